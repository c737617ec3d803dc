#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "blocks.h"
#include "columns.h"
#include "loss.h"
#include "parallel.h"
#include "rows.h"

namespace dqn_fused::cpu {
namespace {

constexpr int64_t ROW_COST = 16;  // cost of a row besides its elements, where reading one costs 1

SoftValue<double> soft_value_of(const Rows& rows, int64_t row, double temperature = 1) {
  const Summary found = rows(row);
  return soft_value(found.largest, found.sum, temperature, rows.masked());
}

// The rows that are looked at, and what is read from them.
template <class T>
struct Values {
  static constexpr bool AS_DOUBLE = std::numeric_limits<T>::digits == std::numeric_limits<double>::digits;

  const Batch& batch;
  const Options& options;
  Rows next, policy, conservative;

  Values(const Batch& b, const Options& o) : batch(b), options(o) {
    if (o.target != MAX && b.next_q) next = {Question::EXPONENTIALS, b.next_q, b.next_legal, AS_DOUBLE, o.temperature};
    if (o.target == MAX && b.next_q) {
      next = b.next_online ? Rows(Question::FIRST_LARGEST, b.next_online, b.next_legal, AS_DOUBLE)
                           : Rows(Question::LARGEST, b.next_q, b.next_legal, AS_DOUBLE);
    }
    if (b.target_q) policy = {Question::EXPONENTIALS, b.target_q, b.legal, AS_DOUBLE, o.temperature};
    if (o.cql) conservative = {Question::EXPONENTIALS, b.q, b.legal, AS_DOUBLE};
  }

  int64_t cost() const { return next.cost() + policy.cost() + conservative.cost(); }

  // Shares out the columns of rows that are too few for the threads; returns whether it did.
  bool share() {
    const auto all = [](int64_t) { return true; };
    bool shared = false;
    if (next) shared |= next.share([&](int64_t row) { return batch.compacted || batch.live(row); });
    if (policy) shared |= policy.share(all);
    if (conservative) shared |= conservative.share(all);
    return shared;
  }

  // Values of the rows [first, first + n) of next_q whose flag in `wanted` is set.
  void next_values(int64_t first, int64_t n, const bool* wanted, T* __restrict out) const {
    if (options.target == MAX && !batch.next_online && !batch.next_legal) return next.largest(first, n, wanted, out);
    for (int64_t i = 0; i < n; ++i) {
      if (wanted[i]) out[i] = next_value(first + i);
    }
  }

  T bonus(int64_t i, int64_t action) const {
    const bool known = !batch.legal || batch.legal.at<bool>(i, action);
    const T taken = known ? batch.target_q.at<T>(i, action) : -INFINITE<T>;
    return munchausen_bonus(options, static_cast<T>(soft_value_of(policy, i, options.temperature).log_policy(taken)));
  }

  SoftValue<T> normaliser(int64_t i) const {
    const SoftValue<double> found = soft_value_of(conservative, i);
    return {static_cast<T>(found.largest), static_cast<T>(found.rest)};
  }

 private:
  T next_value(int64_t row) const {
    if (options.target != MAX) return static_cast<T>(soft_value_of(next, row, options.temperature).sum());
    const Summary found = next(row);
    if (next.masked() && found.largest == -INFINITE<double>) return NOT_A_NUMBER<T>;
    if (!batch.next_online || found.largest != found.largest) return static_cast<T>(found.largest);
    return batch.next_q.at<T>(row, found.index);
  }
};

// A block of rows, column by column.
template <class T>
struct Block {
  int64_t actions[MOST_ROWS];
  bool live[MOST_ROWS];
  T taken[MOST_ROWS], rewards[MOST_ROWS], gammas[MOST_ROWS], next[MOST_ROWS], errors[MOST_ROWS], losses[MOST_ROWS];

  // Rows [begin, begin + n); the live ones have the rows of a compacted next_q from next_row on. Fills their td and
  // normaliser, and losses; returns whether every action is legal.
  bool run(const Values<T>& values, int64_t begin, int64_t n, int64_t next_row, T* td, T* normaliser) {
    const Batch& b = values.batch;
    bool all_legal = true;
    read(b.actions, begin, n, actions);
    prefetch_taken(b.q, actions, begin, n);  // where rows are long, each is a cache miss: all at once
    read_next(values, begin, n, next_row);
    read_taken(b.q, actions, begin, n, taken);
    read(b.rewards, begin, n, rewards);
    for (int64_t i = 0; i < n; ++i) all_legal &= legal(actions[i], b.q.A);
    if (values.policy) {
      for (int64_t i = 0; i < n; ++i) rewards[i] += legal(actions[i], b.q.A) ? values.bonus(begin + i, actions[i]) : 0;
    }
    if (b.discounts)
      read(b.discounts, begin, n, gammas);
    else
      std::fill_n(gammas, n, static_cast<T>(b.discount));
    for (int64_t i = 0; i < n; ++i) errors[i] = taken[i] - bellman_target(rewards[i], live[i], gammas[i], next[i]);
    if (values.options.value_transform != IDENTITY) transformed_errors(values.options, n);
    std::copy_n(errors, n, td + begin);
    for (int64_t i = 0; i < n; ++i) losses[i] = loss_value(values.options, errors[i]);
    if (values.conservative) subtract_log_policy(values, begin, n, normaliser);
    if (b.weights) {
      read(b.weights, begin, n, rewards);
      for (int64_t i = 0; i < n; ++i) losses[i] *= rewards[i];
    }
    return all_legal;
  }

  double sum(int64_t n) const {
    double lanes[4] = {};  // an addition waits for the one before it
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      for (int64_t lane = 0; lane < 4; ++lane) lanes[lane] += losses[i + lane];
    }
    for (; i < n; ++i) lanes[0] += losses[i];
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }

 private:
  // Not inlined, so that the ordinary loop is compiled as if this were not there.
  [[gnu::noinline]] void transformed_errors(const Options& options, int64_t n) {
    for (int64_t i = 0; i < n; ++i) errors[i] = td_error(options, taken[i], rewards[i], live[i], gammas[i], next[i]);
  }

  void read_next(const Values<T>& values, int64_t begin, int64_t n, int64_t next_row) {
    const Batch& b = values.batch;
    std::fill_n(next, n, T(0));
    read_live(b, begin, n, live);
    if (!b.next_q) return;
    if (!b.compacted) return values.next_values(begin, n, live, next);
    T found[MOST_ROWS];
    const int64_t count = std::count(live, live + n, true);
    const int64_t known = std::clamp<int64_t>(b.next_q.rows - next_row, 0, count);
    bool wanted[MOST_ROWS];
    std::fill_n(wanted, known, true);
    values.next_values(next_row, known, wanted, found);
    std::fill(found + known, found + count, NOT_A_NUMBER<T>);
    for (int64_t i = 0, k = 0; i < n; ++i) {
      if (live[i]) next[i] = found[k++];
    }
  }

  void subtract_log_policy(const Values<T>& values, int64_t begin, int64_t n, T* normaliser) {
    const T alpha = static_cast<T>(values.options.cql_alpha);
    for (int64_t i = 0; i < n; ++i) {
      const SoftValue<T> sum = values.normaliser(begin + i);
      normaliser[begin + i] = sum.largest;
      normaliser[values.batch.n + begin + i] = sum.rest;
      if (alpha != 0) losses[i] -= alpha * sum.log_policy(taken[i]);
    }
  }
};

}  // namespace

template <class T>
bool forward(const Batch& b, const Options& options, T* loss, T* td, T* normaliser, const Gradient<T>* gradient) {
  const int64_t A = b.q.A;
  const int64_t block_rows = std::clamp<int64_t>(BLOCK / A, 1, MOST_ROWS), blocks = ceil_div(b.n, block_rows);
  Values<T> values(b, options);
  const bool shared = values.share();
  const int64_t row_cost = ROW_COST + A * (values.cost() + (gradient != nullptr && !shared ? gradient->cost() : 0));
  std::vector<int64_t> first;
  if (b.compacted) first = first_next_rows(b, blocks, block_rows);
  double few[8];  // a small batch needs no allocation
  std::vector<double> many(blocks > 8 ? blocks : 0);
  double* const sums = blocks > 8 ? many.data() : few;
  std::atomic<bool> all_legal = !b.compacted || first.back() == b.next_q.rows;

  for_each_block(blocks, block_rows * row_cost, [&](int64_t begin, int64_t end) {
    Block<T> block;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = k * block_rows, n = std::min(block_rows, b.n - row);
      if (!block.run(values, row, n, b.compacted ? first[k] : row, td, normaliser))
        all_legal.store(false, std::memory_order_relaxed);
      if (options.reduction == NONE)
        std::copy_n(block.losses, n, loss + row);
      else
        sums[k] = block.sum(n);
    }
    // By the thread that has just read the rows, without waking the threads again.
    if (gradient != nullptr && !shared) gradient->write(begin * block_rows * A, std::min(end * block_rows, b.n) * A);
  });
  if (gradient != nullptr && shared) gradient->write();
  if (options.reduction != NONE) {
    const double total = std::accumulate(sums, sums + blocks, 0.0);
    *loss = static_cast<T>(options.reduction == MEAN ? total / static_cast<double>(b.n) : total);
  }
  return all_legal;
}

template bool forward(const Batch&, const Options&, float*, float*, float*, const Gradient<float>*);
template bool forward(const Batch&, const Options&, double*, double*, double*, const Gradient<double>*);

}  // namespace dqn_fused::cpu
