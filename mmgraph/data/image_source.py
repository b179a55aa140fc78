"""Where the images of a graph's nodes are read from."""

import os
import stat
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mmgraph.data.image_paths import ImagePaths, as_path
from mmgraph.data.images import IMAGE_STATUS, OUTSIDE
from mmgraph.data.node_table import NodeTable
from mmgraph.utils.files import file_signature

MAX_FILE_BYTES = 1 << 30  # of an image file; a larger one is not read


class ImageSource(Protocol):
    """What is read of images, by a reference that a node's row gives. It is pickled into DataLoader workers.

    Attributes:
        columns: of the node table, that :meth:`locate` and :meth:`describe` need.
        place: names where the images are, whatever the working directory; caches of their hashes are kept by it.
    """

    columns: tuple[str, ...]
    location: str

    def locate(self, node: Mapping[str, Any]) -> Hashable:
        """Where a row says that its image is; equal for equal images, so that caches find them. None without one."""

    def describe(self, node: Mapping[str, Any]) -> str:
        """What a row says of its image, for people; empty where it has none."""

    def read(self, reference: Any) -> tuple[bytes | None, int]:
        """The encoded image, or None; and an index into :data:`mmgraph.data.images.IMAGE_STATUS`. Raises nothing."""

    def signature(self, reference: Any, min_age_ns: int) -> bytes | None:
        """The state of an image, as :func:`mmgraph.utils.files.file_signature`; ``b""`` where there is none."""

    def check(self, nodes: NodeTable, seed: int) -> None:
        """Look for some images, drawn by ``seed``. Raises :class:`UserError` where none is found."""


class ImageFiles:
    """Images in files, whose paths are in the column ``image_path``.

    Args:
        paths: how they are looked up. Without it each is opened as it is given, which is the public collators' rule.
    """

    columns: tuple[str, ...] = ("image_path",)

    def __init__(self, paths: ImagePaths | None = None):
        self.paths = paths
        # Not the working directory, which may be a second root: a start from elsewhere finds the same hashes.
        self.location = "" if paths is None else str(Path(paths.roots[0]).resolve())

    def locate(self, node: Mapping[str, Any]) -> str | None:
        image_path = node.get("image_path")
        return as_path(image_path) if self.paths is None else self.paths.resolve(image_path)

    def describe(self, node: Mapping[str, Any]) -> str:
        return node["image_path"] or ""

    def read(self, reference: str | None) -> tuple[bytes | None, int]:
        return read_file(reference)

    def signature(self, reference: str | None, min_age_ns: int) -> bytes | None:
        return b"" if reference is None else file_signature(reference, min_age_ns)

    def check(self, nodes: NodeTable, seed: int) -> None:
        if self.paths is not None:
            with nodes.column("image_path") as image_paths:
                self.paths.check(image_paths, seed)


def read_file(path: str | None) -> tuple[bytes | None, int]:
    """An image file's bytes, or None; and an index into ``IMAGE_STATUS``."""
    if path is None or path == OUTSIDE:
        return None, IMAGE_STATUS.index("no image path" if path is None else "outside the image root")
    try:
        status = os.stat(path)  # noqa: PTH116 - of millions of pictures
        if not stat.S_ISREG(status.st_mode):  # a folder; or a pipe or device, which may never end
            return None, IMAGE_STATUS.index("file not found")
        if status.st_size > MAX_FILE_BYTES:
            return None, IMAGE_STATUS.index("file too large")
        return Path(path).read_bytes(), 0
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of a NUL byte
        return None, IMAGE_STATUS.index("file not found")
    except OSError:
        return None, IMAGE_STATUS.index("unreadable")


AS_GIVEN = ImageFiles()
