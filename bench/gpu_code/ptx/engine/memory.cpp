// The rules of memory.h.

#include "memory.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "kernel.h"

namespace ptx {
namespace {

constexpr int EPOCH_BITS = 24;
constexpr uint32_t SEVERAL_WARPS = 0xff;

uint32_t time_of(const Actor& actor) { return actor.warp << EPOCH_BITS | (actor.epoch & ((1 << EPOCH_BITS) - 1)); }
uint32_t warp_at(uint32_t time) { return time >> EPOCH_BITS; }
uint32_t epoch_at(uint32_t time) { return time & ((1 << EPOCH_BITS) - 1); }
uint64_t key(const Actor& actor) { return static_cast<uint64_t>(actor.block) << 8 | actor.warp; }

std::string hex(uint64_t x) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(x));
  return text;
}

void check_alignment(uint64_t address, int alignment) {
  if (address % alignment) {
    throw Fault{"address " + hex(address) + " is not a multiple of " + std::to_string(alignment)};
  }
}

}  // namespace

GlobalMemory::GlobalMemory(std::vector<Range> ranges, bool races) : ranges_(std::move(ranges)), races_(races) {
  std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
}

const Range& GlobalMemory::find(uint64_t address, int size, int alignment) {
  check_alignment(address, alignment);
  const auto holds = [&](const Range& r) { return r.begin <= address && address + size <= r.begin + r.size; };
  if (last_ < ranges_.size() && holds(ranges_[last_])) return ranges_[last_];
  auto after =
      std::upper_bound(ranges_.begin(), ranges_.end(), address, [](uint64_t x, const Range& r) { return x < r.begin; });
  if (after != ranges_.begin() && holds(*--after)) {
    last_ = after - ranges_.begin();
    return *after;
  }
  std::string what = std::to_string(size) + " bytes at " + hex(address) + " are outside of every tensor";
  const Range* nearest = nullptr;
  const auto distance = [&](const Range& r) {
    return address < r.begin ? r.begin - address : address - (r.begin + r.size) + size;
  };
  for (const Range& r : ranges_) {
    if (nearest == nullptr || distance(r) < distance(*nearest)) nearest = &r;
  }
  if (nearest != nullptr) {
    what += address < nearest->begin ? ": " + std::to_string(nearest->begin - address) + " bytes before one"
                                     : ": at byte " + std::to_string(address - nearest->begin) + " of one";
    what += " of " + std::to_string(nearest->size);
  }
  throw Fault{what};
}

GlobalMemory::Byte* GlobalMemory::shadow(uint64_t address) {
  const uint64_t page = address / PAGE;
  if (page != last_page_) {
    auto& bytes = pages_[page];
    if (!bytes) bytes = std::make_unique<std::vector<Byte>>(PAGE);
    last_page_ = page;
    last_bytes_ = bytes->data();
  }
  return last_bytes_ + address % PAGE;
}

// Whether what a block did at a time is known to the actor, by an atomic that the one released and the other acquired.
bool GlobalMemory::saw(const Actor& actor, uint32_t block, uint32_t time) const {
  const auto acquired = acquired_.find(actor.block);
  if (acquired == acquired_.end()) return false;
  for (const Acquire& acquire : acquired->second) {
    if (acquire.actor.warp != actor.warp && acquire.actor.epoch >= actor.epoch) continue;
    const auto& releases = syncs_.at(acquire.address).releases;
    const auto found = releases.find(block);
    if (found == releases.end()) continue;
    for (const Release& release : found->second) {
      if (release.position > acquire.position) continue;
      if (release.actor.warp == warp_at(time) ? release.actor.epoch >= epoch_at(time)
                                              : release.actor.epoch > epoch_at(time)) {
        return true;
      }
    }
  }
  return false;
}

bool GlobalMemory::saw_atomic(const Actor& actor, uint64_t address) const {
  const auto acquired = acquired_.find(actor.block);
  if (acquired == acquired_.end()) return false;
  for (const Acquire& acquire : acquired->second) {
    if (acquire.address == address && acquire.position == syncs_.at(address).operations &&
        (acquire.actor.warp == actor.warp || acquire.actor.epoch < actor.epoch)) {
      return true;
    }
  }
  return false;
}

void GlobalMemory::check_order(const Actor& actor, uint64_t address, uint32_t other, uint32_t time,
                               const char* what) const {
  if (other == NOBODY) return;
  if (other == actor.block + 1) {
    if (warp_at(time) == actor.warp || epoch_at(time) < actor.epoch) return;
    throw Fault{"race: the byte at " + hex(address) + " was " + what + " by warp " + std::to_string(warp_at(time)) +
                " of this block, without a barrier between"};
  }
  if (other == ATOMIC) {
    if (saw_atomic(actor, address)) return;
    throw Fault{"race: the byte at " + hex(address) + " is accessed by atomics of other blocks"};
  }
  if (other != SEVERAL && saw(actor, other - 1, time)) return;
  throw Fault{"race: the byte at " + hex(address) + " was " + what + " by " +
              (other == SEVERAL ? "several blocks" : "block " + std::to_string(other - 1)) + " of this launch"};
}

void GlobalMemory::load(const Actor& actor, uint64_t address, int size, int alignment, void* out) {
  const Range& range = find(address, size, alignment);
  if (range.written != nullptr) {
    const uint8_t* const flags = range.written + (address - range.begin);
    for (int i = 0; i < size; ++i) {
      if (!flags[i]) throw Fault{"the byte at " + hex(address + i) + " was never written"};
    }
  }
  std::memcpy(out, reinterpret_cast<const void*>(address), size);
  if (!races_) return;
  const uint32_t me = actor.block + 1, now = time_of(actor);
  Byte* byte = nullptr;
  for (int i = 0; i < size; ++i) {
    byte = i == 0 || (address + i) % PAGE == 0 ? shadow(address + i) : byte + 1;
    if (byte->writer != NOBODY) check_order(actor, address + i, byte->writer, byte->written_at, "written");
    if (byte->reader == NOBODY || byte->reader == me) {
      const bool others =
          byte->reader == me && epoch_at(byte->read_at) == actor.epoch && warp_at(byte->read_at) != actor.warp;
      byte->read_at = others ? SEVERAL_WARPS << EPOCH_BITS | epoch_at(now) : now;
      byte->reader = me;
    } else if (byte->reader != SEVERAL && !saw(actor, byte->reader - 1, byte->read_at)) {
      byte->reader = SEVERAL;
    }
  }
}

void GlobalMemory::store(const Actor& actor, uint64_t address, int size, int alignment, const void* bytes) {
  const Range& range = find(address, size, alignment);
  uint8_t* const to = reinterpret_cast<uint8_t*>(address);
  if (races_) {
    const uint32_t me = actor.block + 1, now = time_of(actor);
    Byte* byte = nullptr;
    for (int i = 0; i < size; ++i) {
      byte = i == 0 || (address + i) % PAGE == 0 ? shadow(address + i) : byte + 1;
      const bool same = to[i] == static_cast<const uint8_t*>(bytes)[i];
      if (!(same && byte->writer == me)) check_order(actor, address + i, byte->writer, byte->written_at, "written");
      if (!(same && byte->reader == me)) check_order(actor, address + i, byte->reader, byte->read_at, "read");
      byte->writer = me;
      byte->written_at = now;
      byte->reader = NOBODY;
    }
  }
  if (range.written != nullptr) std::memset(range.written + (address - range.begin), 1, size);
  std::memcpy(to, bytes, size);
}

uint8_t* GlobalMemory::atomic(const Actor& actor, uint64_t address, int size, bool release, bool acquire) {
  const Range& range = find(address, size, size);
  if (range.written != nullptr && !range.written[address - range.begin]) {
    throw Fault{"the byte at " + hex(address) + " was never written"};
  }
  if (races_) {
    for (int i = 0; i < size; ++i) {
      Byte* const byte = shadow(address + i);
      if (byte->writer != ATOMIC) check_order(actor, address + i, byte->writer, byte->written_at, "written");
      check_order(actor, address + i, byte->reader, byte->read_at, "read");
      byte->writer = ATOMIC;
    }
    Sync& sync = syncs_[address];
    const size_t position = ++sync.operations;
    if (release) {
      sync.releases[actor.block].push_back({position, actor});
    } else if (const auto fence = fences_.find(key(actor)); fence != fences_.end()) {
      sync.releases[actor.block].push_back({position, fence->second});
    }
    if (acquire) {
      acquired_[actor.block].push_back({address, position, actor});
    } else {
      relaxed_[key(actor)].push_back({address, position, actor});
    }
  }
  return reinterpret_cast<uint8_t*>(address);
}

void GlobalMemory::fence(const Actor& actor) {
  fences_[key(actor)] = actor;
  std::vector<Acquire>& waiting = relaxed_[key(actor)];
  for (Acquire& acquire : waiting) {
    acquire.actor = actor;
    acquired_[actor.block].push_back(acquire);
  }
  waiting.clear();
}

// Poisoned: NaN as a float, -1 as an integer.
SharedMemory::SharedMemory(size_t size, std::vector<Event>* trace) : trace_(trace), bytes_(size, 0xff), shadow_(size) {}

void SharedMemory::note(const Actor& actor, uint64_t address, int size, const void* stored) {
  if (trace_ == nullptr) return;
  uint64_t hash = 0;
  if (stored != nullptr) {
    const std::string_view bytes(static_cast<const char*>(stored), size);
    hash = 1 + std::hash<std::string_view>{}(bytes) / 2;
  }
  trace_->push_back({actor.block, actor.warp, actor.epoch, address, static_cast<uint64_t>(size), hash});
}

void SharedMemory::check(uint64_t address, int size, int alignment) const {
  check_alignment(address, alignment);
  if (address + size > bytes_.size()) {
    throw Fault{std::to_string(size) + " bytes at " + std::to_string(address) + " are outside of the " +
                std::to_string(bytes_.size()) + " of shared memory"};
  }
}

void SharedMemory::load(const Actor& actor, uint64_t address, int size, int alignment, void* out) {
  check(address, size, alignment);
  note(actor, address, size, nullptr);
  for (int i = 0; i < size; ++i) {
    Byte& byte = shadow_[address + i];
    const auto where = [&] { return "shared byte " + std::to_string(address + i); };
    if (byte.flying) throw Fault{"race: " + where() + " is read before its asynchronous copy has landed"};
    if (!byte.written) throw Fault{where() + " was never written"};
    if (byte.writer != actor.warp && byte.written_at == actor.epoch) {
      throw Fault{"race: " + where() + " was written by warp " + std::to_string(byte.writer) + ", no barrier between"};
    }
    if (byte.reader == NOBODY || byte.read_at != actor.epoch) {
      byte.reader = static_cast<uint8_t>(actor.warp);
      byte.read_at = actor.epoch;
    } else if (byte.reader != actor.warp) {
      byte.reader = SEVERAL;
    }
  }
  std::memcpy(out, bytes_.data() + address, size);
}

void SharedMemory::store(const Actor& actor, uint64_t address, int size, int alignment, const void* bytes) {
  check(address, size, alignment);
  note(actor, address, size, bytes);
  for (int i = 0; i < size; ++i) {
    Byte& byte = shadow_[address + i];
    const uint8_t value = static_cast<const uint8_t*>(bytes)[i];
    const bool same = byte.written && bytes_[address + i] == value;
    const auto where = [&] { return "shared byte " + std::to_string(address + i); };
    if (byte.flying) throw Fault{"race: " + where() + " is written while an asynchronous copy is on its way to it"};
    if (!same && byte.written && byte.writer != actor.warp && byte.written_at == actor.epoch) {
      throw Fault{"race: " + where() + " was written by warp " + std::to_string(byte.writer) + ", no barrier between"};
    }
    if (!same && byte.reader != NOBODY && byte.reader != actor.warp && byte.read_at == actor.epoch) {
      throw Fault{"race: " + where() + " was read by " +
                  (byte.reader == SEVERAL ? "other warps" : "warp " + std::to_string(byte.reader)) +
                  ", no barrier between"};
    }
    byte.written = true;
    byte.writer = static_cast<uint8_t>(actor.warp);
    byte.written_at = actor.epoch;
    bytes_[address + i] = value;
  }
}

void SharedMemory::start_copy(const Actor& actor, uint64_t address, int size, int alignment) {
  check(address, size, alignment);
  note(actor, address, size, "on its way, 16 ..");
  for (int i = 0; i < size; ++i) {
    Byte& byte = shadow_[address + i];
    const auto where = [&] { return "shared byte " + std::to_string(address + i); };
    const bool written = byte.written && byte.writer != actor.warp && byte.written_at == actor.epoch;
    const bool read = byte.reader != NOBODY && byte.reader != actor.warp && byte.read_at == actor.epoch;
    if (byte.flying || written || read) {
      throw Fault{"race: an asynchronous copy to " + where() + ", which " +
                  (byte.flying ? "another is on its way to"
                   : read      ? "another warp has read, no barrier between"
                               : "another warp has written, no barrier between")};
    }
    byte.flying = true;
  }
}

void SharedMemory::land_copy(const Actor& actor, uint64_t address, int size, const void* bytes) {
  note(actor, address, size, bytes);
  for (int i = 0; i < size; ++i) {
    Byte& byte = shadow_[address + i];
    byte.flying = false;
    byte.written = true;
    byte.writer = static_cast<uint8_t>(actor.warp);
    byte.written_at = actor.epoch;
  }
  std::memcpy(bytes_.data() + address, bytes, size);
}

}  // namespace ptx
