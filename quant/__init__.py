"""The quantizer: a full checkpoint in, a compressed-tensors checkpoint out; and how to judge it."""
