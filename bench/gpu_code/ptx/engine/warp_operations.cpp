// Exchange between the lanes of a warp, and barriers.

#include "rounding.h"
#include "warp.h"

namespace ptx {
namespace {

enum class Shuffle { BFLY, IDX, UP, DOWN };

// shfl.sync d[|p], a, b, c, members: c holds the segment mask above the clamp.
template <Shuffle MODE>
void shuffle(Warp& w, const Instr& in, uint32_t lanes) {
  const size_t first = in.v.size() - 4;
  const uint64_t *const a = w.row(in.v[first]), *const b = w.row(in.v[first + 1]), *const c = w.row(in.v[first + 2]);
  uint64_t values[LANES];
  std::memcpy(values, a, sizeof values);
  each(lanes, [&](int i) {
    const int n = get<uint32_t>(b, i) & 31, clamp = get<uint32_t>(c, i) & 31, segment = get<uint32_t>(c, i) >> 8 & 31;
    const int last = (i & segment) | (clamp & ~segment), start = i & segment;
    int from = 0;
    bool valid = false;
    switch (MODE) {
      case Shuffle::BFLY:
        from = i ^ n, valid = from <= last;
        break;
      case Shuffle::IDX:
        from = start | (n & ~segment), valid = from <= last;
        break;
      case Shuffle::UP:
        from = i - n, valid = from >= last;
        break;
      case Shuffle::DOWN:
        from = i + n, valid = from <= last;
        break;
    }
    if (!valid) from = i;
    if (!(lanes >> from & 1)) throw Fault{"lane " + std::to_string(from) + ", which is asked, does not take part", i};
    put<uint32_t>(w.row(in.v[0]), i, static_cast<uint32_t>(values[from]));
    if (first == 2) {
      uint32_t& p = w.predicates[in.v[1]];
      p = (p & ~(1u << i)) | static_cast<uint32_t>(valid) << i;
    }
  });
}

template <class T, class F>
Handler reduce(F) {
  return [](Warp& w, const Instr& in, uint32_t lanes) {
    bool first = true;
    T x{};
    each(lanes, [&](int i) {
      const T y = get<T>(w.row(in.v[1]), i);
      x = first ? y : F{}(x, y);
      first = false;
    });
    each(lanes, [&](int i) { put<T>(w.row(in.v[0]), i, x); });
  };
}

void ballot(Warp& w, const Instr& in, uint32_t lanes) {
  const uint32_t votes = w.predicates[in.v[1]] & lanes;
  each(lanes, [&](int i) { put<uint32_t>(w.row(in.v[0]), i, votes); });
}

template <bool ALL_OF>
void vote(Warp& w, const Instr& in, uint32_t lanes) {
  const uint32_t votes = w.predicates[in.v[1]] & lanes;
  uint32_t& p = w.predicates[in.v[0]];
  p = (p & ~lanes) | ((ALL_OF ? votes == lanes : votes != 0) ? lanes : 0);
}

void nothing(Warp&, const Instr&, uint32_t) {}

void fence(Warp& w, const Instr&, uint32_t) { w.launch().memory->fence(w.actor()); }

void active(Warp& w, const Instr& in, uint32_t lanes) {
  each(lanes, [&](int i) { put<uint32_t>(w.row(in.v[0]), i, lanes); });
}

void commit(Warp& w, const Instr&, uint32_t) {
  w.groups.push_back(std::move(w.copies));
  w.copies.clear();
}

void land(Warp& w, size_t left) {
  for (; w.groups.size() > left; w.groups.pop_front()) {
    for (const Copy& copy : w.groups.front()) w.block->shared->land_copy(w.actor(), copy.to, copy.size, copy.bytes);
  }
}

void wait_group(Warp& w, const Instr& in, uint32_t) { land(w, get<uint32_t>(w.row(in.v[0]), 0)); }

void wait_all(Warp& w, const Instr& in, uint32_t lanes) {
  commit(w, in, lanes);
  land(w, 0);
}

void trap(Warp&, const Instr&, uint32_t) { throw Fault{"the kernel stops itself"}; }

}  // namespace

void add_warp_operations(Table& table) {
  const auto together = [&](const std::string& name, Handler run, bool masked, Category category) {
    table[name] = {run, Kind::TOGETHER, category, masked};
  };
  together("shfl.sync.bfly.b32", shuffle<Shuffle::BFLY>, true, Category::SHUFFLE);
  together("shfl.sync.idx.b32", shuffle<Shuffle::IDX>, true, Category::SHUFFLE);
  together("shfl.sync.up.b32", shuffle<Shuffle::UP>, true, Category::SHUFFLE);
  together("shfl.sync.down.b32", shuffle<Shuffle::DOWN>, true, Category::SHUFFLE);
  const auto redux = [&](const std::string& name, Handler run) {
    together("redux.sync." + name, run, true, Category::SHUFFLE);
  };
  redux("add.u32", reduce<uint32_t>([](uint32_t a, uint32_t b) { return a + b; }));
  redux("add.s32", reduce<uint32_t>([](uint32_t a, uint32_t b) { return a + b; }));
  redux("min.u32", reduce<uint32_t>([](uint32_t a, uint32_t b) { return a < b ? a : b; }));
  redux("max.u32", reduce<uint32_t>([](uint32_t a, uint32_t b) { return a < b ? b : a; }));
  redux("min.s32", reduce<int32_t>([](int32_t a, int32_t b) { return a < b ? a : b; }));
  redux("max.s32", reduce<int32_t>([](int32_t a, int32_t b) { return a < b ? b : a; }));
  redux("and.b32", reduce<uint32_t>([](uint32_t a, uint32_t b) { return a & b; }));
  redux("or.b32", reduce<uint32_t>([](uint32_t a, uint32_t b) { return a | b; }));
  redux("xor.b32", reduce<uint32_t>([](uint32_t a, uint32_t b) { return a ^ b; }));
  redux("min.f32", reduce<float>(Minimum<float, false>{}));
  redux("max.f32", reduce<float>(Maximum<float, false>{}));
  redux("min.NaN.f32", reduce<float>(Minimum<float, true>{}));
  redux("max.NaN.f32", reduce<float>(Maximum<float, true>{}));
  together("vote.sync.ballot.b32", ballot, true, Category::SHUFFLE);
  together("vote.sync.any.pred", vote<false>, true, Category::SHUFFLE);
  together("vote.sync.all.pred", vote<true>, true, Category::SHUFFLE);
  together("bar.warp.sync", nothing, true, Category::BARRIER);
  table["activemask.b32"] = {active, Kind::PLAIN, Category::MOVE};
  for (const char* name :
       {"bar.sync", "barrier.sync", "barrier.sync.aligned", "barrier.cta.sync", "barrier.cta.sync.aligned"}) {
    table[name] = {nothing, Kind::BARRIER, Category::BARRIER};
  }
  for (const char* name :
       {"membar.gl", "membar.sys", "fence.acq_rel.gpu", "fence.acq_rel.sys", "fence.sc.gpu", "fence.sc.sys"}) {
    table[name] = {fence, Kind::PLAIN, Category::BARRIER};
  }
  for (const char* name : {"membar.cta", "fence.acq_rel.cta", "fence.sc.cta"}) {
    table[name] = {nothing, Kind::PLAIN, Category::BARRIER};
  }
  // Groups of copies are counted a warp: its lanes are taken to commit and wait together.
  together("cp.async.commit_group", commit, false, Category::OTHER);
  together("cp.async.wait_group", wait_group, false, Category::OTHER);
  together("cp.async.wait_all", wait_all, false, Category::OTHER);
  table["bra"] = table["bra.uni"] = {nullptr, Kind::BRANCH, Category::CONTROL};
  table["ret"] = table["exit"] = {nullptr, Kind::EXIT, Category::CONTROL};
  table["trap"] = {trap, Kind::PLAIN, Category::CONTROL};
}

}  // namespace ptx
