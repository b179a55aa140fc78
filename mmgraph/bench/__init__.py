"""``mmgraph bench``: what this machine does with this graph. Ratios are of times measured in turn, in one run."""
