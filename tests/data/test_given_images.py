"""Images and texts that callers of the public collators pass in node dicts: accepted types, refused ones, warnings."""

import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from launches import run_warm
from PIL import Image

from mmgraph import InferenceCollator, InputRules, MultimodalCollator
from mmgraph.errors import UserError

SIDE = 32  # equal to the crop of the processor, so that no pixel is resized
GENERATOR = np.random.default_rng(0)
RGBA = GENERATOR.integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
RGB, GREY = RGBA[:, :, :3].copy(), RGBA[:, :, 0].copy()
GREY16 = GENERATOR.integers(0, 2000, (SIDE, SIDE), dtype=np.uint16)
MEAN, STD = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.25, 0.2, 0.3], np.float32)


class Processor:
    """An image processor with only the attributes that a collator needs."""

    size, crop_size, resample = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}, 3
    image_mean, image_std = MEAN.tolist(), STD.tolist()


class Tokenizer:
    """Records the texts, and returns constant tokens."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        self.texts += texts
        return dict.fromkeys(("input_ids", "attention_mask"), torch.ones(len(texts), 77, dtype=torch.int64))


def normalized(rgb: np.ndarray) -> np.ndarray:
    """Return the ``pixel_values`` of an image: (S, S, 3) uint8 -> (3, S, S) float32."""
    return ((rgb.astype(np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)


BLACK = normalized(np.zeros((SIDE, SIDE, 3), np.uint8))


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def pixel_values(image: Any) -> np.ndarray:
    """Return the pixels of one node from both collators, which must agree."""
    node = {"short_name": "a", "image_path": image}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = InferenceCollator(Tokenizer(), Processor())([node])["pixel_values"]
        pair = MultimodalCollator(Tokenizer(), Processor())([(node, node)])["pixel_values"]
    assert alone.shape == (1, 3, SIDE, SIDE) and pair.shape == (2, 3, SIDE, SIDE)
    assert torch.equal(pair[0], alone[0]) and torch.equal(pair[1], alone[0])
    return alone[0].numpy()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The color image, as a file."""
    Image.fromarray(RGB).save(tmp_path / "color.png")
    Image.fromarray(GREY).save(tmp_path / "other.png")
    return tmp_path / "color.png"


FORMS = {  # an image_path with the color image, made of its file
    "str": str,
    "str with backslashes": lambda file: str(file).replace("/", "\\"),
    "Path": lambda file: file,
    "Pillow image of a file": lambda file: Image.open(file),
    "Pillow image in memory": lambda file: Image.fromarray(RGB),
    "bytes": lambda file: file.read_bytes(),
    "bytearray": lambda file: bytearray(file.read_bytes()),
    "memoryview": lambda file: memoryview(file.read_bytes()),
    "array": lambda file: RGB,
    "array in column order": lambda file: np.asfortranarray(RGB),
    "part of an array": lambda file: np.repeat(np.repeat(RGB, 2, 0), 2, 1)[::2, ::2],
    "array that cannot be written": lambda file: np.frombuffer(RGB.tobytes(), np.uint8).reshape(RGB.shape),
    "dict with bytes": lambda file: {"bytes": file.read_bytes(), "path": None},
    "dict with bytes only": lambda file: {"bytes": file.read_bytes()},
    "dict with path": lambda file: {"bytes": None, "path": str(file)},
    "dict with path only": lambda file: {"path": str(file)},
    "dict with both": lambda file: {"bytes": file.read_bytes(), "path": str(file.with_name("other.png"))},
    "dict with bytes and a URL": lambda file: {"bytes": file.read_bytes(), "path": "https://a.b/c.png"},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_an_image_has_the_pixels_of_its_file(form: str, file: Path) -> None:
    assert np.allclose(pixel_values(FORMS[form](file)), normalized(RGB), atol=1e-6)


@pytest.mark.parametrize(
    ("array", "rgb"),
    [
        pytest.param(GREY, np.stack([GREY] * 3, 2), id="(H, W)"),
        pytest.param(GREY[:, :, None], np.stack([GREY] * 3, 2), id="(H, W, 1)"),
        pytest.param(RGB, RGB, id="(H, W, 3)"),
        pytest.param(RGBA, RGB, id="(H, W, 4)"),  # the transparency is dropped
        pytest.param(GREY16, np.stack([np.minimum(GREY16, 255).astype(np.uint8)] * 3, 2), id="(H, W) uint16"),
    ],
)
def test_arrays_have_the_pixels_of_a_png_file(array: np.ndarray, rgb: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(array.squeeze()).save(tmp_path / "a.png")
    assert np.allclose(pixel_values(array), normalized(rgb), atol=1e-6)
    assert np.array_equal(pixel_values(str(tmp_path / "a.png")), pixel_values(array))


def test_rules_apply_to_given_images() -> None:
    """A white ground under transparent pixels, and 16-bit values divided by 257."""
    rules = InputRules(background="white", sixteen_bit_images="scale")
    shape = np.zeros_like(RGBA)
    shape[:, :9, 3] = 255
    nodes = [{"short_name": "a", "image_path": image} for image in (shape, GREY16 * 30)]
    white, grey = InferenceCollator(Tokenizer(), Processor(), rules=rules)(nodes)["pixel_values"].numpy()
    expected = np.full_like(RGB, 255)
    expected[:, :9] = 0
    assert np.allclose(white, normalized(expected), atol=1e-6)
    scaled = np.rint(GREY16 * 30 / 257).astype(np.uint8)
    assert np.allclose(grey, normalized(np.stack([scaled] * 3, 2)), atol=1e-6)


@pytest.mark.parametrize(
    "image",
    [None, float("nan"), np.float64("nan"), np.float32("nan"), pd.NA, "", "  ", {"bytes": None, "path": None}],
    ids=repr,
)
def test_a_missing_image_is_black_without_a_warning(image: Any) -> None:
    assert np.allclose(pixel_values(image), BLACK, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InferenceCollator(Tokenizer(), Processor())([{"short_name": "a", "image_path": image}])


@pytest.mark.parametrize(
    ("image", "facts"),
    [
        ("https://example.org/a.png", ["'https://example.org/a.png'", "URL"]),
        ({"bytes": None, "path": "s3://bucket/a.png"}, ["'s3://bucket/a.png'", "URL"]),
        (["a.png"], ["list"]),
        (("a.png",), ["tuple"]),
        (7, ["int"]),
        (True, ["bool"]),
        (1.5, ["float"]),
        (torch.zeros(3, SIDE, SIDE), ["Tensor"]),
        ({}, ["dict"]),
        ({"url": "a.png"}, ["dict"]),
        ({"bytes": None, "path": 7}, ["int"]),
        (np.zeros((SIDE, SIDE, 3)), ["(32, 32, 3)", "float64"]),
        (np.zeros((SIDE, SIDE), bool), ["(32, 32)", "bool"]),
        (np.zeros((3, SIDE, SIDE), np.uint8), ["(3, 32, 32)", "uint8"]),
        (np.zeros((SIDE, SIDE, 2), np.uint8), ["(32, 32, 2)", "uint8"]),
        (np.zeros((SIDE, SIDE, 3), np.uint16), ["(32, 32, 3)", "uint16"]),
        (np.zeros(SIDE, np.uint8), ["(32,)", "uint8"]),
        (np.zeros((0, SIDE), np.uint8), ["(0, 32)", "uint8"]),
        (np.array("a.png"), ["()", "<U5"]),
    ],
    ids=lambda value: None if isinstance(value, list) else type(value).__name__,
)
def test_another_type_of_image_is_an_error_that_names_it(image: Any, facts: list[str]) -> None:
    node = {"short_name": "a", "image_path": image}
    for collate in (
        lambda: InferenceCollator(Tokenizer(), Processor())([node]),
        lambda: MultimodalCollator(Tokenizer(), Processor())([(node, {**node, "image_path": None})]),
    ):
        with pytest.raises(UserError) as caught:
            collate()
        message = str(caught.value)
        assert message.startswith("image_path ") and "\n" not in message
        assert all(re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", message) for fact in facts), message


A, B = {"short_name": "a", "image_path": None}, {"short_name": "b", "summary": "s", "image_path": None}


@pytest.mark.parametrize(
    ("nodes", "key", "found", "near"),
    [
        ([{"short_name": "a", "image_pth": "a.png"}], "image_path", "image_pth", "image_pth"),
        ([{"short_name": "a", "img": "a.png"}], "image_path", "img", "img"),
        ([{"short_name": "a", "Image": b""}], "image_path", "Image", "Image"),
        ([{"short_name": "a", "image_url": "https://a.b/c.png"}], "image_path", "image_url", "image_url"),
        ([{"short_name": "a", "picture-file": "a.png"}], "image_path", "picture-file", "picture-file"),
        ([A, {"short_name": "b"}], "image_path", "short_name", None),
        ([{"short_name": "b"}, A], "image_path", "short_name", None),
        ([{"short_name": "a", "sumary": "a text", "image_path": None}], "summary", "sumary", "sumary"),
        ([{"shortname": "a", "image_path": None}], "short_name", "shortname", "shortname"),
        ([A, B], "summary", "image_path", None),
        ([{"title": "a", "image_path": None}], "short_name", "title", None),
        ([{}, A], "image_path", "no other key", None),
    ],
)
def test_a_missing_key_is_an_error_that_names_it(
    nodes: list[dict[str, Any]], key: str, found: str, near: str | None
) -> None:
    """The message names the missing key, the keys of the node, and a key that resembles the missing one, if any."""
    for collate in (
        lambda: InferenceCollator(Tokenizer(), Processor())(nodes),
        lambda: MultimodalCollator(Tokenizer(), Processor())([(node, node) for node in nodes]),
    ):
        with pytest.raises(UserError) as caught:
            collate()
        message = str(caught.value)
        assert f"no key '{key}'" in message and found in message and "\n" not in message
        assert (f"did you mean '{near}'?" in message) == (near is not None) == ("did you mean" in message)
        # The hint is a sentence or clause of its own.
        assert message.endswith(
            f"{'?' if near else ';'} {'Set' if near else 'set'} '{key}' to None for a node without it"
        )


def test_a_missing_text_column_is_an_error() -> None:
    """With ``text_columns``, each node needs these keys."""
    collate = InferenceCollator(Tokenizer(), Processor(), rules=InputRules(text_columns="title,body"))
    with pytest.raises(UserError, match=r"no key 'title', only body, image_path\b"):
        collate([{"body": "b", "image_path": None}])
    with pytest.raises(UserError, match=r"no key 'body'.*did you mean 'bodi'\?"):
        collate([{"title": "b", "bodi": "b", "image_path": None}])
    collate([{"title": "a", "body": None, "image_path": None}])
    assert collate.inputs.tokenizer.texts == ["a"]


@pytest.mark.parametrize(
    ("node", "text"),
    [
        ({"short_name": "a text only"}, "a text only"),
        ({"summary": "a summary of five words"}, "a summary of five words"),
        ({"image_path": None}, " "),
        ({}, " "),
        ({"short_name": 1984, "image_path": None}, "1984"),
        ({"short_name": np.int64(7), "summary": None}, "7"),
        ({"short_name": 2.5, "summary": float("nan")}, "2.5"),
        ({"short_name": "a", "summary": pd.NA}, "a"),
        ({"short_name": pd.NaT, "summary": np.float32("nan")}, " "),
        ({"short_name": "a", "summary": "one two three"}, "a"),
        ({"short_name": "a", "image_path": None, "node_id": 3, "degree": 5}, "a"),
        ({"image_path": None, "node_id": 3}, " "),
        ({"short_name": "a", "has_image": False, "picture_book": "yes", "imagined": 1}, "a"),
    ],
    ids=str,
)
def test_texts_of_nodes(node: dict[str, Any], text: str) -> None:
    tokenizer = Tokenizer()
    assert InferenceCollator(tokenizer, Processor())([node])["pixel_values"].shape == (1, 3, SIDE, SIDE)
    assert tokenizer.texts == [text]


def test_an_empty_batch_is_an_error() -> None:
    for collate in (InferenceCollator(Tokenizer(), Processor()), InferenceCollator(Tokenizer(), Processor()).inputs):
        with pytest.raises(UserError, match=r"^[^\n]*\bno nodes\b[^\n]*$"):
            collate([])


@pytest.mark.parametrize(
    ("node", "facts"),
    [
        ({"short_name": ["a", "b"]}, ["short_name", "list", "a"]),
        ({"short_name": "a", "summary": {"en": "a"}}, ["summary", "dict"]),
        ({"short_name": b"a"}, ["short_name", "bytes"]),
        ({"short_name": np.array(["a"])}, ["short_name", "ndarray"]),
    ],
    ids=str,
)
def test_another_type_of_text_is_an_error_that_names_it(node: dict[str, Any], facts: list[str]) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*" + r"\b[^\n]*\b".join(facts) + r"\b[^\n]*$"):
        InferenceCollator(Tokenizer(), Processor())([node])


def record_warnings(batches: list[list[dict[str, Any]]]) -> list[warnings.WarningMessage]:
    """Return the warnings of one collator over several batches."""
    collate = InferenceCollator(Tokenizer(), Processor())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches:
            collate(batch)
    return caught


def nodes_of(*images: Any) -> list[dict[str, Any]]:
    return [{"short_name": "a", "image_path": image} for image in images]


def test_missing_files_warn_once(file: Path) -> None:
    """The warning has the counts and the first path of the first batch with a missing file, and the caller's line."""
    gone = [str(file.with_name(f"gone{i}.png")) for i in range(4)]
    (file.parent / "text.png").write_bytes(b"no picture")
    batches = [
        nodes_of(str(file), None),
        nodes_of(None, str(file), gone[0], gone[1], str(file.parent / "text.png")),
        nodes_of(gone[2], gone[3]),
    ]
    [warning] = record_warnings([*batches, *batches])
    message = str(warning.message)
    assert re.search(r"\b5 nodes\b.*\b2 file not found, 1 unreadable\b", message), message
    assert gone[0] in message and gone[1] not in message and "\n" not in message
    assert warning.category is UserWarning and warning.filename == __file__
    with pytest.warns(UserWarning, match=r"\b2 nodes\b.*\b1 file not found\b.*gone0\.png"):
        MultimodalCollator(Tokenizer(), Processor())([tuple(nodes_of(gone[0], None))])


@pytest.mark.parametrize(
    "image", [b"no picture", b"", {"bytes": b"", "path": None}, {"bytes": b"", "path": "a.png"}], ids=str
)
def test_bytes_that_are_no_image_are_black_and_warned(image: Any) -> None:
    """Empty bytes are a damaged image, not a missing one."""
    [warning] = record_warnings([nodes_of(image, encoded(Image.fromarray(RGB))), nodes_of(image)])
    assert re.search(r"\b2 nodes\b.*\b1 unreadable\b", str(warning.message)) and "such as" not in str(warning.message)
    assert np.allclose(pixel_values(image), BLACK, atol=1e-6)


@pytest.mark.parametrize("image", ["file", "bytes", "Pillow image"])
def test_truncated_images_are_warned(image: str, tmp_path: Path) -> None:
    """A file and bytes give the part that can be decoded, a Pillow image gives black."""
    half = encoded(Image.fromarray(RGB))[:1500]
    (tmp_path / "half.png").write_bytes(half)
    given = {"file": str(tmp_path / "half.png"), "bytes": half, "Pillow image": Image.open(tmp_path / "half.png")}[
        image
    ]
    [warning] = record_warnings([nodes_of(given)])
    status = "unreadable" if image == "Pillow image" else "truncated"
    assert re.search(rf"\b1 {status}\b", str(warning.message))
    if image != "Pillow image":
        assert np.allclose(pixel_values(given)[:, :8], normalized(RGB)[:, :8], atol=1e-6)


def test_each_image_status_warns_once(file: Path) -> None:
    """A warning does not hide a later one about images of another status."""
    shape = np.zeros((SIDE, SIDE, 4), np.uint8)
    shape[8:24, 8:24, 3] = 255
    batches = [nodes_of(shape, Image.fromarray(RGBA)), nodes_of(str(file.with_name("gone.png"))), nodes_of(GREY16)]
    batches.append(nodes_of(b"no picture", str(file.with_name("gone.png")), RGBA))
    first, second, third, fourth = (str(warning.message) for warning in record_warnings([*batches, *batches]))
    assert re.search(r"\b2 images\b.*\b1\b.*\bsingle color\b.*--background\b", first)
    assert re.search(r"\b1 file not found\b.*gone\.png", second)
    assert re.search(r"\b1 greyscale images\b.*--sixteen_bit_images\b", third)
    assert "1 unreadable" in fourth and "not found" not in fourth and "such as" not in fourth


def test_complete_images_do_not_warn(file: Path) -> None:
    opaque = np.dstack([RGB, np.full((SIDE, SIDE), 255, np.uint8)])
    assert not record_warnings([nodes_of(str(file), opaque, GREY, None)])


WORKER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_given_images import Processor, Tokenizer
from torch.utils.data import DataLoader
from mmgraph import InferenceCollator
nodes = [{{"short_name": "a", "image_path": None if i % 2 else f"gone{{i}}.png"}} for i in range(12)]
for batch in DataLoader(nodes, 4, collate_fn=InferenceCollator(Tokenizer(), Processor()), num_workers=1):
    print(tuple(batch["pixel_values"].shape))
"""


def test_a_worker_process_warns_once(tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(WORKER)
    ended = run_warm([str(tmp_path / "load.py")])
    assert ended.code == 0 and ended.stdout == "(4, 3, 32, 32)\n" * 3, ended
    [line] = [line for line in ended.stderr.splitlines() if "UserWarning" in line]
    assert re.search(r"\b4 nodes\b.*\b2 file not found\b.*\bgone0\.png\b", line), ended.stderr
