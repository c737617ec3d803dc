#include <atomic>
#include <cmath>

#include "blocks.h"
#include "loss.h"
#include "rows.h"

namespace dqn_fused::cpu {
namespace {

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

  void share() {
    const auto all = [](int64_t) { return true; };
    if (next) next.share([&](int64_t row) { return batch.compacted || batch.live(row); });
    if (policy) policy.share(all);
    if (conservative) conservative.share(all);
  }

  T next_value(int64_t row) const {
    if (options.target != MAX) return static_cast<T>(soft_value_of(next, row, options.temperature).sum());
    const Summary found = next(row);
    if (next.masked() && found.largest == -INFINITE<double>) return NOT_A_NUMBER<T>;
    if (!batch.next_online || found.largest != found.largest) return static_cast<T>(found.largest);
    return batch.next_q.at<T>(row, found.index);
  }

  T bonus(int64_t i, int64_t action) const {
    if (!policy) return 0;
    const bool known = !batch.legal || batch.legal.at<bool>(i, action);
    const T taken = known ? batch.target_q.at<T>(i, action) : -INFINITE<T>;
    return munchausen_bonus(options, static_cast<T>(soft_value_of(policy, i, options.temperature).log_policy(taken)));
  }

  SoftValue<T> normaliser(int64_t i) const {
    const SoftValue<double> found = soft_value_of(conservative, i);
    return {static_cast<T>(found.largest), static_cast<T>(found.rest)};
  }

  // The loss of a sample; normaliser is NaN where it is not asked for.
  T loss(int64_t i, int64_t action, T error, const SoftValue<T>& normaliser) const {
    T value = loss_value(options, error);
    if (options.cql_alpha != 0 && legal(action, batch.q.A))
      value -= static_cast<T>(options.cql_alpha) * normaliser.log_policy(batch.q.at<T>(i, action));
    return batch.weights ? value * batch.weights.at<T>(i) : value;
  }
};

bool is_plain(const Batch& b, const Options& options) {
  return options.loss == MSE && options.target == MAX && !options.cql && b.next_q && !b.next_online && !b.next_legal &&
         !b.weights;
}

// PLAIN spares the plain loss the questions of the others, 5 ns a row, where a row of two actions takes 20.
template <class T, bool PLAIN>
bool forward(const Batch& b, const Options& options, T* loss, T* td, T* normaliser) {
  const int64_t A = b.q.A;
  // A block depends on the shape alone, and its sum is added in its turn: any number of threads gives the same bits.
  const int64_t block_rows = std::max<int64_t>(1, BLOCK / A), blocks = ceil_div(b.n, block_rows);
  Values<T> values(b, options);
  values.share();
  std::vector<int64_t> first;
  if (b.compacted) first = first_next_rows(b, blocks, block_rows);
  std::vector<double> sums(blocks);
  std::atomic<bool> all_legal = !b.compacted || first.back() == b.next_q.rows;

  for_each_block(blocks, block_rows * A * values.cost(), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      double sum = 0;
      int64_t next_row = b.compacted ? first[k] : 0;
      for (int64_t i = k * block_rows; i < std::min(b.n, (k + 1) * block_rows); ++i) {
        const bool live = b.live(i);
        if (!b.compacted) next_row = i;
        const bool known = live && next_row < b.next_q.rows;
        const int64_t action = b.actions.at<int64_t>(i);
        T error = NOT_A_NUMBER<T>;
        if (legal(action, A) && known == live) {
          const T next_value = !known  ? T(0)
                               : PLAIN ? static_cast<T>(values.next.largest(next_row))
                                       : values.next_value(next_row);
          const T reward = b.rewards.at<T>(i) + (PLAIN ? T(0) : values.bonus(i, action));
          error = td_error(b.q.at<T>(i, action), reward, live, live ? b.gamma<T>(i) : T(0), next_value);
        } else {
          all_legal.store(false, std::memory_order_relaxed);
        }
        if (b.compacted) next_row += live;
        td[i] = error;
        T value = error * error;
        if (!PLAIN) {
          SoftValue<T> sum{NOT_A_NUMBER<T>, 0};
          if (options.cql) {
            sum = values.normaliser(i);
            normaliser[i] = sum.largest;
            normaliser[b.n + i] = sum.rest;
          }
          value = values.loss(i, action, error, sum);
        }
        if (options.reduction == NONE)
          loss[i] = value;
        else
          sum += value;
      }
      sums[k] = sum;
    }
  });
  if (options.reduction != NONE) {
    double total = 0;
    for (const double sum : sums) total += sum;
    *loss = static_cast<T>(options.reduction == MEAN ? total / static_cast<double>(b.n) : total);
  }
  return all_legal;
}

}  // namespace

template <class T>
bool forward(const Batch& b, const Options& options, T* loss, T* td, T* normaliser) {
  return is_plain(b, options) ? forward<T, true>(b, options, loss, td, normaliser)
                              : forward<T, false>(b, options, loss, td, normaliser);
}

template bool forward(const Batch&, const Options&, float*, float*, float*);
template bool forward(const Batch&, const Options&, double*, double*, double*);

}  // namespace dqn_fused::cpu
