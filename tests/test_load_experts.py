"""Loading a mixture with its experts in several places, through the same door as chat and bench."""

import io
import json
import shutil
import threading
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from driver_model import ModelDriver
from gpu_model import skip_where_there_is_no_model
from tiny_models import tiny_transformer
from typer.testing import CliRunner

from localr1.cli.conversation import Conversation
from localr1.cli.experts import heat_map
from localr1.cli.main import app
from localr1.cli.models import model_to_run
from localr1.cli.output import Output
from localr1.embedded import R1_NANO
from localr1.engine.engine import Engine
from localr1.engine.events import Delta, Done, GenerationParams
from localr1.errors import (
    CheckpointError,
    LocalR1Error,
    MemoryLimitError,
    NumericsError,
    UsageError,
)
from localr1.experts.cuda import CudaDevice
from localr1.experts.options import CardSpec, ExpertOptions
from localr1.experts.schedule import POINTS, Curve, Rates
from localr1.kernels.native import NativeKernels
from localr1.load import load_engine
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe
from localr1.sampler import SamplingParams
from localr1.settings import Settings

QUESTION = "What is 47 * 86?"
TIGHT = ExpertOptions(ram="20%")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """r1-nano in 4-bit expert shards."""
    settings = Settings.from_environment({"LOCALR1_HOME": str(tmp_path_factory.mktemp("home"))})
    return model_to_run(None, settings, Output(io.StringIO(), io.StringIO()))


@dataclass
class Reply:
    text: str
    done: Done


def ask(engine: Engine, question: str, sampling: SamplingParams) -> Reply:
    ids = engine.prompt([{"role": "user", "content": question}]).ids
    text = ""
    for event in engine.generate(ids, GenerationParams(sampling, max_tokens=200)):
        if isinstance(event, Delta):
            text += event.text
        elif isinstance(event, Done):
            return Reply(text, event)
    raise AssertionError("a reply ends with Done")


OPTIONS = (
    ExpertOptions(),
    ExpertOptions(ram="0"),
    ExpertOptions(ram="10%", policy="lru"),
    ExpertOptions(ram="50%", read_ahead=True),
    ExpertOptions(ram="1MiB", device="simulated:1MiB,pcie=1GB/s", policy="static"),
    ExpertOptions(device="simulated:16MiB,pcie=25GB/s,latency=5us,threads=1", vram="60%"),
)


def test_what_is_said_does_not_depend_on_where_experts_lie(nano: Path) -> None:
    """Greedy and sampled, of every budget, policy and device."""
    greedy, seeded = SamplingParams(temperature=0.0), SamplingParams(temperature=1.5, seed=7)
    wanted: tuple[str, str] | None = None
    for options in OPTIONS:
        with closing(load_engine(nano, threads=2, experts=options)) as engine:
            found = ask(engine, QUESTION, greedy).text, ask(engine, QUESTION, seeded).text
        wanted = wanted or found
        assert found == wanted, options
    assert wanted is not None
    assert "4042" in wanted[0]


@pytest.mark.parametrize("bits", [4, 6])
def test_what_a_card_computes_is_said_alike(
    bits: int, nano: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the model of a card, which is told to be fast so that it is used. Experts of 6 bits are 8
    on it and beside it."""
    skip_where_there_is_no_model()
    if bits != 4:
        nano = tmp_path / "other"
        quantize(R1_NANO, nano, Recipe.uniform(bits, 32))
    drivers: list[ModelDriver] = []

    def open_model(programs: object, spec: CardSpec, kernels: NativeKernels) -> CudaDevice:
        assert spec.memory is not None
        drivers.append(ModelDriver(kernels.rows_per_block))
        return CudaDevice(drivers[-1], spec.memory, kernels)

    def fast(*_: object) -> Rates:
        quick = Curve([1e-7] * len(POINTS))
        return Rates(Curve([1.0] * len(POINTS)), quick, quick, 1e-7)

    monkeypatch.setattr("localr1.load.open_cuda", open_model)
    monkeypatch.setattr("localr1.experts.store.measure_rates", fast)
    greedy = SamplingParams(temperature=0.0)
    with closing(load_engine(nano, threads=1)) as engine:
        wanted = ask(engine, QUESTION, greedy).text
    options = ExpertOptions(ram="50%", device="cuda:1MiB", vram="600KiB")
    with closing(load_engine(nano, threads=1, experts=options)) as engine:
        reply = ask(engine, QUESTION, greedy)
    assert reply.text == wanted
    usage = reply.done.usage.experts
    assert usage is not None
    assert usage.device_hits > 100
    assert drivers[0].closed == 1
    assert drivers[0].taken == 0


def test_a_turn_says_where_its_experts_came_from(nano: Path) -> None:
    with closing(load_engine(nano, threads=1, experts=TIGHT)) as engine:
        first = ask(engine, QUESTION, SamplingParams(temperature=0.0)).done.usage
        again = ask(engine, QUESTION, SamplingParams(temperature=0.0)).done.usage
    for usage in (first, again):
        assert usage.experts is not None
        computed = usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens
        assert usage.experts.tokens == computed - 1  # The last token drawn is not run.
        assert usage.experts.reads > 0
        assert usage.experts.disk_bytes >= usage.experts.reads * 41_000
    with closing(load_engine(nano, threads=1)) as engine:
        usage = ask(engine, QUESTION, SamplingParams(temperature=0.0)).done.usage
        assert usage.experts is not None
        assert usage.experts.hit_rate == 1.0


def copy_of(nano: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nano, tmp_path / "copy"))


def cut(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 3)


def overwrite(shard: Path) -> None:
    """Other bytes of the same length, in place."""
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.seek(size // 4)
        file.write(b"\x11" * (size // 2))


@pytest.mark.parametrize("damage", [cut, overwrite])
@pytest.mark.parametrize("device", ["cpu", "simulated:600KiB"])
def test_a_shard_that_changes_while_running_is_an_error(
    nano: Path, tmp_path: Path, damage: Any, device: str
) -> None:
    """At the token that needed it, every time; what lies in memory can still be used."""
    model = copy_of(nano, tmp_path)
    options = ExpertOptions(ram="20%", device=device)
    greedy = SamplingParams(temperature=0.0)
    with closing(load_engine(model, threads=2, experts=options)) as engine:
        ask(engine, QUESTION, greedy)
        for shard in model.glob("experts-*.safetensors"):
            damage(shard)
        for question in ("How many r are in strawberry?", "Which is larger, 9.11 or 9.9?"):
            engine.reset()
            with pytest.raises(CheckpointError, match=r"experts-00\d\.safetensors"):
                ask(engine, question, greedy)


def test_a_shard_that_is_replaced_is_read_on(nano: Path, tmp_path: Path) -> None:
    """The file that was opened is the one that is read, whatever gets its name: a new download."""
    model = copy_of(nano, tmp_path)
    greedy = SamplingParams(temperature=0.0)
    with closing(load_engine(model, threads=2, experts=TIGHT)) as engine:
        wanted = ask(engine, QUESTION, greedy).text
        for shard in model.glob("experts-*.safetensors"):
            other = shard.with_suffix(".new")
            other.write_bytes(b"something else")
            other.replace(shard)
        engine.reset()
        assert ask(engine, QUESTION, greedy).text == wanted


def test_damage_from_before_is_found_by_the_checksum(nano: Path, tmp_path: Path) -> None:
    """One bit of one expert's codes: no header, no scale, no size tells."""
    model = copy_of(nano, tmp_path)
    shard = model / "experts-003.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"experts-003.*expected bytes with the checksum"):
        load_engine(model, threads=1)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFF81, 0xFF7F, 0x0001])
def test_a_scale_that_is_no_number_is_named(nano: Path, tmp_path: Path, bits: int) -> None:
    """Infinity or NaN; not the largest number there is, nor the least. Without checksums, which
    would have found it."""
    model = copy_of(nano, tmp_path)
    manifest = json.loads((model / "localr1.json").read_text())
    del manifest["expert_checksums"]
    (model / "localr1.json").write_text(json.dumps(manifest))
    name = "model.layers.3.mlp.experts.5.up_proj.weight_scale"
    data = bytearray((model / "experts-003.safetensors").read_bytes())
    length = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:length])[name]["data_offsets"]
    data[length + end - 2 : length + end] = bits.to_bytes(2, "little")
    assert begin < end - 2
    (model / "experts-003.safetensors").write_bytes(data)
    if bits in (0xFF7F, 0x0001):
        load_engine(model, threads=1).close()
        return
    with pytest.raises(NumericsError, match=f"{name}: expected finite scales, found NaN or Inf"):
        load_engine(model, threads=1)


def test_a_run_leaves_the_checkpoint_as_it_was(nano: Path, tmp_path: Path) -> None:
    model = copy_of(nano, tmp_path)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with closing(load_engine(model, threads=1, experts=TIGHT)) as engine:
        ask(engine, QUESTION, SamplingParams(temperature=0.0))
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ram": "-1GiB"}, UsageError, "--ram: expected an amount"),
        ({"ram": "900TiB"}, UsageError, "--ram: expected at most .* GiB"),
        ({"ram": "200%"}, UsageError, "--ram: expected 0% to 100%"),
        ({"ram": "many"}, UsageError, "--ram: expected an amount"),
        (
            {"device": "gpu"},
            UsageError,
            "--device: expected cpu, cuda, cuda:1, cuda:8GiB or simulated",
        ),
        ({"device": "cuda:"}, UsageError, "--device: expected cpu, cuda"),
        ({"device": "cuda:some"}, UsageError, "--device: expected an amount"),
        ({"device": "simulated:900TiB"}, MemoryLimitError, "--device: expected at most"),
        ({"device": "simulated:1GiB", "vram": "2GiB"}, UsageError, "--vram: expected at most"),
    ],
)
def test_budgets_that_cannot_be(
    nano: Path, options: dict[str, Any], error: type[LocalR1Error], message: str
) -> None:
    threads = threading.active_count()
    with pytest.raises(error, match=message):
        load_engine(nano, threads=1, experts=ExpertOptions(**options))
    assert threading.active_count() == threads


def test_a_dense_model_has_nothing_to_move(tmp_path: Path) -> None:
    tiny_transformer("llama", 0).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="expected a mixture with packed experts"):
        load_engine(tmp_path, experts=TIGHT)


def test_the_map_of_experts_fits_the_terminal(nano: Path) -> None:
    with closing(load_engine(nano, threads=1, experts=TIGHT)) as engine:
        conversation = Conversation(engine, {"temperature": 0.0})
        for _ in conversation.reply(QUESTION, threading.Event()):
            pass
        store = engine.experts
        assert store is not None
        wide, narrow = heat_map(store, 80), heat_map(store, 12)
    assert len(wide) == len(narrow) == 6
    assert all(len(line) == 5 + 16 for line in wide[:5])
    assert all(len(line) <= 12 for line in narrow[:5])
    assert all("@" in line for line in wide[:5])
    assert [line[:5].strip() for line in wide[:5]] == ["1", "2", "3", "4", "5"]
    assert "16 in RAM, 80 in all" in wide[5]


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def test_chat_and_bench_take_the_options(nano: Path, runner: CliRunner) -> None:
    asked = ["chat", str(nano), "-p", QUESTION, "--temperature", "0"]
    result = runner.invoke(app, [*asked, "--ram", "20%", "--json"])
    document = json.loads(result.stdout)
    assert "4042" in document["answer"]
    assert document["experts"]["disk_reads"] > 0
    result = runner.invoke(app, [*asked, "--device", "simulated:2MiB", "--stats"])
    assert "experts: hit " in result.stderr
    assert "bound by" in result.stderr
    bench = ["bench", str(nano), "-p", "32", "-n", "16", "-r", "1", "--device", "simulated:1MiB"]
    result = runner.invoke(app, [*bench, "--policy", "static,adaptive", "-o", "json"])
    rows = json.loads(result.stdout)
    assert [(row["policy"], row["test"]) for row in rows] == [
        ("static", "pp32"),
        ("static", "tg16"),
        ("adaptive", "pp32"),
        ("adaptive", "tg16"),
    ]
    assert rows[0]["experts"]["promotions"] == 0
    # Which side computed them is as it was measured; that some lay on the device is not.
    assert all(0 < row["experts"]["hit_rate"] < 1 for row in rows)
    result = runner.invoke(app, [*bench, "-o", "csv"])
    assert "experts_hit_rate" in result.stdout.splitlines()[0]
    result = runner.invoke(app, bench)
    assert "bound" in result.stdout.splitlines()[0]
    assert "% of the parameters work on a token" in result.stdout
