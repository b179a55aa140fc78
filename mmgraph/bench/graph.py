"""``bench graph``: builds a graph for benchmarks. Edges are given or generated; texts and images are generated."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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

WORDS, ROW_CHUNK = 20_000, 100_000  # size of the vocabulary; rows of the node table that are written at once
IMAGE_CHUNK = 1024  # images that are encoded at once


def build_graph(
    folder: Path,
    structure: Path | None,
    num_nodes: int,
    num_edges: int,
    num_images: int | None,
    real_size: bool = True,
) -> None:
    """Write ``nodes.csv``, ``edges.parquet``, ``images/`` and ``towers/``. The same arguments give the same bytes.

    Texts have 40 to 80 words. Images are JPEG files, 300 pixels wide and 200 to 300 pixels high. The towers have the
    size of ViT-B/32, except for the vocabulary. Their weights are random, because speed does not depend on the weights.

    Args:
        folder: output folder, new or empty.
        structure: an edge table (``src_id, dst_id``). Its edges are used, and each of its ids becomes a node.
        num_nodes, num_edges: size of a generated graph, in which node degrees follow a power law. Not used with
            ``structure``.
        num_images: number of different images, which are assigned to the nodes in turn. None: one image per node.
        real_size: whether the towers have the size of ViT-B/32. Otherwise they are those of the demo.

    Raises:
        UserError: the folder is not empty, or ``structure`` cannot be read.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: the folder is not empty; give a new or empty folder")
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    if structure is not None:
        edges = read_edges(structure)[["src_id", "dst_id"]]
        ids = pd.concat([edges["src_id"], edges["dst_id"]]).drop_duplicates().to_numpy(dtype=str)
        pq.write_table(pa.Table.from_pandas(edges, preserve_index=False), folder / "edges.parquet")
    else:
        ids = np.arange(num_nodes).astype(str)
        # With the power 3, 1 % of the nodes get about a fifth of all edge ends.
        ends = (num_nodes * generator.random((num_edges, 2)) ** 3).astype(np.int64)
        pq.write_table(pa.table({"src_id": ends[:, 0], "dst_id": ends[:, 1]}), folder / "edges.parquet")
    words = _words(generator)
    count = len(ids) if num_images is None else min(num_images, len(ids))
    for start in tqdm(range(0, len(ids), ROW_CHUNK), unit="part", disable=None):
        _write_nodes(folder / "nodes.csv", ids[start : start + ROW_CHUNK], start, count, words, generator)
    for i, picture in enumerate(tqdm(_pictures(count, generator), total=count, unit="image", disable=None)):
        (folder / f"images/{i}.jpg").write_bytes(picture)
    build_towers(folder / "towers", [" ".join(generator.choice(words, 60)) for _ in range(2000)], real_size=real_size)
    log(
        f"{folder}: {len(ids):,} nodes, {count:,} images; to use the graph, set --nodes {folder}/nodes.csv "
        f"--edges {folder}/edges.parquet --model_name {folder}/towers"
    )


def _words(generator: np.random.Generator) -> np.ndarray:
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    return np.array(["".join(generator.choice(syllables, generator.integers(1, 4))) for _ in range(WORDS)])


def _write_nodes(
    path: Path, ids: np.ndarray, first: int, images: int, words: np.ndarray, generator: np.random.Generator
) -> None:
    lengths = generator.integers(40, 81, len(ids))
    # Word frequencies are skewed as in natural language (Zipf's law). Most words of a text are therefore single tokens.
    drawn = words[(WORDS * generator.random(int(lengths.sum())) ** 3).astype(int)]
    summaries = [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]
    rows = np.arange(first, first + len(ids))
    paths = [f"images/{row % images}.jpg" for row in rows] if images else [""] * len(ids)
    table = pd.DataFrame(
        {"node_id": ids, "short_name": [f"node {row}" for row in rows], "summary": summaries, "image_path": paths}
    )
    table.to_csv(path, mode="a", header=first == 0, index=False)


def _pictures(count: int, generator: np.random.Generator) -> Iterator[bytes]:
    """Yield JPEGs of blurred noise. Threads encode them; the noise is drawn in order, so that the bytes do not vary."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, count, IMAGE_CHUNK):
            yield from pool.map(_encode, [_noise(generator) for _ in range(start, min(start + IMAGE_CHUNK, count))])


def _noise(generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """Return noise, (H // 6, 50, 3) uint8, and the height H of the picture to make from it."""
    height = int(generator.integers(200, 301))
    return generator.integers(0, 256, (height // 6, 50, 3), dtype=np.uint8), height


def _encode(noise: tuple[np.ndarray, int]) -> bytes:
    """Return a JPEG of blurred noise. It has about as many bytes as a photograph of the same width and height."""
    pixels, height = noise
    file = io.BytesIO()
    Image.fromarray(pixels).resize((300, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()
