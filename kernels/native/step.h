// What a caller hands over; `engines/native.py` has the same structures in Python.
#pragma once

#include "losses.h"

extern "C" {

struct Layer {
  int64_t in, out;
  int32_t dual, moves_weight, moves_bias, activation;
  float p0, p1;  // of the activation
};

struct Samples {
  int64_t samples;
  const float* x;       // [tasks, samples, in]
  const void* y;        // classes [tasks, samples] or values [tasks, samples, out]
  const float* weight;  // [tasks, samples], or missing
};

struct Step {
  int64_t tasks, depth, steps;
  int64_t first;    // layer that moves, or `depth`; below it support features stay the same at every step
  int64_t lowest;   // layer that a gradient of the query loss is asked of, or `depth`
  int64_t block;    // tasks that a thread takes at a time
  int64_t rows;     // samples of each of them that it takes at a time
  int64_t threads;
  int64_t gathers;  // whether the outer gradient is taken of all tasks' query samples at once, behind the last one
  const Layer* layers;
  const float* const* parameters;  // of each layer the weight [out, in] and the bias [out], which may be missing
  float* const* gradients;         // alike; missing where they are not asked for
  const float* rates;  // [steps, depth]
  Loss loss, outer_loss;
  Samples support, query;
  const float* shares;  // what each task counts [tasks]; missing where all count `share`
  float share;
  float* value;     // the tasks' losses times what they count, summed
  float* features;  // the gradient of the query features [tasks, samples, in]; missing where it is not asked for

  const float* weight(long l) const { return parameters[2 * l]; }
  const float* bias(long l) const { return parameters[2 * l + 1]; }
  float* weight_gradient(long l) const { return gradients[2 * l]; }
  float* bias_gradient(long l) const { return gradients[2 * l + 1]; }
};
}

// Takes memory piece by piece; without any, it counts how much there should be.
struct Arena {
  char* memory;
  size_t used = 0;

  float* take(long numbers) {
    float* p = memory ? (float*)(memory + used) : nullptr;
    used += (numbers * sizeof(float) + 63) / 64 * 64;
    return p;
  }
};
