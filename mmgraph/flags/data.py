"""Flags of the data and the model, and of the caches that read them."""

import dataclasses
from pathlib import Path
from typing import Literal

from mmgraph.errors import UserError
from mmgraph.utils.fields import ABOVE_0, FROM_0, FROM_0_TO_1, flag

DEFAULT_TABLES = ("data/processed/nodes.csv", "data/processed/edges.csv")
DEMO_FOLDER = Path("data/demo")


def background_color(background: str) -> tuple[int, int, int] | None:
    """Return the color that ``--background`` names: (red, green, blue) from 0 to 255; None for ``keep``.

    Raises:
        UserError: the text names no color.
    """
    if background == "keep":
        return None
    parts = ["255"] * 3 if background == "white" else background.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) <= 255 for part in parts):
        raise UserError(f"--background {background}: must be keep, white, or a color R,G,B with values from 0 to 255")
    red, green, blue = (int(part) for part in parts)
    return red, green, blue


def column_names(columns: str | None) -> tuple[str, ...]:
    """Return the columns that ``--text_columns`` names; empty for None.

    Raises:
        UserError: a name is empty or repeated.
    """
    if columns is None:
        return ()
    names = tuple(name.strip() for name in columns.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"--text_columns {columns}: must be different column names, separated by commas")
    return names


@dataclasses.dataclass(frozen=True)
class DataFlags:
    """Tables, texts, images and the model."""

    nodes: str = flag(
        DEFAULT_TABLES[0],
        "data",
        "node table (CSV, Parquet or Arrow) with columns node_id, short_name, summary, image_path",
        common=True,
        inherited=True,
    )
    edges: str = flag(
        DEFAULT_TABLES[1],
        "data",
        "edge table (CSV, Parquet or Arrow) with columns src_id, dst_id",
        common=True,
        inherited=True,
    )
    image_root: str | None = flag(
        None,
        "data",
        "base folder of relative image paths (default: the folder of the node table, then the working directory)",
        common=True,
        inherited=True,
    )
    demo: bool = flag(
        False, "data", f"train on the emoji demo graph; it is built in {DEMO_FOLDER} if it does not exist", common=True
    )
    confine_images: bool = flag(
        False,
        "data",
        "refuse image paths that leave the image root (../, absolute paths, symbolic links); for untrusted tables",
        fixed=True,
        inherited=True,
    )
    max_bad_images: float = flag(
        1.0,
        "data",
        "end the run if more than this fraction of the image files read so far is missing or incomplete; checked from "
        "the 100th file on (earlier in graphs of fewer than 200 nodes)",
        FROM_0_TO_1,
    )
    truncated_images: Literal["partial", "black"] = flag(
        "partial",
        "data",
        "truncated image files: partial uses the part that can be decoded (as in the original trainer); black uses a "
        "black image",
        fixed=True,
        inherited=True,
    )
    sixteen_bit_images: Literal["clip", "scale"] = flag(
        "clip",
        "data",
        "greyscale images with 16 bits per pixel: clip makes all values above 255 white (as in the original trainer); "
        "scale divides the values by 257",
        fixed=True,
        inherited=True,
    )
    background: str = flag(
        "keep",
        "data",
        "color under transparent pixels: white, or R,G,B from 0 to 255; keep drops the transparency (as in the "
        "original trainer), so that a black shape on a transparent ground becomes all black",
        fixed=True,
        inherited=True,
    )
    text_columns: str | None = flag(
        None,
        "data",
        "columns to join to a node's text, separated by commas, such as short_name,summary (default: summary if it has "
        "more than three words, else short_name, as in the original trainer)",
        fixed=True,
        inherited=True,
    )
    model_name: str = flag(
        "openai/clip-vit-base-patch32",
        "model",
        "CLIP towers: a model name on the Hugging Face hub, or a local folder",
        common=True,
        inherited=True,
    )
    init_from: str | None = flag(
        None, "model", "start from a checkpoint file (.pt) that mmgraph or the original trainer has written"
    )
    fused_dim: int = flag(512, "model", "width of the cross-attention fusion; a multiple of 8", ABOVE_0, fixed=True)
    proj_dim: int = flag(256, "model", "width of the three projections (z_graph, z_text, z_vis)", ABOVE_0, fixed=True)


@dataclasses.dataclass(frozen=True)
class CacheFlags:
    """DataLoader workers, image caches and the tower store."""

    num_workers: int = flag(4, "loading", "DataLoader workers per process", FROM_0, common=True)
    cache_size: int = flag(
        128, "loading", "decoded images that each worker caches; the least recently used are evicted", FROM_0
    )
    image_cache_gb: float = flag(
        10.0,
        "loading",
        "size in GB of the disk cache of resized images, which all processes of a host share; if it is too small for "
        "all images, it holds those of the nodes with the most edges; 0 disables this cache",
        FROM_0,
    )
    tower_cache: str = flag(
        "auto",
        "towers",
        "the path of a folder: run each node through the towers once, and store its tokens there (the tower store); "
        "off: run the towers in every step; auto: use a store beside the node table (or in $MMGRAPH_CACHE), but run "
        "the towers in every step if the disk has no room, or if building the store would take at least as much "
        "work as the planned steps",
        inherited=True,
    )
    tower_cache_dtype: Literal["auto", "float32", "float16"] = flag(
        "auto", "towers", "dtype of the stored tokens; auto: float32 if the run's precision is float32, else float16"
    )
    tower_cache_local: str | None = flag(
        None,
        "towers",
        "folder on each host's local disk; the run copies the stored tokens there and reads the copy, instead of "
        "reading from a shared file system",
    )
    tower_cache_device: Literal["auto", "cpu", "cuda"] = flag(
        "auto",
        "towers",
        "cuda: keep the stored tokens in GPU memory; cpu: read them from disk as needed; auto: cuda if they take up to "
        "half of the free GPU memory, else cpu",
    )
