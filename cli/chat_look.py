"""How a chat looks: its options, and what they mean at a terminal and in a pipe."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from localr1.errors import UsageError

if TYPE_CHECKING:
    from localr1.cli.printer import ReplyStyle


class ThinkChoice(StrEnum):
    FULL = "full"
    TAIL = "tail"
    HIDDEN = "hidden"


ThinkViewOption = Annotated[
    ThinkChoice | None,
    typer.Option(
        "--think-view",
        help="Thinking as it comes, its last lines, or a status line alone; default: tail in a "
        "conversation, full with -p.",
    ),
]
HideThinkingOption = Annotated[
    bool, typer.Option("--hide-thinking", help="The same as --think-view hidden.")
]
PlainOption = Annotated[
    bool, typer.Option("--plain", help="Text as it comes: no Markdown, no colour, no moving line.")
]

HINT = " — /think to show"
FIRST_RUN = """\
This is {model}; nothing you type leaves this machine.
Enter sends. The model thinks first: /think shows the whole thought afterwards.
Ctrl-C stops a reply and keeps what came; Ctrl-D at an empty prompt leaves.
/help lists commands and keys; /read FILE puts a file before your next message.
Other models: `localr1 plan` says what fits here, `localr1 pull` fetches it."""
WELCOME = "{model} · /help lists the commands; Ctrl-D leaves."


def think_view(view: ThinkChoice | None, hide: bool) -> ThinkChoice | None:
    """What the two options say together. Raises UsageError where they say different things."""
    if hide and view not in (None, ThinkChoice.HIDDEN):
        raise UsageError("--hide-thinking and --think-view", expected="one of them", found="both")
    return ThinkChoice.HIDDEN if hide else view


def conversation_style(view: ThinkChoice | None) -> "ReplyStyle":
    from localr1.cli.printer import ReplyStyle

    chosen = view or ThinkChoice.TAIL
    return ReplyStyle(has_markdown=True, thinking=chosen.value, hint=HINT)


def one_shot_style(view: ThinkChoice | None, *, as_json: bool) -> "ReplyStyle":
    """The answer as it is on stdout, ready for another program; thinking on stderr."""
    from localr1.cli.printer import ReplyStyle

    chosen = ThinkChoice.HIDDEN if as_json else view or ThinkChoice.FULL
    return ReplyStyle(has_answer=not as_json, thinking=chosen.value, stream="stderr")
