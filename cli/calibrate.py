"""`localr1 calibrate`: what a text says of a model's inputs, measured once for `quantize`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from localr1.cli.memory import peak_memory_bytes
from localr1.cli.models import resolve_model
from localr1.cli.output import Output, format_bytes
from localr1.cli.quantize_report import expert_use_line
from localr1.settings import Settings


def calibrate(
    model: Annotated[str, typer.Argument(help="A model's directory, .gguf file, or name.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file to make; by default NAME.calibration.safetensors."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="A UTF-8 text file; by default a built-in text.")
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=2, help="Of the text, from its beginning.")
    ] = 8192,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Throw away what an interrupted run left; begin anew."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Measure what a text brings to each matrix of MODEL, for `quantize --calibration`.

    After an interruption the same command goes on where it was.
    """
    from localr1.quant import calibrating
    from localr1.quant.calibration_file import SUFFIX
    from localr1.quant.progress import Progress

    settings = Settings.from_environment()
    output = Output(color=settings.color)
    path = resolve_model(model, settings)
    target = out or Path(f"{path.name.removesuffix('.gguf')}{SUFFIX}")
    with output.progress("calibrate") as line:
        done, total = 0, 1

        def show(progress: Progress) -> None:
            nonlocal done, total
            if progress.stage == "calibrate":
                done, total = progress.done, progress.total
                amount = f"section {done} of {total}"
            else:
                amount = f"{format_bytes(progress.done)} of {format_bytes(progress.total)}"
            memory = format_bytes(peak_memory_bytes())
            line.update(done, total, f"{progress.stage}: {amount}, {memory}, {progress.name}")

        report = calibrating.calibrate(path, target, text, tokens, show, restart=restart)
    calibrated = report.calibrated
    if as_json:
        output.json(
            {
                "model": str(path),
                "out": str(report.out),
                "bytes": report.nbytes,
                "text": calibrated.text,
                "text_sha256": calibrated.text_sha256,
                "tokens": calibrated.tokens,
                "experts": None if report.experts is None else asdict(report.experts),
                "seconds": round(report.seconds, 3),
                "peak_memory_bytes": peak_memory_bytes(),
            }
        )
        return
    fields = {"read": f"{calibrated.tokens:,} tokens of {calibrated.text}"}
    if calibrated.tokens < tokens:
        fields["read"] += ", all it has"
    if (use := report.experts) is not None:
        fields["experts"] = expert_use_line(use)
    fields["written"] = f"{report.out}, {format_bytes(report.nbytes)}"
    peak = peak_memory_bytes()
    fields["took"] = f"{report.seconds:.1f} s, {format_bytes(peak)} of memory at most"
    output.fields(fields)
