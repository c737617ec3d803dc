// The backward of a loss of distributions: one dense store.

#include "distributions.h"

#include <torch/csrc/stable/library.h>

#include "formats.h"

namespace dqn_fused::cpu {
namespace {

template <class T, class Out>
void write(const Tensor& grad_loss, const Tensor& slopes, const Saved& s, int64_t K, int64_t reduction,
           const Tensor& grad) {
  const T *const upstream = static_cast<const T*>(grad_loss.const_data_ptr()), *const rows = static_cast<const T*>(
                                                                                   slopes.const_data_ptr());
  Out* const out = static_cast<Out*>(grad.mutable_data_ptr());
  for_each_block(s.n, s.A * K, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T factor =
          scaled(T(1), upstream[reduction == NONE ? i : 0], s.weights, i, reduction == MEAN ? s.n : int64_t(1));
      write_gradient(out + i * s.A * K, s.A, K, s.actions.at<int64_t>(i), factor, rows + i * K);
    }
  });
}

Tensor rows_backward(const Tensor& grad_loss, const Tensor& slopes, const Tensor& actions,
                     const std::optional<Tensor>& weights, int64_t A, ScalarType type, int64_t reduction) {
  const Place place(slopes);
  fits(slopes.dim() == 2 && slopes.is_contiguous() && A > 0 && floating(type) &&
           slopes.scalar_type() == accumulation_type(type),
       "slopes");
  Saved s;
  s.n = slopes.size(0);
  s.A = A;
  s.actions = column("actions", actions, s.n, place);
  fits(integer(s.actions.type), "actions");
  if (weights) {
    s.weights = column("weights", *weights, s.n, place);
    fits(floating(s.weights.type), "weights");
  }
  fits(place.holds(grad_loss) && grad_loss.scalar_type() == slopes.scalar_type() && grad_loss.is_contiguous() &&
           grad_loss.numel() == (reduction == NONE ? s.n : 1),
       "grad_loss");
  const int64_t K = slopes.size(1);
  const Tensor grad = empty({s.n, A, K}, type, slopes);
  dispatch(type, [&](auto stored) {
    using Out = decltype(stored);
    write<std::conditional_t<std::is_same_v<Out, double>, double, float>, Out>(grad_loss, slopes, s, K, reduction,
                                                                               grad);
  });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dqn_fused, CPU, m) { m.impl("rows_backward", TORCH_BOX(&rows_backward)); }

}  // namespace dqn_fused::cpu
