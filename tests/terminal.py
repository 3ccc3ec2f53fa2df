"""A person at a terminal: a program in a pseudo-terminal, and the screen as it would be seen."""

import codecs
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import pexpect
import pyte

ENTER, TAB, CTRL_C, CTRL_D, CTRL_J = "\r", "\t", "\x03", "\x04", "\n"
PASTE, PASTE_END = "\x1b[200~", "\x1b[201~"
HISTORY = 2000


PROMPT = ">>>"


def ends_at_prompt(text: str) -> bool:
    return text.split("\n")[-1].rstrip() == PROMPT


def num_prompts(text: str) -> int:
    return sum(line.startswith(PROMPT) for line in text.split("\n"))


class Screen(pyte.HistoryScreen):
    """answer: takes what a terminal says by itself, when it is asked where its cursor is."""

    def __init__(self, columns: int, rows: int, answer: Callable[[str], None]) -> None:
        super().__init__(columns, rows, history=HISTORY, ratio=0.001)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data)

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        """As terminals do it, unlike pyte: rows that scroll away are kept, those below go first."""
        rows = lines or self.lines
        while self.cursor.y >= rows:
            y = self.cursor.y
            self.cursor.y = self.lines - 1
            self.index()
            self.cursor.y = y - 1
        for row in range(rows, self.lines):
            self.buffer.pop(row, None)
        self.lines = rows
        super().resize(rows, columns)

    def shown(self) -> list[str]:
        """What is on the screen, top to bottom, without the blank rest."""
        return [line.rstrip() for line in self.display]

    def scrolled(self) -> list[str]:
        """What has left the screen at the top."""
        return [_row_text(row, self.columns) for row in self.history.top]

    def everything(self) -> str:
        return "\n".join([*self.scrolled(), *self.shown()]).rstrip("\n")


def _row_text(row: Mapping[int, "pyte.screens.Char"], columns: int) -> str:
    # A wide character is followed by an empty cell.
    return "".join(row[column].data for column in range(columns)).rstrip()


class Terminal:
    """`command` in a pseudo-terminal of its own, read as it writes."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        columns: int = 80,
        rows: int = 24,
    ) -> None:
        self._lock = threading.RLock()
        self.received = ""
        self._echoes = False
        self.child = pexpect.spawn(
            command[0],
            list(command[1:]),
            env={**os.environ, "TERM": "xterm-256color", **environment},
            dimensions=(rows, columns),
            encoding="utf-8",
            timeout=60,
        )
        self.child.delaybeforesend = None
        self.screen = Screen(columns, rows, self.send)
        self._stream = pyte.Stream(self.screen)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # Not by the library, which asks for the child's end on every read: so does the thread that
        # waits, and only one of two gets it.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            try:
                received = os.read(self.child.child_fd, 65536)
            except OSError:
                return
            if not received:
                return
            data = decoder.decode(received)
            with self._lock:
                self.received += data
                self._stream.feed(data)

    def send(self, text: str) -> None:
        self.child.send(text)

    def resize(self, columns: int, rows: int) -> None:
        with self._lock:
            self.screen.resize(rows, columns)
            self.child.setwinsize(rows, columns)

    def text(self) -> str:
        """Everything that can be seen by scrolling up."""
        with self._lock:
            return self.screen.everything()

    def lines(self) -> list[str]:
        with self._lock:
            return self.screen.shown()

    def wait_for(self, wanted: str | Callable[[str], bool], seconds: float = 60.0) -> str:
        """The whole text once `wanted` is in it; fails with what was there instead."""
        end = time.monotonic() + seconds
        while True:
            text = self.text()
            if wanted in text if isinstance(wanted, str) else wanted(text):
                return text
            ended = not self.child.isalive()
            if ended and not self._reader.is_alive():
                text = self.text()
                if wanted in text if isinstance(wanted, str) else wanted(text):
                    return text
            assert not ended, f"the program ended without {wanted!r}:\n{text}"
            assert time.monotonic() < end, f"{wanted!r} did not come:\n{text}"
            time.sleep(0.02)

    def wait_for_prompt(self, count: int = 1, seconds: float = 60.0) -> str:
        """Until the prompt stands there for the `count`-th time, with nothing behind it."""
        return self.wait_for(
            lambda text: ends_at_prompt(text) and num_prompts(text) >= count, seconds
        )

    def is_at_prompt(self) -> bool:
        return ends_at_prompt(self.text())

    def prompts(self) -> int:
        """How often the chat has asked for a message, the prompt that stands there included."""
        return num_prompts(self.wait_for_prompt())

    def answer_to(self, keys: str, seconds: float = 60.0, *, before: str | None = None) -> str:
        """Sends keys; returns all that came between the prompt and the next one. before: what was
        there at an empty prompt, where something is typed already."""
        # Counted in what was looked at, as the prompt is drawn anew from time to time.
        before = self.wait_for_prompt() if before is None else before
        self.send(keys)
        text = self.wait_for_prompt(num_prompts(before) + 1, seconds)
        begin = len(before.rpartition("\n")[0])
        _, _, answer = text[begin:].lstrip("\n").partition("\n")
        return answer.removesuffix(PROMPT).rstrip("\n")

    def wait_for_end(self, seconds: float = 60.0) -> int:
        """The exit status; that of a signal is negative."""
        end = time.monotonic() + seconds
        while self.child.isalive():
            assert time.monotonic() < end, f"it does not end:\n{self.text()}"
            time.sleep(0.02)
        self._reader.join(timeout=10)
        self._echoes = bool(self.child.getecho())
        self.child.close()
        status = self.child.exitstatus
        return int(status) if status is not None else -int(self.child.signalstatus)

    def echoes(self) -> bool:
        """Whether the program left the terminal showing what is typed, as a shell expects it."""
        return self._echoes

    def close(self) -> None:
        """Ends the program, whatever it does."""
        if self.child.isalive():
            self.child.kill(signal.SIGKILL)
            self.child.wait()
        self._reader.join(timeout=10)
        self.child.close()
