"""Pictures of a routing trace (docs/trace.md): load per expert, and how a cache of them would do.

    localr1 trace r1-nano --prompts PROMPTS.jsonl --out trace.safetensors
    python benchmarks/routing.py trace.safetensors docs/r1-nano

writes docs/r1-nano-load.svg and docs/r1-nano-reuse.svg.

    python benchmarks/routing.py --prompts PROMPTS.jsonl

writes the questions of `localr1 eval arithmetic` as prompts for the first command.
"""

import argparse
import json
from pathlib import Path
from typing import Final

from localr1.experts.statistics import RoutingStatistics, routing_statistics
from localr1.experts.trace import Trace, read_trace
from localr1.quant.arithmetic import read_problems

CELL: Final = 34
LEFT, TOP, BOTTOM = 76, 44, 40
WIDTH, HEIGHT, RIGHT = 720, 400, 130
# Colour-blind safe (Okabe and Ito), one a layer.
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")


def svg(width: float, height: float, parts: list[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def draw_load(trace: Trace, statistics: RoutingStatistics) -> str:
    """A cell per layer and expert, darker where it is chosen more often."""
    top = max(2.0, float(statistics.load.max()))
    width = LEFT + CELL * trace.num_experts + 12
    height = TOP + CELL * len(trace.layers) + BOTTOM
    parts = [text(LEFT, 22, "Load per expert; 1.0 is an even share", "start")]
    for row, layer in enumerate(trace.layers):
        y = TOP + row * CELL
        parts.append(text(LEFT - 8, y + CELL / 2 + 4, f"layer {layer}", "end"))
        for expert, load in enumerate(statistics.load[row]):
            x, share = LEFT + expert * CELL, float(load) / top
            ink = "white" if share > 0.55 else "black"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="#0072b2" '
                f'fill-opacity="{share:.3f}"/>'
                f'<text x="{x + CELL / 2}" y="{y + CELL / 2 + 4}" text-anchor="middle" '
                f'font-size="10" fill="{ink}">{load:.1f}</text>'
            )
    below = TOP + len(trace.layers) * CELL + 16
    parts += [
        text(LEFT + (expert + 0.5) * CELL, below, str(expert))
        for expert in range(trace.num_experts)
    ]
    parts.append(text(LEFT + trace.num_experts * CELL / 2, below + 18, "expert"))
    return svg(width, height, parts)


def draw_reuse(trace: Trace, statistics: RoutingStatistics) -> str:
    """Hit rate of an LRU cache against its size, a line per layer; dashed: choices at random."""
    count = trace.num_experts

    def place(slots: float, rate: float) -> tuple[float, float]:
        x = LEFT + slots / count * (WIDTH - LEFT - RIGHT)
        return x, TOP + (1 - rate) * (HEIGHT - TOP - BOTTOM - 10)

    def line(values: list[float]) -> str:
        points = (place(slots, rate) for slots, rate in enumerate(values))
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)

    parts = [text(LEFT, 22, "Choices found in a cache that drops the least recently used", "start")]
    for quarter in range(5):
        x, y = place(0, quarter / 4)
        parts.append(f'<path d="M{x:.1f} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(text(x - 8, y + 4, f"{25 * quarter}%", "end"))
        slots = count * quarter / 4
        x, y = place(slots, 0)
        parts.append(text(x, y + 18, f"{slots:g}"))
    x, y = place(count / 2, 0)
    parts.append(text(x, y + 36, f"experts of a layer in the cache, of {count}"))
    even = [slots / count for slots in range(count + 1)]
    parts.append(
        f'<polyline points="{line(even)}" fill="none" stroke="#555" stroke-dasharray="4 4"/>'
    )
    legend = [("#555", "at random")]
    for row, layer in enumerate(trace.layers):
        colour = COLOURS[row % len(COLOURS)]
        rates = [float(rate) for rate in statistics.hit_rates[row]]
        parts.append(
            f'<polyline points="{line(rates)}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        legend.append((colour, f"layer {layer}"))
    for row, (colour, name) in enumerate(legend):
        x, y = WIDTH - RIGHT + 16, TOP + 20 * row
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
        parts.append(text(x + 18, y + 10, name, "start"))
    return svg(WIDTH, HEIGHT, parts)


def main() -> None:
    """Writes the pictures, or the prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, nargs="?")
    parser.add_argument("pictures", nargs="?", help="what the pictures' names begin with")
    parser.add_argument("--prompts", type=Path)
    arguments = parser.parse_args()
    if arguments.prompts is not None:
        lines = [json.dumps({"prompt": problem.question}) for problem in read_problems()]
        arguments.prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if arguments.trace is None:
        return
    trace = read_trace(arguments.trace)
    statistics = routing_statistics(trace)
    for name, picture in (
        ("load", draw_load(trace, statistics)),
        ("reuse", draw_reuse(trace, statistics)),
    ):
        Path(f"{arguments.pictures}-{name}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
