"""Files that several processes make: once, whole, with and without locks."""

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from mmgraph.utils.files import claim_file, make_once, write_durably


def make_slowly(path: Path, byte: bytes, locks: bool) -> None:
    if not locks:

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSYS, "no locks")

        fcntl.lockf = refuse  # in a process of its own

    def make(file: object) -> None:
        for _ in range(50):
            file.write(byte * 1000)  # type: ignore[attr-defined]
            file.flush()  # type: ignore[attr-defined]
            time.sleep(0.005)

    make_once(path, make)
    assert set(path.read_bytes()) == {path.read_bytes()[0]} and path.stat().st_size == 50_000


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_several_makers_leave_one_whole_file(tmp_path: Path, locks: bool) -> None:
    path = tmp_path / "made"
    makers = [multiprocessing.Process(target=make_slowly, args=(path, bytes([i]), locks)) for i in range(3)]
    for maker in makers:
        maker.start()
        time.sleep(0.05)
    for maker in makers:
        maker.join()
        assert maker.exitcode == 0
    assert [file.name for file in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("why", ["no locks", "another user's"])
def test_the_first_to_be_done_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """What is there may be mapped by then: it must stay the same file."""
    path, makers_own = tmp_path / "made", tmp_path / ".made.tmp"
    if why == "no locks":
        monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "")))
    else:
        makers_own.touch()
        opened = os.open
        refused = PermissionError(errno.EACCES, "")
        monkeypatch.setattr(
            "os.open", lambda p, *more: (_ for _ in ()).throw(refused) if p == makers_own else opened(p, *more)
        )
    with claim_file(path) as first:
        assert first is not None
        with claim_file(path) as second:
            assert second is not None
            second.write(b"done first")
        inode = path.stat().st_ino
    assert path.read_bytes() == b"done first" and path.stat().st_ino == inode
    assert makers_own.exists() == (why != "no locks") and len(list(tmp_path.iterdir())) == 1 + makers_own.exists()


def test_a_lock_that_fails_removes_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that got one: such as where a table of locks is full."""
    path = tmp_path / "made"
    with claim_file(path) as first:
        assert first is not None
        monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "")))
        with claim_file(path) as second:
            assert second is not None
            second.write(b"whole")
        first.write(b"whole")
    assert path.read_bytes() == b"whole" and [file.name for file in tmp_path.iterdir()] == ["made"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
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


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("there")
    with claim_file(tmp_path / "a") as file:
        assert file is None
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
