"""The real program with r1-nano in a terminal, used as a person would: typed at, resized,
interrupted at every stage."""

import base64
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if os.name == "nt":
    pytest.skip("needs pseudo-terminals", allow_module_level=True)

from terminal import (
    CTRL_C,
    CTRL_D,
    CTRL_J,
    ENTER,
    PASTE,
    PASTE_END,
    TAB,
    Terminal,
    fake_chat,
    localr1,
)

QUESTION = "What is 47 * 86?"
ANSWER = r"47*86 = \boxed{4042}"
LEAVE_SECONDS = 2.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In which r1-nano is quantized once."""
    return tmp_path_factory.mktemp("home")


Opened = Callable[..., Terminal]


@pytest.fixture
def opened(home: Path) -> Iterator[Opened]:
    """Starts commands in terminals, which are closed at the end."""
    terminals: list[Terminal] = []

    def start(
        command: list[str], *, columns: int = 80, rows: int = 24, **environment: str
    ) -> Terminal:
        variables = {"LOCALR1_HOME": str(home), "LOCALR1_THREADS": "1", **environment}
        terminals.append(Terminal(command, variables, columns=columns, rows=rows))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


@pytest.fixture
def nano(opened: Opened) -> Terminal:
    """A chat with r1-nano, at its first prompt."""
    terminal = opened(localr1("chat", "r1-nano", "--temperature", "0"))
    terminal.wait_for_prompt(1)
    return terminal


def ask(terminal: Terminal, text: str) -> str:
    """Sends one line and waits for the next prompt; returns what came between."""
    before = terminal.text().rstrip("\n")
    count = before.count("\n>>>") + before.startswith(">>>")
    terminal.send(text + ENTER)
    after = terminal.wait_for_prompt(count + 1)
    return after[after.rfind("\n>>> " + text[:20]) :].removesuffix("\n>>>")


def left(terminal: Terminal) -> None:
    """Leaves by Ctrl-D; the terminal is as it was."""
    terminal.send(CTRL_D)
    assert terminal.wait_for_end() == 0
    assert terminal.echoes()


def test_the_first_run_explains_itself(opened: Opened, tmp_path: Path) -> None:
    terminal = opened(localr1("chat", "r1-nano"), LOCALR1_HOME=str(tmp_path))
    text = terminal.wait_for_prompt(1)
    begin = text.index("This is r1-nano-int4; nothing you type leaves this machine.")
    explained = text[begin:].split("\n")[:-1]
    assert len(explained) == 5
    assert max(map(len, explained)) <= 79
    left(terminal)
    again = opened(localr1("chat", "r1-nano"), LOCALR1_HOME=str(tmp_path))
    assert again.wait_for_prompt(1).split("\n")[0] == (
        "r1-nano-int4 · /help lists the commands; Ctrl-D leaves."
    )
    left(again)


def test_a_question_and_every_command(nano: Terminal, tmp_path: Path) -> None:
    reply = ask(nano, QUESTION)
    assert "Thought for" in reply
    assert "tokens) — /think to show" in reply
    assert ANSWER in reply
    assert "47*6: 7*6=42" not in reply
    assert "47*6: 7*6=42" in ask(nano, "/think")
    assert " tok/s · TTFT " in ask(nano, "/stats")
    assert "5 layers, 16 experts each" in nano.text()
    assert "tokens: What| is" in ask(nano, "/tokens What is")
    assert "left" in ask(nano, "/tokens")
    assert "model" in ask(nano, "/show")
    assert "top_k = 3" in ask(nano, "/set parameter top_k 3")
    assert "System prompt set" in ask(nano, "/set system Be brief.")
    assert "System prompt removed" in ask(nano, "/set system")
    assert "The model answers without thinking." in ask(nano, "/set nothink")
    assert "The model thinks" in ask(nano, "/set think on")
    assert "Did you mean /clear?" in ask(nano, "/claer")
    assert "handed to the terminal's clipboard" in ask(nano, "/copy") or "copied" in nano.text()
    (tmp_path / "Größe.txt").write_text("12 + 13", encoding="utf-8")
    assert "in front of your next message" in ask(nano, f"/read {tmp_path / 'Größe.txt'}")
    assert "The conversation starts anew." in ask(nano, "/clear")
    assert "Loaded r1-nano-int4" in ask(nano, "/load r1-nano")
    assert "models here: r1-nano" in ask(nano, "/load nowhere")
    assert ANSWER in ask(nano, QUESTION)
    assert "/bye, /exit" in ask(nano, "/help")
    assert "/bye, /exit" in ask(nano, "/?")
    nano.send("/bye" + ENTER)
    assert nano.wait_for_end() == 0
    assert nano.echoes()


def test_a_german_question(nano: Terminal) -> None:
    assert "r1-nano" in ask(nano, "Hallo, wie heißt du? Grüße – 漢字 🙂")
    left(nano)


def test_help_fits_a_screen_of_24_rows(nano: Terminal) -> None:
    ask(nano, "/help")
    shown = nano.lines()
    assert shown[-1] == ">>>"
    assert any(line.startswith("/help") for line in shown)


def test_several_lines_and_a_paste(nano: Terminal, home: Path) -> None:
    nano.send(f"{PASTE}What is\n47 * 86?\n{PASTE_END}")
    nano.wait_for("... ")
    time.sleep(0.3)
    assert "Thought" not in nano.text()  # A paste never sends.
    nano.send(ENTER)
    nano.wait_for_prompt(2)
    nano.send(f"one{CTRL_J}two\\{ENTER}three{ENTER}")
    nano.wait_for_prompt(3)
    nano.send(f'"""a{ENTER}b"""{ENTER}')
    nano.wait_for_prompt(4)
    left(nano)
    history = (home / "state" / "chat_history").read_text(encoding="utf-8")
    assert "+What is\n+47 * 86?" in history
    assert "+one\n+two\n+three" in history


def test_no_history(opened: Opened, home: Path) -> None:
    terminal = opened(localr1("chat", "r1-nano", "--no-history"))
    terminal.wait_for_prompt(1)
    ask(terminal, "a secret")
    left(terminal)
    path = home / "state" / "chat_history"
    assert not path.exists() or "a secret" not in path.read_text(encoding="utf-8")


def test_keys_at_the_prompt(nano: Terminal) -> None:
    ask(nano, "/tokens first")
    nano.send("/tok" + TAB)
    nano.wait_for(lambda text: text.endswith(">>> /tokens"))
    nano.send(CTRL_C)
    nano.wait_for("Ctrl-C again leaves; so do /bye and Ctrl-D.")
    nano.send("\x12first")  # Ctrl-R
    nano.wait_for("`first'")
    nano.send(ENTER)
    nano.wait_for(lambda text: text.endswith(">>> /tokens first"))
    nano.send(ENTER)
    nano.wait_for(lambda text: text.count("tokens: f") == 2)
    nano.send("\x0c")  # Ctrl-L
    nano.wait_for(lambda _: nano.lines()[0] == ">>>")
    left(nano)


def test_the_editor(opened: Opened, tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "/tokens edited" > "$1"\n')
    editor.chmod(0o700)
    terminal = opened(localr1("chat", "r1-nano"), EDITOR=str(editor), VISUAL="")
    terminal.wait_for_prompt(1)
    terminal.send("draft\x18\x05")
    terminal.wait_for(">>> /tokens edited")
    assert "tokens: " not in terminal.text()  # It is looked at before it is sent.
    terminal.send(ENTER)
    terminal.wait_for("|edit") if "|edit" in terminal.text() else terminal.wait_for("tokens: ")
    terminal.wait_for_prompt(2)
    left(terminal)


def test_twice_ctrl_c_leaves_with_130(nano: Terminal) -> None:
    nano.send(CTRL_C)
    nano.wait_for("Ctrl-C again leaves")
    nano.send(CTRL_C)
    assert nano.wait_for_end() == 130
    assert nano.echoes()


def test_what_is_typed_during_a_reply_waits_for_the_prompt(opened: Opened) -> None:
    program = "engine = FakeEngine([answer(*['word '] * 40)], pause=0.03)"
    terminal = opened(fake_chat(program))
    terminal.wait_for_prompt(1)
    terminal.send("hi" + ENTER)
    terminal.wait_for("word word")
    terminal.send("typed ahead")
    text = terminal.wait_for(lambda text: text.endswith(">>> typed ahead"))
    assert text.count("typed ahead") == 1
    terminal.send(CTRL_C)
    left(terminal)


SLOW = """
import time
class Slow(FakeEngine):
    # A prompt of 40 parts, a thought and an answer, each long enough to be interrupted in.
    def generate(self, ids, params, cancel=None, answer_now=None):
        for done in range(40):
            if cancel.wait(0.03):
                yield Done("cancelled", Usage(3, 0, 0, 0, 0.1, 0.0))
                return
            yield Progress(done + 1, 40)
        yield from super().generate(ids, params, cancel, answer_now)
engine = Slow([thinking(*["thought "] * 60) + answer(*["word "] * 200)], pause=0.03, context=4096)
"""


def test_interrupted_while_loading(opened: Opened) -> None:
    terminal = opened(localr1("chat", "r1-nano"))
    terminal.wait_for("Loading")
    terminal.send(CTRL_C)
    assert terminal.wait_for_end() == 130
    assert "Traceback" not in terminal.text()
    assert terminal.echoes()


def test_interrupted_while_the_prompt_is_read(opened: Opened) -> None:
    terminal = opened(fake_chat(SLOW))
    terminal.wait_for_prompt(1)
    terminal.send("hi" + ENTER)
    terminal.wait_for("Reading the prompt")
    terminal.send(CTRL_C)
    text = terminal.wait_for_prompt(2)
    assert text.endswith(">>> hi\n(stopped)\n>>>")
    left(terminal)


def test_interrupted_while_it_thinks_and_while_it_answers(opened: Opened) -> None:
    terminal = opened(fake_chat(SLOW))
    terminal.wait_for_prompt(1)
    terminal.send("hi" + ENTER)
    terminal.wait_for("  thought thought")
    assert any(line.startswith("Thinking… ") for line in terminal.lines())
    terminal.send(CTRL_C)
    terminal.wait_for("word word")
    terminal.send(CTRL_C)
    text = terminal.wait_for_prompt(2)
    shown = text[text.index(">>> hi") :].split("\n")
    assert shown[1].startswith("Thought for ")
    assert shown[2].startswith("word word")
    assert "(stopped)" in shown
    assert "Thinking…" not in text
    assert "thought thought" in ask(terminal, "/think")
    left(terminal)


def test_three_interrupts_end_a_reply_that_does_not_listen(opened: Opened) -> None:
    program = """
import time
class Deaf(FakeEngine):
    def generate(self, ids, params, cancel=None, answer_now=None):
        yield Progress(1, 2)
        time.sleep(60)
engine = Deaf([answer("x")])
"""
    terminal = opened(fake_chat(program))
    terminal.wait_for_prompt(1)
    terminal.send("hi" + ENTER)
    terminal.wait_for("Reading the prompt")
    terminal.send(CTRL_C)
    time.sleep(0.2)
    terminal.send(CTRL_C)
    terminal.wait_for("(interrupted)")
    terminal.wait_for_prompt(2)
    left(terminal)


@pytest.mark.parametrize(("columns", "rows"), [(40, 24), (100, 12), (19, 24), (80, 5)])
def test_resized_while_it_thinks(columns: int, rows: int, opened: Opened) -> None:
    terminal = opened(fake_chat(SLOW))
    terminal.wait_for_prompt(1)
    terminal.send("hi" + ENTER)
    terminal.wait_for("  thought thought")
    terminal.resize(columns, rows)
    text = terminal.wait_for("word word")
    terminal.send(CTRL_C)
    text = terminal.wait_for_prompt(2)
    assert text.count("Thought for ") == 1
    assert "Thinking…" not in text
    assert "  thought" not in text
    left(terminal)


MARKDOWN = r"""
import re
text = '''# Überschrift

Ein **Satz** mit `code`, 漢字 und \\(a_1 * b_1\\).

- eins
- zwei

| Name | Zahl |
|:-----|-----:|
| 漢字 | 12 |
| b | 1,234 |

```python
def f():
    return 1
```

Ende \x1b[2J\x1b]0;title\x07 der Antwort.
'''
engine = FakeEngine([answer(*re.findall(r"\s*\S+\s?", text))], pause=0.005, context=4096)
"""
RENDERED = r"""
Überschrift

Ein Satz mit code, 漢字 und \(a_1 * b_1\).

• eins
• zwei

Name   Zahl
────  ─────
漢字     12
b     1,234

```python
def f():
    return 1
```

Ende \x1b[2J\x1b]0;title\x07 der Antwort.
>>>""".strip("\n")


def test_markdown_is_rendered_and_nothing_is_left_of_how_it_came(opened: Opened) -> None:
    terminal = opened(fake_chat(MARKDOWN))
    terminal.wait_for_prompt(1)
    text = ask(terminal, "hi") + "\n>>>"
    # pyte gives a wide character two columns, the second one empty.
    assert text.split("\n", 2)[2] == RENDERED


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_plain_terminals_get_the_text_itself(environment: dict[str, str], opened: Opened) -> None:
    terminal = opened(fake_chat(MARKDOWN), **environment)
    terminal.wait_for(">>>")
    terminal.send("hi" + ENTER)
    text = terminal.wait_for("der Antwort.")
    assert "Ein **Satz** mit `code`" in text
    assert r"\x1b[2J" in text


def test_plain_moves_and_colours_nothing(opened: Opened) -> None:
    terminal = opened(fake_chat(SLOW, "--plain"))
    terminal.wait_for_prompt(1)
    begin = len(terminal.received)
    terminal.send("hi" + ENTER)
    terminal.wait_for("word word")
    came = terminal.received[begin:]
    reply = came[came.index("thought") : came.rindex("word")]
    assert "\x1b" not in reply
    assert "Reading" not in came


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["prompt", "thinking"])
def test_a_signal_to_end_leaves_the_terminal_as_it_was(
    number: signal.Signals, when: str, opened: Opened
) -> None:
    terminal = opened(fake_chat(SLOW))
    terminal.wait_for_prompt(1)
    if when == "thinking":
        terminal.send("hi" + ENTER)
        terminal.wait_for("  thought thought")
    os.kill(terminal.child.pid, number)
    assert terminal.wait_for_end() == 128 + number
    assert terminal.echoes()
    assert "Traceback" not in terminal.text()
    assert "\n  thought" not in terminal.text()


def campaign(terminal: Terminal, home: Path, count: int, seed: int) -> None:
    """Interrupts at random moments, by the key and by the signal; the session stays whole."""
    chance = random.Random(seed)
    moments = []
    for number in range(count):
        terminal.send(f"What is {number + 11} * 86?" + ENTER)
        moments.append(chance.expovariate(1 / 0.25))
        time.sleep(moments[-1])
        if chance.random() < 0.5:
            terminal.send(CTRL_C)
        else:
            os.kill(terminal.child.pid, signal.SIGINT)
        assert terminal.child.isalive()
        # Whatever was interrupted, the next command is heard and answered.
        marker = f"mark{number}x"
        end = time.monotonic() + 60
        while f"tokens: {marker}" not in terminal.text().replace("|", ""):
            assert time.monotonic() < end, terminal.text()
            terminal.send(f"\x15/tokens {marker}" + ENTER)
            time.sleep(0.3)
        if number % 5 == 4:
            assert "The conversation starts anew." in ask(terminal, "/clear")
    assert ANSWER in ask(terminal, QUESTION)
    assert "Traceback" not in terminal.text()
    left(terminal)
    assert "What is 11 * 86?" in (home / "state" / "chat_history").read_text(encoding="utf-8")


def test_ten_interrupts_at_random_moments(nano: Terminal, home: Path) -> None:
    campaign(nano, home, 10, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_hundred_interrupts_at_random_moments(nano: Terminal, home: Path) -> None:
    campaign(nano, home, 200, seed=2)


def test_osc_52_holds_the_answer(opened: Opened, tmp_path: Path) -> None:
    terminal = opened(localr1("chat", "r1-nano", "--temperature", "0"), SSH_CONNECTION="here")
    terminal.wait_for_prompt(1)
    ask(terminal, QUESTION)
    ask(terminal, "/copy")
    sent = terminal.received.split("\x1b]52;c;")[1].split("\x07")[0]
    assert base64.b64decode(sent).decode().strip() == ANSWER
    left(terminal)
