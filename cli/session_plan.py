"""Which session a chat goes on with, and where it keeps its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localr1.cli.output import Output
from localr1.errors import UsageError
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.cli.conversation import Conversation
    from localr1.cli.keeper import SessionKeeper
    from localr1.experts.hot_set import HotSet
    from localr1.sessions.archive import SessionArchive


def session_archive(settings: Settings) -> "SessionArchive":
    from localr1.sessions.archive import SessionArchive

    return SessionArchive(settings.state_dir / "sessions")


@dataclass(frozen=True)
class SessionPlan:
    """session_id: to go on with; None for a new one. keeps: whether the conversation is kept.
    model, a path, context, kv_bits: what that session was held with."""

    archive: "SessionArchive"
    keeps: bool
    session_id: str | None = None
    model: str | None = None
    context: int | None = None
    kv_bits: int | None = None

    @staticmethod
    def of(settings: Settings, wanted: str | None, *, keeps: bool) -> "SessionPlan":
        """wanted: an ID, a name, or "last". Raises NotFoundError, FormatError, UsageError."""
        archive = session_archive(settings)
        if wanted is None:
            return SessionPlan(archive, keeps)
        if not keeps:
            raise UsageError("--resume and --no-session", expected="one of them")
        found = archive.find(wanted)
        held = archive.load(found)
        return SessionPlan(archive, keeps, found, held.model, held.context, held.kv_bits)

    def hot_set(self, path: Path) -> "HotSet | None":
        """Which experts of the model at `path` were hot in that session."""
        if self.session_id is None:
            return None
        from localr1.checkpoint.fingerprint import fingerprint
        from localr1.sessions.snapshot import read_hot_set

        return read_hot_set(self.archive.snapshot_path(self.session_id), fingerprint(path))

    def open(
        self,
        conversation: "Conversation",
        path: Path,
        output: Output,
        *,
        context: int | None,
        kv_bits: int | None,
    ) -> "SessionKeeper | None":
        """path, context, kv_bits: what the conversation is held with. Takes the session up. Raises
        NotFoundError, FormatError and OutputError."""
        if not self.keeps:
            return None
        from localr1.cli.keeper import SessionKeeper

        model = str(path.absolute())
        keeper = SessionKeeper(self.archive, conversation, model, context, kv_bits)
        if self.session_id is not None:
            output.note(keeper.resume(self.session_id))
        return keeper
