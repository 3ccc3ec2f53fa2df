"""The real program with r1-nano in a terminal, used as a person would: typed at, resized,
interrupted at every stage."""

import base64
import os
import random
import re
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
)
from terminal_programs import fake_chat, localr1

QUESTION = "What is 47 * 86?"
ANSWER = r"47*86 = \boxed{4042}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In which r1-nano is quantized once."""
    return tmp_path_factory.mktemp("home")


Opened = Callable[..., Terminal]


@pytest.fixture(scope="module")
def opened(home: Path) -> Iterator[Opened]:
    """Starts a command in a terminal, once: the next test goes on where this one was, at a prompt
    and after /clear, for a start costs seconds. One that a test ended is started again."""
    terminals: dict[tuple[str, ...], Terminal] = {}

    def start(command: list[str], **environment: str) -> Terminal:
        key = (*command, *environment.values())
        if key in terminals:
            terminal = terminals[key]
            if terminal.child.isalive() and terminal.is_at_prompt():
                terminal.resize(80, 24)
                terminal.answer_to("/clear" + ENTER)
                return terminal
            terminal.close()
        variables = {"LOCALR1_HOME": str(home), "LOCALR1_THREADS": "1", **environment}
        terminals[key] = Terminal(command, variables)
        return terminals[key]

    yield start
    for terminal in terminals.values():
        terminal.close()


@pytest.fixture
def nano(opened: Opened) -> Terminal:
    """A chat with r1-nano, at a prompt."""
    terminal = opened(localr1("chat", "r1-nano", "--temperature", "0"))
    terminal.wait_for_prompt()
    return terminal


@pytest.fixture
def slow(opened: Opened) -> Terminal:
    """A chat with a model that takes its time, at a prompt."""
    terminal = opened(fake_chat(SLOW))
    terminal.wait_for_prompt()
    return terminal


def ask(terminal: Terminal, text: str) -> str:
    return terminal.answer_to(text + ENTER)


def left(terminal: Terminal) -> None:
    """Leaves by Ctrl-D; the terminal is as it was."""
    terminal.send(CTRL_D)
    assert terminal.wait_for_end() == 0
    assert terminal.echoes()
    assert "Traceback" not in terminal.text()


def test_the_first_run_explains_itself(opened: Opened, tmp_path: Path) -> None:
    terminal = opened(localr1("chat", "r1-nano"), LOCALR1_HOME=str(tmp_path))
    text = terminal.wait_for_prompt()
    begin = text.index("This is r1-nano-int4; nothing you type leaves this machine.")
    explained = text[begin:].split("\n")[:-1]
    assert len(explained) == 5
    assert max(map(len, explained)) <= 79
    left(terminal)
    again = opened(localr1("chat", "r1-nano"), LOCALR1_HOME=str(tmp_path))
    assert again.wait_for_prompt().split("\n")[0] == (
        "r1-nano-int4 · /help lists the commands; Ctrl-D leaves."
    )
    left(again)


def test_a_question_and_every_command(nano: Terminal, tmp_path: Path) -> None:
    reply = ask(nano, QUESTION)
    assert re.fullmatch(
        r"Thought for \d+ s \(\d+ tokens\) — /think to show\n" + re.escape(ANSWER), reply
    )
    assert "47*6: 7*6=42" in ask(nano, "/think")
    stats = ask(nano, "/stats")
    assert " tok/s · TTFT " in stats
    assert "5 layers, 16 experts each" in stats
    assert "tokens: What| is" in ask(nano, "/tokens What is").replace("W|hat", "What")
    assert "left" in ask(nano, "/tokens")
    assert ask(nano, "/show").startswith("model")
    assert ask(nano, "/set parameter top_k 3") == "top_k = 3"
    assert "System prompt set" in ask(nano, "/set system Be brief.")
    assert "System prompt removed" in ask(nano, "/set system")
    assert ask(nano, "/set nothink") == "The model answers without thinking."
    assert "The model thinks" in ask(nano, "/set think on")
    assert "Did you mean /clear?" in ask(nano, "/claer")
    assert re.search(r"characters (copied|handed to the terminal's)", ask(nano, "/copy"))
    (tmp_path / "Größe.txt").write_text("12 + 13", encoding="utf-8")
    read = ask(nano, f"/read {tmp_path / 'Größe.txt'}").replace("\n", "")
    assert "Größe.txt: " in read
    assert ask(nano, "/clear") == "The conversation starts anew."
    assert "Loaded r1-nano-int4" in ask(nano, "/load r1-nano")
    assert "models here: r1-nano" in ask(nano, "/load nowhere").replace("\n", "")
    assert ANSWER in ask(nano, QUESTION)
    assert ask(nano, "/?") == ask(nano, "/help")
    nano.send("/bye" + ENTER)
    assert nano.wait_for_end() == 0
    assert nano.echoes()


def test_help_fits_a_screen_of_24_rows(nano: Terminal) -> None:
    ask(nano, "/help")
    assert any(line.startswith("/help") for line in nano.lines())
    assert ">>>" in nano.lines()


def test_a_german_question(nano: Terminal) -> None:
    assert "r1-nano" in ask(nano, "Hallo, wie heißt du? Grüße – 漢字 🙂")


def test_several_lines_and_a_paste(nano: Terminal, home: Path) -> None:
    before = nano.wait_for_prompt()
    nano.send(f"{PASTE}What is\n47 * 86?\n{PASTE_END}")
    nano.wait_for("... 47 * 86?")
    time.sleep(0.3)
    assert "Thought for" not in nano.text().removeprefix(before)  # A paste never sends.
    assert "Thought for" in nano.answer_to(ENTER, before=before)
    nano.answer_to(f"one{CTRL_J}two\\{ENTER}three{ENTER}")
    nano.answer_to(f'"""a{ENTER}b"""{ENTER}')
    left(nano)
    history = (home / "state" / "chat_history").read_text(encoding="utf-8")
    assert "+What is\n+47 * 86?" in history
    assert "+one\n+two\n+three" in history


def test_keys_at_the_prompt(nano: Terminal) -> None:
    ask(nano, "/tokens first")
    before = nano.wait_for_prompt()
    nano.send("/tok" + TAB)
    nano.wait_for(lambda text: text.endswith(">>> /tokens"))
    assert "Ctrl-C again leaves; so do /bye and Ctrl-D." in nano.answer_to(CTRL_C, before=before)
    before = nano.wait_for_prompt()
    nano.send("\x12first")  # Ctrl-R
    nano.wait_for("I-search backward: first")
    nano.send(ENTER)
    nano.wait_for(lambda text: text.endswith(">>> /tokens first"))
    assert "tokens: " in nano.answer_to(ENTER, before=before)
    nano.send("\x0c")  # Ctrl-L
    nano.wait_for(lambda _: nano.lines()[0] == ">>>")


def test_the_editor_and_no_history(opened: Opened, tmp_path: Path, home: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "/tokens a secret" > "$1"\n')
    editor.chmod(0o700)
    terminal = opened(localr1("chat", "r1-nano", "--no-history"), EDITOR=str(editor), VISUAL="")
    before = terminal.wait_for_prompt()
    terminal.send("draft\x18\x05")  # Ctrl-X Ctrl-E
    terminal.wait_for(">>> /tokens a secret")
    assert "tokens: " not in terminal.text()  # It is looked at before it is sent.
    assert "tokens: " in terminal.answer_to(ENTER, before=before)
    left(terminal)
    path = home / "state" / "chat_history"
    assert not path.exists() or "secret" not in path.read_text(encoding="utf-8")


def test_twice_ctrl_c_leaves_with_130(nano: Terminal) -> None:
    nano.answer_to(CTRL_C)
    nano.send(CTRL_C)
    assert nano.wait_for_end() == 130
    assert nano.echoes()


SLOW = """
class Slow(FakeEngine):
    # A prompt of 40 parts, a thought and an answer, each long enough to be interrupted in; a
    # message of "deaf" is not interrupted by a first Ctrl-C.
    def generate(self, ids, params, cancel=None, answer_now=None):
        if self.prompts[-1][-1]["content"] == "deaf":
            yield Progress(1, 2)
            threading.Event().wait(60)
        for done in range(40):
            if cancel.wait(0.03):
                yield Done("cancelled", Usage(3, 0, 0, 0, 0.1, 0.0))
                return
            yield Progress(done + 1, 40)
        yield from super().generate(ids, params, cancel, answer_now)
engine = Slow([thinking(*["thought "] * 60) + answer(*["word "] * 200)], pause=0.03, context=4096)
"""


def test_interrupted_while_loading(opened: Opened, home: Path) -> None:
    terminal = opened(localr1("chat", "r1-nano", "--seed", "1"))
    terminal.wait_for("Loading")
    terminal.send(CTRL_C)
    assert terminal.wait_for_end() == 130
    assert "Traceback" not in terminal.text()
    assert terminal.echoes()


def test_interrupted_while_the_prompt_is_read(slow: Terminal) -> None:
    prompts = slow.prompts()
    slow.send("hi" + ENTER)
    slow.wait_for("Reading the prompt")
    slow.send(CTRL_C)
    text = slow.wait_for_prompt(prompts + 1)
    assert text.endswith(">>> hi\n(stopped)\n>>>")


def test_interrupted_while_it_thinks_and_while_it_answers(slow: Terminal) -> None:
    prompts = slow.prompts()
    slow.send("go on" + ENTER)
    slow.wait_for("  thought thought")
    assert any(line.startswith("Thinking… ") for line in slow.lines())
    slow.send(CTRL_C)
    slow.wait_for("word word")
    slow.send(CTRL_C)
    text = slow.wait_for_prompt(prompts + 1)
    shown = text[text.index(">>> go on") :].split("\n")
    assert shown[1].startswith("Thought for ")
    assert shown[2].startswith("word word")
    assert "(stopped)" in shown
    assert "Thinking…" not in text
    assert "thought thought" in ask(slow, "/think")


def test_two_interrupts_end_a_reply_that_does_not_listen(slow: Terminal) -> None:
    prompts = slow.prompts()
    slow.send("deaf" + ENTER)
    slow.wait_for("Reading the prompt")
    slow.send(CTRL_C)
    time.sleep(0.2)
    slow.send(CTRL_C)
    slow.wait_for("(interrupted)")
    slow.wait_for_prompt(prompts + 1)


@pytest.mark.parametrize(("columns", "rows"), [(40, 24), (100, 12), (19, 24), (80, 5)])
def test_resized_while_it_thinks(columns: int, rows: int, slow: Terminal) -> None:
    prompts = slow.prompts()
    slow.send(f"resized {columns}" + ENTER)
    slow.wait_for("  thought thought")
    slow.resize(columns, rows)
    slow.wait_for(lambda text: text.rstrip().endswith("word"))
    slow.send(CTRL_C)
    text = slow.wait_for_prompt(prompts + 1)
    assert "Thinking…" not in text
    assert "  thought" not in text


def test_what_is_typed_during_a_reply_waits_for_the_prompt(slow: Terminal) -> None:
    slow.send("type" + ENTER)
    slow.wait_for("  thought thought")
    slow.send("typed " + CTRL_C + "ahead")
    slow.wait_for("word word")
    slow.send(CTRL_C)
    text = slow.wait_for(lambda text: text.endswith(">>> typed ahead"))
    assert text.count("typed ahead") == 1
    slow.send("\x15")
    slow.wait_for(lambda _: slow.is_at_prompt())


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

Ende \x1b[2J\x1b]0;title\x07 der Antwort.""".strip("\n")


def test_markdown_is_rendered_and_nothing_is_left_of_how_it_came(opened: Opened) -> None:
    terminal = opened(fake_chat(MARKDOWN))
    terminal.wait_for_prompt()
    assert ask(terminal, "hi") == RENDERED


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_plain_terminals_get_the_text_itself(environment: dict[str, str], opened: Opened) -> None:
    terminal = opened(fake_chat(MARKDOWN), **environment)
    terminal.wait_for(">>>")
    # A dumb terminal shows the prompt before it listens to keys.
    terminal.send("hi")
    terminal.wait_for(">>> hi")
    time.sleep(0.5)
    terminal.send(ENTER)
    text = terminal.wait_for("der Antwort.")
    assert "Ein **Satz** mit `code`" in text
    assert r"\x1b[2J" in text


def test_plain_moves_and_colours_nothing(opened: Opened) -> None:
    terminal = opened(fake_chat(SLOW, "--plain"))
    terminal.wait_for_prompt()
    begin = len(terminal.received)
    terminal.send("hi" + ENTER)
    terminal.wait_for("word word")
    came = terminal.received[begin:]
    reply = came[came.index("thought") : came.rindex("word")]
    assert "\x1b" not in reply
    assert "Reading" not in came


@pytest.mark.parametrize(
    ("number", "is_thinking"), [(signal.SIGTERM, False), (signal.SIGHUP, True)]
)
def test_a_signal_to_end_leaves_the_terminal_as_it_was(
    number: signal.Signals, is_thinking: bool, slow: Terminal
) -> None:
    if is_thinking:
        slow.send("hi" + ENTER)
        slow.wait_for("  thought thought")
    os.kill(slow.child.pid, number)
    assert slow.wait_for_end() == 128 + number
    assert slow.echoes()
    assert "Traceback" not in slow.text()
    assert "\n  thought" not in slow.text()


def test_osc_52_holds_the_answer(opened: Opened) -> None:
    terminal = opened(localr1("chat", "r1-nano", "--temperature", "0"), SSH_CONNECTION="here")
    terminal.wait_for_prompt()
    ask(terminal, QUESTION)
    ask(terminal, "/copy")
    sent = terminal.received.split("\x1b]52;c;")[1].split("\x07")[0]
    assert base64.b64decode(sent).decode().strip() == ANSWER


HEARD = re.compile(r"\(stopped\)|\(asked to answer|\(interrupted\)|Ctrl-C again leaves")


def campaign(terminal: Terminal, home: Path, count: int, seed: int) -> None:
    """Interrupts at random moments, by the key and by the signal; the session stays whole."""
    chance = random.Random(seed)
    for number in range(count):
        question = f">>> What is {number + 11} *"
        terminal.send(f"What is {number + 11} * 86?" + ENTER)
        terminal.wait_for(question)
        time.sleep(chance.expovariate(1 / 0.25))
        if chance.random() < 0.5:
            terminal.send(CTRL_C)
        else:
            os.kill(terminal.child.pid, signal.SIGINT)
        # Between the prompt and the reply lie moments in which nothing listens: then the reply
        # goes on. Else what was heard is seen before the next command is typed.
        end = time.monotonic() + 3
        while time.monotonic() < end and not HEARD.search(terminal.text().rpartition(question)[2]):
            time.sleep(0.02)
        terminal.wait_for(lambda _: terminal.is_at_prompt())
        counted = ask(terminal, f"/tokens mark{number}x").replace("|", "")
        assert f"mark{number}x" in counted, terminal.text()[-600:]
        if number % 5 == 4:
            assert "starts anew" in ask(terminal, "/clear"), terminal.text()[-1000:]
    assert ANSWER in ask(terminal, QUESTION)
    left(terminal)
    assert "What is 11 * 86?" in (home / "state" / "chat_history").read_text(encoding="utf-8")


def test_ten_interrupts_at_random_moments(nano: Terminal, home: Path) -> None:
    campaign(nano, home, 10, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_hundred_interrupts_at_random_moments(nano: Terminal, home: Path) -> None:
    campaign(nano, home, 200, seed=2)
