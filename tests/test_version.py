"""The version is available if mmgraph runs from a checkout and is not installed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import newest, settings
from launches import REPOSITORY, run

import mmgraph

# Runs a script as if mmgraph were not installed: importlib.metadata finds no mmgraph package.
NOT_INSTALLED = """
import importlib.metadata, runpy, sys
installed_version = importlib.metadata.version
def version(name):
    if name == "mmgraph":
        raise importlib.metadata.PackageNotFoundError(name)
    return installed_version(name)
importlib.metadata.version = version
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_from_a_checkout_records_the_version(graph: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    script = [sys.executable, "-c", NOT_INSTALLED, str(REPOSITORY / "launch.py")]
    done = run([*script, *settings(graph, output, "--max_steps=2", "--report_to=none")], PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stdout + done.stderr
    state = json.loads((newest(output) / "state.json").read_text())
    [start] = json.loads((output / "environment.json").read_text())
    for versions in (state["versions"], start["versions"]):
        assert versions["mmgraph"] == mmgraph.__version__ and {"python", "torch", "accelerate"} <= versions.keys()


def test_the_package_is_built_with_this_version(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "mmgraph").mkdir()
    shutil.copy(REPOSITORY / "mmgraph/__init__.py", tmp_path / "mmgraph")
    build = "from setuptools.build_meta import prepare_metadata_for_build_wheel as p; print(p('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [metadata] = tmp_path.glob("*.dist-info/METADATA")
    assert f"Version: {mmgraph.__version__}\n" in metadata.read_text()


def test_the_version_is_read_without_torch_and_numpy() -> None:
    code = "import sys, mmgraph; print(mmgraph.__version__, 'torch' in sys.modules or 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.split() == [mmgraph.__version__, "False"], done.stderr
