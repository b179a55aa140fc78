"""Decoded images equal Pillow's and CLIP's, and bad image files never raise."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_image
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmgraph.data.images import IMAGE_STATUS
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.preprocessing import Preprocessing
from mmgraph.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (60, 83, 4), dtype=np.uint8)


def pictures() -> dict[str, bytes]:
    """Return one file of every image format and mode that is decoded differently."""
    rgb, rgba = Image.fromarray(NOISE[:, :, :3]), Image.fromarray(NOISE, "RGBA")
    files: dict[str, bytes] = {}

    def save(name: str, picture: Image.Image, kind: str, **options: object) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        files[name] = buffer.getvalue()

    save("rgb.jpg", rgb, "JPEG")
    save("progressive.jpg", rgb, "JPEG", progressive=True)
    save("gray.jpg", rgb.convert("L"), "JPEG")
    save("cmyk.jpg", rgb.convert("CMYK"), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees; the original trainer ignores this tag too
    save("rotated.jpg", rgb, "JPEG", exif=exif)
    save("rgb.png", rgb, "PNG")
    save("rgba.png", rgba, "PNG")
    save("gray.png", rgb.convert("L"), "PNG")
    save("gray_alpha.png", rgba.convert("LA"), "PNG")
    save("palette.png", rgb.quantize(32), "PNG")
    save("palette_transparent.png", rgb.quantize(32), "PNG", transparency=bytes(range(32)))
    save("one_bit.png", rgb.convert("1"), "PNG")
    save("gray16.png", Image.fromarray(NOISE[:, :, 0].astype(np.uint16) * 257), "PNG")
    save("animated.gif", rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)])
    save("lossy.webp", rgb, "WEBP")
    save("rgba.webp", rgba, "WEBP", lossless=True)
    save("picture.bmp", rgb, "BMP")
    save("picture.tiff", rgb, "TIFF")
    return files


@pytest.mark.parametrize("name", list(pictures()))
def test_pixels_equal_pillow(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(pictures()[name])
    tensor, cause = read_image(str(path))
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert cause == 0 and tensor.dtype == torch.uint8
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("size", [(60, 83), (83, 60), (224, 224), (225, 300), (301, 224), (10, 9), (500, 401)])
def test_preprocessing_equals_clip(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    preprocessing = Preprocessing(CLIPImageProcessor())
    ours = preprocessing.normalize(preprocessing.resize(torch.from_numpy(pixels).permute(2, 0, 1))[None])
    assert ours.shape == (1, 3, 224, 224) and ours.dtype == torch.float32
    for processor, tolerance in ((CLIPImageProcessor(), 1e-5), (CLIPImageProcessorPil(), 0.031)):
        theirs = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        assert (ours - theirs).abs().max() <= tolerance


def test_other_preprocessing_is_refused() -> None:
    with pytest.raises(UserError, match=r"^CLIPImageProcessor\b[^\n]*$"):  # one line that starts with the class name
        Preprocessing(CLIPImageProcessor(size={"height": 224, "width": 224}))


@pytest.mark.parametrize("name", ["rgb.jpg", "rgb.png", "palette.png"])
def test_truncated_file_is_decoded_in_part(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(pictures()[name][: len(pictures()[name]) // 2])
    tensor, cause = read_image(str(path))
    assert IMAGE_STATUS[cause] == "truncated" and tensor.shape == (3, 60, 83)
    assert tensor[:, :10].float().std() > 0 and tensor[:, -5:].float().std(dim=(1, 2)).max() == 0
    black, cause = read_image(str(path), truncated="black")
    assert IMAGE_STATUS[cause] == "truncated" and black.shape == (3, 224, 224) and not black.any()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "file not found"),
        (b"", "unreadable"),
        (b"text", "unreadable"),
        (b"\x89PNG\r\n\x1a\n", "unreadable"),
    ],
)
def test_bad_files_are_black(content: bytes | None, cause: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    tensor, code = read_image(str(tmp_path / "a.png"))
    assert IMAGE_STATUS[code] == cause and tensor.shape == (3, 224, 224) and not tensor.any()
    assert IMAGE_STATUS[read_image(None)[1]] == "no image path"
    assert IMAGE_STATUS[read_image(str(tmp_path))[1]] == "file not found"  # a folder


def test_decompression_bomb_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(pictures()["rgb.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 83 // 2 - 1)  # Pillow refuses above twice this
    assert IMAGE_STATUS[read_image(str(tmp_path / "a.png"))[1]] == "too many pixels"


def test_image_too_thin_to_resize_is_black(tmp_path: Path) -> None:
    Image.new("RGB", (1, 20_000)).save(tmp_path / "thin.png")
    inputs = NodeInputs(None, CLIPImageProcessor(), 1)
    pictures, causes = inputs.read_images([str(tmp_path / "thin.png")])
    assert pictures.shape == (1, 3, 224, 224) and [IMAGE_STATUS[cause] for cause in causes] == ["too many pixels"]
