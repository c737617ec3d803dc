// exp(x) for x <= 0, written so that a loop over it vectorises without -ffast-math.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "versions.h"

namespace dqn_fused::cpu {

DQN_FUSED_INLINE uint32_t bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

DQN_FUSED_INLINE float from_bits(uint32_t x) {
  float y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// x = n * log(2) + r, |r| <= log(2) / 2, and 2^n p(r).
struct Reduced {
  float shifted, r;

  DQN_FUSED_INLINE explicit Reduced(float x) {
    constexpr float ROUND = 12582912;  // 1.5 * 2^23: what is added to it is rounded to an integer, its lowest bits
    shifted = x * 1.44269504088896341f + ROUND;
    const float n = shifted - ROUND;
    r = x - n * 0.693359375f + n * 2.12194440e-4f;
  }

  DQN_FUSED_INLINE float scaled(float p) const { return from_bits(bits(p) + (bits(shifted) << 23)); }
};

// p is the polynomial of Cephes' expf: 1.01 ulp from -87 to 0, a third of all floats tried. 1 at 0; 0 below -87, where
// the result is about to leave the normal numbers. x must not be NaN.
DQN_FUSED_INLINE float exponential(float x) {
  const Reduced reduced(x);
  const float r = reduced.r;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1;
  const uint32_t keep =
      -static_cast<uint32_t>(x >= -87.0f);  // a choice between floats would not vectorise before AVX-512
  return from_bits(bits(reduced.scaled(p)) & keep);
}

// exp(x) for |x| <= 87 by a shorter polynomial, fitted to exp on |r| <= log(2) / 2: 2.5 ulp for
// 1e-6 <= |x| <= 40, all floats tried. 1 at 0.
DQN_FUSED_INLINE float short_exponential(float x) {
  const Reduced reduced(x);
  const float r = reduced.r;
  float p = 8.3125013e-3f;
  p = p * r + 4.1890332e-2f;
  p = p * r + 1.6667115e-1f;
  p = p * r + 4.9999230e-1f;
  p = p * r + 1;
  p = p * r + 1;
  return reduced.scaled(p);
}

DQN_FUSED_INLINE double exponential(double x) { return std::exp(x); }

}  // namespace dqn_fused::cpu
