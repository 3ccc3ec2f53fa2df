"""Latent attention by itself: its two forms against each other, its blocks, its cache."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from released_mixtures import R1
from tiny_models import MemoryCheckpoint, prompt, run_in_chunks, tiny_transformer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from localr1.cache.mla import LatentCache
from localr1.errors import ContextError
from localr1.kernels.reference import ReferenceKernels
from localr1.layers import mla
from localr1.layers.linear import FloatLinear
from localr1.models.decoder import make_cache
from localr1.models.registry import load_model, parse_config
from localr1.models.step import Step

FORMS = 2e-5
"""Largest difference of two forms or block sizes, where outputs reach about 3: float32 sums of some
hundred terms in another order. One wrong position or head moves outputs by more than 0.1."""
LOGITS = 1e-4
"""As in test_models_parity."""

HEADS, KEY, VALUE, LATENT, ROPE = 6, 12, 10, 20, 8


def parts(seed: int = 0, **changes: Any) -> mla.LatentAttentionParts:
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * (2 / math.sqrt(shape[-1]))

    unused = FloatLinear(torch.zeros(1, 1))
    result = mla.LatentAttentionParts(
        norm=torch.ones(1),
        q_down=None,
        q_norm=None,
        q=unused,
        kv_down=unused,
        kv_norm=torch.ones(LATENT),
        key_up=matrix(HEADS, KEY, LATENT),
        value_up=matrix(HEADS, VALUE, LATENT).transpose(1, 2),
        o=unused,
        rope_size=ROPE,
        eps=1e-6,
        scale=0.3,
    )
    return dataclasses.replace(result, **changes)


def inputs(tokens: int, start: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, int]:
    """q [H, T, N], q_rope [H, T, R], rows [S, L+R], start."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(HEADS, tokens, KEY, generator=generator)
    q_rope = torch.randn(HEADS, tokens, ROPE, generator=generator)
    return q, q_rope, torch.randn(start + tokens, LATENT + ROPE, generator=generator), start


def plain(q: Tensor, q_rope: Tensor, rows: Tensor, start: int) -> Tensor:
    """The definition, one token and head after another, in float64."""
    weights = parts()
    keys, values = (each.double() for each in mla.expand(weights, rows, 0, HEADS))
    result = torch.empty(*q.shape[:2], VALUE)
    for head in range(HEADS):
        for token in range(q.shape[1]):
            query = torch.cat((q[head, token], q_rope[head, token])).double()
            seen = start + token + 1
            result[head, token] = (keys[head, :seen] @ query).softmax(0) @ values[head, :seen]
    return result


@pytest.mark.parametrize("form", [mla.absorbed, mla.expanded])
@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (1, 70), (9, 0), (9, 61), (70, 0)])
@pytest.mark.parametrize("working", [1, 1 << 10, 1 << 24])
def test_both_forms_are_the_definition(
    form: Any, tokens: int, start: int, working: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few positions (down to one) and heads are taken at once."""
    monkeypatch.setattr(mla, "WORKING_VALUES", working)
    monkeypatch.setattr(mla, "EXPANDED_POSITIONS", min(working, 32))
    given = inputs(tokens, start)
    expected = plain(*given)
    assert expected.abs().max() > 1.0
    assert (form(parts(), *given) - expected).abs().max() <= FORMS


def test_a_forgotten_block_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tolerance would let pass if it were too wide."""
    right = mla._blocks
    monkeypatch.setattr(mla, "EXPANDED_POSITIONS", 32)
    monkeypatch.setattr(mla, "_blocks", lambda count, size: list(right(count, size))[:2])
    given = inputs(9, 61)
    assert (mla.expanded(parts(), *given) - plain(*given)).abs().max() > 1000 * FORMS


def test_scores_far_apart_and_a_later_maximum_stay_finite() -> None:
    sums = mla.StreamingSoftmax()
    values = torch.eye(4)
    sums.add(torch.tensor([[-300.0, 0.0]]), values[:2])
    sums.add(torch.tensor([[200.0, float("-inf")]]), values[2:])
    assert torch.equal(sums.result(), values[2:3])


def test_the_form_with_fewer_multiplications_is_taken() -> None:
    tiny = parts()
    # By hand for these sizes: absorbed 48 a token, expanded 30 and 440 once.
    assert [mla.absorbs(tiny, tokens) for tokens in (1, 24, 25, 1000)] == [True, True, False, False]
    # R1: 1,088 a token against 320 and 131,072 once.
    r1 = parts(key_up=torch.empty(1, 128, 512), value_up=torch.empty(1, 512, 128), rope_size=64)
    assert [mla.absorbs(r1, tokens) for tokens in (1, 170, 171)] == [True, True, False]


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("sizes", [[40], [17, 11], [1]])
def test_a_model_may_take_either_form(
    model_type: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(MemoryCheckpoint.of(tiny_transformer(model_type, 0)), ReferenceKernels())
    ids = prompt(0, 40)
    logits = []
    for choice in (True, False):
        monkeypatch.setattr(mla, "absorbs", lambda parts, tokens, choice=choice: choice)
        logits.append(run_in_chunks(model, ids, sizes))
    assert logits[0].abs().max() > 3.0
    assert (logits[0] - logits[1]).abs().max() <= LOGITS


def test_r1_caches_576_values_where_its_heads_have_40960() -> None:
    config = parse_config({**R1, "num_hidden_layers": 2})
    cache = make_cache(config, torch.float32, limit=4096)
    cache.reserve(700)
    assert isinstance(cache, LatentCache)
    cached = cache.nbytes / (2 * cache.capacity * 4)
    assert cached == config.cached_values == 576
    assert cache.layer(0).shape == (700, 576)

    latent = config.latent
    assert latent is not None
    r1 = parts(
        key_up=torch.empty(config.num_heads, latent.key_size, latent.latent_size),
        value_up=torch.empty(config.num_heads, latent.latent_size, latent.value_size),
        rope_size=latent.rope_size,
    )
    keys, values = mla.expand(r1, torch.zeros(3, 576), 0, config.num_heads)
    assert (keys.numel() + values.numel()) / 3 == 40_960


def test_a_cache_grows_keeps_and_refuses() -> None:
    cache = LatentCache(2, LATENT, ROPE, torch.float16, limit=700)
    for begin in range(0, 700, 100):
        cache.reserve(100)
        for index in range(2):
            numbers = torch.arange(begin, begin + 100)[:, None].half() + index
            cache.layer(index)[begin : begin + 100] = numbers
        cache.advance(100)
    assert (cache.length, cache.capacity, cache.position_bytes) == (700, 700, 2 * 28 * 2)
    expected = torch.arange(700)[:, None].half().expand(700, 28)
    assert torch.equal(cache.layer(0), expected)
    assert torch.equal(cache.layer(1), expected + 1)
    with pytest.raises(ContextError, match="at most 700 tokens, found 700 cached and 1 new"):
        cache.reserve(1)
    cache.truncate(3)
    assert (cache.length, cache.capacity) == (3, 700)


def test_a_truncated_cache_continues_as_a_fresh_one() -> None:
    model = load_model(MemoryCheckpoint.of(tiny_transformer("deepseek_v3", 0)), ReferenceKernels())
    ids = prompt(0, 30)
    cache = model.new_cache(40)
    model.forward(Step(prompt(9, 25), 0), cache)
    cache.truncate(0)
    model.forward(Step(ids[:20], 0), cache)
    again = model.forward(Step(ids[20:], 20, all_logits=True), cache)
    assert (again - run_in_chunks(model, ids, [20, 10])[20:]).abs().max() == 0


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most values that any operation's result has, but for views of what was there before."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in before}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self._known:
            self.values = max(self.values, result.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize(("form", "tokens"), [(mla.absorbed, 8), (mla.expanded, 64)])
def test_memory_does_not_grow_with_the_context(
    form: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 positions at once would be 120,000 scores a token and 3.6 million expanded values."""
    monkeypatch.setattr(mla, "WORKING_VALUES", 1 << 17)
    weights, largest = parts(), []
    for start in (5_000, 20_000):
        q, q_rope, rows, start = inputs(tokens, start)
        with Largest(q, q_rope, rows, weights.key_up, weights.value_up) as mode:
            form(weights, q, q_rope, rows, start)
        largest.append(mode.values)
    assert largest[0] == largest[1] <= 1 << 17
