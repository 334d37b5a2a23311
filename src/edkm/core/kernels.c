/* Loops of native.py: differentiable k-means of single values, one table after another.

   Points are the weights of a group, rows x cols, contiguous. A tile of them and its assignment A [k, tile] stay in the first cache,
   and every inner loop runs along the tile, at vector width. blocks.py states the equations. Tables with a shape, whose groups are small,
   have loops of their own, which need no A at all (`edkm_solve` and what follows).

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
#define CEIL ceil
#define LOWEST -156 /* log2(epsilon^3): under it an entry of A is noise */
#else
typedef float real;
#define EPSILON FLT_EPSILON
#define FAR 1e18f
#define FUSED fmaf
#define CEIL ceilf
#define LOWEST -69
#endif
#if !defined(__FMA__) && !defined(__aarch64__)
#undef FUSED
#define FUSED(x, y, z) ((x) * (y) + (z)) /* without the instruction a call of fma would be slow */
#endif
#define NO_MASS ((double)EPSILON * EPSILON) /* the share of a group's mass that counts as none: reference.mass_floor */
#define LEAST_SPREAD 1e-3                   /* reference.LEAST_SPREAD */

#define TILE 512
#define HELD 32 /* tiles whose assignment is kept, in the second cache, where it is needed twice */
#define VECTOR 16 /* tiles are padded to a multiple of it, */
#define BUNCH 4   /* and tables to a multiple of it: loops take so many centroids at a time, in registers */
#define BUNCHES(j, k) int j = 0; j < (k); j += BUNCH

/* Points to cluster. */
typedef struct {
    const void *weight;         /* real, or bfloat16 */
    const real *importance;     /* or 0 */
    int64_t period;             /* values of `importance`, which are repeated over the weight: one row, some, or all */
    int64_t groups, rows, cols; /* rows of one group */
    int64_t k;
    int64_t is_bf16;
    int64_t to_bf16;    /* round the points first */
    const real *values; /* v [k], ascending, of tables with a shape; 0 for free tables */
    int64_t p;          /* 1: entries are scale v_j; 2: offset + scale v_j */
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

/* Reads n points from the weight's value `at` on, and their importance; returns their number padded. */
static int read_run(const Points *p, int64_t at, int n, real *w, real *s) {
    const int padded = (n + VECTOR - 1) / VECTOR * VECTOR;
    load(p->weight, at, n, (int)p->is_bf16, w);
    if (p->to_bf16)
        for (int i = 0; i < n; i++) w[i] = from_bits(bf16_of((float)w[i]) & 0xffff0000u);
    if (p->importance) {
        int64_t from = at % p->period;
        for (int64_t i = 0, count; i < n; i += count, from = 0) {
            count = n - i < p->period - from ? n - i : p->period - from;
            memcpy(s + i, p->importance + from, count * sizeof *s);
        }
    } else
        for (int i = 0; i < n; i++) s[i] = 1;
    for (int i = n; i < padded; i++) w[i] = s[i] = 0;
    return padded;
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
    tile->length = (int)(p->cols - col < most ? p->cols - col : most);
    tile->padded = read_run(p, at, tile->length, tile->w, tile->s);
}

/* A table of k values, padded with `rest`. */
static void read_table(const real *from, int k, real rest, real *to) {
    for (int j = 0; j < k; j++) to[j] = from[j];
    for (int j = k; j % BUNCH; j++) to[j] = rest;
}

/* The entries of group g's table: centroids [groups, k], or theta [groups, p]. */
static void read_entries(const Points *p, const real *centroids, int64_t g, real *to) {
    const int k = (int)p->k, n = (int)p->p;
    if (!p->values)
        memcpy(to, centroids + g * k, k * sizeof *to);
    else
        for (int j = 0; j < k; j++) to[j] = (n == 2 ? centroids[2 * g] : 0) + centroids[n * g + n - 1] * p->values[j];
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
        real c[MOST];
        read_entries(p, centroids, g, c);
        FOR_TILES(p) {
            read_points(p, g, row, col, &tile);
            assign(&tile, c, k, tau[g]);
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

/* Tables with a shape, c_j = o + a v_j, the values v fixed. Groups are small (32 columns), so that several make a tile, and nothing is kept
   by entry: all that an iteration and its gradient need of A are moments of y_j = v_j - v_near about the value nearest to a point,

       e_m = sum_j A_j y_j^m       m = 1, 2, and in the gradient 3, 4

   which lose no digits when A is nearly hard, and are 0 when it is. With u the distance of the point from that value, in units of the scale,
   the logits are -(a^2 / tau) y_j (y_j - 2u), and those of values a few steps away do not count at all. */

typedef struct {
    double o, a; /* the offset, and the scale */
} Theta;

/* Sums over the points of a group, with t_i = v_near - middle: M = sum s_i, and of x_i = t_i + y the first two moments under A; the right
   side of the least squares for the distance from the present theta; and sum_i v_i A_i (1, x). */
typedef struct {
    double mass, first, second, right0, right1, grad0, grad1;
} Sums;

/* Points of whole groups, or of a part of one, each group padded; their nearest value and their moments. */
typedef struct {
    _Alignas(64) real w[TILE];
    real s[TILE], v[TILE], near[TILE], u[TILE], rate[TILE];
    real e[4][TILE]; /* e1 to e4 */
    int groups, each, padded; /* groups, the points of each, and their number padded */
    int64_t from;             /* the first point of the first group */
} Cells;

/* How groups lie in tiles. */
typedef struct {
    int64_t points; /* of a group */
    int together;   /* groups in a tile */
    int parts;      /* tiles of a group */
    int width;      /* points of a part */
    int integers;   /* the values are consecutive integers */
} Layout;

static Layout layout_of(const Points *p) {
    Layout l = {p->rows * p->cols, 1, 1, 0, 1};
    l.parts = (int)((l.points + TILE - 1) / TILE);
    l.width = (int)(((l.points + l.parts - 1) / l.parts + VECTOR - 1) / VECTOR * VECTOR);
    l.parts = (int)((l.points + l.width - 1) / l.width);
    if (l.parts == 1) l.together = TILE / l.width;
    for (int64_t j = 0; j < p->k; j++) l.integers &= p->values[j] == p->values[0] + j && p->values[j] == (int)p->values[j];
    return l;
}

static Theta theta_of(const Points *p, const real *theta, int64_t g) {
    return p->p == 1 ? (Theta){0, theta[g]} : (Theta){theta[2 * g], theta[2 * g + 1]};
}

/* Reads a part of `groups` groups from g on, and v, which is 0 without a gradient. */
static void read_cells(const Points *p, const Layout *l, int64_t g, int groups, int part, const Grad *grad, Cells *c) {
    const int64_t rest = l->points - (int64_t)part * l->width;
    c->groups = groups;
    c->each = (int)(rest < l->width ? rest : l->width);
    c->from = g * l->points + (int64_t)part * l->width;
    memset(c->v, 0, sizeof c->v);
    for (int i = 0, at = 0; i < groups; i++, at += c->padded) {
        c->padded = read_run(p, c->from + i * l->points, c->each, c->w + at, c->s + at);
        if (grad) load(grad->values, c->from + i * l->points, c->each, (int)grad->is_bf16, c->v + at);
    }
}

#define FOR_GROUPS(c) for (int group = 0, at = 0; group < (c)->groups; group++, at += (c)->padded)

/* The value nearest to each point, halfway between two the lower; and u. tau 0 is a hard assignment. Returns the steps that count. */
static int find_nearest(const Points *p, const Layout *l, const real *theta, const real *tau, int64_t g, Cells *c) {
    const int k = (int)p->k, n = c->groups * c->padded;
    const real low = p->values[0], high = p->values[k - 1];
    real sharpness = FAR;
    FOR_GROUPS(c) {
        const Theta now = theta_of(p, theta, g + group);
        const real o = (real)now.o, a = (real)now.a, divisor = a == 0 ? 1 : a;
        real rate = 0;
        if (tau) {
            rate = a * a / tau[g + group] * (real)1.44269504088896340736; /* to powers of 2 */
            rate = rate < 1 / FAR ? 1 / FAR : rate;
            sharpness = rate < sharpness ? rate : sharpness;
        }
        for (int i = at; i < at + c->padded; i++) c->u[i] = (c->w[i] - o) / divisor, c->rate[i] = rate;
    }
    if (l->integers)
        for (int i = 0; i < n; i++) {
            const real x = CEIL(c->u[i] - (real)0.5);
            c->near[i] = x > low ? x < high ? x : high : low;
        }
    else {
        for (int i = 0; i < n; i++) c->near[i] = low;
        for (int j = 1; j < k; j++) {
            const real middle = (p->values[j - 1] + p->values[j]) / 2, value = p->values[j];
            for (int i = 0; i < n; i++) c->near[i] = c->u[i] > middle ? value : c->near[i];
        }
    }
    for (int i = 0; i < n; i++) c->u[i] -= c->near[i];
    const double steps = 1.5 + sqrt(-LOWEST / (double)sharpness + 0.25); /* from there on rate y (y - 1) > -LOWEST */
    return steps < k ? (int)steps : k;
}

/* e1 to e<order>, over all values, or if they are integers those fewer than `steps` from the nearest. */
static inline __attribute__((always_inline)) void add_moments(const Points *p, int integers, int steps, int order, Cells *c) {
    const int first = integers ? 1 - steps : 0, stop = integers ? steps : (int)p->k, n = (c->groups * c->padded) & -VECTOR;
    enum { AT_ONCE = 5 }; /* as many integers count at the usual softness */
    const real low = p->values[0], high = p->values[p->k - 1];
    real e0[TILE] = {0};
    for (int m = 0; m < order; m++) memset(c->e[m], 0, n * sizeof(real));
    for (int j = first; j < stop; j += AT_ONCE) {
        real v[AT_ONCE];
        for (int m = 0; m < AT_ONCE; m++) v[m] = integers ? j + m : j + m < stop ? p->values[j + m] : FAR;
        for (int i = 0; i < n; i++) {
            const real near = c->near[i], twice = 2 * c->u[i], rate = -c->rate[i];
            real s0 = e0[i], s1 = c->e[0][i], s2 = c->e[1][i], s3 = c->e[2][i], s4 = c->e[3][i];
            for (int m = 0; m < AT_ONCE; m++) {
                const real y = integers ? v[m] : v[m] - near, x = rate * y * (y - twice);
                real e = exp2_of(x);
                e = x > LOWEST ? e : 0;
                if (integers) e = near + v[m] < low ? 0 : e, e = near + v[m] > high ? 0 : e;
                s0 += e;
                s1 += e *= y;
                s2 += e *= y;
                s3 += e *= y;
                s4 += e *= y;
            }
            e0[i] = s0, c->e[0][i] = s1, c->e[1][i] = s2;
            if (order == 4) c->e[2][i] = s3, c->e[3][i] = s4;
        }
    }
    for (int i = 0; i < n; i++) e0[i] = 1 / e0[i];
    for (int m = 0; m < order; m++)
        for (int i = 0; i < n; i++) c->e[m][i] *= e0[i];
}

static void find_moments(const Points *p, const Layout *l, const real *theta, const real *tau, int64_t g, int order, Cells *c) {
    const int steps = find_nearest(p, l, theta, tau, g, c), few = l->integers && 2 * steps - 1 < p->k + p->k / 4;
    if (!tau)
        memset(c->e, 0, sizeof c->e);
    else if (order == 4)
        few ? add_moments(p, 1, steps, 4, c) : add_moments(p, 0, 0, 4, c);
    else
        few ? add_moments(p, 1, steps, 2, c) : add_moments(p, 0, 0, 2, c);
}

/* The value about which a group's sums are made, so that they lose no digits: that of a point. */
static real middle_of(const Points *p, const Cells *c, int at) { return p->p == 1 ? 0 : c->near[at]; }

/* Adds the sums of every group of a tile. `middle` is that of each. */
static void add_group_sums(const Points *p, const Cells *c, const real *theta, int64_t g, const real *middle, Sums *sums) {
    FOR_GROUPS(c) {
        const Theta now = theta_of(p, theta, g + group);
        const real o = (real)now.o, a = (real)now.a, around = middle[group];
        real mass = 0, first = 0, second = 0, right0 = 0, right1 = 0, grad0 = 0, grad1 = 0;
#pragma omp simd reduction(+ : mass, first, second, right0, right1, grad0, grad1)
        for (int i = at; i < at + c->padded; i++) {
            const real s = c->s[i], t = c->near[i] - around, e1 = c->e[0][i], e2 = c->e[1][i], d = c->w[i] - (o + a * c->near[i]);
            const real away = d - a * e1;
            mass += s;
            first += s * (t + e1);
            second += s * (t * (t + 2 * e1) + e2);
            right0 += s * away;
            right1 += s * (t * away + (d * e1 - a * e2));
            grad0 += c->v[i];
            grad1 += c->v[i] * (t + e1);
        }
        Sums *to = sums + group;
        to->mass += mass, to->first += first, to->second += second;
        to->right0 += right0, to->right1 += right1;
        to->grad0 += grad0, to->grad1 += grad1;
    }
}

/* The variance of a group's values, or about 0 without an offset, times its mass; 0 where it is too small to tell a scale:
   reference.normal_inverse. */
static double spread_of(const Points *p, const Sums *x) {
    const double step = (p->values[p->k - 1] - p->values[0]) / (double)(p->k - 1);
    const double spread = p->p == 1 ? x->second : x->second - x->first * x->first / x->mass;
    return x->mass == 0 || spread <= LEAST_SPREAD * step * step * x->mass ? 0 : spread; /* NaN lives on */
}

/* Theta after an iteration, for the groups from `first` to before `stop`: writes trajectory[1:], [iters + 1, groups, p]. */
void edkm_solve(const Points *p, real *trajectory, int64_t iters, const real *tau, int64_t first, int64_t stop) {
    const Layout l = layout_of(p);
    Cells c;
    for (int64_t g = first; g < stop; g += l.together) {
        const int groups = (int)(stop - g < l.together ? stop - g : l.together);
        for (int64_t t = 0; t < iters; t++) {
            const real *now = trajectory + t * p->groups * p->p;
            real *next = trajectory + (t + 1) * p->groups * p->p, middle[TILE / VECTOR];
            Sums sums[TILE / VECTOR] = {0};
            for (int part = 0; part < l.parts; part++) {
                if (t == 0 || l.parts > 1) read_cells(p, &l, g, groups, part, 0, &c);
                find_moments(p, &l, now, tau, g, 2, &c);
                if (part == 0)
                    FOR_GROUPS(&c) middle[group] = middle_of(p, &c, at);
                add_group_sums(p, &c, now, g, middle, sums);
            }
            for (int i = 0; i < groups; i++) {
                const Sums *x = sums + i;
                const Theta before = theta_of(p, now, g + i);
                const double spread = spread_of(p, x), mean = p->p == 1 ? 0 : x->first / x->mass;
                const double scale = spread == 0 ? 0 : (x->right1 - mean * x->right0) / spread;
                real *to = next + (g + i) * p->p;
                to[p->p - 1] = (real)(before.a + scale);
                if (p->p == 2) to[0] = (real)(spread == 0 ? before.o : before.o + x->right0 / x->mass - scale * (mean + middle[i]));
            }
        }
    }
}

/* out = sum_j A_j c'_j, in bfloat16 or as real. */
void edkm_decode_shaped(const Points *p, const real *theta, const real *next, const real *tau, void *out, int64_t is_bf16, int64_t first,
                        int64_t stop) {
    const Layout l = layout_of(p);
    Cells c;
    real soft[TILE];
    for (int64_t g = first; g < stop; g += l.together) {
        const int groups = (int)(stop - g < l.together ? stop - g : l.together);
        for (int part = 0; part < l.parts; part++) {
            read_cells(p, &l, g, groups, part, 0, &c);
            find_moments(p, &l, theta, tau, g, 2, &c);
            FOR_GROUPS(&c) {
                const Theta after = theta_of(p, next, g + group);
                const real o = (real)after.o, a = (real)after.a;
                for (int i = at; i < at + c.padded; i++) soft[i] = a * (c.near[i] + c.e[0][i]) + o;
                store(soft + at, c.each, (int)is_bf16, out, c.from + group * l.points);
            }
        }
    }
}

/* dL/dtheta of a group, and h_j = h0 + h1 (v_j - middle). */
typedef struct {
    double o, a;
    double h0, h1;
} Pull;

/* As blocks.update_adjoint: h, and in the pull itself what goes past the iteration, where theta stayed. */
static void pull_back(const Points *p, const Sums *x, double middle, Pull *pull) {
    const double spread = spread_of(p, x), mean = p->p == 1 ? 0 : x->first / x->mass;
    pull->h0 = pull->h1 = 0;
    if (spread == 0) return;
    pull->h1 = (pull->a - (mean + middle) * pull->o) / spread;
    if (p->p == 2) pull->h0 = pull->o / x->mass - pull->h1 * mean;
    pull->o = pull->a = 0;
}

/* Adds the terms of one iteration to dL/dw, and to the pull on the theta before it. With q_j = (w - c'_j) (s h_j - v), a quadratic in y_j,
   and K = cov(q, y), L = cov(q, y^2) under A:   dL/dw = s sum_j A_j h_j + (2 / tau) a K. */
static void reverse_cells(const Points *p, const Cells *c, const real *theta, const real *next, const real *tau, int64_t g,
                          const real *middle, Pull *pull, int64_t points, int last, real *dw) {
    FOR_GROUPS(c) {
        const Theta now = theta_of(p, theta, g + group), after = theta_of(p, next, g + group);
        const real o = (real)now.o, a = (real)now.a, after_o = (real)after.o, after_a = (real)after.a, around = middle[group];
        const real h0 = (real)pull[group].h0, h1 = (real)pull[group].h1, rate = 2 / tau[g + group];
        real term[TILE], on_o = 0, on_a = 0;
#pragma omp simd reduction(+ : on_o, on_a)
        for (int i = at; i < at + c->padded; i++) {
            const real s = c->s[i], near = c->near[i], t = near - around, e1 = c->e[0][i], e2 = c->e[1][i], e3 = c->e[2][i], e4 = c->e[3][i];
            const real h = h0 + h1 * t, left = c->w[i] - (after_o + after_a * near), right = s * h - c->v[i];
            const real q1 = left * s * h1 - after_a * right, q2 = -after_a * s * h1;
            const real k11 = e2 - e1 * e1, k12 = e3 - e1 * e2, k22 = e4 - e2 * e2;
            const real k = q1 * k11 + q2 * k12, l = q1 * k12 + q2 * k22;
            term[i - at] = s * (h + h1 * e1) + rate * a * k;
            on_o -= rate * a * k;
            on_a += rate * ((c->w[i] - (o + a * near) - a * t) * k - a * l);
        }
        real *into = dw + c->from + group * points;
        for (int i = 0; i < c->each; i++) into[i] = last ? term[i] : into[i] + term[i];
        pull[group].o += on_o;
        pull[group].a += on_a + around * (double)on_o;
    }
}

/* dw = dL/dw from grad = dL/dout. */
void edkm_adjoint_shaped(const Points *p, const void *grad, int64_t is_bf16, const real *trajectory, int64_t iters, const real *tau,
                         real *dw, int64_t first, int64_t stop) {
    const Layout l = layout_of(p);
    const Grad v = {grad, is_bf16};
    const int keep = l.parts <= HELD;
    Cells *held = aligned_alloc(64, (keep ? l.parts : 1) * sizeof *held);
    for (int64_t g = first; g < stop; g += l.together) {
        const int groups = (int)(stop - g < l.together ? stop - g : l.together);
        Pull pull[TILE / VECTOR] = {0};
        for (int64_t t = iters; t > 0; t--) {
            const int last = t == iters;
            const real *now = trajectory + (t - 1) * p->groups * p->p, *next = now + p->groups * p->p;
            real middle[TILE / VECTOR];
            Sums sums[TILE / VECTOR] = {0};
            for (int part = 0; part < l.parts; part++) {
                Cells *c = held + (keep ? part : 0);
                read_cells(p, &l, g, groups, part, last ? &v : 0, c);
                find_moments(p, &l, now, tau, g, 4, c);
                if (part == 0)
                    FOR_GROUPS(c) middle[group] = middle_of(p, c, at);
                add_group_sums(p, c, now, g, middle, sums);
            }
            for (int i = 0; i < groups; i++) {
                if (last) pull[i].o = sums[i].grad0, pull[i].a = sums[i].grad1 + middle[i] * sums[i].grad0;
                pull_back(p, sums + i, middle[i], pull + i);
            }
            for (int part = 0; part < l.parts; part++) {
                Cells *c = held + (keep ? part : 0);
                if (!keep) {
                    read_cells(p, &l, g, groups, part, last ? &v : 0, c);
                    find_moments(p, &l, now, tau, g, 4, c);
                }
                reverse_cells(p, c, now, next, tau, g, middle, pull, l.points, last, dw);
            }
        }
    }
    free(held);
}

/* Loop of assign.py: indices [groups, n], of each value how many of its table's ascending midpoints [groups, m] lie below it. */
void edkm_nearest(int64_t n, int64_t m, const real *values, const real *midpoints, uint8_t *indices, int64_t first, int64_t stop) {
    for (int64_t g = first; g < stop; g++)
        for (int64_t at = g * n; at < (g + 1) * n; at += TILE) {
            const int length = (int)((g + 1) * n - at < TILE ? (g + 1) * n - at : TILE);
            real w[TILE] = {0};
            int32_t below[TILE] = {0};
            memcpy(w, values + at, length * sizeof *w);
            int64_t j = 0;
            for (; j + BUNCH <= m; j += BUNCH) {
                const real *c = midpoints + g * m + j;
                for (int i = 0; i < (length + VECTOR - 1) / VECTOR * VECTOR; i++)
                    below[i] += (w[i] > c[0]) + (w[i] > c[1]) + (w[i] > c[2]) + (w[i] > c[3]);
            }
            for (; j < m; j++)
                for (int i = 0; i < length; i++) below[i] += w[i] > midpoints[g * m + j];
            for (int i = 0; i < length; i++) indices[at + i] = (uint8_t)below[i];
        }
}

/* Loops of gptq_tables.py: round the columns of a weight to the nearest centroids, one column after another. Arrays have a row for every
   column of the weight, so that the inner loops run along its rows.

   target, from, indices [columns, rows]; coupling [columns, columns]. moved [columns, LANES] is scratch memory of the thread: by how
   much columns have moved. */

/* The target of column j in n rows, after the columns before it have moved. */
static inline void follow(const real *target, const real *coupling, const real *moved, int64_t j, int n, real *t) {
    memset(t, 0, LANES * sizeof *t);
    memcpy(t, target, n * sizeof *t);
    for (int64_t earlier = 0; earlier < j; earlier++) {
        const real share = coupling[earlier], *by = moved + earlier * LANES;
        for (int i = 0; i < LANES; i++) t[i] -= share * by[i];
    }
}

/* Each row has a table: centroids [k, rows] ascending, midpoints [k - 1, rows]. Indices count the centroids of all tables. */
void edkm_columns(int64_t columns, int64_t rows, int64_t k, int64_t groups, real *target, const real *from, const real *coupling,
                  const real *centroids, const real *midpoints, int32_t *indices, real *moved, int64_t first, int64_t stop) {
    for (int64_t at = first, n; at < stop && (n = stop - at < LANES ? stop - at : LANES, 1); at += LANES) {
        int32_t table[LANES];
        for (int i = 0; i < n; i++) table[i] = (int32_t)((at + i) / (rows / groups) * k);
        for (int64_t j = 0; j < columns; j++) {
            const real *before = from + j * rows + at;
            int32_t *index = indices + j * rows + at;
            real t[LANES], best[LANES];
            follow(target + j * rows + at, coupling + j * columns, moved, j, (int)n, t);
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

/* Each row has scales, and offsets or 0, for the block of the column: [blocks, rows]; the centroids are offset + scale * values[k].
   Indices count the values, which are consecutive integers where they are even. */
void edkm_columns_of_format(int64_t columns, int64_t rows, int64_t k, int64_t even, real *target, const real *from, const real *coupling,
                            const real *values, const real *midpoints, const int32_t *block_of, const real *scales, const real *offsets,
                            int32_t *indices, real *moved, int64_t first, int64_t stop) {
    for (int64_t at = first, n; at < stop && (n = stop - at < LANES ? stop - at : LANES, 1); at += LANES) {
        for (int64_t j = 0; j < columns; j++) {
            const real *before = from + j * rows + at, *scale = scales + block_of[j] * rows + at;
            const real *offset = offsets ? offsets + block_of[j] * rows + at : 0;
            int32_t *index = indices + j * rows + at;
            real t[LANES], x[LANES], best[LANES];
            follow(target + j * rows + at, coupling + j * columns, moved, j, (int)n, t);
            memcpy(target + j * rows + at, t, n * sizeof *t);
            if (offset)
                for (int i = 0; i < n; i++) t[i] -= offset[i];
            for (int i = 0; i < n; i++) x[i] = t[i] / (scale[i] == 0 ? 1 : scale[i]);
            if (even) {
                for (int i = 0; i < n; i++) {
                    const real up = CEIL(x[i] - (real)0.5), low = up < values[0] ? values[0] : up;
                    best[i] = low > values[k - 1] ? values[k - 1] : low;
                    index[i] = (int32_t)(best[i] - values[0]);
                }
            } else {
                for (int i = 0; i < n; i++) best[i] = values[0], index[i] = 0;
                for (int64_t m = 0; m + 1 < k; m++)
                    for (int i = 0; i < n; i++) {
                        best[i] = x[i] > midpoints[m] ? values[m + 1] : best[i];
                        index[i] += x[i] > midpoints[m];
                    }
            }
            for (int i = 0; i < n; i++) best[i] *= scale[i];
            if (offset)
                for (int i = 0; i < n; i++) best[i] += offset[i];
            for (int i = 0; i < n; i++) moved[j * LANES + i] = best[i] - before[i];
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
