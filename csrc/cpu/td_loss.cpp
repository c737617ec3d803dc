// The ops on the CPU. Their schemas are in dqn_fused/_ops.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include "../tensors.h"
#include "row_max.h"

namespace dqn_fused::cpu {
namespace {

constexpr int64_t BLOCK = 8192;     // elements of next_q in a block of rows: the unit of work and of the partial sums
constexpr int64_t GRAIN = 1 << 16;  // elements that pay for waking a thread: 64 K read in 4 us
constexpr int64_t CHUNK = 1 << 15;  // elements of a row that are worth splitting off

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Thread over items of `size` elements each.
template <class F>
void for_each_block(int64_t items, int64_t size, const F& f) {
  if (items == 0) return;
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(size, 1));
  if (items <= grain) return f(0, items);  // parallel_for would find that out for 0.1 us
  torch::stable::parallel_for(0, items, grain, f);
}

// Rows of next_q and the function that takes their maximum.
struct NextValues {
  Matrix next_q;
  RowMax largest;

  explicit NextValues(const Matrix& m)
      : next_q(m), largest(row_max(m.values.type, m.stride_action == 1)), size(element_size(m.values.type)) {}

  double operator()(int64_t row) const { return (*this)(row, 0, next_q.A); }

  double operator()(int64_t row, int64_t first, int64_t count) const {
    const auto* start = static_cast<const char*>(next_q.values.data);
    const int64_t offset = next_q.offset(row) + first * next_q.stride_action;
    return largest(start + offset * size, count, next_q.stride_action);
  }

 private:
  static int64_t element_size(ScalarType type) {
    return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  }

  int64_t size;
};

// Where the rows are too few for the threads: the maxima of column ranges, (rows, splits), to be read as a next_q.
std::vector<double> split_columns(Batch& b) {
  const int64_t A = b.next_q.A, rows = b.next_q.rows;
  const int64_t splits = std::min<int64_t>(A / CHUNK, torch::stable::get_num_threads());
  if (splits < 2 || rows == 0 || rows >= 4 * splits) return {};
  const int64_t width = ceil_div(A, splits);
  std::vector<double> partial(rows * splits);
  const NextValues next_value(b.next_q);
  for_each_block(rows * splits, width, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = k / splits, first = k % splits * width;
      if (!b.compacted && !b.live(row)) continue;
      partial[k] = next_value(row, first, std::min(width, A - first));
    }
  });
  b.next_q = {{partial.data(), ScalarType::Double}, rows, splits, rows, 0, splits, 1};
  return partial;
}

// How many next rows come before each block of rows, (blocks + 1,).
std::vector<int64_t> first_next_rows(const Batch& b, int64_t blocks, int64_t block_rows) {
  std::vector<int64_t> first(blocks + 1, 0);
  for (int64_t k = 0; k < blocks; ++k) {
    int64_t count = 0;
    for (int64_t i = k * block_rows; i < std::min(b.n, (k + 1) * block_rows); ++i) count += b.live(i);
    first[k + 1] = first[k] + count;
  }
  return first;
}

// Fills td and loss; returns whether every action is legal and the mask has as many true entries as next_q has rows.
template <class T>
bool forward(Batch b, int64_t reduction, T* loss, T* td) {
  const int64_t A = b.q.A;
  // A block depends on the shape alone, and its sum is added in its turn: any number of threads gives the same bits.
  const int64_t block_rows = std::max<int64_t>(1, BLOCK / A), blocks = ceil_div(b.n, block_rows);
  const auto partial = split_columns(b);
  const NextValues next_value(b.next_q);
  std::vector<int64_t> first;
  if (b.compacted) first = first_next_rows(b, blocks, block_rows);
  std::vector<double> sums(blocks);
  std::atomic<bool> all_legal = !b.compacted || first.back() == b.next_q.rows;

  for_each_block(blocks, block_rows * A, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      double sum = 0;
      int64_t next_row = b.compacted ? first[k] : 0;
      for (int64_t i = k * block_rows; i < std::min(b.n, (k + 1) * block_rows); ++i) {
        const bool live = b.live(i);
        if (!b.compacted) next_row = i;
        const bool known = live && next_row < b.next_q.rows;
        const int64_t action = b.actions.at<int64_t>(i);
        T error = std::numeric_limits<T>::quiet_NaN();
        if (legal(action, A) && known == live)
          error = td_error<T>(b, i, action, live, known ? static_cast<T>(next_value(next_row)) : T(0));
        else
          all_legal.store(false, std::memory_order_relaxed);
        if (b.compacted) next_row += live;
        td[i] = error;
        const T value = loss_value(Options{}, error);
        if (reduction == NONE)
          loss[i] = value;
        else
          sum += value;
      }
      sums[k] = sum;
    }
  });
  if (reduction != NONE) {
    double total = 0;
    for (const double sum : sums) total += sum;
    *loss = static_cast<T>(reduction == MEAN ? total / static_cast<double>(b.n) : total);
  }
  return all_legal;
}

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

// Zeros but for the actions taken; by flat ranges, so that one long row is shared by the threads too.
template <class T, class Out>
void backward(const T* grad_loss, const T* td, const Column& actions, int64_t n, int64_t A, int64_t reduction,
              Out* grad_q) {
  advise_huge_pages(grad_q, n * A * static_cast<int64_t>(sizeof(Out)));
  for_each_block(n * A, 1, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<void*>(grad_q + begin), 0, (end - begin) * sizeof(Out));
    for (int64_t i = begin / A; i * A < end; ++i) {
      const int64_t action = actions.at<int64_t>(i);
      if (!legal(action, A)) continue;
      const int64_t here = i * A + action;
      if (here < begin || here >= end) continue;
      const T upstream = grad_loss == nullptr ? T(1) : grad_loss[reduction == NONE ? i : 0];
      const T slope = upstream * loss_slope(Options{}, td[i]);
      grad_q[here] = static_cast<Out>(reduction == MEAN ? slope / static_cast<T>(n) : slope);
    }
  });
}

template <class T>
void backward(const T* grad_loss, const T* td, const Column& actions, int64_t n, int64_t A, int64_t reduction,
              const Tensor& grad_q) {
  void* out = grad_q.mutable_data_ptr();
  switch (grad_q.scalar_type()) {
    case ScalarType::Double:
      return backward(grad_loss, td, actions, n, A, reduction, static_cast<double*>(out));
    case ScalarType::Half:
      return backward(grad_loss, td, actions, n, A, reduction, static_cast<Half*>(out));
    case ScalarType::BFloat16:
      return backward(grad_loss, td, actions, n, A, reduction, static_cast<BFloat16*>(out));
    default:
      return backward(grad_loss, td, actions, n, A, reduction, static_cast<float*>(out));
  }
}

template <class T>
void checked_forward(const Batch& b, int64_t reduction, bool check, const Tensor& loss, const Tensor& td) {
  const bool all_legal =
      forward<T>(b, reduction, static_cast<T*>(loss.mutable_data_ptr()), static_cast<T*>(td.mutable_data_ptr()));
  // Worded by dqn_fused.arguments.check_values, which the caller then asks.
  STD_TORCH_CHECK(all_legal || !check, "an action outside [0, A), or a non_final_mask that does not fit next_q");
}

std::tuple<Tensor, Tensor> td_loss(const Tensor& q, const Tensor& actions, const Tensor& rewards, const Tensor& next_q,
                                   const std::optional<Tensor>& terminated, const std::optional<Tensor>& non_final_mask,
                                   const std::optional<Tensor>& gammas, double gamma, int64_t reduction, bool check) {
  const Batch b = batch(q, actions, rewards, &next_q, terminated, non_final_mask, gammas, gamma);
  const ScalarType type = accumulation_type(b.q.values.type);
  Tensor loss = empty_loss(reduction, b, type, q), td = empty({b.n}, type, q);
  if (type == ScalarType::Double)
    checked_forward<double>(b, reduction, check, loss, td);
  else
    checked_forward<float>(b, reduction, check, loss, td);
  return {std::move(loss), std::move(td)};
}

Tensor td_loss_backward(const Tensor& grad_loss, const Tensor& td, const Tensor& actions, int64_t A, ScalarType type,
                        int64_t reduction) {
  const Column taken = saved(grad_loss, td, actions, A, type, reduction).actions;
  const int64_t n = td.numel();
  Tensor grad_q = empty({n, A}, type, td);
  if (type == ScalarType::Double)
    backward(static_cast<const double*>(grad_loss.const_data_ptr()), static_cast<const double*>(td.const_data_ptr()),
             taken, n, A, reduction, grad_q);
  else
    backward(static_cast<const float*>(grad_loss.const_data_ptr()), static_cast<const float*>(td.const_data_ptr()),
             taken, n, A, reduction, grad_q);
  return grad_q;
}

std::tuple<Tensor, Tensor, Tensor> td_loss_and_grad(const Tensor& q, const Tensor& actions, const Tensor& rewards,
                                                    const Tensor& next_q, const std::optional<Tensor>& terminated,
                                                    const std::optional<Tensor>& non_final_mask,
                                                    const std::optional<Tensor>& gammas, double gamma,
                                                    int64_t reduction, bool check) {
  const Batch b = batch(q, actions, rewards, &next_q, terminated, non_final_mask, gammas, gamma);
  const ScalarType type = accumulation_type(b.q.values.type);
  Tensor loss = empty_loss(reduction, b, type, q), td = empty({b.n}, type, q);
  Tensor grad_q = empty({b.n, b.q.A}, b.q.values.type, q);
  if (type == ScalarType::Double) {
    checked_forward<double>(b, reduction, check, loss, td);
    backward<double>(nullptr, static_cast<const double*>(td.const_data_ptr()), b.actions, b.n, b.q.A, reduction,
                     grad_q);
  } else {
    checked_forward<float>(b, reduction, check, loss, td);
    backward<float>(nullptr, static_cast<const float*>(td.const_data_ptr()), b.actions, b.n, b.q.A, reduction, grad_q);
  }
  return {std::move(loss), std::move(grad_q), std::move(td)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dqn_fused, CPU, m) {
  m.impl("td_loss", TORCH_BOX(&td_loss));
  m.impl("td_loss_backward", TORCH_BOX(&td_loss_backward));
  m.impl("td_loss_and_grad", TORCH_BOX(&td_loss_and_grad));
}

}  // namespace dqn_fused::cpu
