"""The terminal's input while no prompt reads it: no echo, and Ctrl-C where it can do no harm."""

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any, Protocol


class Painted(Protocol):
    """What erases itself, if it is there, also from a signal's handler."""

    def erase_at_once(self) -> None: ...


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Within the block Ctrl-C does nothing; what can be interrupted asks for it by itself (the
    prompt, a reply, `interruptible`). Between those lie moments in which an exception would leave a
    half-written history or a terminal without echo."""

    def nothing(number: int, frame: FrameType | None) -> None:
        """Not SIG_IGN, which the editor and other children would inherit."""

    with _handled(signal.SIGINT, nothing):
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block Ctrl-C raises KeyboardInterrupt, as everywhere outside the chat."""
    with _handled(signal.SIGINT, signal.default_int_handler):
        yield


@contextmanager
def erased_when_stopped(painted: Iterable[Painted]) -> Iterator[None]:
    """Within the block Ctrl-Z first erases what is painted, so that the shell does not write across
    it; after `fg` it is painted anew where the cursor is then. Where nobody could give it the
    terminal again, Ctrl-Z is ignored, and stays so."""
    if sys.platform == "win32" or signal.getsignal(signal.SIGTSTP) == signal.SIG_IGN:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for each in painted:
            each.erase_at_once()
        # As every program stops; it goes on in the line behind.
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, stop)

    with _handled(signal.SIGTSTP, stop):
        yield


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within the block a signal to end (`kill`, a closed window) unwinds the program, so that it
    leaves the terminal as it was, and ends it with 128 and the signal's number."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handled(signal.SIGTERM, leave):
        if sys.platform == "win32":
            yield
        else:
            with _handled(signal.SIGHUP, leave):
                yield


@contextmanager
def _handled(number: int, handler: Any) -> Iterator[None]:
    """Outside the main thread, which gets no signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)


def quiet_keyboard() -> AbstractContextManager[None]:
    """Within the block the terminal does not echo what is typed, which would tear what is painted;
    it waits for the next prompt. Afterwards the terminal is as it was. A Windows console echoes
    only while a program reads lines from it, so there is nothing to be done there."""
    return _terminal(echoes=False)


def whole_output() -> AbstractContextManager[None]:
    """Within the block Ctrl-C takes back nothing: else the system throws away what the terminal has
    not shown yet, which may be half an escape sequence, and what was typed ahead (POSIX, XBD
    11.2.5, NOFLSH). Not for a program that Ctrl-C ends: its shell would get what was typed."""
    return _terminal(takes_back=False)


@contextmanager
def _terminal(*, echoes: bool = True, takes_back: bool = True) -> Iterator[None]:
    if sys.platform == "win32" or sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    import termios

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    changed = termios.tcgetattr(descriptor)
    if not takes_back:
        changed[3] |= termios.NOFLSH
    if not echoes:
        changed[3] &= ~termios.ECHO

    def change(number: int, frame: FrameType | None) -> None:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, changed)

    try:
        change(0, None)
        # A shell that had the terminal after Ctrl-Z gives it back with echo.
        with nullcontext() if echoes else _handled(signal.SIGCONT, change):
            yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
