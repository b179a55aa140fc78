"""The rules by which a node's columns become the inputs of the towers: its text, and the pixels of its image."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from decimal import Decimal
from functools import cached_property
from typing import Any, Literal

import numpy as np

from mmgraph.config import Config
from mmgraph.errors import UserError
from mmgraph.flags.data import background_color, column_names


@dataclasses.dataclass(frozen=True)
class InputRules:
    """How a node's columns become its text and image. The defaults are the rules of the original trainer.

    Args:
        truncated_images: result for a truncated image file: the part that can be decoded, or a black image.
        background: color under transparent pixels: ``white``, or ``R,G,B``; ``keep`` drops the transparency, so that
            each pixel keeps the color that it has without it.
        sixteen_bit_images: ``clip`` makes values above 255 white, as Pillow does; ``scale`` divides by 257.
        text_columns: columns whose values are joined to the text, separated by commas. None: ``summary`` if it has
            more than three words, else ``short_name``.

    Raises:
        UserError: a value is not one of those above, or a column is empty or repeated.
    """

    truncated_images: Literal["partial", "black"] = "partial"
    background: str = "keep"
    sixteen_bit_images: Literal["clip", "scale"] = "clip"
    text_columns: str | None = None

    def __post_init__(self) -> None:
        for name, values in (("truncated_images", ("partial", "black")), ("sixteen_bit_images", ("clip", "scale"))):
            if getattr(self, name) not in values:
                raise UserError(f"{name} '{getattr(self, name)}': must be {' or '.join(values)}")
        _ = self.color, self.columns  # raise an error for a wrong value

    @cached_property
    def color(self) -> tuple[int, int, int] | None:
        """Color under transparent pixels; None if the transparency is dropped."""
        return background_color(self.background)

    @classmethod
    def of(cls, config: Config) -> "InputRules":
        """Return the rules of a run."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Columns of the node table that :meth:`text` reads."""
        return column_names(self.text_columns) or ("short_name", "summary")

    def text(self, node: Mapping[str, Any]) -> str:
        """Return a node's text; one space if it has no text.

        Raises:
            UserError: a value is neither text nor a number.
        """
        if self.text_columns is not None:
            values = (as_text(name, node.get(name)).strip() for name in self.columns)
            return " ".join(value for value in values if value) or " "
        for name, min_words in (("summary", 4), ("short_name", 1)):
            text = as_text(name, node.get(name))
            if len(text.split()) >= min_words:
                return text
        return " "

    def image_key(self) -> dict[str, str]:
        """Return the rules for images as a part of cache keys.

        Rules that were added later are left out while they have their default, so that older caches stay valid.
        """
        key: dict[str, str] = {"truncated_images": self.truncated_images}
        if self.color is not None:
            key["background"] = ",".join(map(str, self.color))
        if self.sixteen_bit_images != "clip":
            key["sixteen_bit_images"] = self.sixteen_bit_images
        return key

    def key(self) -> dict[str, str]:
        """Return all rules as a part of cache keys; see :meth:`image_key`."""
        return self.image_key() | ({} if self.text_columns is None else {"text_columns": ",".join(self.columns)})


def as_text(name: str, value: object) -> str:
    """Return the text of a cell; empty for a missing value (None, NaN or pandas' NA).

    Args:
        name: name of the column, for the message.
        value: text or a number.

    Raises:
        UserError: the value is something else, such as a list.
    """
    if isinstance(value, str):
        return value
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return ""
    if isinstance(value, numbers.Real | Decimal | np.bool_):  # Real: also NumPy's numbers
        return "" if math.isnan(value) else str(value)
    raise UserError(f"{name} is a {type(value).__name__}: {str(value)[:40]!r}; give text, a number or None")
