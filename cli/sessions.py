"""`localr1 sessions`: the conversations that are kept, and `localr1 sessions rm`."""

from typing import Annotated

import typer

from localr1.cli.confirm import confirmed
from localr1.cli.output import Output
from localr1.cli.session_plan import session_archive
from localr1.cli.session_table import print_sessions
from localr1.errors import UsageError
from localr1.settings import Settings

app = typer.Typer(help="Conversations that are kept: list them, delete them.")


@app.callback(invoke_without_command=True)
def list_all(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Conversations that are kept, the newest first; `localr1 chat --resume ID` goes on."""
    if context.invoked_subcommand is not None:
        if as_json:
            raise UsageError("--json before a command", expected="it behind that")
        return
    output = Output.from_environment()
    stored = session_archive(Settings.from_environment()).sessions()
    if as_json:
        output.json([each.to_json() for each in stored])
    elif stored:
        print_sessions(output, stored)
    else:
        output.note("No session is kept: one comes to be with the first answer of a chat.")


@app.command()
def rm(
    wanted: Annotated[list[str], typer.Argument(metavar="ID...", help="IDs or names.")],
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Delete sessions, with all that was kept of them."""
    output = Output.from_environment()
    archive = session_archive(Settings.from_environment())
    found = list(dict.fromkeys(archive.find(each) for each in wanted))
    titles = {each.id: each.title for each in archive.sessions()}
    for each in found:
        output.note(f"{each}: {titles[each]}")
    agreed = confirmed(output, f"Delete {len(found)} of {len(titles)} sessions?", yes)
    gone = []
    try:
        for each in found if agreed else ():
            archive.delete(each)
            gone.append(each)
            output.note(f"Deleted {each}.")
    finally:  # Also when one of them is open elsewhere: those before it are gone.
        if as_json:
            output.json(
                [{"id": each, "title": titles[each], "deleted": each in gone} for each in found]
            )
    if not agreed:
        output.note("Nothing was deleted.")
        raise typer.Exit(1)
