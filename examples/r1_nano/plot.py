"""The curve of a GRPO run as a picture: how many answers are right, and how long the outputs are.

    python examples/r1_nano/plot.py DIR/curve.csv docs/r1-nano-grpo.svg

Writes the SVG itself: three lines over one axis of steps need no plotting library.
"""

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

WIDTH: Final = 720
HEIGHT: Final = 560
LEFT, RIGHT, BOTTOM = 56, 20, 48
TITLE: Final = 30
"""Of each panel, for its lines' names."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A column of the curve. Colours are safe for the colour-blind; marks tell lines apart too."""

    column: str
    label: str
    colour: str
    marked: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines that share an axis of values, from `low` to `high`, with a grid line every `grid`."""

    lines: tuple[Line, ...]
    top: int
    bottom: int
    low: float
    high: float
    grid: float
    percent: bool

    def y(self, value: float) -> float:
        """Where a value stands in the picture."""
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top)


SHARES: Final = (
    Line("held_out", "held-out accuracy, greedy (1,000 problems)", "#0072b2", marked=True),
    Line("answer", "right among the sampled outputs, temperature 1", "#d55e00"),
)
LENGTH: Final = Line("tokens", "mean tokens of a sampled output", "#009e73")


def read_curve(path: Path) -> dict[str, list[Point]]:
    """(step, value) of each plotted column, rows without a value left out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        line.column: [
            (float(row["step"]), float(row[line.column])) for row in rows if row[line.column]
        ]
        for line in (*SHARES, LENGTH)
    }


def panels(curve: Mapping[str, Sequence[Point]]) -> tuple[Panel, Panel]:
    """Shares from the tenth below the lowest to 100 %; lengths between multiples of ten."""
    lowest = min(share for line in SHARES for _, share in curve[line.column])
    lengths = [length for _, length in curve[LENGTH.column]]
    middle = 360
    return (
        Panel(SHARES, 10 + TITLE, middle, math.floor(lowest * 10) / 10, 1.0, 0.1, percent=True),
        Panel(
            (LENGTH,),
            middle + 20 + TITLE,
            HEIGHT - BOTTOM,
            math.floor(min(lengths) / 10) * 10,
            math.ceil(max(lengths) / 10) * 10 or 10,
            10.0,
            percent=False,
        ),
    )


def draw(curve: Mapping[str, Sequence[Point]]) -> str:
    """The whole picture as SVG text."""
    last = max(step for points in curve.values() for step, _ in points)

    def x(step: float) -> float:
        return LEFT + step / max(last, 1) * (WIDTH - LEFT - RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for panel in panels(curve):
        for count in range(round((panel.high - panel.low) / panel.grid) + 1):
            value = panel.low + count * panel.grid
            text = f"{value * 100:.0f}%" if panel.percent else f"{value:.0f}"
            y = panel.y(value)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        for place, line in enumerate(panel.lines):
            points = [(x(step), panel.y(value)) for step, value in curve[line.column]]
            parts += _line(points, line)
            left, top = LEFT + place * 300, panel.top - TITLE + 2
            parts.append(
                f'<rect x="{left}" y="{top}" width="12" height="12" fill="{line.colour}"/>'
            )
            parts.append(f'<text x="{left + 18}" y="{top + 10}">{line.label}</text>')
    for quarter in range(5):
        step = last * quarter / 4
        parts.append(
            f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{step:.0f}</text>"
        )
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">GRPO step</text>')
    return "\n".join([*parts, "</svg>", ""])


def _line(points: Sequence[Point], line: Line) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{line.colour}"/>' for x, y in points]
    return [
        f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"/>',
        *(marks if line.marked else []),
    ]


def main() -> None:
    """Draws curve.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curve", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    arguments.picture.write_text(draw(read_curve(arguments.curve)), encoding="utf-8")


if __name__ == "__main__":
    main()
