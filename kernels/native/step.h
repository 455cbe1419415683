// What a caller hands over: structures that `engines/native.py` has in Python too, and where the tensors of a call are.
#pragma once

#include "losses.h"

extern "C" {

struct Layer {
  int64_t in, out;
  int32_t dual, moves_weight, moves_bias, activation;
  float p0, p1;  // of the activation
};

// What is the same at every call.
struct Plan {
  int64_t tasks, shots, queries, depth, steps;
  int64_t first;    // layer that moves, or `depth`; below it support features stay the same at every step
  int64_t lowest;   // layer that a gradient of the query loss is asked of, or `depth`
  int64_t block;    // tasks that a thread takes at a time
  int64_t rows;     // samples of each of them that it takes at a time
  int64_t threads;
  int64_t gathers;  // whether the outer gradient is taken of all tasks' query samples at once, behind the last one
  const Layer* layers;
  const float* rates;  // [steps, depth]
  Loss loss, outer_loss;
};
}

struct Samples {
  long samples;
  const float* x;       // [tasks, samples, in]
  const void* y;        // classes [tasks, samples] or values [tasks, samples, out]
  const float* weight;  // [tasks, samples], or missing
};

// A call: the plan, and where the tensors are, in the order of what is filled here.
struct Step : Plan {
  Samples support, query;
  const float* shares;             // what each task counts [tasks]; missing where all count `share`
  const float* const* parameters;  // of each layer the weight [out, in] and the bias [out], which may be missing
  float* const* gradients;         // alike; missing where they are not asked for
  float* value;                    // the tasks' losses times what they count, summed
  float* features;                 // the gradient of the query features; missing where it is not asked for
  float share;

  Step(const Plan& plan, void* const* at, float share)
      : Plan(plan),
        support{shots, (const float*)at[0], at[1], (const float*)at[2]},
        query{queries, (const float*)at[3], at[4], (const float*)at[5]},
        shares((const float*)at[6]),
        parameters((const float* const*)at + 7),
        gradients((float* const*)at + 7 + 2 * depth),
        value((float*)at[7 + 4 * depth]),
        features((float*)at[8 + 4 * depth]),
        share(share) {}

  const float* weight(long l) const { return parameters[2 * l]; }
  const float* bias(long l) const { return parameters[2 * l + 1]; }
  float* weight_gradient(long l) const { return gradients[2 * l]; }
  float* bias_gradient(long l) const { return gradients[2 * l + 1]; }
};

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
