"""What the chat itself costs: from the start to the first prompt, and for each token it shows.

    python benchmarks/chat.py             # both; POSIX: the start is timed in a pseudo-terminal
    python benchmarks/chat.py --starts 0  # tokens alone

A token's cost is processor time of this process, without any model: pieces of a reply through the
printer to a terminal that takes everything. "painted" repaints the live lines at every token, which
the chat does at most twenty times a second.
"""

import argparse
import io
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from localr1.cli import live
from localr1.cli.output import Output
from localr1.cli.printer import ReplyPrinter, ReplyStyle
from localr1.engine.events import Channel, Delta, Done, Event, Progress, Usage

WORDS = 3000
PROGRAM = [sys.executable, "-c", "from localr1.cli.main import main; main()", "chat", "r1-nano"]
ANSWER = """\
## A heading

A paragraph of *some* words with `code`, **bold** ones and a formula \\(a_1 * b_1\\), long enough to
be broken into lines on a terminal of eighty columns.

- one item
- another one

| name | days |
|------|-----:|
| Mercury | 88 |

```python
def double(number: int) -> int:
    return 2 * number  # twice
```

"""


class Terminal(io.StringIO):
    """Takes everything, keeps nothing."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def pieces(text: str, channel: Channel) -> list[Delta]:
    words = re.findall(r"\S+\s*", text)
    many = (words * (WORDS // len(words) + 1))[:WORDS]
    return [Delta(channel, word, number, number) for number, word in enumerate(many)]


def reply(deltas: list[Delta]) -> Iterator[Event]:
    yield Progress(1, 1)
    yield from deltas
    yield Done("stop", Usage(1, 0, len(deltas), 0, 0.1, 1.0))


def milliseconds_a_token(deltas: list[Delta], style: ReplyStyle, repaint: float) -> float:
    before, live.REPAINT_SECONDS = live.REPAINT_SECONDS, repaint
    printer = ReplyPrinter(Output(Terminal(), Terminal(), color=True), style, 131_072)
    begin = time.process_time()
    printer.print(reply(deltas))
    spent = time.process_time() - begin
    live.REPAINT_SECONDS = before
    return 1000 * spent / len(deltas)


def measure_tokens() -> None:
    styles = {
        "thinking, tail": (pieces(ANSWER, "thinking"), ReplyStyle(thinking="tail")),
        "thinking, full": (pieces(ANSWER, "thinking"), ReplyStyle(thinking="full")),
        "answer, Markdown": (pieces(ANSWER, "answer"), ReplyStyle(has_markdown=True)),
        "one long block of code": (
            pieces("```python\n" + "x = f(1)  # call\n" * 1000, "answer"),
            ReplyStyle(has_markdown=True),
        ),
        "answer, plain": (pieces(ANSWER, "answer"), ReplyStyle()),
    }
    print(f"{'ms of processor time a token':<30}{'as it is':>10}{'painted':>10}")
    for name, (deltas, style) in styles.items():
        usual = [milliseconds_a_token(deltas, style, 0.05) for _ in range(3)]
        painted = [milliseconds_a_token(deltas, style, 0.0) for _ in range(3)]
        print(f"{name:<30}{statistics.median(usual):>10.3f}{statistics.median(painted):>10.3f}")


def seconds_to_prompt(home: str) -> tuple[float, float]:
    """(wall clock, processor) seconds from the start until the prompt stands there."""
    import pty
    import resource

    begin = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["LOCALR1_HOME"] = home
        os.execv(PROGRAM[0], PROGRAM)
    seen = b""
    while b">>>" not in seen:
        seen += os.read(terminal, 65536)
    elapsed = time.perf_counter() - begin
    os.write(terminal, b"\x04")
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:  # The other side is closed.
        pass
    os.waitpid(pid, 0)
    os.close(terminal)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return elapsed, spent


def measure_starts(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        elapsed, spent = seconds_to_prompt(str(Path(folder)))
        print(f"first start, quantizing r1-nano: {elapsed:.2f} s, processor {spent:.2f} s")
        later = [seconds_to_prompt(str(Path(folder))) for _ in range(count)]
    best = min(elapsed for elapsed, _ in later)
    typical = statistics.median(elapsed for elapsed, _ in later)
    processor = statistics.median(spent for _, spent in later)
    print(
        f"start to the first prompt, {count} times: best {best:.2f} s, median {typical:.2f} s; "
        f"processor {processor:.2f} s, leaving included"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--starts", type=int, default=5, help="how often it is started")
    arguments = parser.parse_args()
    os.environ["TERM"] = "xterm-256color"
    measure_tokens()
    if arguments.starts:
        measure_starts(arguments.starts)


if __name__ == "__main__":
    main()
