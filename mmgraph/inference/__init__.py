"""From a checkpoint to embeddings: encoding, feature files, neighbor search."""
