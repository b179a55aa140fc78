"""Settings that cannot work, and runs in a folder that is another's: one line with the differences, nothing changed."""

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from conftest import WORDS, graph_files
from runs import brief, each, run

from mmgraph.demo_towers import build_towers

Cases = Callable[[int], None]


def fingerprints(folder: Path) -> dict[str, str]:
    """What a folder holds, but for the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def done(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps."""
    output = tmp_path_factory.mktemp("done") / "run"
    assert run(brief(graph, output, "--max_steps=6")).code == 0
    return output


FLAGS = {  # and what is said of them
    "--epoch=3": "unknown argument --epoch, did you mean --epochs?",
    "--epochs=three": "argument --epochs: invalid int value: 'three'",
    "--epochs=0": "--epochs 0: must be above 0",
    "--learning_rate=nan": "--learning_rate nan: must be above 0",
    "--learning_rate=1e999": "--learning_rate inf: must be above 0",
    "--temperature=-1": "--temperature -1.0: must be above 0",
    "--fused_dim=12": "--fused_dim 12: must be a multiple of 8",
    "--batch_size=201": "--global_batch_size 201 is larger than the graph's 200 edges",
    "--keep_best=z_graph/mrr": "--keep_best needs edges to evaluate on",
    "--keep_best=loss": "--keep_best loss: must be one of",
    "--eval_fraction=1.5": "--eval_fraction 1.5: must be 0 or more, and below 1",
    "--max_bad_images=30": "--max_bad_images 30.0: must be a share",
    "--max_skipped_steps=-1": "--max_skipped_steps -1: must be 0 or more",
    "--seed=-1": "--seed -1: must be 0 or more",
    "--resume=nowhere": "nowhere: not a state",
    "--init_from=nothing.pt": "--init_from nothing.pt: no such file",
    "--model_name=no/such/model": "no/such/model",
    "--image_root=nowhere": "--image_root nowhere: no such folder",
    "--nodes=nowhere.csv": "nowhere.csv: no such file",
    "--config=nowhere.yaml": "--config nowhere.yaml: No such file",
    "--report_to=mlflow": "invalid choice: 'mlflow'",
}
FILES: dict[str, tuple[bytes, str]] = {  # YAML
    "unknown": (b"epoch: 3\n", "unknown key 'epoch', did you mean 'epochs'?"),
    "type": (b"epochs: three\n", "invalid int value: 'three'"),
    "list": (b"epochs: [1, 2]\n", "'epochs' must be a single value"),
    "no mapping": (b"- epochs\n", "must hold 'flag: value' lines"),
    "yaml": (b"epochs: [3\n", "not valid YAML"),
    "bytes": (b"epochs: \xff\n", "not valid YAML"),
    "code": (b"epochs: !!python/object/apply:os.mkdir [ran]\n", "not valid YAML"),
    "deep": (b"epochs: " + b"[" * 20_000, "not valid YAML"),
    "nul": (b"epochs: 3\0\n", "not valid YAML"),
    "contradiction": (b"eval_fraction: 0.1\neval_edges: edges.csv\n", "give one of the two"),
}


@pytest.mark.fault("settings: unknown, of a wrong type, out of range, contradictory, in an unreadable file")
def test_bad_settings(graph: Path, tmp_path: Path, cases: Cases) -> None:
    def check(number: int) -> None:
        output = tmp_path / f"{number}"
        if number < len(FLAGS):
            flag, message = list(FLAGS.items())[number]
        else:
            name, (content, message) = list(FILES.items())[number - len(FLAGS)]
            path = tmp_path / f"{name}.yaml"
            path.write_bytes(content)
            flag = f"--config={path}"
        ended = run(brief(graph, output, flag))
        [line] = [line for line in ended.said.splitlines() if line.startswith("mmgraph: error: ")]
        assert ended.code == 2 and message in line and "Traceback" not in ended.said, ended.said
        assert not output.exists()

    cases(each(range(len(FLAGS) + len(FILES)), check))
    assert not Path("ran").exists()


def other_data(graph: Path, folder: Path) -> None:
    shutil.copytree(graph, folder, ignore=shutil.ignore_patterns("mmgraph_cache"))


@pytest.mark.fault("a run resumed with other settings, data or towers: refused, with the differences, nothing changed")
def test_another_run_in_the_folder(graph: Path, done: Path, tmp_path: Path, cases: Cases) -> None:
    for name in ("nodes", "edges", "towers"):
        other_data(graph, tmp_path / name)
    nodes = pd.read_csv(tmp_path / "nodes/nodes.csv", dtype=str)
    nodes.loc[3, "summary"] = "something else is written here"
    nodes.to_csv(tmp_path / "nodes/nodes.csv", index=False)
    edges = (tmp_path / "edges/edges.csv").read_text().splitlines()
    (tmp_path / "edges/edges.csv").write_text("\n".join([edges[0], *reversed(edges[1:])]))
    shutil.rmtree(tmp_path / "towers/towers")
    build_towers(tmp_path / "towers/towers", [*WORDS, "another word, and so other towers"])
    changes = {
        "--seed=7": "seed 42 -> 7",
        "--batch_size=24": "global_batch_size 48 -> 24",
        "--learning_rate=2e-3": "learning_rate 0.001 -> 0.002",
        "--fused_dim=24": "fused_dim 16 -> 24",
        "--temperature=0.1": "temperature 0.07 -> 0.1",
        "--lr_schedule=cosine": "lr_schedule constant -> cosine",
        "--false_negatives=mask_same": "false_negatives keep -> mask_same",
        "--truncated_images=black": "truncated_images partial -> black",
        "--confine_images": "confine_images False -> True",
        "--eval_fraction=0.1": "eval_fraction 0.0 -> 0.1",
        f"--nodes={tmp_path}/nodes/nodes.csv": "nodes table",
        f"--edges={tmp_path}/edges/edges.csv": "edges table",
        f"--model_name={tmp_path}/towers/towers": "towers",
        "--resume=never": "holds a run; choose another --run_name",
    }
    before = fingerprints(done)

    def check(flag: str) -> None:
        ended = run(brief(graph, done, "--max_steps=12", flag))
        [line] = [line for line in ended.said.splitlines() if line.startswith("mmgraph: error: ")]
        assert ended.code == 2 and changes[flag] in line and "choose another --run_name" in line, ended.said
        assert fingerprints(done) == before

    cases(each(changes, check))


@pytest.mark.fault("a second run in the output folder of one that trains: refused, and the first goes on")
def test_two_runs_in_one_folder(graph: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print('held', flush=True); input()"
    output.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", hold, output / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        begun = time.monotonic()
        for ranks in (1, 2):
            ended = run(brief(graph, output), ranks=ranks)
            assert ended.codes == [2] * ranks and "another process is training in this folder" in ended.said
        assert time.monotonic() - begun < 30 and not (output / "metrics.jsonl").exists()
        first.communicate("\n")
    assert run(brief(graph, output)).code == 0


@pytest.mark.fault("a second start that has read the state, and waits while the first goes on and ends: refused")
def test_a_start_that_comes_late(graph: Path, tmp_path: Path) -> None:
    output, flags = tmp_path / "run", brief(graph, tmp_path / "run")
    assert run(flags, ("after_step", {"step": 8, "action": "SIGKILL"})).code == -9
    with ThreadPoolExecutor(1) as thread:
        meet = {"target": "mmgraph.trainer.Trainer._build", "folder": str(tmp_path)}
        late = thread.submit(run, flags, ("meet_at", meet))
        while not (tmp_path / "here").exists():
            time.sleep(0.02)
        assert run(flags).code == 0
        done = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        (tmp_path / "go").touch()
        ended = late.result()
    assert ended.code == 2 and "another process has gone on to step-00000012 meanwhile; start again" in ended.said
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == done


@pytest.mark.fault(
    "an output folder that cannot be: a file in its place, no permission, a file system that is read-only"
)
def test_output_folders_that_cannot_be(graph: Path, tmp_path: Path, cases: Cases) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "checkpoints").write_text("a file")
    for folder in ("file", "file/below", "run", "checkpoints", "/proc/mmgraph", "/sys/mmgraph"):
        ended = run(brief(graph, tmp_path / folder))
        assert ended.code == 2 and "Traceback" not in ended.said and "--output_dir" in ended.said, ended.said
    cases(6)


@pytest.mark.fault("a graph with fewer edges than ranks times one, or a batch that ranks cannot share")
def test_batches_that_ranks_cannot_share(tmp_path: Path, graph: Path) -> None:
    small = graph_files(tmp_path / "small", nodes=4, edges=3)
    more = [f"--nodes={small / 'nodes.csv'}", f"--edges={small / 'edges.csv'}"]
    for size, message in ((3, "does not divide into 2 processes; 2 or 4 does"), (4, "larger than the graph's 3 edges")):
        ended = run([*brief(graph, tmp_path / "run"), *more, f"--batch_size={size}"], ranks=2)
        assert ended.codes == [2, 2] and message in ended.said
    assert run([*brief(graph, tmp_path / "run"), *more, "--batch_size=2"], ranks=2).codes == [0, 0]
