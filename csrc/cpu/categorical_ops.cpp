// The ops of the categorical losses.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "atoms.h"
#include "categorical.h"

namespace dqn_fused::cpu {
namespace {

using Maybe = std::optional<Tensor>;

// Whether K atoms from low to high are finite and differ in T: check_range of dqn_fused/categorical_arguments.py.
template <class T>
bool in_range(double low, double high, int64_t K) {
  using Limits = std::numeric_limits<T>;
  const double step = (high - low) / static_cast<double>(K - 1);
  return step > Limits::epsilon() * std::max(std::abs(low), std::abs(high)) && step * Limits::max() >= 1 &&
         high - low <= Limits::max();
}

// The support, padded with zeros: as given, or K atoms from v_min to v_max. That a given one is evenly spaced is
// checked in dqn_fused/categorical.py.
template <class T>
std::vector<T> atoms_of(const Maybe& support, double v_min, double v_max, int64_t K, const Place& place) {
  constexpr int64_t WIDTH = Support<T>::WIDTH;
  fits(K > 1, "q");
  std::vector<T> atoms((K + WIDTH - 1) / WIDTH * WIDTH, T(0));
  if (support) {
    const Column values = column("support", *support, K, place);
    fits(support->dim() == 1 && floating(values.type), "support");
    fits(in_range<T>(values.at<double>(0), values.at<double>(K - 1), K), "support");
    for (int64_t j = 0; j < K; ++j) atoms[j] = values.at<T>(j);
    return atoms;
  }
  fits(in_range<T>(v_min, v_max, K), "support");
  const double step = (v_max - v_min) / static_cast<double>(K - 1);
  for (int64_t j = 0; j < K - 1; ++j) atoms[j] = static_cast<T>(v_min + step * static_cast<double>(j));
  atoms[K - 1] = static_cast<T>(v_max);
  return atoms;
}

Results run(const Tensor& q, const Tensor& actions, const Tensor& rewards, const Maybe& next_q, const Maybe& terminated,
            const Maybe& non_final_mask, const Maybe& gammas, double gamma, const Maybe& next_q_online,
            const Maybe& next_action_mask, const Maybe& weights, const Maybe& support, double v_min, double v_max,
            double sigma, int64_t reduction, bool check, bool with_grad) {
  const Distributions d = distributions(q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma,
                                        next_q_online, next_action_mask, weights);
  fits(!next_q || (next_q->size(2) == d.K && sigma == 0), "next_q");
  fits(!next_q_online || d.values_choose || d.batch.next_online.A == d.K, "next_q_online");
  const CategoricalOptions options{reduction, sigma};
  const auto compute = [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> atoms = atoms_of<T>(support, v_min, v_max, d.K, Place(q));
    return results<T>(d, reduction, {2, d.batch.n}, q, check, with_grad,
                      [&](const Outputs<T>& out) { return categorical(d, options, atoms, out); });
  };
  return d.batch.q.values.type == ScalarType::Double ? compute(0.0) : compute(0.0f);
}

std::tuple<Tensor, Tensor, Tensor> categorical_loss(const Tensor& q, const Tensor& actions, const Tensor& rewards,
                                                    const Maybe& next_q, const Maybe& terminated,
                                                    const Maybe& non_final_mask, const Maybe& gammas, double gamma,
                                                    const Maybe& next_q_online, const Maybe& next_action_mask,
                                                    const Maybe& weights, const Maybe& support, double v_min,
                                                    double v_max, double sigma, int64_t reduction, bool check) {
  Results r = run(q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma, next_q_online,
                  next_action_mask, weights, support, v_min, v_max, sigma, reduction, check, false);
  return {std::move(r.loss), std::move(r.values), std::move(r.slopes)};
}

std::tuple<Tensor, Tensor, Tensor> categorical_loss_and_grad(
    const Tensor& q, const Tensor& actions, const Tensor& rewards, const Maybe& next_q, const Maybe& terminated,
    const Maybe& non_final_mask, const Maybe& gammas, double gamma, const Maybe& next_q_online,
    const Maybe& next_action_mask, const Maybe& weights, const Maybe& support, double v_min, double v_max, double sigma,
    int64_t reduction, bool check) {
  Results r = run(q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma, next_q_online,
                  next_action_mask, weights, support, v_min, v_max, sigma, reduction, check, true);
  return {std::move(r.loss), std::move(r.grad), std::move(r.values)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dqn_fused, CPU, m) {
  m.impl("categorical_loss", TORCH_BOX(&categorical_loss));
  m.impl("categorical_loss_and_grad", TORCH_BOX(&categorical_loss_and_grad));
}

}  // namespace dqn_fused::cpu
