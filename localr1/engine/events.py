"""What a generation is asked for, and what it says while it runs."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from localr1.engine.constraint import Grammar
from localr1.errors import UsageError
from localr1.experts.usage import ExpertUsage
from localr1.sampler import SamplingParams

Channel: TypeAlias = Literal["thinking", "answer"]
Reason: TypeAlias = Literal["stop", "length", "context", "cancelled"]
Closing: TypeAlias = Literal["budget", "asked"]

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1000


@dataclass(frozen=True)
class GenerationParams:
    """max_tokens: of thinking and answer together; None: until the context is full. stop: texts
    that end the answer and are not part of it; they do not count inside thinking.
    starts_in_thinking: whether the prompt ends inside a thinking block; None: look at its end.
    ignore_eos: go on after the token that ends a turn (to measure speed). think_budget: tokens of
    thinking after which the thought is closed and the answer begins; None: as long as it takes.
    grammar: what the answer must look like; a thought in front of it is free. looks_ahead: compute
    drafted tokens along, where that pays and changes no token.

    Raises UsageError for a value outside its range.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    starts_in_thinking: bool | None = None
    ignore_eos: bool = False
    think_budget: int | None = None
    grammar: Grammar | None = None
    looks_ahead: bool = False

    def __post_init__(self) -> None:
        _check_count("max_tokens", self.max_tokens, 1)
        _check_count("think_budget", self.think_budget, 0)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise UsageError(
                "stop", expected=f"at most {MAX_STOP_STRINGS} texts", found=len(self.stop)
            )
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise UsageError(
                    "stop",
                    expected=f"texts of 1 to {MAX_STOP_LENGTH} characters",
                    found=f"one of {len(text)}",
                )


def _check_count(name: str, count: int | None, least: int) -> None:
    if count is not None and (
        not isinstance(count, int) or isinstance(count, bool) or count < least
    ):
        raise UsageError(name, expected=f"a whole number from {least}", found=repr(count)[:40])


@dataclass(frozen=True)
class Usage:
    """Tokens and seconds of one generation.

    prompt_tokens: all of the prompt; cached_tokens: those of them found in the cache.
    completion_tokens: all generated, the one that ended the turn included; thinking_tokens: those
    of them inside thinking; forced_tokens: those of them that the model did not choose but was
    given, to close its thought; drafted_tokens: computed along on the chance that they come next,
    accepted_tokens: those of them that did. prefill_seconds: from the start until the first token
    was drawn (the time to first token); decode_seconds: from there to the end. experts: what the
    store of a mixture's experts did, None without one.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    thinking_tokens: int
    prefill_seconds: float
    decode_seconds: float
    experts: ExpertUsage | None = None
    forced_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Progress:
    """During prefill: `done` of `total` prompt tokens are in the cache."""

    done: int
    total: int


@dataclass(frozen=True)
class Delta:
    """A piece of text, never empty, never half a character. tokens: generated so far in this reply;
    thinking_tokens: those of them inside thinking. Both as Usage counts them at the end."""

    channel: Channel
    text: str
    tokens: int = 0
    thinking_tokens: int = 0


@dataclass(frozen=True)
class Done:
    """The last event. reason: "stop" (the model ended its turn, or a stop text came), "length"
    (max_tokens), "context" (the window is full), "cancelled". closed: what ended the thought, where
    the model did not: "budget" (think_budget) or "asked" (answer_now)."""

    reason: Reason
    usage: Usage
    closed: Closing | None = None


Event: TypeAlias = Progress | Delta | Done
