"""What nodes' texts and image files hold, as hashes: how a stored token is known to be of this very text or image."""

import hashlib
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from mmgraph.data.image_source import ImageSource
from mmgraph.data.images import IMAGE_STATUS
from mmgraph.data.node_inputs import node_text
from mmgraph.data.node_table import NodeTable
from mmgraph.distributed.collectives import raise_on_all_ranks
from mmgraph.utils.files import save_array

HASH = np.dtype("S16")  # BLAKE2b, 128 bits
SEEN = np.dtype([("signature", HASH), ("hash", HASH)])  # of an image file: where it lies and when it changed; its bytes
AT_ONCE = 4096  # image files that are looked at together
MIN_AGE_NS = 2_000_000_000  # a file that changed less than this before it was read may change again at the same time


class ContentHashes(NamedTuple):
    """Two equal hashes are of equal texts, or images."""

    texts: np.ndarray  # (N,) HASH of each node's text
    images: np.ndarray  # (N,) HASH of each node's image file, or of why there is none


def text_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=HASH.itemsize).digest()


def image_hash(data: bytes | None, status: int) -> bytes:
    """Of what :meth:`mmgraph.data.image_source.ImageSource.read` gave."""
    if data is None:
        return hashlib.blake2b(IMAGE_STATUS[status].encode(), digest_size=HASH.itemsize, person=b"no image").digest()
    return hashlib.blake2b(data, digest_size=HASH.itemsize).digest()


def without_file(images: np.ndarray) -> np.ndarray:
    """Which of :class:`ContentHashes`' image hashes are of no file's bytes: (N,) bool."""
    return np.isin(images, np.array([image_hash(None, status) for status in range(len(IMAGE_STATUS))], HASH))


def read_content_hashes(
    nodes: NodeTable, images: ImageSource, table: str | Path, fingerprint: str, folder: Path, accelerator: Accelerator
) -> ContentHashes:
    """Hash all nodes, each rank its share. Called by all ranks; every rank gets all hashes.

    Texts are those of the table's bytes, and hashed once for each ``fingerprint``. An image file is looked at each
    time, and read where its path, size or times are not those that it was last hashed with.

    Args:
        table: the node table's path.
        folder: where hashes are kept from start to start, if it can be written.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    rows = range(len(nodes) * rank // world_size, len(nodes) * (rank + 1) // world_size)
    kept = folder / f"texts-{fingerprint[:16]}.npy"
    location = f"{Path(table).resolve()}\n{images.location}"
    seen = folder / f"images-{text_hash(location).hex()[:16]}.npy"
    texts = _read(kept, HASH)
    known = all(gather_object([len(texts) == len(nodes)]))  # on every host
    own = raise_on_all_ranks(
        accelerator, lambda: (texts[:0] if known else _texts(nodes, rows), _images(nodes, images, rows, seen))
    )
    parts: list[tuple[np.ndarray, np.ndarray]] = gather_object([own])
    found = np.concatenate([part[1] for part in parts])
    if not known:
        texts = np.concatenate([part[0] for part in parts])
    if accelerator.is_local_main_process:
        with suppress(OSError):  # a folder that can only be read
            folder.mkdir(parents=True, exist_ok=True)
            if not known:
                save_array(kept, texts)
            save_array(seen, found)
    return ContentHashes(texts, found["hash"])


def _texts(nodes: NodeTable, rows: range) -> np.ndarray:
    texts = (node_text(node) for node in nodes.scan(rows, ("short_name", "summary")))
    return np.fromiter(map(text_hash, texts), HASH, len(rows))


def _images(nodes: NodeTable, images: ImageSource, rows: range, seen: Path) -> np.ndarray:
    """SEEN of the rows' image files; those that are as they were seen before are not read."""
    before = np.sort(_read(seen, SEEN), order="signature")
    found = np.zeros(len(rows), SEEN)
    scanned = nodes.scan(rows, images.columns)
    with ThreadPoolExecutor(8) as readers:
        for start in range(0, len(rows), AT_ONCE):  # the references of all rows would be a list as large as the table
            references = [images.locate(node) for node in islice(scanned, AT_ONCE)]
            found[start : start + AT_ONCE] = _look(images, references, before, readers)
    return found


def _look(
    images: ImageSource, references: list[Hashable], before: np.ndarray, readers: ThreadPoolExecutor
) -> np.ndarray:
    """SEEN of some images; ``before`` is sorted by signature."""
    found = np.zeros(len(references), SEEN)
    found["signature"] = [_signature(images, reference) for reference in references]
    places = np.searchsorted(before["signature"], found["signature"])
    places[places == len(before)] = 0
    same = (before["signature"][places] == found["signature"]) if len(before) else np.zeros(len(references), bool)
    same &= found["signature"] != b""
    found["hash"][same] = before["hash"][places[same]]

    def hash_of(number: int) -> tuple[bytes, int]:  # in a reader, so that the bytes of one image each are in memory
        data, status = images.read(references[number])
        return image_hash(data, status), status

    others = np.flatnonzero(~same).tolist()
    for i, (found_hash, status) in zip(others, readers.map(hash_of, others), strict=True):
        found["hash"][i] = found_hash
        passing = IMAGE_STATUS[status] == "unreadable"  # perhaps not at the next start
        if passing or _signature(images, references[i]) != found["signature"][i]:
            found["signature"][i] = b""  # to be read again then
    return found


def _signature(images: ImageSource, reference: Hashable) -> bytes:
    """As SEEN holds it, which strips zeros; empty where the image is to be read at each start."""
    return (images.signature(reference, MIN_AGE_NS) or b"").rstrip(b"\0")


def _read(path: Path, kind: np.dtype[Any]) -> np.ndarray:
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError):
        return np.empty(0, kind)
    return found if found.dtype == kind else np.empty(0, kind)
