// Products of a few tokens and a weight that is never made in memory: x·Wᵀ + b for a packed 2:4 weight W, which is read
// as it lies, and x·((W + B·A) ⊙ M)ᵀ + b for a weight W under a mask M and a low-rank update, packed or dense. For more
// tokens, the weight: W, unpacked.
//
// A row of W is columns/2 kept values and a bit for each column (bit i of byte j: column 8·j + i). Every group of four
// columns has two bits set, so 32 columns always take 16 values: what a block of columns needs is known beforehand.
// Sums are of float32, in another order than that of a dense product.
//
// Nothing of torch is included: a plain C interface, called with addresses. One file holds the instruction sets, and
// the processor is asked at run time.

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

struct Task {
    const void* x;      // (tokens, columns)
    const float* wide;  // the same in float32
    const void* values; // (rows, columns / 2)
    const uint8_t* bits; // (rows, ceil(columns / 8))
    const void* bias;   // (rows,) or null
    void* out;          // (tokens, rows)
    long tokens, rows, columns;
    long stride;           // floats from one token to the next in `wide`, from one rank to the next in `a`
    const uint8_t* mask;   // M, (rows, ceil(columns / 8)); null: where W is stored, or, of a dense W, is not 0
    const float* a;        // (rank, columns)
    const float* b;        // (rows, rank)
    long rank;
    const float* columns_of_a; // A as `Eight`s, (ranks / 8, stride, 8); null: the masked product goes by tiles
    float* updates;            // what is added to the product, (tokens, rows); null: nothing
    void (*packed_rows)(const Task&, long, long); // the product of the packed form
    long width() const { return (columns + 7) / 8; }
};

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

template <class T>
inline void store(const Task& task, long token, long row, float sum) {
    if (task.updates) sum += task.updates[token * task.rows + row];
    if (task.bias) sum += widen(static_cast<const T*>(task.bias)[row]);
    narrow(sum, static_cast<T*>(task.out)[token * task.rows + row]);
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

// One row and one token from `column` on, value by value. Zeros are multiplied, too: with what is not finite they are NaN.
template <class T>
inline float plain_sum(const Task& task, long row, long token, long column) {
    const T* values = static_cast<const T*>(task.values) + row * (task.columns / 2) + column / 2;
    const uint8_t* bits = task.bits + row * task.width();
    const float* x = task.wide + token * task.stride;
    float sum = 0;
    for (; column < task.columns; column += 8) {
        const int columns = task.columns - column < 8 ? 4 : 8;  // the last byte may stand for one group
        const uint8_t* places = TABLES.columns[bits[column / 8]];
        float weights[8] = {};
        for (int index = 0; index < columns / 2; ++index) weights[places[index]] = widen(*values++);
        for (int index = 0; index < columns; ++index) sum += weights[index] * x[column + index];
    }
    return sum;
}

template <class T>
void plain_rows(const Task& task, long begin, long end) {
    for (long row = begin; row < end; ++row)
        for (long token = 0; token < task.tokens; ++token) store<T>(task, token, row, plain_sum<T>(task, row, token, 0));
}

#if defined(__x86_64__)

// Up to eight tokens share what was expanded of a row.
#define FOR_TOKENS(sums, T)                                            \
    for (long row = begin; row < end; ++row) {                         \
        long token = 0;                                                \
        for (; task.tokens - token >= 8; token += 8) sums<8, T>(task, row, token); \
        for (; task.tokens - token >= 4; token += 4) sums<4, T>(task, row, token); \
        for (; task.tokens - token >= 2; token += 2) sums<2, T>(task, row, token); \
        for (; token < task.tokens; ++token) sums<1, T>(task, row, token);         \
    }

AVX2 inline __m128 load4(const float* values) { return _mm_loadu_ps(values); }
AVX2 inline __m128 load4(const uint16_t* values) {
    const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(raw), 16));
}

template <int M, class T>
AVX2 inline void avx2_sums(const Task& task, long row, long token) {
    constexpr int U = M == 1 ? 4 : M == 2 ? 2 : 1;
    const T* values = static_cast<const T*>(task.values) + row * (task.columns / 2);
    const uint8_t* bits = task.bits + row * task.width();
    const float* x = task.wide + token * task.stride;
    __m256 sums[M][U];
    for (int m = 0; m < M; ++m)
        for (int u = 0; u < U; ++u) sums[m][u] = _mm256_setzero_ps();
    long column = 0;
    for (; column + 8 * U <= task.columns; column += 8 * U)
        for (int u = 0; u < U; ++u) {
            const long at = column + 8 * u;
            const __m256 kept = _mm256_insertf128_ps(_mm256_setzero_ps(), load4(values + at / 2), 0);
            const __m256i source = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(TABLES.sources[bits[at / 8]]));
            const __m256 weight = _mm256_permutevar8x32_ps(kept, source);
            for (int m = 0; m < M; ++m)
                sums[m][u] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + m * task.stride + at), sums[m][u]);
        }
    for (int m = 0; m < M; ++m) {
        for (int u = 1; u < U; ++u) sums[m][0] = _mm256_add_ps(sums[m][0], sums[m][u]);
        alignas(32) float parts[8];
        _mm256_store_ps(parts, sums[m][0]);
        float sum = ((parts[0] + parts[4]) + (parts[1] + parts[5])) + ((parts[2] + parts[6]) + (parts[3] + parts[7]));
        if (column < task.columns) sum += plain_sum<T>(task, row, token + m, column);
        store<T>(task, token + m, row, sum);
    }
}

template <class T>
AVX2 void avx2_rows(const Task& task, long begin, long end) {
    FOR_TOKENS(avx2_sums, T)
}

AVX512 inline __m256 load8(const float* values) { return _mm256_loadu_ps(values); }
AVX512 inline __m256 load8(const uint16_t* values) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

template <int M, class T>
AVX512 inline void avx512_sums(const Task& task, long row, long token) {
    constexpr int U = M == 1 ? 4 : M == 2 ? 2 : 1;
    const T* values = static_cast<const T*>(task.values) + row * (task.columns / 2);
    const uint8_t* bits = task.bits + row * task.width();
    const float* x = task.wide + token * task.stride;
    __m512 sums[M][U];
    for (int m = 0; m < M; ++m)
        for (int u = 0; u < U; ++u) sums[m][u] = _mm512_setzero_ps();
    long column = 0;
    for (; column + 16 * U <= task.columns; column += 16 * U)
        for (int u = 0; u < U; ++u) {
            const long at = column + 16 * u;
            uint16_t mask;
            std::memcpy(&mask, bits + at / 8, sizeof mask);
            const __m512 weight = _mm512_maskz_expand_ps(mask, _mm512_castps256_ps512(load8(values + at / 2)));
            for (int m = 0; m < M; ++m)
                sums[m][u] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(x + m * task.stride + at), sums[m][u]);
        }
    for (int m = 0; m < M; ++m) {
        for (int u = 1; u < U; ++u) sums[m][0] = _mm512_add_ps(sums[m][0], sums[m][u]);
        float sum = _mm512_reduce_add_ps(sums[m][0]);
        if (column < task.columns) sum += plain_sum<T>(task, row, token + m, column);
        store<T>(task, token + m, row, sum);
    }
}

template <class T>
AVX512 void avx512_rows(const Task& task, long begin, long end) {
    FOR_TOKENS(avx512_sums, T)
}

template <int M, class T>
AVX512BF16 inline void avx512_bf16_sums(const Task& task, long row, long token) {
    constexpr int U = M == 1 ? 4 : M == 2 ? 2 : 1;
    const T* values = static_cast<const T*>(task.values) + row * (task.columns / 2);
    const uint8_t* bits = task.bits + row * task.width();
    const T* x = static_cast<const T*>(task.x) + token * task.columns;
    __m512 sums[M][U];
    for (int m = 0; m < M; ++m)
        for (int u = 0; u < U; ++u) sums[m][u] = _mm512_setzero_ps();
    long column = 0;
    for (; column + 32 * U <= task.columns; column += 32 * U)
        for (int u = 0; u < U; ++u) {
            const long at = column + 32 * u;
            uint32_t mask;
            std::memcpy(&mask, bits + at / 8, sizeof mask);
            const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + at / 2));
            const __m512i weight = _mm512_maskz_expand_epi16(mask, _mm512_castsi256_si512(kept));
            for (int m = 0; m < M; ++m)
                sums[m][u] = _mm512_dpbf16_ps(
                    sums[m][u], (__m512bh)weight, (__m512bh)_mm512_loadu_si512(x + m * task.columns + at));
        }
    for (int m = 0; m < M; ++m) {
        for (int u = 1; u < U; ++u) sums[m][0] = _mm512_add_ps(sums[m][0], sums[m][u]);
        float sum = _mm512_reduce_add_ps(sums[m][0]);
        if (column < task.columns) sum += plain_sum<T>(task, row, token + m, column);
        store<T>(task, token + m, row, sum);
    }
}

AVX512BF16 void avx512_bf16_rows(const Task& task, long begin, long end) {
    FOR_TOKENS(avx512_bf16_sums, uint16_t)
}

#endif

// The masked product, in one of two ways. Nothing is kept from one call to the next.
//
// By tiles: a tile of rows and columns of W + B·A exists in registers alone: its share of B·A is summed over the rank, W is
// added and M applied, and all tokens are multiplied with it.
//
// By tables, for the fewest tokens, where M is the places of a packed W: x·Wᵀ is the product of the packed form, and the
// update adds B_i·s to row i, where s is the sum of x_j·A_j over the columns j that the row keeps. A byte of its bits has
// one of 36 patterns: their sums, which all rows share, stand in a table in the nearest cache, where a row looks them up.

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

// What sets of instructions have in common: w + u where M keeps it, else 0.
struct Generic {
    static INLINE Floats add_at(uint32_t bits, Floats w, Floats u) {
        const Lanes one = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
        return (Floats)((Lanes)(w + u) & (((Lanes{} + static_cast<int32_t>(bits)) & one) != 0));
    }
    static INLINE Floats add_where_not_zero(Floats w, Floats u) {
        return (Floats)((Lanes)(w + u) & (w != 0));  // NaN is not 0
    }
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
};
#endif

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

// Add the products of a tile, which begins at `at` in these rows and at `column` in x and A, to the sums of each token.
template <class Set, class T, bool PACKED>
INLINE void add_tile(const Task& task, const float* factors, const Row<T>* rows, long at, long column, float* sums) {
    constexpr int R = Set::ROWS, V = Set::VECTORS;
    Floats tile[R][V] = {};
    for (long k = 0; k < task.rank; ++k) {
        Floats a[V];
        for (int v = 0; v < V; ++v) a[v] = load<Floats>(task.a + k * task.stride + column + LANES * v);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) tile[r][v] += factors[k * R + r] * a[v];
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v)
            tile[r][v] = updated16<Set, T, PACKED>(rows[r], at + LANES * v, tile[r][v]);
    for (long token = 0; token < task.tokens; ++token, sums += R * LANES)
        for (int r = 0; r < R; ++r) {
            Floats sum = load<Floats>(sums + r * LANES);
            for (int v = 0; v < V; ++v)
                sum += tile[r][v] * load<Floats>(task.wide + token * task.stride + column + LANES * v);
            std::memcpy(sums + r * LANES, &sum, sizeof sum);
        }
}

template <class Set, class T, bool PACKED>
INLINE void rows_by_tiles(const Task& task, long begin, long end) {
    constexpr int R = Set::ROWS;
    constexpr long COLUMNS = LANES * Set::VECTORS;
    const long whole = task.columns / COLUMNS * COLUMNS, rest = task.columns - whole;
    std::vector<float> factors(R * task.rank), sums(R * task.tokens * LANES);
    for (long row = begin; row < end; row += R) {
        Row<T> rows[R], tails[R];
        T values[R][COLUMNS] = {};  // what is left of these rows, followed by zeros that M does not keep
        uint8_t places[R][COLUMNS / 8] = {}, mask[R][COLUMNS / 8] = {};
        for (int r = 0; r < R; ++r) {
            const long at = row + r < end ? row + r : end - 1;  // the last one again where there are no more
            const T* from = static_cast<const T*>(task.values) + at * task.columns / (PACKED ? 2 : 1);
            const uint8_t* bits = task.mask ? task.mask : task.bits;
            rows[r] = {from, PACKED ? task.bits + at * task.width() : nullptr, bits ? bits + at * task.width() : nullptr};
            tails[r] = {values[r], places[r], bits ? mask[r] : nullptr};
            std::memcpy(values[r], from + whole / (PACKED ? 2 : 1), rest / (PACKED ? 2 : 1) * sizeof(T));
            if (PACKED) std::memcpy(places[r], rows[r].places + whole / 8, (rest + 7) / 8);
            if (bits) std::memcpy(mask[r], rows[r].mask + whole / 8, (rest + 7) / 8);
            for (long k = 0; k < task.rank; ++k) factors[k * R + r] = task.b[at * task.rank + k];
        }
        std::memset(sums.data(), 0, sums.size() * sizeof(float));
        for (long column = 0; column < task.columns; column += COLUMNS) {
            const bool inside = column < whole;
            add_tile<Set, T, PACKED>(task, factors.data(), inside ? rows : tails, inside ? column : 0, column, sums.data());
        }
        for (long token = 0; token < task.tokens; ++token)
            for (int r = 0; r < R && row + r < end; ++r) {
                float sum = 0;
                for (int lane = 0; lane < LANES; ++lane) sum += sums[(token * R + r) * LANES + lane];
                store<T>(task, token, row + r, sum);
            }
    }
}

typedef float Eight __attribute__((vector_size(32)));
constexpr long EIGHT = 8;         // ranks at a time
constexpr long CHUNK = 512;       // rows that share a table
constexpr long BYTES = 16;        // of a row's bits in a table, which takes 18 KiB
constexpr int PAIRS = 6, PATTERNS = PAIRS * PAIRS;
constexpr uint8_t PAIR_BITS[PAIRS] = {3, 5, 9, 6, 10, 12};

// Where in a table the sum of a byte's columns stands, in floats; the last byte may have a lower half alone.
struct Offsets {
    uint16_t of_byte[256] = {};
    Offsets() {
        for (int low = 0; low < PAIRS; ++low) {
            of_byte[PAIR_BITS[low]] = static_cast<uint16_t>(EIGHT * low);
            for (int high = 0; high < PAIRS; ++high)
                of_byte[PAIR_BITS[low] | PAIR_BITS[high] << 4] = static_cast<uint16_t>(EIGHT * (PAIRS * high + low));
        }
    }
};
const Offsets OFFSETS;

// The sums of x_j·A_j over the two columns of each pair in four.
INLINE void sum_pairs(const float* x, const float* columns_of_a, Eight* pairs) {
    Eight products[4];
    for (int column = 0; column < 4; ++column) products[column] = x[column] * load<Eight>(columns_of_a + EIGHT * column);
    for (int pair = 0, first = 0; first < 4; ++first)
        for (int second = first + 1; second < 4; ++second) pairs[pair++] = products[first] + products[second];
}

INLINE void add_updates_by_tables(const Task& task, long begin, long end) {
    const long width = task.width();
    Eight table[BYTES][PATTERNS], sums[CHUNK];
    for (long token = 0; token < task.tokens; ++token)
        for (long k = 0; k < task.rank; k += EIGHT) {
            std::memset(static_cast<void*>(sums), 0, sizeof sums);
            for (long byte = 0; byte < width; byte += BYTES) {
                const long bytes = width - byte < BYTES ? width - byte : BYTES;
                for (long index = 0; index < bytes; ++index) {
                    const long column = 8 * (byte + index);
                    const float* x = task.wide + token * task.stride + column;  // zeros after the last column
                    const float* a = task.columns_of_a + (k / EIGHT * task.stride + column) * EIGHT;
                    Eight low[PAIRS], high[PAIRS];
                    sum_pairs(x, a, low);
                    sum_pairs(x + 4, a + 4 * EIGHT, high);
                    for (int above = 0; above < PAIRS; ++above)
                        for (int below = 0; below < PAIRS; ++below)
                            table[index][PAIRS * above + below] = low[below] + high[above];
                }
                for (long row = begin; row < end; ++row) {
                    const uint8_t* bits = task.bits + row * width + byte;
                    const auto look_up = [&](long index, uint8_t pattern) __attribute__((always_inline)) {
                        return load<Eight>(reinterpret_cast<const float*>(table[index]) + OFFSETS.of_byte[pattern]);
                    };
                    Eight parts[4] = {sums[row - begin]};
                    long index = 0;
                    for (; index + 8 <= bytes; index += 8) {
                        const uint64_t eight = load<uint64_t>(bits + index);
                        for (int each = 0; each < 8; ++each)
                            parts[each % 4] += look_up(index + each, static_cast<uint8_t>(eight >> 8 * each));
                    }
                    for (; index < bytes; ++index) parts[0] += look_up(index, bits[index]);
                    sums[row - begin] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
                }
            }
            for (long row = begin; row < end; ++row) {
                float* update = task.updates + token * task.rows + row;
                for (long index = 0; index < EIGHT && k + index < task.rank; ++index)
                    *update += task.b[row * task.rank + k + index] * sums[row - begin][index];
            }
        }
}

template <class Set, class T, bool PACKED>
INLINE void masked_rows(const Task& task, long begin, long end) {
    if (!task.columns_of_a) return rows_by_tiles<Set, T, PACKED>(task, begin, end);
    for (long first = begin; first < end; first += CHUNK) {
        const long last = end - first < CHUNK ? end : first + CHUNK;
        add_updates_by_tables(task, first, last);
        task.packed_rows(task, first, last);
    }
}

template <class Set, class T>
INLINE void masked_rows(const Task& task, long begin, long end) {
    task.bits ? masked_rows<Set, T, true>(task, begin, end) : masked_rows<Set, T, false>(task, begin, end);
}

template <class T>
void masked_rows_portable(const Task& task, long begin, long end) {
    masked_rows<Portable, T>(task, begin, end);
}
#if defined(__x86_64__)
template <class T>
AVX2 void masked_rows_avx2(const Task& task, long begin, long end) {
    masked_rows<WithAvx2, T>(task, begin, end);
}
template <class T>
AVX512 void masked_rows_avx512(const Task& task, long begin, long end) {
    masked_rows<WithAvx512, T>(task, begin, end);
}
#endif

using Rows = void (*)(const Task&, long, long);

template <class T>
Rows rows_at(int level, bool masked) {
#if defined(__x86_64__)
    if (level >= WITH_AVX512 && masked) return masked_rows_avx512<T>;
    if (level == WITH_AVX512_BF16 && sizeof(T) == 2) return avx512_bf16_rows;
    if (level >= WITH_AVX512) return avx512_rows<T>;
    if (level == WITH_AVX2) return masked ? masked_rows_avx2<T> : avx2_rows<T>;
#endif
    return masked ? masked_rows_portable<T> : plain_rows<T>;
}

// Rows of floats at a distance of `stride`, zeros in between; the rows themselves where there is nothing in between.
template <class T>
const float* strided(const T* from, long rows, long columns, long stride, std::vector<float>& store) {
    if (sizeof(T) == 4 && stride == columns) return reinterpret_cast<const float*>(from);
    store.resize(rows * stride);
    for (long row = 0; row < rows; ++row)
        for (long column = 0; column < columns; ++column) store[row * stride + column] = widen(from[row * columns + column]);
    return store.data();
}

template <class T>
void run(const Task& given, int level, int threads) {
    Task task = given;
    const bool masked = task.a != nullptr;
    // By measurement. Without AVX-512 tiles took 3 to 16 times as long for up to four tokens.
    const bool fewest = level < WITH_AVX512 || task.tokens <= (task.rank < EIGHT ? 1 : 2);
    const bool by_tables = masked && task.bits && !task.mask && fewest;
    std::vector<float> wide, a, updates;
    task.stride = masked ? (task.columns + STRIDE - 1) / STRIDE * STRIDE : task.columns;
    task.wide = strided(static_cast<const T*>(task.x), task.tokens, task.columns, task.stride, wide);
    if (by_tables) {
        a.resize((task.rank + EIGHT - 1) / EIGHT * EIGHT * task.stride);
        for (long k = 0; k < task.rank; ++k)
            for (long column = 0; column < task.columns; ++column)
                a[(k / EIGHT * task.stride + column) * EIGHT + k % EIGHT] = given.a[k * task.columns + column];
        updates.resize(task.tokens * task.rows);
        task.columns_of_a = a.data();
        task.updates = updates.data();
        task.packed_rows = rows_at<T>(level, false);
    } else if (masked) task.a = strided(given.a, task.rank, task.columns, task.stride, a);
    const Rows rows = rows_at<T>(level, masked);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int share = 0; share < threads; ++share)
        rows(task, task.rows * share / threads, task.rows * (share + 1) / threads);
}

// Unpacking: rows of `values` and `bits` as above -> `out`, (rows, columns). Bits are moved, so it is the same for every
// dtype of a size, and NaN stays what it is.
struct Unpacking {
    const void* values;
    const uint8_t* bits;
    void* out;
    long columns;
};

// Some columns of a row, the last byte of whose bits may stand for one group.
template <class T>
inline void unpack_columns(const T* values, const uint8_t* bits, T* out, long columns) {
    std::memset(out, 0, columns * sizeof(T));
    for (long column = 0; column < columns; column += 8)
        for (int index = 0; index < (columns - column < 8 ? 2 : 4); ++index)
            out[column + TABLES.columns[bits[column / 8]][index]] = *values++;
}

struct Unpack {
    static constexpr long COLUMNS = 8;
    template <class T>
    static INLINE void step(const T* values, const uint8_t* bits, T* out) { unpack_columns(values, bits, out, COLUMNS); }
};

#if defined(__x86_64__)
struct UnpackWithAvx2 {
    static constexpr long COLUMNS = 8;
    AVX2 static inline void step(const uint16_t* values, const uint8_t* bits, uint16_t* out) {
        const __m128i kept = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
        const __m128i source = _mm_loadu_si128(reinterpret_cast<const __m128i*>(TABLES.bytes[*bits]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(kept, source));
    }
    AVX2 static inline void step(const uint32_t* values, const uint8_t* bits, uint32_t* out) {
        const __m256i kept = _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
        const __m256i source = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(TABLES.sources[*bits]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(kept, source));
    }
};

struct UnpackWithAvx512 {
    static constexpr long COLUMNS = 16;
    AVX512 static inline void step(const uint32_t* values, const uint8_t* bits, uint32_t* out) {
        const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
        _mm512_storeu_si512(out, _mm512_maskz_expand_epi32(load<uint16_t>(bits), _mm512_castsi256_si512(kept)));
    }
};

struct UnpackWithVbmi2 {
    static constexpr long COLUMNS = 32;
    AVX512BF16 static inline void step(const uint16_t* values, const uint8_t* bits, uint16_t* out) {
        const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
        _mm512_storeu_si512(out, _mm512_maskz_expand_epi16(load<uint32_t>(bits), _mm512_castsi256_si512(kept)));
    }
};
#endif

template <class Set, class T>
INLINE void unpack_rows(const Unpacking& task, long begin, long end) {
    for (long row = begin; row < end; ++row) {
        const T* values = static_cast<const T*>(task.values) + row * (task.columns / 2);
        const uint8_t* bits = task.bits + row * ((task.columns + 7) / 8);
        T* out = static_cast<T*>(task.out) + row * task.columns;
        long column = 0;
        for (; column + Set::COLUMNS <= task.columns; column += Set::COLUMNS)
            Set::step(values + column / 2, bits + column / 8, out + column);
        unpack_columns(values + column / 2, bits + column / 8, out + column, task.columns - column);
    }
}

using UnpackRows = void (*)(const Unpacking&, long, long);

template <class T>
void unpack_rows_portable(const Unpacking& task, long begin, long end) { unpack_rows<Unpack, T>(task, begin, end); }
#if defined(__x86_64__)
template <class T>
AVX2 void unpack_rows_avx2(const Unpacking& task, long begin, long end) { unpack_rows<UnpackWithAvx2, T>(task, begin, end); }
AVX512 void unpack_rows_avx512(const Unpacking& task, long begin, long end) {
    unpack_rows<UnpackWithAvx512, uint32_t>(task, begin, end);
}
AVX512BF16 void unpack_rows_vbmi2(const Unpacking& task, long begin, long end) {
    unpack_rows<UnpackWithVbmi2, uint16_t>(task, begin, end);
}
#endif

template <class T>
UnpackRows unpack_rows_at(int level) {
#if defined(__x86_64__)
    if (sizeof(T) == 4 && level >= WITH_AVX512) return unpack_rows_avx512;
    if (sizeof(T) == 2 && level == WITH_AVX512_BF16) return unpack_rows_vbmi2;
    if (level >= WITH_AVX2) return unpack_rows_avx2<T>;
#endif
    return unpack_rows_portable<T>;
}

template <class T>
void unpack(const Unpacking& task, long rows, int level, int threads) {
    const UnpackRows unpack_share = unpack_rows_at<T>(level);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int share = 0; share < threads; ++share)
        unpack_share(task, rows * share / threads, rows * (share + 1) / threads);
}

}  // namespace

extern "C" {

// The best level of this processor.
int best_level() {
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

// Rows are shared among `threads`; `bytes` a value: 2 for bfloat16, 4 for float32. Without `a` and `b` the weight is the
// packed one, and `bits` is needed; with them it is (W + B·A) ⊙ M, and W is dense where `bits` is null.
void few_tokens_linear(const void* x, const void* values, const uint8_t* bits, const uint8_t* mask, const float* a,
                       const float* b, const void* bias, void* out, long tokens, long rows, long columns, long rank,
                       int bytes, int level, int threads) {
    const Task task{x, nullptr, values, bits, bias, out, tokens, rows, columns, 0, mask, a, b, rank, nullptr, nullptr, nullptr};
    bytes == 2 ? run<uint16_t>(task, level, threads) : run<float>(task, level, threads);
}

// The weight itself, into `out`; `bytes` a value: 2 or 4.
void unpack_two_four(const void* values, const uint8_t* bits, void* out, long rows, long columns, int bytes, int level,
                     int threads) {
    const Unpacking task{values, bits, out, columns};
    bytes == 2 ? unpack<uint16_t>(task, rows, level, threads) : unpack<uint32_t>(task, rows, level, threads);
}
}
