"""A real terminal emulator, tmux: it wraps lines anew when it gets narrower, as pyte does not."""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from terminal import ends_at_prompt

ENVIRONMENT = {**os.environ, "LC_ALL": "C.UTF-8"}
CTRL_C, ENTER = "C-c", "Enter"


class Tmux:
    """`command` in the one pane of a tmux server of its own, whose socket lies in `folder`."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        columns: int = 80,
        rows: int = 24,
    ) -> None:
        if shutil.which("tmux") is None:
            pytest.skip("needs tmux")
        self._socket = folder / "tmux"
        variables = [f"{name}={value}" for name, value in environment.items()]
        # What it says last stays to be read.
        whole = f"{shlex.join(['env', '-u', 'TMUX', *variables, *command])}; sleep 600"
        size = ["-x", f"{columns}", "-y", f"{rows}"]
        self._run("-f", os.devnull, "new-session", "-d", *size, whole)

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-u", "-S", str(self._socket), *arguments],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def type(self, text: str) -> None:
        self._run("send-keys", "-l", "--", text)

    def press(self, *keys: str) -> None:
        """keys: by tmux's names for them."""
        self._run("send-keys", *keys)

    def paste(self, text: str) -> None:
        """As a terminal that marks what is pasted, if the program asked for that."""
        self._run("set-buffer", "--", text)
        self._run("paste-buffer", "-p", "-r")

    def resize(self, columns: int, rows: int = 24) -> None:
        self._run("resize-window", "-x", f"{columns}", "-y", f"{rows}")

    def text(self) -> str:
        """Everything that can be seen by scrolling up, a line a row."""
        rows = self._run("capture-pane", "-p", "-S", "-").split("\n")
        return "\n".join(row.rstrip() for row in rows).rstrip("\n")

    def wait_for(self, wanted: str | Callable[[str], bool], seconds: float = 60.0) -> str:
        """The whole text once `wanted` is in it; fails with what was there instead."""
        end = time.monotonic() + seconds
        while True:
            text = self.text()
            if wanted in text if isinstance(wanted, str) else wanted(text):
                return text
            assert time.monotonic() < end, f"{wanted!r} did not come:\n{text}"
            time.sleep(0.05)

    def wait_for_prompt(self, seconds: float = 60.0) -> str:
        return self.wait_for(ends_at_prompt, seconds)

    def close(self) -> None:
        subprocess.run(
            ["tmux", "-S", str(self._socket), "kill-server"], capture_output=True, timeout=60
        )
