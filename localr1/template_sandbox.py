"""Rendering a stranger's template in a process of its own, under limits."""

import json
import os
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from localr1.errors import TemplateError

WORKER = Path(__file__).with_name("template_worker.py")
START_SECONDS = 30.0
"""For the interpreter and jinja2, from a cold and busy disk; usually a tenth of a second."""
POLL_SECONDS = 0.02
FIX = "Use the chat template of the model's original release."


@dataclass(frozen=True)
class Limits:
    """Of one rendering. max_memory: bytes of the whole process. max_output: bytes of text."""

    seconds: float = 2.0
    max_memory: int = 256 << 20
    max_output: int = 4 << 20


class TemplateSandbox:
    """One template and the process that renders it, started when first needed (or by `start`),
    and again after a rendering that had to be killed. Safe to use from several threads."""

    def __init__(self, source: str, limits: Limits | None = None) -> None:
        self._source = source
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def start(self) -> None:
        """Start the process without waiting for it: it gets ready while weights are read."""
        with self._lock:
            if self._process is None:
                self._start()

    def render(self, context: Mapping[str, Any]) -> str:
        """The template's text. context: JSON values by name. Raises TemplateError."""
        try:
            request = json.dumps(context).encode("ascii")
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(
                "chat messages", expected="what JSON can hold", found=f"{error}"[:200]
            ) from error
        with self._lock:
            try:
                reply = self._ask(request)
            except BaseException:  # Ctrl-C: the reply still to come would answer the next request.
                self._stop()
                raise
            if "text" not in reply and "error" not in reply:
                self._stop()
        return self._text_of(reply)

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _ask(self, request: bytes) -> dict[str, Any]:
        if self._process is not None and self._process.poll() is not None:
            self._stop()  # It died while idle.
        if self._process is None:
            self._start()
        if not self._is_ready:
            if self._exchange(None, START_SECONDS) != {"ready": True}:
                raise TemplateError("chat template: its process did not start")
            self._is_ready = True
        return self._exchange(request, self.limits.seconds)

    def _text_of(self, reply: Mapping[str, Any]) -> str:
        if isinstance(reply.get("text"), str):
            return str(reply["text"])
        if "error" in reply:
            raise TemplateError(f"chat template: {reply['error'] or reply['kind']}", fix=FIX)
        limits = self.limits
        expected = {
            "time": f"a rendering within {limits.seconds:g} seconds",
            "memory": f"at most {limits.max_memory >> 20} MiB of memory",
            "output": f"at most {limits.max_output >> 20} MiB of text",
        }
        limit = reply.get("limit")
        if limit in expected:
            raise TemplateError("chat template", expected=expected[limit], found="more", fix=FIX)
        raise TemplateError("chat template: rendering it ended its process", fix=FIX)

    def _start(self) -> None:
        if not sys.executable:
            raise TemplateError("chat template: there is no Python interpreter to render it with")
        options: dict[str, Any] = {}
        if os.name == "nt":
            flags = ("CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW")
            options["creationflags"] = sum(getattr(subprocess, flag) for flag in flags)
        else:
            options["process_group"] = 0  # Ctrl-C at the terminal is not for it.
        # -I and -S: no environment variable, user directory or start-up file reaches it, and it
        # starts faster; it is told this process's own path instead.
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                **options,
            )
        except OSError as error:
            raise TemplateError(f"chat template: its process cannot start: {error}") from error
        self._finalizer = weakref.finalize(self, _end, self._process)
        self._is_ready = False
        # From a thread: a pipe holds some 64 KiB, and the process reads only once it has started.
        sending = (self._process.stdin, json.dumps(self._setup()).encode("ascii"))
        threading.Thread(target=_send, args=sending, daemon=True).start()

    def _setup(self) -> dict[str, Any]:
        return {
            "path": sys.path,
            "source": self._source,
            "seconds": self.limits.seconds,
            "max_memory": self.limits.max_memory,
            "max_output": self.limits.max_output,
        }

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = None
        self._finalizer = None

    def _exchange(self, request: bytes | None, seconds: float) -> dict[str, Any]:
        """Send a request and wait for the reply, or for the first limit that is crossed.

        Pipes cannot be waited for with a time limit on every platform, so a thread blocks on them;
        killing the process is what releases it.
        """
        process = self._process
        assert process is not None
        reply: dict[str, Any] = {}
        max_reply = 8 * self.limits.max_output + 4096  # JSON's escapes: six bytes a character.

        def talk() -> None:
            if request is None or _send(process.stdin, request):
                reply.update(_receive(process.stdout, max_reply))

        thread = threading.Thread(target=talk, daemon=True)
        end = time.monotonic() + seconds
        thread.start()
        thread.join(min(POLL_SECONDS, seconds))
        while thread.is_alive():
            crossed = None
            if time.monotonic() >= end:
                crossed = "time"
            elif _resident_bytes(process.pid) > self.limits.max_memory:
                crossed = "memory"
            if crossed is not None:
                process.kill()
                thread.join()
                return {"limit": crossed}
            thread.join(POLL_SECONDS)
        return reply


def _resident_bytes(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        # On Windows a virtual environment's python.exe is a launcher with the interpreter below it.
        below = process.children(recursive=True) if os.name == "nt" else []
        return sum(int(each.memory_info().rss) for each in (process, *below))
    except psutil.Error:
        return 0  # It has just ended; the pipe says so.


def _send(stream: IO[bytes] | None, data: bytes) -> bool:
    assert stream is not None
    try:
        stream.write(struct.pack(">I", len(data)) + data)
        stream.flush()
    except (OSError, ValueError):  # The process ended, or `_end` closed the pipe.
        return False
    return True


def _receive(stream: IO[bytes] | None, max_bytes: int) -> dict[str, Any]:
    """The next reply, {} when there is none."""
    assert stream is not None
    try:
        header = stream.read(4)
        if len(header) < 4 or struct.unpack(">I", header)[0] > max_bytes:
            return {}
        reply = json.loads(stream.read(struct.unpack(">I", header)[0]))
    except (OSError, ValueError):
        return {}
    return reply if isinstance(reply, dict) else {}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # Bytes that nobody will read any more.
                continue
