"""run.sh and its summary, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def script(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(FOLDER / "run.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environment})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepp"], "unknown part stepp"),
        (["--wheels"], "--wheels needs a folder"),
        (["--wheels", "/none"], "no wheels"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = script(*arguments, *(() if arguments == ["--wheels"] else ("--out", tmp_path, "--work", tmp_path)))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("run.sh: error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_help_names_the_parts() -> None:
    done = script("--help")
    assert done.returncode == 0 and "versions step runs store bench zero demo compile" in done.stdout


def test_a_part_without_a_gpu_is_skipped_and_not_passed(tmp_path: Path) -> None:
    """It has not passed, so the next start would run it again. A part that has passed is not run again."""
    arguments = ("bench", "--out", tmp_path / "out", "--work", tmp_path / "work")
    environment = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    status = tmp_path / "work/parts/bench.status"
    done = script(*arguments, **environment)
    assert done.returncode == 0 and "skipped: no CUDA device" in done.stdout, done.stdout + done.stderr
    assert status.read_text().startswith("skipped, ")
    status.write_text("passed, 3 s\n")
    done = script(*arguments, **environment)
    assert done.returncode == 0 and "bench: passed before" in done.stdout and "no CUDA device" not in done.stdout


def test_the_summary_has_a_row_for_each_test(tmp_path: Path) -> None:
    parts, bench, out = tmp_path / "parts", tmp_path / "bench", tmp_path / "out"
    for folder in (parts, bench, out):
        folder.mkdir()
    (parts / "step.status").write_text("failed (exit code 1), 12 s\n")
    (parts / "step.log").write_text("the log\n")
    (parts / "step.xml").write_text(
        '<testsuites><testsuite><testcase name="a" time="1.5"/><testcase name="b"><failure/></testcase>'
        '<testcase name="c"><skipped message="no CUDA device"/></testcase></testsuite></testsuites>'
    )
    (parts / "zero.status").write_text("stopped after 540 s, 541 s\n")
    (parts / "zero.log").write_text("")
    (bench / "gpu_loss.json").write_text('{"rows": []}')
    done = subprocess.run([sys.executable, FOLDER / "summary.py", tmp_path, out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (out / "summary.txt").read_text()
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines == [
        ["step:", "failed", "(exit", "code", "1),", "12", "s"],
        ["1", "passed,", "1", "failure,", "1", "skipped"],
        ["passed", "1.5", "s", "a"],
        ["failure", "0.0", "s", "b"],
        ["skipped", "0.0", "s", "c", "(no", "CUDA", "device)"],
        ["zero:", "stopped", "after", "540", "s,", "541", "s"],
    ]
    assert "the log" in (out / "tests.log").read_text()
    assert json.loads((out / "bench.json").read_text()) == {"gpu_loss": {"rows": []}}
