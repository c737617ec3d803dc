// The ops on the CPU.

#include <torch/csrc/stable/ops.h>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include "../ops.h"
#include "loss.h"
#include "rows.h"
#include "versions.h"

namespace dqn_fused::cpu {
namespace {

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

Tensor empty_gradient(int64_t n, int64_t A, ScalarType type, const Tensor& like) {
  Tensor grad_q = empty({n, A}, type, like);
  advise_huge_pages(grad_q.mutable_data_ptr(), n * A * element_size(type));
  return grad_q;
}

template <class T>
Outputs run(const Batch& b, const Options& options, const Tensor& q, bool check, bool with_grad) {
  const ScalarType type = accumulation_type(b.q.values.type);
  Outputs out{empty_loss(options.reduction, b, type, q), empty({b.n}, type, q), {}, {}};
  if (options.cql) out.normaliser = empty({2, b.n}, type, q);
  if (with_grad) out.grad_q = empty_gradient(b.n, b.q.A, b.q.values.type, q);
  const auto data = [](const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); };
  T* const td = data(out.td);
  T* const normaliser = options.cql ? data(*out.normaliser) : nullptr;
  const Saved saved{b.actions, b.weights, b.q, b.legal, b.n, b.q.A};
  void* const grad_q = with_grad ? out.grad_q->mutable_data_ptr() : nullptr;
  const Gradient<T> gradient{saved, options, nullptr, td, normaliser, grad_q, b.q.values.type};
  const bool all_legal = forward(b, options, data(out.loss), td, normaliser, with_grad ? &gradient : nullptr);
  // Worded by dqn_fused.arguments.check_values, which the caller then asks.
  STD_TORCH_CHECK(all_legal || !check, "an action outside [0, A), or a non_final_mask that does not fit next_q");
  return out;
}

template <class T>
void write(const Tensor& grad_q, const Saved& saved, const Options& options, const Tensor& grad_loss, const Tensor& td,
           const Maybe& normaliser, ScalarType type) {
  const auto data = [](const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); };
  Gradient<T>{
      saved, options, data(grad_loss), data(td), normaliser ? data(*normaliser) : nullptr, grad_q.mutable_data_ptr(),
      type}
      .write();
}

struct Cpu {
  static Outputs run(const Batch& b, const Options& options, const Tensor& q, const Maybe&, bool check,
                     bool with_grad) {
    return b.q.values.type == ScalarType::Double ? cpu::run<double>(b, options, q, check, with_grad)
                                                 : cpu::run<float>(b, options, q, check, with_grad);
  }

  static Tensor gradient(const Saved& saved, const Options& options, const Tensor& grad_loss, const Tensor& td,
                         const Maybe& normaliser, ScalarType type) {
    Tensor grad_q = empty_gradient(saved.n, saved.A, type, td);
    if (type == ScalarType::Double)
      write<double>(grad_q, saved, options, grad_loss, td, normaliser, type);
    else
      write<float>(grad_q, saved, options, grad_loss, td, normaliser, type);
    return grad_q;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dqn_fused, CPU, m) { Ops<Cpu>::implement(m); }

}  // namespace dqn_fused::cpu

// The instruction set in use, for a bug report; see versions.h.
extern "C" __attribute__((visibility("default"))) const char* dqn_fused_cpu_capability() {
  return dqn_fused::cpu::CAPABILITIES[static_cast<int>(dqn_fused::cpu::capability())];
}
