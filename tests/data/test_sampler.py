"""The order of edges, and the slices that ranks get of it."""

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard

from mmgraph.data.sampler import GlobalBatchSampler, permuted

ORDER_42_1 = [295, 435, 968, 485, 891, 367, 807, 535]


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 255, 256, 257, 1000, 4097])
def test_every_edge_once(length: int) -> None:
    for epoch in (1, 2):
        assert sorted(permuted(np.arange(length), length, 42, epoch)) == list(range(length))


def test_the_order_never_changes() -> None:
    """Resumes of old runs depend on it."""
    assert permuted(np.arange(8), 1000, 42, 1).tolist() == ORDER_42_1
    assert permuted(np.arange(8), 1000, 42, 1).tolist() != permuted(np.arange(8), 1000, 42, 2).tolist()
    assert permuted(np.arange(8), 1000, 42, 1).tolist() != permuted(np.arange(8), 1000, 43, 1).tolist()


def test_the_order_looks_random() -> None:
    """Chi-square of where an eighth of the edges goes, over seeds: 7 degrees of freedom, mean 7, deviation 3.7."""
    values = []
    for seed in range(100):
        counts = np.bincount(permuted(np.arange(1000), 8000, seed, 1) // 1000, minlength=8)
        values.append(float(((counts - 125) ** 2 / 125).sum()) * 8000 / 7000)  # drawn without replacement
    assert 6 < np.mean(values) < 8
    firsts = np.bincount([permuted(np.array([0]), 10, seed, 1)[0] for seed in range(1000)], minlength=10)
    assert firsts.min() > 60 and firsts.max() < 140  # 100 each, deviation 9.5
    # neighbours in place are not neighbours in value
    order = permuted(np.arange(8000), 8000, 0, 1).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_get_slices_of_the_same_batches(world_size: int) -> None:
    whole = list(GlobalBatchSampler(103, 12, seed=1))
    shards = [
        BatchSamplerShard(GlobalBatchSampler(103, 12, seed=1), world_size, rank, split_batches=True, even_batches=False)
        for rank in range(world_size)
    ]
    joined = [[edge for part in parts for edge in part] for parts in zip(*shards, strict=True)]
    assert joined == whole and len(whole) == 8
    seen = [edge for batch in joined for edge in batch]
    assert len(seen) == len(set(seen)) == 96  # each edge once, the incomplete batch dropped


def test_beginning_in_the_middle() -> None:
    sampler = GlobalBatchSampler(103, 12, seed=1)
    sampler.begin(epoch=3)
    whole = list(sampler)
    sampler.begin(epoch=3, samples=36)
    assert list(sampler) == whole[3:] and len(sampler) == 8
