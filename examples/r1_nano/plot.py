"""The curve of a GRPO run as a picture.

    python examples/r1_nano/plot.py DIR/curve.csv docs/r1-nano-grpo.svg

Writes the SVG itself: two lines on one share axis need no plotting library.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Final

WIDTH: Final = 720
HEIGHT: Final = 400
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 40, 48
# Colour-blind safe, and told apart by marks as well.
COLOURS: Final = {"held_out": "#0072b2", "answer": "#d55e00"}
LABELS: Final = {
    "held_out": "held-out accuracy, greedy (1,000 problems)",
    "answer": "right among the sampled outputs, temperature 1",
}

Point = tuple[float, float]


def read_curve(path: Path) -> dict[str, list[Point]]:
    """(step, share) of each plotted column, rows without a value left out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        column: [(float(row["step"]), float(row[column])) for row in rows if row[column]]
        for column in COLOURS
    }


def _line(points: Sequence[Point], colour: str, marked: bool) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points]
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *(marks if marked else []),
    ]


def draw(curve: dict[str, list[Point]]) -> str:
    """The whole picture as SVG text; the share axis begins at the tenth below the lowest value."""
    last = max(step for points in curve.values() for step, _ in points)
    lowest = min(share for points in curve.values() for _, share in points)
    floor = int(lowest * 10) / 10

    def place(point: Point) -> Point:
        x = LEFT + point[0] / max(last, 1) * (WIDTH - LEFT - RIGHT)
        return x, TOP + (1 - point[1]) / (1 - floor) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tenth in range(round(floor * 10), 11):
        y = place((0, tenth / 10))[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tenth * 10}%</text>')
    for quarter in range(5):
        step = last * quarter / 4
        x = place((step, 0))[0]
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step:.0f}</text>'
        )
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">GRPO step</text>')
    for index, (column, points) in enumerate(curve.items()):
        parts += _line([place(p) for p in points], COLOURS[column], marked=column == "held_out")
        x = LEFT + index * 300
        parts.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{COLOURS[column]}"/>')
        parts.append(f'<text x="{x + 18}" y="22">{LABELS[column]}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Draws curve.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curve", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    arguments.picture.write_text(draw(read_curve(arguments.curve)), encoding="utf-8")


if __name__ == "__main__":
    main()
