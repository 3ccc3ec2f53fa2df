"""How good a model is on a text, and how far it is from another.

A text is cut into disjoint windows; each is read by the model from an empty cache, and every
position in it counts. Both measures are means over positions. Neighbouring positions are not
independent, so standard errors come from the spread between windows, not between positions (the
ratio estimator for clusters of unequal size: Cochran, Sampling Techniques, 3rd ed., chapter 6).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from localr1.checkpoint.files import read_text as read_text_file
from localr1.checkpoint.nf4 import runnable
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import NumericsError, UsageError
from localr1.kernels.api import Kernels
from localr1.models.api import Model
from localr1.models.decoder import Decoder
from localr1.models.registry import load_model
from localr1.models.step import Step
from localr1.tokenizer import Tokenizer

DEFAULT_WINDOW = 1024
DEFAULT_TEXT = Path(__file__).parent / "data" / "evaluation_text.txt"
"""Worked problems, code, questions and answers, some prose: what a chat with a reasoning model is
made of. 22 kB, written for this purpose (MIT, as all of localr1), so no model was trained on it."""

LOGIT_BYTES = 32 << 20
"""Float32 logits of one model held at once; a few copies of them are made."""

MAX_TEXT_BYTES = 8 << 20

WindowProgress = Callable[[int, int], None]
"""Called with windows done and windows in all."""


@dataclass(frozen=True)
class Mean:
    """standard_error: None when there is a single window."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Perplexity:
    """loss: mean negative log likelihood of a token, in nats. perplexity: exp of it; its standard
    error is to first order."""

    loss: Mean
    perplexity: Mean
    num_tokens: int


@dataclass(frozen=True)
class Divergence:
    """kl: Kullback-Leibler divergence of the model's next-token distribution from the reference's,
    sum p_ref * ln(p_ref / p_model), in nats. kl_p99: its 99th percentile over positions. top1:
    share of positions where both find the same token most probable. num_positions: compared."""

    kl: Mean
    kl_p99: float
    top1: Mean
    reference: Perplexity
    model: Perplexity
    num_positions: int


def load(path: Path, kernels: Kernels, *, cache_in_8_bits: bool = False) -> tuple[Model, Tokenizer]:
    """A model without the rest of an engine. Raises what opening and loading raise."""
    with runnable(open_checkpoint(path)) as checkpoint:
        model = load_model(checkpoint, kernels)
        if cache_in_8_bits and isinstance(model, Decoder):
            model.quantize_cache()
        files = checkpoint.tokenizer_files()
    return model, Tokenizer.from_files(files, model.config.vocab_size)


def read_text(path: Path | None) -> str:
    """The text of a UTF-8 file, DEFAULT_TEXT for None."""
    path = path or DEFAULT_TEXT
    return read_text_file(path, str(path), MAX_TEXT_BYTES)


def windows_of(tokenizer: Tokenizer, text: str, window: int) -> list[Tensor]:
    """int64 [<= window] each, beginning with bos where the model was trained so. A last window of
    one token is dropped. Raises UsageError when the text or the window is too short."""
    front = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    size = window - len(front)
    if size < 2:
        raise UsageError("window", expected=f"at least {2 + len(front)} tokens", found=window)
    ids = tokenizer.encode(text)
    windows = [
        torch.tensor(front + ids[start : start + size]) for start in range(0, len(ids) - 1, size)
    ]
    if not windows:
        raise UsageError("text", expected="at least 2 tokens", found=len(ids))
    return windows


def perplexity(
    model: Model,
    tokenizer: Tokenizer,
    text: str,
    window: int = DEFAULT_WINDOW,
    progress: WindowProgress | None = None,
) -> Perplexity:
    """Every token but the first of each window is predicted from those before it in the window.

    Raises UsageError, ContextError (a window longer than the model's context), NumericsError.
    """
    losses: list[Tensor] = []
    windows = windows_of(tokenizer, text, window)
    for index, ids in enumerate(windows):
        rows = [
            _losses(log_probabilities, ids, start)
            for start, log_probabilities in _predictions(model, ids)
        ]
        losses.append(torch.cat(rows))
        if progress is not None:
            progress(index + 1, len(windows))
    return _perplexity(losses)


def divergence(
    reference: Model,
    model: Model,
    tokenizer: Tokenizer,
    text: str,
    window: int = DEFAULT_WINDOW,
    progress: WindowProgress | None = None,
) -> Divergence:
    """Both models read the same windows side by side. tokenizer: of both.

    Raises UsageError (different vocabularies), ContextError, NumericsError.
    """
    sizes = reference.config.vocab_size, model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UsageError(
            "models to compare", expected=f"a vocabulary of {sizes[0]}", found=f"one of {sizes[1]}"
        )
    windows = windows_of(tokenizer, text, window)
    kl: list[Tensor] = []
    same: list[Tensor] = []
    losses: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index, ids in enumerate(windows):
        both = zip(_predictions(reference, ids), _predictions(model, ids), strict=True)
        rows: tuple[list[Tensor], ...] = ([], [], [], [])
        for (start, expected), (_, found) in both:
            rows[0].append(divergence_of_rows(expected, found))
            rows[1].append((expected.argmax(1) == found.argmax(1)).to(torch.float64))
            rows[2].append(_losses(expected, ids, start))
            rows[3].append(_losses(found, ids, start))
        for collected, new in zip((kl, same, *losses), rows, strict=True):
            collected.append(torch.cat(new))
        if progress is not None:
            progress(index + 1, len(windows))
    every = torch.cat(kl)
    return Divergence(
        kl=mean_over_windows(kl),
        kl_p99=float(every.quantile(0.99)),
        top1=mean_over_windows(same),
        reference=_perplexity(losses[0]),
        model=_perplexity(losses[1]),
        num_positions=len(every),
    )


def _predictions(model: Model, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first position, log probabilities float32 [t, vocabulary]) of pieces of a window."""
    piece = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
    cache = model.new_cache(len(ids))
    for start in range(0, len(ids), piece):
        logits = model.forward(Step(ids[start : start + piece], start, all_logits=True), cache)
        if not torch.isfinite(logits).all():
            raise NumericsError("logits", expected="finite numbers", found="NaN or Inf")
        yield start, torch.log_softmax(logits, dim=1)


def _losses(log_probabilities: Tensor, ids: Tensor, start: int) -> Tensor:
    """float64 [t], or [t - 1] for the window's last piece: its last token has no successor."""
    following = ids[start + 1 : start + 1 + len(log_probabilities)]
    rows = log_probabilities[: len(following)]
    return -rows.gather(1, following[:, None])[:, 0].to(torch.float64)


def divergence_of_rows(expected: Tensor, found: Tensor) -> Tensor:
    """Log probabilities [t, vocabulary] -> float64 [t]. Rounding may take it below zero by some
    1e-7, which a mean should average out, so it is not clipped."""
    return (expected.exp() * (expected - found)).sum(1, dtype=torch.float64)


def _perplexity(losses: Sequence[Tensor]) -> Perplexity:
    loss = mean_over_windows(losses)
    value = math.exp(loss.value)
    error = None if loss.standard_error is None else value * loss.standard_error
    return Perplexity(loss, Mean(value, error), sum(map(len, losses)))


def mean_over_windows(windows: Sequence[Tensor]) -> Mean:
    """Over all positions; the windows are the clusters of the standard error."""
    totals = torch.stack([values.sum() for values in windows])
    counts = torch.tensor([float(len(values)) for values in windows], dtype=torch.float64)
    value = float(totals.sum() / counts.sum())
    if len(windows) < 2:
        return Mean(value, None)
    spread = (totals - value * counts).square().sum() * len(windows) / (len(windows) - 1)
    return Mean(value, float(spread.sqrt() / counts.sum()))
