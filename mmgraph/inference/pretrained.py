"""What encode and evaluate begin with: a checkpoint of mmgraph or the original, and the nodes that it is to embed."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator

from mmgraph.arguments import config_of
from mmgraph.checkpoints.files import epoch_files, final_file, read_checkpoint
from mmgraph.config import INHERITED, Config
from mmgraph.data.graph import find_images
from mmgraph.data.image_source import AS_GIVEN, ImageSource
from mmgraph.data.images import IMAGE_STATUS
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.node_table import NodeTable
from mmgraph.data.readers import fingerprint as file_fingerprint
from mmgraph.data.table_cache import open_nodes
from mmgraph.distributed.collectives import raise_on_all_ranks
from mmgraph.errors import UserError
from mmgraph.inference.node_outputs import NodeOutputs
from mmgraph.models.multimodal_graph_encoder import MultimodalGraphEncoder, TrainedModule
from mmgraph.towers.cached import existing_store
from mmgraph.towers.clip import DEFAULT_MODEL
from mmgraph.towers.fingerprint import towers_fingerprint
from mmgraph.towers.live import LiveTowers, run_towers
from mmgraph.towers.load import empty_towers, load_tokenizer_and_processor
from mmgraph.towers.tokens import Towers
from mmgraph.utils.log import log

HEADS = 8  # of the fusion's attention


def newest_run() -> Path:
    """The folder below ``runs/`` whose run ended last. Raises :class:`UserError` where none has."""
    ended = [folder for folder in Path("runs").glob("*") if final_file(folder).is_file()]
    if not ended:
        raise UserError("which run? none below runs/ has ended; give a run's folder")
    return max(ended, key=lambda folder: final_file(folder).stat().st_mtime)


def find_checkpoint(source: Path) -> Path:
    """The file that is meant: ``source``, or the final file of the run in that folder.

    Raises:
        UserError: there is none.
    """
    checkpoint = final_file(source) if source.is_dir() else source
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint}: no such checkpoint; give a run's folder or an epoch or final file (.pt)")
    return checkpoint


def last_checkpoint(folder: Path) -> Path:
    """The epoch or final file of a run that was written last. Raises :class:`UserError` where there is none."""
    final = final_file(folder)
    found = [path for path in (*epoch_files(folder), final) if path.is_file()]
    if not found:
        raise UserError(f"{folder} has written no checkpoint yet")
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path == final))


def settings_of(checkpoint: Path, given: dict[str, Any]) -> Config:
    """The settings of the run that a checkpoint lies in, but for those that are given (and not None).

    Raises:
        UserError: it lies in no run's folder, and no node table is given.
    """
    run = run_settings(checkpoint) or {}
    given = {name: value for name, value in given.items() if value is not None}
    if "nodes" not in {**run, **given}:
        raise UserError(f"{checkpoint} lies in no run's folder: give --nodes")
    if "eval_edges" in given or "eval_fraction" in given:
        run = {name: value for name, value in run.items() if name not in ("eval_edges", "eval_fraction")}
    try:
        of_the_run = config_of({name: run[name] for name in INHERITED if name in run})
    except UserError as error:
        raise UserError(f"{checkpoint.parent.parent / 'config.yaml'}: {error}") from None
    if "nodes" not in given and not Path(of_the_run.nodes).exists():
        raise UserError(
            f"{of_the_run.nodes}, of {checkpoint.parent.parent / 'config.yaml'}, is not there: run this where training "
            "was started, or give --nodes, --image_root and --model_name"
        )
    return dataclasses.replace(of_the_run, **given)


class Inference(NamedTuple):
    """A checkpoint's trained module over a graph's nodes, on this rank's device in float32."""

    nodes: NodeTable
    images: ImageSource
    module: TrainedModule
    outputs: NodeOutputs
    towers: Towers  # on the CPU, or where live towers run
    nodes_fingerprint: str
    checkpoint_fingerprint: str

    @torch.no_grad()
    def embed_new(self, text: str | None, image_path: str | None) -> dict[str, torch.Tensor]:
        """All embeddings, (d,) each, of a node that is not in the graph: with this text and image, or one of them.

        What it lacks is what a node of the graph without it has: one space, or a black picture.

        Raises:
            UserError: the image cannot be read.
        """
        inputs = self.outputs.inputs
        input_ids, attention_mask = inputs.texts([text or " "])
        pictures, [cause] = inputs.pictures([AS_GIVEN.locate({"image_path": image_path})])
        if cause == IMAGE_STATUS.index("truncated"):
            log(f"{image_path} ends early: the part that is there is used")
        elif image_path is not None and cause:
            raise UserError(f"{image_path}: {IMAGE_STATUS[cause]}")
        device = next(self.towers.text_model.parameters()).device
        pixel_values = inputs.preprocessing.normalize(pictures)
        tokens = run_towers(self.towers, input_ids.to(device), attention_mask.to(device), pixel_values.to(device))
        own = self.module.graph_proj.weight.device
        embeddings = self.module.embeddings(tokens.map(lambda tensor: tensor.to(own)))
        return {name: vectors[0].float().cpu() for name, vectors in embeddings.items()}


def open_checkpoint(checkpoint: Path, config: Config, accelerator: Accelerator) -> Inference:
    """Load a checkpoint, and open the nodes and the tower store of them, if there is one; else the file's own towers.

    Called by all ranks.

    Raises:
        UserError: no node table, or towers that do not fit the file.
    """
    digest = raise_on_all_ranks(accelerator, lambda: file_fingerprint(config.nodes))
    nodes = raise_on_all_ranks(accelerator, lambda: open_nodes(config.nodes, digest))
    images = raise_on_all_ranks(accelerator, lambda: find_images(nodes, config, seed=0))
    tokenizer, processor = raise_on_all_ranks(accelerator, lambda: load_tokenizer_and_processor(config.model_name))
    inputs = NodeInputs(tokenizer, processor, 0, config.truncated_images)
    encoder = raise_on_all_ranks(
        accelerator, lambda: load_pretrained_encoder(checkpoint, "cpu", model_name=config.model_name)
    )
    weights = encoder.state_dict()
    module = TrainedModule.from_weights(weights).to(accelerator.device)
    towers = towers_fingerprint(weights)
    stored = existing_store(config, accelerator, nodes, images, digest, inputs, towers)
    if stored is not None:
        log(f"tower store: {stored.store.folder}, of float32 tokens; no tower is run")
    source = stored or LiveTowers(encoder.towers, inputs.preprocessing, accelerator.device)
    outputs = NodeOutputs(nodes, images, inputs, source, config.num_workers, config.collective_timeout)
    return Inference(nodes, images, module, outputs, encoder.towers, digest, _fingerprint(towers, module))


def _fingerprint(towers: str, module: TrainedModule) -> str:
    digest = hashlib.sha256(towers.encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def load_pretrained_encoder(
    checkpoint_path: str | Path, device: str | torch.device = "cuda", *, model_name: str | None = None
) -> MultimodalGraphEncoder:
    """An encoder from an epoch or final file, in eval mode. All weights come from the file, the widths too.

    Args:
        checkpoint_path: a file of mmgraph or of the original.
        device: where to put it; without CUDA the CPU is used, and the log says so.
        model_name: whose configuration the towers have. Default: the run's ``config.yaml`` beside the checkpoint's
            folder, else ViT-B/32.

    Raises:
        UserError: the file cannot be read, or does not fit the towers' configuration.
    """
    state = read_checkpoint(checkpoint_path).model_state_dict
    name = model_name or model_name_of_run(checkpoint_path) or DEFAULT_MODEL
    widths = state["fusion.text_proj.weight"].shape[:1] + state["graph_proj.weight"].shape[:1]
    if len(widths) < 2 or widths[0] % HEADS or not min(widths):
        raise UserError(f"{checkpoint_path}: widths of {tuple(widths)}; the fusion's must be a multiple of {HEADS}")
    with torch.device("meta"):  # what a file claims is compared before it is given memory
        expected = MultimodalGraphEncoder.from_towers(empty_towers(name), *widths).state_dict()
    for key in [*expected, *state]:
        if key not in state or key not in expected:
            where = "is missing in" if key not in state else "is not expected in"
            raise UserError(f"{checkpoint_path}: {key} {where} it; is {name} the model it was trained with?")
        if state[key].shape != expected[key].shape:
            raise UserError(
                f"{checkpoint_path}: {key} is {tuple(state[key].shape)}, but {tuple(expected[key].shape)} with the "
                f"towers of {name}; give the model it was trained with"
            )
    encoder = MultimodalGraphEncoder.from_towers(empty_towers(name), *widths)
    encoder.load_state_dict(state)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        log("no CUDA device: the encoder is loaded on the CPU")
        device = "cpu"
    return encoder.to(device).eval()


def model_name_of_run(checkpoint_path: str | Path) -> str | None:
    """The model that the run around a checkpoint was made with, if there is such a run."""
    settings = run_settings(checkpoint_path)
    return settings.get("model_name") if settings else None


def run_settings(checkpoint_path: str | Path) -> dict[str, Any] | None:
    """The ``config.yaml`` of the run that a checkpoint lies in, or None."""
    path = Path(checkpoint_path).resolve().parent.parent / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None
