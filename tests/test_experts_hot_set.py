"""Which experts were hot, taken up again: the same ones in fast memory, and the same bits."""

import numpy as np
import pytest
import torch
from stored_models import Stored, expected, stored, tokens

from localr1.errors import TruncatedError
from localr1.experts.hot_set import HotSet
from localr1.experts.store_options import StoreOptions

LENGTH = 48
OPTIONS = StoreOptions(read_ahead=False)


def held(model: Stored) -> tuple[list[int], list[int]]:
    """Keys in RAM, and on the device."""
    store = model.store
    ram: list[int] = store.ram.residency.resident_keys.tolist()
    device: list[int] = [] if store.hot is None else store.hot.resident_keys
    return sorted(ram), sorted(device)


@pytest.mark.parametrize("device", [None, 0.3])
def test_what_was_hot_is_hot_again(device: float | None) -> None:
    with stored("deepseek_v3", 0.4, device, OPTIONS) as model:
        at_start = held(model)
        model.logits(tokens(LENGTH))
        if model.store.hot is not None:
            model.store.hot.settle()
        hot, then = model.store.hot_set(), held(model)
        counts = model.store.counts.copy()
    assert then != at_start, "a set that never changes shows nothing"
    with stored("deepseek_v3", 0.4, device, OPTIONS) as model:
        model.store.restore(hot)
        assert held(model) == then
        assert (model.store.counts == counts).all()
        assert torch.equal(model.logits(tokens(LENGTH)), expected("deepseek_v3", LENGTH))


def test_with_less_memory_as_much_as_there_is_room_for() -> None:
    with stored("deepseek_v3", 0.6, None, OPTIONS) as model:
        model.logits(tokens(LENGTH))
        hot, (then, _) = model.store.hot_set(), held(model)
    with stored("deepseek_v3", 0.3, None, OPTIONS) as model:
        model.store.restore(hot)
        assert set(held(model)[0]) <= set(then)
        assert torch.equal(model.logits(tokens(LENGTH)), expected("deepseek_v3", LENGTH))


def test_a_set_of_another_model_is_left_alone() -> None:
    with stored("deepseek_v3", 0.4, None, OPTIONS) as model:
        before = held(model)
        sizes = model.store.counts.shape
        wrong = HotSet(np.ones(sizes, np.int64), np.array([10_000]), np.zeros(0, np.int64))
        model.store.restore(wrong)
        model.store.restore(HotSet.empty())
        assert held(model) == before
        assert not model.store.counts.any()


def test_a_read_that_fails_costs_one_error() -> None:
    with stored("deepseek_v3", 0.4, None, OPTIONS) as model:
        model.logits(tokens(LENGTH))
        hot = model.store.hot_set()
    with stored("deepseek_v3", 0.4, None, OPTIONS) as model:
        model.checkpoint.arm(TruncatedError("the file ends early"), 1)
        with pytest.raises(TruncatedError):
            model.store.restore(hot)
        assert torch.equal(model.logits(tokens(LENGTH)), expected("deepseek_v3", LENGTH))
