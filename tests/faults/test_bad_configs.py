"""Invalid settings, and output folders of another run: an error of one line, and no file is changed."""

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
import targets
from conftest import WORDS, error_of, graph_files, lines_with
from runs import brief, each, run

from mmgraph.demo.towers import build_towers

Cases = Callable[[int], None]


def fingerprints(folder: Path) -> dict[str, str]:
    """Return the hash of each file in a folder, without the lock file."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def done(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a run of 6 steps."""
    output = tmp_path_factory.mktemp("done") / "run"
    assert run(brief(graph, output, "--max_steps=6")).code == 0
    return output


FLAGS: dict[str, tuple[object, ...]] = {  # what the error must contain
    "--epoch=3": ("--epoch", "--epochs"),
    "--epochs=three": ("--epochs", "three"),
    "--epochs=0": ("--epochs", 0, 0),
    "--learning_rate=nan": ("--learning_rate", "nan", 0),
    "--learning_rate=1e999": ("--learning_rate", "inf", 0),
    "--temperature=-1": ("--temperature", "-1.0", 0),
    "--fused_dim=12": ("--fused_dim", 12, 8),
    "--batch_size=201": ("--global_batch_size", 201, 200),
    "--keep_best=z_graph/mrr": ("--keep_best", "--eval_fraction", "--eval_edges"),
    "--keep_best=loss": ("--keep_best", "loss", "z_graph/mrr"),
    "--eval_fraction=1.5": ("--eval_fraction", 1.5, 0, 1),
    "--max_bad_images=30": ("--max_bad_images", "30.0", 0, 1),
    "--max_skipped_steps=-1": ("--max_skipped_steps", -1, 0),
    "--seed=-1": ("--seed", -1, 0),
    "--resume=nowhere": ("nowhere", "state.json"),
    "--init_from=nothing.pt": ("--init_from", "nothing.pt"),
    "--model_name=no/such/model": ("no/such/model",),
    "--image_root=nowhere": ("--image_root", "nowhere"),
    "--nodes=nowhere.csv": ("nowhere.csv",),
    "--config=nowhere.yaml": ("--config", "nowhere.yaml"),
    "--report_to=mlflow": ("--report_to", "mlflow", "wandb"),
}
FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {  # YAML, what the error must contain after the path
    "unknown": (b"epoch: 3\n", ("epoch", "epochs")),
    "type": (b"epochs: three\n", ("three",)),
    "list": (b"epochs: [1, 2]\n", ("epochs",)),
    "no mapping": (b"- epochs\n", ("list",)),
    "yaml": (b"epochs: [3\n", ("YAML", "line 2")),
    "bytes": (b"epochs: \xff\n", ("YAML",)),
    "code": (b"epochs: !!python/object/apply:os.mkdir [ran]\n", ("YAML", "os.mkdir")),
    "deep": (b"epochs: " + b"[" * 20_000, ("YAML",)),
    "nul": (b"epochs: 3\0\n", ("YAML",)),
    "contradiction": (b"eval_fraction: 0.1\neval_edges: edges.csv\n", ("--eval_fraction", "--eval_edges")),
}


@pytest.mark.fault(
    "settings that are unknown, of the wrong type, out of range, contradictory, or in an unreadable file: one line"
)
def test_bad_settings(graph: Path, tmp_path: Path, cases: Cases) -> None:
    def check(number: int) -> None:
        output = tmp_path / f"{number}"
        if number < len(FLAGS):
            flag, facts = list(FLAGS.items())[number]
        else:
            name, (content, facts) = list(FILES.items())[number - len(FLAGS)]
            path = tmp_path / f"{name}.yaml"
            path.write_bytes(content)
            flag = f"--config={path}"
            facts = (path, *facts) if name not in ("type", "contradiction") else facts
        ended = run(brief(graph, output, flag))
        assert ended.code == 2 and error_of(ended.said, *facts)
        assert not output.exists()

    cases(each(range(len(FLAGS) + len(FILES)), check))
    assert not Path("ran").exists()


def copy_graph(graph: Path, folder: Path) -> None:
    shutil.copytree(graph, folder, ignore=shutil.ignore_patterns("mmgraph_cache"))


@pytest.mark.fault("a run resumed with other settings, data or towers: refused, the differences named, nothing changed")
def test_resume_with_other_settings_or_data(graph: Path, done: Path, tmp_path: Path, cases: Cases) -> None:
    for name in ("nodes", "edges", "towers"):
        copy_graph(graph, tmp_path / name)
    nodes = pd.read_csv(tmp_path / "nodes/nodes.csv", dtype=str)
    nodes.loc[3, "summary"] = "something else is written here"
    nodes.to_csv(tmp_path / "nodes/nodes.csv", index=False)
    edges = (tmp_path / "edges/edges.csv").read_text().splitlines()
    (tmp_path / "edges/edges.csv").write_text("\n".join([edges[0], *reversed(edges[1:])]))
    shutil.rmtree(tmp_path / "towers/towers")
    build_towers(tmp_path / "towers/towers", [*WORDS, "another word, and so other towers"])
    changes: dict[str, tuple[object, ...]] = {  # setting, old value, new value
        "--seed=7": ("seed", 42, 7),
        "--batch_size=24": ("global_batch_size", 48, 24),
        "--learning_rate=2e-3": ("learning_rate", 0.001, 0.002),
        "--fused_dim=24": ("fused_dim", 16, 24),
        "--temperature=0.1": ("temperature", 0.07, 0.1),
        "--lr_schedule=cosine": ("lr_schedule", "constant", "cosine"),
        "--false_negatives=mask_same": ("false_negatives", "keep", "mask_same"),
        "--truncated_images=black": ("truncated_images", "partial", "black"),
        "--confine_images": ("confine_images", False, True),
        "--eval_fraction=0.1": ("eval_fraction", "0.0", 0.1),
        f"--nodes={tmp_path}/nodes/nodes.csv": ("nodes table",),
        f"--edges={tmp_path}/edges/edges.csv": ("edges table",),
        f"--model_name={tmp_path}/towers/towers": ("towers",),
        "--resume=never": ("--resume",),
    }
    before = fingerprints(done)

    def check(flag: str) -> None:
        ended = run(brief(graph, done, "--max_steps=12", flag))
        assert ended.code == 2 and error_of(ended.said, *changes[flag], "--run_name")
        assert error_of(ended.said, done)
        assert fingerprints(done) == before

    cases(each(changes, check))


@pytest.mark.fault("a second run in the output folder of a running one: refused, and the first continues")
def test_two_runs_in_one_folder(graph: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print('held', flush=True); input()"
    output.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", hold, output / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        start = time.monotonic()
        for ranks in (1, 2):
            ended = run(brief(graph, output), ranks=ranks)
            assert ended.codes == [2] * ranks
            errors = [line for line in ended.said.splitlines() if line.startswith("mmgraph: error: ")]
            assert len(errors) == ranks and all(str(output) in line for line in errors), ended.said
            assert "Traceback" not in ended.said
        assert time.monotonic() - start < 30 and not (output / "metrics.jsonl").exists()
        first.communicate("\n")
    assert run(brief(graph, output)).code == 0


@pytest.mark.fault("a second start that read the state, then waited while the first run continued and ended: refused")
def test_state_read_before_another_run_continued(graph: Path, tmp_path: Path) -> None:
    output, flags = tmp_path / "run", brief(graph, tmp_path / "run")
    assert run(flags, ("after_step", {"step": 8, "action": "SIGKILL"})).code == -9
    with ThreadPoolExecutor(1) as thread:
        meet = {"target": targets.BUILD_LOADER, "folder": str(tmp_path)}
        late = thread.submit(run, flags, ("meet_at", meet))
        while not (tmp_path / "here").exists():
            time.sleep(0.02)
        assert run(flags).code == 0
        done = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        (tmp_path / "go").touch()
        ended = late.result()
    assert ended.code == 2 and error_of(ended.said, output, "step-00000012")
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == done


@pytest.mark.fault(
    "an output folder that is a file, has no write permission, or is on a read-only file system: one line"
)
def test_output_folders_that_cannot_be_written(graph: Path, tmp_path: Path, cases: Cases) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "checkpoints").write_text("a file")
    for folder in ("file", "file/below", "run", "checkpoints", "/proc/mmgraph", "/sys/mmgraph"):
        ended = run(brief(graph, tmp_path / folder))
        assert ended.code == 2 and "Traceback" not in ended.said and "--output_dir" in ended.said, ended.said
    cases(6)


@pytest.mark.fault("fewer edges than ranks, or a global batch that does not divide by the ranks: one line")
def test_invalid_global_batch_sizes(tmp_path: Path, graph: Path) -> None:
    small = graph_files(tmp_path / "small", nodes=4, edges=3)
    more = [f"--nodes={small / 'nodes.csv'}", f"--edges={small / 'edges.csv'}"]
    for size, facts in ((3, (2, 2, 4)), (4, (3,))):  # the number of ranks and two valid sizes; the number of edges
        ended = run([*brief(graph, tmp_path / "run"), *more, f"--batch_size={size}"], ranks=2)
        errors = lines_with(ended.said, "mmgraph: error:", "--global_batch_size", size, *facts)
        assert ended.codes == [2, 2] and len(errors) == 2 and "Traceback" not in ended.said, ended.said
    assert run([*brief(graph, tmp_path / "run"), *more, "--batch_size=2"], ranks=2).codes == [0, 0]
