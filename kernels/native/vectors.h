// Vectors of float32 as the compiler has them on every processor, and the functions that activations are made of.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

// Lanes of a vector register, and how many registers there are for a product's sums and operands.
#if defined(__AVX512F__)
constexpr int LANES = 16, PANEL = 64;
#elif defined(__AVX__)
constexpr int LANES = 8, PANEL = 16;
#else
constexpr int LANES = 4, PANEL = 16;
#endif
constexpr int PAD = 16;  // rows of matrices are padded to as many numbers with zeros

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

constexpr long padded(long n) { return (n + PAD - 1) / PAD * PAD; }

static inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
static inline vec all(float x) { return x - vec{}; }
static inline vec bits(ints v) { return (vec)v; }

// All bits of the first n lanes, n < LANES.
static inline ints before(long n) {
  ints lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  return lane < (int32_t)n;
}

// The first n of them, and zeros.
static inline vec load_first(const float* p, long n) {
  if (n >= LANES) return load(p);
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps((1u << n) - 1, p);
#elif defined(__AVX__)
  return _mm256_maskload_ps(p, (__m256i)before(n));
#else
  vec v{};
  for (long i = 0; i < n; i++) v[i] = p[i];
  return v;
#endif
}

// Its first n numbers, and zeros.
static inline vec first(long n, vec v) { return n >= LANES ? v : before(n) ? v : vec{}; }

static inline vec smaller(vec a, vec b) { return b < a ? b : a; }  // of (a, b); a where one is nan
static inline vec larger(vec a, vec b) { return b > a ? b : a; }
static inline vec magnitude(vec x) { return bits((ints)x & 0x7fffffff); }

// The nearest whole number, for |x| < 2^22: what the sum loses is what lies behind the point.
static inline vec nearest(vec x) { return (x + 12582912.0f) - 12582912.0f; }

// exp(x) to 2 units in the last place: x = n log(2) + r, and of r a polynomial (Cephes).
static inline vec exponential(vec x) {
  x = smaller(larger(x, all(-104.0f)), all(89.0f));
  vec n = nearest(x * 1.44269504f);
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  ints whole = __builtin_convertvector(n, ints), half = whole >> 1;  // in two factors, for 2^128 is none
  return p * bits((half + 127) << 23) * bits((whole - half + 127) << 23);
}

// log(1 + x) for 0 <= x <= 1 (Cephes, and Kahan for what 1 + x loses of x).
static inline vec log_one_plus(vec x) {
  vec u = 1.0f + x;
  auto upper = u > 1.41421356f;
  vec f = (upper ? 0.5f * u : u) - 1.0f;
  vec p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  vec log_u = f + (f * f * f * p - 0.5f * f * f) + (upper ? all(0.693147181f) : vec{});
  return u == 1.0f ? x : log_u * (x / (u - 1.0f));
}

static inline vec expm1(vec x) {
  vec series = x * (1.0f + x * (0.5f + x * (1.0f / 6 + x * (1.0f / 24 + x * (1.0f / 120)))));
  return magnitude(x) < 0.1f ? series : exponential(x) - 1.0f;
}

static inline vec logistic(vec x) { return 1.0f / (1.0f + exponential(-x)); }

static inline vec hyperbolic_tangent(vec x) {
  vec x2 = x * x;  // near 0 the quotient cancels, where the series has the digits
  vec series = x * (1.0f + x2 * (-1.0f / 3 + x2 * (2.0f / 15 + x2 * (-17.0f / 315))));
  return magnitude(x) < 0.15f ? series : 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
}

// sin(x) and cos(x): the nearest multiple of pi is taken off in three parts (Cody and Waite 1980), which holds up to
// |x| of some thousands; of what is left, polynomials.
static inline void sine_and_cosine(vec x, vec& sine, vec& cosine) {
  vec k = nearest(x * 0.3183098861837907f);
  vec r = x - k * 3.140625f;
  r -= k * 9.67502593994140625e-4f;
  r -= k * 1.509957990978376432e-7f;
  vec r2 = r * r;
  vec s = r + r * r2 * (-0.16666659550388593f +
                        r2 * (8.333066245278211e-3f + r2 * (-1.9809602851865332e-4f + r2 * 2.6057805405205964e-6f)));
  vec c = 1.0f + r2 * (-0.5f + r2 * (1.0f / 24 + r2 * (-1.0f / 720 + r2 * (1.0f / 40320 + r2 * (-1.0f / 3628800 +
                       r2 * (1.0f / 479001600))))));
  ints odd = __builtin_convertvector(k, ints) << 31;  // every other multiple turns the sign
  sine = bits((ints)s ^ odd);
  cosine = bits((ints)c ^ odd);
}

// The normal distribution up to x, to 1.2e-7 of itself (Numerical Recipes, erfc by Chebyshev).
static inline vec normal(vec x) {
  vec z = magnitude(x) * 0.70710678f, t = 1.0f / (1.0f + 0.5f * z);
  vec p = 0.17087277f * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  vec tail = 0.5f * t * exponential(p * t - 1.26551223f - z * z);
  return x > 0.0f ? 1.0f - tail : tail;
}
