"""Files that several processes create: once and complete, with and without locks."""

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from mmgraph.utils.files import claim_file, create_once, write_durably


def make_slowly(path: Path, byte: bytes, locks: bool) -> None:
    if not locks:

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSYS, "no locks")

        fcntl.lockf = refuse  # this function runs in a separate process

    def make(file: object) -> None:
        for _ in range(50):
            file.write(byte * 1000)  # type: ignore[attr-defined]
            file.flush()  # type: ignore[attr-defined]
            time.sleep(0.005)

    create_once(path, make)
    assert set(path.read_bytes()) == {path.read_bytes()[0]} and path.stat().st_size == 50_000


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_several_processes_create_one_complete_file(tmp_path: Path, locks: bool) -> None:
    path = tmp_path / "made"
    processes = [multiprocessing.Process(target=make_slowly, args=(path, bytes([i]), locks)) for i in range(3)]
    for process in processes:
        process.start()
        time.sleep(0.05)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [file.name for file in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("why", ["no locks", "another user's"])
def test_the_first_to_finish_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """Without a common lock, the process that finishes second does not replace the file: it may already be mapped."""
    path, lock_file = tmp_path / "made", tmp_path / ".made.tmp"
    if why == "no locks":
        monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "")))
    else:
        lock_file.touch()
        opened = os.open
        refused = PermissionError(errno.EACCES, "")
        monkeypatch.setattr(
            "os.open", lambda p, *more: (_ for _ in ()).throw(refused) if p == lock_file else opened(p, *more)
        )
    with claim_file(path) as first:
        assert first is not None
        with claim_file(path) as second:
            assert second is not None
            second.write(b"done first")
        inode = path.stat().st_ino
    assert path.read_bytes() == b"done first" and path.stat().st_ino == inode
    assert lock_file.exists() == (why != "no locks") and len(list(tmp_path.iterdir())) == 1 + lock_file.exists()


def test_a_failed_lock_keeps_the_claim_of_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process cannot lock the file, for example because the lock table is full."""
    path = tmp_path / "made"
    with claim_file(path) as first:
        assert first is not None
        monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "")))
        with claim_file(path) as second:
            assert second is not None
            second.write(b"whole")
        first.write(b"whole")
    assert path.read_bytes() == b"whole" and [file.name for file in tmp_path.iterdir()] == ["made"]


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), claim_file(tmp_path / "a") as file:
        assert file is not None
        file.write(b"half")
        raise RuntimeError
    for shared in (False, True):
        with pytest.raises(RuntimeError):
            write_durably(tmp_path / "b", fail, shared)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_not_created_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("there")
    with claim_file(tmp_path / "a") as file:
        assert file is None
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
