"""`localr1 eval`: how good a model is on a text or at arithmetic, and how far from a reference."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localr1.cli.chat_options import KvBitsOption
from localr1.cli.experts import (
    DeviceOption,
    DevicesOption,
    GpuLayersOption,
    expert_options,
)
from localr1.cli.models import model_to_run, resolve_model
from localr1.cli.output import Output, format_bytes
from localr1.cli.show import quality_line
from localr1.errors import UsageError
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.experts.options import ExpertOptions
    from localr1.models.api import Model as Predictor
    from localr1.quant.arithmetic import Accuracy, Attempt
    from localr1.quant.evaluate import Divergence, Mean
    from localr1.quant.quality_card import Cost
    from localr1.tokenizer import Tokenizer

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


@contextmanager
def loaded(
    path: Path,
    window: int,
    threads: int | None,
    experts: "ExpertOptions | None" = None,
    kv_bits: int | None = None,
) -> Iterator[tuple["Predictor", "Tokenizer"]]:
    """A model that reads windows of at most so many tokens. Raises what loading raises."""
    from localr1.experts.workspace import cache_in_8_bits
    from localr1.load import LoadOptions, load_engine, make_kernels
    from localr1.quant import evaluate

    if experts is None or not experts.names_a_device:
        kernels, _ = make_kernels(LoadOptions(threads=threads))
        yield evaluate.load(path, kernels, cache_in_8_bits=cache_in_8_bits(kv_bits))
        return
    with closing(
        load_engine(path, threads=threads, context=window, experts=experts, kv_bits=kv_bits)
    ) as engine:
        yield engine.model, engine.tokenizer


@app.command()
def ppl(
    model: Model,
    text: Text = None,
    window: Window = 1024,
    threads: Threads = None,
    device: DeviceOption = "cpu",
    devices: DevicesOption = None,
    gpu_layers: GpuLayersOption = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity: how surprised the model is by the text, lower is better."""
    from localr1.quant import evaluate

    settings = Settings.from_environment()
    output = Output(color=settings.color)
    path = model_to_run(model, settings, output)
    experts = expert_options(device=device, devices=devices, gpu_layers=gpu_layers)
    words = evaluate.read_text(text)
    with (
        loaded(path, window, threads or settings.threads, experts) as (predictor, tokenizer),
        output.progress("eval ppl") as line,
    ):
        result = evaluate.perplexity(predictor, tokenizer, words, window, line.update)
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
    other: Annotated[
        str | None, typer.Argument(metavar="[REFERENCE]", help="The model to compare with.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", "-r", help="The same, as an option: the original."),
    ] = None,
    text: Text = None,
    window: Window = 1024,
    threads: Threads = None,
    kv_bits: KvBitsOption = None,
    device: DeviceOption = "cpu",
    devices: DevicesOption = None,
    gpu_layers: GpuLayersOption = None,
    as_json: AsJson = False,
) -> None:
    """Divergence of the model's predictions from those of a reference: 0 is the same model. The
    reference is computed by the CPU."""
    from localr1.quant import evaluate

    settings = Settings.from_environment()
    output = Output(color=settings.color)
    if (other is None) == (reference is None):
        raise UsageError(
            "eval kl",
            expected="one model to compare with: eval kl MODEL REFERENCE",
            found="none" if other is None else f"two, {other} and {reference}",
        )
    result = compare(
        output,
        model_to_run(model, settings, output),
        resolve_model(other or reference, settings),
        evaluate.read_text(text),
        window,
        threads or settings.threads,
        kv_bits,
        expert_options(device=device, devices=devices, gpu_layers=gpu_layers),
    )
    if as_json:
        output.json(asdict(result))
    else:
        output.fields(divergence_fields(result))


def compare(
    output: Output,
    model: Path,
    reference: Path,
    text: str,
    window: int,
    threads: int | None,
    kv_bits: int | None = None,
    experts: "ExpertOptions | None" = None,
) -> "Divergence":
    """Of the model from the reference on a text, with a line of progress. kv_bits: of the model's
    cache. experts: where the model is computed."""
    from localr1.quant import evaluate

    with (
        loaded(reference, window, threads) as (original, tokenizer),
        loaded(model, window, threads, experts, kv_bits) as (predictor, _),
        output.progress("eval kl") as line,
    ):
        return evaluate.divergence(original, predictor, tokenizer, text, window, line.update)


def divergence_fields(result: "Divergence") -> dict[str, str]:
    return {
        "mean KL": with_error(result.kl, 5, unit=" nats"),
        "99th percentile": f"{result.kl_p99:.4f} nats",
        "same top token": with_error(result.top1, 2, 100.0, " %"),
        "perplexity": with_error(result.model.perplexity, 3),
        "reference": with_error(result.reference.perplexity, 3),
        "positions": f"{result.num_positions:,}",
    }


@app.command()
def card(
    model: Model,
    reference: Annotated[
        str, typer.Option("--reference", "-r", help="The unquantized model it was made from.")
    ],
    text: Text = None,
    window: Window = 1024,
    threads: Threads = None,
    write: Annotated[
        bool, typer.Option("--write", help="Put it into the model's directory, for `show`.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """The quality card of a quantized model: all measures, sizes and the error of each layer."""
    settings = Settings.from_environment()
    output = Output(color=settings.color)
    folder, source = (resolve_model(name, settings) for name in (model, reference))
    made = quality_card(output, folder, source, text, window, threads or settings.threads)
    if write:
        from localr1.quant.quality_card import write_card

        output.note(f"Written: {write_card(folder, made)}")
    if as_json:
        output.json(made)
    else:
        print_card(output, made)


def quality_card(
    output: Output,
    folder: Path,
    source: Path,
    text: Path | None,
    window: int,
    threads: int | None,
    cost: "Cost | None" = None,
) -> dict[str, Any]:
    """Measured. Raises as `check_disjoint`, `make_card` and what loading raises."""
    from localr1.quant import evaluate
    from localr1.quant.quality_card import check_disjoint, make_card

    words = evaluate.read_text(text)
    check_disjoint(words, folder)
    result = compare(output, folder, source, words, window, threads)
    name = (text or evaluate.DEFAULT_TEXT).name
    return make_card(folder, source, result, words, name, window, cost)


def print_card(output: Output, made: Mapping[str, Any]) -> None:
    fields = {
        "quality": quality_line(made),
        "size": f"{format_bytes(made['bytes'])}, {made['bits_per_weight']:.2f} bits for each "
        "weight of the source",
    }
    if made["seconds"] is not None:
        peak = format_bytes(made["peak_memory_bytes"])
        fields["quantized"] = f"in {made['seconds']:.1f} s, {peak} of memory at most"
    output.fields(fields)
    output.line()
    output.table(
        ("layer", "relative error"),
        [(layer["layer"], f"{layer['relative_error']:.2e}") for layer in made["layers"]],
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
    device: DeviceOption = "cpu",
    devices: DevicesOption = None,
    gpu_layers: GpuLayersOption = None,
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
    experts = expert_options(device=device, devices=devices, gpu_layers=gpu_layers)
    threads = threads or settings.threads
    problems = arithmetic_test.read_problems(per_kind)
    with output.progress("eval arithmetic") as line:

        def show(done: int, total: int, right: int) -> None:
            line.update(done, total, f"{right} of {done} right")

        with closing(load_engine(path, threads=threads, experts=experts)) as engine:
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
