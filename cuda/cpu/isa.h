// Which kernel tables this processor and operating system can run.
#pragma once

#include <vector>

#include "kernels.h"

namespace localr1 {

// Best first; the generic table is always there and last.
std::vector<const KernelTable*> available_tables();

}  // namespace localr1
