// Tensor cores and the loads and stores of their operands. The sum of a product is float64, rounded once.

#include "rounding.h"
#include "shared.h"
#include "warp.h"

namespace ptx {
namespace {

struct Half {
  static constexpr int SIZE = 2;
  static double at(const uint64_t* row, int lane, int part) {
    return from_f16(static_cast<uint16_t>(get<uint32_t>(row, lane) >> 16 * part));
  }
};
struct BFloat16 {
  static constexpr int SIZE = 2;
  static double at(const uint64_t* row, int lane, int part) {
    return from_bf16(static_cast<uint16_t>(get<uint32_t>(row, lane) >> 16 * part));
  }
};
struct Tf32 {
  static constexpr int SIZE = 4;
  static double at(const uint64_t* row, int lane, int) { return tf32(get<uint32_t>(row, lane)); }
};

// d (16 x 8) = a (16 x K) b (K x 8) + c. A register holds a word of a: 4 / SIZE neighbouring columns; the lanes of a
// group of four hold the words of 4 * 4 / SIZE columns, the groups the rows, and registers go on by 8 rows, then by
// columns. b likewise, its columns for rows.
template <class T, int K>
void multiply(Warp& w, const Instr& in, uint32_t) {
  constexpr int PARTS = 4 / T::SIZE, COLUMNS = 4 * PARTS, STEPS = K / COLUMNS;
  double a[16][K], b[8][K];
  const int *const va = in.v.data() + 4, *const vb = va + 2 * STEPS, *const vc = vb + STEPS;
  for (int lane = 0; lane < LANES; ++lane) {
    const int group = lane / 4, column = lane % 4 * PARTS;
    for (int step = 0; step < STEPS; ++step) {
      for (int part = 0; part < PARTS; ++part) {
        const int k = step * COLUMNS + column + part;
        a[group][k] = T::at(w.row(va[2 * step]), lane, part);
        a[group + 8][k] = T::at(w.row(va[2 * step + 1]), lane, part);
        b[group][k] = T::at(w.row(vb[step]), lane, part);
      }
    }
  }
  float d[4][LANES];
  for (int lane = 0; lane < LANES; ++lane) {
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      double sum = get<float>(w.row(vc[r]), lane);
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[column][k];
      d[r][lane] = static_cast<float>(sum);
    }
  }
  for (int r = 0; r < 4; ++r) {
    for (int lane = 0; lane < LANES; ++lane) put(w.row(in.v[r]), lane, d[r][lane]);
  }
}

// Lane 8 * m + r gives the address of row r of matrix m; lane l holds two elements of row l / 4 of each, or of column
// l / 4 if transposed.
template <int MATRICES, bool TRANSPOSED>
void load_matrices(Warp& w, const Instr& in, uint32_t) {
  const uint64_t* const addresses = w.row(in.v[MATRICES]);
  for (int m = 0; m < MATRICES; ++m) {
    uint16_t rows[8][8];
    uint64_t at[8];
    for (int r = 0; r < 8; ++r) {
      at[r] = get<uint32_t>(addresses, 8 * m + r) + in.offset[0];
      on_lane(8 * m + r, [&] { w.block->shared->load(w.actor(), at[r], 16, 16, rows[r]); });
    }
    count_wavefronts(w, at, 8, 16);
    for (int lane = 0; lane < LANES; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      const uint32_t low = TRANSPOSED ? rows[c][r] : rows[r][c], high = TRANSPOSED ? rows[c + 1][r] : rows[r][c + 1];
      put<uint32_t>(w.row(in.v[m]), lane, high << 16 | low);
    }
  }
}

template <int MATRICES, bool TRANSPOSED>
void store_matrices(Warp& w, const Instr& in, uint32_t) {
  const uint64_t* const addresses = w.row(in.v[0]);
  for (int m = 0; m < MATRICES; ++m) {
    uint16_t rows[8][8];
    for (int lane = 0; lane < LANES; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      const uint32_t word = get<uint32_t>(w.row(in.v[1 + m]), lane);
      (TRANSPOSED ? rows[c][r] : rows[r][c]) = static_cast<uint16_t>(word);
      (TRANSPOSED ? rows[c + 1][r] : rows[r][c + 1]) = static_cast<uint16_t>(word >> 16);
    }
    uint64_t at[8];
    for (int r = 0; r < 8; ++r) {
      at[r] = get<uint32_t>(addresses, 8 * m + r) + in.offset[0];
      on_lane(8 * m + r, [&] { w.block->shared->store(w.actor(), at[r], 16, 16, rows[r]); });
    }
    count_wavefronts(w, at, 8, 16);
  }
}

template <int MATRICES>
void add_copies(Table& table) {
  const std::string number = std::to_string(MATRICES);
  for (const char* space : {".shared", ".shared::cta"}) {
    const auto add = [&](const std::string& name, Handler run, Category category) {
      table[name + space + ".b16"] = {run, Kind::TOGETHER, category};
    };
    const std::string load = "ldmatrix.sync.aligned.m8n8.x" + number, store = "stmatrix.sync.aligned.m8n8.x" + number;
    add(load, load_matrices<MATRICES, false>, Category::SHARED_LOAD);
    add(load + ".trans", load_matrices<MATRICES, true>, Category::SHARED_LOAD);
    add(store, store_matrices<MATRICES, false>, Category::SHARED_STORE);
    add(store + ".trans", store_matrices<MATRICES, true>, Category::SHARED_STORE);
  }
}

}  // namespace

void add_matrices(Table& table) {
  const auto add = [&](const std::string& name, Handler run, size_t words_of_a, size_t words_of_b) {
    Opcode& opcode = table["mma.sync.aligned." + name];
    opcode.run = run;
    opcode.kind = Kind::TOGETHER;
    opcode.category = Category::MATRIX;
    opcode.operands = 8 + words_of_a + words_of_b;
  };
  add("m16n8k16.row.col.f32.f16.f16.f32", multiply<Half, 16>, 4, 2);
  add("m16n8k8.row.col.f32.f16.f16.f32", multiply<Half, 8>, 2, 1);
  add("m16n8k16.row.col.f32.bf16.bf16.f32", multiply<BFloat16, 16>, 4, 2);
  add("m16n8k8.row.col.f32.bf16.bf16.f32", multiply<BFloat16, 8>, 2, 1);
  add("m16n8k8.row.col.f32.tf32.tf32.f32", multiply<Tf32, 8>, 4, 2);
  add("m16n8k4.row.col.f32.tf32.tf32.f32", multiply<Tf32, 4>, 2, 1);
  add_copies<1>(table);
  add_copies<2>(table);
  add_copies<4>(table);
}

}  // namespace ptx
