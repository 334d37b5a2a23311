/* The loops of cpu.py: y = x W^T with W as a stream of indices and tables (docs/format.md), on a CPU.

   A row is read as vectors of LANES dwords. Lane l of a vector holds the indices that begin in its dword, lowest bits first, so step s
   looks up the s-th index of every lane and a shift by `bits` brings the next ones down. The activations are put into that order
   beforehand, once for all rows: `arrange`. An index of 3 bits may reach into the next dword: a dword is first shifted to where
   its first index begins (0, 1 or 2 bits), ten whole indices follow, and the eleventh step takes those that reach over from a second load,
   two bytes further on. Lanes without an index in a step meet activations of zero.

   Plain C with vector extensions (gcc, clang). Only looking up is written per instruction set: one permutation of 16 values with AVX-512, of
   8 with AVX2; loads elsewhere, and with -DPORTABLE. */

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
#define ROWS 4  /* at once: enough sums to hide the latency of an addition, and one load of the activations for all */
#define GROUP 4 /* rows of x at once */
#define PART 64 /* rows that a thread takes at once */
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
typedef void Kernel(const Job *, int64_t first, int64_t stop);

struct Job {
    const uint8_t *packed; /* the stream of rows * cols indices */
    const void *lut;       /* [luts, k] */
    int64_t rows, cols, bits, luts, k, lut_type;
    const void *x; /* [batch, cols] */
    void *out;     /* [batch, rows], or what is unpacked of [rows, cols] */
    int64_t batch, x_type;
    float *arranged; /* x as the kernels read it: [batch, padded to GROUP][vectors of a row][steps][LANES] */
    Kernel *kernel;
    int64_t first, stop; /* the rows asked for */
    int64_t next;        /* the first that no thread has taken */
};

/* Looking up: the low 4 bits of every lane, or those of them that the table's size needs. A permutation of 16 takes 4 bits: enough for 2
   indices of 2 bits or 4 of 1 bit before one shift, each with a table of its own that ignores the bits below `low`. */

#if LANES == 16
#define PER_SHIFT(bits) ((bits) < 3 ? 4 / (bits) : 1)
#else
#define PER_SHIFT(bits) 1
#endif

/* The first of 16 readable entries, 2^bits of them meant. A table of 8 bits stays in memory. */
#if LANES == 16
typedef struct { floats all; const float *entries; } Table;
INLINE Table table_of(const float *entries, const int bits, const int low) {
    words order;
    for (int l = 0; l < LANES; l++) order[l] = (l >> low) & ((1 << bits) - 1);
    return (Table){(floats)_mm512_permutexvar_ps((__m512i)order, _mm512_loadu_ps(entries)), entries};
}
INLINE floats look_up(const Table *t, words v, const int bits) {
    if (bits == 8) return (floats)_mm512_i32gather_ps((__m512i)(v & 255), t->entries, 4);
    return (floats)_mm512_permutexvar_ps((__m512i)v, (__m512)t->all);
}
#elif LANES == 8
typedef struct { floats low, high; const float *entries; } Table;
INLINE Table table_of(const float *entries, const int bits, const int low) {
    words order;
    (void)low;
    for (int l = 0; l < LANES; l++) order[l] = l & ((1 << bits) - 1);
    return (Table){(floats)_mm256_permutevar8x32_ps(_mm256_loadu_ps(entries), (__m256i)order), (floats)_mm256_loadu_ps(entries + 8), entries};
}
INLINE floats look_up(const Table *t, words v, const int bits) {
    if (bits == 8) return (floats)_mm256_i32gather_ps(t->entries, (__m256i)(v & 255), 4);
    const floats low = (floats)_mm256_permutevar8x32_ps((__m256)t->low, (__m256i)v);
    if (bits < 4) return low;
    return (floats)_mm256_blendv_ps((__m256)low, _mm256_permutevar8x32_ps((__m256)t->high, (__m256i)v), (__m256)(v << 28));
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

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}


INLINE float of_half(uint16_t h) {
    const uint32_t size = (uint32_t)(h & 0x7fff) << 13;
    const float value = size < 0x0f800000 ? as_float(size) * 0x1p112f : as_float(size | 0x7f800000);
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
        for (int64_t i = 0; i < n; i++) out[i] = of_half(short_floats[i]);
    if (type == BFLOAT16)
        for (int64_t i = 0; i < n; i++) out[i] = of_bfloat(short_floats[i]);
}

static int64_t vectors_of(const Job *j) { return (j->cols * j->bits + 32 * LANES - 1) / (32 * LANES); }
static int64_t steps_of(const Job *j) { return j->bits == 3 ? 11 : 32 / j->bits; }

/* x in the order in which the indices come; batch rows that only fill up the last group stay zero. */
static void arrange(const Job *j, float *row) {
    const int64_t vectors = vectors_of(j), steps = steps_of(j);
    float *out = j->arranged;
    for (int64_t b = 0; b < j->batch; b++) {
        read_floats(j->x, j->x_type, b * j->cols, j->cols, row);
        for (int64_t v = 0; v < vectors; v++, out += steps * LANES)
            for (int64_t l = 0; l < LANES; l++) {
                const int64_t dword = v * LANES + l, first = (32 * dword + j->bits - 1) / j->bits;
                const int64_t all = (32 * dword + 31 + j->bits) / j->bits, stop = all < j->cols ? all : j->cols;
                for (int64_t s = 0; s < steps; s++) out[s * LANES + l] = first + s < stop ? row[first + s] : 0;
            }
    }
}

static int64_t table_at(const Job *j, int64_t row) { return row / (j->rows / j->luts); }

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

/* One vector of ROWS rows of 1, 2, 4 or 8 bits. Bytes come down by loads further on: shifts and permutations are what there is too little of. */
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

INLINE float total(floats sum) {
    UNROLLED for (int n = LANES / 2; n; n /= 2) {
        floats other;
        UNROLLED for (int l = 0; l < LANES; l++) other[l] = sum[l ^ n];
        sum += other;
    }
    return sum[0];
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

/* y of ROWS rows from `row` on (fewer at the end: the last is then computed again), for BATCH rows of x from `from` on. */
INLINE void block(const Job *j, const float *entries, int64_t row, int64_t from, const int bits, const int batch) {
    const int64_t row_bytes = j->cols * bits / 8, vectors = vectors_of(j), steps = steps_of(j);
    const int64_t stride = vectors * steps * LANES;
    const uint8_t *at[ROWS], *end = j->packed + j->rows * row_bytes;
    Table tables[ROWS][4];
    floats sums[GROUP][ROWS] = {0};
    UNROLLED for (int r = 0; r < ROWS; r++) {
        const int64_t own = row + r < j->rows ? row + r : j->rows - 1;
        at[r] = j->packed + own * row_bytes;
        const float *table = entries + table_at(j, own) * (1 << bits);
        for (int m = 0; m < PER_SHIFT(bits); m++) tables[r][m] = table_of(table, bits, m * bits);
    }
    const float *x = j->arranged + from * stride;
    const int64_t within = (end - at[ROWS - 1] - 3) / (4 * LANES); /* vectors whose loads stay in the buffer */
    for (int64_t v = 0; v < vectors; v++, x += steps * LANES) {
        uint8_t copy[ROWS][4 * LANES + 4];
        const uint8_t *from[ROWS];
        UNROLLED for (int r = 0; r < ROWS; r++) from[r] = at[r] + v * 4 * LANES;
        if (v >= within) end_of(from, end, copy);
        if (bits == 3)
            take3(from, tables, x, stride, PHASES + v * LANES % 3, sums, batch);
        else
            take(from, tables, x, stride, sums, bits, batch);
    }
    float y[GROUP][ROWS];
    UNROLLED for (int b = 0; b < batch; b++)
        UNROLLED for (int r = 0; r < ROWS; r++) y[b][r] = total(sums[b][r]);
    for (int b = 0; b < batch && from + b < j->batch; b++)
        for (int r = 0; r < ROWS && row + r < j->rows; r++) {
            const int64_t to = (from + b) * j->rows + row + r;
            if (j->x_type == BFLOAT16)
                ((uint16_t *)j->out)[to] = to_bfloat(y[b][r]);
            else
                ((float *)j->out)[to] = y[b][r];
        }
}

INLINE void blocks(const Job *j, int64_t first, int64_t stop, const int bits) {
    float tables[(PART << bits) + 16];
    read_tables(j, first, stop, tables);
    const float *entries = tables - table_at(j, first) * (1 << bits);
    for (int64_t row = first; row < stop; row += ROWS)
        for (int64_t b = 0; b < j->batch; b += GROUP)
            if (j->batch - b > 2)
                block(j, entries, row, b, bits, 4);
            else if (j->batch - b == 2)
                block(j, entries, row, b, bits, 2);
            else
                block(j, entries, row, b, bits, 1);
}

static void rows1(const Job *j, int64_t first, int64_t stop) { blocks(j, first, stop, 1); }
static void rows2(const Job *j, int64_t first, int64_t stop) { blocks(j, first, stop, 2); }
static void rows3(const Job *j, int64_t first, int64_t stop) { blocks(j, first, stop, 3); }
static void rows4(const Job *j, int64_t first, int64_t stop) { blocks(j, first, stop, 4); }
static void rows8(const Job *j, int64_t first, int64_t stop) { blocks(j, first, stop, 8); }

/* Row by row in the order of the weights, 8 * bits bits at once where rows are whole bytes and a table is a few registers. */
INLINE void unpack(const Job *j, int64_t first, int64_t stop, const int bits) {
    float tables[(PART << bits) + 16];
    read_tables(j, first, stop, tables);
    const uint8_t *end = j->packed + (j->rows * j->cols * bits + 7) / 8;
    for (int64_t row = first; row < stop; row++) {
        const float *entries = tables + ((table_at(j, row) - table_at(j, first)) << bits);
        float *out = (float *)j->out + (row - j->first) * j->cols;
        int64_t col = 0;
#if LANES > 4
        if (bits <= 4 && j->cols % 8 == 0) {
            const Table table = table_of(entries, bits, 0);
            const uint8_t *at = j->packed + row * j->cols / 8 * bits;
            words shift;
            for (int l = 0; l < LANES; l++) shift[l] = l % 8 * bits;
            for (; col + LANES <= j->cols && end - at >= 8; col += LANES, at += LANES / 8 * bits) {
                uint32_t low, high;
                words v;
                memcpy(&low, at, 4);
                memcpy(&high, at + bits, 4);
                UNROLLED for (int l = 0; l < LANES; l++) v[l] = l < 8 ? low : high;
                *(loose_floats *)(out + col) = look_up(&table, v >> shift, bits);
            }
        }
#endif
        for (; col < j->cols; col++) {
            const int64_t bit = (row * j->cols + col) * bits;
            const uint8_t *at = j->packed + bit / 8;
            const int shift = bit % 8;
            out[col] = entries[(*at >> shift | (shift + bits > 8 ? at[1] << (8 - shift) : 0)) & ((1 << bits) - 1)];
        }
    }
}

static void unpack1(const Job *j, int64_t first, int64_t stop) { unpack(j, first, stop, 1); }
static void unpack2(const Job *j, int64_t first, int64_t stop) { unpack(j, first, stop, 2); }
static void unpack3(const Job *j, int64_t first, int64_t stop) { unpack(j, first, stop, 3); }
static void unpack4(const Job *j, int64_t first, int64_t stop) { unpack(j, first, stop, 4); }
static void unpack5(const Job *j, int64_t first, int64_t stop) { unpack(j, first, stop, 5); }
static void unpack6(const Job *j, int64_t first, int64_t stop) { unpack(j, first, stop, 6); }
static void unpack7(const Job *j, int64_t first, int64_t stop) { unpack(j, first, stop, 7); }
static void unpack8(const Job *j, int64_t first, int64_t stop) { unpack(j, first, stop, 8); }

/* What each thread does: takes rows until none are left. */
static void work(void *job) {
    Job *j = job;
    for (int64_t first; (first = __atomic_fetch_add(&j->next, PART, __ATOMIC_RELAXED)) < j->stop;)
        j->kernel(j, first, first + PART < j->stop ? first + PART : j->stop);
}

/* GOMP_parallel of the OpenMP library that the process has already, or 0: given by cpu.py. */
static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
void edkm_use(void *run) { memcpy(&parallel, &run, sizeof parallel); }

static void run(Job *j, int64_t threads) {
    j->next = j->first;
    if (parallel && threads > 1)
        parallel(work, j, (unsigned)threads, 0);
    else
        work(j);
}

/* y = x W^T, for 1 to 4 and 8 bits and rows of whole bytes. 0, or 1 without memory. */
int edkm_linear(const uint8_t *packed, const void *lut, int64_t rows, int64_t cols, int64_t bits, int64_t luts, int64_t k, int64_t lut_type,
                const void *x, void *out, int64_t batch, int64_t x_type, int64_t threads) {
    static Kernel *const KERNELS[] = {0, rows1, rows2, rows3, rows4, 0, 0, 0, rows8};
    Job j = {packed, lut, rows, cols, bits, luts, k, lut_type, x, out, batch, x_type, 0, KERNELS[bits], 0, rows, 0};
    const int64_t size = (batch + GROUP - 1) / GROUP * GROUP * vectors_of(&j) * steps_of(&j) * LANES;
    char *memory = calloc(size + cols + 16, sizeof(float));
    if (!memory) return 1;
    j.arranged = (float *)(memory + (-(uintptr_t)memory & 63));
    arrange(&j, j.arranged + size);
    run(&j, threads);
    free(memory);
    return 0;
}

/* Rows `first` to `stop` of W, for any bits and shape, as float32. */
void edkm_unpack(const uint8_t *packed, const void *lut, int64_t rows, int64_t cols, int64_t bits, int64_t luts, int64_t k, int64_t lut_type,
                 float *out, int64_t first, int64_t stop, int64_t threads) {
    static Kernel *const KERNELS[] = {0, unpack1, unpack2, unpack3, unpack4, unpack5, unpack6, unpack7, unpack8};
    Job j = {packed, lut, rows, cols, bits, luts, k, lut_type, 0, out, 0, FLOAT32, 0, KERNELS[bits], first, stop, 0};
    run(&j, threads);
}
