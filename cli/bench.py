"""`localr1 bench`: tokens a second, with llama-bench's names, defaults and output fields."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localr1.cli.memory import peak_memory_bytes
from localr1.cli.models import model_to_run
from localr1.cli.output import Output, format_bytes
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.cli.measure import Measurement


class Format(StrEnum):
    MD = "md"
    JSON = "json"
    CSV = "csv"


def llama_bench_fields(test: "Measurement", about: dict[str, Any]) -> dict[str, Any]:
    """One row of `-o json` and `-o csv`, under llama-bench's names."""
    import statistics

    nanoseconds = [round(each * 1e9) for each in test.seconds]
    spread = statistics.stdev(nanoseconds) if len(nanoseconds) > 1 else 0.0
    return {
        **about,
        "n_prompt": test.prompt,
        "n_gen": test.generated,
        "avg_ns": round(statistics.fmean(nanoseconds)),
        "stddev_ns": round(spread),
        "avg_ts": round(test.mean, 4),
        "stddev_ts": round(test.deviation, 4),
        "samples_ns": nanoseconds,
        "samples_ts": [round(rate, 4) for rate in test.rates],
    }


def as_csv(rows: list[dict[str, Any]]) -> str:
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def print_markdown(output: Output, tests: "list[Measurement]", about: dict[str, Any]) -> None:
    """llama-bench's table, aligned for reading."""
    name = Path(about["model_filename"]).name
    parameters = f"{about['model_n_params'] / 1e6:.2f} M"
    fixed = (name, format_bytes(about["model_size"]), parameters, about["backend"])
    header = ("model", "size", "params", "backend", "threads", "test", "t/s")
    rows = [
        (*fixed, str(about["n_threads"]), test.name, f"{test.mean:.2f} ± {test.deviation:.2f}")
        for test in tests
    ]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        output.line(f"| {' | '.join(cells)} |")
        if row is header:
            output.line(f"| {' | '.join('-' * width for width in widths)} |")


def bench(
    model: Annotated[
        str | None, typer.Argument(help="A model's directory, .gguf file, or name.")
    ] = None,
    n_prompt: Annotated[int, typer.Option("-p", "--n-prompt", min=0, help="Prefilled.")] = 512,
    n_gen: Annotated[int, typer.Option("-n", "--n-gen", min=0, help="Decoded.")] = 128,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1)] = 5,
    threads: Annotated[
        int | None, typer.Option("-t", "--threads", min=1, help="CPU threads.")
    ] = None,
    output_format: Annotated[Format, typer.Option("-o", "--output")] = Format.MD,
) -> None:
    """Tokens a second of prefill and decode, as llama-bench measures them; time to first token."""
    settings = Settings.from_environment()
    output = Output(color=settings.color)
    path = model_to_run(model, settings, output)
    import statistics

    from localr1.cli.measure import measure, time_to_first_token
    from localr1.load import load_engine

    with output.progress(f"Loading {path.name}") as status:
        engine = load_engine(path, threads=threads if threads is not None else settings.threads)
        status.paint("Measuring")
        tests = measure(engine.model, n_prompt, n_gen, repetitions)
        first = time_to_first_token(engine, n_prompt, repetitions)
    about: dict[str, Any] = {
        "model_filename": str(path),
        "model_size": engine.model.weight_bytes,
        "model_n_params": engine.model.config.parameter_count,
        "backend": engine.kernels,
        "n_threads": engine.threads,
        "peak_memory_bytes": peak_memory_bytes(),
        "time_to_first_token_s": round(statistics.fmean(first), 5),
    }
    rows = [llama_bench_fields(test, about) for test in tests]
    if output_format is Format.JSON:
        output.json(rows)
    elif output_format is Format.CSV:
        output.text(as_csv(rows))
    else:
        print_markdown(output, tests, about)
        output.line()
        deviation = statistics.stdev(first) if len(first) > 1 else 0.0
        output.line(
            f"time to first token ({n_prompt} tokens): {statistics.fmean(first):.3f} ± "
            f"{deviation:.3f} s; peak memory: {format_bytes(about['peak_memory_bytes'])}"
        )
