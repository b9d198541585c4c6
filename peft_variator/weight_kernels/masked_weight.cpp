// A weight under a mask and a low-rank update, (W + B·A) ⊙ M, as training needs it: made in one pass, and the gradients of
// A and B from that of the whole, which is read once and never written. Sums are of float32.
//
// With AVX-512 alone: with less the operators of PyTorch are as fast.

#include "weights.h"

#if defined(__x86_64__)

namespace {

struct Task : Weight {
    const float* a;  // (rank, columns), rows `stride` floats apart
    const float* b;  // (rows, rank)
    long rank, stride;
    void* matrix;    // (rows, columns): what is made, or the gradient of it
    float* of_a;     // gradients: (threads, rank, stride), zeros before
    float* of_b;     // (rows, rank)
};

// B's rows by rank; zeros where there are no more rows.
template <int R>
INLINE void take_factors(const Task& task, long row, long end, float* factors) {
    for (int r = 0; r < R; ++r)
        for (long k = 0; k < task.rank; ++k) factors[k * R + r] = row + r < end ? task.b[(row + r) * task.rank + k] : 0;
}

template <class Set, class T, class O, bool PACKED>
INLINE void sum_rows(const Task& task, long begin, long end) {
    constexpr int R = Set::ROWS, V = Set::VECTORS;
    RowBlock<Set, T, PACKED> block;
    constexpr long COLUMNS = block.COLUMNS;
    std::vector<float> factors(R * task.rank);
    for (long row = begin; row < end; row += R) {
        block.begin(task, row, end);
        take_factors<R>(task, row, end, factors.data());
        for (long column = 0; column < task.columns; column += COLUMNS) {
            const long here = task.columns - column < COLUMNS ? task.columns - column : COLUMNS;
            const bool inside = here == COLUMNS;
            Floats tile[R][V];
            sum_tile<Set, T, PACKED>(inside ? block.rows : block.tails, inside ? column : 0, factors.data(), task.a,
                                     task.rank, task.stride, column, tile);
            for (int r = 0; r < R && row + r < end; ++r) {
                O* out = static_cast<O*>(task.matrix) + (row + r) * task.columns + column;
                O rest[COLUMNS];
                for (int v = 0; v < V; ++v) narrow16(tile[r][v], (inside ? out : rest) + LANES * v);
                if (!inside) std::memcpy(out, rest, here * sizeof(O));
            }
        }
    }
}

template <class Set, class T, class G, bool PACKED>
INLINE void gradient_rows(const Task& task, long begin, long end, float* of_a) {
    constexpr int R = Set::ROWS, V = Set::VECTORS;
    RowBlock<Set, T, PACKED> block;
    constexpr long COLUMNS = block.COLUMNS;
    std::vector<float> factors(R * task.rank), sums(R * task.rank * LANES);
    for (long row = begin; row < end; row += R) {
        block.begin(task, row, end);
        take_factors<R>(task, row, end, factors.data());
        std::memset(sums.data(), 0, sums.size() * sizeof(float));
        for (long column = 0; column < task.columns; column += COLUMNS) {
            const long here = task.columns - column < COLUMNS ? task.columns - column : COLUMNS;
            const bool inside = here == COLUMNS;
            const Row<T>* rows = inside ? block.rows : block.tails;
            Floats gradient[R][V] = {};
            for (int r = 0; r < R && row + r < end; ++r) {
                const G* from = static_cast<const G*>(task.matrix) + (row + r) * task.columns + column;
                G rest[COLUMNS] = {};
                if (!inside) std::memcpy(rest, from, here * sizeof(G));
                for (int v = 0; v < V; ++v)
                    gradient[r][v] = kept16<Set, T, PACKED>(
                        rows[r], (inside ? column : 0) + LANES * v, widen16((inside ? from : rest) + LANES * v));
            }
            for (long k = 0; k < task.rank; ++k)
                for (int v = 0; v < V; ++v) {
                    const long at = k * task.stride + column + LANES * v;
                    const Floats a = load<Floats>(task.a + at);
                    Floats sum = load<Floats>(of_a + at);
                    for (int r = 0; r < R; ++r) {
                        float* of_row = sums.data() + (k * R + r) * LANES;
                        sum += factors[k * R + r] * gradient[r][v];
                        const Floats products = load<Floats>(of_row) + gradient[r][v] * a;
                        std::memcpy(of_row, &products, sizeof products);
                    }
                    std::memcpy(of_a + at, &sum, sizeof sum);
                }
        }
        for (int r = 0; r < R && row + r < end; ++r)
            for (long k = 0; k < task.rank; ++k) {
                float sum = 0;
                for (int lane = 0; lane < LANES; ++lane) sum += sums[(k * R + r) * LANES + lane];
                task.of_b[(row + r) * task.rank + k] = sum;
            }
    }
}

// Rows of the one or, where `of_a` is given, of the other.
template <class Set, class T, class O>
INLINE void rows_of(const Task& task, long begin, long end, float* of_a) {
    if (task.bits) of_a ? gradient_rows<Set, T, O, true>(task, begin, end, of_a) : sum_rows<Set, T, O, true>(task, begin, end);
    else of_a ? gradient_rows<Set, T, O, false>(task, begin, end, of_a) : sum_rows<Set, T, O, false>(task, begin, end);
}

template <class T, class O>
AVX512 void rows_avx512(const Task& task, long begin, long end, float* of_a) {
    rows_of<WithAvx512, T, O>(task, begin, end, of_a);
}

template <class T, class O>
void run(const Task& given, int threads) {
    Task task = given;
    std::vector<float> a;
    task.stride = padded(task.columns);
    task.a = strided(given.a, task.rank, task.columns, task.stride, a);
    std::vector<float> of_a(given.of_a ? threads * task.rank * task.stride : 0);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int share = 0; share < threads; ++share)
        rows_avx512<T, O>(task, task.rows * share / threads, task.rows * (share + 1) / threads,
                          given.of_a ? of_a.data() + share * task.rank * task.stride : nullptr);
    if (!given.of_a) return;
    for (long k = 0; k < task.rank; ++k)
        for (long column = 0; column < task.columns; ++column) {
            float sum = 0;
            for (int share = 0; share < threads; ++share) sum += of_a[(share * task.rank + k) * task.stride + column];
            given.of_a[k * task.columns + column] = sum;
        }
}

}  // namespace

// `matrix`, (rows, columns), is (W + B·A) ⊙ M, written; where `of_a` and `of_b` are given, it is the gradient of that, read,
// and they are those of A and B. `bytes` a value of W and `matrix_bytes` one of the matrix: 2 for bfloat16, 4 for float32.
// W is dense where `bits` is null.
extern "C" void masked_weight(const void* values, const uint8_t* bits, const uint8_t* mask, const float* a, const float* b,
                              void* matrix, float* of_a, float* of_b, long rows, long columns, long rank, int bytes,
                              int matrix_bytes, int threads) {
    const Weight weight{values, bits, mask, rows, columns};
    const Task task{weight, a, b, rank, 0, matrix, of_a, of_b};
    if (bytes == 2) matrix_bytes == 2 ? run<uint16_t, uint16_t>(task, threads) : run<uint16_t, float>(task, threads);
    else matrix_bytes == 2 ? run<float, uint16_t>(task, threads) : run<float, float>(task, threads);
}
#endif
