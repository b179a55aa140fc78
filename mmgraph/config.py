"""A run's settings: one frozen dataclass, checked where it is built."""

import dataclasses
from pathlib import Path
from typing import Literal

import yaml

from mmgraph.errors import UserError
from mmgraph.utils.fields import ABOVE_0, BELOW_2_63, FROM_0, FROM_0_BELOW_1, FROM_0_TO_1, flag

DEFAULT_TABLES = ("data/processed/nodes.csv", "data/processed/edges.csv")
DEMO_FOLDER = Path("data/demo")
BEST_METRICS = tuple(
    f"{embedding}/{metric}" for embedding in ("z_graph", "fused") for metric in ("mrr", "hits@1", "hits@3", "hits@10")
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Defaults are the original trainer's. Raises :class:`UserError` on values that cannot work."""

    nodes: str = flag(
        DEFAULT_TABLES[0],
        "data",
        "node table, CSV or Parquet: node_id, short_name, summary, image_path",
        common=True,
        inherited=True,
    )
    edges: str = flag(
        DEFAULT_TABLES[1], "data", "edge table, CSV or Parquet: src_id, dst_id", common=True, inherited=True
    )
    image_root: str | None = flag(
        None,
        "data",
        "folder that relative image paths start from (default: the folder of the node table, then the working "
        "directory)",
        common=True,
        inherited=True,
    )
    demo: bool = flag(
        False, "data", f"build the emoji demo graph in {DEMO_FOLDER} if it is not there, and train on it", common=True
    )
    confine_images: bool = flag(
        False,
        "data",
        "refuse image paths that leave the image root (../, absolute, symbolic links): for tables from strangers",
        fixed=True,
        inherited=True,
    )
    max_bad_images: float = flag(
        1.0,
        "data",
        "end the run where more than this share of the image files seen (100 or more) are missing or not whole",
        FROM_0_TO_1,
    )
    truncated_images: Literal["partial", "black"] = flag(
        "partial",
        "data",
        "an image file that ends early: use the part that is there (as the original), or black",
        fixed=True,
        inherited=True,
    )
    model_name: str = flag(
        "openai/clip-vit-base-patch32",
        "model",
        "CLIP towers: a name on the Hugging Face hub or a folder",
        common=True,
        inherited=True,
    )
    init_from: str | None = flag(None, "model", "start from an epoch or final file (.pt) of mmgraph or the original")
    fused_dim: int = flag(512, "model", "width of the cross-attention fusion, a multiple of 8", ABOVE_0, fixed=True)
    proj_dim: int = flag(256, "model", "width of the three projections, and so of the embeddings", ABOVE_0, fixed=True)
    epochs: int = flag(20, "training", "passes over the edges", ABOVE_0, common=True)
    max_steps: int | None = flag(
        None, "training", "end after this many optimizer steps, if sooner", ABOVE_0, common=True
    )
    global_batch_size: int = flag(
        64,
        "training",
        "edges in one optimizer step, over all processes",
        ABOVE_0,
        aliases=("--batch_size", "--batch-size"),
        common=True,
        fixed=True,
    )
    micro_batch_size: int | None = flag(
        None,
        "training",
        "edges of a process's part of the batch that are in memory at once; the loss stays over the global batch "
        "(default: all of them)",
        ABOVE_0,
    )
    learning_rate: float = flag(5e-5, "training", "AdamW's rate", ABOVE_0, common=True, fixed=True)
    weight_decay: float = flag(1e-4, "training", "AdamW's decoupled weight decay", FROM_0, fixed=True)
    lr_schedule: Literal["constant", "cosine"] = flag(
        "constant", "training", "rate over the steps; cosine ends at 0", fixed=True
    )
    warmup_steps: int = flag(
        0, "training", "steps over which the rate rises linearly to learning_rate", FROM_0, fixed=True
    )
    max_grad_norm: float = flag(0.0, "training", "clip gradients to this L2 norm; 0 does not clip", FROM_0, fixed=True)
    max_skipped_steps: int = flag(
        0,
        "training",
        "steps whose loss or gradient is not finite that a run may leave out (they update nothing) before it ends",
        FROM_0,
    )
    temperature: float = flag(0.07, "training", "divides the cosine similarities in both losses", ABOVE_0, fixed=True)
    graph_loss_weight: float = flag(
        1.0, "training", "weight of the graph loss; the text-image loss has weight 1", FROM_0, fixed=True
    )
    false_negatives: Literal["keep", "mask_same", "mask_neighbors"] = flag(
        "keep",
        "training",
        "what leaves the losses' denominators: nothing (as the original); the query's own nodes and nodes of the same "
        "image; and also neighbours that are trained on",
        fixed=True,
    )
    missing_image: Literal["black", "mask"] = flag(
        "black",
        "training",
        "nodes without an image: have a black one (as the original), or are left out of the text-image loss",
        fixed=True,
    )
    seed: int = flag(
        42, "training", "everything random comes from it", FROM_0, BELOW_2_63, common=True, fixed=True, inherited=True
    )
    num_workers: int = flag(4, "loading", "DataLoader workers in each process", FROM_0, common=True)
    cache_size: int = flag(128, "loading", "images kept decoded in each worker, least recently used go first", FROM_0)
    image_cache_gb: float = flag(
        10.0,
        "loading",
        "disk for resized images that all processes of a host share, most frequent nodes first; 0 is none",
        FROM_0,
    )
    tower_cache: str = flag(
        "auto",
        "towers",
        "each node goes through the towers once: auto keeps their tokens below the node table (or in $MMGRAPH_CACHE) "
        "where the planned steps see more nodes than the graph has; the path of a folder keeps them there; off runs "
        "the towers at every step",
        inherited=True,
    )
    tower_cache_dtype: Literal["auto", "float32", "float16"] = flag(
        "auto", "towers", "of the tokens kept; auto: float32 where the run's precision is, else float16"
    )
    tower_cache_local: str | None = flag(
        None, "towers", "folder of each host's own disk that the tokens are copied to first, from a shared file system"
    )
    tower_cache_device: Literal["auto", "cpu", "cuda"] = flag(
        "auto",
        "towers",
        "where the tokens are kept in a run; auto: on the GPU where they take up to half of its free memory",
    )
    eval_fraction: float = flag(
        0.0,
        "evaluation",
        "share of the edges, whole pairs by seed, to hold out and evaluate on",
        FROM_0_BELOW_1,
        common=True,
        fixed=True,
        inherited=True,
    )
    eval_edges: str | None = flag(
        None,
        "evaluation",
        "edge table to evaluate on: src_id, dst_id, and rel_id for a table by relation",
        inherited=True,
    )
    eval_every: int = flag(
        500, "evaluation", "steps between evaluations; there is one before the first step and one at the end", FROM_0
    )
    keep_best: str | None = flag(
        None,
        "evaluation",
        "metric whose best evaluation's weights are kept in multimodal_encoder_best.pt, such as z_graph/mrr",
    )
    early_stopping_patience: int | None = flag(
        None, "evaluation", "end after this many evaluations without a better --keep_best (z_graph/mrr)", ABOVE_0
    )
    output_dir: str | None = flag(
        None, "output", "where everything the run makes lies (default: runs/RUN_NAME)", common=True
    )
    run_name: str | None = flag(None, "output", "the run's name (default: demo, or the folder of the node table)")
    resume: str = flag(
        "auto",
        "output",
        "auto goes on where the run in the output folder stopped; never refuses to; or the path of a state folder",
        common=True,
    )
    save_every: int = flag(500, "output", "steps between resume states; 0: only at the end of each epoch", FROM_0)
    keep_last: int = flag(2, "output", "resume states kept; epoch files are never removed", ABOVE_0)
    log_every: int = flag(50, "output", "steps between lines of the text log", ABOVE_0)
    log_buffer_size: int = flag(10, "output", "lines of the text log written at a time", ABOVE_0)
    report: bool = flag(True, "output", "write report.html into the output folder when all steps are done")
    report_to: Literal["auto", "wandb", "tensorboard", "all", "none"] = flag(
        "auto", "tracking", "tracker that follows the run; auto: wandb where there is a key or a login", common=True
    )
    project: str = flag("mmgraph", "tracking", "wandb: the project")
    tags: str | None = flag(None, "tracking", "wandb: tags, with commas between them")
    notes: str | None = flag(None, "tracking", "wandb: a text about the run")
    collective_timeout: float = flag(
        600.0,
        "processes",
        "seconds that a rank waits for the others, or for a DataLoader worker, before it gives up",
        ABOVE_0,
    )
    stop_grace: float = flag(
        15.0, "processes", "seconds that a rank that is asked to stop gives a step, on top of its usual time", ABOVE_0
    )
    check: bool = flag(False, "processes", "check arguments, data and launch, and train nothing", common=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            for valid in field.metadata["ranges"]:
                if not valid.contains(value):
                    raise UserError(f"--{field.name} {value}: must be {valid.description}")
        if self.eval_fraction and self.eval_edges is not None:
            raise UserError("--eval_fraction splits the edges, --eval_edges names others: give one of the two")
        self._check_best()
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


_FIELDS = dataclasses.fields(Config)
COMMON, INHERITED, FIXED_ON_RESUME = (
    tuple(field.name for field in _FIELDS if field.metadata[key]) for key in ("common", "inherited", "fixed")
)
