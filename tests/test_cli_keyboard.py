"""What a terminal does by itself while no prompt reads it."""

import os
import sys
import time
from pathlib import Path

import pytest

if os.name == "nt":
    pytest.skip("needs pseudo-terminals", allow_module_level=True)

import pexpect
from fake_engine import wait_until

PROGRAM = """
import os, signal, sys
from pathlib import Path
from localr1.cli import keyboard
signal.signal(signal.SIGINT, lambda *_: None)
with getattr(keyboard, sys.argv[1])():
    os.write(1, b"x" * 2000)
    Path(sys.argv[2]).touch()
    signal.pause()
    print(" end", sys.stdin.readline(), flush=True)
"""


@pytest.mark.parametrize("name", ["quiet_keyboard", "whole_output"])
def test_an_interrupt_takes_back_neither_output_nor_input(name: str, tmp_path: Path) -> None:
    written = tmp_path / "written"
    child = pexpect.spawn(sys.executable, ["-c", PROGRAM, name, str(written)], encoding="utf-8")
    child.delaybeforesend = None
    try:
        # Nothing is read here until the interrupt has come: a terminal that is slow.
        wait_until(written.exists, 60.0)
        time.sleep(0.1)
        child.send("typed ahead\n")
        child.sendintr()
        child.expect("end typed ahead")
        assert child.before.count("x") == 2000
    finally:
        child.close(force=True)
