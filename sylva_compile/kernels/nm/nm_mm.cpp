// x * W^T on the CPU, for a sparse W [rows, in_features] whose rows all hold equally many elements.
//
// A task multiplies a run of rows by a panel of tokens. The panel is a copy of x in which the tokens of one column lie
// side by side, so that an element of W multiplies whole vectors of tokens: one load a vector, no gather. Several rows
// are multiplied at a time: with that many sums on their way, a load from the second-level cache is not waited for.
// Long rows are cut into runs, whose columns of the panel stay in the second-level cache. The codes of a few rows are
// unpacked into the first-level cache right before those rows are multiplied, and serve all tokens of a panel.
//
// bfloat16 becomes float in panels, and in the copies of values that are made as codes are unpacked. Sums are of float,
// and are rounded once.
//
// One token alone has no panel: rows are multiplied by x as it is.
//
// Each sum is taken in the order of the elements of its row, and runs depend on the shape of W alone. The result thus
// depends neither on the number of threads nor on which tokens share a panel.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

namespace {

constexpr int WIDEST = 4;   // vectors of tokens of a panel
constexpr int HIGHEST = 8;  // rows multiplied at a time
constexpr int CHUNK = 96;   // rows whose sums stay in the first-level cache until they are stored
constexpr int SHARE = 4;    // tasks for each thread, where the tokens alone do not give as many

// `Element` is float or BFloat16.
template <typename Element>
struct Problem {
    const Element* x;
    int64_t tokens, in_features, token_stride, column_stride;
    const Element* values;  // [rows, per_row]
    const uint8_t* codes;   // [rows, bytes_per_row]
    int64_t rows, per_row, bytes_per_row;
    const Pattern& pattern;
    Element* out;  // [tokens, rows]

    const uint8_t* codes_at(int64_t row, int64_t run) const {
        return codes + row * bytes_per_row + run * pattern.bytes(pattern.values_of_run());
    }
};

struct Release {
    void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
typedef std::unique_ptr<float[], Release> Memory;

Memory allocate(int64_t count) {
    return Memory(static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t(64), std::nothrow)));
}

// Returns the number of vectors of a panel for so many tokens.
int vectors_of(int64_t tokens) { return tokens <= LANES ? 1 : tokens <= 2 * LANES ? 2 : WIDEST; }

// Copies `used` tokens of x, from `token` on, into panel [in_features][VECTORS * LANES]; the other tokens become zero.
template <int VECTORS, typename Element>
void load_panel(const Problem<Element>& p, int64_t token, int64_t used, float* panel) {
    constexpr int WIDTH = VECTORS * LANES;
    const Element* x = p.x + token * p.token_stride;
    for (int64_t column = 0; column < p.in_features; column += LANES) {
        const int64_t columns = std::min<int64_t>(LANES, p.in_features - column);
        for (int64_t first = 0; first < WIDTH; first += LANES) {
            const int64_t tokens = std::max<int64_t>(0, std::min<int64_t>(LANES, used - first));
            const Element* from = x + first * p.token_stride + column * p.column_stride;
            float* to = panel + column * WIDTH + first;
            if (columns == LANES && tokens == LANES && p.column_stride == 1) {
                transpose(from, p.token_stride, to, WIDTH);
                continue;
            }
            for (int64_t i = 0; i < columns; ++i) {
                for (int64_t j = 0; j < tokens; ++j)
                    to[i * WIDTH + j] = widen(from[j * p.token_stride + i * p.column_stride]);
                for (int64_t j = tokens; j < LANES; ++j) to[i * WIDTH + j] = 0.0f;
            }
        }
    }
}

// A run of some rows: their codes, a byte each, and their values. The distance of the codes of two rows is known to the
// compiler, which then needs one address for all of them, and is no power of two.
struct Run {
    static constexpr int64_t STRIDE = RUN + 64;
    uint8_t codes[HIGHEST * STRIDE];
    float room[HIGHEST * STRIDE];
    const float* values;
    int64_t stride;  // from the values of one row to those of the next one

    template <int ROWS, typename Element>
    void load_rows(const Problem<Element>& p, int64_t row, int64_t run, int64_t count) {
        const uint8_t* packed = p.codes_at(row, run);
        for (int r = 0; r < ROWS; ++r) p.pattern.unpack(packed + r * p.bytes_per_row, count, codes + r * STRIDE);
        const Element* from = p.values + row * p.per_row + run * p.pattern.values_of_run();
        if constexpr (std::is_same<Element, float>::value) {
            values = from;
            stride = p.per_row;
        } else {
            values = room;
            stride = STRIDE;
            for (int r = 0; r < ROWS; ++r)
                for (int64_t e = 0; e < count; ++e) room[r * STRIDE + e] = widen(from[r * p.per_row + e]);
        }
    }
};

// sums[ROWS][VECTORS * LANES] (+)= `count` elements of ROWS rows of W times a run of the panel.
// Inlined into the loops around it, it would lose its addresses to the stack.
template <int VECTORS, int ROWS>
__attribute__((noinline)) void multiply(const float* panel, const uint16_t* first, const Run& run, int64_t count,
                                        float* sums, bool add) {
    constexpr int WIDTH = VECTORS * LANES;
    const float* values = run.values;
    const int64_t stride = run.stride;
    Vector total[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) total[r][v] = Vector{};
    for (int64_t e = 0; e < count; ++e) {
        const float* group = panel + first[e] * WIDTH;
        for (int r = 0; r < ROWS; ++r) {
            const Vector* x = reinterpret_cast<const Vector*>(group + run.codes[r * Run::STRIDE + e] * WIDTH);
            const float value = values[r * stride + e];
            for (int v = 0; v < VECTORS; ++v) total[r][v] += value * x[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            Vector* place = reinterpret_cast<Vector*>(sums + r * WIDTH) + v;
            *place = add ? *place + total[r][v] : total[r][v];
        }
}

// Returns total + value * x, rounded once where there is such an instruction: compilers use it in `multiply`, but left
// to themselves not in every loop over single numbers.
inline float add_product(float total, float value, float x) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(value, x, total);
#else
    return total + value * x;
#endif
}

// sums[ROWS] (+)= `count` elements of ROWS rows of W times the one token x. A vector of tokens would be empty but for
// one. Elements are added in the order in which `multiply` adds them, so the result has the same bits.
template <int ROWS>
__attribute__((noinline)) void multiply_one(const float* x, const uint16_t* first, const Run& run, int64_t count,
                                            float* sums, bool add) {
    const float* values = run.values;
    const int64_t stride = run.stride;
    float total[ROWS] = {};
    for (int64_t e = 0; e < count; ++e) {
        const float* group = x + first[e];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
            total[r] = add_product(total[r], values[r * stride + e], group[run.codes[r * Run::STRIDE + e]]);
    }
    for (int r = 0; r < ROWS; ++r) sums[r] = add ? sums[r] + total[r] : total[r];
}

// Writes sums [rows][VECTORS * LANES] to the columns `row`.. of the result.
template <int VECTORS, typename Element>
void store_sums(const Problem<Element>& p, const float* sums, int64_t row, int64_t rows, int64_t token, int64_t used) {
    constexpr int WIDTH = VECTORS * LANES;
    for (int64_t t = 0; t < used; t += LANES)
        for (int64_t r = 0; r < rows; r += LANES) {
            Element* to = p.out + (token + t) * p.rows + row + r;
            const float* from = sums + r * WIDTH + t;
            if (r + LANES <= rows && t + LANES <= used) {
                transpose(from, WIDTH, to, p.rows);
                continue;
            }
            for (int64_t i = 0; i < std::min<int64_t>(LANES, used - t); ++i)
                for (int64_t j = 0; j < std::min<int64_t>(LANES, rows - r); ++j)
                    narrow(from[j * WIDTH + i], to + i * p.rows + j);
        }
}

// Computes rows first..last of W for `used` tokens from `token` on. Returns false if a code is m or more.
template <int VECTORS, typename Element>
bool multiply_rows(const Problem<Element>& p, const float* panel, int64_t token, int64_t used, int64_t first,
                   int64_t last, float* sums) {
    constexpr int WIDTH = VECTORS * LANES, ROWS = std::min(SUMS / VECTORS, HIGHEST);
    const int64_t length = p.pattern.values_of_run(), width = p.pattern.columns_of_run() * WIDTH;
    Run loaded;
    for (int64_t row = first; row < last; row += CHUNK) {
        const int64_t rows = std::min<int64_t>(CHUNK, last - row);
        // Checked here, and not before, so that threads wait for each other once alone.
        if (p.pattern.any_outside(p.codes_at(row, 0), rows * p.bytes_per_row)) return false;
        for (int64_t run = 0; run * length < p.per_row; ++run) {
            const int64_t count = std::min(length, p.per_row - run * length);
            const auto multiply_some = [&](auto some, int64_t r) {
                loaded.load_rows<some()>(p, row + r, run, count);
                multiply<VECTORS, some()>(panel + run * width, p.pattern.first, loaded, count, sums + r * WIDTH,
                                          run > 0);
            };
            int64_t r = 0;
            for (; r + ROWS <= rows; r += ROWS) multiply_some(std::integral_constant<int, ROWS>(), r);
            for (; r < rows; ++r) multiply_some(std::integral_constant<int, 1>(), r);
        }
        store_sums<VECTORS>(p, sums, row, rows, token, used);
    }
    return true;
}

template <typename Element>
int compute_one(const Problem<Element>& p, int threads) {
    constexpr int ROWS = HIGHEST;
    const float* x = nullptr;
    if constexpr (std::is_same<Element, float>::value)
        if (p.column_stride == 1) x = p.x;
    const Memory copy = x ? Memory() : allocate(p.in_features);
    if (!x) {
        if (!copy) return 2;
        for (int64_t i = 0; i < p.in_features; ++i) copy[i] = widen(p.x[i * p.column_stride]);
        x = copy.get();
    }
    const int64_t blocks = (p.rows + ROWS - 1) / ROWS, length = p.pattern.values_of_run();
    int failed = 0;
#pragma omp parallel for num_threads(threads) reduction(| : failed) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * ROWS, last = std::min(first + ROWS, p.rows);
        if (p.pattern.any_outside(p.codes_at(first, 0), (last - first) * p.bytes_per_row)) {
            failed = 1;
            continue;
        }
        Run loaded;
        float sums[ROWS] = {};
        for (int64_t run = 0; run * length < p.per_row; ++run) {
            const int64_t count = std::min(length, p.per_row - run * length);
            const auto multiply_some = [&](auto some, int64_t row) {
                loaded.load_rows<some()>(p, row, run, count);
                multiply_one<some()>(x + run * p.pattern.columns_of_run(), p.pattern.first, loaded, count,
                                     sums + row - first, run > 0);
            };
            if (last - first == ROWS)
                multiply_some(std::integral_constant<int, ROWS>(), first);
            else
                for (int64_t row = first; row < last; ++row) multiply_some(std::integral_constant<int, 1>(), row);
        }
        for (int64_t row = first; row < last; ++row) narrow(sums[row - first], p.out + row);
    }
    return failed;
}

template <typename Element>
int compute(const Problem<Element>& p, int threads) {
    if (p.tokens == 1) return compute_one(p, threads);
    constexpr int64_t WIDTH = WIDEST * LANES;
    int failed = 0;
    const int64_t panels = (p.tokens + WIDTH - 1) / WIDTH, chunks = (p.rows + CHUNK - 1) / CHUNK;
    const int64_t parts = std::min(chunks, std::max<int64_t>(1, (SHARE * threads + panels - 1) / panels));
    const int64_t tasks = panels * parts;
    // Tasks of one panel go to one thread as far as possible, since each thread makes its own copy of a panel.
    const int64_t together = parts == 1 ? 1 : (tasks + threads - 1) / threads;
#pragma omp parallel num_threads(threads)
    {
        const Memory panel = allocate(p.in_features * LANES * vectors_of(p.tokens));
        const Memory sums = allocate(CHUNK * WIDTH);
        int64_t loaded = -1;
        if (!panel || !sums) {
#pragma omp atomic write
            failed = 2;
        }
#pragma omp for schedule(dynamic, together)
        for (int64_t task = 0; task < tasks; ++task) {
            if (!panel || !sums) continue;
            const int64_t token = task / parts * WIDTH, part = task % parts;
            const int64_t used = std::min(WIDTH, p.tokens - token);
            const int64_t first = chunks * part / parts * CHUNK;
            const int64_t last = std::min(chunks * (part + 1) / parts * CHUNK, p.rows);
            const auto run = [&](auto vectors) {
                if (loaded != token) load_panel<vectors()>(p, token, used, panel.get());
                loaded = token;
                if (!multiply_rows<vectors()>(p, panel.get(), token, used, first, last, sums.get())) {
#pragma omp atomic write
                    failed = 1;
                }
            };
            switch (vectors_of(used)) {
                case 1: run(std::integral_constant<int, 1>()); break;
                case 2: run(std::integral_constant<int, 2>()); break;
                default: run(std::integral_constant<int, WIDEST>());
            }
        }
    }
    return failed;
}

}  // namespace

// out [tokens, rows] = x [tokens, in_features] * W^T, all of float (`bytes` is 4) or of bfloat16 (2). values
// [rows, per_row] and codes [rows, bytes of per_row codes] are contiguous. No size is zero.
// Returns 0; 1 if a column lies outside of its group; 2 if there is not enough memory.
extern "C" int sylva_nm_mm(int bytes, const void* x, int64_t tokens, int64_t in_features, int64_t token_stride,
                           int64_t column_stride, const void* values, const uint8_t* codes, int n, int m,
                           int64_t rows, int64_t per_row, int threads, void* out) {
    const Pattern pattern(n, m);
    const auto run = [&](auto* element) {
        typedef decltype(element) Elements;
        typedef std::remove_pointer_t<Elements> Element;
        return compute<Element>({static_cast<const Element*>(x), tokens, in_features, token_stride, column_stride,
                                 static_cast<const Element*>(values), codes, rows, per_row, pattern.bytes(per_row),
                                 pattern, static_cast<Elements>(out)},
                                threads);
    };
    return bytes == 4 ? run(static_cast<float*>(nullptr)) : run(static_cast<BFloat16*>(nullptr));
}
