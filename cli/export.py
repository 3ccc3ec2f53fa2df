"""`localr1 export`: a model for other programs, as one GGUF file."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from localr1.cli.models import resolve_model
from localr1.cli.output import Output, format_bytes
from localr1.errors import UsageError
from localr1.settings import Settings


def export(
    model: Annotated[str, typer.Argument(help="A model's directory, .gguf file, or name.")],
    out: Annotated[Path, typer.Argument(help="The file to make; must not exist.")],
    form: Annotated[str, typer.Option("--format", help="gguf.")] = "gguf",
    kind: Annotated[
        str,
        typer.Option("--type", help="stored: each matrix as it is; or all in q4_0, q8_0 or f16."),
    ] = "stored",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Write MODEL as a GGUF file, for llama.cpp and what is made of it."""
    from localr1.quant.gguf_export import STORED, TYPES, export_gguf

    if form != "gguf":
        raise UsageError("--format", expected="gguf", found=repr(form))
    if kind not in (STORED, *TYPES):
        raise UsageError("--type", expected=" or ".join((STORED, *TYPES)), found=repr(kind))
    settings = Settings.from_environment()
    output = Output(color=settings.color)
    path = resolve_model(model, settings)
    with output.progress("export") as line:

        def show(done: int, total: int, name: str) -> None:
            amount = f"{format_bytes(done)} of {format_bytes(total)}"
            line.update(done, total, f"export: {amount}, {name}")

        made = export_gguf(path, out, kind, progress=show)
    if as_json:
        output.json({**asdict(made), "out": str(made.out)})
        return
    types = ", ".join(f"{count} {name}" for name, count in sorted(made.types.items()))
    output.fields(
        {
            "written": f"{made.out}, {format_bytes(made.nbytes)}",
            "architecture": made.architecture,
            "tensors": types,
        }
    )
