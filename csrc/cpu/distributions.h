// Batches whose q is (n, A, K), a distribution for each action, and their gradient: the slopes of each sample's loss by
// the K values of the action taken, and zeros.

#pragma once

#include <atomic>
#include <cstring>

#include "../tensors.h"
#include "blocks.h"
#include "formats.h"

namespace dqn_fused::cpu {

// In the batch q, next_q and next_online have a row for each sample and action; next_online may also hold Q-values, a
// row for each sample. next_legal holds flags, a row for each sample.
struct Distributions {
  Batch batch;
  int64_t A = 0, K = 0;
  bool values_choose = false;

  int64_t next_count() const { return batch.next_q ? batch.next_q.rows / A : 0; }
};

inline Matrix distributions_of(const char* name, const Tensor& x, const Place& place) {
  fits(x.dim() == 3 && x.size(1) > 0, name);
  return matrix(name, x, place);
}

inline Distributions distributions(const Tensor& q, const Tensor& actions, const Tensor& rewards,
                                   const std::optional<Tensor>& next_q, const std::optional<Tensor>& terminated,
                                   const std::optional<Tensor>& non_final_mask, const std::optional<Tensor>& gammas,
                                   double gamma, const std::optional<Tensor>& next_online,
                                   const std::optional<Tensor>& next_legal, const std::optional<Tensor>& weights) {
  const Place place(q);
  Distributions d;
  Batch& b = d.batch;
  b.q = distributions_of("q", q, place);
  b.n = q.size(0);
  d.A = q.size(1);
  d.K = b.q.A;
  columns(b, place, next_q.has_value(), actions, rewards, terminated, non_final_mask, gammas, gamma);
  fits(next_q || (!next_online && !next_legal), "next_q");
  if (next_q) {
    b.next_q = distributions_of("next_q", *next_q, place);
    const int64_t m = next_q->size(0);
    fits(next_q->size(1) == d.A && (b.compacted ? m <= b.n : m == b.n), "next_q");
    if (next_online) {
      d.values_choose = next_online->dim() == 2;
      b.next_online = d.values_choose ? matrix("next_q_online", *next_online, place)
                                      : distributions_of("next_q_online", *next_online, place);
      fits(next_online->size(0) == m && next_online->size(1) == d.A, "next_q_online");
    }
    if (next_legal) {
      b.next_legal = matrix("next_action_mask", *next_legal, place, true);
      fits(next_legal->dim() == 2 && b.next_legal.rows == m && b.next_legal.A == d.A, "next_action_mask");
    }
  }
  if (weights) {
    b.weights = column("weights", *weights, b.n, place);
    fits(floating(b.weights.type), "weights");
  }
  return d;
}

// Reduces the losses of all samples; returns whether every action is legal and the mask has as many true entries as
// there are next states. Each block has a worker, make_worker(), and worker(i, known, live, next_row) is the loss of
// sample i: known says whether its action is legal and its next state is there, if it has one, in next_row.
template <class T, class MakeWorker>
bool reduce_samples(const Distributions& d, int64_t reduction, int64_t cost, T* loss, const MakeWorker& make_worker) {
  const Batch& b = d.batch;
  const int64_t block_rows = std::max<int64_t>(1, BLOCK / (d.A * d.K)), blocks = ceil_div(b.n, block_rows);
  std::vector<int64_t> first;
  if (b.compacted) first = first_next_rows(b, blocks, block_rows);
  std::vector<double> sums(blocks);
  std::atomic<bool> all_known = !b.compacted || first.back() == d.next_count();

  for_each_block(blocks, block_rows * cost, [&](int64_t begin, int64_t end) {
    auto worker = make_worker();
    for (int64_t k = begin; k < end; ++k) {
      double sum = 0;
      int64_t next_row = b.compacted ? first[k] : 0;
      for (int64_t i = k * block_rows; i < std::min(b.n, (k + 1) * block_rows); ++i) {
        const bool live = b.live(i);
        if (!b.compacted) next_row = i;
        const bool known = legal(b.actions.at<int64_t>(i), d.A) && (!live || next_row < d.next_count());
        if (!known) all_known.store(false, std::memory_order_relaxed);
        const T value = worker(i, known, live, next_row);
        if (b.compacted) next_row += live;
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
  return all_known;
}

// The first legal action of the largest value, which is value(action) unless Q-values choose. -1 if no action is legal,
// -inf counting as illegal beside a mask, or if the value of a legal one is NaN.
template <class Value>
int64_t best_action(const Distributions& d, int64_t next_row, const Value& value) {
  const Matrix& next_legal = d.batch.next_legal;
  int64_t best = -1;
  double largest = 0;
  for (int64_t a = 0; a < d.A; ++a) {
    if (next_legal && !next_legal.at<bool>(next_row, a)) continue;
    const double found = d.values_choose ? d.batch.next_online.at<double>(next_row, a) : value(a);
    if (found != found) return -1;
    if (best >= 0 && found <= largest) continue;
    best = a;
    largest = found;
  }
  return next_legal && largest == -INFINITE<double> ? -1 : best;
}

// A sample's gradient, (A, K): a factor times the slopes, (K,), at the action taken, and zeros.
template <class T, class Out>
void write_gradient(Out* out, int64_t A, int64_t K, int64_t action, T factor, const T* slopes) {
  std::memset(static_cast<void*>(out), 0, A * K * sizeof(Out));
  if (!legal(action, A)) return;
  out += action * K;
  for (int64_t j = 0; j < K; ++j) out[j] = static_cast<Out>(slopes[j] * factor);
}

// The same for sample i of a batch, if there is a gradient to write: that of the reduced loss, zero if action is -1.
template <class T>
void write_gradient(const Distributions& d, int64_t reduction, int64_t i, int64_t action, const T* slopes, void* grad) {
  if (grad == nullptr) return;
  const T factor = scaled(T(1), T(1), d.batch.weights, i, reduction == MEAN ? d.batch.n : int64_t(1));
  dispatch(d.batch.q.values.type, [&](auto stored) {
    using Out = decltype(stored);
    write_gradient(static_cast<Out*>(grad) + i * d.A * d.K, d.A, d.K, action, factor, slopes);
  });
}

// Where results go: values of each sample, (n,) or (2, n); slopes, (n, K), or null; grad, (n, A, K), or null.
template <class T>
struct Outputs {
  T *loss, *values, *slopes;
  void* grad;
};

struct Results {
  Tensor loss, values, slopes, grad;
};

// Allocates results, with values of the given size and either slopes, which a backward needs, or the gradient itself.
// fill(outputs) computes them and returns what reduce_samples returns.
template <class T, class Fill>
Results results(const Distributions& d, int64_t reduction, std::initializer_list<int64_t> size, const Tensor& q,
                bool check, bool with_grad, const Fill& fill) {
  const ScalarType stored = d.batch.q.values.type, type = accumulation_type(stored);
  Results r{empty_loss(reduction, d.batch, type, q), empty(size, type, q), {}, {}};
  if (with_grad)
    r.grad = empty({d.batch.n, d.A, d.K}, stored, q);
  else
    r.slopes = empty({d.batch.n, d.K}, type, q);
  const auto data = [](const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); };
  const bool all_known = fill(Outputs<T>{data(r.loss), data(r.values), with_grad ? nullptr : data(r.slopes),
                                         with_grad ? r.grad.mutable_data_ptr() : nullptr});
  // Worded by dqn_fused.arguments.check_values, which the caller then asks.
  STD_TORCH_CHECK(all_known || !check, "an action outside [0, A), or a non_final_mask that does not fit next_q");
  return r;
}

}  // namespace dqn_fused::cpu
