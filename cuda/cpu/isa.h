// Which kernel tables this processor and operating system can run.
#pragma once

#include <vector>

#include "kernels.h"

namespace localr1 {

// Best first; the generic table is always there and last.
std::vector<const KernelTable*> available_tables();

#ifdef LOCALR1_X86
bool has_sse42();
#endif

}  // namespace localr1
