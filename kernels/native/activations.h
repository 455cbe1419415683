// Activations: of pre-activations z the output and the derivative, both at once.
#pragma once

#include "vectors.h"

enum Activation {  // in the order of `engines.native.ACTIVATIONS`
  IDENTITY, RELU, LEAKY_RELU, ELU, GELU, GELU_TANH, SILU, TANH, SIGMOID, SOFTPLUS, SINE
};

template <int KIND>
static inline vec activate(vec z, float p0, float p1, vec& slope) {
  const vec one = all(1.0f), zero{};
  if constexpr (KIND == RELU) {
    slope = z <= 0.0f ? zero : one;  // as torch has it: where the output is nan, the gradient goes on
    return z <= 0.0f ? zero : z;
  } else if constexpr (KIND == LEAKY_RELU) {
    slope = z > 0.0f ? one : all(p0);
    return z * slope;
  } else if constexpr (KIND == ELU) {
    vec below = smaller(z, zero);
    slope = z > 0.0f ? one : p0 * exponential(below);
    return z > 0.0f ? z : p0 * expm1(below);
  } else if constexpr (KIND == GELU) {
    vec share = normal(z);
    slope = share + z * (0.3989422804014327f * exponential(-0.5f * z * z));
    return z * share;
  } else if constexpr (KIND == GELU_TANH) {
    vec s = logistic(1.5957691216057308f * (z + 0.044715f * z * z * z));
    slope = s + z * s * (1.0f - s) * (1.5957691216057308f * (1.0f + 0.134145f * z * z));
    return z * s;
  } else if constexpr (KIND == SILU) {
    vec s = logistic(z);
    slope = s * (1.0f + z * (1.0f - s));
    return z * s;
  } else if constexpr (KIND == TANH) {
    vec h = hyperbolic_tangent(z);
    slope = 1.0f - h * h;
    return h;
  } else if constexpr (KIND == SIGMOID) {
    vec h = logistic(z);
    slope = h * (1.0f - h);
    return h;
  } else if constexpr (KIND == SOFTPLUS) {
    vec x = z * p0, soft = larger(x, zero) + log_one_plus(exponential(-magnitude(x)));
    slope = x > p1 ? one : logistic(x);
    return x > p1 ? z : soft / p0;
  } else if constexpr (KIND == SINE) {
    vec sine, cosine;
    sine_and_cosine(z * p0, sine, cosine);
    slope = p0 * cosine;
    return sine;
  } else {
    slope = one;
    return z;
  }
}

// Pre-activations without their bias [rows, columns] become outputs, and `slopes` their derivatives; both are padded.
template <int KIND>
static void run(long rows, long columns, float* z, long ld, const float* bias, float* slopes, float p0, float p1) {
  for (long i = 0; i < rows; i++)
    for (long j = 0; j < columns; j += LANES) {
      vec slope, of = load(z + i * ld + j);
      store(z + i * ld + j, activate<KIND>(bias ? of + load(bias + j) : of, p0, p1, slope));
      store(slopes + i * ld + j, slope);
    }
}

typedef void (*Run)(long, long, float*, long, const float*, float*, float, float);
static const Run RUN[] = {run<IDENTITY>, run<RELU>, run<LEAKY_RELU>, run<ELU>, run<GELU>, run<GELU_TANH>,
                          run<SILU>, run<TANH>, run<SIGMOID>, run<SOFTPLUS>, run<SINE>};
