"""The models localr1 knows by name (models.toml), without a network. Never imports torch."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

TABLE: Final = Path(__file__).parent / "models.toml"


@dataclass(frozen=True)
class RecommendedRecipe:
    """bits, group: as of `localr1 quantize`. tested: whether it was run on these very weights."""

    bits: int
    group: int
    tested: bool


@dataclass(frozen=True)
class KnownModel:
    """alias: the short name. repository: the whole one, on the Hub; None for what comes with
    localr1. family: of models that one may take in place of another. config: config.json's fields
    that say what the model is. licence: its SPDX name, or the one its page gives it. revision: of
    the repository that `localr1 pull` follows. recipe: what it is best quantized with."""

    alias: str
    repository: str | None
    family: str
    config: Mapping[str, Any]
    licence: str
    revision: str
    recipe: RecommendedRecipe


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
    recipe = RecommendedRecipe(
        entry["recipe"]["bits"], entry["recipe"]["group"], entry.get("tested", False)
    )
    return KnownModel(
        alias=alias,
        repository=entry.get("repository"),
        family=entry["family"],
        config=config,
        licence=entry["licence"],
        revision=entry.get("revision", "main"),
        recipe=recipe,
    )
