// Global and shared memory with a shadow: which warp last wrote and read each byte, and whether it was written at all.
//
// Two accesses conflict where one of them writes, nothing orders them, and they come from two blocks of a launch, or
// from two warps of a block without a barrier between. Warps of one block may write the same value to a byte.

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

// Who accesses memory: epoch counts the barriers of the block so far.
struct Actor {
  uint32_t block = 0;
  uint32_t warp = 0;
  uint32_t epoch = 0;
};

// Bytes of a tensor. written has a flag for each byte, or is null if every byte is written.
struct Range {
  uint64_t begin = 0, size = 0;
  uint8_t* written = nullptr;
};

class GlobalMemory {
 public:
  GlobalMemory(std::vector<Range> ranges, bool races);

  void load(const Actor& actor, uint64_t address, int size, int alignment, void* out);
  void store(const Actor& actor, uint64_t address, int size, int alignment, const void* bytes);
  // The bytes themselves, for an atomic operation on them.
  uint8_t* atomic(const Actor& actor, uint64_t address, int size, bool release, bool acquire);
  // A fence of the whole GPU: makes relaxed atomics behind it release, and those before it acquire.
  void fence(const Actor& actor);

 private:
  static constexpr uint32_t NOBODY = 0, SEVERAL = 0xffffffff, ATOMIC = 0xfffffffe;
  static constexpr int PAGE = 4096;

  // Blocks count from 1. In a time the warp stands above 24 bits of epoch.
  struct Byte {
    uint32_t writer = NOBODY, written_at = 0, reader = NOBODY, read_at = 0;
  };

  // What a block had done when it released at an atomic, the position-th operation on it.
  struct Release {
    size_t position = 0;
    Actor actor;
  };
  struct Sync {
    size_t operations = 0;
    std::unordered_map<uint32_t, std::vector<Release>> releases;
  };
  struct Acquire {
    uint64_t address = 0;
    size_t position = 0;
    Actor actor;
  };

  const Range& find(uint64_t address, int size, int alignment);
  Byte* shadow(uint64_t address);
  bool saw(const Actor& actor, uint32_t block, uint32_t time) const;
  bool saw_atomic(const Actor& actor, uint64_t address) const;
  void check_order(const Actor& actor, uint64_t address, uint32_t other, uint32_t time, const char* what) const;

  std::vector<Range> ranges_;
  size_t last_ = 0;
  bool races_;
  std::unordered_map<uint64_t, std::unique_ptr<std::vector<Byte>>> pages_;
  uint64_t last_page_ = ~0ull;
  Byte* last_bytes_ = nullptr;
  std::unordered_map<uint64_t, Sync> syncs_;
  std::unordered_map<uint32_t, std::vector<Acquire>> acquired_;
  std::unordered_map<uint64_t, Actor> fences_;                  // the last one of each warp
  std::unordered_map<uint64_t, std::vector<Acquire>> relaxed_;  // atomics of a warp that no fence has followed
};

// An access to shared memory, as it happened.
struct Event {
  uint64_t block, warp, epoch, address, size;
  uint64_t stored;  // 0 for a load, else 1 + a hash of the bytes
};

class SharedMemory {
 public:
  // Writes what happens to trace, if that is given.
  explicit SharedMemory(size_t size, std::vector<Event>* trace = nullptr);

  void load(const Actor& actor, uint64_t address, int size, int alignment, void* out);
  void store(const Actor& actor, uint64_t address, int size, int alignment, const void* bytes);
  // The destination of an asynchronous copy: it may not be touched until it has landed.
  void start_copy(const Actor& actor, uint64_t address, int size, int alignment);
  void land_copy(const Actor& actor, uint64_t address, int size, const void* bytes);

 private:
  static constexpr uint8_t NOBODY = 0xff, SEVERAL = 0xfe;

  struct Byte {
    bool written = false, flying = false;
    uint8_t writer = NOBODY, reader = NOBODY;
    uint32_t written_at = 0, read_at = 0;  // epochs
  };

  void check(uint64_t address, int size, int alignment) const;
  void note(const Actor& actor, uint64_t address, int size, const void* stored);

  std::vector<Event>* trace_;
  std::vector<uint8_t> bytes_;
  std::vector<Byte> shadow_;
};

}  // namespace ptx
