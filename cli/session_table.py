"""Sessions as they are listed."""

import time
from typing import TYPE_CHECKING

from localr1.cli.output import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from localr1.sessions.archive import StoredSession


def session_table(
    sessions: "Sequence[StoredSession]", opened: str | None = None
) -> tuple[list[str], list[list[str]]]:
    """opened: the ID of the one that is marked as open."""
    rows = []
    for each in sessions:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.changed))
        mark = " (open)" if each.id == opened else ""
        size = format_bytes(each.snapshot_bytes) if each.snapshot_bytes else "-"
        rows.append([each.id + mark, changed, f"{each.num_messages}", size, each.title])
    return ["ID", "CHANGED", "MESSAGES", "CACHE", "TITLE"], rows
