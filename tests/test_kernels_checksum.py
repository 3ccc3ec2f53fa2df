"""CRC-32C against the vectors of RFC 3720, appendix B.4, and against its definition bit by bit."""

import threading

import pytest
import torch

from localr1.kernels.checksum import available_checksums, crc32c, crc32c_joined

READ_COMMAND = bytes.fromhex(
    "01c00000 00000000 00000000 00000000 14000000 00000400 00000014 00000018"
    "28000000 00000000 02000000 00000000"
)
VECTORS = {
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(range(31, -1, -1)): 0x113FDB5C,
    READ_COMMAND: 0xD9963A56,
    b"123456789": 0xE3069283,
    b"": 0,
}
"""Of the RFC, which prints the bytes of a checksum in the order they are sent, and the usual check
value of the algorithm."""

LENGTHS = [*range(20), 255, 4095, *range(8184, 8218), 24576, 100_003]
"""Around what the fast build takes in three lanes, and its remainders."""


def by_bits(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def noise(length: int, seed: int = 0) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (length,), generator=generator, dtype=torch.uint8)
    return values.numpy().tobytes()


@pytest.mark.parametrize("build", available_checksums())
def test_the_known_values(build: str) -> None:
    for data, expected in VECTORS.items():
        assert crc32c(data, build=build) == crc32c(data) == expected


@pytest.mark.parametrize("build", available_checksums())
def test_every_length_and_start(build: str) -> None:
    data = noise(max(LENGTHS) + 16)
    for length in LENGTHS:
        for start in (0, 1, 7):
            part = data[start : start + length]
            view = memoryview(data)[start : start + length]
            assert crc32c(view, build=build) == crc32c(part, build="generic"), (start, length)
    for length in (1, 7, 8, 9, 8192, 8215):
        assert crc32c(data[:length], build=build) == by_bits(data[:length])


@pytest.mark.parametrize("build", available_checksums())
def test_pieces_make_the_whole(build: str) -> None:
    data = noise(50_000)
    whole = crc32c(data, build=build)
    for cut in (0, 1, 8191, 8192, 33_333, 49_999, 50_000):
        first, second = data[:cut], data[cut:]
        assert crc32c(second, crc32c(first, build=build), build=build) == whole
        assert crc32c_joined(crc32c(first), crc32c(second), len(second)) == whole


def test_a_piece_larger_than_a_lane_of_32_bits_is_joined_right() -> None:
    """Zeros behind a first byte, 2^33 of them: by squaring, and in steps of 2^20."""
    zeros = bytes(1 << 20)
    first, block = crc32c(b"x"), crc32c(zeros)
    stepped, block_size = block, 1 << 20
    while block_size < 1 << 33:
        stepped = crc32c_joined(stepped, stepped, block_size)
        block_size *= 2
    found = crc32c_joined(first, stepped, 1 << 33)
    one_by_one = first
    for _ in range(1 << 13):
        one_by_one = crc32c_joined(one_by_one, block, 1 << 20)
    assert found == one_by_one


def test_every_kind_of_buffer() -> None:
    data = noise(999)
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    expected = crc32c(data)
    assert crc32c(bytearray(data)) == crc32c(memoryview(data)) == expected
    assert crc32c(tensor.numpy().data) == expected
    words = noise(96)
    assert crc32c(memoryview(words).cast("i")) == crc32c(words)
    with pytest.raises(BufferError):
        crc32c(memoryview(data)[::2])
    with pytest.raises(TypeError):
        crc32c("text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no build avx9"):
        crc32c(data, build="avx9")


def test_threads_do_not_meet() -> None:
    data = [noise(100_000, seed) for seed in range(4)]
    expected = [crc32c(each) for each in data]
    found = [0] * 4

    def work(place: int) -> None:
        for _ in range(50):
            found[place] = crc32c(data[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
