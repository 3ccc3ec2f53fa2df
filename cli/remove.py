"""`localr1 rm`: models of this machine, off its disk."""

from typing import TYPE_CHECKING, Annotated

import typer

from localr1.cli.confirm import confirmed
from localr1.cli.library import one_line
from localr1.cli.output import Output, format_bytes
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.hub.removal import Removal


def remove_models(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="As `localr1 list` names them.")
    ],
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Delete models. What another revision or repository shares with them stays."""
    settings = Settings.from_environment()
    output = Output(color=settings.color)
    from localr1.hub.library import Library
    from localr1.hub.removal import plan_removals, remove

    library = Library.of(settings)
    removals = plan_removals(names, library)
    for removal in removals:
        shared = f", {format_bytes(removal.kept)} stay: others use them" if removal.kept else ""
        listed = one_line(", ".join(removal.names))
        output.note(f"{listed}: {format_bytes(removal.nbytes)}{shared} ({removal.folder})")
    total = sum(removal.nbytes for removal in removals)
    agreed = confirmed(output, f"Delete {format_bytes(total)}?", yes)
    gone: list[Removal] = []
    try:
        for removal in removals if agreed else ():
            remove(removal, library)
            gone.append(removal)
            output.note(f"Deleted {one_line(', '.join(removal.names))}.")
    finally:  # Also when one of them fails: those before it are gone.
        if as_json:
            output.json([{**each.to_json(), "deleted": each in gone} for each in removals])
    if not agreed:
        output.note("Nothing was deleted.")
        raise typer.Exit(1)
