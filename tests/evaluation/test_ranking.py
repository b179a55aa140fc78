"""Ranks and metrics against brute force, with ties, repeated edges, self-loops and several relations."""

from fractions import Fraction
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from targets import CANDIDATE_CHUNK, QUERY_CHUNK, SAMPLED_NEGATIVES

from mmgraph.data.adjacency import Adjacency, pair_keys
from mmgraph.data.split import HeldOut
from mmgraph.errors import UserError
from mmgraph.evaluation.evaluator import Evaluation
from mmgraph.evaluation.ranking import round_to_grid, sampled_ranks

Edges = list[tuple[int, int]]


def neighbors(edges: Edges, nodes: int) -> Adjacency:
    return Adjacency(torch.from_numpy(pair_keys(np.array(edges).reshape(-1, 2), nodes)), nodes)


def exact_scores(vectors: torch.Tensor) -> list[list[Fraction]]:
    """Return the similarities of all pairs of vectors as exact rational numbers."""
    rows = [[Fraction(value) for value in row] for row in vectors.double().tolist()]
    return [[sum((a * b for a, b in zip(left, right, strict=True)), Fraction()) for right in rows] for left in rows]


def brute_force_rank(scores: list[Fraction], query: int, target: int, true: Edges) -> float:
    """Return a rank by its definition, with a loop over the candidates."""
    others = {b for a, b in true if a == query} | {a for a, b in true if b == query}
    candidates = [node for node in range(len(scores)) if node != query and (node == target or node not in others)]
    above = sum(scores[node] > scores[target] for node in candidates)
    equal = sum(scores[node] == scores[target] for node in candidates if node != target)
    return 1 + above + equal / 2


def random_graph(seed: int, nodes: int = 23) -> tuple[torch.Tensor, Edges, list[tuple[int, int, int]]]:
    """Return vectors, many of them equal, training edges, and held-out edges with relations."""
    generator = np.random.default_rng(seed)
    vectors = torch.from_numpy(generator.normal(size=(nodes, 5)).astype(np.float32))
    copies = generator.integers(0, nodes, (nodes // 2, 2))
    vectors[copies[:, 0]] = vectors[copies[:, 1]]
    vectors[int(generator.integers(nodes))] = 0.0  # its similarity to every vector is 0, a tie
    train = [tuple(edge) for edge in generator.integers(0, nodes, (40, 2)).tolist()]
    held_out = [
        tuple(edge)
        for edge in np.column_stack([generator.integers(0, nodes, (30, 2)), generator.integers(0, 3, 30)]).tolist()
    ]
    held_out += [
        held_out[0],
        (*held_out[1][:2], 2 - held_out[1][2]),
        (held_out[2][1], held_out[2][0], held_out[2][2]),
        (4, 4, 1),
    ]
    return vectors, train, held_out


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tile", [(1, 1), (5, 7), (512, 8192)], ids=["one score", "5 x 7", "whole"])
def test_table_against_brute_force(monkeypatch: pytest.MonkeyPatch, seed: int, tile: tuple[int, int]) -> None:
    """MRR and Hits, overall and by relation, are equal to brute force for every tile size."""
    monkeypatch.setattr(QUERY_CHUNK, tile[0])
    monkeypatch.setattr(CANDIDATE_CHUNK, tile[1])
    vectors, train, held_out = random_graph(seed)
    rows = np.array(held_out)
    evaluation = Evaluation(
        Accelerator(cpu=True), neighbors(train, 23), HeldOut(rows[:, :2], rows[:, 2], ["r0", "r1", "r2"], "x"), seed=3
    )
    table = evaluation.table({"z": evaluation.ranks(vectors)})

    scores = exact_scores(round_to_grid(vectors))
    true = train + [(a, b) for a, b, _ in held_out]
    evaluated = sorted({edge for edge in held_out if edge[0] != edge[1]})
    expected = {
        edge: [brute_force_rank(scores[a], a, b, true), brute_force_rank(scores[b], b, a, true)]
        for edge in evaluated
        for a, b in [edge[:2]]
    }
    ranks = [rank for pair in expected.values() for rank in pair]
    assert any(rank % 1 for rank in ranks)  # some ranks are ties
    metrics = table["embeddings"]["z"]
    assert metrics["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks), rel=1e-12)
    for k in (1, 3, 10):
        assert metrics[f"hits@{k}"] == pytest.approx(sum(rank <= k for rank in ranks) / len(ranks), rel=1e-12)
    for relation in {edge[2] for edge in evaluated}:
        relation_ranks = [rank for edge, pair in expected.items() if edge[2] == relation for rank in pair]
        assert table["relations"][f"r{relation}"]["z"] == pytest.approx(
            sum(1 / rank for rank in relation_ranks) / len(relation_ranks), rel=1e-12
        )
        assert table["relations"][f"r{relation}"]["edges"] == len(relation_ranks) / 2


def test_scores_are_exact_in_any_order() -> None:
    """Scores are exact sums: they do not depend on the kernel or the summation order, and equal vectors tie."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(301, 515, generator=generator)
    vectors[1::2] = vectors[0]
    grid = round_to_grid(vectors)
    scores = grid[:7].double() @ grid.double().T
    assert all(len(set(row[1::2].tolist())) == 1 for row in scores)
    shuffled = torch.randperm(515, generator=generator)
    assert torch.equal(grid[:7, shuffled].double() @ grid[:, shuffled].double().T, scores)
    assert torch.equal((grid[:7, None].double() * grid.double()).sum(2), scores)
    exact = sum(
        (Fraction(a) * Fraction(b) for a, b in zip(grid[0].tolist(), grid[2].tolist(), strict=True)), Fraction()
    )
    assert Fraction(scores[0, 2].item()) == exact
    assert (grid - torch.nn.functional.normalize(vectors, dim=1)).abs().max() < 2**-24


def test_sampled_ranks() -> None:
    """Ranks among 100 random nodes are equal to their definition, and do not depend on how the positives are split.

    The target is never drawn as a negative.
    """
    generator = torch.Generator().manual_seed(0)
    grid = round_to_grid(torch.randn(50, 4, generator=generator))
    queries, targets = (torch.randint(50, (3000,), generator=generator) for _ in range(2))
    ranks = sampled_ranks(grid, queries, targets, 0, seed=5)
    assert torch.equal(sampled_ranks(grid, queries[1500:2100], targets[1500:2100], 1500, seed=5), ranks[1500:2100])
    negatives = resolve_name(SAMPLED_NEGATIVES)
    drawn = negatives(1020, 10, 49, seed=5)  # these positives are in two chunks of negatives
    drawn += drawn >= targets[1020:1030, None]
    assert not (drawn == targets[1020:1030, None]).any() and drawn.min() >= 0 and drawn.max() == 49
    for i in range(10):
        scores = [
            float(grid[n].double() @ grid[queries[1020 + i]].double())
            for n in [int(targets[1020 + i]), *drawn[i].tolist()]
        ]
        expected = 1 + sum(s > scores[0] for s in scores[1:]) + sum(s == scores[0] for s in scores[1:]) / 2
        assert ranks[1020 + i] == expected
    counts = torch.bincount(negatives(0, 3000, 50, seed=5).flatten(), minlength=50)
    assert counts.min() > 0.9 * counts.float().mean()  # the draw is uniform
    assert not torch.equal(sampled_ranks(grid, queries, targets, 0, seed=6), ranks)


def test_adjacency_against_a_set_of_edges() -> None:
    edges: Edges = [(0, 1), (1, 0), (5, 5), (3, 6), (3, 2), (6, 3)]
    known = neighbors(edges, 8)
    both_directions = {*edges, *((b, a) for a, b in edges)}
    owners, rows = known.neighbors_of(torch.tensor([3, 7, 5, 3]))
    assert sorted(zip(owners.tolist(), rows.tolist(), strict=True)) == [(0, 2), (0, 6), (2, 5), (3, 2), (3, 6)]
    owners, rows = known.neighbors_of(torch.tensor([3, 7, 5, 3]), 3, 6)
    assert sorted(zip(owners.tolist(), rows.tolist(), strict=True)) == [(2, 5)]
    left, right = torch.tensor([0, 3, 7, 5]), torch.arange(8)
    expected = [[(a, b) in both_directions for b in range(8)] for a in left.tolist()]
    assert known.linked(left, right).tolist() == expected
    empty = neighbors([], 8)
    assert not empty.linked(left, right).any() and not len(empty.neighbors_of(left)[0])


def test_errors_of_vectors_and_edges_that_cannot_be_ranked() -> None:
    with pytest.raises(UserError, match=r"\b1\b"):  # the number of the row
        round_to_grid(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))

    def evaluation_on(*edges: tuple[int, int]) -> Evaluation:
        held_out = HeldOut(np.array(edges), None, [], "")
        return Evaluation(Accelerator(cpu=True), neighbors([(0, 1)], 3), held_out, 0)

    with pytest.raises(UserError):
        evaluation_on((2, 2))
    assert len(evaluation_on((2, 2), (2, 1)).rows) == 1
