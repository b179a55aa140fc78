"""The frozen towers: load them, run them live, or read their tokens from a store on disk."""
