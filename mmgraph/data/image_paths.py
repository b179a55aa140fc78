"""Image paths: from the column of a node table to the file to open."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmgraph.data.images import OUTSIDE
from mmgraph.errors import UserError
from mmgraph.utils.log import log


def as_path(image_path: object) -> str | None:
    """The path that the cell of a table holds; None where it holds none. ``\\`` is read as ``/``."""
    return image_path.replace("\\", "/") if isinstance(image_path, str) and image_path.strip() else None


class ImagePaths:
    """Turns the ``image_path`` of a row into the path to open.

    ``\\`` is read as ``/``. A relative path is looked up below ``root``, or, without one, below the folder of the node
    table and then the working directory (the original's rule).

    Args:
        confine: a path that leaves the root (by ``..``, an absolute path, a symbolic link) is not to be opened; without
            ``root``, the root is the folder of the node table alone.

    Raises:
        UserError: there is no such root.
    """

    def __init__(self, nodes_path: str | Path, root: str | Path | None = None, confine: bool = False):
        if root is not None and not Path(root).is_dir():
            raise UserError(f"--image_root {root}: no such folder")
        roots = (Path(root),) if root is not None else (Path(nodes_path).parent, Path())
        self.roots = ["" if str(folder) == "." else str(folder) for folder in roots[: 1 if confine else None]]
        self.confined_to = os.path.join(os.path.realpath(roots[0]), "") if confine else None  # noqa: PTH118

    def resolve(self, image_path: object) -> str | None:
        """The path to open, or None where the row has no image. A path that leaves the root is ``images.OUTSIDE``."""
        path = as_path(image_path)
        if path is None:
            return None
        # Not Path's: it interns the parts of every path, and the table of interned strings grows by megabytes.
        candidates = [os.path.join(root, path) for root in self.roots]  # noqa: PTH118
        for candidate in candidates[:-1]:
            if os.path.exists(candidate):  # noqa: PTH110 - False, not an error, where a name is too long
                return candidate
        if self.confined_to is not None and not self._is_inside(candidates[0]):
            return OUTSIDE
        if len(candidates) > 1 and not os.path.exists(candidates[-1]):  # noqa: PTH110
            return candidates[0]
        return candidates[-1]

    def _is_inside(self, path: str) -> bool:
        try:
            return os.path.realpath(path).startswith(str(self.confined_to))
        except (OSError, ValueError):  # the latter of a NUL byte
            return False

    def check(self, image_paths: pa.ChunkedArray | Sequence[str | None], seed: int, sample: int = 1000) -> None:
        """Look up to ``sample`` of the paths up, drawn by ``seed``, so that a wrong root is seen before training.

        Raises:
            UserError: none of the files exists. More than 10 % missing is one line in the log.
        """
        if not isinstance(image_paths, pa.ChunkedArray):
            image_paths = pa.chunked_array([pa.array(image_paths, pa.large_string(), from_pandas=True)])
        drawn = [path for path in self._draw(image_paths, seed, sample) if as_path(path) is not None]
        if not drawn:
            log("no node has an image path: every image is black")
            return
        resolved = [self.resolve(path) for path in drawn]
        missing = [path for path in resolved if not os.path.isfile(str(path))]  # noqa: PTH113
        if len(missing) == len(resolved):
            tried = resolved[0] if resolved[0] != OUTSIDE else f"{drawn[0]}, which --confine_images refuses"
            raise UserError(
                f"none of {len(resolved):,} image files looked up exists; the first tried is {tried}. "
                "Set --image_root to the folder that image_path starts from"
            )
        if len(missing) > 0.1 * len(resolved):
            share = len(missing) / len(resolved)
            log(f"warning: {share:.0%} of {len(resolved):,} image files looked up do not exist, such as {missing[0]}")

    @staticmethod
    def _draw(image_paths: pa.ChunkedArray, seed: int, sample: int) -> list[str | None]:
        """Up to ``sample`` of the filled paths. Each gets a random number, and those of the least are drawn."""
        generator = np.random.default_rng(seed)
        numbers, rows = np.empty(0), np.empty(0, dtype=np.int64)
        for start in range(0, len(image_paths), 1 << 16):
            part = image_paths.slice(start, 1 << 16)
            filled = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(part), ""), False).to_numpy()
            numbers = np.append(numbers, generator.random(len(part))[filled])
            rows = np.append(rows, start + np.flatnonzero(filled))
            least = np.argsort(numbers)[:sample]
            numbers, rows = numbers[least], rows[least]
        return [image_paths[int(row)].as_py() for row in rows]
