"""What a plan says that layers take of a card, before any weight is there, is what loading them
takes, to the byte."""

import json
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import VOCAB_SIZE, tokenizer_document
from card_models import CASES, on_host, placed_on, rows_per_block, some_cards, source
from driver_model import ModelDriver
from packed_models import SHAPE, packed_checkpoint
from quant_sources import save_source
from tiny_models import MemoryCheckpoint, tiny_transformer

from localr1.card.decoder import CardDecoder
from localr1.card.fit import share_of_cards
from localr1.card.forecast import CardForecast, forecast_card
from localr1.card.loading import needs_of
from localr1.checkpoint.reader import open_checkpoint
from localr1.cli.plan import Asked
from localr1.cli.plan_machine import CardBudget, Machine
from localr1.cli.plan_model import find_subject, make_plan
from localr1.experts.hardware import PROFILES
from localr1.experts.options import ExpertOptions
from localr1.experts.placement import CARD_MARGIN, DEVICE_PROGRAM_BYTES, Memory
from localr1.kernels.native import NativeKernels
from localr1.load import load_engine
from localr1.models.decoder import Decoder
from localr1.models.registry import load_model, parse_config
from localr1.quant.forecast import forecast_quantized
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe
from localr1.settings import Settings


def forecast_of(checkpoint: MemoryCheckpoint, capacity: int) -> CardForecast:
    config = parse_config(checkpoint.config)
    tensors = [(info, 1) for info in checkpoint.tensors.values()]
    return forecast_card(tensors, config, capacity, (rows_per_block(),))


@pytest.mark.parametrize("capacity", [64, 320])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", CASES)
def test_needs_are_those_of_loading(case: str, bits: int, capacity: int) -> None:
    checkpoint = source(case, bits)
    assert forecast_of(checkpoint, capacity).needs == needs_of(on_host(checkpoint), capacity)


def test_layers_end_where_one_is_not_quantized() -> None:
    theirs = tiny_transformer("qwen3", 0, **{**SHAPE, "num_hidden_layers": 3})
    checkpoint = packed_checkpoint(theirs, 4, keep=lambda prefix: ".1.mlp" in prefix)
    needs = forecast_of(checkpoint, 64).needs
    assert len(needs.layers) == 1
    assert needs == needs_of(on_host(checkpoint), 64)
    floats = MemoryCheckpoint.of(tiny_transformer("llama", 0))
    assert forecast_of(floats, 64).needs.layers == []


@pytest.mark.parametrize(("asked", "spared"), [(None, 1.0), (None, 0.9), (3, 1.0), (4, 1.0)])
@pytest.mark.parametrize("memory", [(1,), (1, 1), (2, 1, 1)])
def test_cards_take_what_was_forecast(
    memory: tuple[int, ...], asked: int | None, spared: float
) -> None:
    """On models of cards that have room for that: each its layers, and nothing besides."""
    checkpoint = source("qwen3", 4, 5)
    needs = forecast_of(checkpoint, 320).needs
    assert needs.head is not None
    part = spared * (sum(needs.layers) + needs.head) / sum(memory)
    rooms = [needs.fixed + int(each * part) + max(needs.layers) for each in memory]
    names = [f"model {number}" for number in range(len(rooms))]
    shares = share_of_cards(needs, rooms, asked, names)
    drivers = some_cards(*[{}] * len(rooms))
    with placed_on(drivers, rooms, layers=5, asked=asked) as setup:
        cards = setup.model.layers.cards
        assert [card.num_layers for card in cards] == [share.num_layers for share in shares]
        assert setup.model.layers.has_head == shares[-1].has_head
        for share, driver in zip(shares, drivers, strict=True):
            layers = sum(needs.layers[share.first : share.last])
            assert driver.taken == needs.fixed + layers + share.has_head * needs.head


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_is_not_there_yet(tmp_path: Path, bits: int) -> None:
    """From config.json and a recipe alone: what quantizing it gives."""
    source_path, out = tmp_path / "source", tmp_path / "out"
    save_source(source_path, "llama")
    recipe = Recipe.uniform(bits, 32)
    quantize(source_path, out, recipe)
    config = json.loads((source_path / "config.json").read_text())
    forecast = forecast_quantized(config, recipe)
    found = forecast_card(forecast.tensors, forecast.config, 64, (rows_per_block(),))
    with open_checkpoint(out) as checkpoint:
        model = load_model(checkpoint, NativeKernels(threads=1))
        assert isinstance(model, Decoder)
        assert found.needs == needs_of(model, 64)


def opened(
    drivers: list[ModelDriver], programs: object, rows: int, files: object, number: int
) -> ModelDriver:
    """In the place of `open_card`."""
    return drivers[number]


def test_a_plan_is_what_loading_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model in a directory, through the doors of `plan` and of `chat`: on two cards of so much
    memory each has the layers, and takes the bytes, that were said."""
    source_path, path = tmp_path / "source", tmp_path / "out"
    # Sizes of which all instruction sets lay blocks out alike.
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    save_source(source_path, "qwen3", num_hidden_layers=6, vocab_size=VOCAB_SIZE, **sizes)
    quantize(source_path, path, Recipe.uniform(4, 32))
    document = json.dumps(tokenizer_document())
    (path / "tokenizer.json").write_text(document, encoding="utf-8")
    subject = find_subject(str(path), Settings.from_environment())
    a_model = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    for share in (0.6, 0.9, 2.0):
        rooms = [1 << 20, int((1 << 20) + share * a_model)]
        cards = tuple(
            CardBudget(number, room + DEVICE_PROGRAM_BYTES) for number, room in enumerate(rooms)
        )
        memory = Memory(ram=8 << 30, vram=1)
        machine = Machine(PROFILES["rtx4090-24g-ddr5-64g"], memory, 1, "", False, cards)
        asked = Asked(None, 32, 64, None, None, devices="0,1")
        planned = make_plan(subject, machine, asked).placement.cards
        drivers = some_cards(*[{"total": room + CARD_MARGIN} for room in rooms])

        monkeypatch.setattr("localr1.load.open_card", partial(opened, drivers))
        options = ExpertOptions(devices="0,1")
        with closing(load_engine(path, threads=1, context=64, experts=options)) as engine:
            assert isinstance(engine.model, CardDecoder)
            found = engine.model.layers.cards
            assert [card.num_layers for card in found] == [card.num_layers for card in planned]
            assert [card.has_head for card in found] == [card.has_head for card in planned]
            for driver, card in zip(drivers, planned, strict=True):
                tier = card.tier
                assert driver.taken == tier.weights + tier.cache + tier.workspace
                driver.enter()
                assert driver.free_memory() == tier.free + CARD_MARGIN
