// Products of small matrices, C = S + A B: rows of A times PANEL columns of B at a time, sums in registers.
#pragma once

#include <utility>

#include "vectors.h"

// Of a left factor the element (i, k) is p[i * row + k * column], so that a transposed matrix is one too.
struct Left {
  const float* p;
  long row, column;
};

// Rows of `ld` numbers in panels of PANEL columns, `panel` numbers apart; ld 0 is one row for all, no p is zero.
template <class Number>
struct Panels {
  Number* p;
  long ld, panel;
  Panels(Number* p = nullptr, long ld = 0, long panel = PANEL) : p(p), ld(ld), panel(panel) {}
  operator Panels<const Number>() const { return {p, ld, panel}; }
  Number* at(long row, long column) const { return p + row * ld + column / PANEL * panel + column % PANEL; }
};
using Right = Panels<const float>;
using Target = Panels<float>;
static const Right NOTHING;

// Panels of a matrix [rows, columns] one behind the other, in which products read without a stride.
static inline long packed_size(long rows, long columns) { return rows * ((columns + PANEL - 1) / PANEL) * PANEL; }
template <class Number>
static inline Panels<Number> packed(Number* p, long rows, long columns) {
  long ld = columns < PANEL ? padded(columns) : PANEL;
  return {p, ld, rows * PANEL};
}

constexpr long AHEAD = 16;  // rows of B that the first to read them fetches into the cache before

template <bool FIRST, int M, int N>
static inline void tile(Left a, const float* b, long ldb, long depth, const float* s, long lds, float* c, long ldc) {
  vec sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) sum[i][j] = s ? load(s + i * lds + j * LANES) : vec{};
  for (long k = 0; k < depth; k++) {
    vec right[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
      right[j] = load(b + k * ldb + j * LANES);
      if (FIRST) __builtin_prefetch(b + (k + AHEAD) * ldb + j * LANES);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      vec left = all(a.p[i * a.row + k * a.column]);
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) store(c + i * ldc + j * LANES, sum[i][j]);
}

constexpr int ROWS = 6;  // of A at a time
typedef void (*Tile)(Left, const float*, long, long, const float*, long, float*, long);
#define WIDTHS(F, M) {tile<F, M, 1>, tile<F, M, 2>, tile<F, M, 3>, tile<F, M, 4>}
#define HEIGHTS(F) {WIDTHS(F, 1), WIDTHS(F, 2), WIDTHS(F, 3), WIDTHS(F, 4), WIDTHS(F, 5), WIDTHS(F, 6)}
static const Tile TILE[2][ROWS][4] = {HEIGHTS(false), HEIGHTS(true)};
#undef HEIGHTS
#undef WIDTHS

// C [m, n] = S + A [m, k] B [k, n]; S may be C, and n is padded: what lies behind column n is computed as well.
static inline void product(long m, long n, long k, Left a, Right b, Right s, Target c) {
  if (m == 0) return;
  long groups = (m + ROWS - 1) / ROWS;
  n = (n + LANES - 1) / LANES * LANES;
  for (long j = 0; j < n; j += PANEL) {
    long vectors = (n - j < PANEL ? n - j : PANEL) / LANES;
    for (long g = 0, i = 0; g < groups; g++) {
      long end = m * (g + 1) / groups;  // groups alike, for few rows leave few sums under way
      Left rows{a.p + i * a.row, a.row, a.column};
      TILE[g == 0][end - i - 1][vectors - 1](rows, b.at(0, j), b.ld, k, s.p ? s.at(i, j) : nullptr, s.ld, c.at(i, j), c.ld);
      i = end;
    }
  }
}

// Two vectors with halves of runs of 2 * DISTANCE lanes exchanged: what both have at lanes without that bit, and with it.
template <int DISTANCE, int... LANE>
static inline void exchange(vec a, vec b, vec& low, vec& high, std::integer_sequence<int, LANE...>) {
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, (LANE & DISTANCE ? LANES + LANE - DISTANCE : LANE)...);
  high = __builtin_shufflevector(a, b, (LANE & DISTANCE ? LANES + LANE : LANE + DISTANCE)...);
#else
  low = __builtin_shuffle(a, b, ints{(LANE & DISTANCE ? LANES + LANE - DISTANCE : LANE)...});
  high = __builtin_shuffle(a, b, ints{(LANE & DISTANCE ? LANES + LANE : LANE + DISTANCE)...});
#endif
}
template <int DISTANCE>
static inline void exchange(vec a, vec b, vec& low, vec& high) {
  exchange<DISTANCE>(a, b, low, high, std::make_integer_sequence<int, LANES>());
}

template <int DISTANCE = 1>
static inline void transpose(vec* square) {
  if constexpr (DISTANCE < LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
      if (!(i & DISTANCE)) exchange<DISTANCE>(square[i], square[i + DISTANCE], square[i], square[i + DISTANCE]);
    transpose<2 * DISTANCE>(square);
  }
}

// In lane i the sum of the lanes of rows[i], which are used up.
template <int DISTANCE = 1>
static inline vec sums(vec* rows) {
  if constexpr (DISTANCE < LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES / DISTANCE; i += 2) {
      vec low, high;
      exchange<DISTANCE>(rows[i], rows[i + 1], low, high);
      rows[i / 2] = low + high;
    }
    return sums<2 * DISTANCE>(rows);
  }
  return rows[0];
}

template <int M>
static inline void dot(const float* a, long lda, const float* b, long ldb, long depth, long n, float* c, long ldc) {
  constexpr int N = 16 / M;
  for (long j = 0; j < n; j += N) {
    vec sum[16] = {};
    const float* rows[N];
    for (int r = 0; r < N; r++) rows[r] = b + (j + r < n ? j + r : n - 1) * ldb;
    for (long k = 0; k < depth; k += LANES) {
      vec right[N];
#pragma GCC unroll 16
      for (int r = 0; r < N; r++) right[r] = load_first(rows[r] + k, depth - k);
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) {
        vec left = load_first(a + i * lda + k, depth - k);
#pragma GCC unroll 16
        for (int r = 0; r < N; r++) sum[i * N + r] += left * right[r];
      }
    }
    float found[16];
    for (int g = 0; g < 16; g += LANES) store(found + g, sums(sum + g));
    for (int i = 0; i < M; i++)
      for (int r = 0; r < N && j + r < n; r++) c[i * ldc + j + r] = found[i * N + r];
  }
}

// C [m, n] = A [m, k] B [n, k]^T, rows by rows: for so few of B that to transpose it would take as long.
static inline void dots(long m, long n, long k, const float* a, long lda, const float* b, long ldb, float* c, long ldc) {
  typedef void (*Dot)(const float*, long, const float*, long, long, long, float*, long);
  static const Dot DOT[] = {dot<1>, dot<2>, dot<3>, dot<4>, dot<5>};
  long groups = (m + 4) / 5;
  for (long g = 0, i = 0; g < groups && n > 0; g++) {
    long end = m * (g + 1) / groups;
    DOT[end - i - 1](a + i * lda, lda, b, ldb, k, n, c + i * ldc, ldc);
    i = end;
  }
}

// to [columns, rows] = from [rows, columns], in which rows are not padded; behind the last row of it stand zeros.
static inline void transpose(long rows, long columns, Right from, Target to) {
  for (long i = 0; i < rows; i += LANES)
    for (long j = 0; j < columns; j += LANES) {
      vec square[LANES];
      for (int r = 0; r < LANES; r++)
        square[r] = i + r < rows ? load_first(from.at(i + r, j), columns - j) : vec{};
      transpose(square);
      for (int c = 0; c < LANES && j + c < columns; c++) store(to.at(j + c, i), square[c]);
    }
}
