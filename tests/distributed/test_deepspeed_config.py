"""The DeepSpeed JSON that an accelerate config names by a path relative to the checkout."""

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
from launches import REPOSITORY

from mmgraph.distributed.deepspeed import CONFIG_FILE, build_plugin
from mmgraph.errors import UserError


def stage(path: str) -> int:
    """The ZeRO stage of the plugin, as `accelerate launch` sets it up with this config file."""
    launched = {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no", "DS_ACCELERATOR": "cpu",
        "ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file,mixed_precision", CONFIG_FILE: path,
    }  # fmt: skip
    with patch.dict(os.environ, launched):  # build_plugin changes more of them
        return build_plugin(cpu=True).deepspeed_config["zero_optimization"]["stage"]


@pytest.mark.parametrize("file", sorted(path.name for path in (REPOSITORY / "ds_configs").iterdir()))
def test_a_relative_path_from_another_folder(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = json.loads((REPOSITORY / "ds_configs" / file).read_text())["zero_optimization"]["stage"]
    assert stage(f"ds_configs/{file}") == expected


def test_a_file_of_the_working_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs/zero2.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert stage("ds_configs/zero2.json") == 1


def test_a_path_that_is_nowhere_is_named_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"DeepSpeed config ds_configs/none\.json: "):
        stage("ds_configs/none.json")
