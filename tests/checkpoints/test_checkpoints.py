"""Checkpoints in the original trainer's format, with the ViT-B/32 shape and with a tiny one."""

import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import settings, tiny_configs
from launches import launch
from safetensors.torch import save
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from mmgraph.checkpoints.consolidate import consolidate
from mmgraph.checkpoints.convert import convert
from mmgraph.checkpoints.files import (
    Checkpoint,
    TrainedState,
    model_state,
    optimizer_state,
    read_checkpoint,
    write_checkpoint,
)
from mmgraph.errors import UserError
from mmgraph.inference.pretrained import load_pretrained_encoder
from mmgraph.models.multimodal_graph_encoder import MultimodalGraphEncoder, TrainedModule
from mmgraph.towers.clip import random_towers, tower_state
from mmgraph.towers.tokens import Towers

ATTENTION = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
TRAINED = [
    *(f"fusion.{name}.{kind}" for name in ("text_proj", "vis_proj") for kind in ("weight", "bias")),
    *(f"fusion.{name}.{kind}" for name in ("text2vis_attn", "vis2text_attn") for kind in ATTENTION),
    *(f"fusion.{name}.{i}.{k}" for name in ("text_ffn", "vis_ffn") for i in (0, 2) for k in ("weight", "bias")),
    *(f"fusion.fusion_mlp.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")),
    *(f"{name}.{kind}" for name in ("graph_proj", "text_proj", "vis_proj") for kind in ("weight", "bias")),
]


def trained_step(module: TrainedModule) -> tuple[TrainedState, torch.optim.Optimizer]:
    """Take one AdamW step on random gradients. Returns the module's state and the optimizer."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return consolidate(module, optimizer), optimizer


def epoch_checkpoint(towers: Towers, fused_dim: int, proj_dim: int) -> tuple[Checkpoint, torch.optim.Optimizer]:
    trained, optimizer = trained_step(TrainedModule(*towers.widths, fused_dim, proj_dim))
    state = model_state(tower_state(towers), trained.weights)
    return Checkpoint(state, optimizer_state(trained, optimizer.param_groups[0]), 3, 1.25), optimizer


def check_the_real_shape(path: Path) -> dict[str, Any]:
    """Check the contents of an epoch checkpoint with the ViT-B/32 shape. Returns the contents."""
    file = torch.load(path, weights_only=True)
    assert list(file) == ["epoch", "model_state_dict", "optimizer_state_dict", "loss"]
    state = file["model_state_dict"]
    keys = list(state)
    assert len(keys) == 427 and sum(tensor.numel() for tensor in state.values()) == 156_662_272
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(key.startswith("text_model.text_model.") for key in keys[:196])
    assert all(key.startswith("vision_model.vision_model.") for key in keys[196:395])
    assert keys[395:] == TRAINED
    assert state["text_model.text_model.embeddings.token_embedding.weight"].shape == (49408, 512)
    assert state["text_model.text_model.embeddings.position_embedding.weight"].shape == (77, 512)
    assert state["vision_model.vision_model.embeddings.patch_embedding.weight"].shape == (768, 3, 32, 32)
    assert state["vision_model.vision_model.pre_layrnorm.weight"].shape == (768,)
    assert state["fusion.vis_proj.weight"].shape == (512, 768)
    assert state["fusion.text2vis_attn.in_proj_weight"].shape == (1536, 512)
    assert state["graph_proj.weight"].shape == (256, 512)

    adam = file["optimizer_state_dict"]
    assert [group["params"] for group in adam["param_groups"]] == [list(range(32))]
    assert list(adam["state"]) == list(range(32))
    for i, name in enumerate(TRAINED):
        assert set(adam["state"][i]) == {"step", "exp_avg", "exp_avg_sq"} and adam["state"][i]["step"] == 1
        assert adam["state"][i]["exp_avg"].shape == state[name].shape
    assert sum(adam["state"][i]["exp_avg"].numel() for i in range(32)) == 6_040_320
    encoder = load_pretrained_encoder(path, device="cpu")  # needs no hub: this is the default model's shape
    assert list(encoder.state_dict()) == keys and not encoder.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in encoder.state_dict().items())
    return file


@pytest.mark.slow
def test_a_checkpoint_with_the_real_shape(tmp_path: Path) -> None:
    towers = random_towers(CLIPTextConfig(), CLIPVisionConfig())  # transformers' defaults are ViT-B/32
    checkpoint, optimizer = epoch_checkpoint(towers, 512, 256)
    path = tmp_path / "checkpoints/multimodal_encoder_epoch_3.pt"
    write_checkpoint(path, checkpoint)
    file = check_the_real_shape(path)
    assert (file["epoch"], file["loss"]) == (3, 1.25)
    adam, native = file["optimizer_state_dict"], optimizer.state_dict()  # the original trainer saved native
    assert native["param_groups"] == adam["param_groups"]
    assert all(torch.equal(native["state"][i][k], adam["state"][i][k]) for i in range(32) for k in adam["state"][i])


@pytest.mark.slow
def test_a_checkpoint_with_the_real_shape_written_under_zero3(tmp_path: Path, graph: Path) -> None:
    """The checkpoint of an epoch of one step, with random towers of the ViT-B/32 shape."""
    towers = shutil.copytree(graph / "towers", tmp_path / "towers")
    model = CLIPModel(CLIPConfig())
    (towers / "model.safetensors").write_bytes(save(dict(model.state_dict()), metadata={"format": "pt"}))
    CLIPConfig().save_pretrained(towers)
    CLIPImageProcessor().save_pretrained(towers)
    flags = [f"--model_name={towers}", "--fused_dim=512", "--proj_dim=256", "--batch_size=4", "--epochs=1"]
    edges = pd.read_csv(graph / "edges.csv", dtype=str)[:4]
    edges.to_csv(tmp_path / "edges.csv", index=False)
    config = "deepspeed_zero3.yaml --num_processes 2 --mixed_precision no"
    launch(config, *settings(graph, tmp_path / "run", *flags, f"--edges={tmp_path / 'edges.csv'}"))
    file = check_the_real_shape(tmp_path / "run/checkpoints/multimodal_encoder_epoch_1.pt")
    assert file["epoch"] == 1 and file["loss"] > 0


@pytest.fixture(params=["built here", "written under ZeRO-3"])
def tiny(tmp_path: Path, graph: Path, request: pytest.FixtureRequest) -> Path:
    """An epoch checkpoint of an encoder with the tiny graph's towers."""
    from mmgraph.towers.clip import load_towers

    if request.param == "written under ZeRO-3":
        run = request.getfixturevalue("zero3")
        return shutil.copy(run / "checkpoints/multimodal_encoder_epoch_1.pt", tmp_path / "epoch.pt")
    checkpoint, _ = epoch_checkpoint(load_towers(str(graph / "towers")), 16, 8)
    path = tmp_path / "epoch.pt"
    write_checkpoint(path, checkpoint)
    return path


def test_keys_of_both_transformers_versions_load(tiny: Path, graph: Path, tmp_path: Path) -> None:
    """Keys of transformers 4 have the tower's name twice, keys of transformers 5 once.

    Old versions also have position_ids.
    """
    file = torch.load(tiny)
    state = file["model_state_dict"]
    widths = len(state["fusion.text_proj.weight"]), len(state["graph_proj.weight"])
    single = {
        key.replace("text_model.text_model.", "text_model.").replace("vision_model.vision_model.", "vision_model."): t
        for key, t in state.items()
    }
    old = {**state, "text_model.text_model.embeddings.position_ids": torch.arange(77)[None]}
    for name, layout in (("single", single), ("old", old)):
        torch.save(layout, tmp_path / f"{name}.pt")
        encoder = load_pretrained_encoder(tmp_path / f"{name}.pt", "cpu", model_name=str(graph / "towers"))
        assert list(encoder.state_dict()) == list(state)
        assert all(torch.equal(tensor, state[key]) for key, tensor in encoder.state_dict().items())
        direct = MultimodalGraphEncoder(str(graph / "towers"), *widths)
        assert direct.load_state_dict(layout, strict=True).missing_keys == []
        partial = direct.load_state_dict({key: layout[key] for key in list(layout)[:3]}, strict=False)
        assert partial.unexpected_keys == [] and len(partial.missing_keys) == len(state) - 3


def test_an_encoder_inside_another_module_keeps_its_keys() -> None:
    encoder = MultimodalGraphEncoder.from_towers(random_towers(*tiny_configs()), 16, 8)
    outer = torch.nn.ModuleDict({"first": torch.nn.Linear(2, 2), "encoder": encoder})
    keys = list(outer.state_dict())
    assert keys[0] == "first.weight" and keys[2].startswith("encoder.text_model.text_model.")
    assert outer.load_state_dict(outer.state_dict()).missing_keys == []


@pytest.mark.parametrize("kind", ["epoch", "final", "SGD"])
def test_convert_and_back_is_lossless(tiny: Path, tmp_path: Path, kind: str) -> None:
    content = torch.load(tiny)
    if kind == "final":
        torch.save(content["model_state_dict"], tiny)
    elif kind == "SGD":  # the optimizer of another trainer
        groups = [{"lr": 0.1, "momentum": 0.9, "params": [0]}]
        optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": groups}
        torch.save({**content, "optimizer_state_dict": optimizer}, tiny)
    convert(tiny, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
    before, after = read_checkpoint(tiny), read_checkpoint(tmp_path / "b.pt")
    assert list(before.model_state_dict) == list(after.model_state_dict)
    assert all(torch.equal(t, after.model_state_dict[key]) for key, t in before.model_state_dict.items())
    assert (before.epoch, before.loss) == (after.epoch, after.loss)
    if kind != "final":
        first, second = before.optimizer_state_dict, after.optimizer_state_dict
        assert first["param_groups"] == second["param_groups"] and list(first["state"]) == list(second["state"])
        assert all(
            torch.equal(value, second["state"][i][k]) for i in first["state"] for k, value in first["state"][i].items()
        )


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code in a checkpoint was run",))


@pytest.mark.parametrize("content", ["pickle", "zip", "list", "other", "epoch"])
def test_errors_for_files_that_are_not_checkpoints(
    content: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(tiny)["model_state_dict"]
    if content == "zip":
        tiny.write_bytes(tiny.read_bytes()[:5000])
    else:
        broken = {"pickle": Harmful(), "list": [1, 2], "other": {"weight": torch.zeros(1)},
                  "epoch": {"model_state_dict": state, "epoch": 1}}  # fmt: skip
        torch.save(broken[content], tiny)
    with pytest.raises(UserError, match=re.escape(str(tiny))):
        read_checkpoint(tiny)
    assert capsys.readouterr().out == ""


def test_error_for_towers_that_do_not_fit(tiny: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_pretrained_encoder(tiny, "cpu")
    message = str(caught.value)
    assert str(tiny) in message and "openai/clip-vit-base-patch32" in message and "\n" not in message
    assert re.search(r"\b(text|vision)_model\.\S+", message), message  # names the first tensor that does not fit
