"""Flags of the training and of its evaluation."""

import dataclasses
from typing import Literal

from mmgraph.utils.fields import ABOVE_0, BELOW_2_63, FROM_0, FROM_0_BELOW_1, flag


@dataclasses.dataclass(frozen=True)
class TrainingFlags:
    """Steps, optimizer and losses."""

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


@dataclasses.dataclass(frozen=True)
class EvaluationFlags:
    """Held-out edges, and when they are ranked."""

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
