#include "pairs.h"

#include <cmath>

#include "formats.h"

namespace dqn_fused::cpu {
namespace {

constexpr int64_t LANES = 32;  // partial sums of a mean

template <class Stored>
struct MeanOf {
  using T = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

  DQN_FUSED_INLINE static double run(const Row& row) {
    const Stored* const x = static_cast<const Stored*>(row.values);
    T lanes[LANES] = {};
    int64_t first = 0;
    for (; first + LANES <= row.n; first += LANES) {
      if (row.stride == 1) {
        for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += widen<T>(x[first + lane]);
      } else {
        for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += widen<T>(x[(first + lane) * row.stride]);
      }
    }
    double total = 0;
    for (int64_t j = first; j < row.n; ++j) total += widen<T>(x[j * row.stride]);
    if (first > 0) {
      for (const T lane : lanes) total += lane;
    }
    return total / static_cast<double>(row.n);
  }
};

template <class Stored, class T>
struct AffineOf {
  DQN_FUSED_INLINE static void run(const Row& row, T offset, T factor, T* __restrict out) {
    const Stored* const x = static_cast<const Stored*>(row.values);
    if (row.stride == 1) {
      for (int64_t j = 0; j < row.n; ++j) out[j] = offset + factor * widen<T>(x[j]);
    } else {
      for (int64_t j = 0; j < row.n; ++j) out[j] = offset + factor * widen<T>(x[j * row.stride]);
    }
  }
};

// Values are chosen as integers, since a choice between floats does not vectorise before AVX-512: magnitudes of floats
// are ordered as integers are, and a mask of the sign bit chooses the weight. PLAIN is for kappa 0.
template <class T, bool PLAIN>
struct PairsOf {
  using Bits = typename FormatOf<T>::Bits;
  static constexpr Bits MAGNITUDE = FormatOf<T>::MAGNITUDE;

  DQN_FUSED_INLINE static Bits to_bits(T x) {
    Bits y;
    std::memcpy(&y, &x, sizeof y);
    return y;
  }

  DQN_FUSED_INLINE static T of_bits(Bits x) {
    T y;
    std::memcpy(&y, &x, sizeof y);
    return y;
  }

  DQN_FUSED_INLINE static void run(const T* __restrict predicted, const T* __restrict above, const T* __restrict below,
                                   int64_t padded, const T* __restrict target, int64_t n, T kappa, T* __restrict losses,
                                   T* __restrict slopes) {
    const T inverse = std::min(1 / kappa, std::numeric_limits<T>::max()), half = kappa / 2;
    const Bits one = to_bits(T(1));
    for (int64_t first = 0; first < padded; first += PAIR_WIDTH) {
      T x[PAIR_WIDTH], loss[PAIR_WIDTH] = {}, slope[PAIR_WIDTH] = {};
      Bits positive[PAIR_WIDTH], either[PAIR_WIDTH];  // weight of d > 0, and how the bits of that of -d differ
      for (int64_t lane = 0; lane < PAIR_WIDTH; ++lane) {
        x[lane] = predicted[first + lane];
        positive[lane] = to_bits(above[first + lane]);
        either[lane] = positive[lane] ^ to_bits(-below[first + lane]);
      }
      for (int64_t j = 0; j < n; ++j) {
        const T t = target[j];
        for (int64_t lane = 0; lane < PAIR_WIDTH; ++lane) {
          const T d = x[lane] - t;
          const Bits sign = to_bits(d) >> (8 * sizeof(T) - 1), size = to_bits(d) & MAGNITUDE;
          const T weight = of_bits(positive[lane] ^ (either[lane] & sign));  // with the sign of d
          // huber(d) / kappa is part * (size - kappa / 2 * part), its derivative is part.
          Bits part;
          if (PLAIN) {
            part = -static_cast<Bits>(size != 0) & one;
          } else {
            part = to_bits(of_bits(size) * inverse);
            part = part < one ? part : one;
          }
          const T step = weight * of_bits(part);
          slope[lane] += step;
          loss[lane] += of_bits(to_bits(step) & MAGNITUDE) * (of_bits(size) - half * of_bits(part));
        }
      }
      for (int64_t lane = 0; lane < PAIR_WIDTH; ++lane) {
        losses[first + lane] = loss[lane];
        slopes[first + lane] = loss[lane] != loss[lane] ? loss[lane] : slope[lane];  // part of NaN is 1
      }
    }
  }
};

}  // namespace

Mean mean_of(ScalarType type) {
  return dispatch(type, [](auto stored) -> Mean { return fastest<MeanOf<decltype(stored)>>(); });
}

template <class T>
Affine<T> affine(ScalarType type) {
  return dispatch(type, [](auto stored) -> Affine<T> { return fastest<AffineOf<decltype(stored), T>>(); });
}

template <class T>
Pairs<T> pairs(double kappa) {
  return kappa > 0 ? fastest<PairsOf<T, false>>() : fastest<PairsOf<T, true>>();
}

template Affine<float> affine(ScalarType);
template Affine<double> affine(ScalarType);
template Pairs<float> pairs(double);
template Pairs<double> pairs(double);

}  // namespace dqn_fused::cpu
