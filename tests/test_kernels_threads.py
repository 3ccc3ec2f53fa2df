"""The pool of threads: calls from several Python threads, forks, many pools, and the end of the
interpreter."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_cases import ISAS, Shape, assert_same_bits, native, random_packed

from localr1.kernels.native import NativeKernels, default_threads


def test_calls_from_several_python_threads_wait_for_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    kernels = native(ISAS[0], 2)
    weight = kernels.prepare(random_packed(Shape(300, 256, 4, 32), generator))
    inputs = [torch.randn(1 + i % 20, 256, generator=generator) for i in range(40)]
    expected = [kernels.linear(x, weight) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: kernels.linear(x, weight), inputs))
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_same_bits(a, b, i)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_alone() -> None:
    """The workers exist only in the parent; the child must neither wait for them nor join them."""
    code = """
import os, torch
from kernel_cases import Shape, random_packed
from localr1.kernels.native import NativeKernels
kernels = NativeKernels(threads=3)
weight = kernels.prepare(random_packed(Shape(64, 64, 4, 32), torch.Generator()))
x = torch.ones(5, 64)
expected = kernels.linear(x, weight)
child = os.fork()
if child == 0:
    same = torch.equal(kernels.linear(x, weight), expected)
    del kernels
    os._exit(0 if same else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(kernels.linear(x, weight), expected)
"""
    run_python(code)


def test_the_interpreter_ends_with_pools_alive() -> None:
    run_python("""
import torch
from localr1.kernels.native import NativeKernels
kept = [NativeKernels(threads=3) for _ in range(3)]
kept[0].rms_norm(torch.ones(2, 64), torch.ones(64), 1e-6)
""")


def run_python(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_pools_come_and_go() -> None:
    x, weight = torch.ones(9, 64), torch.ones(64)
    expected = native(ISAS[0], 1).rms_norm(x, weight, 1e-6)
    for i in range(40):
        found = NativeKernels(threads=1 + i % 5).rms_norm(x, weight, 1e-6)
        assert_same_bits(found, expected, i)


def test_default_threads() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
