"""A picture of what overlaps while a token is decoded: reads of experts, the CPU, the device.

    python benchmarks/timeline.py MODEL docs/experts-timeline.svg --ram 50% --tokens 2
    python benchmarks/timeline.py MODEL docs/experts-timeline-device.svg --ram 50% \\
        --device simulated:1GiB,pcie=25GB/s

Some tokens are decoded before, so that the tiers are warm; then the spans of the last ones are
drawn, with the share of the time in which reading and computing went on at once.
"""

import argparse
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch
from routing import LEFT, TOP, svg, text

from localr1.cli.measure import sampled_ids
from localr1.engine.engine import Engine
from localr1.experts.options import ExpertOptions
from localr1.experts.usage import Span
from localr1.load import load_engine
from localr1.models.step import Step

WIDTH: Final = 900
LANE: Final = 26
COLOURS: Final = {"read": "#d55e00", "compute": "#0072b2", "device": "#009e73"}
NAMES: Final = {"read": "read from disk", "compute": "experts on the CPU", "device": "device"}


def decode(engine: Engine, warm: int, tokens: int) -> tuple[list[Span], float, float]:
    """The spans of the last `tokens` of `warm + tokens`, and when they began and ended."""
    assert engine.experts is not None
    ids = sampled_ids(engine.model, warm + tokens)
    cache = engine.model.new_cache(warm + tokens)
    for position in range(warm):
        engine.model.forward(Step(torch.tensor([ids[position]]), position), cache)
    spans = engine.experts.record_spans()
    begin = time.perf_counter()
    for position in range(warm, warm + tokens):
        engine.model.forward(Step(torch.tensor([ids[position]]), position), cache)
    end = time.perf_counter()
    return [span for span in spans if span.end > begin and span.begin < end], begin, end


def lanes_of(spans: list[Span]) -> list[tuple[str, list[Span]]]:
    """Spans of a kind that overlap, as reads do, have lanes of their own."""
    lanes: list[tuple[str, list[Span]]] = []
    for kind in COLOURS:
        rows: list[list[Span]] = []
        for span in sorted((s for s in spans if s.kind == kind), key=lambda s: s.begin):
            row = next((row for row in rows if row[-1].end <= span.begin), None)
            if row is None:
                rows.append([span])
            else:
                row.append(span)
        lanes += [(kind, row) for row in rows]
    return lanes


def overlap(spans: list[Span]) -> float:
    """Share of the time of reading in which something was computed."""
    edges = sorted({edge for span in spans for edge in (span.begin, span.end)})
    reading = both = 0.0
    for begin, end in pairwise(edges):
        kinds = {span.kind for span in spans if span.begin <= begin and span.end >= end}
        if "read" in kinds:
            reading += end - begin
            both += end - begin if kinds & {"compute", "device"} else 0.0
    return both / reading if reading else 0.0


def draw(spans: list[Span], begin: float, end: float, title: str) -> str:
    lanes = lanes_of(spans)
    scale = (WIDTH - LEFT - 60) / (end - begin)
    parts = [text(LEFT, 22, title, "start")]
    for row, (kind, members) in enumerate(lanes):
        y = TOP + row * LANE
        if row == 0 or lanes[row - 1][0] != kind:
            parts.append(text(LEFT - 8, y + LANE / 2 + 3, NAMES[kind].split()[0], "end"))
        for span in members:
            x = LEFT + (max(span.begin, begin) - begin) * scale
            width = max((min(span.end, end) - max(span.begin, begin)) * scale, 0.5)
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LANE - 6}" '
                f'fill="{COLOURS[kind]}"/>'
            )
    below = TOP + len(lanes) * LANE + 8
    for tick in range(6):
        seconds = (end - begin) * tick / 5
        parts.append(text(LEFT + seconds * scale, below + 12, f"{1000 * seconds:.1f} ms"))
    return svg(WIDTH, below + 30, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--ram", default="50%")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--warm", type=int, default=64, help="tokens decoded before")
    parser.add_argument("--tokens", type=int, default=2, help="tokens drawn")
    arguments = parser.parse_args()
    options = ExpertOptions(ram=arguments.ram, device=arguments.device)
    with closing(load_engine(arguments.model, experts=options)) as engine:
        spans, begin, end = decode(engine, arguments.warm, arguments.tokens)
        share = overlap(spans)
        title = (
            f"{engine.name}: {arguments.tokens} tokens decoded, experts in RAM: {arguments.ram}, "
            f"device: {arguments.device}; {share:.0%} of reading beside computing"
        )
    arguments.picture.write_text(draw(spans, begin, end, title), encoding="utf-8")
    print(title)


if __name__ == "__main__":
    main()
