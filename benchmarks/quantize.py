"""Speed and memory of `localr1 quantize`, on random weights of R1's own sizes.

    python benchmarks/quantize.py kernel                       # MB/s of input of one core
    python benchmarks/quantize.py scaling --threads 1 2        # the same of several, by the clock
    python benchmarks/quantize.py layer --directory /tmp       # one of R1's mixtures, 15 GB + 10 GB
    python benchmarks/quantize.py layer --directory /tmp --experts 16 --small 8
    python benchmarks/quantize.py plan --directory /tmp        # all 61 layers, but no weights

`kernel` times the native kernel alone, one thread, in seconds of the processor, which other
programs on the machine lengthen less than those of the clock; the best of several repetitions.

`scaling` times it with several numbers of threads in turns, by the clock: the medians say something
of a machine that does nothing else.

`layer` writes a model with R1's embedding, one of its layers and its head as DeepSeek releases it
(FP8 with block scales), reads it once past the page cache, quantizes it in a process of its own,
and removes both. From the bytes it projects the time of the released model.

`plan` writes the headers of all of R1's files, with holes in place of the weights, and makes all
that is made of them: plan, files, sections, schedule, index. It is what grows with the model.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from geometry_sizes import GEOMETRIES, sized
from geometry_source import GeometrySource
from torch import Tensor

from localr1.checkpoint.direct_file import PAGE, DirectFile
from localr1.cli.memory import peak_memory_bytes
from localr1.kernels.block_scaled import BlockScaledRows
from localr1.kernels.native import available_isas
from localr1.kernels.quantize import quantize_rows
from localr1.models.registry import parse_config
from localr1.models.tensor_list import CHOICE_BIAS, tensor_shapes
from localr1.qtypes import QuantScheme
from localr1.quant import documents
from localr1.quant.atomic import AtomicDirectory
from localr1.quant.layout import index_json
from localr1.quant.methods.rtn import RoundToNearest, positions_of
from localr1.quant.pipeline import plan_files, quantize
from localr1.quant.plan import plan_quantization
from localr1.quant.progress import Progress
from localr1.quant.recipe import Recipe
from localr1.quant.sections import plan_sections
from localr1.quant.source import Source
from localr1.quant.writer import ShardWriter

BLOCK = (128, 128)
SHARD_BYTES = 4_300_000_000
"""About what R1's files have."""
POOL_BYTES = 64 << 20
"""Random values that every tensor takes its own from, beginning somewhere else."""
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK),
}
FP8_PARTS = ("_proj.weight", "_proj_with_mqa.weight")
"""Ends of the names of R1's FP8 matrices: all but the embedding, the router and the head."""
REFERENCE = "torch"
"""The definition of the method, beside the names of the native builds."""
ROWS, COLUMNS = 2048, 7168
"""Of an expert's gate and up."""


# --- kernel ---------------------------------------------------------------------------------------


def best_seconds(run: Callable[[], object], repetitions: int) -> float:
    """Of this thread, on the processor."""
    best = math.inf
    for _ in range(repetitions):
        start = time.thread_time()
        run()
        best = min(best, time.thread_time() - start)
    return best


def kernel_inputs(num_rows: int) -> dict[str, tuple[Tensor | BlockScaledRows, int]]:
    """Of each kind [num_rows, COLUMNS], and its bytes."""
    weight = torch.randn(num_rows, COLUMNS)
    codes = weight.to(torch.float8_e4m3fn)
    scales = torch.rand(-(-len(codes) // BLOCK[0]), COLUMNS // BLOCK[1]) + 0.1
    return {
        "BF16": (weight.bfloat16(), 2 * weight.numel()),
        "FP8": (BlockScaledRows(codes, scales, BLOCK), codes.numel()),
    }


def time_kernel(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    inputs = kernel_inputs(ROWS // 4)
    importance = torch.rand(COLUMNS) + 0.1
    print(f"{'input':6}{'scheme':12}{'kernel':14}{'MB/s':>8}{'weighted columns':>20}")
    for name, (rows, nbytes) in inputs.items():
        for bits, group in ((4, 32), (4, 64), (4, 128), (8, 32)):
            scheme = QuantScheme(bits, group)
            for isa in arguments.isa or [*available_isas(), REFERENCE]:
                if isa == REFERENCE and name == "FP8":
                    continue
                seconds = [
                    best_seconds(rounding(rows, scheme, weights, isa), arguments.repetitions)
                    for weights in (None, importance)
                ]
                plain, weighted = (nbytes / each / 1e6 for each in seconds)
                print(f"{name:6}{scheme.name:12}{isa:14}{plain:8.0f}{weighted:20.0f}", flush=True)


def rounding(
    rows: Tensor | BlockScaledRows,
    scheme: QuantScheme,
    weights: Tensor | None,
    isa: str,
    threads: int = 1,
) -> Callable[[], object]:
    if isa == REFERENCE:
        assert isinstance(rows, Tensor)
        return partial(
            RoundToNearest().quantize, rows, scheme, torch.bfloat16, "weight", weights=weights
        )
    positions = positions_of(scheme)
    what = (rows, scheme, torch.bfloat16, positions, weights)
    return partial(quantize_rows, *what, threads=threads, isa=isa)


def time_scaling(arguments: argparse.Namespace) -> None:
    """4 bits in groups of 32, a matrix of an expert."""
    torch.set_num_threads(1)
    scheme = QuantScheme(4, 32)
    print(f"{'input':6}{'kernel':14}{'threads':>8}{'MB/s':>8}{'a thread':>10}{'of one':>8}")
    for name, (rows, nbytes) in kernel_inputs(ROWS).items():
        for isa in arguments.isa or available_isas():
            runs = {n: rounding(rows, scheme, None, isa, n) for n in arguments.threads}
            seconds: dict[int, list[float]] = {count: [] for count in runs}
            for _ in range(arguments.repetitions + 1):  # The first is not counted.
                for count, run in runs.items():
                    start = time.perf_counter()
                    run()
                    seconds[count].append(time.perf_counter() - start)
            first = 0.0
            for count, measured in seconds.items():
                rate = nbytes / statistics.median(measured[1:]) / 1e6
                first = first or rate / count
                each = f"{rate / count:10.0f}{rate / count / first:8.0%}"
                print(f"{name:6}{isa:14}{count:8}{rate:8.0f}{each}", flush=True)


# --- a source of R1's kind ------------------------------------------------------------------------


class Pool:
    """Random values of one dtype, as bytes."""

    def __init__(self, values: Tensor) -> None:
        self._bytes = values.contiguous().view(torch.uint8).numpy().data

    def chunks(self, name: str, nbytes: int) -> Iterator[memoryview]:
        begin = sum(map(ord, name)) * 4096 % len(self._bytes)
        while nbytes:
            chunk = self._bytes[begin : begin + nbytes]
            yield chunk
            nbytes -= len(chunk)
            begin = 0


def make_pools() -> dict[str, Pool]:
    torch.manual_seed(0)
    normal = torch.randn(POOL_BYTES)
    codes = (normal * 112).clamp(-448, 448).to(torch.float8_e4m3fn)  # 448 is the largest.
    return {
        "F8_E4M3": Pool(codes),
        "BF16": Pool((normal[: POOL_BYTES // 2] * 0.02).bfloat16()),
        "F32": Pool(torch.rand(POOL_BYTES // 64) * 1e-3 + 1e-4),
    }


def stored_tensors(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name -> dtype, shape and bytes, in the layout of DeepSeek's release."""
    stored: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, shape in tensor_shapes(parse_config(config)).items():
        if len(shape) == 2 and name.endswith(FP8_PARTS):
            blocks = (-(-shape[0] // BLOCK[0]), -(-shape[1] // BLOCK[1]))
            stored[name] = ("F8_E4M3", shape, math.prod(shape))
            stored[f"{name}_scale_inv"] = ("F32", blocks, 4 * math.prod(blocks))
        elif name.endswith(CHOICE_BIAS):
            stored[name] = ("F32", shape, 4 * math.prod(shape))
        else:
            stored[name] = ("BF16", shape, 2 * math.prod(shape))
    return stored


def write_source(config: Mapping[str, Any], folder: Path, *, holes: bool = False) -> int:
    """Returns the bytes of its tensors. holes: leave them out; a file system that knows holes gives
    zeros for them."""
    folder.mkdir(parents=True)
    stored = stored_tensors(config)
    shards: list[list[str]] = [[]]
    size = 0
    for name, (_, _, nbytes) in stored.items():
        if size and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    pools = make_pools()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        header: dict[str, Any] = {}
        end = 0
        for name in names:
            dtype, shape, nbytes = stored[name]
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [end, end + nbytes],
            }
            end += nbytes
        text = json.dumps(header).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        with open(folder / file_name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in () if holes else names:
                dtype, _, nbytes = stored[name]
                for chunk in pools[dtype].chunks(name, nbytes):
                    file.write(chunk)
            file.truncate(8 + len(text) + end)
            file.flush()
            os.fsync(file.fileno())
    files = GeometrySource("r1", config).tokenizer_files()
    total = sum(nbytes for _, _, nbytes in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    (folder / "tokenizer.json").write_text(files.tokenizer_json)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": files.chat_template})
    )
    return total


# --- one layer ------------------------------------------------------------------------------------


def read_rate(folder: Path, at_most: int = 4 << 30) -> float:
    """Bytes a second of reading its files in order, past the page cache."""
    room = torch.empty((16 << 20) + PAGE, dtype=torch.uint8)
    skip = -room.data_ptr() % PAGE
    buffer = room.numpy().data[skip : skip + (16 << 20)]
    done, start = 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with DirectFile(path) as file:
            for begin in range(0, file.size, len(buffer)):
                length = min(len(buffer), file.size - begin)
                file.read_range(begin, length, buffer)
                done += length
                if done >= at_most:
                    return done / (time.perf_counter() - start)
    return done / (time.perf_counter() - start)


class Stages:
    """Seconds of the clock and of the processor, by what `quantize` was doing."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._last = time.perf_counter(), time.process_time()

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter(), time.process_time()
        for of, which in ((self.wall, 0), (self.cpu, 1)):
            of[progress.stage] = of.get(progress.stage, 0.0) + now[which] - self._last[which]
        self._last = now


def run_child(source: Path, out: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    stages = Stages()
    start = time.perf_counter()
    quantize(source, out, Recipe.uniform(4, 32), stages)
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": time.process_time(),
                "peak": peak_memory_bytes(),
                "wall": stages.wall,
                "cpu": stages.cpu,
            }
        )
    )


def measure_layer(arguments: argparse.Namespace) -> None:
    config = sized(GEOMETRIES["r1"].config, layers=1, small=arguments.small)
    config["n_routed_experts"] = arguments.experts
    work = Path(tempfile.mkdtemp(prefix="quantize-", dir=arguments.directory))
    source, out = work / "source", work / "out"
    try:
        total = write_source(config, source)
        rate = read_rate(source)
        child = [sys.executable, __file__, "child", str(source), str(out), str(arguments.threads)]
        completed = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(completed.stdout.splitlines()[-1])
        written = sum(path.stat().st_size for path in out.iterdir())
    finally:
        shutil.rmtree(work)
    whole = sum(nbytes for _, _, nbytes in stored_tensors(GEOMETRIES["r1"].config).values())
    print(
        f"source: {total / 1e9:.2f} GB, {arguments.experts} experts; result: {written / 1e9:.2f} GB"
    )
    print(f"machine: {platform.processor() or platform.machine()}, {arguments.threads} thread(s)")
    seconds, cpu_seconds = found["seconds"], found["cpu_seconds"]
    print(f"measured: {seconds:.0f} s of the clock, {cpu_seconds:.0f} s of processor")
    print(f"measured: peak resident memory {found['peak'] / 2**20:.0f} MiB")
    print(f"measured: plain sequential read {rate / 1e6:.0f} MB/s")
    print(f"measured: {total / seconds / 1e6:.0f} MB/s of source by the clock, "
          f"{total / cpu_seconds / 1e6:.0f} a second of processor, "
          f"{total / seconds / rate:.0%} of the read")  # fmt: skip
    for stage, of_stage in found["wall"].items():
        print(f"  {stage:12} {of_stage:8.1f} s clock {found['cpu'][stage]:8.1f} s processor")
    factor = whole / total
    print(f"projected by bytes, R1's 61 layers, {whole / 1e9:.0f} GB: "
          f"{factor * seconds / 3600:.1f} h by the clock of this run, "
          f"{factor * cpu_seconds / 3600:.1f} h of processor")  # fmt: skip


def measure_plan(arguments: argparse.Namespace) -> None:
    work = Path(tempfile.mkdtemp(prefix="quantize-", dir=arguments.directory))
    try:
        write_source(GEOMETRIES["r1"].config, work / "source", holes=True)
        child = [sys.executable, __file__, "plan-child", str(work / "source")]
        subprocess.run(child, check=True)
    finally:
        shutil.rmtree(work)


def run_plan_child(folder: Path) -> None:
    before = peak_memory_bytes()
    with Source(folder) as source:
        plan = plan_quantization(source.checkpoint, Recipe.uniform(4, 32))
        shards = plan_files(plan)
        sections = plan_sections(plan, parse_config(source.checkpoint.config).num_layers)
        source.schedule(sections).peak(source.there, releases=False)
        writer = ShardWriter(AtomicDirectory(folder / "out"), shards)
        tensors = sum(len(shard.tensors) for shard in shards)
        documents.encode(index_json(shards))
        print(f"{len(source.checkpoint.tensors)} tensors of the source, {tensors} of the result")
        print(f"measured: peak {peak_memory_bytes() / 2**20:.0f} MiB, {before / 2**20:.0f} of them "
              f"Python's and torch's, {time.process_time():.0f} s of processor")  # fmt: skip
        del writer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(dest="command", required=True)
    kernel = commands.add_parser("kernel")
    kernel.add_argument("--isa", nargs="*", choices=[*available_isas(), REFERENCE])
    kernel.add_argument("--repetitions", type=int, default=9)
    scaling = commands.add_parser("scaling")
    scaling.add_argument("--isa", nargs="*", choices=available_isas())
    scaling.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    scaling.add_argument("--repetitions", type=int, default=15)
    layer = commands.add_parser("layer")
    layer.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    layer.add_argument("--experts", type=int, default=256, help="a multiple of 8")
    layer.add_argument("--small", type=int, default=1, help="divide every width by this")
    layer.add_argument("--threads", type=int, default=1)
    plan = commands.add_parser("plan")
    plan.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    plan_child = commands.add_parser("plan-child", help="what `plan` starts")
    plan_child.add_argument("source", type=Path)
    child = commands.add_parser("child", help="what `layer` starts")
    child.add_argument("source", type=Path)
    child.add_argument("out", type=Path)
    child.add_argument("threads", type=int)
    arguments = parser.parse_args()
    if arguments.command == "kernel":
        time_kernel(arguments)
    elif arguments.command == "scaling":
        time_scaling(arguments)
    elif arguments.command == "layer":
        measure_layer(arguments)
    elif arguments.command == "plan":
        measure_plan(arguments)
    elif arguments.command == "plan-child":
        run_plan_child(arguments.source)
    else:
        run_child(arguments.source, arguments.out, arguments.threads)


if __name__ == "__main__":
    main()
