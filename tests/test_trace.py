"""Routing traces: what is recorded, the file, and what is computed from it."""

import json
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import refused
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tiny_models import (
    MemoryCheckpoint,
    prompt,
    run_in_chunks,
    tiny_transformer,
    transformer_logits,
)
from typer.testing import CliRunner

from localr1.cli.main import app
from localr1.cli.trace import read_prompts, sampling_of
from localr1.engine.events import GenerationParams
from localr1.errors import FormatError, LocalR1Error, UnsupportedError, UsageError
from localr1.experts.recorder import RoutingRecorder
from localr1.experts.statistics import routing_statistics
from localr1.experts.trace import Trace, read_trace, write_trace
from localr1.kernels.reference import ReferenceKernels
from localr1.load import load_engine
from localr1.models.registry import load_model
from localr1.sampler import SamplingParams

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "r1_nano"))

from export import save_directory
from model import Config, R1Nano
from tokenizer import train_tokenizer


def trace_of(
    choices: list[list[int]], num_experts: int = 4, sequences: list[tuple[int, int]] | None = None
) -> Trace:
    """One layer; a row of `choices` is a token."""
    experts = np.array(choices, dtype=np.uint8)[:, None, :]
    lengths = sequences or [(len(choices), 0)]
    return Trace(experts, np.array(lengths, dtype=np.int32), (1,), num_experts, "a model")


def lru_hits(choices: NDArray[Any], slots: int) -> int:
    """What a cache of so many slots would hit, played through."""
    cache: list[int] = []
    hits = 0
    for expert in choices.flatten().tolist():
        hits += expert in cache
        cache = [expert, *(each for each in cache if each != expert)][:slots]
    return hits


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "qwen3_moe"])
def test_what_is_recorded_is_what_transformers_chooses(model_type: str) -> None:
    source = tiny_transformer(model_type, 0)
    chosen: dict[int, torch.Tensor] = {}

    def note(layer: int) -> Any:
        def hook(_module: Any, arguments: tuple[Any, ...], _output: Any) -> None:
            chosen[layer] = arguments[1].reshape(-1, arguments[1].shape[-1])

        return hook

    for index, layer in enumerate(source.model.layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_hook(note(index))
    model = load_model(MemoryCheckpoint.of(source), ReferenceKernels())
    recorder = RoutingRecorder(model, "tiny")
    ids = prompt(3, 17)
    transformer_logits(source, ids)
    run_in_chunks(model, ids, [5, 1, 7])
    recorder.end_sequence(13)
    trace = recorder.trace()
    assert trace.layers == tuple(chosen)
    assert trace.sequences.tolist() == [[13, 4]]
    for place, layer in enumerate(trace.layers):
        found = np.sort(trace.experts[:, place], axis=1)
        assert np.array_equal(found, np.sort(chosen[layer].numpy(), axis=1))


def test_recording_changes_no_bit() -> None:
    source = MemoryCheckpoint.of(tiny_transformer("deepseek_v3", 1))
    ids = prompt(0, 9)
    plain, recorded = (load_model(source, ReferenceKernels()) for _ in range(2))
    RoutingRecorder(recorded, "tiny")
    assert torch.equal(run_in_chunks(plain, ids, [4]), run_in_chunks(recorded, ids, [4]))


def test_a_model_without_experts_is_refused() -> None:
    model = load_model(MemoryCheckpoint.of(tiny_transformer("llama", 0)), ReferenceKernels())
    with pytest.raises(UnsupportedError, match="expected a mixture of experts, found llama"):
        RoutingRecorder(model, "tiny")


def test_reuse_distances_by_hand() -> None:
    #                        first 0, first 1; 0 again after one other; first 2; 1 after 0 and 2
    statistics = routing_statistics(trace_of([[0, 1], [0, 2], [1, 1]]))
    # Distances 1 (expert 0), 2 (expert 1), 0 (expert 1 again) and three first choices.
    assert statistics.distances.tolist() == [[1, 1, 1, 0, 3]]
    assert statistics.load.tolist() == [[4 * 2 / 6, 4 * 3 / 6, 4 * 1 / 6, 0.0]]
    assert statistics.hit_rates[0] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 3 / 6])
    assert statistics.hit_rate(0.5) == pytest.approx(2 / 6)


@pytest.mark.parametrize("seed", range(3))
def test_hit_rates_are_those_of_a_cache_played_through(seed: int) -> None:
    generator = np.random.default_rng(seed)
    num_experts, per_token = 12, 3
    experts = np.stack(
        [[generator.permutation(num_experts)[:per_token] for _ in range(2)] for _ in range(40)]
    ).astype(np.uint8)
    trace = Trace(experts, np.array([[40, 0]], dtype=np.int32), (0, 3), num_experts, "")
    rates = routing_statistics(trace).hit_rates
    for layer in range(2):
        for slots in range(num_experts + 1):
            expected = lru_hits(experts[:, layer], slots) / (40 * per_token)
            assert rates[layer, slots] == pytest.approx(expected)


def test_a_trace_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.safetensors"
    many = replace(
        trace_of([[0, 1], [2, 3]], sequences=[(1, 0), (0, 1)]),
        experts=np.array([[[0, 700]], [[2, 3]]], dtype=np.uint16),
        num_experts=1000,
        sampling={"temperature": 0.5, "seed": 2**63 - 1},
    )
    for trace in (trace_of([[0, 1], [2, 3]]), many):
        write_trace(trace, path)
        found = read_trace(path)
        assert np.array_equal(found.experts, trace.experts)
        assert found.experts.dtype == trace.experts.dtype
        assert np.array_equal(found.sequences, trace.sequences)
        assert found.sampling == trace.sampling
        assert (found.layers, found.num_experts, found.model) == (
            (1,),
            trace.num_experts,
            "a model",
        )
    assert [each.name for each in path.parent.iterdir()] == ["a.safetensors"]


def damaged(path: Path, metadata: dict[str, str], **tensors: NDArray[Any]) -> None:
    """A good trace with some of it replaced."""
    write_trace(trace_of([[0, 1], [2, 3]]), path)
    good = {
        "format": "localr1-trace",
        "version": "1",
        "model": "",
        "num_experts": "4",
        "layers": "1",
    }
    save_file({**load_file(path), **tensors}, path, {**good, **metadata})


@pytest.mark.parametrize(
    ("metadata", "tensors", "error", "said"),
    [
        ({"format": "other"}, {}, FormatError, "format 'localr1-trace'"),
        ({"version": "2"}, {}, UnsupportedError, "expected 1"),
        ({"num_experts": "0"}, {}, FormatError, "num_experts"),
        ({"num_experts": "1e3"}, {}, FormatError, "whole number"),
        ({"num_experts": "3"}, {}, FormatError, "numbers below 3"),
        ({"layers": "1,2"}, {}, FormatError, "experts"),
        ({"layers": ""}, {}, FormatError, "layers"),
        ({"sampling": "hot"}, {}, FormatError, "sampling"),
        ({"sampling": "[1]"}, {}, FormatError, "object of numbers"),
        ({"sampling": '{"seed": true}'}, {}, FormatError, "object of numbers"),
        ({"sampling": '{"seed": NaN}'}, {}, FormatError, "sampling"),
        ({}, {"experts": np.zeros((2, 1, 2), dtype=np.int64)}, FormatError, "U8 or U16"),
        ({}, {"sequences": np.zeros((1, 3), dtype=np.int32)}, FormatError, "[sequences, 2]"),
        ({}, {"sequences": np.array([[1, 0]], dtype=np.int32)}, FormatError, "add up to 2"),
        ({}, {"sequences": np.array([[3, -1]], dtype=np.int32)}, FormatError, "add up to 2"),
    ],
)
def test_a_damaged_trace_is_refused(
    metadata: dict[str, str],
    tensors: dict[str, NDArray[Any]],
    error: type[LocalR1Error],
    said: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.safetensors"
    damaged(path, metadata, **tensors)
    with refused(tmp_path, error, said):
        read_trace(path)


def test_prompts_are_lines_or_json_lines(tmp_path: Path) -> None:
    plain, listed = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text('What is 1+1?\n\n"quoted"\n')
    listed.write_text('"two\\nlines"\n{"prompt": "x", "id": 3}\n')
    assert read_prompts(plain) == ["What is 1+1?", '"quoted"']
    assert read_prompts(listed) == ["two\nlines", "x"]
    listed.write_text('{"text": "x"}\n')
    with pytest.raises(FormatError, match="line 1"):
        read_prompts(listed)
    plain.write_text("\n")
    with pytest.raises(UsageError, match="a prompt per line"):
        read_prompts(plain)


def test_the_command_writes_a_trace_and_its_summary(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_directory(R1Nano(Config()), train_tokenizer(per_kind=50), tmp_path / "nano")
    prompts, out = tmp_path / "prompts.txt", tmp_path / "trace.safetensors"
    prompts.write_text("What is 47 * 86?\nWhat is 47 * 85?\n")
    arguments = ["trace", str(tmp_path / "nano"), "--prompts", str(prompts), "--max-tokens", "4"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    trace = read_trace(out)
    # The last token drawn is not read again. The second prompt is routed whole though it begins
    # as the first one does.
    assert trace.sequences[0].tolist() == trace.sequences[1].tolist()
    assert trace.sequences[0][1] == 3
    assert report["tokens"] == trace.num_tokens == int(trace.sequences.sum())
    assert (trace.layers, trace.num_experts, trace.experts_per_token) == ((1, 2, 3, 4, 5), 16, 2)
    assert [row["layer"] for row in report["layers"]] == [1, 2, 3, 4, 5]
    shown = CliRunner().invoke(app, arguments)
    assert "2 of 16 experts each" in shown.stdout
    assert shown.stdout.splitlines()[0].split()[:3] == ["layer", "busiest", "idlest"]


def test_answers_are_drawn_as_in_a_chat_where_a_flag_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_directory(R1Nano(Config()), train_tokenizer(per_kind=50), tmp_path / "nano")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is 47 * 86?\nWhat is 3 + 4?\n")
    arguments = ["trace", str(tmp_path / "nano"), "--prompts", str(prompts), "--max-tokens", "12"]

    def recorded(*flags: str) -> Trace:
        out = tmp_path / "trace.safetensors"
        result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--json", *flags])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["sampling"] == read_trace(out).sampling
        return read_trace(out)

    def is_same(one: Trace, other: Trace) -> bool:
        return np.array_equal(one.experts, other.experts)

    greedy = recorded()
    assert greedy.sampling["temperature"] == 0.0
    assert "seed" not in greedy.sampling
    assert is_same(greedy, recorded("--temperature", "0"))
    drawn = recorded("--temperature", "1.5", "--top-p", "0.9", "--seed", "7")
    said = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    assert {name: drawn.sampling[name] for name in said} == said
    assert not is_same(drawn, greedy)
    assert is_same(drawn, recorded("--temperature", "1.5", "--top-p", "0.9", "--seed", "7"))
    assert not is_same(drawn, recorded("--temperature", "1.5", "--top-p", "0.9", "--seed", "8"))
    assert is_same(greedy, recorded("--temperature", "1.5", "--top-p", "1e-9"))
    # What no flag says is as in a chat, and a seed that nobody gave can be given again.
    unseeded = recorded("--temperature", "1.5")
    assert unseeded.sampling["top_p"] == SamplingParams().top_p
    again = recorded("--temperature", "1.5", "--seed", str(unseeded.sampling["seed"]))
    assert is_same(unseeded, again)
    assert recorded("--seed", "3").sampling["temperature"] == 0.0, "as r1-nano's makers advise"
    with closing(load_engine(tmp_path / "nano", threads=1)) as engine:
        engine.defaults = {"temperature": 0.25, "top_k": 5}
        advised = sampling_of(engine, {"top_p": 0.5, "temperature": None, "seed": 1})
        assert advised == SamplingParams(temperature=0.25, top_k=5, top_p=0.5, seed=1)
        assert sampling_of(engine, {"seed": None}) == SamplingParams(temperature=0.0)
        # The text is that of the chat.
        engine.reset()
        params = GenerationParams(SamplingParams(temperature=1.5, top_p=0.9, seed=7), max_tokens=12)
        ids = engine.prompt([{"role": "user", "content": "What is 47 * 86?"}]).ids
        recorder = RoutingRecorder(engine.model, engine.name)
        for _ in engine.generate(ids, params):
            pass
        recorder.end_sequence(len(ids))
        chosen = recorder.trace().experts
    assert np.array_equal(drawn.experts[: len(chosen)], chosen)
    refusal = CliRunner().invoke(app, [*arguments, "--top-p", "2"])
    assert isinstance(refusal.exception, UsageError)
    assert "top_p" in str(refusal.exception)
