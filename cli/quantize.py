"""`localr1 quantize`: a full checkpoint in, one of 4 to 8 bits out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localr1.cli.confirm import confirmed
from localr1.cli.memory import peak_memory_bytes
from localr1.cli.models import resolve_model
from localr1.cli.output import Output, format_bytes
from localr1.cli.quantize_report import as_document, print_report, print_tensors
from localr1.cli.quantize_target import Choice, Wanted, choose
from localr1.cli.show import quality_line
from localr1.embedded import R1_NANO
from localr1.errors import UsageError
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.quant.calibration_options import CalibrationOptions
    from localr1.quant.recipe import Recipe, Rotation
    from localr1.quant.report import Report

CHOSEN_FOR_A_TARGET = ("bits", "attention_bits", "shared_bits", "head_bits", "embedding_bits")
"""Options for which --target-size and --target-bpw leave no room."""
SAID_BY_A_RECIPE = (*CHOSEN_FOR_A_TARGET, "group", "method", "smooth", "asymmetric")
"""Those for which --recipe leaves none."""


def was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_alone(context: typer.Context, name: str, option: str) -> None:
    """Raises UsageError for an option that was given and means nothing without another."""
    if was_given(context, name):
        raise UsageError(f"--{name.replace('_', '-')}", expected=f"{option} beside it")


def refuse_beside(context: typer.Context, option: str, names: Sequence[str]) -> None:
    """Raises UsageError for an option that was given although `option` says what it would."""
    for name in names:
        if was_given(context, name):
            raise UsageError(
                f"--{name.removesuffix('_name').replace('_', '-')} beside {option}",
                expected="one of the two",
                found="both",
                fix=f"Leave one out: {option} says it all.",
            )


def run(output: Output, path: Path, out: Path, recipe: "Recipe", **options: Any) -> "Report":
    """With a line of progress. options: of `pipeline.quantize`."""
    from localr1.quant import pipeline
    from localr1.quant.progress import Progress

    with output.progress("quantize") as line:
        done, total = 0, 1

        def show(progress: Progress) -> None:
            nonlocal done, total
            # The other stages take turns with this one, so that the line goes by it alone.
            if progress.stage == "quantize":
                done, total = progress.done, progress.total
            if progress.stage == "calibrate":
                amount = f"layer {progress.done} of {progress.total}"
            else:
                amount = f"{format_bytes(progress.done)} of {format_bytes(progress.total)}"
            memory = format_bytes(peak_memory_bytes())
            line.update(done, total, f"{progress.stage}: {amount}, {memory}, {progress.name}")

        return pipeline.quantize(path, out, recipe, show, **options)


def run_and_delete(
    output: Output, path: Path, out: Path, recipe: "Recipe", yes: bool, **options: Any
) -> "Report":
    """`run`, and each file of the source is deleted when it is used up. Asks first unless `yes`."""
    from localr1.quant.deleting import DeletingArrival, source_held

    if path == R1_NANO:
        raise UsageError(f"{path.name} is a part of localr1, and stays")
    with source_held(path):
        arrival = DeletingArrival(path)
        nbytes = sum(file.stat().st_size for file in arrival.to_delete.values())
        what = f"{len(arrival.to_delete)} files, {format_bytes(nbytes)}, of {path}"
        if not confirmed(output, f"Delete {what}, as they are quantized?", yes):
            output.note("Nothing was deleted.")
            raise typer.Exit(1)
        report = run(output, path, out, recipe, arrival=arrival, **options)
        arrival.finish()
    return report


def add_card(output: Output, source: Path, report: "Report", settings: Settings) -> dict[str, Any]:
    """The quality card, which is written into the result."""
    from localr1.cli.eval import quality_card
    from localr1.quant.evaluate import DEFAULT_WINDOW
    from localr1.quant.quality_card import Cost, write_card

    assert report.out is not None
    cost = Cost(report.seconds, peak_memory_bytes())  # Before a model is loaded.
    card = quality_card(output, report.out, source, None, DEFAULT_WINDOW, settings.threads, cost)
    write_card(report.out, card)
    return card


def calibration_options(
    file: Path | None, text: Path | None, tokens: int | None
) -> "CalibrationOptions":
    from localr1.quant.calibration_options import CalibrationOptions

    if file is not None and (text is not None or tokens is not None):
        raise UsageError(
            "--calibration beside --text or --tokens",
            expected="one of the two",
            found="both",
            fix="Leave one out: the file says what text was read.",
        )
    if text is None:
        return CalibrationOptions(file, tokens=tokens)
    return CalibrationOptions(text=text, tokens=tokens)


def nf4_recipe(context: typer.Context, *, smooth: bool, rotation: "Rotation | None") -> "Recipe":
    """Raises UsageError for an option of what NF4's layout leaves no choice in."""
    from localr1.quant.recipe import Recipe

    refuse_beside(context, "--method nf4", (*CHOSEN_FOR_A_TARGET, "group", "asymmetric"))
    return Recipe.nf4(smooth=smooth, rotation=rotation)


def quantize(
    source: Annotated[str, typer.Argument(help="A model's directory, .gguf file, or name.")],
    out: Annotated[Path, typer.Argument(help="The directory to make; must not exist.")],
    context: typer.Context,
    recipe_name: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="small, balanced, quality, local, or a .toml file: bits by names."
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option("--target-size", help="Choose bits so that all files fit in 40GiB."),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option("--target-bpw", min=0.0, help="Choose bits for 4.5 a weight on average."),
    ] = None,
    not_portable: Annotated[
        bool,
        typer.Option(
            "--not-portable",
            help="With a target: also 5 and 6 bits, bits expert by expert, a packed embedding.",
        ),
    ] = False,
    routing: Annotated[
        Path | None,
        typer.Option("--routing", help="With a target: a routing trace, how much experts count."),
    ] = None,
    bits: Annotated[
        int, typer.Option("--bits", "-b", help="Of the MLP, or the routed experts: 4, 5, 6 or 8.")
    ] = 4,
    group: Annotated[
        int, typer.Option("--group", "-g", help="Weights that share a scale: 32, 64 or 128.")
    ] = 32,
    asymmetric: Annotated[
        bool,
        typer.Option(
            "--asymmetric", help="Zero points for less than 8 bits: closer, but not portable."
        ),
    ] = False,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="How codes are chosen: rtn, imatrix, gptq or nf4; awq+ before it scales columns.",
        ),
    ] = "rtn",
    attention_bits: Annotated[
        int, typer.Option("--attention-bits", help="4, 5, 6, 8, or 16 to keep attention as it is.")
    ] = 8,
    shared_bits: Annotated[
        int,
        typer.Option(
            "--shared-bits", help="4, 5, 6, 8, 16: shared experts, a mixture's dense MLPs."
        ),
    ] = 8,
    head_bits: Annotated[
        int, typer.Option("--head-bits", help="4, 5, 6, 8, or 16 to keep the output head as it is.")
    ] = 8,
    embedding_bits: Annotated[
        int,
        typer.Option(
            "--embedding-bits",
            help="16 as it is; 8, 6, 5 or 4: smaller, but opens in localr1 only.",
        ),
    ] = 16,
    smooth: Annotated[
        bool, typer.Option(help="Even out the activations of a dense model first.")
    ] = True,
    rotate: Annotated[
        str | None,
        typer.Option(
            "--rotate", help="Rotate the residual stream first: hadamard or random. Unties a head."
        ),
    ] = None,
    rotation_seed: Annotated[
        int, typer.Option("--rotation-seed", help="Of what --rotate draws.")
    ] = 0,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="What `localr1 calibrate` wrote of SOURCE."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="To calibrate with instead, UTF-8; by default a built-in one."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help="Of the text; by default 8192 at most.")
    ] = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Throw away what an interrupted run left; begin anew."),
    ] = False,
    delete_source_shards: Annotated[
        bool,
        typer.Option(
            "--delete-source-shards",
            help="Delete each file of SOURCE's weights when what is made of it is safe.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before deleting.")] = False,
    with_card: Annotated[
        bool,
        typer.Option("--quality-card", help="Measure the result against SOURCE, for `show`."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written; write nothing.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="With --dry-run: a line for each tensor.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Quantize SOURCE into the new directory OUT (Hugging Face compressed-tensors).

    After an interruption the same command goes on where it was.
    """
    from localr1.quant import pipeline
    from localr1.quant.methods.registry import METHODS, WITH_ZERO_POINTS, method_named
    from localr1.quant.recipe import NF4, Recipe, Rotation, split_method
    from localr1.quant.recipe_file import find_recipe

    settings = Settings.from_environment()
    output = Output(color=settings.color)
    if not dry_run:
        refuse_alone(context, "verbose", "--dry-run")
    if with_card and (dry_run or delete_source_shards):
        found = "--dry-run" if dry_run else "--delete-source-shards"
        raise UsageError("--quality-card", expected="source and result in the end", found=found)
    if rotate is None:
        refuse_alone(context, "rotation_seed", "--rotate")
    rotation = None if rotate is None else Rotation(rotate, rotation_seed)
    options = calibration_options(calibration, text, tokens)
    path = resolve_model(source, settings)
    wanted = Wanted(target_size, target_bpw, not_portable, routing)
    choice: Choice | None = None
    if wanted.is_given:
        refuse_beside(context, "a target", ("recipe_name", *CHOSEN_FOR_A_TARGET, "rotate"))
        is_awq, rounding = split_method(method)
        name = method_named(rounding, symmetric=not asymmetric).name
        target = wanted.target(
            group, name, smooth=smooth, asymmetric=asymmetric, calibration=calibration
        )
        choice = choose(output, path, out, wanted, target, calibration, is_new=restart or dry_run)
        recipe = replace(choice.recipe, awq=is_awq)
    elif recipe_name is not None:
        refuse_beside(context, "--recipe", SAID_BY_A_RECIPE)
        recipe = replace(find_recipe(recipe_name, METHODS, WITH_ZERO_POINTS), rotation=rotation)
    elif method == NF4:
        recipe = nf4_recipe(context, smooth=smooth, rotation=rotation)
    else:
        method_named(split_method(method)[1], symmetric=not asymmetric)
        recipe = Recipe.uniform(
            bits,
            group,
            attention_bits=attention_bits,
            head_bits=head_bits,
            embedding_bits=embedding_bits,
            shared_bits=shared_bits,
            method=method,
            asymmetric=asymmetric,
            smooth=smooth,
            rotation=rotation,
        )
    if dry_run:
        report = pipeline.dry_run(path, recipe, options, choice.errors if choice else None)
    elif delete_source_shards:
        report = run_and_delete(
            output, path, out, recipe, yes, calibration=options, restart=restart
        )
    else:
        report = run(output, path, out, recipe, calibration=options, restart=restart)
    card = add_card(output, path, report, settings) if with_card else None
    if as_json:
        document = as_document(report, with_tensors=dry_run)
        for name, more in (("target", choice.document if choice else None), ("quality", card)):
            if more is not None:
                document[name] = more
        output.json(document)
    else:
        if verbose:
            print_tensors(output, report.tensors)
        print_report(output, report)
        if card is not None:
            output.fields({"quality": quality_line(card)})
