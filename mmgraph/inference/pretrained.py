"""Opens a checkpoint that mmgraph or the original trainer has written, and the nodes to embed with the checkpoint."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from accelerate import Accelerator

from mmgraph.arguments import build_config, parse_settings
from mmgraph.checkpoints.files import final_file, read_checkpoint
from mmgraph.checkpoints.newest import last_checkpoint
from mmgraph.config import INHERITED, VALUE_TYPES, Config
from mmgraph.data.graph import find_images
from mmgraph.data.image_source import UNRESOLVED_FILES, ImageSource
from mmgraph.data.images import IMAGE_STATUS, count_image_status, image_remarks, is_incomplete
from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.node_table import NodeTable
from mmgraph.data.readers import fingerprint as file_fingerprint
from mmgraph.data.table_cache import open_nodes
from mmgraph.data.text_check import check_texts
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

HEADS = 8  # attention heads of the fusion
MAX_LINKS = 40  # links to links that are followed, as in Linux


def find_checkpoint(source: Path) -> Path:
    """Return ``source`` if it is a file, or the newest checkpoint of the run in the folder ``source``.

    Raises:
        UserError: the file does not exist, or the folder has no checkpoint.
    """
    if not source.is_dir():
        if not source.is_file():
            raise UserError(f"{source}: no such checkpoint; give a run's folder, or an epoch or final file (.pt)")
        return source
    checkpoint = last_checkpoint(source)
    if checkpoint != final_file(source):
        log(f"{checkpoint} is used: the run in {source} has not finished, or has continued since its final file")
    return checkpoint


def load_run_config(checkpoint: Path, overrides: dict[str, Any]) -> Config:
    """Return the settings of a checkpoint's run. Values in ``overrides`` that are not None replace the run's values.

    Raises:
        UserError: the checkpoint is not in a run's folder, and ``overrides`` has no node table; the run's node table
            does not exist; or the run's ``config.yaml`` is invalid.
    """
    folder = run_folder(checkpoint)
    run = {} if folder is None else read_settings(folder) or {}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if "nodes" not in {**run, **overrides}:
        raise UserError(
            f"{checkpoint} is not in a run's folder, so the graph is unknown; set --nodes to its node table"
        )
    if "eval_edges" in overrides or "eval_fraction" in overrides:
        run = {name: value for name, value in run.items() if name not in ("eval_edges", "eval_fraction")}
    try:
        run_config = build_config({name: run[name] for name in INHERITED if name in run})
    except UserError as error:
        raise UserError(f"{folder or checkpoint.parent.parent}/config.yaml: {error}") from None
    if "nodes" not in overrides and not Path(run_config.nodes).exists():
        raise UserError(
            f"{run_config.nodes} (from {folder}/config.yaml) does not exist; run this command in "
            "the folder that training was started in, or set --nodes, --image_root and --model_name"
        )
    return dataclasses.replace(run_config, **overrides)


class Inference(NamedTuple):
    """A checkpoint's trained module, in float32 on this rank's device, and a graph's nodes to embed with it."""

    nodes: NodeTable
    images: ImageSource
    module: TrainedModule
    outputs: NodeOutputs
    towers: Towers  # on the CPU if outputs come from a tower store, else on this rank's device
    nodes_fingerprint: str
    checkpoint_fingerprint: str

    @torch.no_grad()
    def embed_new(self, text: str | None, image_path: str | None) -> dict[str, torch.Tensor]:
        """Return all embeddings, (d,) each, of a new node that has a text, an image or both.

        A missing text is replaced by one space, and a missing image by a black image, as for the graph's nodes.

        Raises:
            UserError: the image cannot be read.
        """
        inputs = self.outputs.inputs
        input_ids, attention_mask = inputs.tokenize([text or " "])
        pictures, [status] = inputs.read_images([UNRESOLVED_FILES.locate({"image_path": image_path})])
        if status == IMAGE_STATUS.index("truncated"):
            log(f"{image_path} is truncated; it is used as the run's truncated_images setting says")
        elif image_path is not None and is_incomplete(np.array(status)):
            raise UserError(f"{image_path}: {IMAGE_STATUS[status]}")
        for remark in image_remarks(count_image_status([status]), inputs.rules):
            log(remark)
        device = next(self.towers.text_model.parameters()).device
        pixel_values = inputs.preprocessing.normalize(pictures)
        tokens = run_towers(self.towers, input_ids.to(device), attention_mask.to(device), pixel_values.to(device))
        module_device = self.module.graph_proj.weight.device
        embeddings = self.module.embeddings(tokens.map(lambda tensor: tensor.to(module_device)))
        return {name: vectors[0].float().cpu() for name, vectors in embeddings.items()}


def open_checkpoint(checkpoint: Path, config: Config, accelerator: Accelerator) -> Inference:
    """Load a checkpoint, and open the graph's nodes and their token source. Call on all ranks.

    Tokens are read from the tower store if it has float32 tokens of all nodes. Otherwise, the towers in the checkpoint
    run live.

    Raises:
        UserError: the node table or the checkpoint cannot be read, or the checkpoint does not fit the towers'
            configuration.
    """
    digest = raise_on_all_ranks(accelerator, lambda: file_fingerprint(config.nodes))
    nodes = raise_on_all_ranks(accelerator, lambda: open_nodes(config.nodes, digest))
    rules = InputRules.of(config)
    raise_on_all_ranks(accelerator, lambda: check_texts(nodes, rules, config.nodes))
    images = raise_on_all_ranks(accelerator, lambda: find_images(nodes, config, seed=0))
    tokenizer, processor = raise_on_all_ranks(accelerator, lambda: load_tokenizer_and_processor(config.model_name))
    inputs = NodeInputs(tokenizer, processor, 0, rules)
    encoder = raise_on_all_ranks(accelerator, lambda: _load_encoder(checkpoint, "cpu", config.model_name))
    weights = encoder.state_dict()
    module = TrainedModule.from_weights(weights).to(accelerator.device)
    towers = towers_fingerprint(weights)
    stored = existing_store(config, accelerator, nodes, images, digest, inputs, towers)
    if stored is not None:
        log(f"tower store: {stored.store.folder}, float32 tokens; the towers are not run")
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
    """Load an encoder from an epoch or final file, in eval mode. All weights and widths come from the file.

    If the checkpoint's run has other input rules than the defaults, they are logged, because collators need them too.

    Args:
        checkpoint_path: a file that mmgraph or the original trainer has written.
        device: where to put the encoder. If CUDA is requested but not available, the CPU is used and a line is logged.
        model_name: CLIP model that the checkpoint's towers belong to; only its configuration is used. Default: the
            model in the run's ``config.yaml``, beside the checkpoint's folder. Without such a file: ViT-B/32.

    Raises:
        UserError: the file cannot be read, or does not fit the towers' configuration.
    """
    encoder = _load_encoder(checkpoint_path, device, model_name)
    _log_input_rules(checkpoint_path)
    return encoder


def _load_encoder(
    checkpoint_path: str | Path, device: str | torch.device, model_name: str | None
) -> MultimodalGraphEncoder:
    state = read_checkpoint(checkpoint_path).model_state_dict
    name = model_name or model_name_of_run(checkpoint_path) or DEFAULT_MODEL
    widths = state["fusion.text_proj.weight"].shape[:1] + state["graph_proj.weight"].shape[:1]
    if len(widths) < 2 or widths[0] % HEADS or not min(widths):
        raise UserError(
            f"{checkpoint_path}: fusion and projections have the widths {tuple(widths)}; the fusion's width must be a "
            f"multiple of {HEADS}, and no width may be 0"
        )
    with torch.device("meta"):  # the file's shapes are checked before memory is allocated for them
        expected = MultimodalGraphEncoder.from_towers(empty_towers(name), *widths).state_dict()
    for key in [*expected, *state]:
        if key not in state or key not in expected:
            where = "is missing in" if key not in state else "is unexpected in"
            raise UserError(
                f"{checkpoint_path}: {key} {where} the file for the model {name}; give the model that the "
                "checkpoint was trained with"
            )
        if state[key].shape != expected[key].shape:
            raise UserError(
                f"{checkpoint_path}: {key} has shape {tuple(state[key].shape)}, but the towers of {name} need shape "
                f"{tuple(expected[key].shape)}; give the model that the checkpoint was trained with"
            )
    encoder = MultimodalGraphEncoder.from_towers(empty_towers(name), *widths)
    encoder.load_state_dict(state)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        log("no CUDA device: the encoder is loaded on the CPU")
        device = "cpu"
    return encoder.to(device).eval()


def _log_input_rules(checkpoint_path: str | Path) -> None:
    """Log the input rules of a checkpoint's run that differ from the defaults."""
    folder = run_folder(checkpoint_path)
    settings = {} if folder is None else read_settings(folder) or {}
    defaults = dataclasses.asdict(InputRules())
    changed = {name: settings[name] for name in defaults if settings.get(name, defaults[name]) != defaults[name]}
    if changed:
        arguments = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        log(f"{checkpoint_path}: trained with other input rules: give collators rules=InputRules({arguments})")


def model_name_of_run(checkpoint_path: str | Path) -> str | None:
    """Return the name of the CLIP model in the settings of a checkpoint's run. Without such settings, return None."""
    folder = run_folder(checkpoint_path)
    return None if folder is None else (read_settings(folder) or {}).get("model_name")


def run_folder(checkpoint_path: str | Path) -> Path | None:
    """Return the folder of the run that a checkpoint belongs to; None if the checkpoint is in no run's folder.

    The checkpoint is two levels below a folder with the settings of a run. It may be a link. First, the folder above
    the link counts, as in a hub's cache, whose files are links to blobs. Then, the folder above the link's target
    counts.
    """
    path = Path(checkpoint_path)
    for _ in range(MAX_LINKS):
        folder = path.parent.resolve().parent
        settings = read_settings(folder)
        if settings is not None and settings.keys() & VALUE_TYPES.keys():
            return folder if Path(checkpoint_path).is_absolute() else Path(os.path.relpath(folder))
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return None


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings in the ``config.yaml`` of a run's folder. Without a valid file, return None."""
    try:
        return parse_settings((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # ValueError: also text that is not UTF-8
        return None
