"""Relative paths to a DeepSpeed JSON file in an accelerate config."""

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from launches import REPOSITORY

from mmgraph.distributed.deepspeed import CONFIG_FILE, build_plugin
from mmgraph.errors import UserError


def stage(path: str) -> int:
    """Return the ZeRO stage of the plugin that is built when `accelerate launch` passes this config file."""
    launched = {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no", "DS_ACCELERATOR": "cpu",
        "ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file,mixed_precision", CONFIG_FILE: path,
    }  # fmt: skip
    with patch.dict(os.environ, launched):  # also undoes the changes of build_plugin
        return build_plugin(cpu=True).deepspeed_config["zero_optimization"]["stage"]


@pytest.mark.parametrize("file", sorted(path.name for path in (REPOSITORY / "ds_configs").iterdir()))
def test_relative_path_from_another_folder(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path relative to the checkout is found from any working directory."""
    monkeypatch.chdir(tmp_path)
    expected = json.loads((REPOSITORY / "ds_configs" / file).read_text())["zero_optimization"]["stage"]
    assert stage(f"ds_configs/{file}") == expected


def test_file_in_the_working_directory_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs/zero2.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert stage("ds_configs/zero2.json") == 1


def test_error_names_the_missing_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error contains the path as the accelerate config has it, not a resolved path."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"DeepSpeed config ds_configs/none\.json: "):
        stage("ds_configs/none.json")
