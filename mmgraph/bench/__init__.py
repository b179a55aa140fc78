"""``mmgraph bench``: benchmarks of this machine and graph. Variants to compare take turns in one run."""
