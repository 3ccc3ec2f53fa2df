"""The dense cache: growth, limits, and what survives a failure."""

from typing import Any

import pytest
import torch

from localr1.cache.dense import DenseCache
from localr1.cache.sequence import INITIAL_CAPACITY
from localr1.errors import ContextError, MemoryLimitError


def new_cache(limit: int = 4096, layers: int = 3) -> DenseCache:
    return DenseCache(layers, num_kv_heads=2, head_dim=4, dtype=torch.float16, limit=limit)


def fill(cache: DenseCache, num_tokens: int) -> None:
    """Every position holds its own number, plus the layer's."""
    cache.reserve(num_tokens)
    for index in range(3):
        numbers = torch.arange(cache.length, cache.length + num_tokens) + index
        layer = cache.layer(index)
        layer.k[:, cache.length : cache.length + num_tokens] = numbers[None, :, None].half()
        layer.v[:, cache.length : cache.length + num_tokens] = -numbers[None, :, None].half()
    cache.advance(num_tokens)


def check(cache: DenseCache, length: int) -> None:
    assert cache.length == length
    for index in range(3):
        expected = (torch.arange(length) + index)[None, :, None].half().expand(2, length, 4)
        assert torch.equal(cache.layer(index).k[:, :length], expected)
        assert torch.equal(cache.layer(index).v[:, :length], -expected)


def test_it_grows_by_doubling_and_keeps_what_it_holds() -> None:
    cache = new_cache()
    assert (cache.length, cache.capacity, cache.nbytes) == (0, 0, 0)
    capacities = []
    for _ in range(20):
        fill(cache, 40)
        capacities.append(cache.capacity)
        check(cache, cache.length)
    assert sorted(set(capacities)) == [INITIAL_CAPACITY, 512, 1024]
    assert cache.nbytes == 3 * 2 * 2 * 4 * 2 * 1024
    assert cache.layer(0).k.dtype == torch.float16
    assert cache.layer(0).k.is_contiguous()


def test_a_large_reservation_is_met_at_once_and_the_limit_bounds_all() -> None:
    cache = new_cache(limit=700)
    cache.reserve(600)
    assert cache.capacity == 600
    fill(cache, 600)
    fill(cache, 100)
    assert cache.capacity == 700
    with pytest.raises(ContextError, match="at most 700 tokens, found 700 cached and 1 new"):
        cache.reserve(1)
    check(cache, 700)


def test_truncation_keeps_the_room_and_the_front() -> None:
    cache = new_cache()
    fill(cache, 300)
    room = cache.nbytes
    cache.truncate(17)
    check(cache, 17)
    assert cache.nbytes == room
    fill(cache, 10)
    check(cache, 27)


def test_a_step_that_fails_leaves_no_trace() -> None:
    cache = new_cache()
    fill(cache, 10)
    cache.reserve(500)
    for index in range(3):
        cache.layer(index).k[:, 10:] = float("nan")
    check(cache, 10)
    fill(cache, 5)
    check(cache, 15)


@pytest.mark.parametrize("failing", range(6))
def test_no_memory_is_an_error_that_the_next_request_survives(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th allocation of a growth fails, for every n."""
    cache = new_cache()
    fill(cache, 250)
    allocate, calls = torch.empty, 0

    def scarce(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator")
        return allocate(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", scarce)
    with pytest.raises(MemoryLimitError, match="GiB for 512 tokens"):
        cache.reserve(100)
    check(cache, 250)
    fill(cache, 100)
    check(cache, 350)


def test_more_than_the_machine_has_is_refused() -> None:
    cache = DenseCache(2, num_kv_heads=64, head_dim=256, dtype=torch.float32, limit=2**40)
    with pytest.raises(MemoryLimitError, match="smaller context"):
        cache.reserve(2**39)
    assert cache.capacity == 0


def test_a_window_must_hold_a_token() -> None:
    with pytest.raises(ContextError, match="at least 1 token, found 0"):
        new_cache(limit=0)
