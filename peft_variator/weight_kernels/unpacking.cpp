// A packed 2:4 weight, unpacked. Bits are moved, so it is the same for every dtype of a size, and NaN stays what it is.

#include "weights.h"

namespace {

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

// `values` and `bits` of rows -> `out`, (rows, columns); `bytes` a value: 2 or 4.
extern "C" void unpack_two_four(const void* values, const uint8_t* bits, void* out, long rows, long columns, int bytes,
                                int level, int threads) {
    const Unpacking task{values, bits, out, columns};
    bytes == 2 ? unpack<uint16_t>(task, rows, level, threads) : unpack<uint32_t>(task, rows, level, threads);
}
