#include "quantize_weights.h"

#include "kernels.h"
#include "pool.h"

namespace localr1 {

namespace {

constexpr int64_t kItemWeights = 1 << 15;  // of one share of the work: a tenth of a millisecond
constexpr int64_t kItemRows = 16;          // whole vectors of groups, however many a row has

}  // namespace

void quantize_rows(Pool& pool, const KernelTable& table, const WeightRows& source,
                      const Rounding& rounding, const QuantizedRows& out) {
  const int64_t wanted = kItemWeights / source.columns;
  const int64_t rows = (wanted / kItemRows + 1) * kItemRows;
  const int64_t items = (source.rows + rows - 1) / rows;
  pool.run([&](Team& team) {
    team.for_ranges(items, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * rows, last = end * rows < source.rows ? end * rows : source.rows;
      table.quantize_weights(source, rounding, first, last - first, out);
    });
  });
}

}  // namespace localr1
