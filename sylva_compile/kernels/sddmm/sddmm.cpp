// SDDMM on the CPU: blocks of lhs^T * rhs, for lhs [T, m] and rhs [T, n] with any strides.
//
// A task computes a run of blocks in one block row, over one segment of the tokens. It walks its segment in tiles of
// TOKENS tokens. For each tile it packs the panels that it reads (TOKENS x b of lhs once, of rhs for each block),
// widened to the type of the sums, and multiplies them with a kernel that keeps a tile of the result in registers.
// Processors that have instructions for bfloat16 multiply it as it is, two tokens at once, and add to float32.
// Packing makes it fast: rows of an operand often lie a power of two apart, and a panel left in its place would then
// share a few sets of the cache. Where many small blocks lie in few rows and columns, all tasks share packed panels.
//
// Segments depend on the shape alone, and their sums are added in order. The result therefore depends neither on the
// number of threads nor on the task that each thread runs.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int TOKENS = 128;  // tokens of a tile: both panels of a register tile stay in the first-level cache
constexpr int RUN = 4;       // most blocks of a task, which share a packed panel of lhs
constexpr int LARGE = 64;    // blocks from this size on take so long to multiply that packing hardly shows
constexpr int REUSE = 3;     // blocks for each panel, above which packing panels once outweighs waiting for them

#if defined(__AVX512F__)
constexpr int BYTES = 64, HEIGHT = 8;
#else
constexpr int BYTES = 32, HEIGHT = 4;
#endif

struct BFloat16 {
    uint16_t bits;
    operator float() const {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};

struct Operand {
    const void* data;
    int64_t width;          // number of columns
    int64_t token_stride;   // in elements
    int64_t column_stride;
};

template <typename W>
struct Vector {
    typedef W type __attribute__((vector_size(BYTES), aligned(sizeof(W)), may_alias));
    static constexpr int lanes = BYTES / sizeof(W);
};

// What a packed panel holds of one column: one token, as wide as the sums.
template <typename T, typename W>
struct Packed {
    typedef W type;
    static constexpr int depth = 1;  // tokens that one value holds

    static W of(const T* place, int64_t /* token_stride */, bool /* full */) { return static_cast<W>(*place); }
    static void add(typename Vector<W>::type& total, W factor, const W* values) {
        total += factor * *reinterpret_cast<const typename Vector<W>::type*>(values);
    }
};

#if defined(__AVX512BF16__)
// Two tokens, for the instruction that adds both products to a sum in float32. It takes subnormal numbers for zero.
struct Pair {
    uint16_t first, second;
};

template <>
struct Packed<BFloat16, float> {
    typedef Pair type;
    static constexpr int depth = 2;

    static Pair of(const BFloat16* place, int64_t token_stride, bool full) {
        return {place->bits, full ? place[token_stride].bits : uint16_t(0)};
    }
    static void add(Vector<float>::type& total, Pair factor, const Pair* values) {
        int both;
        std::memcpy(&both, &factor, sizeof both);
        total = reinterpret_cast<Vector<float>::type>(_mm512_dpbf16_ps(
            (__m512)total, (__m512bh)_mm512_set1_epi32(both), (__m512bh)_mm512_loadu_si512(values)));
    }
};
#endif

template <typename T, typename W>
using Value = typename Packed<T, W>::type;

// Packed values along the tokens of a tile, and along the first `tokens` of them.
template <typename T, typename W>
constexpr int STEPS = TOKENS / Packed<T, W>::depth;
template <typename T, typename W>
int steps_of(int tokens) {
    return (tokens + Packed<T, W>::depth - 1) / Packed<T, W>::depth;
}

// Packs one step of the first `count` columns at `source`; the rest of the GROUP becomes zero. Unless `full`, there is
// only one token left.
template <int GROUP, typename T, typename W>
inline void pack_group(const T* source, const Operand& from, int count, bool full, Value<T, W>* to) {
    using P = Packed<T, W>;
    const int64_t apart = from.token_stride;
    if (count == GROUP && from.column_stride == 1 && full) {
        for (int i = 0; i < GROUP; ++i) to[i] = P::of(source + i, apart, true);
    } else {
        for (int i = 0; i < GROUP; ++i)
            to[i] = i < count ? P::of(source + i * from.column_stride, apart, full) : Value<T, W>{};
    }
}

// Packs columns into panels of GROUP columns, [panel][step][GROUP]; columns from `used` on become zero.
template <int GROUP, typename T, typename W>
void pack(const Operand& from, int64_t token, int tokens, int64_t column, int used, int padded, Value<T, W>* to) {
    using P = Packed<T, W>;
    const T* base = static_cast<const T*>(from.data) + token * from.token_stride + column * from.column_stride;
    for (int group = 0; group < padded; group += GROUP, to += static_cast<int64_t>(STEPS<T, W>) * GROUP) {
        const int count = std::clamp(used - group, 0, GROUP);
        for (int t = 0; t < tokens; t += P::depth) {
            const T* source = base + group * from.column_stride + t * from.token_stride;
            pack_group<GROUP, T, W>(source, from, count, t + P::depth <= tokens, to + t / P::depth * GROUP);
        }
    }
}

// sums[HEIGHT][VECTORS * lanes] (+)= left^T * right over `steps` values along the tokens of packed panels.
template <int VECTORS, typename T, typename W>
void multiply(const Value<T, W>* left, const Value<T, W>* right, int steps, W* sums, int64_t stride, bool add) {
    using V = typename Vector<W>::type;
    constexpr int lanes = Vector<W>::lanes, width = VECTORS * lanes;
    V total[HEIGHT][VECTORS];
    for (int i = 0; i < HEIGHT; ++i)
        for (int v = 0; v < VECTORS; ++v) total[i][v] = V{};
    for (int t = 0; t < steps; ++t)
        for (int i = 0; i < HEIGHT; ++i)
            for (int v = 0; v < VECTORS; ++v)
                Packed<T, W>::add(total[i][v], left[t * HEIGHT + i], right + t * width + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < HEIGHT; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
            V* place = reinterpret_cast<V*>(sums + i * stride + v * lanes);
            *place = add ? *place + total[i][v] : total[i][v];
        }
}

struct Problem {
    Operand lhs, rhs;
    int64_t tokens;
    const int64_t *rows, *cols;
    int64_t blocks;
    int b;
    int64_t segments;
    int threads;
    const int32_t* offsets;  // where the tokens of each expert end; null where there is one matrix and no experts
    int64_t row_blocks;      // block rows of lhs: rows count on from one expert to the next

    // The first column of lhs that the block reads.
    int64_t row_of(int64_t block) const { return rows[block] % row_blocks * b; }
    // The tokens that the block sums over.
    int64_t start_of(int64_t block) const {
        const int64_t expert = rows[block] / row_blocks;
        return offsets && expert > 0 ? std::clamp<int64_t>(offsets[expert - 1], 0, tokens) : 0;
    }
    int64_t stop_of(int64_t block) const {
        return offsets ? std::clamp<int64_t>(offsets[rows[block] / row_blocks], 0, tokens) : tokens;
    }
};

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Writes `sums` [rows x stride] into the block `to` [b, b]; elements over the edge become zero, even if sums are NaN.
template <typename W>
void store(const W* sums, int64_t stride, int b, int height, int width, W* to) {
    for (int i = 0; i < b; ++i) {
        const int kept = i < height ? width : 0;
        std::copy(sums + i * stride, sums + i * stride + kept, to + static_cast<int64_t>(i) * b);
        std::fill(to + static_cast<int64_t>(i) * b + kept, to + static_cast<int64_t>(i + 1) * b, W(0));
    }
}

template <typename T, typename W, int VECTORS>
class Task {
  public:
    explicit Task(int b)
        : high_(round_up(b, HEIGHT)),
          wide_(round_up(b, WIDTH)),
          left_(new Value<T, W>[STEPS<T, W> * high_]),
          right_(new Value<T, W>[STEPS<T, W> * wide_]),
          sums_(new W[RUN * high_ * wide_]) {}

    // Computes blocks first..last (of one block row) over tokens start..stop into `out`, that segment's [blocks, b, b].
    void run(const Problem& p, int64_t first, int64_t last, int64_t start, int64_t stop, W* out) {
        const int64_t row = p.row_of(first);
        if (start >= stop) std::fill(sums_.get(), sums_.get() + RUN * high_ * wide_, W(0));
        const int height = static_cast<int>(std::min<int64_t>(p.b, p.lhs.width - row));
        for (int64_t token = start; token < stop; token += TOKENS) {
            const int tokens = static_cast<int>(std::min<int64_t>(TOKENS, stop - token));
            pack<HEIGHT, T, W>(p.lhs, token, tokens, row, height, high_, left_.get());
            for (int64_t k = first; k < last; ++k) {
                const int64_t col = p.cols[k] * p.b;
                pack<WIDTH, T, W>(p.rhs, token, tokens, col, width_of(p, col), wide_, right_.get());
                W* sums = sums_.get() + (k - first) * high_ * wide_;
                for (int j = 0; j < wide_; j += WIDTH)
                    for (int i = 0; i < high_; i += HEIGHT)
                        multiply<VECTORS, T, W>(left_.get() + i * STEPS<T, W>, right_.get() + j * STEPS<T, W>,
                                                steps_of<T, W>(tokens), sums + i * wide_ + j, wide_, token > start);
            }
        }
        for (int64_t k = first; k < last; ++k)
            store(sums_.get() + (k - first) * high_ * wide_, wide_, p.b, height, width_of(p, p.cols[k] * p.b),
                  out + k * p.b * p.b);
    }

  private:
    static constexpr int WIDTH = VECTORS * Vector<W>::lanes;

    static int width_of(const Problem& p, int64_t col) {
        return static_cast<int>(std::min<int64_t>(p.b, p.rhs.width - col));
    }

    int64_t high_, wide_;
    std::unique_ptr<Value<T, W>[]> left_, right_;
    std::unique_ptr<W[]> sums_;
};

template <typename T, typename W, int VECTORS>
bool compute(const Problem& p, const int64_t* runs, int64_t count, W* out) {
    const int64_t size = static_cast<int64_t>(p.b) * p.b, tiles = (p.tokens + TOKENS - 1) / TOKENS;
    const int threads = static_cast<int>(std::min<int64_t>(p.threads, count * p.segments));
    bool failed = false;
#pragma omp parallel num_threads(threads)
    {
        std::unique_ptr<Task<T, W, VECTORS>> task;
        try {
            task.reset(new Task<T, W, VECTORS>(p.b));
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t index = 0; index < count * p.segments; ++index) {
            const int64_t run = index / p.segments, segment = index % p.segments;
            const int64_t start = std::max(tiles * segment / p.segments * TOKENS, p.start_of(runs[run]));
            const int64_t stop = std::min(tiles * (segment + 1) / p.segments * TOKENS, p.stop_of(runs[run]));
            if (task) task->run(p, runs[run], runs[run + 1], start, stop, out + segment * p.blocks * size);
        }
        // The first segment's sums become the result: the other segments are added to them, in order.
        if (p.segments > 1) {
#pragma omp for schedule(static)
            for (int64_t k = 0; k < p.blocks; ++k)
                for (int64_t segment = 1; segment < p.segments; ++segment) {
                    W* to = out + k * size;
                    const W* from = to + segment * p.blocks * size;
                    for (int64_t i = 0; i < size; ++i) to[i] += from[i];
                }
        }
    }
    return !failed;
}

// Packs `count` blocks whose block columns are `columns`, token by token: rows of the operand are read from end to end,
// where a panel alone would fetch single cache lines that lie pages apart. `to` has `stride` elements for each group.
template <int GROUP, typename T, typename W>
void pack_blocks(const Operand& from, int64_t token, int tokens, const int64_t* columns, int64_t count, int b,
                 Value<T, W>* to, int64_t stride) {
    using P = Packed<T, W>;
    const int groups = b / GROUP;
    for (int t = 0; t < tokens; t += P::depth) {
        const T* row = static_cast<const T*>(from.data) + (token + t) * from.token_stride;
        for (int64_t k = 0; k < count; ++k)
            for (int g = 0; g < groups; ++g) {
                const int64_t column = columns[k] * b + g * GROUP;
                const int used = static_cast<int>(std::clamp<int64_t>(from.width - column, 0, GROUP));
                pack_group<GROUP, T, W>(row + column * from.column_stride, from, used, t + P::depth <= tokens,
                                        to + (k * groups + g) * stride + t / P::depth * GROUP);
            }
    }
}

// The distinct block rows or block columns of the blocks, ascending, and the index among them of each block's.
struct Panels {
    std::unique_ptr<int64_t[]> places, index;
    int64_t count = 0;

    Panels(const int64_t* of_blocks, int64_t blocks, int64_t limit)
        : places(new int64_t[limit]), index(new int64_t[blocks]) {
        std::unique_ptr<int64_t[]> slot(new int64_t[limit]);
        std::fill(slot.get(), slot.get() + limit, int64_t(-1));
        for (int64_t k = 0; k < blocks; ++k) slot[of_blocks[k]] = 0;
        for (int64_t place = 0; place < limit; ++place)
            if (slot[place] == 0) places[count] = place, slot[place] = count++;
        for (int64_t k = 0; k < blocks; ++k) index[k] = slot[of_blocks[k]];
    }
};

// As `compute`, for many small blocks: all threads together pack every panel of a tile of tokens once, where tasks of
// their own would pack a panel again for each block. The sums are the same, bit for bit. `b` is a multiple of the
// height and the width of a tile of registers.
template <typename T, typename W, int VECTORS>
bool compute_packed(const Problem& p, const Panels& rows, const Panels& cols, const int64_t* runs, int64_t count,
                    W* out) {
    constexpr int WIDTH = VECTORS * Vector<W>::lanes, TOGETHER = 8;
    // A little more than the elements of a panel, so that panels do not share the sets of a cache.
    constexpr int64_t LEFT = STEPS<T, W> * HEIGHT + Vector<W>::lanes, RIGHT = STEPS<T, W> * WIDTH + Vector<W>::lanes;
    const int64_t size = static_cast<int64_t>(p.b) * p.b, tiles = (p.tokens + TOKENS - 1) / TOKENS;
    const int64_t high = p.b / HEIGHT, wide = p.b / WIDTH;
    std::unique_ptr<Value<T, W>[]> left(new (std::nothrow) Value<T, W>[rows.count * high * LEFT]);
    std::unique_ptr<Value<T, W>[]> right(new (std::nothrow) Value<T, W>[cols.count * wide * RIGHT]);
    if (!left || !right) return false;
    const int64_t row_parts = (rows.count + TOGETHER - 1) / TOGETHER;
    const int64_t col_parts = (cols.count + TOGETHER - 1) / TOGETHER;
#pragma omp parallel num_threads(p.threads)
    for (int64_t segment = 0; segment < p.segments; ++segment) {
        W* sums = out + segment * p.blocks * size;
        const int64_t start = tiles * segment / p.segments * TOKENS;
        const int64_t stop = std::min(tiles * (segment + 1) / p.segments * TOKENS, p.tokens);
        for (int64_t token = start; token < stop; token += TOKENS) {
            const int tokens = static_cast<int>(std::min<int64_t>(TOKENS, stop - token));
            const int steps = steps_of<T, W>(tokens);
#pragma omp for schedule(dynamic, 1)
            for (int64_t part = 0; part < row_parts + col_parts; ++part) {
                if (part < row_parts) {
                    const int64_t k = part * TOGETHER;
                    pack_blocks<HEIGHT, T, W>(p.lhs, token, tokens, rows.places.get() + k,
                                              std::min<int64_t>(TOGETHER, rows.count - k), p.b,
                                              left.get() + k * high * LEFT, LEFT);
                } else {
                    const int64_t k = (part - row_parts) * TOGETHER;
                    pack_blocks<WIDTH, T, W>(p.rhs, token, tokens, cols.places.get() + k,
                                             std::min<int64_t>(TOGETHER, cols.count - k), p.b,
                                             right.get() + k * wide * RIGHT, RIGHT);
                }
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t run = 0; run < count; ++run)
                for (int64_t k = runs[run]; k < runs[run + 1]; ++k)
                    for (int64_t j = 0; j < wide; ++j)
                        for (int64_t i = 0; i < high; ++i)
                            multiply<VECTORS, T, W>(left.get() + (rows.index[k] * high + i) * LEFT,
                                                    right.get() + (cols.index[k] * wide + j) * RIGHT, steps,
                                                    sums + k * size + i * HEIGHT * p.b + j * WIDTH, p.b, token > start);
        }
    }
    for (int64_t k = 0; k < p.blocks; ++k) {
        W* to = out + k * size;
        for (int64_t segment = 1; segment < p.segments; ++segment) {
            const W* from = to + segment * p.blocks * size;
            for (int64_t i = 0; i < size; ++i) to[i] += from[i];
        }
        const int64_t height = std::min<int64_t>(p.b, p.lhs.width - p.rows[k] * p.b);
        const int64_t width = std::min<int64_t>(p.b, p.rhs.width - p.cols[k] * p.b);
        if (height == p.b && width == p.b) continue;
        // Elements over the edge are zero, even if sums are NaN.
        for (int64_t i = 0; i < p.b; ++i) std::fill(to + i * p.b + (i < height ? width : 0), to + (i + 1) * p.b, W(0));
    }
    return true;
}

template <typename T, typename W, int VECTORS>
bool compute_either(const Problem& p, const int64_t* runs, int64_t count, W* out) {
    constexpr int WIDTH = VECTORS * Vector<W>::lanes;
    if (!p.offsets && p.b < LARGE && p.b % WIDTH == 0 && p.b % HEIGHT == 0) {
        try {
            const Panels rows(p.rows, p.blocks, (p.lhs.width + p.b - 1) / p.b);
            const Panels cols(p.cols, p.blocks, (p.rhs.width + p.b - 1) / p.b);
            if (p.blocks >= REUSE * (rows.count + cols.count))
                return compute_packed<T, W, VECTORS>(p, rows, cols, runs, count, out);
        } catch (const std::bad_alloc&) {
            return false;
        }
    }
    return compute<T, W, VECTORS>(p, runs, count, out);
}

template <typename T, typename W>
int dispatch(const Problem& p, W* out) {
    std::unique_ptr<int64_t[]> runs(new (std::nothrow) int64_t[p.blocks + 1]);
    if (!runs) return 2;
    int64_t count = 0;
    for (int64_t k = 0; k < p.blocks; ++k)
        if (k == 0 || p.rows[k] != p.rows[k - 1] || k - runs[count - 1] == RUN) runs[count++] = k;
    runs[count] = p.blocks;
    const bool narrow = p.b <= Vector<W>::lanes;
    const bool done = narrow ? compute_either<T, W, 1>(p, runs.get(), count, out)
                             : compute_either<T, W, 2>(p, runs.get(), count, out);
    return done ? 0 : 2;
}

}  // namespace

// dtype: 0 float32, 1 float64, 2 bfloat16, 3 float16. positions: int64[2, blocks], contiguous. tokens > 0.
// offsets: int32[experts], or null where experts is 1. Block rows count on from one expert to the next.
// out: [segments, blocks, b, b] in float32 (float64 for float64); the result is its first segment.
// Returns 0; 1 if a position lies outside of the matrix; 2 if there is not enough memory.
extern "C" int sylva_sddmm(int dtype, const void* lhs, int64_t m, int64_t lhs_token_stride, int64_t lhs_column_stride,
                           const void* rhs, int64_t n, int64_t rhs_token_stride, int64_t rhs_column_stride,
                           int64_t tokens, const int64_t* positions, int64_t blocks, int64_t b, int64_t segments,
                           int threads, const int32_t* offsets, int64_t experts, void* out) {
    const int64_t row_blocks = (m + b - 1) / b;
    const Problem p{{lhs, m, lhs_token_stride, lhs_column_stride},
                    {rhs, n, rhs_token_stride, rhs_column_stride},
                    tokens,
                    positions,
                    positions + blocks,
                    blocks,
                    static_cast<int>(b),
                    segments,
                    threads,
                    offsets,
                    row_blocks};
    for (int64_t k = 0; k < blocks; ++k)
        if (p.rows[k] < 0 || p.rows[k] >= experts * row_blocks || p.cols[k] < 0 || p.cols[k] * b >= n) return 1;
    switch (dtype) {
        case 0: return dispatch<float, float>(p, static_cast<float*>(out));
        case 1: return dispatch<double, double>(p, static_cast<double*>(out));
        case 2: return dispatch<BFloat16, float>(p, static_cast<float*>(out));
        default: return dispatch<_Float16, float>(p, static_cast<float*>(out));
    }
}
