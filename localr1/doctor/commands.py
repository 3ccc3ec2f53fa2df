"""What the system's own programs say, where no file of it can be read."""

import subprocess
from collections.abc import Callable, Sequence
from typing import Final

SECONDS: Final = 2.0
MAX_CHARACTERS: Final = 1 << 16

Command = Callable[[Sequence[str]], str]


def run(command: Sequence[str]) -> str:
    """What it prints; "" where it cannot be run or does not end."""
    try:
        result = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout[:MAX_CHARACTERS]
