"""Quantization methods: how a matrix becomes codes and scales. `registry.py` names them."""
