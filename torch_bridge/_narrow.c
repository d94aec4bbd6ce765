/* A site whose chunks are narrow, on a CPU: bodies r = x down up, measured as they are computed.

   Activations are [N, D] row by row, float32, D = chunks F. A thread serves whole chunks, so sums
   need no other thread and are the same every time. Sixty-four rows of a chunk at a time are copied
   to where caches hold them, which is all the memory traffic there is. Sums of a block are float32;
   blocks add up in float64. */

#include <stdint.h>
#include <string.h>

enum { BLOCK = 64, LANES = 8, WIDEST = 64 };

/* Eight floats wherever they lie. */
typedef float lanes __attribute__((vector_size(32), aligned(4)));

#define INLINE static inline __attribute__((always_inline))
#define AT(p) (*(lanes *)(p))

/* Rows that a product computes at once: as many as leave sums in registers. */
#define TOGETHER(F) ((F) <= 16 ? 4 : (F) <= 32 ? 2 : 1)

/* Copies a block of a chunk; rows beyond it are zero. */
INLINE void pack(float *to, const float *from, int64_t stride, int rows, const int F) {
  for (int n = 0; n < rows; ++n)
    for (int f = 0; f < F; f += LANES) AT(to + n * F + f) = AT(from + n * stride + f);
  memset(to + rows * F, 0, sizeof(float) * (BLOCK - rows) * F);
}

/* out = a m, [BLOCK, F] and [F, F]. */
INLINE void product(float *out, const float *a, const float *m, const int F) {
  enum { MOST = 4 };
  for (int n = 0; n < BLOCK; n += TOGETHER(F)) {
    lanes sum[MOST][WIDEST / LANES];
#pragma GCC unroll 4
    for (int t = 0; t < TOGETHER(F); ++t)
#pragma GCC unroll 8
      for (int v = 0; v < F / LANES; ++v) sum[t][v] = (lanes){0};
    for (int k = 0; k < F; ++k)
#pragma GCC unroll 8
      for (int v = 0; v < F / LANES; ++v) {
        const lanes row = AT(m + k * F + v * LANES);
#pragma GCC unroll 4
        for (int t = 0; t < TOGETHER(F); ++t) sum[t][v] += a[(n + t) * F + k] * row;
      }
#pragma GCC unroll 4
    for (int t = 0; t < TOGETHER(F); ++t)
#pragma GCC unroll 8
      for (int v = 0; v < F / LANES; ++v) AT(out + (n + t) * F + v * LANES) = sum[t][v];
  }
}

/* d += a^T b, [F, F] of two [BLOCK, F]. */
INLINE void outer(float *d, const float *a, const float *b, const int F) {
  enum { MOST = 4 };
  for (int k = 0; k < F; k += TOGETHER(F)) {
    lanes sum[MOST][WIDEST / LANES];
#pragma GCC unroll 4
    for (int t = 0; t < TOGETHER(F); ++t)
#pragma GCC unroll 8
      for (int v = 0; v < F / LANES; ++v) sum[t][v] = AT(d + (k + t) * F + v * LANES);
    for (int n = 0; n < BLOCK; ++n)
#pragma GCC unroll 8
      for (int v = 0; v < F / LANES; ++v) {
        const lanes row = AT(b + n * F + v * LANES);
#pragma GCC unroll 4
        for (int t = 0; t < TOGETHER(F); ++t) sum[t][v] += a[n * F + k + t] * row;
      }
#pragma GCC unroll 4
    for (int t = 0; t < TOGETHER(F); ++t)
#pragma GCC unroll 8
      for (int v = 0; v < F / LANES; ++v) AT(d + (k + t) * F + v * LANES) = sum[t][v];
  }
}

INLINE float across(lanes of) {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += of[i];
  return sum;
}

INLINE double square_of(const float *of, int size) {
  double square = 0;
  for (int i = 0; i < size; ++i) square += (double)of[i] * of[i];
  return square;
}

/* m = down up, [F, F] of [F, R] and [R, F]. */
INLINE void merge(float *m, const float *down, const float *up, int R, const int F) {
  memset(m, 0, sizeof(float) * F * F);
  for (int k = 0; k < F; ++k)
    for (int r = 0; r < R; ++r)
      for (int f = 0; f < F; f += LANES) AT(m + k * F + f) += down[k * R + r] * AT(up + r * F + f);
}

typedef struct {
  int64_t rows, chunks, rank;
  const float *x, *gains, *down, *up; /* gains: [C, 3] */
} site;

/* Writes y = x + act r, and sums: of x and x^2 per feature, of r^2. Returns the square of x; adds
   those of the parameters to `of_leaves`. */
INLINE double grow_chunk(const site *s, int64_t c, float *y, float *total, float *square,
                         float *r_square, double *of_leaves, const int F) {
  const int64_t stride = s->chunks * F, R = s->rank;
  const float *down = s->down + c * F * R, *up = s->up + c * F * R;
  const float act = s->gains[3 * c];
  float m[WIDEST * WIDEST], u[BLOCK * WIDEST], r[BLOCK * WIDEST];
  double totals[WIDEST] = {0}, squares[WIDEST] = {0}, of_r = 0, all = 0;
  of_leaves[0] += square_of(down, F * R);
  of_leaves[1] += square_of(up, F * R);
  merge(m, down, up, R, F);
  for (int64_t from = 0; from < s->rows; from += BLOCK) {
    const int rows = s->rows - from < BLOCK ? s->rows - from : BLOCK;
    const int64_t at = from * stride + c * F;
    pack(u, s->x + at, stride, rows, F);
    product(r, u, m, F);
    lanes r_sum = {0};
    for (int f = 0; f < F; f += LANES) {
      lanes sum = {0}, sum_square = {0};
      for (int n = 0; n < rows; ++n) {
        const lanes x = AT(u + n * F + f), of = AT(r + n * F + f);
        sum += x;
        sum_square += x * x;
        r_sum += of * of;
        AT(y + at + n * stride + f) = x + act * of;
      }
      for (int i = 0; i < LANES; ++i) totals[f + i] += sum[i], squares[f + i] += sum_square[i];
    }
    of_r += across(r_sum);
  }
  for (int f = 0; f < F; ++f) {
    total[c * F + f] = totals[f];
    square[c * F + f] = squares[f];
    all += squares[f];
  }
  r_square[c] = of_r;
  return all;
}

/* Writes d x = dy + feel (dy m^T), gradients of the parameters, sums of dy^2 per feature, and
   -<dy, r>. Returns the square of dy. */
INLINE double pull_chunk(const site *s, int64_t c, const float *dy, float *dx, float *d_down,
                         float *d_up, float *slope_square, float *utility, const int F) {
  const int64_t stride = s->chunks * F, R = s->rank;
  const float *down = s->down + c * F * R, *up = s->up + c * F * R;
  const float feel = s->gains[3 * c + 2];
  float m[WIDEST * WIDEST], turned[WIDEST * WIDEST], d_m[WIDEST * WIDEST];
  float u[BLOCK * WIDEST], slope[BLOCK * WIDEST], d_u[BLOCK * WIDEST];
  double squares[WIDEST] = {0}, all = 0, inner = 0;
  merge(m, down, up, R, F);
  for (int k = 0; k < F; ++k)
    for (int f = 0; f < F; ++f) turned[f * F + k] = m[k * F + f];
  memset(d_m, 0, sizeof(float) * F * F);
  for (int64_t from = 0; from < s->rows; from += BLOCK) {
    const int rows = s->rows - from < BLOCK ? s->rows - from : BLOCK;
    const int64_t at = from * stride + c * F;
    pack(u, s->x + at, stride, rows, F);
    pack(slope, dy + at, stride, rows, F);
    outer(d_m, u, slope, F);
    product(d_u, slope, turned, F);
    for (int f = 0; f < F; f += LANES) {
      lanes sum_square = {0};
      for (int n = 0; n < rows; ++n) {
        const lanes of = AT(slope + n * F + f);
        sum_square += of * of;
        AT(dx + at + n * stride + f) = of + feel * AT(d_u + n * F + f);
      }
      for (int i = 0; i < LANES; ++i) squares[f + i] += sum_square[i];
    }
  }
  for (int f = 0; f < F; ++f) {
    slope_square[c * F + f] = squares[f];
    all += squares[f];
  }
  for (int i = 0; i < F * F; ++i) inner += (double)d_m[i] * m[i];
  utility[c] = -inner;
  d_down += c * F * R, d_up += c * F * R;
  memset(d_up, 0, sizeof(float) * F * R);
  for (int k = 0; k < F; ++k)
    for (int r = 0; r < R; ++r) {
      lanes sum = {0};
      for (int f = 0; f < F; f += LANES) {
        const lanes of = AT(d_m + k * F + f);
        sum += of * AT(up + r * F + f);
        AT(d_up + r * F + f) += down[k * R + r] * of;
      }
      d_down[k * R + r] = across(sum);
    }
  return all;
}

#define FOR_EACH_WIDTH(DO) DO(8) DO(16) DO(24) DO(32) DO(48) DO(64)

/* squares: of x, of all down, of all up. Returns whether the width is served. */
int esper_grow(int64_t rows, int64_t chunks, int64_t rank, int64_t width, const float *x,
               const float *gains, const float *down, const float *up, float *y, float *total,
               float *square, float *r_square, double *squares) {
  const site of_call = {rows, chunks, rank, x, gains, down, up}, *s = &of_call;
  double of_x = 0, of_down = 0, of_up = 0;
#define CASE(F)                                                                         \
  case F:                                                                               \
    _Pragma("omp parallel for schedule(static) reduction(+ : of_x, of_down, of_up)")    \
    for (int64_t c = 0; c < s->chunks; ++c) {                                           \
      double of_leaves[2] = {0};                                                        \
      of_x += grow_chunk(s, c, y, total, square, r_square, of_leaves, F);               \
      of_down += of_leaves[0], of_up += of_leaves[1];                                   \
    }                                                                                   \
    break;
  switch (width) {
    FOR_EACH_WIDTH(CASE)
    default: return 0;
  }
#undef CASE
  squares[0] = of_x, squares[1] = of_down, squares[2] = of_up;
  return 1;
}

/* squares: of dy. Returns whether the width is served. */
int esper_pull(int64_t rows, int64_t chunks, int64_t rank, int64_t width, const float *x,
               const float *gains, const float *down, const float *up, const float *dy, float *dx,
               float *d_down, float *d_up, float *slope_square, float *utility, double *squares) {
  const site of_call = {rows, chunks, rank, x, gains, down, up}, *s = &of_call;
  double of_slope = 0;
#define CASE(F)                                                                              \
  case F:                                                                                    \
    _Pragma("omp parallel for schedule(static) reduction(+ : of_slope)")                     \
    for (int64_t c = 0; c < s->chunks; ++c)                                                  \
      of_slope += pull_chunk(s, c, dy, dx, d_down, d_up, slope_square, utility, F);          \
    break;
  switch (width) {
    FOR_EACH_WIDTH(CASE)
    default: return 0;
  }
#undef CASE
  squares[0] = of_slope;
  return 1;
}
