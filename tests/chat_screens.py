"""The screens in docs/chat.md and README.md: what the program shows in a terminal of 80 columns.

    python tests/chat_screens.py            # writes into the documents what has changed
    python tests/chat_screens.py --figures  # also what the machine decides: see VARYING

A test takes them too and compares (test_terminal_screens.py).
"""

import re
import sys
import tempfile
from pathlib import Path

from terminal import CTRL_C, ENTER, Terminal
from terminal_programs import fake_chat, localr1

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "chat.md")
SCREEN = re.compile(r"<!-- screen: (\S+) -->\n\n````\n(.*?)\n````", re.DOTALL)
# What differs from run to run: seconds, speeds, sizes; how much was read ahead and drafted, which
# depends on the time there was for it, and with that how often each expert was chosen.
VARYING = re.compile(
    r"\d[\d,.]*(?=\s(?:s|tok/s|GiB|MiB)\b)|(?<=bound by )\w+"
    r"|(?<=\d)(?: \(\d+ cached\))?(?=\+\d+ tok)|(?<=^drafts: )\d+ of \d+"
    r"|(?<=^   \d )[ .:*=#%@+-]{16}$",
    re.MULTILINE,
)
# And whether there were drafts at all.
DRAFTS = re.compile(r"^drafts: .*\n", re.MULTILINE)

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


NANO = ("chat", "r1-nano", "--temperature", "0")
README = (
    "What is 47 * 86?",
    "/think",
    "Which is larger, 9.11 or 9.9?",
    "How many r are in strawberry?",
    "Hallo",
    "/stats",
)


def first_screens(home: Path) -> dict[str, str]:
    """With r1-nano, in a home where nothing is yet: its first start, and the README's session."""
    terminal = Terminal(localr1(*NANO), {"LOCALR1_HOME": str(home)})
    try:
        # Where it was quantized to has the name of a temporary directory.
        text = terminal.wait_for_prompt(seconds=120)
        begin = text.index("This is r1-nano")
        for line in README:
            terminal.answer_to(line + ENTER)
        session = terminal.text()[begin:].removesuffix(">>>").rstrip()
    finally:
        terminal.close()
    return {"first-run": text[begin:], "readme": f"$ localr1 {' '.join(NANO)}\n{session}"}


def nano_screens(home: Path) -> dict[str, str]:
    """With r1-nano, where it has been before."""
    terminal = Terminal(localr1(*NANO), {"LOCALR1_HOME": str(home)})
    screens = {}
    try:
        begin = len(terminal.wait_for_prompt()) - len(">>>")
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
        screens = {**first_screens(home), **nano_screens(home), **stand_in_screens(home)}
    return {name: text.rstrip("\n") for name, text in screens.items()}


def documented() -> dict[str, str]:
    texts = (document.read_text(encoding="utf-8") for document in DOCUMENTS)
    return dict(pair for text in texts for pair in SCREEN.findall(text))


def comparable(screen: str) -> str:
    return VARYING.sub("~", DRAFTS.sub("", screen))


def with_figures_of(before: str, screen: str) -> str:
    """`screen`, but for lines that differ from those before in what varies alone: they stay."""
    known = {VARYING.sub("~", line): line for line in before.split("\n")}
    return "\n".join(known.get(VARYING.sub("~", line), line) for line in screen.split("\n"))


def write(takes_figures: bool) -> None:
    taken = all_screens()

    def anew(match: re.Match[str]) -> str:
        name, before = match.groups()
        screen = taken[name] if takes_figures else with_figures_of(before, taken[name])
        return f"<!-- screen: {name} -->\n\n````\n{screen}\n````"

    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        document.write_text(SCREEN.sub(anew, text), encoding="utf-8")


if __name__ == "__main__":
    write(takes_figures="--figures" in sys.argv[1:])
