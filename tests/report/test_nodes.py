"""Positions on the map of nodes."""

import numpy as np
import pytest

from mmgraph.report.nodes import arrange


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 40, 100])
def test_positions_of_any_number_of_nodes(count: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(count, 16)).astype(np.float32)
    for rows in (vectors, np.ones_like(vectors)):
        positions = arrange(rows / np.linalg.norm(rows, axis=1, keepdims=True), seed=1)
        assert positions.shape == (count, 2) and positions.min() >= 0 and positions.max() <= 1
        assert np.array_equal(positions, arrange(rows / np.linalg.norm(rows, axis=1, keepdims=True), seed=1))


def test_positions_keep_groups_together() -> None:
    """If the vectors form two distant groups, the nearest node on the map is always in the same group."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(2, 32))
    vectors = np.repeat(centers, 60, axis=0) + 0.1 * generator.normal(size=(120, 32))
    positions = arrange((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), seed=0)
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert ((distances.argmin(axis=1) < 60) == (np.arange(120) < 60)).all()
