"""A tiny packed DeepSeek-V3 from end to end: native against reference kernels and exact arithmetic,
decode against prefill, any number of threads, and the memory it takes.

Differences are relative, as in test_models_quantized, and so are the tolerances.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from packed_models import packed_checkpoint
from tiny_models import (
    MemoryCheckpoint,
    prompt,
    run_in_chunks,
    stored_matrix,
    tiny_transformer,
    transformer_logits,
)
from torch import Tensor

from localr1.experts import footprint
from localr1.kernels.api import Kernels
from localr1.kernels.native import NativeKernels, available_isas
from localr1.kernels.reference import ReferenceKernels
from localr1.layers import mla
from localr1.layers.moe import MoeBlock, PackedExperts
from localr1.load import footprint_of
from localr1.models.decoder import Decoder
from localr1.models.registry import load_model

LENGTH = 40
INT8_ACTIVATIONS = 0.06
SAME_BLOCKS = 0.01
SEEN = 0.15

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
# Where every expert is chosen, rounding moves no choice, however many layers there are.
ALL = {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "num_hidden_layers": 3}
CASES: dict[str, dict[str, Any]] = {
    "rank": {},
    "no-rank-biases": {"q_lora_rank": None, "attention_bias": True, **ALL},
    "packed-kv_b": {},
}


@cache
def packed_case(case: str) -> tuple[MemoryCheckpoint, Tensor]:
    """A checkpoint whose kv_b is bfloat16 or packed, and its logits in exact arithmetic."""
    theirs = tiny_transformer("deepseek_v3", 0, **{**SIZES, **CASES[case]})
    for name, parameter in theirs.named_parameters():
        if "kv_b_proj" in name:
            parameter.data = parameter.data.bfloat16().float()
    checkpoint = packed_checkpoint(
        theirs,
        8,
        keep=lambda prefix: (
            prefix.endswith(".gate") or ("kv_b" in prefix and case != "packed-kv_b")
        ),
    )
    for name in checkpoint.tensors:
        if name.endswith("kv_b_proj.weight"):
            checkpoint.put(name, stored_matrix(theirs, name).detach().bfloat16())
    return checkpoint, transformer_logits(theirs, prompt(0, LENGTH))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def load(case: str, kernels: Kernels) -> Decoder:
    model = load_model(packed_case(case)[0], kernels)
    assert isinstance(model, Decoder)
    return model


def logits(model: Decoder, *sizes: int) -> Tensor:
    return run_in_chunks(model, prompt(0, LENGTH), list(sizes) or [LENGTH])


@pytest.mark.parametrize("case", CASES)
def test_packed_mixtures_follow_exact_arithmetic(case: str) -> None:
    exact = packed_case(case)[1]
    reference = logits(load(case, ReferenceKernels()))
    assert relative(reference, exact) < INT8_ACTIVATIONS
    for isa in available_isas():
        model = load(case, NativeKernels(1, isa))
        whole = logits(model)
        assert relative(whole, exact) < INT8_ACTIVATIONS
        assert relative(whole, reference) < SAME_BLOCKS
        for sizes in ((17, 11), (1,)):
            assert relative(logits(model, *sizes), whole) < SAME_BLOCKS


def test_the_number_of_threads_changes_no_bit() -> None:
    for isa in available_isas():
        expected = logits(load("rank", NativeKernels(1, isa)), 17, 11)
        for threads in (2, 3, 7):
            found = logits(load("rank", NativeKernels(threads, isa)), 17, 11)
            assert torch.equal(found, expected), (isa, threads)


def test_one_call_computes_what_the_layers_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two forms of attention, and the block of the kernels against the composed one."""
    expected = logits(load("rank", ReferenceKernels()), 1)
    for choice in (True, False):
        monkeypatch.setattr(mla, "absorbs", lambda parts, tokens, choice=choice: choice)
        for kernels in (ReferenceKernels(), NativeKernels(1)):
            model = load("rank", kernels)
            assert relative(logits(model, 17, 11), expected) < SAME_BLOCKS
            monkeypatch.setattr(mla, "_fits_one_call", lambda parts, tokens: False)
            assert relative(logits(model, 17, 11), expected) < SAME_BLOCKS
            monkeypatch.undo()
            monkeypatch.setattr(mla, "absorbs", lambda parts, tokens, choice=choice: choice)


def exchange_experts(model: Decoder) -> None:
    def shifted(_layer: int, experts: Any) -> Any:
        assert isinstance(experts, PackedExperts)

        def call(x: Tensor, routing: Any, residual: Tensor) -> None:
            moved = type(routing)((routing.experts + 1) % 8, routing.weights)
            experts(x, moved, residual)

        return call

    model.wrap_experts(shifted)


def exchange_heads(model: Decoder) -> None:
    for attention, _ in model._layers:
        assert isinstance(attention, mla.LatentAttention)
        attention.parts.key_up.copy_(attention.parts.key_up.roll(1, 0))


@pytest.mark.parametrize("plant", [exchange_experts, exchange_heads])
def test_an_error_is_seen(plant: Callable[[Decoder], None]) -> None:
    model = load("rank", NativeKernels(1))
    plant(model)
    assert relative(logits(model), packed_case("rank")[1]) > SEEN


@pytest.mark.parametrize("case", CASES)
def test_the_memory_taken_is_the_memory_announced(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "BLOCK_ROWS", (8,))  # Of "generic".
    checkpoint, _ = packed_case(case)
    model = load(case, NativeKernels(1, "generic"))
    assert model.weight_bytes == footprint_of(checkpoint.tensors, model.config).weights
    ups = [a.parts for a, _ in model._layers if isinstance(a, mla.LatentAttention)]
    wide = case == "packed-kv_b"
    assert {parts.key_up.dtype for parts in ups} == {torch.float32 if wide else torch.bfloat16}


def test_all_experts_are_one_bank() -> None:
    model = load("rank", NativeKernels(1))
    blocks = [mlp for _, mlp in model._layers if isinstance(mlp, MoeBlock)]
    assert blocks
    for block in blocks:
        assert isinstance(block.experts, PackedExperts)
        assert block.experts.bank.num_experts == 8
