"""From a directory to a running engine, and what is refused on the way."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, tokenizer_document
from tiny_models import tiny_transformer

from localr1 import load
from localr1.checkpoint.reader import open_checkpoint
from localr1.engine.engine import Engine
from localr1.engine.events import Delta, Done, GenerationParams
from localr1.errors import (
    ConfigError,
    MemoryLimitError,
    NotFoundError,
    TemplateError,
    TokenizerError,
    UsageError,
)
from localr1.experts.placement import (
    DEFAULT_CONTEXT,
    LEAST_MARGIN,
    PROGRAM_BYTES,
    Memory,
    place,
)
from localr1.load import load_engine, sampling_defaults
from localr1.models.registry import parse_config
from localr1.sampler import SamplingParams

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: a tiny random llama, a byte tokenizer, a template."""
    path = tmp_path_factory.mktemp("tiny-llama")
    model = tiny_transformer("llama", 0, vocab_size=VOCAB_SIZE, max_position_embeddings=128)
    model.save_pretrained(path)
    write(path / "tokenizer.json", tokenizer_document())
    write(
        path / "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE},
    )
    write(path / "generation_config.json", {"temperature": 0.5, "top_p": 0.9, "eos_token_id": 257})
    return path


def write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.fixture
def changed(directory: Path, tmp_path: Path) -> Path:
    """A copy whose JSON files a test may change; the weights are shared."""
    for file in directory.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
        else:
            (tmp_path / file.name).hardlink_to(file)
    return tmp_path


def answer(engine: Engine, prompt: Sequence[int], count: int) -> tuple[str, Done]:
    params = GenerationParams(SamplingParams(temperature=0.0), count, ignore_eos=True)
    events = list(engine.generate(prompt, params))
    done = events[-1]
    assert isinstance(done, Done)
    return "".join(event.text for event in events if isinstance(event, Delta)), done


def test_an_engine_of_a_directory(directory: Path) -> None:
    engine = load_engine(directory, threads=1, kernels="reference")
    assert engine.context == 128
    assert engine.name == directory.name
    assert engine.kernels == "reference"
    assert engine.threads == 1
    assert engine.defaults == {"temperature": 0.5, "top_p": 0.9}
    assert engine.tokenizer.eos_ids == {257}
    prompt = engine.prompt([{"role": "user", "content": "hi"}])
    assert prompt.text == "<s><|user|>hi<|assistant|>"
    first, done = answer(engine, prompt.ids, 20)
    assert done.usage.completion_tokens == 20
    assert answer(engine, prompt.ids, 20)[0] == first
    engine.close()


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_reuse_and_chunks_give_what_a_fresh_engine_gives(directory: Path, chunk: int) -> None:
    """With a real forward pass and its real cache, against one pass over everything."""
    engine = load_engine(directory, threads=1, kernels="reference")
    fresh = Engine(engine.model, engine.tokenizer, None, 128, chunk=chunk)
    shared = engine.tokenizer.encode("The quick brown fox ")
    for ending in ("jumps", "jumped over", "sleeps. The quick", ""):
        prompt = [*shared, *engine.tokenizer.encode(ending)]
        text, _ = answer(engine, prompt, 12)
        fresh.reset()
        assert answer(fresh, prompt, 12)[0] == text
    _, done = answer(engine, prompt, 1)
    assert done.usage.cached_tokens == len(prompt) - 1
    engine.close()


def test_the_context_that_was_asked_for(directory: Path) -> None:
    assert load_engine(directory, context=50, kernels="reference").context == 50
    for context in (0, 1, 129):
        with pytest.raises(UsageError, match="context"):
            load_engine(directory, context=context, kernels="reference")
    with pytest.raises(UsageError, match="threads"):
        load_engine(directory, threads=0)
    with pytest.raises(UsageError, match="native or reference"):
        load_engine(directory, kernels="cuda")
    with pytest.raises(NotFoundError):
        load_engine(directory / "nothing")


def test_a_model_without_a_template_loads(changed: Path) -> None:
    write(changed / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    engine = load_engine(changed, kernels="reference")
    with pytest.raises(TemplateError, match="no chat template"):
        engine.prompt([{"role": "user", "content": "hi"}])


def test_a_tokenizer_of_another_model_is_refused(changed: Path) -> None:
    document = tokenizer_document()
    document["added_tokens"][0]["id"] = VOCAB_SIZE
    write(changed / "tokenizer.json", document)
    with pytest.raises(TokenizerError, match=f"from 0 to {VOCAB_SIZE - 1}"):
        load_engine(changed, kernels="reference")


def test_too_little_memory_is_told_before_weights_are_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_nothing(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(load, "load_model", read_nothing)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 << 20))
    with pytest.raises(MemoryLimitError, match=r"expected .* GiB free .*weights.*found 0\.1 GiB"):
        load_engine(directory, kernels="reference")


def test_the_window_shrinks_to_free_memory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoint(directory) as checkpoint:
        config = parse_config(checkpoint.config)
        footprint = load.footprint_of(checkpoint.tensors, config)
    footprint = replace(footprint, config=replace(config, max_positions=1 << 20))

    def free_for(tokens: int) -> None:
        whole = place(footprint, Memory(ram=1 << 50), tokens, threads=2).ram
        available = whole.needed - PROGRAM_BYTES + LEAST_MARGIN
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))

    free_for(1000)
    assert load.choose_placement(footprint, None, 2).context == 1000
    assert load.choose_placement(footprint, 1000, 2).context == 1000
    with pytest.raises(MemoryLimitError, match="smaller context"):
        load.choose_placement(footprint, 1001, 2)
    free_for(4 * DEFAULT_CONTEXT)
    assert load.choose_placement(footprint, None, 2).context == DEFAULT_CONTEXT
    long = 4 * DEFAULT_CONTEXT
    assert load.choose_placement(footprint, long, 2).context == long
    free_for(400)
    with pytest.raises(MemoryLimitError, match="Close other programs"):
        load.choose_placement(footprint, None, 2)


def test_the_estimate_of_memory_is_what_the_model_takes(directory: Path) -> None:
    engine = load_engine(directory, kernels="reference")
    with open_checkpoint(directory) as checkpoint:
        footprint = load.footprint_of(checkpoint.tensors, engine.model.config)
    assert footprint.weights == engine.model.weight_bytes


def test_advised_sampling_parameters() -> None:
    assert sampling_defaults({}) == {}
    assert sampling_defaults({"do_sample": False, "temperature": 0.7}) == {"temperature": 0.0}
    advised = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": None, "other": "x"}
    assert sampling_defaults(advised) == {"temperature": 0.6, "top_p": 0.95}
    for wrong in ({"temperature": -1}, {"top_p": "a"}, {"top_k": 0.5}, {"min_p": True}):
        with pytest.raises(ConfigError, match=r"generation_config\.json: "):
            sampling_defaults(wrong)


@pytest.mark.smollm2
def test_smollm2_answers_and_remembers(smollm2_gguf: Path) -> None:
    engine = load_engine(smollm2_gguf)
    threads = torch.get_num_threads()
    assert threads == engine.threads
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text, done = chat(engine, messages)
    assert "Paris" in text
    assert done.reason == "stop"
    messages += [
        {"role": "assistant", "content": text},
        {"role": "user", "content": "Repeat the name of that city."},
    ]
    text, done = chat(engine, messages)
    assert "Paris" in text
    # All of the first turn but what its end added.
    assert done.usage.cached_tokens > 30
    engine.reset()
    assert chat(engine, messages)[0] == text
    engine.close()


def chat(engine: Engine, messages: list[dict[str, str]]) -> tuple[str, Done]:
    prompt = engine.prompt(messages)
    params = GenerationParams(SamplingParams(temperature=0.0), max_tokens=40)
    events = list(engine.generate(prompt.ids, params))
    done = events[-1]
    assert isinstance(done, Done)
    return "".join(event.text for event in events if isinstance(event, Delta)), done
