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

from mmgraph.data.images import IMAGE_STATUS, convert_picture, decode_picture
from mmgraph.data.input_rules import InputRules
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


# Remarks on complete images. All other images in pictures() have none.
REMARKS = {
    **dict.fromkeys(("rgba.png", "gray_alpha.png", "palette_transparent.png", "rgba.webp"), "transparent"),
    "gray16.png": "16-bit grey",
}


@pytest.mark.parametrize("name", list(pictures()))
def test_pixels_equal_pillow(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(pictures()[name])
    tensor, cause = read_image(str(path))
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert IMAGE_STATUS[cause] == REMARKS.get(name, "") and tensor.dtype == torch.uint8
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


ALPHA = NOISE[:, :, 3].copy()
ALPHA[:20], ALPHA[20:40] = 0, 255  # the rest: from 0 to 255
KEY = (200, 7, 9)  # color that a tRNS chunk makes transparent


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def transparent_pictures() -> dict[str, tuple[bytes, np.ndarray, np.ndarray]]:
    """Return a file of each mode with transparency, its colors (H, W, 3), and its alpha values (H, W), by name."""
    rgb, grey, indices = NOISE[:, :, :3], NOISE[:, :, 0], NOISE[:, :, 0] % 8
    rgba = np.dstack([rgb, ALPHA])
    palette = NOISE[0, :8, :3]
    alphas = np.array([0, 30, 60, 128, 200, 254, 255, 255], np.uint8)
    indexed = Image.frombytes("P", (83, 60), indices.tobytes())
    indexed.putpalette(palette.tobytes())
    keyed = rgb.copy()
    keyed[:30] = KEY
    binary = np.where(indices == 3, 0, 255)
    keyed_alpha = np.where((keyed == KEY).all(axis=2), 0, 255)
    gray3 = np.stack([grey] * 3, 2)
    return {
        "rgba.png": (encoded(Image.fromarray(rgba), "PNG"), rgb, ALPHA),
        "rgba.webp": (encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True), rgb, ALPHA),
        "rgba.tiff": (encoded(Image.fromarray(rgba), "TIFF"), rgb, ALPHA),
        "la.png": (encoded(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(ALPHA)]), "PNG"), gray3, ALPHA),
        "p.png": (encoded(indexed, "PNG", transparency=alphas.tobytes()), palette[indices], alphas[indices]),
        "p_index.png": (encoded(indexed, "PNG", transparency=3), palette[indices], binary),
        "p.gif": (encoded(indexed, "GIF", transparency=3), palette[indices], binary),
        "rgb_key.png": (encoded(Image.fromarray(keyed), "PNG", transparency=KEY), keyed, keyed_alpha),
        "l_key.png": (
            encoded(Image.fromarray(grey), "PNG", transparency=77), gray3, np.where(grey == 77, 0, 255),
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("background", "color"), [("white", (255, 255, 255)), ("255,0,0", (255, 0, 0)), ("1, 2,3", (1, 2, 3))]
)
@pytest.mark.parametrize("name", list(transparent_pictures()))
def test_background_is_composited_under_transparent_pixels(
    name: str, background: str, color: tuple[int, int, int]
) -> None:
    """The reference is computed in float64 from the colors and alpha values that the file was made of."""
    data, rgb, alpha = transparent_pictures()[name]
    share = alpha[:, :, None] / 255
    expected = (rgb * share + np.array(color) * (1 - share)).transpose(2, 0, 1)
    pixels, status = decode_picture(data, 0, InputRules(background=background))
    assert IMAGE_STATUS[status] == "transparent" and pixels.dtype == torch.uint8
    assert np.abs(pixels.numpy() - expected).max() <= 1
    opaque = np.broadcast_to(alpha == 255, expected.shape)
    assert np.array_equal(pixels.numpy()[opaque], expected[opaque])
    opened, opened_status = convert_picture(Image.open(io.BytesIO(data)), InputRules(background=background))
    assert torch.equal(opened, pixels) and opened_status == status


@pytest.mark.parametrize("name", list(transparent_pictures()))
def test_keep_drops_the_transparency_as_pillow_does(name: str) -> None:
    data, rgb, alpha = transparent_pictures()[name]
    pixels, status = decode_picture(data, 0)
    assert IMAGE_STATUS[status] == "transparent"
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy()[alpha > 0], rgb[alpha > 0])


def test_a_black_shape_on_a_transparent_ground() -> None:
    shape = np.zeros((20, 30, 4), np.uint8)
    shape[5:15, 10:20, 3] = 255
    data = encoded(Image.fromarray(shape), "PNG")
    kept, status = decode_picture(data, 0)
    assert not kept.any() and kept.shape == (3, 20, 30) and IMAGE_STATUS[status] == "transparent, one color"
    white, status = decode_picture(data, 0, InputRules(background="white"))
    assert IMAGE_STATUS[status] == "transparent"
    assert np.array_equal(white.numpy(), np.broadcast_to(np.where(shape[:, :, 3], 0, 255), (3, 20, 30)))
    black, status = decode_picture(data, 0, InputRules(background="0,0,0"))
    assert not black.any() and IMAGE_STATUS[status] == "transparent, one color"


@pytest.mark.parametrize("background", ["keep", "white"])
def test_an_opaque_image_with_an_alpha_channel_has_no_remark(background: str) -> None:
    opaque = np.dstack([NOISE[:, :, :3], np.full((60, 83), 255, np.uint8)])
    one_color = np.full((60, 83, 4), 255, np.uint8)
    indexed = Image.fromarray(NOISE[:, :, 0] % 8, "P")
    indexed.putpalette(NOISE[0, :8, :3].tobytes())
    for picture, options in (
        (Image.fromarray(opaque), {}),
        (Image.fromarray(one_color), {}),
        (Image.fromarray(opaque).convert("LA"), {}),
        (indexed, {"transparency": bytes([255] * 8)}),
        (Image.fromarray(NOISE[:, :, :3]), {"transparency": (1, 1, 1)}),  # no pixel has this color
    ):
        data = encoded(picture, "PNG", **options)
        pixels, status = decode_picture(data, 0, InputRules(background=background))
        assert status == 0
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("background", ["keep", "white"])
def test_a_truncated_transparent_image_is_truncated(background: str) -> None:
    data = encoded(Image.fromarray(np.dstack([NOISE[:, :, :3], ALPHA])), "PNG")
    part, status = decode_picture(data[: len(data) * 3 // 4], 0, InputRules(background=background))
    assert IMAGE_STATUS[status] == "truncated" and part.shape == (3, 60, 83)
    whole, _ = decode_picture(data, 0, InputRules(background=background))
    assert torch.equal(part[:, :35], whole[:, :35])
    black, status = decode_picture(data[: len(data) // 2], 0, InputRules("black", background))
    assert IMAGE_STATUS[status] == "truncated" and not black.any()


def sixteen_bit_pictures() -> dict[str, tuple[bytes, np.ndarray]]:
    """Return a file of each format with 16 bits of grey, and its values (H, W)."""
    values = np.random.default_rng(1).integers(0, 1 << 16, (60, 83)).astype(np.uint16)
    values[0, :6] = [0, 128, 255, 256, 65_534, 65_535]
    values[1] = np.arange(83) * 257 + np.resize([128, 129], 83)  # on both sides of a half
    big_endian = Image.frombytes("I;16B", (83, 60), values.astype(">u2").tobytes())
    return {
        "16.png": (encoded(Image.fromarray(values), "PNG"), values),
        "16.tiff": (encoded(Image.fromarray(values), "TIFF"), values),
        "16_big_endian.tiff": (encoded(big_endian, "TIFF"), values),
        "16.pgm": (b"P5 83 60 65535\n" + values.astype(">u2").tobytes(), values),  # Pillow's mode I, not I;16
    }


@pytest.mark.parametrize("name", list(sixteen_bit_pictures()))
def test_sixteen_bits_of_grey(name: str) -> None:
    data, values = sixteen_bit_pictures()[name]
    clipped = np.minimum(values, 255)
    pillow = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    scaled = np.rint(values / 257)
    for rule, expected, remark in (("clip", clipped, "16-bit grey"), ("scale", scaled, "")):
        rules = InputRules(sixteen_bit_images=rule)
        opened = convert_picture(Image.open(io.BytesIO(data)), rules)
        for pixels, status in (decode_picture(data, 0, rules), opened):
            assert IMAGE_STATUS[status] == remark and pixels.dtype == torch.uint8
            assert np.array_equal(pixels.numpy(), np.broadcast_to(expected, (3, 60, 83)))
    assert np.array_equal(pillow, np.broadcast_to(clipped, (3, 60, 83)))


@pytest.mark.parametrize(
    ("values", "clip", "scale"),  # whether values are lost
    [
        pytest.param(np.arange(256, dtype=np.uint16), False, False, id="16 bits, up to 255"),
        pytest.param(np.arange(257, dtype=np.uint16), True, False, id="16 bits, up to 256"),
        pytest.param(np.arange(256, dtype=np.int32), False, False, id="32 bits, up to 255"),
        pytest.param(np.array([0, 65_535], np.int32), True, False, id="32 bits, up to 65,535"),
        pytest.param(np.array([0, 65_536], np.int32), True, True, id="32 bits, up to 65,536"),
        pytest.param(np.array([0.0, 1.0], np.float32), True, True, id="float, up to 1"),
        pytest.param(np.array([0.0, 255.0], np.float32), False, False, id="float, up to 255"),
        pytest.param(np.array([0.0, 300.0], np.float32), True, True, id="float, up to 300"),
        pytest.param(np.zeros(4, np.float32), False, False, id="float, black"),
    ],
)
def test_grey_images_have_a_remark_if_values_are_lost(values: np.ndarray, clip: bool, scale: bool) -> None:
    """Images with 16 or 32 bits or floating-point numbers; a TIFF file can have each."""
    picture = Image.fromarray(values[None])
    for rule, lost in (("clip", clip), ("scale", scale)):
        pixels, status = decode_picture(encoded(picture, "TIFF"), 0, InputRules(sixteen_bit_images=rule))
        assert IMAGE_STATUS[status] == ("16-bit grey" if lost else "")
        if rule == "clip":
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(picture.convert("RGB")))


def test_other_images_are_equal_under_all_rules() -> None:
    """The rules change only images with transparency or with 16 bits of grey."""
    rules = InputRules("black", "white", "scale", "short_name")
    for name, data in pictures().items():
        if name not in REMARKS:
            (first, status), (second, other) = decode_picture(data, 0), decode_picture(data, 0, rules)
            assert torch.equal(first, second) and status == other == 0, name
