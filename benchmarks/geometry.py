"""Mixtures of experts at their real size with random weights, for measuring speed and caches.

    python benchmarks/geometry.py write v2-lite OUT            # 9 GB; qwen3-30b-a3b: 17 GB
    python benchmarks/geometry.py write r1 OUT --layers 5      # 25 GB of experts in 2 layers
    python benchmarks/geometry.py gguf OUT OUT.gguf            # the same model for llama.cpp
    python benchmarks/geometry.py check v2-lite OUT            # its routing beside the real one's

`write` makes what `localr1 quantize` would write of such a model: its plan, its files and its
documents, with random codes and scales. The words such a model says mean nothing, but which experts
they choose is made to resemble the released model: see Stream in geometry_sizes.py. `check` records
a trace of generated tokens and prints the hit rates of a cache beside the published ones.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from geometry_sizes import GEOMETRIES, SHARES, Geometry, sized
from geometry_source import CONTROL_IDS, GeometrySource, word
from geometry_values import ROWS_AT_ONCE, RandomValues
from torch import Tensor

from localr1.checkpoint.manifest import MANIFEST_NAME
from localr1.engine.engine import Engine
from localr1.engine.events import GenerationParams
from localr1.experts.recorder import RoutingRecorder
from localr1.experts.statistics import routing_statistics
from localr1.experts.trace import Trace, write_trace
from localr1.load import load_engine
from localr1.models.registry import parse_config
from localr1.quant import documents
from localr1.quant.atomic import AtomicDirectory
from localr1.quant.gguf_export import export_gguf
from localr1.quant.layout import index_json
from localr1.quant.methods.base import CalibratedMethod
from localr1.quant.methods.registry import method_named
from localr1.quant.packing import pack_codes
from localr1.quant.pipeline import DOCUMENT_BYTES, plan_files
from localr1.quant.plan import HEAD_WEIGHT, Item, plan_quantization
from localr1.quant.recipe import Recipe
from localr1.quant.report import tensor_report
from localr1.quant.writer import DTYPES, ShardWriter
from localr1.sampler import SamplingParams

HEAD_MODULE = HEAD_WEIGHT.removesuffix(".weight")


def write(
    geometry: Geometry,
    out: Path,
    recipe: Recipe,
    *,
    layers: int | None = None,
    small: int = 1,
    seed: int = 0,
) -> None:
    """The new directory `out`. Memory: one matrix. Raises what `quantize` raises."""
    source = GeometrySource(out.name, sized(geometry.config, layers=layers, small=small))
    plan = plan_quantization(source, recipe)
    values = RandomValues(parse_config(source.config), geometry.stream, seed, CONTROL_IDS)
    shards = plan_files(plan)
    directory = AtomicDirectory(out)
    directory.check(sum(shard.nbytes for shard in shards) + DOCUMENT_BYTES)
    tokenizer = source.tokenizer_files()
    with directory:
        with ShardWriter(directory, shards) as writer:
            for item in plan.items:
                _put(item, values, DTYPES[plan.dtype], writer)
            files = writer.finish()
            reports = [tensor_report(item, None) for item in plan.items]
            written = documents.Written(reports, files, writer.expert_checksums())
        for name, document in (
            ("config.json", documents.config_json(source.config, plan)),
            ("generation_config.json", documents.generation_config_json(source, tokenizer)),
            ("tokenizer_config.json", documents.tokenizer_config_json(tokenizer, source.config)),
            (
                MANIFEST_NAME,
                documents.manifest_json(source, plan, [], written),
            ),
            ("model.safetensors.index.json", index_json(shards)),
        ):
            directory.write(name, documents.encode(document))
        directory.write("tokenizer.json", tokenizer.tokenizer_json.encode())
        directory.commit()


def _put(item: Item, values: RandomValues, scale_dtype: torch.dtype, writer: ShardWriter) -> None:
    name, shape = item.name, item.source.shape
    if item.rule is None:
        (spec,) = item.specs
        kept = (
            torch.cat([part.to(DTYPES[spec.dtype]) for part in _head_parts(values, shape[0])])
            if name == HEAD_WEIGHT
            else values.kept(name, shape, DTYPES[spec.dtype])
        )
        writer.put(name, kept)
        return
    (rows, columns), scheme = shape, item.rule.scheme
    if name == HEAD_MODULE:  # Its rows are no random ones, so they are quantized as any others.
        method = method_named(item.rule.method)
        assert not isinstance(method, CalibratedMethod), "random weights have seen no text"
        parts = [
            method.quantize(part, scheme, scale_dtype, name) for part in _head_parts(values, rows)
        ]  # One part in float32 at a time.
        packed = torch.cat([pack_codes(part.codes, scheme) for part in parts])
        scale = torch.cat([part.scale for part in parts])
    else:
        packed = values.packed(name, rows, columns, scheme.bits)
        scale = values.scale(name, rows, columns, scheme, scale_dtype)
    writer.put(f"{name}.weight_packed", packed)
    writer.put(f"{name}.weight_scale", scale)
    writer.put(f"{name}.weight_shape", torch.tensor(shape, dtype=torch.int64))


def _head_parts(values: RandomValues, rows: int) -> Iterator[Tensor]:
    for begin in range(0, rows, ROWS_AT_ONCE):
        yield values.head(begin, min(begin + ROWS_AT_ONCE, rows))


def belady_rate(choices: np.ndarray[tuple[int], np.dtype[np.integer]], slots: int) -> float:
    """Share of choices [n] of one layer that the best possible cache of `slots` experts hits: it
    keeps those that are chosen again soonest (Belady 1966), the one at hand among them."""
    never = len(choices)
    following = np.full(len(choices), never)
    last: dict[int, int] = {}
    for index in range(len(choices) - 1, -1, -1):
        expert = int(choices[index])
        following[index] = last.get(expert, never)
        last[expert] = index
    cache: dict[int, int] = {}
    hits = 0
    for expert, again in zip(choices.tolist(), following.tolist(), strict=True):
        hits += expert in cache
        cache[expert] = again
        if len(cache) > slots:
            del cache[max(cache, key=cache.__getitem__)]
    return hits / max(len(choices), 1)


def hit_rates(trace: Trace) -> list[tuple[float, float]]:
    """(LRU, Belady) in percent for each of SHARES, the mean over the layers."""
    statistics = routing_statistics(trace)
    rates = []
    for share in SHARES:
        slots = int(share * trace.num_experts + 1e-9)
        layers = trace.experts.transpose(1, 0, 2).reshape(len(trace.layers), -1)
        belady = float(np.mean([belady_rate(layer, slots) for layer in layers]))
        rates.append((100 * statistics.hit_rate(share), 100 * belady))
    return rates


def record_sampled(engine: Engine, prompts: Sequence[str], tokens: int) -> Trace:
    """As `localr1 trace` does, but sampled: the most probable words soon go round in circles."""
    recorder = RoutingRecorder(engine.model, engine.name)
    for number, prompt in enumerate(prompts):
        engine.reset()
        ids = engine.prompt([{"role": "user", "content": prompt}]).ids
        sampling = SamplingParams(temperature=1.0, seed=number)
        for _ in engine.generate(ids, GenerationParams(sampling, max_tokens=tokens)):
            pass
        recorder.end_sequence(len(ids))
    return recorder.trace()


def check(geometry: Geometry, model: Path, prompts: int, tokens: int, trace: Path | None) -> None:
    """Prints the hit rates of generated tokens beside the released model's."""
    texts = ["".join(word(17 * n + i) for i in range(4)).replace("Ġ", " ") for n in range(prompts)]
    with closing(load_engine(model)) as engine:
        recorded = record_sampled(engine, texts, tokens)
    if trace is not None:
        write_trace(recorded, trace)
    print(f"{recorded.num_tokens} tokens of {prompts} prompts; LRU / Belady, percent")
    print("| share of the experts | released model | this one |")
    print("|---|---|---|")
    published = geometry.hit_rates or [None] * len(SHARES)
    for share, theirs, ours in zip(SHARES, published, hit_rates(recorded), strict=True):
        released = "unknown" if theirs is None else f"{theirs[0]} / {theirs[1]}"
        print(f"| {share:.1%} | {released} | {ours[0]:.0f} / {ours[1]:.0f} |")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="a checkpoint")
    writing.add_argument("geometry", choices=GEOMETRIES)
    writing.add_argument("out", type=Path)
    writing.add_argument("--layers", type=int, help="fewer than the model has")
    writing.add_argument("--small", type=int, default=1, help="divide every width by this")
    writing.add_argument("--seed", type=int, default=0)
    writing.add_argument("--bits", type=int, default=4, help="of the routed experts")
    writing.add_argument("--dense-bits", type=int, default=8, help="of attention and shared MLPs")
    converting = commands.add_parser("gguf", help="the same model as a GGUF file")
    converting.add_argument("model", type=Path)
    converting.add_argument("out", type=Path)
    checking = commands.add_parser("check", help="hit rates of its routing")
    checking.add_argument("geometry", choices=GEOMETRIES)
    checking.add_argument("model", type=Path)
    checking.add_argument("--prompts", type=int, default=4)
    checking.add_argument("--tokens", type=int, default=256, help="generated for each prompt")
    checking.add_argument("--trace", type=Path, help="keep the trace here")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    started = time.monotonic()
    if options.command == "write":
        recipe = Recipe.uniform(
            options.bits,
            attention_bits=options.dense_bits,
            shared_bits=options.dense_bits,
            smooth=False,
        )
        geometry = GEOMETRIES[options.geometry]
        write(
            geometry,
            options.out,
            recipe,
            layers=options.layers,
            small=options.small,
            seed=options.seed,
        )
        print(f"{options.out}: written in {time.monotonic() - started:.0f} s")
    elif options.command == "gguf":
        export_gguf(options.model, options.out, with_tokenizer=False)
        print(f"{options.out}: written in {time.monotonic() - started:.0f} s")
    else:
        check(
            GEOMETRIES[options.geometry],
            options.model,
            options.prompts,
            options.tokens,
            options.trace,
        )


if __name__ == "__main__":
    main()
