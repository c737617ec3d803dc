// From tensors of the stable ABI to the structures of td_loss.h. The errors are short: the caller then asks
// dqn_fused/arguments.py, which names the argument, what was expected and what came.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "td_loss.h"

namespace dqn_fused {

using torch::stable::Tensor;

inline bool floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline bool integer(ScalarType type) {
  return type == ScalarType::Long || type == ScalarType::Int || type == ScalarType::Short || type == ScalarType::Char ||
         type == ScalarType::Byte || type == ScalarType::UInt16 || type == ScalarType::UInt32 ||
         type == ScalarType::UInt64;
}

inline ScalarType accumulation_type(ScalarType q) { return q == ScalarType::Double ? q : ScalarType::Float; }

inline void fits(bool condition, const char* name) {
  STD_TORCH_CHECK(condition, name, ": its shape, dtype or device does not fit q; see dqn_fused.fused_dqn_loss");
}

inline int32_t device_type(const Tensor& x) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  return type;
}

// Sizes and strides; sizes() and strides() would each ask for the number of dimensions again.
struct Layout {
  int64_t dim = 0;
  int64_t *size = nullptr, *stride = nullptr;

  explicit Layout(const Tensor& x) : dim(x.dim()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x.get(), &size));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x.get(), &stride));
  }
};

// The device on which the tensors must be.
struct Place {
  int32_t type;
  int32_t index;

  explicit Place(const Tensor& x) : type(device_type(x)), index(x.get_device_index()) {}
  bool holds(const Tensor& x) const { return device_type(x) == type && (index < 0 || x.get_device_index() == index); }
};

// (n,) or (n, 1); the caller checks the dtype.
inline Column column(const char* name, const Tensor& x, int64_t n, const Place& place) {
  const Layout layout(x);
  fits(place.holds(x) && layout.dim >= 1 && layout.size[0] == n &&
           (layout.dim == 1 || (layout.dim == 2 && layout.size[1] == 1)),
       name);
  return {x.const_data_ptr(), x.scalar_type(), layout.stride[0]};
}

// (rows, A) or (outer, inner, A) of floats, or of flags.
inline Matrix matrix(const char* name, const Tensor& x, const Place& place, bool flags = false) {
  const auto [dim, size, stride] = Layout(x);
  const Column values{x.const_data_ptr(), x.scalar_type()};
  fits(place.holds(x) && (flags ? values.type == ScalarType::Bool : floating(values.type)) && (dim == 2 || dim == 3) &&
           size[dim - 1] > 0,
       name);
  if (dim == 2) return {values, size[0], size[1], size[0], 0, stride[0], stride[1]};
  return {values, size[0] * size[1], size[2], size[1], stride[0], stride[1], stride[2]};
}

// A matrix that goes with another, if it is given; `allowed` says whether the options have a use for it.
inline Matrix beside(const Matrix& other, const char* name, const std::optional<Tensor>& x, const Place& place,
                     bool flags, bool allowed) {
  if (!x) return {};
  const Matrix found = matrix(name, *x, place, flags);
  fits(allowed && found.rows == other.rows && found.A == other.A, name);
  return found;
}

// The columns of the b.n samples, without the weights. `next` says whether there are next values.
inline void columns(Batch& b, const Place& place, bool next, const Tensor& actions, const Tensor& rewards,
                    const std::optional<Tensor>& terminated, const std::optional<Tensor>& non_final_mask,
                    const std::optional<Tensor>& gammas, double gamma) {
  b.actions = column("actions", actions, b.n, place);
  fits(integer(b.actions.type), "actions");
  b.rewards = column("rewards", rewards, b.n, place);
  fits(integer(b.rewards.type) || floating(b.rewards.type), "rewards");
  b.discount = gamma;
  b.compacted = non_final_mask.has_value();
  fits(next || (!terminated && !b.compacted && !gammas), "next_q");
  if (b.compacted) {
    b.final = column("non_final_mask", *non_final_mask, b.n, place);
    fits(b.final.type == ScalarType::Bool && !terminated, "non_final_mask");
  } else if (terminated) {
    b.final = column("terminated", *terminated, b.n, place);
    fits(b.final.type == ScalarType::Bool || integer(b.final.type) || floating(b.final.type), "terminated");
  }
  if (gammas) {
    if (gammas->dim() == 0) {
      fits(place.holds(*gammas), "gamma");
      b.discounts = {gammas->const_data_ptr(), gammas->scalar_type(), 0};
    } else {
      b.discounts = column("gamma", *gammas, b.n, place);
    }
    fits(floating(b.discounts.type), "gamma");
  }
}

// A batch as an op is given it. A matrix for which the options have no use is not ignored but refused, as by
// check_batch.
inline Batch batch(const Options& options, const Tensor& q, const Tensor& actions, const Tensor& rewards,
                   const std::optional<Tensor>& next_q, const std::optional<Tensor>& terminated,
                   const std::optional<Tensor>& non_final_mask, const std::optional<Tensor>& gammas, double gamma,
                   const std::optional<Tensor>& next_q_online, const std::optional<Tensor>& next_action_mask,
                   const std::optional<Tensor>& weights, const std::optional<Tensor>& target_q,
                   const std::optional<Tensor>& action_mask) {
  const Place place(q);
  const bool next = next_q.has_value(), munchausen = options.target == MUNCHAUSEN;
  Batch b;
  b.q = matrix("q", q, place);
  b.n = b.q.rows;
  columns(b, place, next, actions, rewards, terminated, non_final_mask, gammas, gamma);
  if (next) {
    b.next_q = matrix("next_q", *next_q, place);
    fits(b.next_q.A == b.q.A && (b.compacted ? b.next_q.rows <= b.n : b.next_q.rows == b.n), "next_q");
  }
  b.next_online = beside(b.next_q, "next_q_online", next_q_online, place, false, next && options.target == MAX);
  b.next_legal = beside(b.next_q, "next_action_mask", next_action_mask, place, true, next);
  b.target_q = beside(b.q, "target_q", target_q, place, false, munchausen);
  fits(munchausen == static_cast<bool>(b.target_q), "target_q");
  b.legal = beside(b.q, "action_mask", action_mask, place, true, munchausen || options.cql);
  if (weights) {
    b.weights = column("weights", *weights, b.n, place);
    fits(floating(b.weights.type), "weights");
  }
  return b;
}

// What a backward is given: q, and its mask if there was one, only with the conservative term.
struct Saved {
  Column actions, weights;
  Matrix q, legal;
  int64_t n = 0, A = 0;
};

inline Saved saved(const Options& options, const Tensor& grad_loss, const Tensor& td_error, const Tensor& actions,
                   const std::optional<Tensor>& weights, const std::optional<Tensor>& normaliser,
                   const std::optional<Tensor>& q, const std::optional<Tensor>& action_mask, int64_t A,
                   ScalarType dtype) {
  const Place place(td_error);
  Saved s;
  s.n = td_error.numel();
  s.A = A;
  s.actions = column("actions", actions, s.n, place);
  fits(integer(s.actions.type), "actions");
  fits(A > 0 && floating(dtype) && td_error.scalar_type() == accumulation_type(dtype) && td_error.is_contiguous(),
       "td_error");
  fits(place.holds(grad_loss) && grad_loss.scalar_type() == td_error.scalar_type() && grad_loss.is_contiguous() &&
           grad_loss.numel() == (options.reduction == NONE ? s.n : 1),
       "grad_loss");
  if (weights) {
    s.weights = column("weights", *weights, s.n, place);
    fits(floating(s.weights.type), "weights");
  }
  const bool dense = options.cql_alpha != 0;
  fits(dense == q.has_value() && dense == normaliser.has_value() && (dense || !action_mask), "q");
  if (!dense) return s;
  s.q = matrix("q", *q, place);
  fits(s.q.rows == s.n && s.q.A == s.A && s.q.values.type == dtype, "q");
  s.legal = beside(s.q, "action_mask", action_mask, place, true, true);
  fits(place.holds(*normaliser) && normaliser->scalar_type() == td_error.scalar_type() && normaliser->is_contiguous() &&
           normaliser->numel() == 2 * s.n,
       "normaliser");
  return s;
}

// Calls the shim itself: torch::stable::empty looks the operator up by name, which takes 1 us.
inline Tensor empty(std::initializer_list<int64_t> size, ScalarType type, const Tensor& like) {
  int64_t stride[3] = {1, 1, 1};
  for (size_t k = size.size(); k-- > 1;) stride[k - 1] = stride[k] * std::max<int64_t>(size.begin()[k], 1);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.begin(), stride,
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  device_type(like), like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty_loss(int64_t reduction, const Batch& b, ScalarType type, const Tensor& like) {
  return reduction == NONE ? empty({b.n}, type, like) : empty({}, type, like);
}

}  // namespace dqn_fused
