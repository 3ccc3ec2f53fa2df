"""Which model a command means."""

from pathlib import Path

from localr1.cli.output import Output
from localr1.embedded import R1_NANO
from localr1.errors import NotFoundError, OutputError, UsageError
from localr1.settings import Settings

EMBEDDED_BITS = 4


def models_dir(settings: Settings) -> Path:
    return settings.data_dir / "models"


def resolve_model(name: str | None, settings: Settings) -> Path:
    """A path as it is given, else a model of this user's library or the embedded one by name. None
    is the only model of the library, and the embedded one where there is none.

    Raises NotFoundError, naming what is there, and UsageError for None where there are several.
    """
    library = models_dir(settings)
    entries = library.iterdir() if library.is_dir() else ()
    # A name with a dot in front is a model that is still being written.
    present = sorted(each.name for each in entries if not each.name.startswith("."))
    if name is None:
        if len(present) > 1:
            raise UsageError(
                "no MODEL was given, and there are several: " + ", ".join(present),
                fix=f"Name one of them, or {R1_NANO.name}, which comes with localr1.",
            )
        return library / present[0] if present else R1_NANO
    path = Path(name)
    if path.exists():
        return path
    if path.name == name and name in present:
        return library / name
    if name == R1_NANO.name:
        return R1_NANO
    known = ", ".join([*present, R1_NANO.name])
    raise NotFoundError(
        f"{name}: there is no such file or directory; models here: {known}",
        fix="Give the directory of a model (with config.json) or a .gguf file.",
    )


def model_to_run(name: str | None, settings: Settings, output: Output) -> Path:
    """As `resolve_model`, but the embedded model is quantized into expert shards at its first use
    and taken from the cache from then on. Where nothing can be written it runs as it is."""
    path = resolve_model(name, settings)
    if path != R1_NANO:
        return path
    from localr1.quant.pipeline import quantize
    from localr1.quant.progress import Progress
    from localr1.quant.recipe import Recipe
    from localr1.quant.writer import hash_file

    digest = hash_file(path / "model.safetensors", None).sha256[:12]
    quantized = settings.cache_dir / "embedded" / digest / f"{path.name}-int{EMBEDDED_BITS}"
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
