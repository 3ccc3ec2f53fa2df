"""`localr1 trace`: which experts a model chooses, and how well a cache of them would do."""

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localr1.cli.models import model_to_run
from localr1.cli.output import Output, format_bytes
from localr1.errors import FormatError, UsageError
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.engine.engine import Engine
    from localr1.experts.statistics import RoutingStatistics
    from localr1.experts.trace import Trace
    from localr1.sampler import SamplingParams

MAX_PROMPT_BYTES = 64 << 20
SHARES = (0.25, 0.5, 0.75)
"""Of a layer's experts in the cache, for the table."""


def read_prompts(path: Path) -> list[str]:
    """A prompt per line; with the suffix .jsonl a JSON string, or an object with "prompt".

    Raises NotFoundError, FormatError and UsageError.
    """
    from localr1.checkpoint.files import read_text
    from localr1.checkpoint.strict_json import parse_json

    lines = [line for line in read_text(path, str(path), MAX_PROMPT_BYTES).splitlines() if line]
    prompts: list[str] = []
    for number, line in enumerate(lines, 1):
        prompt: Any = line
        if path.suffix == ".jsonl":
            prompt = parse_json(line.encode(), f"{path}: line {number}")
            prompt = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if not isinstance(prompt, str):
            raise FormatError(
                f"{path}: line {number}",
                expected='a JSON string or an object with "prompt"',
                found=json.dumps(prompt)[:40],
            )
        prompts.append(prompt)
    if not prompts:
        raise UsageError(f"{path}", expected="a prompt per line", found="none")
    return prompts


def sampling_of(engine: "Engine", flags: Mapping[str, int | float | None]) -> "SamplingParams":
    """The most probable tokens where no flag is given. Else as in a chat: the model's own defaults
    speak where no flag does; a seed that nobody gave is drawn, so that it can be recorded. Raises
    UsageError for what is out of range."""
    from localr1.sampler import Sampler, SamplingParams

    given = {name: value for name, value in flags.items() if value is not None}
    if not given:
        return SamplingParams(temperature=0.0)
    values: dict[str, Any] = {**engine.defaults, **given}
    params = SamplingParams(**values)
    return replace(params, seed=Sampler(params).seed)


def record(
    engine: "Engine",
    prompts: list[str],
    sampling: "SamplingParams",
    max_tokens: int,
    output: Output,
) -> "Trace":
    """Each prompt in a conversation of its own, and each answer drawn with the same seed, as
    `localr1 chat -p` would."""
    from localr1.engine.events import GenerationParams
    from localr1.experts.recorder import RoutingRecorder

    recorder = RoutingRecorder(engine.model, engine.name)
    params = GenerationParams(sampling, max_tokens=max_tokens)
    with output.progress("trace") as line:
        for index, prompt in enumerate(prompts):
            engine.reset()  # Else a prefix that the last prompt shares would not be routed.
            ids = engine.prompt([{"role": "user", "content": prompt}]).ids
            for _ in engine.generate(ids, params):
                pass
            recorder.end_sequence(len(ids))
            line.update(index + 1, len(prompts))
    values = asdict(sampling)
    return recorder.trace({name: value for name, value in values.items() if value is not None})


def as_document(trace: "Trace", statistics: "RoutingStatistics") -> dict[str, Any]:
    return {
        "model": trace.model,
        "sampling": dict(trace.sampling),
        "num_experts": trace.num_experts,
        "experts_per_token": trace.experts_per_token,
        "sequences": len(trace.sequences),
        "tokens": trace.num_tokens,
        "layers": [
            {
                "layer": layer,
                "load": [round(float(value), 4) for value in load],
                "lru_hit_rate": [round(float(value), 4) for value in rates],
            }
            for layer, load, rates in zip(
                trace.layers, statistics.load, statistics.hit_rates, strict=True
            )
        ],
    }


def print_statistics(output: Output, trace: "Trace", statistics: "RoutingStatistics") -> None:
    slots = [int(share * trace.num_experts + 1e-9) for share in SHARES]
    rows = [
        (
            str(layer),
            f"{load.max():.2f}",
            f"{load.min():.2f}",
            *(f"{rates[count]:.1%}" for count in slots),
        )
        for layer, load, rates in zip(
            trace.layers, statistics.load, statistics.hit_rates, strict=True
        )
    ]
    means = (f"{statistics.hit_rate(share):.1%}" for share in SHARES)
    titles = (f"{count} of {trace.num_experts}" for count in slots)
    output.table(
        ("layer", "busiest", "idlest", *titles),
        [*rows, ("all", f"{statistics.load.max():.2f}", f"{statistics.load.min():.2f}", *means)],
    )
    output.line()
    output.line(
        f"{trace.num_tokens:,} tokens of {len(trace.sequences):,} prompts, "
        f"{trace.experts_per_token} of {trace.num_experts} experts each. Load: 1.00 is an even "
        "share. Right: hits of a cache of so many experts a layer that drops the least recently "
        "used."
    )


def trace(
    prompts: Annotated[
        Path, typer.Option("--prompts", "-f", help="A prompt per line; .jsonl: JSON strings.")
    ],
    model: Annotated[
        str | None, typer.Argument(help="A model's directory, .gguf file, or name.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the trace here (safetensors).")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Generated for a prompt.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="0: the most probable token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the nucleus of this mass.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", min=1, help="CPU threads.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Record which experts each token of some prompts and their answers chooses. The answers are
    the most probable tokens unless --temperature, --top-p or --seed is given; then as in chat."""
    from localr1.experts.statistics import routing_statistics
    from localr1.experts.trace import write_trace
    from localr1.load import load_engine

    settings = Settings.from_environment()
    output = Output(color=settings.color)
    texts = read_prompts(prompts)
    path = model_to_run(model, settings, output)
    with closing(load_engine(path, threads=threads or settings.threads)) as engine:
        sampling = sampling_of(engine, {"temperature": temperature, "top_p": top_p, "seed": seed})
        recorded = record(engine, texts, sampling, max_tokens, output)
    if out is not None:
        write_trace(recorded, out)
    statistics = routing_statistics(recorded)
    if as_json:
        output.json(as_document(recorded, statistics))
        return
    print_statistics(output, recorded, statistics)
    if out is not None:
        output.note(f"{out}: {format_bytes(out.stat().st_size)}")
