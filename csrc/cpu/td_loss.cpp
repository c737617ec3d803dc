// The ops on the CPU. Their schemas are in dqn_fused/_ops.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "loss.h"

namespace dqn_fused::cpu {
namespace {

using Maybe = std::optional<Tensor>;

struct Outputs {
  Tensor loss, td, log_sum;
  Maybe grad_q;
};

template <class T>
Outputs run(const Batch& b, const Options& options, const Tensor& q, bool check, bool with_grad) {
  const ScalarType type = accumulation_type(b.q.values.type);
  Outputs out{empty_loss(options.reduction, b, type, q), empty({b.n}, type, q), {}, {}};
  if (options.cql) out.log_sum = empty({b.n}, type, q);
  if (with_grad) out.grad_q = empty({b.n, b.q.A}, b.q.values.type, q);
  const auto data = [](const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); };
  T* const td = data(out.td);
  T* const log_sum = options.cql ? data(out.log_sum) : nullptr;
  const bool all_legal = forward(b, options, data(out.loss), td, log_sum);
  // Worded by dqn_fused.arguments.check_values, which the caller then asks.
  STD_TORCH_CHECK(all_legal || !check, "an action outside [0, A), or a non_final_mask that does not fit next_q");
  if (with_grad) {
    const Saved saved{b.actions, b.weights, b.q, b.legal, b.n, b.q.A};
    backward<T>(saved, options, nullptr, td, log_sum, *out.grad_q);
  }
  return out;
}

Outputs run(const Batch& b, const Options& options, const Tensor& q, bool check, bool with_grad) {
  return b.q.values.type == ScalarType::Double ? run<double>(b, options, q, check, with_grad)
                                               : run<float>(b, options, q, check, with_grad);
}

template <class T>
void write(const Tensor& grad_q, const Saved& saved, const Options& options, const Tensor& grad_loss, const Tensor& td,
           const Maybe& log_sum) {
  const auto data = [](const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); };
  backward(saved, options, data(grad_loss), data(td), log_sum ? data(*log_sum) : nullptr, grad_q);
}

Tensor gradient(const Saved& saved, const Options& options, const Tensor& grad_loss, const Tensor& td,
                const Maybe& log_sum, ScalarType type) {
  Tensor grad_q = empty({saved.n, saved.A}, type, td);
  if (type == ScalarType::Double)
    write<double>(grad_q, saved, options, grad_loss, td, log_sum);
  else
    write<float>(grad_q, saved, options, grad_loss, td, log_sum);
  return grad_q;
}

Options plain(int64_t reduction) {
  Options options;
  options.reduction = reduction;
  return options;
}

std::tuple<Tensor, Tensor> td_loss(const Tensor& q, const Tensor& actions, const Tensor& rewards, const Tensor& next_q,
                                   const Maybe& terminated, const Maybe& non_final_mask, const Maybe& gammas,
                                   double gamma, int64_t reduction, bool check) {
  const Batch b = batch(q, actions, rewards, &next_q, terminated, non_final_mask, gammas, gamma);
  Outputs out = run(b, plain(reduction), q, check, false);
  return {std::move(out.loss), std::move(out.td)};
}

std::tuple<Tensor, Tensor, Tensor> td_loss_and_grad(const Tensor& q, const Tensor& actions, const Tensor& rewards,
                                                    const Tensor& next_q, const Maybe& terminated,
                                                    const Maybe& non_final_mask, const Maybe& gammas, double gamma,
                                                    int64_t reduction, bool check) {
  const Batch b = batch(q, actions, rewards, &next_q, terminated, non_final_mask, gammas, gamma);
  Outputs out = run(b, plain(reduction), q, check, true);
  return {std::move(out.loss), std::move(*out.grad_q), std::move(out.td)};
}

Tensor td_loss_backward(const Tensor& grad_loss, const Tensor& td, const Tensor& actions, int64_t A, ScalarType type,
                        int64_t reduction) {
  return gradient(saved(grad_loss, td, actions, A, type, reduction), plain(reduction), grad_loss, td, {}, type);
}

Outputs general(const Tensor& q, const Tensor& actions, const Tensor& rewards, const Maybe& next_q,
                const Maybe& terminated, const Maybe& non_final_mask, const Maybe& gammas, double gamma,
                const Maybe& next_q_online, const Maybe& next_action_mask, const Maybe& weights, const Maybe& target_q,
                const Maybe& action_mask, const Options& options, bool check, bool with_grad) {
  Batch b = batch(q, actions, rewards, next_q ? &*next_q : nullptr, terminated, non_final_mask, gammas, gamma);
  extend(b, options, q, next_q_online, next_action_mask, weights, target_q, action_mask);
  Outputs out = run(b, options, q, check, with_grad);
  if (!options.cql) out.log_sum = empty({0}, accumulation_type(b.q.values.type), q);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> general_td_loss(const Tensor& q, const Tensor& actions, const Tensor& rewards,
                                                   const Maybe& next_q, const Maybe& terminated,
                                                   const Maybe& non_final_mask, const Maybe& gammas, double gamma,
                                                   const Maybe& next_q_online, const Maybe& next_action_mask,
                                                   const Maybe& weights, const Maybe& target_q,
                                                   const Maybe& action_mask, int64_t loss, double delta, int64_t target,
                                                   double temperature, double alpha, double clip, bool cql,
                                                   double cql_alpha, int64_t reduction, bool check) {
  const Options options{reduction, loss, target, delta, temperature, alpha, clip, cql_alpha, cql};
  Outputs out = general(q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma, next_q_online,
                        next_action_mask, weights, target_q, action_mask, options, check, false);
  return {std::move(out.loss), std::move(out.td), std::move(out.log_sum)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> general_td_loss_and_grad(
    const Tensor& q, const Tensor& actions, const Tensor& rewards, const Maybe& next_q, const Maybe& terminated,
    const Maybe& non_final_mask, const Maybe& gammas, double gamma, const Maybe& next_q_online,
    const Maybe& next_action_mask, const Maybe& weights, const Maybe& target_q, const Maybe& action_mask, int64_t loss,
    double delta, int64_t target, double temperature, double alpha, double clip, bool cql, double cql_alpha,
    int64_t reduction, bool check) {
  const Options options{reduction, loss, target, delta, temperature, alpha, clip, cql_alpha, cql};
  Outputs out = general(q, actions, rewards, next_q, terminated, non_final_mask, gammas, gamma, next_q_online,
                        next_action_mask, weights, target_q, action_mask, options, check, true);
  return {std::move(out.loss), std::move(*out.grad_q), std::move(out.td), std::move(out.log_sum)};
}

Tensor general_td_loss_backward(const Tensor& grad_loss, const Tensor& td, const Tensor& actions, const Maybe& weights,
                                const Maybe& log_sum, const Maybe& q, const Maybe& action_mask, int64_t A,
                                ScalarType type, int64_t loss, double delta, double cql_alpha, int64_t reduction) {
  Options options;
  options.reduction = reduction;
  options.loss = loss;
  options.delta = delta;
  options.cql_alpha = cql_alpha;
  Saved s = saved(grad_loss, td, actions, A, type, reduction);
  extend(s, options, td, type, weights, log_sum, q, action_mask);
  return gradient(s, options, grad_loss, td, log_sum, type);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dqn_fused, CPU, m) {
  m.impl("td_loss", TORCH_BOX(&td_loss));
  m.impl("td_loss_and_grad", TORCH_BOX(&td_loss_and_grad));
  m.impl("td_loss_backward", TORCH_BOX(&td_loss_backward));
  m.impl("general_td_loss", TORCH_BOX(&general_td_loss));
  m.impl("general_td_loss_and_grad", TORCH_BOX(&general_td_loss_and_grad));
  m.impl("general_td_loss_backward", TORCH_BOX(&general_td_loss_backward));
}

}  // namespace dqn_fused::cpu
