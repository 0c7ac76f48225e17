// The functions that Python calls, for all rules. `step_tile` above steps a tile by the rule.
//
// A tile is a row of the table and its first element. Tiles are independent of each other, so the result does not depend
// on the number of threads.

namespace {

template <typename T>
double sum_of_squares(const int64_t* row, int64_t gradient, int64_t first, int64_t end) {
  alignas(64) T buffer[CHUNK];
  double total = 0.0;
  for (; first < end; first += CHUNK) {
    const int64_t n = std::min(CHUNK, end - first);
    const T* g = load(gradient, row[GRAD_TYPE], first, n, buffer);
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) total += double(g[i]) * double(g[i]);
  }
  return total;
}

}  // namespace

// Steps every parameter that has a gradient: `table [rows, WIDTH]`, `gradients [rows]` (0 where one is missing),
// `hyper [groups, HYPERPARAMETERS]`, `tiles [count, 2]` (row and first element).
extern "C" void step(const int64_t* table, const int64_t* gradients, int64_t rows, const double* hyper,
                     const int64_t* tiles, int64_t count, int64_t tile, double scale, uint32_t seed, int threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; ++i) {
      const int64_t *row = table + tiles[2 * i] * WIDTH, gradient = gradients[tiles[2 * i]], first = tiles[2 * i + 1];
      if (!gradient) continue;
      if (row[PARAM_TYPE] == FLOAT64) {
        step_tile<double>(row, gradient, hyper, scale, seed, first, tile);
      } else {
        step_tile<float>(row, gradient, hyper, scale, seed, first, tile);
      }
    }
    finish_lines();
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t* row = table + r * WIDTH;
    if (gradients[r] && row[STEP]) *address<float>(row[STEP]) += 1.0f;
  }
}

// Writes the sum of squares of each tile's gradient to `sums [count]`; not finite where an element is not.
extern "C" void squares(const int64_t* table, const int64_t* gradients, const int64_t* tiles, int64_t count, int64_t tile,
                        double* sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t *row = table + tiles[2 * i] * WIDTH, gradient = gradients[tiles[2 * i]], first = tiles[2 * i + 1];
    const int64_t b = row[BLOCK], unit = row[BLOCK] ? std::max(tile / (b * b), int64_t(1)) * b * b : tile;
    const int64_t end = std::min(first + unit, row[COUNT]);
    if (!gradient) {
      sums[i] = 0.0;
    } else if (row[GRAD_TYPE] == FLOAT64) {
      sums[i] = sum_of_squares<double>(row, gradient, first, end);
    } else {
      sums[i] = sum_of_squares<float>(row, gradient, first, end);
    }
  }
}
