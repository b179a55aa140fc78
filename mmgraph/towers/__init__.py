"""The frozen towers: loading, running live, and their tokens on disk."""
