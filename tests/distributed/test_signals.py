"""Stop signals, dead ranks and hanging ranks in real launches.

All ranks end within seconds, the reason is printed, and the run can be resumed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import targets
import torch.distributed as dist
from conftest import LOSSES, PACKAGE, line_with, lines_with, read_metrics, settings, stop_lines
from launches import REPOSITORY, SCRIPT, TESTS, launch_command, run, run_warm

from mmgraph.distributed.signals import StopRequest

LAUNCHED = str(TESTS / "faults/launched.py")  # launch.py with the faults in the variable FAULTS
TESTS_PATH = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
ZERO2 = "deepspeed_zero2.yaml --num_processes 2 --mixed_precision no"


def ranks_of(launcher: psutil.Process) -> dict[int, psutil.Process]:
    """Return the training processes of a launch by rank. A single process has no variable ``RANK`` and is rank 0."""
    return {
        int(child.environ().get("RANK", "0")): child
        for child in launcher.children(recursive=True)
        if str(REPOSITORY / "launch.py") in child.cmdline() and child.ppid() == launcher.pid
    }


@contextmanager
def training(
    config: str, output: Path, *flags: str
) -> Iterator[tuple[subprocess.Popen[str], dict[int, psutil.Process]]]:
    """Start a launch in its own process group, and wait for its first steps. Kill all its processes at the end."""
    command = launch_command(config, *flags)
    with (output.parent / f"{output.name}.out").open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None, printed(output)
        time.sleep(0.05)
    ranks = ranks_of(psutil.Process(process.pid))
    try:
        yield process, ranks
    finally:
        for victim in [*ranks.values(), process]:
            if victim.pid and psutil.pid_exists(victim.pid):
                victim.kill()
        process.wait()


def printed(output: Path) -> str:
    """Return what the launch with this output folder printed."""
    return (output.parent / f"{output.name}.out").read_text()


def ended(process: subprocess.Popen[str], ranks: dict[int, psutil.Process], within: float) -> int:
    """Wait until launcher and ranks have exited. Return the launcher's exit code."""
    start = time.monotonic()
    code = process.wait(timeout=within)
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=max(0, within - (time.monotonic() - start)))
    assert not alive, "orphans"
    return code


@pytest.fixture
def endless(graph: Path, tmp_path: Path) -> list[str]:
    """Flags of a run that ends only when it is stopped. It writes states at the stop and at the end of each epoch."""
    return settings(graph, tmp_path / "run", "--max_steps=100000", "--epochs=100000", "--save_every=0")


CASES = [("cpu_2proc.yaml", signal.SIGTERM, "group", 1)]  # config, signal, receiver, the launcher's exit code
ONE_PROCESS = ("cpu.yaml", signal.SIGTERM, "launcher", -signal.SIGTERM)
MORE = [
    (config, number, target, code)
    for config in ("cpu_2proc.yaml", ZERO2)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for target, code in (
        ("launcher", -number if number == signal.SIGUSR1 else 1),
        ("group", -number if number == signal.SIGUSR1 else 1),
        ("rank", 1),
    )
    if (config, number, target, code) not in CASES
]


@pytest.mark.parametrize(
    ("config", "number", "target", "code"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in [ONE_PROCESS, *MORE])],
)
def test_a_signal_stops_all_ranks_together(
    endless: list[str], tmp_path: Path, config: str, number: signal.Signals, target: str, code: int
) -> None:
    output = tmp_path / "run"
    with training(config, output, *endless) as (process, ranks):
        for _ in range(2):  # the second signal must have no effect
            if target == "group":
                os.killpg(process.pid, number)
            elif target == "launcher":
                process.send_signal(number)
            else:
                ranks[max(ranks)].send_signal(number)
            time.sleep(0.01)
        assert ended(process, ranks, 20) == code, printed(output)
    steps = [row["step"] for row in read_metrics(output)]
    assert steps == list(range(1, len(steps) + 1)) and (output / f"state/step-{len(steps):08d}/state.json").exists()
    assert len(stop_lines(printed(output), len(steps))) == 1
    log = (output / "training_log.txt").read_text()
    assert stop_lines(log, len(steps)) == [log.splitlines()[-1]]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_2proc.yaml", ZERO2])
def test_a_killed_rank_ends_the_run_and_is_named(endless: list[str], tmp_path: Path, config: str) -> None:
    with training(config, tmp_path / "run", *endless) as (process, ranks):
        ranks[1].kill()
        assert ended(process, ranks, 20) == 1
    text = printed(tmp_path / "run")
    [error_line] = lines_with(text, "mmgraph: error:", "rank 0")
    assert "--collective_timeout" not in error_line and "exitcode  : -9" in text and "rank      : 1" in text
    assert PACKAGE not in text  # no traceback from this package


@pytest.mark.slow
def test_a_hanging_rank_ends_the_run(endless: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    with training("cpu_2proc.yaml", output, *endless, "--collective_timeout=4") as (process, ranks):
        ranks[1].suspend()
        assert ended(process, ranks, 4 + 35) == 1
    assert line_with(printed(output), "mmgraph: error:", "rank 0", "--collective_timeout")


@pytest.mark.slow
def test_watchdog_ends_a_rank_if_the_other_rank_hangs(graph: Path, endless: list[str], tmp_path: Path) -> None:
    """Rank 0 gets a stop signal, but cannot finish its step because rank 1 hangs. The watchdog of rank 0 ends it."""
    output = tmp_path / "run"
    header, *edges = (graph / "edges.csv").read_text().splitlines()
    # Long epochs, so that rank 1 does not hang in the save at the end of an epoch.
    (tmp_path / "edges.csv").write_text("\n".join([header, *edges * 500]))
    flags = [*endless, f"--edges={tmp_path / 'edges.csv'}", "--stop_grace=2"]
    with training("cpu_2proc.yaml", output, *flags) as (process, ranks):
        ranks[1].suspend()
        ranks[0].terminate()
        ranks[0].wait(timeout=12)  # --stop_grace is 15 s otherwise
        ranks[1].kill()
        ended(process, ranks, 20)
    assert line_with(printed(output), "mmgraph:", "rank 0", "2 s", "--stop_grace")


SLOW_STEPS = f"""
import os, signal, time
{targets.imports(StopRequest)}
stop = StopRequest(0.4)
with stop.listening():
    for _ in range(2):
        time.sleep(1)
        stop.step_finished()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    stop.step_finished()
    with stop.pause_watchdog():
        time.sleep(2)
    print("saved", flush=True)
    time.sleep(20)
"""


def test_watchdog_allows_slow_steps_and_a_slow_save() -> None:
    """With a grace of 0.4 s, the watchdog allows steps of 1 s and a save of 2 s. It ends the 20 s wait after them."""
    start = time.monotonic()
    done = run([sys.executable, "-c", SLOW_STEPS])
    assert done.stdout == "saved\n" and done.returncode == 143 and time.monotonic() - start < 25
    assert line_with(done.stderr, "rank 0", "0.4 s", "--stop_grace")


FAILS = f"""
import os, signal
{targets.imports(StopRequest)}
try:
    with StopRequest(1).listening():
        raise ValueError
except ValueError:
    os.kill(os.getpid(), signal.SIGTERM)
print("goes on", flush=True)
"""


def test_only_a_launched_rank_ignores_sigterm_after_an_error() -> None:
    """A launched rank must still print its error after the launcher's SIGTERM. Other processes end at SIGTERM."""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    for variables, code, stdout in (({}, -signal.SIGTERM, ""), ({"RANK": "0"}, 0, "goes on\n")):
        command = [sys.executable, "-c", FAILS]
        done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (code, stdout), done.stderr


def test_a_stop_in_a_slow_save_writes_the_state(graph: Path, tmp_path: Path) -> None:
    """The run gets SIGTERM in a save of 4 s. Its steps take 1.5 s, and the grace of 1 s is shorter than both."""
    faults = [
        ("slow_steps", {"seconds": 1.5}),
        ("at_call", {"target": targets.WRITE_STATE, "number": 1, "action": 4}),
        ("at_call", {"target": targets.WRITE_STATE, "number": 1, "action": "SIGTERM"}),  # before the 4 s
    ]
    flags = settings(graph, tmp_path / "run", "--save_every=3", "--stop_grace=1", "--report_to=none")
    done = run_warm([SCRIPT, *flags], faults=faults)
    steps = len(read_metrics(tmp_path / "run"))
    assert len(stop_lines(done.stdout, steps)) == 1 and not lines_with(done.stderr, "mmgraph:"), done.stderr
    assert 3 <= steps < 8 and (tmp_path / f"run/state/step-{steps:08d}").exists()


RENDEZVOUS = """
import os, sys
from datetime import timedelta
from pkgutil import resolve_name
import targets, torch
if sys.argv[1] == "dies":
    targets.put(targets.RENDEZVOUS_ANSWER, lambda *_: os._exit(9))
resolve_name(targets.RENDEZVOUS)(timedelta(seconds=30), "gloo")
total = torch.ones(1)
torch.distributed.all_reduce(total)
print(total.item())
"""


def test_rendezvous_ignores_the_ranks_of_an_earlier_start() -> None:
    """Both ranks of a start die, and the ranks of the next start find each other.

    Rank 1 of the first start has left a request in the store, and rank 0 dies before it answers. In the next start,
    rank 1 arrives before rank 0.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    request_key = f"{targets.RENDEZVOUS_PREFIX}/asks/1"
    store.set(request_key, "of a rank that died asking")

    def start(rank: int, mode: str = "lives") -> subprocess.Popen[str]:
        environment = {
            **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": str(rank),
            "WORLD_SIZE": "2", "PYTHONPATH": TESTS_PATH,
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-c", RENDEZVOUS, mode], env=environment, stdout=subprocess.PIPE, text=True
        )

    assert start(0, "dies").wait(timeout=60) == 9
    rank_1 = start(1)
    while store.get(request_key) == b"of a rank that died asking":
        time.sleep(0.1)
    rank_0 = start(0)
    assert [process.communicate(timeout=60)[0] for process in (rank_0, rank_1)] == ["2.0\n", "2.0\n"]


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_run(endless: list[str]) -> None:
    """The collator raises on rank 1. Its error is printed, and rank 0 ends without waiting for the timeout."""
    fault = ("at_call", {"target": targets.COLLATE_EDGES, "number": 3, "action": "raise", "rank": "1"})
    start = time.monotonic()
    done = run([*launch_command("cpu_2proc.yaml")[:-1], LAUNCHED, *endless], FAULTS=json.dumps([fault]))
    assert done.returncode == 1 and time.monotonic() - start < 60
    error_line = line_with(done.stderr, "mmgraph: error:", "rank 0")
    assert "ValueError: injected by the test" in done.stderr and "--collective_timeout" not in error_line


@pytest.mark.slow
def test_max_restarts_resumes_the_run(graph: Path, one_process: Path, tmp_path: Path) -> None:
    """The launcher restarts the ranks after one is killed. The losses are those of a run without a kill."""
    output = tmp_path / "run"
    flags = settings(graph, output, "--max_steps=30", "--save_every=5")
    command = launch_command("cpu_2proc.yaml --max_restarts 1", *flags)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (output / "state/step-00000010").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    ranks_of(psutil.Process(process.pid))[1].kill()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text[-3000:]
    assert re.search(rf"step \d+ .*{output}/state/step-\d{{8}}", text)  # the state from which it resumed
    assert lines_with(text, output / "checkpoints/multimodal_encoder_final.pt")
    for row, other in zip(read_metrics(output), read_metrics(one_process), strict=True):
        assert max(abs(row[name] - other[name]) for name in LOSSES) < 1e-5


def test_slurm_script(tmp_path: Path) -> None:
    """The script is valid bash. With fake Slurm commands, it forwards SIGUSR1, ends and requeues its job."""
    script = REPOSITORY / "accelerate_configs/slurm.sbatch"
    assert run(["bash", "-n", str(script)]).returncode == 0
    (tmp_path / "bin").mkdir()
    commands = {
        "srun": 'shift; exec "$@"',
        "scontrol": '[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >>requeued',
        "scancel": 'kill -USR1 "$(cat rank.pid)"',
        "accelerate": f"{sys.executable} rank.py >started 2>&1",
    }
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "rank.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1))\n"
        "with open('rank.new', 'w') as file:\n"
        "    print(os.getpid(), file=file)\n"
        "os.rename('rank.new', 'rank.pid')\n"
        "time.sleep(60)\n"
    )
    environment = {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "1", "GPUS": "2",
        "SLURM_JOB_NODELIST": "a", "SLURM_JOB_ID": "7", "SLURM_NODEID": "0",
    }  # fmt: skip
    process = subprocess.Popen(["bash", str(script), "--epochs", "1"], cwd=tmp_path, env=environment)
    while not (tmp_path / "rank.pid").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 1 and (tmp_path / "requeued").read_text() == "requeue 7\n"
