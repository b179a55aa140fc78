"""Checkpoint files in the original trainer's format, and resume states."""
