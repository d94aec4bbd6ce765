/* A site whose chunks are narrow, on a CPU: bodies r = x down up, measured as they are computed.

   Activations are [N, D] row by row, float32, D = chunks F. A thread serves whole chunks, so sums
   need no other thread and are the same every time. Sixty-four rows of a chunk at a time are copied
   to where caches hold them, which is all the memory traffic there is. Sums of a block are float32;
   blocks add up in float64. */

#include <stdint.h>
#include <string.h>

/* F and the rank, padded with zeros, are multiples of LANES. */
enum { BLOCK = 64, LANES = 8, WIDEST = 64, GAINS = 4 };

/* Eight floats wherever they lie. */
typedef float lanes __attribute__((vector_size(32), aligned(4)));

#define INLINE static inline __attribute__((always_inline))
#define AT(p) (*(lanes *)(p))

/* out = a m, or out += a m: T rows of V lanes, whose sums stay in registers. The entry of `a` in row
   t and column k is a[t row + k column]; rows of `m` are as far apart as those of `out`. */
INLINE void tile(float *out, const float *a, int row, int column, const float *m, int stride,
                 int inner, int adds, const int T, const int V) {
  enum { MOST_ROWS = 8, MOST_LANES = 2 };
  lanes sum[MOST_ROWS][MOST_LANES];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      sum[t][v] = (lanes){0};
  for (int k = 0; k < inner; ++k)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        sum[t][v] += a[t * row + k * column] * AT(m + k * stride + v * LANES);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      AT(out + t * stride + v * LANES) =
          adds ? AT(out + t * stride + v * LANES) + sum[t][v] : sum[t][v];
}

/* [rows, inner] times [inner, columns]; rows and columns are multiples of LANES. */
INLINE void multiply(float *out, const float *a, int row, int column, const float *m, int rows,
                     int inner, int columns, int adds) {
  int c = 0, n;
  for (; columns - c >= 2 * LANES; c += 2 * LANES) {
    for (n = 0; rows - n >= 6; n += 6)
      tile(out + n * columns + c, a + n * row, row, column, m + c, columns, inner, adds, 6, 2);
    for (; rows - n >= 4; n += 4)
      tile(out + n * columns + c, a + n * row, row, column, m + c, columns, inner, adds, 4, 2);
    for (; n < rows; n += 2)
      tile(out + n * columns + c, a + n * row, row, column, m + c, columns, inner, adds, 2, 2);
  }
  for (n = 0; c < columns && n < rows; n += 8)
    tile(out + n * columns + c, a + n * row, row, column, m + c, columns, inner, adds, 8, 1);
}

/* out = a m, of [rows, inner] and [inner, columns]. */
static void product(float *out, const float *a, const float *m, int rows, int inner, int columns) {
  multiply(out, a, inner, 1, m, rows, inner, columns, 0);
}

/* out += a^T m, of [inner, rows] and [inner, columns]. */
static void add_outer(float *out, const float *a, const float *m, int rows, int inner,
                      int columns) {
  multiply(out, a, 1, rows, m, rows, inner, columns, 1);
}

/* out = a^T, [columns, rows] of [rows, columns]. */
INLINE void turn(float *out, const float *a, int rows, int columns) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) out[j * rows + i] = a[i * columns + j];
}

INLINE int padded(int size) { return (size + LANES - 1) / LANES * LANES; }

/* Copies a block of a chunk; rows up to a multiple of LANES are zero. */
INLINE void pack(float *to, const float *from, int64_t stride, int rows, int F) {
  for (int n = 0; n < rows; ++n)
    for (int f = 0; f < F; f += LANES) AT(to + n * F + f) = AT(from + n * stride + f);
  memset(to + rows * F, 0, sizeof(float) * (padded(rows) - rows) * F);
}

INLINE float across(lanes of) {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += of[i];
  return sum;
}

/* Of numbers that lie together, `size` a multiple of LANES. */
INLINE double inner_product(const float *a, const float *b, int size) {
  lanes sum[4] = {{0}};
  int i = 0;
  for (; size - i >= 4 * LANES; i += 4 * LANES)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] += AT(a + i + j * LANES) * AT(b + i + j * LANES);
  for (; i < size; i += LANES) sum[0] += AT(a + i) * AT(b + i);
  return across((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* out = base + gain of, a block of a chunk; `out` is where the activations are. */
INLINE void put(float *out, int64_t stride, const float *base, float gain, const float *of,
                int rows, int F) {
  // Row by row, as lines of the same column of a block often share a set of the cache.
  for (int n = 0; n < rows; ++n)
    for (int f = 0; f < F; f += LANES)
      AT(out + n * stride + f) = AT(base + n * F + f) + gain * AT(of + n * F + f);
}

typedef struct {
  int64_t rows, chunks, rank;
  int F;
  const float *x, *gains, *down, *up; /* gains: [C, 4], of bodies without damping */
} site;

/* A body: `down` is [F, R] and `up` [R, F], with the rank padded; `both` is their product, [F, F],
   where that takes fewer operations than one after the other, both passes together: N rows take
   3 N F F then, and 4 F F R for the products of parameters; else 7 N F R. */
typedef struct {
  int R, is_merged;
  float down[WIDEST * WIDEST], up[WIDEST * WIDEST], both[WIDEST * WIDEST];
} body;

INLINE void load_body(body *of, const site *s, int64_t c) {
  const int F = s->F, rank = s->rank, R = of->R = padded(rank);
  for (int f = 0; f < F; ++f) {
    memcpy(of->down + f * R, s->down + (c * F + f) * rank, sizeof(float) * rank);
    memset(of->down + f * R + rank, 0, sizeof(float) * (R - rank));
  }
  memcpy(of->up, s->up + c * rank * F, sizeof(float) * rank * F);
  memset(of->up + rank * F, 0, sizeof(float) * (R - rank) * F);
  of->is_merged = s->rows * (7 * R - 3 * F) > 4 * F * R;
  if (of->is_merged) product(of->both, of->down, of->up, F, R, F);
}

/* What both passes measured of a chunk: a row of `Pulled.told`. */
typedef struct {
  float num_values, total, square, num_features, num_dead, slope_square;
  float num_live, r_square, utility, num_errors;
} told_row;

/* Writes y = x + act r, and sums: of x and x^2 per feature, of r^2. Returns the square of x; adds
   those of the parameters to `of_leaves`. */
static double grow_chunk(const site *s, int64_t c, float *y, float *total, float *square,
                         float *r_square, double *of_leaves) {
  const int F = s->F;
  const int64_t stride = s->chunks * F;
  const float act = s->gains[GAINS * c];
  body b;
  float u[BLOCK * WIDEST], h[BLOCK * WIDEST], r[BLOCK * WIDEST];
  double totals[WIDEST] = {0}, squares[WIDEST] = {0}, of_r = 0, all = 0;
  load_body(&b, s, c);
  of_leaves[0] += inner_product(b.down, b.down, F * b.R);
  of_leaves[1] += inner_product(b.up, b.up, F * b.R);
  for (int64_t from = 0; from < s->rows; from += BLOCK) {
    const int rows = s->rows - from < BLOCK ? s->rows - from : BLOCK, N = padded(rows);
    const int64_t at = from * stride + c * F;
    pack(u, s->x + at, stride, rows, F);
    if (b.is_merged) {
      product(r, u, b.both, N, F, F);
    } else {
      product(h, u, b.down, N, F, b.R);
      product(r, h, b.up, N, b.R, F);
    }
    put(y + at, stride, u, act, r, rows, F);
    lanes r_sum = {0};
    for (int f = 0; f < F; f += LANES) {
      lanes sum = {0}, sum_square = {0};
      for (int n = 0; n < rows; ++n) {
        const lanes x = AT(u + n * F + f), of = AT(r + n * F + f);
        sum += x;
        sum_square += x * x;
        r_sum += of * of;
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

/* Writes d x = dy + feel (dy (down up)^T), gradients of the parameters, and what was measured,
   -<dy, r> among it; `total`, `square` and `r_square` are the forward pass's. Returns the square of
   dy. */
static double pull_chunk(const site *s, int64_t c, const float *total, const float *square,
                         const float *r_square, const float *dy, float *dx, float *d_down,
                         float *d_up, told_row *told) {
  const int F = s->F, rank = s->rank;
  const int64_t stride = s->chunks * F;
  const float feel = s->gains[GAINS * c + 2];
  body b;
  float down_turned[WIDEST * WIDEST], up_turned[WIDEST * WIDEST], both_turned[WIDEST * WIDEST];
  float own_down[WIDEST * WIDEST], own_up[WIDEST * WIDEST], own_both[WIDEST * WIDEST];
  float u[BLOCK * WIDEST], slope[BLOCK * WIDEST], d_u[BLOCK * WIDEST];
  float h[BLOCK * WIDEST], d_h[BLOCK * WIDEST];
  double of_slope = 0, of_x = 0, of_x_square = 0, inner;
  int dead = 0;
  load_body(&b, s, c);
  const int R = b.R;
  turn(up_turned, b.up, R, F);
  if (b.is_merged)
    turn(both_turned, b.both, F, F);
  else
    turn(down_turned, b.down, F, R);
  memset(own_down, 0, sizeof(float) * F * R);
  memset(own_up, 0, sizeof(float) * F * R);
  memset(own_both, 0, sizeof(float) * F * F);
  for (int64_t from = 0; from < s->rows; from += BLOCK) {
    const int rows = s->rows - from < BLOCK ? s->rows - from : BLOCK, N = padded(rows);
    const int64_t at = from * stride + c * F;
    pack(u, s->x + at, stride, rows, F);
    pack(slope, dy + at, stride, rows, F);
    if (b.is_merged) {
      add_outer(own_both, u, slope, F, N, F);
      product(d_u, slope, both_turned, N, F, F);
    } else {
      product(h, u, b.down, N, F, R);
      product(d_h, slope, up_turned, N, F, R);
      add_outer(own_up, h, slope, R, N, F);
      add_outer(own_down, u, d_h, F, N, R);
      product(d_u, d_h, down_turned, N, R, F);
    }
    put(dx + at, stride, slope, feel, d_u, rows, F);
    of_slope += inner_product(slope, slope, rows * F);
  }
  if (b.is_merged) {
    inner = inner_product(own_both, b.both, F * F);
    add_outer(own_up, b.down, own_both, R, F, F);
    product(own_down, own_both, up_turned, F, F, R);
  } else {
    inner = inner_product(own_up, b.up, F * R);
  }
  for (int f = 0; f < F; ++f) {
    of_x += total[c * F + f];
    of_x_square += square[c * F + f];
    dead += square[c * F + f] == 0;
    memcpy(d_down + (c * F + f) * rank, own_down + f * R, sizeof(float) * rank);
  }
  memcpy(d_up + c * rank * F, own_up, sizeof(float) * rank * F);
  told[c] = (told_row){
      .num_values = (float)s->rows * F, .total = of_x, .square = of_x_square, .num_features = F,
      .num_dead = dead, .slope_square = of_slope, .num_live = 1, .r_square = r_square[c],
      .utility = -inner, .num_errors = 0,
  };
  return of_slope;
}

/* squares: of x, of all down, of all up. */
void esper_grow(int64_t rows, int64_t chunks, int64_t rank, int64_t width, const float *x,
                const float *gains, const float *down, const float *up, float *y, float *total,
                float *square, float *r_square, double *squares) {
  const site s = {rows, chunks, rank, width, x, gains, down, up};
  double of_x = 0, of_down = 0, of_up = 0;
#pragma omp parallel for schedule(static) reduction(+ : of_x, of_down, of_up)
  for (int64_t c = 0; c < chunks; ++c) {
    double of_leaves[2] = {0};
    of_x += grow_chunk(&s, c, y, total, square, r_square, of_leaves);
    of_down += of_leaves[0], of_up += of_leaves[1];
  }
  squares[0] = of_x, squares[1] = of_down, squares[2] = of_up;
}

/* squares: of dy. */
void esper_pull(int64_t rows, int64_t chunks, int64_t rank, int64_t width, const float *x,
                const float *gains, const float *down, const float *up, const float *total,
                const float *square, const float *r_square, const float *dy, float *dx,
                float *d_down, float *d_up, told_row *told, double *squares) {
  const site s = {rows, chunks, rank, width, x, gains, down, up};
  double of_slope = 0;
#pragma omp parallel for schedule(static) reduction(+ : of_slope)
  for (int64_t c = 0; c < chunks; ++c)
    of_slope += pull_chunk(&s, c, total, square, r_square, dy, dx, d_down, d_up, told);
  squares[0] = of_slope;
}
