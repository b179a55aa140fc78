"""Flags are declared once, as fields of Config, which hold their help, group, valid range and uses."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from mmgraph.arguments import parse_config
from mmgraph.checkpoints import run_start
from mmgraph.checkpoints.resume_state import compute_run_fingerprint
from mmgraph.cli import verbs
from mmgraph.config import COMMON, FIXED_ON_RESUME, INHERITED, Config
from mmgraph.errors import UserError
from mmgraph.utils.fields import GROUPS, Range

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
FIXED = [
    "seed", "global_batch_size", "fused_dim", "proj_dim", "temperature", "graph_loss_weight", "learning_rate",
    "weight_decay", "lr_schedule", "warmup_steps", "max_grad_norm", "confine_images", "truncated_images",
    "false_negatives", "missing_image", "eval_fraction", "sixteen_bit_images", "background", "text_columns",
]  # fmt: skip


def refusal(**settings: Any) -> str:
    """Return the error message of a Config, or an empty string if the settings are valid."""
    try:
        Config(**settings)
    except UserError as error:
        return str(error)
    return ""


def listed_flags(flag: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the flags that ``--help`` or ``--help_all`` lists, and the titles above them, which end in a colon."""
    with pytest.raises(SystemExit):
        parse_config([flag])
    lines = re.findall(r"^(?:  --(\w+)|(\w+:))", capsys.readouterr().out, re.MULTILINE)
    return [flag or title for flag, title in lines]


def test_each_field_has_a_group_and_help() -> None:
    for field in FIELDS.values():
        assert field.metadata["group"] in GROUPS and field.metadata["help"], field.name
    assert {field.metadata["group"] for field in FIELDS.values()} == set(GROUPS)


def bounds() -> list[Any]:
    """Return a case per bound of each range: flag, a valid value, an invalid value, range.

    One of the values is the bound, and the other is the next number.
    """
    cases = []
    for name, field in FIELDS.items():
        is_integer = not isinstance(field.default, float)

        def neighbor(bound: float, towards: int, is_integer: bool = is_integer) -> float:
            return bound + towards if is_integer else math.nextafter(bound, towards * math.inf)

        for valid in field.metadata["ranges"]:
            pairs = {
                "above": (neighbor(valid.above, 1), valid.above),
                "at_least": (valid.at_least, neighbor(valid.at_least, -1)),
                "at_most": (valid.at_most, neighbor(valid.at_most, 1)),
                "below": (neighbor(valid.below, -1), valid.below),
            }
            cases += [
                pytest.param(name, *pair, valid, id=f"{name}-{bound}")
                for bound, pair in pairs.items()
                if math.isfinite(getattr(valid, bound))
            ]
    return cases


@pytest.mark.parametrize(("name", "inside", "outside", "valid"), bounds())
def test_values_beyond_a_bound_are_refused(name: str, inside: float, outside: float, valid: Range) -> None:
    assert refusal(**{name: outside}) == f"--{name} {outside}: must be {valid.description}"
    assert f"must be {valid.description}" not in refusal(**{name: inside})  # another check may refuse the value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 0.0, "--temperature 0.0: must be above 0"),
        ("temperature", math.nan, "--temperature nan: must be above 0"),
        ("learning_rate", math.inf, "--learning_rate inf: must be above 0"),
        ("weight_decay", 0.0, ""),
        ("weight_decay", -1e-9, "--weight_decay -1e-09: must be 0 or more"),
        ("max_grad_norm", math.inf, "--max_grad_norm inf: must be 0 or more"),
        ("max_bad_images", 1.0, ""),
        ("max_bad_images", 1.1, "--max_bad_images 1.1: must be a fraction from 0 to 1"),
        ("eval_fraction", 0.999, ""),
        ("eval_fraction", 1.0, "--eval_fraction 1.0: must be 0 or more, and below 1"),
        ("seed", -1, "--seed -1: must be 0 or more"),
        ("seed", 2**63 - 1, ""),
        ("seed", 2**63, "--seed 9223372036854775808: must be below 2^63"),
        ("max_steps", None, ""),
        ("max_steps", 0, "--max_steps 0: must be above 0"),
        ("micro_batch_size", -1, "--micro_batch_size -1: must be above 0"),
        ("fused_dim", 12, "--fused_dim 12: must be a multiple of 8, the number of attention heads"),
        ("num_workers", 0, ""),
    ],
)
def test_values_and_messages(name: str, value: float, message: str) -> None:
    assert refusal(**{name: value}) == message


def test_every_number_has_a_range() -> None:
    numbers = {name for name, field in FIELDS.items() if type(field.default) in (int, float)}
    assert {name for name in numbers if not FIELDS[name].metadata["ranges"]} == set()


def test_flags_fixed_on_resume() -> None:
    assert set(FIXED_ON_RESUME) == set(FIXED)
    fingerprint = compute_run_fingerprint(Config(seed=7), "n", "e")
    assert set(fingerprint) == {*FIXED, "nodes table", "edges table"} and fingerprint["seed"] == 7
    cosine = compute_run_fingerprint(Config(lr_schedule="cosine"), "n", "e")
    assert set(cosine) == {*FIXED, "epochs", "max_steps", "nodes table", "edges table"}


@pytest.mark.parametrize("name", FIXED)
def test_a_state_written_before_a_flag_existed_has_its_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    current = compute_run_fingerprint(Config(), "n", "e")
    older = {key: value for key, value in current.items() if key != name}
    monkeypatch.setattr(run_start, "read_record", lambda state: {"identity": older})
    run_start.check_run_fingerprint(Path("state"), current, "another run")
    with pytest.raises(UserError, match=rf"^another run: {name} {current[name]} -> changed; "):
        run_start.check_run_fingerprint(Path("state"), {**current, name: "changed"}, "another run")


def test_flags_that_other_commands_read_from_the_run() -> None:
    assert set(INHERITED) == {
        "nodes", "edges", "image_root", "confine_images", "model_name", "truncated_images", "tower_cache",
        "eval_edges", "eval_fraction", "seed", "sixteen_bit_images", "background", "text_columns",
    }  # fmt: skip
    assert {*verbs.RUN_FLAGS, *verbs.SPLIT_FLAGS} <= set(INHERITED)


def test_help_shows_the_common_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(COMMON) == {
        "nodes", "edges", "image_root", "demo", "model_name", "epochs", "max_steps", "global_batch_size",
        "learning_rate", "seed", "eval_fraction", "num_workers", "output_dir", "resume", "report_to", "check",
    }  # fmt: skip
    flags = [name for name in listed_flags("--help", capsys) if not name.endswith(":")]
    assert sorted(flags) == sorted([*COMMON, "config", "help", "help_all"])


def test_help_all_shows_each_flag_below_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    group, group_of_flag, titles = "", {}, []
    for name in listed_flags("--help_all", capsys):
        if name.endswith(":"):
            group = name[:-1]
            titles.append(group)
        else:
            group_of_flag[name] = group
    assert titles == ["usage", "start", *GROUPS]
    assert {name: group_of_flag[name] for name in FIELDS} == {
        name: field.metadata["group"] for name, field in FIELDS.items()
    }
