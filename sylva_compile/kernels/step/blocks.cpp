// The step of a rule over blocks, a block at a time. `update`, `scalars`, BUFFERS and RESULTS above are generated.

namespace {

// Returns `count` elements at a cache line, which the thread keeps from block to block.
template <typename T>
T* scratch(int64_t count) {
  static thread_local std::vector<T> memory;
  const size_t wanted = size_t(count) + LINE / sizeof(T);
  if (memory.size() < wanted) memory.resize(wanted);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + LINE - 1) / LINE * LINE);
}

// Loads `height` x `width` elements of the block whose first element is `first`, times `scale`; the rest is zero.
template <typename T>
void load_block(int64_t at, int64_t type, int64_t first, int64_t b, int64_t side, int64_t height, int64_t width, T scale,
                T* block) {
  for (int64_t r = 0; r < side; ++r) {
    T* to = block + r * side;
    const int64_t n = r < height ? width : 0;
    const T* from = n ? load(at, type, first + r * b, n, to) : to;
    for (int64_t c = 0; c < n; ++c) to[c] = from[c] * scale;
    std::fill(to + n, to + side, T(0));
  }
}

template <typename T>
void store_block(int64_t at, int64_t type, int64_t first, int64_t b, int64_t side, int64_t height, int64_t width,
                 const T* block, uint32_t key) {
  for (int64_t r = 0; r < height; ++r) {
    if (type == type_of(T())) {
      std::copy_n(block + r * side, width, address<T>(at) + first + r * b);
    } else {
      store(at, type, first + r * b, width, block + r * side, key);
    }
  }
}

// A tile is one block.
template <typename T>
void step_tile(const int64_t* row, int64_t gradient, const double* hyper, double scale, uint32_t seed, int64_t first,
               int64_t) {
  const int64_t b = row[BLOCK], side = (b + PANEL - 1) / PANEL * PANEL;
  double wide[SCALARS + 1];
  T s[SCALARS + 1];
  scalars(hyper + row[HYPER] * HYPERPARAMETERS, step_of_block(row, first / (b * b)), wide);
  for (int k = 0; k < SCALARS; ++k) s[k] = T(wide[k]);
  int64_t top = 0, left = 0, height = b, width = b;
  if (row[DENSE]) {
    const int64_t *positions = address<int64_t>(row[POSITIONS]), block = first / (b * b);
    top = positions[block] * b, left = positions[row[BLOCKS] + block] * b;
    height = std::min(b, row[ROWS] - top), width = std::min(b, row[COLS] - left);
    if (!in_whole_lines(row, left, width)) prefetch_rows(row, top, left, height, width);
  }
  T* matrices[BUFFERS];
  matrices[0] = scratch<T>(BUFFERS * side * side);
  for (int k = 1; k < BUFFERS; ++k) matrices[k] = matrices[k - 1] + side * side;
  load_block(row[PARAM], row[PARAM_TYPE], first, b, side, height, width, T(1), matrices[0]);
  load_block(gradient, row[GRAD_TYPE], first, b, side, height, width, T(scale), matrices[1]);
  for (int k = 0; k < STATES; ++k) {
    const int64_t* state = state_columns(row, k);
    load_block(state[0], state[1], first, b, side, height, width, T(1), matrices[2 + k]);
  }
  update<T>(b, side, T(height), T(width), s, matrices);
  store_block(row[PARAM], row[PARAM_TYPE], first, b, side, height, width, matrices[RESULTS[0]], 0);
  for (int k = 0; k < STATES; ++k) {
    const int64_t* state = state_columns(row, k);
    store_block(state[0], state[1], first, b, side, height, width, matrices[RESULTS[1 + k]], state_key(row, seed, k));
  }
  if (row[DENSE]) write_through<T>(row, first, top, left, height, width);
}

}  // namespace
