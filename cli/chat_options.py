"""Options of `localr1 chat` about replies, thinking, sessions and the form of answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localr1.cli.answer_format import AnswerSchema
from localr1.cli.output import Output
from localr1.errors import UsageError

if TYPE_CHECKING:
    from localr1.cli.conversation import Conversation

NO_THINKING = (
    "This model's chat template has no thinking: it answers as it does, and only a thought that it "
    "opens by itself has a budget."
)
FOLDED_SYSTEM = "This model takes no system prompt: it goes in front of the first message."
CLOSED = {
    "budget": "the thought reached its budget and was closed",
    "asked": "asked to answer: the thought was closed",
}

DROP_OLDEST = "drop-oldest"
ON_FULL = ("stop", DROP_OLDEST)


def session_wanted(resume: str | None, continues: bool) -> str | None:
    """What --resume and --continue ask for: an ID, a name, "last", or none. Raises UsageError for
    both."""
    if continues and resume is not None:
        raise UsageError("--resume and --continue", expected="one of them", found="both")
    return "last" if continues else resume


def drops_oldest(what: str, value: str | None) -> bool | None:
    """What --on-full or /set full, named by `what`, says; None where it says nothing. Raises
    UsageError."""
    if value is None:
        return None
    if value not in ON_FULL:
        raise UsageError(what, expected=" or ".join(ON_FULL), found=repr(value)[:40])
    return value == DROP_OLDEST


@dataclass(frozen=True)
class ReplyOptions:
    """What the command line says of replies; None, {} and False: nothing. It goes before what a
    session has kept. changes_answers: whether `answers` is meant, where that is None."""

    parameters: dict[str, int | float]
    system: str | None
    no_think: bool
    think_budget: int | None
    drops_oldest: bool | None
    changes_answers: bool
    answers: AnswerSchema | None
    looks_ahead: bool

    def __post_init__(self) -> None:
        if self.no_think and self.think_budget:
            raise UsageError("--no-think and --think-budget", expected="one of them", found="both")

    def apply(self, conversation: "Conversation", output: Output) -> None:
        """Raises UsageError for a value outside its range, or a schema that cannot be followed."""
        conversation.parameters |= self.parameters
        conversation.generation()
        conversation.looks_ahead = self.looks_ahead
        if self.system is not None:
            conversation.system = self.system
            if conversation.folds_system:
                output.note(FOLDED_SYSTEM)
        if self.drops_oldest is not None:
            conversation.drops_oldest = self.drops_oldest
        if self.changes_answers:
            conversation.set_answers(self.answers)
        if self.no_think or self.think_budget is not None:
            # A budget of nothing is an empty block, not a closed thought.
            thinks = not self.no_think and self.think_budget != 0
            conversation.set_thinking(thinks, self.think_budget or None)
            if not conversation.engine.can_think:
                output.note(NO_THINKING)


OnFullOption = Annotated[
    str | None,
    typer.Option(
        "--on-full",
        metavar="WHAT",
        help="Where the context is full: stop, the default, or drop-oldest turns.",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="json|text", help="Answer with a JSON object; thinking is free."
    ),
]
SchemaOption = Annotated[
    Path | None,
    typer.Option("--schema", metavar="FILE", help="Answer with JSON that fits this JSON schema."),
]
LookAheadOption = Annotated[
    bool,
    typer.Option(
        "--look-ahead/--no-look-ahead",
        help="Compute along what came next the last time, while it pays; changes no token.",
    ),
]
KvBitsOption = Annotated[
    int | None,
    typer.Option("--kv-bits", metavar="8|16", help="Bits of cached keys and values; default 16."),
]
ThinkBudgetOption = Annotated[
    int | None,
    typer.Option(
        "--think-budget", metavar="N", min=0, help="Answer after N tokens of thinking at the most."
    ),
]
ResumeOption = Annotated[
    str | None,
    typer.Option("--resume", metavar="ID", help="Go on with a session: its ID, name, or last."),
]
ContinueOption = Annotated[bool, typer.Option("--continue", help="Go on with the last session.")]
NoSessionOption = Annotated[
    bool, typer.Option("--no-session", help="Do not keep the conversation.")
]
NoThinkOption = Annotated[
    bool, typer.Option("--no-think", help="Answer without thinking: an empty thinking block.")
]
