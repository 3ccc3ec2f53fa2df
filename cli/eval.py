"""`localr1 eval`: how good a model is on a text, and how far it is from a reference."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localr1.cli.models import resolve_model
from localr1.cli.output import Output
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.quant.evaluate import Mean

app = typer.Typer(no_args_is_help=True, help="Measure a model on a text.")

Model = Annotated[str, typer.Argument(help="A model's directory, .gguf file, or name.")]
Text = Annotated[
    Path | None, typer.Option("--text", help="A UTF-8 text file; by default a built-in text.")
]
Window = Annotated[int, typer.Option("--window", min=2, help="Tokens read at a time.")]
Threads = Annotated[int | None, typer.Option("-t", "--threads", min=1, help="CPU threads.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]


def with_error(mean: "Mean", digits: int, factor: float = 1.0, unit: str = "") -> str:
    """ "12.34 ± 0.05": the standard error is shown where there is one."""
    error = ""
    if mean.standard_error is not None:
        error = f" ± {factor * mean.standard_error:.{digits}f}"
    return f"{factor * mean.value:.{digits}f}{error}{unit}"


@app.command()
def ppl(
    model: Model,
    text: Text = None,
    window: Window = 1024,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity: how surprised the model is by the text, lower is better."""
    from localr1.load import LoadOptions, make_kernels
    from localr1.quant import evaluate

    settings = Settings.from_environment()
    output = Output(color=settings.color)
    kernels, _ = make_kernels(LoadOptions(threads=threads or settings.threads))
    loaded, tokenizer = evaluate.load(resolve_model(model, settings), kernels)
    with output.progress("eval ppl") as line:
        result = evaluate.perplexity(
            loaded, tokenizer, evaluate.read_text(text), window, line.update
        )
    if as_json:
        output.json(asdict(result))
        return
    output.fields(
        {
            "perplexity": with_error(result.perplexity, 3),
            "loss": with_error(result.loss, 4, unit=" nats a token"),
            "tokens": f"{result.num_tokens:,}",
        }
    )


@app.command()
def kl(
    model: Model,
    reference: Annotated[
        str, typer.Option("--reference", "-r", help="The model to compare with: the original.")
    ],
    text: Text = None,
    window: Window = 1024,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Divergence of the model's predictions from those of a reference: 0 is the same model."""
    from localr1.load import LoadOptions, make_kernels
    from localr1.quant import evaluate

    settings = Settings.from_environment()
    output = Output(color=settings.color)
    kernels, _ = make_kernels(LoadOptions(threads=threads or settings.threads))
    original, tokenizer = evaluate.load(resolve_model(reference, settings), kernels)
    loaded, _ = evaluate.load(resolve_model(model, settings), kernels)
    with output.progress("eval kl") as line:
        result = evaluate.divergence(
            original, loaded, tokenizer, evaluate.read_text(text), window, line.update
        )
    if as_json:
        output.json(asdict(result))
        return
    output.fields(
        {
            "mean KL": with_error(result.kl, 5, unit=" nats"),
            "99th percentile": f"{result.kl_p99:.4f} nats",
            "same top token": with_error(result.top1, 2, 100.0, " %"),
            "perplexity": with_error(result.model.perplexity, 3),
            "reference": with_error(result.reference.perplexity, 3),
            "positions": f"{result.num_positions:,}",
        }
    )
