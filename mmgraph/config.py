"""A run's settings: one frozen dataclass, checked where it is built."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml

from mmgraph.errors import UserError

DEFAULT_TABLES = ("data/processed/nodes.csv", "data/processed/edges.csv")
DEMO_FOLDER = Path("data/demo")
BEST_METRICS = tuple(
    f"{embedding}/{metric}" for embedding in ("z_graph", "fused") for metric in ("mrr", "hits@1", "hits@3", "hits@10")
)

Group = Literal["data", "model", "training", "evaluation", "towers", "loading", "output", "tracking", "processes"]
GROUPS: tuple[Group, ...] = get_args(Group)  # in the order of --help_all


class Range(NamedTuple):
    """The finite numbers between two bounds, and their description in an error message."""

    description: str
    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def contains(self, value: float) -> bool:
        """Whether a number lies in the range; NaN lies in none."""
        return self.above < value < self.below and self.at_least <= value <= self.at_most


ABOVE_0 = Range("above 0", above=0)
FROM_0 = Range("0 or more", at_least=0)
BELOW_2_63 = Range("below 2^63", below=2**63)
FROM_0_TO_1 = Range("a share, from 0 to 1", at_least=0, at_most=1)
FROM_0_BELOW_1 = Range("0 or more, and below 1", at_least=0, below=1)


def _flag(
    default: Any,
    group: Group,
    help: str,
    *ranges: Range,
    aliases: tuple[str, ...] = (),
    common: bool = False,
    fixed: bool = False,
    inherited: bool = False,
) -> Any:
    """Declare a flag. Everything that depends on it is derived from this metadata.

    Args:
        ranges: the values must lie in all of them; None is also valid where it is the default.
        common: ``--help`` shows the flag, not only ``--help_all``.
        fixed: the value may not change when a run is resumed.
        inherited: verbs that read a checkpoint (encode, evaluate, ...) take the value from the run's ``config.yaml``.
    """
    metadata = {"help": help, "aliases": list(aliases), "group": group, "ranges": ranges, "common": common}
    return dataclasses.field(default=default, metadata={**metadata, "fixed": fixed, "inherited": inherited})


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run. Defaults are the original trainer's. Raises :class:`UserError` on values that cannot work."""

    nodes: str = _flag(
        DEFAULT_TABLES[0],
        "data",
        "node table, CSV or Parquet: node_id, short_name, summary, image_path",
        common=True,
        inherited=True,
    )
    edges: str = _flag(
        DEFAULT_TABLES[1], "data", "edge table, CSV or Parquet: src_id, dst_id", common=True, inherited=True
    )
    image_root: str | None = _flag(
        None,
        "data",
        "folder that relative image paths start from (default: the folder of the node table, then the working "
        "directory)",
        common=True,
        inherited=True,
    )
    demo: bool = _flag(
        False, "data", f"build the emoji demo graph in {DEMO_FOLDER} if it is not there, and train on it", common=True
    )
    confine_images: bool = _flag(
        False,
        "data",
        "refuse image paths that leave the image root (../, absolute, symbolic links): for tables from strangers",
        fixed=True,
        inherited=True,
    )
    max_bad_images: float = _flag(
        1.0,
        "data",
        "end the run where more than this share of the image files seen (100 or more) are missing or not whole",
        FROM_0_TO_1,
    )
    truncated_images: Literal["partial", "black"] = _flag(
        "partial",
        "data",
        "an image file that ends early: use the part that is there (as the original), or black",
        fixed=True,
        inherited=True,
    )
    model_name: str = _flag(
        "openai/clip-vit-base-patch32",
        "model",
        "CLIP towers: a name on the Hugging Face hub or a folder",
        common=True,
        inherited=True,
    )
    init_from: str | None = _flag(None, "model", "start from an epoch or final file (.pt) of mmgraph or the original")
    fused_dim: int = _flag(512, "model", "width of the cross-attention fusion, a multiple of 8", ABOVE_0, fixed=True)
    proj_dim: int = _flag(256, "model", "width of the three projections, and so of the embeddings", ABOVE_0, fixed=True)
    epochs: int = _flag(20, "training", "passes over the edges", ABOVE_0, common=True)
    max_steps: int | None = _flag(
        None, "training", "end after this many optimizer steps, if sooner", ABOVE_0, common=True
    )
    global_batch_size: int = _flag(
        64,
        "training",
        "edges in one optimizer step, over all processes",
        ABOVE_0,
        aliases=("--batch_size", "--batch-size"),
        common=True,
        fixed=True,
    )
    micro_batch_size: int | None = _flag(
        None,
        "training",
        "edges of a process's part of the batch that are in memory at once; the loss stays over the global batch "
        "(default: all of them)",
        ABOVE_0,
    )
    learning_rate: float = _flag(5e-5, "training", "AdamW's rate", ABOVE_0, common=True, fixed=True)
    weight_decay: float = _flag(1e-4, "training", "AdamW's decoupled weight decay", FROM_0, fixed=True)
    lr_schedule: Literal["constant", "cosine"] = _flag(
        "constant", "training", "rate over the steps; cosine ends at 0", fixed=True
    )
    warmup_steps: int = _flag(
        0, "training", "steps over which the rate rises linearly to learning_rate", FROM_0, fixed=True
    )
    max_grad_norm: float = _flag(0.0, "training", "clip gradients to this L2 norm; 0 does not clip", FROM_0, fixed=True)
    max_skipped_steps: int = _flag(
        0,
        "training",
        "steps whose loss or gradient is not finite that a run may leave out (they update nothing) before it ends",
        FROM_0,
    )
    temperature: float = _flag(0.07, "training", "divides the cosine similarities in both losses", ABOVE_0, fixed=True)
    graph_loss_weight: float = _flag(
        1.0, "training", "weight of the graph loss; the text-image loss has weight 1", FROM_0, fixed=True
    )
    false_negatives: Literal["keep", "mask_same", "mask_neighbors"] = _flag(
        "keep",
        "training",
        "what leaves the losses' denominators: nothing (as the original); the query's own nodes and nodes of the same "
        "image; and also neighbours that are trained on",
        fixed=True,
    )
    missing_image: Literal["black", "mask"] = _flag(
        "black",
        "training",
        "nodes without an image: have a black one (as the original), or are left out of the text-image loss",
        fixed=True,
    )
    seed: int = _flag(
        42, "training", "everything random comes from it", FROM_0, BELOW_2_63, common=True, fixed=True, inherited=True
    )
    num_workers: int = _flag(4, "loading", "DataLoader workers in each process", FROM_0, common=True)
    cache_size: int = _flag(128, "loading", "images kept decoded in each worker, least recently used go first", FROM_0)
    image_cache_gb: float = _flag(
        10.0,
        "loading",
        "disk for resized images that all processes of a host share, most frequent nodes first; 0 is none",
        FROM_0,
    )
    tower_cache: str = _flag(
        "auto",
        "towers",
        "each node goes through the towers once: auto keeps their tokens below the node table (or in $MMGRAPH_CACHE) "
        "where the planned steps see more nodes than the graph has; the path of a folder keeps them there; off runs "
        "the towers at every step",
        inherited=True,
    )
    tower_cache_dtype: Literal["auto", "float32", "float16"] = _flag(
        "auto", "towers", "of the tokens kept; auto: float32 where the run's precision is, else float16"
    )
    tower_cache_local: str | None = _flag(
        None, "towers", "folder of each host's own disk that the tokens are copied to first, from a shared file system"
    )
    tower_cache_device: Literal["auto", "cpu", "cuda"] = _flag(
        "auto",
        "towers",
        "where the tokens are kept in a run; auto: on the GPU where they take up to half of its free memory",
    )
    eval_fraction: float = _flag(
        0.0,
        "evaluation",
        "share of the edges, whole pairs by seed, to hold out and evaluate on",
        FROM_0_BELOW_1,
        common=True,
        fixed=True,
        inherited=True,
    )
    eval_edges: str | None = _flag(
        None,
        "evaluation",
        "edge table to evaluate on: src_id, dst_id, and rel_id for a table by relation",
        inherited=True,
    )
    eval_every: int = _flag(
        500, "evaluation", "steps between evaluations; there is one before the first step and one at the end", FROM_0
    )
    keep_best: str | None = _flag(
        None,
        "evaluation",
        "metric whose best evaluation's weights are kept in multimodal_encoder_best.pt, such as z_graph/mrr",
    )
    early_stopping_patience: int | None = _flag(
        None, "evaluation", "end after this many evaluations without a better --keep_best (z_graph/mrr)", ABOVE_0
    )
    output_dir: str | None = _flag(
        None, "output", "where everything the run makes lies (default: runs/RUN_NAME)", common=True
    )
    run_name: str | None = _flag(None, "output", "the run's name (default: demo, or the folder of the node table)")
    resume: str = _flag(
        "auto",
        "output",
        "auto goes on where the run in the output folder stopped; never refuses to; or the path of a state folder",
        common=True,
    )
    save_every: int = _flag(500, "output", "steps between resume states; 0: only at the end of each epoch", FROM_0)
    keep_last: int = _flag(2, "output", "resume states kept; epoch files are never removed", ABOVE_0)
    log_every: int = _flag(50, "output", "steps between lines of the text log", ABOVE_0)
    log_buffer_size: int = _flag(10, "output", "lines of the text log written at a time", ABOVE_0)
    report: bool = _flag(True, "output", "write report.html into the output folder when all steps are done")
    report_to: Literal["auto", "wandb", "tensorboard", "all", "none"] = _flag(
        "auto", "tracking", "tracker that follows the run; auto: wandb where there is a key or a login", common=True
    )
    project: str = _flag("mmgraph", "tracking", "wandb: the project")
    tags: str | None = _flag(None, "tracking", "wandb: tags, with commas between them")
    notes: str | None = _flag(None, "tracking", "wandb: a text about the run")
    collective_timeout: float = _flag(
        600.0,
        "processes",
        "seconds that a rank waits for the others, or for a DataLoader worker, before it gives up",
        ABOVE_0,
    )
    stop_grace: float = _flag(
        15.0, "processes", "seconds that a rank that is asked to stop gives a step, on top of its usual time", ABOVE_0
    )
    check: bool = _flag(False, "processes", "check arguments, data and launch, and train nothing", common=True)

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
