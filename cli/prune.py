"""`localr1 prune` and `localr1 paths`: what lies on this machine's disk, and what of it may go."""

from typing import Annotated

import typer

from localr1.cli.confirm import confirmed
from localr1.cli.library import one_line
from localr1.cli.models import embedded_digest
from localr1.cli.output import Output, format_bytes
from localr1.settings import Settings


def prune(
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Delete what serves nobody: unfinished downloads, blobs of no snapshot, half-deleted models.
    No model is touched that `localr1 list` names."""
    settings = Settings.from_environment()
    output = Output(color=settings.color)
    from localr1.hub.library import Library
    from localr1.hub.prune import leftovers
    from localr1.hub.prune import prune as delete

    library = Library.of(settings)
    found = leftovers(library, settings.cache_dir, embedded_digest())
    documents = [(leftover, leftover.to_json()) for leftover in found]
    total = sum(leftover.nbytes for leftover in found)
    if not as_json:
        if not found:
            output.note("Nothing to delete.")
            return
        rows = [(each.kind, one_line(each.of), format_bytes(each.nbytes)) for each in found]
        output.table(("KIND", "OF", "SIZE"), rows)
    gone = []
    freed = 0
    if not dry_run and found and confirmed(output, f"Delete {format_bytes(total)}?", yes):
        for leftover in found:
            size = leftover.nbytes
            if delete(leftover, library):
                gone.append(leftover)
                freed += size
            else:
                output.note(f"{one_line(leftover.of)}: in use, left as it is.")
        output.note(f"Deleted {format_bytes(freed)}.")
    if as_json:
        output.json([{**each, "deleted": leftover in gone} for leftover, each in documents])


def paths(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Where everything lies, and how much of it there is."""
    settings = Settings.from_environment()
    output = Output(color=settings.color)
    from localr1.hub.prune import disk_usage

    places = {
        "data": (settings.data_dir, "quantized models"),
        "hub cache": (settings.hub_cache, "downloads, which other programs share"),
        "state": (settings.state_dir, "what was typed into the chat"),
        "cache": (settings.cache_dir, "what can be made again"),
    }
    sizes = {name: disk_usage([path]) for name, (path, _) in places.items()}
    if as_json:
        output.json(
            {
                name.replace(" ", "_"): {
                    "path": str(path),
                    "exists": path.exists(),
                    "bytes": sizes[name],
                }
                for name, (path, _) in places.items()
            }
        )
        return
    for name, (path, what) in places.items():
        output.line(f"{name:<9}  {format_bytes(sizes[name]):>9}  {one_line(str(path))}  ({what})")
