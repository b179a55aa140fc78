"""Files of features in each format, against the formats' own libraries."""

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
def test_formats_are_their_libraries_own(tmp_path: Path, kind: str) -> None:
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
        [(name, found)] = load_file(path).items()
        assert name == "fused" and torch.equal(found, VECTORS)
    else:
        table = pq.read_table(path)
        assert table["node_id"].to_pylist() == IDS
        assert np.array_equal(np.stack(table["vector"].to_numpy()), VECTORS.numpy())
    found, names = read_features(path)
    assert torch.equal(found, VECTORS) and names == (IDS if kind == "parquet" else None)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("kind", FORMATS)
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"features_fused.{kind}"
    path.write_bytes(b"older")

    def failing() -> object:
        yield blocks()[0]
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        list(write_features(path, (1000, 7), failing(), ids()))  # type: ignore[arg-type]
    assert path.read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1


def test_other_files_are_told(tmp_path: Path) -> None:
    torch.save({"a": VECTORS}, tmp_path / "dict.pt")
    torch.save(torch.arange(5), tmp_path / "flat.pt")
    torch.save(torch.zeros(1, 1).expand(10**6, 10**6), tmp_path / "huge.pt")
    torch.save(torch.empty(10**6, 10**6, device="meta"), tmp_path / "meta.pt")
    torch.save(VECTORS, tmp_path / "features_old.pt", _use_new_zipfile_serialization=False)
    assert find_features([tmp_path / "features_old.pt"]) == [tmp_path / "features_old.pt"]  # no checkpoint
    (tmp_path / "broken.npy").write_bytes(b"x")
    (tmp_path / "table.csv").write_text("a,b\n")
    for name, *facts in (
        ("huge.pt",), ("meta.pt",), ("dict.pt",), ("flat.pt",), ("broken.npy", "Error: "), ("none.pt",),
        ("table.csv", *(f".{kind}" for kind in FORMATS)), ("features_old.pt", "Error: ", "zip"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            read_features(tmp_path / name)
        told = str(caught.value)
        assert told.startswith(str(tmp_path / name)) and "\n" not in told and all(fact in told for fact in facts), told
        assert ("Error: " in told) == ("Error: " in facts)  # what a library could not read, and what is another thing
