// Products of a few tokens and a weight that is never made in memory: x·Wᵀ + b for a packed 2:4 weight W, which is read
// as it lies, and x·((W + B·A) ⊙ M)ᵀ + b for a weight W under a mask M and a low-rank update, packed or dense.
//
// Sums are of float32, in another order than that of a dense product.

#include "weights.h"

namespace {

struct Task : Weight {
    const void* x;      // (tokens, columns)
    const float* wide;  // the same in float32
    const void* bias;   // (rows,) or null
    void* out;          // (tokens, rows)
    long tokens;
    long stride;           // floats from one token to the next in `wide`, from one rank to the next in `a`
    const float* a;        // (rank, columns)
    const float* b;        // (rows, rank)
    long rank;
    const float* columns_of_a; // A as `Eight`s, (ranks / 8, stride, 8); null: the masked product goes by tiles
    float* updates;            // what is added to the product, (tokens, rows); null: nothing
    void (*packed_rows)(const Task&, long, long); // the product of the packed form
};

template <class T>
inline void store(const Task& task, long token, long row, float sum) {
    if (task.updates) sum += task.updates[token * task.rows + row];
    if (task.bias) sum += widen(static_cast<const T*>(task.bias)[row]);
    narrow(sum, static_cast<T*>(task.out)[token * task.rows + row]);
}

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

template <class Set, class T, bool PACKED>
INLINE void rows_by_tiles(const Task& task, long begin, long end) {
    constexpr int R = Set::ROWS, V = Set::VECTORS;
    RowBlock<Set, T, PACKED> block;
    constexpr long COLUMNS = block.COLUMNS;
    std::vector<float> factors(R * task.rank), sums(R * task.tokens * LANES);
    for (long row = begin; row < end; row += R) {
        block.begin(task, row, end);
        for (int r = 0; r < R; ++r)
            for (long k = 0; k < task.rank; ++k)
                factors[k * R + r] = task.b[(row + r < end ? row + r : end - 1) * task.rank + k];
        std::memset(sums.data(), 0, sums.size() * sizeof(float));
        for (long column = 0; column < task.columns; column += COLUMNS) {
            const bool inside = column + COLUMNS <= task.columns;
            Floats tile[R][V];
            sum_tile<Set, T, PACKED>(inside ? block.rows : block.tails, inside ? column : 0, factors.data(), task.a,
                                     task.rank, task.stride, column, tile);
            float* of_token = sums.data();
            for (long token = 0; token < task.tokens; ++token, of_token += R * LANES)
                for (int r = 0; r < R; ++r) {
                    Floats sum = load<Floats>(of_token + r * LANES);
                    for (int v = 0; v < V; ++v)
                        sum += tile[r][v] * load<Floats>(task.wide + token * task.stride + column + LANES * v);
                    std::memcpy(of_token + r * LANES, &sum, sizeof sum);
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

template <class T>
void run(const Task& given, int level, int threads) {
    Task task = given;
    const bool masked = task.a != nullptr;
    // By measurement. Without AVX-512 tiles took 3 to 16 times as long for up to four tokens.
    const bool fewest = level < WITH_AVX512 || task.tokens <= (task.rank < EIGHT ? 1 : 2);
    const bool by_tables = masked && task.bits && !task.mask && fewest;
    std::vector<float> wide, a, updates;
    task.stride = masked ? padded(task.columns) : task.columns;
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

}  // namespace

// Rows are shared among `threads`; `bytes` a value: 2 for bfloat16, 4 for float32. Without `a` and `b` the weight is the
// packed one, and `bits` is needed; with them it is (W + B·A) ⊙ M, and W is dense where `bits` is null.
extern "C" void few_tokens_linear(const void* x, const void* values, const uint8_t* bits, const uint8_t* mask,
                                  const float* a, const float* b, const void* bias, void* out, long tokens, long rows,
                                  long columns, long rank, int bytes, int level, int threads) {
    const Weight weight{values, bits, mask, rows, columns};
    const Task task{weight, x, nullptr, bias, out, tokens, 0, a, b, rank, nullptr, nullptr, nullptr};
    bytes == 2 ? run<uint16_t>(task, level, threads) : run<float>(task, level, threads);
}
