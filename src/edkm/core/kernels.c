/* The loops of compiled.py: differentiable k-means of single values, one table after another.

   Points are the weights of a group, rows x cols, contiguous. A tile of them and its assignment A [k, tile] stay in the first cache,
   and every inner loop runs along the tile, at vector width. The equations are those of fused.py, which has them in full.

   Plain C, built by compiled.py with the compiler of the machine: for float32, and with -DDOUBLE for float64. */

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
#define MOST 16 /* centroids of a table */

typedef real Map[MOST][TILE];

/* Points and what is known of them. `importance` has a row of its own every `importance_stride` values (0: one row for all), or is 0. */
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
static void assignment(const real *w, int length, const real *c, int k, real tau, Map a) {
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
    Map a;
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
    Map a;
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

/* dw = dL/dw from v = dL/dout; trajectory [iters + 1, groups, k]. */
void edkm_adjoint(const Points *p, const real *v, const real *trajectory, int64_t iters, const real *tau, real *dw, int64_t first,
                  int64_t stop) {
    Map a, dz;
    real w[TILE];
    int k = (int)p->k;
    for (int64_t g = first; g < stop; g++) {
        const real rate = 2 / tau[g];
        double pull[MOST] = {0}; /* dL/dc of the iteration's result */
        memset(dw + g * p->rows * p->cols, 0, p->rows * p->cols * sizeof *dw);
        for (int64_t t = iters; t > 0; t--) {
            const real *c = trajectory + ((t - 1) * p->groups + g) * k, *next = trajectory + (t * p->groups + g) * k;
            const int last = t == iters;
            double mass[MOST] = {0}, all = 0, before[MOST];
            real h[MOST];
            FOR_TILES(p, g) {
                int n = (int)length;
                const real *s = importance_at(p, g, row, col);
                read_points(p, at, n, w);
                assignment(w, n, c, k, tau[g], a);
                for (int j = 0; j < k; j++) {
                    mass[j] += s ? dot(a[j], s, n) : sum_of(a[j], n);
                    if (last) pull[j] += dot(a[j], v + at, n);
                }
            }
            for (int j = 0; j < k; j++) all += mass[j];
            for (int j = 0; j < k; j++) {
                const int alive = mass[j] > NO_MASS * all;
                h[j] = alive ? (real)(pull[j] / mass[j]) : 0;
                before[j] = alive ? 0 : pull[j]; /* a centroid that stayed hands its gradient on */
            }
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
                        before[j] += sum_of(dz[j], n);
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
                    before[j] += s ? dot(dz[j], s, n) : sum_of(dz[j], n);
                }
                for (int i = 0; i < n; i++) into[i] += s ? path[i] * s[i] : path[i];
            }
            memcpy(pull, before, sizeof pull);
        }
    }
}
