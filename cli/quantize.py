"""`localr1 quantize`: a full checkpoint in, a 4- or 8-bit one out."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localr1.cli.confirm import confirmed
from localr1.cli.memory import peak_memory_bytes
from localr1.cli.models import resolve_model
from localr1.cli.output import Output, format_bytes
from localr1.cli.quantize_target import Choice, Wanted, choose
from localr1.cli.show import left_out_line, quality_line
from localr1.embedded import R1_NANO
from localr1.errors import UsageError
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.quant.calibration_options import CalibrationOptions
    from localr1.quant.moments import ExpertUse
    from localr1.quant.recipe import Recipe, Rotation
    from localr1.quant.report import Report, TensorReport

CHOSEN_FOR_A_TARGET = ("bits", "attention_bits", "shared_bits", "head_bits", "embedding_bits")
"""Options for which --target-size and --target-bpw leave no room."""
SAID_BY_A_RECIPE = (*CHOSEN_FOR_A_TARGET, "group", "method", "smooth", "asymmetric")
"""Those for which --recipe leaves none."""


def refuse_beside(context: typer.Context, option: str, names: Sequence[str]) -> None:
    """Raises UsageError for an option that was given although `option` says what it would."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(
                f"--{name.removesuffix('_name').replace('_', '-')} beside {option}",
                expected="one of the two",
                found="both",
                fix=f"Leave one out: {option} says it all.",
            )


def as_document(report: "Report", *, with_tensors: bool = False) -> dict[str, Any]:
    document = {
        "source": str(report.source),
        "out": None if report.out is None else str(report.out),
        "parameters": report.parameters,
        "source_bytes": report.source_nbytes,
        "bytes": report.nbytes,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "portable": not report.reasons_not_portable,
        "not_portable_because": list(report.reasons_not_portable),
        "smoothed": report.num_smoothed,
        "rotation": None if report.rotation is None else asdict(report.rotation),
        "left_out": None if report.left_out is None else asdict(report.left_out),
        "calibration": calibration_document(report),
        "seconds": round(report.seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "parts": [asdict(part) for part in report.parts],
    }
    if with_tensors:
        document["tensors"] = [asdict(tensor) for tensor in report.tensors]
    return document


def print_tensors(output: Output, tensors: Sequence["TensorReport"]) -> None:
    output.table(
        ("tensor", "part", "type", "parameters", "size"),
        [
            (
                tensor.name,
                tensor.part,
                tensor.scheme,
                f"{tensor.parameters:,}",
                format_bytes(tensor.nbytes),
            )
            for tensor in tensors
        ],
    )
    output.line()


def calibration_document(report: "Report") -> dict[str, Any] | None:
    """What text was read; None where none was."""
    if report.calibrated is None:
        return None
    use = report.expert_use
    return {
        "text": report.calibrated.text,
        "tokens": report.calibrated.tokens,
        "experts": None if use is None else asdict(use),
    }


def expert_use_line(use: "ExpertUse") -> str:
    return (
        f"{use.experts:,}, of which each saw {use.median:,} tokens in the median, "
        f"{use.fewest:,} at least; {use.unseen:,} saw none"
    )


def print_report(output: Output, report: "Report") -> None:
    output.table(
        ("part", "type", "tensors", "parameters", "size", "relative error"),
        [
            (
                part.part,
                part.scheme,
                f"{part.num_tensors:,}",
                f"{part.parameters:,}",
                format_bytes(part.nbytes),
                "" if part.relative_error is None else f"{part.relative_error:.2e}",
            )
            for part in report.parts
        ],
    )
    output.line()
    fields = {
        "weights": f"{format_bytes(report.source_nbytes)} -> {format_bytes(report.nbytes)}, "
        f"{report.bits_per_weight:.2f} bits for each weight of the source",
        "opens in": "localr1 only: " + "; ".join(report.reasons_not_portable)
        if report.reasons_not_portable
        else f"localr1, transformers and what else reads {report.layout}",
    }
    if report.num_smoothed:
        fields["smoothed"] = f"the inputs of {report.num_smoothed} groups of matrices"
    if report.rotation is not None:
        fields["rotated"] = f"{report.rotation.kind}, seed {report.rotation.seed}"
    if report.calibrated is not None:
        fields["calibrated"] = f"{report.calibrated.tokens:,} tokens of {report.calibrated.text}"
    if report.expert_use is not None:
        fields["experts"] = expert_use_line(report.expert_use)
    if report.left_out is not None:
        fields["left out"] = left_out_line(asdict(report.left_out))
    if report.out is not None:
        peak = peak_memory_bytes()
        fields["written"] = str(report.out)
        fields["took"] = f"{report.seconds:.1f} s, {format_bytes(peak)} of memory at most"
    output.fields(fields)


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
            "--recipe", help="small, balanced, quality, or a .toml file: bits by names of tensors."
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
            help="With a target: also what localr1 alone opens: bits expert by expert, embedding.",
        ),
    ] = False,
    routing: Annotated[
        Path | None,
        typer.Option("--routing", help="With a target: a routing trace, how much experts count."),
    ] = None,
    bits: Annotated[
        int, typer.Option("--bits", "-b", help="Of the MLP, or the routed experts: 4 or 8.")
    ] = 4,
    group: Annotated[
        int, typer.Option("--group", "-g", help="Weights that share a scale: 32, 64 or 128.")
    ] = 32,
    asymmetric: Annotated[
        bool,
        typer.Option(
            "--asymmetric", help="Zero points for 4-bit matrices: closer, but not portable."
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
        int, typer.Option("--attention-bits", help="4, 8, or 16 to keep attention as it is.")
    ] = 8,
    shared_bits: Annotated[
        int,
        typer.Option(
            "--shared-bits", help="4, 8 or 16: shared experts and dense MLPs of a mixture."
        ),
    ] = 8,
    head_bits: Annotated[
        int, typer.Option("--head-bits", help="4, 8, or 16 to keep the output head as it is.")
    ] = 8,
    embedding_bits: Annotated[
        int,
        typer.Option(
            "--embedding-bits", help="16 as it is; 8 or 4: smaller, but opens in localr1 only."
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
    if verbose and not dry_run:
        raise UsageError("--verbose", expected="--dry-run beside it")
    if with_card and (dry_run or delete_source_shards):
        found = "--dry-run" if dry_run else "--delete-source-shards"
        raise UsageError("--quality-card", expected="source and result in the end", found=found)
    rotation = None if rotate is None else Rotation(rotate, rotation_seed)
    options = calibration_options(calibration, text, tokens)
    path = resolve_model(source, settings)
    wanted = Wanted(target_size, target_bpw, not_portable, routing)
    choice: Choice | None = None
    if wanted.is_given:
        names = ("recipe_name", *CHOSEN_FOR_A_TARGET, "asymmetric", "rotate")
        refuse_beside(context, "a target", names)
        is_awq, rounding = split_method(method)
        target = wanted.target(group, method_named(rounding).name, smooth, calibration)
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
            report = run(
                output, path, out, recipe, calibration=options, arrival=arrival, restart=restart
            )
            arrival.finish()
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
