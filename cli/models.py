"""Which model a command means."""

from pathlib import Path

from localr1.errors import NotFoundError
from localr1.settings import Settings

DEFAULT_MODEL = "smollm2-135m-instruct-int8"
"""What `make chat` makes, and what a command without MODEL opens."""


def models_dir(settings: Settings) -> Path:
    return settings.data_dir / "models"


def resolve_model(name: str | None, settings: Settings) -> Path:
    """A path as it is given, else a model of this user's library by name; None is DEFAULT_MODEL.

    Raises NotFoundError, naming what is there.
    """
    library = models_dir(settings)
    if name is None:
        default = library / DEFAULT_MODEL
        if default.is_dir():
            return default
        raise NotFoundError(
            f"no MODEL was given, and the default one ({default}) is not there",
            fix="Give a model's directory or .gguf file, or run `make chat` in a checkout once.",
        )
    path = Path(name)
    if path.exists():
        return path
    if path.name == name and (library / name).is_dir():
        return library / name
    entries = library.iterdir() if library.is_dir() else ()
    # A name with a dot in front is a model that is still being written.
    present = sorted(each.name for each in entries if not each.name.startswith("."))
    known = "; models here: " + ", ".join(present) if present else ""
    raise NotFoundError(
        f"{name}: there is no such file or directory{known}",
        fix="Give the directory of a model (with config.json) or a .gguf file.",
    )
