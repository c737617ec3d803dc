#include "categorical.h"

#include <cmath>

#include "atoms.h"

namespace dqn_fused::cpu {
namespace {

constexpr int64_t COST = 8;  // of an exponential, in reads of an element

template <class T>
struct Worker {
  const Distributions& d;
  const CategoricalOptions& options;
  const Support<T>& support;
  const Outputs<T>& out;
  const Matrix& chooser;
  AtomFunctions<T> functions = atom_functions<T>();
  Exponentials<T> taken, next;
  Expectations<T> values;
  std::vector<double> found;
  std::vector<T> scratch;

  Worker(const Distributions& d, const CategoricalOptions& options, const Support<T>& support, const Outputs<T>& out)
      : d(d),
        options(options),
        support(support),
        out(out),
        chooser(d.batch.next_online ? d.batch.next_online : d.batch.next_q),
        taken(exponentials<T>(d.batch.q.values.type)),
        next(exponentials<T>(d.batch.next_q.values.type)),
        values(expectations<T>(chooser.values.type)),
        found(d.A),
        scratch((3 + AtomFunctions<T>::SCRATCH) * (support.padded + Support<T>::WIDTH)) {}

  ActionRows rows_of_actions(int64_t next_row) const {
    const Matrix& legal = d.batch.next_legal;
    const int64_t first = next_row * d.A, step = d.A > 1 ? chooser.offset(first + 1) - chooser.offset(first) : 0;
    const uint8_t* const flags =
        legal ? static_cast<const uint8_t*>(legal.values.data) + legal.offset(next_row) : nullptr;
    return {row_of(chooser, {}, first, 0, d.K), d.A, step, flags, legal.stride_action};
  }

  // The target of sample i, (K,); next_row is read only where something is bootstrapped.
  void fill_target(int64_t i, bool live, int64_t next_row, T* target, T* logits, T* powers, T* more) {
    const Batch& b = d.batch;
    const T reward = b.rewards.at<T>(i);
    if (options.sigma > 0) {
      const double scale = 1 / (options.sigma * std::sqrt(2.0)), most = std::numeric_limits<T>::max();
      return functions.gauss(support, reward, static_cast<T>(std::min(scale, most)), target, more);
    }
    if (!live) return functions.two_hot(support, reward, target);
    if (!d.values_choose) values(support, rows_of_actions(next_row), found.data(), more);
    const int64_t best = best_action(d, next_row, [&](int64_t a) { return found[a]; });
    if (best < 0) return functions.two_hot(support, NOT_A_NUMBER<T>, target);
    const Softmax<T> softmax = next(support, row_of(b.next_q, {}, next_row * d.A + best, 0, d.K), logits, powers);
    functions.project(support, reward, b.gamma<T>(i), powers, softmax.total, target, more);
  }

  // The worker of reduce_samples.
  T operator()(int64_t i, bool known, bool live, int64_t next_row) {
    const Batch& b = d.batch;
    const int64_t action = b.actions.at<int64_t>(i), row = support.padded + Support<T>::WIDTH;
    T *const target = scratch.data(), *const logits = target + row, *const powers = logits + row;
    T *const more = powers + row, *const slopes = out.slopes ? out.slopes + i * d.K : more;
    constexpr T NONE = NOT_A_NUMBER<T>;
    CrossEntropy<T> result{NONE, NONE, NONE, NONE};
    Softmax<T> softmax{NONE, NONE};
    if (known) {
      fill_target(i, live, next_row, target, logits, powers, more);
      softmax = taken(support, row_of(b.q, {}, i * d.A + action, 0, d.K), logits, powers);
      result = functions.cross_entropy(support, target, logits, powers, softmax);
    }
    out.values[i] = result.expectation - result.target_expectation;
    out.values[b.n + i] = result.expectation;
    functions.slopes(support, target, powers, softmax.total, result.mass, slopes);
    write_gradient(d, options.reduction, i, known ? action : -1, slopes, out.grad);
    return b.weights ? result.loss * b.weights.at<T>(i) : result.loss;
  }
};

}  // namespace

template <class T>
bool categorical(const Distributions& d, const CategoricalOptions& options, const std::vector<T>& atoms,
                 const Outputs<T>& out) {
  const Support<T> support{atoms.data(), d.K, static_cast<int64_t>(atoms.size())};
  const int64_t cost = d.A * d.K * (d.batch.next_q ? COST : 1);
  return reduce_samples(d, options.reduction, cost, out.loss, [&] { return Worker<T>(d, options, support, out); });
}

template bool categorical(const Distributions&, const CategoricalOptions&, const std::vector<float>&,
                          const Outputs<float>&);
template bool categorical(const Distributions&, const CategoricalOptions&, const std::vector<double>&,
                          const Outputs<double>&);

}  // namespace dqn_fused::cpu
