// One function compiled for several vector instruction sets; the processor chooses at the first call, and no better one
// than the environment variable DQN_FUSED_CPU_CAPABILITY names: default, avx2 or avx512.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace dqn_fused::cpu {

// What a version calls must be inlined into it: otherwise it is compiled for any processor.
#define DQN_FUSED_INLINE __attribute__((always_inline)) inline

#if defined(__x86_64__) && defined(__GNUC__)
#define DQN_FUSED_MULTIVERSION 1
#endif

enum class Capability { DEFAULT, AVX2, AVX512 };
constexpr const char* CAPABILITIES[] = {"default", "avx2", "avx512"};

// The best that the processor has.
inline Capability supported() {
#ifdef DQN_FUSED_MULTIVERSION
  // Asked by hand, not by target_clones: an ifunc resolver runs before a sanitizer does, and musl has none.
  const bool fma = __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Capability::AVX512;
  if (fma && __builtin_cpu_supports("avx2")) return Capability::AVX2;
#endif
  return Capability::DEFAULT;
}

// The one in use, read once; dqn_fused/_backends/compiled_backend.py refuses other words.
inline Capability capability() {
  static const Capability found = [] {
    const char* const wanted = std::getenv("DQN_FUSED_CPU_CAPABILITY");
    for (int k = 0; wanted != nullptr && k < 3; ++k) {
      if (std::strcmp(wanted, CAPABILITIES[k]) == 0) return std::min(static_cast<Capability>(k), supported());
    }
    return supported();
  }();
  return found;
}

template <class Op, class Signature = decltype(Op::run)>
struct Versions;

template <class Op, class Result, class... Arguments>
struct Versions<Op, Result(Arguments...)> {
  using Function = Result (*)(Arguments...);

  static Result baseline(Arguments... arguments) { return Op::run(arguments...); }

#ifdef DQN_FUSED_MULTIVERSION
  __attribute__((target("avx2,fma"))) static Result avx2(Arguments... arguments) { return Op::run(arguments...); }

  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) static Result avx512(Arguments... arguments) {
    return Op::run(arguments...);
  }
#endif

  static Function best() {
#ifdef DQN_FUSED_MULTIVERSION
    if (capability() == Capability::AVX512) return avx512;
    if (capability() == Capability::AVX2) return avx2;
#endif
    return baseline;
  }
};

// The best version of Op::run.
template <class Op>
typename Versions<Op>::Function fastest() {
  static const auto best = Versions<Op>::best();
  return best;
}

}  // namespace dqn_fused::cpu
