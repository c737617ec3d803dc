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
#include <limits>
#include <tuple>

#include "../tensors.h"

namespace dqn_fused::cuda {
namespace {

constexpr int WARP = 32;
constexpr int THREADS = 256;  // of the kernels that move the bytes
constexpr int FORWARD_THREADS =
    512;  // of forward_kernel, which may have to do with one block; two a multiprocessor: left alone, ptxas spills
constexpr int64_t NARROW = 64;        // up to so many actions a row is read element by element
constexpr int64_t LANE_COLUMNS = 4;   // loads in flight a lane, there
constexpr int64_t SINGLE_ROUNDS = 8;  // rows that a group of lanes takes in turn before a second launch is cheaper
constexpr int64_t ROUNDS = 2;         // and where several blocks share the work
constexpr int64_t WARPS = 16 * 1024;  // fill any GPU: the 132 multiprocessors of an H200 hold 8,448
constexpr int64_t MIN_CHUNK = 2048;   // columns of a split, at least: 8 vectors of 16 bytes a lane and more

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
__device__ T infinity() {
  return static_cast<T>(__int_as_float(0x7f800000));
}

template <class T>
__device__ T nan() {
  return static_cast<T>(__int_as_float(0x7fc00000));
}

template <class Stored>
struct alignas(16) Vector {
  static constexpr int SIZE = 16 / sizeof(Stored);
  Stored values[SIZE];
};

// Maximum over `lanes` neighbouring lanes, a power of two; every lane has the result.
template <class T>
__device__ T lanes_max(T x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    x = nan_max(x, __shfl_xor_sync(0xffffffff, x, distance));
  }
  return x;
}

// Sum over FORWARD_THREADS in a fixed order, on thread 0.
template <class T>
__device__ T block_sum(T x) {
  __shared__ T warp_sums[FORWARD_THREADS / WARP];
  for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
  if (threadIdx.x % WARP == 0) warp_sums[threadIdx.x / WARP] = x;
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < FORWARD_THREADS / WARP; ++warp) sum += warp_sums[warp];
  }
  return sum;
}

// partial[row, split]: the maximum of a range of columns, for a warp. Rows that are not live are left out.
template <class T, class Stored>
__global__ void __launch_bounds__(THREADS) row_max_kernel(T* partial, Batch batch, int64_t splits, int64_t chunk) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / WARP;
  const int lane = threadIdx.x % WARP;
  const int64_t row = warp / splits, split = warp % splits;
  if (row >= batch.next_q.rows || (!batch.compacted && !batch.live(row))) return;

  const Stored* const start = static_cast<const Stored*>(batch.next_q.values.data) + batch.next_q.offset(row);
  const int64_t first = split * chunk, left = batch.next_q.A - first;
  const Stored* const x = start + first;
  const int64_t n = left < chunk ? left : chunk;
  // Elements before the first 16-byte boundary and behind the last are read one by one.
  constexpr int SIZE = Vector<Stored>::SIZE;
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) / sizeof(Stored) % SIZE);
  const int64_t head = misaligned == 0 ? 0 : (SIZE - misaligned < n ? SIZE - misaligned : n);
  const int64_t vectors = (n - head) / SIZE, tail = head + vectors * SIZE;

  T best = -infinity<T>();
  if (lane < head) best = static_cast<T>(x[lane]);
  if (lane < n - tail) best = nan_max(best, static_cast<T>(x[tail + lane]));
  const Vector<Stored>* const body = reinterpret_cast<const Vector<Stored>*>(x + head);
#pragma unroll 4
  for (int64_t v = lane; v < vectors; v += WARP) {
    const Vector<Stored> vector = body[v];
#pragma unroll
    for (int k = 0; k < SIZE; ++k) best = nan_max(best, static_cast<T>(vector.values[k]));
  }
  best = lanes_max(best, WARP);
  if (lane == 0) partial[warp] = best;
}

template <class T>
__device__ T coefficient(T upstream, T td, int64_t count) {
  return upstream * SquaredError<T>::slope(td) / static_cast<T>(count);
}

template <class T>
__device__ void store(void* data, ScalarType type, int64_t i, T x) {
  switch (type) {
    case ScalarType::Half:
      static_cast<Half*>(data)[i] = static_cast<Half>(static_cast<float>(x));
      break;
    case ScalarType::BFloat16:
      static_cast<BFloat16*>(data)[i] = static_cast<BFloat16>(static_cast<float>(x));
      break;
    default:
      static_cast<T*>(data)[i] = x;  // float32 and float64 are their own accumulation dtypes
      break;
  }
}

// A row is taken by `lanes` neighbouring lanes, a block takes block_rows rows. loss is (n,) where the reduction is
// NONE, else one sum a block, divided by divisor. grad_q is null, or (n, A), contiguous.
template <class T, class Stored>
__global__ void __launch_bounds__(FORWARD_THREADS, 2)
    forward_kernel(T* loss, T* td, void* grad_q, Batch batch, const int64_t* rank, int lanes, int64_t block_rows,
                   int64_t reduction, int64_t divisor, int64_t count) {
  using Loss = SquaredError<T>;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = FORWARD_THREADS / lanes;
  const int64_t A = batch.q.A, K = batch.next_q.A, first = blockIdx.x * block_rows;
  const int64_t stop = first + block_rows < batch.n ? first + block_rows : batch.n;
  T sum = 0;
  // Every lane makes every round: the shuffles below need them all.
  for (int64_t round = first; round < stop; round += groups) {
    const int64_t i = round + group;
    const bool inside = i < stop;
    const bool live = inside && batch.live(i);
    const int64_t next_row = live && rank != nullptr ? rank[i] - 1 : i;
    const bool known = live && next_row < batch.next_q.rows;
    T next_value = -infinity<T>();
    if (known) {
      const Stored* const x = static_cast<const Stored*>(batch.next_q.values.data) + batch.next_q.offset(next_row);
#pragma unroll 4
      for (int64_t j = lane; j < K; j += lanes) {
        next_value = nan_max(next_value, static_cast<T>(x[j * batch.next_q.stride_action]));
      }
    }
    next_value = lanes_max(next_value, lanes);
    if (!inside) continue;

    const int64_t action = batch.actions.at<int64_t>(i);
    const bool taken = legal(action, A);
    const T error = taken && known == live ? td_error<T>(batch, i, action, live, next_value) : nan<T>();
    if (lane == 0) {
      td[i] = error;
      const T value = Loss::value(error);
      if (reduction == NONE) {
        loss[i] = value;
      } else {
        sum += value;
      }
    }
    if (grad_q != nullptr) {
      const T slope = coefficient(T(1), error, count);
      for (int64_t j = lane; j < A; j += lanes) {
        store(grad_q, batch.q.values.type, i * A + j, j == action ? slope : T(0));
      }
    }
  }
  if (reduction == NONE) return;
  sum = block_sum(sum);
  if (threadIdx.x == 0) loss[blockIdx.x] = sum / static_cast<T>(divisor);
}

// The sum of n partial sums over count, in a fixed order: one block.
template <class T>
__global__ void __launch_bounds__(FORWARD_THREADS, 2) sum_kernel(T* loss, const T* partial, int64_t n, int64_t count) {
  T sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += FORWARD_THREADS) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = sum / static_cast<T>(count);
}

// One dense store of where(column == action, coefficient, 0) over grad_q as a flat array of `size` elements: every
// store is aligned, whatever A is. grad_loss is empty for ones.
template <class T, class Stored>
__global__ void __launch_bounds__(THREADS)
    backward_kernel(Stored* grad_q, const T* grad_loss, const T* td, Column actions, int64_t A, int64_t size,
                    bool per_row, int64_t count) {
  constexpr int SIZE = Vector<Stored>::SIZE;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * (THREADS * SIZE);
  const int64_t here = start + threadIdx.x * SIZE;
  if (here >= size) return;
  // The 64-bit division is the block's; from its first row on 32 bits will do.
  int64_t row = start / A;
  int64_t column = start - row * A + threadIdx.x * SIZE;
  if (column >= A) {
    if (A < THREADS * SIZE) {
      const uint32_t rows = static_cast<uint32_t>(column) / static_cast<uint32_t>(A);
      row += rows;
      column -= rows * A;
    } else {
      ++row;
      column -= A;
    }
  }
  int64_t action = actions.at<int64_t>(row);
  Vector<Stored> vector;
#pragma unroll
  for (int k = 0; k < SIZE; ++k) {
    T value = 0;
    if (column == action && here + k < size) {
      const T upstream = grad_loss == nullptr ? T(1) : grad_loss[per_row ? row : 0];
      value = coefficient(upstream, td[row], count);
    }
    vector.values[k] = static_cast<Stored>(value);
    if (++column == A) {
      column = 0;
      ++row;
      if (here + k + 1 < size) action = actions.at<int64_t>(row);
    }
  }
  if (here + SIZE <= size) {
    *reinterpret_cast<Vector<Stored>*>(grad_q + here) = vector;
  } else {
#pragma unroll
    for (int k = 0; k < SIZE; ++k) {
      if (here + k < size) grad_q[here + k] = vector.values[k];
    }
  }
}

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
  const bool single = b.n <= groups * SINGLE_ROUNDS;
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
  const Batch b = batch(q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma);
  Outputs out = forward(b, q, non_final_mask, reduction, false);
  return {std::move(out.loss), std::move(out.td)};
}

std::tuple<Tensor, Tensor, Tensor> td_loss_and_grad(const Tensor& q, const Tensor& actions, const Tensor& rewards,
                                                    const Tensor& next_q, const std::optional<Tensor>& terminated,
                                                    const std::optional<Tensor>& non_final_mask,
                                                    const std::optional<Tensor>& gammas, double gamma,
                                                    int64_t reduction, bool) {
  const Batch b = batch(q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma);
  Outputs out = forward(b, q, non_final_mask, reduction, true);
  return {std::move(out.loss), std::move(*out.grad_q), std::move(out.td)};
}

Tensor td_loss_backward(const Tensor& grad_loss, const Tensor& td, const Tensor& actions, int64_t A, ScalarType type,
                        int64_t reduction) {
  const Column taken = taken_actions(grad_loss, td, actions, A, type, reduction);
  const torch::stable::accelerator::DeviceGuard guard(td.get_device_index());
  const cudaStream_t stream = current_stream(td);
  const int64_t n = td.numel();
  Tensor grad_q = empty({n, A}, type, td);
  if (type == ScalarType::Double) {
    launch_backward(grad_q, static_cast<const double*>(grad_loss.const_data_ptr()),
                    static_cast<const double*>(td.const_data_ptr()), taken, n, A, reduction, stream);
  } else {
    launch_backward(grad_q, static_cast<const float*>(grad_loss.const_data_ptr()),
                    static_cast<const float*>(td.const_data_ptr()), taken, n, A, reduction, stream);
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
