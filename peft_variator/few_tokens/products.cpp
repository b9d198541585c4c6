// Products of a few tokens and a weight that is never made in memory: x·Wᵀ + b for a packed 2:4 weight W, which is read
// as it lies, and x·((W + B·A) ⊙ M)ᵀ + b for a weight W under a mask M and a low-rank update, packed or dense.
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
    if (task.bias) sum += widen(static_cast<const T*>(task.bias)[row]);
    narrow(sum, static_cast<T*>(task.out)[token * task.rows + row]);
}

// Columns of the bits set in a byte, and where each column of a byte finds its value: 4 to 7 hold zeros.
struct Tables {
    uint8_t columns[256][4] = {};
    int32_t sources[256][8] = {};
    Tables() {
        for (int byte = 0; byte < 256; ++byte) {
            int kept = 0;
            for (int column = 0; column < 8; ++column) {
                const bool set = byte >> column & 1;
                sources[byte][column] = set && kept < 4 ? kept : 7;
                if (set && kept < 4) columns[byte][kept++] = static_cast<uint8_t>(column);
            }
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

// The masked product. A tile of rows and columns of W + B·A exists in registers alone: its share of B·A is summed over the
// rank, W is added and M applied, and all tokens are multiplied with it. Nothing is kept from one call to the next.

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

// 16 bits of a mask from `column` on, those past the last column 0.
INLINE uint32_t bits16(const uint8_t* bits, const Task& task, long row, long column) {
    const uint8_t* from = bits + row * task.width() + column / 8;
    const long left = task.columns - column;
    if (left >= LANES) return from[0] | from[1] << 8;
    return (from[0] | (left > 8 ? from[1] << 8 : 0)) & ((1u << left) - 1);
}
INLINE Lanes spread(uint32_t bits) {
    const Lanes one = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    return ((Lanes{} + static_cast<int32_t>(bits)) & one) != 0;
}

struct Portable {
    static constexpr int ROWS = 2, VECTORS = 1;
    template <class T>
    static INLINE void expand(const T* values, uint32_t bits, float* out) {
        for (int byte = 0; byte < 2; ++byte, bits >>= 8)
            for (int index = 0; index < 4; ++index, ++values) {
                const int kept = __builtin_popcount(bits & 255);
                if (index < kept) out[8 * byte + TABLES.columns[bits & 255][index]] = widen(*values);
            }
    }
};

#if defined(__x86_64__)
struct WithAvx2 {
    static constexpr int ROWS = 4, VECTORS = 1;
    template <class T>
    AVX2 static inline void expand(const T* values, uint32_t bits, float* out) {
        for (int byte = 0; byte < 2; ++byte) {
            const __m256 kept = _mm256_insertf128_ps(_mm256_setzero_ps(), load4(values + 4 * byte), 0);
            const int32_t* source = TABLES.sources[bits >> 8 * byte & 255];
            const __m256i places = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
            _mm256_storeu_ps(out + 8 * byte, _mm256_permutevar8x32_ps(kept, places));
        }
    }
};

struct WithAvx512 {
    static constexpr int ROWS = 8, VECTORS = 2;
    template <class T>
    AVX512 static inline void expand(const T* values, uint32_t bits, float* out) {
        const __m512 kept = _mm512_castps256_ps512(load8(values));
        _mm512_storeu_ps(out, _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), kept));
    }
};
#endif

// 16 values of W in a row from `column` on, and all bits set in the lanes that M keeps.
template <class Set, class T>
INLINE void read16(const Task& task, long row, long column, Floats& weights, Lanes& kept) {
    const bool packed = task.bits != nullptr;
    const long left = task.columns - column;
    if (left <= 0) {
        weights = Floats{};
        kept = Lanes{};
        return;
    }
    const T* values = static_cast<const T*>(task.values);
    values += packed ? (row * task.columns + column) / 2 : row * task.columns + column;
    T tail[LANES] = {};
    if (left < LANES) {
        std::memcpy(tail, values, (packed ? left / 2 : left) * sizeof(T));
        values = tail;
    }
    uint32_t places = 0;
    if (packed) {
        float expanded[LANES] = {};
        places = bits16(task.bits, task, row, column);
        Set::expand(values, places, expanded);
        weights = load<Floats>(expanded);
    } else {
        weights = widen16(values);
    }
    if (task.mask)
        kept = spread(bits16(task.mask, task, row, column));
    else
        kept = packed ? spread(places) : weights != 0;  // NaN is not 0
}

template <class Set, class T>
INLINE void masked_rows(const Task& task, long begin, long end) {
    constexpr int R = Set::ROWS, V = Set::VECTORS;
    std::vector<float> factors(R * task.rank), store_of_sums(R * task.tokens * LANES);
    float* sums = store_of_sums.data();
    for (long row = begin; row < end; row += R) {
        long rows[R];  // the last one again where there are no more
        for (int r = 0; r < R; ++r) rows[r] = row + r < end ? row + r : end - 1;
        for (long k = 0; k < task.rank; ++k)
            for (int r = 0; r < R; ++r) factors[k * R + r] = task.b[rows[r] * task.rank + k];
        std::memset(sums, 0, store_of_sums.size() * sizeof(float));
        for (long column = 0; column < task.columns; column += LANES * V) {
            Floats tile[R][V] = {};
            for (long k = 0; k < task.rank; ++k) {
                Floats a[V];
                for (int v = 0; v < V; ++v) a[v] = load<Floats>(task.a + k * task.stride + column + LANES * v);
                for (int r = 0; r < R; ++r)
                    for (int v = 0; v < V; ++v) tile[r][v] += factors[k * R + r] * a[v];
            }
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) {
                    Floats weights;
                    Lanes kept;
                    read16<Set, T>(task, rows[r], column + LANES * v, weights, kept);
                    tile[r][v] = (Floats)((Lanes)(weights + tile[r][v]) & kept);
                }
            for (long token = 0; token < task.tokens; ++token)
                for (int r = 0; r < R; ++r) {
                    float* at = sums + (token * R + r) * LANES;
                    Floats sum = load<Floats>(at);
                    for (int v = 0; v < V; ++v)
                        sum += tile[r][v] * load<Floats>(task.wide + token * task.stride + column + LANES * v);
                    std::memcpy(at, &sum, sizeof sum);
                }
        }
        for (long token = 0; token < task.tokens; ++token)
            for (int r = 0; r < R && row + r < end; ++r) {
                float sum = 0;
                for (int lane = 0; lane < LANES; ++lane) sum += sums[(token * R + r) * LANES + lane];
                store<T>(task, token, row + r, sum);
            }
    }
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
    std::vector<float> wide, a;
    task.stride = masked ? (task.columns + STRIDE - 1) / STRIDE * STRIDE : task.columns;
    task.wide = strided(static_cast<const T*>(task.x), task.tokens, task.columns, task.stride, wide);
    if (masked) task.a = strided(given.a, task.rank, task.columns, task.stride, a);
    const Rows rows = rows_at<T>(level, masked);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int share = 0; share < threads; ++share)
        rows(task, task.rows * share / threads, task.rows * (share + 1) / threads);
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
    const Task task{x, nullptr, values, bits, bias, out, tokens, rows, columns, 0, mask, a, b, rank};
    bytes == 2 ? run<uint16_t>(task, level, threads) : run<float>(task, level, threads);
}
}
