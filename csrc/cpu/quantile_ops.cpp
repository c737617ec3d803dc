// The ops of the quantile loss.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "quantile.h"

namespace dqn_fused::cpu {
namespace {

using Maybe = std::optional<Tensor>;

// (n, K), or (K,) for all samples.
Matrix taus_of(const Maybe& taus, const Distributions& d, const Place& place) {
  if (!taus) return {};
  if (taus->dim() == 2) {
    const Matrix found = matrix("taus", *taus, place);
    fits(found.rows == d.batch.n && found.A == d.K, "taus");
    return found;
  }
  const Column values = column("taus", *taus, d.K, place);
  fits(taus->dim() == 1 && floating(values.type), "taus");
  return {{values.data, values.type}, d.batch.n, d.K, d.batch.n, 0, 0, values.stride};
}

Results run(const Tensor& q, const Tensor& actions, const Tensor& rewards, const Maybe& next_q, const Maybe& terminated,
            const Maybe& non_final_mask, const Maybe& gammas, double gamma, const Maybe& next_q_online,
            const Maybe& next_action_mask, const Maybe& weights, const Maybe& taus, double kappa, bool mean,
            int64_t reduction, bool check, bool with_grad) {
  const Distributions d = distributions(q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma,
                                        next_q_online, next_action_mask, weights);
  fits(next_q.has_value() && kappa >= 0, "next_q");
  const QuantileOptions options{reduction, kappa, mean, taus_of(taus, d, Place(q))};
  const auto fill = [&](const auto& out) { return quantile(d, options, out); };
  if (d.batch.q.values.type == ScalarType::Double)
    return results<double>(d, reduction, {d.batch.n}, q, check, with_grad, fill);
  return results<float>(d, reduction, {d.batch.n}, q, check, with_grad, fill);
}

std::tuple<Tensor, Tensor, Tensor> quantile_loss(const Tensor& q, const Tensor& actions, const Tensor& rewards,
                                                 const Maybe& next_q, const Maybe& terminated,
                                                 const Maybe& non_final_mask, const Maybe& gammas, double gamma,
                                                 const Maybe& next_q_online, const Maybe& next_action_mask,
                                                 const Maybe& weights, const Maybe& taus, double kappa, bool mean,
                                                 int64_t reduction, bool check) {
  Results r = run(q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma, next_q_online,
                  next_action_mask, weights, taus, kappa, mean, reduction, check, false);
  return {std::move(r.loss), std::move(r.values), std::move(r.slopes)};
}

std::tuple<Tensor, Tensor, Tensor> quantile_loss_and_grad(const Tensor& q, const Tensor& actions, const Tensor& rewards,
                                                          const Maybe& next_q, const Maybe& terminated,
                                                          const Maybe& non_final_mask, const Maybe& gammas,
                                                          double gamma, const Maybe& next_q_online,
                                                          const Maybe& next_action_mask, const Maybe& weights,
                                                          const Maybe& taus, double kappa, bool mean, int64_t reduction,
                                                          bool check) {
  Results r = run(q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma, next_q_online,
                  next_action_mask, weights, taus, kappa, mean, reduction, check, true);
  return {std::move(r.loss), std::move(r.grad), std::move(r.values)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dqn_fused, CPU, m) {
  m.impl("quantile_loss", TORCH_BOX(&quantile_loss));
  m.impl("quantile_loss_and_grad", TORCH_BOX(&quantile_loss_and_grad));
}

}  // namespace dqn_fused::cpu
