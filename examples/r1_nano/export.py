"""r1-nano as a Hugging Face directory: `deepseek_v3` for transformers, vLLM and localr1.

    python examples/r1_nano/export.py STATE_DIR OUT_DIR

The rows of q_proj and kv_a_proj_with_mqa need no reordering: model.py rotates interleaved pairs, as
`rope_interleave` says.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from model import Config, R1Nano
from run_state import FILE, load_model
from safetensors.torch import load_file, save_file
from tokenizer import save_tokenizer
from tokenizers import Tokenizer
from torch import Tensor

# transformers keeps the router's bias in float32, and so does DeepSeek-V3's own release.
BIAS = "e_score_correction_bias"


def to_checkpoint(model: R1Nano, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors under DeepSeek-V3's names, one per expert and matrix."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        full = name if name.startswith("lm_head") else f"model.{name}"
        if full.endswith("experts.gate_up"):
            stem = full.removesuffix("gate_up")
            for index, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                tensors[f"{stem}{index}.gate_proj.weight"] = gate.to(dtype).clone()
                tensors[f"{stem}{index}.up_proj.weight"] = up.to(dtype).clone()
        elif full.endswith("experts.down"):
            stem = full.removesuffix("down")
            for index, expert in enumerate(tensor):
                tensors[f"{stem}{index}.down_proj.weight"] = expert.to(dtype).clone()
        else:
            tensors[full] = tensor.clone() if full.endswith(BIAS) else tensor.to(dtype)
    return tensors


def from_checkpoint(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The inverse of `to_checkpoint`, in float32."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".mlp.experts." not in name:
            state[name.removeprefix("model.")] = tensor.float()
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        stem = f"layers.{layer}.mlp.experts."
        gate, up, down = (
            [
                tensors[f"model.{stem}{index}.{part}_proj.weight"].float()
                for index in range(config.n_routed_experts)
            ]
            for part in ("gate", "up", "down")
        )
        pairs = zip(gate, up, strict=True)
        state[f"{stem}gate_up"] = torch.stack([torch.cat(pair) for pair in pairs])
        state[f"{stem}down"] = torch.stack(down)
    return state


def hugging_face_config(config: Config) -> dict[str, object]:
    """config.json as transformers' DeepseekV3Config reads it."""
    sizes: dict[str, object] = asdict(config)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": "bfloat16",
        **sizes,
        "num_key_value_heads": config.num_attention_heads,
        "q_lora_rank": None,
        "rope_interleave": True,
        "rope_scaling": None,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


def save_directory(
    model: R1Nano, tokenizer: Tokenizer, out: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Writes config, generation config, tokenizer and weights."""
    out.mkdir(parents=True, exist_ok=True)
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False}
    config = {**hugging_face_config(model.config), "dtype": str(dtype).removeprefix("torch.")}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, out)
    tensors = {name: tensor.contiguous() for name, tensor in to_checkpoint(model, dtype).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def load_directory(path: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[R1Nano, Tokenizer]:
    """A model saved by `save_directory`, and its tokenizer."""
    saved = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config = Config(**{name: saved[name] for name in asdict(Config())})
    model = R1Nano(config)
    model.load_state_dict(from_checkpoint(load_file(path / "model.safetensors"), config))
    if dtype == torch.bfloat16:
        model.to_bfloat16()
    return model, Tokenizer.from_file(str(path / "tokenizer.json"))


def main() -> None:
    """Exports the state of train.py or grpo.py."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path, help="output directory of a run")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    model = R1Nano(Config())
    model.load_state_dict(load_model(arguments.state / FILE))
    tokenizer = Tokenizer.from_file(str(arguments.state / "tokenizer.json"))
    save_directory(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
