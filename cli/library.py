"""`localr1 list`: the models on this machine."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from localr1.cli.output import Output, format_bytes
from localr1.embedded import R1_NANO
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.hub.downloads import Download
    from localr1.hub.library import LocalModel

HEADER = ("NAME", "QUANT", "SIZE", "CTX", "MODIFIED")
DAY = 86_400


def age(modified: float | None, now: float) -> str:
    """As people say it: "3 hours ago"; older than a month, the day."""
    if modified is None:
        return "-"
    seconds = max(now - modified, 0)
    if seconds >= 30 * DAY:
        return time.strftime("%Y-%m-%d", time.localtime(modified))
    for unit, length in (("day", DAY), ("hour", 3600), ("minute", 60)):
        if (count := int(seconds // length)) >= 1:
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"


def one_line(text: str) -> str:
    """Names may hold anything a file system does: a line break would make two rows of one."""
    return text.replace("\n", "\\n").replace("\t", "\\t")


def row_of(model: "LocalModel", now: float) -> tuple[str, ...]:
    return (
        one_line(model.name),
        one_line(model.quantization),
        format_bytes(model.nbytes),
        "-" if model.context is None else f"{model.context:,}",
        age(model.modified, now),
    )


def what_is_wrong(model: "LocalModel") -> str | None:
    """A sentence about a model that cannot be used as it is."""
    name = one_line(model.name)
    if model.problem is not None:
        return f"{name} cannot be read: {one_line(model.problem)}"
    if not model.missing:
        return None
    from localr1.hub.describe import QUANTIZED

    first = one_line(", ".join(model.missing[:2])) + (", ..." if len(model.missing) > 2 else "")
    files = "1 file" if len(model.missing) == 1 else f"{len(model.missing):,} files"
    what = f"{name} is incomplete, {files} missing ({first})"
    if model.kind == QUANTIZED:
        return f"{what}: quantize it again."
    return f"{what}: `localr1 pull {one_line(model.pull_name)}` fetches the rest."


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Names alone.")] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Downloads that are not finished instead.")
    ] = False,
) -> None:
    """The models on this machine: quantized here, or in the Hugging Face cache."""
    settings = Settings.from_environment()
    output = Output(color=settings.color)
    if partial:
        print_partial(output, settings, as_json=as_json, quiet=quiet)
        return
    from localr1.hub.library import Library

    models = Library.of(settings).models()
    if as_json:
        output.json([model.to_json() for model in models])
        return
    if not models:
        output.note(
            f"No models yet: `localr1 pull` lists what can be fetched; {R1_NANO.name} comes with "
            "localr1 and is there without a name: `localr1 chat`."
        )
        return
    if quiet:
        for model in models:
            output.line(one_line(model.name))
        return
    now = time.time()
    output.table(HEADER, [row_of(model, now) for model in models])
    for model in models:
        if (wrong := what_is_wrong(model)) is not None:
            output.note(wrong)


def print_partial(output: Output, settings: Settings, *, as_json: bool, quiet: bool) -> None:
    from localr1.hub.downloads import downloads

    found = downloads(settings.hub_cache)
    if as_json:
        output.json([download.to_json() for download in found])
        return
    if not found:
        output.note("No download is unfinished.")
        return
    if quiet:
        for download in found:
            output.line(one_line(download.name))
        return
    output.table(("NAME", "DONE", "OF", "FILES", "BY"), [partial_row(each) for each in found])
    output.note("`localr1 pull NAME` goes on with one; `localr1 prune` removes them.")


def partial_row(download: "Download") -> tuple[str, ...]:
    return (
        one_line(download.name),
        format_bytes(download.done),
        "?" if download.total is None else format_bytes(download.total),
        f"{download.files_done:,}/{download.files_total:,}"
        if download.files_total is not None
        else f"{len(download.partial):,}",
        "localr1" if download.is_ours else "another program",
    )
