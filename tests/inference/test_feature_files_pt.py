""".pt feature files: complete zip archives, written in constant memory, with no files left after an error."""

import resource
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from mmgraph.inference.feature_files import write_features

VECTORS = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0))


def blocks() -> list[np.ndarray]:
    return [part.numpy() for part in VECTORS.split(64)]


def test_the_archive_is_complete_and_loads_with_torch(tmp_path: Path) -> None:
    path = tmp_path / "features_fused.pt"
    assert sum(write_features(path, (1000, 7), blocks(), [])) == 1000
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    for mapped in (False, True):
        vectors = torch.load(path, weights_only=True, mmap=mapped)
        assert torch.equal(vectors, VECTORS) and vectors.dtype == torch.float32 and vectors.is_contiguous()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# A copy of the vectors, on the heap or in private pages, would exceed the limit.
WRITE = """
import resource, sys
from pathlib import Path
import numpy as np
from mmgraph.inference.feature_files import write_features
def write(rows):
    block = np.full((10_000, 256), 0.5, np.float32)
    return sum(write_features(Path(sys.argv[1]), (rows, 256), (block for _ in range(rows // 10_000)), []))
assert write(10_000) == 10_000
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (32 << 20),) * 2)
assert write(150_000) == 150_000
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_vectors(tmp_path: Path) -> None:
    """Writing 150 MB of vectors succeeds with 32 MB more memory than the process uses after writing 10 MB."""
    path = tmp_path / "features_fused.pt"
    done = subprocess.run([sys.executable, "-c", WRITE, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    vectors = torch.load(path, weights_only=True, mmap=True)
    assert vectors.shape == (150_000, 256) and vectors[-1, -1] == 0.5


def failing_blocks() -> Iterator[np.ndarray]:
    yield blocks()[0]
    raise OSError("No space left on device")


def too_few_blocks() -> Iterator[np.ndarray]:
    yield blocks()[0]


@pytest.mark.parametrize(("source", "kind"), [(failing_blocks, OSError), (too_few_blocks, ValueError)])
def test_missing_vectors_keep_the_old_file(tmp_path: Path, source: type, kind: type[Exception]) -> None:
    path = tmp_path / "features_fused.pt"
    path.write_bytes(b"older")
    with pytest.raises(kind):
        list(write_features(path, (1000, 7), source(), []))
    assert path.read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Make writes beyond ``size`` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10_000, 28_100], ids=["raw file", "torch.save"])
def test_a_full_disk_is_an_os_error(tmp_path: Path, size: int) -> None:
    with pytest.raises(OSError) as caught, files_up_to(size):
        list(write_features(tmp_path / "features_fused.pt", (1000, 7), blocks(), []))
    assert ("torch.save" in str(caught.value)) == (size > 4 * VECTORS.numel())
    assert list(tmp_path.iterdir()) == []
