"""The buffered log: the number of writes, and no lost lines."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import write_pending_log
from targets import LOG_FILE
from torch.utils.data import DataLoader, Dataset

from mmgraph import flush_log, log
from mmgraph.utils.log import log_file


@pytest.fixture(autouse=True)
def empty_buffer(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Write the buffered lines of other tests to a separate file, so that no test here writes them to its log."""
    write_pending_log(tmp_path_factory.mktemp("before") / "log.txt")


def count_writes(path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Log 1,000 messages. Returns how often the log file is opened."""
    opened = 0
    open_path = Path.open

    def counting(self: Path, *args: object, **kwargs: object) -> object:
        nonlocal opened
        opened += self == path
        return open_path(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", counting)
        with log_file(path, size):
            for i in range(1000):
                log("message", i)
    assert path.read_text().splitlines() == [f"message {i}" for i in range(1000)]
    return opened


def test_threads_lose_no_line(tmp_path: Path) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with log_file(tmp_path / "log.txt", 3), ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda name: [log(name, i) for i in range(2000)], "ab"))
    finally:
        sys.setswitchinterval(before)
    assert sorted((tmp_path / "log.txt").read_text().splitlines()) == sorted(
        f"{n} {i}" for n in "ab" for i in range(2000)
    )


def test_a_tenth_of_the_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffered = count_writes(tmp_path / "buffered.txt", 10, monkeypatch)
    unbuffered = count_writes(tmp_path / "unbuffered.txt", 1, monkeypatch)
    print(f"{buffered} writes a thousand messages against {unbuffered}")
    assert unbuffered == 1000 and buffered <= unbuffered / 10


def test_lines_are_printed_immediately_and_written_in_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.txt"
    with log_file(path, 3):
        log("a", 1, sep="-")
        log("b")
        assert capsys.readouterr().out == "a-1\nb\n" and not path.exists()
        log("c", end="!\n")
        assert path.read_text() == "a-1\nb\nc!\n"
        log("d")
        flush_log()
        assert path.read_text().endswith("d\n")
        log("e")
    assert path.read_text() == "a-1\nb\nc!\nd\ne\n"


def test_lines_logged_before_a_run_are_written_by_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log("before the file is open")
    flush_log()
    assert "before" in capsys.readouterr().out
    with log_file(tmp_path / "log.txt"):
        pass
    assert (tmp_path / "log.txt").read_text() == "before the file is open\n"
    with log_file(tmp_path / "second.txt"):
        pass
    assert not (tmp_path / "second.txt").exists()


def test_an_exception_loses_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), log_file(tmp_path / "log.txt"):
        log("last words")
        raise RuntimeError
    assert (tmp_path / "log.txt").read_text() == "last words\n"


@pytest.mark.parametrize("end", ["sys.exit(3)", "raise ValueError", "pass"])
def test_exit_loses_nothing(tmp_path: Path, end: str) -> None:
    """The log is also written if the interpreter exits inside the ``log_file`` block."""
    code = f"""
import sys
from pkgutil import resolve_name
from mmgraph import log
manager = resolve_name({LOG_FILE!r})({str(tmp_path / "log.txt")!r})
manager.__enter__()
log("one")
{end}
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (tmp_path / "log.txt").read_text() == "one\n"


def test_other_ranks_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with log_file(tmp_path / "log.txt"):
        log("from rank 1")
    assert capsys.readouterr().out == "" and not (tmp_path / "log.txt").exists()


class LoggingDataset(Dataset[int]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> int:
        log("from a worker")
        return i


def test_workers_and_forks_do_not_write(tmp_path: Path) -> None:
    with log_file(tmp_path / "log.txt"):
        log("once")
        assert len(list(DataLoader(LoggingDataset(), num_workers=1, multiprocessing_context="fork"))) == 2
        child = os.fork()
        if child == 0:
            flush_log()
            os._exit(0)
        os.waitpid(child, 0)
    assert (tmp_path / "log.txt").read_text() == "once\n"
