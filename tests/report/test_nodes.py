"""Positions on the map of nodes."""

import numpy as np
import pytest

from mmgraph.report.nodes import arrange


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 40, 100])
def test_positions_of_any_number_of_nodes(count: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(count, 16)).astype(np.float32)
    for some in (vectors, np.ones_like(vectors)):
        places = arrange(some / np.linalg.norm(some, axis=1, keepdims=True), seed=1)
        assert places.shape == (count, 2) and places.min() >= 0 and places.max() <= 1
        assert np.array_equal(places, arrange(some / np.linalg.norm(some, axis=1, keepdims=True), seed=1))


def test_positions_keep_groups_together() -> None:
    """Two distant groups of vectors are two groups on the map."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(2, 32))
    vectors = np.repeat(centres, 60, axis=0) + 0.1 * generator.normal(size=(120, 32))
    places = arrange((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), seed=0)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert ((distances.argmin(axis=1) < 60) == (np.arange(120) < 60)).all()
