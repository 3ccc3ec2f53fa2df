"""What a transfer knows of one file: its blocks, who is at them, how far it is hashed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from localr1.hub.partial import PartialFile
from localr1.hub.repository import Location, RemoteFile

HASH_BLOCKS: Final = 32
"""Blocks hashed before another file may have its turn."""


class FileTask:
    """One file on its way, perhaps under several names. Everything in it belongs to the transfer's
    lock but the digest, which belongs to who claimed `is_hashing`.

    failures: of attempts in a row. refusals: of addresses, in a row. damaged: how often it came
    whole but wrong. not_before: when it may be tried again (time.monotonic). is_elsewhere: it is
    fetched whole by other means. is_dropped: what is in the partial file is not wanted any more.
    """

    def __init__(self, files: Sequence[RemoteFile], blob: Path) -> None:
        self.files, self.file, self.blob = files, files[0], blob
        self.partial: PartialFile | None = None
        self.location: Location | None = None
        self.claimed: set[int] = set()
        self.first_missing = 0
        self.in_order = False
        """The server knows no ranges: the whole file in one answer."""
        self.failures = self.damaged = self.refusals = 0
        self.not_before = 0.0
        self.is_hashing = self.is_done = self.is_dropped = self.is_elsewhere = False
        self.restart_hash()

    def restart_hash(self) -> None:
        self.num_hashed = 0
        self.digest = self.file.new_digest()

    def missing_run(self, longest: int) -> range:
        """The first blocks that are neither there nor on their way."""
        assert self.partial is not None
        count = self.partial.num_blocks
        while self.first_missing < count and self.partial.has(self.first_missing):
            self.first_missing += 1
        first = self.first_missing
        while first < count and (self.partial.has(first) or first in self.claimed):
            first += 1
        stop = first
        while stop < min(count, first + longest):
            if self.partial.has(stop) or stop in self.claimed:
                break
            stop += 1
        return range(first, stop)

    def hashable(self) -> range:
        """Blocks that can be hashed now."""
        assert self.partial is not None
        stop = self.num_hashed
        last = min(self.partial.num_blocks, stop + HASH_BLOCKS)
        while stop < last and self.partial.has(stop):
            stop += 1
        return range(self.num_hashed, stop)
