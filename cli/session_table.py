"""Sessions as they are listed."""

import time
from typing import TYPE_CHECKING

from localr1.cli.cells import fit
from localr1.cli.output import Output, escape_controls, format_bytes, terminal_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from localr1.sessions.archive import StoredSession

HEADER = ("ID", "CHANGED", "MESSAGES", "CACHE", "TITLE")
OPEN = "(open) "
BEFORE_TITLE = len("20261128-190000-0000  2026-11-28 19:00  MESSAGES  1023.9 MiB  ")
"""Cells, at the most."""
MIN_TITLE = 16


def print_sessions(
    output: Output, sessions: "Sequence[StoredSession]", opened: str | None = None
) -> None:
    """opened: the ID of the one that is marked as open. On a terminal a title is cut at its
    width."""
    rows = []
    for each in sessions:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.changed))
        size = format_bytes(each.snapshot_bytes) if each.snapshot_bytes else "-"
        title = (OPEN if each.id == opened else "") + escape_controls(each.title)
        if output.is_terminal("stdout"):
            columns = terminal_size(output.stdout)[0]
            title = fit(title, max(columns - BEFORE_TITLE, MIN_TITLE))
        rows.append((each.id, changed, f"{each.num_messages}", size, title))
    output.table(HEADER, rows, left=(0, 1, 4))
