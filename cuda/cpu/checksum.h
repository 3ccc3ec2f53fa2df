// CRC-32C (Castagnoli; RFC 3720, section 12.1, with the polynomial and test vectors of its appendix
// B.4): every build returns the same value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace localr1 {

// The register of the division: it starts as all ones and is inverted at the end, which `crc32c`
// does. Any state may come in, so that a file can be worked on in pieces.
using ChecksumUpdate = uint32_t (*)(uint32_t state, const uint8_t* data, size_t size);

struct ChecksumBuild {
  const char* name;
  ChecksumUpdate update;
};

// Those that this processor can run, best first; "generic" is always there and last.
std::vector<ChecksumBuild> available_checksums();

// The checksum of bytes that follow others whose checksum is `value`; 0 before the first byte.
uint32_t crc32c(ChecksumUpdate update, uint32_t value, const uint8_t* data, size_t size);

// The checksum of two pieces one behind the other, from theirs and the bytes of the second.
uint32_t crc32c_joined(uint32_t first, uint32_t second, uint64_t second_size);

// The state after so many bytes of zero: what a state is worth that far ahead.
uint32_t checksum_advanced(uint32_t state, uint64_t zeros);

uint32_t checksum_generic(uint32_t state, const uint8_t* data, size_t size);
uint32_t checksum_sse42(uint32_t state, const uint8_t* data, size_t size);

}  // namespace localr1
