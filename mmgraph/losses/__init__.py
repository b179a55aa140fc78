"""The contrastive losses over the global batch."""
