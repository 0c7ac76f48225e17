// The step of a rule over elements. `update` and `scalars` above are generated.

namespace {

// Steps elements [first, first + count) of one parameter.
template <typename T>
void run(const int64_t* row, int64_t gradient, T scale, const T* s, uint32_t seed, int64_t first, int64_t count) {
  alignas(64) T buffers[STATES + 2][CHUNK];
  for (const int64_t end = first + count; first < end; first += CHUNK) {
    const int64_t n = std::min(CHUNK, end - first);
    T* p = load(row[PARAM], row[PARAM_TYPE], first, n, buffers[STATES]);
    const T* g = load(gradient, row[GRAD_TYPE], first, n, buffers[STATES + 1]);
    T* states[STATES + 1];
    for (int k = 0; k < STATES; ++k) {
      const int64_t* state = state_columns(row, k);
      states[k] = load(state[0], state[1], first, n, buffers[k]);
    }
    update(n, scale, s, p, g, states);
    store(row[PARAM], row[PARAM_TYPE], first, n, p, 0);
    for (int k = 0; k < STATES; ++k) {
      const int64_t* state = state_columns(row, k);
      store(state[0], state[1], first, n, states[k], state_key(row, seed, k));
    }
  }
}

// Steps elements [first, end) of one parameter, whole blocks of a dense weight, by the scalars of step `t`.
template <typename T>
void step_range(const int64_t* row, int64_t gradient, const double* hyper, double scale, uint32_t seed, int64_t first,
                int64_t end, double t) {
  double wide[SCALARS + 1];
  T s[SCALARS + 1];
  scalars(hyper + row[HYPER] * HYPERPARAMETERS, t, wide);
  for (int k = 0; k < SCALARS; ++k) s[k] = T(wide[k]);
  if (!row[DENSE]) return run<T>(row, gradient, T(scale), s, seed, first, end - first);
  const int64_t b = row[BLOCK], size = b * b;
  const int64_t* positions = address<int64_t>(row[POSITIONS]);
  for (; first < end; first += size) {
    const int64_t top = positions[first / size] * b, left = positions[row[BLOCKS] + first / size] * b;
    const int64_t height = std::min(b, row[ROWS] - top), width = std::min(b, row[COLS] - left);
    // Whole cache lines are written as soon as they are computed, beside the next rows' arithmetic; single elements are
    // faster to write all at once.
    const bool lines = in_whole_lines(row, left, width);
    const int64_t rows = lines ? std::max(CHUNK / b, int64_t(1)) : b;
    if (!lines) prefetch_rows(row, top, left, height, width);
    for (int64_t r = 0; r < height; r += rows) {
      const int64_t begin = first + r * b, n = std::min(rows, height - r);
      // Elements over the matrix's edge are neither trained nor written.
      if (width == b) {
        run<T>(row, gradient, T(scale), s, seed, begin, n * b);
      } else {
        for (int64_t k = 0; k < n; ++k) run<T>(row, gradient, T(scale), s, seed, begin + k * b, width);
      }
      write_through<T>(row, begin, top + r, left, n, width);
    }
  }
}

template <typename T>
void step_tile(const int64_t* row, int64_t gradient, const double* hyper, double scale, uint32_t seed, int64_t first,
               int64_t tile) {
  const int64_t size = row[BLOCK] * row[BLOCK], unit = size ? std::max(tile / size, int64_t(1)) * size : tile;
  const int64_t end = std::min(first + unit, row[COUNT]);
  if (!row[BORN]) return step_range<T>(row, gradient, hyper, scale, seed, first, end, step_number(row));
  while (first < end) {
    const double t = step_of_block(row, first / size);
    int64_t next = first + size;
    // Blocks of the same age have the same scalars.
    while (next < end && step_of_block(row, next / size) == t) next += size;
    step_range<T>(row, gradient, hyper, scale, seed, first, next, t);
    first = next;
  }
}

}  // namespace
