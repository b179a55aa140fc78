"""The command line: flags, settings files, verbs, and the errors for wrong ones."""

import errno
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import targets
from conftest import graph_files, read_metrics, settings
from launches import REPOSITORY, run

from mmgraph.arguments import parse_config
from mmgraph.cli import main, train_main
from mmgraph.config import Config
from mmgraph.errors import UserError
from mmgraph.training.lr_schedule import lr_at


def test_defaults_of_the_original_trainer() -> None:
    config = parse_config([])
    assert config == Config()
    assert (config.model_name, config.fused_dim, config.proj_dim) == ("openai/clip-vit-base-patch32", 512, 256)
    assert (config.global_batch_size, config.epochs, config.seed, config.cache_size) == (64, 20, 42, 128)
    assert (config.learning_rate, config.weight_decay, config.temperature) == (5e-5, 1e-4, 0.07)
    assert (config.graph_loss_weight, config.lr_schedule, config.max_grad_norm) == (1.0, "constant", 0.0)
    assert (config.nodes, config.edges) == ("data/processed/nodes.csv", "data/processed/edges.csv")


def test_flags_override_settings_files(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 5e-5\nbatch_size: 32\nrun_name: 7\nmax_steps:\n")  # PyYAML reads 5e-5 as text
    config = parse_config([f"--config={path}", "--max-steps", "9", "--seed=1"])
    assert (config.learning_rate, config.global_batch_size, config.run_name, config.max_steps) == (5e-5, 32, "7", 9)
    assert parse_config([f"--config={path}", "--global_batch_size=8"]).global_batch_size == 8
    config.save(tmp_path / "saved.yaml")
    assert parse_config(["--config", str(tmp_path / "saved.yaml")]) == config
    assert parse_config(["--demo", "--epochs=1"]).fused_dim == 128
    assert str(parse_config(["--nodes=a/b/nodes.csv"]).output_folder) == "runs/b"


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        # Text flags have the text in the file, also where YAML 1.1 reads a boolean, a number or a date.
        ("tower_cache: off", "tower_cache", "off"),
        ("tower_cache: 'off'", "tower_cache", "off"),
        ("run_name: 007", "run_name", "007"),
        ("run_name: yes", "run_name", "yes"),
        ("run_name: No", "run_name", "No"),
        ("run_name: 1e3", "run_name", "1e3"),
        ("run_name: 1_000", "run_name", "1_000"),
        ("run_name: 0x1F", "run_name", "0x1F"),
        ("run_name: 12:30", "run_name", "12:30"),
        ("run_name: 2026-11-05", "run_name", "2026-11-05"),
        ("run_name: 2026-31-12", "run_name", "2026-31-12"),  # looks like a date, but is none
        ("run_name: 1.10", "run_name", "1.10"),
        ("run_name: 'null'", "run_name", "null"),
        ("run_name: a b # comment", "run_name", "a b"),
        ("run_name: |-\n  off", "run_name", "off"),
        ("run_name: &name off", "run_name", "off"),
        ("background: 1,2,3", "background", "1,2,3"),
        ("background: 255, 0, 0", "background", "255, 0, 0"),
        ("text_columns: true,false", "text_columns", "true,false"),
        # Numbers are read as on the command line.
        ("seed: 010", "seed", 10),
        ("seed: 7", "seed", 7),
        ("seed: '7'", "seed", 7),
        ("seed: 1_000", "seed", 1000),
        ("batch_size: 08", "global_batch_size", 8),
        ("global_batch_size: 12", "global_batch_size", 12),
        ("max_steps: 9", "max_steps", 9),
        ("learning_rate: 5e-5", "learning_rate", 5e-5),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("temperature: .5", "temperature", 0.5),
        # Switches.
        ("report: off", "report", False),
        ("report: no", "report", False),
        ("report: false", "report", False),
        ("confine_images: on", "confine_images", True),
        ("confine_images: yes", "confine_images", True),
        # No value selects the default.
        ("max_steps: null", "max_steps", None),
        ("max_steps:", "max_steps", None),
        ("max_steps: ~", "max_steps", None),
        ("run_name: null", "run_name", None),
        ("report:", "report", True),
        ("tower_cache:", "tower_cache", "auto"),
    ],
)
def test_values_of_settings_files(line: str, name: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"epochs: 3\n{line}\nproj_dim: 16\n")
    config = parse_config([f"--config={path}"])
    found = getattr(config, name)
    assert found == value and type(found) is type(value)
    assert (config.epochs, config.proj_dim) == (3, 16)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("epochs: 3\nseed: 1\nepochs: 4", ["FILE", "'epochs' occurs twice"]),
        ("run_name: off\nrun_name: off", ["FILE", "'run_name' occurs twice"]),
        ("[a, b]: 3", ["FILE", "a key is a list"]),
        ("? {a: 1}\n: 3", ["FILE", "a key is a list or a mapping"]),
        ("epochs: [3]", ["FILE", "'epochs'", "single value"]),
        ("run_name: [a]", ["FILE", "'run_name'", "single value"]),
        ("run_name: {a: b}", ["FILE", "'run_name'", "single value"]),
        ("text_columns: [short_name, summary]", ["FILE", "'text_columns'", "single value"]),
        ("text", ["FILE", "str"]),
        ("7", ["FILE", "int"]),
        ("- epochs: 3", ["FILE", "list"]),
        ("seed: 1.5", ["FILE", "--seed", "int", "'1.5'"]),
        ("seed: yes", ["FILE", "--seed", "int", "'yes'"]),
        ("seed: 2026-31-12", ["FILE", "--seed", "int", "'2026-31-12'"]),
        ("2026-31-12: 3", ["FILE", "'2026-31-12'"]),
        ("- 2026-31-12", ["FILE", "list"]),
        ("epochs: 0x", ["FILE", "--epochs", "int", "'0x'"]),
        ("learning_rate: fast", ["FILE", "--learning_rate", "float", "'fast'"]),
        ("report: maybe", ["FILE", "--report", "maybe"]),
        ("seed: -1", ["--seed -1"]),
        ("1: 2", ["FILE", "'1'"]),
        ("off: 2", ["FILE", "unknown key"]),
        ("epochs: 3\n---\nepochs: 4", ["FILE", "YAML"]),
        ("epochs: !!python/object:os.system 3", ["FILE", "YAML"]),
        ("epochs: *missing", ["FILE", "YAML"]),
        ("a: " + "[" * 5000, ["FILE", "YAML"]),
    ],
)
def test_wrong_settings_files_are_one_line_with_the_name_of_the_file(
    text: str, facts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text(text)
    assert train_main(["--config=FILE"]) == 2
    check_error(capsys.readouterr().err, *facts)


def test_a_settings_file_may_be_empty(tmp_path: Path) -> None:
    for text in ("", "# only a comment\n", "---\n", "{}"):
        (tmp_path / "run.yaml").write_text(text)
        assert parse_config([f"--config={tmp_path / 'run.yaml'}"]) == Config()
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbfepochs: 3\r\nrun_name: off\r\n")  # written on Windows
    assert parse_config([f"--config={tmp_path / 'run.yaml'}"]) == Config(epochs=3, run_name="off")


@pytest.mark.parametrize(
    "settings",
    [
        *(
            {"run_name": name}
            for name in ("off", "007", "null", "~", "1e3", "", "yes", "1.10", " a ", "a: b", "#1", "é\n")
        ),
        {"tower_cache": "off"},
        {"background": "1,2,3", "text_columns": "yes,no", "sixteen_bit_images": "scale", "truncated_images": "black"},
        {"learning_rate": 1e-5, "temperature": 1.0, "weight_decay": 1e-30, "max_grad_norm": 2.0},
        {"seed": 2**63 - 1, "max_steps": 8, "micro_batch_size": 3, "report": False, "confine_images": True},
        {"nodes": "2026-11-05/nodes.csv", "edges": "0x10", "image_root": "off"},
    ],
    ids=str,
)
def test_saved_settings_are_read_back(settings: dict[str, Any], tmp_path: Path) -> None:
    config = Config(**settings)
    config.save(tmp_path / "config.yaml")
    assert parse_config([f"--config={tmp_path / 'config.yaml'}"]) == config


def check_error(text: str, *facts: str) -> None:
    """Check that the output is one error line that contains the facts in this order, each as a separate word."""
    assert text.startswith("mmgraph: error: ") and text.count("\n") == 1 and text.endswith("\n"), text
    pattern = ".*".join(rf"(?<![\w-]){re.escape(fact)}(?!\w)" for fact in facts)
    assert re.search(pattern, text.removeprefix("mmgraph: error: ")), (facts, text)


@pytest.mark.parametrize(
    ("flags", "facts"),  # facts: what the error must contain
    [
        (["--epoch=3"], ["--epoch", "--epochs"]),
        (["--seed=x"], ["--seed", "int", "'x'"]),
        (["--learning_rate=nan"], ["--learning_rate nan", "0"]),
        (["--lr_schedule=linear"], ["--lr_schedule", "'linear'", "'constant'", "'cosine'"]),
        (["--fused_dim=100"], ["--fused_dim 100", "8"]),
        (["--epochs=0"], ["--epochs 0", "0"]),
        (["--max_steps=-1"], ["--max_steps -1", "0"]),
        (["stray"], ["stray"]),
        (["--demo", "--nodes=x.csv"], ["--demo", "--nodes", "--edges"]),
        (["--config=nowhere.yaml"], ["--config nowhere.yaml", os.strerror(errno.ENOENT)]),
        (["--config=BROKEN"], ["--config BROKEN", "YAML", "line 2"]),
        (["--config=LIST"], ["--config LIST", "list"]),
        (["--config=UNKNOWN"], ["--config UNKNOWN", "'epocs'", "'epochs'"]),
        (["--config=WRONG"], ["--config WRONG", "--epochs", "int", "'x'"]),
        (["--config=NESTED"], ["--config NESTED", "'epochs'"]),
        (["--nodes=nowhere.csv", "--edges=nowhere.csv"], ["nowhere.csv:"]),
        (["--resume=never", "--report_to=nothing"], ["--report_to", "'nothing'", "'wandb'", "'tensorboard'"]),
        ([], ["data/processed/nodes.csv", "data/processed/edges.csv", "--nodes", "--edges", "--demo"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    flags: list[str], facts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, text in (("BROKEN", "a: [1\nb: }"), ("LIST", "- 1"), ("UNKNOWN", "epocs: 3"), ("WRONG", "epochs: x"),
                       ("NESTED", "epochs: [1]")):  # fmt: skip
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(targets.LOAD_TOWERS, None)  # a call would fail: the error must come before a model is loaded
    assert train_main(flags) == 2
    check_error(capsys.readouterr().err, *facts)
    assert not (tmp_path / "runs").exists()


def test_exit_code_of_the_process(tmp_path: Path) -> None:
    done = run([sys.executable, str(REPOSITORY / "launch.py"), "--learning_rte=1"], tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    check_error(done.stderr, "--learning_rte", "--learning_rate", "--help")


LEAVE = """
import atexit
from mmgraph.cli import leave
class Kept:
    def __del__(self):
        print("torn down")
kept = Kept()
atexit.register(print, "at exit")
leave(5)
"""


def test_a_rank_exits_without_interpreter_teardown() -> None:
    """A rank runs its exit hooks but does not destroy its objects, because this can abort the process.

    Without a launcher, a process exits normally.
    """
    alone, rank = (run([sys.executable, "-c", LEAVE], **environment) for environment in ({}, {"RANK": "0"}))
    assert (alone.returncode, alone.stdout) == (5, "at exit\ntorn down\n"), alone.stderr
    assert (rank.returncode, rank.stdout) == (5, "at exit\n"), rank.stderr


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as caught:
            parse_config([flag])
        assert caught.value.code == 0
    short, _, long = capsys.readouterr().out.partition("usage:")[2].partition("usage:")
    assert short.count("\n  --") <= 19 and "--temperature" not in short and "--model_name" in short
    assert long.count("\n  --") >= 34 and "--temperature" in long and "training:" in long


def test_check_trains_nothing(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main(settings(graph, tmp_path / "run", "--check")) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.findall(r"\b\d+\b", last) == ["40", "200"]  # nodes, edges
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "facts"),
    [
        (["--batch_size=500"], ["--global_batch_size 500", "200"]),
        (["--image_root=/nowhere"], ["--image_root /nowhere"]),
        (["--image_root=EMPTY"], ["40", "EMPTY/images", "--image_root"]),
        (["--model_name=EMPTY"], ["--model_name EMPTY"]),
        (["--output_dir=/proc/nowhere"], ["--output_dir /proc/nowhere", "/proc"]),
        (["--init_from=nowhere.pt"], ["--init_from nowhere.pt"]),
    ],
)
def test_errors_of_data_and_paths(
    more: list[str], facts: list[str], graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [flag.replace("EMPTY", str(tmp_path)) for flag in more]
    assert train_main(settings(graph, tmp_path / "run", *more)) == 2
    check_error(capsys.readouterr().err.replace(str(tmp_path), "EMPTY"), *facts)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_launch_without_flags(graph: Path, tmp_path: Path) -> None:
    """``accelerate launch launch.py`` trains on data in the original trainer's folder layout.

    The hub's cache holds tiny towers under the name of the default model.
    """
    graph_files(tmp_path / "data/processed", nodes=20, edges=70)
    model = tmp_path / "hub/hub/models--openai--clip-vit-base-patch32"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text("0" * 40)
    shutil.copytree(graph / "towers", model / "snapshots" / ("0" * 40))
    command = [sys.executable, "-m", "accelerate.commands.launch", str(REPOSITORY / "launch.py")]
    done = run(command, tmp_path, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    output = tmp_path / "runs/processed"
    assert len(read_metrics(output)) == 20  # one batch of 64 edges in each of 20 epochs
    assert len(list((output / "checkpoints").glob("multimodal_encoder_epoch_*.pt"))) == 20
    assert (output / "checkpoints/multimodal_encoder_final.pt").is_file()


def test_learning_rate_schedules() -> None:
    constant, cosine = Config(), Config(lr_schedule="cosine", warmup_steps=10, learning_rate=1.0)
    assert {lr_at(s, constant, 100) for s in range(1, 101)} == {5e-5}
    assert [lr_at(s, cosine, 110) for s in (1, 5, 10)] == [0.1, 0.5, 1.0]
    assert lr_at(60, cosine, 110) == pytest.approx(0.5) and lr_at(110, cosine, 110) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["convert", "a.pt", "b.pt"], ["a.pt", "b.pt", ".pt", ".safetensors"]),
        (["convert", "a.pt", "b.safetensors"], ["a.pt:"]),
        (["encode", "nowhere"], ["nowhere:"]),
        (["encode", "x", "--num_workers=-1"], ["--num_workers", "0", "mmgraph encode --help"]),
        (["fly"], ["VERB", "'fly'", "'encode'", "mmgraph --help"]),
        ([], ["VERB", "mmgraph --help"]),
        (["demo", "FULL"], ["FULL:"]),
    ],
)
def test_errors_of_verbs(
    arguments: list[str], facts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL/mine.txt").touch()
    assert main(arguments) == 2
    check_error(capsys.readouterr().err, *facts)
    assert (tmp_path / "FULL/mine.txt").exists()


def test_config_checks_its_values() -> None:
    with pytest.raises(UserError):
        Config(epochs=0)
