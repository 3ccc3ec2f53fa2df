"""Locks that keep two processes from working on one model at once. The operating system lets go of
them when a process dies, however that happens.

A repository of the Hugging Face cache has one of ours in the cache's own folder of locks: `pull`
holds it from its start to its end, what removes or verifies takes it without waiting. A directory
of quantized models has one for each name, which `localr1 quantize` holds while it writes.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from localr1.errors import OutputError
from localr1.hub.cached import LOCKS

LOCK_NAME: Final = "localr1.lock"
POLL_SECONDS: Final = 0.2
_NOT_WRITABLE: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


class BusyError(OutputError):
    """Another process is at work on it."""


def repository_lock(repository: Path) -> Path:
    """Of a repository's folder in the cache, models--org--name."""
    return repository.parent / LOCKS / repository.name / LOCK_NAME


def blob_lock(repository: Path, etag: str) -> Path:
    """That huggingface_hub holds while it downloads a blob."""
    return repository.parent / LOCKS / repository.name / f"{etag}.lock"


def model_lock(path: Path) -> Path:
    """Of a quantized model's directory."""
    return path.parent / f".{path.name}.lock"


@contextlib.contextmanager
def model_held(path: Path, *, reading: bool = False) -> Iterator[None]:
    """As `held`, of a quantized model's directory; leaves no lock file beside the models."""
    with held(model_lock(path), path.name, reading=reading):
        try:
            yield
        finally:
            if os.name != "nt":  # There an open file stays; it is empty and found again.
                with contextlib.suppress(OSError):
                    model_lock(path).unlink(missing_ok=True)


@contextlib.contextmanager
def waited_for(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds the lock file `path` in a block, as soon as another process lets go of it. on_wait:
    called once where there is one. Raises OutputError where the lock cannot be made."""
    with contextlib.ExitStack() as stack:
        is_waiting = False
        while True:
            try:
                stack.enter_context(held(path, path.parent.name))
                break
            except BusyError:
                if not is_waiting:
                    on_wait()
                is_waiting = True
                time.sleep(POLL_SECONDS)
        yield


@contextlib.contextmanager
def held(path: Path, what: str, *, reading: bool = False) -> Iterator[None]:
    """Holds the lock file `path` in a block, and does not wait for it. reading: go on without one
    where none can be made, as on a disk that cannot be written.

    Raises BusyError, which says that another process has `what`, and OutputError where the lock
    cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, mode=0o664)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise BusyError(
            f"{what} is in use: it is being pulled, quantized, verified or removed",
            fix="Wait for that to end, or stop it.",
        ) from error
    except OSError as error:
        if not (reading and error.errno in _NOT_WRITABLE):
            raise OutputError(f"{path} cannot be made", found=error.strerror) from error
        yield
        return
    except NotImplementedError:  # A file system without locks: as huggingface_hub, without one.
        yield
        return
    try:
        yield
    finally:
        lock.release()
