"""Which model a command means."""

from pathlib import Path
from typing import TYPE_CHECKING

from localr1.cli.output import Output
from localr1.embedded import R1_NANO
from localr1.errors import NotFoundError, OutputError, UsageError
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.hub.library import Library

EMBEDDED_BITS = 4


def models_dir(settings: Settings) -> Path:
    from localr1.hub.library import Library

    return Library.of(settings).models_dir


def resolve_model(name: str | None, settings: Settings) -> Path:
    """A path as it is given; else by name: a quantized model of this user's library; what the
    Hugging Face cache holds under an alias or org/name[@REVISION], where the one model quantized
    from that goes first (localr1/hub/library.py); or the embedded model. None is the only model
    that was quantized here, and the embedded one where there is none.

    Raises NotFoundError, saying what there is and how to get the named one, and UsageError for None
    or a name where that means several.
    """
    from localr1.hub.library import Library

    library = Library.of(settings)
    if name is None:
        present = library.names()
        if len(present) > 1:
            raise UsageError(
                "no MODEL was given, and there are several: " + ", ".join(present),
                fix=f"Name one of them, or {R1_NANO.name}, which comes with localr1.",
            )
        return library.models_dir / present[0] if present else R1_NANO
    path = Path(name)
    if path.exists():
        return path
    if (model := library.resolve(name)) is not None:
        return model.path
    if name == R1_NANO.name:
        return R1_NANO
    raise NotFoundError(_not_found(name, library), fix=_how_to_get(name))


def _not_found(name: str, library: "Library") -> str:
    present = ", ".join([*(model.name for model in library.models()), R1_NANO.name])
    return f"{name}: there is no such file or directory; models here: {present}"


def _how_to_get(name: str) -> str:
    from localr1.hub.reference import DEFAULT_REVISION, parse_reference

    try:
        reference = parse_reference(name)
    except (NotFoundError, UsageError):
        return "Give the directory of a model (with config.json) or a .gguf file."
    at = "" if reference.revision == DEFAULT_REVISION else f"@{reference.revision}"
    pull = f"`localr1 pull {reference.name}{at}`"
    if reference.alias is not None:
        return f"{pull} fetches it: {reference.repository}."
    return f"If that is a repository of the Hugging Face Hub, {pull} fetches it."


def embedded_digest() -> str:
    """Of the embedded model's weights: names what is cached of it."""
    from localr1.hub.verify import digest_of

    return digest_of(R1_NANO / "model.safetensors", 64, lambda _: None)[:12]


def model_to_run(name: str | None, settings: Settings, output: Output) -> Path:
    """As `resolve_model`, but the embedded model is quantized into expert shards at its first use
    and taken from the cache from then on. Where nothing can be written it runs as it is."""
    path = resolve_model(name, settings)
    if path != R1_NANO:
        return path
    from localr1.quant.pipeline import quantize
    from localr1.quant.progress import Progress
    from localr1.quant.recipe import Recipe

    folder = settings.cache_dir / "embedded" / embedded_digest()
    quantized = folder / f"{path.name}-int{EMBEDDED_BITS}"
    if quantized.is_dir():
        return quantized
    with output.progress(f"Quantizing {path.name}, once") as line:

        def show(progress: Progress) -> None:
            if progress.stage == "quantize":
                line.update(progress.done, progress.total)

        try:
            quantize(path, quantized, Recipe.uniform(EMBEDDED_BITS, 32), show, restart=True)
        except OutputError as error:
            if quantized.is_dir():  # Another process was faster.
                return quantized
            output.note(f"{path.name} runs unquantized: {error}")
            return path
    output.note(f"Quantized {path.name} to {EMBEDDED_BITS}-bit expert shards: {quantized}")
    return quantized
