"""Curves of long runs, where each point is the mean of several steps."""

import numpy as np

from mmgraph.report.history import thinned


def test_thinned_curves() -> None:
    steps = np.arange(1, 2501, dtype=float)
    values = np.sin(steps)
    values[10:14] = np.nan
    at, means, size = thinned({"step": steps, "loss": values}, "loss", 1000)
    assert size == 3 and at.tolist() == [*range(3, 2500, 3), 2500]
    expected = [np.nanmean(values[i : i + 3]) if np.isfinite(values[i : i + 3]).any() else np.nan
                for i in range(0, 2500, 3)]  # fmt: skip
    assert np.array_equal(means, np.array(expected), equal_nan=True) or np.allclose(
        means, expected, rtol=1e-12, equal_nan=True
    )
    assert thinned({"step": steps[:1000], "loss": values[:1000]}, "loss", 1000)[2] == 1
