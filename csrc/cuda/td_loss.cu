// The ops on CUDA. Their schemas are in dqn_fused/_ops.py; nothing here synchronises or looks at a value on the host.
//
// Small (few actions, or columns that are not contiguous): forward_kernel does everything, and one block of it is the
// whole launch. Large: row_max_kernel reads next_q 16 bytes at a time, a warp for each row and range of columns, and
// forward_kernel finishes its (rows, splits) maxima; backward_kernel stores the gradient 16 bytes at a time.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>

#include "../tensors.h"
#include "kernels.cuh"

namespace dqn_fused::cuda {
namespace {

constexpr int64_t NARROW = 64;            // up to so many actions a row is read element by element
constexpr int64_t SINGLE_COLUMNS = 4096;  // of a strided row, such as the partial maxima of a split, for one block
constexpr int64_t LANE_COLUMNS = 4;       // loads in flight a lane, there
constexpr int64_t SINGLE_ROUNDS = 8;      // rows that a group of lanes takes in turn before a second launch is cheaper
constexpr int64_t ROUNDS = 2;             // and where several blocks share the work
constexpr int64_t WARPS = 16 * 1024;      // fill any GPU: the 132 multiprocessors of an H200 hold 8,448
constexpr int64_t MIN_CHUNK = 2048;       // columns of a split, at least: 8 vectors of 16 bytes a lane and more

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

unsigned grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "too many elements for one launch: ", blocks,
                  " blocks");
  return static_cast<unsigned>(blocks);
}

template <class T, class Stored>
void launch_row_max(const Tensor& partial, const Batch& b, int64_t splits, int64_t chunk, cudaStream_t stream) {
  const int64_t blocks = ceil_div(b.next_q.rows * splits, THREADS / WARP);
  row_max_kernel<T, Stored>
      <<<grid(blocks), THREADS, 0, stream>>>(static_cast<T*>(partial.mutable_data_ptr()), b, splits, chunk);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T>
void launch_backward(const Tensor& grad_q, const T* grad_loss, const T* td, const Column& actions, int64_t n, int64_t A,
                     int64_t reduction, cudaStream_t stream) {
  const int64_t size = n * A, count = reduction == MEAN ? n : 1;
  if (size == 0) return;
  const auto launch = [&](auto* out) {
    using Stored = std::remove_pointer_t<decltype(out)>;
    const int64_t blocks = ceil_div(size, THREADS * Vector<Stored>::SIZE);
    backward_kernel<T, Stored>
        <<<grid(blocks), THREADS, 0, stream>>>(out, grad_loss, td, actions, A, size, reduction == NONE, count);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  void* const out = grad_q.mutable_data_ptr();
  if constexpr (std::is_same_v<T, double>) {
    launch(static_cast<double*>(out));
  } else {
    switch (grad_q.scalar_type()) {
      case ScalarType::Half:
        return launch(static_cast<Half*>(out));
      case ScalarType::BFloat16:
        return launch(static_cast<BFloat16*>(out));
      default:
        return launch(static_cast<float*>(out));
    }
  }
}

// Calls f with a null pointer of the type that x is stored as.
template <class F>
void dispatch(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

// How many next rows there are up to each sample: its own is one less.
Tensor running_count(const Tensor& mask) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(mask), torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct Outputs {
  Tensor loss, td;
  std::optional<Tensor> grad_q;
};

template <class T>
Outputs forward(Batch b, const Tensor& q, const std::optional<Tensor>& mask, int64_t reduction, bool with_grad,
                ScalarType type) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  Outputs out{empty_loss(reduction, b, type, q), empty({b.n}, type, q), std::nullopt};
  if (with_grad) out.grad_q = empty({b.n, b.q.A}, b.q.values.type, q);
  std::optional<Tensor> rank, row_maxima, sums;
  if (b.compacted) rank = running_count(*mask);
  T* const td = static_cast<T*>(out.td.mutable_data_ptr());

  const bool wide = b.next_q.stride_action == 1 && b.next_q.A > NARROW;
  if (wide && b.next_q.rows > 0) {
    const int64_t rows = b.next_q.rows, A = b.next_q.A;
    const int64_t most = std::min(ceil_div(A, MIN_CHUNK), ceil_div(WARPS, rows));
    const int64_t chunk = ceil_div(ceil_div(A, most), MIN_CHUNK) * MIN_CHUNK, splits = ceil_div(A, chunk);
    row_maxima = empty({rows, splits}, type, q);
    dispatch(b.next_q.values.type, [&](auto* stored) {
      launch_row_max<T, std::remove_pointer_t<decltype(stored)>>(*row_maxima, b, splits, chunk, stream);
    });
    b.next_q = matrix("next_q", *row_maxima, Place(q));
  }

  int lanes = 1;
  while (lanes < WARP && lanes * LANE_COLUMNS < b.next_q.A) lanes *= 2;
  const int64_t groups = FORWARD_THREADS / lanes;
  const bool single = b.n <= groups * SINGLE_ROUNDS && b.next_q.A <= SINGLE_COLUMNS;
  const int64_t block_rows = groups * (single ? SINGLE_ROUNDS : ROUNDS);
  const int64_t blocks = std::max<int64_t>(1, ceil_div(b.n, block_rows));
  const int64_t count = reduction == MEAN ? b.n : 1;
  T* loss = static_cast<T*>(out.loss.mutable_data_ptr());
  if (reduction != NONE && blocks > 1) {
    sums = empty({blocks}, type, q);
    loss = static_cast<T*>(sums->mutable_data_ptr());
  }
  // Wide rows of the gradient are left to the dense store of backward_kernel.
  const bool fused_grad = with_grad && b.q.A <= NARROW;
  if (b.n > 0 || reduction != NONE) {
    dispatch(b.next_q.values.type, [&](auto* stored) {
      forward_kernel<T, std::remove_pointer_t<decltype(stored)>><<<grid(blocks), FORWARD_THREADS, 0, stream>>>(
          loss, td, fused_grad ? out.grad_q->mutable_data_ptr() : nullptr, b,
          rank ? static_cast<const int64_t*>(rank->const_data_ptr()) : nullptr, lanes, block_rows, reduction,
          blocks > 1 ? 1 : count, count);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  if (sums) {
    sum_kernel<T><<<1, FORWARD_THREADS, 0, stream>>>(static_cast<T*>(out.loss.mutable_data_ptr()), loss, blocks, count);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (with_grad && !fused_grad) {
    launch_backward<T>(*out.grad_q, nullptr, td, b.actions, b.n, b.q.A, reduction, stream);
  }
  return out;
}

Outputs forward(const Batch& b, const Tensor& q, const std::optional<Tensor>& mask, int64_t reduction, bool with_grad) {
  const ScalarType type = accumulation_type(b.q.values.type);
  return type == ScalarType::Double ? forward<double>(b, q, mask, reduction, with_grad, type)
                                    : forward<float>(b, q, mask, reduction, with_grad, type);
}

// check is the CPU's: looking at a value would cost a synchronisation.
std::tuple<Tensor, Tensor> td_loss(const Tensor& q, const Tensor& actions, const Tensor& rewards, const Tensor& next_q,
                                   const std::optional<Tensor>& terminated, const std::optional<Tensor>& non_final_mask,
                                   const std::optional<Tensor>& gammas, double gamma, int64_t reduction, bool) {
  const Batch b = batch(q, actions, rewards, &next_q, terminated, non_final_mask, gammas, gamma);
  Outputs out = forward(b, q, non_final_mask, reduction, false);
  return {std::move(out.loss), std::move(out.td)};
}

std::tuple<Tensor, Tensor, Tensor> td_loss_and_grad(const Tensor& q, const Tensor& actions, const Tensor& rewards,
                                                    const Tensor& next_q, const std::optional<Tensor>& terminated,
                                                    const std::optional<Tensor>& non_final_mask,
                                                    const std::optional<Tensor>& gammas, double gamma,
                                                    int64_t reduction, bool) {
  const Batch b = batch(q, actions, rewards, &next_q, terminated, non_final_mask, gammas, gamma);
  Outputs out = forward(b, q, non_final_mask, reduction, true);
  return {std::move(out.loss), std::move(*out.grad_q), std::move(out.td)};
}

Tensor td_loss_backward(const Tensor& grad_loss, const Tensor& td, const Tensor& actions, int64_t A, ScalarType type,
                        int64_t reduction) {
  const Saved given = saved(grad_loss, td, actions, A, type, reduction);
  const torch::stable::accelerator::DeviceGuard guard(td.get_device_index());
  const cudaStream_t stream = current_stream(td);
  const int64_t n = td.numel();
  Tensor grad_q = empty({n, A}, type, td);
  if (type == ScalarType::Double) {
    launch_backward(grad_q, static_cast<const double*>(grad_loss.const_data_ptr()),
                    static_cast<const double*>(td.const_data_ptr()), given.actions, n, A, reduction, stream);
  } else {
    launch_backward(grad_q, static_cast<const float*>(grad_loss.const_data_ptr()),
                    static_cast<const float*>(td.const_data_ptr()), given.actions, n, A, reduction, stream);
  }
  return grad_q;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dqn_fused, CUDA, m) {
  m.impl("td_loss", TORCH_BOX(&td_loss));
  m.impl("td_loss_backward", TORCH_BOX(&td_loss_backward));
  m.impl("td_loss_and_grad", TORCH_BOX(&td_loss_and_grad));
}

}  // namespace dqn_fused::cuda
