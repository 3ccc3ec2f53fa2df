"""`localr1 bench`: tokens a second, with llama-bench's names, defaults and output fields."""

from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localr1.cli.experts import (
    DeviceOption,
    DevicesOption,
    GpuLayersOption,
    RamOption,
    ReadAheadOption,
    VramOption,
    expert_options,
    usage_document,
)
from localr1.cli.memory import peak_memory_bytes
from localr1.cli.models import model_to_run
from localr1.cli.output import Output, format_bytes
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.cli.measure import Measurement
    from localr1.experts.options import ExpertOptions


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
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def print_markdown(output: Output, rows: list[dict[str, Any]], n_prompt: int) -> None:
    """llama-bench's table, aligned for reading; where experts are moved, how."""
    if not rows:
        return
    moved = any("experts" in row for row in rows)
    header = ["model", "size", "params", "backend", "threads"]
    header += ["policy"] if moved else []
    header += ["test", "t/s"]
    header += ["hit", "device", "RAM", "link", "disk", "bound"] if moved else []
    cells = []
    for row in rows:
        cells.append(
            [
                Path(row["model_filename"]).name,
                format_bytes(row["model_size"]),
                f"{row['model_n_params'] / 1e6:.2f} M",
                row["backend"],
                str(row["n_threads"]),
                *([row["policy"]] if moved else []),
                row["test"],
                f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
            ]
        )
        if moved:
            used = row["experts"]
            places = (used[f"{name}_bytes"] for name in ("device", "ram", "link", "disk"))
            cells[-1] += [f"{used['hit_rate']:.1%}", *map(format_bytes, places), used["bound"]]
    widths = [max(len(row[column]) for row in (header, *cells)) for column in range(len(header))]
    for line in (header, ["-" * width for width in widths], *cells):
        padded = [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)]
        output.line(f"| {' | '.join(padded)} |")
    output.line()
    last = rows[-1]
    if not moved and "device" in last:
        output.line(last["device"])
    active = last["model_n_active_params"] / last["model_n_params"]
    output.line(
        f"time to first token ({n_prompt} tokens): {last['time_to_first_token_s']:.3f} ± "
        f"{last['time_to_first_token_stddev_s']:.3f} s; peak memory: "
        f"{format_bytes(last['peak_memory_bytes'])}; {active:.0%} of the parameters work on a token"
    )


def measure_one(
    path: Path,
    output: Output,
    threads: int | None,
    experts: "ExpertOptions",
    counts: tuple[int, int, int],
) -> list[dict[str, Any]]:
    """llama-bench's fields of each test, of a model loaded for it. counts: tokens prefilled, tokens
    decoded, repetitions."""
    import statistics

    from localr1.cli.measure import measure, sampled_ids, time_to_first_token
    from localr1.load import load_engine

    n_prompt, n_gen, repetitions = counts
    with output.progress(f"Loading {path.name}") as status:
        engine = load_engine(
            path, threads=threads, experts=experts, progress=status.update, notice=status.paint
        )
        with closing(engine):
            status.paint("Measuring")
            store = engine.experts
            in_parts = store is not None and not store.is_complete
            ids = sampled_ids(engine.model, max(n_prompt, n_gen, 1)) if in_parts else None
            rows = []
            for prompt, generated in ((n_prompt, 0), (0, n_gen)):
                before = None if store is None else store.usage.copy()
                for test in measure(engine.model, prompt, generated, repetitions, ids):
                    used = None if store is None or before is None else store.usage - before
                    rows.append((test, used))
            first = time_to_first_token(engine, n_prompt, repetitions)
    config = engine.model.config
    about: dict[str, Any] = {
        "model_filename": str(path),
        "model_size": engine.model.weight_bytes,
        "model_n_params": config.parameter_count,
        "model_n_active_params": config.active_parameter_count,
        "backend": engine.kernels,
        "n_threads": engine.threads,
        "peak_memory_bytes": peak_memory_bytes(),
        "time_to_first_token_s": round(statistics.fmean(first), 5),
        "time_to_first_token_stddev_s": round(
            statistics.stdev(first) if len(first) > 1 else 0.0, 5
        ),
    }
    if store is not None:
        about["policy"] = experts.policy
        about["device"] = experts.device
        if experts.devices is not None:
            about["device"] = f"cards {experts.devices}"
    elif engine.where:
        about["device"] = engine.where
    return [
        {
            **llama_bench_fields(test, about),
            "test": test.name,
            **({} if used is None else {"experts": usage_document(used)}),
        }
        for test, used in rows
    ]


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """For CSV: what the store counted beside the rest."""
    experts = row.get("experts", {})
    return {
        **{name: value for name, value in row.items() if name != "experts"},
        **{f"experts_{name}": value for name, value in experts.items()},
    }


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
    ram: RamOption = None,
    vram: VramOption = None,
    device: DeviceOption = "cpu",
    devices: DevicesOption = None,
    gpu_layers: GpuLayersOption = None,
    policy: Annotated[
        str, typer.Option("--policy", help="As in chat; several with commas between.")
    ] = "adaptive",
    read_ahead: ReadAheadOption = None,
) -> None:
    """Tokens a second of prefill and decode, as llama-bench measures them; time to first token."""
    settings = Settings.from_environment()
    output = Output(color=settings.color)
    path = model_to_run(model, settings, output)
    variants = [
        expert_options(ram, vram, device, name.strip(), read_ahead, gpu_layers, devices)
        for name in policy.split(",")
    ]
    threads = threads if threads is not None else settings.threads
    rows = [
        row
        for experts in variants
        for row in measure_one(path, output, threads, experts, (n_prompt, n_gen, repetitions))
    ]
    if output_format is Format.JSON:
        output.json(rows)
    elif output_format is Format.CSV:
        output.text(as_csv([flat(row) for row in rows]))
    else:
        print_markdown(output, rows, n_prompt)
