// scalar_t: the 16-bit float that a kernel is compiled for. Macro: KVT_BF16, 0 = float16, 1 = bfloat16.
#pragma once

#include <kvt/ptx/scalar.cuh>

namespace kvt {

#if KVT_BF16
using scalar_t = ptx::BFloat16;
#else
using scalar_t = ptx::Half;
#endif

}  // namespace kvt
