"""Resolves the image paths of a node table to the files to open."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmgraph.data.images import OUTSIDE_IMAGE_ROOT
from mmgraph.errors import UserError
from mmgraph.utils.log import log


def as_path(image_path: object) -> str | None:
    """Return the path in a cell of a table, with ``\\`` replaced by ``/``; None if the cell has no path."""
    return image_path.replace("\\", "/") if isinstance(image_path, str) and image_path.strip() else None


class ImagePaths:
    """Resolves the ``image_path`` of a row to the path to open.

    ``\\`` is replaced by ``/``. A relative path starts from ``root``. Without ``root``, it starts from the folder of
    the node table; if no file exists there, it starts from the working directory, as in the original trainer.

    Args:
        nodes_path: path of the node table.
        root: folder from which relative paths start, or None.
        confine: refuse paths that leave the root through ``..``, an absolute path or a symbolic link. If ``root`` is
            None, the folder of the node table is then the only root.

    Raises:
        UserError: ``root`` is not a folder.
    """

    def __init__(self, nodes_path: str | Path, root: str | Path | None = None, confine: bool = False):
        if root is not None and not Path(root).is_dir():
            raise UserError(f"--image_root {root}: no such folder")
        roots = (Path(root),) if root is not None else (Path(nodes_path).parent, Path())
        self.roots = ["" if str(folder) == "." else str(folder) for folder in roots[: 1 if confine else None]]
        self.confined_to = os.path.join(os.path.realpath(roots[0]), "") if confine else None  # noqa: PTH118

    def resolve(self, image_path: object) -> str | None:
        """Return the path to open; None if the row has no image; ``images.OUTSIDE_IMAGE_ROOT`` for a refused path."""
        path = as_path(image_path)
        if path is None:
            return None
        # Not pathlib: it interns the parts of every path, so the table of interned strings would grow by megabytes.
        candidates = [os.path.join(root, path) for root in self.roots]  # noqa: PTH118
        for candidate in candidates[:-1]:
            if os.path.exists(candidate):  # noqa: PTH110 - Path.exists raises if a name is too long; this returns False
                return candidate
        if self.confined_to is not None and not self._is_inside(candidates[0]):
            return OUTSIDE_IMAGE_ROOT
        if len(candidates) > 1 and not os.path.exists(candidates[-1]):  # noqa: PTH110
            return candidates[0]
        return candidates[-1]

    def _is_inside(self, path: str) -> bool:
        try:
            return os.path.realpath(path).startswith(str(self.confined_to))
        except (OSError, ValueError):  # ValueError: the path contains a NUL byte
            return False

    def check(self, image_paths: pa.ChunkedArray | Sequence[str | None], seed: int, sample: int = 1000) -> None:
        """Check that the files of a random sample of the paths exist, so that a wrong root is found before training.

        If more than 10 % of them are missing, a warning is logged.

        Args:
            image_paths: (N,) paths as in the node table; empty or None: the node has no image.
            seed: seed of the sample.
            sample: maximum number of paths to check.

        Raises:
            UserError: none of the files exists.
        """
        if not isinstance(image_paths, pa.ChunkedArray):
            image_paths = pa.chunked_array([pa.array(image_paths, pa.large_string(), from_pandas=True)])
        drawn = [path for path in self._draw(image_paths, seed, sample) if as_path(path) is not None]
        if not drawn:
            log("no node has an image path, so all images are black")
            return
        resolved = [self.resolve(path) for path in drawn]
        missing = [path for path in resolved if not os.path.isfile(str(path))]  # noqa: PTH113
        if len(missing) == len(resolved):
            first = resolved[0] if resolved[0] != OUTSIDE_IMAGE_ROOT else f"{drawn[0]}, which --confine_images refuses"
            remedy = "Set --image_root to the folder that image_path starts from"
            if "://" in str(drawn[0]):
                first, remedy = drawn[0], "URLs are not read: download the images, and set image_path to their files"
            raise UserError(
                f"none of the {len(resolved):,} checked image files exists; the first path is {first}. {remedy}"
            )
        if len(missing) > 0.1 * len(resolved):
            share = len(missing) / len(resolved)
            log(f"warning: {share:.0%} of the {len(resolved):,} checked image files do not exist, such as {missing[0]}")

    @staticmethod
    def _draw(image_paths: pa.ChunkedArray, seed: int, sample: int) -> list[str | None]:
        """Return up to ``sample`` of the paths that are not empty.

        Each path gets a random number, and the paths with the smallest numbers are drawn. So the column can be read in
        chunks, and only the sample stays in memory.
        """
        generator = np.random.default_rng(seed)
        numbers, rows = np.empty(0), np.empty(0, dtype=np.int64)
        for start in range(0, len(image_paths), 1 << 16):
            part = image_paths.slice(start, 1 << 16)
            filled = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(part), ""), False).to_numpy()
            numbers = np.append(numbers, generator.random(len(part))[filled])
            rows = np.append(rows, start + np.flatnonzero(filled))
            smallest = np.argsort(numbers)[:sample]
            numbers, rows = numbers[smallest], rows[smallest]
        return [image_paths[int(row)].as_py() for row in rows]
