"""How much memory this process has taken at most."""

import sys


def peak_memory_bytes() -> int:
    """The largest resident set so far, in bytes, as the operating system counts it."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kibibytes.
    return int(peak if sys.platform == "darwin" else peak * 1024)
