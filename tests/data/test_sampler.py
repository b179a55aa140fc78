"""The sampler's order of edges, and its slices for the ranks."""

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard

from mmgraph.data.sampler import GlobalBatchSampler, permuted

ORDER_42_1 = [295, 435, 968, 485, 891, 367, 807, 535]


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 255, 256, 257, 1000, 4097])
def test_each_edge_once(length: int) -> None:
    for epoch in (1, 2):
        assert sorted(permuted(np.arange(length), length, 42, epoch)) == list(range(length))


def test_order_is_fixed() -> None:
    """Runs of older versions can only be resumed if the order stays the same."""
    assert permuted(np.arange(8), 1000, 42, 1).tolist() == ORDER_42_1
    assert permuted(np.arange(8), 1000, 42, 1).tolist() != permuted(np.arange(8), 1000, 42, 2).tolist()
    assert permuted(np.arange(8), 1000, 42, 1).tolist() != permuted(np.arange(8), 1000, 43, 1).tolist()


def test_order_looks_random() -> None:
    """The order has the statistics of random permutations.

    The values of the first 1,000 positions are counted per eighth of the 8,000 edges. Over seeds, the chi-square of
    these counts has 7 degrees of freedom: mean 7, standard deviation 3.7.
    """
    values = []
    for seed in range(100):
        counts = np.bincount(permuted(np.arange(1000), 8000, seed, 1) // 1000, minlength=8)
        # the factor corrects for drawing without replacement
        values.append(float(((counts - 125) ** 2 / 125).sum()) * 8000 / 7000)
    assert 6 < np.mean(values) < 8
    firsts = np.bincount([permuted(np.array([0]), 10, seed, 1)[0] for seed in range(1000)], minlength=10)
    assert firsts.min() > 60 and firsts.max() < 140  # expected: 100 each, standard deviation 9.5
    # values at adjacent positions are uncorrelated
    order = permuted(np.arange(8000), 8000, 0, 1).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_get_slices_of_the_same_batches(world_size: int) -> None:
    batches = list(GlobalBatchSampler(103, 12, seed=1))
    shards = [
        BatchSamplerShard(GlobalBatchSampler(103, 12, seed=1), world_size, rank, split_batches=True, even_batches=False)
        for rank in range(world_size)
    ]
    joined = [[edge for part in parts for edge in part] for parts in zip(*shards, strict=True)]
    assert joined == batches and len(batches) == 8
    edges = [edge for batch in joined for edge in batch]
    assert len(edges) == len(set(edges)) == 96  # each edge at most once; the incomplete batch is dropped


def test_begin_inside_an_epoch() -> None:
    sampler = GlobalBatchSampler(103, 12, seed=1)
    sampler.begin(epoch=3)
    batches = list(sampler)
    sampler.begin(epoch=3, samples=36)
    assert list(sampler) == batches[3:] and len(sampler) == 8
