"""``mmgraph bench``: benchmarks on this machine and a given graph. The variants of a comparison take turns."""
