"""Stops, deaths and hangs in real launches: the run ends together and soon, says why, and goes on."""

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

LAUNCHED = str(TESTS / "faults/launched.py")  # launch.py with FAULTS
TESTS_PATH = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
ZERO2 = "deepspeed_zero2.yaml --num_processes 2 --mixed_precision no"


def ranks_of(launcher: psutil.Process) -> dict[int, psutil.Process]:
    """The processes that train, by rank. (A single one has no launcher's ``RANK``.)"""
    return {
        int(child.environ().get("RANK", "0")): child
        for child in launcher.children(recursive=True)
        if str(REPOSITORY / "launch.py") in child.cmdline() and child.ppid() == launcher.pid
    }


@contextmanager
def training(
    config: str, output: Path, *flags: str
) -> Iterator[tuple[subprocess.Popen[str], dict[int, psutil.Process]]]:
    """A launch that has made its first steps, as the leader of a process group; nothing of it is left behind."""
    command = launch_command(config, *flags)
    with (output.parent / f"{output.name}.out").open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None, said(output)
        time.sleep(0.05)
    ranks = ranks_of(psutil.Process(process.pid))
    try:
        yield process, ranks
    finally:
        for victim in [*ranks.values(), process]:
            if victim.pid and psutil.pid_exists(victim.pid):
                victim.kill()
        process.wait()


def said(output: Path) -> str:
    return (output.parent / f"{output.name}.out").read_text()


def ended(process: subprocess.Popen[str], ranks: dict[int, psutil.Process], within: float) -> int:
    """Wait until launcher and ranks are gone. Returns the launcher's exit code."""
    start = time.monotonic()
    code = process.wait(timeout=within)
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=max(0, within - (time.monotonic() - start)))
    assert not alive, "orphans"
    return code


@pytest.fixture
def endless(graph: Path, tmp_path: Path) -> list[str]:
    """Flags of a run that ends only when it is stopped; states at its stops alone."""
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
        for _ in range(2):  # being asked twice does no harm
            if target == "group":
                os.killpg(process.pid, number)
            elif target == "launcher":
                process.send_signal(number)
            else:
                ranks[max(ranks)].send_signal(number)
            time.sleep(0.01)
        assert ended(process, ranks, 20) == code, said(output)
    steps = [row["step"] for row in read_metrics(output)]
    assert steps == list(range(1, len(steps) + 1)) and (output / f"state/step-{len(steps):08d}/state.json").exists()
    assert len(stop_lines(said(output), len(steps))) == 1
    log = (output / "training_log.txt").read_text()
    assert stop_lines(log, len(steps)) == [log.splitlines()[-1]]


@pytest.mark.parametrize("config", ["cpu_2proc.yaml", pytest.param(ZERO2, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_all_and_is_named(endless: list[str], tmp_path: Path, config: str) -> None:
    with training(config, tmp_path / "run", *endless) as (process, ranks):
        ranks[1].kill()
        assert ended(process, ranks, 20) == 1
    text = said(tmp_path / "run")
    [told] = lines_with(text, "mmgraph: error:", "rank 0")
    assert "--collective_timeout" not in told and "exitcode  : -9" in text and "rank      : 1" in text
    assert PACKAGE not in text  # no traceback of ours


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all(endless: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    with training("cpu_2proc.yaml", output, *endless, "--collective_timeout=4") as (process, ranks):
        ranks[1].suspend()
        assert ended(process, ranks, 4 + 35) == 1
    assert line_with(said(output), "mmgraph: error:", "rank 0", "--collective_timeout")


@pytest.mark.slow
def test_a_stop_that_cannot_be_shared_ends_the_rank(graph: Path, endless: list[str], tmp_path: Path) -> None:
    """The other rank hangs, so no step is finished together: the watchdog of the one that was asked ends it."""
    output = tmp_path / "run"
    header, *edges = (graph / "edges.csv").read_text().splitlines()
    (tmp_path / "edges.csv").write_text("\n".join([header, *edges * 500]))  # so no rank hangs while an epoch is saved
    flags = [*endless, f"--edges={tmp_path / 'edges.csv'}", "--stop_grace=2"]
    with training("cpu_2proc.yaml", output, *flags) as (process, ranks):
        ranks[1].suspend()
        ranks[0].terminate()
        ranks[0].wait(timeout=12)  # --stop_grace is 15 s otherwise
        ranks[1].kill()
        ended(process, ranks, 20)
    assert line_with(said(output), "mmgraph:", "rank 0", "2 s", "--stop_grace")


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


def test_neither_slow_steps_nor_a_save_are_cut_off() -> None:
    """Steps of 1 s, and a save of 2 s, with a grace of 0.4 s; what comes after takes longer than that."""
    start = time.monotonic()
    done = run([sys.executable, "-c", SLOW_STEPS])
    assert done.stdout == "saved\n" and done.returncode == 143 and time.monotonic() - start < 15
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


def test_after_an_error_a_launched_rank_alone_is_deaf() -> None:
    """A launcher's SIGTERM is for ranks that have yet to say why; a process without one must be easy to end."""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    for more, code, said in (({}, -signal.SIGTERM, ""), ({"RANK": "0"}, 0, "goes on\n")):
        command = [sys.executable, "-c", FAILS]
        done = subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (code, said), done.stderr


def test_a_run_of_slow_steps_and_saves_stops_with_its_state(graph: Path, tmp_path: Path) -> None:
    """Asked in a save of 4 s, with steps of 1.5 s, and a grace that is shorter than either."""
    faults = [
        ("slow_steps", {"seconds": 1.5}),
        ("at_call", {"target": targets.WRITE_STATE, "number": 1, "action": 4}),
        ("at_call", {"target": targets.WRITE_STATE, "number": 1, "action": "SIGTERM"}),  # before those 4 s
    ]
    flags = settings(graph, tmp_path / "run", "--save_every=3", "--stop_grace=1", "--report_to=none")
    done = run_warm([SCRIPT, *flags], faults=faults)
    steps = len(read_metrics(tmp_path / "run"))
    assert len(stop_lines(done.stdout, steps)) == 1 and not lines_with(done.stderr, "mmgraph:"), done.stderr
    assert 3 <= steps < 8 and (tmp_path / f"run/state/step-{steps:08d}").exists()


MEET = """
import os, sys
from datetime import timedelta
from pkgutil import resolve_name
import targets, torch
if sys.argv[1] == "dies":
    targets.put(targets.MEET_ANSWER, lambda *_: os._exit(9))
resolve_name(targets.MEET)(timedelta(seconds=30), "gloo")
total = torch.ones(1)
torch.distributed.all_reduce(total)
print(total.item())
"""


def test_ranks_meet_in_their_own_start() -> None:
    """Rank 0 dies before rank 1 is there; rank 1 of the next start is there before rank 0 is."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    asks = f"{targets.MEET_FOLDER}/asks/1"
    store.set(asks, "of a rank that died asking")

    def start(rank: int, how: str = "lives") -> subprocess.Popen[str]:
        environment = {
            **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": str(rank),
            "WORLD_SIZE": "2", "PYTHONPATH": TESTS_PATH,
        }  # fmt: skip
        return subprocess.Popen([sys.executable, "-c", MEET, how], env=environment, stdout=subprocess.PIPE, text=True)

    assert start(0, "dies").wait(timeout=60) == 9
    second = start(1)
    while store.get(asks) == b"of a rank that died asking":
        time.sleep(0.1)
    first = start(0)
    assert [process.communicate(timeout=60)[0] for process in (first, second)] == ["2.0\n", "2.0\n"]


@pytest.mark.slow
def test_a_rank_that_raises_ends_all_with_its_cause(endless: list[str]) -> None:
    """In the collator, on rank 1 alone."""
    fault = ("at_call", {"target": targets.COLLATE_EDGES, "number": 3, "action": "raise", "rank": "1"})
    start = time.monotonic()
    done = run([*launch_command("cpu_2proc.yaml")[:-1], LAUNCHED, *endless], FAULTS=json.dumps([fault]))
    assert done.returncode == 1 and time.monotonic() - start < 60
    told = line_with(done.stderr, "mmgraph: error:", "rank 0")
    assert "ValueError: injected by the test" in done.stderr and "--collective_timeout" not in told


@pytest.mark.slow
def test_the_launchers_restarts_just_work(graph: Path, one_process: Path, tmp_path: Path) -> None:
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
    assert re.search(rf"step \d+ .*{output}/state/step-\d{{8}}", text)  # where it went on
    assert lines_with(text, output / "checkpoints/multimodal_encoder_final.pt")
    for row, other in zip(read_metrics(output), read_metrics(one_process), strict=True):
        assert max(abs(row[name] - other[name]) for name in LOSSES) < 1e-5


def test_slurm_script(tmp_path: Path) -> None:
    """The script is valid bash. With fake Slurm commands it starts, forwards a signal, ends and requeues its job."""
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
