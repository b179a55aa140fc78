"""Unusual, damaged and malicious image files: the documented result and count of each, equal on every rank."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import targets
import torch
from conftest import error_of, graph_files, line_with, lines_with, read_image
from PIL import Image, ImageFile
from runs import brief, run

from mmgraph.data.image_paths import ImagePaths
from mmgraph.data.image_source import MAX_FILE_BYTES, read_file
from mmgraph.data.images import IMAGE_STATUS, OUTSIDE_IMAGE_ROOT, decode_picture
from mmgraph.distributed.launch import peak_memory_gb

Cases = Callable[[int], None]
NOISE = np.random.default_rng(0).integers(0, 256, (61, 83, 4), dtype=np.uint8)
RGB, RGBA = Image.fromarray(NOISE[:, :, :3]), Image.fromarray(NOISE, "RGBA")


def encoded(picture: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(RGB, "JPEG", exif=exif)


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """Return an 8-bit RGB PNG file with this size in the header, which may differ from the size of ``rows``."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def gif(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)  # two colours
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00;"


INTACT = {  # intact: decoded as Pillow decodes them
    "cmyk.jpg": encoded(RGB.convert("CMYK"), "JPEG"),
    "palette.png": encoded(RGB.quantize(32), "PNG"),
    "alpha.png": encoded(RGBA, "PNG"),
    "gray-alpha.png": encoded(RGBA.convert("LA"), "PNG"),
    "one-bit.png": encoded(RGB.convert("1"), "PNG"),
    "16-bit.png": encoded(Image.fromarray(NOISE[:, :, 0].astype(np.uint16) * 257), "PNG"),
    "float.tiff": encoded(RGB.convert("F"), "TIFF"),
    "animated.gif": encoded(RGB, "GIF", save_all=True, append_images=[RGB.rotate(90)]),
    "animated.webp": encoded(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(90)]),
    "animated.png": encoded(RGB, "PNG", save_all=True, append_images=[RGB.rotate(90)]),
    "rotated.jpg": rotated(),
    "1x1.png": encoded(RGB.crop((0, 0, 1, 1)), "PNG"),
    "webp-named.jpg": encoded(RGB, "WEBP"),
    "ppm.ppm": encoded(RGB, "PPM"),
    "tga.tga": encoded(RGB, "TGA"),
    "ico.ico": encoded(RGB.resize((64, 64)), "ICO"),
}
REMARKS = {"alpha.png": "transparent", "gray-alpha.png": "transparent", "16-bit.png": "16-bit grey"}  # of intact images
BLACK = {  # content, image status
    "empty.png": (b"", "unreadable"),
    "html.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "unreadable"),
    "text.jpg": (b"not found\n" * 100, "unreadable"),
    "json.png": (b'{"error": "rate limit"}', "unreadable"),
    "svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unreadable"),
    "postscript.eps": (encoded(RGB, "EPS"), "unreadable"),  # not an allowed format: Pillow would run Ghostscript on it
    "pdf.png": (encoded(RGB, "PDF"), "unreadable"),
    "sgi.sgi": (encoded(RGB, "SGI"), "unreadable"),
    "header.png": (b"\x89PNG\r\n\x1a\n", "unreadable"),
    "zeros.jpg": (bytes(5000), "unreadable"),
    "bomb.png": (png(50_000, 50_000), "too many pixels"),
    "bomb.bmp": (bmp(50_000, 50_000), "too many pixels"),
    "bomb.gif": (gif(50_000, 50_000), "too many pixels"),
    "bomb.ppm": (b"P6 50000 50000 255\n", "too many pixels"),
    "no-rows.png": (png(300, 200), "truncated"),
}


@pytest.mark.fault("images in unusual formats and modes: decoded as Pillow does")
def test_unusual_image_formats(tmp_path: Path, cases: Cases) -> None:
    for name, content in INTACT.items():
        (tmp_path / name).write_bytes(content)
        pixels, status = read_image(str(tmp_path / name))
        expected = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
        assert IMAGE_STATUS[status] == REMARKS.get(name, "")
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected), name
    cases(len(INTACT))


@pytest.mark.fault("files that are not images, or have too many pixels: black, and counted by reason")
def test_undecodable_images_are_black(tmp_path: Path, cases: Cases) -> None:
    for name, (content, expected) in BLACK.items():
        (tmp_path / name).write_bytes(content)
        pixels, status = read_image(str(tmp_path / name), "black")
        assert IMAGE_STATUS[status] == expected and not pixels.any(), (name, IMAGE_STATUS[status])
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    others = {"pipe.png": 2, "sparse.png": 7, "missing.png": 2, "x" * 300: 3, "nul\0.png": 2, ".": 2}
    for name, code in others.items():
        assert read_image(f"{tmp_path}/{name}")[1] == code, name
    for device in ("/dev/zero", "/dev/tty", "/proc/self/mem", "/dev/stdin"):
        assert IMAGE_STATUS[read_image(device)[1]] in ("file not found", "unreadable"), device
    cases(len(BLACK) + len(others) + 4)


@pytest.mark.fault("images truncated at ten lengths: the part that can be decoded, or black")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_images(tmp_path: Path, cases: Cases, kind: str) -> None:
    intact = encoded(RGB, kind)
    for tenth in range(10):
        path = tmp_path / f"{tenth}"
        path.write_bytes(intact[: len(intact) * tenth // 10])
        pixels, status = read_image(str(path))
        assert IMAGE_STATUS[status] in ("truncated", "unreadable")
        if IMAGE_STATUS[status] == "truncated":
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            try:
                expected = np.array(Image.open(path).convert("RGB"))
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
        black, black_status = read_image(str(path), "black")
        assert black_status == status and not black.any()
    cases(20)


@pytest.mark.fault("images with flipped bits: an image or black, never an exception")
@pytest.mark.parametrize("flips", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_flipped_bits(tmp_path: Path, cases: Cases, flips: int) -> None:
    generator, path, tried = torch.Generator().manual_seed(0), tmp_path / "flipped", 0
    for image_format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        intact = bytearray(encoded(RGB, image_format))
        bits = torch.randint(8 * len(intact), (flips // 6,), generator=generator).tolist()
        bits += range(0, 8 * 60, 8 * 60 // (flips // 6) + 1)  # in the headers
        for bit in bits:
            damaged = bytearray(intact)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            pixels, _ = read_image(str(path))
            assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3
            tried += 1
    cases(tried)


@pytest.mark.fault("damaged images decoded by four threads: the same results as one at a time")
def test_decoding_in_threads(cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    intact = encoded(Image.fromarray(noise), "PNG", compress_level=1)
    flipped = bytearray(intact)
    flipped[len(intact) // 2] ^= 0x55  # a wrong checksum, which Pillow ignores if LOAD_TRUNCATED_IMAGES is set
    files = [(intact, ""), (intact[: len(intact) * 4 // 5], "truncated"), (bytes(flipped), "unreadable")]
    alone = [decode_picture(data, 0) for data, _ in files]
    assert [IMAGE_STATUS[status] for _, status in alone] == [expected for _, expected in files]
    with ThreadPoolExecutor(4) as threads:
        decoded = list(threads.map(lambda file: decode_picture(file[0], 0), files * 60))
    for (pixels, status), (expected_pixels, expected) in zip(decoded, alone * 60, strict=True):
        assert status == expected and torch.equal(pixels, expected_pixels)
    begun, go, open_file = threading.Event(), threading.Event(), Image.open

    def waiting_open(*arguments: Any, **named: Any) -> Image.Image:
        if threading.current_thread() is decoding:
            begun.set()
            go.wait()
        return open_file(*arguments, **named)

    monkeypatch.setattr(Image, "open", waiting_open)
    decoding = threading.Thread(target=decode_picture, args=(files[1][0], 0))
    decoding.start()
    assert begun.wait(20)  # the fork happens while the thread decodes
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(IMAGE_STATUS[decode_picture(files[1][0], 0)[1]] != "truncated")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    go.set()
    decoding.join()
    cases(len(decoded) + 1)


MEMORY = f"""
import sys
import torch
{targets.imports(decode_picture, read_file, peak_memory_gb)}
decode_picture(*read_file(sys.argv[1]))
before = peak_memory_gb(torch.device("cpu"))
for path in sys.argv[2:]:
    assert not decode_picture(*read_file(path))[0].any()
print(1e3 * (peak_memory_gb(torch.device("cpu")) - before))
"""


@pytest.mark.slow
@pytest.mark.fault("small files that claim 50,000 x 50,000 pixels: refused from the header (memory is measured)")
def test_memory_of_bombs(tmp_path: Path, cases: Cases) -> None:
    names = [name for name in BLACK if name.startswith("bomb")]
    for name in names:
        (tmp_path / name).write_bytes(BLACK[name][0])
    (tmp_path / "a.png").write_bytes(encoded(RGB, "PNG"))
    paths = [str(tmp_path / name) for name in ("a.png", *names)]
    done = subprocess.run([sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True)
    print(f"four files of 50,000 x 50,000 pixels: {done.stdout.strip()} MB")
    assert float(done.stdout) < 20, done.stderr
    cases(len(names))


def bad_graph(folder: Path) -> tuple[Path, Counter[str]]:
    """Write a graph whose nodes have all of these images. Return its folder, and the number of images by status."""
    graph_files(folder)
    nodes = pd.read_csv(folder / "nodes.csv", dtype=str, keep_default_na=False)
    files = {**{name: (content, "") for name, content in INTACT.items()}, **BLACK}
    paths, statuses = [], Counter[str]()
    for row, (name, (content, status)) in enumerate(files.items()):
        (folder / "images" / f"{row}-{name}").write_bytes(content)
        paths.append(f"images/{row}-{name}")
        statuses[status] += 1
    os.mkfifo(folder / "images/pipe.png")
    paths += ["images/pipe.png", "images/missing.png", "", "images", "../outside.png"]
    statuses += Counter({"file not found": 3, "no image path": 1, "": 1})
    (folder.parent / "outside.png").write_bytes(INTACT["alpha.png"])
    paths += ["images/16.png"] * (len(nodes) - len(paths))
    nodes["image_path"] = paths
    nodes.to_csv(folder / "nodes.csv", index=False)
    ends = [(nodes["node_id"][i % 40], nodes["node_id"][(i * 7 + 3) % 40]) for i in range(200)]  # over all nodes
    pd.DataFrame(ends, columns=["src_id", "dst_id"]).to_csv(folder / "edges.csv", index=False)
    return folder, statuses


@pytest.mark.fault(
    "a run on a graph with all of these images: the same losses on one and two ranks, stored and live; all counted"
)
def test_run_on_bad_images(graph: Path, tmp_path: Path, cases: Cases) -> None:
    bad, statuses = bad_graph(tmp_path / "bad")
    (bad / "towers").symlink_to(graph / "towers")
    statuses.pop("")
    losses = []
    live, threads = ["--tower_cache=off"], ["--num_workers=4", f"--tower_cache={tmp_path / 'another'}"]
    for name, ranks, flags in (("stored", 1, []), ("two", 2, []), ("live", 1, live), ("threads", 1, threads)):
        output = tmp_path / name
        ended = run(brief(bad, output, *flags), ranks=ranks)
        assert ended.codes == [0] * ranks, ended.said
        line = line_with(ended.said, f"{statuses['unreadable']} unreadable")
        for status, count in statuses.items():
            assert lines_with(line, f"{count} {status}"), (status, count, line)
        losses.append([json.loads(row)["loss"] for row in (output / "metrics.jsonl").read_text().splitlines()])
    for other in losses[1:]:
        assert np.allclose(other, losses[0], rtol=0, atol=1e-5)
    cases(4)


@pytest.mark.fault("image paths that leave the image root: read, or refused under --confine_images")
def test_confined_paths(graph: Path, tmp_path: Path, cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "folder").mkdir(parents=True)
    outside.mkdir()
    for path in (root / "in.png", outside / "out.png", tmp_path / "root-too.png"):
        path.write_bytes(encoded(RGB, "PNG"))
    (root / "link.png").symlink_to(outside / "out.png")
    (root / "linked").symlink_to(outside)
    (root / "inner.png").symlink_to(root / "in.png")
    (tmp_path / "alias").symlink_to(root)
    inside = ["in.png", "folder/../in.png", "./in.png", "inner.png", "missing.png", str(root / "in.png"),
              "folder\\..\\in.png"]  # fmt: skip
    leaving = ["../outside/out.png", str(outside / "out.png"), "link.png", "linked/out.png", "..\\outside\\out.png",
               "../root-too.png", "/etc/passwd", "nul\0.png", "../root", "linked/missing.png"]  # fmt: skip
    monkeypatch.chdir(tmp_path)  # without an image root, paths are also searched below the working directory
    for confined in (ImagePaths("x/nodes.csv", root, True), ImagePaths(root / "nodes.csv", None, True),
                     ImagePaths("x", tmp_path / "alias", True)):  # fmt: skip
        assert not [path for path in inside if confined.resolve(path) == OUTSIDE_IMAGE_ROOT]
        assert [path for path in leaving if confined.resolve(path) == OUTSIDE_IMAGE_ROOT] == leaving
    free = ImagePaths("x/nodes.csv", root)
    assert not [path for path in leaving if free.resolve(path) == OUTSIDE_IMAGE_ROOT]
    assert read_image(free.resolve("../outside/out.png"))[1] == 0
    assert IMAGE_STATUS[read_image(OUTSIDE_IMAGE_ROOT)[1]] == "outside the image root"
    assert ImagePaths("x/nodes.csv", root, True).resolve(" ") is None
    cases(3 * (len(inside) + len(leaving)))

    bad, _ = bad_graph(tmp_path / "bad")
    # The confined run must not use cached tokens of the image outside, which the unconfined run has stored.
    for flags in ([], ["--tower_cache=off"]):
        output = tmp_path / f"run{len(flags)}"
        flags = [*brief(graph, output, *flags), f"--nodes={bad / 'nodes.csv'}", f"--edges={bad / 'edges.csv'}"]
        assert "outside the image root" not in run(flags).said
        refused = run([*flags, "--confine_images"])
        assert refused.code == 2 and error_of(refused.said, "confine_images", False, True)
        ended = run([*flags, "--confine_images", f"--output_dir={output}-confined"])
        assert ended.code == 0 and "1 outside the image root" in ended.said, ended.said


@pytest.mark.fault("a run whose image files are mostly bad: ended by --max_bad_images on every rank")
def test_mostly_bad_images(graph: Path, tmp_path: Path, cases: Cases) -> None:
    bad, _ = bad_graph(tmp_path / "bad")
    more = [f"--nodes={bad / 'nodes.csv'}", f"--edges={bad / 'edges.csv'}"]
    for ranks in (1, 2):
        flags = [*brief(graph, tmp_path / f"run{ranks}", "--tower_cache=off"), *more]
        ended = run([*flags, "--max_bad_images=0.3"], ranks=ranks)
        errors = lines_with(ended.said, "mmgraph: error:", "4 too many pixels", "--max_bad_images", 0.3)
        assert ended.codes == [2] * ranks and len(errors) == ranks and "Traceback" not in ended.said, ended.said
        assert run([*flags, "--max_bad_images=0.6"], ranks=ranks).codes == [0] * ranks
    cases(4)
