"""The demo graph, and its towers with random weights."""
