"""Choice of the tower implementation by model type, shapes of towers without weights, and hanging loader workers."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import line_with, settings, tiny_configs

from mmgraph.cli import train_main
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.errors import UserError
from mmgraph.models.multimodal_graph_encoder import MultimodalGraphEncoder
from mmgraph.towers.clip import CLIPImageTower, CLIPTextTower, random_towers
from mmgraph.towers.load import empty_towers, load_towers, tower_shapes


def model_of_type(model_type: str | None, towers: Path, folder: Path) -> str:
    """Copy a model, set ``model_type`` in its config.json (None removes it), and return the copy's path."""
    shutil.copytree(towers, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("model_type")
    (folder / "config.json").write_text(json.dumps(config | ({"model_type": model_type} if model_type else {})))
    return str(folder)


@pytest.mark.parametrize("model_type", ["clip", None])
def test_clip_models_have_clip_towers(model_type: str | None, graph: Path, tmp_path: Path) -> None:
    """A model without a ``model_type`` is loaded as CLIP."""
    text, image = load_towers(model_of_type(model_type, graph / "towers", tmp_path / "towers"))
    assert isinstance(text, CLIPTextTower) and isinstance(image, CLIPImageTower)


def test_unsupported_model_type_prints_one_error_line(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = model_of_type("bert", graph / "towers", tmp_path / "towers")
    assert train_main(settings(graph, tmp_path / "run", f"--model_name={name}")) == 2
    line = f"mmgraph: error: --model_name {name}: model_type 'bert' is not implemented; supported: clip\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "run").exists()


def test_error_for_a_missing_model(tmp_path: Path) -> None:
    for load in (load_towers, tower_shapes, empty_towers):
        with pytest.raises(UserError, match=r"--model_name .*nowhere: no CLIP model, tokenizer or image processor"):
            load(str(tmp_path / "nowhere"))


def test_tower_shapes_match_loaded_towers(graph: Path) -> None:
    """The towers on the meta device have the shapes of the loaded towers. Building them draws no random numbers."""
    before = torch.get_rng_state()
    shapes = tower_shapes(str(graph / "towers"))
    assert torch.equal(torch.get_rng_state(), before)  # else the initial weights of a run would change
    assert all(tensor.is_meta for tower in shapes for tensor in tower.model.state_dict().values())
    loaded = load_towers(str(graph / "towers"))
    for meta, real in zip(shapes, loaded, strict=True):
        assert (meta.width, meta.description()) == (real.width, real.description())
    assert shapes.widths == (128, 128) and shapes.text.length == 77
    assert shapes.image.image_size == 72 and shapes.image.patches == 16
    assert shapes.text.flops(77) == loaded.text.flops(77) > shapes.text.flops(10)


@torch.no_grad()
def test_outputs_have_the_shapes_in_the_tower_attributes() -> None:
    towers = random_towers(*tiny_configs())
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    text = towers.text.tokens(torch.tensor([[0, 5, 1, 1], [0, 5, 6, 1]]), mask)
    assert text.sequence.shape == (2, 4, towers.text.width) and text.mask is mask
    assert text.pooled.shape == (2, towers.text.width)
    side = towers.image.image_size
    image = towers.image.tokens(torch.randn(2, 3, side, side))
    assert image.sequence.shape == (2, towers.image.patches, towers.image.width) and image.mask is None
    assert image.pooled.shape == (2, towers.image.width)


def test_an_encoder_uses_replaced_tower_modules() -> None:
    """After a tower module of an encoder is assigned, ``towers`` returns the new module."""
    encoder = MultimodalGraphEncoder.from_towers(random_towers(*tiny_configs()), 16, 8)
    encoder.text_model, encoder.vision_model = (tower.model for tower in random_towers(*tiny_configs()))
    assert encoder.towers.text_model is encoder.text_model and encoder.towers.vision_model is encoder.vision_model


def test_a_hanging_worker_in_an_evaluation_ends_the_run(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends with an error after ``--collective_timeout``.

    Workers are forked, so the replaced method hangs in them. The main process does not call it.
    """
    monkeypatch.setattr(NodeInputs, "read_images", lambda *_: time.sleep(600))
    flags = ["--tower_cache=off", "--eval_fraction=0.2", "--collective_timeout=3", "--num_workers=1"]
    start = time.monotonic()
    assert train_main(settings(graph, tmp_path / "run", *flags)) == 1
    assert time.monotonic() - start < 60
    assert line_with(capsys.readouterr().err, "mmgraph: error:", "--collective_timeout", "DataLoader worker")
