// The places of N:M sparse rows, which `sylva_compile.kernels.nm_codes` describes: n codes for each group of m columns,
// `bits` wide, in whole bytes for each row. This text stands before that of each library.
//
// Codes are unpacked a run of columns at a time. Runs begin with a byte.

#include <algorithm>
#include <cstdint>

namespace {

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Codes are unpacked in the order of a little-endian machine."
#endif

constexpr int RUN = 1024;  // columns of a run at most

typedef uint16_t Pair __attribute__((may_alias, aligned(1)));
typedef uint32_t Four __attribute__((may_alias, aligned(1)));

struct Pattern {
    int n, m, bits;
    int64_t groups;       // of a run
    uint16_t first[RUN];  // the first column of each value's group, from the run's first column on

    Pattern(int n, int m) : n(n), m(m), bits(m <= 4 ? 2 : m <= 16 ? 4 : 8), groups(groups_of(RUN)) {
        for (int64_t k = 0; k < groups * n; ++k) first[k] = k / n * m;
    }

    // Returns how many groups have about so many columns, and codes that end with a byte.
    int64_t groups_of(int64_t columns) const {
        const int64_t step = 8 / bits;
        return std::max<int64_t>(step, columns / m / step * step);
    }

    int64_t columns_of_run() const { return groups * m; }
    int64_t values_of_run() const { return groups * n; }
    int64_t bytes(int64_t values) const { return (values * bits + 7) / 8; }

    // Writes the codes of `count` values, a byte each, and all codes of the last byte.
    void unpack(const uint8_t* __restrict packed, int64_t count, uint8_t* __restrict room) const {
        const int64_t size = bytes(count);
        if (bits == 8)
            std::copy_n(packed, size, room);
        else if (bits == 4)
            for (int64_t i = 0; i < size; ++i) {
                const uint16_t b = packed[i];
                reinterpret_cast<Pair*>(room)[i] = (b | b << 4) & 0x0f0f;
            }
        else
            for (int64_t i = 0; i < size; ++i) {
                const uint32_t b = packed[i];
                reinterpret_cast<Four*>(room)[i] = (b | b << 6 | b << 12 | b << 18) & 0x03030303;
            }
    }

    // Returns whether one of the codes in some bytes is m or more.
    bool any_outside(const uint8_t* packed, int64_t size) const {
        if (m == 1 << bits) return false;
        const uint8_t mask = (1 << bits) - 1;
        uint8_t found = 0;
        for (int64_t i = 0; i < size; ++i) {
            const uint8_t lower = packed[i] & mask, upper = packed[i] >> 4 & mask;
            found = std::max(found, bits == 8 ? packed[i] : std::max(lower, upper));
            if (bits == 2) {
                const uint8_t second = packed[i] >> 2 & mask, last = packed[i] >> 6;
                found = std::max(found, std::max(second, last));
            }
        }
        return found >= m;
    }
};

}  // namespace
