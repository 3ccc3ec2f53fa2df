"""The messages of one conversation and how the next reply is made. Prints nothing."""

import threading
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from localr1.chat_template import R1_ASSISTANT, ChatPrompt
from localr1.cli.answer_format import AnswerSchema, grammar_of
from localr1.cli.output import format_bytes
from localr1.engine.constraint import Grammar
from localr1.engine.engine import Engine
from localr1.engine.events import Delta, Event, GenerationParams
from localr1.errors import ContextError, LocalR1Error
from localr1.sampler import SamplingParams

LEAST_ROOM = 16
"""The share of the context, one of so many, that a reply must have: with less, turns are dropped.
"""
ROOM_MADE = 4
"""The share that is free afterwards, so that not every turn drops one, and reads all others anew.
"""


@dataclass
class Conversation:
    """engine: answers. parameters: what the user set, by the names of cli.parameters; the model's
    own defaults speak where he did not. system: the prompt or None. turns: the messages so far,
    without thinking. thinking, think_budget: as prepare_chat and GenerationParams have them.
    looks_ahead: as GenerationParams has it. drops_oldest: whether the oldest turns make room where
    the context is full; else it is an error. answers: what they must look like, None for any text
    (set_answers).
    """

    engine: Engine
    parameters: dict[str, int | float] = field(default_factory=dict)
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    thinking: bool | None = None
    think_budget: int | None = None
    looks_ahead: bool = True
    drops_oldest: bool = False
    answers: AnswerSchema | None = field(default=None, init=False)
    _grammar: Grammar | None = field(default=None, init=False, repr=False)
    dropped: int = field(default=0, init=False)

    def generation(self, **changes: int | float) -> GenerationParams:
        """What the next reply is asked for, `changes` on top. Raises UsageError for a parameter
        outside its range."""
        sampling: dict[str, Any] = {**self.engine.defaults, **self.parameters, **changes}
        max_tokens = sampling.pop("max_tokens", None)
        return GenerationParams(
            SamplingParams(**sampling),
            max_tokens,
            think_budget=self.think_budget,
            grammar=self._grammar,
            looks_ahead=self.looks_ahead,
        )

    def set_parameter(self, name: str, value: int | float) -> None:
        """Raises UsageError, and changes nothing, for a value outside its range."""
        self.generation(**{name: value})
        self.parameters[name] = value

    def set_thinking(self, thinking: bool, budget: int | None = None) -> None:
        """Whether the model thinks from the next message on, and for how many tokens at most."""
        self.thinking, self.think_budget = thinking, budget

    def set_answers(self, wanted: AnswerSchema | None) -> None:
        """What answers look like from the next message on. Raises UsageError, and changes nothing,
        for a schema that cannot be followed; UnsupportedError where this model follows none."""
        self._grammar = None if wanted is None else grammar_of(self.engine, wanted)
        self.answers = wanted

    def keep_answers(self, wanted: AnswerSchema | None) -> str:
        """`set_answers`, for a schema that was set with another model or long ago: where it cannot
        be followed here, answers are text. Returns a sentence where they are no mere text."""
        try:
            self.set_answers(wanted)
        except LocalR1Error as error:
            self.set_answers(None)
            return f"Answers are text: {error}"
        return "" if wanted is None else f"Answers are JSON: {wanted.name}."

    def clear(self) -> None:
        self.turns.clear()

    def cut(self, number: int) -> str:
        """Forget message `number`, counted from 1, and all that followed; returns the message."""
        message = self.turns[2 * number - 2]["content"]
        del self.turns[2 * number - 2 :]
        return message

    @cached_property
    def folds_system(self) -> bool:
        """Whether a system prompt goes into the first user message: R1 was trained without one, as
        its makers say, and some templates drop or refuse it."""
        template = self.engine.template
        return R1_ASSISTANT in template.source or not template.supports_system()

    def prompt(self, text: str) -> ChatPrompt:
        """The conversation with `text` as the next user message, as the model reads it."""
        messages = [dict(turn) for turn in self.turns] + [{"role": "user", "content": text}]
        if self.system is not None:
            if self.folds_system:
                messages[0]["content"] = f"{self.system}\n\n{messages[0]['content']}"
            else:
                messages.insert(0, {"role": "system", "content": self.system})
        return self.engine.prompt(messages, thinking=self.thinking)

    def coming_prompt(self) -> list[int]:
        """The ids that the next prompt begins with, whatever its message says; [] before the first
        turn. Found by asking the template twice: some write the last answer in another way as long
        as nothing follows it."""
        if not self.turns:
            return []
        first, second = (self.prompt(probe).ids for probe in ("a", "b"))
        pairs = zip(first, second, strict=False)
        return first[: next((i for i, (one, other) in enumerate(pairs) if one != other), 0)]

    def describe(self) -> dict[str, str]:
        """The state of the conversation, for people."""
        engine = self.engine
        sampling = self.generation().sampling
        max_tokens = self.parameters.get("max_tokens", "until the context is full")
        return {
            "model": engine.name,
            "kernels": f"{engine.kernels}, {engine.threads} threads",
            "weights": format_bytes(engine.model.weight_bytes),
            "context": f"{engine.context:,} tokens",
            "turns": str(len(self.turns) // 2),
            "system": self.system or "none",
            "thinking": self._describe_thinking(),
            "answers": "text" if self.answers is None else f"JSON: {self.answers.name}",
            "when full": "the oldest turns are dropped" if self.drops_oldest else "it stops",
            **{name: f"{value}" for name, value in asdict(sampling).items() if value is not None},
            "max_tokens": f"{max_tokens}",
        }

    def _describe_thinking(self) -> str:
        if not self.engine.can_think:
            return "none: the model's template has none"
        if self.thinking is False:
            return "off"
        budget = self.think_budget
        return "on" if budget is None else f"on, at most {budget:,} tokens"

    def reply(
        self, text: str, cancel: threading.Event, answer_now: threading.Event | None = None
    ) -> Generator[Event]:
        """The events of the answer to `text`; cancel, answer_now: as Engine.generate has them. The
        turn joins the conversation as soon as the reply has begun, also when it was stopped. Raises
        ContextError when the conversation no longer fits; it is then as it was. `dropped` says how
        many turns had to go."""
        prompt = self._prompt_that_fits(text)
        params = replace(self.generation(), starts_in_thinking=prompt.starts_in_thinking)
        return self._take_turn(text, self.engine.generate(prompt.ids, params, cancel, answer_now))

    def _prompt_that_fits(self, text: str) -> ChatPrompt:
        """The prompt of `text`, for which the oldest turns make room if they have to and may.
        Raises ContextError where nothing helps; nothing is dropped then."""
        prompt, context = self.prompt(text), self.engine.context
        self.dropped = 0
        if not self.drops_oldest:
            if len(prompt.ids) < context:
                return prompt
            raise ContextError(
                "the conversation fills the context",
                expected=f"at most {context - 1:,} tokens with the new message",
                found=f"{len(prompt.ids):,}",
                fix="`/set full drop-oldest` drops the oldest turns, /clear starts anew, and "
                "--context has room for more.",
            )
        if len(prompt.ids) + context // LEAST_ROOM < context:
            return prompt
        before = self.turns.copy()
        while self.turns and len(prompt.ids) + context // ROOM_MADE >= context:
            del self.turns[:2]
            prompt = self.prompt(text)
        if len(prompt.ids) >= context:
            self.turns[:] = before
            raise ContextError(
                "the message alone fills the context",
                expected=f"at most {context - 1:,} tokens",
                found=f"{len(prompt.ids):,}",
                fix="Shorten it, or choose a larger --context.",
            )
        self.dropped = (len(before) - len(self.turns)) // 2
        return prompt

    def _take_turn(self, text: str, events: Iterable[Event]) -> Generator[Event]:
        answer = ""
        begun = False
        try:
            for event in events:
                if isinstance(event, Delta):
                    begun = True
                    answer += event.text if event.channel == "answer" else ""
                yield event
        finally:
            if begun:
                self.turns.append({"role": "user", "content": text})
                self.turns.append({"role": "assistant", "content": answer})
