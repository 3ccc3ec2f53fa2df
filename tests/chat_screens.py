"""The screens in docs/chat.md: what the program shows in a terminal of 80 columns.

    python tests/chat_screens.py      # takes them anew and writes them into the document

A test takes them too and compares (test_terminal_screens.py). What differs from run to run is
seconds, speeds and sizes alone.
"""

import re
import tempfile
from pathlib import Path

from terminal import CTRL_C, ENTER, Terminal
from terminal_programs import fake_chat, localr1

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "chat.md"
SCREEN = re.compile(r"<!-- screen: (\S+) -->\n\n````\n(.*?)\n````", re.DOTALL)
VARYING = re.compile(r"\d[\d,.]*(?=\s(?:s|tok/s|GiB|MiB)\b)")

# A model that thinks and answers as fast as one reads, and stops where a picture is taken of it.
STAND_IN = """
import re, time
thought = '''The user wants a short table of the planets that are nearest to the sun, and the code
that prints it. Mercury needs 88 days, Venus 225, the Earth 365. Their distances are 58, 108 and
150 million kilometres. A table has three columns then: the name, the days, the distance. For the
code a dictionary and a loop are enough, and the numbers should be aligned to the right, so a
format with a width. I should not forget the units, and say in one sentence what is remarkable:
the farther a planet is, the longer is its year, by Kepler's third law even the square of it.'''
text = '''## The inner planets

The farther out, the **longer the year**: \\\\(T^2 \\\\propto a^3\\\\).

| Planet | Days | Million km |
|:-------|-----:|-----------:|
| Mercury | 88 | 58 |
| Venus | 225 | 108 |
| Earth | 365 | 150 |

```python
for name, days in years.items():
    print(f"{name:<8} {days:>4}")
```

1. `years` is a dictionary.
2. Its items come in the order in which they were put in.
'''
class StandIn(FakeEngine):
    def generate(self, ids, params, cancel=None, answer_now=None):
        for event in super().generate(ids, params, cancel, answer_now):
            stops = isinstance(event, Delta) and event.text.strip() in ("loop", "Its")
            if stops:
                time.sleep(0.1)  # So that it is painted.
            yield event
            if stops:
                (answer_now if event.channel == "thinking" else cancel).wait()
pieces = lambda text: re.findall(r"\\s*\\S+\\s?", text)
engine = StandIn([thinking(*pieces(thought)) + answer(*pieces(text))], pause=0.02, context=4096)
engine.name = "stand-in"
"""


def nano_screens(home: Path) -> dict[str, str]:
    """With r1-nano, in a home where nothing is yet."""
    (home / "Notizen.txt").write_text("47 * 86\n", encoding="utf-8")
    command = localr1("chat", "r1-nano", "--temperature", "0")
    terminal = Terminal(command, {"LOCALR1_HOME": str(home / "localr1")})
    screens = {}
    try:
        # Where it was quantized to has the name of a temporary directory.
        text = terminal.wait_for_prompt(seconds=120)
        screens["first-run"] = text[text.index("This is r1-nano") :]
        begin = len(text) - len(">>>")
        terminal.answer_to("What is 47 * 86?" + ENTER)
        terminal.answer_to("/think" + ENTER)
        terminal.answer_to("How many r are in strawberry?" + ENTER)
        screens["question"] = terminal.text()[begin:]
        begin = len(terminal.text()) - len(">>>")
        terminal.answer_to("Hallo, wer bist du?" + ENTER)
        terminal.answer_to("/tokens Grüße" + ENTER)
        terminal.answer_to("/set parametre top_k 3" + ENTER)
        terminal.answer_to("/claer" + ENTER)
        screens["words"] = terminal.text()[begin:]
        begin = len(terminal.text()) - len(">>>")
        terminal.answer_to("/help" + ENTER)
        screens["help"] = terminal.text()[begin:]
    finally:
        terminal.close()
    return screens


def stand_in_screens(home: Path) -> dict[str, str]:
    """With a model that stops for the picture."""
    terminal = Terminal(fake_chat(STAND_IN), {"LOCALR1_HOME": str(home)})
    screens = {}
    try:
        begin = len(terminal.wait_for_prompt()) - len(">>>")
        terminal.send("The inner planets, please: a table, and code that prints it." + ENTER)
        terminal.wait_for("and a loop")
        screens["thinking"] = terminal.text()[begin:]
        terminal.send(CTRL_C)
        terminal.wait_for("\n2. Its")
        screens["answering"] = terminal.text()[begin:]
        terminal.send(CTRL_C)
        screens["stopped"] = terminal.wait_for_prompt(2)[begin:]
    finally:
        terminal.close()
    return screens


def all_screens() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        screens = {**nano_screens(home), **stand_in_screens(home)}
    return {name: text.rstrip("\n") for name, text in screens.items()}


def documented() -> dict[str, str]:
    return dict(SCREEN.findall(DOCUMENT.read_text(encoding="utf-8")))


def comparable(screen: str) -> str:
    return VARYING.sub("0", screen)


if __name__ == "__main__":
    taken = all_screens()
    document = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(
        SCREEN.sub(
            lambda match: f"<!-- screen: {match[1]} -->\n\n````\n{taken[match[1]]}\n````", document
        ),
        encoding="utf-8",
    )
