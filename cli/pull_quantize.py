"""`localr1 pull --quantize`: the shards are quantized as they arrive, and may go again."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer

from localr1.checkpoint.manifest import MANIFEST_NAME
from localr1.cli.confirm import confirmed
from localr1.cli.models import models_dir
from localr1.cli.output import Output, format_bytes
from localr1.cli.pull import PullLine, Wishes, format_duration
from localr1.errors import OutputError, UsageError
from localr1.hub.arrival import DownloadArrival
from localr1.hub.describe import Origin, origin_of
from localr1.hub.downloads import read_pull
from localr1.hub.known import find_model
from localr1.hub.pull import MARGIN_BYTES, Pull, check_space, fetch
from localr1.hub.repository import Hub
from localr1.hub.transfer import Totals
from localr1.quant import progress as quant_progress
from localr1.quant.journal import sections_done
from localr1.quant.methods.registry import METHODS, WITH_ZERO_POINTS
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe
from localr1.quant.recipe_file import find_recipe
from localr1.quant.report import Report
from localr1.quant.schedule import Schedule
from localr1.quant.source import plan_arrival
from localr1.settings import Settings

GROUP = 32
HELD_SHARDS = 4
"""Of the largest, how many may lie there before they are needed, where shards are deleted."""


def fetch_and_quantize(
    output: Output, pull: Pull, hub: Hub, settings: Settings, wishes: Wishes
) -> bool:
    """Under the repository's lock. Prints where the quantized model lies. Returns whether the
    source's shards have gone.

    Raises OutputError where another model has the name, and what the download and the quantizer
    raise; the same command goes on where it was.
    """
    assert wishes.form is not None
    reference = pull.listing.reference
    bits = int(wishes.form) if wishes.form.isdecimal() else None
    recipe = recipe_of(wishes.form, bits, pull.listing.repository)
    ending = Path(wishes.form).stem if bits is None else f"int{bits}"
    out = models_dir(settings) / f"{reference.name.rpartition('/')[2]}-{ending}"
    is_new = not os.path.lexists(out)
    if not is_new:
        output.note(what_is_there(out, pull))
    else:
        if wishes.deletes:
            ask_for_what_was_there(output, pull, wishes)
        with output.progress(f"Pulling {reference.name}") as line:
            shown = BothLines(PullLine(reference.name, line))
            if any(file.path.endswith(".gguf") for file in pull.selection.weights):
                report = whole_first(pull, hub, out, recipe, wishes, shown)
            else:
                report = as_it_arrives(pull, hub, out, recipe, wishes, shown)
        output.note(
            f"{format_bytes(report.source_nbytes)} -> {format_bytes(report.nbytes)}, "
            f"{report.bits_per_weight:.2f} bits for each weight"
        )
    if wishes.as_json:
        output.json(
            {
                "repository": pull.listing.repository,
                "commit": pull.listing.commit,
                "bits": bits,
                "recipe": None if bits is not None else wishes.form,
                "path": str(out),
            }
        )
    else:
        output.line(str(out))
    return is_new and wishes.deletes


def recipe_of(form: str, bits: int | None, repository: str) -> Recipe:
    """form: of --quantize. bits: that it is; None for the name of a recipe. Raises as
    `find_recipe`."""
    if bits is None:
        return find_recipe(form, METHODS, WITH_ZERO_POINTS)
    known = find_model(repository)
    return Recipe.uniform(bits, GROUP if known is None else known.recipe.group)


def what_is_there(out: Path, pull: Pull) -> str:
    """Of a quantized model of the name. Raises OutputError where it is another's."""
    manifest = out / MANIFEST_NAME
    origin = origin_of(manifest) if manifest.is_file() else Origin(None, None)
    remedy = f"`localr1 rm {out.name}` makes room"
    if origin.repository != pull.listing.repository:
        raise OutputError(
            f"{out}: the name is taken",
            expected=f"nothing, or the model quantized from {pull.listing.repository}",
            found=f"one quantized from {origin.repository or 'elsewhere'}",
            fix=f"{remedy}; or pull without --quantize, and `localr1 quantize` under a name of "
            "your own.",
        )
    if origin.commit != pull.listing.commit:
        return f"{out.name} is here already, made from commit {origin.commit}: {remedy}."
    return f"{out.name} is here already."


def ask_for_what_was_there(output: Output, pull: Pull, wishes: Wishes) -> None:
    """Shards that no unfinished pull of this model has fetched may be another program's. Raises
    UsageError where nobody can be asked, typer.Exit where the answer is no."""
    record = read_pull(pull.cached.path)
    if record is not None and record.commit == pull.listing.commit:
        return
    there = set(pull.selection.weights) - set(pull.missing)
    if there and not confirmed(
        output,
        f"{len(there)} shards were in the cache before ({pull.snapshot}). Delete them too?",
        wishes.yes,
    ):
        raise typer.Exit(1)


def as_it_arrives(
    pull: Pull, hub: Hub, out: Path, recipe: Recipe, wishes: Wishes, shown: "BothLines"
) -> Report:
    with DownloadArrival(
        pull, hub, jobs=wishes.jobs, releases=wishes.deletes, on_progress=shown.show_download
    ) as arrival:
        shown.totals = arrival.totals
        arrival.open()
        schedule = plan_arrival(arrival.directory, arrival, recipe)
        done = 0 if wishes.restart else sections_done(out)
        held = None
        if wishes.deletes:
            held = most_held(pull, schedule, done)
        else:
            to_write = sum(schedule.written[done:])
            check_space(pull, to_write if is_one_disk(pull, out) else 0)
        arrival.schedule(schedule.remaining(done), held)
        report = quantize(
            arrival.directory,
            out,
            recipe,
            shown.show_quantization,
            arrival=arrival,
            restart=wishes.restart,
        )
        arrival.finish()
    if wishes.deletes:
        pull.cached.end_pull()
    return report


def whole_first(
    pull: Pull, hub: Hub, out: Path, recipe: Recipe, wishes: Wishes, shown: "BothLines"
) -> Report:
    """A GGUF file has no order that would help."""
    if wishes.deletes:
        raise UsageError(
            "--delete-source-shards",
            expected="a model in safetensors",
            found="a GGUF file",
            fix="Remove it afterwards: localr1 rm.",
        )
    check_space(pull)
    snapshot = fetch(pull, hub, jobs=wishes.jobs, progress=shown.show_download)
    source = snapshot.joinpath(*pull.selection.weights[0].path.split("/"))
    return quantize(source, out, recipe, shown.show_quantization, restart=wishes.restart)


def forget_source(pull: Pull, settings: Settings) -> None:
    """What is left of the source once its shards are gone: small files that make no model."""
    from localr1.hub.library import Library
    from localr1.hub.removal import plan_removals, remove

    library = Library.of(settings)
    names = [model.name for model in library.models() if model.path == pull.snapshot]
    for removal in plan_removals(names, library):
        remove(removal, library)


def most_held(pull: Pull, schedule: Schedule, done: int) -> int:
    """Bytes of shards that may run ahead of the quantizer: some, if the disk has room for them and
    what will have been written by then. done: sections that an earlier run has written. Raises
    OutputError where there is no room for the least."""
    largest = max((file.size for file in pull.selection.weights), default=0)
    least = schedule.peak(
        {file.path for file in pull.selection.weights} - {file.path for file in pull.missing},
        releases=True,
        begin=done,
    )
    spare = pull.free_bytes() - least - MARGIN_BYTES
    if spare < 0:
        raise OutputError(
            f"{pull.listing.repository}: room on the disk of {pull.cached.path}",
            expected=f"{(least + MARGIN_BYTES) / 2**30:.1f} GiB",
            found=f"{pull.free_bytes() / 2**30:.1f} GiB free",
            fix="Free some (localr1 prune, localr1 rm), or set HF_HOME to a larger disk.",
        )
    return min(spare, HELD_SHARDS * largest)


def is_one_disk(pull: Pull, out: Path) -> bool:
    """Whether source and result share one."""

    def device(path: Path) -> int:
        while not path.exists():
            path = path.parent
        return path.stat().st_dev

    return device(pull.cached.path) == device(out)


@dataclass
class BothLines:
    """One line for what arrives and what is made of it. quantized: as last told. totals: asks how
    far the download is. begun: when the quantizer was first heard of, and where it was."""

    pull: PullLine
    quantized: str = ""
    begun: tuple[float, float] | None = None
    totals: Callable[[], Totals | None] = lambda: None

    def show_download(self, totals: Totals) -> None:
        self.pull.show(totals, self.quantized)

    def show_quantization(self, progress: quant_progress.Progress) -> None:
        if progress.stage == "quantize" and progress.total:
            share = progress.done / progress.total
            self.quantized = f"; quantized {share:.0%}"
            is_whole = (totals := self.totals()) is None or totals.done == totals.nbytes
            self.begun = self.begun or (time.monotonic(), share)
            if is_whole and share > self.begun[1]:  # Before, the download says how long it takes.
                seconds = time.monotonic() - self.begun[0]
                left = seconds * (1 - share) / (share - self.begun[1])
                self.quantized += f", {format_duration(left)} left"
        totals = self.totals()
        if totals is not None:
            self.pull.show(totals, self.quantized)
