"""Commands that tests start: the program itself, and one that talks to a model of the test's."""

import sys
from pathlib import Path


def localr1(*arguments: str) -> list[str]:
    """The program as the console script runs it."""
    return [sys.executable, "-c", "from localr1.cli.main import main; main()", *arguments]


def fake_chat(program: str, *arguments: str) -> list[str]:
    """`localr1 chat . ARGUMENTS` with the engine that `program` (Python) calls `engine`."""
    whole = FAKE_CHAT.format(program=program)
    return [sys.executable, "-c", whole, str(Path(__file__).parent), *arguments]


FAKE_CHAT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from fake_engine import *
from localr1.cli import chat, main
{program}
chat.load_conversation = lambda *_, **__: conversation(engine)
main.main(["chat", ".", *sys.argv[1:]])
"""
