"""Text to the clipboard: by a tool of the desktop, else through the terminal."""

import base64
import shutil
import subprocess
import sys

from localr1.cli.output import Output
from localr1.errors import LocalR1Error

SECONDS = 5
# xterm's "manipulate selection data"; a hundred thousand bytes are what terminals commonly take.
OSC_52 = "\x1b]52;c;{}\x07"
MAX_OSC_52 = 100_000


def tools() -> list[list[str]]:
    """Commands that take the text on stdin, the likeliest first."""
    if sys.platform == "darwin":
        return [["pbcopy"]]
    if sys.platform == "win32":
        return [["clip"]]
    return [["wl-copy"], ["xclip", "-selection", "clipboard"], ["xsel", "--clipboard", "--input"]]


def copy_text(text: str, output: Output, *, over_ssh: bool) -> str:
    """Copies, and says how in a sentence. Raises LocalR1Error where there is no way to.

    over_ssh: a tool would reach the far machine's clipboard, the terminal reaches the near one."""
    size = f"{len(text):,} characters"
    ways = [_by_tool, _by_terminal]
    for way in reversed(ways) if over_ssh else ways:
        how = way(text, output)
        if how is not None:
            return f"{size} {how}"
    raise LocalR1Error(
        "there is no clipboard here",
        expected="a tool (wl-copy, xclip or xsel), or a terminal for up to 75,000 bytes",
        fix="Select the text on the screen.",
    )


def _by_tool(text: str, output: Output) -> str | None:
    # clip.exe takes UTF-16 with a mark; everything else UTF-8.
    data = text.encode("utf-16" if sys.platform == "win32" else "utf-8", errors="replace")
    for command in tools():
        if shutil.which(command[0]) is None:
            continue
        try:
            # The tools stay behind to serve the text: nothing of ours may wait for their end.
            result = subprocess.run(
                command,
                input=data,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if result.returncode == 0:
            return f"copied ({command[0]})."
    return None


def _by_terminal(text: str, output: Output) -> str | None:
    encoded = base64.b64encode(text.encode("utf-8", errors="replace")).decode()
    if len(encoded) > MAX_OSC_52 or not output.moves_cursor("stdout"):
        return None
    output.stdout.write(OSC_52.format(encoded))
    output.stdout.flush()
    return "handed to the terminal's clipboard (OSC 52), which some terminals do not allow."
