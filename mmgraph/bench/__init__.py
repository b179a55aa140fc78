"""``mmgraph bench``: benchmarks on this machine and a given graph. The variants of a comparison take turns."""

GPU_PARTS = ("steps", "profile", "loss", "store", "evaluation")  # of bench gpu; here, so that its help needs no torch
