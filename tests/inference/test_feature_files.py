"""Feature files in each format, read by mmgraph and by the formats' libraries."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from mmgraph.errors import UserError
from mmgraph.evaluation.command import find_features
from mmgraph.inference.feature_files import FORMATS, read_features, write_features

VECTORS = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0))
IDS = [f"{i:04d}" for i in range(1000)]


def blocks() -> list[np.ndarray]:
    return [part.numpy() for part in VECTORS.split(64)]


def ids() -> list[pa.ChunkedArray]:
    return [pa.chunked_array([pa.array(IDS[i : i + 64])]) for i in range(0, 1000, 64)]


@pytest.mark.parametrize("kind", FORMATS)
def test_files_are_readable_by_their_libraries(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"features_fused.{kind}"
    assert sum(write_features(path, (1000, 7), blocks(), ids())) == 1000
    if kind == "pt":
        for mapped in (False, True):
            assert torch.equal(torch.load(path, weights_only=True, mmap=mapped), VECTORS)
        torch.save(VECTORS, tmp_path / "plain.pt")
        assert path.stat().st_size - (tmp_path / "plain.pt").stat().st_size in range(-200, 200)
    elif kind == "npy":
        assert np.array_equal(np.load(path), VECTORS.numpy())
        assert np.array_equal(np.load(path, mmap_mode="r"), VECTORS.numpy())
    elif kind == "safetensors":
        [(name, vectors)] = load_file(path).items()
        assert name == "fused" and torch.equal(vectors, VECTORS)
    else:
        table = pq.read_table(path)
        assert table["node_id"].to_pylist() == IDS
        assert np.array_equal(np.stack(table["vector"].to_numpy()), VECTORS.numpy())
    vectors, names = read_features(path)
    assert torch.equal(vectors, VECTORS) and names == (IDS if kind == "parquet" else None)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("kind", FORMATS)
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"features_fused.{kind}"
    path.write_bytes(b"older")

    def failing() -> object:
        yield blocks()[0]
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        list(write_features(path, (1000, 7), failing(), ids()))  # type: ignore[arg-type]
    assert path.read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1


def test_errors_for_other_files(tmp_path: Path) -> None:
    torch.save({"a": VECTORS}, tmp_path / "dict.pt")
    torch.save(torch.arange(5), tmp_path / "flat.pt")
    torch.save(torch.zeros(1, 1).expand(10**6, 10**6), tmp_path / "huge.pt")
    torch.save(torch.empty(10**6, 10**6, device="meta"), tmp_path / "meta.pt")
    torch.save(VECTORS, tmp_path / "features_old.pt", _use_new_zipfile_serialization=False)
    assert find_features([tmp_path / "features_old.pt"]) == [tmp_path / "features_old.pt"]  # not taken for a checkpoint
    (tmp_path / "broken.npy").write_bytes(b"x")
    (tmp_path / "table.csv").write_text("a,b\n")
    for name, *facts in (
        ("huge.pt",), ("meta.pt",), ("dict.pt",), ("flat.pt",), ("broken.npy", "Error: "), ("none.pt",),
        ("table.csv", *(f".{kind}" for kind in FORMATS)), ("features_old.pt", "Error: ", "zip"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            read_features(tmp_path / name)
        text = str(caught.value)
        assert text.startswith(str(tmp_path / name)) and "\n" not in text and all(fact in text for fact in facts), text
        # A library's error is included only if the library could not read the file.
        assert ("Error: " in text) == ("Error: " in facts)
