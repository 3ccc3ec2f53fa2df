"""Which model a command means, and the embedded model's first use."""

import io
from pathlib import Path
from typing import Any

import pytest
from quant_sources import MIXTURES, save_source

from localr1.cli import models
from localr1.cli.models import model_to_run, resolve_model
from localr1.cli.output import Output
from localr1.embedded import R1_NANO
from localr1.errors import NotFoundError, OutputError, UsageError
from localr1.quant import pipeline
from localr1.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_environment(
        {"LOCALR1_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    )


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny mixture in the embedded model's place."""
    source = tmp_path / "package" / "r1-nano"
    save_source(source, "deepseek_v3", **MIXTURES["deepseek_v3"])
    monkeypatch.setattr(models, "R1_NANO", source)
    return source


def in_library(settings: Settings, *names: str) -> list[Path]:
    paths = [models.models_dir(settings) / name for name in names]
    for path in paths:
        path.mkdir(parents=True)
    return paths


def silent() -> Output:
    return Output(io.StringIO(), io.StringIO())


def test_without_a_name_it_is_the_embedded_model(settings: Settings) -> None:
    assert resolve_model(None, settings) == R1_NANO


def test_without_a_name_it_is_the_only_model_there_is(settings: Settings) -> None:
    mine, _ = in_library(settings, "mine", ".yours.partial-1")
    assert resolve_model(None, settings) == mine
    assert resolve_model("r1-nano", settings) == R1_NANO


def test_without_a_name_several_models_are_named(settings: Settings) -> None:
    in_library(settings, "b", "a")
    with pytest.raises(UsageError, match=r"several: a, b\. Name one of them, or r1-nano"):
        resolve_model(None, settings)


def test_a_model_of_the_library_goes_before_the_embedded_one(settings: Settings) -> None:
    (mine,) = in_library(settings, "r1-nano")
    assert resolve_model("r1-nano", settings) == mine


def test_an_unknown_name_is_told_what_is_there(settings: Settings) -> None:
    in_library(settings, "mine", ".mine.partial-x")
    with pytest.raises(NotFoundError, match=r"models here: mine, r1-nano\."):
        resolve_model("yours", settings)


def test_the_embedded_model_is_quantized_once(
    settings: Settings, embedded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model_to_run(None, settings, silent())
    assert first.parent.parent == settings.cache_dir / "embedded"
    assert first.name == "r1-nano-int4"
    assert list(first.glob("experts-*.safetensors"))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it is there already")

    monkeypatch.setattr(pipeline, "quantize", refuse)
    assert model_to_run("r1-nano", settings, silent()) == first


def test_other_weights_are_quantized_anew(settings: Settings, embedded: Path) -> None:
    first = model_to_run(None, settings, silent())
    data = bytearray((embedded / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (embedded / "model.safetensors").write_bytes(data)
    assert model_to_run(None, settings, silent()) != first


def test_where_nothing_can_be_written_it_runs_unquantized(
    settings: Settings, embedded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(pipeline, "quantize", fail)
    output = silent()
    assert model_to_run(None, settings, output) == embedded
    assert isinstance(output.stderr, io.StringIO)
    assert "runs unquantized: the disk is full" in output.stderr.getvalue()


def test_another_process_that_was_faster_is_no_error(
    settings: Settings, embedded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(_source: Path, out: Path, *_: Any, **__: Any) -> None:
        out.mkdir(parents=True)
        raise OutputError(f"{out} exists")

    monkeypatch.setattr(pipeline, "quantize", lose)
    assert settings.cache_dir in model_to_run(None, settings, silent()).parents


def test_any_other_model_is_run_from_where_it_lies(settings: Settings, tmp_path: Path) -> None:
    assert model_to_run(str(tmp_path), settings, silent()) == tmp_path
