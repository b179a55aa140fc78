"""Exact ranks by cosine similarity. Summation order, chunk sizes and the number of processes do not change the ranks.

The values of unit vectors are rounded to multiples of 2^-24, which float32 represents exactly. A product of two values
is then a multiple of 2^-48. The partial sums in a dot product of two unit vectors do not exceed 1 by much, so they need
about 49 bits. float64 has 53 bits, so the sum has no rounding error in any order. Equal vectors therefore have exactly
the same score, and every tie is detected.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from mmgraph.data.adjacency import Adjacency
from mmgraph.errors import UserError

GRID = 2.0**24
QUERY_CHUNK, CANDIDATE_CHUNK = 512, 8192  # a tile of float64 scores takes 32 MB
VALUE_CHUNK = 1 << 22  # maximum number of vector elements of negatives in memory at a time; 32 MB in float64
SAMPLED = 100  # random negatives per positive
NEGATIVE_CHUNK = 1024  # number of positives whose negatives one generator draws


def round_to_grid(vectors: torch.Tensor) -> torch.Tensor:
    """Scale rows to unit length and round them to the grid: (N, d) float32.

    Raises:
        UserError: a value is not finite.
    """
    vectors = F.normalize(vectors.float(), dim=1)
    if not vectors.isfinite().all():
        row = int((~vectors.isfinite()).any(dim=1).nonzero()[0])
        raise UserError(f"the embedding of node row {row} is not finite, so edges cannot be ranked")
    return vectors.mul_(GRID).round_().div_(GRID)


def filtered_ranks(
    vectors: torch.Tensor,
    queries: torch.Tensor,
    targets: torch.Tensor,
    known: Sequence[Adjacency],
    query_vectors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the rank of each target among all nodes, by similarity to its query. The best rank is 1.

    The query itself and its other neighbors are not candidates (Bordes et al., 2013). A tie gets the mean rank: 1 + the
    number of candidates with a higher score + half the number of other candidates with the target's score.

    Args:
        vectors: (N, d), from :func:`round_to_grid`.
        queries, targets: (Q,) int64 rows; no query is its own target.
        known: adjacencies that together contain all known edges.
        query_vectors: (Q, d) vectors to use for the queries. Default: ``vectors[queries]``.

    Returns:
        (Q,) float64.
    """
    scoring_vectors = vectors[queries] if query_vectors is None else query_vectors

    def remove(scores: torch.Tensor, part: slice, first: int) -> None:
        query, stop = queries[part], first + scores.shape[1]
        inside = torch.nonzero((query >= first) & (query < stop)).flatten()
        scores[inside, query[inside] - first] = -torch.inf
        for neighbors in known:
            owners, rows = neighbors.neighbors_of(query, first, stop)
            scores[owners, rows - first] = -torch.inf

    return _mean_ranks(scoring_vectors, vectors, targets, remove)


def matching_ranks(queries: torch.Tensor, candidates: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """Return the rank of each query's match among all candidates, (Q,) float64.

    A tie gets the mean rank, as in :func:`filtered_ranks`.

    Args:
        queries, candidates: (Q, d) and (C, d), from :func:`round_to_grid`.
        matches: (Q,) int64 indices into the candidates.
    """
    return _mean_ranks(queries, candidates, matches, lambda *_: None)


def _mean_ranks(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    targets: torch.Tensor,
    remove: Callable[[torch.Tensor, slice, int], None],
) -> torch.Tensor:
    """Return the ranks of (Q,) targets among (C, d) candidates for (Q, d) queries. Scores are computed tile by tile.

    Args:
        remove: sets the scores of excluded candidates to -inf. Called with a tile's (q, c) scores, the slice of its
            queries and the index of its first candidate.
    """
    target_scores = (queries.double() * candidates[targets].double()).sum(1)  # (Q,)
    above, equal = torch.zeros_like(target_scores), torch.zeros_like(target_scores)
    for first in range(0, len(candidates), CANDIDATE_CHUNK):
        columns = candidates[first : first + CANDIDATE_CHUNK].double().T  # (d, c)
        for start in range(0, len(queries), QUERY_CHUNK):
            part = slice(start, start + QUERY_CHUNK)
            scores = queries[part].double() @ columns  # (q, c)
            remove(scores, part, first)
            index = targets[part] - first
            inside = torch.nonzero((index >= 0) & (index < scores.shape[1])).flatten()
            # remove() also excludes the targets, so their scores are restored.
            scores[inside, index[inside]] = target_scores[part][inside]
            above[part] += (scores > target_scores[part, None]).sum(1)
            equal[part] += (scores == target_scores[part, None]).sum(1)
    return 1 + above + (equal - 1) / 2


def sampled_ranks(
    vectors: torch.Tensor, queries: torch.Tensor, targets: torch.Tensor, first: int, seed: int
) -> torch.Tensor:
    """Return the rank of each target among itself and 100 random nodes: (Q,) float64.

    This is a common quick protocol, but not that of the original trainer, which scores 2,460 pairs, half of them random
    negatives, with an R-GCN and an MLP. The random nodes are drawn uniformly from all nodes except the target. Known
    neighbors are not excluded. A positive is a pair of query and target. The draw depends only on the seed and
    on the index of the positive.

    Args:
        vectors, queries, targets: as in :func:`filtered_ranks`.
        first: index of ``queries[0]`` among the positives of all processes.
        seed: seed of the draw.
    """
    ranks = [vectors.new_empty(0, dtype=torch.float64)]
    for start in range(0, len(queries), NEGATIVE_CHUNK):
        query, target = queries[start : start + NEGATIVE_CHUNK], targets[start : start + NEGATIVE_CHUNK]
        drawn = _negatives(first + start, len(query), len(vectors) - 1, seed).to(query.device)  # (q, 100)
        drawn += drawn >= target[:, None]
        candidates = torch.cat([target[:, None], drawn], dim=1)  # (q, 101)
        size = max(1, VALUE_CHUNK // (candidates.shape[1] * vectors.shape[1]))
        for rows, query_rows in zip(candidates.split(size), query.split(size), strict=True):
            scores = (vectors[rows].double() @ vectors[query_rows].double()[:, :, None]).squeeze(2)  # (q, 101)
            target_scores = scores[:, :1]
            ranks.append(1 + (scores > target_scores).sum(1) + ((scores == target_scores).sum(1) - 1) / 2)
    return torch.cat(ranks).double()


def _negatives(first: int, count: int, below: int, seed: int) -> torch.Tensor:
    """Draw 100 integers in [0, ``below``) for each positive ``first`` to ``first + count - 1``: (count, 100) int64.

    The integers of a positive depend only on its index and the seed, not on ``first`` or ``count``.
    """
    chunks = range(first // NEGATIVE_CHUNK, (first + count - 1) // NEGATIVE_CHUNK + 1)
    drawn = [np.random.default_rng([seed, chunk]).integers(0, below, (NEGATIVE_CHUNK, SAMPLED)) for chunk in chunks]
    return torch.from_numpy(np.concatenate(drawn)[first % NEGATIVE_CHUNK :][:count])


def summary(ranks: np.ndarray) -> dict[str, float]:
    """Return MRR and Hits@1, 3 and 10 of ranks of any shape. A tie can give rank 1.5, which is no hit for Hits@1."""
    return {"mrr": float((1 / ranks).mean()), **{f"hits@{k}": float((ranks <= k).mean()) for k in (1, 3, 10)}}
