// What is stored of a weight, read by rows: W packed 2:4 or dense, and a mask M.
//
// A row of a packed W is columns/2 kept values and a bit for each column (bit i of byte j: column 8·j + i). Every group of
// four columns has two bits set, so 32 columns always take 16 values: what a block of columns needs is known beforehand.
//
// Nothing of torch is included: plain C interfaces, called with addresses. A library holds the instruction sets, and the
// processor is asked at run time.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16")))
#endif

namespace {

enum Level { PLAIN = 0, WITH_AVX2 = 1, WITH_AVX512 = 2, WITH_AVX512_BF16 = 3 };

inline float widen(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
inline float widen(float value) { return value; }

inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, uint16_t& out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        out = 0x7fc0;  // NaN: rounding could make it infinite
        return;
    }
    out = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
}

// Columns of the bits set in a byte, followed by one that is not set where there are fewer than four; and where each
// column of a byte finds its value: 4 to 7 hold zeros.
struct Tables {
    uint8_t columns[256][4] = {};
    int32_t sources[256][8] = {};
    uint8_t bytes[256][16] = {};  // the same for values of two bytes, as _mm_shuffle_epi8 reads it: 128 is a zero
    Tables() {
        for (int byte = 0; byte < 256; ++byte) {
            int kept = 0;
            for (int column = 0; column < 8; ++column) {
                const bool set = byte >> column & 1;
                sources[byte][column] = set && kept < 4 ? kept : 7;
                for (int half = 0; half < 2; ++half)
                    bytes[byte][2 * column + half] = static_cast<uint8_t>(set && kept < 4 ? 2 * kept + half : 128);
                if (set && kept < 4) columns[byte][kept++] = static_cast<uint8_t>(column);
            }
            int unset = 0;
            while (byte >> unset & 1) ++unset;
            for (; kept < 4; ++kept) columns[byte][kept] = static_cast<uint8_t>(unset);
        }
    }
};
const Tables TABLES;

#if defined(__x86_64__)
AVX2 inline __m128 load4(const float* values) { return _mm_loadu_ps(values); }
AVX2 inline __m128 load4(const uint16_t* values) {
    const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(raw), 16));
}

AVX512 inline __m256 load8(const float* values) { return _mm256_loadu_ps(values); }
AVX512 inline __m256 load8(const uint16_t* values) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
#endif

#define INLINE inline __attribute__((always_inline))
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Lanes __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
constexpr long LANES = 16, STRIDE = 32;  // a stride is a multiple of the columns of any tile

template <class V>
INLINE V load(const void* from) {
    V vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}
INLINE Floats widen16(const float* values) { return load<Floats>(values); }
INLINE Floats widen16(const uint16_t* values) {
    return (Floats)(__builtin_convertvector(load<Halves>(values), Lanes) << 16);
}
INLINE void narrow16(Floats values, float* out) { std::memcpy(out, &values, sizeof values); }
INLINE void narrow16(Floats values, uint16_t* out) {
    typedef uint32_t Words __attribute__((vector_size(64)));
    const Words bits = (Words)values, nan = (Words)(values != values);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // as `narrow`
    const Halves halves = __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), Halves);
    std::memcpy(out, &halves, sizeof halves);
}

// What sets of instructions have in common: w + u where M keeps it, else 0.
struct Generic {
    static INLINE Floats add_at(uint32_t bits, Floats w, Floats u) {
        const Lanes one = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
        return (Floats)((Lanes)(w + u) & (((Lanes{} + static_cast<int32_t>(bits)) & one) != 0));
    }
    static INLINE Floats add_where_not_zero(Floats w, Floats u) {
        return (Floats)((Lanes)(w + u) & (w != 0));  // NaN is not 0
    }
    static INLINE Floats keep_where_not_zero(Floats w, Floats kept) { return (Floats)((Lanes)kept & (w != 0)); }
};

struct Portable : Generic {
    static constexpr int ROWS = 2, VECTORS = 1;
    template <class T>
    static INLINE void expand(const T* values, uint32_t bits, Floats& out) {
        float lanes[LANES] = {};
        for (int byte = 0; byte < 2; ++byte, bits >>= 8)
            for (int index = 0; index < 4; ++index, ++values) {
                const int column = TABLES.columns[bits & 255][index];
                if (bits >> column & 1) lanes[8 * byte + column] = widen(*values);
            }
        out = load<Floats>(lanes);
    }
};

#if defined(__x86_64__)
struct WithAvx2 : Generic {
    static constexpr int ROWS = 4, VECTORS = 1;
    template <class T>
    AVX2 static inline void expand(const T* values, uint32_t bits, Floats& out) {
        float lanes[LANES];
        for (int byte = 0; byte < 2; ++byte) {
            const __m256 kept = _mm256_insertf128_ps(_mm256_setzero_ps(), load4(values + 4 * byte), 0);
            const int32_t* source = TABLES.sources[bits >> 8 * byte & 255];
            const __m256i places = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
            _mm256_storeu_ps(lanes + 8 * byte, _mm256_permutevar8x32_ps(kept, places));
        }
        out = load<Floats>(lanes);
    }
};

struct WithAvx512 {
    static constexpr int ROWS = 8, VECTORS = 2;
    template <class T>
    AVX512 static inline void expand(const T* values, uint32_t bits, Floats& out) {
        const __m512 kept = _mm512_castps256_ps512(load8(values));
        out = (Floats)_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), kept);
    }
    AVX512 static inline Floats add_at(uint32_t bits, Floats w, Floats u) {
        return (Floats)_mm512_maskz_add_ps(static_cast<__mmask16>(bits), (__m512)w, (__m512)u);
    }
    AVX512 static inline Floats add_where_not_zero(Floats w, Floats u) {
        const __mmask16 kept = _mm512_cmp_ps_mask((__m512)w, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        return (Floats)_mm512_maskz_add_ps(kept, (__m512)w, (__m512)u);
    }
    AVX512 static inline Floats keep_where_not_zero(Floats w, Floats kept) {
        return (Floats)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)w, _mm512_setzero_ps(), _CMP_NEQ_UQ), (__m512)kept);
    }
};
#endif

// A weight as it is stored.
struct Weight {
    const void* values;   // packed (rows, columns / 2), or dense (rows, columns)
    const uint8_t* bits;  // (rows, ceil(columns / 8)); null: it is dense
    const uint8_t* mask;  // M, likewise; null: where W is stored, or, of a dense W, is not 0
    long rows, columns;
    long width() const { return (columns + 7) / 8; }
};

// A row of W from some column on, and of M; null where a dense W that is 0 is what M does not keep.
template <class T>
struct Row {
    const T* values;
    const uint8_t* places;
    const uint8_t* mask;
};
INLINE uint32_t bits16(const uint8_t* bits) { return bits[0] | bits[1] << 8; }

// 16 columns of (W + update) ⊙ M.
template <class Set, class T, bool PACKED>
INLINE Floats updated16(const Row<T>& row, long column, Floats update) {
    Floats weights;
    if (PACKED)
        Set::expand(row.values + column / 2, bits16(row.places + column / 8), weights);
    else
        weights = widen16(row.values + column);
    if (PACKED || row.mask) return Set::add_at(bits16(row.mask + column / 8), weights, update);
    return Set::add_where_not_zero(weights, update);
}

// 16 columns of a row, those that M keeps, else 0.
template <class Set, class T, bool PACKED>
INLINE Floats kept16(const Row<T>& row, long column, Floats values) {
    if (PACKED || row.mask) return Set::add_at(bits16(row.mask + column / 8), values, Floats{});
    return Set::keep_where_not_zero(widen16(row.values + column), values);
}

// Rows of a weight that are read together, a tile of COLUMNS at a time.
template <class Set, class T, bool PACKED>
struct RowBlock {
    static constexpr int R = Set::ROWS;
    static constexpr long COLUMNS = LANES * Set::VECTORS;
    Row<T> rows[R], tails[R];
    T values[R][COLUMNS] = {};  // what is left of these rows, followed by zeros that M does not keep
    uint8_t places[R][COLUMNS / 8] = {}, mask[R][COLUMNS / 8] = {};

    // From `row` on; the last one before `end` again where there are no more.
    INLINE void begin(const Weight& weight, long row, long end) {
        const long whole = weight.columns / COLUMNS * COLUMNS, rest = weight.columns - whole;
        const uint8_t* bits = weight.mask ? weight.mask : weight.bits;
        for (int r = 0; r < R; ++r) {
            const long at = row + r < end ? row + r : end - 1;
            const T* from = static_cast<const T*>(weight.values) + at * weight.columns / (PACKED ? 2 : 1);
            const auto of_row = [&](const uint8_t* all) { return all ? all + at * weight.width() : nullptr; };
            rows[r] = {from, of_row(weight.bits), of_row(bits)};
            tails[r] = {values[r], places[r], bits ? mask[r] : nullptr};
            std::memcpy(values[r], from + whole / (PACKED ? 2 : 1), rest / (PACKED ? 2 : 1) * sizeof(T));
            if (PACKED) std::memcpy(places[r], rows[r].places + whole / 8, (rest + 7) / 8);
            if (bits) std::memcpy(mask[r], rows[r].mask + whole / 8, (rest + 7) / 8);
        }
    }
};

// The rows of a tile of (W + B·A) ⊙ M, which begins at `at` in these rows and at `column` in A, whose ranks lie `stride`
// floats apart; `factors` are B's, by rank.
template <class Set, class T, bool PACKED>
INLINE void sum_tile(const Row<T>* rows, long at, const float* factors, const float* a, long rank, long stride, long column,
                     Floats (&tile)[Set::ROWS][Set::VECTORS]) {
    constexpr int R = Set::ROWS, V = Set::VECTORS;
    std::memset(static_cast<void*>(tile), 0, sizeof tile);
    for (long k = 0; k < rank; ++k) {
        Floats of_a[V];
        for (int v = 0; v < V; ++v) of_a[v] = load<Floats>(a + k * stride + column + LANES * v);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) tile[r][v] += factors[k * R + r] * of_a[v];
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) tile[r][v] = updated16<Set, T, PACKED>(rows[r], at + LANES * v, tile[r][v]);
}

INLINE long padded(long columns) { return (columns + STRIDE - 1) / STRIDE * STRIDE; }

// Rows of floats at a distance of `stride`, zeros in between; the rows themselves where there is nothing in between.
template <class T>
const float* strided(const T* from, long rows, long columns, long stride, std::vector<float>& store) {
    if (sizeof(T) == 4 && stride == columns) return reinterpret_cast<const float*>(from);
    store.resize(rows * stride);
    for (long row = 0; row < rows; ++row)
        for (long column = 0; column < columns; ++column) store[row * stride + column] = widen(from[row * columns + column]);
    return store.data();
}

}  // namespace

// The best level of this processor.
extern "C" int best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16") ? WITH_AVX512_BF16
                                                                                             : WITH_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return WITH_AVX2;
#endif
    return PLAIN;
}
