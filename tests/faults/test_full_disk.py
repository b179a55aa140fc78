"""Disks that are full, over a quota, or broken.

The run ends with one error line, keeps what it has saved, and can be resumed once the disk works again.
"""

import errno
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import targets
from conftest import lines_with
from runs import brief, check_same, count, each, run, valid_steps

from mmgraph.cli import main
from mmgraph.inference.feature_files import FORMATS, read_features

SAVING = [targets.SAVE]
LOGGING = [targets.RECORD_ROW]
NO_SPACE = os.strerror(errno.ENOSPC)
Cases = Callable[[int], None]


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path]:
    """Mount a disk of ``size`` bytes at ``folder`` while the block runs."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def filled(disk: Path, free: int) -> Iterator[None]:
    """Fill a disk while the block runs, so that only ``free`` bytes are left."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - free))
    yield
    filler.unlink()


@pytest.fixture(scope="module")
def reference(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Output folders of runs on one and two ranks without faults."""
    outputs = {ranks: tmp_path_factory.mktemp("reference") / f"{ranks}" for ranks in (1, 2)}
    for ranks, output in outputs.items():
        assert run(brief(graph, output), ranks=ranks).codes == [0] * ranks
    return outputs


def one_line(text: str) -> str:
    """Return the only error line of rank 0, and check that there is no traceback. Lines of other ranks say "rank"."""
    assert "Traceback" not in text, text
    [line] = [line for line in text.splitlines() if "error:" in line and "rank" not in line]
    return line


@pytest.mark.fault("a full disk (tmpfs) during a save of an epoch file, a state, or metrics")
@pytest.mark.parametrize("sizes", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_full_disk_in_a_save(graph: Path, reference: dict[int, Path], tmp_path: Path, cases: Cases, sizes: int) -> None:
    run_size = sum(path.stat().st_size for path in reference[1].rglob("*") if path.is_file())

    def check(number: int) -> None:
        ranks = 1 + number % 2
        with tmpfs(tmp_path / f"{number}", 2 * run_size) as disk:
            output = disk / "run"
            interrupted = run(brief(graph, output), ("after_step", {"step": 5, "action": "SIGTERM"}), ranks=ranks)
            assert interrupted.codes == [143] * ranks, interrupted.said
            states = valid_steps(output)
            files = {path: path.read_bytes() for path in (output / "checkpoints").iterdir()}
            # From the free space that the check at the start requires, up to 4.3 MB less than a complete run needs.
            with filled(disk, 4_700_000 + number * (run_size - 9_000_000) // sizes):
                stopped = run(brief(graph, output), ranks=ranks)
                assert all(code in (1, 2) for code in stopped.codes), stopped
                error_line = one_line(stopped.said)  # of the check at the start, or of a write
                # PyTorch's error for a full disk has no errno: torch.save's file is recognized by its name.
                has_reason = NO_SPACE in error_line or re.search(r"--output_dir .*\d MB|\.pt\.", error_line)
                assert str(output) in error_line and has_reason, error_line
                assert set(valid_steps(output)) & set(states) or max(valid_steps(output)) > max(states)
                assert all(path.read_bytes() == content for path, content in files.items())
                assert not list(output.rglob("*.tmp*"))
            resumed = run(brief(graph, output), ranks=ranks)
            assert resumed.codes == [0] * ranks, resumed.said
            check_same(output, reference[ranks])

    cases(each(range(sizes), check))


@pytest.mark.fault("a failing write, sync or rename during a save (no space, quota, I/O error)")
@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_errors_in_a_save(graph: Path, reference: dict[int, Path], tmp_path: Path, cases: Cases, every: int) -> None:
    def check(number: int) -> None:
        output, ranks = tmp_path / f"{number}", 1 + (number % 4 == 0)
        action = ("full", "quota", "broken")[number % 3]
        call = {"inside": SAVING, "number": number, "action": action, "rank": 0}
        stopped = run(brief(graph, output), ("at_file_call", call), ranks=ranks)
        if stopped.codes != [0] * ranks:  # an error while metadata is read does not end the run
            assert stopped.codes == [1] * ranks, stopped.said
            assert str(output) in one_line(stopped.said)
        assert not list(output.rglob("*.tmp*"))
        resumed = run(brief(graph, output), ranks=ranks)
        assert resumed.codes == [0] * ranks, resumed.said
        check_same(output, reference[ranks], was_done=True)

    cases(each(range(1, count(graph, tmp_path, SAVING) + 1, every), check))


@pytest.mark.fault("a full disk while metrics and log lines are written")
@pytest.mark.slow
@pytest.mark.parametrize("every", [3])
def test_full_disk_while_logging(
    graph: Path, reference: dict[int, Path], tmp_path: Path, cases: Cases, every: int
) -> None:
    def check(number: int) -> None:
        output, ranks = tmp_path / f"{number}", 1 + number % 2
        call = {"inside": LOGGING, "number": number, "action": "full", "rank": 0}
        flags = brief(graph, output, "--log_every=1", "--log_buffer_size=1")
        stopped = run(flags, ("at_file_call", call), ranks=ranks)
        log = (output / "training_log.txt").read_text()
        if stopped.codes != [0] * ranks:
            assert stopped.codes == [1] * ranks, stopped.said
            assert str(output) in one_line(stopped.said)
        assert run(flags, ranks=ranks).codes == [0] * ranks
        check_same(output, reference[ranks])
        assert (output / "training_log.txt").read_text().startswith(log)

    flags = ("--log_every=1", "--log_buffer_size=1")
    cases(each(range(1, count(graph, tmp_path, LOGGING, *flags) + 1, every), check))


@pytest.mark.fault("a text log on a full disk: no line twice, no partial line")
def test_log_has_no_partial_line(tmp_path: Path) -> None:
    from mmgraph.utils.log import flush_log, log, log_file

    with log_file(tmp_path / "earlier.txt"):
        pass  # takes the buffered lines of earlier tests
    with tmpfs(tmp_path / "disk", 64 << 10) as disk, log_file(disk / "log.txt", size=1):
        log("first")
        with filled(disk, 4096):
            (disk / "page").write_bytes(b"0" * 4096)
            log("x" * 20_000)
            with pytest.raises(OSError, match=NO_SPACE):
                flush_log()
            assert (disk / "log.txt").read_text() == "first\n"
        (disk / "page").unlink()
        log("last")
        assert (disk / "log.txt").read_text().split() == ["first", "x" * 20_000, "last"]


@pytest.mark.fault("a full disk while the tower store is built")
@pytest.mark.parametrize(
    "free_bytes", [(100_000,), pytest.param((0, 100_000, 300_000), marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_full_disk_in_the_store_build(
    graph: Path, reference: dict[int, Path], tmp_path: Path, cases: Cases, free_bytes: tuple[int, ...]
) -> None:
    tried = 0
    for ranks in (1, 2):
        for free in free_bytes:
            with tmpfs(tmp_path / f"{ranks}-{free}", 20_000_000) as disk:
                output, cache = tmp_path / f"run-{ranks}-{free}", {"MMGRAPH_CACHE": str(disk / "cache")}
                flags = brief(graph, output, f"--tower_cache={disk / 'store'}")
                with filled(disk, free):
                    stopped = run(flags, ranks=ranks, environment=cache)
                    assert all(code in (1, 2) for code in stopped.codes), stopped.said
                    assert str(disk) in one_line(stopped.said)
                assert run(flags, ranks=ranks, environment=cache).codes == [0] * ranks
                check_same(output, reference[ranks])
                tried += 1
    cases(tried)


@pytest.mark.fault("a full disk while embeddings are written: shards, then each file format")
def test_full_disk_in_encode(
    graph: Path, reference: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], cases: Cases
) -> None:
    tried = 0
    for file_format in FORMATS:
        with tmpfs(tmp_path / file_format, 1_000_000) as disk:
            command = ["encode", str(reference[1]), f"--format={file_format}", f"--output_dir={disk}/features"]
            for free in (0, 60_000, 100_000):
                with filled(disk, free):
                    code = main(command)
                    stderr = capsys.readouterr().err
                    assert code == 1 or (code == 0 and free == 100_000), stderr
                    assert code == 0 or f"{disk}/features: " in one_line(stderr), stderr
                    assert not list(disk.rglob("*.tmp*"))
                tried += 1
            assert main(command) == 0
            assert read_features(disk / f"features/features_fused.{file_format}")[0].shape == (40, 16)
    cases(tried)


@pytest.mark.fault("a closed terminal, a closed pipe, or a full disk under the printed output: training continues")
@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_lost_output(graph: Path, reference: dict[int, Path], tmp_path: Path, cases: Cases, every: int) -> None:
    def check(case: tuple[str, int]) -> None:
        kind, ranks = case
        output = tmp_path / f"{kind}-{ranks}"
        lost = ("lost_output", {"step": 5, "kind": kind, "rank": 0})
        ended = run(brief(graph, output, "--log_every=1"), lost, ranks=ranks)
        assert ended.codes == [0] * ranks, ended
        check_same(output, reference[ranks])
        log = (output / "training_log.txt").read_text()
        assert [f"step {step}/12" in log for step in range(1, 13)] == [True] * 12
        assert lines_with(log.splitlines()[-1], output / "checkpoints/multimodal_encoder_final.pt")

    cases(each(list(itertools.product(("terminal", "pipe", "full"), (1, 2)))[::every], check))


@pytest.mark.fault("a full disk at the start of a run: one line, nothing written")
def test_full_disk_at_the_start(graph: Path, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", 4_000_000) as disk:
        refused = run(brief(graph, disk / "run"))
        assert refused.code == 2 and lines_with(one_line(refused.said), "--output_dir", disk / "run", "4 MB")
        assert not (disk / "run").exists()
