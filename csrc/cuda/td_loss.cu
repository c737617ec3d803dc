// CUDA's part of the ops; nothing here synchronises or looks at a value on the host.
//
// Small (few actions, or columns that are not contiguous): forward_kernel does everything, and one block of it is the
// whole launch. Large: row_best_kernel reads Q-values 16 bytes at a time, a warp for each row and range of columns, and
// forward_kernel finishes its (rows, splits) answers; backward_kernel stores the gradient 16 bytes at a time.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <type_traits>

#include "../ops.h"
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

template <class T>
T* data(const Maybe& x) {
  return x ? static_cast<T*>(x->mutable_data_ptr()) : nullptr;
}

template <class T>
void launch_backward(const Tensor& grad_q, const T* grad_loss, const T* td, const Saved& saved, const Options& options,
                     cudaStream_t stream) {
  const int64_t size = saved.n * saved.A, count = options.reduction == MEAN ? saved.n : 1;
  if (size == 0) return;
  const auto launch = [&](auto* out) {
    using Stored = std::remove_pointer_t<decltype(out)>;
    const int64_t blocks = ceil_div(size, THREADS * Vector<Stored>::SIZE);
    backward_kernel<T, Stored><<<grid(blocks), THREADS, 0, stream>>>(out, grad_loss, td, saved.actions, saved.weights,
                                                                     options, saved.A, size, count);
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

// The best actions of ranges of columns, (rows, splits), to be chosen from in turn.
struct RowBest {
  Tensor best;
  Maybe index;

  RowBest(const Batch& b, const Choice& choice, const Tensor& like, cudaStream_t stream) {
    const int64_t rows = choice.values.rows, A = choice.values.A;
    const int64_t most = std::min(ceil_div(A, MIN_CHUNK), ceil_div(WARPS, rows));
    const int64_t chunk = ceil_div(ceil_div(A, most), MIN_CHUNK) * MIN_CHUNK, splits = ceil_div(A, chunk);
    best = empty({rows, splits}, accumulation_type(choice.values.values.type), like);
    if (b.next_online) index = empty({rows, splits}, ScalarType::Long, like);
    const unsigned blocks = grid(ceil_div(rows * splits, THREADS / WARP));
    dispatch(choice.values.values.type, [&](auto* stored) {
      using Stored = std::remove_pointer_t<decltype(stored)>;
      auto* const kernel =
          index          ? choice.legal ? row_best_kernel<Stored, true, true> : row_best_kernel<Stored, false, true>
          : choice.legal ? row_best_kernel<Stored, true, false>
                         : row_best_kernel<Stored, false, false>;
      kernel<<<blocks, THREADS, 0, stream>>>(static_cast<Wide<Stored>*>(best.mutable_data_ptr()), data<int64_t>(index),
                                             b, choice, splits, chunk);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }

  Choice choice() const {
    const Place place(best);
    return {matrix("next_q", best, place), {}, data<int64_t>(index)};
  }
};

template <class T>
Outputs forward(const Batch& b, const Options& options, const Tensor& q, const Maybe& mask, bool with_grad,
                ScalarType type) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  Outputs out{empty_loss(options.reduction, b, type, q), empty({b.n}, type, q), {}, {}};
  if (with_grad) out.grad_q = empty({b.n, b.q.A}, b.q.values.type, q);
  Maybe rank, sums;
  if (b.compacted) rank = running_count(*mask);
  T* const td = static_cast<T*>(out.td.mutable_data_ptr());

  Choice choice{b.next_online ? b.next_online : b.next_q, b.next_legal};
  std::optional<RowBest> row_best;
  const bool contiguous = choice.values.stride_action == 1 && (!choice.legal || choice.legal.stride_action == 1);
  if (contiguous && choice.values.A > NARROW && choice.values.rows > 0) {
    row_best.emplace(b, choice, q, stream);
    choice = row_best->choice();
  }

  const int64_t K = choice.values.A;
  int lanes = 1;
  while (lanes < WARP && lanes * LANE_COLUMNS < K) lanes *= 2;
  const int64_t groups = FORWARD_THREADS / lanes;
  const bool single = b.n <= groups * SINGLE_ROUNDS && K <= SINGLE_COLUMNS;
  const int64_t block_rows = groups * (single ? SINGLE_ROUNDS : ROUNDS);
  const int64_t blocks = std::max<int64_t>(1, ceil_div(b.n, block_rows));
  const int64_t count = options.reduction == MEAN ? b.n : 1;
  T* loss = static_cast<T*>(out.loss.mutable_data_ptr());
  if (options.reduction != NONE && blocks > 1) {
    sums = empty({blocks}, type, q);
    loss = data<T>(sums);
  }
  // Wide rows of the gradient are left to the dense store of backward_kernel.
  const bool fused_grad = with_grad && b.q.A <= NARROW;
  if (b.n > 0 || options.reduction != NONE) {
    dispatch(choice.values.values.type, [&](auto* stored) {
      using Stored = std::remove_pointer_t<decltype(stored)>;
      auto* const kernel = b.next_online ? forward_kernel<T, Stored, true> : forward_kernel<T, Stored, false>;
      kernel<<<grid(blocks), FORWARD_THREADS, 0, stream>>>(
          loss, td, fused_grad ? out.grad_q->mutable_data_ptr() : nullptr, b, options, choice, data<int64_t>(rank),
          lanes, block_rows, blocks > 1 ? 1 : count, count);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  if (sums) {
    sum_kernel<T><<<1, FORWARD_THREADS, 0, stream>>>(static_cast<T*>(out.loss.mutable_data_ptr()), loss, blocks, count);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (with_grad && !fused_grad) {
    const Saved saved{b.actions, b.weights, {}, {}, b.n, b.q.A};
    launch_backward<T>(*out.grad_q, nullptr, td, saved, options, stream);
  }
  return out;
}

// The kernels have no exponentials: the Triton ones do.
void serves(const Options& options) {
  STD_TORCH_CHECK(options.target == MAX && !options.cql && options.cql_alpha == 0,
                  "on CUDA there is no soft or Munchausen target and no conservative term");
}

struct Cuda {
  // check is the CPU's: looking at a value would cost a synchronisation.
  static Outputs run(const Batch& b, const Options& options, const Tensor& q, const Maybe& non_final_mask, bool,
                     bool with_grad) {
    serves(options);
    const ScalarType type = accumulation_type(b.q.values.type);
    return type == ScalarType::Double ? forward<double>(b, options, q, non_final_mask, with_grad, type)
                                      : forward<float>(b, options, q, non_final_mask, with_grad, type);
  }

  static Tensor gradient(const Saved& saved, const Options& options, const Tensor& grad_loss, const Tensor& td,
                         const Maybe&, ScalarType type) {
    serves(options);
    const torch::stable::accelerator::DeviceGuard guard(td.get_device_index());
    const cudaStream_t stream = current_stream(td);
    Tensor grad_q = empty({saved.n, saved.A}, type, td);
    if (type == ScalarType::Double) {
      launch_backward(grad_q, static_cast<const double*>(grad_loss.const_data_ptr()),
                      static_cast<const double*>(td.const_data_ptr()), saved, options, stream);
    } else {
      launch_backward(grad_q, static_cast<const float*>(grad_loss.const_data_ptr()),
                      static_cast<const float*>(td.const_data_ptr()), saved, options, stream);
    }
    return grad_q;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dqn_fused, CUDA, m) { Ops<Cuda>::implement(m); }

}  // namespace dqn_fused::cuda
