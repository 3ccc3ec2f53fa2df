"""Sessions on disk: found again, kept from others, bounded; damage is told and loses nothing."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localr1.errors import FormatError, LocalR1Error, NotFoundError, OutputError, UsageError
from localr1.sessions.archive import SessionArchive
from localr1.sessions.document import SessionDocument, checked_name, new_id


def document(text: str = "hello", changed: float = 0.0, name: str | None = None) -> SessionDocument:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "hi"}]
    return SessionDocument(new_id(), "/a/model", turns, name, changed=changed)


@pytest.fixture
def archive(tmp_path: Path) -> SessionArchive:
    return SessionArchive(tmp_path / "state" / "sessions")


@settings(max_examples=100, deadline=None)
@given(text=st.text(), system=st.none() | st.text())
def test_a_document_is_read_as_it_was_written(text: str, system: str | None) -> None:
    before = document(text)
    before.system, before.parameters = system, {"temperature": 0.5, "seed": 2**62}
    before.thinking, before.think_budget = True, 300
    before.drops_oldest, before.schema_name = True, text.encode("utf-8", "replace").decode()
    before.context, before.kv_bits = 4096, 8
    before.schema = {"enum": [text.encode("utf-8", "replace").decode()]}
    assert SessionDocument.from_bytes(before.to_bytes(), Path("a")) == before


def test_a_document_from_before_there_was_so_much_in_it_is_read() -> None:
    values = json.loads(document().to_bytes())
    for name in ("drops_oldest", "schema", "schema_name", "context", "kv_bits"):
        del values[name]
    again = SessionDocument.from_bytes(json.dumps(values).encode(), Path("a"))
    assert (again.drops_oldest, again.schema, again.schema_name) == (False, None, None)
    assert (again.context, again.kv_bits) == (None, None)


def test_a_schema_may_be_as_deep_as_its_own_file() -> None:
    before = document()
    for _ in range(31):
        before.schema = {"not": [before.schema]}
    assert SessionDocument.from_bytes(before.to_bytes(), Path("a")) == before


def test_a_lone_surrogate_is_no_reason_to_lose_a_conversation() -> None:
    again = SessionDocument.from_bytes(document("a\ud800b 👩").to_bytes(), Path("a"))
    assert again.turns[0]["content"] == "a\ufffdb 👩"


def test_sessions_are_found_by_id_name_and_last(archive: SessionArchive) -> None:
    old, new = document("old", 100.0, "trip to Rome"), document("new", 200.0)
    old.id = "20250101-000000-aaaa"
    for each in (old, new):
        archive.save(each)
    assert [each.id for each in archive.sessions()] == [new.id, old.id]
    assert archive.find("last") == new.id
    assert archive.find("trip to Rome") == archive.find("2025") == archive.find(old.id) == old.id
    assert archive.load(old.id) == old
    for wrong in ("rome", "2", "", "20"):
        with pytest.raises(NotFoundError):
            archive.find(wrong)
    if os.name != "nt":
        assert stat.S_IMODE(archive.document_path(old.id).stat().st_mode) == 0o600
        assert stat.S_IMODE(archive.directory.stat().st_mode) == 0o700


def test_where_there_is_none_that_is_said(archive: SessionArchive) -> None:
    assert archive.sessions() == []
    with pytest.raises(NotFoundError, match="there is no session yet"):
        archive.find("last")


def test_a_damaged_session_is_listed_and_the_others_are_found(archive: SessionArchive) -> None:
    good, bad = document("good", 100.0), document("bad", 200.0)
    for each in (good, bad):
        archive.save(each)
    path = archive.document_path(bad.id)
    whole = path.read_bytes()
    for data in (b"", whole[:40], whole.replace(b'"user"', b'"assistant"'), b"[1]", b"\xff" * 9):
        path.write_bytes(data)
        assert archive.find("last") == good.id
        stored = {each.id: each for each in archive.sessions()}
        assert "damaged" in stored[bad.id].title
        with pytest.raises(FormatError):
            archive.load(bad.id)
    archive.prune()
    assert path.exists(), "it is the user's to delete"
    archive.delete(bad.id)
    assert not path.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"format": "localr1-conversation-2"},
        {"turns": [{"role": "user", "content": "a"}]},
        {"turns": [{"role": "user"}, {"role": "assistant", "content": "b"}]},
        {"parameters": {"seed": "x"}},
        {"parameters": {"seed": True}},
        {"thinking": "yes"},
        {"begun": None},
        {"model": 3},
    ],
)
def test_what_is_no_conversation_is_refused(change: dict[str, object]) -> None:
    values = {**json.loads(document().to_bytes()), **change}
    with pytest.raises(FormatError):
        SessionDocument.from_bytes(json.dumps(values).encode(), Path("a"))


@pytest.mark.parametrize("name", ["", "  ", "last", "20250101-000000-aaaa", "a" * 61, "a\x1bb"])
def test_names_that_would_mislead_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        checked_name(name)


def test_a_name_belongs_to_one_session(archive: SessionArchive) -> None:
    first, second = document(), document()
    archive.rename(first, "  trip   to Rome ")
    archive.save(first)
    assert first.name == "trip to Rome"
    archive.rename(first, "trip to Rome")
    with pytest.raises(OutputError, match="called 'trip to Rome' already"):
        archive.rename(second, "trip to Rome")


HOLDER = """
import sys, time
from pathlib import Path
from localr1.sessions.archive import SessionArchive
lock = SessionArchive(Path(sys.argv[1])).take(sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_share_a_session(archive: SessionArchive) -> None:
    each = document()
    archive.save(each)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(archive.directory), each.id],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    for action in (archive.take, archive.delete):
        with pytest.raises(OutputError, match="is open in another localr1"):
            action(each.id)
    holder.kill()  # A process that dies lets go.
    holder.wait()
    archive.take(each.id).release()
    assert [path.suffix for path in archive.directory.iterdir()] == [".json"]


def test_what_is_kept_is_bounded(archive: SessionArchive) -> None:
    archive = SessionArchive(archive.directory, newest=3, max_snapshot_bytes=250)
    documents = [document(f"{number}", float(number)) for number in range(6)]
    documents[0].name = "kept"
    for each in documents:
        archive.save(each)
        archive.snapshot_path(each.id).write_bytes(bytes(100))
    held = archive.take(documents[1].id)
    archive.prune()
    held.release()
    left = {each.id: each.snapshot_bytes for each in archive.sessions()}
    # The three newest, the one that has a name, and the one that was open.
    assert left.keys() == {documents[number].id for number in (0, 1, 3, 4, 5)}
    assert [left[documents[number].id] for number in (0, 1, 3, 4, 5)] == [0, 100, 0, 100, 100]


def test_what_a_dead_process_left_unfinished_goes(archive: SessionArchive) -> None:
    each = document()
    archive.save(each)
    old = archive.directory / f".{each.id}.json.partial-00000000"
    new = archive.directory / f".{each.id}.json.partial-11111111"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 1e6,) * 2)
    archive.prune()
    assert not old.exists()
    assert new.exists(), "another process may be writing it"
    archive.delete(each.id)
    assert list(archive.directory.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--no-session"):
        SessionArchive(tmp_path / "file" / "sessions").save(document())
    assert issubclass(OutputError, LocalR1Error)
