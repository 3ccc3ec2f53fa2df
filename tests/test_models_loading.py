"""From checkpoint to model: what is missing, misshapen or left over is named."""

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, Change, MemoryCheckpoint, drop, prompt, put, tiny_transformer
from torch import Tensor

from localr1.errors import ContextError, MemoryLimitError, TensorError, TokenizerError
from localr1.kernels.reference import ReferenceKernels
from localr1.models.api import Model
from localr1.models.registry import load_model
from localr1.models.step import Step

LAYER = "model.layers.1."


def load(change: Change | None = None, model_type: str = "llama", **config: Any) -> Model:
    theirs = tiny_transformer(model_type, 0, **config)
    return load_model(MemoryCheckpoint.of(theirs, change), ReferenceKernels())


BROKEN: list[tuple[Change, dict[str, Any], str]] = [
    (drop(LAYER + "mlp.up_proj.weight"), {}, r"1\.mlp\.up_proj\.weight: expected shape \[80, 48\]"),
    (drop("model.norm.weight"), {}, r"model\.norm\.weight: expected shape \[48\], found no such"),
    (drop("model.embed_tokens.weight"), {}, r"embed_tokens\.weight: expected shape \[97, 48\]"),
    (drop("lm_head.weight"), {}, r"lm_head\.weight: expected shape \[97, 48\], found no such"),
    (
        drop(LAYER + "self_attn.q_proj.bias"),
        {"model_type": "qwen2"},
        r"1\.self_attn\.q_proj\.bias: expected shape \[48\], found no such",
    ),
    (
        drop(LAYER + "self_attn.k_norm.weight"),
        {"model_type": "qwen3", "head_dim": 16},
        r"1\.self_attn\.k_norm\.weight: expected shape \[16\]",
    ),
    (
        put(LAYER + "self_attn.k_proj.weight", torch.ones(48, 24)),
        {},
        r"k_proj\.weight: expected shape \[24, 48\], found \[48, 24\]",
    ),
    (put("model.norm.weight", torch.ones(48, 1)), {}, r"norm\.weight: .*\[48\], found \[48, 1\]"),
    (
        put("model.norm.weight", torch.ones(48, dtype=torch.int32)),
        {},
        "expected floating-point values, found torch.int32",
    ),
    (
        put(LAYER + "self_attn.q_proj.bias", torch.ones(48)),
        {},
        r"tensor model\.layers\.1\.self_attn\.q_proj\.bias: expected only tensors that",
    ),
    (
        put("model.layers.2.input_layernorm.weight", torch.ones(48)),
        {},
        r"tensor model\.layers\.2\.input_layernorm\.weight: expected only",
    ),
    (
        put("lm_head.weight", torch.ones(VOCABULARY, 48)),
        {"tie_word_embeddings": True},
        r"lm_head\.weight: expected a copy of model\.embed_tokens\.weight",
    ),
    (
        put("lm_head.bias", torch.ones(VOCABULARY)),
        {"tie_word_embeddings": True},
        r"lm_head\.bias: expected a copy of model\.embed_tokens\.bias",
    ),
]


@pytest.mark.parametrize(("change", "config", "message"), BROKEN, ids=[case[2] for case in BROKEN])
def test_weights_that_do_not_fit_the_config_are_named(
    change: Change, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(TensorError, match=message):
        load(change, **config)


def test_leftovers_that_change_nothing_are_let_through() -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    step = Step(prompt(0, 5), 0)
    plain, changed = load(tie_word_embeddings=True), load(change, tie_word_embeddings=True)
    first, second = (model.forward(step, model.new_cache(5)) for model in (plain, changed))
    assert torch.equal(first, second)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_matrix_is_held_once(tied: bool) -> None:
    model = load(tie_word_embeddings=tied)
    assert model.weight_bytes == 4 * model.config.parameter_count


@pytest.mark.parametrize("tied", [False, True])
def test_half_precision_weights_are_widened(tied: bool) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: value.bfloat16() for name, value in tensors.items()})

    def halve_and_widen(tensors: dict[str, Tensor]) -> None:
        halve(tensors)
        tensors.update({name: value.float() for name, value in tensors.items()})

    step = Step(prompt(0, 5), 0)
    halved, widened = (
        load(change, tie_word_embeddings=tied) for change in (halve, halve_and_widen)
    )
    first, second = (model.forward(step, model.new_cache(5)) for model in (halved, widened))
    assert first.dtype == torch.float32
    assert torch.equal(first, second)
    # Looked up row by row, an embedding that is not also the head stays as narrow as it is stored.
    spared = 0 if tied else 2 * VOCABULARY * 48
    assert widened.weight_bytes - halved.weight_bytes == spared


def test_a_context_beyond_the_model_is_refused() -> None:
    model = load()
    assert model.new_cache(64).limit == 64
    with pytest.raises(ContextError, match="at most the 64 tokens this model was made for"):
        model.new_cache(65)


@pytest.mark.parametrize("bad", [-1, VOCABULARY])
def test_a_token_outside_the_vocabulary_is_refused(bad: int) -> None:
    model = load()
    cache = model.new_cache(8)
    with pytest.raises(TokenizerError, match=f"0 to 96, the model's vocabulary, found {bad}"):
        model.forward(Step(torch.tensor([1, bad, 2]), 0), cache)
    assert cache.length == 0


def test_a_step_that_fails_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load()
    ids = prompt(0, 12)
    expected = model.forward(Step(ids, 0, all_logits=True), model.new_cache(12))
    cache = model.new_cache(12)
    model.forward(Step(ids[:7], 0), cache)
    with pytest.raises(ContextError, match="at most 12 tokens, found 7 cached and 6 new"):
        model.forward(Step(prompt(0, 6), 7), cache)
    with monkeypatch.context() as patch:
        patch.setattr(
            "localr1.layers.mlp.functional.silu", lambda x: (_ for _ in ()).throw(MemoryError)
        )
        with pytest.raises(MemoryError):
            model.forward(Step(ids[7:], 7), cache)
    assert cache.length == 7
    rest = model.forward(Step(ids[7:], 7, all_logits=True), cache)
    torch.testing.assert_close(rest, expected[7:], rtol=0, atol=1e-4)


def test_no_memory_for_the_cache_ends_one_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load()
    cache = model.new_cache(12)
    with monkeypatch.context() as patch:

        def scarce(*args: Any, **kwargs: Any) -> Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        patch.setattr(torch, "empty", scarce)
        with pytest.raises(MemoryLimitError):
            model.forward(Step(prompt(0, 5), 0), cache)
    assert model.forward(Step(prompt(0, 5), 0), cache).isfinite().all()
