"""localr1: a local runner for DeepSeek-R1-style reasoning models."""

__version__ = "0.1.0"
