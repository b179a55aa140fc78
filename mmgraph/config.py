"""The settings of a run: one frozen dataclass, checked on construction."""

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
    """The settings of a run.

    The defaults are those of the original trainer, the single-GPU research trainer that mmgraph grew from.

    Raises:
        UserError: a value is out of its range, or flags conflict.
    """

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
    epochs: int = flag(20, "training", "number of passes over the edges", ABOVE_0, common=True)
    max_steps: int | None = flag(
        None, "training", "maximum number of optimizer steps (default: limited only by --epochs)", ABOVE_0, common=True
    )
    global_batch_size: int = flag(
        64,
        "training",
        "edges per optimizer step, summed over all processes",
        ABOVE_0,
        aliases=("--batch_size", "--batch-size"),
        common=True,
        fixed=True,
    )
    micro_batch_size: int | None = flag(
        None,
        "training",
        "edges that each process embeds at a time; a smaller number saves memory, and the loss still covers the global "
        "batch (default: all edges of the process in a step)",
        ABOVE_0,
    )
    learning_rate: float = flag(5e-5, "training", "AdamW's learning rate", ABOVE_0, common=True, fixed=True)
    weight_decay: float = flag(1e-4, "training", "AdamW's decoupled weight decay", FROM_0, fixed=True)
    lr_schedule: Literal["constant", "cosine"] = flag(
        "constant", "training", "learning rate after warmup; cosine: decay to 0 at the last step", fixed=True
    )
    warmup_steps: int = flag(0, "training", "steps of linear warmup to --learning_rate", FROM_0, fixed=True)
    max_grad_norm: float = flag(
        0.0, "training", "clip gradients to this L2 norm; 0 disables clipping", FROM_0, fixed=True
    )
    max_skipped_steps: int = flag(
        0,
        "training",
        "maximum number of steps with a non-finite loss or gradient that the run skips; one more ends the run with an "
        "error; a skipped step does not update the weights",
        FROM_0,
    )
    temperature: float = flag(
        0.07, "training", "divisor of the cosine similarities in both losses", ABOVE_0, fixed=True
    )
    graph_loss_weight: float = flag(
        1.0, "training", "weight of the graph loss; the text-image loss has weight 1", FROM_0, fixed=True
    )
    false_negatives: Literal["keep", "mask_same", "mask_neighbors"] = flag(
        "keep",
        "training",
        "false negatives to exclude from the losses' denominators; keep: none (as in the original trainer); mask_same: "
        "other entries of the batch with the query's node (in the graph loss, also with its positive's node) or with "
        "the same image; mask_neighbors: in the graph loss, also the query's neighbors in the training edges",
        fixed=True,
    )
    missing_image: Literal["black", "mask"] = flag(
        "black",
        "training",
        "nodes without a readable image: black uses a black image (as in the original trainer); mask excludes these "
        "nodes from the text-image loss",
        fixed=True,
    )
    seed: int = flag(
        42, "training", "seed of all random choices", FROM_0, BELOW_2_63, common=True, fixed=True, inherited=True
    )
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
    eval_fraction: float = flag(
        0.0,
        "evaluation",
        "fraction of the edges to hold out for evaluation, drawn at random with --seed; all edges of a node pair are "
        "held out or kept together",
        FROM_0_BELOW_1,
        common=True,
        fixed=True,
        inherited=True,
    )
    eval_edges: str | None = flag(
        None,
        "evaluation",
        "edge table to evaluate on, with columns src_id, dst_id and optionally rel_id (for results by relation)",
        inherited=True,
    )
    eval_every: int = flag(
        500,
        "evaluation",
        "steps between evaluations; the run also evaluates before the first and after the last step; 0: only these two "
        "evaluations",
        FROM_0,
    )
    keep_best: str | None = flag(
        None,
        "evaluation",
        "metric that decides which evaluation is the best, such as z_graph/mrr; the weights at the best evaluation are "
        "written to multimodal_encoder_best.pt",
    )
    early_stopping_patience: int | None = flag(
        None,
        "evaluation",
        "end the run after this many evaluations in a row without an improvement of the --keep_best metric (default "
        "metric: z_graph/mrr)",
        ABOVE_0,
    )
    output_dir: str | None = flag(None, "output", "output folder of the run (default: runs/RUN_NAME)", common=True)
    run_name: str | None = flag(
        None, "output", "name of the run (default: demo with --demo, else the name of the node table's folder)"
    )
    resume: str = flag(
        "auto",
        "output",
        "auto: continue the run in the output folder, or start a new run if the folder contains none; never: fail if "
        "the output folder contains a run; the path of a state folder: resume from this state",
        common=True,
    )
    save_every: int = flag(500, "output", "steps between resume states; 0: only at evaluations and epoch ends", FROM_0)
    keep_last: int = flag(2, "output", "number of resume states to keep; epoch files are never removed", ABOVE_0)
    log_every: int = flag(50, "output", "steps between progress lines in the text log", ABOVE_0)
    log_buffer_size: int = flag(
        10, "output", "number of lines of the text log to collect before they are written to the file", ABOVE_0
    )
    report: bool = flag(True, "output", "write report.html to the output folder when training is done")
    report_to: Literal["auto", "wandb", "tensorboard", "all", "none"] = flag(
        "auto", "tracking", "experiment tracker; auto: wandb if an API key or a login exists, else none", common=True
    )
    project: str = flag("mmgraph", "tracking", "wandb project")
    tags: str | None = flag(None, "tracking", "wandb tags, separated by commas")
    notes: str | None = flag(None, "tracking", "wandb notes about the run")
    collective_timeout: float = flag(
        600.0,
        "processes",
        "seconds that a rank waits for the other ranks, or for a DataLoader worker, before it fails",
        ABOVE_0,
    )
    stop_grace: float = flag(
        15.0,
        "processes",
        "after a stop signal, a rank exits without a new resume state if its step takes this many seconds longer than "
        "usual",
        ABOVE_0,
    )
    check: bool = flag(False, "processes", "check arguments, data and launch without training", common=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            for valid in field.metadata["ranges"]:
                if not valid.contains(value):
                    raise UserError(f"--{field.name} {value}: must be {valid.description}")
        if self.eval_fraction and self.eval_edges is not None:
            raise UserError(
                "--eval_fraction and --eval_edges both define the edges to evaluate on: set only one of them"
            )
        self._check_best()
        if self.fused_dim % 8:
            raise UserError(f"--fused_dim {self.fused_dim}: must be a multiple of 8, the number of attention heads")

    def _check_best(self) -> None:
        if self.keep_best is not None and self.keep_best not in BEST_METRICS:
            raise UserError(f"--keep_best {self.keep_best}: must be one of {', '.join(BEST_METRICS)}")
        if not self.evaluates and (self.keep_best is not None or self.early_stopping_patience is not None):
            flag = "keep_best" if self.keep_best is not None else "early_stopping_patience"
            raise UserError(f"--{flag} needs edges to evaluate on: set --eval_fraction or --eval_edges")

    @property
    def evaluates(self) -> bool:
        """Whether the run has edges to evaluate on."""
        return self.eval_fraction > 0 or self.eval_edges is not None

    @property
    def output_folder(self) -> Path:
        """The output folder of the run."""
        name = self.run_name or Path(self.nodes).resolve().parent.name
        return Path(self.output_dir) if self.output_dir else Path("runs") / name

    def save(self, path: Path) -> None:
        """Write the settings as YAML that ``--config`` can read."""
        path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False), encoding="utf-8")


_FIELDS = dataclasses.fields(Config)
COMMON, INHERITED, FIXED_ON_RESUME = (
    tuple(field.name for field in _FIELDS if field.metadata[key]) for key in ("common", "inherited", "fixed")
)
