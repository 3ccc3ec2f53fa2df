"""Ctrl-C as a request to the model, not as an exception in the middle of its step."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localr1.engine.events import Event


class Interrupts:
    """stop, answer_now: what Engine.generate looks at. An interrupt while the model thinks asks it
    to answer; the next one, or one at any other time, stops it; one more interrupts as ever, and
    what unwinds then is left in peace."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.answer_now = threading.Event()
        self._in_thinking = False
        self._has_raised = False
        self._is_setting = False

    def watch(self, events: "Iterable[Event]") -> "Iterator[Event]":
        """The same events; what they say decides what an interrupt means."""
        from localr1.engine.events import Delta

        for event in events:
            if isinstance(event, Delta):
                self._in_thinking = event.channel == "thinking"
            yield event

    def interrupt(self) -> None:
        """Raises KeyboardInterrupt where the model was told to stop before."""
        if self._is_setting:
            return  # A signal within this one's handler, which holds the event's lock.
        if self._in_thinking and not self.answer_now.is_set():
            self._set(self.answer_now)
        elif not self.stop.is_set():
            self._set(self.stop)
        elif not self._has_raised:
            self._has_raised = True
            raise KeyboardInterrupt

    def _set(self, event: threading.Event) -> None:
        self._is_setting = True
        event.set()
        self._is_setting = False


@contextmanager
def catch_interrupts() -> Iterator[Interrupts]:
    """Within the block a Ctrl-C is `Interrupts.interrupt`. Outside the main thread, which gets no
    signals, nothing is ever set."""
    interrupts = Interrupts()

    def handle(number: int, frame: FrameType | None) -> None:
        interrupts.interrupt()

    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)
