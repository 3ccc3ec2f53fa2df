"""Slash commands about sessions and earlier turns: /save, /resume, /sessions, /regen, /edit."""

from localr1.cli.session import ChatSession
from localr1.cli.session_table import print_sessions
from localr1.errors import UsageError


def save(session: ChatSession, name: str) -> None:
    keeper = session.kept()
    if not session.conversation.turns:
        raise UsageError("/save", expected="a conversation", found="none yet")
    document = keeper.save(name or None)
    keeper.save_snapshot()
    session.output.note(f"Saved as {document.name or document.id}: /resume takes it up again.")


def resume(session: ChatSession, wanted: str) -> None:
    keeper = session.kept()
    if not wanted:
        list_sessions(session, "")
        return
    found = keeper.archive.find(wanted)
    if keeper.document is not None and keeper.document.id == found:
        raise UsageError("/resume", expected="another session", found="the one that is open")
    keeper.save_settings()
    keeper.save_snapshot()
    session.output.note(keeper.resume(found))


def complete_session(session: ChatSession, _: str) -> list[str]:
    if session.keeper is None:
        return []
    stored = session.keeper.archive.sessions()
    return [(each.document and each.document.name) or each.id for each in stored]


def list_sessions(session: ChatSession, rest: str) -> None:
    """Also `/sessions rm ID`."""
    keeper = session.kept()
    what, _, wanted = rest.partition(" ")
    if what == "rm" and wanted.strip():
        found = keeper.archive.find(wanted.strip())
        if keeper.document is not None and keeper.document.id == found:
            keeper.leave()
        keeper.archive.delete(found)
        session.output.note(f"Deleted {found}.")
    elif what:
        raise UsageError("/sessions", expected="nothing, or `rm ID`", found=repr(rest)[:40])
    else:
        stored = keeper.archive.sessions()
        if not stored:
            session.output.line("No session yet: one comes to be with the first answer.")
            return
        opened = None if keeper.document is None else keeper.document.id
        print_sessions(session.output, stored, opened)


def regenerate(session: ChatSession, _: str) -> None:
    conversation = session.conversation
    if not conversation.turns:
        raise UsageError("/regen", expected="an answer to give again", found="none yet")
    before = conversation.turns.copy()
    message = conversation.cut(len(before) // 2)
    try:
        session.say(message)
    finally:
        if not conversation.turns or len(conversation.turns) < len(before):
            conversation.turns[:] = before


def edit(session: ChatSession, rest: str) -> None:
    """`/edit [N] [TEXT]`: TEXT in place of message N, the last one by default; without TEXT the
    message comes back to the prompt."""
    conversation = session.conversation
    count = len(conversation.turns) // 2
    first, _, others = rest.partition(" ")
    numbered = first.isascii() and first.isdigit()
    number, text = (int(first), others.strip()) if numbered else (count, rest)
    if not 1 <= number <= count:
        raise UsageError(
            "/edit",
            expected=f"a message from 1 to {count}" if count else "a message to edit",
            found=str(number) if count else "none yet",
        )
    # The conversation as it was stays a session of its own.
    if session.keeper is not None:
        session.keeper.leave()
    message = conversation.cut(number)
    if text:
        session.say(text)
    else:
        session.draft = message
        session.output.note(f"The conversation goes on from before message {number}.")
