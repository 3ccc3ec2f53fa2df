"""What is done while the user reads an answer and types the next message."""

import threading
from collections.abc import Callable


class Settling:
    """One piece of work in the background, stopped before the conversation is used again.

    An error in it is kept in `error` and loses nothing: the next turn does the same work, and
    raises where it must.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._cancel = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[threading.Event], object]) -> None:
        """work: is given an event that it looks at, and ends soon after that is set."""
        self.stop()
        cancel = self._cancel = threading.Event()

        def run() -> None:
            try:
                work(cancel)
            except Exception as error:
                self.error = error

        self._thread = threading.Thread(target=run, name="localr1-settle")
        self._thread.start()

    def stop(self) -> None:
        """Ends the work, or waits until it has ended by itself."""
        self._cancel.set()
        self.wait()

    def wait(self) -> None:
        """Until all of it is done."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
