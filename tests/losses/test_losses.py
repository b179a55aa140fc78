"""The losses in parts against the plain ones, and against explicit ones in float64."""

import pkgutil

import pytest
import targets
import torch
import torch.nn.functional as F

from mmgraph.losses import contrastive as losses


def embeddings(rows: int, width: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [F.normalize(torch.randn(rows, width, generator=generator, dtype=dtype), dim=1) for _ in range(3)]


def leaves(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def float64_losses(z: list[torch.Tensor], temperature: float, weight: float) -> torch.Tensor:
    """By explicit softmax over the whole square."""

    def one(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        s = (left @ right.T / temperature).exp()
        return -((s.diagonal() / s.sum(1)).log() + (s.diagonal() / s.sum(0)).log()).mean() / 2

    graph, text, vis = z
    edges = len(graph) // 2
    return one(text, vis) + weight * one(graph[:edges], graph[edges:])


@pytest.mark.parametrize("at_once", [1, 40, 333, 1 << 30], ids=["a row", "2 rows", "16 rows", "whole"])
def test_in_parts_is_exact(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Losses and gradients, 10 edges; also where the last part is smaller."""
    monkeypatch.setattr(targets.LOGIT_CHUNK, at_once)
    z = leaves(embeddings(20, 8))
    exact = leaves([tensor.detach().double() for tensor in z])
    found = losses.contrastive_losses(*z, 0.07, 0.5)
    found.total.backward()
    expected = float64_losses(exact, 0.07, 0.5)
    expected.backward()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(z, exact, strict=True):
        assert (ours.grad.double() - theirs.grad).norm() < 1e-6 * theirs.grad.norm()


def test_ranks_shares_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of three ranks, whose mean is the loss of one, with gradients to everybody's embeddings."""
    left, right = embeddings(12, 8, torch.float64)[:2]
    info_nce, ends = pkgutil.resolve_name(targets.INFO_NCE), {}
    for at_once in (1 << 30, 20):
        monkeypatch.setattr(targets.LOGIT_CHUNK, at_once)
        own, everyone = leaves([left, right]), leaves([left, right])
        shares = [
            info_nce(
                (own[0][4 * r : 4 * r + 4], own[1][4 * r : 4 * r + 4]),
                (everyone[0], everyone[1]),
                torch.arange(4 * r, 4 * r + 4),
                0.07,
            )
            for r in range(3)
        ]
        loss = torch.stack(shares).mean()
        loss.backward()
        ends[at_once] = [loss.detach(), *(tensor.grad for tensor in (*own, *everyone))]
    for whole, in_parts in zip(*ends.values(), strict=True):
        assert torch.allclose(whole, in_parts, rtol=1e-12)


def test_memory_is_not_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor as large as the square of logits is made, forward or backward."""
    monkeypatch.setattr(targets.LOGIT_CHUNK, 4096)
    z = leaves(embeddings(512, 8))
    with torch.profiler.profile(profile_memory=True) as profile:
        losses.contrastive_losses(*z, 0.07, 1.0).total.backward()
    most = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < most < 512 * 512 * 4 / 2
