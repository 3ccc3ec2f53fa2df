"""Whole layers of a model on an NVIDIA card: weights, cache and a step's launches."""
