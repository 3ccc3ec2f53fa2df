"""Conversations kept on disk, with what the model had read of them."""
