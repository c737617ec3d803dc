// From tensors of the stable ABI to td_loss.h's view of them. Arguments are checked in dqn_fused/arguments.py.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "td_loss.h"

namespace dqn_fused {

using torch::stable::Tensor;

inline Column column(const Tensor& x) { return {x.const_data_ptr(), x.scalar_type()}; }
inline Column column(const std::optional<Tensor>& x) { return x ? column(*x) : Column{}; }

inline Matrix matrix(const Tensor& x) {
  const auto size = x.sizes(), stride = x.strides();
  if (size.size() == 2) return {column(x), size[0], size[1], size[0], 0, stride[0], stride[1]};
  return {column(x), size[0] * size[1], size[2], size[1], stride[0], stride[1], stride[2]};
}

inline Batch batch(const Tensor& q, const Tensor& actions, const Tensor& rewards, const Tensor& next_q,
                   const std::optional<Tensor>& terminated, const std::optional<Tensor>& non_final_mask,
                   const std::optional<Tensor>& gammas, double gamma) {
  Batch b;
  b.q = matrix(q);
  b.next_q = matrix(next_q);
  b.actions = column(actions);
  b.rewards = column(rewards);
  b.compacted = non_final_mask.has_value();
  b.final = column(b.compacted ? non_final_mask : terminated);
  b.n = b.q.rows;
  b.discounts = column(gammas);
  b.discount_stride = gammas && gammas->dim() == 1;
  b.discount = gamma;
  return b;
}

inline ScalarType accumulation_type(ScalarType q) { return q == ScalarType::Double ? q : ScalarType::Float; }

// The shim itself: torch::stable::empty looks the operator up by name, 1 us a tensor.
inline Tensor empty(std::initializer_list<int64_t> size, ScalarType type, const Tensor& like) {
  int64_t stride[2] = {1, 1};
  if (size.size() == 2) stride[0] = std::max<int64_t>(size.begin()[1], 1);
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.begin(), stride,
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty_loss(int64_t reduction, const Batch& b, ScalarType type, const Tensor& like) {
  return reduction == NONE ? empty({b.n}, type, like) : empty({}, type, like);
}

}  // namespace dqn_fused
