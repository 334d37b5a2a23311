/* Loops of native.py: differentiable k-means of single values, one table after another.

   Points are the weights of a group, rows x cols, contiguous. A tile of them and its assignment A [k, tile] stay in the first cache,
   and every inner loop runs along the tile, at vector width. blocks.py states the equations.

   Plain C, built by native.py with the compiler of the machine: for float32, and with -DDOUBLE for float64. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef DOUBLE
typedef double real;
#define EPSILON DBL_EPSILON
#define FAR 1e150
#define FUSED fma
#define LOWEST -156 /* log2(epsilon^3): under it an entry of A is noise */
#else
typedef float real;
#define EPSILON FLT_EPSILON
#define FAR 1e18f
#define FUSED fmaf
#define LOWEST -69
#endif
#if !defined(__FMA__) && !defined(__aarch64__)
#undef FUSED
#define FUSED(x, y, z) ((x) * (y) + (z)) /* without the instruction a call of fma would be slow */
#endif
#define NO_MASS ((double)EPSILON * EPSILON) /* the share of a group's mass that counts as none: reference.mass_floor */

#define TILE 512
#define HELD 32 /* tiles whose assignment is kept, in the second cache, where it is needed twice */
#define VECTOR 16 /* tiles are padded to a multiple of it, */
#define BUNCH 4   /* and tables to a multiple of it: loops take so many centroids at a time, in registers */
#define BUNCHES(j, k) int j = 0; j < (k); j += BUNCH

/* Points to cluster. `importance` has a row every `importance_stride` values (0: one row for all), or is 0. */
typedef struct {
    const void *weight; /* real, or bfloat16 */
    const real *importance;
    int64_t importance_stride;
    int64_t groups, rows, cols; /* rows of one group */
    int64_t k;
    int64_t is_bf16;
    int64_t to_bf16; /* round the points first */
} Points;

/* Points of a tile and their assignment, A_ij = e_ij share_i. Padded with points 0 without importance. */
typedef struct {
    _Alignas(64) real w[TILE];
    real s[TILE], v[TILE], share[TILE];
    real e[MOST][TILE]; /* native.py defines MOST, of the centroids of a table */
    int length, padded;
} Tile;

/* v = dL/dout. */
typedef struct {
    const void *values; /* real, or bfloat16 */
    int64_t is_bf16;
} Grad;

/* 2^x for x in [LOWEST, 0] to 2e-7 relative, and exact for 0; no branch, so that loops of it are vectors. */
static inline real exp2_of(real x) {
#ifdef DOUBLE
    return exp2(x);
#else
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float n = x + shift, f = x - (n - shift);
    float p = 1.32647273e-3f;
    p = FUSED(p, f, 9.67151299e-3f);
    p = FUSED(p, f, 5.55073358e-2f);
    p = FUSED(p, f, 2.40222424e-1f);
    p = FUSED(p, f, 6.93147004e-1f);
    p = FUSED(p, f, 1.0f);
    int32_t exponent, bits;
    memcpy(&exponent, &n, 4);
    memcpy(&bits, &p, 4);
    bits += exponent << 23; /* the low bits of the shifted n are n */
    memcpy(&p, &bits, 4);
    return p;
#endif
}

/* The bits of the nearest bfloat16, in the upper half. */
static inline uint32_t bf16_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value == value ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void load(const void *from, int64_t at, int length, int is_bf16, real *to) {
    const uint16_t *narrow = (const uint16_t *)from + at;
    const int size = is_bf16 ? 2 : sizeof(real);
    for (int i = 0; i < length * size; i += 64) __builtin_prefetch((const char *)from + (at + length) * size + i); /* the next tile */
    if (is_bf16)
        for (int i = 0; i < length; i++) to[i] = from_bits((uint32_t)narrow[i] << 16);
    else
        memcpy(to, (const real *)from + at, length * sizeof *to);
}

static void store(const real *from, int length, int is_bf16, void *to, int64_t at) {
    uint16_t *narrow = (uint16_t *)to + at;
    if (is_bf16)
        for (int i = 0; i < length; i++) narrow[i] = (uint16_t)(bf16_of((float)from[i]) >> 16);
    else
        memcpy((real *)to + at, from, length * sizeof *from);
}

/* Columns of a tile: those of a row are cut evenly. */
static int64_t tile_columns(const Points *p) {
    const int64_t tiles = (p->cols + TILE - 1) / TILE, each = (p->cols + tiles - 1) / tiles;
    return (each + VECTOR - 1) / VECTOR * VECTOR;
}

/* Reads the points at row `row` of group g, from column `col` on. */
static void read_points(const Points *p, int64_t g, int64_t row, int64_t col, Tile *tile) {
    const int64_t at = (g * p->rows + row) * p->cols + col;
    const int64_t most = tile_columns(p);
    const int n = tile->length = (int)(p->cols - col < most ? p->cols - col : most);
    tile->padded = (n + VECTOR - 1) / VECTOR * VECTOR;
    load(p->weight, at, n, (int)p->is_bf16, tile->w);
    if (p->to_bf16)
        for (int i = 0; i < n; i++) tile->w[i] = from_bits(bf16_of((float)tile->w[i]) & 0xffff0000u);
    if (p->importance)
        memcpy(tile->s, p->importance + (g * p->rows + row) * p->importance_stride + col, n * sizeof *tile->s);
    else
        for (int i = 0; i < n; i++) tile->s[i] = 1;
    for (int i = n; i < tile->padded; i++) tile->w[i] = tile->s[i] = 0;
}

/* A table of k values, padded with `rest`. */
static void read_table(const real *from, int k, real rest, real *to) {
    for (int j = 0; j < k; j++) to[j] = from[j];
    for (int j = k; j % BUNCH; j++) to[j] = rest;
}

/* A of a tile's points for `centroids`. */
static void assign(Tile *tile, const real *centroids, int k, real tau) {
    const real rate = (real)1.44269504088896340736 / tau; /* to powers of 2 */
    const int n = tile->padded & -VECTOR;                 /* tells the compiler that it divides */
    real c[MOST], least[TILE], total[TILE] = {0};
    read_table(centroids, k, FAR, c);
    for (int i = 0; i < n; i++) least[i] = FAR * FAR;
    for (BUNCHES(j, k))
        for (int i = 0; i < n; i++) {
            real x = least[i];
            for (int m = j; m < j + BUNCH; m++) {
                real d = tile->w[i] - c[m];
                d *= d;
                x = d < x ? d : x;
            }
            least[i] = x;
        }
    for (BUNCHES(j, k))
        for (int i = 0; i < n; i++) {
            real sum = total[i];
            for (int m = j; m < j + BUNCH; m++) {
                real d = tile->w[i] - c[m], x = (least[i] - d * d) * rate;
                x = exp2_of(x > LOWEST ? x : LOWEST);
                tile->e[m][i] = x;
                sum += x;
            }
            total[i] = sum;
        }
    for (int i = 0; i < n; i++) tile->share[i] = 1 / total[i];
}

#define FOR_TILES(p)                              \
    for (int64_t row = 0; row < (p)->rows; row++) \
        for (int64_t col = 0; col < (p)->cols; col += tile_columns(p))

/* Adds sum_i e_ij x_i to sums_j. */
static void add_sums(const Tile *tile, int k, const real *x, double *sums) {
    for (BUNCHES(j, k)) {
        real s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int i = 0; i < tile->padded; i++) {
            s0 = FUSED(tile->e[j][i], x[i], s0);
            s1 = FUSED(tile->e[j + 1][i], x[i], s1);
            s2 = FUSED(tile->e[j + 2][i], x[i], s2);
            s3 = FUSED(tile->e[j + 3][i], x[i], s3);
        }
        sums[j] += s0, sums[j + 1] += s1, sums[j + 2] += s2, sums[j + 3] += s3;
    }
}

/* mass [groups, k] and total [groups, k] of one iteration, for the groups from `first` to before `stop`. */
void edkm_sums(const Points *p, const real *centroids, const real *tau, real *mass, real *total, int64_t first, int64_t stop) {
    Tile tile;
    real x[TILE], y[TILE];
    const int k = (int)p->k;
    for (int64_t g = first; g < stop; g++) {
        double m[MOST] = {0}, t[MOST] = {0};
        FOR_TILES(p) {
            read_points(p, g, row, col, &tile);
            assign(&tile, centroids + g * k, k, tau[g]);
            for (int i = 0; i < tile.padded; i++) {
                x[i] = tile.share[i] * tile.s[i];
                y[i] = x[i] * tile.w[i];
            }
            add_sums(&tile, k, x, m);
            add_sums(&tile, k, y, t);
        }
        for (int j = 0; j < k; j++) {
            mass[g * k + j] = (real)m[j];
            total[g * k + j] = (real)t[j];
        }
    }
}

/* out = sum_j A_j next_j, in bfloat16 or as real. */
void edkm_decode(const Points *p, const real *centroids, const real *next, const real *tau, void *out, int64_t is_bf16, int64_t first,
                 int64_t stop) {
    Tile tile;
    const int k = (int)p->k;
    for (int64_t g = first; g < stop; g++)
        FOR_TILES(p) {
            read_points(p, g, row, col, &tile);
            assign(&tile, centroids + g * k, k, tau[g]);
            const int n = tile.padded & -VECTOR;
            real c[MOST], sum[TILE] = {0};
            read_table(next + g * k, k, 0, c);
            for (BUNCHES(j, k))
                for (int i = 0; i < n; i++)
                    for (int m = j; m < j + BUNCH; m++) sum[i] = FUSED(tile.e[m][i], c[m], sum[i]);
            for (int i = 0; i < n; i++) sum[i] *= tile.share[i];
            store(sum, tile.length, (int)is_bf16, out, (g * p->rows + row) * p->cols + col);
        }
}

/* As blocks.update_adjoint: dL/d(weighted sum) in h, and in `gc_before` the part of dL/d(centroids before) from centroids that stayed. */
static void update_adjoint(int k, const double *grad, const double *mass, real *h, double *gc_before) {
    double all = 0;
    for (int j = 0; j < k; j++) all += mass[j];
    for (int j = 0; j < k; j++) {
        const int alive = mass[j] > NO_MASS * all;
        h[j] = alive ? (real)(grad[j] / mass[j]) : 0;
        gc_before[j] = alive ? 0 : grad[j];
    }
}

/* The terms of one iteration in dL/dw of a tile's points, and dz_ij / (share_i rate) in the place of e_ij.

   Both terms are one: with q_ij = (w_i - c'_j) (s_i h_j - v_i), dz_ij = s_i dZ_ij + dZ^out_ij = A_ij (q_ij - sum_m A_im q_im). */
static void reverse_tile(Tile *tile, int k, const real *c, const real *next, const real *h, real rate, real *term) {
    const int n = tile->padded & -VECTOR;
    const real *w = tile->w, *s = tile->s, *v = tile->v;
    real path[TILE] = {0}, mean[TILE] = {0}, direct[TILE] = {0};
    for (BUNCHES(j, k))
        for (int i = 0; i < n; i++) {
            real eh = path[i], eq = mean[i];
            for (int m = j; m < j + BUNCH; m++) {
                eh = FUSED(tile->e[m][i], h[m], eh);
                eq = FUSED(tile->e[m][i], (w[i] - next[m]) * (s[i] * h[m] - v[i]), eq);
            }
            path[i] = eh, mean[i] = eq;
        }
    for (int i = 0; i < n; i++) mean[i] *= tile->share[i];
    for (BUNCHES(j, k))
        for (int i = 0; i < n; i++) {
            real sum = direct[i];
            for (int m = j; m < j + BUNCH; m++) {
                const real q = (w[i] - next[m]) * (s[i] * h[m] - v[i]);
                const real dz = tile->e[m][i] * (q - mean[i]) * (w[i] - c[m]);
                tile->e[m][i] = dz;
                sum += dz;
            }
            direct[i] = sum;
        }
    for (int i = 0; i < n; i++) term[i] = tile->share[i] * (s[i] * path[i] - rate * direct[i]);
}

/* Reads a tile's points and v, 0 but in the last iteration, and assigns them. */
static void read_tile(const Points *p, int64_t g, int64_t row, int64_t col, const Grad *grad, const real *c, real tau, Tile *tile) {
    read_points(p, g, row, col, tile);
    memset(tile->v, 0, sizeof tile->v);
    if (grad) load(grad->values, (g * p->rows + row) * p->cols + col, tile->length, (int)grad->is_bf16, tile->v);
    assign(tile, c, (int)p->k, tau);
}

/* dw = dL/dw from grad = dL/dout; trajectory [iters + 1, groups, k]. */
void edkm_adjoint(const Points *p, const void *grad, int64_t is_bf16, const real *trajectory, int64_t iters, const real *tau, real *dw,
                  int64_t first, int64_t stop) {
    const int64_t tiles = p->rows * ((p->cols - 1) / tile_columns(p) + 1);
    const Grad v = {grad, is_bf16};
    Tile one, *held = tiles <= HELD ? aligned_alloc(64, tiles * sizeof *held) : 0, *tile;
    real x[TILE], y[TILE];
    const int k = (int)p->k;
    for (int64_t g = first; g < stop; g++) {
        const real rate = 2 / tau[g];
        double gc[MOST] = {0}; /* dL/dc of the iteration's result */
        for (int64_t t = iters; t > 0; t--) {
            const int last = t == iters;
            const real *before = trajectory + ((t - 1) * p->groups + g) * k;
            double mass[MOST] = {0}, gc_before[MOST] = {0};
            real c[MOST], next[MOST], h[MOST] = {0};
            read_table(before, k, 0, c);
            read_table(before + p->groups * k, k, 0, next);
            tile = held ? held : &one;
            FOR_TILES(p) {
                read_tile(p, g, row, col, last ? &v : 0, before, tau[g], tile);
                for (int i = 0; i < tile->padded; i++) {
                    x[i] = tile->share[i] * tile->s[i];
                    y[i] = tile->share[i] * tile->v[i];
                }
                add_sums(tile, k, x, mass);
                if (last) add_sums(tile, k, y, gc);
                tile += held != 0;
            }
            update_adjoint(k, gc, mass, h, gc_before);
            tile = held ? held : &one;
            FOR_TILES(p) {
                if (!held) read_tile(p, g, row, col, last ? &v : 0, before, tau[g], tile);
                reverse_tile(tile, k, c, next, h, rate, x);
                real *into = dw + (g * p->rows + row) * p->cols + col;
                for (int i = 0; i < tile->length; i++) into[i] = last ? x[i] : into[i] + x[i];
                for (int i = 0; i < tile->padded; i++) x[i] = rate * tile->share[i];
                if (t > 1) add_sums(tile, k, x, gc_before);
                tile += held != 0;
            }
            memcpy(gc, gc_before, sizeof gc);
        }
    }
    free(held);
}

/* Loop of gptq.py: round the columns of a weight to the nearest centroids, one column after another. Arrays have a row for every
   column of the weight, so that the inner loops run along its rows, each of which has a table.

   target, from, indices [columns, rows]; coupling [columns, columns]; centroids [k, rows] ascending; midpoints [k - 1, rows]. Indices
   count the centroids of all tables. moved [columns, LANES] is scratch memory of the thread. */
void edkm_columns(int64_t columns, int64_t rows, int64_t k, int64_t groups, real *target, const real *from, const real *coupling,
                  const real *centroids, const real *midpoints, int32_t *indices, real *moved, int64_t first, int64_t stop) {
    for (int64_t at = first, n; at < stop && (n = stop - at < LANES ? stop - at : LANES, 1); at += LANES) {
        int32_t table[LANES];
        for (int i = 0; i < n; i++) table[i] = (int32_t)((at + i) / (rows / groups) * k);
        for (int64_t j = 0; j < columns; j++) {
            const real *before = from + j * rows + at;
            int32_t *index = indices + j * rows + at;
            real t[LANES] = {0}, best[LANES];
            memcpy(t, target + j * rows + at, n * sizeof *t);
            for (int64_t earlier = 0; earlier < j; earlier++) {
                const real share = coupling[j * columns + earlier], *by = moved + earlier * LANES;
                for (int i = 0; i < LANES; i++) t[i] -= share * by[i];
            }
            for (int i = 0; i < n; i++) best[i] = centroids[at + i], index[i] = table[i];
            for (int64_t m = 0; m + 1 < k; m++) {
                const real *midpoint = midpoints + m * rows + at, *centroid = centroids + (m + 1) * rows + at;
                for (int i = 0; i < n; i++) {
                    best[i] = t[i] > midpoint[i] ? centroid[i] : best[i];
                    index[i] += t[i] > midpoint[i];
                }
            }
            for (int i = 0; i < n; i++) moved[j * LANES + i] = best[i] - before[i];
            memcpy(target + j * rows + at, t, n * sizeof *t);
        }
    }
}

/* Loop of kmeans.py: the optimal k-means of single values; `segments` there has the method. most[j][b] is the most that j segments of the
   first b values take off the squared error: the best over their last boundary a of most[j - 1][a] + x^2 / w, for a last segment of
   mass w and weighted sum x. */

typedef struct {
    const double *mass, *total; /* of all values before, [m + 1] */
    const double *before;       /* most[j - 1] */
    double *most;
    int32_t *origin;
} Cuts;

static void cut(const Cuts *c, int64_t low, int64_t high, int64_t from, int64_t to) {
    while (low <= high) {
        const int64_t b = (low + high) / 2, end = to < b ? to : b;
        int64_t best = from;
        double most = -1;
        for (int64_t a = from; a <= end; a++) {
            const double w = c->mass[b] - c->mass[a], x = c->total[b] - c->total[a];
            const double value = c->before[a] + (w > 0 ? x * x / w : 0);
            if (value > most) most = value, best = a;
        }
        c->most[b] = most;
        c->origin[b] = (int32_t)best;
        cut(c, low, b - 1, from, best);
        low = b + 1;
        from = best;
    }
}

/* means [groups, k], ascending, from ascending values and their mass [groups, m]; a segment without mass takes the value at its left
   end. Sums are in double. work [4, m + 1] and origin [k, m + 1] are scratch memory of the thread. */
void edkm_segments(int64_t m, int64_t k, const real *values, const real *weights, real *means, double *work, int32_t *origin,
                   int64_t first, int64_t stop) {
    const int64_t n = m + 1;
    for (int64_t g = first; g < stop; g++) {
        const real *value = values + g * m, *weight = weights + g * m;
        double *mass = work, *total = work + n, *before = work + 2 * n, *most = work + 3 * n;
        double all = 0, center = 0;
        for (int64_t b = 0; b < m; b++) all += weight[b], center += (double)weight[b] * value[b];
        center /= all;
        mass[0] = total[0] = before[0] = 0;
        for (int64_t b = 0; b < m; b++) {
            mass[b + 1] = mass[b] + weight[b];
            total[b + 1] = total[b] + (double)weight[b] * (value[b] - center);
            before[b + 1] = mass[b + 1] > 0 ? total[b + 1] * total[b + 1] / mass[b + 1] : 0;
        }
        for (int64_t j = 1; j < k; j++) {
            Cuts c = {mass, total, before, most, origin + j * n};
            cut(&c, j + 1 < k ? 0 : m, m, 0, m);
            double *swap = before;
            before = most, most = swap;
        }
        real *mean = means + g * k;
        for (int64_t j = k, end = m; j > 0; j--) {
            const int64_t start = j > 1 ? origin[(j - 1) * n + end] : 0;
            const double w = mass[end] - mass[start];
            mean[j - 1] = (real)(w > 0 ? center + (total[end] - total[start]) / w : value[start < m ? start : m - 1]);
            end = start;
        }
        for (int64_t j = 1; j < k; j++)
            if (mean[j] < mean[j - 1]) mean[j] = mean[j - 1];
    }
}
