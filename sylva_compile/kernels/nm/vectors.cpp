// Vectors of float for the products, and bfloat16 read and written through them.

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 24;  // lanes of a vector; vectors of sums that the registers hold
#else
constexpr int LANES = 8, SUMS = 12;
#endif

struct BFloat16 {
    uint16_t bits;
};

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef int32_t Order __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(sizeof(uint16_t)), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

inline Vector load(const BFloat16* from) {
    const Halves halves = *reinterpret_cast<const Halves*>(from);
    return reinterpret_cast<Vector>(__builtin_convertvector(halves, Words) << 16);
}

inline void store(Vector vector, float* to) { *reinterpret_cast<Vector*>(to) = vector; }

inline void store(Vector vector, BFloat16* to) {
    const Words words = reinterpret_cast<Words>(vector), rounded = words + 0x7fff + (words >> 16 & 1);
    // A NaN whose upper bits are those of infinity, or that rounding carries away, stays one.
    const Words nearest = (words & 0x7fffffff) > 0x7f800000 ? words | 0x400000 : rounded;
    *reinterpret_cast<Halves*>(to) = __builtin_convertvector(nearest >> 16, Halves);
}

inline float widen(float number) { return number; }

inline float widen(BFloat16 number) {
    const uint32_t word = static_cast<uint32_t>(number.bits) << 16;
    float found;
    std::memcpy(&found, &word, sizeof(found));
    return found;
}

inline void narrow(float number, float* to) { *to = number; }

inline void narrow(float number, BFloat16* to) {
    uint32_t word;
    std::memcpy(&word, &number, sizeof(word));
    to->bits = ((word & 0x7fffffff) > 0x7f800000 ? word | 0x400000 : word + 0x7fff + (word >> 16 & 1)) >> 16;
}

// Returns a0 b0 a1 b1 ... from the lower halves of both vectors (`upper`: from their upper halves).
inline Vector zip(Vector a, Vector b, bool upper) {
    Order order;
    for (int i = 0; i < LANES; ++i) order[i] = i / 2 + (i % 2) * LANES + (upper ? LANES / 2 : 0);
#if defined(__clang__)
    Vector zipped;
    for (int i = 0; i < LANES; ++i) zipped[i] = order[i] < LANES ? a[order[i]] : b[order[i] - LANES];
    return zipped;
#else
    return __builtin_shuffle(a, b, order);
#endif
}

// Writes the transpose of a tile of LANES x LANES.
template <typename From, typename To>
inline void transpose(const From* from, int64_t from_stride, To* to, int64_t to_stride) {
    Vector tile[LANES], zipped[LANES];
    for (int i = 0; i < LANES; ++i) tile[i] = load(from + i * from_stride);
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; ++i) {
            zipped[2 * i] = zip(tile[i], tile[i + LANES / 2], false);
            zipped[2 * i + 1] = zip(tile[i], tile[i + LANES / 2], true);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) tile[i] = zipped[i];
    }
    for (int i = 0; i < LANES; ++i) store(tile[i], to + i * to_stride);
}

}  // namespace
