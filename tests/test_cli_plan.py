"""`localr1 plan`: what it says of known models on known machines, and how it refuses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from quant_sources import MIXTURES, save_source
from released_configs import (
    R1_0528_QWEN3_8B,
    R1_DISTILL_LLAMA_8B,
    R1_DISTILL_QWEN_1_5B,
    R1_DISTILL_QWEN_7B,
)
from released_mixtures import KIMI_K2, KIMI_K2_THINKING, QWEN3_30B_A3B, R1, V2_LITE

from localr1.cli.main import main
from localr1.embedded import R1_NANO
from localr1.experts import measure
from localr1.experts.hardware import PROFILES, HardwareProfile
from localr1.experts.placement import PROGRAM_BYTES
from localr1.experts.prediction import LAYER_SECONDS
from localr1.hub.known import find_model, known_models, smaller_models
from localr1.models.registry import parse_config
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

GAMING_PC = ("--hardware", "rtx4090-24g-ddr5-64g")
WITHOUT_GPU = ("--hardware", "cpu-ddr5-64g")
GIB = 1 << 30
PUBLISHED = {
    "r1": R1,
    "kimi-k2": KIMI_K2,
    "v2-lite-chat": V2_LITE,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "r1-0528-qwen3-8b": R1_0528_QWEN3_8B,
    "r1-distill-llama-8b": R1_DISTILL_LLAMA_8B,
    "r1-distill-qwen-7b": R1_DISTILL_QWEN_7B,
    "r1-distill-qwen-1.5b": R1_DISTILL_QWEN_1_5B,
}
PARAMETERS = {
    "r1-distill-llama-70b": 70_553_706_496,
    "r1-distill-qwen-32b": 32_763_876_352,
    "r1-distill-qwen-14b": 14_770_033_664,
}
"""Of the files on the Hub; the configs of these three are nowhere else in the tests."""


class Runner:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        code: Any = 0
        try:
            main(["plan", *arguments])
        except SystemExit as end:
            code = end.code or 0
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def document(self, *arguments: str) -> Any:
        code, out, _ = self(*arguments, "--json")
        assert code in (0, 3)
        return json.loads(out)


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)


def test_known_models_are_as_published() -> None:
    for alias, config in PUBLISHED.items():
        assert parse_config(known_models()[alias].config) == parse_config(config)
    assert known_models()["r1-0528"].config == known_models()["r1"].config
    for alias, count in PARAMETERS.items():
        assert parse_config(known_models()[alias].config).parameter_count == count
    config = json.loads((R1_NANO / "config.json").read_text())
    assert parse_config(known_models()["r1-nano"].config) == parse_config(config)


def test_known_models_are_found_by_alias_and_repository() -> None:
    r1 = find_model("DeepSeek-AI/DeepSeek-R1")
    assert r1 is not None
    assert r1.alias == "r1"
    assert find_model("R1-distill-qwen-1.5B") == known_models()["r1-distill-qwen-1.5b"]
    assert find_model("deepseek-r1") is None
    smaller = [model.alias for model in smaller_models(r1)]
    assert smaller[0] == "r1-distill-llama-70b"
    assert smaller[-1] == "r1-nano"
    counts = [parse_config(model.config).parameter_count for model in smaller_models(r1)]
    assert counts == sorted(counts, reverse=True)


def test_r1_on_a_gaming_pc_runs_from_disk(plan: Runner) -> None:
    document = plan.document("r1", *GAMING_PC)
    assert document["verdict"] == "from disk"
    assert document["repository"] == "deepseek-ai/DeepSeek-R1"
    assert document["experts"] * document["expert_bytes"] == pytest.approx(368e9, rel=0.001)
    assert document["file_bytes"] == pytest.approx(388e9, rel=0.001)
    assert document["vram"]["weights"] > 16 * GIB
    assert document["disk"]["experts"] > 0.8 * document["experts"]
    prediction = document["prediction"]
    # The limit model's 1-4 tok/s, but with a curve that is LRU's, and 8-bit attention.
    assert 0.5 < prediction["decode"] < 4
    assert prediction["decode_bound"] == "disk"
    assert sum(prediction["hits"].values()) == pytest.approx(1)
    code, out, _ = plan("r1", *GAMING_PC)
    assert code == 0
    assert "slow: 8" in out
    assert "% of the experts stay on disk" in out
    assert "localr1 pull r1 --quantize 4" in out
    faster = plan.document("r1", "--hardware", "rtx5090-32g-ddr5-192g")["prediction"]
    assert faster["decode"] > 1.5 * prediction["decode"]


@pytest.mark.parametrize("name", ["v2-lite-chat", "qwen3-30b-a3b", "r1-distill-qwen-14b"])
def test_what_fits_a_gaming_pc(plan: Runner, name: str) -> None:
    document = plan.document(name, *GAMING_PC)
    assert document["verdict"] == "fits"
    assert document["disk"] == {"experts": 0, "bytes": 0}
    for memory in ("vram", "ram"):
        tier = document[memory]
        taken = sum(tier[part] for part in ("program", "weights", "cache", "workspace"))
        assert taken + tier["expert_bytes"] + tier["free"] == tier["budget"]
        assert tier["free"] >= 0
    assert document["prediction"]["prefill"] > document["prediction"]["decode"] > 10
    on_cpu = plan.document(name, *GAMING_PC, "--device", "cpu")
    assert on_cpu["vram"] is None
    assert on_cpu["prediction"]["decode"] < document["prediction"]["decode"] / 2


def test_a_dense_model_reads_all_its_weights_for_a_token(plan: Runner) -> None:
    document = plan.document("r1-distill-llama-8b", *WITHOUT_GPU)
    dense = document["weight_bytes"] - 2 * 128256 * 4096
    limit = 60e9 / dense
    assert 0.9 * limit < document["prediction"]["decode"] < limit
    assert document["prediction"]["hits"] is None
    eight = plan.document("r1-distill-llama-8b", *WITHOUT_GPU, "--bits", "8")
    assert eight["file_bytes"] > 1.4 * document["file_bytes"]
    assert eight["next"][0] == "localr1 pull r1-distill-llama-8b --quantize 8"


def test_what_does_not_fit_names_the_nearest_that_does(plan: Runner, tmp_path: Path) -> None:
    small = tmp_path / "small.toml"
    small.write_text('name = "small"\nram_bytes = "8GiB"\ncpu = 30\ndense = 30\ndisk = 1\n')
    code, out, err = plan("r1-distill-qwen-14b", "--hardware", str(small))
    assert (code, err) == (3, "")
    assert "does not fit" in out
    assert "of main memory short" in out
    document = plan.document("r1-distill-qwen-14b", "--hardware", str(small))
    assert not document["fits"]
    assert document["short"]["ram"] == -document["ram"]["free"] > 0
    assert (document["prediction"], document["next"]) == (None, [])
    assert document["nearest"]["model"] == "r1-distill-qwen-1.5b"
    assert document["nearest"]["next"][0].startswith("localr1 pull r1-distill-qwen-1.5b ")
    # A shorter context comes first, then fewer bits.
    shorter = plan.document("r1-distill-qwen-7b", "-c", "131072", *GAMING_PC, "--device", "cpu")
    assert shorter["fits"]
    for options, expected in (
        (["r1-distill-qwen-1.5b", "-c", "131072"], ("r1-distill-qwen-1.5b", 4)),
        (["r1-distill-qwen-1.5b", "-b", "8", "-c", "131072"], ("r1-distill-qwen-1.5b", 8)),
    ):
        nearest = plan.document(*options, "--hardware", str(small))["nearest"]
        assert (nearest["model"], nearest["bits"]) == expected
        assert nearest["context"] == nearest["largest_context"] < 131072
    tiny = tmp_path / "tiny.json"
    tiny.write_text(json.dumps({"ram_bytes": "3.5GiB", "cpu": 30, "dense": 30, "disk": 1}))
    code, out, _ = plan("v2-lite-chat", "--hardware", str(tiny))
    assert code == 3
    assert "nothing that is known here fits" in out


def test_a_dense_model_has_as_many_layers_on_the_gpu_as_fit(plan: Runner) -> None:
    document = plan.document("r1-distill-llama-70b", *GAMING_PC)
    (card,) = document["cards"]
    layers = card["layers"]
    assert 30 < layers < 60
    assert document["verdict"] == f"fits, {layers} of 80 layers on the GPU"
    assert not card["head"]
    assert document["vram"] == {name: card[name] for name in document["vram"]}
    # One layer more would not have fit; main memory holds all of them.
    a_layer = (card["weights"] + card["cache"]) / layers
    assert 0 <= card["free"] < a_layer
    on_cpu = plan.document("r1-distill-llama-70b", *GAMING_PC, "--device", "cpu")
    assert document["ram"] == on_cpu["ram"]
    assert on_cpu["cards"] == []
    # Layers one after another, whoever computes them.
    cache = document["ram"]["cache"] / document["context"] * 512
    read_there = card["weights"] + cache * layers / 80
    dense = document["weight_bytes"] - 2 * 128256 * 8192
    read_here = dense - card["weights"] + cache * (80 - layers) / 80
    seconds = read_there / 700e9 + read_here / 60e9 + (80 - layers) * LAYER_SECONDS
    assert document["prediction"]["decode"] == pytest.approx(1 / seconds)
    assert document["prediction"]["decode_bound"] == "layers on the CPU"
    assert document["next"][-1] == "localr1 chat r1-distill-llama-70b --device cuda"
    code, out, _ = plan("r1-distill-llama-70b", *GAMING_PC)
    assert code == 0
    assert f"layers            {layers}         {80 - layers}" in out
    # A longer context costs layers.
    longer = plan.document("r1-distill-llama-70b", *GAMING_PC, "--context", "32768")
    assert longer["cards"][0]["layers"] < layers
    asked = plan.document("r1-distill-llama-70b", *GAMING_PC, "--gpu-layers", "5")
    assert asked["cards"][0]["layers"] == 5
    assert asked["next"][-1].endswith("--device cuda --gpu-layers 5")
    both = plan.document("r1-distill-llama-70b", "--bits", "8", *GAMING_PC)
    assert set(both["short"]) == {"ram"}
    assert both["nearest"]["cards"]
    # What is not quantized is not computed there; nor is what one layer has no room for.
    floats = plan.document("r1-distill-qwen-7b", "--bits", "16", *GAMING_PC)
    assert floats["verdict"] == "fits, without the GPU"
    assert (
        "which computes quantized layers" in plan("r1-distill-qwen-7b", "-b", "16", *GAMING_PC)[1]
    )


TWO_CARDS = """
name = "two cards"
vram_bytes = "12GiB"
ram_bytes = "64GiB"
gpu_large = 250
gpu_small = 216
pcie = 24
cpu = 40
dense = 250
disk = 6
round_trip_us = 85
cpu_gmacs = 400
gpu_gmacs = 9400
[[more_cards]]
vram_bytes = "24GiB"
dense = 700
"""


def test_several_cards(plan: Runner, tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text(TWO_CARDS)
    asked = ("r1-distill-qwen-32b", "--hardware", str(path))
    one = plan.document(*asked)
    assert [card["number"] for card in one["cards"]] == [0]
    assert one["cards"][0]["layers"] < 64
    both = plan.document(*asked, "--devices", "0,1")
    first, second = both["cards"]
    assert (first["number"], second["number"]) == (0, 1)
    assert first["layers"] + second["layers"] == 64
    assert second["head"]
    assert both["verdict"] == "fits"
    full = [card["free"] / (card["budget"] - card["program"]) for card in (first, second)]
    assert full[0] == pytest.approx(full[1], abs=0.06)
    assert both["vram"]["budget"] == first["budget"] + second["budget"]
    assert both["prediction"]["decode"] > 2 * one["prediction"]["decode"]
    assert both["prediction"]["prefill"] is None, "the second card's multiply-adds are not known"
    assert both["next"][-1].endswith("--devices 0,1")
    code, out, _ = plan(*asked, "--devices", "1,0:4GiB", "--gpu-layers", "40")
    assert code == 0
    assert "card 1     card 0        RAM" in out
    assert "fits, 40 of 64 layers on 2 GPUs" in out
    assert "--devices 1,0:4GiB --gpu-layers 40" in out
    for options, expected, words in (
        (["--devices", "0,2"], 2, "expected cards 0 to 1, of two cards, found 2"),
        (["--devices", "0,0"], 2, "each card once"),
        (["--devices", "0:20GiB"], 3, "expected at most 10.5 GiB of the card, found 20.0 GiB"),
        (["--gpu-layers", "60"], 3, "card 0: memory for 60 layers of the model"),
        (["--gpu-layers", "0"], 2, "--gpu-layers"),
    ):
        code, _, err = plan(*asked, *options)
        assert (code, len(err.splitlines())) == (expected, 1), err
        assert words in err


def test_a_mixture_on_several_cards(plan: Runner, tmp_path: Path) -> None:
    """Each has its layers and their experts in what is left; R1's are more than one holds."""
    path = tmp_path / "two.toml"
    path.write_text(TWO_CARDS)
    asked = ("r1", "--hardware", str(path))
    one, both = plan.document(*asked), plan.document(*asked, "--devices", "0,1")
    assert one["verdict"].endswith("without the GPU")
    first, second = both["cards"]
    assert first["layers"] + second["layers"] == 61
    assert second["head"]
    assert min(first["slots"], second["slots"]) > 0
    for card in (first, second):
        assert 0 <= card["free"] < both["expert_bytes"], "what is left is experts'"
        taken = sum(card[part] for part in ("program", "weights", "cache", "workspace"))
        assert card["budget"] == taken + card["expert_bytes"] + card["free"]
    held = first["slots"] + second["slots"] + both["ram"]["slots"]
    assert both["disk"]["experts"] == 58 * 256 - held
    # A layer takes the same share of what either has for layers.
    parts = [card["weights"] / (card["budget"] - card["program"]) for card in (first, second)]
    assert parts[0] == pytest.approx(parts[1], abs=0.06)
    narrow = (*asked, "--devices", "0,1:10GiB")
    longest = plan.document(*narrow)["largest_context"]
    assert longest < both["largest_context"] == 163_840
    found = [plan.document(*narrow, "-c", str(each))["cards"] for each in (longest, longest + 1)]
    assert list(map(len, found)) == [2, 0]
    assert both["prediction"]["decode"] > one["prediction"]["decode"]
    assert both["next"][-1].endswith("--devices 0,1")
    code, out, _ = plan(*asked, "--devices", "0,1", "--vram", "0,1GiB")
    assert code == 0
    assert "card 0 card 1 RAM disk" in " ".join(out.split())
    assert "--devices 0,1 --vram 0,1GiB" in out
    for options, expected, words in (
        (["--vram", "0,1GiB,2GiB"], 2, "an amount of all cards, or 2 with commas between"),
        (["--vram", "20GiB"], 2, "--vram: expected at most"),
        (["--vram", "0", "-c", "150000"], 3, "room for all layers beside experts"),
    ):
        code, _, err = plan(*narrow, *options)
        assert (code, len(err.splitlines())) == (expected, 1), err
        assert words in err


def test_a_mixture_on_two_cards_is_as_fast_as_they_are_one_after_another(
    plan: Runner, tmp_path: Path
) -> None:
    """Of a mixture that one card holds: two such take as long, one of half the speed longer."""
    two, path = TWO_CARDS.replace("12GiB", "24GiB"), tmp_path / "two.toml"

    def decode(rate: str, devices: str) -> float:
        path.write_text(two.replace("dense = 700", f"dense = {rate}\ngmacs = 9400"))
        asked = ("v2-lite-chat", "--hardware", str(path), "--devices", devices)
        found: float = plan.document(*asked)["prediction"]["decode"]
        return found

    alone = decode("250", "0")
    assert decode("250", "0,1") == pytest.approx(alone, rel=1e-3)
    assert 0.5 * alone < decode("125", "0,1") < 0.8 * alone
    assert decode("125", "1") == pytest.approx(0.5 * alone, rel=0.02)
    document = plan.document("v2-lite-chat", "--hardware", str(path), "--devices", "0,1")
    assert document["prediction"]["prefill"] > 0
    # Room for all: no card has more than its layers have experts, and none counts a weight twice.
    assert [card["slots"] % 64 for card in document["cards"]] == [0, 0]
    assert sum(card["slots"] for card in document["cards"]) == 26 * 64
    table = 102_400 * 2048 * 2
    weights = sum(card["weights"] for card in document["cards"])
    assert weights == pytest.approx(document["ram"]["weights"] - table, abs=27)


def test_a_mixture_whose_dense_weights_exceed_the_gpu_does_without(plan: Runner) -> None:
    document = plan.document("kimi-k2", "--hardware", "rtx3060-12g-ddr4-32g", "--context", "512")
    assert document["vram"] is None
    assert document["verdict"].endswith("without the GPU")
    found = plan("kimi-k2", "--hardware", "rtx3060-12g-ddr4-32g", "--context", "512")[1]
    assert "without the GPU, which lacks" in found
    # But not where graphics memory was asked for.
    code, _, _ = plan(
        "kimi-k2", "--hardware", "rtx3060-12g-ddr4-32g", "--context", "512", "--vram", "0"
    )
    assert code == 3


def test_budgets_bound_the_experts(plan: Runner) -> None:
    free = plan.document("v2-lite-chat", *GAMING_PC)
    half = plan.document("v2-lite-chat", *GAMING_PC, "--vram", "1GiB", "--ram", "25%")
    assert half["vram"]["slots"] == GIB // half["expert_bytes"]
    assert half["ram"]["slots"] == half["experts"] // 4
    held = half["vram"]["slots"] + half["ram"]["slots"]
    assert half["disk"]["experts"] == half["experts"] - held
    assert half["prediction"]["decode"] < free["prediction"]["decode"]
    assert half["next"][-1].endswith("--vram 1GiB --ram 25%")
    none = plan.document("v2-lite-chat", *GAMING_PC, "--vram", "0", "--ram", "0")
    assert none["vram"]["slots"] == 0
    assert none["ram"]["slots"] == 2 * 6


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["r1-dstill-qwen-7b"], 4, "Did you mean r1-distill-qwen-7b?"),
        (["deepseek-ai/DeepSeek-R2"], 4, "Did you mean deepseek-ai/DeepSeek-R1"),
        (["r1", "--context", "163841"], 2, "2 to 163,840 tokens"),
        (["r1", "--context", "1"], 2, "2 to 163,840 tokens"),
        (["r1", "--bits", "7"], 1, "4, 5, 6 or 8 bits"),
        (["r1", "--group", "48"], 1, "32, 64 or 128"),
        (["v2-lite-chat", "--group", "128"], 1, "Use --group 32 or 64."),
        (["r1", "--ram", "much"], 2, "--ram"),
        (["r1", "--ram", "9999GiB"], 2, "--ram"),
        (["r1", "--vram", "-1"], 2, "--vram"),
        (["r1", "--vram", "8GiB", "--device", "cpu"], 2, "a machine with a GPU"),
        (["r1", "--device", "tpu"], 2, "auto or cpu"),
        (["r1", "--gpu-layers", "3"], 2, "--gpu-layers: expected a dense model"),
        (["r1", "--devices", "0", "--device", "cpu"], 2, "--devices: expected no --device cpu"),
        (["r1-distill-qwen-7b", "--vram", "1GiB"], 2, "--vram: expected a mixture"),
        (["r1-distill-qwen-7b", "--gpu-layers", "3", "--device", "cpu"], 2, "with a GPU"),
    ],
)
def test_bad_input_is_one_line(plan: Runner, arguments: list[str], code: int, words: str) -> None:
    found, out, err = plan(*arguments, *GAMING_PC)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert words in err


def test_an_unknown_machine_is_a_usage_error(plan: Runner) -> None:
    code, _, err = plan("r1", "--hardware", "rtx9090")
    assert code == 2
    assert "rtx4090-24g-ddr5-64g" in err


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"hidden_size": None}, 1, "hidden_size"),
        ({"n_routed_experts": 4}, 1, "num_experts_per_tok"),
        ({"model_type": "mamba"}, 1, "model_type"),
        ({"sliding_window_pattern": 5}, 1, "sliding_window_pattern"),
        ({"quantization_config": {"quant_method": "awq"}}, 1, "quant_method"),
    ],
)
def test_a_config_that_makes_no_model(
    plan: Runner, tmp_path: Path, change: dict[str, Any], code: int, words: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**V2_LITE, **change}))
    found, _, err = plan(str(path), *GAMING_PC)
    assert found == code
    assert words in err
    path.write_text("{")
    assert plan(str(path), *GAMING_PC)[0] == 1


def test_a_config_file_alone_is_enough(plan: Runner, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V2_LITE))
    named = plan.document("v2-lite-chat", *GAMING_PC)
    for given in (path, tmp_path):
        document = plan.document(str(given), *GAMING_PC)
        for key in ("file_bytes", "weight_bytes", "vram", "ram", "prediction"):
            assert document[key] == named[key]
        assert document["repository"] is None
        assert document["next"][0].startswith("localr1 quantize MODEL")
    path.write_text(json.dumps(KIMI_K2_THINKING))
    packed = plan.document(str(path), "--hardware", "rtx5090-32g-ddr5-192g")
    assert packed["bits"] is None
    assert packed["verdict"] == "from disk, without the GPU"
    assert plan(str(path), "--bits", "4", *GAMING_PC)[0] == 2


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_the_plan_before_is_the_plan_after_quantizing(
    plan: Runner, tmp_path: Path, model_type: str
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_source(source, model_type, **MIXTURES.get(model_type, {}))
    before = plan.document(str(source), *WITHOUT_GPU)
    quantize(source, out, Recipe.uniform(4, 32))
    after = plan.document(str(out), *WITHOUT_GPU)
    for key in ("file_bytes", "weight_bytes", "experts", "expert_bytes", "ram", "prediction"):
        assert before[key] == after[key], key
    assert before["next"] == [
        f"localr1 quantize {source} source-int4 --bits 4",
        "localr1 chat source-int4 --context 64",
    ]
    assert after["next"] == [f"localr1 chat {out} --context 64"]
    floats = plan.document(str(source), "--bits", "16", *WITHOUT_GPU)
    assert floats["weight_bytes"] > 2 * after["weight_bytes"]
    assert floats["next"] == [f"localr1 chat {source} --context 64"]


@pytest.mark.parametrize("name", ["r1-distill-qwen-7b", "v2-lite-chat"])
def test_six_bits_are_eight_for_a_card(plan: Runner, name: str) -> None:
    def weights(bits: int, *machine: str) -> int:
        nbytes: int = plan.document(name, "--bits", str(bits), *GAMING_PC, *machine)["weight_bytes"]
        return nbytes

    assert weights(6) == weights(8)
    on_cpu = [weights(bits, "--device", "cpu") for bits in (4, 5, 6, 8)]
    assert on_cpu[0] < on_cpu[1] < on_cpu[2] < on_cpu[3]
    files = [plan.document(name, "--bits", str(b), *GAMING_PC)["file_bytes"] for b in (6, 8)]
    assert files[0] < 0.9 * files[1]


def test_a_gguf_header_is_enough(plan: Runner, r1_header_gguf: Path) -> None:
    named = plan.document("r1-distill-qwen-7b", *GAMING_PC)
    document = plan.document(str(r1_header_gguf), *GAMING_PC)
    assert document["parameters"] == named["parameters"]
    assert document["ram"]["weights"] == named["ram"]["weights"]
    assert document["vram"]["cache"] == named["vram"]["cache"]


def test_this_machine(plan: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profile = HardwareProfile("here", 0, 16 * GIB, 0, 0, 0, 20, 20, 2, 0)
    monkeypatch.setattr(measure, "this_machine", lambda *_, **__: profile)
    free = SimpleNamespace(available=10 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    document = plan.document("v2-lite-chat")
    code, _, err = plan("r1-distill-qwen-7b", "--devices", "0,1")
    assert (code, "a machine whose cards are described" in err) == (2, True)
    assert document["hardware"]["measured"]
    assert document["vram"] is None
    # What this process has taken is not free now, but will be when a model runs.
    assert 9.5 * GIB < document["ram"]["budget"] < 12 * GIB
    assert document["prediction"]["prefill"] is None
    assert "not predicted" in plan("v2-lite-chat")[1]
    assert document["ram"]["program"] > PROGRAM_BYTES


def test_the_table_of_known_models(plan: Runner) -> None:
    rows = plan.document(*GAMING_PC)
    assert [(row["model"], row["bits"]) for row in rows[:2]] == [("r1-0528", 4), ("r1-0528", 8)]
    assert {row["model"] for row in rows} == set(known_models())
    verdicts = {(row["model"], row["bits"]): row["verdict"] for row in rows}
    assert verdicts["r1", 4] == "from disk"
    assert verdicts["r1-distill-llama-70b", 8] == "does not fit"
    assert verdicts["r1-distill-qwen-7b", 8] == "fits"
    code, out, _ = plan(*GAMING_PC, "--bits", "4")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["model", "bits"]
    assert sum(line.startswith("r1-distill") for line in lines) == 6
    assert "Predictions, from RTX 4090" in out
    assert lines[-1].endswith("localr1 plan MODEL --hardware rtx4090-24g-ddr5-64g")


def test_every_described_machine_has_a_plan(plan: Runner) -> None:
    for name in PROFILES:
        assert plan("r1-distill-qwen-7b", "--hardware", name)[0] == 0
