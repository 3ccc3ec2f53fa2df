"""Prompt ids to events: chunked prefill, decode, reuse of what the last turn left in the cache."""

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from localr1.chat_template import (
    THINK_OPEN,
    ChatPrompt,
    ChatTemplate,
    knows_thinking,
    prepare_chat,
)
from localr1.engine.counts import Counts
from localr1.engine.draft_length import LENGTHS as DRAFT_LENGTHS
from localr1.engine.draft_length import DraftLength
from localr1.engine.events import Done, Event, GenerationParams, Progress
from localr1.engine.generation import Generation
from localr1.engine.sequence import CachedSequence
from localr1.errors import ContextError, NumericsError, TemplateError, UsageError
from localr1.models.api import Model
from localr1.tokenizer import Tokenizer

if TYPE_CHECKING:
    from localr1.experts.store import ExpertStore

DEFAULT_CHUNK = 512
"""Prompt tokens of one forward pass: many enough for matrix products to be efficient, few enough
that Ctrl-C is heard soon."""
SETTLING_CHUNK = 64
"""Tokens of a pass of `read_ahead`, which whoever types the next message must not have to wait for.
"""
_TAIL = 16
"""Tokens looked at for a thinking block left open; <think> has at most a few."""


class Engine:
    """A model, its tokenizer and template, and the cache of one conversation.

    context: the window in tokens, prompt and reply together. chunk: prompt tokens of a forward
    pass. name: what the model is called. kernels, threads: the backend's name and its threads.
    defaults: sampling parameters the model's makers advise (generation_config.json). experts: the
    store of a mixture's experts, which the engine closes at its end; None for what has none. path:
    where the model was loaded from. arithmetic: what the last bits of its numbers depend on. where:
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
        path: Path | None = None,
        arithmetic: str = "",
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
        self.path = path
        self.arithmetic = arithmetic
        self.where = where
        self._on_close = on_close
        self._template = template
        self._chunk = chunk
        self.sequence = CachedSequence(model, context)
        exact = model.same_bits(1 + DRAFT_LENGTHS[-1])
        self._draft_length = DraftLength() if exact else None
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

    @property
    def can_think(self) -> bool:
        """Whether the model has a thinking block, which a prompt can open or leave empty."""
        return knows_thinking(self.template, self.tokenizer)

    def prompt(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> ChatPrompt:
        """`prepare_chat` with this model's template and tokenizer."""
        return prepare_chat(self.template, self.tokenizer, messages, **options)

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: GenerationParams,
        cancel: threading.Event | None = None,
        answer_now: threading.Event | None = None,
    ) -> Generator[Event, None, None]:
        """The events of one reply: Progress during prefill, Delta, and Done at the end.

        cancel: looked at between prefill chunks and between tokens. answer_now: looked at between
        tokens; while the model thinks, it ends the thought, and the answer begins. Raises, before
        any work, ContextError (the prompt leaves no room for a reply) and UsageError; while it runs
        NumericsError, MemoryLimitError and KernelError.
        """
        prompt = self._checked(prompt_ids)
        return self._exclusively(
            prompt, params, cancel or threading.Event(), answer_now or threading.Event()
        )

    def read_ahead(self, prompt_ids: Sequence[int], cancel: threading.Event) -> int:
        """Read what the next prompt will begin with, so that only its rest is left to read then.
        Returns how many tokens were read. cancel: looked at between passes; what was read stays.

        What a turn leaves in the cache is its thought and the answer that followed it; the next
        prompt has the answer without the thought, whose keys and values are others. Raises as
        `generate`."""
        ids = self._checked(prompt_ids)
        with self._alone():
            if self.sequence.ids[: len(ids)] == ids:
                return 0
            begin = self.sequence.reuse(ids)
            for start in range(begin, len(ids), SETTLING_CHUNK):
                if cancel.is_set():
                    break
                self.sequence.forward(ids[start : start + SETTLING_CHUNK])
            return len(self.sequence.ids) - begin

    @property
    def looks_ahead(self) -> bool:
        """Whether a pass over several tokens gives the bits that passes of one give, so that
        drafted tokens can be computed along."""
        return self._draft_length is not None

    def reset(self) -> None:
        """Forget the conversation's cache; the next prompt is computed whole."""
        self.sequence.reuse([])

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
        self,
        prompt: list[int],
        params: GenerationParams,
        cancel: threading.Event,
        answer_now: threading.Event,
    ) -> Generator[Event, None, None]:
        with self._alone():
            yield from self._generate(prompt, params, cancel, answer_now)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The cache is this caller's within the block."""
        if not self._lock.acquire(blocking=False):
            raise UsageError(
                "the model is answering already",
                expected="one generation at a time",
                fix="Wait for it to end, or cancel it.",
            )
        try:
            yield
        except NumericsError:
            # What the pass left in the cache is no more to be trusted than its logits.
            self.sequence.reuse([])
            raise
        finally:
            self._lock.release()

    def _checked(self, prompt_ids: Sequence[int]) -> list[int]:
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
        return prompt

    def _generate(
        self,
        prompt: list[int],
        params: GenerationParams,
        cancel: threading.Event,
        answer_now: threading.Event,
    ) -> Generator[Event, None, None]:
        # The last token is computed again even if it is cached: its logits are not.
        counts = Counts(
            prompt=len(prompt),
            cached=self.sequence.reuse(prompt[:-1]),
            experts=self.experts,
            experts_before=None if self.experts is None else self.experts.usage.copy(),
        )
        logits: Tensor | None = None
        for start in range(counts.cached, len(prompt), self._chunk):
            if cancel.is_set():
                yield Done("cancelled", counts.usage())
                return
            logits = self.sequence.forward(prompt[start : start + self._chunk])
            yield Progress(len(self.sequence.ids), len(prompt))
        assert logits is not None
        in_thinking = params.starts_in_thinking
        if in_thinking is None:
            in_thinking = self.tokenizer.decode(prompt[-_TAIL:]).rstrip().endswith(THINK_OPEN)
        generation = Generation(
            self.sequence,
            self.tokenizer,
            prompt,
            params,
            counts,
            in_thinking=in_thinking,
            context=self.context,
            draft_length=self._draft_length if params.looks_ahead else None,
            cancel=cancel,
            answer_now=answer_now,
        )
        yield from generation.run(logits)
