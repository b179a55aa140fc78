"""A graph to measure with, where there is none at hand: given or generated edges, generated texts and pictures."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from mmgraph.data.tables import read_edges
from mmgraph.demo.towers import build_towers
from mmgraph.errors import UserError
from mmgraph.utils.log import log

WORDS, ROW_CHUNK = 20_000, 100_000


def build_graph(folder: Path, structure: Path | None, num_nodes: int, num_edges: int, num_images: int | None) -> None:
    """Write ``nodes.csv``, ``edges.parquet``, ``images/`` and ``towers/``, the same bytes each time.

    Texts have 40 to 80 words; images are JPEGs of 300 pixels on the long side; towers have the shape of ViT-B/32 and
    random weights, as speed does not depend on them.

    Args:
        structure: an edge table (``src_id, dst_id``) whose edges are used; its ids become the nodes.
        num_nodes, num_edges: without a structure: edges whose ends follow a power law.
        num_images: distinct pictures, which nodes share in turn; default: one a node.

    Raises:
        UserError: the folder holds something, or the structure cannot be read.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; give a folder to make")
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    if structure is not None:
        edges = read_edges(structure)[["src_id", "dst_id"]]
        ids = pd.concat([edges["src_id"], edges["dst_id"]]).drop_duplicates().to_numpy(dtype=str)
        pq.write_table(pa.Table.from_pandas(edges, preserve_index=False), folder / "edges.parquet")
    else:
        ids = np.arange(num_nodes).astype(str)
        ends = (num_nodes * generator.random((num_edges, 2)) ** 3).astype(np.int64)  # a hundredth of them has a fifth
        pq.write_table(pa.table({"src_id": ends[:, 0], "dst_id": ends[:, 1]}), folder / "edges.parquet")
    words = _words(generator)
    count = len(ids) if num_images is None else min(num_images, len(ids))
    for start in tqdm(range(0, len(ids), ROW_CHUNK), unit="part", disable=None):
        _write_nodes(folder / "nodes.csv", ids[start : start + ROW_CHUNK], start, count, words, generator)
    for i in tqdm(range(count), unit="image", disable=None):
        (folder / f"images/{i}.jpg").write_bytes(_picture(generator))
    build_towers(folder / "towers", [" ".join(generator.choice(words, 60)) for _ in range(2000)], real_size=True)
    log(
        f"{folder}: {len(ids):,} nodes, {count:,} pictures; --nodes {folder}/nodes.csv --edges {folder}/edges.parquet "
        f"--model_name {folder}/towers"
    )


def _words(generator: np.random.Generator) -> np.ndarray:
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    return np.array(["".join(generator.choice(syllables, generator.integers(1, 4))) for _ in range(WORDS)])


def _write_nodes(
    path: Path, ids: np.ndarray, first: int, images: int, words: np.ndarray, generator: np.random.Generator
) -> None:
    lengths = generator.integers(40, 81, len(ids))
    # Frequent words are frequent, as in a language (Zipf), so that the tokenizer meets most of them whole.
    drawn = words[(WORDS * generator.random(int(lengths.sum())) ** 3).astype(int)]
    summaries = [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]
    rows = np.arange(first, first + len(ids))
    paths = [f"images/{row % images}.jpg" for row in rows] if images else [""] * len(ids)
    table = pd.DataFrame(
        {"node_id": ids, "short_name": [f"node {row}" for row in rows], "summary": summaries, "image_path": paths}
    )
    table.to_csv(path, mode="a", header=first == 0, index=False)


def _picture(generator: np.random.Generator) -> bytes:
    """Blurred noise, whose JPEG is about as large as a photograph's."""
    height = int(generator.integers(200, 301))
    noise = generator.integers(0, 256, (height // 6, 50, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((300, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()
