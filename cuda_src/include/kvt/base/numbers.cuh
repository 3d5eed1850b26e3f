// Constants of floating-point arithmetic.
#pragma once

namespace kvt {

#define kInfinity __int_as_float(0x7F800000)  // NVRTC has no constant for it
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

}  // namespace kvt
