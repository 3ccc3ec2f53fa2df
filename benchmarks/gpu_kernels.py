"""Speed of the GPU kernels. At one token: bytes of weights a second, as a share of the rate at
which the card copies its own memory (reads and writes, both counted). At a prompt's many: products
and sums a second, as a share of what the tensor cores do in int8 by the data sheet.

    python benchmarks/gpu_kernels.py

Experts of R1's, V2-Lite's and Qwen3-30B's shapes, gate and up and then down, and matrices of dense
models. What is read lies in no cache: weights are used in turn, of more bytes than any has. The
launches are one graph, so that the host's part does not count; times are those of the card's own
events, the median of several repetitions. Without a card it says so in one sentence.
"""

import argparse
import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from gpu_bench import REPETITIONS, BenchCard, open_bench_card, write_results

from localr1.card.program import pointer
from localr1.errors import LocalR1Error
from localr1.kernels import gpu_launch
from localr1.kernels.gpu_layout import ExpertLayout, MatrixLayout
from localr1.kernels.gpu_pairs import order_pairs
from localr1.kernels.native_module import _native
from localr1.qtypes import ACTIVATION_GROUP, QuantScheme

STREAM_BYTES = 1 << 30
BFLOAT16 = 0
GROUP = 32


@dataclass(frozen=True)
class ExpertShape:
    """experts: of a layer. target: the share of the copy rate that is to be reached at a token."""

    name: str
    hidden: int
    inner: int
    per_token: int
    experts: int
    target: float


EXPERTS = (
    ExpertShape("R1", 7168, 2048, 8, 256, 0.80),
    ExpertShape("V2-Lite", 2048, 1408, 6, 64, 0.60),
    ExpertShape("Qwen3-30B", 2048, 768, 8, 128, 0.50),
)
PROMPTS = (128, 512)
"""Tokens."""
MATRICES = ((4096, 4096), (18944, 3584), (152064, 3584))
"""Rows and columns: of Llama-8B's attention; of Qwen2-7B's MLP and head."""


@dataclass(frozen=True)
class Figure:
    """share: of the copy rate. microseconds: of a token's work."""

    kernel: str
    bits: int
    microseconds: float
    gigabytes_per_second: float
    share: float
    target: float | None


@dataclass(frozen=True)
class PromptFigure:
    """tops: 10^12 products and sums a second. share: of the tensor cores' int8, None where that is
    not known."""

    kernel: str
    bits: int
    tokens: int
    microseconds: float
    tops: float
    share: float | None


def layout(rows: int, columns: int, bits: int, rows_per_block: int) -> MatrixLayout:
    return MatrixLayout.of(rows, columns, rows_per_block, QuantScheme(bits, GROUP), BFLOAT16)


def nbytes_of(matrix: MatrixLayout) -> int:
    return int(
        _native.matrix_bytes(
            matrix.rows, matrix.columns, matrix.rows_per_block, matrix.code, matrix.group,
            matrix.scale_type, bool(matrix.has_zero),
        )
    )  # fmt: skip


class Bench:
    """Memory of the card that is freed at the end."""

    def __init__(self, card: BenchCard, stream_bytes: int, repetitions: int) -> None:
        self.card = card
        self.stream_bytes, self._repetitions = stream_bytes, repetitions
        self._allocated: list[int] = []
        self.rate = card.copy_rate(min(stream_bytes, 1 << 30))

    def weights(self, nbytes: int) -> int:
        """Random bytes: what they stand for costs a card nothing."""
        address = self._allocate(nbytes)
        block = torch.randint(0, 256, (min(nbytes, 16 << 20),), dtype=torch.uint8)
        for offset in range(0, nbytes, len(block)):
            size = min(len(block), nbytes - offset)
            self.card.driver.copy_in(address + offset, block.data_ptr(), size, self.card.stream)
            self.card.driver.synchronize(self.card.stream)
        return address

    def tensor(self, value: torch.Tensor) -> int:
        address = self._allocate(value.nbytes)
        self.card.driver.copy_in(address, value.data_ptr(), value.nbytes, self.card.stream)
        self.card.driver.synchronize(self.card.stream)
        return address

    def activations(self, count: int, columns: int) -> tuple[ctypes.c_void_p, ...]:
        groups = columns // ACTIVATION_GROUP
        parts = (
            torch.randint(-127, 128, (count, columns), dtype=torch.int8),
            torch.full((count, groups), 1e-2),
            torch.zeros(count, groups, dtype=torch.int32),
        )
        return tuple(pointer(self.tensor(part)) for part in parts)

    def figure(
        self,
        name: str,
        bits: int,
        nbytes: int,
        launches: int,
        work: Callable[[], None],
        target: float | None,
    ) -> Figure:
        """work: gives the card so many launches, which read nbytes together. Of the token's work
        that one of them is, or all of the kernels of one token."""
        seconds = self._seconds(work)
        reached = nbytes / seconds
        return Figure(
            name, bits, 1e6 * seconds / launches, reached / 1e9, reached / self.rate, target
        )

    def prompt_figure(
        self, name: str, bits: int, tokens: int, products: int, times: int, work: Callable[[], None]
    ) -> PromptFigure:
        """products: multiplications of int8 in each of the `times` computations that `work` gives
        to the card."""
        seconds = self._seconds(work) / times
        reached, peak = 2.0 * products / seconds, self.card.int8_peak
        share = None if peak is None else reached / peak
        return PromptFigure(name, bits, tokens, 1e6 * seconds, reached / 1e12, share)

    def _seconds(self, work: Callable[[], None]) -> float:
        driver, stream = self.card.driver, self.card.stream
        work()  # Loads the kernels, which a capture must not do.
        driver.synchronize(stream)
        driver.begin_capture(stream)
        work()
        graph = driver.end_capture(stream)
        return self.card.median(lambda: driver.launch_graph(graph, stream), self._repetitions)

    def free(self) -> None:
        while self._allocated:
            self.card.driver.free(self._allocated.pop())

    def _allocate(self, nbytes: int) -> int:
        self._allocated.append(self.card.driver.allocate(nbytes))
        return self._allocated[-1]


def experts(bench: Bench, shape: ExpertShape, bits: int) -> Figure:
    """gate_up and down of the chosen experts of one token after another, each with others."""
    rows, driver, stream = bench.card.rows_per_block, bench.card.driver, bench.card.stream
    gate = layout(shape.inner, shape.hidden, bits, rows)
    down = layout(shape.hidden, shape.inner, bits, rows)
    form = ExpertLayout(gate, gate, down)
    size = 2 * nbytes_of(gate) + nbytes_of(down)
    tokens = max(2, bench.stream_bytes // (size * shape.per_token))
    count = tokens * shape.per_token
    base = bench.weights(count * size)
    table = pointer(bench.tensor(torch.arange(count) * size + base))
    order = torch.randperm(count).to(torch.int32).view(tokens, shape.per_token).contiguous()
    chosen = bench.tensor(order)
    inputs = bench.activations(1, shape.hidden)
    gated = bench.activations(shape.per_token, shape.inner)
    outputs = pointer(bench.tensor(torch.zeros(shape.per_token, shape.hidden)))

    def work() -> None:
        for token in range(tokens):
            some = pointer(chosen + 4 * token * shape.per_token)
            driver.launch(
                gpu_launch.gate_up(form, shape.per_token),
                (form, table, some, ctypes.c_int32(shape.per_token), *inputs, *gated),
                stream,
            )
            driver.launch(
                gpu_launch.down(form, shape.per_token), (form, table, some, *gated, outputs), stream
            )

    name = f"{shape.per_token} experts of {shape.name}, {shape.hidden} x {shape.inner}"
    return bench.figure(name, bits, count * size, tokens, work, shape.target)


def product(bench: Bench, num_rows: int, columns: int, bits: int) -> Figure:
    """matvec of one token, with one matrix after another."""
    driver, stream = bench.card.driver, bench.card.stream
    matrix = layout(num_rows, columns, bits, bench.card.rows_per_block)
    size = nbytes_of(matrix)
    count = max(2, bench.stream_bytes // size)
    base = bench.weights(count * size)
    inputs = bench.activations(1, columns)
    out = pointer(bench.tensor(torch.zeros(num_rows)))

    def work() -> None:
        for index in range(count):
            driver.launch(
                gpu_launch.matvec(bits, num_rows, 1),
                (
                    matrix, pointer(base + index * size), *inputs, ctypes.c_int32(1), pointer(0),
                    out, ctypes.c_int64(num_rows), ctypes.c_int32(0),
                ),
                stream,
            )  # fmt: skip

    return bench.figure(f"matrix of {num_rows} x {columns}", bits, count * size, count, work, None)


def turned(bench: Bench, columns: int, positions: int) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """Where `by_group` puts scales and sums."""
    shape = (columns // ACTIVATION_GROUP, positions)
    scales = bench.tensor(torch.zeros(shape))
    return pointer(scales), pointer(bench.tensor(torch.zeros(shape, dtype=torch.int32)))


def prompt_product(
    bench: Bench, num_rows: int, columns: int, bits: int, tokens: int
) -> PromptFigure:
    """matmul and what goes before it, with one matrix after another."""
    driver, stream = bench.card.driver, bench.card.stream
    matrix = layout(num_rows, columns, bits, bench.card.rows_per_block)
    size, groups = nbytes_of(matrix), columns // ACTIVATION_GROUP
    count = max(2, bench.stream_bytes // size)
    base = bench.weights(count * size)
    q, *scales = bench.activations(tokens, columns)
    positions = gpu_launch.positions_of(tokens)
    by_group, stride = turned(bench, columns, positions), ctypes.c_int64(positions)
    out = pointer(bench.tensor(torch.zeros(tokens, num_rows)))

    def work() -> None:
        for index in range(count):
            driver.launch(
                gpu_launch.by_group(groups, positions),
                (
                    *scales, ctypes.c_int32(groups), pointer(0), ctypes.c_int32(1),
                    ctypes.c_int32(tokens), stride, *by_group,
                ),
                stream,
            )  # fmt: skip
            driver.launch(
                gpu_launch.matmul(bits, num_rows, tokens),
                (
                    matrix, pointer(base + index * size), q, *by_group, stride,
                    ctypes.c_int32(tokens), pointer(0), out, ctypes.c_int64(num_rows),
                    ctypes.c_int32(0),
                ),
                stream,
            )  # fmt: skip

    name, products = f"matrix of {num_rows} x {columns}", tokens * num_rows * columns
    return bench.prompt_figure(name, bits, tokens, products, count, work)


def prompt_experts(bench: Bench, shape: ExpertShape, bits: int, tokens: int) -> PromptFigure:
    """gate and up, and down, of experts chosen at random. Those for which the streamed bytes have
    no room share theirs with others."""
    rows, driver, stream = bench.card.rows_per_block, bench.card.driver, bench.card.stream
    gate = layout(shape.inner, shape.hidden, bits, rows)
    down = layout(shape.hidden, shape.inner, bits, rows)
    form = ExpertLayout(gate, gate, down)
    size = 2 * nbytes_of(gate) + nbytes_of(down)
    count = min(shape.experts, max(1, bench.stream_bytes // size))
    base = bench.weights(count * size)
    table = pointer(bench.tensor(torch.arange(shape.experts) % count * size + base))
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(tokens, shape.experts, generator=generator)
    pairs = order_pairs(scores.topk(shape.per_token).indices)
    order, positions = pointer(bench.tensor(pairs.order)), len(pairs.order)
    where = table, order, pointer(bench.tensor(pairs.experts))
    q, *scales = bench.activations(tokens, shape.hidden)
    by_group, stride = turned(bench, shape.hidden, positions), ctypes.c_int64(positions)
    gated_q, *_ = bench.activations(positions, shape.inner)
    gated = gated_q, *turned(bench, shape.inner, positions)
    out = pointer(bench.tensor(torch.zeros(tokens * shape.per_token, shape.hidden)))
    each, groups = ctypes.c_int32(shape.per_token), shape.hidden // ACTIVATION_GROUP

    def work() -> None:
        driver.launch(
            gpu_launch.by_group(groups, positions),
            (
                *scales, ctypes.c_int32(groups), order, each, ctypes.c_int32(positions), stride,
                *by_group,
            ),
            stream,
        )  # fmt: skip
        driver.launch(
            gpu_launch.gate_up_tiles(form, pairs.num_tiles),
            (form, *where, each, q, *by_group, stride, *gated),
            stream,
        )
        driver.launch(
            gpu_launch.down_tiles(form, pairs.num_tiles),
            (form, *where, *gated, stride, out),
            stream,
        )

    name = f"{shape.per_token} of {shape.experts} experts of {shape.name}"
    products = 3 * tokens * shape.per_token * shape.hidden * shape.inner
    return bench.prompt_figure(name, bits, tokens, products, 1, work)


def measure(
    card: BenchCard,
    shapes: Sequence[ExpertShape] = EXPERTS,
    matrices: Sequence[tuple[int, int]] = MATRICES,
    stream_bytes: int = STREAM_BYTES,
    repetitions: int = REPETITIONS,
) -> tuple[float, list[Figure]]:
    """The copy rate in bytes a second, and a figure for each shape in 4 and 8 bits."""
    bench = Bench(card, stream_bytes, repetitions)
    found: list[Figure] = []
    for bits in (4, 8):
        for shape in shapes:
            found.append(experts(bench, shape, bits))
            bench.free()
        for rows, columns in matrices:
            found.append(product(bench, rows, columns, bits))
            bench.free()
    return bench.rate, found


def measure_prompts(
    card: BenchCard,
    shapes: Sequence[ExpertShape] = EXPERTS,
    matrices: Sequence[tuple[int, int]] = MATRICES[:2],
    tokens: Sequence[int] = PROMPTS,
    stream_bytes: int = STREAM_BYTES,
    repetitions: int = REPETITIONS,
) -> list[PromptFigure]:
    """A figure for each shape and number of tokens in 4 and 8 bits. Of a prompt the head computes
    one token's logits, so that it is none of the matrices."""
    bench = Bench(card, stream_bytes, repetitions)
    found: list[PromptFigure] = []
    for bits in (4, 8):
        for count in tokens:
            for shape in shapes:
                found.append(prompt_experts(bench, shape, bits, count))
                bench.free()
            for rows, columns in matrices:
                found.append(prompt_product(bench, rows, columns, bits, count))
                bench.free()
    return found


def table(card: str, rate: float, figures: Sequence[Figure]) -> list[str]:
    lines = [
        f"{card}: copies its memory at {rate / 1e9:.0f} GB/s (reads and writes, both counted).",
        "",
        "| one token | bits | us | GB/s | of the copy rate | to reach |",
        "|---|---|---|---|---|---|",
    ]
    for each in figures:
        target = "" if each.target is None or each.bits != 4 else f"{each.target:.0%}"
        lines.append(
            f"| {each.kernel} | {each.bits} | {each.microseconds:.1f} | "
            f"{each.gigabytes_per_second:.0f} | {each.share:.0%} | {target} |"
        )
    return lines


def prompt_table(peak: float | None, figures: Sequence[PromptFigure]) -> list[str]:
    known = "not known" if peak is None else f"{peak / 1e12:.0f} TOPS"
    lines = [
        f"Its tensor cores in int8, by the data sheet and its highest clock: {known}.",
        "",
        "| a prompt's tokens | tokens | bits | us | TOPS | of the tensor cores |",
        "|---|---|---|---|---|---|",
    ]
    for each in figures:
        share = "" if each.share is None else f"{each.share:.0%}"
        lines.append(
            f"| {each.kernel} | {each.tokens} | {each.bits} | {each.microseconds:.1f} | "
            f"{each.tops:.1f} | {share} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    arguments = parser.parse_args()
    try:
        card = open_bench_card()
    except LocalR1Error as error:
        print(f"Not measured: {error}", file=sys.stderr)
        return error.exit_code
    try:
        rate, figures = measure(card, repetitions=arguments.repetitions)
        prompts = measure_prompts(card, repetitions=arguments.repetitions)
    finally:
        card.driver.close()
    data = {
        "card": card.driver.name,
        "copy_rate": rate,
        "figures": [asdict(each) for each in figures],
        "int8_peak": card.int8_peak,
        "prompts": [asdict(each) for each in prompts],
    }
    lines = table(card.driver.name, rate, figures)
    lines += ["", *prompt_table(card.int8_peak, prompts)]
    write_results("gpu_kernels", card.driver.name, lines, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
