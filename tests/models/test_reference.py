"""Fusion, heads, losses and towers, against references in plain float64 tensor operations."""

import math

import pytest
import torch
from conftest import tiny_configs

from mmgraph.losses.contrastive import contrastive_losses, info_nce_loss
from mmgraph.models.cross_attention_fusion import CrossAttentionFusion
from mmgraph.models.multimodal_graph_encoder import MultimodalGraphEncoder, TrainedModule
from mmgraph.towers.clip import random_towers
from mmgraph.towers.tokens import Tokens

State = dict[str, torch.Tensor]


def linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(state: State, name: str, query: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the attention of one node: query (Q, d), keys (K, d), valid (K,) -> (Q, d).

    Without a valid key, the result is the bias of the output projection.
    """
    d = query.shape[1]
    weight, bias = state[f"{name}.in_proj_weight"], state[f"{name}.in_proj_bias"]
    q, k, v = (x @ weight[i * d : (i + 1) * d].T + bias[i * d : (i + 1) * d] for i, x in enumerate((query, keys, keys)))
    heads = []
    for h in range(8):
        part = slice(h * d // 8, (h + 1) * d // 8)
        scores = torch.exp(q[:, part] @ k[valid][:, part].T / math.sqrt(d // 8))
        heads.append(scores @ v[valid][:, part] / scores.sum(dim=1, keepdim=True) if valid.any() else 0 * q[:, part])
    return linear(state, f"{name}.out_proj", torch.cat(heads, dim=1))


def reference(state: State, text: torch.Tensor, mask: torch.Tensor, patches: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run the forward pass of one node in float64: text (L, d_text), mask (L,), patches (P, d_vis)."""
    valid = mask.bool()
    t, v = linear(state, "fusion.text_proj", text), linear(state, "fusion.vis_proj", patches)
    all_patches = torch.ones(len(patches), dtype=torch.bool)
    t2v = attention(state, "fusion.text2vis_attn", t, v, all_patches) + t
    v2t = attention(state, "fusion.vis2text_attn", v, t, valid) + v
    t2v = linear(state, "fusion.text_ffn.2", gelu(linear(state, "fusion.text_ffn.0", t2v)))
    v2t = linear(state, "fusion.vis_ffn.2", gelu(linear(state, "fusion.vis_ffn.0", v2t)))
    text_pool = t2v[valid].sum(dim=0) / max(int(valid.sum()), 1)
    vis_pool = v2t.sum(dim=0) / len(v2t)
    x = linear(state, "fusion.fusion_mlp.0", torch.cat([text_pool, vis_pool]))
    x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
    x = gelu(x * state["fusion.fusion_mlp.1.weight"] + state["fusion.fusion_mlp.1.bias"])
    fused = linear(state, "fusion.fusion_mlp.3", x)
    out = {"fused": fused, "text_pool": text_pool, "vis_pool": vis_pool}
    for name, head, pooled in (("z_graph", "graph_proj", fused), ("z_text", "text_proj", text_pool),
                               ("z_vis", "vis_proj", vis_pool)):  # fmt: skip
        z = linear(state, head, pooled)
        out[name] = z / torch.sqrt((z**2).sum())
    return out


def reference_losses(z: State, temperature: float) -> dict[str, float]:
    """Return the symmetric InfoNCE losses by explicit log-sum-exp; z_* are (2B, d), B anchors, then B positives."""

    def info_nce(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        s = left @ right.T / temperature
        rows = torch.log(torch.exp(s).sum(dim=1)) - s.diagonal()
        columns = torch.log(torch.exp(s).sum(dim=0)) - s.diagonal()
        return (rows.mean() + columns.mean()) / 2

    batch = len(z["z_graph"]) // 2
    mm = info_nce(z["z_text"], z["z_vis"])
    graph = info_nce(z["z_graph"][:batch], z["z_graph"][batch:])
    return {"mm": float(mm), "graph": float(graph)}


# d_text, d_vis, fused_dim, proj_dim, patches; the first are those of ViT-B/32
SIZES = [pytest.param(512, 768, 512, 256, 49, marks=pytest.mark.slow), (40, 24, 64, 16, 5)]


@pytest.mark.parametrize(("d_text", "d_vis", "fused_dim", "proj_dim", "patches"), SIZES)
def test_forward_and_losses(d_text: int, d_vis: int, fused_dim: int, proj_dim: int, patches: int) -> None:
    torch.manual_seed(0)
    lengths = list(range(78))  # all text lengths, including 0
    mask = (torch.arange(77) < torch.tensor(lengths)[:, None]).long()  # (78, 77)
    tokens = Tokens(torch.randn(78, 77, d_text), mask, torch.randn(78, patches, d_vis))
    module = TrainedModule(d_text, d_vis, fused_dim, proj_dim)
    state = {name: tensor.double() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        fused, text_pool, vis_pool = module.fusion(*tokens[:3])
        z = dict(zip(("z_graph", "z_text", "z_vis"), module(tokens), strict=True))
    outputs = {"fused": fused, "text_pool": text_pool, "vis_pool": vis_pool, **z}
    rows = [
        reference(state, t.double(), m, p.double()) for t, m, p in zip(tokens.text, mask, tokens.patches, strict=True)
    ]
    for name, tensor in outputs.items():
        expected = torch.stack([row[name] for row in rows])
        assert tensor.isfinite().all()
        assert (tensor.double() - expected).norm() / expected.norm() < 2e-6, name
    losses = contrastive_losses(z["z_graph"], z["z_text"], z["z_vis"], 0.07, 0.5)
    expected_losses = reference_losses({name: torch.stack([row[name] for row in rows]) for name in z}, 0.07)
    assert abs(float(losses.mm) - expected_losses["mm"]) < 1e-6 * max(1, expected_losses["mm"])
    assert abs(float(losses.graph) - expected_losses["graph"]) < 1e-6 * max(1, expected_losses["graph"])
    assert float(losses.total) == pytest.approx(float(losses.mm) + 0.5 * float(losses.graph), rel=1e-6)


def test_no_valid_text_gives_finite_gradients() -> None:
    fusion = CrossAttentionFusion(8, 8, 16)
    outputs = fusion(torch.randn(2, 5, 8), torch.tensor([[0] * 5, [1, 1, 0, 0, 0]]), torch.randn(2, 3, 8))
    sum(output.sum() for output in outputs).backward()
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())
    assert torch.equal(outputs[1][0], torch.zeros(16))  # the mask's sum is clamped at 1: 0 / 1


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
def test_fusion_in_bf16_is_close_to_float32(autocast: bool) -> None:
    """On a CPU, attention in bf16 is computed in float32. The mask, also of a node without text, stays in effect."""
    torch.manual_seed(0)
    fusion = CrossAttentionFusion(8, 8, 64)
    inputs = torch.randn(3, 5, 8), torch.randn(3, 7, 8)
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [0] * 5])
    expected = fusion(inputs[0], mask, inputs[1])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if autocast:
            outputs = fusion(inputs[0], mask, inputs[1])
        else:
            outputs = fusion.bfloat16()(inputs[0].bfloat16(), mask, inputs[1].bfloat16())
    sum(output.float().sum() for output in outputs).backward()
    for ours, theirs in zip(outputs, expected, strict=True):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())


def test_pooling_of_text_without_a_valid_token() -> None:
    """Text without a valid token pools to 0."""
    fusion = CrossAttentionFusion(8, 8, 16)
    with torch.no_grad():
        valid = fusion(torch.ones(1, 1, 8), torch.ones(1, 1), torch.ones(1, 3, 8))[1]
        empty = fusion(torch.ones(1, 1, 8), torch.zeros(1, 1), torch.ones(1, 3, 8))[1]
    assert valid.abs().max() > 0.01 and empty.abs().max() == 0


def test_info_nce_of_known_logits() -> None:
    assert float(info_nce_loss(torch.zeros(4, 4))) == pytest.approx(math.log(4))
    s = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    rows = (math.log(math.exp(2) + 1) - 2 + math.log(math.exp(1) + math.exp(3)) - 3) / 2
    columns = (math.log(math.exp(2) + math.exp(1)) - 2 + math.log(1 + math.exp(3)) - 3) / 2
    assert float(info_nce_loss(s)) == pytest.approx((rows + columns) / 2)


def test_towers_match_transformers() -> None:
    text, vision = (tower.model for tower in random_towers(*tiny_configs()))
    encoder = MultimodalGraphEncoder.from_towers(random_towers(*tiny_configs()), 16, 8)
    encoder.text_model.load_state_dict(text.state_dict())
    encoder.vision_model.load_state_dict(vision.state_dict())
    ids = torch.randint(2, 60, (3, 77))
    mask = (torch.arange(77) < torch.tensor([3, 40, 77])[:, None]).long()
    ids[:, 0] = 0
    ids[torch.arange(3), mask.sum(dim=1) - 1] = 1
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        text_out = text(input_ids=ids, attention_mask=mask)
        vision_out = vision(pixel_values=pixels)
        z = encoder(ids, mask, pixels)
        trained = TrainedModule.forward(
            encoder, Tokens(text_out.last_hidden_state, mask, vision_out.last_hidden_state[:, 1:])
        )
        features = encoder.encode(ids, mask, pixels)
    assert all(torch.equal(a, b) for a, b in zip(z, trained, strict=True))
    assert all(torch.allclose(a.norm(dim=1), torch.ones(3)) for a in z)
    assert torch.equal(features["text_only"], text_out.pooler_output)
    assert torch.equal(features["image_only"], vision_out.pooler_output)
    assert torch.equal(features["concat"], torch.cat([text_out.pooler_output, vision_out.pooler_output], dim=1))
    assert features["fused"].shape == (3, 16)


def test_towers_stay_frozen_and_in_eval_mode() -> None:
    encoder = MultimodalGraphEncoder.from_towers(random_towers(*tiny_configs()), 16, 8).train()
    assert encoder.fusion.training and not encoder.text_model.training and not encoder.vision_model.training
    assert not any(p.requires_grad for p in [*encoder.text_model.parameters(), *encoder.vision_model.parameters()])
    assert len(encoder.get_trainable_parameters()) == 32
