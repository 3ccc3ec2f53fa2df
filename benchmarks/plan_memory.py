"""Peak memory of real runs beside what `localr1 plan` says of them.

    python benchmarks/plan_memory.py                     # random models of several geometries
    python benchmarks/plan_memory.py --only dense mla    # some of them
    python benchmarks/plan_memory.py --model DIR 512 8192

Each model is loaded in a process of its own, which fills the context to the last token: a prompt in
chunks, then tokens one by one. Its peak resident memory must not exceed the plan. Prints a Markdown
table with the slack, the share of the plan that was not needed; exits with 1 when a plan is broken.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

from localr1.checkpoint.reader import open_checkpoint
from localr1.embedded import R1_NANO
from localr1.experts.footprint import measure
from localr1.experts.placement import Memory, Placement, place
from localr1.models.registry import parse_config
from localr1.models.tensor_list import tensor_shapes
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

WORKER = Path(__file__).parent / "workers" / "fill_context.py"
MIB = 1 << 20
UNLIMITED = Memory(ram=1 << 50)

COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 512,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}


@dataclass(frozen=True)
class Case:
    """bits: None for the model as it is, in 16 bits on disk and float32 in memory."""

    config: dict[str, Any]
    contexts: tuple[int, ...]
    bits: int | None = 4


CASES: dict[str, Case] = {
    "dense": Case({**COMMON, "model_type": "llama"}, (64, 2048, 8192)),
    "dense, 8 bits": Case({**COMMON, "model_type": "qwen3", "head_dim": 128}, (4096,), 8),
    "dense, large vocabulary": Case(
        {**COMMON, "model_type": "qwen2", "vocab_size": 151936, "num_hidden_layers": 4}, (2048,)
    ),
    "dense, tied": Case(
        {**COMMON, "model_type": "llama", "vocab_size": 98304, "tie_word_embeddings": True}, (1024,)
    ),
    "dense, floats": Case({**COMMON, "model_type": "llama"}, (64, 2048, 4096), None),
    "mla": Case(
        {**COMMON, **LATENT, "model_type": "deepseek_v3", "q_lora_rank": 768}, (64, 2048, 4096)
    ),
    "mla, no rank": Case(
        {**COMMON, **LATENT, "model_type": "deepseek_v2", "q_lora_rank": None}, (2048,), 8
    ),
    "mla, 64 heads": Case(
        {
            **COMMON,
            **LATENT,
            "model_type": "deepseek_v3",
            "q_lora_rank": 768,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "num_hidden_layers": 3,
        },
        (64, 1500),
    ),
    "mla, floats": Case(
        {**COMMON, **LATENT, "model_type": "deepseek_v3", "q_lora_rank": 768}, (1500,), None
    ),
    "moe": Case(
        {
            **COMMON,
            "model_type": "qwen3_moe",
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 384,
        },
        (64, 2048),
    ),
    "moe, floats": Case(
        {
            **COMMON,
            "model_type": "qwen3_moe",
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 384,
        },
        (1500,),
        None,
    ),
}


def tokenizer_of(size: int) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE with so many words: all pairs of bytes, then of three."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in letters for b in letters]
    merges += [(a + b, c) for c in letters for a in letters for b in letters]
    del merges[size - len(letters) - 2 :]
    words = ["<s>", "</s>", *letters, *(a + b for a, b in merges)]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": words[index], "normalized": False, **special}
            for index in range(2)
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {word: index for index, word in enumerate(words)},
            "merges": [f"{a} {b}" for a, b in merges],
        },
    }


def write_random(folder: Path, config: dict[str, Any]) -> None:
    """A BF16 checkpoint of this config, its tokenizer as large as its vocabulary."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in tensor_shapes(parse_config(config)).items():
        value = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        tensors[name] = (value if len(shape) > 1 else value + 1).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    for name, document in (
        ("config.json", config),
        ("tokenizer.json", tokenizer_of(config["vocab_size"])),
        ("tokenizer_config.json", tokens),
        ("generation_config.json", {"eos_token_id": 1}),
    ):
        (folder / name).write_text(json.dumps(document), encoding="utf-8")


def prepare(case: Case, folder: Path) -> Path:
    write_random(folder / "source", case.config)
    if case.bits is None:
        return folder / "source"
    recipe = Recipe.uniform(case.bits, 32, smooth=False)
    quantize(folder / "source", folder / "quantized", recipe)
    shutil.rmtree(folder / "source")
    return folder / "quantized"


def planned(model: Path, context: int, threads: int) -> Placement:
    with open_checkpoint(model) as checkpoint:
        config = parse_config(checkpoint.config)
        footprint = measure(((info, 1) for info in checkpoint.tensors.values()), config)
    return place(footprint, UNLIMITED, context, threads=threads)


def run(model: Path, context: int, threads: int | None) -> dict[str, int]:
    command = [sys.executable, str(WORKER), str(model), str(context)]
    if threads is not None:
        command += ["--threads", str(threads)]
    result: dict[str, int] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    )
    return result


def models(only: list[str] | None, folder: Path) -> Iterator[tuple[str, Path, tuple[int, ...]]]:
    if not only or any("r1-nano".startswith(word) for word in only):
        yield "r1-nano, floats", R1_NANO, (64, 1024)
        quantize(R1_NANO, folder / "r1-nano-int4", Recipe.uniform(4, 32))
        yield "r1-nano", folder / "r1-nano-int4", (64, 1024)
    for name, case in CASES.items():
        if not only or any(name.startswith(word) for word in only):
            yield name, prepare(case, folder / name), case.contexts
            shutil.rmtree(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", help="Cases whose names start so.")
    parser.add_argument("--model", nargs="+", metavar=("MODEL", "CONTEXT"))
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    broken = False
    print("| model | context | started | loaded | peak | planned | slack |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="localr1-plan-") as work:
        chosen: Any = models(arguments.only, Path(work))
        if arguments.model:
            path, *contexts = arguments.model
            chosen = [(Path(path).name, Path(path), tuple(map(int, contexts)))]
        for name, model, contexts in chosen:
            for context in contexts:
                found = run(model, context, arguments.threads)
                ram = planned(model, context, found["threads"]).ram
                plan = ram.needed + ram.experts
                broken |= found["peak"] > plan
                cells = [found["started"], found["loaded"], found["peak"], plan]
                shown = " | ".join(f"{cell / MIB:,.0f} MiB" for cell in cells)
                slack = (plan - found["peak"]) / plan
                print(f"| {name} | {context:,} | {shown} | {slack:.1%} |", flush=True)
    sys.exit(broken)


if __name__ == "__main__":
    main()
