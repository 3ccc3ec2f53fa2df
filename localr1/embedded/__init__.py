"""The model that comes with localr1: r1-nano, a mixture of 8.4 million parameters in BF16, trained
in examples/r1_nano. It is there on any machine, without a network."""

from pathlib import Path
from typing import Final

R1_NANO: Final = Path(__file__).parent / "r1-nano"
"""A Hugging Face directory (deepseek_v3)."""
