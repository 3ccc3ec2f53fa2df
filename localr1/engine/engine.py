"""Prompt ids to events: chunked prefill, decode, reuse of what the last turn left in the cache."""

import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from localr1.chat_template import THINK_OPEN, ChatPrompt, ChatTemplate, prepare_chat
from localr1.engine.events import Delta, Done, Event, GenerationParams, Progress, Reason, Usage
from localr1.engine.stop import StopMatcher
from localr1.engine.think import ThinkSplitter
from localr1.errors import ContextError, NumericsError, TemplateError, UsageError
from localr1.experts.usage import ExpertUsage
from localr1.models.api import Model
from localr1.models.step import Step
from localr1.sampler import Sampler
from localr1.tokenizer import Tokenizer

if TYPE_CHECKING:
    from localr1.experts.store import ExpertStore

DEFAULT_CHUNK = 512
"""Prompt tokens of one forward pass: many enough for matrix products to be efficient, few enough
that Ctrl-C is heard soon."""
_TAIL = 16
"""Tokens looked at for a thinking block left open; <think> has at most a few."""


@dataclass
class _Counts:
    """Of one generation, while it runs."""

    prompt: int
    cached: int
    completion: int = 0
    thinking: int = 0
    begin: float = field(default_factory=time.perf_counter)
    first: float | None = None
    experts: "ExpertStore | None" = None
    experts_before: ExpertUsage | None = None

    def usage(self) -> Usage:
        used = None
        if self.experts is not None and self.experts_before is not None:
            used = self.experts.usage - self.experts_before
        now = time.perf_counter()
        first = now if self.first is None else self.first
        return Usage(
            prompt_tokens=self.prompt,
            cached_tokens=self.cached,
            completion_tokens=self.completion,
            thinking_tokens=self.thinking,
            prefill_seconds=first - self.begin,
            decode_seconds=now - first,
            experts=used,
        )


class _Reply:
    """Tokens to pieces of text: decoded, split into thinking and answer, ended by stop texts."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], in_thinking: bool) -> None:
        self._stream = tokenizer.stream()
        self._splitter = ThinkSplitter(in_thinking)
        self._stops = StopMatcher(stops)

    @property
    def in_thinking(self) -> bool:
        return self._splitter.in_thinking

    @property
    def has_stopped(self) -> bool:
        return self._stops.has_stopped

    def step(self, token: int) -> list[Delta]:
        text = self._stream.step(token)
        return [] if text is None else self._deltas(text)

    def flush(self) -> list[Delta]:
        """The rest, when no token follows."""
        deltas = self._deltas(self._stream.flush())
        for channel, text in self._splitter.flush():
            shown = text if channel == "thinking" else self._stops.feed(text)
            deltas += [Delta(channel, shown)] if shown else []
        rest = self._stops.flush()
        return [*deltas, Delta("answer", rest)] if rest else deltas

    def _deltas(self, text: str) -> list[Delta]:
        deltas = []
        for channel, piece in self._splitter.feed(text):
            shown = piece if channel == "thinking" else self._stops.feed(piece)
            if shown:
                deltas.append(Delta(channel, shown))
        return deltas


class Engine:
    """A model, its tokenizer and template, and the cache of one conversation.

    context: the window in tokens, prompt and reply together. chunk: prompt tokens of a forward
    pass. name: what the model is called. kernels, threads: the backend's name and its threads.
    defaults: sampling parameters the model's makers advise (generation_config.json). experts: the
    store of a mixture's experts, which the engine closes at its end; None for what has none. where:
    what besides the CPU computes, in words; empty for nothing. on_close: called first at its end.

    One generation at a time; another one meanwhile is a UsageError. Whatever ends a generation (its
    end, an error, a cancel, a Ctrl-C), the cache is known exactly and the next one works.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        context: int,
        *,
        chunk: int = DEFAULT_CHUNK,
        name: str = "",
        kernels: str = "",
        threads: int = 0,
        defaults: Mapping[str, int | float] | None = None,
        experts: "ExpertStore | None" = None,
        where: str = "",
        on_close: Callable[[], None] | None = None,
    ) -> None:
        if chunk < 1:
            raise UsageError("chunk", expected="at least 1 token", found=chunk)
        self.model = model
        self.tokenizer = tokenizer
        self.context = context
        self.name = name
        self.kernels = kernels
        self.threads = threads
        self.defaults: Mapping[str, int | float] = dict(defaults or {})
        self.experts = experts
        self.where = where
        self._on_close = on_close
        self._template = template
        self._chunk = chunk
        self._cache = model.new_cache(context)
        # The ids whose keys and values the cache holds. Where an interrupt falls between the two,
        # the cache is the longer one, and `_reuse` cuts it.
        self._cached_ids: list[int] = []
        self._lock = threading.Lock()

    @property
    def template(self) -> ChatTemplate:
        """Raises TemplateError when the model has none: a base model, that completes plain text."""
        if self._template is None:
            raise TemplateError(
                f"{self.name or 'the model'} has no chat template",
                fix="Use an instruction-tuned release of the model.",
            )
        return self._template

    def prompt(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> ChatPrompt:
        """`prepare_chat` with this model's template and tokenizer."""
        return prepare_chat(self.template, self.tokenizer, messages, **options)

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: GenerationParams,
        cancel: threading.Event | None = None,
    ) -> Generator[Event, None, None]:
        """The events of one reply: Progress during prefill, Delta, and Done at the end.

        cancel: looked at between prefill chunks and between tokens. Raises, before any work,
        ContextError (the prompt leaves no room for a reply) and UsageError; while it runs
        NumericsError, MemoryLimitError and KernelError.
        """
        prompt = list(prompt_ids)
        if not prompt:
            raise UsageError("prompt", expected="at least one token", found="none")
        if not 0 <= min(prompt) <= max(prompt) < self.tokenizer.vocab_size:
            raise UsageError(
                "prompt", expected=f"token ids from 0 to {self.tokenizer.vocab_size - 1}"
            )
        if len(prompt) >= self.context:
            raise ContextError(
                "the prompt does not fit the context window",
                expected=f"at most {self.context - 1} tokens, one less than the window",
                found=len(prompt),
                fix="Shorten or clear the conversation, or choose a larger context.",
            )
        return self._exclusively(prompt, params, cancel or threading.Event())

    def reset(self) -> None:
        """Forget the conversation's cache; the next prompt is computed whole."""
        self._reuse([])

    def close(self) -> None:
        """End the template's process, and the threads that move experts. Without experts the engine
        can be used again all the same."""
        if self._template is not None:
            self._template.close()
        if self._on_close is not None:
            self._on_close()
        if self.experts is not None:
            self.experts.close()

    def _exclusively(
        self, prompt: list[int], params: GenerationParams, cancel: threading.Event
    ) -> Generator[Event, None, None]:
        if not self._lock.acquire(blocking=False):
            raise UsageError(
                "the model is answering already",
                expected="one generation at a time",
                fix="Wait for it to end, or cancel it.",
            )
        try:
            yield from self._generate(prompt, params, cancel)
        except NumericsError:
            # What the pass left in the cache is no more to be trusted than its logits.
            self._reuse([])
            raise
        finally:
            self._lock.release()

    def _generate(
        self, prompt: list[int], params: GenerationParams, cancel: threading.Event
    ) -> Generator[Event, None, None]:
        sampler = Sampler(params.sampling)
        # The last token is computed again even if it is cached: its logits are not.
        counts = _Counts(
            prompt=len(prompt),
            cached=self._reuse(prompt[:-1]),
            experts=self.experts,
            experts_before=None if self.experts is None else self.experts.usage.copy(),
        )
        logits: Tensor | None = None
        for start in range(counts.cached, len(prompt), self._chunk):
            if cancel.is_set():
                yield Done("cancelled", counts.usage())
                return
            logits = self._forward(prompt[start : start + self._chunk])
            yield Progress(len(self._cached_ids), len(prompt))
        assert logits is not None
        in_thinking = params.starts_in_thinking
        if in_thinking is None:
            in_thinking = self.tokenizer.decode(prompt[-_TAIL:]).rstrip().endswith(THINK_OPEN)
        reply = _Reply(self.tokenizer, params.stop, in_thinking)
        history = prompt.copy()
        reason: Reason | None = "cancelled" if cancel.is_set() else None
        while reason is None:
            token = sampler.sample(logits, history)
            history.append(token)
            counts.first = counts.first or time.perf_counter()
            counts.completion += 1
            was_thinking = reply.in_thinking
            if token in self.tokenizer.eos_ids and not params.ignore_eos:
                counts.thinking += was_thinking
                reason = "stop"
                break
            yield from reply.step(token)
            counts.thinking += was_thinking or reply.in_thinking
            reason = self._reason_to_end(reply, params, counts, cancel)
            if reason is None:
                logits = self._forward([token])
        yield from reply.flush()
        yield Done(reason, counts.usage())

    def _reason_to_end(
        self, reply: _Reply, params: GenerationParams, counts: _Counts, cancel: threading.Event
    ) -> Reason | None:
        if reply.has_stopped:
            return "stop"
        if cancel.is_set():
            return "cancelled"
        if counts.completion == params.max_tokens:
            return "length"
        if counts.prompt + counts.completion >= self.context:
            return "context"
        return None

    def _forward(self, ids: list[int]) -> Tensor:
        """Logits [1, vocab] of the last of `ids`, which join the cache."""
        step = Step(torch.tensor(ids, dtype=torch.int64), len(self._cached_ids))
        logits = self.model.forward(step, self._cache)
        self._cached_ids.extend(ids)
        return logits

    def _reuse(self, ids: list[int]) -> int:
        """Cut the cache to the longest prefix it shares with `ids`; returns its length."""
        limit = min(len(ids), len(self._cached_ids), self._cache.length)
        common = next((i for i in range(limit) if ids[i] != self._cached_ids[i]), limit)
        del self._cached_ids[common:]
        self._cache.truncate(common)
        return common
