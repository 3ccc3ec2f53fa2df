// What an operation takes from the workspace.
#pragma once

#include "../blocks.h"
#include "memory.h"

namespace localr1 {

// Adds up what an operation takes from the workspace, then hands it out.
class Plan {
 public:
  template <class T>
  void add(int64_t count) {
    bytes_ += Workspace::size_of<T>(count);
  }
  void add_activations(int64_t tokens, int64_t columns) {
    add<int8_t>(tokens * columns);
    add<float>(tokens * (columns / kGroup));
    add<int32_t>(tokens * (columns / kGroup));
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

inline Activations take_activations(Workspace& workspace, int64_t tokens, int64_t columns) {
  const int64_t groups = columns / kGroup;
  Activations a;
  a.q = workspace.take<int8_t>(tokens * columns);
  a.scale = workspace.take<float>(tokens * groups);
  a.offset = workspace.take<int32_t>(tokens * groups);
  a.tokens = tokens;
  a.groups = groups;
  return a;
}

}  // namespace localr1
