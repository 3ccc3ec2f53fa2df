"""The models localr1 knows by name (models.toml), without a network. Never imports torch."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

TABLE: Final = Path(__file__).parent / "models.toml"


@dataclass(frozen=True)
class KnownModel:
    """alias: the short name. repository: the whole one, on the Hub; None for what comes with
    localr1. family: of models that one may take in place of another. config: config.json's fields
    that say what the model is."""

    alias: str
    repository: str | None
    family: str
    config: Mapping[str, Any]


@cache
def known_models() -> Mapping[str, KnownModel]:
    """By alias, in the table's order: within a family from large to small."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {alias: _model(alias, entry, table) for alias, entry in table.items()}


def find_model(name: str) -> KnownModel | None:
    """By alias or repository, in any case."""
    wanted = name.casefold()
    for model in known_models().values():
        if wanted in (model.alias, (model.repository or "").casefold()):
            return model
    return None


def smaller_models(model: KnownModel) -> list[KnownModel]:
    """Those of the same family that come after it."""
    family = [each for each in known_models().values() if each.family == model.family]
    return family[family.index(model) + 1 :]


def _model(alias: str, entry: Mapping[str, Any], table: Mapping[str, Any]) -> KnownModel:
    config = entry.get("config", {})
    if like := entry.get("like"):  # The same sizes under another name, but for what is given.
        config = {**table[like]["config"], **config}
    return KnownModel(alias, entry.get("repository"), entry["family"], config)
