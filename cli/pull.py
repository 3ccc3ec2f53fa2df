"""`localr1 pull`: a model from the Hub, whole and verified."""

import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localr1.cli.confirm import can_ask, confirmed
from localr1.cli.output import Output, Progress, format_bytes
from localr1.errors import MemoryLimitError, NotFoundError, UsageError
from localr1.qtypes import SUPPORTED_BITS
from localr1.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from localr1.cli.pull_verdict import Verdict
    from localr1.hub.pull import Pull
    from localr1.hub.reference import Reference
    from localr1.hub.repository import Hub
    from localr1.hub.transfer import Totals

MAX_JOBS = 64
REPAINT_SECONDS = 0.2
RATE_SECONDS = 10.0
"""Over how long the speed on the progress line is taken."""


def pull(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A name such as r1-distill-qwen-1.5b, or organization/name; @revision may follow. "
            "None: the names, and what of them this machine can run."
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", help="Weights to fetch, as a pattern: '*Q4_K_M*'. Repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Files to leave out. Repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be fetched, and fetch nothing.")
    ] = False,
    hardware: Annotated[
        str,
        typer.Option("--hardware", help="Say what another machine would make of it, as of `plan`."),
    ] = "this",
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Connections at once.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            "-q",
            help="Quantize as the shards arrive: to 4, 5, 6 or 8 bits, or by a recipe.",
        ),
    ] = None,
    delete_source_shards: Annotated[
        bool,
        typer.Option(
            "--delete-source-shards",
            help="With --quantize: delete each shard when all that is made of it is written.",
        ),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="With --quantize: begin the quantization anew."),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Fetch also what does not fit this machine.")
    ] = False,
) -> None:
    """Download a model from the Hugging Face Hub, into the cache that other tools share. Stopped at
    any point, the same command goes on. Exits with 3 where the model fits neither as it is nor
    quantized, unless -y is given."""
    settings = Settings.from_environment()
    output = Output(color=settings.color)
    if not 1 <= jobs <= MAX_JOBS:
        raise UsageError("--jobs", expected=f"1 to {MAX_JOBS}", found=jobs)
    if model is None:
        from localr1.cli.pull_verdict import print_known

        print_known(output, settings, hardware, as_json)
        return
    if quantize is not None and quantize.isdecimal() and int(quantize) not in SUPPORTED_BITS:
        raise UsageError(
            "--quantize", expected="4, 5, 6 or 8, or the name of a recipe", found=quantize
        )
    if delete_source_shards and quantize is None:
        raise UsageError("--delete-source-shards", expected="--quantize beside it")
    from localr1.hub.reference import parse_reference

    wishes = Wishes(
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        dry_run=dry_run,
        hardware=hardware,
        jobs=jobs,
        as_json=as_json,
        yes=yes,
        form=quantize,
        deletes=delete_source_shards,
        restart=restart,
    )
    fetch_model(output, parse_reference(model), settings, wishes)


@dataclass(frozen=True)
class Wishes:
    """The options as they were given. form: of --quantize. deletes: --delete-source-shards."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    dry_run: bool
    hardware: str
    jobs: int
    as_json: bool
    yes: bool
    form: str | None
    deletes: bool
    restart: bool


def fetch_model(output: Output, reference: "Reference", settings: Settings, wishes: Wishes) -> None:
    from localr1.cli.pull_verdict import judge
    from localr1.hub.pull import finish_what_is_here, prepare
    from localr1.hub.repository import Hub

    hub = Hub()
    if hub.is_offline:
        print_what_is_here(output, reference, settings)
        return
    with output.progress(f"Looking up {reference.name}"):
        pull = prepare(hub, reference, settings.hub_cache, wishes.include, wishes.exclude)
    commit = f"{reference.repository}@{reference.revision} is commit {pull.listing.commit}"
    is_here = not pull.missing and wishes.form is None and not wishes.dry_run
    output.note(f"{commit}, already here" if is_here else commit)
    if is_here:
        finish_what_is_here(pull)
        print_result(output, pull, None, wishes.as_json)
        return
    output.note(amounts(pull))
    with output.progress("Planning"):
        verdict = judge(pull, settings, wishes.hardware)
    for line in verdict.lines:
        output.note(line)
    if wishes.dry_run:
        print_files(output, pull, verdict, wishes.as_json)
        return
    refuse_what_does_not_fit(output, verdict, wishes.yes)
    try:
        carry_out(output, pull, hub, settings, wishes)
    except KeyboardInterrupt:
        output.note("Interrupted. The same command goes on where it was.")
        raise
    for command in next_commands(reference, verdict, wishes):
        output.note(f"    {command}")


def carry_out(output: Output, pull: "Pull", hub: "Hub", settings: Settings, wishes: Wishes) -> None:
    from localr1.hub.locks import waited_for
    from localr1.hub.pull import check_space, fetch, refreshed

    has_gone = False
    with waited_for(
        pull.cached.lock_path, lambda: output.note("Another command is at this model: waiting.")
    ):
        pull = refreshed(pull)
        if wishes.form is not None:
            from localr1.cli.pull_quantize import fetch_and_quantize

            has_gone = fetch_and_quantize(output, pull, hub, settings, wishes)
        else:
            check_space(pull)
            began = time.monotonic()
            with shown_progress(output, pull.listing.reference.name) as show:
                fetch(pull, hub, jobs=wishes.jobs, progress=show)
            print_result(output, pull, time.monotonic() - began, wishes.as_json)
    if has_gone:
        from localr1.cli.pull_quantize import forget_source

        forget_source(pull, settings)


def print_what_is_here(output: Output, reference: "Reference", settings: Settings) -> None:
    """With HF_HUB_OFFLINE: the model's path if it is here whole. Raises NotFoundError."""
    from localr1.hub.library import Library

    library = Library.of(settings)
    snapshot = library.snapshot(f"{reference.repository}@{reference.revision}")
    path = None if snapshot is None else snapshot.path
    model = next((each for each in library.models() if each.path == path), None)
    if model is None or not model.is_complete:
        raise NotFoundError(
            f"{reference.name}: HF_HUB_OFFLINE is set, and the cache does not hold all of it",
            fix="Unset HF_HUB_OFFLINE to fetch it.",
        )
    output.note(f"HF_HUB_OFFLINE is set; {reference.name} is here, commit {model.commit}")
    output.line(str(model.path))


def amounts(pull: "Pull") -> str:
    """How much there is to fetch, and room for it."""
    left, whole = format_bytes(pull.nbytes), format_bytes(pull.selection.nbytes)
    line = f"{left} to fetch"
    if left != whole:
        line += f", of {whole}"
    count = len(pull.selection.files)
    line += f" in {count} file{'s' if count > 1 else ''}; {format_bytes(pull.free_bytes())} free"
    return line + (f". Licence: {pull.listing.licence}" if pull.listing.licence else "")


def refuse_what_does_not_fit(output: Output, verdict: "Verdict", yes: bool) -> None:
    """Raises MemoryLimitError, unless the user says that he wants it all the same."""
    if verdict.fits is not False or yes:
        return
    if not can_ask():
        raise MemoryLimitError("it does not fit the machine", fix="Fetch it all the same with -y.")
    if not confirmed(output, "Fetch it all the same?", yes):
        raise typer.Exit(MemoryLimitError.exit_code)


def next_commands(reference: "Reference", verdict: "Verdict", wishes: Wishes) -> list[str]:
    name = reference.name
    chat = f"localr1 chat {name}"
    if wishes.form is not None or verdict.bits is None:
        return [chat]
    return [f"localr1 pull {name} --quantize {verdict.bits}", chat]


def print_files(output: Output, pull: "Pull", verdict: "Verdict", as_json: bool) -> None:
    missing = set(pull.missing)
    if as_json:
        files = [
            {"path": file.path, "bytes": file.size, "hash": file.etag, "here": file not in missing}
            for file in pull.selection.files
        ]
        output.json(
            {
                **document(pull),
                "bytes_to_fetch": pull.nbytes,
                "free_bytes": pull.free_bytes(),
                "fits": verdict.fits,
                "verdict": list(verdict.lines),
                "files": files,
            }
        )
        return
    rows = [
        (file.path, format_bytes(file.size), "to fetch" if file in missing else "here")
        for file in pull.selection.files
    ]
    output.table(("FILE", "SIZE", ""), rows)


def print_result(output: Output, pull: "Pull", seconds: float | None, as_json: bool) -> None:
    """Where the model lies. seconds: that fetching took; None where nothing was fetched."""
    if as_json:
        fetched = 0 if seconds is None else pull.nbytes
        output.json({**document(pull), "fetched_bytes": fetched, "seconds": seconds})
    else:
        output.line(str(pull.snapshot))


def document(pull: "Pull") -> dict[str, Any]:
    listing = pull.listing
    return {
        "repository": listing.repository,
        "revision": listing.reference.revision,
        "commit": listing.commit,
        "licence": listing.licence,
        "path": str(pull.snapshot),
        "bytes": pull.selection.nbytes,
    }


@contextmanager
def shown_progress(output: Output, name: str) -> "Iterator[Callable[[Totals], None]]":
    """A line with what is there, how fast it comes and how long it will take."""
    with output.progress(f"Pulling {name}") as line:
        yield PullLine(name, line).show


@dataclass
class PullLine:
    """points: (time, bytes) of the last seconds, from which the speed is taken."""

    name: str
    line: Progress
    points: deque[tuple[float, int]] = field(default_factory=deque)

    def show(self, totals: "Totals", besides: str = "") -> None:
        now = time.monotonic()
        if self.points and now - self.points[-1][0] < REPAINT_SECONDS:
            return
        self.points.append((now, totals.done))
        while now - self.points[0][0] > RATE_SECONDS:
            self.points.popleft()
        (begin, before), (end, after) = self.points[0], self.points[-1]
        rate = (after - before) / (end - begin) if end > begin else 0.0
        share = totals.done / totals.nbytes if totals.nbytes else 1.0
        text = f"Pulling {self.name} {share:4.0%}  {format_bytes(totals.done)}"
        text += f" of {format_bytes(totals.nbytes)}, {totals.files_done} of {totals.files} files"
        if rate > 0:
            text += f", {format_bytes(rate)}/s"
            text += f", {format_duration((totals.nbytes - totals.done) / rate)} left"
        self.line.paint(text + besides)


def format_duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
