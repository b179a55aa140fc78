"""Checkpoint files in the original's format, and resume states."""
