/* The loops of cpu.py: y = x W^T with W as a stream of indices and tables (docs/format.md), on a CPU.

   A row is read as vectors of LANES dwords. Lane l of a vector holds the indices that begin in its dword, lowest bits first, so step s
   looks up the s-th index of every lane and a shift by `bits` brings the next ones down. The activations are put into that order
   beforehand, once for all rows: `arrange`. An index of 3 bits may reach into the next dword: a dword is first shifted to where
   its first index begins (0, 1 or 2 bits), ten whole indices follow, and the eleventh step takes those that reach over from a second load,
   two bytes further on. Lanes without an index in a step meet activations of zero.

   Plain C with vector extensions (gcc, clang). Only looking up is written per instruction set: one permutation of 16 values with AVX-512, of
   8 or 4 with AVX2, or of 16 bytes four times; loads elsewhere, and with -DPORTABLE. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(PORTABLE) && (defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__)))
#include <immintrin.h>
#endif
#if !defined(PORTABLE) && defined(__AVX512F__)
#define LANES 16
#elif !defined(PORTABLE) && defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#else
#define LANES 4
#endif
/* Four bits: AMD's processors before AVX-512 are slow to permute 8 values, and fast to look up bytes. */
#if !defined(BYTES) && (defined(__znver1__) || defined(__znver2__) || defined(__znver3__))
#define BYTES 1
#endif
#if LANES == 8 && BYTES
#define BY_BYTES(bits) ((bits) == 4)
#else
#define BY_BYTES(bits) 0
#endif
#define ROWS 4  /* at once: enough sums to hide the latency of an addition, and one load of the activations for all */
#define GROUP 4 /* rows of x at once */
#define PART 64 /* rows that a thread takes at once */
#define AHEAD 16 /* rows whose scales are read at once */
#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline))

typedef float floats __attribute__((vector_size(4 * LANES), may_alias));
typedef float loose_floats __attribute__((vector_size(4 * LANES), may_alias, aligned(1)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), may_alias));
typedef uint32_t loose_words __attribute__((vector_size(4 * LANES), may_alias, aligned(1)));
/* Loops over rows and sums go before anything else is decided, so that arrays of vectors are registers. */
#define UNROLLED _Pragma("GCC unroll 32")

enum { FLOAT32, FLOAT16, BFLOAT16 };

typedef struct Job Job;
typedef void Kernel(const Job *, int64_t first, int64_t stop, float *scratch);

struct Job {
    const uint8_t *packed; /* the stream of rows * cols indices */
    const void *lut;       /* [luts, k]; of a format its values, float32 */
    int64_t rows, cols, bits, luts, k, lut_type;
    const void *scale;     /* of a format, [rows, cols / wide] of type theta_type; else 0 */
    const void *offset;    /* the same, or a stream of integers of zero_bits: offset = -scale integer; or 0 */
    int64_t wide, theta_type, zero_bits;
    void *out;     /* [batch, rows], or what is unpacked of [rows, cols] */
    int64_t batch, x_type;
    Kernel *kernel;
    int64_t first, stop; /* the rows asked for */
    float *xs;           /* x in float32, as the kernel reads it: [batch, padded as in `blocks`][stride] */
    int64_t stride;
};

/* Products of one x with several weights, or one weight to unpack: the threads are woken once. */
typedef struct {
    const Job *jobs;
    int64_t count, parts;  /* of PART rows, in all jobs */
    float *scratch;        /* of `apart` floats for every thread */
    int64_t apart;
    int64_t next, entered; /* the first part that no thread has taken, and how many threads have come */
} Run;

/* Looking up: the low 4 bits of every lane, or those of them that the table's size needs. A permutation of 16 takes 4 bits: enough for 2
   indices of 2 bits or 4 of 1 bit before one shift, each with a table of its own that ignores the bits below `low`. */

#if LANES == 16
#define PER_SHIFT(bits) ((bits) < 3 ? 4 / (bits) : 1)
#else
#define PER_SHIFT(bits) 1
#endif

/* The first of 16 readable entries, 2^bits of them meant. */
#if LANES == 16
typedef struct { floats all; } Table;
INLINE Table table_of(const float *entries, const int bits, const int low) {
    words order;
    for (int l = 0; l < LANES; l++) order[l] = (l >> low) & ((1 << bits) - 1);
    return (Table){(floats)_mm512_permutexvar_ps((__m512i)order, _mm512_loadu_ps(entries))};
}
INLINE floats look_up(const Table *t, words v, const int bits) {
    (void)bits;
    return (floats)_mm512_permutexvar_ps((__m512i)v, (__m512)t->all);
}
/* 16 indices: dwords of 8. */
INLINE words eights(const uint8_t *at, const int bits) {
    uint32_t low, high;
    memcpy(&low, at, 4);
    memcpy(&high, at + bits, 4);
    return (words)_mm512_mask_set1_epi32(_mm512_set1_epi32((int)low), 0xff00, (int)high);
}
#elif LANES == 8
typedef struct { floats low, high; } Table;
INLINE Table table_of(const float *entries, const int bits, const int low) {
    words order;
    (void)low;
    for (int l = 0; l < LANES; l++) order[l] = l & ((1 << bits) - 1);
    return (Table){(floats)_mm256_permutevar8x32_ps(_mm256_loadu_ps(entries), (__m256i)order), (floats)_mm256_loadu_ps(entries + 8)};
}
INLINE floats look_up(const Table *t, words v, const int bits) {
    if (bits < 3) return (floats)_mm256_permutevar_ps((__m256)t->low, (__m256i)v); /* within 4 lanes: half the time on some processors */
    const floats low = (floats)_mm256_permutevar8x32_ps((__m256)t->low, (__m256i)v);
    if (bits < 4) return low;
    return (floats)_mm256_blendv_ps((__m256)low, _mm256_permutevar8x32_ps((__m256)t->high, (__m256i)v), (__m256)(v << 28));
}
INLINE words eights(const uint8_t *at, const int bits) {
    uint32_t low;
    (void)bits;
    memcpy(&low, at, 4);
    return (words)_mm256_set1_epi32((int)low);
}
#else
typedef struct { const float *entries; } Table;
INLINE Table table_of(const float *entries, const int bits, const int low) {
    (void)bits, (void)low;
    return (Table){entries};
}
INLINE floats look_up(const Table *t, words v, const int bits) {
    floats out;
    v &= (1 << bits) - 1;
    for (int l = 0; l < LANES; l++) out[l] = t->entries[v[l]];
    return out;
}
#endif

/* LANES bytes, less 128: so that the sum of products is not a small difference of large ones. */
INLINE floats bytes_at(const uint8_t *at) {
#if LANES == 16
    return (floats)_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)at)), _mm512_set1_epi32(128)));
#elif LANES == 8
    return (floats)_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)at)), _mm256_set1_epi32(128)));
#else
    return (floats){at[0] - 128, at[1] - 128, at[2] - 128, at[3] - 128};
#endif
}

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}


/* Without subnormal floats, which a process may have switched off: those of half precision are steps of 0.5f. */
INLINE float of_half(uint16_t h) {
    const uint32_t size = (uint32_t)(h & 0x7fff) << 13;
    const float value = size < 0x00800000 ? as_float(0x3f000000 | (h & 0x3ff)) - 0.5f
                        : size < 0x0f800000 ? as_float(size + 0x38000000)
                                            : as_float(size | 0x7f800000);
    return h & 0x8000 ? -value : value;
}

INLINE float of_bfloat(uint16_t h) { return as_float((uint32_t)h << 16); }

INLINE uint16_t to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

/* n numbers of any of the types. */
INLINE void read_floats(const void *from, int64_t type, int64_t at, int64_t n, float *out) {
    if (type == FLOAT32) memcpy(out, (const float *)from + at, n * sizeof *out);
    const uint16_t *short_floats = (const uint16_t *)from + at;
    if (type == FLOAT16)
        for (int64_t i = 0; i < n; i++) {
#if LANES > 4 && defined(__F16C__)
            for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(short_floats + i))));
            if (i == n) break;
#endif
            out[i] = of_half(short_floats[i]);
        }
    if (type == BFLOAT16)
        for (int64_t i = 0; i < n; i++) out[i] = of_bfloat(short_floats[i]);
}

static int64_t vectors_of(const Job *j) { return (j->cols * j->bits + 32 * LANES - 1) / (32 * LANES); }
static int64_t steps_of(const Job *j) { return j->bits == 3 ? 11 : 32 / j->bits; }

/* A row of x in the order in which the indices come. */
static void arrange(const Job *j, const float *row, float *out) {
    const int64_t vectors = vectors_of(j), steps = steps_of(j);
    int64_t col = 0;
    if (BY_BYTES(j->bits)) {
        /* Step s has the low (s < 4) or high halves of 4 bytes of either half of the vector. */
        for (int64_t v = 0; v < vectors; v++)
            for (int64_t s = 0; s < 8; s++)
                for (int64_t l = 0; l < 8; l++, out++) {
                    col = 64 * v + 2 * (16 * (l / 4) + 4 * (s % 4) + l % 4) + s / 4;
                    *out = col < j->cols ? row[col] : 0;
                }
        return;
    }
    for (int64_t v = 0; v < vectors; v++, out += steps * LANES)
        for (int64_t l = 0; l < LANES; l++) {
            /* every third dword of 3-bit indices has no eleventh */
            const int64_t begins = j->bits == 3 && (v * LANES + l) % 3 == 2 ? 10 : steps;
            for (int64_t s = 0; s < steps; s++) out[s * LANES + l] = s < begins && col + s < j->cols ? row[col + s] : 0;
            col += begins;
        }
}

/* Dividing takes as long as a short row. */
INLINE int64_t table_at(const Job *j, int64_t row) { return j->rows == j->luts ? row : row / (j->rows / j->luts); }

/* The tables of the rows from `first` to `stop`, one after another, each filled up with zeros to 2^bits entries: no index reaches beyond. */
APART void read_tables(const Job *j, int64_t first, int64_t stop, float *entries) {
    const int64_t size = (int64_t)1 << j->bits, from = table_at(j, first), count = table_at(j, stop - 1) + 1 - from;
    if (j->k == size) {
        read_floats(j->lut, j->lut_type, from * size, count * size, entries);
        return;
    }
    memset(entries, 0, count * size * sizeof *entries);
    for (int64_t t = 0; t < count; t++) read_floats(j->lut, j->lut_type, (from + t) * j->k, j->k, entries + t * size);
}

/* How far the dwords of a vector are shifted to where their first index of 3 bits begins; the pattern repeats after 3. */
static const uint32_t PHASES[18] = {0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2};

#define LOAD(from) (*(const loose_words *)(from))

/* The index at bit `low` of every lane of v, for `batch` rows of x. */
INLINE void step(const words *v, Table tables[][4], const int low, const float *x, int64_t stride, floats sums[][ROWS], const int bits,
                 const int batch) {
    UNROLLED for (int r = 0; r < ROWS; r++) {
        const floats w = look_up(&tables[r][low / bits], v[r], bits);
        UNROLLED for (int b = 0; b < batch; b++) sums[b][r] += w * *(const floats *)(x + b * stride);
    }
}

/* One vector of ROWS rows of 1, 2 or 4 bits. Bytes come down by loads further on: shifts and permutations are what there is too little of. */
INLINE void take(const uint8_t *const *at, Table tables[][4], const float *x, int64_t stride, floats sums[][ROWS], const int bits,
                 const int batch) {
    const int shift = bits * PER_SHIFT(bits);
    for (int byte = 0; byte < 4; byte++) {
        words v[ROWS];
        UNROLLED for (int r = 0; r < ROWS; r++) v[r] = LOAD(at[r] + byte);
        UNROLLED for (int bit = 0; bit < 8; bit += bits, x += LANES) {
            if (bit && bit % shift == 0)
                UNROLLED for (int r = 0; r < ROWS; r++) v[r] >>= shift;
            step(v, tables, bit % shift, x, stride, sums, bits, batch);
        }
    }
}

/* Of 3 bits; `phase` says where in each dword the first index begins. */
INLINE void take3(const uint8_t *const *at, Table tables[][4], const float *x, int64_t stride, const uint32_t *phase, floats sums[][ROWS],
                  const int batch) {
    const words shift = LOAD(phase);
    words v[ROWS];
    UNROLLED for (int r = 0; r < ROWS; r++) v[r] = LOAD(at[r]) >> shift;
    UNROLLED for (int s = 0; s < 10; s++, x += LANES) {
        step(v, tables, 0, x, stride, sums, 3, batch);
        UNROLLED for (int r = 0; r < ROWS; r++) v[r] >>= 3;
    }
    UNROLLED for (int r = 0; r < ROWS; r++) v[r] = LOAD(at[r] + 2) >> (shift + 14);
    step(v, tables, 0, x, stride, sums, 3, batch);
}

#if LANES == 8
/* The four bytes of 16 entries apart, in either half of a register. */
typedef struct { __m256i byte[4]; } Planes;

INLINE Planes planes_of(const float *entries) {
    const __m128i apart = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m128i part[4];
    for (int i = 0; i < 4; i++) part[i] = _mm_shuffle_epi8(_mm_loadu_si128((const void *)(entries + 4 * i)), apart);
    const __m128i low = _mm_unpacklo_epi32(part[0], part[1]), low2 = _mm_unpacklo_epi32(part[2], part[3]);
    const __m128i high = _mm_unpackhi_epi32(part[0], part[1]), high2 = _mm_unpackhi_epi32(part[2], part[3]);
    return (Planes){{_mm256_broadcastsi128_si256(_mm_unpacklo_epi64(low, low2)), _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(low, low2)),
                     _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(high, high2)),
                     _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(high, high2))}};
}

/* One vector of ROWS rows: an entry is put together from its bytes, each looked up in a register of 16. */
INLINE void take_bytes(const uint8_t *const *at, const Planes *planes, const float *x, int64_t stride, floats sums[][ROWS],
                       const int batch) {
    UNROLLED for (int half = 0; half < 2; half++)
        UNROLLED for (int r = 0; r < ROWS; r++) {
            __m256i index = _mm256_loadu_si256((const void *)at[r]), b[4];
            if (half) index = _mm256_srli_epi16(index, 4);
            index = _mm256_and_si256(index, _mm256_set1_epi8(15));
            UNROLLED for (int i = 0; i < 4; i++) b[i] = _mm256_shuffle_epi8(planes[r].byte[i], index);
            UNROLLED for (int s = 0; s < 4; s++) {
                const __m256i low = s < 2 ? _mm256_unpacklo_epi8(b[0], b[1]) : _mm256_unpackhi_epi8(b[0], b[1]);
                const __m256i high = s < 2 ? _mm256_unpacklo_epi8(b[2], b[3]) : _mm256_unpackhi_epi8(b[2], b[3]);
                const floats w = (floats)(s % 2 ? _mm256_unpackhi_epi16(low, high) : _mm256_unpacklo_epi16(low, high));
                UNROLLED for (int k = 0; k < batch; k++) sums[k][r] += w * *(const floats *)(x + k * stride + (4 * half + s) * LANES);
            }
        }
}
#endif

INLINE float total(floats sum) {
    UNROLLED for (int n = LANES / 2; n; n /= 2) {
        floats other;
        UNROLLED for (int l = 0; l < LANES; l++) other[l] = sum[l ^ n];
        sum += other;
    }
    return sum[0];
}

INLINE void store(const Job *j, int64_t b, int64_t row, float y) {
    if (j->x_type == BFLOAT16)
        ((uint16_t *)j->out)[b * j->rows + row] = to_bfloat(y);
    else
        ((float *)j->out)[b * j->rows + row] = y;
}

/* The last bytes of the stream, in front of zeros. */
APART void end_of(const uint8_t **at, const uint8_t *end, uint8_t copy[][4 * LANES + 4]) {
    memset(copy, 0, ROWS * (4 * LANES + 4));
    for (int r = 0; r < ROWS; r++) {
        const int64_t left = end - at[r];
        memcpy(copy[r], at[r], left < 4 * LANES + 4 ? left : 4 * LANES + 4);
        at[r] = copy[r];
    }
}

/* Formats: entry j is offset + scale v_j, with theta for every `wide` columns of a row. */

INLINE int64_t wides_of(const Job *j) { return j->cols / j->wide; }

/* Of the rows of a block: the scale of every dword, and `shift` of every block of columns. */
typedef struct { const float *lanes, *shift; } Theta;

/* Scales of the rows from `first` to `stop`, and what every x of a block counts for besides: offset + scale centre. */
APART void read_theta(const Job *j, int64_t first, int64_t stop, float centre, float *scale, float *shift) {
    const int64_t from = first * wides_of(j), count = (stop - first) * wides_of(j);
    read_floats(j->scale, j->theta_type, from, count, scale);
    if (!j->offset)
        memset(shift, 0, count * sizeof *shift);
    else if (!j->zero_bits)
        read_floats(j->offset, j->theta_type, from, count, shift);
    else
        for (int64_t i = 0; i < count; i++) {
            const int64_t bit = (from + i) * j->zero_bits, low = bit % 8;
            const uint8_t *at = (const uint8_t *)j->offset + bit / 8;
            const int zero = (at[0] >> low | (low + j->zero_bits > 8 ? at[1] << (8 - low) : 0)) & ((1 << j->zero_bits) - 1);
            shift[i] = -scale[i] * zero;
        }
    for (int64_t i = 0; i < count; i++) shift[i] += scale[i] * centre;
}

/* What the offsets of a row add: x has the sums of its blocks behind it. */
INLINE float shifts_of(const Job *j, const float *shift, int64_t b) {
    const int64_t wides = wides_of(j);
    const float *x = j->xs + (b + 1) * j->stride - wides;
    float sum = 0;
    for (int64_t w = 0; w < wides; w++) sum += shift[w] * x[w];
    return sum;
}

/* y of ROWS rows from `row` on (fewer at the end: the last is then computed again), for BATCH rows of x from `from` on. */
INLINE void block(const Job *j, const float *entries, int64_t row, int64_t from, const int bits, const int batch, const Theta *theta) {
    const int64_t row_bytes = j->cols * bits / 8, vectors = vectors_of(j), steps = steps_of(j);
    const uint8_t *at[ROWS], *end = j->packed + j->rows * row_bytes;
    Table tables[ROWS][4];
#if LANES == 8
    Planes planes[ROWS];
#endif
    floats sums[GROUP][ROWS] = {0};
    UNROLLED for (int r = 0; r < ROWS; r++) {
        const int64_t own = row + r < j->rows ? row + r : j->rows - 1;
        at[r] = j->packed + own * row_bytes;
        const float *table = entries + table_at(j, own) * (1 << bits);
        for (int m = 0; m < PER_SHIFT(bits); m++) tables[r][m] = table_of(table, bits, m * bits);
#if LANES == 8
        if (BY_BYTES(bits)) planes[r] = planes_of(table);
#endif
    }
    const float *x = j->xs + from * j->stride;
    const int64_t within = (end - at[ROWS - 1] - 3) / (4 * LANES); /* vectors whose loads stay in the buffer */
    for (int64_t v = 0; v < vectors; v++, x += steps * LANES) {
        uint8_t copy[ROWS][4 * LANES + 4];
        const uint8_t *from[ROWS];
        UNROLLED for (int r = 0; r < ROWS; r++) {
            from[r] = at[r] + v * 4 * LANES;
            __builtin_prefetch(from[r] + ROWS * row_bytes); /* the next block: the hardware does not see four rows as one stream */
        }
        if (v >= within) end_of(from, end, copy);
        floats part[GROUP][ROWS] = {0}, (*sum)[ROWS] = theta ? part : sums;
#if LANES == 8
        if (BY_BYTES(bits))
            take_bytes(from, planes, x, j->stride, sum, batch);
        else
#endif
            if (bits == 3)
                take3(from, tables, x, j->stride, PHASES + v * LANES % 3, sum, batch);
            else
                take(from, tables, x, j->stride, sum, bits, batch);
        if (theta)
            UNROLLED for (int r = 0; r < ROWS; r++) {
                const floats scale = *(const loose_floats *)(theta->lanes + r * vectors * LANES + v * LANES);
                UNROLLED for (int b = 0; b < batch; b++) sums[b][r] += part[b][r] * scale;
            }
    }
    float y[GROUP][ROWS];
    UNROLLED for (int b = 0; b < batch; b++)
        UNROLLED for (int r = 0; r < ROWS; r++) {
            y[b][r] = total(sums[b][r]);
            if (theta) y[b][r] += shifts_of(j, theta->shift + r * wides_of(j), from + b);
        }
    for (int b = 0; b < batch && from + b < j->batch; b++)
        for (int r = 0; r < ROWS && row + r < j->rows; r++) store(j, from + b, row + r, y[b][r]);
}

INLINE void groups(const Job *j, const float *entries, int64_t row, const int bits, const Theta *theta) {
    for (int64_t b = 0; b < j->batch; b += GROUP)
        if (j->batch - b > 2)
            block(j, entries, row, b, bits, 4, theta);
        else if (j->batch - b == 2)
            block(j, entries, row, b, bits, 2, theta);
        else
            block(j, entries, row, b, bits, 1, theta);
}

INLINE void blocks(const Job *j, int64_t first, int64_t stop, const int bits) {
    float tables[(PART << bits) + 16];
    read_tables(j, first, stop, tables);
    const float *entries = tables - table_at(j, first) * (1 << bits);
    for (int64_t row = first; row < stop; row += ROWS) groups(j, entries, row, bits, 0);
}

/* Every number `each` times. */
APART void spread_out(const float *from, int64_t n, int64_t each, float *out) {
#define TIMES(number) \
    case number: \
        for (int64_t i = 0; i < n; i++, out += number) UNROLLED for (int k = 0; k < number; k++) out[k] = from[i]; \
        return;
    switch (each) { TIMES(1) TIMES(2) TIMES(3) TIMES(4) TIMES(6) TIMES(8) TIMES(12) TIMES(16) }
    for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < each; k++) *out++ = from[i];
}

/* Of a format: every dword of a row has the scale of its block. */
INLINE void scaled(const Job *j, int64_t first, int64_t stop, float *scratch, const int bits) {
    const int64_t wides = wides_of(j), lanes = vectors_of(j) * LANES, each = j->wide * bits / 32;
    const float centre = j->offset ? 1 << (bits - 1) : 0;
    float entries[32], *scales = scratch, *shifts = scales + AHEAD * wides, *spread = shifts + AHEAD * wides;
    read_tables(j, first, stop, entries);
    for (int i = 0; i < 1 << bits; i++) entries[i] -= centre;
    memset(spread, 0, ROWS * lanes * sizeof *spread);
    for (int64_t row = first; row < stop; row += ROWS) {
        const int64_t ahead = (row - first) % AHEAD;
        if (!ahead) read_theta(j, row, row + AHEAD < stop ? row + AHEAD : stop, centre, scales, shifts);
        for (int r = 0; r < ROWS; r++) spread_out(scales + (ahead + r) * wides, wides, each, spread + r * lanes);
        groups(j, entries, row, bits, &(Theta){spread, shifts + ahead * wides});
    }
}

#if LANES == 16 && defined(__AVX512BW__)
#define WIDE
/* A table of 8 bits whose values have 16: 8 registers of 32. */
typedef struct { __m512i part[8]; } Wide;

INLINE __m256i narrow(const float *entries, int64_t type) {
    if (type == FLOAT16) return _mm512_cvtps_ph(_mm512_loadu_ps(entries), _MM_FROUND_NO_EXC);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_loadu_si512(entries), 16));
}

/* Weights from tables of 16-bit values, 32 at once; how many. */
static int64_t unpack_wide(const uint8_t *at, int64_t cols, const Wide *t, int64_t type, float *out) {
    int64_t col = 0;
    for (; col + 32 <= cols; col += 32) {
        __builtin_prefetch(at + col + 1024);
        const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)(at + col)));
        const __mmask32 odd = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
        __m512i pair[4];
        UNROLLED for (int i = 0; i < 4; i++) pair[i] = _mm512_permutex2var_epi16(t->part[2 * i], index, t->part[2 * i + 1]);
        const __m512i v = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(128)),
                                                  _mm512_mask_blend_epi16(odd, pair[0], pair[1]),
                                                  _mm512_mask_blend_epi16(odd, pair[2], pair[3]));
        const __m256i low = _mm512_castsi512_si256(v), high = _mm512_extracti64x4_epi64(v, 1);
        if (type == FLOAT16) {
            _mm512_storeu_ps(out + col, _mm512_cvtph_ps(low));
            _mm512_storeu_ps(out + col + 16, _mm512_cvtph_ps(high));
        } else {
            _mm512_storeu_si512(out + col, _mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16));
            _mm512_storeu_si512(out + col + 16, _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        }
    }
    return col;
}
#endif

/* `cols` weights of a row, in their order, from bit `bit` of the stream on. */
INLINE void unpack_row(const uint8_t *packed, const uint8_t *end, int64_t bit, int64_t cols, const float *entries, float *out,
                       const int bits) {
    int64_t col = 0;
    (void)end;
#if LANES > 4
    if (bits <= 4 && bit % 8 == 0) { /* 8 indices are one dword */
        const uint8_t *at = packed + bit / 8;
        const Table table = table_of(entries, bits, 0);
        words shift;
        for (int l = 0; l < LANES; l++) shift[l] = l % 8 * bits;
        for (; col + LANES <= cols && end - at >= 8; col += LANES, at += LANES / 8 * bits)
            *(loose_floats *)(out + col) = look_up(&table, eights(at, bits) >> shift, bits);
    }
#endif
    for (; col < cols; col++) {
        const uint8_t *from = packed + (bit + col * bits) / 8;
        const int shift = (bit + col * bits) % 8;
        out[col] = entries[(*from >> shift | (shift + bits > 8 ? from[1] << (8 - shift) : 0)) & ((1 << bits) - 1)];
    }
}

/* Scale and offset one after the other: each is rounded. */
APART void apply_theta(const Job *j, int64_t row, float *out, float *scratch) {
    const int64_t wides = wides_of(j);
    read_theta(j, row, row + 1, 0, scratch, scratch + wides);
    for (int64_t w = 0; w < wides; w++)
        for (int64_t c = w * j->wide; c < (w + 1) * j->wide; c++) out[c] *= scratch[w];
    for (int64_t w = 0; j->offset && w < wides; w++)
        for (int64_t c = w * j->wide; c < (w + 1) * j->wide; c++) out[c] += scratch[wides + w];
}

INLINE void unpack_rows(const Job *j, int64_t first, int64_t stop, float *scratch, const int bits) {
    float tables[(PART << bits) + 16];
    read_tables(j, first, stop, tables);
    const uint8_t *end = j->packed + (j->rows * j->cols * bits + 7) / 8;
#ifdef WIDE
    Wide wide;
#endif
    for (int64_t row = first, last = -1; row < stop; row++) {
        const int64_t table = table_at(j, row) - table_at(j, first), bit = row * j->cols * bits;
        const float *entries = tables + (table << bits);
        float *out = (float *)j->out + (row - j->first) * j->cols;
        int64_t done = 0;
#ifdef WIDE
        if (bits == 8 && !j->scale && j->lut_type != FLOAT32) {
            for (int i = 0; table != last && i < 8; i++)
                wide.part[i] = _mm512_inserti64x4(_mm512_castsi256_si512(narrow(entries + 32 * i, j->lut_type)),
                                                  narrow(entries + 32 * i + 16, j->lut_type), 1);
            last = table;
            done = unpack_wide(j->packed + bit / 8, j->cols, &wide, j->lut_type, out);
        }
#endif
        (void)last;
        unpack_row(j->packed, end, bit + done * bits, j->cols - done, entries, out + done, bits);
        if (j->scale) apply_theta(j, row, out, scratch);
    }
}

#define UNPACK(bits) static void unpack##bits(const Job *j, int64_t first, int64_t stop, float *s) { unpack_rows(j, first, stop, s, bits); }
UNPACK(1) UNPACK(2) UNPACK(3) UNPACK(4) UNPACK(5) UNPACK(6) UNPACK(7) UNPACK(8)
static Kernel *const UNPACK[] = {0, unpack1, unpack2, unpack3, unpack4, unpack5, unpack6, unpack7, unpack8};

#define ROWS_OF(bits) \
    static void rows##bits(const Job *j, int64_t first, int64_t stop, float *s) { (void)s, blocks(j, first, stop, bits); } \
    static void scaled##bits(const Job *j, int64_t first, int64_t stop, float *s) { scaled(j, first, stop, s, bits); }
ROWS_OF(1) ROWS_OF(2) ROWS_OF(3) ROWS_OF(4)

/* Any bits and shape: a few rows are unpacked into the first cache, and multiplied. */
static void rows_of_any(const Job *j, int64_t first, int64_t stop, float *scratch) {
    for (int64_t from = first; from < stop; from += 8) {
        const int64_t to = from + 8 < stop ? from + 8 : stop;
        Job part = *j;
        part.out = scratch;
        part.first = from;
        UNPACK[j->bits](&part, from, to, 0);
        for (int64_t row = from; row < to; row++)
            for (int64_t b = 0; b < j->batch; b++) {
                const float *w = scratch + (row - from) * j->cols, *x = j->xs + b * j->stride;
                floats sums[4] = {0};
                int64_t col = 0;
                for (; col + 4 * LANES <= j->cols; col += 4 * LANES)
                    UNROLLED for (int i = 0; i < 4; i++)
                        sums[i] += *(const loose_floats *)(w + col + i * LANES) * *(const loose_floats *)(x + col + i * LANES);
                float y = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
                for (; col < j->cols; col++) y += w[col] * x[col];
                store(j, b, row, y);
            }
    }
}

INLINE void take8(const uint8_t *const *at, int64_t col, const float *x, int64_t stride, floats sums[][ROWS], const int batch) {
    UNROLLED for (int r = 0; r < ROWS; r++) {
        const floats q = bytes_at(at[r] + col);
        UNROLLED for (int b = 0; b < batch; b++) sums[b][r] += q * *(const floats *)(x + b * stride + col);
    }
}

/* 8 bits, whose values are integers one after another: y of ROWS rows, as in `block`. */
INLINE void block8(const Job *j, int64_t row, int64_t from, const float *scale, const float *shift, const int batch) {
    const int64_t wides = wides_of(j), whole = j->cols / LANES * LANES;
    const uint8_t *at[ROWS];
    const float *x = j->xs + from * j->stride;
    floats sums[GROUP][ROWS] = {0};
    UNROLLED for (int r = 0; r < ROWS; r++) at[r] = j->packed + (row + r < j->rows ? row + r : j->rows - 1) * j->cols;
    for (int64_t w = 0, c = 0; w < wides; w++) {
        const int64_t end = (w + 1) * j->wide < whole ? (w + 1) * j->wide : whole;
        floats part[GROUP][ROWS] = {0};
        for (; c + 64 <= end; c += 64) {
            UNROLLED for (int r = 0; r < ROWS; r++) __builtin_prefetch(at[r] + c + ROWS * j->cols);
            UNROLLED for (int i = 0; i < 64; i += LANES) take8(at, c + i, x, j->stride, part, batch);
        }
        for (; c < end; c += LANES) take8(at, c, x, j->stride, part, batch);
        UNROLLED for (int b = 0; b < batch; b++)
            UNROLLED for (int r = 0; r < ROWS; r++) sums[b][r] += part[b][r] * scale[r * wides + w];
    }
    float y[GROUP][ROWS];
    UNROLLED for (int b = 0; b < batch; b++)
        UNROLLED for (int r = 0; r < ROWS; r++) {
            y[b][r] = total(sums[b][r]);
            for (int64_t c = whole; c < j->cols; c++) y[b][r] += scale[r * wides] * (at[r][c] - 128) * x[b * j->stride + c];
            y[b][r] += shifts_of(j, shift + r * wides, from + b);
        }
    for (int b = 0; b < batch && from + b < j->batch; b++)
        for (int r = 0; r < ROWS && row + r < j->rows; r++) store(j, from + b, row + r, y[b][r]);
}

static void rows8(const Job *j, int64_t first, int64_t stop, float *scratch) {
    const int64_t wides = wides_of(j);
    float *shifts = scratch + AHEAD * wides;
    for (int64_t row = first; row < stop; row += ROWS) {
        const int64_t ahead = (row - first) % AHEAD;
        if (!ahead) read_theta(j, row, row + AHEAD < stop ? row + AHEAD : stop, 128 + *(const float *)j->lut, scratch, shifts);
        const float *scale = scratch + ahead * wides, *shift = shifts + ahead * wides;
        for (int64_t b = 0; b < j->batch; b += GROUP)
            if (j->batch - b > 2)
                block8(j, row, b, scale, shift, 4);
            else if (j->batch - b == 2)
                block8(j, row, b, scale, shift, 2);
            else
                block8(j, row, b, scale, shift, 1);
    }
}

/* Behind a row of x the sum of each block. */
static void add_up(const Job *j, const float *row, float *out) {
    const int64_t wides = wides_of(j);
    for (int64_t w = 0; w < wides; w++) {
        double sum = 0;
        for (int64_t c = w * j->wide; c < (w + 1) * j->wide; c++) sum += row[c];
        out[j->stride - wides + w] = sum;
    }
}

static int64_t scratch_of(const Job *j) { return 2 * AHEAD * wides_of(j) + (j->bits < 8 ? ROWS * LANES * vectors_of(j) : 0); }

static int64_t parts_of(const Job *j) { return (j->stop - j->first + PART - 1) / PART; }

/* What each thread does: takes rows until none are left. */
static void work(void *all) {
    Run *r = all;
    float *scratch = r->scratch + __atomic_fetch_add(&r->entered, 1, __ATOMIC_RELAXED) * r->apart;
    for (int64_t part; (part = __atomic_fetch_add(&r->next, 1, __ATOMIC_RELAXED)) < r->parts;) {
        const Job *j = r->jobs;
        for (; part >= parts_of(j); j++) part -= parts_of(j);
        const int64_t first = j->first + part * PART;
        j->kernel(j, first, first + PART < j->stop ? first + PART : j->stop, scratch);
    }
}

/* GOMP_parallel of the OpenMP library that the process has already, or 0: given by cpu.py. */
static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
void edkm_use(void *run) { memcpy(&parallel, &run, sizeof parallel); }

static void run(Run *r, int64_t threads) {
    r->parts = 0;
    for (int64_t i = 0; i < r->count; i++) r->parts += parts_of(r->jobs + i);
    if (parallel && threads > 1)
        parallel(work, r, (unsigned)threads, 0);
    else
        work(r);
}

static int fused(int64_t cols, int64_t bits) { return bits <= 4 && cols * bits % 8 == 0; }

/* The most rows of x that are faster so than by unpacking W for a matrix product, as measured at 2048 x 2048 and 1536 x 576. */
int64_t edkm_most(int64_t cols, int64_t bits) { return fused(cols, bits) ? 2 * LANES : LANES; }

/* A packed weight, and memory for its result. */
typedef struct {
    const uint8_t *packed;
    const void *lut;
    int64_t rows, cols, bits, luts, k, lut_type;
    const void *scale, *offset;
    int64_t wide, theta_type, zero_bits;
    void *out;
} Weight;

static Job job_of(const Weight *w, Kernel *kernel, int64_t first, int64_t stop) {
    return (Job){w->packed, w->lut, w->rows, w->cols, w->bits, w->luts, w->k, w->lut_type, w->scale, w->offset, w->wide, w->theta_type, w->zero_bits, w->out, 0, FLOAT32, kernel, first, stop, 0, 0};
}

/* y = x W^T, x [batch, cols], for each of up to MOST weights of the same columns and bits: y float32, or bfloat16 if x is.
   0, or 1 without memory. */
enum { MOST = 8 };
int edkm_linear(const Weight *weights, int64_t count, const void *x, int64_t batch, int64_t x_type, int64_t threads) {
    static Kernel *const KERNELS[] = {0, rows1, rows2, rows3, rows4}, *const SCALED[] = {0, scaled1, scaled2, scaled3, scaled4, 0, 0, 0, rows8};
    const int64_t cols = weights->cols, bits = weights->bits;
    const int direct = fused(cols, bits), shaped = weights->scale != 0;
    Job jobs[MOST];
    for (int64_t i = 0; i < count; i++) {
        jobs[i] = job_of(weights + i, shaped ? SCALED[bits] : direct ? KERNELS[bits] : rows_of_any, 0, weights[i].rows);
        jobs[i].batch = batch, jobs[i].x_type = x_type;
        jobs[i].stride = direct ? vectors_of(jobs) * steps_of(jobs) * LANES : cols;
        if (shaped) jobs[i].stride = (jobs[i].stride + wides_of(jobs) + LANES - 1) / LANES * LANES;
    }
    Run r = {jobs, count, 0, 0, shaped ? scratch_of(jobs) : direct ? 0 : 8 * cols, 0, 0};
    const int64_t padded = batch + (batch % GROUP == 3), stride = jobs->stride; /* as `blocks` goes */
    char *memory = malloc((padded * stride + cols + threads * r.apart + 16) * sizeof(float));
    if (!memory) return 1;
    float *xs = (float *)(memory + (-(uintptr_t)memory & 63)), *row = xs + padded * stride;
    r.scratch = row + cols;
    for (int64_t i = 0; i < count; i++) jobs[i].xs = xs;
    for (int64_t b = 0; b < batch; b++)
        if (direct) {
            read_floats(x, x_type, b * cols, cols, row);
            arrange(jobs, row, xs + b * stride);
            if (shaped) add_up(jobs, row, xs + b * stride);
        } else {
            read_floats(x, x_type, b * cols, cols, xs + b * stride);
            if (shaped) add_up(jobs, xs + b * stride, xs + b * stride);
        }
    memset(xs + batch * stride, 0, (padded - batch) * stride * sizeof(float));
    run(&r, threads);
    free(memory);
    return 0;
}

/* Rows `first` to `stop` of W as float32. 0, or 1 without memory. */
int edkm_unpack(const Weight *weight, int64_t first, int64_t stop, int64_t threads) {
    const Job job = job_of(weight, UNPACK[weight->bits], first, stop);
    Run r = {&job, 1, 0, 0, weight->scale ? 2 * wides_of(&job) : 0, 0, 0};
    float *scratch = malloc((threads * r.apart + 1) * sizeof(float));
    if (!scratch) return 1;
    r.scratch = scratch;
    run(&r, threads);
    free(scratch);
    return 0;
}
