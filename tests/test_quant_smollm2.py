"""A real model from its GGUF file: what the quantizer promises of 8 bits, on a short text.

The figures of the README come from the whole text (benchmarks/quality.py): 98.3% and 0.0014.
"""

from pathlib import Path

import pytest

from localr1.kernels.native import NativeKernels
from localr1.quant import evaluate
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

CHARACTERS = 1000
TOP1_AT_LEAST = 0.95
"""Of some 300 positions; 4 bits give 84%."""
KL_AT_MOST = 0.01
"""Nats; 4 bits give 0.13."""


@pytest.mark.smollm2
def test_eight_bits_say_what_the_original_says(smollm2_gguf: Path, tmp_path: Path) -> None:
    report = quantize(smollm2_gguf, tmp_path / "int8", Recipe.uniform(8, 32))
    assert report.parameters == 134_515_008
    assert {part.part: part.num_tensors for part in report.parts} == {
        "kept": 62,
        "head": 1,
        "attention": 120,
        "mlp": 90,
    }
    kernels = NativeKernels()
    text = evaluate.read_text(None)[:CHARACTERS]
    reference, tokenizer = evaluate.load(smollm2_gguf, kernels)
    model, _ = evaluate.load(tmp_path / "int8", kernels)
    result = evaluate.divergence(reference, model, tokenizer, text, 512)
    assert result.kl.value < KL_AT_MOST
    assert result.top1.value >= TOP1_AT_LEAST
    assert result.model.perplexity.value < 1.02 * result.reference.perplexity.value
