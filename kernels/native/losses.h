// Losses of one sample: its value, and the gradient with respect to the outputs in place of them.
#pragma once

#include "vectors.h"

enum LossKind { MSE, L1, HUBER, CROSS_ENTROPY, BCE_WITH_LOGITS };  // in the order of `problem.LOSSES`

struct Loss {
  int kind;
  float delta, smoothing;
};

// The target is a class for cross-entropy, else `n` values. Behind its n numbers `d` gets zeros, for a vector.
// share: what the sample counts of its task's loss.  cotangent: of the task's loss.
static inline float sample_loss(Loss loss, const float* z, const void* target, long n, float share, float cotangent,
                                float* d) {
  float value = 0.0f, each = share / n;
  if (loss.kind == CROSS_ENTROPY) {
    float largest = z[0], sum = 0.0f, mean = 0.0f;
    for (long j = 1; j < n; j++) largest = z[j] > largest || z[j] != z[j] ? z[j] : largest;
    for (long j = 0; j < n; j += LANES) store(d + j, exponential(load_first(z + j, n - j) - largest));
    for (long j = 0; j < n; j++) sum += d[j], mean += z[j] - largest;
    long own = *(const int64_t*)target;
    float keep = 1.0f - loss.smoothing, spread = loss.smoothing / n, log_sum = std::log(sum);
    value = log_sum - keep * (z[own] - largest) - spread * mean;
    for (long j = n; j % LANES; j++) d[j] = 0.0f;
    for (long j = 0; j < n; j++) d[j] = share * cotangent * (d[j] / sum - (j == own ? keep + spread : spread));
    value *= share;
  } else {
    const float* y = (const float*)target;
    for (long j = 0; j < n; j += LANES) {
      vec of = load_first(z + j, n - j), to = load_first(y + j, n - j), e = of - to, v, g;
      if (loss.kind == MSE) {
        v = e * e, g = 2.0f * e;
      } else if (loss.kind == L1) {
        v = magnitude(e), g = e > 0.0f ? all(1.0f) : e < 0.0f ? all(-1.0f) : e;
      } else if (loss.kind == HUBER) {
        vec size = magnitude(e);
        v = size <= loss.delta ? 0.5f * e * e : loss.delta * (size - 0.5f * loss.delta);
        g = size <= loss.delta ? e : e > 0.0f ? all(loss.delta) : e < 0.0f ? all(-loss.delta) : e;
      } else {
        v = larger(of, vec{}) - of * to + log_one_plus(exponential(-magnitude(of))), g = logistic(of) - to;
      }
      store(d + j, first(n - j, g * (each * cotangent)));
      for (long i = 0; i < LANES && j + i < n; i++) value += v[i];
    }
    value *= each;
  }
  return value;
}
