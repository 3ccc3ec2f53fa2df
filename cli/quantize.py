"""`localr1 quantize`: a full checkpoint in, one of 4 to 8 bits out."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from localr1.cli import quantize_options as option
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
    from localr1.quant.recipe import Recipe, Rotation
    from localr1.quant.report import Report


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


@dataclass(frozen=True)
class Asked:
    """The options that say what becomes of which tensor."""

    recipe_name: str | None
    bits: int
    group: int
    asymmetric: bool
    method: str
    attention_bits: int
    shared_bits: int
    head_bits: int
    embedding_bits: int
    smooth: bool
    rotation: "Rotation | None"

    def recipe(self, context: typer.Context) -> "Recipe":
        """Without a target. Raises UsageError for options that do not go together, and as
        `find_recipe` and `Recipe.uniform`."""
        from localr1.quant.methods.registry import METHODS, WITH_ZERO_POINTS, method_named
        from localr1.quant.recipe import NF4, Recipe, split_method
        from localr1.quant.recipe_file import find_recipe

        if self.recipe_name is not None:
            option.refuse_beside(context, "--recipe", option.SAID_BY_A_RECIPE)
            found = find_recipe(self.recipe_name, METHODS, WITH_ZERO_POINTS)
            return replace(found, rotation=self.rotation)
        if self.method == NF4:  # Its layout leaves no choice.
            fixed = (*option.CHOSEN_FOR_A_TARGET, "group", "asymmetric")
            option.refuse_beside(context, "--method nf4", fixed)
            return Recipe.nf4(smooth=self.smooth, rotation=self.rotation)
        method_named(split_method(self.method)[1], symmetric=not self.asymmetric)
        return Recipe.uniform(
            self.bits,
            self.group,
            attention_bits=self.attention_bits,
            head_bits=self.head_bits,
            embedding_bits=self.embedding_bits,
            shared_bits=self.shared_bits,
            method=self.method,
            asymmetric=self.asymmetric,
            smooth=self.smooth,
            rotation=self.rotation,
        )

    def choice(
        self,
        context: typer.Context,
        output: Output,
        places: tuple[Path, Path],
        wanted: Wanted,
        calibration: Path | None,
        *,
        is_new: bool,
    ) -> Choice:
        """With one. places: of the model and of the result. Raises as `quantize_target.choose`."""
        from localr1.quant.methods.registry import method_named
        from localr1.quant.recipe import split_method

        taken = ("recipe_name", *option.CHOSEN_FOR_A_TARGET, "rotate")
        option.refuse_beside(context, "a target", taken)
        is_awq, rounding = split_method(self.method)
        target = wanted.target(
            self.group,
            method_named(rounding, symmetric=not self.asymmetric).name,
            smooth=self.smooth,
            asymmetric=self.asymmetric,
            calibration=calibration,
        )
        made = choose(output, *places, wanted, target, calibration, is_new=is_new)
        return replace(made, recipe=replace(made.recipe, awq=is_awq))


def show_result(
    output: Output,
    report: "Report",
    choice: Choice | None,
    card: dict[str, Any] | None,
    *,
    as_json: bool,
    with_tensors: bool,
) -> None:
    """with_tensors: a line for each; JSON has them of every dry run."""
    if as_json:
        document = as_document(report, with_tensors=report.out is None)
        for name, more in (("target", choice.document if choice else None), ("quality", card)):
            if more is not None:
                document[name] = more
        output.json(document)
        return
    if with_tensors:
        print_tensors(output, report.tensors)
    print_report(output, report)
    if card is not None:
        output.fields({"quality": quality_line(card)})


def quantize(
    source: option.Source,
    out: option.Out,
    context: typer.Context,
    recipe_name: option.RecipeName = None,
    target_size: option.TargetSize = None,
    target_bpw: option.TargetBpw = None,
    not_portable: option.NotPortable = False,
    routing: option.Routing = None,
    bits: option.Bits = 4,
    group: option.Group = 32,
    asymmetric: option.Asymmetric = False,
    method: option.Method = "rtn",
    attention_bits: option.AttentionBits = 8,
    shared_bits: option.SharedBits = 8,
    head_bits: option.HeadBits = 8,
    embedding_bits: option.EmbeddingBits = 16,
    smooth: option.Smooth = True,
    rotate: option.Rotate = None,
    rotation_seed: option.RotationSeed = 0,
    calibration: option.Calibration = None,
    text: option.Text = None,
    tokens: option.Tokens = None,
    restart: option.Restart = False,
    delete_source_shards: option.DeleteSourceShards = False,
    yes: option.Yes = False,
    with_card: option.WithCard = False,
    dry_run: option.DryRun = False,
    verbose: option.Verbose = False,
    as_json: option.AsJson = False,
) -> None:
    """Quantize SOURCE into the new directory OUT (Hugging Face compressed-tensors).

    After an interruption the same command goes on where it was.
    """
    from localr1.quant import pipeline
    from localr1.quant.recipe import Rotation

    settings = Settings.from_environment()
    output = Output(color=settings.color)
    if not dry_run:
        option.refuse_alone(context, "verbose", "--dry-run")
    if with_card and (dry_run or delete_source_shards):
        found = "--dry-run" if dry_run else "--delete-source-shards"
        raise UsageError("--quality-card", expected="source and result in the end", found=found)
    if rotate is None:
        option.refuse_alone(context, "rotation_seed", "--rotate")
    asked = Asked(
        recipe_name,
        bits,
        group,
        asymmetric,
        method,
        attention_bits,
        shared_bits,
        head_bits,
        embedding_bits,
        smooth,
        None if rotate is None else Rotation(rotate, rotation_seed),
    )
    read = option.calibration_options(calibration, text, tokens)
    path = resolve_model(source, settings)
    wanted = Wanted(target_size, target_bpw, not_portable, routing)
    choice: Choice | None = None
    if wanted.is_given:
        is_new = restart or dry_run
        choice = asked.choice(context, output, (path, out), wanted, calibration, is_new=is_new)
    recipe = choice.recipe if choice else asked.recipe(context)
    if dry_run:
        report = pipeline.dry_run(path, recipe, read, choice.errors if choice else None)
    elif delete_source_shards:
        report = run_and_delete(output, path, out, recipe, yes, calibration=read, restart=restart)
    else:
        report = run(output, path, out, recipe, calibration=read, restart=restart)
    card = add_card(output, path, report, settings) if with_card else None
    show_result(output, report, choice, card, as_json=as_json, with_tensors=verbose)
