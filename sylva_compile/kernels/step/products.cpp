// Products of square matrices, tile by tile in the processor's vector registers.
//
// A matrix is `side` x `side` in memory, `side` a multiple of 16, and zero beyond its first `n` rows and columns. It
// begins at a cache line.

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, TILE_ROWS = 8, TILE_VECTORS = 3;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, TILE_ROWS = 4, TILE_VECTORS = 2;
#else
constexpr int VECTOR_BYTES = 16, TILE_ROWS = 4, TILE_VECTORS = 2;
#endif
constexpr int64_t PANEL = 16;  // `side` is a multiple of it.

template <typename T>
struct Vectors {
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int64_t LANES = VECTOR_BYTES / sizeof(T);
};

// Computes ROWS x WIDTH vectors of `c = a · b`, or of `aᵀ · b`; the pointers are at the tile's first row and column.
template <typename T, bool TRANSPOSED, int ROWS, int WIDTH>
inline void multiply_tile(int64_t n, int64_t side, const T* a, const T* b, T* c) {
  using Vector = typename Vectors<T>::Vector;
  constexpr int64_t LANES = Vectors<T>::LANES;
  Vector sums[ROWS][WIDTH] = {};
  for (int64_t k = 0; k < n; ++k) {
    Vector right[WIDTH];
    for (int w = 0; w < WIDTH; ++w) right[w] = *reinterpret_cast<const Vector*>(b + k * side + w * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const T left = TRANSPOSED ? a[k * side + r] : a[r * side + k];
#pragma GCC unroll 4
      for (int w = 0; w < WIDTH; ++w) sums[r][w] += left * right[w];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int w = 0; w < WIDTH; ++w) *reinterpret_cast<Vector*>(c + r * side + w * LANES) = sums[r][w];
}

// Computes as many tiles of ROWS rows from `row` on as fit between column `col` and the last one; returns where they end.
template <typename T, bool TRANSPOSED, int ROWS, int WIDTH>
inline int64_t multiply_row(int64_t n, int64_t side, int64_t row, int64_t col, const T* a, const T* b, T* c) {
  constexpr int64_t STEP = WIDTH * Vectors<T>::LANES;
  const T* left = a + (TRANSPOSED ? row : row * side);
  for (; col + STEP <= side; col += STEP)
    multiply_tile<T, TRANSPOSED, ROWS, WIDTH>(n, side, left, b + col, c + row * side + col);
  return col;
}

// c = a · b, or aᵀ · b.
template <typename T, bool TRANSPOSED>
void multiply(int64_t n, int64_t side, const T* a, const T* b, T* c) {
  constexpr int64_t WIDEST = TILE_VECTORS * Vectors<T>::LANES;
  for (int64_t row = 0; row < side; row += TILE_ROWS) {
    int64_t col = 0;
    // Use the widest tiles only where they fill the row; else a narrow tile would remain at its end.
    if (side % WIDEST == 0) col = multiply_row<T, TRANSPOSED, TILE_ROWS, TILE_VECTORS>(n, side, row, col, a, b, c);
    col = multiply_row<T, TRANSPOSED, TILE_ROWS, 2>(n, side, row, col, a, b, c);
    multiply_row<T, TRANSPOSED, TILE_ROWS, 1>(n, side, row, col, a, b, c);
  }
}

#if defined(__clang__) || __GNUC__ >= 12
// Swaps elements of two rows, one of the log2(LANES) stages of a transpose: the row numbers differ in the bit STEP, and
// an element whose lane has this bit in the upper row changes places with one whose lane lacks it in the lower row.
template <typename T, int64_t STEP, size_t... LANE>
inline void exchange(typename Vectors<T>::Vector& a, typename Vectors<T>::Vector& b, std::index_sequence<LANE...>) {
  constexpr int64_t LANES = sizeof...(LANE);
  const auto upper = __builtin_shufflevector(a, b, int(LANE & STEP ? LANES + LANE - STEP : LANE)...);
  b = __builtin_shufflevector(a, b, int(LANE & STEP ? LANES + LANE : LANE + STEP)...);
  a = upper;
}

template <typename T, int64_t STEP = 1>
inline void transpose_rows(typename Vectors<T>::Vector (&rows)[Vectors<T>::LANES]) {
  constexpr int64_t LANES = Vectors<T>::LANES;
  if constexpr (STEP < LANES) {
#pragma GCC unroll 16
    for (int64_t r = 0; r < LANES; ++r)
      if (!(r & STEP)) exchange<T, STEP>(rows[r], rows[r + STEP], std::make_index_sequence<LANES>());
    transpose_rows<T, 2 * STEP>(rows);
  }
}

// Writes the transpose of the panel of `a` at (row, col) to the panel of `c` at (col, row).
template <typename T>
void transpose_panel(int64_t side, int64_t row, int64_t col, const T* a, T* c) {
  using Vector = typename Vectors<T>::Vector;
  constexpr int64_t LANES = Vectors<T>::LANES;
  for (int64_t r = row; r < row + PANEL; r += LANES)
    for (int64_t k = col; k < col + PANEL; k += LANES) {
      Vector rows[LANES];
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) rows[i] = *reinterpret_cast<const Vector*>(a + (r + i) * side + k);
      transpose_rows<T>(rows);
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) *reinterpret_cast<Vector*>(c + (k + i) * side + r) = rows[i];
    }
}
#else
template <typename T>
void transpose_panel(int64_t side, int64_t row, int64_t col, const T* a, T* c) {
  for (int64_t r = row; r < row + PANEL; ++r)
    for (int64_t k = col; k < col + PANEL; ++k) c[k * side + r] = a[r * side + k];
}
#endif

// The same for a product that is symmetric: computes the panels on and above the diagonal, and transposes them.
template <typename T, bool TRANSPOSED>
void multiply_symmetric(int64_t n, int64_t side, const T* a, const T* b, T* c) {
  for (int64_t row = 0; row < side; row += 2 * TILE_ROWS)
    multiply_row<T, TRANSPOSED, 2 * TILE_ROWS, 1>(n, side, row, row / PANEL * PANEL, a, b, c);
  for (int64_t row = 0; row < side; row += PANEL)
    for (int64_t col = row + PANEL; col < side; col += PANEL) transpose_panel(side, row, col, c, c);
}

template <typename T>
void transpose(int64_t side, const T* a, T* c) {
  for (int64_t row = 0; row < side; row += PANEL)
    for (int64_t col = 0; col < side; col += PANEL) transpose_panel(side, row, col, a, c);
}

}  // namespace
