"""Perplexity and divergence against values that can be computed by hand."""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from quant_sources import save_source
from tiny_models import transformer_logits
from torch import Tensor
from typer.testing import CliRunner

from localr1.cache.dense import DenseCache
from localr1.cache.sequence import Cache
from localr1.cli.main import app
from localr1.errors import ContextError, LocalR1Error, NumericsError, UsageError
from localr1.kernels.native import NativeKernels
from localr1.kernels.reference import ReferenceKernels
from localr1.models.config import ModelConfig
from localr1.models.registry import parse_config
from localr1.models.step import Step
from localr1.quant import evaluate
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

CLOSE = 1e-5
"""Relative; float32 logits against float64. Leaving out one position of 60 changes a mean by 1%."""

TEXT = "The quick brown fox jumps over the lazy dog. Ça va? 0123456789"


@dataclass
class TableModel:
    """Logits that depend on the last token alone, so that every number is known."""

    table: Tensor  # float32 [vocabulary, vocabulary]
    config: ModelConfig
    weight_bytes: int = 0
    longest: int = 0

    def same_bits(self, num_tokens: int) -> bool:
        return True

    def new_cache(self, limit: int) -> Cache[Any]:
        if limit > self.config.max_positions:
            raise ContextError("context window")
        self.longest = max(self.longest, limit)
        return DenseCache(1, 1, 8, torch.float32, limit)

    def forward(self, step: Step, cache: Cache[Any]) -> Tensor:
        assert step.all_logits
        assert step.start == cache.length, "pieces of a window follow each other"
        cache.reserve(len(step.token_ids))
        cache.advance(len(step.token_ids))
        return self.table[step.token_ids]


def table_model(seed: int, vocabulary: int = VOCAB_SIZE, spread: float = 3.0) -> TableModel:
    config = parse_config(
        {
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
        }
    )
    generator = torch.Generator().manual_seed(seed)
    table = spread * torch.randn(vocabulary, vocabulary, generator=generator)
    return TableModel(table, config)


def expected_losses(model: TableModel, windows: list[Tensor]) -> list[float]:
    table = torch.log_softmax(model.table.double(), dim=1)
    return [
        -float(table[first, second])
        for ids in windows
        for first, second in itertools.pairwise(ids.tolist())
    ]


@pytest.mark.parametrize("window", [2, 7, 20, 64])
def test_perplexity_is_that_of_every_token_but_the_first_of_a_window(window: int) -> None:
    model, tokenizer = table_model(0), byte_tokenizer()
    windows = evaluate.windows_of(tokenizer, TEXT, window)
    losses = expected_losses(model, windows)
    result = evaluate.perplexity(model, tokenizer, TEXT, window)
    assert result.num_tokens == len(losses)
    assert result.loss.value == pytest.approx(sum(losses) / len(losses), rel=CLOSE)
    assert result.perplexity.value == pytest.approx(math.exp(result.loss.value))


def test_windows_cover_the_text_once() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(TEXT)
    windows = evaluate.windows_of(tokenizer, TEXT, 10)
    assert torch.cat(windows).tolist() == ids[: sum(map(len, windows))]
    assert len(ids) - sum(map(len, windows)) < 2, "at most one token is left over"
    with_bos = evaluate.windows_of(byte_tokenizer(add_bos=True), TEXT, 10)
    assert all(int(window[0]) == 256 for window in with_bos)
    assert (
        torch.cat([window[1:] for window in with_bos]).tolist()
        == ids[: sum(len(window) - 1 for window in with_bos)]
    )


@pytest.mark.parametrize(("text", "window"), [("a", 10), ("", 10), (TEXT, 1), (TEXT, 0)])
def test_too_short_a_text_or_window(text: str, window: int) -> None:
    with pytest.raises(UsageError, match="at least 2 tokens"):
        evaluate.windows_of(byte_tokenizer(), text, window)


def test_divergence_of_two_known_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pieces of three positions, so that their seams are part of the test.
    monkeypatch.setattr(evaluate, "LOGIT_BYTES", 3 * 4 * VOCAB_SIZE)
    reference, model, tokenizer = table_model(1), table_model(2), byte_tokenizer()
    model.table = reference.table + 0.5 * model.table
    result = evaluate.divergence(reference, model, tokenizer, TEXT, 20)
    ids = torch.cat(evaluate.windows_of(tokenizer, TEXT, 20))
    p, q = (torch.log_softmax(each.table.double(), 1)[ids] for each in (reference, model))
    kl = (p.exp() * (p - q)).sum(1)
    assert result.num_positions == len(ids)
    assert result.kl.value == pytest.approx(float(kl.mean()), rel=CLOSE)
    assert result.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=CLOSE)
    assert result.top1.value == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert 0 < result.top1.value < 1
    for found, table in ((result.reference, reference), (result.model, model)):
        alone = evaluate.perplexity(table, tokenizer, TEXT, 20)
        assert found == alone


def test_a_model_does_not_differ_from_itself() -> None:
    model = table_model(3)
    result = evaluate.divergence(model, model, byte_tokenizer(), TEXT, 16)
    assert result.kl.value == 0.0
    assert result.top1.value == 1.0


def test_standard_error_is_that_of_window_means() -> None:
    """Windows of equal length: the textbook error of a mean of their means."""
    windows = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 4.0, 4.0]), torch.zeros(3)]
    mean = evaluate.mean_over_windows([window.double() for window in windows])
    means = torch.tensor([2.0, 4.0, 0.0])
    assert mean.value == pytest.approx(2.0)
    assert mean.standard_error == pytest.approx(float(means.std() / 3**0.5))
    assert evaluate.mean_over_windows(windows[:1]).standard_error is None


def test_what_cannot_be_compared_or_measured() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(UsageError, match="vocabulary of 300, found one of 301"):
        evaluate.divergence(table_model(0), table_model(0, VOCAB_SIZE + 1), tokenizer, TEXT, 16)
    with pytest.raises(ContextError):
        evaluate.perplexity(table_model(0), tokenizer, TEXT * 3, 65)
    broken = table_model(0)
    broken.table[tokenizer.encode("q")[0]] = float("nan")
    with pytest.raises(NumericsError, match="logits"):
        evaluate.perplexity(broken, tokenizer, TEXT, 16)


def test_perplexity_of_a_real_architecture_is_that_of_transformers(tmp_path: Path) -> None:
    source_model = save_source(tmp_path / "source", "qwen3")
    model, tokenizer = evaluate.load(tmp_path / "source", ReferenceKernels())
    found = evaluate.perplexity(model, tokenizer, TEXT, 32)
    losses = []
    for ids in evaluate.windows_of(tokenizer, TEXT, 32):
        table = torch.log_softmax(transformer_logits(source_model, ids).double(), 1)
        losses += [-float(table[row, ids[row + 1]]) for row in range(len(ids) - 1)]
    assert found.loss.value == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_built_in_text() -> None:
    text = evaluate.read_text(None)
    assert 20_000 < len(text) < 40_000
    assert text.isprintable() or set(text) - {"\n"} == {c for c in text if c.isprintable()}


def test_commands_quantize_and_eval(tmp_path: Path) -> None:
    source, out, text = tmp_path / "source", tmp_path / "out", tmp_path / "text.txt"
    save_source(source)
    text.write_text(TEXT)
    run = CliRunner().invoke

    planned = run(app, ["quantize", str(source), str(out), "--dry-run", "--json"])
    assert planned.exit_code == 0, planned.output
    assert not out.exists()
    done = run(app, ["quantize", str(source), str(out), "--bits", "8", "--group", "64", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["portable"]
    assert {part["scheme"] for part in report["parts"]} == {"bf16", "int8-g64"}
    assert json.loads(planned.stdout)["bytes"] < report["bytes"]

    shown = run(app, ["eval", "ppl", str(out), "--text", str(text), "--window", "32"])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("perplexity")
    compared = run(
        app,
        [
            "eval",
            "kl",
            str(out),
            "-r",
            str(source),
            "--text",
            str(text),
            "--window",
            "32",
            "--json",
        ],
    )
    assert compared.exit_code == 0, compared.output
    result = json.loads(compared.stdout)
    assert 0 < result["kl"]["value"] < 0.5

    again = run(app, ["quantize", str(source), str(out)])
    assert isinstance(again.exception, LocalR1Error)
    assert "exists" in str(again.exception)
    unknown = run(app, ["quantize", str(source), str(tmp_path / "b"), "--method", "magic"])
    assert isinstance(unknown.exception, UsageError)


def test_int8_is_nearer_to_the_source_than_int4(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    kernels = NativeKernels(threads=1)
    reference, tokenizer = evaluate.load(tmp_path / "source", kernels)
    divergences = []
    for bits in (8, 4):
        out = tmp_path / f"int{bits}"
        quantize(tmp_path / "source", out, Recipe.uniform(bits, 32))
        model, _ = evaluate.load(out, kernels)
        divergences.append(evaluate.divergence(reference, model, tokenizer, TEXT, 32).kl.value)
    assert 0 < 5 * divergences[0] < divergences[1]
