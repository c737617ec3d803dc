#include "atoms.h"

#include <algorithm>
#include <cmath>

#include "formats.h"

namespace dqn_fused::cpu {
namespace {

template <class T>
constexpr int64_t WIDTH = Support<T>::WIDTH;

// x if it is kept, else 0: no product, which would keep NaN, and no choice between floats, which does not vectorise
// before AVX-512.
DQN_FUSED_INLINE float keep_if(bool keep, float x) { return from_bits(bits(x) & -static_cast<uint32_t>(keep)); }

DQN_FUSED_INLINE double keep_if(bool keep, double x) { return keep ? x : 0; }

// a or b without a branch, as bits for the same reason.
DQN_FUSED_INLINE float choose(bool first, float a, float b) {
  const uint32_t mask = -static_cast<uint32_t>(first);
  return from_bits((bits(a) & mask) | (bits(b) & ~mask));
}

DQN_FUSED_INLINE double choose(bool first, double a, double b) { return first ? a : b; }

template <int64_t lanes, class T>
DQN_FUSED_INLINE T sum_of(const T* x) {
  if constexpr (lanes == 1) {
    return x[0];
  } else {
    T half[lanes / 2];
    for (int64_t lane = 0; lane < lanes / 2; ++lane) half[lane] = x[lane] + x[lane + lanes / 2];
    return sum_of<lanes / 2>(half);
  }
}

// 1 - exp(-x p(x)), where p is fitted to -log(erfc(x)) / x on [0, 4.1] by weighted least squares. The error is 2.3e-9
// and two roundings of 1. Beyond 4.1 the result is 1. x must not be NaN.
DQN_FUSED_INLINE float error_function(float x) {
  const uint32_t sign = bits(x) & 0x80000000u;
  float size = from_bits(bits(x) ^ sign);
  size = size < 4.1f ? size : 4.1f;
  float p = -8.0438240e-6f;
  p = p * size + 1.0602666e-4f;
  p = p * size - 5.8795069e-4f;
  p = p * size + 1.5767602e-3f;
  p = p * size - 5.8781545e-5f;
  p = p * size - 1.9217143e-2f;
  p = p * size + 1.0279921e-1f;
  p = p * size + 6.3661611e-1f;
  p = p * size + 1.1283793f;
  return from_bits(bits(1 - exponential(-p * size)) | sign);
}

DQN_FUSED_INLINE double error_function(double x) { return std::erf(x); }

// Evenly spaced atoms as positions 0 to K - 1. Values beyond an end are moved to it.
template <class T>
struct Positions {
  T low, high, last, per_unit;  // a division costs as much as the rest

  DQN_FUSED_INLINE explicit Positions(const Support<T>& support)
      : low(support.atoms[0]),
        high(support.atoms[support.K - 1]),
        last(static_cast<T>(support.K - 1)),
        per_unit(last / (high - low)) {}

  // value must not be NaN. The ends, where many values lie, are exact: a rounding would give a share to the atom beside
  // an end, where the prediction may have no probability.
  DQN_FUSED_INLINE T operator()(T value) const {
    const T inside = choose(value < low, low, value), position = (inside - low) * per_unit;
    return choose((value < high) & (position < last), position, last);  // && would be a branch
  }

  // The atom below, at most the last but one, so that a position on the last atom gives it everything.
  DQN_FUSED_INLINE int32_t below(T position) const {
    const int32_t index = static_cast<int32_t>(position), most = static_cast<int32_t>(last) - 1;
    return index < most ? index : most;
  }
};

// Lanes of an expectation: 16 would spill half of AVX2's registers, and K = 51 fills 7 vectors of 8 better than 4 of
// 16. The last vector overlaps the one before it, since a remainder would take longer than the rest.
constexpr int64_t LANES = 8;

template <int64_t lanes, class Key>
DQN_FUSED_INLINE Key largest_key_of(const Key* x) {
  if constexpr (lanes == 1) {
    return x[0];
  } else {
    Key half[lanes / 2];
    for (int64_t lane = 0; lane < lanes / 2; ++lane) half[lane] = std::max(x[lane], x[lane + lanes / 2]);
    return largest_key_of<lanes / 2>(half);
  }
}

// The largest of n >= LANES values, NaN if one is NaN.
template <class Stored, class T>
DQN_FUSED_INLINE T largest_of_lanes(const Stored* x, int64_t n) {
  using F = FormatOf<Stored>;
  using Key = typename F::Bits;
  const auto key = [&](int64_t j) {
    Key bits;
    std::memcpy(&bits, x + j, sizeof bits);
    return F::key(bits);
  };
  Key best[LANES];
  for (int64_t lane = 0; lane < LANES; ++lane) best[lane] = key(n - LANES + lane);
  for (int64_t j = 0; j + LANES < n; j += LANES) {
    for (int64_t lane = 0; lane < LANES; ++lane) best[lane] = std::max(best[lane], static_cast<Key>(key(j + lane)));
  }
  return F::template value<T>(largest_key_of<LANES>(best));
}

// The sums of n >= LANES powers and of their products with the atoms; power(j, lane) is that of logit j.
template <class T>
struct Sums {
  T total[LANES] = {}, weighted[LANES] = {};

  template <class Power>
  DQN_FUSED_INLINE Sums(const T* __restrict atoms, int64_t n, const Power& power) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
      for (int64_t lane = 0; lane < LANES; ++lane) {
        const T p = power(j + lane, lane);
        total[lane] += p;
        weighted[lane] += p * atoms[j + lane];
      }
    }
    if (j == n) return;
    const int32_t seen = static_cast<int32_t>(j - (n - LANES));
    for (int32_t lane = 0; lane < LANES; ++lane) {
      const T p = keep_if(lane >= seen, power(n - LANES + lane, lane));
      total[lane] += p;
      weighted[lane] += p * atoms[n - LANES + lane];
    }
  }

  DQN_FUSED_INLINE double mean() const {
    return static_cast<double>(sum_of<LANES>(weighted)) / static_cast<double>(sum_of<LANES>(total));
  }
};

// With logits and atoms of ordinary size the largest logit need not be found and subtracted first, 40 % of the time: no
// exponential times an atom, and no sum of 2^24 of them, leaves the normal numbers.
constexpr float ORDINARY_LOGIT = 40, LEAST_ATOM = 1e-12f, MOST_ATOM = 1e12f;

template <class T>
DQN_FUSED_INLINE bool ordinary_atoms(const Support<T>& support) {
  const T largest = std::max(std::abs(support.atoms[0]), std::abs(support.atoms[support.K - 1]));
  return largest >= LEAST_ATOM && largest <= MOST_ATOM;
}

// Expectation of the softmax of n >= LANES logits that lie side by side, NaN where there is none.
template <class T, class Stored>
DQN_FUSED_INLINE double expectation_of(const Stored* __restrict x, const T* __restrict atoms, int64_t n,
                                       bool ordinary) {
  if constexpr (std::is_same_v<T, float>) {
    if (ordinary) {
      int32_t size[LANES] = {};
      const Sums<T> sums(atoms, n, [&](int64_t j, int64_t lane) {
        const float logit = widen<float>(x[j]);
        size[lane] = std::max(size[lane], static_cast<int32_t>(bits(logit) & 0x7fffffffu));  // NaN is above infinity
        return short_exponential(logit);
      });
      if (largest_key_of<LANES>(size) < static_cast<int32_t>(bits(ORDINARY_LOGIT))) return sums.mean();
    }
  }
  const T largest = largest_of_lanes<Stored, T>(x, n);
  const Sums<T> sums(atoms, n, [&](int64_t j, int64_t) { return exponential(widen<T>(x[j]) - largest); });
  return std::abs(largest) < INFINITE<T> ? sums.mean() : NOT_A_NUMBER<double>;
}

template <class Stored, class T>
struct ExpectationsOf {
  DQN_FUSED_INLINE static void run(const Support<T>& support, const ActionRows& logits, double* __restrict values,
                                   T* __restrict row) {
    const int64_t K = support.K, stride = logits.first.stride;
    const Stored* x = static_cast<const Stored*>(logits.first.values);
    const bool ordinary = ordinary_atoms(support);
    for (int64_t a = 0; a < logits.A; ++a, x += logits.step) {
      if (logits.legal != nullptr && !logits.legal[a * logits.legal_stride]) continue;
      if (stride == 1 && K >= LANES) {
        values[a] = expectation_of(x, support.atoms, K, ordinary);
        continue;
      }
      for (int64_t j = 0; j < K; ++j) row[j] = widen<T>(x[j * stride]);
      for (int64_t j = K; j < support.padded; ++j) row[j] = -INFINITE<T>;
      values[a] = expectation_of(row, support.atoms, support.padded, false);  // the padding is -inf
    }
  }
};

template <class Stored, class T>
struct ExponentialsOf {
  DQN_FUSED_INLINE static Softmax<T> run(const Support<T>& support, const Row& row, T* __restrict logits,
                                         T* __restrict powers) {
    const Stored* const x = static_cast<const Stored*>(row.values);
    if (row.stride == 1) {
      for (int64_t j = 0; j < row.n; ++j) logits[j] = widen<T>(x[j]);
    } else {
      for (int64_t j = 0; j < row.n; ++j) logits[j] = widen<T>(x[j * row.stride]);
    }
    for (int64_t j = row.n; j < support.padded; ++j) logits[j] = -INFINITE<T>;
    const T largest = static_cast<T>(largest_of<T>(logits, support.padded, 1));
    if (!(std::abs(largest) < INFINITE<T>)) return {largest, NOT_A_NUMBER<T>};
    T total[WIDTH<T>] = {};
    for (int64_t j = 0; j < support.padded; j += WIDTH<T>) {
      for (int64_t lane = 0; lane < WIDTH<T>; ++lane) {
        const T power = exponential(logits[j + lane] - largest);
        powers[j + lane] = power;
        total[lane] += power;
      }
    }
    return {largest, sum_of<WIDTH<T>>(total)};
  }
};

template <class T>
DQN_FUSED_INLINE void fill(T* row, int64_t n, T value) {
  for (int64_t j = 0; j < n; ++j) row[j] = value;
}

template <class T>
struct Project {
  DQN_FUSED_INLINE static void run(const Support<T>& support, T reward, T gamma, const T* __restrict e, T total,
                                   T* __restrict target, T* __restrict scratch) {
    const int64_t K = support.K, padded = support.padded;
    T* __restrict const lower = scratch;
    T* __restrict const upper = scratch + padded;
    T* __restrict const more = scratch + 2 * padded;
    int32_t* __restrict const index = reinterpret_cast<int32_t*>(scratch + 3 * padded);
    // A location is NaN only if one at an end is not finite.
    const T first = reward + gamma * support.atoms[0], last = reward + gamma * support.atoms[K - 1];
    const bool infinite = !(std::abs(first) < INFINITE<T>) || !(std::abs(last) < INFINITE<T>);
    if (infinite || total != total) {
      for (int64_t j = 0; j < K; ++j) {
        const T location = reward + gamma * support.atoms[j];
        if (location != location || total != total) return fill(target, padded, NOT_A_NUMBER<T>);
      }
    }
    const Positions<T> positions(support);
    const T inverse = 1 / total;
    for (int64_t j = 0; j < padded; ++j) {
      const T position = positions(reward + gamma * support.atoms[j]), probability = e[j] * inverse;
      const int32_t below = positions.below(position);
      const T share = position - static_cast<T>(below);
      index[j] = below;
      lower[j] = (1 - share) * probability;
      upper[j] = share * probability;
    }
    fill(target, padded, T(0));
    fill(more, padded, T(0));
    for (int64_t j = 0; j < K; ++j) {  // two rows: one would wait for each sum before the next
      target[index[j]] += lower[j];
      more[index[j] + 1] += upper[j];
    }
    for (int64_t j = 0; j < padded; ++j) target[j] += more[j];
  }
};

template <class T>
struct TwoHot {
  DQN_FUSED_INLINE static void run(const Support<T>& support, T value, T* target) {
    if (value != value) return fill(target, support.padded, NOT_A_NUMBER<T>);
    const Positions<T> positions(support);
    const T position = positions(value);
    const int32_t below = positions.below(position);
    fill(target, support.padded, T(0));
    target[below + 1] = position - static_cast<T>(below);
    target[below] = 1 - target[below + 1];
  }
};

template <class T>
struct Gauss {
  DQN_FUSED_INLINE static void run(const Support<T>& support, T value, T scale, T* __restrict target,
                                   T* __restrict cumulative) {
    const int64_t K = support.K;
    if (value != value) return fill(target, support.padded, NOT_A_NUMBER<T>);
    const T position = Positions<T>(support)(value);
    const auto edge = [&](int32_t j) { return (static_cast<T>(j) - T(0.5) - position) * scale; };
    if (static_cast<T>(K) * scale < T(0.5)) {  // so wide that only the relative error of each counts
      for (int32_t j = 0; j <= static_cast<int32_t>(K); ++j) cumulative[j] = std::erf(edge(j));
    } else {
      for (int32_t j = 0; j <= static_cast<int32_t>(K); ++j) cumulative[j] = error_function(edge(j));
    }
    const T total = cumulative[K] - cumulative[0];
    for (int64_t j = 0; j < K; ++j) target[j] = (cumulative[j + 1] - cumulative[j]) / total;
    fill(target + K, support.padded - K, T(0));
  }
};

template <class T>
struct CrossEntropyOf {
  DQN_FUSED_INLINE static CrossEntropy<T> run(const Support<T>& support, const T* target, const T* logits, const T* e,
                                              const Softmax<T>& softmax) {
    constexpr T NONE = NOT_A_NUMBER<T>;
    if (softmax.total != softmax.total) return {NONE, NONE, NONE, NONE};
    const T log_total = std::log(softmax.total);
    T loss[WIDTH<T>] = {}, mean[WIDTH<T>] = {}, target_mean[WIDTH<T>] = {}, mass[WIDTH<T>] = {};
    for (int64_t j = 0; j < support.padded; j += WIDTH<T>) {
      for (int64_t lane = 0; lane < WIDTH<T>; ++lane) {
        const T m = target[j + lane], atom = support.atoms[j + lane];
        // Where there is no target a logit does not count, -inf included.
        loss[lane] += keep_if(m != 0, m * (log_total - (logits[j + lane] - softmax.largest)));
        mean[lane] += e[j + lane] * atom;
        target_mean[lane] += m * atom;
        mass[lane] += m;
      }
    }
    constexpr int64_t W = WIDTH<T>;
    return {sum_of<W>(loss), sum_of<W>(mean) / softmax.total, sum_of<W>(target_mean), sum_of<W>(mass)};
  }
};

template <class T>
struct Slopes {
  DQN_FUSED_INLINE static void run(const Support<T>& support, const T* __restrict target, const T* __restrict e,
                                   T total, T mass, T* __restrict slopes) {
    if (total != total) return fill(slopes, support.K, NOT_A_NUMBER<T>);
    const T factor = mass / total;
    for (int64_t j = 0; j < support.K; ++j) slopes[j] = e[j] * factor - target[j];
  }
};

}  // namespace

template <class T>
Expectations<T> expectations(ScalarType type) {
  return dispatch(type, [](auto stored) -> Expectations<T> { return fastest<ExpectationsOf<decltype(stored), T>>(); });
}

template <class T>
Exponentials<T> exponentials(ScalarType type) {
  return dispatch(type, [](auto stored) -> Exponentials<T> { return fastest<ExponentialsOf<decltype(stored), T>>(); });
}

template <class T>
AtomFunctions<T> atom_functions() {
  return {fastest<Project<T>>(), fastest<TwoHot<T>>(), fastest<Gauss<T>>(), fastest<CrossEntropyOf<T>>(),
          fastest<Slopes<T>>()};
}

template Expectations<float> expectations(ScalarType);
template Expectations<double> expectations(ScalarType);
template Exponentials<float> exponentials(ScalarType);
template Exponentials<double> exponentials(ScalarType);
template AtomFunctions<float> atom_functions();
template AtomFunctions<double> atom_functions();

}  // namespace dqn_fused::cpu
