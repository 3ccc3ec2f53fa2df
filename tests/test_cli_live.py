"""What is painted again and again: never wrapped, never left behind, whatever the terminal does."""

import time

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localr1.cli import live
from localr1.cli.cells import cells, fit, wrapped
from localr1.cli.live import LiveRegion
from localr1.cli.thinking_view import LiveThinking, Pace, folded

WIDE = "漢字 と 🙂 e\u0301 a\tb"
"""Without joined emoji: pyte drops what follows them in a line."""


TEXTS = st.text(alphabet=st.sampled_from(list("ab  漢🙂\u0301\ufe0f\n")), max_size=60)


class Painted:
    """A region on a simulated terminal. The stream translates line ends as a terminal does."""

    def __init__(self, columns: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self.stream = pyte.Stream(self.screen)
        self.written = ""
        monkeypatch.setattr(live, "terminal_size", lambda _: self.size)
        self.region = LiveRegion(self)  # type: ignore[arg-type]

    @property
    def size(self) -> tuple[int, int]:
        return self.screen.columns, self.screen.lines

    def write(self, text: str) -> None:
        self.written += text
        self.stream.feed(text.replace("\n", "\r\n"))

    def flush(self) -> None:
        pass

    def lines(self) -> list[str]:
        shown = [line.rstrip() for line in self.screen.display]
        while shown and not shown[-1]:
            shown.pop()
        return shown


def test_a_region_is_painted_over_and_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    painted = Painted(40, 10, monkeypatch)
    painted.write("above\n")
    painted.region.paint(["a longer one", "two", "three"])
    assert painted.lines() == ["above", "a longer one", "two", "three"]
    painted.region.paint(["four", "five"])
    assert painted.lines() == ["above", "four", "five"]
    painted.region.clear()
    painted.write("below\n")
    assert painted.lines() == ["above", "below"]


def test_nothing_is_left_in_what_scrolled_away(monkeypatch: pytest.MonkeyPatch) -> None:
    painted = Painted(40, 8, monkeypatch)
    for number in range(30):
        painted.write(f"line {number}\n")
        painted.region.paint([f"status {number}", "tail", "tail"])
        painted.region.clear()
    scrolled = [
        "".join(row[c].data for c in range(40)).rstrip() for row in painted.screen.history.top
    ]
    assert [*scrolled, *painted.lines()] == [f"line {number}" for number in range(30)]


@pytest.mark.parametrize("columns", [20, 21, 37, 80])
def test_wide_glyphs_never_wrap(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    painted = Painted(columns, 10, monkeypatch)
    painted.write("above\n")
    for offset in range(8):
        painted.region.paint(["x" * offset + WIDE * 10] * 5)
        assert len(painted.lines()) == 6
        assert painted.lines()[0] == "above"
    painted.region.clear()
    assert painted.lines() == ["above"]


def test_a_resized_terminal_keeps_nothing_of_the_old_painting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    painted = Painted(60, 12, monkeypatch)
    painted.write("above\n")
    painted.region.paint(["status", *["x" * 59] * 6])
    for columns in (30, 60, 25, 80):
        painted.screen.resize(columns=columns)
        painted.region.paint(["status", "y" * 100])
        assert painted.lines() == ["above", "status", fit("y" * 100, columns - 1)]
    painted.region.clear()
    assert painted.lines() == ["above"]


def test_lines_that_a_narrower_terminal_wrapped_are_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    # As terminals do that keep lines whole: the cursor stays at the beginning of its line, what was
    # one row is two.
    painted = Painted(30, 12, monkeypatch)
    painted.write("above\n")
    painted.write("status\n" + "x" * 58 + "\n" + "x" * 58 + "\r" + "\x1b[4A")
    painted.region.is_shown = True
    painted.region.paint(["status", "new"])
    assert painted.lines() == ["above", "status", "new"]


def test_a_terminal_that_is_narrower_than_it_says_cuts_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    painted = Painted(40, 12, monkeypatch)
    painted.write("above\n")
    for columns in (40, 30, 10):
        # The window has changed already, and the program has not heard of it.
        painted.screen.resize(columns=columns)
        monkeypatch.setattr(live, "terminal_size", lambda _: (40, 12))
        painted.region.paint(["status", "x" * 60, "y" * 60])
        assert len(painted.lines()) == 4
    painted.region.clear()
    painted.write("z" * 12)
    assert painted.lines() == ["above", "z" * 10, "z" * 2], "other text is wrapped as ever"


@given(st.lists(TEXTS, max_size=30), st.integers(8, 60), st.integers(4, 30), st.integers(2, 60))
def test_lines_that_would_leave_the_screen_are_not_painted(
    texts: list[str], columns: int, rows: int, narrowed: int
) -> None:
    lines = [fit(text.replace("\n", ""), columns - 1) for text in texts]
    region = LiveRegion(None)
    region.size = lambda: (columns - 1, rows - 1)  # type: ignore[method-assign]
    kept = region.last_lines(lines, narrowed_to=narrowed)
    assert list(kept) == lines[len(lines) - len(kept) :]
    screen = pyte.HistoryScreen(min(narrowed, columns), rows, history=1000)
    pyte.Stream(screen).feed("\r\n".join(kept))
    assert not screen.history.top
    if len(kept) < len(lines) and narrowed >= columns:
        assert len(kept) == rows - 1


def test_more_lines_than_rows_and_a_tiny_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    painted = Painted(40, 10, monkeypatch)
    painted.region.paint([str(number) for number in range(50)])
    assert painted.lines() == [str(number) for number in range(9)]
    for columns, rows in ((19, 10), (40, 5)):
        painted = Painted(columns, rows, monkeypatch)
        painted.region.paint(["status", "tail", "tail"])
        assert painted.lines() == ["status"]


def test_what_a_model_says_cannot_drive_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    painted = Painted(60, 10, monkeypatch)
    painted.region.paint(["\x1b]0;title\x07", "\x1b[2J \u202eevil", "a\nb"])
    assert painted.lines() == [r"\x1b]0;title\x07", r"\x1b[2J \u202eevil", "a b"]


def test_painting_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    painted = Painted(40, 10, monkeypatch)
    clock = [0.0]
    monkeypatch.setattr("localr1.cli.live.time.monotonic", lambda: clock[0])
    painted.region = LiveRegion(painted)  # type: ignore[arg-type]
    clock[0] = 10.0
    for _ in range(5):  # Five tokens at once: all are seen.
        assert painted.region.is_due()
        painted.region.paint(["x"])
    clock[0] = 10.01
    monkeypatch.setattr(live, "PAINTING_SHARE", 0.0)
    assert not painted.region.is_due()
    clock[0] = 10.06
    assert painted.region.is_due()


def test_without_a_terminal_nothing_is_written() -> None:
    region = LiveRegion(None)
    region.paint(["x"])
    region.clear()
    assert not region.is_due()


def test_no_styles_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    painted = Painted(40, 10, monkeypatch)
    painted.region = LiveRegion(painted, has_styles=False)  # type: ignore[arg-type]
    painted.region.paint(["x"])
    assert "\x1b[2m" not in painted.written


@given(TEXTS, st.integers(2, 30))
def test_wrapped_rows_fit_and_lose_spaces_alone(text: str, columns: int) -> None:
    rows = list(wrapped(text, columns))
    assert all(cells(row) <= columns for row in rows)
    assert "".join(rows).replace(" ", "") == text.replace("\n", "").replace(" ", "")


@given(TEXTS, st.integers(0, 30))
def test_what_is_cut_fits_and_says_so(text: str, columns: int) -> None:
    line = text.replace("\n", "")
    cut = fit(line, columns)
    assert cells(cut) <= columns
    assert cut == line or columns == 0 or cut.endswith("…")


@pytest.mark.parametrize(
    ("text", "most"), [("e\u0301", 1), ("漢", 2), ("❤️", 2), ("👨‍👩‍👧", 6), ("🇩🇪", 4), ("a", 1)]
)
def test_a_character_counts_as_wide_as_any_terminal_makes_it(text: str, most: int) -> None:
    assert cells(text) == most


def test_wrapping_breaks_at_spaces() -> None:
    assert list(wrapped("one two three\n\nfour", 8)) == ["one two", "three", "", "four"]
    assert list(wrapped("abcdefghij", 4)) == ["abcd", "efgh", "ij"]
    assert list(wrapped("漢字漢字", 5)) == ["漢字", "漢字"]


def test_thinking_is_a_status_and_its_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "REPAINT_SECONDS", 0.0)
    painted = Painted(50, 24, monkeypatch)
    monkeypatch.setattr("localr1.cli.thinking_view.time.monotonic", lambda: 100.0)
    pace = Pace(context=1000, begin=87.6, first=90.0, prompt_tokens=50)
    view = LiveThinking(painted.region, pace, shows_tail=True)
    for number in range(20):
        pace.tokens = 40
        view.add(f"line {number}\n")
    status, *tail = painted.lines()
    assert status == "Thinking… 12 s · 40 tok · 4 tok/s · ctx 9%"
    assert tail == [f"  line {number}" for number in range(14, 20)]
    view.finish()
    assert painted.lines() == []


def test_hidden_thinking_is_a_status_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "REPAINT_SECONDS", 0.0)
    painted = Painted(50, 24, monkeypatch)
    view = LiveThinking(painted.region, Pace(100, time.monotonic()), shows_tail=False)
    view.add("secret")
    assert painted.lines() == ["Thinking… 0 s · 0 tok · ctx 0%"]


def test_what_stays_of_a_thought() -> None:
    assert folded(12.3, 1412, " — /think to show") == (
        "Thought for 12 s (1,412 tokens) — /think to show"
    )
    assert folded(0.2, 1) == "Thought for 0 s (1 token)"
