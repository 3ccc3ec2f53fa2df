"""One reply, token by token, once its prompt is read."""

import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import replace

from torch import Tensor

from localr1.candidates import Candidates
from localr1.engine.constraint import Constraint
from localr1.engine.counts import Counts
from localr1.engine.draft_length import DraftLength
from localr1.engine.events import Closing, Delta, Done, Event, GenerationParams, Reason
from localr1.engine.lookahead import Lookahead
from localr1.engine.reply import Reply
from localr1.engine.sequence import CachedSequence
from localr1.sampler import Sampler
from localr1.tokenizer import Tokenizer

CLOSING_TEXT = "\n\nThat is enough thinking; now I answer.\n</think>\n\n"
"""What ends a thought that may not go on. A model that finds a thought ended in its own words goes
on to the answer (Muennighoff et al. 2025, "s1: Simple test-time scaling", section 3.1)."""


class Generation:
    """prompt: ids that `sequence` has read. context: the window in tokens, prompt and reply
    together. draft_length: for looking ahead; None where that is not wanted, or would change the
    bits. cancel, answer_now: looked at between tokens, as Engine.generate has them."""

    def __init__(
        self,
        sequence: CachedSequence,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        params: GenerationParams,
        counts: Counts,
        *,
        in_thinking: bool,
        context: int,
        draft_length: DraftLength | None,
        cancel: threading.Event,
        answer_now: threading.Event,
    ) -> None:
        self._sequence = sequence
        self._tokenizer = tokenizer
        self._params = params
        self._counts = counts
        self._context = context
        self._cancel = cancel
        self._answer_now = answer_now
        self._history = list(prompt)
        self._sampler = Sampler(params.sampling)
        # A grammar chooses among all tokens.
        self._sought = self._sampler.sought if params.grammar is None else None
        self._reply = Reply(tokenizer, params.stop, in_thinking)
        self._closed: Closing | None = None
        self._lookahead: Lookahead | None = None
        if draft_length is not None:
            self._lookahead = Lookahead(sequence, prompt, draft_length, counts)
        # Begun with the answer, which may follow at once.
        self._constraint: Constraint | None = None
        if not in_thinking:
            self._constrain("")

    def run(self, logits: Candidates | Tensor) -> Generator[Event, None, None]:
        """From the logits behind the prompt to Done."""
        reason: Reason | None = "cancelled" if self._cancel.is_set() else None
        while reason is None:
            tokens = self._tokens_that_close()
            if not tokens:
                token = self._sample(logits)
                tokens = [token]
                if token in self._tokenizer.eos_ids and not self._params.ignore_eos:
                    self._count(token, was_thinking=self._reply.in_thinking)
                    reason = "stop"
                    break
            for token in tokens:
                yield from self._take(token)
            reason = self._reason_to_end()
            if reason is None:
                logits = self._logits_after(tokens)
        yield from self._stamped(self._reply.flush())
        yield Done(reason, self._counts.usage(), self._closed)

    def _logits_after(self, tokens: list[int]) -> Candidates | Tensor:
        if self._lookahead is not None:
            return self._lookahead.logits_after(tokens)
        if self._sought is not None:
            return self._sequence.select(tokens, self._sought)
        return self._sequence.forward(tokens)

    def _tokens_that_close(self) -> list[int]:
        """What ends the thought, where it may not go on; [] where it may, or where the window or
        max_tokens leave no room for an answer behind it."""
        if self._closed is not None or not self._reply.in_thinking:
            return []
        counts, params = self._counts, self._params
        asked = self._answer_now.is_set()
        over = params.think_budget is not None and counts.thinking >= params.think_budget
        if not asked and not over:
            return []
        tokens = self._tokenizer.encode(CLOSING_TEXT, allow_special=True)
        completion = counts.completion + len(tokens)
        if counts.prompt + completion >= self._context or (
            params.max_tokens is not None and completion >= params.max_tokens
        ):
            return []
        self._closed = "asked" if asked else "budget"
        counts.forced += len(tokens)
        return tokens

    def _sample(self, logits: Candidates | Tensor) -> int:
        if isinstance(logits, Candidates):
            return self._sampler.sample_from(logits)
        if self._constraint is None:
            return self._sampler.sample(logits, self._history)
        token = self._sampler.sample(logits, self._history, self._constraint.allowed())
        self._constraint.accept(token)
        return token

    def _constrain(self, begun: str) -> None:
        """The answer begins; begun: what of it came along with the end of the thought."""
        if self._params.grammar is None:
            return
        self._constraint = self._params.grammar.start()
        if begun:
            self._constraint.accept_text(begun)

    def _take(self, token: int) -> list[Delta]:
        """The next token of the reply; returns the text it completes."""
        was_thinking = self._reply.in_thinking
        deltas = self._reply.step(token)
        if was_thinking and not self._reply.in_thinking:
            self._constrain("".join(each.text for each in deltas if each.channel == "answer"))
        self._count(token, was_thinking=was_thinking or self._reply.in_thinking)
        return self._stamped(deltas)

    def _stamped(self, deltas: list[Delta]) -> list[Delta]:
        """With the counts so far."""
        counts = self._counts
        return [
            replace(each, tokens=counts.completion, thinking_tokens=counts.thinking)
            for each in deltas
        ]

    def _count(self, token: int, *, was_thinking: bool) -> None:
        self._history.append(token)
        self._counts.first = self._counts.first or time.perf_counter()
        self._counts.completion += 1
        self._counts.thinking += was_thinking

    def _reason_to_end(self) -> Reason | None:
        counts = self._counts
        if self._reply.has_stopped:
            return "stop"
        if self._cancel.is_set():
            return "cancelled"
        if counts.completion == self._params.max_tokens:
            return "length"
        if counts.prompt + counts.completion >= self._context:
            return "context"
        return None
