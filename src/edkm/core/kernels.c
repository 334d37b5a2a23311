/* Loops of native.py: differentiable k-means of single values, one table after another.

   Points are the weights of a group, rows x cols, contiguous. A tile of them and its assignment A [k, tile] stay in the first cache,
   and every inner loop runs along the tile, at vector width. blocks.py states the equations.

   Plain C, built by native.py with the compiler of the machine: for float32, and with -DDOUBLE for float64. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef DOUBLE
typedef double real;
#define LOWEST -108 /* the logit under which an entry of A is noise: 3 log(epsilon) */
#define NO_MASS (DBL_EPSILON * DBL_EPSILON) /* the share of a group's mass that counts as none: reference.mass_floor */
#else
typedef float real;
#define LOWEST -47
#define NO_MASS ((double)FLT_EPSILON * FLT_EPSILON)
#endif

#define TILE 256

typedef real Matrix[MOST][TILE]; /* [k, tile]; native.py defines MOST, of the centroids of a table */

/* Points to cluster. `importance` has a row every `importance_stride` values (0: one row for all), or is 0. */
typedef struct {
    const real *weight;
    const real *importance;
    int64_t importance_stride;
    int64_t groups, rows, cols; /* rows of one group */
    int64_t k;
    int64_t to_bf16; /* round the points first */
} Points;

/* exp(x) for x in [LOWEST, 0] to 1e-7 relative; no branch, so that loops of it are vectors. */
static inline real exp_of(real x) {
#ifdef DOUBLE
    return exp(x);
#else
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float n = x * 1.44269504f + shift;
    int32_t bits;
    memcpy(&bits, &n, 4);
    n -= shift;
    float f = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts */
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    int32_t scale = (bits + 127) << 23; /* the low bits of the shifted n are n */
    float power;
    memcpy(&power, &scale, 4);
    return p * power;
#endif
}

static void read_points(const Points *p, int64_t at, int length, real *w) {
    const real *from = p->weight + at;
    if (!p->to_bf16) {
        memcpy(w, from, length * sizeof *w);
        return;
    }
    for (int i = 0; i < length; i++) {
        float value = (float)from[i];
        uint32_t bits;
        memcpy(&bits, &value, 4);
        bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
        memcpy(&value, &bits, 4);
        w[i] = from[i] == from[i] ? value : from[i];
    }
}

/* A [k, length] of the points w. */
static void assignment(const real *w, int length, const real *c, int k, real tau, Matrix a) {
    const real rate = 1 / tau;
    real least[TILE], total[TILE];
    for (int i = 0; i < length; i++) {
        real d = w[i] - c[0];
        least[i] = a[0][i] = d * d;
        total[i] = 0;
    }
    for (int j = 1; j < k; j++)
        for (int i = 0; i < length; i++) {
            real d = w[i] - c[j];
            d *= d;
            a[j][i] = d;
            least[i] = d < least[i] ? d : least[i];
        }
    for (int j = 0; j < k; j++)
        for (int i = 0; i < length; i++) {
            real x = (least[i] - a[j][i]) * rate;
            x = exp_of(x > LOWEST ? x : LOWEST);
            a[j][i] = x;
            total[i] += x;
        }
    for (int i = 0; i < length; i++) total[i] = 1 / total[i];
    for (int j = 0; j < k; j++)
        for (int i = 0; i < length; i++) a[j][i] *= total[i];
}

/* Visits the tiles of group g: `at` is where they start, `s` their importance or 0. */
#define FOR_TILES(p, g)                                                                                          \
    for (int64_t row = 0; row < (p)->rows; row++)                                                                \
        for (int64_t col = 0, length, at; col < (p)->cols                                                        \
             && (length = (p)->cols - col < TILE ? (p)->cols - col : TILE,                                       \
                 at = ((g) * (p)->rows + row) * (p)->cols + col, 1);                                             \
             col += TILE)

static const real *importance_at(const Points *p, int64_t g, int64_t row, int64_t col) {
    return p->importance ? p->importance + (g * p->rows + row) * p->importance_stride + col : 0;
}

static real dot(const real *x, const real *y, int length) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < length; i++) sum += x[i] * y[i];
    return sum;
}

static real sum_of(const real *x, int length) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < length; i++) sum += x[i];
    return sum;
}

/* mass [groups, k] and total [groups, k] of one iteration, for the groups from `first` to before `stop`. */
void edkm_sums(const Points *p, const real *centroids, const real *tau, real *mass, real *total, int64_t first, int64_t stop) {
    Matrix a;
    real w[TILE];
    int k = (int)p->k;
    for (int64_t g = first; g < stop; g++) {
        double m[MOST] = {0}, t[MOST] = {0};
        FOR_TILES(p, g) {
            int n = (int)length;
            const real *s = importance_at(p, g, row, col);
            read_points(p, at, n, w);
            assignment(w, n, centroids + g * k, k, tau[g], a);
            for (int j = 0; j < k; j++) {
                if (s)
                    for (int i = 0; i < n; i++) a[j][i] *= s[i];
                m[j] += sum_of(a[j], n);
                t[j] += dot(a[j], w, n);
            }
        }
        for (int j = 0; j < k; j++) {
            mass[g * k + j] = (real)m[j];
            total[g * k + j] = (real)t[j];
        }
    }
}

/* out = sum_j A_j next_j. */
void edkm_decode(const Points *p, const real *centroids, const real *next, const real *tau, real *out, int64_t first, int64_t stop) {
    Matrix a;
    real w[TILE];
    int k = (int)p->k;
    for (int64_t g = first; g < stop; g++)
        FOR_TILES(p, g) {
            int n = (int)length;
            read_points(p, at, n, w);
            assignment(w, n, centroids + g * k, k, tau[g], a);
            real sum[TILE] = {0};
            for (int j = 0; j < k; j++)
                for (int i = 0; i < n; i++) sum[i] += a[j][i] * next[g * k + j];
            memcpy(out + at, sum, n * sizeof *sum);
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

/* dw = dL/dw from v = dL/dout; trajectory [iters + 1, groups, k]. */
void edkm_adjoint(const Points *p, const real *v, const real *trajectory, int64_t iters, const real *tau, real *dw, int64_t first,
                  int64_t stop) {
    Matrix a, dz;
    real w[TILE];
    int k = (int)p->k;
    for (int64_t g = first; g < stop; g++) {
        const real rate = 2 / tau[g];
        double gc[MOST] = {0}; /* dL/dc of the iteration's result */
        memset(dw + g * p->rows * p->cols, 0, p->rows * p->cols * sizeof *dw);
        for (int64_t t = iters; t > 0; t--) {
            const real *c = trajectory + ((t - 1) * p->groups + g) * k, *next = trajectory + (t * p->groups + g) * k;
            const int last = t == iters;
            double mass[MOST] = {0}, gc_before[MOST] = {0};
            real h[MOST];
            FOR_TILES(p, g) {
                int n = (int)length;
                const real *s = importance_at(p, g, row, col);
                read_points(p, at, n, w);
                assignment(w, n, c, k, tau[g], a);
                for (int j = 0; j < k; j++) {
                    mass[j] += s ? dot(a[j], s, n) : sum_of(a[j], n);
                    if (last) gc[j] += dot(a[j], v + at, n);
                }
            }
            update_adjoint(k, gc, mass, h, gc_before);
            FOR_TILES(p, g) {
                int n = (int)length;
                const real *s = importance_at(p, g, row, col);
                real path[TILE] = {0}, mean[TILE] = {0}, *into = dw + at;
                read_points(p, at, n, w);
                assignment(w, n, c, k, tau[g], a);
                if (last) { /* the output's own terms */
                    real out[TILE] = {0};
                    for (int j = 0; j < k; j++)
                        for (int i = 0; i < n; i++) out[i] += a[j][i] * next[j];
                    for (int j = 0; j < k; j++) {
                        for (int i = 0; i < n; i++) {
                            dz[j][i] = a[j][i] * v[at + i] * (next[j] - out[i]) * (w[i] - c[j]) * rate;
                            into[i] -= dz[j][i];
                        }
                        gc_before[j] += sum_of(dz[j], n);
                    }
                }
                for (int j = 0; j < k; j++)
                    for (int i = 0; i < n; i++) {
                        dz[j][i] = h[j] * (w[i] - next[j]);
                        mean[i] += a[j][i] * dz[j][i];
                    }
                for (int j = 0; j < k; j++) {
                    for (int i = 0; i < n; i++) {
                        dz[j][i] = a[j][i] * (dz[j][i] - mean[i]) * (w[i] - c[j]) * rate;
                        path[i] += h[j] * a[j][i] - dz[j][i];
                    }
                    gc_before[j] += s ? dot(dz[j], s, n) : sum_of(dz[j], n);
                }
                for (int i = 0; i < n; i++) into[i] += s ? path[i] * s[i] : path[i];
            }
            memcpy(gc, gc_before, sizeof gc);
        }
    }
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
