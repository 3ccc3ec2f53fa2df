// The steps that operations are made of. Each is called by every thread of a team and returns when
// the whole step is done.
#pragma once

#include "operations.h"

namespace localr1 {

// How the attention of a call is cut. A row is one query head of one token; rows that share a
// key/value head stand together. Few rows (decoding): the chunks of keys run in parallel and are
// merged afterwards, in order. Many (a prompt): tiles of rows run in parallel, each over its chunks.
struct AttentionPlan {
  int64_t rows;    // per key/value head
  int64_t tiles;   // of kMaxQueryRows rows
  int64_t chunks;  // of kKeyChunk keys
  bool split;      // chunks run in parallel

  AttentionPlan(int64_t tokens, int64_t start, const Heads& heads);
  // Temporaries: of each thread, and of the whole call.
  static size_t thread_floats(int64_t head_dim);
  size_t partial_floats(const Heads& heads) const;
};

class Steps {
 public:
  Steps(const KernelTable& table, Team& team) : table_(table), team_(team) {}

  // x [tokens, columns] -> a, through an RMS norm where norm is given. row: [columns] of this thread.
  // stride: from token to token, 0 for the columns.
  void quantize(const float* x, const float* norm, float eps, const Activations& a, float* row,
                int64_t stride = 0);
  // out [tokens, stride] = the products with each of parts side by side; added to out where add.
  void products(const Activations& a, const Linear* parts, int64_t num_parts, float* out,
                int64_t stride, bool add);
  // silu(gate) * up, as out [tokens, rows] or, where out is null, quantized for the next product.
  void gate_up(const Activations& a, const Linear& gate, const Linear& up, float* out,
               const Activations& quantized);
  void rope_append(const float* qkv, int64_t tokens, const Heads& heads, const HeadNorms& norms,
                   const Rope& rope, const Cache& cache, int64_t start, float* q);
  // thread_memory: AttentionPlan::thread_floats of this thread; partials: shared by all.
  void attention(const float* q, const Heads& heads, const Cache& cache, int64_t start,
                 float scale, const AttentionPlan& plan, float* thread_memory, float* partials,
                 float* out);

 private:
  template <class Body>
  void share_rows(int64_t units, int64_t tiles, const Body& body);

  const KernelTable& table_;
  Team& team_;
};

}  // namespace localr1
