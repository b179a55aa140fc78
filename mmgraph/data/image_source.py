"""Sources of the images of a graph's nodes."""

import os
import stat
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mmgraph.data.image_paths import ImagePaths, as_path
from mmgraph.data.images import IMAGE_STATUS, OUTSIDE_IMAGE_ROOT
from mmgraph.data.node_table import NodeTable
from mmgraph.utils.files import file_signature

MAX_FILE_BYTES = 1 << 30  # larger image files are not read


class ImageSource(Protocol):
    """Reads the images of nodes. DataLoader workers may get a pickled copy, so it must support pickle.

    :meth:`locate` returns a reference that identifies a node's image. The other methods take this reference.

    Attributes:
        columns: columns of the node table that :meth:`locate` and :meth:`describe` need.
        location: identifies where the images are stored, independent of the working directory. The file name of stored
            image hashes depends on ``location``.
    """

    columns: tuple[str, ...]
    location: str

    def locate(self, node: Mapping[str, Any]) -> Hashable:
        """Return the reference of a row's image; None if it has no image.

        Rows with the same image have equal references, because caches use the reference as a key.
        """

    def describe(self, node: Mapping[str, Any]) -> str:
        """Return a description of a row's image for the report; empty if it has no image."""

    def read(self, reference: Any) -> tuple[bytes | None, int]:
        """Return the encoded image or None, and an index into ``images.IMAGE_STATUS``. Never raises."""

    def signature(self, reference: Any, min_age_ns: int) -> bytes | None:
        """Return the signature of an image, as :func:`~mmgraph.utils.files.file_signature`; ``b""`` for no image."""

    def check(self, nodes: NodeTable, seed: int) -> None:
        """Check a random sample of the images.

        Raises:
            UserError: no image of the sample exists.
        """


class ImageFiles:
    """Images in files. The column ``image_path`` contains their paths.

    Args:
        paths: resolves the paths. None: relative paths start from the working directory, as in the public collators.
    """

    columns: tuple[str, ...] = ("image_path",)

    def __init__(self, paths: ImagePaths | None = None):
        self.paths = paths
        # Only the first root is used. The second may be the working directory, which must not affect self.location.
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
    """Return the bytes of an image file or None, and an index into ``IMAGE_STATUS``."""
    if path is None or path == OUTSIDE_IMAGE_ROOT:
        return None, IMAGE_STATUS.index("no image path" if path is None else "outside the image root")
    try:
        status = os.stat(path)  # noqa: PTH116 - Path.stat is slow for millions of files
        if not stat.S_ISREG(status.st_mode):  # a folder, or a pipe or device whose data may never end
            return None, IMAGE_STATUS.index("file not found")
        if status.st_size > MAX_FILE_BYTES:
            return None, IMAGE_STATUS.index("file too large")
        return Path(path).read_bytes(), 0
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the path contains a NUL byte
        return None, IMAGE_STATUS.index("file not found")
    except OSError:
        return None, IMAGE_STATUS.index("unreadable")


UNRESOLVED_FILES = ImageFiles()  # used by the public collators
