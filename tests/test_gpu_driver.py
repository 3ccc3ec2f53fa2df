"""The real driver without a card: every function it calls exists in cuda-bindings with as many
arguments, codes become our errors, and where there is no card one sentence says so.

Nothing here shows that a card does what it is asked: `make gpu-test` does.
"""

import contextlib
import ctypes
import gc
import re
import sys
import weakref
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from localr1.cli.main import app
from localr1.errors import DeviceError, KernelError, MemoryLimitError, UsageError
from localr1.experts.cuda import open_cuda
from localr1.experts.options import CardSpec
from localr1.experts.placement import CARD_MARGIN
from localr1.kernels import gpu_driver
from localr1.kernels.gpu_driver import CudaDriver, HostFunction, open_card
from localr1.kernels.gpu_launch import Launch
from localr1.kernels.gpu_program import ProgramCache, installed_sources
from localr1.kernels.native import NativeKernels


class Code(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
LAUNCH_HOST_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3)


class FakeApi:
    """What cuda.bindings.driver has of functions that CudaDriver calls, with results of its own.
    codes: function -> what it returns from now on."""

    CUresult = Code
    CU_MEMHOSTALLOC_PORTABLE = 1
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2, CU_EVENT_BLOCKING_SYNC=1)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
    )
    RESULTS: dict[str, tuple[Any, ...]] = {  # noqa: RUF012  Never changed.
        "cuDeviceGetCount": (1,),
        "cuDeviceGet": (0,),
        "cuDeviceGetName": (b"Some Card\0\0\0",),
        "cuDevicePrimaryCtxRetain": ("context",),
        "cuMemGetInfo": (8 << 30, 24 << 30),
        "cuMemAlloc": (4096,),
        "cuMemHostAlloc": (8192,),
        "cuStreamCreate": (77,),
        "cuEventCreate": ("event",),
        "cuModuleLoadData": ("module",),
        "cuModuleGetFunction": ("function",),
        "cuStreamEndCapture": ("noted",),
        "cuGraphInstantiate": ("graph",),
    }

    def __init__(self, capability: int = 89) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.codes: dict[str, Code] = {}
        self.parameters: list[bytes] = []
        self._capability = capability
        self._launch_host = LAUNCH_HOST_FUNCTION(self.launch_host)

    def launch_host(self, stream: int, function: int, argument: int) -> int:
        self.calls.append(("cuLaunchHostFunc", (stream, function, argument)))
        return self.codes.get("cuLaunchHostFunc", Code.CUDA_SUCCESS)

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            code = self.codes.get(name, Code.CUDA_SUCCESS)
            if name == "cuDeviceGetAttribute":
                major = arguments[0] == 75
                return code, self._capability // 10 if major else self._capability % 10
            if name == "cuGetProcAddress":
                assert arguments[0] == b"cuLaunchHostFunc"
                return code, ctypes.cast(self._launch_host, ctypes.c_void_p).value, "found"
            if name == "cuLaunchKernel":
                address = ctypes.c_void_p.from_address(arguments[9]).value
                assert address is not None
                self.parameters.append(ctypes.string_at(address, 8))
            return code, *self.RESULTS.get(name, ())

        return function


class Programs(ProgramCache):
    """Compiles nothing."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, int]] = []

    def get(self, file: str, arch: str, rows_per_block: int) -> bytes:
        self.asked.append((file, arch, rows_per_block))
        return b"cubin"


def opened(api: FakeApi) -> CudaDriver:
    pytest.importorskip("cuda.bindings.nvrtc")
    driver = CudaDriver(api, 0, "context")
    driver.load(Programs(), 16, ["f.cu"])
    return driver


def use_everything(driver: CudaDriver) -> None:
    driver.enter()
    assert driver.name == "Some Card"
    assert driver.free_memory() == 8 << 30
    address, pinned = driver.allocate(100), driver.allocate_pinned(100)
    assert (address, pinned) == (4096, 8192)
    stream, event = driver.stream(), driver.event()
    driver.copy_in(address, 1, 10, stream)
    driver.copy_out(1, address, 10, stream)
    driver.launch(Launch("f.cu", "kernel", (3, 2), 64), [ctypes.c_int64(77)], stream)
    driver.record(event, stream)
    driver.wait(event)
    driver.wait_for(event, stream)
    driver.call_host(HostFunction(1234, 0, None), stream)
    driver.begin_capture(stream)
    graph = driver.end_capture(stream)
    assert graph == "graph"
    driver.launch_graph(graph, stream)
    driver.synchronize(stream)
    driver.free(address)
    assert pinned is not None
    driver.free_pinned(pinned)
    driver.close()
    driver.close()


def test_every_call_is_one_that_the_bindings_have() -> None:
    real = pytest.importorskip("cuda.bindings.driver")
    api = FakeApi()
    use_everything(opened(api))
    assert len(api.calls) > 20
    assert ("cuLaunchHostFunc", (77, 1234, None)) in api.calls
    for name, arguments in [
        *api.calls,
        ("cuInit", (0,)),
        ("cuDeviceGetCount", ()),
        ("cuDeviceGet", (0,)),
    ]:
        signature = (getattr(real, name).__doc__ or "").splitlines()[0]
        if name == "cuLaunchHostFunc":  # Not by way of the bindings.
            continue
        match = re.fullmatch(rf"{name}\((.*)\)", signature)
        assert match is not None, signature
        expected = len(match[1].split(",")) if match[1] else 0
        assert len(arguments) == expected, signature
    assert int(real.CU_MEMHOSTALLOC_PORTABLE) == FakeApi.CU_MEMHOSTALLOC_PORTABLE
    for kind in (
        "CUresult",
        "CUstreamCaptureMode",
        "CUstream_flags",
        "CUevent_flags",
        "CUdevice_attribute",
    ):
        fake = getattr(FakeApi, kind)
        for name in [each for each in dir(fake) if each.startswith("CU")]:
            assert int(getattr(getattr(real, kind), name)) == int(getattr(fake, name)), name


def test_a_launch_hands_over_grid_and_arguments() -> None:
    api = FakeApi()
    driver = opened(api)
    driver.launch(Launch("f.cu", "kernel", (3, 2), 64), [ctypes.c_int64(77)], "stream")
    arguments = dict(api.calls)["cuLaunchKernel"]
    assert arguments[:9] == ("function", 3, 2, 1, 64, 1, 1, 0, "stream")
    assert api.parameters == [(77).to_bytes(8, "little")]


def test_a_function_of_the_host_is_handed_over_as_it_is() -> None:
    """With its argument, straight to the driver; and kept as long as a graph may name it."""
    api = FakeApi()
    called: list[int] = []
    driver = opened(api)
    function = HOST_FUNCTION(called.append)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    alive = weakref.ref(function)
    for argument in (5, 6, 5):
        driver.call_host(HostFunction(address, argument, function), 77)
    del function
    gc.collect()
    assert alive() is not None
    calls = [arguments for name, arguments in api.calls if name == "cuLaunchHostFunc"]
    assert calls == [(77, address, 5), (77, address, 6), (77, address, 5)]
    assert [name for name, _ in api.calls].count("cuGetProcAddress") == 1
    for _, function_address, argument in calls:
        HOST_FUNCTION(function_address)(argument)
    assert called == [5, 6, 5]
    api.codes = {"cuLaunchHostFunc": Code.CUDA_ERROR_ILLEGAL_ADDRESS}
    with pytest.raises(DeviceError, match="cuLaunchHostFunc: found ILLEGAL_ADDRESS"):
        driver.call_host(HostFunction(address, 5, None), 77)


def test_codes_become_errors() -> None:
    api = FakeApi()
    driver = opened(api)
    api.codes = {"cuMemAlloc": Code.CUDA_ERROR_OUT_OF_MEMORY}
    with pytest.raises(MemoryLimitError, match="Some Card: cuMemAlloc"):
        driver.allocate(1)
    api.codes = {"cuMemHostAlloc": Code.CUDA_ERROR_OUT_OF_MEMORY}
    assert driver.allocate_pinned(1) is None
    api.codes = {"cuStreamSynchronize": Code.CUDA_ERROR_ILLEGAL_ADDRESS}
    with pytest.raises(DeviceError, match="cuStreamSynchronize: found ILLEGAL_ADDRESS"):
        driver.synchronize("stream")
    api.codes = {"cuLaunchKernel": Code.CUDA_ERROR_OUT_OF_MEMORY}
    with pytest.raises(DeviceError, match=r"launching kernel, grid \(3, 2\), 64 threads"):
        driver.launch(Launch("f.cu", "kernel", (3, 2), 64), [ctypes.c_int64(1)], "stream")


def test_a_card_that_is_too_old() -> None:
    with pytest.raises(KernelError, match=r"compute capability 7\.5 or newer, found 6\.1"):
        opened(FakeApi(capability=61))


def test_how_much_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = NativeKernels(threads=1)
    drivers: list[CudaDriver] = []

    def found(*_: object) -> CudaDriver:
        drivers.append(opened(FakeApi()))
        return drivers[-1]

    monkeypatch.setattr("localr1.experts.cuda.open_card", found)
    for asked, expected in ((None, (8 << 30) - CARD_MARGIN), (1 << 30, 1 << 30)):
        with contextlib.closing(open_cuda(Programs(), CardSpec(0, asked), kernels)) as device:
            assert device.memory == expected
    with pytest.raises(
        MemoryLimitError, match=r"--device: expected at most 7\.5 GiB, what Some Card"
    ):
        open_cuda(Programs(), CardSpec(0, 8 << 30), kernels)


def test_without_a_driver_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package, no driver, no card."""
    programs = ProgramCache(installed_sources(), installed_sources())
    fake = SimpleNamespace(driver=FakeApi())
    monkeypatch.setitem(sys.modules, "cuda.bindings", fake)
    fake.driver.codes = {"cuInit": Code.CUDA_ERROR_NO_DEVICE}
    with pytest.raises(
        KernelError, match=r"found NO_DEVICE\. Leave --device and --devices out: the CPU"
    ):
        open_card(programs, 16, ["f.cu"])

    def no_library(*_: object) -> None:
        raise RuntimeError("libcuda.so.1 is nowhere")

    monkeypatch.setattr(fake.driver, "cuInit", no_library, raising=False)
    with pytest.raises(KernelError, match=r"found no NVIDIA driver \(RuntimeError\)"):
        open_card(programs, 16, ["f.cu"])
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match="no package cuda-bindings"):
        open_card(programs, 16, ["f.cu"])


def test_one_of_several_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number, which its name has then; one that is not there is named."""
    real = pytest.importorskip("cuda.bindings.nvrtc")
    api = FakeApi()
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=api, nvrtc=real))
    with pytest.raises(UsageError, match=r"card 1: expected 0, the only one that CUDA finds"):
        open_card(Programs(), 16, ["f.cu"], 1)
    monkeypatch.setitem(FakeApi.RESULTS, "cuDeviceGetCount", (3,))
    assert open_card(Programs(), 16, ["f.cu"], 2).name == "Some Card (cuda:2)"
    assert ("cuDeviceGet", (2,)) in api.calls
    with pytest.raises(UsageError, match=r"card 3: expected 0 to 2, of the 3 that CUDA finds"):
        open_card(Programs(), 16, ["f.cu"], 3)


def test_a_driver_that_is_older_than_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses the programs, or has not all functions."""
    real = pytest.importorskip("cuda.bindings.nvrtc")
    fake = SimpleNamespace(driver=FakeApi(), nvrtc=real)
    monkeypatch.setitem(sys.modules, "cuda.bindings", fake)
    fake.driver.codes = {"cuModuleLoadData": Code.CUDA_ERROR_ILLEGAL_ADDRESS}
    with pytest.raises(KernelError, match=r"refuses: Some Card: cuModuleLoadData, ILLEGAL_ADDRESS"):
        open_card(Programs(), 16, ["f.cu"])
    assert fake.driver.calls[-1][0] == "cuDevicePrimaryCtxRelease"

    def lacking(*_: object) -> None:
        raise RuntimeError("Function is not found")

    monkeypatch.setattr(fake.driver, "cuModuleLoadData", lacking, raising=False)
    with pytest.raises(KernelError, match=r"a driver that is too old \(RuntimeError\)"):
        open_card(Programs(), 16, ["f.cu"])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=FakeApi(), nvrtc=real))
    assert open_card(Programs(), 8, ["f.cu"]).name == "Some Card"


def test_chat_without_a_card_ends_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    asked = ["chat", "-p", "hello", "--device", "cuda:1GiB"]
    result = CliRunner().invoke(app, asked)
    told = str(result.exception) if isinstance(result.exception, KernelError) else result.stderr
    assert result.exit_code == 1
    assert "--device cuda: expected an NVIDIA graphics card and its driver" in told
    assert told.rstrip().endswith(gpu_driver.NO_CARD)
    assert "Traceback" not in result.stderr
