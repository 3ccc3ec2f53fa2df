"""CRC-32C: the checksum of bytes that are read again and again, such as an expert's.

The Castagnoli polynomial, as iSCSI computes it (RFC 3720, section 12.1). It finds damage, not
forgery: localr1.json has the SHA-256 of every file too.
"""

from localr1.kernels.native_module import _native

Bytes = bytes | bytearray | memoryview


def available_checksums() -> list[str]:
    """The builds this processor can run, best first: of sse4.2, generic. All return the same."""
    return list(_native.available_checksums())


def crc32c(buffer: Bytes, value: int = 0, *, build: str = "") -> int:
    """The checksum of `buffer`, contiguous bytes in memory, which follow others whose checksum is
    `value`: crc32c(a + b) == crc32c(b, crc32c(a)). Releases the GIL.

    build: of `available_checksums`, "" for the best. Raises BufferError unless contiguous.
    """
    return _native.crc32c(buffer, value, build)


def crc32c_joined(first: int, second: int, second_size: int) -> int:
    """The checksum of two pieces one behind the other, from theirs and the second's bytes."""
    return _native.crc32c_joined(first, second, second_size)
