// Moves values between the places of N:M sparse matrices and dense ones, on the CPU. No number is computed: elements
// are bits, 2, 4 or 8 bytes wide.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

namespace {

// A tile of the dense matrix stays in the first-level cache.
constexpr int LINE = 128;  // bytes of its rows
constexpr int TILE = 128;  // its rows
constexpr int AHEAD = 4;   // columns ahead of which memory is fetched: no processor guesses this order

struct Sizes {
    int64_t rows, per_row, in_features;
    int threads;
};

// Calls `act(e, column)` for `count` values of a row, whose first code begins a byte. Codes are below m. N is n, or 0
// where it is not known when this is compiled, or groups do not fill a byte.
template <int BITS, int N, typename F>
inline void each_column(const Pattern& pattern, const uint8_t* codes, int64_t count, F act) {
    constexpr int EACH = 8 / BITS, MASK = (1 << BITS) - 1;
    const int64_t n = pattern.n, m = pattern.m;
    int64_t k = 0, group = 0;  // `group` is its first column
    if constexpr (N > 0)
        for (; k + EACH <= count; k += EACH, group += EACH / N * m) {
            const int byte = *codes++;
#pragma GCC unroll 4
            for (int i = 0; i < EACH; ++i) act(k + i, group + i / N * m + (byte >> i * BITS & MASK));
        }
    const int64_t start = k;
    for (int64_t place = 0; k < count; ++k, ++place) {
        if (place == n) {
            place = 0;
            group += m;
        }
        act(k, group + (codes[(k - start) / EACH] >> k % EACH * BITS & MASK));
    }
}

// Writes the dense matrix [rows, in_features] of values [rows, per_row].
template <int BITS, int N, typename T>
int fill(const Pattern& pattern, const T* values, const uint8_t* codes, const Sizes& s, T* out) {
    const int64_t bytes = pattern.bytes(s.per_row);
    int outside = 0;
#pragma omp parallel for num_threads(s.threads) reduction(| : outside) schedule(static)
    for (int64_t row = 0; row < s.rows; ++row) {
        const uint8_t* places = codes + row * bytes;
        const T* from = values + row * s.per_row;
        T* to = out + row * s.in_features;
        std::fill(to, to + s.in_features, T(0));
        if (pattern.any_outside(places, bytes))
            outside = 1;
        else
            each_column<BITS, N>(pattern, places, s.per_row, [=](int64_t e, int64_t column) { to[column] = from[e]; });
    }
    return outside;
}

// Reads the values [rows, per_row] of a dense matrix [rows, in_features].
template <int BITS, int N, typename T>
int gather(const Pattern& pattern, const T* matrix, const uint8_t* codes, const Sizes& s, T* out) {
    const int64_t bytes = pattern.bytes(s.per_row);
    int outside = 0;
#pragma omp parallel for num_threads(s.threads) reduction(| : outside) schedule(static)
    for (int64_t row = 0; row < s.rows; ++row) {
        const uint8_t* places = codes + row * bytes;
        const T* from = matrix + row * s.in_features;
        T* to = out + row * s.per_row;
        if (pattern.any_outside(places, bytes))
            outside = 1;
        else
            each_column<BITS, N>(pattern, places, s.per_row, [=](int64_t e, int64_t column) { to[e] = from[column]; });
    }
    return outside;
}

// Writes values of the transposed matrix, [in_features, kept], whose places are `second`, from values [rows, per_row];
// zero where the first mask keeps nothing. A tile of the dense matrix is written out at a time, and read by columns.
template <int BITS, int N, typename T>
int transpose(const Pattern& pattern, const T* values, const uint8_t* codes, const uint8_t* second, int64_t kept,
              const Sizes& s, T* out) {
    const int64_t bytes = pattern.bytes(s.per_row), second_bytes = pattern.bytes(kept);
    if (pattern.any_outside(codes, s.rows * bytes)) return 1;
    if (pattern.any_outside(second, s.in_features * second_bytes)) return 1;
    const int64_t groups = pattern.groups_of(LINE / sizeof(T)), width = groups * pattern.m, across = groups * pattern.n;
    const int64_t tall = pattern.groups_of(TILE), height = tall * pattern.m, down = tall * pattern.n;
    const int64_t tiles = (s.rows + height - 1) / height;
    int failed = 0;
#pragma omp parallel num_threads(s.threads) reduction(| : failed)
    {
        const std::unique_ptr<T[]> tile(new (std::nothrow) T[height * width]);
#pragma omp for schedule(dynamic, 1)
        for (int64_t at = 0; at < tiles; ++at) {
            if (!tile) {
                failed |= 2;
                continue;
            }
            const int64_t top = at * height, rows = std::min(height, s.rows - top);
            const int64_t place = at * down, places = std::min(down, kept - place);
            for (int64_t left = 0, start = 0; left < s.in_features; left += width, start += across) {
                const int64_t used = std::min(across, s.per_row - start);
                const int64_t columns = std::min(width, s.in_features - left);
                std::fill_n(tile.get(), rows * width, T(0));
                for (int64_t row = 0; row < rows; ++row) {
                    const T* from = values + (top + row) * s.per_row + start;
                    T* to = tile.get() + row * width;
                    __builtin_prefetch(from + across);
                    each_column<BITS, N>(pattern, codes + (top + row) * bytes + pattern.bytes(start), used,
                                         [=](int64_t e, int64_t column) { to[column] = from[e]; });
                }
                for (int64_t column = 0; column < columns; ++column) {
                    const T* from = tile.get() + column;
                    T* to = out + (left + column) * kept + place;
                    const uint8_t* at = second + (left + column) * second_bytes + pattern.bytes(place);
                    __builtin_prefetch(to + AHEAD * kept, 1);
                    __builtin_prefetch(at + AHEAD * second_bytes);
                    each_column<BITS, N>(pattern, at, places,
                                         [=](int64_t e, int64_t row) { to[e] = from[row * width]; });
                }
            }
        }
    }
    return failed;
}

// Calls `run` with a null pointer to the type of an element, the number of bits of a code, and n (see `each_column`).
template <typename F>
int by_type(int bytes, int n, int m, F run) {
    const Pattern pattern(n, m);
    const auto with_n = [&](auto* element, auto bits) {
        if constexpr (bits() < 8) {
            if (n == 1) return run(pattern, element, bits, std::integral_constant<int, 1>());
            if (n == 2) return run(pattern, element, bits, std::integral_constant<int, 2>());
        }
        return run(pattern, element, bits, std::integral_constant<int, 0>());
    };
    const auto with = [&](auto* element) {
        switch (pattern.bits) {
            case 2: return with_n(element, std::integral_constant<int, 2>());
            case 4: return with_n(element, std::integral_constant<int, 4>());
            default: return with_n(element, std::integral_constant<int, 8>());
        }
    };
    switch (bytes) {
        case 2: return with(static_cast<uint16_t*>(nullptr));
        case 4: return with(static_cast<uint32_t*>(nullptr));
        default: return with(static_cast<uint64_t*>(nullptr));
    }
}

}  // namespace

// All matrices are contiguous; elements are `bytes` wide; codes are n for each group of m. Each function returns 0; 1
// if a code is m or more, where nothing is read or written; 2 or more if there is not enough memory.

extern "C" int sylva_nm_dense(int bytes, int n, int m, const void* values, const uint8_t* codes, int64_t rows,
                              int64_t per_row, int64_t in_features, int threads, void* out) {
    return by_type(bytes, n, m, [&](const Pattern& pattern, auto* element, auto bits, auto known) {
        typedef decltype(element) Elements;
        return fill<bits(), known()>(pattern, static_cast<Elements>(const_cast<void*>(values)), codes,
                                     {rows, per_row, in_features, threads}, static_cast<Elements>(out));
    });
}

extern "C" int sylva_nm_gather(int bytes, int n, int m, const void* matrix, const uint8_t* codes, int64_t rows,
                               int64_t per_row, int64_t in_features, int threads, void* out) {
    return by_type(bytes, n, m, [&](const Pattern& pattern, auto* element, auto bits, auto known) {
        typedef decltype(element) Elements;
        return gather<bits(), known()>(pattern, static_cast<Elements>(const_cast<void*>(matrix)), codes,
                                       {rows, per_row, in_features, threads}, static_cast<Elements>(out));
    });
}

extern "C" int sylva_nm_transpose(int bytes, int n, int m, const void* values, const uint8_t* codes,
                                  const uint8_t* second, int64_t rows, int64_t per_row, int64_t in_features,
                                  int64_t kept, int threads, void* out) {
    return by_type(bytes, n, m, [&](const Pattern& pattern, auto* element, auto bits, auto known) {
        typedef decltype(element) Elements;
        return transpose<bits(), known()>(pattern, static_cast<Elements>(const_cast<void*>(values)), codes, second,
                                          kept, {rows, per_row, in_features, threads}, static_cast<Elements>(out));
    });
}
