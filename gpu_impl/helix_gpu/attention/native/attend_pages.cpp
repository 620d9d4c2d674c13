// Partial attention of new tokens over one rank's pages, on the CPU: see helix_gpu/attention/native.
//
// A row's keys are cut from its start on into pieces of a fixed number of tokens, so that what else is in the batch
// does not change the order of any sum; the pieces are worked on in parallel and merged in order.
// Within a piece, tiles of LANES tokens: all heads' scores (K is read once, front to back, while V
// is fetched ahead), an online softmax for each head, then the weighted sum of V. All arithmetic
// is float32, whatever the type of the cache. Where query and cache are bfloat16 the processor may
// take their products in pairs: these are exact, and their sums are float32 too, each rounded.

#include <ATen/Parallel.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifndef _OPENMP
#error "Without OpenMP at::parallel_for works on the pieces one after the other: give -fopenmp."
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int64_t PIECE = 2048;  // tokens
constexpr float NONE = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef uint16_t Uppers __attribute__((vector_size(LANES * sizeof(uint16_t))));
typedef _Float16 Halves __attribute__((vector_size(LANES * sizeof(_Float16))));

struct BFloat16 {
  uint16_t bits;  // the upper half of a float
};

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

inline Floats load(const BFloat16* from) {
  Uppers bits;
  std::memcpy(&bits, from, sizeof(bits));
#ifdef __AVX512F__  // gcc 12 takes half a dozen instructions for what this one does
  return (Floats)((Ints)_mm512_cvtepu16_epi32((__m256i)bits) << 16);
#else
  return (Floats)(__builtin_convertvector(bits, Ints) << 16);
#endif
}

inline Floats load(const _Float16* from) {
  Halves x;
  std::memcpy(&x, from, sizeof(x));
  return __builtin_convertvector(x, Floats);
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof(x)); }

inline Floats all(float x) { return x - Floats{}; }

// The vector turned by so many lanes.
template <int by>
inline Floats turned(Floats x) {
  Ints lanes;
  for (int i = 0; i < LANES; i++) lanes[i] = (i + by) % LANES;
  return __builtin_shuffle(x, lanes);
}

inline float sum(Floats x) {
  x += turned<8>(x);
  x += turned<4>(x);
  x += turned<2>(x);
  x += turned<1>(x);
  return x[0];
}

// Lanes that are `of` apart, of both: the first of each pair from one half, its fellow from here.
template <int of>
inline Floats folded(Floats a, Floats b) {
  Ints near, far;
  for (int i = 0; i < LANES / 2; i++) {
    const int lane = i / of * 2 * of + i % of;
    near[i] = lane, near[i + LANES / 2] = lane + LANES;
    far[i] = lane + of, far[i + LANES / 2] = lane + of + LANES;
  }
  return __builtin_shuffle(a, b, near) + __builtin_shuffle(a, b, far);
}

// The sums of four vectors.
inline void sums(const Floats (&x)[4], float* to, int64_t stride) {
  Floats y = folded<4>(folded<8>(x[0], x[1]), folded<8>(x[2], x[3]));
  y = folded<2>(y, y);
  y = folded<1>(y, y);
  for (int i = 0; i < 4; i++) to[i * stride] = y[i];
}

inline void sums(const Floats (&x)[1], float* to, int64_t) { *to = sum(x[0]); }

inline float largest(Floats x) {
  auto larger = [](Floats a, Floats b) { return a > b ? a : b; };
  x = larger(x, turned<8>(x));
  x = larger(x, turned<4>(x));
  x = larger(x, turned<2>(x));
  x = larger(x, turned<1>(x));
  return x[0];
}

// exp(x) for x <= 0 to about a unit of roundoff: 2^n * exp(r) with |r| <= ln(2)/2, where exp(r) is
// its Taylor polynomial of degree 7 (the next term is below 2^-27). Below -87 it is 0.
inline Floats exponential(Floats x) {
  Ints vanishes = x < all(-87.0f);
  x = (Floats)((Ints)x & ~vanishes);
  Floats n = x * 1.44269504f;
  n = (n - 12582912.0f) + 12582912.0f;  // to the nearest integer
  Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
  Floats y = all(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  Ints exponent = __builtin_convertvector(n, Ints) << 23;
  return (Floats)(((Ints)y + exponent) & ~vanishes);
}

// e^x - 1 for x >= 0, to a few units of roundoff, near 0 too; from 40 on as at 40.
inline Floats exponential_less_1(Floats x) {
  x = x < all(40.0f) ? x : all(40.0f);
  Floats n = x * 1.44269504f;
  n = (n + 12582912.0f) - 12582912.0f;
  Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = all(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  Floats power = (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
  return power * (y * r) + (power - 1.0f);
}

inline Floats tanh(Floats x) {
  const Ints sign = (Ints)x & std::numeric_limits<int32_t>::min();
  Floats e = exponential_less_1((Floats)((Ints)x ^ sign) * 2.0f);
  return (Floats)((Ints)(e / (e + 2.0f)) | sign);
}

// As in helix_gpu/attention/native/__init__.py.
struct Sizes {
  int64_t rows, width, q_heads, kv_heads, group, key_dim, value_dim, tokens_per_block;
  int64_t page_stride, part_stride, token_stride;  // in elements
  float scale, softcap;                            // no cap where it is 0
};

#ifdef __AVX512BF16__
inline __m512bh load_pairs(const BFloat16* from) {
  __m512bh x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

// Adds the products of two neighbours to each lane.
inline Floats multiply_add(Floats sum, __m512bh a, __m512bh b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, a, b);
}
#endif

// Scores of `heads` query heads that share a key.
template <int heads, typename Q, typename T>
inline void scores(const Q* q, const T* key, int64_t dim, float* to) {
  Floats dot[heads] = {};
  int64_t d = 0;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<Q, BFloat16>) {
    for (; d + 2 * LANES <= dim; d += 2 * LANES) {
      const __m512bh k = load_pairs(key + d);
      for (int i = 0; i < heads; i++) dot[i] = multiply_add(dot[i], load_pairs(q + i * dim + d), k);
    }
  }
#endif
  for (; d < dim; d += LANES) {
    const Floats k = load(key + d);
    for (int i = 0; i < heads; i++) dot[i] += k * load(q + i * dim + d);
  }
  sums(dot, to, LANES);
}

// All heads' scores for a token: K is read front to back while V is fetched ahead.
template <typename Q, typename T>
inline void score_token(const Sizes& s, const Q* q, const T* key, const T* value, float* to) {
  for (int64_t h = 0; h < s.kv_heads; h++, key += s.key_dim, value += s.key_dim) {
    for (int64_t d = 0; d < s.value_dim; d += 64 / sizeof(T)) __builtin_prefetch(value + d);
    int64_t head = h * s.group;
    const int64_t end = head + s.group;
    for (; head + 4 <= end; head += 4)
      scores<4>(q + head * s.key_dim, key, s.key_dim, to + head * LANES);
    for (; head < end; head++)
      scores<1>(q + head * s.key_dim, key, s.key_dim, to + head * LANES);
  }
}

// Adds to `width` elements of the outputs of `heads` query heads their weighted values.
template <int heads, int width, typename T>
inline void weigh(const float* weights, const T* const* values, int64_t offset, int tokens,
                  int64_t dim, float* output) {
  constexpr int vectors = width / LANES;
  Floats total[heads][vectors];
  for (int i = 0; i < heads; i++)
    for (int j = 0; j < vectors; j++) total[i][j] = load(output + i * dim + j * LANES);
  for (int t = 0; t < tokens; t++) {
    Floats v[vectors];
    for (int j = 0; j < vectors; j++) v[j] = load(values[t] + offset + j * LANES);
    for (int i = 0; i < heads; i++)
      for (int j = 0; j < vectors; j++) total[i][j] += weights[i * LANES + t] * v[j];
  }
  for (int i = 0; i < heads; i++)
    for (int j = 0; j < vectors; j++) store(output + i * dim + j * LANES, total[i][j]);
}

// The same for all elements of the values.
template <int heads, typename T>
inline void weigh_all(const float* weights, const T* const* values, int64_t offset, int tokens,
                      int64_t dim, float* output) {
  int64_t d = 0;
  for (; d + 4 * LANES <= dim; d += 4 * LANES)
    weigh<heads, 4 * LANES>(weights, values, offset + d, tokens, dim, output + d);
  for (; d < dim; d += LANES)
    weigh<heads, LANES>(weights, values, offset + d, tokens, dim, output + d);
}

// One piece of one row: sums relative to the largest score, per query head.
template <typename Q, typename T>
void attend(const Sizes& s, const Q* q, const T* pages, const int64_t* table,
            int64_t first, int64_t last, float* output, float* most, float* total) {
  std::vector<float> weights(s.q_heads * LANES, NONE);
  std::fill_n(output, s.q_heads * s.value_dim, 0.0f);
  std::fill_n(most, s.q_heads, NONE);
  std::fill_n(total, s.q_heads, 0.0f);
  for (int64_t from = first; from < last; from += LANES) {
    const int tokens = std::min<int64_t>(LANES, last - from);
    const T* keys[LANES];
    const T* values[LANES];
    for (int t = 0; t < tokens; t++) {
      const int64_t slot = from + t;
      keys[t] = pages + table[slot / s.tokens_per_block] * s.page_stride +
                slot % s.tokens_per_block * s.token_stride;
      values[t] = keys[t] + s.part_stride;
    }
    for (int t = 0; t < tokens; t++) score_token(s, q, keys[t], values[t], &weights[t]);
    for (int64_t h = 0; h < s.q_heads; h++) {
      float* mine = &weights[h * LANES];
      Floats x = load(mine) * s.scale;
      if (s.softcap != 0) x = s.softcap * tanh(x / s.softcap);
      for (int t = tokens; t < LANES; t++) x[t] = NONE;
      const float now = std::max(most[h], largest(x));
      if (now > most[h]) {
        const float shrunk = std::exp(most[h] - now);
        total[h] *= shrunk;
        for (int64_t d = 0; d < s.value_dim; d++) output[h * s.value_dim + d] *= shrunk;
        most[h] = now;
      }
      Floats p = exponential(x - now);
      total[h] += sum(p);
      store(mine, p);
    }
    for (int64_t h = 0; h < s.kv_heads; h++) {
      const int64_t offset = h * s.key_dim;
      int64_t g = 0;
      auto mine = [&] { return &weights[(h * s.group + g) * LANES]; };
      auto to = [&] { return output + (h * s.group + g) * s.value_dim; };
      for (; g + 4 <= s.group; g += 4)
        weigh_all<4>(mine(), values, offset, tokens, s.value_dim, to());
      for (; g < s.group; g++) weigh_all<1>(mine(), values, offset, tokens, s.value_dim, to());
    }
  }
}

template <typename Q, typename T>
void attend_rows(const Sizes& s, const Q* q, const T* pages, const int64_t* tables,
                 const int64_t* starts, const int64_t* lengths, float* output, float* lse) {
  struct Piece {
    int64_t row, first, last;
  };
  std::vector<Piece> pieces;
  std::vector<int64_t> begins;
  for (int64_t row = 0; row < s.rows; row++) {
    begins.push_back(pieces.size());
    for (int64_t first = starts[row]; first < lengths[row]; first += PIECE)
      pieces.push_back({row, first, std::min(first + PIECE, lengths[row])});
  }
  begins.push_back(pieces.size());
  const int64_t heads = s.q_heads, dim = s.value_dim;
  std::vector<float> part(pieces.size() * heads * dim);
  std::vector<float> most(pieces.size() * heads), total(pieces.size() * heads);
  std::atomic<int64_t> next = 0;  // a thread that is held up does not hold up the others
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < (int64_t)pieces.size();)
      attend(s, q + pieces[i].row * heads * s.key_dim, pages,
             tables + pieces[i].row * s.width, pieces[i].first, pieces[i].last,
             &part[i * heads * dim], &most[i * heads], &total[i * heads]);
  });
  for (int64_t row = 0; row < s.rows; row++) {
    for (int64_t h = 0; h < heads; h++) {
      float top = NONE, sum = 0;
      for (int64_t i = begins[row]; i < begins[row + 1]; i++)
        top = std::max(top, most[i * heads + h]);
      float* to = output + (row * heads + h) * dim;
      std::fill_n(to, dim, 0.0f);
      for (int64_t i = begins[row]; i < begins[row + 1]; i++) {
        const float share = std::exp(most[i * heads + h] - top);
        sum += share * total[i * heads + h];
        const float* from = &part[(i * heads + h) * dim];
        for (int64_t d = 0; d < dim; d++) to[d] += share * from[d];
      }
      lse[row * heads + h] = sum > 0 ? top + std::log(sum) : NONE;
      if (sum > 0)
        for (int64_t d = 0; d < dim; d++) to[d] /= sum;
    }
  }
}

}  // namespace

// Sizes, types and layout are checked by the caller; a name for each type of query and cache.
#define ATTEND_PAGES(name, Q, T)                                                               \
  extern "C" void name(const Sizes* s, const void* q, const void* pages,                       \
                       const int64_t* tables, const int64_t* starts, const int64_t* lengths,   \
                       float* output, float* lse) {                                            \
    attend_rows(*s, (const Q*)q, (const T*)pages, tables, starts, lengths, output, lse);       \
  }
ATTEND_PAGES(attend_float32, float, float)
ATTEND_PAGES(attend_bfloat16, float, BFloat16)
ATTEND_PAGES(attend_bfloat16_alike, BFloat16, BFloat16)
ATTEND_PAGES(attend_float16, float, _Float16)
