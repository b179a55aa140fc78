"""Ranking of held-out edges."""
