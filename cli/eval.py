"""`localr1 eval`: how good a model is on a text or at arithmetic, and how far from a reference."""

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localr1.cli.chat_options import KvBitsOption
from localr1.cli.models import model_to_run, resolve_model
from localr1.cli.output import Output
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.quant.arithmetic import Accuracy, Attempt
    from localr1.quant.evaluate import Mean

app = typer.Typer(no_args_is_help=True, help="Measure a model.")

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
    loaded, tokenizer = evaluate.load(model_to_run(model, settings, output), kernels)
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
    kv_bits: KvBitsOption = None,
    as_json: AsJson = False,
) -> None:
    """Divergence of the model's predictions from those of a reference: 0 is the same model."""
    from localr1.experts.workspace import cache_in_8_bits
    from localr1.load import LoadOptions, make_kernels
    from localr1.quant import evaluate

    settings = Settings.from_environment()
    output = Output(color=settings.color)
    kernels, _ = make_kernels(LoadOptions(threads=threads or settings.threads))
    in_8_bits = cache_in_8_bits(kv_bits)
    original, tokenizer = evaluate.load(resolve_model(reference, settings), kernels)
    path = model_to_run(model, settings, output)
    loaded, _ = evaluate.load(path, kernels, cache_in_8_bits=in_8_bits)
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


def accuracy_row(name: str, accuracy: "Accuracy") -> tuple[str, str, str, str]:
    error = f"± {100 * accuracy.standard_error:.1f}"
    share = f"{100 * accuracy.share:.1f} %"
    return name, f"{accuracy.right} of {accuracy.total}", share, error


def wrong_answer(attempt: "Attempt") -> dict[str, str | None]:
    problem = attempt.problem
    return {
        "kind": problem.kind,
        "question": problem.question,
        "expected": problem.answer,
        "found": attempt.boxed,
        "reply": attempt.reply,
    }


@app.command()
def arithmetic(
    model: Annotated[
        str | None, typer.Argument(help="A model's directory, .gguf file, or name.")
    ] = None,
    per_kind: Annotated[
        int | None, typer.Option("--per-kind", min=1, help="Only so many of each kind.")
    ] = None,
    instruction: Annotated[
        str, typer.Option("-i", "--instruction", help="A line that follows each question.")
    ] = "",
    max_tokens: Annotated[
        int, typer.Option(min=1, help="End a reply after so many; it then counts as wrong.")
    ] = 1024,
    threads: Threads = None,
    show_wrong: Annotated[
        bool, typer.Option("--show-wrong", help="Print every wrong answer.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    r"""Share of 875 questions of arithmetic that the model answers right, in \boxed{}."""
    from localr1.load import load_engine
    from localr1.quant import arithmetic as arithmetic_test

    settings = Settings.from_environment()
    output = Output(color=settings.color)
    path = model_to_run(model, settings, output)
    problems = arithmetic_test.read_problems(per_kind)
    with output.progress("eval arithmetic") as line:

        def show(done: int, total: int, right: int) -> None:
            line.update(done, total, f"{right} of {done} right")

        with closing(load_engine(path, threads=threads or settings.threads)) as engine:
            attempts = arithmetic_test.attempt_all(
                engine, problems, instruction=instruction, max_tokens=max_tokens, progress=show
            )
    total = arithmetic_test.accuracy(attempts)
    kinds = arithmetic_test.by_kind(attempts)
    wrong = [wrong_answer(each) for each in attempts if not each.is_right]
    if as_json:
        output.json(
            {
                "model": str(path),
                "accuracy": total.share,
                "standard_error": total.standard_error,
                "right": total.right,
                "total": total.total,
                "cut_off": sum(each.was_cut for each in attempts),
                "kinds": {name: asdict(each) for name, each in kinds.items()},
                "wrong": wrong,
            }
        )
        return
    rows = [accuracy_row(name.replace("_", " "), each) for name, each in kinds.items()]
    output.table(("kind", "right", "share", "error"), [*rows, accuracy_row("all", total)])
    if show_wrong:
        for each in wrong:
            found = each["found"] if each["found"] is not None else "nothing in a box"
            output.line(f"\n{each['question']}  expected {each['expected']}, found {found}")
            output.line(each["reply"] or "")
    if cut := sum(each.was_cut for each in attempts):
        output.note(f"{cut} replies were cut off at {max_tokens} tokens: see --max-tokens.")
    if not any(each.boxed is not None for each in attempts):
        output.note(
            "No answer stood in a box. Ask for one: -i 'Put the final answer within \\boxed{}.'"
        )
