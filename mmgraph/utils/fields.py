"""Command-line flags, declared as dataclass fields with metadata."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

Group = Literal["data", "model", "training", "evaluation", "towers", "loading", "output", "tracking", "processes"]
GROUPS: tuple[Group, ...] = get_args(Group)  # in the order of --help_all


class Range(NamedTuple):
    """A range of finite numbers, with its description for error messages."""

    description: str
    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def contains(self, value: float) -> bool:
        """Whether ``value`` is in the range. NaN is in no range."""
        return self.above < value < self.below and self.at_least <= value <= self.at_most


ABOVE_0 = Range("above 0", above=0)
FROM_0 = Range("0 or more", at_least=0)
BELOW_2_63 = Range("below 2^63", below=2**63)
FROM_0_TO_1 = Range("a fraction from 0 to 1", at_least=0, at_most=1)
FROM_0_BELOW_1 = Range("0 or more, and below 1", at_least=0, below=1)


def flag(
    default: Any,
    group: Group,
    help: str,
    *ranges: Range,
    aliases: tuple[str, ...] = (),
    common: bool = False,
    fixed: bool = False,
    inherited: bool = False,
) -> Any:
    """Declare a flag: a dataclass field whose metadata drives help pages, range checks, resume checks and verbs.

    Args:
        default: value if the flag is not set.
        group: heading of the flag in ``--help_all``.
        help: help text of the flag.
        ranges: the value must be in all of them. None is also valid if it is the default.
        aliases: other spellings of the flag.
        common: ``--help`` also shows the flag, not only ``--help_all``.
        fixed: the value must not change when a run is resumed.
        inherited: verbs that read a checkpoint (encode, evaluate, ...) take the value from the run's ``config.yaml``.
    """
    metadata = {"help": help, "aliases": list(aliases), "group": group, "ranges": ranges, "common": common}
    return dataclasses.field(default=default, metadata={**metadata, "fixed": fixed, "inherited": inherited})
