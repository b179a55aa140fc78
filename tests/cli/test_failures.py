"""Errors that are printed as one line, and errors that keep their traceback."""

import errno
import os
from pathlib import Path

import pytest

from mmgraph.bench.report import report
from mmgraph.cli import failures
from mmgraph.cli.failures import ENVIRONMENT_ERRORS, run
from mmgraph.errors import RunError, UserError


def raising(error: Exception) -> int:
    raise error


@pytest.mark.parametrize(
    "number",
    [
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE,
        errno.ENOLCK, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
    ],
    ids=errno.errorcode.get,
)  # fmt: skip
def test_errors_of_the_machine_are_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(number, os.strerror(number), "runs/a/state.json")
    assert run(lambda: raising(error)) == 1
    assert capsys.readouterr().err == f"mmgraph: error: {error}\n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EBADF, "Bad file descriptor"),
        OSError(errno.EINVAL, "Invalid argument"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "internal"),
        OSError("without a number"),
        ValueError("no OSError at all"),
    ],
    ids=repr,
)
def test_a_bug_keeps_its_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)) as caught:
        run(lambda: raising(error))
    assert caught.value is error and capsys.readouterr().err == ""


def test_a_bug_is_printed_if_exit_hooks_may_hang(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``run`` prints the traceback and returns a code, so that the caller can end the process without the hooks."""
    monkeypatch.setattr(failures, "hooks_may_hang", lambda: True)
    assert run(lambda: raising(ValueError("a bug"))) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("ValueError: a bug\n") and "in raising" in err


@pytest.mark.parametrize(("error", "code"), [(UserError("no such file"), 2), (RunError("no room"), 1)])
def test_errors_for_the_user_have_their_exit_code(
    error: UserError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda: raising(error)) == code
    assert capsys.readouterr().err == f"mmgraph: error: {error}\n"


def test_errors_of_bugs_are_not_errors_of_the_machine() -> None:
    assert not ENVIRONMENT_ERRORS & {errno.EBADF, errno.EINVAL, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, None}


def test_a_missing_folder_for_json_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> int:
        report("title", [{"name": "a", "ms": 1.0}], {}, tmp_path / "nowhere/figures.json")
        return 0

    assert run(action) == 1
    err = capsys.readouterr().err
    assert "nowhere/figures.json: No such file" in err and "; set --json" in err and err.count("\n") == 1
