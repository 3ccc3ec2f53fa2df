"""Options of `localr1 chat` about thinking."""

from typing import Annotated

import typer

NO_THINKING = (
    "This model's chat template has no thinking: it answers as it does, and only a thought that it "
    "opens by itself has a budget."
)
CLOSED = {
    "budget": "the thought reached its budget and was closed",
    "asked": "asked to answer: the thought was closed",
}

ThinkBudgetOption = Annotated[
    int | None,
    typer.Option(
        "--think-budget", metavar="N", min=0, help="Answer after N tokens of thinking at the most."
    ),
]
NoThinkOption = Annotated[
    bool, typer.Option("--no-think", help="Answer without thinking: an empty thinking block.")
]
