"""How much memory this process has taken at most."""

import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """The largest resident set so far, in bytes, as the operating system counts it."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # getrusage would do, but its figure survives exec: a large parent's peak would show.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, others kibibytes.
    return int(peak if sys.platform == "darwin" else peak * 1024)
