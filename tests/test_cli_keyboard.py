"""What a terminal does by itself while no prompt reads it."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

if os.name == "nt":
    pytest.skip("needs pseudo-terminals", allow_module_level=True)

import pexpect
from fake_engine import wait_until

from localr1.cli.keyboard import erased_when_stopped

# What it has written is not read until the interrupt has come: by a terminal that is slow.
PROGRAM = """
import os, select, signal, sys
from contextlib import ExitStack
from pathlib import Path
from localr1.cli import keyboard
signal.signal(signal.SIGINT, lambda *_: None)
with ExitStack() as stack:
    for name in sys.argv[2:]:
        stack.enter_context(getattr(keyboard, name)())
    os.write(1, b"x" * 2000)
    Path(sys.argv[1]).touch()
    signal.pause()
    typed = select.select([0], [], [], 1)[0] and sys.stdin.readline().strip()
    print(" typed:", typed, "end", flush=True)
"""


def interrupted(written: Path, *names: str) -> str:
    """What a terminal shows in the end."""
    child = pexpect.spawn(sys.executable, ["-c", PROGRAM, str(written), *names], encoding="utf-8")
    child.delaybeforesend = None
    try:
        wait_until(written.exists, 60.0)
        time.sleep(0.1)
        child.send("typed ahead\n")
        child.sendintr()
        child.expect("end")
        return str(child.before)
    finally:
        child.close(force=True)


@pytest.mark.parametrize("names", [["whole_output"], ["whole_output", "quiet_keyboard"]])
def test_in_a_chat_an_interrupt_takes_back_neither_output_nor_input(
    names: list[str], tmp_path: Path
) -> None:
    shown = interrupted(tmp_path / "written", *names)
    assert shown.count("x") == 2000
    assert shown.endswith("typed: typed ahead ")


def test_ctrl_z_stays_ignored_where_it_is() -> None:
    before = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        with erased_when_stopped([]):
            assert signal.getsignal(signal.SIGTSTP) == signal.SIG_IGN
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        with erased_when_stopped([]):
            assert callable(signal.getsignal(signal.SIGTSTP))
        assert signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTSTP, before)


def test_what_was_typed_before_an_interrupt_does_not_reach_the_shell(tmp_path: Path) -> None:
    assert interrupted(tmp_path / "written", "quiet_keyboard").endswith("typed: [] ")
