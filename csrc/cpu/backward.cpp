#include <cmath>
#include <cstring>
#include <type_traits>

#include "columns.h"
#include "exponential.h"
#include "loss.h"
#include "parallel.h"
#include "rows.h"

namespace dqn_fused::cpu {
namespace {

// Elements that are cleared at once: they are still in the second-level cache when the actions are set, and enough for
// memset not to read what it overwrites: 16 MiB took 310 us this way, and 430 us in pieces of 16 KiB.
constexpr int64_t SEGMENT = 1 << 17;

template <class T, class Out>
struct Writer : Gradient<T> {
  using Gradient<T>::saved, Gradient<T>::options, Gradient<T>::grad_loss, Gradient<T>::td, Gradient<T>::normaliser;
  Out* const out = static_cast<Out*>(this->grad_q);
  const WritePolicy policy = cpu::write_policy(this->type);

  // A slope times the factors of a row's gradient.
  T scaled(int64_t i, T slope) const {
    const T upstream = grad_loss == nullptr ? T(1) : grad_loss[options.reduction == NONE ? i : 0];
    return dqn_fused::scaled(slope, upstream, saved.weights, i, options.reduction == MEAN ? saved.n : 1);
  }

  bool may_take(int64_t i, int64_t action) const { return !saved.legal || saved.legal.template at<bool>(i, action); }

  SoftValue<T> sum_of(int64_t i) const { return {normaliser[i], normaliser[saved.n + i]}; }

  // Columns [first, first + n) of row i: the policy of the conservative term.
  void write_policy(int64_t i, int64_t first, int64_t n, T coefficient) const {
    Out* const to = out + i * saved.A + first;
    const SoftValue<T> sum = sum_of(i);
    if (std::isfinite(sum.largest)) {
      policy(row_of(saved.q, saved.legal, i, first, n), sum.largest, sum.rest, coefficient, to);
    } else {
      for (int64_t j = 0; j < n; ++j) to[j] = static_cast<Out>(may_take(i, first + j) ? NOT_A_NUMBER<T> : T(0));
    }
  }

  T policy_of(int64_t i, int64_t action) const {
    if (!may_take(i, action)) return 0;
    const SoftValue<T> sum = sum_of(i);
    return std::isfinite(sum.largest) ? exponential(sum.log_policy(saved.q.template at<T>(i, action)))
                                      : NOT_A_NUMBER<T>;
  }

  // As scaled(loss_slope(td)) row by row, in loops that vectorise.
  void scaled_slopes(int64_t row, int64_t n, T* __restrict slopes) const {
    const Options o = options;
    const bool each = grad_loss != nullptr && o.reduction == NONE;
    const T upstream = grad_loss == nullptr || each ? T(1) : *grad_loss;
    const T divisor = o.reduction == MEAN ? static_cast<T>(saved.n) : T(1);
    for (int64_t i = 0; i < n; ++i) slopes[i] = loss_slope(o, td[row + i]);
    for (int64_t i = 0; i < n; ++i) slopes[i] *= each ? grad_loss[row + i] : upstream;
    if (saved.weights) {
      T weights[MOST_ROWS];
      read(saved.weights, row, n, weights);
      for (int64_t i = 0; i < n; ++i) slopes[i] *= weights[i];
    }
    for (int64_t i = 0; i < n; ++i) slopes[i] /= divisor;
  }

  // Zeros except at the actions taken. Ranges are flat, here and below, so that threads share one long row, too.
  void sparse(int64_t begin, int64_t end) const {
    const int64_t A = saved.A, group = std::clamp<int64_t>(SEGMENT / A, 1, MOST_ROWS);
    int64_t actions[MOST_ROWS];
    T slopes[MOST_ROWS];
    for (int64_t row = begin / A; row * A < end; row += group) {
      const int64_t n = std::min(group, saved.n - row), from = std::max(begin, row * A),
                    to = std::min(end, (row + n) * A);
      std::memset(static_cast<void*>(out + from), 0, (to - from) * sizeof(Out));
      read(saved.actions, row, n, actions);
      scaled_slopes(row, n, slopes);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t here = (row + i) * A + actions[i];
        if (legal(actions[i], A) && here >= from && here < to) out[here] = static_cast<Out>(slopes[i]);
      }
    }
  }

  void dense(int64_t begin, int64_t end) const {
    const T alpha = static_cast<T>(options.cql_alpha);
    for (int64_t i = begin / saved.A; i * saved.A < end; ++i) {
      const int64_t start = i * saved.A, from = std::max(begin, start), to = std::min(end, start + saved.A);
      const int64_t action = saved.actions.template at<int64_t>(i);
      if (!legal(action, saved.A)) {
        std::memset(static_cast<void*>(out + from), 0, (to - from) * sizeof(Out));
        continue;
      }
      write_policy(i, from - start, to - from, scaled(i, alpha));
      if (start + action < from || start + action >= to) continue;
      const T slope = slope_by_q(options, true, loss_slope(options, td[i]), policy_of(i, action));
      out[start + action] = static_cast<Out>(scaled(i, slope));
    }
  }
};

}  // namespace

template <class T>
void Gradient<T>::write(int64_t begin, int64_t end) const {
  const auto write_as = [&](auto stored) {
    const Writer<T, decltype(stored)> writer{*this};
    options.cql_alpha != 0 ? writer.dense(begin, end) : writer.sparse(begin, end);
  };
  if constexpr (std::is_same_v<T, double>) {
    write_as(double());
  } else {
    type == ScalarType::Half       ? write_as(Half())
    : type == ScalarType::BFloat16 ? write_as(BFloat16())
                                   : write_as(float());
  }
}

template <class T>
void Gradient<T>::write() const {
  for_each_block(saved.n * saved.A, cost(), [&](int64_t begin, int64_t end) { write(begin, end); });
}

template struct Gradient<float>;
template struct Gradient<double>;

}  // namespace dqn_fused::cpu
