// Included behind a file of cuda/gpu and a list of its kernels: what a test calls through ctypes.
#pragma once

extern "C" {

// Runs a kernel on a grid; 0, or 1 where something was found (model_message, model_fault).
__attribute__((visibility("default"))) int model_launch(const char* name, const unsigned* grid,
                                                         const unsigned* block, void** values,
                                                         uint64_t seed) {
  for (const cuda_model::Entry& entry : cuda_model::entries) {
    if (strcmp(entry.name, name) != 0) continue;
    return !cuda_model::run_grid({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, seed,
                                 entry.call, values);
  }
  cuda_model::machine.error = "no such kernel";
  return 1;
}

// Bytes of argument `index` of a kernel, or 0 where it has no such argument.
__attribute__((visibility("default"))) size_t model_argument_bytes(const char* name, size_t index) {
  for (const cuda_model::Entry& entry : cuda_model::entries) {
    if (strcmp(entry.name, name) == 0) return index < entry.num_arguments ? entry.sizes[index] : 0;
  }
  return 0;
}

__attribute__((visibility("default"))) const char* model_message() { return cuda_model::machine.error; }
__attribute__((visibility("default"))) uint64_t model_fault() { return cuda_model::machine.fault; }

}  // extern "C"
