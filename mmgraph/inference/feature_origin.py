"""The origin of feature files: which nodes their rows belong to. It stands in a JSON file beside each feature file."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmgraph.data.node_table import NodeTable
from mmgraph.errors import UserError
from mmgraph.utils.files import write_durably
from mmgraph.utils.log import log

ID_CHUNK = 1 << 16  # ids that are hashed at a time


def origin_file(path: Path) -> Path:
    """Return the path of a feature file's origin, such as ``features_z_graph.pt.json``."""
    return path.with_name(f"{path.name}.json")


def ids_digest(nodes: NodeTable) -> str:
    """Return the SHA-256 of the node ids as text, in the order of the table, in hexadecimal."""
    digest = hashlib.sha256()
    for start in range(0, len(nodes), ID_CHUNK):
        # The column is opened again for each chunk, so that its memory-mapped pages are released.
        with nodes.column("node_id") as column:
            ids = column.slice(start, ID_CHUNK).cast(pa.large_string()).to_pylist()
        for node_id in ids:
            encoded = node_id.encode()
            digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest.hexdigest()


def write_origin(path: Path, nodes: int, ids: str, nodes_fingerprint: str, checkpoint_fingerprint: str) -> None:
    """Write the origin of the feature file ``path``.

    Args:
        nodes: number of rows.
        ids: result of :func:`ids_digest` for the node table.
        nodes_fingerprint, checkpoint_fingerprint: fingerprints of the node table and of the checkpoint.
    """
    origin = {
        "nodes": nodes,
        "ids_sha256": ids,
        "nodes_sha256": nodes_fingerprint,
        "checkpoint_sha256": checkpoint_fingerprint,
    }
    content = json.dumps(origin, indent=1) + "\n"
    write_durably(origin_file(path), lambda temporary: temporary.write_text(content, encoding="utf-8"))


def check_origin(path: Path, nodes: NodeTable, nodes_fingerprint: str, nodes_path: str) -> None:
    """Check that the rows of a feature file without ids are in the order of a node table.

    A file without an origin, such as one of the original trainer, is taken to be in this order, and a line is logged.

    Args:
        path: the feature file.
        nodes, nodes_fingerprint, nodes_path: the node table, its fingerprint, and its path for messages.

    Raises:
        UserError: the file was written for other nodes or for another order of the nodes, or its origin is damaged.
    """
    file = origin_file(path)
    try:
        origin: Any = json.loads(file.read_text(encoding="utf-8"))
        expected, table = str(origin["ids_sha256"]), origin["nodes_sha256"]
    except FileNotFoundError:
        log(f"warning: {path} has no {file.name} beside it, so it is not known whether its rows fit {nodes_path}")
        return
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}: {error}); run mmgraph encode again") from None
    if table != nodes_fingerprint and expected != ids_digest(nodes):
        raise UserError(
            f"{path}: written for other nodes than those of {nodes_path}, or for another order of them; run mmgraph "
            "encode again, or restore the node table"
        )
