#include "checksum.h"

#include <array>

#include "isa.h"

namespace localr1 {
namespace {

// A polynomial of degree below 32 over GF(2): bit 31 is the coefficient of x^0, bit 0 that of x^31.
constexpr uint32_t kPolynomial = 0x82f63b78;  // but for x^32
constexpr uint32_t kOne = 1u << 31, kX = 1u << 30;

constexpr uint32_t times_x(uint32_t p) { return (p >> 1) ^ (p & 1 ? kPolynomial : 0); }

constexpr uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = kOne; bit != 0; bit >>= 1) {
    if (b & bit) product ^= a;
    a = times_x(a);
  }
  return product;
}

constexpr int kCountBits = 64;

// x^(8 * 2^i): what 2^i bytes of zero multiply a state by.
constexpr std::array<uint32_t, kCountBits> byte_powers() {
  std::array<uint32_t, kCountBits> powers{};
  uint32_t power = kX;
  for (int i = 0; i < 3; ++i) power = multiply(power, power);
  for (int i = 0; i < kCountBits; ++i) {
    powers[i] = power;
    power = multiply(power, power);
  }
  return powers;
}

constexpr std::array<uint32_t, kCountBits> kBytePowers = byte_powers();
constexpr int kSlices = 8;

struct Tables {
  uint32_t slice[kSlices][256];
};

// slice[k][b]: what the byte b leaves after k more bytes of zero.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t state = byte;
    for (int i = 0; i < 8; ++i) state = times_x(state);
    tables.slice[0][byte] = state;
  }
  for (int k = 1; k < kSlices; ++k) {
    for (int byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables.slice[k - 1][byte];
      tables.slice[k][byte] = (before >> 8) ^ tables.slice[0][before & 0xff];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

}  // namespace

// Eight bytes a step, one lookup each, all independent of one another.
uint32_t checksum_generic(uint32_t state, const uint8_t* data, size_t size) {
  const auto& slice = kTables.slice;
  for (; size >= kSlices; data += kSlices, size -= kSlices) {
    uint32_t next = 0;
    for (int i = 0; i < 4; ++i) next ^= slice[7 - i][data[i] ^ ((state >> 8 * i) & 0xff)];
    for (int i = 4; i < 8; ++i) next ^= slice[7 - i][data[i]];
    state = next;
  }
  for (; size > 0; ++data, --size) state = (state >> 8) ^ slice[0][(state ^ *data) & 0xff];
  return state;
}

uint32_t checksum_advanced(uint32_t state, uint64_t zeros) {
  for (int i = 0; zeros != 0; ++i, zeros >>= 1) {
    if (zeros & 1) state = multiply(state, kBytePowers[i]);
  }
  return state;
}

uint32_t crc32c(ChecksumUpdate update, uint32_t value, const uint8_t* data, size_t size) {
  return ~update(~value, data, size);
}

// The two inversions cancel: the second piece's state began with all ones and must begin with what
// the first left, and the difference of the two travels on as if over zeros.
uint32_t crc32c_joined(uint32_t first, uint32_t second, uint64_t second_size) {
  return checksum_advanced(first, second_size) ^ second;
}

std::vector<ChecksumBuild> available_checksums() {
  std::vector<ChecksumBuild> builds;
#ifdef LOCALR1_X86
  if (has_sse42()) builds.push_back({"sse4.2", checksum_sse42});
#endif
  builds.push_back({"generic", checksum_generic});
  return builds;
}

}  // namespace localr1
