"""The simulator: its accounts by hand, against the replays, and through the command."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from localr1.cli.main import app
from localr1.errors import LocalR1Error, MemoryLimitError, UsageError
from localr1.experts.hardware import PROFILES, HardwareProfile
from localr1.experts.policy import Belady, make_ranking
from localr1.experts.residency import ABSENT, Promotion, Residency
from localr1.experts.simulate import (
    BOUNDS,
    INSERT_CAP,
    POLICIES,
    Budgets,
    MixtureSizes,
    Prediction,
    simulate,
)
from localr1.experts.synthetic import ROUTINGS, V2_LITE, SyntheticRouting, synthetic_trace
from localr1.experts.trace import Trace, read_trace, write_trace

NANO = Path(__file__).parent / "data" / "r1-nano-trace.safetensors"
EXPERT = 10**6
SIZES = MixtureSizes(expert_bytes=EXPERT, dense_bytes=3 * EXPERT)
GIB = 1 << 30
MACHINE = HardwareProfile(
    "a machine",
    vram_bytes=GIB,
    ram_bytes=GIB,
    gpu_large=400.0,
    gpu_small=200.0,
    pcie=20.0,
    cpu=40.0,
    dense=300.0,
    disk=4.0,
    round_trip_us=50.0,
)
SMALL = replace(V2_LITE, num_layers=4, num_experts=16, experts_per_token=3)
TRACE = synthetic_trace(SMALL, 2, 60)
ALL = 4 * 16 * EXPERT


def decoded(choices: list[list[int]], prompt: int = 0, num_experts: int = 4) -> Trace:
    """One layer; a row is a token, the first `prompt` of them a prompt."""
    lengths = np.array([[prompt, len(choices) - prompt]], np.int32)
    return Trace(np.array(choices, np.uint8)[:, None], lengths, (1,), num_experts, "by hand")


def test_all_on_the_device() -> None:
    found = simulate(TRACE, SIZES, MACHINE, Budgets(ALL, 6 * EXPERT), "adaptive")
    assert (found.device_uses, found.ram_uses, found.reads) == (60 * 12, 0, 0)
    assert found.seconds == pytest.approx(60 * (3e6 / 300e9 + 4 * 3 * 1e6 / 200e9))
    assert found.device_bytes == 60 * 12 * EXPERT
    assert found.disk_bytes == found.link_bytes == 0
    assert found.bound == "device"


def test_all_in_ram() -> None:
    found = simulate(TRACE, SIZES, MACHINE, Budgets(0, ALL), "lru")
    assert (found.device_uses, found.ram_uses, found.reads) == (0, 60 * 12, 0)
    # Each layer waits for the CPU, so it pays the round trip.
    assert found.seconds == pytest.approx(60 * (3e6 / 300e9 + 4 * (3e6 / 40e9 + 50e-6)))
    alone = replace(MACHINE, vram_bytes=0, gpu_large=0.0, gpu_small=0.0, round_trip_us=0.0)
    found = simulate(TRACE, SIZES, alone, Budgets(0, ALL), "lru")
    assert found.seconds == pytest.approx(60 * (3e6 / 300e9 + 4 * 3e6 / 40e9))
    assert found.bound == "RAM"


def test_reads_by_hand() -> None:
    # Four slots for two experts a token; all of 0 to 3 are there at the start.
    trace = decoded([[0, 1], [4, 1], [4, 5], [0, 5]], num_experts=8)
    alone = replace(MACHINE, vram_bytes=0)
    found = simulate(trace, SIZES, alone, Budgets(0, 4 * EXPERT), "lru")
    # 4 evicts 2 (never used, the lowest), 5 evicts 3, 0 is still there.
    assert (found.ram_uses, found.reads) == (6, 2)
    assert found.disk_bytes == 2 * EXPERT
    dense, cpu, disk = 3e6 / 300e9, 1e6 / 40e9, 1e6 / 4e9
    # A read takes longer than the CPU has other work, and is computed after it.
    with_read = disk + cpu
    assert found.seconds == pytest.approx(4 * dense + 2 * 2 * cpu + 2 * with_read)
    assert found.disk_seconds == pytest.approx(2 * (disk - cpu))
    assert found.bound == "disk"


def test_reads_share_the_disk() -> None:
    trace = decoded([[8, 9, 10, 11, 12, 13]], num_experts=16)
    alone = replace(MACHINE, vram_bytes=0)
    found = simulate(trace, SIZES, alone, Budgets(0, 12 * EXPERT), "lru")
    assert found.reads == 2, "0 to 11 are there"
    trace = decoded([[12, 13, 14, 15, 16, 17]], num_experts=18)
    found = simulate(trace, SIZES, alone, Budgets(0, 12 * EXPERT), "lru")
    dense, cpu, disk = 3e6 / 300e9, 1e6 / 40e9, 1e6 / 4e9
    # Four arrive together, are computed while the other two are read, which then are too.
    assert found.seconds == pytest.approx(dense + 6 * disk + 2 * cpu)


def test_a_copy_takes_its_time_and_effect_between_tokens() -> None:
    # One slot on the device, holding 0 at the start; the trace only wants 3.
    trace = decoded([[3]] * 40)
    token = 3e6 / 300e9 + 1e6 / 40e9 + 50e-6
    for tokens_it_takes in (0.5, 3.5):
        link = replace(MACHINE, pcie=1e6 / (tokens_it_takes * token) / 1e9)
        found = simulate(trace, SIZES, link, Budgets(EXPERT, 4 * EXPERT), "lru")
        # Begun after the first token; there after the first that ends later than the copy.
        first_hit = 1 + int(np.ceil(tokens_it_takes))
        assert found.device_uses == 40 - first_hit
        assert (found.promotions, found.link_bytes) == (1, EXPERT)


@pytest.mark.parametrize("ram", [0.5, 0.76])
def test_what_the_device_drops_comes_back_to_ram(
    ram: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = read_trace(NANO)
    experts = trace.experts.shape[1] * trace.num_experts
    budgets = Budgets(int(0.25 * experts) * EXPERT, int(ram * experts) * EXPERT)
    found = simulate(trace, SIZES, MACHINE, budgets, "adaptive")
    assert 0 < found.demotions <= found.promotions
    assert found.link_bytes == (found.promotions + found.demotions) * EXPERT
    monkeypatch.setattr("localr1.experts.simulate._Tiers._demote", lambda *_: None)
    dropped = simulate(trace, SIZES, MACHINE, budgets, "adaptive")
    assert found.reads < 0.65 * dropped.reads
    assert found.tokens_per_second > dropped.tokens_per_second


def replayed_hits(trace: Trace, policy: str, slots: int) -> int:
    """Hits of the device tier in a trace that only decodes, with copies that land after one more
    token."""
    _, layers, _ = trace.experts.shape
    ranking = make_ranking(policy, layers, trace.num_experts)
    residency = Residency(layers, trace.num_experts, slots, ranking, insert_cap=INSERT_CAP)
    for promotion in residency.warm_start():
        residency.complete(promotion)
    flying: list[Promotion] = []
    hits = 0
    for token in trace.experts.astype(np.int64):
        hits += int((residency.slot_of[np.arange(layers)[:, None], token] != ABSENT).sum())
        for layer, experts in enumerate(token):
            ranking.observe(layer, experts)
        ranking.tick(1)
        for promotion in flying:
            residency.complete(promotion)
        flying = residency.promotions()
    return hits


@pytest.mark.parametrize("policy", ["lru", "lfu", "adaptive"])
def test_hits_are_those_of_the_replay(policy: str) -> None:
    trace = replace(TRACE, sequences=np.array([[0, 120]], np.int32))
    # A link that is done at once, and a CPU so slow that no hit is computed there instead.
    quick = replace(MACHINE, pcie=1e6, cpu=1.0)
    found = simulate(trace, SIZES, quick, Budgets(16 * EXPERT, ALL), policy)
    assert found.device_uses == replayed_hits(trace, policy, 16)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_accounts_agree(policy: str) -> None:
    budgets = Budgets(12 * EXPERT, 20 * EXPERT)
    found = simulate(TRACE, SIZES, MACHINE, budgets, policy)
    assert found.tokens == 60
    assert found.uses == 60 * 12
    assert found.disk_bytes == found.reads * EXPERT
    assert found.ram_bytes == (found.ram_uses + found.reads) * EXPERT
    assert found.device_bytes == found.device_uses * EXPERT
    assert found.link_bytes == (found.promotions + found.demotions) * EXPERT
    assert found.ram_seconds + found.device_seconds + found.disk_seconds < found.seconds
    assert found.bound in BOUNDS
    assert found.reads > 0
    assert (found.promotions == 0) == (policy == "static")
    assert simulate(TRACE, SIZES, MACHINE, budgets, policy) == found, "nothing is left to chance"


def test_the_oracle_knows_what_follows_a_prompt() -> None:
    whole, chunked = Belady(TRACE), Belady(TRACE)
    for token in TRACE.experts[:20].astype(np.int64):
        for layer, experts in enumerate(token):
            whole.observe(layer, experts)
        whole.tick(1)
    for layer in range(4):
        experts, counts = np.unique(TRACE.experts[:20, layer], return_counts=True)
        chunked.observe(layer, experts.astype(np.int64), counts.astype(np.float64))
    chunked.tick(20)
    assert np.array_equal(chunked.scores, whole.scores)


def test_adaptive_reads_less_than_lru_and_lfu() -> None:
    trace = read_trace(NANO)
    alone = replace(MACHINE, vram_bytes=0)
    reads = {
        policy: simulate(trace, SIZES, alone, Budgets(0, 40 * EXPERT), policy).reads
        for policy in POLICIES
    }
    assert reads["belady"] < reads["adaptive"] <= min(reads["lru"], reads["lfu"])
    assert max(reads["lru"], reads["lfu"]) < reads["static"]


@pytest.mark.parametrize(
    ("trace", "budgets", "policy", "said"),
    [
        (TRACE, Budgets(0, ALL), "mru", "--policy: expected one of static"),
        (TRACE, Budgets(0, 5 * EXPERT), "lru", "--ram: expected at least 6,000,000 bytes"),
        (decoded([[0], [1]], prompt=2), Budgets(0, ALL), "lru", "generated tokens"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    trace: Trace, budgets: Budgets, policy: str, said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        simulate(trace, SIZES, MACHINE, budgets, policy)
    assert said in str(caught.value)


def test_nothing_found_is_no_speed() -> None:
    assert Prediction("lru").tokens_per_second == 0.0


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=lambda routing: routing.name)
def test_made_traces(routing: SyntheticRouting, tmp_path: Path) -> None:
    few = replace(routing, num_layers=3)
    trace = synthetic_trace(few, 2, 10, seed=1)
    assert trace.experts.shape == (20, 3, routing.experts_per_token)
    assert trace.sequences.tolist() == [[5, 5], [5, 5]]
    ordered = np.sort(trace.experts, axis=2)
    assert (ordered[..., 1:] > ordered[..., :-1]).all(), "a token's experts are distinct"
    assert np.array_equal(synthetic_trace(few, 2, 10, seed=1).experts, trace.experts)
    assert not np.array_equal(synthetic_trace(few, 2, 10, seed=2).experts, trace.experts)
    write_trace(trace, tmp_path / "t.safetensors")
    assert np.array_equal(read_trace(tmp_path / "t.safetensors").experts, trace.experts)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALR1_HOME", str(tmp_path / "home"))
    return tmp_path


PROFILE = "rtx3060-12g-ddr4-32g"


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["simulate", *arguments])
    if code == 0:
        assert result.exit_code == 0, result.output
        return result.stdout
    assert isinstance(result.exception, LocalR1Error), result.output
    assert result.exception.exit_code == code
    return str(result.exception)


def test_the_command_predicts(home: Path) -> None:
    arguments = (str(NANO), "--hardware", PROFILE, "--vram", "25%", "--ram", "50%")
    report = json.loads(run(*arguments, "--json"))
    assert report["bits_per_weight"] == 4.5
    assert report["hardware"]["name"] == PROFILES[PROFILE].name
    assert report["budgets"]["ram"] == report["experts_bytes"] // 2
    assert [row["policy"] for row in report["policies"]] == list(POLICIES)
    for row in report["policies"]:
        shares = row["device_share"] + row["ram_share"] + row["disk_share"]
        assert shares == pytest.approx(1.0)
        assert row["tokens_per_second"] > 0
    shown = run(*arguments, "--policy", "lru,adaptive", "--bits", "8")
    assert "8.5 bits a weight" in shown
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["lru", "adaptive"]


def test_everything_fits_where_there_is_room(home: Path) -> None:
    report = json.loads(run(str(NANO), "--hardware", PROFILE, "--policy", "lru", "--json"))
    assert report["budgets"]["vram"] == report["budgets"]["ram"] == report["experts_bytes"]
    assert report["policies"][0]["device_share"] > 0.5
    assert report["policies"][0]["disk_share"] == 0.0


def test_a_config_is_enough_of_a_model(home: Path) -> None:
    from released_mixtures import V2_LITE as V2_LITE_CONFIG

    path, config = home / "t.safetensors", home / "config.json"
    write_trace(synthetic_trace(V2_LITE, 1, 10), path)
    config.write_text(json.dumps(V2_LITE_CONFIG))
    arguments = (str(path), "--hardware", PROFILE, "--policy", "lru", "--json")
    report = json.loads(run(*arguments, "--model", str(config)))
    assert report["expert_bytes"] == 3 * 2048 * 1408 * 4.5 / 8
    assert "is no model here" in run(*arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--hardware", "rtx9090"], 2, "one of rtx3060"),
        (["--hardware", "none.toml"], 4, "none.toml"),
        (["--policy", "lru,mru"], 2, "found 'mru'"),
        (["--policy", ""], 2, "expected one of static"),
        (["--vram", "-1"], 2, "--vram"),
        (["--vram", "12GiB"], 2, "at most"),
        (["--ram", "lots"], 2, "--ram"),
        (["--ram", "1e30GiB"], 2, "--ram"),
        (["--ram", "0"], 2, "at least"),
        (["--model", "nowhere"], 4, "no such file"),
        (["--model", "nowhere.json"], 4, "nowhere.json"),
    ],
)
def test_bad_arguments_cost_one_error(
    arguments: list[str], code: int, said: str, home: Path
) -> None:
    assert said in run(str(NANO), "--hardware", PROFILE, *arguments, code=code)


@pytest.mark.parametrize("bits", ["0", "-4", "33", "x", "nan"])
def test_bits_are_bits(bits: str, home: Path) -> None:
    result = CliRunner().invoke(app, ["simulate", str(NANO), "--bits", bits])
    assert result.exit_code == 2


def test_a_model_must_be_that_of_the_trace(home: Path) -> None:
    from released_mixtures import QWEN3_30B_A3B

    config = home / "config.json"
    config.write_text(json.dumps(QWEN3_30B_A3B))
    said = run(str(NANO), "--hardware", PROFILE, "--model", str(config), code=2)
    assert "expected 48 layers of 128 experts, 8 a token, found 5, 16 and 2" in said


def test_a_dense_model_and_one_too_large_are_refused(home: Path) -> None:
    from released_configs import LLAMA_2_7B
    from released_mixtures import R1

    path, config = home / "t.safetensors", home / "config.json"
    config.write_text(json.dumps(LLAMA_2_7B))
    said = run(str(NANO), "--hardware", PROFILE, "--model", str(config), code=2)
    assert "a mixture of experts" in said
    config.write_text(json.dumps(R1))
    write_trace(synthetic_trace(ROUTINGS["synthetic-r1"], 1, 4), path)
    arguments = (str(path), "--hardware", PROFILE, "--model", str(config), "--bits", "8")
    assert "memory for the weights of every token" in run(*arguments, code=3)
    assert MemoryLimitError.exit_code == 3


def test_a_name_in_a_trace_is_no_path(home: Path) -> None:
    trace = replace(read_trace(NANO), model="../../etc/passwd")
    write_trace(trace, home / "t.safetensors")
    assert "is no model here" in run(str(home / "t.safetensors"), "--hardware", PROFILE, code=2)


PURE = (
    "policy",
    "residency",
    "replay",
    "simulate",
    "synthetic",
    "hardware",
    "budget",
    "beneath",
    "statistics",
)


def test_pure_modules_load_no_torch() -> None:
    """Also not by way of what they import."""
    imports = ", ".join(f"localr1.experts.{name}" for name in PURE)
    code = f"import sys, {imports}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
