"""What `show` says, against facts known from elsewhere."""

import json
from pathlib import Path

import pytest
import torch
from quant_sources import MIXTURES, save_source
from safetensors.torch import load_file, save_file
from tiny_models import tiny_transformer
from typer.testing import CliRunner

from localr1.cli.main import app
from localr1.cli.show import describe
from localr1.cli.weights import kind_of
from localr1.errors import LocalR1Error

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
PREFIX = "model.layers.0.self_attn.o_proj"


def write_model(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_gguf_file(smollm2_gguf: Path) -> None:
    """The figures are those of the model's card and of gguf-dump."""
    model = describe(smollm2_gguf)
    assert model["architecture"] == "llama"
    assert model["parameters"] == model["stored_parameters"] == 134_515_008
    assert model["context"] == 8192
    assert model["tied_embeddings"]
    assert model["chat_template"]
    assert model["licence"] == "apache-2.0"
    kinds = {(group["kind"], group["type"]): group["bits"] for group in model["weights"]}
    assert kinds == {
        ("embedding", "Q8_0"): 8.5,
        ("attention", "Q4_1"): 5.0,
        ("mlp", "Q4_1"): 5.0,
        ("norm", "F32"): 32.0,
    }


def test_a_cut_gguf_file_shows_its_header(r1_header_gguf: Path) -> None:
    model = describe(r1_header_gguf)
    assert model["truncated"]
    assert (model["architecture"], model["layers"], model["context"]) == ("qwen2", 28, 131072)
    assert model["parameters"] == 7_615_616_512
    result = CliRunner().invoke(app, ["show", str(r1_header_gguf)])
    assert "cut short: the header only" in result.stdout


def test_packed_weights_count_codes_and_scales(tmp_path: Path) -> None:
    """4 bits in groups of 32 with 16-bit scales: 4.5 bits a weight, and 16 bytes of shape."""
    packed = {
        f"{PREFIX}.weight_packed": torch.zeros(64, 8, dtype=torch.int32),
        f"{PREFIX}.weight_scale": torch.ones(64, 2, dtype=torch.bfloat16),
        f"{PREFIX}.weight_shape": torch.tensor([64, 64]),
        "model.norm.weight": torch.ones(64, dtype=torch.bfloat16),
    }
    model = describe(write_model(tmp_path / "model", packed))
    assert model["weights"] == [
        {
            "kind": "attention",
            "type": "int4-g32",
            "tensors": 1,
            "parameters": 4096,
            "bytes": 4096 * 4.5 / 8 + 16,
            "bits": 4.531,
        },
        {
            "kind": "norm",
            "type": "BF16",
            "tensors": 1,
            "parameters": 64,
            "bytes": 128,
            "bits": 16.0,
        },
    ]
    assert model["stored_parameters"] == 4160


def test_a_packed_matrix_without_its_shape_is_shown_as_it_lies(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}.weight_packed": torch.zeros(64, 8, dtype=torch.int32)}
    (group,) = describe(write_model(tmp_path / "model", tensors))["weights"]
    assert (group["type"], group["parameters"]) == ("I32", 512)


def test_an_architecture_that_does_not_run_says_why(tmp_path: Path) -> None:
    tensors = {"model.norm.weight": torch.ones(64)}
    folder = write_model(tmp_path / "model", tensors, model_type="mamba")
    model = describe(folder)
    assert not model["runs"]
    assert model["architecture"] == "mamba"
    result = CliRunner().invoke(app, ["show", str(folder)])
    assert result.exit_code == 0
    assert "does not run" in result.stdout


def test_the_licence_of_a_readme(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", {"model.norm.weight": torch.ones(64)})
    assert describe(folder)["licence"] is None
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\nlicense: other\n")
    assert describe(folder)["licence"] == "mit"
    (folder / "README.md").write_text("# A model\nlicense: mit\n")
    assert describe(folder)["licence"] is None
    (folder / "README.md").write_text('---\nlicense: other\nlicense_name: "ours"\n---\n')
    assert describe(folder)["licence"] == "ours"


def test_where_it_was_pulled_from(tmp_path: Path) -> None:
    """Of an original its place in the Hugging Face cache, of a quantized model its manifest."""
    commit = "1" * 40
    tensors = {"model.norm.weight": torch.ones(64)}
    for repository, licence in (("org/m", None), ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek")):
        folder = tmp_path / f"models--{repository.replace('/', '--')}" / "snapshots" / commit
        folder.parent.mkdir(parents=True)
        model = describe(write_model(folder, tensors))
        assert (model["repository"], model["commit"]) == (repository, commit)
        assert model["licence"] == licence
    printed = CliRunner().invoke(app, ["show", str(folder)]).stdout
    assert "repository     deepseek-ai/DeepSeek-V2-Lite-Chat\n" in printed
    assert f"commit         {commit}\n" in printed
    made = write_model(tmp_path / "made", tensors)
    source: dict[str, object] = {
        "name": commit,
        "format": "safetensors",
        "repository": "org/m",
        "commit": commit,
    }
    manifest = {"source": source, "portable": True}
    (made / "localr1.json").write_text(json.dumps(manifest))
    printed = CliRunner().invoke(app, ["show", str(made)]).stdout
    assert "source repository  org/m\n" in printed
    assert f"source commit      {commit}\n" in printed
    source["repository"] = 3
    (made / "localr1.json").write_text(json.dumps(manifest))
    assert describe(made)["repository"] is None


def test_what_quantize_recorded_is_shown(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", {"model.norm.weight": torch.ones(64)})
    manifest = {
        "source": {"name": "original", "format": "safetensors", "files": []},
        "made_by": {"localr1": "0.1.0"},
        "recipe": [{"name": "mlp", "bits": 4, "group_size": 32, "method": "rtn"}],
        "rotation": {"kind": "hadamard", "seed": 3},
        "portable": False,
        "not_portable_because": ["a \x1b[2J reason"],
    }
    (folder / "localr1.json").write_text(json.dumps(manifest))
    printed = CliRunner().invoke(app, ["show", str(folder)]).stdout
    assert "original (safetensors)" in printed
    assert "mlp 4 bits in groups of 32 (rtn)" in printed
    assert "hadamard, seed 3" in printed
    assert r"no: a \x1b[2J reason" in printed
    manifest["source"] = "somewhere"
    (folder / "localr1.json").write_text(json.dumps(manifest))
    with pytest.raises(LocalR1Error, match="source: expected an object, found a string"):
        describe(folder)


def test_json_is_one_document_and_the_same_facts(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", {"model.norm.weight": torch.ones(64)})
    result = CliRunner().invoke(app, ["show", str(folder), "--json"])
    assert json.loads(result.stdout) == json.loads(json.dumps(describe(folder)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight_packed", "head"),
        ("model.layers.3.self_attn.k_proj.bias", "attention"),
        ("model.layers.3.self_attn.k_norm.weight", "norm"),
        ("model.layers.3.mlp.down_proj.weight_scale", "mlp"),
        ("model.layers.3.post_attention_layernorm.weight", "norm"),
        ("something.else", "other"),
    ],
)
def test_kinds_of_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_mixture_says_what_is_active_and_what_is_left_out(tmp_path: Path) -> None:
    theirs = tiny_transformer("deepseek_v3", 0)
    theirs.save_pretrained(tmp_path)
    plain = describe(tmp_path)
    assert plain["left_out"] is None
    assert plain["active_parameters"] < plain["parameters"] == plain["stored_parameters"]
    assert plain["experts"] == {"experts": 8, "experts_per_token": 3, "layers": 1}
    assert plain["cached_values"] == 28
    assert {group["kind"] for group in plain["weights"]} == {
        "embedding", "head", "attention", "experts", "router", "mlp", "norm"
    }  # fmt: skip

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.enorm.weight"] = torch.ones(48)
    tensors["model.layers.2.mlp.experts.0.up_proj.weight"] = torch.ones(24, 48)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert describe(tmp_path)["left_out"] == {"mtp_layers": 1, "tensors": 2, "bytes": 4800}
    shown = CliRunner().invoke(app, ["show", str(tmp_path)])
    assert "1 multi-token-prediction layer (2 tensors, 4.7 KiB)" in shown.stdout, shown.stdout
    assert "8 a layer, 3 a token, in 1 of 2 layers" in shown.stdout
    assert "28 values a token and layer" in shown.stdout


def test_a_quantized_mixture(tmp_path: Path) -> None:
    """Of each expert 3 matrices of 64 x 128 in 4.5 bits, in one file a layer; what was left out."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_source(source, "deepseek_v3", **{**MIXTURES["deepseek_v3"], "num_hidden_layers": 3})
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.enorm.weight"] = torch.ones(128)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = CliRunner().invoke(app, ["quantize", str(source), str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["left_out"] == {"mtp_layers": 1, "tensors": 1, "bytes": 512}

    before, model = describe(source), describe(out)
    shards = {name: size for name, size in model["files"].items() if name.startswith("experts-")}
    assert list(shards) == ["experts-001.safetensors", "experts-002.safetensors"]
    assert model["stored_experts"] == {
        "smallest_bytes": 3 * 64 * 128 * 9 // 16,
        "largest_bytes": 3 * 64 * 128 * 9 // 16,
        "shards": 2,
        "shard_bytes": sum(shards.values()),
    }
    assert before["stored_experts"]["largest_bytes"] == 3 * 64 * 128 * 2
    assert before["stored_experts"]["shards"] == 0
    for name in ("parameters", "active_parameters", "experts"):
        assert model[name] == before[name]
    assert model["stored_parameters"] == before["stored_parameters"] - 128
    shown = CliRunner().invoke(app, ["show", str(out)]).stdout
    assert "8 a layer, 3 a token, in 2 of 3 layers" in shown
    assert "an expert      13.5 KiB" in shown
    assert "expert shards  2, " in shown
    assert "left out       1 multi-token-prediction layer (1 tensor, 512 B) of the source" in shown
    assert f"{model['active_parameters']:,} active" in shown
