"""What a model had read, written and taken up again: the same bits, or a refusal that says why."""

import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from scripted_model import ScriptedModel

from localr1.cache.dense import DenseCache
from localr1.cache.mla import LatentCache
from localr1.cache.sequence import Cache
from localr1.engine.sequence import CachedSequence
from localr1.errors import FormatError, LocalR1Error, NotFoundError, OutputError, TruncatedError
from localr1.experts.hot_set import HotSet
from localr1.sessions import private_file
from localr1.sessions.snapshot import Origin, read_hot_set, read_snapshot, write_snapshot

LENGTH = 300
HOT = HotSet(np.arange(6).reshape(2, 3), np.array([0, 4]), np.array([5]))


CACHES: dict[str, Callable[[], Cache[Any]]] = {
    "dense float16": lambda: DenseCache(3, 2, 8, torch.float16, 1000),
    "dense float32": lambda: DenseCache(1, 1, 4, torch.float32, 1000),
    "latent float16": lambda: LatentCache(2, 16, 8, torch.float16, 1000),
}


def sequence_of(cache: Cache[Any], length: int = LENGTH) -> CachedSequence:
    """With random values and ids."""
    sequence = CachedSequence(ScriptedModel(), 1000)
    sequence.cache = cache
    cache.reserve(length)
    for layer in range(cache.num_layers):
        for tensor in cache.tensors(layer):
            tensor.copy_(torch.randn(tensor.shape))
    cache.advance(length)
    sequence.ids = list(range(length))
    return sequence


def origin_of(sequence: CachedSequence) -> Origin:
    return Origin("a model", sequence.cache.form, "native avx2")


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("length", [0, 1, LENGTH])
def test_what_is_read_is_what_was_written(kind: str, length: int, tmp_path: Path) -> None:
    before, after = sequence_of(CACHES[kind](), length), sequence_of(CACHES[kind](), 7)
    path = tmp_path / "a.safetensors"
    size = write_snapshot(path, before, origin_of(before), HOT)
    assert size == path.stat().st_size
    hot = read_snapshot(path, after, origin_of(after))
    assert isinstance(hot, HotSet)
    assert (hot.counts == HOT.counts).all()
    assert (hot.ram.tolist(), hot.device.tolist()) == ([0, 4], [5])
    assert after.ids == before.ids
    assert after.cache.length == length
    for layer in range(before.cache.num_layers):
        pairs = zip(before.cache.tensors(layer), after.cache.tensors(layer), strict=True)
        for one, other in pairs:
            assert torch.equal(one[..., :length, :], other[..., :length, :])


def test_only_what_was_read_for_good_is_written(tmp_path: Path) -> None:
    """As when a draft of tokens, or an interrupted pass, left more in the cache."""
    before, after = sequence_of(CACHES["dense float16"]()), sequence_of(CACHES["dense float16"]())
    del before.ids[100:]
    path = tmp_path / "a.safetensors"
    write_snapshot(path, before, origin_of(before), None)
    assert isinstance(read_snapshot(path, after, origin_of(after)), HotSet)
    assert after.cache.length == len(after.ids) == 100


def test_the_library_opens_it(tmp_path: Path) -> None:
    sequence = sequence_of(CACHES["latent float16"]())
    path = tmp_path / "a.safetensors"
    write_snapshot(path, sequence, origin_of(sequence), HOT)
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors["layer.1.0"], sequence.cache.tensors(1)[0][:LENGTH])
    assert tensors["ids"].tolist() == sequence.ids
    if os.name != "nt":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "another"}, "the model, its revision or its quantization is another"),
        ({"cache": "LatentCache"}, "the cache is of another kind or precision"),
        ({"arithmetic": "native avx512"}, "it was computed by other kernels"),
    ],
)
def test_what_belongs_to_something_else_is_refused(
    change: dict[str, str], reason: str, tmp_path: Path
) -> None:
    sequence = sequence_of(CACHES["dense float16"]())
    path = tmp_path / "a.safetensors"
    write_snapshot(path, sequence, origin_of(sequence), None)
    assert read_snapshot(path, sequence, replace(origin_of(sequence), **change)) == reason
    assert sequence.ids == []
    assert sequence.cache.length == 0


def test_a_cache_of_another_precision_is_refused(tmp_path: Path) -> None:
    one, other = (sequence_of(DenseCache(1, 1, 4, d, 1000)) for d in (torch.float16, torch.float32))
    path = tmp_path / "a.safetensors"
    write_snapshot(path, one, origin_of(one), None)
    reason = read_snapshot(path, other, origin_of(other))
    assert reason == "the cache is of another kind or precision"


def test_what_is_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    sequence = sequence_of(DenseCache(1, 1, 4, torch.float32, 1000))
    small = sequence_of(DenseCache(1, 1, 4, torch.float32, 200), 5)
    path = tmp_path / "a.safetensors"
    write_snapshot(path, sequence, origin_of(sequence), None)
    assert read_snapshot(path, small, origin_of(small)) == "it is longer than the context"


def test_every_damage_is_a_known_error_and_leaves_nothing_read(tmp_path: Path) -> None:
    sequence = sequence_of(LatentCache(2, 4, 4, torch.float16, 1000), 20)
    path = tmp_path / "a.safetensors"
    write_snapshot(path, sequence, origin_of(sequence), HOT)
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            found = read_snapshot(path, sequence, origin_of(sequence))
        except LocalR1Error:
            found = "damaged"
        assert isinstance(found, str), f"byte {place} of {len(whole)}"
        assert sequence.ids == []
        assert sequence.cache.length == 0
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises((TruncatedError, FormatError)):
            read_snapshot(path, sequence, origin_of(sequence))
    with pytest.raises(NotFoundError):
        read_snapshot(tmp_path / "none", sequence, origin_of(sequence))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    private_file.write_private(path, [b"before"])

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match="No space left"):
        private_file.write_private(path, [b"af", b"ter"])
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_hot_experts_are_known_before_the_model_is_loaded(tmp_path: Path) -> None:
    sequence = sequence_of(CACHES["latent float16"]())
    path = tmp_path / "a.safetensors"
    assert read_hot_set(path, "a model") is None
    write_snapshot(path, sequence, origin_of(sequence), HOT)
    hot = read_hot_set(path, "a model")
    assert hot is not None
    assert hot.ram.tolist() == [0, 4]
    assert read_hot_set(path, "another") is None
    path.write_bytes(path.read_bytes()[:50])
    assert read_hot_set(path, "a model") is None
