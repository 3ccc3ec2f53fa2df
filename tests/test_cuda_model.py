"""The model of CUDA's execution by itself: it sees what a kernel must not do, and nothing else."""

import ctypes

import pytest
import torch
from gpu_cases import i32, models
from gpu_model import ModelError, Program
from torch import Tensor

from localr1.kernels.gpu_launch import Launch

KERNEL = """#include "device.h"

namespace localr1 {

LOCALR1_KERNEL(64, 1024)
probe(float* x, int n) {
  __shared__ float all[64];
  const int i = threadIdx.x;
  %s
}

}  // namespace localr1
"""


def run(body: str, size: int = 64, n: int = 0, threads: int = 64, blocks: int = 1) -> list[Tensor]:
    """x [size], counted up from 0, after a kernel of this body: for each order of warps."""
    program = Program("probe.cu", text=KERNEL % body)
    results = []
    for gpu in models():
        x = torch.arange(float(size))
        buffer = gpu.upload("x", x)
        gpu.run(program, Launch("probe.cu", "probe", (blocks,), threads), buffer, i32(n))
        results.append(gpu.download(buffer, x))
    return results


def refused(body: str, match: str, size: int = 64, n: int = 0) -> None:
    """By at least one order of warps and side of the buffer, with these words."""
    with pytest.raises(ModelError, match=match):
        run(body, size, n)


def test_threads_and_blocks_have_their_numbers() -> None:
    body = "x[blockIdx.x * blockDim.x + i] = gridDim.x * 1000 + blockIdx.x * 100 + i;"
    expected = torch.tensor(
        [3000.0 + 100 * block + thread for block in range(3) for thread in range(40)]
    )
    for found in run(body, 120, threads=40, blocks=3):
        assert torch.equal(found, expected)


def test_shuffles_and_barriers_pass_values_on() -> None:
    body = """
  float value = x[i];
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  all[i] = value + __shfl_sync(kAllLanes, x[i], 5);
  __syncthreads();
  x[i] = all[63 - i];
  __syncwarp();
"""
    sums = torch.arange(64.0).view(2, 32).sum(1) + torch.tensor([5.0, 37.0])
    for found in run(body):
        assert torch.equal(found, sums.flip(0).repeat_interleave(32))


def test_integer_products_are_signed() -> None:
    body = "x[i] = float(__dp4a(int(0x80ff7f01u), int(0x80017f02u), n));"
    for found in run(body, n=3):
        assert found[0] == 128 * 128 - 1 + 127 * 127 + 2 + 3


def test_bytes_are_chosen_by_three_bits_of_a_nibble() -> None:
    body = "x[i] = float(__byte_perm(0x00030201u, 0x07060504u, unsigned(n)));"
    for found in run(body, n=0xB8F2):
        assert found[0] == 0x00010703


def test_shared_memory_is_no_number_at_first() -> None:
    body = "x[i] = all[i];\n  all[i] = 1.0f;"
    for found in run(body):
        assert found.isnan().all()


def test_a_read_outside_is_seen_on_either_side() -> None:
    refused("if (i == 3) x[0] = x[n];", "outside every buffer: byte 256 of x", n=64)
    refused("if (i == 3) x[0] = x[n];", "outside every buffer: 4 bytes before x", n=-1)


def test_a_write_outside_is_seen_on_either_side() -> None:
    refused("if (i == 3) x[n] = 1.0f;", "outside every buffer: byte 256 of x", n=64)
    refused(
        "if (i == 3) x[n] = 1.0f;", "outside every buffer: 4 bytes before x|written before", n=-1
    )
    # Where no forbidden page is near: 61 floats end 12 bytes before theirs.
    refused("if (i == 3) x[n] = 1.0f;", "written behind its 244 bytes", 61, 61)


def test_a_load_that_its_type_does_not_align_with_is_seen() -> None:
    refused("if (i == 0) x[0] = ((const float4*)(x + n))->y;", "does not align", n=1)


def test_an_index_outside_an_array_of_shared_memory_is_seen() -> None:
    body = "all[i + n] = 1.0f;\n  x[i] = all[i];"
    refused(body, "index outside an array", n=1)


def test_lanes_that_do_not_meet_are_seen() -> None:
    refused(
        "if (i % 32 < 9) x[0] = __shfl_xor_sync(kAllLanes, x[0], 1);",
        "block .0, 0.: 18 threads wait for others that never come, 0 of them at __syncthreads",
    )
    refused("if (i % 2) __syncthreads(); else __syncwarp();", "wait for others")
    refused(
        "if (i % 2) __syncwarp(); else x[0] = __shfl_sync(kAllLanes, x[0], 1);",
        "meet at different operations: (__syncwarp|__shfl_sync) and",
    )
    refused("__syncwarp(i % 2 ? 1u : 2u);", "without being among those it names")
    refused("if (i % 32 < 8) x[0] = __shfl_sync(0xffu, x[0], 12);", "reads a lane that is not")


def test_a_thread_that_has_ended_is_not_waited_for() -> None:
    body = "if (i >= 40) return;\n  __syncthreads();\n  x[i] = 1.0f;"
    for found in run(body):
        assert found.sum() == 40 + sum(range(40, 64))


def test_after_an_error_the_next_launch_works() -> None:
    for body in (
        "x[n] = 1.0f; __syncthreads();",
        "if (i) __syncthreads(); else __syncwarp();",
    ):
        refused(body, "outside|written|wait for", n=64)
        assert run("__syncthreads();\n  x[i] += 1.0f;")[0][0] == 1.0


@pytest.mark.parametrize(
    "body",
    [
        # read after write, between warps: forwards or backwards shows it
        "all[i] = x[i];\n  x[i] = all[(i + 33) % 64];",
        # and between lanes of one warp
        "all[i] = x[i];\n  x[i] = all[i ^ 1];",
        # write after read: one warp is ahead of the other by a turn
        """for (int turn = 0; turn < 3; ++turn) {
    all[i] = x[i] + turn;
    __syncthreads();
    x[i] = all[63 - i];
  }""",
    ],
)
def test_what_no_barrier_orders_differs_between_orders(body: str) -> None:
    results = run(body)
    assert any(not torch.equal(each.nan_to_num(), results[0].nan_to_num()) for each in results[1:])
    fixed = body.replace(";\n  x[i] = all", ";\n  __syncthreads();\n  x[i] = all")
    fixed = fixed.replace("63 - i];", "63 - i];\n    __syncthreads();")
    results = run(fixed)
    assert all(torch.equal(each, results[0]) for each in results)


def test_arguments_are_counted_and_measured() -> None:
    program = Program("probe.cu", text=KERNEL % "x[0] = n;")
    gpu = next(models())
    x = gpu.upload("x", torch.zeros(1))
    for arguments in ((x,), (x, i32(1), i32(1)), (x, ctypes.c_int64(1)), (i32(1), i32(1))):
        with pytest.raises(AssertionError, match="bytes, found"):
            gpu.run(program, Launch("probe.cu", "probe", (1,), 1), *arguments)


def fragments(a: Tensor, b: Tensor) -> Tensor:
    """int32 [32 lanes, 6 words] of int8 a [16, 32] and b [32, 8], element by element as the PTX ISA
    numbers them ("Matrix Fragments for mma.m16n8k32"): 16 of a in four words, 8 of b in two."""
    words = torch.empty(32, 24, dtype=torch.int8)
    for lane in range(32):
        group, within = divmod(lane, 4)
        for i in range(16):
            row = group if i < 4 or 8 <= i < 12 else group + 8
            words[lane, i] = a[row, within * 4 + i % 4 + (0 if i < 8 else 16)]
        for i in range(8):
            words[lane, 16 + i] = b[within * 4 + i % 4 + (0 if i < 4 else 16), group]
    return words.view(torch.int32)


MULTIPLY = """#include "device.h"

namespace localr1 {

LOCALR1_KERNEL(64, 1024)
multiply(const uint32_t* words, int32_t* sums) {
  const uint32_t* own = words + threadIdx.x * 6;
  const uint32_t a[4] = {own[0], own[1], own[2], own[3]};
  int found[4] = {sums[threadIdx.x * 4], 0, 0, 7};
  multiply_16x8x32(a, uint2{own[4], own[5]}, found);
  for (int i = 0; i < 4; ++i) sums[threadIdx.x * 4 + i] = found[i];
}

}  // namespace localr1
"""


def test_a_product_of_the_tensor_cores_is_that_of_the_matrices() -> None:
    """In two warps at once; what the sums were before is added."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (2, 16, 32), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (2, 32, 8), generator=generator, dtype=torch.int8)
    words = torch.cat([fragments(a[i], b[i]) for i in range(2)])
    before = torch.full((64, 4), 1000, dtype=torch.int32)
    expected = a.int() @ b.int()
    for gpu in models():
        sums = gpu.upload("sums", before)
        launch = Launch("multiply.cu", "multiply", (1,), 64)
        gpu.run(Program("multiply.cu", text=MULTIPLY), launch, gpu.upload("words", words), sums)
        found = gpu.download(sums, before).view(2, 32, 4)
        for lane in range(32):
            group, within = divmod(lane, 4)
            for i, added in enumerate((1000, 0, 0, 7)):
                row, column = group + i // 2 * 8, within * 2 + i % 2
                assert torch.equal(found[:, lane, i], expected[:, row, column] + added)


def test_lanes_that_do_not_meet_at_a_product_are_seen() -> None:
    body = (
        "uint32_t a[4] = {}; int sums[4] = {};\n  if (i % 32) multiply_16x8x32(a, uint2{}, sums);"
    )
    refused(body, "wait for others")


COPY = """
  const int other = i ^ 32;  // of the other warp
  copy_async<16>(all + i / 4 * 4, x + i / 4 * 4);
  end_group();
  %s
"""


def test_an_asynchronous_copy_is_there_once_it_was_awaited() -> None:
    for found in run(COPY % "await_groups<0>();\n  __syncthreads();\n  x[i] = all[other] + 1.0f;"):
        assert torch.equal(found, torch.arange(64.0).view(2, 32).flip(0).flatten() + 1.0)
    # All but the last group: the second copy may or may not be there.
    body = COPY % (
        "copy_async<8>(all + (other & ~1), x + (other & ~1));\n  end_group();\n"
        "  await_groups<1>();\n  __syncwarp();\n  x[i] = all[i];"
    )
    for found in run(body, size=64):
        assert torch.equal(found, torch.arange(64.0))


@pytest.mark.parametrize(
    "body",
    [
        "__syncthreads();\n  x[i] = all[other];",  # never awaited
        "end_group();\n  await_groups<2>();\n  __syncthreads();\n  x[i] = all[other];",
        "await_groups<0>();\n  x[i] = all[other];",  # by its own thread alone
    ],
)
def test_a_copy_that_is_read_too_early_shows(body: str) -> None:
    expected = torch.arange(64.0).view(2, 32).flip(0).flatten()
    assert any(not torch.equal(found, expected) for found in run(COPY % body))


def test_a_copy_that_overwrites_what_is_still_read_shows() -> None:
    body = """all[i] = 1.0f;
  __syncthreads();
  copy_async<16>(all + i / 4 * 4, x + i / 4 * 4);
  const float read = all[i ^ 32];
  await_groups<0>();
  __syncthreads();
  x[i] = read;"""
    assert any(not torch.equal(found, torch.ones(64)) for found in run(body))


def test_a_copy_that_is_not_aligned_is_seen() -> None:
    refused("copy_async<16>(all + i / 4 * 4, x + 2);", "asynchronous copy that is not aligned")
