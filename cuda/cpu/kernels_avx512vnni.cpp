#include <math.h>

#include "kernels.h"
#include "simd_avx512.h"
#include "product_avx512.h"
#include "product.h"
#include "rowwise.h"
#include "attention.h"
#include "place.h"

namespace localr1 {

const KernelTable* kernels_avx512vnni() {
  static const KernelTable table = {
      "avx512vnni", kRows,    place_codes, product,  quantize, rms_norm, store,  accumulate,      silu_multiply,
      combine, lane_dot, exp_sum,  sigmoid,  rotate,   store_cache_row, attend,
      attend_expanded, transpose_keys, widen_cache, merge, multiply, widen_rows, multiply_stored};
  return &table;
}

}  // namespace localr1
