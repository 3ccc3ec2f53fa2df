"""The chat in tmux, which wraps anew what stands there when its window gets narrower: at every
stage of a reply, down to 20 columns, and nothing is left of what was painted."""

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if os.name == "nt":
    pytest.skip("needs tmux", allow_module_level=True)

from terminal import ends_at_prompt
from terminal_programs import fake_chat
from tmux import CTRL_C, ENTER, Tmux

# A prompt, a thought and an answer that go on until they are interrupted: full lines, wide glyphs.
ENDLESS = """
import itertools
words = ["planets ", "漢字 ", "🙂 ", "nearest ", "to ", "the ", "sun, ", "Größe ", "e\u0301tude "]
class Endless(FakeEngine):
    def generate(self, ids, params, cancel, answer_now):
        reads = self.prompts[-1][-1]["content"] == "read"
        tokens, thinking = 0, 0
        while reads and not cancel.is_set():
            yield Progress(1, 3)
            time.sleep(0.01)
        for word in itertools.cycle(words):
            if cancel.is_set() or answer_now.is_set():
                break
            tokens, thinking = tokens + 1, thinking + 1
            yield Delta("thinking", word, tokens, thinking)
            time.sleep(0.01)
        for word in itertools.chain(["Done.\\n\\n"], itertools.cycle(words)):
            if cancel.is_set():
                break
            tokens += 1
            yield Delta("answer", word, tokens, thinking)
            time.sleep(0.01)
        closed = "asked" if answer_now.is_set() else None
        yield Done("cancelled", Usage(3, 0, tokens, thinking, 0.1, 1.0), closed)
engine = Endless([], context=100000)
engine.name = "stand-in"
"""
STATUS = re.compile(r"Thinking… \d+ s")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tmux]:
    folder = tmp_path_factory.mktemp("tmux")
    terminal = Tmux(folder, fake_chat(ENDLESS), {"LOCALR1_HOME": str(folder / "home")})
    yield terminal
    terminal.close()


@pytest.fixture
def chat(opened: Tmux) -> Tmux:
    """At an empty prompt at the bottom of a full screen of 80 columns and 24 rows. (Where there is
    room below, tmux keeps it: as many rows as lines grow by leave at the top, the cursor's too.)"""
    opened.resize(80)
    opened.wait_for_prompt()
    opened.type("/help")
    opened.press(ENTER)
    opened.wait_for(lambda text: ends_at_prompt(text) and "twice it leaves" in text)
    return opened


def since(text: str, begin: str) -> str:
    """What is there from the last `begin` on; nothing before there is one."""
    _, found, rest = text.rpartition(begin)
    return found + rest if found else ""


Sizes = list[tuple[int, int]]
SIZES: list[Sizes] = [[(40, 24), (20, 24)], [(20, 24), (100, 24)], [(100, 30), (60, 8), (19, 24)]]


def resized(
    chat: Tmux, size: tuple[int, int], is_clean: Callable[[str], bool] = lambda _: True
) -> None:
    """Until nothing is left of what was painted before, which is for ever if anything is."""
    chat.resize(*size)
    time.sleep(0.4)  # Most often tmux has told the program then, and that has painted.
    chat.wait_for(is_clean, seconds=10)


def ask(chat: Tmux, text: str) -> None:
    chat.type(text)
    chat.press(ENTER)


def is_one_status(text: str) -> bool:
    return bool(re.fullmatch(r">>> read\nReading the promp[^\n]*", since(text, ">>> read")))


def is_one_thought(text: str) -> bool:
    lines = since(text, ">>> think").split("\n")
    is_status = [STATUS.match(line) is not None for line in lines]
    return len(STATUS.findall(text)) == 1 and is_status[1:2] == [True] and len(lines) <= 2 + 6


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_resized_while_the_prompt_is_read(sizes: Sizes, chat: Tmux) -> None:
    ask(chat, "read")
    chat.wait_for("Reading the prompt")
    for size in sizes:
        resized(chat, size, is_one_status)
    chat.press(CTRL_C)
    assert since(chat.wait_for_prompt(), ">>> read") == ">>> read\n(stopped)\n>>>"


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_resized_while_it_thinks(sizes: Sizes, chat: Tmux) -> None:
    ask(chat, "think")
    chat.wait_for(lambda text: since(text, ">>> think").count("planets") > 5)
    for size in sizes:
        resized(chat, size, is_one_thought)
    chat.press(CTRL_C)
    chat.wait_for(lambda text: "\nDone." in since(text, ">>> think"))
    chat.press(CTRL_C)
    text = chat.wait_for_prompt()
    assert "Thinking" not in text
    shown = since(text, ">>> think").replace("\n", "").replace(" ", "")
    assert re.match(r">>>thinkThoughtfor\d+s\([\d,]+tokens\)—/thinktoshowDone\.", shown)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_resized_while_it_answers(sizes: Sizes, chat: Tmux) -> None:
    """A paragraph that is not closed yet is painted again and again: at the end it is there once,
    every word of it in its place."""
    ask(chat, "answer")
    chat.wait_for(lambda text: "Thinking…" in since(text, ">>> answer"))
    chat.press(CTRL_C)
    chat.wait_for(lambda text: since(text, ">>> answer").count("sun") > 5)
    for size in sizes:
        resized(chat, size)
    chat.press(CTRL_C)
    shown = since(chat.wait_for_prompt(), "Done.").replace("\n", "").replace(" ", "")
    words = "planets漢字🙂nearesttothesun,Größee\u0301tude"
    paragraph, notes, _ = shown.removeprefix("Done.").partition("(askedtoanswer")
    assert notes
    assert paragraph.startswith(words)
    assert (words * (len(paragraph) // len(words) + 1)).startswith(paragraph)


def test_a_paste_of_several_lines_is_not_sent(chat: Tmux) -> None:
    chat.paste("Größe 漢字 🙂\n  zweite Zeile\n")
    text = chat.wait_for("zweite Zeile")
    time.sleep(0.3)
    assert since(text, ">>> ").split("\n")[:2] == [">>> Größe 漢字 🙂", "...   zweite Zeile"]
    assert "Thinking" not in since(chat.text(), ">>> Größe")
    chat.press(ENTER)
    chat.wait_for(lambda text: "Thinking…" in since(text, ">>> Größe"))
    chat.press(CTRL_C)
    chat.press(CTRL_C)
    assert "\n(stopped" in since(chat.wait_for_prompt(), ">>> Größe")


def stopped_and_continued(shell: Tmux, question: str, painted: str) -> None:
    """By Ctrl-Z, as soon as `painted` is there, and by `fg`, until it is there again."""
    ask(shell, question)
    shell.wait_for(lambda text: painted in since(text, f">>> {question}"))
    shell.press("C-z")
    shown = since(shell.wait_for(lambda text: text.endswith("$")), f">>> {question}")
    stopped = rf">>> {question}\n+\[1\]\+ +Stopped .*/chat\n\$"
    assert re.fullmatch(stopped, shown, re.DOTALL), shown
    assert painted not in shown
    ask(shell, "fg")
    shell.wait_for(lambda text: painted in since(text, "$ fg"))


def test_a_shell_that_gets_the_terminal_back_finds_it_clean(tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("needs bash, for its jobs")
    program = tmp_path / "chat"
    program.write_text(f"#!/bin/sh\nexec {shlex.join(fake_chat(ENDLESS))}\n", encoding="utf-8")
    program.chmod(0o700)
    variables = {"LOCALR1_HOME": str(tmp_path / "home"), "PS1": "$ "}
    shell = Tmux(tmp_path, ["bash", "--norc", "--noprofile", "-i"], variables)
    try:
        shell.wait_for(lambda text: text.endswith("$"))
        ask(shell, str(program))
        shell.wait_for_prompt()
        stopped_and_continued(shell, "read", "Reading the prompt")
        shell.press(CTRL_C)
        shell.wait_for_prompt()
        stopped_and_continued(shell, "think", "planets")
        shell.press(CTRL_C)
        shell.wait_for(lambda text: "\nDone." in since(text, "$ fg"))
        shell.press(CTRL_C)
        text = shell.wait_for_prompt()
        assert "Thinking" not in text
        assert "Reading" not in text
    finally:
        shell.close()


CORNER = """
import time
from localr1.cli.live import LiveRegion
from localr1.cli.output import Output
output = Output()
with output.progress("working"):
    time.sleep(0.2)
region = LiveRegion(output.stdout)
region.paint(["status", "tail"])
time.sleep(0.2)
region.clear()
output.line("done")
"""


def test_nothing_is_left_of_lines_in_the_corner_of_the_screen(tmp_path: Path) -> None:
    terminal = Tmux(tmp_path, [sys.executable, "-c", CORNER], {})
    try:
        assert terminal.wait_for("done") == "done"
    finally:
        terminal.close()
