"""Ranking held-out edges."""
