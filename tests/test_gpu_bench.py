"""The benchmarks of graphics cards run: on the model of one, with a clock of the host's, at tiny
sizes. What they print there is no speed of anything."""

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from card_models import rows_per_block
from driver_model import ModelDriver
from gpu_model import skip_where_there_is_no_model
from test_card_loading import Cards, cards, packed

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu_bench
import gpu_decode
import gpu_kernels
from gpu_bench import BenchCard
from gpu_kernels import ExpertShape

__all__ = ["cards", "packed"]  # The fixtures.


class HostClock:
    def __init__(self, driver: ModelDriver, stream: Any) -> None:
        self._driver, self._stream = driver, stream

    def seconds(self, work: Callable[[], None]) -> float:
        begin = time.perf_counter()
        work()
        self._driver.synchronize(self._stream)
        return time.perf_counter() - begin

    def copy(self, target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)


def model_card() -> BenchCard:
    skip_where_there_is_no_model()
    driver = ModelDriver(rows_per_block())
    driver.enter()
    stream = driver.stream()
    return BenchCard(driver, stream, HostClock(driver, stream), rows_per_block())


def test_figures_of_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_bench, "RESULTS", tmp_path / "results")
    card = model_card()
    shapes = (ExpertShape("tiny", 96, 64, 3, 5, 0.5),)
    rate, figures = gpu_kernels.measure(card, shapes, ((80, 64),), 1 << 16, repetitions=1)
    assert isinstance(card.driver, ModelDriver)
    assert card.driver.taken == 0
    assert card.driver.launched.count("gate_up_int4") == card.driver.launched.count("down_int4") > 2
    assert {"gate_up_int8", "matvec_int4_t1", "matvec_int8_t1"} <= set(card.driver.launched)
    for each in figures:
        assert each.gigabytes_per_second == pytest.approx(each.share * rate / 1e9)
    lines = gpu_kernels.table("model", rate, figures)
    gpu_bench.write_results("gpu_kernels", "Some Card", lines, {"rate": rate})
    assert (tmp_path / "results" / "gpu_kernels-some-card.md").read_text().count("tiny") == 2
    kept = json.loads((tmp_path / "results" / "gpu_kernels-some-card.json").read_text())
    assert kept == {"rate": rate}


def test_figures_of_prompts() -> None:
    card = model_card()
    card.int8_peak = 2e12
    shapes = (ExpertShape("tiny", 96, 64, 2, 3, 0.5),)
    figures = gpu_kernels.measure_prompts(card, shapes, ((80, 64),), (3, 65), 1 << 12, 1)
    assert isinstance(card.driver, ModelDriver)
    assert card.driver.taken == 0
    kernels = {"by_group", "matmul_int4", "gate_up_tiles_int8", "down_tiles_int4"}
    assert kernels <= set(card.driver.launched)
    products = {"2 of 3 experts of tiny": 3 * 2 * 96 * 64, "matrix of 80 x 64": 80 * 64}
    assert len(figures) == 8
    for each in figures:
        operations = 2 * each.tokens * products[each.kernel]
        assert each.tops == pytest.approx(operations / each.microseconds / 1e6)
        assert each.share == pytest.approx(each.tops / 2)
    assert "2 TOPS" in gpu_kernels.prompt_table(2e12, figures)[0]
    assert "not known" in gpu_kernels.prompt_table(None, figures)[0]


def test_figures_of_decoding(packed: Path, cards: Cards) -> None:
    """Of a dense model."""
    (figure,) = gpu_decode.measure(packed, [1.0], tokens=6, repetitions=1, card_rate=1e9)
    assert figure.share is None
    assert figure.hit_rate == 1.0
    assert "2 of 2 layers" in figure.where
    assert 0.0 < figure.reached < 1.0
    assert "dense" in gpu_decode.table("model", 1e9, [figure])[4]


def test_the_limit_is_the_slower_of_card_and_cpu() -> None:
    rates = gpu_decode.Rates(card=1000.0, cpu=10.0)
    assert gpu_decode.limit_of(100.0, 400.0, 0.0, rates) == pytest.approx(2.0)
    assert gpu_decode.limit_of(100.0, 100.0, 10.0, rates) == pytest.approx(1.0)


@pytest.mark.parametrize("script", [gpu_kernels, gpu_decode])
def test_without_a_card_one_sentence_says_so(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(sys, "argv", [script.__name__])
    assert script.main() == 1
    told = capsys.readouterr().err
    assert told.startswith("Not measured: --device cuda: expected an NVIDIA graphics card")
    assert told.count("\n") == 1
