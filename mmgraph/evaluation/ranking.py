"""Ranks by cosine similarity, exact: no order of summation, no chunk and no number of processes changes one.

Unit vectors are rounded to multiples of 2^-24, which float32 holds. Products of two are then multiples of 2^-48, and no
sum of them exceeds 1, so float64 sums them without rounding, in whatever order a library does. Equal vectors have equal
scores to the bit, and a tie is a tie.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from mmgraph.data.adjacency import Adjacency
from mmgraph.errors import UserError

GRID = 2.0**24
QUERY_CHUNK, CANDIDATE_CHUNK = 512, 8192  # a tile of scores has 32 MB
VALUE_CHUNK = 1 << 22  # of vectors that are gathered, 32 MB
SAMPLED = 100  # random negatives of a positive, in the original's protocol
NEGATIVE_CHUNK = 1024  # positives whose negatives are drawn together


def round_to_grid(vectors: torch.Tensor) -> torch.Tensor:
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
    known: Sequence[Adjacency],
    query_vectors: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rank of each target among all nodes, by similarity to its query; the best is 1.

    The query itself and its other neighbours are no candidates (Bordes et al., 2013). Of equal scores the rank is the
    mean one: 1 + those above + half of the other equal ones.

    Args:
        vectors: (N, d), from :func:`round_to_grid`.
        queries, targets: (Q,) int64 rows; no query is its own target.
        known: all true edges.
        query_vectors: (Q, d) vectors of the queries, where they are not their nodes' own.

    Returns:
        (Q,) float64.
    """
    asked = vectors[queries] if query_vectors is None else query_vectors

    def remove(scores: torch.Tensor, part: slice, first: int) -> None:
        query, stop = queries[part], first + scores.shape[1]
        inside = torch.nonzero((query >= first) & (query < stop)).flatten()
        scores[inside, query[inside] - first] = -torch.inf
        for neighbors in known:
            owners, rows = neighbors.of(query, first, stop)
            scores[owners, rows - first] = -torch.inf

    return _mean_ranks(asked, vectors, targets, remove)


def matching_ranks(queries: torch.Tensor, candidates: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """The rank of each query's match among all candidates, ties as in :func:`filtered_ranks`; (Q,) float64.

    Args:
        queries, candidates: (Q, d) and (C, d), from :func:`round_to_grid`.
        matches: (Q,) int64, places among the candidates.
    """
    return _mean_ranks(queries, candidates, matches, lambda *_: None)


def _mean_ranks(
    asked: torch.Tensor,
    candidates: torch.Tensor,
    targets: torch.Tensor,
    remove: Callable[[torch.Tensor, slice, int], None],
) -> torch.Tensor:
    """Ranks of (Q,) targets among (C, d) candidates by (Q, d) queries, a tile of scores at a time.

    Args:
        remove: puts -inf where a tile's candidates are none: given (q, c) scores, which queries they are of, and the
            number of the first candidate.
    """
    of_target = (asked.double() * candidates[targets].double()).sum(1)  # (Q,)
    above, equal = torch.zeros_like(of_target), torch.zeros_like(of_target)
    for first in range(0, len(candidates), CANDIDATE_CHUNK):
        columns = candidates[first : first + CANDIDATE_CHUNK].double().T  # (d, c)
        for start in range(0, len(asked), QUERY_CHUNK):
            part = slice(start, start + QUERY_CHUNK)
            scores = asked[part].double() @ columns  # (q, c)
            remove(scores, part, first)
            place = targets[part] - first
            inside = torch.nonzero((place >= 0) & (place < scores.shape[1])).flatten()
            scores[inside, place[inside]] = of_target[part][inside]  # also where it was removed
            above[part] += (scores > of_target[part, None]).sum(1)
            equal[part] += (scores == of_target[part, None]).sum(1)
    return 1 + above + (equal - 1) / 2


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
    for start in range(0, len(queries), NEGATIVE_CHUNK):
        query, target = queries[start : start + NEGATIVE_CHUNK], targets[start : start + NEGATIVE_CHUNK]
        drawn = _negatives(first + start, len(query), len(vectors) - 1, seed).to(query.device)  # (q, 100)
        drawn += drawn >= target[:, None]
        places = torch.cat([target[:, None], drawn], dim=1)  # (q, 101)
        size = max(1, VALUE_CHUNK // (places.shape[1] * vectors.shape[1]))
        for some, asked in zip(places.split(size), query.split(size), strict=True):
            scores = (vectors[some].double() @ vectors[asked].double()[:, :, None]).squeeze(2)  # (q, 101)
            of_target = scores[:, :1]
            ranks.append(1 + (scores > of_target).sum(1) + ((scores == of_target).sum(1) - 1) / 2)
    return torch.cat(ranks).double()


def _negatives(first: int, count: int, below: int, seed: int) -> torch.Tensor:
    """Numbers below a limit for the positives ``first`` and those after it, the same wherever a part begins."""
    blocks = range(first // NEGATIVE_CHUNK, (first + count - 1) // NEGATIVE_CHUNK + 1)
    drawn = [np.random.default_rng([seed, block]).integers(0, below, (NEGATIVE_CHUNK, SAMPLED)) for block in blocks]
    return torch.from_numpy(np.concatenate(drawn)[first % NEGATIVE_CHUNK :][:count])


def summary(ranks: np.ndarray) -> dict[str, float]:
    """MRR and Hits@1, 3 and 10 of ranks of any shape; the mean rank of a tie counts as it is."""
    return {"mrr": float((1 / ranks).mean()), **{f"hits@{k}": float((ranks <= k).mean()) for k in (1, 3, 10)}}
