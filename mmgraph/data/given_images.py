"""Images that callers of the public collators pass in ``image_path``: paths, bytes, Pillow images and arrays."""

import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from PIL import Image

from mmgraph.data.image_paths import as_path
from mmgraph.data.input_rules import InputRules
from mmgraph.errors import UserError

KEY = "image_path"
# A key that has one of the first words, and no other words than these, looks like a misspelt KEY.
IMAGE_WORDS, PATH_WORDS = (
    {"image", "images", "img", "picture", "photo"},
    {"path", "pth", "paths", "file", "name", "url"},
)

Given = str | bytes | Image.Image | None


def given_image(node: Mapping[str, Any]) -> Given:
    """Return the image of a node dict: a path, an encoded image, a Pillow image, or None if the node has no image.

    Accepted values of ``image_path``: text or ``os.PathLike`` (a path); ``bytes``, ``bytearray`` or ``memoryview`` (an
    encoded image); a Pillow image; a NumPy array, (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8, or (H, W) uint16; a
    dict with ``bytes`` or ``path``, as in Hugging Face ``datasets``; and None, NaN or empty text for no image.

    Raises:
        UserError: the value is a URL, or of another type.
    """
    return _given(node.get(KEY))


def _given(value: Any) -> Given:
    match value:
        case None:
            return None
        case float() | np.floating() if np.isnan(value):
            return None
        case str():
            if "://" in value:
                raise UserError(f"{KEY} '{value}' is a URL; download the image and give the path of its file")
            return as_path(value)
        case os.PathLike():
            return os.fsdecode(value)
        case bytes() | bytearray() | memoryview():
            return bytes(value)
        case Image.Image():
            return value
        case np.ndarray():
            return _from_array(value)
        case dict() if value and value.keys() <= {"bytes", "path"}:
            return _given(value["bytes"] if value.get("bytes") is not None else value.get("path"))
    if type(value).__name__ == "NAType":
        return None
    raise UserError(
        f"{KEY} is a {type(value).__name__}; give a path, bytes, a Pillow image, a NumPy array, a dict with 'bytes' or "
        "'path', or None"
    )


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not shaped or not array.size or not (array.dtype == np.uint8 or (array.dtype == np.uint16 and array.ndim == 2)):
        raise UserError(
            f"{KEY} is an array of shape {array.shape} and dtype {array.dtype}; give (H, W), (H, W, 3) or (H, W, 4) of "
            "uint8, or (H, W) of uint16"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def check_keys(nodes: Sequence[Mapping[str, Any]], rules: InputRules) -> None:
    """Check that node dicts have the keys of their text and image.

    A node without the key ``image_path`` has no image. A node without the keys of its text has no text if it has no
    other keys either. So that a misspelt key is not taken for that, this check refuses nodes that lack a key which
    other nodes have, or which one of their own keys resembles.

    Raises:
        UserError: there are no nodes, or a key is missing. The message names the key and the node's keys.
    """
    if not nodes:
        raise UserError("the batch has no nodes; give at least one")
    known = {name for node in nodes for name in node}
    for node in nodes:
        for key in (KEY, *rules.columns):
            if key not in node:
                _check_missing(key, node, known, rules)


def _check_missing(key: str, node: Mapping[str, Any], known: set[Any], rules: InputRules) -> None:
    others = [str(name) for name in node if name not in ("node_id", KEY, *rules.columns)]
    near = get_close_matches(key, others, 1, cutoff=0.85 if key == KEY else 0.75)
    if key == KEY:
        words = {name: set(re.split(r"[\W_]+", name.lower())) for name in others}
        near += [name for name in others if words[name] & IMAGE_WORDS and words[name] <= IMAGE_WORDS | PATH_WORDS]
    has_text = any(name in node for name in rules.columns)
    required = rules.text_columns is not None or (not has_text and bool(others))
    if near or key in known or (key != KEY and required):
        found = f", only {', '.join(map(str, node))}" if node else " and no other key"
        hint = f"; did you mean '{near[0]}'? Set" if near else "; set"
        raise UserError(f"a node has no key '{key}'{found}{hint} '{key}' to None for a node without it")
