#include "quantile.h"

#include <cmath>
#include <vector>

#include "pairs.h"

namespace dqn_fused::cpu {
namespace {

constexpr int64_t PAIR_COST = 2;  // in reads of an element: a pair takes 0.11 ns with AVX-512, 0.13 ns with AVX2
// Targets whose pairs are added up at a time. Beyond kappa all slopes are equal, and the roundings of a long sum of
// equal terms do not cancel: 680 units of roundoff of 4000 terms. Runs of 32 take 24 % more time.
constexpr int64_t RUN = 128;

template <class T>
Row row_of(const std::vector<T>& x, int64_t n) {
  return {x.data(), 1, nullptr, 0, n};
}

template <class T>
struct Worker {
  static constexpr ScalarType TYPE = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

  const Distributions& d;
  const QuantileOptions& options;
  const Outputs<T>& out;
  const Matrix& chooser;
  const int64_t padded;
  const Mean value, mean = mean_of(TYPE);
  const Affine<T> read, next, tau;
  const T kappa;
  const Pairs<T> sums;
  std::vector<T> predicted, above, below, losses, slopes, more_losses, more_slopes, target;

  Worker(const Distributions& d, const QuantileOptions& options, const Outputs<T>& out)
      : d(d),
        options(options),
        out(out),
        chooser(d.batch.next_online ? d.batch.next_online : d.batch.next_q),
        padded(ceil_div(d.K, PAIR_WIDTH) * PAIR_WIDTH),
        value(mean_of(chooser.values.type)),
        read(affine<T>(d.batch.q.values.type)),
        next(affine<T>(d.batch.next_q.values.type)),
        tau(affine<T>(options.taus.values.type)),
        kappa(kappa_of(options.kappa)),
        sums(pairs<T>(kappa)),
        predicted(padded),
        above(padded),
        below(padded),
        losses(padded),
        slopes(padded),
        more_losses(d.batch.next_q.A > RUN ? padded : 0),
        more_slopes(more_losses.size()),
        target(d.batch.next_q.A) {
    if (options.taus) return;
    for (int64_t i = 0; i < d.K; ++i) below[i] = (static_cast<T>(i) + T(0.5)) / static_cast<T>(d.K);
    weigh();
  }

  // In T: at most its largest number, and 0 below its normal numbers.
  static T kappa_of(double kappa) {
    using Limits = std::numeric_limits<T>;
    return kappa < Limits::min() ? T(0) : static_cast<T>(std::min<double>(kappa, Limits::max()));
  }

  // |tau - 1| and |tau| of the taus in below.
  void weigh() {
    for (int64_t i = 0; i < d.K; ++i) {
      above[i] = std::abs(below[i] - 1);
      below[i] = std::abs(below[i]);
    }
  }

  // The target's quantiles of sample i; returns how many, which is one where they are all equal.
  int64_t fill_target(int64_t i, bool live, int64_t next_row) {
    const Batch& b = d.batch;
    target[0] = b.rewards.at<T>(i);
    if (!live) return 1;
    const int64_t best = best_action(d, next_row, [&](int64_t action) {
      const int64_t row = next_row * d.A + action;
      return value(dqn_fused::cpu::row_of(chooser, {}, row, 0, chooser.A));
    });
    target[0] = best < 0 ? NOT_A_NUMBER<T> : target[0];
    if (best < 0) return 1;
    const Row row = dqn_fused::cpu::row_of(b.next_q, {}, next_row * d.A + best, 0, b.next_q.A);
    next(row, target[0], b.gamma<T>(i), target.data());
    return row.n;
  }

  // The sums over the pairs with n targets.
  void add_pairs(int64_t n) {
    const auto run = [&](int64_t begin, T* loss, T* slope) {
      sums(predicted.data(), above.data(), below.data(), padded, target.data() + begin, std::min(n - begin, RUN), kappa,
           loss, slope);
    };
    run(0, losses.data(), slopes.data());
    for (int64_t begin = RUN; begin < n; begin += RUN) {
      run(begin, more_losses.data(), more_slopes.data());
      for (int64_t k = 0; k < padded; ++k) {
        losses[k] += more_losses[k];
        slopes[k] += more_slopes[k];
      }
    }
  }

  // The worker of reduce_samples.
  T operator()(int64_t i, bool known, bool live, int64_t next_row) {
    const Batch& b = d.batch;
    const int64_t action = b.actions.at<int64_t>(i);
    T* const found = out.slopes ? out.slopes + i * d.K : slopes.data();
    if (!known) {
      std::fill_n(found, d.K, NOT_A_NUMBER<T>);
      out.values[i] = NOT_A_NUMBER<T>;
      write_gradient(d, options.reduction, i, -1, found, out.grad);
      return NOT_A_NUMBER<T>;
    }
    const int64_t n = fill_target(i, live, next_row), parts = options.mean ? n * d.K : n;
    read(dqn_fused::cpu::row_of(b.q, {}, i * d.A + action, 0, d.K), 0, 1, predicted.data());
    if (options.taus) {
      tau(dqn_fused::cpu::row_of(options.taus, {}, i, 0, d.K), 0, 1, below.data());
      weigh();
    }
    add_pairs(n);
    const T share = 1 / static_cast<T>(parts);
    for (int64_t k = 0; k < d.K; ++k) found[k] = slopes[k] * share;
    write_gradient(d, options.reduction, i, action, found, out.grad);
    out.values[i] = static_cast<T>(mean(row_of(predicted, d.K)) - mean(row_of(target, n)));
    const T loss = static_cast<T>(mean(row_of(losses, d.K)) * static_cast<double>(d.K) / static_cast<double>(parts));
    return b.weights ? loss * b.weights.at<T>(i) : loss;
  }
};

}  // namespace

template <class T>
bool quantile(const Distributions& d, const QuantileOptions& options, const Outputs<T>& out) {
  const int64_t chosen = d.values_choose ? 1 : d.batch.next_online ? d.batch.next_online.A : d.batch.next_q.A;
  const int64_t cost = d.A * chosen + PAIR_COST * d.K * d.batch.next_q.A;
  return reduce_samples(d, options.reduction, cost, out.loss, [&] { return Worker<T>(d, options, out); });
}

template bool quantile(const Distributions&, const QuantileOptions&, const Outputs<float>&);
template bool quantile(const Distributions&, const QuantileOptions&, const Outputs<double>&);

}  // namespace dqn_fused::cpu
