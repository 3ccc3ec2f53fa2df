"""Mixtures on a card: attention, router and shared experts there, hits computed without the host,
misses by the host meanwhile. On the model of a card; r1-nano through the same door as chat."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from card_models import PlacedMixture, placed_mixture, rows_per_block, run
from driver_model import LARGE, ModelDriver
from gpu_model import skip_where_there_is_no_model
from kernel_cases import assert_same_bits
from stored_models import source, tokens
from test_load_experts import QUESTION, ask, nano
from test_models_quantized import SAME_BLOCKS, relative
from torch import Tensor

from localr1.card.model import computable_layers
from localr1.card.program import Program
from localr1.errors import CheckpointError, DeviceError, KernelError, MemoryLimitError
from localr1.experts.cuda import CudaDevice
from localr1.experts.options import CardSpec, ExpertOptions
from localr1.experts.schedule import POINTS, Curve, Rates
from localr1.experts.store_options import StoreOptions
from localr1.kernels.host_mixtures import HostMixtures
from localr1.kernels.native import NativeKernels
from localr1.load import load_engine
from localr1.models.decoder import Decoder
from localr1.models.registry import load_model
from localr1.models.step import Step
from localr1.sampler import SamplingParams

__all__ = ["nano"]  # The fixture.

LENGTH, PREFILL = 16, 6
MODELS = ("qwen3_moe", "deepseek_v3")
NOTHING_MOVES = StoreOptions("static", read_ahead=False)


@pytest.fixture(autouse=True)
def rates_that_prefer_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of a card is so slow that nothing would be computed on it."""

    def fixed(*_: object) -> Rates:
        quick = Curve([1e-7] * len(POINTS))
        return Rates(Curve([1.0] * len(POINTS)), quick, quick, 1e-7)

    monkeypatch.setattr("localr1.experts.store.measure_rates", fixed)


def model_driver(**changes: Any) -> ModelDriver:
    skip_where_there_is_no_model()
    return ModelDriver(rows_per_block(), **changes)


def says_what_the_cpu_says(setup: PlacedMixture) -> None:
    ids = tokens(LENGTH)
    expected = run(setup.host, ids, PREFILL, LENGTH - PREFILL)
    found = run(setup.model, ids, PREFILL, LENGTH - PREFILL)
    assert relative(found, expected) < SAME_BLOCKS


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize(
    ("ram", "device", "driver"),
    [
        (1.0, 0.3, {"seed": 2}),
        (0.3, 0.5, {"seed": 1, "eager": True}),
        (0.0, 0.1, {"seed": 2}),
        (0.5, 0.5, {"pinned": False, "others_first": True}),
        (1.0, 1.0, {"seed": 2}),
    ],
)
def test_logits_are_those_of_the_cpu(
    model_type: str, ram: float, device: float, driver: dict[str, Any]
) -> None:
    """Wherever experts lie, cold and warm, while they move."""
    with placed_mixture(model_type, ram, device, driver=model_driver(**driver)) as setup:
        for _ in range(2):
            says_what_the_cpu_says(setup)
        assert setup.store.usage.device_hits > 0
        if ram > 0.0 and device < 1.0:
            assert setup.store.usage.promotions > 0


@pytest.mark.parametrize("model_type", MODELS)
def test_bits_do_not_depend_on_where_experts_lie(model_type: str) -> None:
    """With the layers on the card: of any share of the experts, cold and warm, of a prompt at once
    and one by one, and of any order of work."""
    ids = tokens(LENGTH)
    wanted: Tensor | None = None
    for ram, device, changes in (
        (1.0, 0.2, {"seed": 1, "eager": True}),
        (0.3, 0.6, {"seed": 2}),
        (0.0, 1.0, {"seed": 0, "others_first": True}),
    ):
        with placed_mixture(model_type, ram, device, driver=model_driver(**changes)) as setup:
            for _ in range(2):
                found = run(setup.model, ids, PREFILL, LENGTH - PREFILL)
                wanted = found if wanted is None else wanted
                assert_same_bits(found, wanted, (ram, device))
            one_by_one = run(setup.model, ids, 1, LENGTH - PREFILL)
            assert wanted is not None
            assert_same_bits(one_by_one[-4:], wanted[-4:], "a prompt one by one")


def test_a_prompt_in_tiles_has_the_bits_of_one_in_small_pieces() -> None:
    """Layers, their latents and experts: those of a prompt that is long enough are in tiles."""
    ids = tokens(35)
    with placed_mixture("deepseek_v3", 0.5, 1.0) as setup:
        in_tiles = run(setup.model, ids, 33, 2)
        kernels = ("by_group", "matmul_int4", "gate_up_tiles_int4", "down_tiles_int4")
        assert all(kernel in setup.driver.launched for kernel in kernels)
        setup.driver.launched.clear()
        assert_same_bits(run(setup.model, ids, 3, 2), in_tiles, "in small pieces")
        assert not any(kernel in setup.driver.launched for kernel in kernels)


def decoded_calls(setup: PlacedMixture, count: int) -> dict[str, int]:
    """Calls of the driver for so many tokens, once all programs are there."""
    cache, ids = setup.model.new_cache(64), tokens(6 + count)
    setup.model.forward(Step(ids[:4], 0), cache)
    for position in (4, 5):
        setup.model.forward(Step(ids[position : position + 1], position), cache)
    setup.driver.calls = {}
    for position in range(6, 6 + count):
        setup.model.forward(Step(ids[position : position + 1], position), cache)
    return setup.driver.calls


@pytest.mark.parametrize("device", [1.0, 0.4])
@pytest.mark.parametrize("model_type", MODELS)
def test_the_host_waits_once_a_token(model_type: str, device: float) -> None:
    """At the end of it, whether all experts hit or not."""
    with placed_mixture(model_type, 1.0, device, options=NOTHING_MOVES) as setup:
        before = setup.store.usage.copy()
        calls = decoded_calls(setup, 5)
        used = setup.store.usage - before
        assert (used.ram_hits == 0) == (device == 1.0)
        waits = {kind: calls.get(kind, 0) for kind in ("synchronize", "wait", "launch_graph")}
        assert waits == {"synchronize": 5, "wait": 0, "launch_graph": 5}
        assert "launch" not in calls
        assert calls.get("copy_in", 0) == calls.get("copy_out", 0) == 0


@pytest.mark.parametrize("asked", [1, 3])
@pytest.mark.parametrize("model_type", MODELS)
def test_the_cpu_computes_the_rest(model_type: str, asked: int) -> None:
    with placed_mixture(model_type, 0.6, 0.4, asked=asked) as setup:
        assert f"computes {asked} of 4 layers" in setup.model.where
        assert setup.model.where.count("routed experts") == len(setup.model.layers.mixtures[:1])
        says_what_the_cpu_says(setup)


def leave_out(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(Program, name, lambda self: None)


def keep_old_tables(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CudaDevice, "refresh", lambda self, stream: None)


def compute_nothing_here(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HostMixtures, "go", lambda self, way: None)


PLANTED = {
    "the card does not wait for the host": leave_out("join"),
    "the host does not wait for the router": leave_out("fork"),
    "tables never change": keep_old_tables,
    "nobody computes what misses": compute_nothing_here,
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_seen(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[error](monkeypatch)
    ids, seen = tokens(8), 0
    for order in ({}, {"eager": True}, {"others_first": True}):
        driver = model_driver(seed=1, pinned=False, **order)
        with placed_mixture("qwen3_moe", 1.0, 0.5, driver=driver, options=NOTHING_MOVES) as setup:
            expected = run(setup.host, ids, 1, 7)
            try:
                found = run(setup.model, ids, 1, 7)
            except Exception:  # Experts that are none, layers in a wrong order: all of it shows.
                seen += 1
            else:
                seen += not relative(found, expected) < 3 * SAME_BLOCKS
    assert seen


def test_memory_ends_at_every_allocation() -> None:
    """One error, nothing left behind; or fewer layers or slots, and the same text."""
    reached, at, errors, fewer = False, 0, 0, 0
    while not reached:
        at += 1
        driver = model_driver()
        driver.arm("allocate", at, MemoryLimitError("model: allocate", found="no memory"))
        try:
            with placed_mixture("qwen3_moe", 1.0, 0.3, driver=driver) as setup:
                reached = driver.calls["allocate"] < at
                fewer += setup.model.layers.num_layers < 4
                ids = tokens(7)
                assert relative(run(setup.model, ids, 5, 2), run(setup.host, ids, 5, 2)) < 0.01
        except MemoryLimitError:
            errors += 1
    assert errors >= 3
    assert fewer >= 4


ILLEGAL = DeviceError("model: cuStreamSynchronize", found="ILLEGAL_ADDRESS")


def gives_the_bits_of_the_cpu(setup: PlacedMixture) -> None:
    ids = tokens(LENGTH)
    expected = run(setup.host, ids, PREFILL, LENGTH - PREFILL)
    assert_same_bits(run(setup.model, ids, PREFILL, LENGTH - PREFILL), expected, "on the CPU")


def run_thrice(setup: PlacedMixture, ids: Tensor) -> None:
    for _ in range(3):
        run(setup.model, ids, PREFILL, LENGTH - PREFILL)


@pytest.mark.parametrize(
    ("kind", "at", "lost"),
    [
        ("launch", 1, True),
        ("launch", 120, False),
        ("launch_graph", 2, False),
        ("call_host", 2, True),
        ("synchronize", 3, False),
        ("synchronize", 12, True),
        ("copy_in", 2, False),
        ("copy_out", 2, True),
        ("end_capture", 1, False),
    ],
)
def test_a_card_that_fails_costs_one_error(kind: str, at: int, lost: bool) -> None:
    """Of the layers or of the experts' copies; afterwards the CPU computes all of both."""
    with placed_mixture("deepseek_v3", 1.0, 0.4) as setup:
        ids = tokens(LENGTH)
        setup.driver.arm(kind, at, ILLEGAL, lost=lost)
        with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
            run_thrice(setup, ids)
        assert setup.model.is_lost
        hits = setup.store.usage.device_hits
        for _ in range(2):
            gives_the_bits_of_the_cpu(setup)
        assert setup.store.usage.device_hits == hits
        assert setup.store.num_device_slots == 0


def test_an_expert_that_cannot_be_copied_there_is_the_end_of_the_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed: Future[float] = Future()
    failed.set_exception(ILLEGAL)
    with placed_mixture("deepseek_v3", 1.0, 0.4) as setup:
        monkeypatch.setattr(setup.store.devices[0], "upload", lambda *_: failed)
        with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
            run(setup.model, tokens(LENGTH), PREFILL, LENGTH - PREFILL)
        assert setup.model.is_lost
        gives_the_bits_of_the_cpu(setup)


def test_an_error_of_a_file_leaves_the_card_in_use() -> None:
    """It came up while the host computed its part of a token."""
    options = StoreOptions(read_ahead=False)
    with placed_mixture("deepseek_v3", 0.2, 0.3, options=options) as setup:
        setup.checkpoint.arm(CheckpointError("bad sector"), 2)
        with pytest.raises(CheckpointError, match="bad sector"):
            run(setup.model, tokens(LENGTH), 1, LENGTH - 1)
        assert not setup.model.is_lost
        says_what_the_cpu_says(setup)
        assert setup.store.num_device_slots > 0


def test_a_router_that_the_card_cannot_hold_leaves_the_layer_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """deepseek_v3's first layer is dense, the next a mixture."""

    def refuse(rule: object) -> None:
        raise KernelError("route on a GPU")

    model = load_model(source("deepseek_v3"), NativeKernels(threads=1), leave_experts=True)
    assert isinstance(model, Decoder)
    assert len(computable_layers(model)) == 4
    monkeypatch.setattr("localr1.card.model.RouterArguments.of", refuse)
    assert len(computable_layers(model)) == 1


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        (ExpertOptions(ram="50%", device="cuda:64MiB", vram="600KiB"), 6),
        (ExpertOptions(device="cuda:64MiB", gpu_layers=2), 2),
        (ExpertOptions(device="cuda:64MiB", gpu_layers=0), None),
        (ExpertOptions(device="cuda:1MiB", vram="600KiB"), None),
    ],
)
def test_r1_nano_on_a_card(
    nano: Path, options: ExpertOptions, layers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, in part, or its experts alone, where there is no room or none was asked for."""
    skip_where_there_is_no_model()
    drivers: list[ModelDriver] = []

    def open_model(programs: object, spec: CardSpec, kernels: NativeKernels) -> CudaDevice:
        drivers.append(ModelDriver(kernels.rows_per_block))
        return CudaDevice(drivers[-1], spec.memory or LARGE, kernels)

    monkeypatch.setattr("localr1.load.open_cuda", open_model)
    greedy = SamplingParams(temperature=0.0)
    with closing(load_engine(nano, threads=1, context=256, experts=options)) as engine:
        assert ("computes" in engine.where) == (layers is not None)
        if layers is not None:
            assert f"computes {layers} of" in engine.where
        if layers == engine.model.config.num_layers:
            assert "4042" in ask(engine, QUESTION, greedy).text
    assert drivers[0].closed == 1
    assert drivers[0].taken == drivers[0].num_pinned == 0
