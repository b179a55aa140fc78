"""The losses computed in chunks, against the complete logit matrix and against an explicit softmax in float64."""

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
    """Return the total loss from an explicit softmax over the complete logit matrix."""

    def info_nce(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        s = (left @ right.T / temperature).exp()
        return -((s.diagonal() / s.sum(1)).log() + (s.diagonal() / s.sum(0)).log()).mean() / 2

    graph, text, vis = z
    edges = len(graph) // 2
    return info_nce(text, vis) + weight * info_nce(graph[:edges], graph[edges:])


@pytest.mark.parametrize("at_once", [1, 40, 333, 1 << 30], ids=["a row", "2 rows", "16 rows", "whole"])
def test_losses_in_chunks_against_float64(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """The losses and gradients of 10 edges match float64 within 1e-6, also if the last chunk is smaller."""
    monkeypatch.setattr(targets.LOGIT_CHUNK, at_once)
    z = leaves(embeddings(20, 8))
    exact = leaves([tensor.detach().double() for tensor in z])
    result = losses.contrastive_losses(*z, 0.07, 0.5)
    result.total.backward()
    expected = float64_losses(exact, 0.07, 0.5)
    expected.backward()
    assert result.total.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(z, exact, strict=True):
        assert (ours.grad.double() - theirs.grad).norm() < 1e-6 * theirs.grad.norm()


def test_chunks_do_not_change_the_losses_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean loss of three ranks stays the same, and so do its gradients for local and gathered embeddings."""
    left, right = embeddings(12, 8, torch.float64)[:2]
    info_nce, results = pkgutil.resolve_name(targets.INFO_NCE), {}
    for chunk in (1 << 30, 20):
        monkeypatch.setattr(targets.LOGIT_CHUNK, chunk)
        local, gathered = leaves([left, right]), leaves([left, right])
        rank_losses = [
            info_nce(
                (local[0][4 * r : 4 * r + 4], local[1][4 * r : 4 * r + 4]),
                (gathered[0], gathered[1]),
                torch.arange(4 * r, 4 * r + 4),
                0.07,
            )
            for r in range(3)
        ]
        loss = torch.stack(rank_losses).mean()
        loss.backward()
        results[chunk] = [loss.detach(), *(tensor.grad for tensor in (*local, *gathered))]
    for complete, chunked in zip(*results.values(), strict=True):
        assert torch.allclose(complete, chunked, rtol=1e-12)


def test_chunked_losses_never_store_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor in the forward or backward pass is as large as half of the logit matrix (512 x 512 float32)."""
    monkeypatch.setattr(targets.LOGIT_CHUNK, 4096)
    z = leaves(embeddings(512, 8))
    with torch.profiler.profile(profile_memory=True) as profile:
        losses.contrastive_losses(*z, 0.07, 1.0).total.backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 512 * 512 * 4 / 2
