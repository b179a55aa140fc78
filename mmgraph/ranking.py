"""Ranks by cosine similarity, exact: no order of summation, no chunk and no number of processes changes one.

Unit vectors are rounded to multiples of 2^-24, which float32 holds. Products of two are then multiples of 2^-48, and no
sum of them exceeds 1, so float64 sums them without rounding, in whatever order a library does. Equal vectors have equal
scores to the bit, and a tie is a tie.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from mmgraph.errors import UserError
from mmgraph.neighbors import Neighbors

GRID = 2.0**24
SCORES_AT_ONCE = 1 << 22  # float64, 32 MB
SAMPLED = 100  # random negatives of a positive, in the original's protocol
BLOCK = 1024  # positives whose negatives are drawn together


def on_grid(vectors: torch.Tensor) -> torch.Tensor:
    """Rows of unit length, rounded to the grid: (N, d) float32.

    Raises:
        UserError: a value is not finite.
    """
    vectors = F.normalize(vectors.float(), dim=1)
    if not vectors.isfinite().all():
        row = int((~vectors.isfinite()).any(dim=1).nonzero()[0])
        raise UserError(f"the embedding of row {row} is not finite: nothing can be ranked")
    return vectors.mul_(GRID).round_().div_(GRID)


def filtered_ranks(
    vectors: torch.Tensor,
    queries: torch.Tensor,
    targets: torch.Tensor,
    known: Sequence[Neighbors],
    asked_with: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rank of each target among all nodes, by similarity to its query; the best is 1.

    The query itself and its other neighbours are no candidates (Bordes et al., 2013). Of equal scores the rank is the
    mean one: 1 + those above + half of the other equal ones.

    Args:
        vectors: (N, d), from :func:`on_grid`.
        queries, targets: (Q,) int64 rows; no query is its own target.
        known: all true edges.
        asked_with: (Q, d) vectors of the queries, where they are not their nodes' own.

    Returns:
        (Q,) float64.
    """
    ranks = [vectors.new_empty(0, dtype=torch.float64)]
    for part in _parts(len(queries), len(vectors)):
        query, target = queries[part], targets[part]
        scores = _scores(vectors[query] if asked_with is None else asked_with[part], vectors)  # (q, N)
        of_target = scores.gather(1, target[:, None])  # (q, 1)
        scores[torch.arange(len(query), device=query.device), query] = -torch.inf
        for neighbors in known:
            scores[neighbors.of(query)] = -torch.inf
        ranks.append(_mean_rank(scores.scatter_(1, target[:, None], of_target), of_target))
    return torch.cat(ranks)


def matching_ranks(queries: torch.Tensor, candidates: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """The rank of each query's match among all candidates, ties as in :func:`filtered_ranks`; (Q,) float64.

    Args:
        queries, candidates: (Q, d) and (C, d), from :func:`on_grid`.
        matches: (Q,) int64, places among the candidates.
    """
    ranks = [queries.new_empty(0, dtype=torch.float64)]
    for part in _parts(len(queries), len(candidates)):
        scores = _scores(queries[part], candidates)  # (q, C)
        ranks.append(_mean_rank(scores, scores.gather(1, matches[part, None])))
    return torch.cat(ranks)


def sampled_ranks(
    vectors: torch.Tensor, queries: torch.Tensor, targets: torch.Tensor, first: int, seed: int
) -> torch.Tensor:
    """The rank of each target among itself and 100 random nodes, as the original ranks: unfiltered; (Q,) float64.

    The nodes are drawn uniformly from all but the target, by the seed and the positive's number.

    Args:
        vectors, queries, targets: as :func:`filtered_ranks`.
        first: the number of the first positive.
    """
    ranks = [vectors.new_empty(0, dtype=torch.float64)]
    for start in range(0, len(queries), BLOCK):
        query, target = queries[start : start + BLOCK], targets[start : start + BLOCK]
        drawn = _negatives(first + start, len(query), len(vectors) - 1, seed).to(query.device)  # (q, 100)
        drawn += drawn >= target[:, None]
        places = torch.cat([target[:, None], drawn], dim=1)  # (q, 101)
        scores = (vectors[places].double() @ vectors[query].double()[:, :, None]).squeeze(2)
        ranks.append(_mean_rank(scores, scores[:, :1]))
    return torch.cat(ranks)


def _negatives(first: int, count: int, below: int, seed: int) -> torch.Tensor:
    """Numbers below a limit for the positives ``first`` and those after it, the same wherever a part begins."""
    blocks = range(first // BLOCK, (first + count - 1) // BLOCK + 1)
    drawn = [np.random.default_rng([seed, block]).integers(0, below, (BLOCK, SAMPLED)) for block in blocks]
    return torch.from_numpy(np.concatenate(drawn)[first % BLOCK :][:count])


def _scores(queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """(q, d) against (C, d): (q, C) float64, exact."""
    scores = queries.new_empty((len(queries), len(candidates)), dtype=torch.float64)
    queries = queries.double()
    for start in range(0, len(candidates), size := max(1, SCORES_AT_ONCE // candidates.shape[1])):
        torch.mm(queries, candidates[start : start + size].double().T, out=scores[:, start : start + size])
    return scores


def _mean_rank(scores: torch.Tensor, of_target: torch.Tensor) -> torch.Tensor:
    """(q, C) and (q, 1) -> (q,), where the target's score is among the row's."""
    return 1 + (scores > of_target).sum(1).double() + ((scores == of_target).sum(1) - 1) / 2


def _parts(queries: int, candidates: int) -> Iterator[slice]:
    size = max(1, SCORES_AT_ONCE // max(1, candidates))
    for start in range(0, queries, size):
        yield slice(start, start + size)


def summary(ranks: np.ndarray) -> dict[str, float]:
    """MRR and Hits@1, 3 and 10 of ranks of any shape; the mean rank of a tie counts as it is."""
    return {"mrr": float((1 / ranks).mean()), **{f"hits@{k}": float((ranks <= k).mean()) for k in (1, 3, 10)}}
