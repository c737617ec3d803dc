#include <cmath>
#include <cstring>
#include <type_traits>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include "exponential.h"
#include "loss.h"
#include "parallel.h"
#include "rows.h"

namespace dqn_fused::cpu {
namespace {

// From 32 MiB on glibc maps every allocation afresh, and page faults are most of the time of writing it: 125 MiB took
// 84 ms, and 28 ms in huge pages. Smaller ones are recycled, and it made no difference.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 2 << 20;
  if (bytes < 32 << 20) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class T, class Out>
struct Gradient {
  const Saved& saved;
  const Options& options;
  const T *grad_loss, *td, *normaliser;
  Out* grad_q;
  WritePolicy policy;

  // What the gradient of a row's loss is multiplied by.
  T scaled(int64_t i, T slope) const {
    const T upstream = grad_loss == nullptr ? T(1) : grad_loss[options.reduction == NONE ? i : 0];
    return dqn_fused::scaled(slope, upstream, saved.weights, i, options.reduction == MEAN ? saved.n : 1);
  }

  bool may_take(int64_t i, int64_t action) const { return !saved.legal || saved.legal.template at<bool>(i, action); }

  SoftValue<T> sum_of(int64_t i) const { return {normaliser[i], normaliser[saved.n + i]}; }

  // Columns [first, first + n) of row i: the policy of the conservative term.
  void write_policy(int64_t i, int64_t first, int64_t n, T coefficient) const {
    Out* const out = grad_q + i * saved.A + first;
    const SoftValue<T> sum = sum_of(i);
    if (std::isfinite(sum.largest)) {
      policy(row_of(saved.q, saved.legal, i, first, n), sum.largest, sum.rest, coefficient, out);
    } else {
      for (int64_t j = 0; j < n; ++j) out[j] = static_cast<Out>(may_take(i, first + j) ? NOT_A_NUMBER<T> : T(0));
    }
  }

  T policy_of(int64_t i, int64_t action) const {
    if (!may_take(i, action)) return 0;
    const SoftValue<T> sum = sum_of(i);
    return std::isfinite(sum.largest) ? exponential(sum.log_policy(saved.q.template at<T>(i, action)))
                                      : NOT_A_NUMBER<T>;
  }

  // Zeros but for the actions taken. Flat ranges, here and below, so that one long row is shared by the threads too.
  void sparse(int64_t begin, int64_t end) const {
    std::memset(static_cast<void*>(grad_q + begin), 0, (end - begin) * sizeof(Out));
    for (int64_t i = begin / saved.A; i * saved.A < end; ++i) {
      const int64_t action = saved.actions.at<int64_t>(i);
      if (!legal(action, saved.A)) continue;
      const int64_t here = i * saved.A + action;
      if (here >= begin && here < end) grad_q[here] = static_cast<Out>(scaled(i, loss_slope(options, td[i])));
    }
  }

  void dense(int64_t begin, int64_t end) const {
    const T alpha = static_cast<T>(options.cql_alpha);
    for (int64_t i = begin / saved.A; i * saved.A < end; ++i) {
      const int64_t start = i * saved.A, from = std::max(begin, start), to = std::min(end, start + saved.A);
      const int64_t action = saved.actions.at<int64_t>(i);
      if (!legal(action, saved.A)) {
        std::memset(static_cast<void*>(grad_q + from), 0, (to - from) * sizeof(Out));
        continue;
      }
      write_policy(i, from - start, to - from, scaled(i, alpha));
      if (start + action < from || start + action >= to) continue;
      const T slope = slope_by_q(options, true, loss_slope(options, td[i]), policy_of(i, action));
      grad_q[start + action] = static_cast<Out>(scaled(i, slope));
    }
  }
};

template <class T, class Out>
void write(const Saved& saved, const Options& options, const T* grad_loss, const T* td, const T* normaliser,
           const Tensor& grad_q) {
  Out* const out = static_cast<Out*>(grad_q.mutable_data_ptr());
  const bool dense = options.cql_alpha != 0;
  const int64_t size = saved.n * saved.A;
  advise_huge_pages(out, size * static_cast<int64_t>(sizeof(Out)));
  const Gradient<T, Out> gradient{saved, options, grad_loss, td, normaliser, out, write_policy(grad_q.scalar_type())};
  for_each_block(size, dense ? 8 : 1, [&](int64_t begin, int64_t end) {
    if (dense)
      gradient.dense(begin, end);
    else
      gradient.sparse(begin, end);
  });
}

}  // namespace

template <class T>
void backward(const Saved& saved, const Options& options, const T* grad_loss, const T* td, const T* normaliser,
              const Tensor& grad_q) {
  if constexpr (std::is_same_v<T, double>) {
    write<T, double>(saved, options, grad_loss, td, normaliser, grad_q);
  } else {
    switch (grad_q.scalar_type()) {
      case ScalarType::Half:
        return write<T, Half>(saved, options, grad_loss, td, normaliser, grad_q);
      case ScalarType::BFloat16:
        return write<T, BFloat16>(saved, options, grad_loss, td, normaliser, grad_q);
      default:
        return write<T, float>(saved, options, grad_loss, td, normaliser, grad_q);
    }
  }
}

template void backward(const Saved&, const Options&, const float*, const float*, const float*, const Tensor&);
template void backward(const Saved&, const Options&, const double*, const double*, const double*, const Tensor&);

}  // namespace dqn_fused::cpu
