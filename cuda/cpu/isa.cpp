#include "isa.h"

#ifdef LOCALR1_X86
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace localr1 {

#ifdef LOCALR1_X86
namespace {

struct Registers {
  unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
#ifdef _MSC_VER
  int r[4];
  __cpuidex(r, int(leaf), int(subleaf));
  return {unsigned(r[0]), unsigned(r[1]), unsigned(r[2]), unsigned(r[3])};
#else
  Registers r{};
  __cpuid_count(leaf, subleaf, r.a, r.b, r.c, r.d);
  return r;
#endif
}

// The register state that the operating system saves (XCR0); needs OSXSAVE.
unsigned saved_state() {
#ifdef _MSC_VER
  return unsigned(_xgetbv(0));
#else
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
#endif
}

constexpr bool has(unsigned value, unsigned bits) { return (value & bits) == bits; }
constexpr unsigned bit(int i) { return 1u << i; }

struct Features {
  bool avx2 = false, avx512vnni = false;
};

// Bits: Intel SDM volume 2A, CPUID; XCR0: volume 1, section 13.3.
Features detect() {
  Features features;
  if (cpuid(0, 0).a < 7) return features;
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  const unsigned fma = bit(12), osxsave = bit(27), avx = bit(28), f16c = bit(29);
  if (!has(one.c, fma | osxsave | avx | f16c)) return features;
  const unsigned state = saved_state();
  const unsigned xmm_ymm = 0x6, zmm = 0xe6;
  features.avx2 = has(state, xmm_ymm) && has(seven.b, bit(5));
  const unsigned f_dq_bw_vl = bit(16) | bit(17) | bit(30) | bit(31), vnni = bit(11);
  features.avx512vnni =
      features.avx2 && has(state, zmm) && has(seven.b, f_dq_bw_vl) && has(seven.c, vnni);
  return features;
}

}  // namespace

bool has_sse42() { return has(cpuid(1, 0).c, bit(20)); }
#endif

std::vector<const KernelTable*> available_tables() {
  std::vector<const KernelTable*> tables;
#ifdef LOCALR1_X86
  const Features features = detect();
  if (features.avx512vnni) tables.push_back(kernels_avx512vnni());
  if (features.avx2) tables.push_back(kernels_avx2());
#endif
  tables.push_back(kernels_generic());
  return tables;
}

}  // namespace localr1
