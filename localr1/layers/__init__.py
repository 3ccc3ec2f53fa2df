"""Parts that architectures share: linear, norm, rope, attention, MLP."""
