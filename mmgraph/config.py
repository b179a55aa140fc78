"""A run's settings: one frozen dataclass, checked where it is built."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import yaml

from mmgraph.errors import UserError

DEFAULT_TABLES = ("data/processed/nodes.csv", "data/processed/edges.csv")
DEMO_FOLDER = Path("data/demo")
BEST_METRICS = tuple(
    f"{embedding}/{metric}" for embedding in ("z_graph", "fused") for metric in ("mrr", "hits@1", "hits@3", "hits@10")
)


def _flag(default: Any, help: str, aliases: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "aliases": list(aliases)})


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Defaults are the original trainer's. Raises :class:`UserError` on values that cannot work."""

    nodes: str = _flag(DEFAULT_TABLES[0], "node table, CSV or Parquet: node_id, short_name, summary, image_path")
    edges: str = _flag(DEFAULT_TABLES[1], "edge table, CSV or Parquet: src_id, dst_id")
    image_root: str | None = _flag(
        None,
        "folder that relative image paths start from (default: the folder "
        "of the node table, then the working directory)",
    )
    demo: bool = _flag(False, f"build the emoji demo graph in {DEMO_FOLDER} if it is not there, and train on it")
    confine_images: bool = _flag(
        False, "refuse image paths that leave the image root (../, absolute, symbolic links): for tables from strangers"
    )
    max_bad_images: float = _flag(
        1.0, "end the run where more than this share of the image files seen (100 or more) are missing or not whole"
    )
    truncated_images: Literal["partial", "black"] = _flag(
        "partial", "an image file that ends early: use the part that is there (as the original), or black"
    )
    model_name: str = _flag("openai/clip-vit-base-patch32", "CLIP towers: a name on the Hugging Face hub or a folder")
    init_from: str | None = _flag(None, "start from an epoch or final file (.pt) of mmgraph or the original")
    fused_dim: int = _flag(512, "width of the cross-attention fusion, a multiple of 8")
    proj_dim: int = _flag(256, "width of the three projections, and so of the embeddings")
    epochs: int = _flag(20, "passes over the edges")
    max_steps: int | None = _flag(None, "end after this many optimizer steps, if sooner")
    global_batch_size: int = _flag(
        64, "edges in one optimizer step, over all processes", aliases=("--batch_size", "--batch-size")
    )
    micro_batch_size: int | None = _flag(
        None,
        "edges of a process's part of the batch that are in memory at once; the loss stays over the global batch "
        "(default: all of them)",
    )
    learning_rate: float = _flag(5e-5, "AdamW's rate")
    weight_decay: float = _flag(1e-4, "AdamW's decoupled weight decay")
    lr_schedule: Literal["constant", "cosine"] = _flag("constant", "rate over the steps; cosine ends at 0")
    warmup_steps: int = _flag(0, "steps over which the rate rises linearly to learning_rate")
    max_grad_norm: float = _flag(0.0, "clip gradients to this L2 norm; 0 does not clip")
    max_skipped_steps: int = _flag(
        0, "steps whose loss or gradient is not finite that a run may leave out (they update nothing) before it ends"
    )
    temperature: float = _flag(0.07, "divides the cosine similarities in both losses")
    graph_loss_weight: float = _flag(1.0, "weight of the graph loss; the text-image loss has weight 1")
    false_negatives: Literal["keep", "mask_same", "mask_neighbors"] = _flag(
        "keep",
        "what leaves the losses' denominators: nothing (as the original); the query's own nodes and nodes of the same "
        "image; and also neighbours that are trained on",
    )
    missing_image: Literal["black", "mask"] = _flag(
        "black", "nodes without an image: have a black one (as the original), or are left out of the text-image loss"
    )
    seed: int = _flag(42, "everything random comes from it")
    num_workers: int = _flag(4, "DataLoader workers in each process")
    cache_size: int = _flag(128, "images kept decoded in each worker, least recently used go first")
    image_cache_gb: float = _flag(
        10.0, "disk for resized images that all processes of a host share, most frequent nodes first; 0 is none"
    )
    tower_cache: str = _flag(
        "auto",
        "each node goes through the towers once: auto keeps their tokens below the node table (or in $MMGRAPH_CACHE) "
        "where the planned steps see more nodes than the graph has; the path of a folder keeps them there; off runs "
        "the towers at every step",
    )
    tower_cache_dtype: Literal["auto", "float32", "float16"] = _flag(
        "auto", "of the tokens kept; auto: float32 where the run's precision is, else float16"
    )
    tower_cache_local: str | None = _flag(
        None, "folder of each host's own disk that the tokens are copied to first, from a shared file system"
    )
    tower_cache_device: Literal["auto", "cpu", "cuda"] = _flag(
        "auto", "where the tokens are kept in a run; auto: on the GPU where they take up to half of its free memory"
    )
    eval_fraction: float = _flag(0.0, "share of the edges, whole pairs by seed, to hold out and evaluate on")
    eval_edges: str | None = _flag(
        None, "edge table to evaluate on: src_id, dst_id, and rel_id for a table by relation"
    )
    eval_every: int = _flag(500, "steps between evaluations; there is one before the first step and one at the end")
    keep_best: str | None = _flag(
        None, "metric whose best evaluation's weights are kept in multimodal_encoder_best.pt, such as z_graph/mrr"
    )
    early_stopping_patience: int | None = _flag(
        None, "end after this many evaluations without a better --keep_best (z_graph/mrr)"
    )
    output_dir: str | None = _flag(None, "where everything the run makes lies (default: runs/RUN_NAME)")
    run_name: str | None = _flag(None, "the run's name (default: demo, or the folder of the node table)")
    resume: str = _flag(
        "auto",
        "auto goes on where the run in the output folder stopped; never refuses to; or the path of a state folder",
    )
    save_every: int = _flag(500, "steps between resume states; 0: only at the end of each epoch")
    keep_last: int = _flag(2, "resume states kept; epoch files are never removed")
    log_every: int = _flag(50, "steps between lines of the text log")
    log_buffer_size: int = _flag(10, "lines of the text log written at a time")
    report: bool = _flag(True, "write report.html into the output folder when all steps are done")
    report_to: Literal["auto", "wandb", "tensorboard", "all", "none"] = _flag(
        "auto", "tracker that follows the run; auto: wandb where there is a key or a login"
    )
    project: str = _flag("mmgraph", "wandb: the project")
    tags: str | None = _flag(None, "wandb: tags, with commas between them")
    notes: str | None = _flag(None, "wandb: a text about the run")
    collective_timeout: float = _flag(
        600.0, "seconds that a rank waits for the others, or for a DataLoader worker, before it gives up"
    )
    stop_grace: float = _flag(15.0, "seconds that a rank that is asked to stop gives a step, on top of its usual time")
    check: bool = _flag(False, "check arguments, data and launch, and train nothing")

    def __post_init__(self) -> None:
        positive = (
            "fused_dim",
            "proj_dim",
            "epochs",
            "global_batch_size",
            "learning_rate",
            "temperature",
            "keep_last",
            "log_every",
            "log_buffer_size",
            "collective_timeout",
            "stop_grace",
        )
        not_negative = (
            "weight_decay",
            "warmup_steps",
            "max_grad_norm",
            "max_skipped_steps",
            "graph_loss_weight",
            "seed",
            "num_workers",
            "cache_size",
            "image_cache_gb",
            "save_every",
            "eval_every",
        )
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name} {getattr(self, name)}: must be above 0")
        for name in not_negative:
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} {getattr(self, name)}: must be 0 or more")
        if self.seed >= 2**63:
            raise UserError(f"--seed {self.seed}: must be below 2^63")
        if self.eval_fraction and self.eval_edges is not None:
            raise UserError("--eval_fraction splits the edges, --eval_edges names others: give one of the two")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"--eval_fraction {self.eval_fraction}: must be 0 or more, and below 1")
        if not 0 <= self.max_bad_images <= 1:
            raise UserError(f"--max_bad_images {self.max_bad_images}: must be a share, from 0 to 1")
        self._check_best()
        for name in ("max_steps", "micro_batch_size", "early_stopping_patience"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be above 0")
        if self.fused_dim % 8:
            raise UserError(f"--fused_dim {self.fused_dim}: must be a multiple of 8, the number of attention heads")

    def _check_best(self) -> None:
        if self.keep_best is not None and self.keep_best not in BEST_METRICS:
            raise UserError(f"--keep_best {self.keep_best}: must be one of {', '.join(BEST_METRICS)}")
        if not self.evaluates and (self.keep_best is not None or self.early_stopping_patience is not None):
            flag = "keep_best" if self.keep_best is not None else "early_stopping_patience"
            raise UserError(f"--{flag} needs edges to evaluate on: give --eval_fraction or --eval_edges")

    @property
    def evaluates(self) -> bool:
        """Whether there are edges to evaluate on."""
        return self.eval_fraction > 0 or self.eval_edges is not None

    @property
    def output_folder(self) -> Path:
        """The folder of everything that the run makes."""
        name = self.run_name or Path(self.nodes).resolve().parent.name
        return Path(self.output_dir) if self.output_dir else Path("runs") / name

    def save(self, path: Path) -> None:
        """Write the settings as YAML that ``--config`` reads back."""
        path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False), encoding="utf-8")
