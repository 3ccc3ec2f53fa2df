"""The table of known models: what each entry says beyond its config."""

import pytest

from localr1.embedded import R1_NANO
from localr1.hub.known import KnownModel, find_model, known_models
from localr1.qtypes import SUPPORTED_BITS, SUPPORTED_GROUPS


@pytest.mark.parametrize("model", known_models().values(), ids=list(known_models()))
def test_an_entry_is_whole(model: KnownModel) -> None:
    assert model.licence
    assert model.revision == "main"
    assert model.recipe.bits in SUPPORTED_BITS
    assert model.recipe.group in SUPPORTED_GROUPS
    assert (model.repository is None) == (model.alias == R1_NANO.name)
    # No other model's weights were ever here.
    assert model.recipe.tested == (model.alias == R1_NANO.name)


PROMISED = (
    "r1-distill-qwen-1.5b",
    "r1-distill-qwen-7b",
    "r1-distill-qwen-14b",
    "r1-distill-qwen-32b",
    "r1-distill-llama-8b",
    "r1-distill-llama-70b",
    "r1-0528-qwen3-8b",
    "v2-lite-chat",
    "r1",
    "r1-nano",
)


@pytest.mark.parametrize("alias", PROMISED)
def test_the_aliases_that_are_promised(alias: str) -> None:
    assert find_model(alias) is known_models()[alias]
