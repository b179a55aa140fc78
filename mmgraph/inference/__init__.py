"""Embedding nodes with a checkpoint: encoding, feature files, neighbor search."""
