"""Training on two machines: two network namespaces joined by a cable (a veth pair), with a launcher in each."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import loss_difference, settings
from launches import launch_command

NODES = ("mmgraph0", "mmgraph1")  # names of the namespaces, and of the cable's end in each
MAIN_IP = "10.77.31.1"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def remove() -> None:
    """Delete the namespaces. The cable disappears with them."""
    for node in NODES:
        subprocess.run(["ip", "netns", "del", node], capture_output=True)


@pytest.fixture(scope="module")
def cable() -> Iterator[None]:
    """The two namespaces and their cable. Skips the test if they cannot be created."""
    if shutil.which("ip") is None:
        pytest.skip("two nodes need the ip command (Debian's iproute2)")
    remove()
    try:
        for node in NODES:
            ip("netns", "add", node)
        ip("link", "add", NODES[0], "netns", NODES[0], "type", "veth", "peer", "name", NODES[1], "netns", NODES[1])
        for i, node in enumerate(NODES):
            ip("-n", node, "addr", "add", f"10.77.31.{i + 1}/24", "dev", node)
            ip("-n", node, "link", "set", "lo", "up")
            ip("-n", node, "link", "set", node, "up")
    except subprocess.CalledProcessError as error:
        remove()
        pytest.skip(f"two nodes need permission to create network namespaces: {error.stderr.strip()}")
    yield
    remove()


def start(config: str, machine_rank: int, *flags: str) -> subprocess.Popen[str]:
    """Start ``accelerate launch`` on one of the machines."""
    node = NODES[machine_rank]
    launcher = (
        f"{config}.yaml --num_processes 2 --num_machines 2 --machine_rank {machine_rank} --main_process_ip {MAIN_IP} "
        "--mixed_precision no"
    )
    command = ["ip", "netns", "exec", node, *launch_command(launcher, *flags)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": node}  # else gloo uses 127.0.0.1, which is not reachable
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.usefixtures("cable")
@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_node", "multi_node_zero2"])
def test_two_nodes_resume_after_one_is_killed(config: str, graph: Path, one_process: Path, tmp_path: Path) -> None:
    """If one node is killed, the other ends with an error. The resumed run has the losses of a single process."""
    output = tmp_path / "run"
    flags = settings(graph, output, "--max_steps=30", "--save_every=5")
    nodes = [start(config, i, *flags) for i in range(2)]
    deadline = time.monotonic() + 120
    while not (output / "state/step-00000010").exists():
        assert time.monotonic() < deadline and nodes[0].poll() is None, nodes[0].communicate()[0]
        time.sleep(0.005)
    pids = subprocess.run(["ip", "netns", "pids", NODES[1]], capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(["kill", "-9", *pids], capture_output=True)
    text, _ = nodes[0].communicate(timeout=20)  # no signal is sent to node 0
    nodes[1].communicate(timeout=20)
    [error_line] = [line for line in text.splitlines() if "mmgraph: error: " in line]
    assert nodes[0].returncode != 0 and "mmgraph: error: rank 0 " in error_line, text
    assert "--collective_timeout" not in error_line  # no timeout: the connection to the other node is lost
    assert "(10.77.31.2" in text or "[10.77.31.2]" in text
    assert not (output / "state/step-00000030").exists()

    texts = [node.communicate(timeout=120)[0] for node in [start(config, i, *flags) for i in range(2)]]
    starts = json.loads((output / "environment.json").read_text())
    assert [start["processes"] for start in starts] == [2, 2] and starts[0]["from_step"] == 0
    state = output / f"state/step-{starts[1]['from_step']:08d}"
    assert starts[1]["from_step"] >= 10 and str(state) in texts[0], texts[0]
    assert str(output / "checkpoints/multimodal_encoder_final.pt") in texts[0], texts[0]
    assert str(output) not in texts[1], texts[1]  # only rank 0 prints and writes
    assert loss_difference(output, one_process, 30) < 1e-5
