// The schedule: blocks in a random order, two of them resident at a time, their warps interleaved at random.
//
// Lanes of a warp that have diverged are fragments. The one that is lowest in the code runs, so that they meet again;
// at an instruction that exchanges something between lanes a fragment waits for the others.

#include "execute.h"

#include <algorithm>
#include <numeric>

namespace ptx {
namespace {

constexpr size_t RESIDENT = 2;

std::string coordinates(const Dim& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

Dim place(uint32_t index, const Dim& extent) {
  return {index % extent.x, index / extent.x % extent.y, index / extent.x / extent.y};
}

uint64_t special(const std::string& name, const Launch& launch, const Block& block, uint32_t warp, int lane) {
  const Dim thread = place(warp * LANES + lane, launch.block);
  const auto axis = [&](const Dim& d) -> uint64_t { return name.back() == 'x' ? d.x : name.back() == 'y' ? d.y : d.z; };
  if (name.rfind("%tid.", 0) == 0) return axis(thread);
  if (name.rfind("%ntid.", 0) == 0) return axis(launch.block);
  if (name.rfind("%ctaid.", 0) == 0) return axis(block.at);
  if (name.rfind("%nctaid.", 0) == 0) return axis(launch.grid);
  if (name == "%laneid") return lane;
  if (name == "%warpid") return warp;
  if (name == "%nwarpid") return block.warps.size();
  if (name == "%lanemask_eq") return 1u << lane;
  if (name == "%lanemask_lt") return (1u << lane) - 1;
  if (name == "%lanemask_le") return (2ull << lane) - 1;
  if (name == "%lanemask_gt") return ALL & ~((2ull << lane) - 1);
  if (name == "%lanemask_ge") return ALL & ~((1u << lane) - 1);
  if (name == "dynamic shared memory") return launch.dynamic_start;
  throw Fault{"unknown special register " + name};
}

class Schedule {
 public:
  Schedule(Launch& launch, const Options& options)
      : launch_(launch), kernel_(*launch.kernel), options_(options), random_(options.seed) {}

  void run() {
    std::vector<uint32_t> order(static_cast<size_t>(launch_.grid.x) * launch_.grid.y * launch_.grid.z);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    std::vector<std::unique_ptr<Block>> resident;
    size_t next = 0;
    while (next < order.size() || !resident.empty()) {
      if (resident.size() < RESIDENT && next < order.size()) {
        resident.push_back(start(order[next++]));
        continue;
      }
      const size_t chosen = random_() % resident.size();
      if (advance(*resident[chosen])) continue;
      resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(chosen));
    }
  }

 private:
  std::unique_ptr<Block> start(uint32_t index) {
    auto block = std::make_unique<Block>();
    block->launch = &launch_;
    block->index = index;
    block->at = place(index, launch_.grid);
    block->shared = std::make_unique<SharedMemory>(launch_.dynamic_start + launch_.dynamic_shared, launch_.trace);
    const uint32_t threads = launch_.block.x * launch_.block.y * launch_.block.z;
    for (uint32_t first = 0; first < threads; first += LANES) block->warps.push_back(std::make_unique<Warp>());
    for (uint32_t i = 0; i < block->warps.size(); ++i) start(*block, *block->warps[i], i, threads - i * LANES);
    launch_.counts.warps += block->warps.size();
    return block;
  }

  void start(Block& block, Warp& w, uint32_t index, uint32_t threads) {
    w.block = &block;
    w.index = index;
    w.live = threads >= LANES ? ALL : (1u << threads) - 1;
    w.fragments.push_back({0, w.live});
    // A register that was never written is NaN, or large.
    w.registers.assign(static_cast<size_t>(kernel_.rows) * LANES, 0x7ff8dead7fc0dead);
    w.predicates.assign(kernel_.predicates, 0);
    if (kernel_.local_bytes) w.local.assign(LANES, std::vector<uint8_t>(kernel_.local_bytes, 0xff));
    for (const auto& [row, bits] : kernel_.constants) std::fill_n(w.row(row), LANES, bits);
    for (const auto& [predicate, bits] : kernel_.constant_predicates) w.predicates[predicate] = bits;
    for (const auto& [row, name] : kernel_.specials) {
      for (int lane = 0; lane < LANES; ++lane) w.row(row)[lane] = special(name, launch_, block, index, lane);
    }
  }

  // Runs one warp for a while; false when the block has ended.
  bool advance(Block& block) {
    std::vector<Warp*> ready;
    bool alive = false;
    for (const auto& warp : block.warps) {
      alive |= !warp->done();
      if (!warp->done() && !warp->at_barrier) ready.push_back(warp.get());
    }
    if (!alive) return false;
    if (ready.empty()) {
      pass_barrier(block);
      return true;
    }
    Warp& w = *ready[random_() % ready.size()];
    for (uint64_t budget = 1 + random_() % 64; budget > 0 && !w.done() && !w.at_barrier; --budget) step(w);
    return true;
  }

  // Every warp that has not ended waits.
  void pass_barrier(Block& block) {
    const Warp* first = nullptr;
    for (const auto& warp : block.warps) {
      if (warp->done()) continue;
      if (first != nullptr && warp->barrier != first->barrier) {
        throw Fault{kernel_.name + ": deadlock: warps wait at different barriers, block " + coordinates(block.at)};
      }
      first = warp.get();
    }
    if (launch_.trace != nullptr) launch_.barriers.emplace_back(block.index, first->fragments[0].pc - 1);
    ++block.epoch;
    for (const auto& warp : block.warps) warp->at_barrier = false;
  }

  void step(Warp& w) {
    Fragment& f = lowest(w);
    const Instr& in = kernel_.code[f.pc];
    if (++launch_.counts.instructions > options_.most_instructions) throw Fault{kernel_.name + " does not end"};
    uint32_t lanes = f.lanes;
    if (in.guard >= 0) lanes &= in.negated ? ~w.predicates[in.guard] : w.predicates[in.guard];
    try {
      execute(w, f, in, lanes);
    } catch (Fault& fault) {
      throw Fault{kernel_.name + ", " + in.place + ", block " + coordinates(w.block->at) + ", " + who(w, fault.lane) +
                  ": " + fault.what + "\n    " + in.text};
    }
    if (w.fragments.size() != 1) settle(w);
  }

  void execute(Warp& w, Fragment& f, const Instr& in, uint32_t lanes) {
    switch (in.op.kind) {
      case Kind::PLAIN:
        if (lanes != 0) in.op.run(w, in, lanes);
        break;
      case Kind::BRANCH:
        count(in);
        branch(w, f, in, lanes);
        return;
      case Kind::EXIT:
        w.live &= ~lanes;
        f.lanes &= ~lanes;
        break;
      case Kind::BARRIER:
        if (lanes != 0 && f.lanes != w.live) {
          f.waiting = true;
          return;
        }
        if (lanes == 0) break;
        if (in.v.size() != 1) throw Fault{"a barrier of a part of the block"};
        w.at_barrier = true;
        w.barrier = get<uint32_t>(w.row(in.v[0]), 0);
        break;
      case Kind::TOGETHER:
        if (lanes == 0) break;
        if ((members(w, in, lanes) & w.live) & ~f.lanes) {
          f.waiting = true;
          return;
        }
        in.op.run(w, in, lanes);
        break;
    }
    count(in);
    ++f.pc;
  }

  static uint32_t members(Warp& w, const Instr& in, uint32_t lanes) {
    if (!in.op.masked) return ALL;
    const uint64_t* const row = w.row(in.v.back());
    const uint32_t mask = get<uint32_t>(row, __builtin_ctz(lanes));
    each(lanes, [&](int i) {
      if (get<uint32_t>(row, i) != mask || !(mask >> i & 1)) throw Fault{"a lane outside of its member mask", i};
    });
    return mask;
  }

  void branch(Warp& w, Fragment& f, const Instr& in, uint32_t lanes) {
    const uint32_t left = f.lanes & ~lanes;
    if (lanes == 0) {
      ++f.pc;
    } else if (left == 0) {
      f.pc = in.target;
    } else {
      f.lanes = left;
      ++f.pc;
      w.fragments.push_back({in.target, lanes});
    }
  }

  void count(const Instr& in) { ++launch_.counts.by_category[static_cast<int>(in.op.category)]; }

  Fragment& lowest(Warp& w) {
    if (w.fragments.size() == 1 && !w.fragments[0].waiting) return w.fragments[0];
    Fragment* found = nullptr;
    for (Fragment& f : w.fragments) {
      if (!f.waiting && (found == nullptr || f.pc < found->pc)) found = &f;
    }
    if (found == nullptr) {
      const Instr& in = kernel_.code[w.fragments[0].pc];
      throw Fault{kernel_.name + ", " + in.place + ", block " + coordinates(w.block->at) + ", " + who(w, -1) +
                  ": deadlock: the lanes of a warp wait for one another\n    " + in.text};
    }
    return *found;
  }

  // Fragments at one instruction become one; those without lanes go.
  static void settle(Warp& w) {
    std::vector<Fragment> kept;
    for (const Fragment& f : w.fragments) {
      if (f.lanes == 0) continue;
      const auto other = std::find_if(kept.begin(), kept.end(), [&](const Fragment& k) { return k.pc == f.pc; });
      if (other == kept.end()) {
        kept.push_back(f);
      } else {
        other->lanes |= f.lanes;
        other->waiting = false;
      }
    }
    // Lanes that have exited no longer have to be waited for.
    if (kept.size() < w.fragments.size()) {
      for (Fragment& f : kept) f.waiting = false;
    }
    w.fragments = std::move(kept);
  }

  std::string who(const Warp& w, int lane) const {
    if (lane < 0) return "warp " + std::to_string(w.index);
    return "thread " + coordinates(place(w.index * LANES + lane, launch_.block));
  }

  Launch& launch_;
  const Kernel& kernel_;
  const Options& options_;
  std::mt19937_64 random_;
};

}  // namespace

void execute(Launch& launch, const Options& options) { Schedule(launch, options).run(); }

}  // namespace ptx
