"""Speed of the CPU kernels: bandwidth of one-token products, multiply-adds of many-token products,
attention, whole blocks, mixtures of experts, and the checksum of an expert. Prints a table; every
figure is the best of several repetitions.

    python benchmarks/kernels.py --threads 2 --shape 4096x4096 --bits 4
"""

import argparse
import platform
import time
from collections.abc import Callable, Sequence

import torch

from localr1.kernels.api import (
    AttentionWeights,
    LayerCache,
    MlpWeights,
    PackedExpert,
    PackedWeight,
    RopeTable,
    RouterRule,
    Routing,
    Scoring,
)
from localr1.kernels.checksum import available_checksums, crc32c
from localr1.kernels.native import NativeKernels
from localr1.kernels.native_weight import NativeWeight
from localr1.qtypes import Codes, QuantScheme

EXPERT_BYTES = 24_772_608
"""Of R1 in 4 bits (docs/quantization.md)."""

STREAM_BYTES = 1 << 30
"""Weights read in turn, so that none is still in a cache: servers have last-level ones of 256 MiB
and more."""


def best_seconds(run: Callable[[], object], repetitions: int) -> float:
    best = float("inf")
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


INT4 = QuantScheme(4, 32)


def random_weight(
    kernels: NativeKernels, rows: int, columns: int, scheme: QuantScheme = INT4
) -> NativeWeight:
    return kernels.prepare(random_packed(rows, columns, scheme))


def random_packed(rows: int, columns: int, scheme: QuantScheme = INT4) -> PackedWeight:
    words = torch.randint(-(2**31), 2**31, (rows, scheme.packed_words(columns)), dtype=torch.int64)
    scale = torch.full((rows, columns // 32), 1e-3, dtype=torch.bfloat16)
    return PackedWeight(words.to(torch.int32), scale, None, scheme, rows, columns)


def read_bandwidth(threads: int, repetitions: int) -> float:
    """GB/s of summing a buffer larger than the caches."""
    torch.set_num_threads(threads)
    buffer = torch.ones(STREAM_BYTES // 4)
    return buffer.nbytes / best_seconds(buffer.sum, repetitions) / 1e9


def one_token(
    kernels: NativeKernels, rows: int, columns: int, scheme: QuantScheme, repetitions: int
) -> tuple[float, float]:
    """(GB/s of weights, microseconds a call) over weights that are in no cache."""
    first = random_weight(kernels, rows, columns, scheme)
    count = max(2, STREAM_BYTES // first.nbytes)
    weights = [first] + [random_weight(kernels, rows, columns, scheme) for _ in range(count - 1)]
    x = torch.randn(1, columns)

    def run() -> None:
        for weight in weights:
            kernels.linear(x, weight)

    seconds = best_seconds(run, repetitions)
    return count * first.nbytes / seconds / 1e9, seconds / count * 1e6


def many_tokens(
    kernels: NativeKernels,
    rows: int,
    columns: int,
    scheme: QuantScheme,
    tokens: int,
    repetitions: int,
) -> float:
    """Multiply-adds, in 10^9 a second."""
    weight = random_weight(kernels, rows, columns, scheme)
    x = torch.randn(tokens, columns)
    seconds = best_seconds(lambda: kernels.linear(x, weight), repetitions)
    return tokens * rows * columns / seconds / 1e9


def attention(
    kernels: NativeKernels, heads: tuple[int, int, int], tokens: int, past: int, repetitions: int
) -> tuple[float, float]:
    """(milliseconds, 10^9 float multiply-adds a second) of causal attention, float16 cache."""
    num_heads, num_kv_heads, dim = heads
    shape = (num_kv_heads, past + tokens, dim)
    cache = LayerCache(torch.randn(shape).half(), torch.randn(shape).half())
    q = torch.randn(tokens, num_heads, dim)
    seconds = best_seconds(lambda: kernels.attention(q, cache, past, dim**-0.5), repetitions)
    pairs = tokens * past + tokens * (tokens + 1) / 2
    return seconds * 1e3, 2 * pairs * num_heads * dim / seconds / 1e9


def blocks(
    kernels: NativeKernels,
    hidden: int,
    inner: int,
    heads: tuple[int, int, int],
    tokens: int,
    past: int,
    repetitions: int,
) -> tuple[float, float]:
    """(attention block, MLP block) in microseconds, 4 bits, over weights that are in no cache."""
    num_heads, num_kv_heads, dim = heads

    def weight(rows: int, columns: int) -> NativeWeight:
        return random_weight(kernels, rows, columns)

    def layer() -> tuple[object, object]:
        ones, wide, narrow = torch.ones(hidden), num_heads * dim, num_kv_heads * dim
        return (
            kernels.bind_attention(
                AttentionWeights(
                    ones,
                    weight(wide, hidden),
                    weight(narrow, hidden),
                    weight(narrow, hidden),
                    weight(hidden, wide),
                    None,
                    None,
                    None,
                    None,
                    None,
                    None,
                    num_heads,
                    num_kv_heads,
                    dim,
                    1e-5,
                    dim**-0.5,
                )
            ),
            kernels.bind_mlp(
                MlpWeights(
                    ones,
                    weight(inner, hidden),
                    weight(inner, hidden),
                    weight(hidden, inner),
                    None,
                    None,
                    None,
                    1e-5,
                )
            ),
        )

    layers = [layer() for _ in range(max(2, STREAM_BYTES // (hidden * inner * 2)))]
    shape = (num_kv_heads, past + tokens, dim)
    caches = [LayerCache(torch.randn(shape).half(), torch.randn(shape).half()) for _ in layers]
    rope = RopeTable(torch.ones(past + tokens, dim // 2), torch.zeros(past + tokens, dim // 2))
    x = torch.randn(tokens, hidden)

    def run_attention() -> None:
        for (block, _), cache in zip(layers, caches, strict=True):
            kernels.attention_block(x, block, rope, cache, past)

    def run_mlp() -> None:
        for _, block in layers:
            kernels.mlp_block(x, block)

    scale = 1e6 / len(layers)
    return (
        best_seconds(run_attention, repetitions) * scale,
        best_seconds(run_mlp, repetitions) * scale,
    )


def experts(
    kernels: NativeKernels, rule: RouterRule, hidden: int, inner: int, tokens: int, repetitions: int
) -> tuple[float, float, float, float]:
    """(microseconds of the router, of the experts, 10^9 multiply-adds a second, GB/s of weights) of
    a mixture in 4 bits. A token alone goes to other experts in every call, so that they are in no
    cache where the layer is larger than it."""
    expert = PackedExpert(
        random_packed(inner, hidden),
        random_packed(inner, hidden),
        random_packed(hidden, inner),
    )
    bank = kernels.prepare_experts((expert for _ in range(rule.num_experts)), rule.num_experts)
    weight = torch.randn(rule.num_experts, hidden) / hidden**0.5
    x, residual = torch.randn(tokens, hidden), torch.zeros(tokens, hidden)
    chosen = kernels.route(x, weight, None, rule)
    count = max(1, rule.num_experts // rule.experts_per_token)
    choices = [
        Routing((chosen.experts + i * rule.experts_per_token) % rule.num_experts, chosen.weights)
        for i in range(count if tokens == 1 else 1)
    ]

    def run() -> None:
        for choice in choices:
            kernels.mix_experts(x, choice, bank, residual)

    seconds = best_seconds(run, repetitions) / len(choices)
    routing = best_seconds(lambda: kernels.route(x, weight, None, rule), repetitions)
    macs = 3 * tokens * rule.experts_per_token * hidden * inner
    read = bank.nbytes / rule.num_experts * len(set(chosen.experts.flatten().tolist()))
    return routing * 1e6, seconds * 1e6, macs / seconds / 1e9, read / seconds / 1e9


def checksum(build: str, repetitions: int) -> tuple[float, float]:
    """GB/s of one thread: a megabyte again and again, and experts that are in no cache."""
    data = memoryview(bytearray(STREAM_BYTES))
    starts = range(0, STREAM_BYTES - EXPERT_BYTES, EXPERT_BYTES)
    cached = data[: 1 << 20]

    def run_cached() -> None:
        for _ in starts:
            crc32c(cached, build=build)

    def run_experts() -> None:
        for start in starts:
            crc32c(data[start : start + EXPERT_BYTES], build=build)

    return (
        len(starts) * len(cached) / best_seconds(run_cached, repetitions) / 1e9,
        len(starts) * EXPERT_BYTES / best_seconds(run_experts, repetitions) / 1e9,
    )


def parse_scheme(text: str) -> QuantScheme:
    """nf4, or a number of bits."""
    return QuantScheme(4, 32, codes=Codes.NF4) if text == "nf4" else QuantScheme(int(text), 32)


def parse_shape(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", default=None)
    schemes = [parse_scheme(name) for name in ("4", "nf4", "5", "6", "8")]
    parser.add_argument("--bits", type=parse_scheme, nargs="+", default=schemes, metavar="4|nf4|8")
    parser.add_argument(
        "--shape", type=parse_shape, nargs="+", default=[(576, 576), (1536, 576), (4096, 4096)]
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args(arguments)
    tokens, repetitions = options.tokens, options.repetitions
    for build in available_checksums():
        cached, gb = checksum(build, repetitions)
        print(f"checksum {build}: 1 MB in cache {cached:5.1f} GB/s, experts in none {gb:5.1f} GB/s")
    for threads in options.threads:
        kernels = NativeKernels(threads=threads, isa=options.isa)
        bandwidth = read_bandwidth(threads, repetitions)
        print(f"{platform.processor() or platform.machine()}, {kernels.isa}, {threads} threads")
        print(f"plain read: {bandwidth:.1f} GB/s")
        for scheme in options.bits:
            for rows, columns in options.shape:
                gb, micro = one_token(kernels, rows, columns, scheme, repetitions)
                macs = many_tokens(kernels, rows, columns, scheme, tokens, repetitions)
                print(
                    f"{scheme.code_name} {rows}x{columns}: 1 token {gb:6.1f} GB/s "
                    f"({100 * gb / bandwidth:.0f}% of plain), {micro:7.1f} us; "
                    f"{tokens} tokens {macs:7.1f} GMAC/s"
                )
        for heads in ((9, 3, 64), (32, 8, 128)):
            for count, past in ((tokens, 0), (1, 512), (1, 4096)):
                milli, macs = attention(kernels, heads, count, past, repetitions)
                print(
                    f"attention {heads}: {count} tokens after {past}: {milli:8.3f} ms, "
                    f"{macs:6.1f} GMAC/s"
                )
        for count, past in ((1, 128), (tokens, 0)):
            first, second = blocks(kernels, 576, 1536, (9, 3, 64), count, past, repetitions)
            print(
                f"layer 576/1536: {count} tokens: attention {first:8.1f} us, mlp {second:8.1f} us"
            )
        for num_experts, per_token, hidden, inner in ((16, 2, 256, 96), (64, 6, 2048, 1408)):
            rule = RouterRule(num_experts, per_token, Scoring.SOFTMAX, False)
            for count in (1, tokens):
                route, micro, macs, gb = experts(kernels, rule, hidden, inner, count, repetitions)
                print(
                    f"experts {num_experts}x{hidden}x{inner} top {per_token}: {count} tokens "
                    f"{micro:9.1f} us, {macs:6.1f} GMAC/s, {gb:5.1f} GB/s "
                    f"({100 * gb / bandwidth:.0f}% of plain); router {route:.1f} us"
                )


if __name__ == "__main__":
    main()
