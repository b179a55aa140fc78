"""A run under load: memory of every process, open files and shared memory stay flat."""

from pathlib import Path

import pytest
from load import growth, load


@pytest.mark.fault("a long run under load: resident memory, open files and /dev/shm of every process stay constant")
@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "edges", "minutes"), [(2_000, 20_000, 0.5), (200_000, 2_000_000, 30.0)])
def test_flat(tmp_path: Path, nodes: int, edges: int, minutes: float) -> None:
    samples = load(tmp_path, nodes, edges, minutes, every=minutes * 60 / 60)
    families = {len(sample.resident) for sample in samples[1:]}
    assert families == {3}  # the launcher and two ranks
    columns = list(zip(*(sample.resident for sample in samples[1:]), strict=True))
    print("growth of the last third, MB:", [round(growth(list(column)), 2) for column in columns])
    assert all(growth(list(column)) < 0.02 * column[-1] for column in columns)
    assert samples[-1].files == samples[len(samples) // 3].files
    assert samples[-1].shared - samples[len(samples) // 3].shared < 0.1
