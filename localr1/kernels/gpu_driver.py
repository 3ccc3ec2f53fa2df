"""What is asked of a graphics card: memory, copies, events and launches; and NVIDIA's driver, which
does it.

Addresses are plain numbers, streams and events whatever `stream` and `event` return. Work on one
stream is done in order, and not before the call that gave it has returned necessarily: what it
reads or writes must stay as it is until `synchronize`, or `wait` for an event recorded behind it.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, Protocol

from localr1.errors import DeviceError, KernelError, LocalR1Error, MemoryLimitError, UsageError
from localr1.kernels.gpu_launch import Launch
from localr1.kernels.gpu_program import ProgramCache, architecture

DENSE_PROGRAMS: Final = (
    "activations.cu",
    "attention.cu",
    "matmul.cu",
    "matvec.cu",
    "sampling.cu",
)
"""Of cuda/gpu, that a dense model needs."""
MODEL_PROGRAMS: Final = (
    *DENSE_PROGRAMS,
    "expert_tiles.cu",
    "experts.cu",
    "latent.cu",
    "router.cu",
)
"""That a mixture needs."""
_LAUNCH_HOST_FUNCTION: Final = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3)
_FIRST_WITH_HOST_FUNCTIONS: Final = 10000
"""The version of CUDA that cuLaunchHostFunc came with."""
NO_CARD: Final = "Leave --device and --devices out: the CPU computes everything then."


@dataclass(frozen=True)
class HostFunction:
    """A C function of one pointer, by its address, and the pointer it is given. owner: keeps what
    either points to."""

    address: int
    argument: int
    owner: object


class Driver(Protocol):
    """Calls may come from any thread that called `enter`, and entered no other card since. Every
    one may raise DeviceError: the card cannot be used any more then, but for `close`."""

    @property
    def name(self) -> str:
        """The card's."""
        ...

    def enter(self) -> None:
        """Before all else in a thread and behind another card's calls, as often as one likes."""
        ...

    def free_memory(self) -> int:
        """Bytes of the card that no program has taken."""
        ...

    def allocate(self, nbytes: int) -> int:
        """The address of memory of the card, a multiple of 16. Raises MemoryLimitError."""
        ...

    def free(self, address: int) -> None: ...

    def allocate_pinned(self, nbytes: int) -> int | None:
        """Memory of the host that copies of any card need no detour for, None where there is
        none."""
        ...

    def free_pinned(self, address: int) -> None: ...

    def stream(self) -> Any: ...

    def event(self) -> Any: ...

    def copy_in(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """From the host to the card."""
        ...

    def copy_out(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """From the card to the host."""
        ...

    def launch(self, launch: Launch, arguments: Sequence[Any], stream: Any) -> None:
        """arguments: ctypes values, in the kernel's order; of no use afterwards."""
        ...

    def record(self, event: Any, stream: Any) -> None: ...

    def wait(self, event: Any) -> None:
        """Until all is done that was on the stream when the event was recorded last."""
        ...

    def wait_for(self, event: Any, stream: Any) -> None:
        """What is given to the stream from now on is done behind that, whichever card's the event
        is; the host does not wait."""
        ...

    def call_host(self, function: HostFunction, stream: Any) -> None:
        """Called in the stream's order, by a thread of the driver's. It must call nothing of the
        driver and wait for nothing that does. It is kept until `close`, as graphs name it."""
        ...

    def synchronize(self, stream: Any) -> None: ...

    def begin_capture(self, stream: Any) -> None:
        """What this thread gives to the stream from now on is noted, not done."""
        ...

    def end_capture(self, stream: Any) -> Any:
        """A graph of what was noted, to be given to a stream as often as one likes. Addresses and
        other arguments are those of then."""
        ...

    def launch_graph(self, graph: Any, stream: Any) -> None: ...

    def close(self) -> None:
        """Raises nothing. What was allocated and not freed is lost."""
        ...


class CudaDriver:
    """`Driver` by way of cuda-bindings: a card of this machine. Make it with `open_card`.

    api: `cuda.bindings.driver`. context: the primary one, which torch would use as well. suffix: of
    its name, to tell it from others.
    """

    def __init__(self, api: Any, device: Any, context: Any, suffix: str = "") -> None:
        self._api, self._device, self._context = api, device, context
        self._functions: dict[str, Any] = {}
        self._modules: list[Any] = []
        self._streams: list[Any] = []
        self._events: list[Any] = []
        self._graphs: list[Any] = []
        self._host_functions: dict[tuple[int, int], HostFunction] = {}
        self._launch_host: Callable[[int, int, int], int] | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self.name = "cuda"
        self._suffix = suffix

    def load(self, programs: ProgramCache, rows_per_block: int, files: Sequence[str]) -> None:
        """The kernels of these files, compiled where they were not yet. Raises KernelError."""
        self.enter()
        self.name = _text(self._call("cuDeviceGetName", 100, self._device)) + self._suffix
        arch = architecture(self._capability())
        for file in files:
            cubin = programs.get(file, arch, rows_per_block)
            image = ctypes.create_string_buffer(cubin, len(cubin))
            self._modules.append(self._call("cuModuleLoadData", ctypes.addressof(image)))

    def enter(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def free_memory(self) -> int:
        return int(self._call("cuMemGetInfo")[0])

    def allocate(self, nbytes: int) -> int:
        return int(self._call("cuMemAlloc", nbytes))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def allocate_pinned(self, nbytes: int) -> int | None:
        code, address = self._api.cuMemHostAlloc(nbytes, self._api.CU_MEMHOSTALLOC_PORTABLE)
        return int(address) if code == self._api.CUresult.CUDA_SUCCESS else None

    def free_pinned(self, address: int) -> None:
        self._call("cuMemFreeHost", address)

    def stream(self) -> Any:
        flag = self._api.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = self._call("cuStreamCreate", int(flag))
        self._streams.append(stream)
        return stream

    def event(self) -> Any:
        flags = self._api.CUevent_flags
        # A thread that waits leaves its core to the CPU's kernels.
        blocking = int(flags.CU_EVENT_DISABLE_TIMING) | int(flags.CU_EVENT_BLOCKING_SYNC)
        event = self._call("cuEventCreate", blocking)
        self._events.append(event)
        return event

    def copy_in(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        self._call("cuMemcpyHtoDAsync", target, source, nbytes, stream)

    def copy_out(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        self._call("cuMemcpyDtoHAsync", target, source, nbytes, stream)

    def launch(self, launch: Launch, arguments: Sequence[Any], stream: Any) -> None:
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        grid, block = [*launch.grid, 1, 1][:3], (launch.threads, 1, 1)
        parameters = ctypes.addressof(addresses)
        try:
            function = self._function(launch.kernel)
            self._call("cuLaunchKernel", function, *grid, *block, 0, stream, parameters, 0)
        except LocalR1Error as error:
            raise DeviceError(
                f"{self.name}: launching {launch.kernel}, grid {launch.grid}, "
                f"{launch.threads} threads",
                found=error.found,
                fix=NO_CARD,
            ) from None

    def record(self, event: Any, stream: Any) -> None:
        self._call("cuEventRecord", event, stream)

    def wait(self, event: Any) -> None:
        self._call("cuEventSynchronize", event)

    def wait_for(self, event: Any, stream: Any) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def call_host(self, function: HostFunction, stream: Any) -> None:
        # cuda-bindings' own call is not used: that of 12.9 puts a function around it that takes the
        # interpreter's lock, and that frees itself when it is called, which a graph does again.
        if self._launch_host is None:
            name = b"cuLaunchHostFunc"
            address, _ = self._call("cuGetProcAddress", name, _FIRST_WITH_HOST_FUNCTIONS, 0)
            self._launch_host = _LAUNCH_HOST_FUNCTION(int(address))
        self._host_functions[function.address, function.argument] = function
        code = self._launch_host(int(stream), function.address, function.argument)
        _check(self._api, self.name, "cuLaunchHostFunc", self._api.CUresult(code))

    def synchronize(self, stream: Any) -> None:
        self._call("cuStreamSynchronize", stream)

    def begin_capture(self, stream: Any) -> None:
        # Other threads may go on allocating meanwhile.
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Any) -> Any:
        noted = self._call("cuStreamEndCapture", stream)
        try:
            graph = self._call("cuGraphInstantiate", noted, 0)
        finally:
            self._api.cuGraphDestroy(noted)
        self._graphs.append(graph)
        return graph

    def launch_graph(self, graph: Any, stream: Any) -> None:
        self._call("cuGraphLaunch", graph, stream)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        api = self._api
        # Codes are not looked at: of a card that is lost, all of them say so.
        api.cuCtxSetCurrent(self._context)
        for destroy, handles in (
            (api.cuGraphExecDestroy, self._graphs),
            (api.cuEventDestroy, self._events),
            (api.cuStreamDestroy, self._streams),
            (api.cuModuleUnload, self._modules),
        ):
            for handle in handles:
                destroy(handle)
        api.cuDevicePrimaryCtxRelease(self._device)

    def _function(self, kernel: str) -> Any:
        with self._lock:
            if kernel not in self._functions:
                self._functions[kernel] = self._find(kernel)
            return self._functions[kernel]

    def _find(self, kernel: str) -> Any:
        for module in self._modules:
            code, function = self._api.cuModuleGetFunction(module, kernel.encode())
            if code == self._api.CUresult.CUDA_SUCCESS:
                return function
        raise DeviceError(kernel, found="no such kernel among those that were loaded")

    def _capability(self) -> int:
        """89 for 8.9."""
        names = self._api.CUdevice_attribute
        major, minor = (
            int(self._call("cuDeviceGetAttribute", attribute, self._device))
            for attribute in (
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return 10 * major + minor

    def _call(self, function: str, *arguments: Any) -> Any:
        return _checked(self._api, self.name, function, *arguments)


def open_card(
    programs: ProgramCache, rows_per_block: int, files: Sequence[str], number: int = 0
) -> CudaDriver:
    """A card of this machine, with the kernels of these files loaded. rows_per_block: of the CPU's
    row blocks, whose bytes the card gets. number: CUDA's of the card. Raises KernelError, in one
    sentence, where it cannot be used, and UsageError where there are cards, but not this one."""
    try:
        from cuda.bindings import driver as api

        # Without NVIDIA's driver this is where its library is found missing.
        _checked(api, "cuda", "cuInit", 0)
        count = int(_checked(api, "cuda", "cuDeviceGetCount"))
        device = _checked(api, "cuda", "cuDeviceGet", _known(number, count))
        context = _checked(api, "cuda", "cuDevicePrimaryCtxRetain", device)
    except UsageError:
        raise
    except LocalR1Error as error:
        raise _no_card(str(error.found)) from None
    except ImportError:
        raise _no_card("no package cuda-bindings (`pip install 'localr1[gpu]'`)") from None
    except Exception as error:  # Whatever the loader of NVIDIA's library raises.
        raise _no_card(f"no NVIDIA driver ({type(error).__name__})") from None
    card = CudaDriver(api, device, context, f" (cuda:{number})" if count > 1 else "")
    with ExitStack() as undo:
        undo.callback(card.close)
        try:
            card.load(programs, rows_per_block, files)
        except DeviceError as error:
            # As of a driver that is older than the compiler: it takes none of its programs.
            raise _no_card(f"one whose driver refuses: {error.what}, {error.found}") from None
        except LocalR1Error:
            raise
        except Exception as error:  # cuda-bindings, of a function that the driver lacks.
            raise _no_card(f"a driver that is too old ({type(error).__name__})") from None
        undo.pop_all()
    return card


def _known(number: int, count: int) -> int:
    if count and number >= count:
        raise UsageError(
            f"card {number}",
            expected=f"0 to {count - 1}, of the {count} that CUDA finds here"
            if count > 1
            else "0, the only one that CUDA finds here",
            found=number,
            fix="It counts the fastest first, or as CUDA_DEVICE_ORDER says.",
        )
    return number


def _no_card(found: str) -> KernelError:
    return KernelError(
        "--device cuda", expected="an NVIDIA graphics card and its driver", found=found, fix=NO_CARD
    )


def _checked(api: Any, name: str, function: str, *arguments: Any) -> Any:
    """What a function of the driver returns behind its code: nothing, one value or a tuple."""
    code, *values = getattr(api, function)(*arguments)
    _check(api, name, function, code)
    return values[0] if len(values) == 1 else tuple(values)


def _check(api: Any, name: str, function: str, code: Any) -> None:
    if code == api.CUresult.CUDA_SUCCESS:
        return
    if code == api.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise MemoryLimitError(f"{name}: {function}", found="no free memory on the card")
    found = getattr(code, "name", str(code)).removeprefix("CUDA_ERROR_")
    raise DeviceError(f"{name}: {function}", found=found, fix=NO_CARD)


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode("utf-8", errors="replace")
