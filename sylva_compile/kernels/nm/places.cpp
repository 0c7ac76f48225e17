// Moves values between the places of N:M sparse matrices and dense ones, on the CPU. No number is computed: elements are
// bits, 2, 4 or 8 bytes wide.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace {

constexpr int OUTSIDE = 255;  // the slot of a place that carries no value
constexpr int LINE = 128;     // bytes of a row that are read at once
constexpr int TILE = 64;      // places of a row that are read before those of the next row

struct Sizes {
    int64_t rows, per_row, in_features;
    int threads;
};

// Writes the dense matrix [rows, in_features] of values and columns [rows, per_row].
template <typename T, typename C>
int fill(const T* values, const C* columns, const Sizes& s, T* out) {
    int outside = 0;
#pragma omp parallel for num_threads(s.threads) reduction(| : outside) schedule(static)
    for (int64_t row = 0; row < s.rows; ++row) {
        T* to = out + row * s.in_features;
        std::fill(to, to + s.in_features, T(0));
        for (int64_t e = row * s.per_row; e < (row + 1) * s.per_row; ++e) {
            if (columns[e] < 0 || columns[e] >= s.in_features)
                outside = 1;
            else
                to[columns[e]] = values[e];
        }
    }
    return outside;
}

// Reads the elements of a dense matrix [rows, in_features] at columns [rows, per_row].
template <typename T, typename C>
int gather(const T* matrix, const C* columns, const Sizes& s, T* out) {
    int outside = 0;
#pragma omp parallel for num_threads(s.threads) reduction(| : outside) schedule(static)
    for (int64_t row = 0; row < s.rows; ++row) {
        const T* from = matrix + row * s.in_features;
        for (int64_t e = row * s.per_row; e < (row + 1) * s.per_row; ++e) {
            if (columns[e] < 0 || columns[e] >= s.in_features)
                outside = 1;
            else
                out[e] = from[columns[e]];
        }
    }
    return outside;
}

// Writes elements first..last of `out` from rows of `from` that lie `width` apart. Returns 1 if one lies outside.
template <typename T, typename C>
int move(const T* from, int64_t width, const C* places, const uint8_t* slots, int64_t first, int64_t last, int n,
         int64_t rows, T* out) {
    int outside = 0;
    for (int64_t e = first; e < last; ++e)
        outside |= (places[e] < 0) | (places[e] >= rows) | ((slots[e] >= n) & (slots[e] != OUTSIDE));
    if (outside) return 1;
    // Slots outside come without order, and a branch would be guessed wrongly.
    for (int64_t e = first; e < last; ++e) {
        const bool inside = slots[e] != OUTSIDE;
        const T value = from[places[e] * width + (inside ? slots[e] : 0)];
        out[e] = inside ? value : T(0);
    }
    return 0;
}

// Writes values of the transposed matrix, [in_features, kept], from values [rows, per_row]: the element at `places`
// [in_features, kept], a row, comes from slot `slots` of its column's group of m. Columns whose values share a line of
// memory are taken together. Their values are copied first: rows often lie a power of two apart, and their lines would
// share a few sets of the cache.
template <typename T, typename C>
int transpose(const T* values, const C* places, const uint8_t* slots, int64_t kept, int n, int m, const Sizes& s,
              T* out) {
    const int64_t groups = std::max<int64_t>(1, LINE / (n * static_cast<int64_t>(sizeof(T))));
    const int64_t together = groups * m, width = groups * n, blocks = (s.in_features + together - 1) / together;
    int failed = 0;
#pragma omp parallel num_threads(s.threads) reduction(| : failed)
    {
        const std::unique_ptr<T[]> panel(new (std::nothrow) T[s.rows * width]);
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; ++block) {
            if (!panel) {
                failed |= 2;
                continue;
            }
            const int64_t first = block * together, last = std::min(first + together, s.in_features);
            const int64_t used = std::min(width, s.per_row - block * width);
            for (int64_t row = 0; row < s.rows; ++row)
                std::copy_n(values + row * s.per_row + block * width, used, panel.get() + row * width);
            for (int64_t start = 0; start < kept; start += TILE)
                for (int64_t column = first; column < last; ++column)
                    failed |= move(panel.get() + (column - first) / m * n, width, places, slots, column * kept + start,
                                   column * kept + std::min(start + TILE, kept), n, s.rows, out);
        }
    }
    return failed;
}

// Calls `run` with null pointers to the type of an element and to that of a column.
template <typename F>
int by_type(int bytes, int wide, F run) {
    const auto with = [&](auto* element) {
        return wide ? run(element, static_cast<int32_t*>(nullptr)) : run(element, static_cast<int16_t*>(nullptr));
    };
    switch (bytes) {
        case 2: return with(static_cast<uint16_t*>(nullptr));
        case 4: return with(static_cast<uint32_t*>(nullptr));
        default: return with(static_cast<uint64_t*>(nullptr));
    }
}

}  // namespace

// All matrices are contiguous; elements are `bytes` wide, columns are int16, or int32 if `wide`. Each function returns 0;
// 1 if a place lies outside of its matrix, where nothing is read or written; 2 or more if there is not enough memory.

extern "C" int sylva_nm_dense(int bytes, int wide, const void* values, const void* columns, int64_t rows,
                              int64_t per_row, int64_t in_features, int threads, void* out) {
    return by_type(bytes, wide, [&](auto* element, auto* column) {
        return fill(static_cast<decltype(element)>(const_cast<void*>(values)),
                    static_cast<decltype(column)>(const_cast<void*>(columns)), {rows, per_row, in_features, threads},
                    static_cast<decltype(element)>(out));
    });
}

extern "C" int sylva_nm_gather(int bytes, int wide, const void* matrix, const void* columns, int64_t rows,
                               int64_t per_row, int64_t in_features, int threads, void* out) {
    return by_type(bytes, wide, [&](auto* element, auto* column) {
        return gather(static_cast<decltype(element)>(const_cast<void*>(matrix)),
                      static_cast<decltype(column)>(const_cast<void*>(columns)), {rows, per_row, in_features, threads},
                      static_cast<decltype(element)>(out));
    });
}

extern "C" int sylva_nm_transpose(int bytes, int wide, const void* values, const void* places, const uint8_t* slots,
                                  int64_t rows, int64_t per_row, int64_t in_features, int64_t kept, int n, int m,
                                  int threads, void* out) {
    return by_type(bytes, wide, [&](auto* element, auto* place) {
        return transpose(static_cast<decltype(element)>(const_cast<void*>(values)),
                         static_cast<decltype(place)>(const_cast<void*>(places)), slots, kept, n, m,
                         {rows, per_row, in_features, threads}, static_cast<decltype(element)>(out));
    });
}
