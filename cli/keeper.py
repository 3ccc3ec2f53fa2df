"""Keeps a conversation on disk while it goes on, and takes up one that was kept."""

import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from localr1.checkpoint.fingerprint import fingerprint
from localr1.cli.answer_format import AnswerSchema
from localr1.errors import LocalR1Error
from localr1.sessions.archive import SessionArchive, SessionLock
from localr1.sessions.document import SessionDocument, new_id
from localr1.sessions.snapshot import Origin, read_snapshot, snapshot_bytes, write_snapshot

if TYPE_CHECKING:
    from localr1.cli.conversation import Conversation

SMALL_SNAPSHOT = 64 << 20
"""Bytes up to which a snapshot is written after every turn, while the user types. A larger one is
written at the end, as writing it after every turn would wear the disk out."""


@dataclass
class SessionKeeper:
    """archive: where sessions are kept. model: what the conversation is held with, a path; context,
    kv_bits: and with what of --context and --kv-bits.

    A session comes to be with its first answer. While it is open, no other process can open it.
    """

    archive: SessionArchive
    conversation: "Conversation"
    model: str
    context: int | None = None
    kv_bits: int | None = None
    document: SessionDocument | None = None
    _lock: SessionLock | None = field(default=None, repr=False)

    @cached_property
    def origin(self) -> Origin:
        """What the cache's values belong to."""
        engine = self.conversation.engine
        assert engine.path is not None
        return Origin(fingerprint(engine.path), engine.sequence.cache.form, engine.arithmetic)

    def save(self, name: str | None = None) -> SessionDocument:
        """The conversation as it is now; name: it is called so from now on. Raises OutputError,
        UsageError."""
        document = self.document
        if document is None:
            document = SessionDocument(new_id(), self.model, [])
            self._lock = self.archive.take(document.id)
            self.document = document
        if name is not None:
            self.archive.rename(document, name)
        document.model = self.model
        document.context, document.kv_bits = self.context, self.kv_bits
        document.turns = [dict(turn) for turn in self.conversation.turns]
        self._take_settings(document)
        document.changed = time.time()
        self.archive.save(document)
        return document

    def save_settings(self) -> None:
        """What was set since the last answer. Raises OutputError."""
        if self.document is None:
            return
        before = replace(self.document)
        self._take_settings(self.document)
        if self.document != before:
            self.archive.save(self.document)

    def _take_settings(self, document: SessionDocument) -> None:
        conversation = self.conversation
        document.parameters = dict(conversation.parameters)
        document.system = conversation.system
        document.thinking, document.think_budget = conversation.thinking, conversation.think_budget
        document.drops_oldest = conversation.drops_oldest
        answers = conversation.answers
        document.schema = None if answers is None else answers.schema
        document.schema_name = None if answers is None else answers.name

    def save_snapshot(self, *, if_small: bool = False) -> None:
        """What the model has read, between generations; nothing where a card's memory holds it.
        Raises OutputError."""
        engine = self.conversation.engine
        if self.document is None or engine.path is None or not engine.sequence.ids:
            return
        if not engine.sequence.cache.is_in_ram:
            return
        if if_small and snapshot_bytes(engine.sequence) > SMALL_SNAPSHOT:
            return
        hot = None if engine.experts is None else engine.experts.hot_set()
        path = self.archive.snapshot_path(self.document.id)
        write_snapshot(path, engine.sequence, self.origin, hot)

    def resume(self, session_id: str) -> str:
        """Go on with a kept conversation; returns a line that says how. Raises NotFoundError,
        FormatError and OutputError, and changes nothing then."""
        lock = self.archive.take(session_id)
        try:
            document = self.archive.load(session_id)
        except LocalR1Error:
            lock.release()
            raise
        self.leave()
        self.document, self._lock = document, lock
        conversation = self.conversation
        conversation.turns = [dict(turn) for turn in document.turns]
        conversation.parameters = dict(document.parameters)
        conversation.system = document.system
        conversation.thinking, conversation.think_budget = document.thinking, document.think_budget
        conversation.drops_oldest = document.drops_oldest
        name, schema = document.schema_name, document.schema
        wanted = None if schema is None else AnswerSchema(schema, name or "a schema")
        answers = conversation.keep_answers(wanted)
        messages = len(document.turns) // 2
        line = f"Resumed {document.title!r} ({messages} messages): {self._take_up()} {answers}"
        return line.rstrip()

    def leave(self) -> None:
        """The next save begins another session; this one is kept as it was saved last."""
        if self._lock is not None:
            self._lock.release()
        self.document = self._lock = None

    def close(self) -> None:
        """Write what was set and what the model has read, and make room in the archive. Raises
        OutputError."""
        try:
            self.save_settings()
            self.save_snapshot()
            self.archive.prune()
        finally:
            self.leave()

    def _take_up(self) -> str:
        """What the model had read of the conversation, if it is still of use."""
        assert self.document is not None
        engine = self.conversation.engine
        path = self.archive.snapshot_path(self.document.id)
        if not path.exists():
            return "it is read anew, as nothing was kept of what the model had read."
        if not engine.sequence.cache.is_in_ram:
            return "it is read anew, into the card's memory."
        begin = time.perf_counter()
        try:
            hot = read_snapshot(path, engine.sequence, self.origin)
        except LocalR1Error as error:
            return f"it is read anew: {error}"
        if isinstance(hot, str):
            return f"it is read anew, as {hot}."
        if engine.experts is not None:
            engine.experts.restore(hot)
        seconds = time.perf_counter() - begin
        return f"{len(engine.sequence.ids):,} tokens taken up in {seconds:.2f} s."
