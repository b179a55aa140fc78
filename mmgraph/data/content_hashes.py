"""Hashes of nodes' texts and image files. A tower store finds the tokens of a text or image by its hash."""

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
from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_table import NodeTable
from mmgraph.distributed.collectives import raise_on_all_ranks
from mmgraph.utils.files import save_array

HASH = np.dtype("S16")  # BLAKE2b, 128 bits
# A record of an image file contains its signature (a digest of path, size and times) and the hash of its bytes.
IMAGE_RECORD = np.dtype([("signature", HASH), ("hash", HASH)])
IMAGE_CHUNK = 4096  # image files per chunk
# If a file is hashed within this time after its last change, it may change again without a change of its times. So it
# is hashed again at the next start.
MIN_AGE_NS = 2_000_000_000


class ContentHashes(NamedTuple):
    """Hashes of the texts and images of all nodes. Equal text hashes mean equal texts, and likewise for images."""

    texts: np.ndarray  # (N,) HASH of each node's text
    images: np.ndarray  # (N,) HASH of each node's image file, or of the image status if no file was read


def text_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=HASH.itemsize).digest()


def image_hash(data: bytes | None, status: int) -> bytes:
    """Return the hash of an image file, or of its image status if it could not be read.

    Args:
        data, status: results of :meth:`mmgraph.data.image_source.ImageSource.read`.
    """
    if data is None:
        return hashlib.blake2b(IMAGE_STATUS[status].encode(), digest_size=HASH.itemsize, person=b"no image").digest()
    return hashlib.blake2b(data, digest_size=HASH.itemsize).digest()


def without_file(images: np.ndarray) -> np.ndarray:
    """Return (N,) bool, true for each image hash that is the hash of an image status, not of a file's bytes."""
    return np.isin(images, np.array([image_hash(None, status) for status in range(len(IMAGE_STATUS))], HASH))


def read_content_hashes(
    nodes: NodeTable,
    images: ImageSource,
    table: str | Path,
    fingerprint: str,
    rules: InputRules,
    folder: Path,
    accelerator: Accelerator,
) -> ContentHashes:
    """Hash the texts and images of all nodes. Call on all ranks.

    Each rank hashes its shard of the nodes, and every rank returns all hashes. Texts are hashed only if ``folder`` has
    no hashes for ``fingerprint``. The path, size and times of the image files are checked at every call. An image file
    is read only if one of these has changed since it was last hashed.

    Args:
        nodes: the node table.
        images: source of the images.
        table: path of the node table.
        fingerprint: fingerprint of the node table.
        rules: how columns become text.
        folder: cache folder. If it can be written, the hashes are stored there for later starts.
        accelerator: the accelerator of the run.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    rows = range(len(nodes) * rank // world_size, len(nodes) * (rank + 1) // world_size)
    columns = "" if rules.text_columns is None else f"-{text_hash(','.join(rules.columns)).hex()[:16]}"
    texts_path = folder / f"texts-{fingerprint[:16]}{columns}.npy"
    location = f"{Path(table).resolve()}\n{images.location}"
    images_path = folder / f"images-{text_hash(location).hex()[:16]}.npy"
    texts = _read(texts_path, HASH)
    known = all(gather_object([len(texts) == len(nodes)]))  # true if every rank could read the hashes of the texts
    shard = raise_on_all_ranks(
        accelerator,
        lambda: (texts[:0] if known else _texts(nodes, rows, rules), _images(nodes, images, rows, images_path)),
    )
    shards: list[tuple[np.ndarray, np.ndarray]] = gather_object([shard])
    records = np.concatenate([part[1] for part in shards])
    if not known:
        texts = np.concatenate([part[0] for part in shards])
    if accelerator.is_local_main_process:
        with suppress(OSError):  # the folder is read-only
            folder.mkdir(parents=True, exist_ok=True)
            if not known:
                save_array(texts_path, texts)
            save_array(images_path, records)
    return ContentHashes(texts, records["hash"])


def _texts(nodes: NodeTable, rows: range, rules: InputRules) -> np.ndarray:
    texts = (rules.text(node) for node in nodes.scan(rows, rules.columns))
    return np.fromiter(map(text_hash, texts), HASH, len(rows))


def _images(nodes: NodeTable, images: ImageSource, rows: range, path: Path) -> np.ndarray:
    """Return an IMAGE_RECORD for each row's image. Images that have not changed since the last start are not read."""
    stored = np.sort(_read(path, IMAGE_RECORD), order="signature")
    records = np.zeros(len(rows), IMAGE_RECORD)
    scanned = nodes.scan(rows, images.columns)
    with ThreadPoolExecutor(8) as readers:
        # In chunks, because a list of all references would be as large as the table.
        for start in range(0, len(rows), IMAGE_CHUNK):
            references = [images.locate(node) for node in islice(scanned, IMAGE_CHUNK)]
            records[start : start + IMAGE_CHUNK] = _image_records(images, references, stored, readers)
    return records


def _image_records(
    images: ImageSource, references: list[Hashable], stored: np.ndarray, readers: ThreadPoolExecutor
) -> np.ndarray:
    """Return an IMAGE_RECORD for each image. ``stored`` are the records of the last start, sorted by signature."""
    records = np.zeros(len(references), IMAGE_RECORD)
    records["signature"] = [_signature(images, reference) for reference in references]
    indices = np.searchsorted(stored["signature"], records["signature"])
    indices[indices == len(stored)] = 0
    same = (stored["signature"][indices] == records["signature"]) if len(stored) else np.zeros(len(references), bool)
    same &= records["signature"] != b""
    records["hash"][same] = stored["hash"][indices[same]]

    def hash_of(index: int) -> tuple[bytes, int]:
        # Both steps run in the reader thread, so that each thread has at most one image in memory.
        data, status = images.read(references[index])
        return image_hash(data, status), status

    changed = np.flatnonzero(~same).tolist()
    for i, (content_hash, status) in zip(changed, readers.map(hash_of, changed), strict=True):
        records["hash"][i] = content_hash
        temporary = IMAGE_STATUS[status] == "unreadable"  # the next start may be able to read the image
        if temporary or _signature(images, references[i]) != records["signature"][i]:
            records["signature"][i] = b""  # read the image again at the next start
    return records


def _signature(images: ImageSource, reference: Hashable) -> bytes:
    """Return an image's signature without trailing zero bytes, because HASH arrays strip them too.

    An empty signature means that the image is read at every start.
    """
    return (images.signature(reference, MIN_AGE_NS) or b"").rstrip(b"\0")


def _read(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """Return the array in a file, or an empty array if the file cannot be read or has another dtype."""
    try:
        array = np.load(path)
    except (OSError, ValueError, EOFError):
        return np.empty(0, dtype)
    return array if array.dtype == dtype else np.empty(0, dtype)
