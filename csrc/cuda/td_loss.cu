// The ops on CUDA; nothing here synchronises or looks at a value on the host.
//
// Small (few actions, or columns that are not contiguous): forward_kernel does everything, and one block of it is the
// whole launch. Large: rows_kernel reduces each matrix whose every action counts, 16 bytes at a time, a warp for each
// row and range of columns, and forward_kernel finishes its (rows, splits) pairs; backward_kernel stores the gradient
// 16 bytes at a time.

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
#include "backward.cuh"
#include "forward.cuh"
#include "geometry.h"
#include "rows.cuh"

namespace dqn_fused::cuda {
namespace {

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
T* pointer(const Maybe& x) {
  return x ? static_cast<T*>(x->mutable_data_ptr()) : nullptr;
}

// Calls f with a null pointer to the type in which values are stored: double where W is, else one that float32 holds.
template <class W, class F>
void dispatch(ScalarType type, const F& f) {
  if constexpr (std::is_same_v<W, double>) {
    f(static_cast<double*>(nullptr));
  } else {
    switch (type) {
      case ScalarType::Half:
        return f(static_cast<Half*>(nullptr));
      case ScalarType::BFloat16:
        return f(static_cast<BFloat16*>(nullptr));
      default:
        return f(static_cast<float*>(nullptr));
    }
  }
}

// Whether a matrix is contiguous, as the gradient is, and begins at a multiple of `alignment`.
bool flat(const Matrix& x, int64_t alignment) {
  const int64_t outer = x.inner == 0 ? 1 : x.rows / x.inner;
  return x && x.stride_action == 1 && (x.inner <= 1 || x.stride_inner == x.A) &&
         (outer <= 1 || x.stride_outer == x.inner * x.A) &&
         reinterpret_cast<uintptr_t>(x.values.data) % static_cast<uintptr_t>(alignment) == 0;
}

template <class T>
void launch_backward(const Tensor& grad_q, const T* grad_loss, const T* td, const T* normaliser, const Saved& saved,
                     const Options& options, cudaStream_t stream) {
  const int64_t size = saved.n * saved.A, count = options.reduction == MEAN ? saved.n : 1;
  if (size == 0) return;
  dispatch<T>(grad_q.scalar_type(), [&](auto* stored) {
    using Stored = std::remove_pointer_t<decltype(stored)>;
    const BackwardLaunch plan = backward_launch(size, saved.A, sizeof(Stored));
    const bool dense = options.cql_alpha != 0;
    auto* const kernel = dense ? backward_kernel<T, Stored, true> : backward_kernel<T, Stored, false>;
    const int64_t row = dense ? sizeof(RowGradient<T, true>) : sizeof(RowGradient<T, false>);
    kernel<<<grid(plan.blocks), THREADS, plan.rows * row, stream>>>(
        static_cast<Stored*>(grad_q.mutable_data_ptr()), grad_loss, td, normaliser, saved, options, plan.block, count,
        flat(saved.q, 16), flat(saved.legal, Vector<Stored>::SIZE));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

// The number of next rows up to and including each sample's own.
Tensor running_count(const Tensor& mask) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(mask), torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The results of rows_kernel for a matrix; empty where forward_kernel reads the rows itself.
struct Reduced {
  Maybe best, aux;
  int64_t splits = 0;

  Partial partial() const { return {pointer<void>(best), pointer<void>(aux), splits}; }
};

// Only where both x and the pair hold float64, or neither does; else forward_kernel reads the rows, whatever A is.
template <class Pair>
Reduced reduce_rows(const Matrix& x, const Matrix& legal, const Column& terminated, typename Pair::Value scale,
                    const Tensor& like, cudaStream_t stream) {
  using W = typename Pair::Value;
  using Aux = typename Pair::Aux;
  const bool contiguous = x.stride_action == 1 && (!legal || legal.stride_action == 1);
  const bool fits = (x.values.type == ScalarType::Double) == std::is_same_v<W, double>;
  if (x.A <= NARROW || x.rows == 0 || !contiguous || !fits) return {};
  const RowsLaunch plan = rows_launch(x.rows, x.A);
  const ScalarType type = std::is_same_v<W, double> ? ScalarType::Double : ScalarType::Float;
  Reduced found{empty({x.rows, plan.splits}, type, like), {}, plan.splits};
  if (!std::is_same_v<Pair, Largest<W>>) {
    found.aux = empty({x.rows, plan.splits}, std::is_same_v<Aux, W> ? type : ScalarType::Long, like);
  }
  dispatch<W>(x.values.type, [&](auto* stored) {
    using Stored = std::remove_pointer_t<decltype(stored)>;
    auto* const kernel = legal ? rows_kernel<Stored, Pair, true> : rows_kernel<Stored, Pair, false>;
    kernel<<<grid(plan.blocks), THREADS, 0, stream>>>(pointer<W>(found.best), pointer<Aux>(found.aux), x, legal,
                                                      terminated, scale, plan.splits, plan.chunk);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return found;
}

// T is the dtype of the arithmetic, W that in which next actions are compared.
template <class T, class W>
Outputs forward(const Batch& b, const Options& options, const Tensor& q, const Maybe& mask, bool with_grad,
                ScalarType type) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  Outputs out{empty_loss(options.reduction, b, type, q), empty({b.n}, type, q), {}, {}};
  if (options.cql) out.normaliser = empty({2, b.n}, type, q);
  if (with_grad) out.grad_q = empty({b.n, b.q.A}, b.q.values.type, q);
  Maybe rank, sums;
  if (b.compacted) rank = running_count(*mask);

  // 1 / temperature must be finite and above 0 in T: infinity times 0 is NaN.
  using Limits = std::numeric_limits<T>;
  const double inverse = std::clamp<double>(1 / options.temperature, Limits::min(), Limits::max());
  const T scale = static_cast<T>(inverse);
  const Column terminated = b.compacted ? Column{} : b.final;
  Reduced next, policy, conservative;
  if (b.next_q && options.target != MAX) {
    next = reduce_rows<Exponentials<T>>(b.next_q, b.next_legal, terminated, scale, q, stream);
  } else if (b.next_online) {
    next = reduce_rows<FirstLargest<W>>(b.next_online, b.next_legal, terminated, W(1), q, stream);
  } else if (b.next_q) {
    next = reduce_rows<Largest<W>>(b.next_q, b.next_legal, terminated, W(1), q, stream);
  }
  if (b.target_q) policy = reduce_rows<Exponentials<T>>(b.target_q, b.legal, {}, scale, q, stream);
  if (options.cql) conservative = reduce_rows<Exponentials<T>>(b.q, b.legal, {}, T(1), q, stream);

  int64_t columns = 1;
  const auto read = [&](bool asked, const Reduced& reduced) {
    if (asked) columns = std::max(columns, reduced.splits == 0 ? b.q.A : reduced.splits);
  };
  read(static_cast<bool>(b.next_q), next);
  read(static_cast<bool>(b.target_q), policy);
  read(options.cql, conservative);
  const bool exponentials = options.target != MAX || options.cql;
  const int most = exponentials ? MOST_THREADS<T, W, true> : MOST_THREADS<T, W, false>;
  const ForwardLaunch plan = forward_launch(b.n, columns, most);
  if (options.reduction != NONE && plan.blocks > 1) sums = empty({plan.blocks}, type, q);
  // Wide rows of the gradient are left to the dense store of backward_kernel.
  const bool fused_grad = with_grad && b.q.A <= NARROW;

  T* const loss = static_cast<T*>(out.loss.mutable_data_ptr());
  Forward<T> f;
  f.loss = sums ? pointer<T>(sums) : loss;
  f.td = static_cast<T*>(out.td.mutable_data_ptr());
  f.normaliser = options.cql ? static_cast<T*>(out.normaliser->mutable_data_ptr()) : nullptr;
  f.grad_q = fused_grad ? pointer<void>(out.grad_q) : nullptr;
  f.batch = b;
  f.options = options;
  f.rank = pointer<int64_t>(rank);
  f.next = next.partial();
  f.policy = policy.partial();
  f.conservative = conservative.partial();
  f.lanes = plan.lanes;
  f.block_rows = plan.block_rows;
  f.count = options.reduction == MEAN ? b.n : 1;
  f.divisor = sums ? 1 : f.count;
  f.scale = scale;
  if (b.n > 0 || options.reduction != NONE) {
    auto* const kernel = exponentials ? forward_kernel<T, W, true> : forward_kernel<T, W, false>;
    kernel<<<grid(plan.blocks), plan.threads, 0, stream>>>(f);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (sums) {
    sum_kernel<T><<<1, SUM_THREADS, 0, stream>>>(loss, pointer<T>(sums), plan.blocks, f.count);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (with_grad && !fused_grad) {
    const Saved saved{b.actions, b.weights, b.q, b.legal, b.n, b.q.A};
    launch_backward<T>(*out.grad_q, nullptr, f.td, f.normaliser, saved, options, stream);
  }
  return out;
}

template <class T>
Tensor gradient(const Saved& saved, const Options& options, const Tensor& grad_loss, const Tensor& td,
                const Maybe& normaliser, ScalarType type) {
  const torch::stable::accelerator::DeviceGuard guard(td.get_device_index());
  const auto values = [](const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); };
  Tensor grad_q = empty({saved.n, saved.A}, type, td);
  launch_backward(grad_q, values(grad_loss), values(td), normaliser ? values(*normaliser) : nullptr, saved, options,
                  current_stream(td));
  return grad_q;
}

struct Cuda {
  // check is for the CPU: here a look at a value would cost a synchronisation.
  static Outputs run(const Batch& b, const Options& options, const Tensor& q, const Maybe& mask, bool, bool with_grad) {
    const ScalarType type = accumulation_type(b.q.values.type);
    if (type == ScalarType::Double) return forward<double, double>(b, options, q, mask, with_grad, type);
    const ScalarType compared = (b.next_online ? b.next_online : b.next_q).values.type;
    const bool compared_as_double = options.target == MAX && compared == ScalarType::Double;
    return compared_as_double ? forward<float, double>(b, options, q, mask, with_grad, type)
                              : forward<float, float>(b, options, q, mask, with_grad, type);
  }

  static Tensor gradient(const Saved& saved, const Options& options, const Tensor& grad_loss, const Tensor& td,
                         const Maybe& normaliser, ScalarType type) {
    return type == ScalarType::Double ? cuda::gradient<double>(saved, options, grad_loss, td, normaliser, type)
                                      : cuda::gradient<float>(saved, options, grad_loss, td, normaliser, type);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dqn_fused, CUDA, m) { Ops<Cuda>::implement(m); }

}  // namespace dqn_fused::cuda
