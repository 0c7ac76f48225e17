// Loads and stores of elements of any dtype, and of blocks into dense weights. The constants above are generated.
//
// A row of the table describes one parameter.

namespace {

enum Type { FLOAT32, BFLOAT16, FLOAT16, FLOAT64, BFLOAT16_STOCHASTIC };
constexpr int64_t CHUNK = 512;  // Elements stepped at a time, whose results stay in the first-level cache.
constexpr int64_t LINE = 64;    // Bytes of a cache line.

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return value != value ? 0x7FC0 : uint16_t(nearest);
}

// Rounds up with the probability that makes the expectation exact. Infinity and NaN are not rounded at random.
inline uint16_t to_bfloat16_stochastic(float value, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const bool finite = (bits & 0x7F800000) != 0x7F800000;
  return finite ? uint16_t((bits + (random & 0xFFFF)) >> 16) : to_bfloat16(value);
}

// A 32-bit mixer with low bias: each bit of the argument changes each bit of the result with probability one half.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

inline uint32_t random_bits(uint32_t key, int64_t element) {
  return mix(mix(uint32_t(element) ^ key) + uint32_t(element >> 32));
}

template <typename T>
T* address(int64_t at) { return reinterpret_cast<T*>(at); }

constexpr Type type_of(float) { return FLOAT32; }
constexpr Type type_of(double) { return FLOAT64; }

// Returns `n` elements from `first` on as T: a pointer to them if they have that type, else widened into `buffer`.
template <typename T>
T* load(int64_t at, int64_t type, int64_t first, int64_t n, T* buffer) {
  if (type == type_of(T())) return address<T>(at) + first;
  switch (type) {
    case FLOAT32: std::copy_n(address<float>(at) + first, n, buffer); break;
    case FLOAT64: std::copy_n(address<double>(at) + first, n, buffer); break;
    case FLOAT16: std::copy_n(address<_Float16>(at) + first, n, buffer); break;
    default:
      for (int64_t i = 0; i < n; ++i) buffer[i] = from_bfloat16(address<uint16_t>(at)[first + i]);
  }
  return buffer;
}

// Stores what `load` returned; values of type T were changed in place and need no store.
template <typename T>
void store(int64_t at, int64_t type, int64_t first, int64_t n, const T* values, uint32_t key) {
  if (type == type_of(T())) return;
  switch (type) {
    case FLOAT32: std::copy_n(values, n, address<float>(at) + first); break;
    case FLOAT64: std::copy_n(values, n, address<double>(at) + first); break;
    case FLOAT16:
      for (int64_t i = 0; i < n; ++i) address<_Float16>(at)[first + i] = _Float16(float(values[i]));
      break;
    case BFLOAT16:
      for (int64_t i = 0; i < n; ++i) address<uint16_t>(at)[first + i] = to_bfloat16(float(values[i]));
      break;
    default:
      for (int64_t i = 0; i < n; ++i)
        address<uint16_t>(at)[first + i] = to_bfloat16_stochastic(float(values[i]), random_bits(key, first + i));
  }
}

double step_number(const int64_t* row) { return row[STEP] ? double(*address<float>(row[STEP])) + 1.0 : 1.0; }

// The number of this step among the block's own, since its states started from zero.
double step_of_block(const int64_t* row, int64_t block) {
  return step_number(row) - (row[BORN] ? double(address<float>(row[BORN])[block]) : 0.0);
}

uint32_t state_key(const int64_t* row, uint32_t seed, int state) {
  return mix(mix(mix(seed ^ uint32_t(step_number(row))) + uint32_t(row[INDEX])) + uint32_t(state));
}

const int64_t* state_columns(const int64_t* row, int state) { return row + WIDTH - STATE_COLUMNS * (STATES - state); }

// Writes a whole cache line, past the caches where the processor can. The caches would read the line before they change
// it: rows of a block are pages apart in the dense weight, so the caches hold none of a large weight's lines.
inline void write_line(void* line, const void* values) {
#ifdef __SSE2__
  const auto* from = static_cast<const __m128i*>(values);
  auto* to = static_cast<__m128i*>(line);
  for (int k = 0; k < 4; ++k) _mm_stream_si128(to + k, _mm_load_si128(from + k));
#else
  std::memcpy(line, values, LINE);
#endif
}

// Makes the lines that this thread wrote visible to all other threads.
inline void finish_lines() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Whether `width` elements from column `left` on are whole cache lines of the dense weight in every row.
bool in_whole_lines(const int64_t* row, int64_t left, int64_t width) {
  const int64_t bytes = row[DENSE_TYPE] == FLOAT64 ? 8 : row[DENSE_TYPE] == FLOAT32 ? 4 : 2;
  return row[COL_STRIDE] == 1 && (row[DENSE] + left * bytes) % LINE == 0 && row[ROW_STRIDE] * bytes % LINE == 0 &&
         width * bytes % LINE == 0;
}

// Rounds the rows of a block whose first element is `first` into the dense weight at (top, left).
template <typename T, typename D, typename Round>
void write_rows(const int64_t* row, int64_t first, int64_t top, int64_t left, int64_t height, int64_t width, Round round) {
  constexpr int64_t PIECE = LINE / sizeof(D);
  const int64_t b = row[BLOCK], down = row[ROW_STRIDE], right = row[COL_STRIDE];
  const T* block = address<T>(row[PARAM]) + first;
  D* dense = address<D>(row[DENSE]) + top * down + left * right;
  if (in_whole_lines(row, left, width)) {
    alignas(LINE) D line[PIECE];
    for (int64_t r = 0; r < height; ++r)
      for (int64_t c = 0; c < width; c += PIECE) {
        for (int64_t k = 0; k < PIECE; ++k) line[k] = round(block[r * b + c + k]);
        write_line(dense + r * down + c, line);
      }
  } else if (right == 1) {
    for (int64_t r = 0; r < height; ++r)
      for (int64_t c = 0; c < width; ++c) dense[r * down + c] = round(block[r * b + c]);
  } else {
    for (int64_t c = 0; c < width; ++c)
      for (int64_t r = 0; r < height; ++r) dense[r * down + c * right] = round(block[r * b + c]);
  }
}

// Fetching a block's rows, pages apart in the dense weight, takes about as long as stepping the block, so the prefetch
// starts first. Whole cache lines are written without being fetched.
void prefetch_rows(const int64_t* row, int64_t top, int64_t left, int64_t height, int64_t width) {
  const int64_t bytes = row[DENSE_TYPE] == FLOAT64 ? 8 : row[DENSE_TYPE] == FLOAT32 ? 4 : 2;
  if (row[COL_STRIDE] != 1) return;
  for (int64_t r = 0; r < height; ++r) {
    const char* at = address<char>(row[DENSE]) + ((top + r) * row[ROW_STRIDE] + left) * bytes;
    for (int64_t offset = 0; offset < width * bytes; offset += LINE) __builtin_prefetch(at + offset, 1);
  }
}

template <typename T>
void write_through(const int64_t* row, int64_t first, int64_t top, int64_t left, int64_t height, int64_t width) {
  switch (row[DENSE_TYPE]) {
    case FLOAT32: return write_rows<T, float>(row, first, top, left, height, width, [](T x) { return float(x); });
    case FLOAT64: return write_rows<T, double>(row, first, top, left, height, width, [](T x) { return double(x); });
    case FLOAT16:
      return write_rows<T, _Float16>(row, first, top, left, height, width, [](T x) { return _Float16(float(x)); });
    default:
      return write_rows<T, uint16_t>(row, first, top, left, height, width, [](T x) { return to_bfloat16(float(x)); });
  }
}

}  // namespace
