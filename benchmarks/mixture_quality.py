"""What each method makes of r1-nano, a mixture of experts with trained weights.

    python benchmarks/mixture_quality.py                       # all rows
    python benchmarks/mixture_quality.py --only "rtn" "gptq"
    python benchmarks/mixture_quality.py --problems 40         # of each kind of arithmetic

Prints a Markdown table. A method that reads a text has a row for each of two: "own", worked
problems as r1-nano was trained on, and "built-in", what `localr1 quantize` reads if it is told
nothing. Divergence and equal top tokens are of the replies to held-out problems, 40 of each kind:
of the questions themselves nothing was ever learned. Each conversation is read by itself. The
reference computes in float32; the quantized models run on the native kernels, activations in int8.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from localr1.embedded import R1_NANO
from localr1.load import LoadOptions, load_engine, make_kernels
from localr1.models.api import Model
from localr1.models.step import Step
from localr1.quant import evaluate
from localr1.quant.arithmetic import Accuracy, accuracy, attempt_all, read_problems
from localr1.quant.calibrate import DEFAULT_TEXT
from localr1.quant.calibration_options import CalibrationOptions
from localr1.quant.methods.registry import METHODS, WITH_ZERO_POINTS
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe
from localr1.quant.recipe_file import find_recipe, read_recipe
from localr1.quant.report import Report
from localr1.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "r1_nano"))

# An example's files import each other by bare names.
from problems import KINDS, Problem, draw
from tokenizer import prompt_text, reply_text

HELD_OUT_PER_KIND = 40
CALIBRATION_PER_KIND = 40
"""More than the 8,192 tokens that a quantization reads."""

ALL_METHODS = ("rtn", "imatrix", "gptq", "awq", "awq+imatrix", "awq+gptq")
IN_4_BITS = ("rtn", "imatrix", "gptq", "awq+gptq")

OWN, BUILT_IN = "own", "built-in"
ZERO_POINTS = """
method = "{method}"
awq = {awq}
mixture = [
    {{ part = "experts", bits = 4 }},
    {{ part = "attention", bits = 4, symmetric = false }},
    {{ part = "shared", bits = 4, symmetric = false }},
    {{ part = "mlp", bits = 4, symmetric = false }},
    {{ part = "head", bits = 8 }},
]
"""
"""Routed experts cannot have zero points; all else of fewer than 8 bits has them here."""


@dataclass(frozen=True)
class Row:
    """text: OWN, BUILT_IN, or None of a method that reads none."""

    name: str
    recipe: Recipe
    text: str | None


def rows(folder: Path) -> Iterator[Row]:
    """folder: where recipes are written that no option of the command line makes."""
    yield Row("8 bits, rtn", Recipe.uniform(8), None)
    for bits, label, methods in ((8, "", ALL_METHODS), (4, "all in 4 bits, ", IN_4_BITS)):
        for method in methods:
            recipe = Recipe.uniform(4, attention_bits=bits, shared_bits=bits, method=method)
            for text in (OWN, BUILT_IN) if method != "rtn" else (None,):
                yield Row(f"{label}{method}", recipe, text)
    yield Row("local, a recipe", find_recipe("local", METHODS, WITH_ZERO_POINTS), BUILT_IN)
    for method, awq in (("rtn", "false"), ("gptq", "true")):
        path = folder / f"{method}.toml"
        path.write_text(ZERO_POINTS.format(method=method, awq=awq), encoding="utf-8")
        recipe = read_recipe(path, METHODS, WITH_ZERO_POINTS)
        name = f"all in 4 bits, {'awq+' if recipe.awq else ''}{method}, zero points"
        for text in (OWN, BUILT_IN) if recipe.awq else (None,):
            yield Row(name, recipe, text)


def drawn(seed: str, per_kind: int, *, held_out: bool) -> Iterator[Problem]:
    """The kinds in turn."""
    rng = random.Random(seed)
    for _ in range(per_kind):
        for kind in KINDS:
            yield draw(rng, kind, held_out=held_out)


def own_text() -> str:
    """Without control tokens, which a calibration text is not read for."""
    problems = drawn("calibration", CALIBRATION_PER_KIND, held_out=False)
    return "".join(f"{each.prompt}\n{each.thought}\n\n{each.reply}\n\n" for each in problems)


def log_probabilities(model: Model, ids: Tensor, begin: int) -> Tensor:
    """float32 [len(ids) - begin, vocabulary], of the tokens from `begin` on."""
    logits = model.forward(Step(ids, 0, all_logits=True), model.new_cache(len(ids)))
    return torch.log_softmax(logits[begin - 1 : -1].float(), dim=1)


class HeldOut:
    """Replies, and what the reference makes of them."""

    def __init__(self, reference: Model, tokenizer: Tokenizer) -> None:
        self._ids: list[tuple[Tensor, int]] = []
        for problem in drawn("held out", HELD_OUT_PER_KIND, held_out=True):
            begin = tokenizer.encode(prompt_text(problem.prompt), allow_special=True)
            ids = begin + tokenizer.encode(reply_text(problem), allow_special=True)
            self._ids.append((torch.tensor(ids), len(begin)))
        self._expected = [log_probabilities(reference, *each) for each in self._ids]

    @property
    def num_positions(self) -> int:
        return sum(map(len, self._expected))

    def compare(self, model: Model) -> tuple[evaluate.Mean, float, evaluate.Mean]:
        """Mean KL and its 99th percentile, nats, and the share of equal top tokens."""
        kl, same = [], []
        for each, expected in zip(self._ids, self._expected, strict=True):
            found = log_probabilities(model, *each)
            kl.append(evaluate.divergence_of_rows(expected, found))
            same.append((expected.argmax(1) == found.argmax(1)).double())
        p99 = float(torch.cat(kl).quantile(0.99))
        return evaluate.mean_over_windows(kl), p99, evaluate.mean_over_windows(same)


def cells(
    row: Row,
    report: Report,
    seconds: float,
    compared: tuple[evaluate.Mean, float, evaluate.Mean],
    answers: Accuracy,
) -> Sequence[str]:
    kl, p99, same = compared
    use = report.expert_use
    return (
        row.name,
        row.text or "",
        f"{report.bits_per_weight:.2f}",
        f"{kl.value:.5f} ± {kl.standard_error or 0:.5f}",
        f"{p99:.4f}",
        f"{100 * same.value:.2f} ± {100 * (same.standard_error or 0):.2f}",
        f"{answers.right} of {answers.total}",
        "" if use is None else f"{use.fewest:,}, {use.median:,}, {use.unseen}",
        f"{seconds:.0f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="rows; default: all")
    parser.add_argument("--text", choices=(OWN, BUILT_IN), help="default: both")
    parser.add_argument("--problems", type=int, help="of each kind of arithmetic; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()

    kernels, _ = make_kernels(LoadOptions(threads=options.threads))
    held_out = HeldOut(*evaluate.load(R1_NANO, kernels))
    problems = read_problems(options.problems)
    print(f"{held_out.num_positions:,} positions of {HELD_OUT_PER_KIND * len(KINDS)} replies\n")
    print(
        "| method | text | bits | mean KL (nats) | p99 KL | same top token (%) | arithmetic", end=""
    )
    print(" | tokens an expert: fewest, median, unseen | processor s |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = folder / "own.txt"
        own.write_text(own_text(), encoding="utf-8")
        for number, row in enumerate(rows(folder)):
            if options.only is not None and row.name not in options.only:
                continue
            if options.text is not None and row.text not in (options.text, None):
                continue
            text = {OWN: own, BUILT_IN: DEFAULT_TEXT}.get(row.text or "")
            calibration = None if text is None else CalibrationOptions(text=text)
            out = folder / str(number)
            begin = time.process_time()
            report = quantize(R1_NANO, out, row.recipe, calibration=calibration)
            seconds = time.process_time() - begin
            compared = held_out.compare(evaluate.load(out, kernels)[0])
            with closing(load_engine(out, threads=options.threads)) as engine:
                answers = accuracy(attempt_all(engine, problems))
            print(f"| {' | '.join(cells(row, report, seconds, compared, answers))} |", flush=True)


if __name__ == "__main__":
    main()
