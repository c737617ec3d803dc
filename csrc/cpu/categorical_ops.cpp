// The ops of the categorical losses.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "atoms.h"
#include "categorical.h"

namespace dqn_fused::cpu {
namespace {

using Maybe = std::optional<Tensor>;

// The support, padded with zeros: as given, or K atoms from v_min to v_max. Whether a given one is evenly spaced is for
// dqn_fused/categorical.py to check.
template <class T>
std::vector<T> atoms_of(const Maybe& support, double v_min, double v_max, int64_t K, const Place& place) {
  constexpr int64_t WIDTH = Support<T>::WIDTH;
  std::vector<T> atoms((K + WIDTH - 1) / WIDTH * WIDTH, T(0));
  if (support) {
    const Column values = column("support", *support, K, place);
    fits(support->dim() == 1 && floating(values.type), "support");
    for (int64_t j = 0; j < K; ++j) atoms[j] = values.at<T>(j);
  } else {
    const double step = (v_max - v_min) / static_cast<double>(K - 1);
    for (int64_t j = 0; j < K; ++j)
      atoms[j] = static_cast<T>(j < K - 1 ? v_min + step * static_cast<double>(j) : v_max);
  }
  fits(K > 1 && atoms[0] < atoms[K - 1], "support");
  return atoms;
}

struct Results {
  Tensor loss, values, slopes, grad;
};

template <class T>
Results run(const Distributions& d, const CategoricalOptions& options, const std::vector<T>& atoms, const Tensor& q,
            bool check, bool with_grad) {
  const ScalarType stored = d.batch.q.values.type, type = accumulation_type(stored);
  const int64_t n = d.batch.n;
  Results r{empty_loss(options.reduction, d.batch, type, q), empty({2, n}, type, q), {}, {}};
  if (with_grad)
    r.grad = empty({n, d.A, d.K}, stored, q);
  else
    r.slopes = empty({n, d.K}, type, q);
  const auto data = [](const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); };
  const CategoricalOutputs<T> out{data(r.loss), data(r.values), with_grad ? nullptr : data(r.slopes),
                                  with_grad ? r.grad.mutable_data_ptr() : nullptr};
  const bool all_known = categorical(d, options, atoms, out);
  // Worded by dqn_fused.arguments.check_values, which the caller then asks.
  STD_TORCH_CHECK(all_known || !check, "an action outside [0, A), or a non_final_mask that does not fit next_q");
  return r;
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
  const Place place(q);
  if (d.batch.q.values.type == ScalarType::Double)
    return run(d, options, atoms_of<double>(support, v_min, v_max, d.K, place), q, check, with_grad);
  return run(d, options, atoms_of<float>(support, v_min, v_max, d.K, place), q, check, with_grad);
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
