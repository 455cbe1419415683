// A thread's part of a meta-step: a few tasks at a time through all inner steps, the query pass and back.
#pragma once

#include <algorithm>

#include "activations.h"
#include "products.h"
#include "step.h"

constexpr int DEEPEST = 64;  // layers that a network may have
constexpr long CACHED = 96;  // samples of a panel that stay in a core's innermost cache

// Rows of a power of two would all fall on a few sets of the cache.
static long row_size(long columns) { return padded(columns) + PAD; }

// What there is, and one vector of each of some rows.
static vec plus_rows(vec total, const float* p, long rows, long ld) {
  for (long i = 0; i < rows; i++) total += load(p + i * ld);
  return total;
}

// What all threads read: the weights as products take them, and each task's loss; what the query pass of all tasks left.
struct Shared {
  Target forward[DEEPEST], backward[DEEPEST];  // [in, out] and [out, in], packed
  float* bias[DEEPEST];                        // padded; missing where there is none
  float* losses;                               // [tasks]
  float *h[DEEPEST], *d[DEEPEST];  // inputs of layers, and gradients with respect to pre-activations [tasks, samples, *]

  Shared(const Step& s, Arena& arena) {
    for (long l = 0; l < s.depth; l++) {
      const Layer& of = s.layers[l];
      forward[l] = packed(arena.take(packed_size(of.in, of.out)), of.in, of.out);
      backward[l] = packed(arena.take(packed_size(of.out, of.in)), of.out, of.in);
      bias[l] = s.bias(l) ? arena.take(padded(of.out)) : nullptr;
      bool gathers = s.gathers && l >= s.lowest;
      h[l] = gathers ? arena.take(s.tasks * s.query.samples * row_size(of.in)) : nullptr;
      d[l] = gathers ? arena.take(s.tasks * s.query.samples * row_size(of.out)) : nullptr;
    }
    losses = arena.take(s.tasks);
  }

  // Pack the layers whose turn it is of one of the threads.
  void pack(const Step& s, long thread, long threads) const {
    for (long l = 0, turn = 0; l < s.depth; l++) {
      const Layer& of = s.layers[l];
      for (long start = 0; start < of.out; start += PANEL, turn++)
        if (turn % threads == thread)
          transpose(std::min<long>(PANEL, of.out - start), of.in, Right(s.weight(l) + start * of.in, of.in),
                    Target(forward[l].at(0, start), forward[l].ld));
      if (turn++ % threads != thread) continue;
      bool below = l > std::min(s.lowest, s.first) || s.features;
      for (long i = 0; below && i < of.out; i++)
        for (long j = 0; j < of.in; j += LANES) store(backward[l].at(i, j), load_first(s.weight(l) + i * of.in + j, of.in - j));
      for (long j = 0; bias[l] && j < of.out; j += LANES) store(bias[l] + j, load_first(s.bias(l) + j, of.out - j));
    }
  }
};

class Worker {
 public:
  Worker(const Step& s, const Shared& shared, Arena& arena) : s(s), shared(shared) {
    long most = 0, largest = 0, rows = s.block * std::max(least(s.support), least(s.query));
    own_h[0] = arena.take(rows * row_size(s.layers[0].in));
    for (long l = 0; l < s.depth; l++) {
      const Layer& of = s.layers[l];
      Own& own = this->own[l];
      own.in = row_size(of.in), own.out = row_size(of.out);
      most = std::max({most, own.in, own.out});
      own_h[l + 1] = arena.take(rows * own.out);
      own.slopes = arena.take(rows * own.out);
      if (of.moves_bias) own.bias = arena.take(s.block * own.out), own.bias_sum = arena.take(s.block * own.out);
      if (of.moves_weight && of.dual) {
        own.history = l == s.first ? s.support.samples : s.support.samples * s.steps;
        own.past = row_size(own.history);
        if (l == s.first) own.base = arena.take(rows * own.out), own.gram = arena.take(rows * own.past);
        own.x = arena.take(s.block * own.history * own.in), own.d = arena.take(s.block * own.history * own.out);
        largest = std::max(largest, std::max(least(s.support), least(s.query)) * own.past);
      } else if (of.moves_weight) {
        own.size = packed_size(of.in, of.out);
        own.weight = arena.take(s.block * own.size);
        if (several()) own.sum = arena.take(s.block * own.size);
        own.turned = arena.take(s.block * packed_size(of.out, of.in));
      }
      if (s.gathers) continue;
      if (s.weight_gradient(l)) own.weight_gradient = arena.take(of.out * own.in);
      if (s.bias_gradient(l)) own.bias_gradient = arena.take(own.out);
    }
    d = arena.take(rows * most), next = arena.take(rows * most), scratch = arena.take(largest);
    panel = s.gathers ? arena.take(most * PANEL) : nullptr;
  }

  // Some tasks from the first: their losses, and what they add to the gradients.
  void run(long start, long count) {
    task = start, tasks = count;
    std::copy(own_h, own_h + s.depth + 1, h);
    for (step = 0; step < s.steps && s.first < s.depth; step++)
      for (long i = 0; i < s.support.samples; i += rows) {
        rows = std::min(s.support.samples - i, s.rows);
        inner_step(i);
      }
    for (long t = 0; t < tasks; t++) shared.losses[task + t] = 0.0f;
    for (long l = s.lowest; s.gathers && l < s.depth; l++) h[l] = shared.h[l] + start * s.query.samples * own[l].in;
    for (long i = 0; i < s.query.samples; i += rows) {
      rows = std::min(s.query.samples - i, s.rows);
      query_pass(i);
    }
  }

  // Of a layer's gradient a panel of columns, from what the query pass of all tasks left: of D^T H.
  void gather(long l, long column) const {
    float *weights = s.weight_gradient(l), *biases = s.bias_gradient(l);
    long in = s.layers[l].in, out = s.layers[l].out, columns = std::min<long>(PANEL, in - column);
    long samples = s.tasks * s.query.samples, parts = (samples + CACHED - 1) / CACHED;
    const float *d = shared.d[l], *h = shared.h[l] + column;
    Target sum(panel, PANEL);
    for (long part = 0; weights && part < parts; part++) {
      long k = samples * part / parts, end = samples * (part + 1) / parts;
      product(out, columns, end - k, {d + k * own[l].out, 1, own[l].out}, Right(h + k * own[l].in, own[l].in),
              part ? Right(sum) : NOTHING, sum);
    }
    for (long i = 0; weights && i < out; i++)
      std::memcpy(weights + i * in + column, sum.at(i, 0), columns * sizeof(float));
    for (long j = 0; biases && column == 0 && j < out; j += LANES) {
      vec total = plus_rows(vec{}, d + j, samples, own[l].out);
      std::memcpy(biases + j, &total, sizeof(float) * std::min<long>(LANES, out - j));
    }
  }

  // The same where each worker has the sum of its own tasks: of all workers', in their order.
  static void reduce(const Step& s, const Worker* const* workers, long count, long l, long start, long end) {
    float *weights = s.weight_gradient(l), *biases = s.bias_gradient(l);
    long in = s.layers[l].in;
    for (long i = start; i < end; i++) {
      if (biases) {
        float sum = 0.0f;
        for (long w = 0; w < count; w++)
          if (!workers[w]->fresh) sum += workers[w]->own[l].bias_gradient[i];
        biases[i] = sum;
      }
      for (long j = 0; weights && j < in; j += LANES) {
        vec sum{};
        for (long w = 0; w < count; w++)
          if (!workers[w]->fresh) sum += load(workers[w]->own[l].weight_gradient + i * workers[w]->own[l].in + j);
        std::memcpy(weights + i * in + j, &sum, sizeof(float) * std::min<long>(LANES, in - j));
      }
    }
  }

 private:
  struct Own {
    long in, out, past, history, size;    // of rows of features in and out, and of a history; its samples; of weights
    float* slopes;                        // of the activation [rows, out]
    float *base, *gram;                   // of the first dual layer: H W^T [rows, out], and X X^T [rows, history]
    float *x, *d;                         // of dual layers: the history [tasks, history, in or out]
    float *weight, *turned, *sum;         // of primal ones: [tasks, in, out] and [tasks, out, in], packed; a step's sum
    float *bias, *bias_sum;               // [tasks, out]
    float *weight_gradient, *bias_gradient;  // of the query loss [out, in] and [out], summed over this thread's tasks
  };

  const Step& s;
  const Shared& shared;
  Own own[DEEPEST] = {};
  float *h[DEEPEST + 1], *own_h[DEEPEST + 1];  // the inputs of each layer [tasks, rows, in], and the outputs
  float *d, *next, *scratch, *panel;           // gradients with respect to what a layer gives, and takes
  long task, tasks, rows, step; // the tasks under way; samples of each; inner steps that are behind them
  bool fresh = true;            // whether gradients have not been summed yet

  long least(const Samples& set) const { return std::min(set.samples, s.rows); }
  bool several() const { return s.support.samples > s.rows; }
  bool collapses(long l) const { return s.layers[l].dual && l == s.first; }  // its inputs are those of every step
  bool moved(long l) const { return step > 0 && s.layers[l].moves_weight; }
  long past(long l) const { return collapses(l) ? own[l].history : step * s.support.samples; }

  void inner_step(long sample) {
    if (step == 0 || several()) {
      read(s.support, sample);
      for (long l = 0; l < s.first; l++) forward(l, false);
    }
    for (long l = s.first; l < s.depth; l++) forward(l, false);
    loss_gradient(s.loss, s.support, sample, nullptr);
    for (long l = s.depth - 1; l >= s.first; l--) {
      pull_back(l, d);
      if (l > s.first) backward(l, d, sample == 0);
      update(l, sample);
      std::swap(d, next);
    }
  }

  void query_pass(long sample) {
    read(s.query, sample);
    for (long l = 0; l < s.depth; l++) forward(l, true);
    loss_gradient(s.outer_loss, s.query, sample, shared.losses);
    for (long l = s.depth - 1; l >= s.lowest; l--) {
      float* e = s.gathers ? shared.d[l] + task * rows * own[l].out : d;
      pull_back(l, e);
      if (!s.gathers) add_gradient(l);
      if (l > s.lowest || s.features) backward(l, e, sample == 0);
      std::swap(d, next);
    }
    fresh = s.lowest == s.depth;
    if (s.features) write_features(sample);
  }

  void read(const Samples& set, long sample) {
    long in = s.layers[0].in, ld = own[0].in;
    for (long t = 0; t < tasks; t++)
      for (long i = 0; i < rows; i++) {
        const float* from = set.x + ((task + t) * set.samples + sample + i) * in;
        for (long j = 0; j < in; j += LANES) store(h[0] + (t * rows + i) * ld + j, load_first(from + j, in - j));
      }
  }

  void write_features(long sample) {
    long in = s.layers[0].in;
    for (long t = 0; t < tasks; t++)
      for (long i = 0; i < rows; i++)
        std::memcpy(s.features + ((task + t) * s.query.samples + sample + i) * in, d + (t * rows + i) * own[0].in,
                    in * sizeof(float));
  }

  // H W^T of one layer's inputs, with the bias through the activation.
  void forward(long l, bool query) {
    const Layer& of = s.layers[l];
    Own& own = this->own[l];
    float* z = h[l + 1];
    bool primal = moved(l) && !of.dual, collapsed = collapses(l) && !query;
    if (collapsed && step == 0) shared_product(l, own.base);
    if (!primal && !collapsed) shared_product(l, z);
    for (long t = 0; t < tasks; t++) {
      Left x{h[l] + t * rows * own.in, own.in, 1};
      Target to(z + t * rows * own.out, own.out);
      if (primal) {
        product(rows, of.out, of.in, x, packed(weight(l, t), of.in, of.out), NOTHING, to);
      } else if (collapsed) {  // G D, where there is a D
        product(rows, of.out, step ? own.history : 0, {own.gram + t * rows * own.past, own.past, 1},
                Right(own.d + t * own.history * own.out, own.out), Right(own.base + t * rows * own.out, own.out), to);
      } else if (moved(l)) {  // (H X^T) D
        dots(rows, past(l), of.in, x.p, own.in, own.x + t * own.history * own.in, own.in, scratch, own.past);
        product(rows, of.out, past(l), {scratch, own.past, 1}, Right(own.d + t * own.history * own.out, own.out), to, to);
      }
      const float* bias = of.moves_bias && step ? own.bias + t * own.out : shared.bias[l];
      RUN[of.activation](rows, of.out, to.p, own.out, bias, own.slopes + t * rows * own.out, of.p0, of.p1);
    }
  }

  void shared_product(long l, float* z) {
    const Layer& of = s.layers[l];
    product(tasks * rows, of.out, of.in, {h[l], own[l].in, 1}, shared.forward[l], NOTHING, Target(z, own[l].out));
  }

  // Losses of outputs, where they are asked for, and in `d` their gradient; without losses, of the support set.
  void loss_gradient(Loss loss, const Samples& set, long sample, float* losses) {
    const Layer& last = s.layers[s.depth - 1];
    long ld = own[s.depth - 1].out, size = loss.kind == CROSS_ENTROPY ? sizeof(int64_t) : last.out * sizeof(float);
    for (long t = 0; t < tasks; t++) {
      float total = 0.0f, cotangent = !losses ? 1.0f : s.shares ? s.shares[task + t] : s.share;
      const float* weight = set.weight ? set.weight + (task + t) * set.samples : nullptr;
      for (long i = 0; weight && i < set.samples; i++) total += weight[i];
      for (long i = 0; i < rows; i++) {
        float share = weight ? weight[sample + i] / total : 1.0f / set.samples;
        const char* target = (const char*)set.y + ((task + t) * set.samples + sample + i) * size;
        long row = (t * rows + i) * ld;
        float value = sample_loss(loss, h[s.depth] + row, target, last.out, share, cotangent, d + row);
        if (losses) losses[task + t] += value;
      }
    }
  }

  // Gradients with respect to a layer's outputs become those with respect to its pre-activations.
  void pull_back(long l, float* e) {
    for (long i = 0; i < tasks * rows; i++)
      for (long j = 0; j < s.layers[l].out; j += LANES) {
        long at = i * own[l].out + j;
        store(e + at, load(d + at) * load(own[l].slopes + at));
      }
  }

  // In `next` the gradients with respect to a layer's inputs, D W.  starts: these are the first samples since W moved.
  void backward(long l, const float* e, bool starts) {
    const Layer& of = s.layers[l];
    Own& own = this->own[l];
    bool primal = moved(l) && !of.dual;
    if (!primal)
      product(tasks * rows, of.in, of.out, {e, own.out, 1}, shared.backward[l], NOTHING, Target(next, own.in));
    for (long t = 0; t < tasks && moved(l); t++) {
      Left of_task{e + t * rows * own.out, own.out, 1};
      Target to(next + t * rows * own.in, own.in);
      if (primal) {
        Target turned = packed(own.turned + t * packed_size(of.out, of.in), of.out, of.in);
        Right own_weight = packed(weight(l, t), of.in, of.out);
        for (long j = 0; starts && j < of.out; j += PANEL)
          transpose(of.in, std::min<long>(PANEL, of.out - j), Right(own_weight.at(0, j), own_weight.ld),
                    Target(turned.at(j, 0), turned.ld, turned.panel));
        product(rows, of.in, of.out, of_task, turned, NOTHING, to);
      } else {  // (D E^T) X, where E is the history
        dots(rows, past(l), of.out, of_task.p, own.out, own.d + t * own.history * own.out, own.out, scratch, own.past);
        product(rows, of.in, past(l), {scratch, own.past, 1}, Right(own.x + t * own.history * own.in, own.in), to, to);
      }
    }
  }

  float* weight(long l, long t) { return own[l].weight + t * own[l].size; }

  // The part of an inner step that some samples have in a layer: `d` is used up.
  void update(long l, long sample) {
    const Layer& of = s.layers[l];
    Own& own = this->own[l];
    float rate = -s.rates[step * s.depth + l];
    for (long i = 0; i < tasks * rows; i++)
      for (long j = 0; j < of.out; j += LANES) store(d + i * own.out + j, rate * load(d + i * own.out + j));
    bool starts = sample == 0, ends = sample + rows == s.support.samples;
    for (long t = 0; t < tasks; t++) {
      const float *x = h[l] + t * rows * own.in, *e = d + t * rows * own.out;
      if (of.moves_bias) move_bias(l, t, e, starts, ends);
      if (of.moves_weight && of.dual) collapses(l) ? sum_history(l, t, x, e) : append(l, t, x, e);
      if (of.moves_weight && !of.dual) move_weight(l, t, x, e, starts, ends);
    }
  }

  void move_bias(long l, long t, const float* e, bool starts, bool ends) {
    Own& own = this->own[l];
    float *sum = own.bias_sum + t * own.out, *bias = own.bias + t * own.out;
    for (long j = 0; j < s.layers[l].out; j += LANES) {
      vec total = plus_rows(starts ? vec{} : load(sum + j), e + j, rows, own.out);
      store(sum + j, total);
      if (ends) store(bias + j, total + load((step ? bias : shared.bias[l]) + j));
    }
  }

  void move_weight(long l, long t, const float* x, const float* e, bool starts, bool ends) {
    const Layer& of = s.layers[l];
    Own& own = this->own[l];
    Target to = packed(weight(l, t), of.in, of.out), before = step ? to : shared.forward[l];
    if (starts && ends) {
      product(of.in, of.out, rows, {x, 1, own.in}, Right(e, own.out), before, to);
      return;
    }
    Target sum = packed(own.sum + t * own.size, of.in, of.out);
    product(of.in, of.out, rows, {x, 1, own.in}, Right(e, own.out), starts ? NOTHING : Right(sum), sum);
    for (long i = 0; ends && i < own.size; i += LANES) store(to.p + i, load(before.p + i) + load(sum.p + i));
  }

  // Add the samples of this step to a task's history.
  void append(long l, long t, const float* x, const float* e) {
    Own& own = this->own[l];
    long at = t * own.history + step * rows;
    std::memcpy(own.x + at * own.in, x, rows * own.in * sizeof(float));
    std::memcpy(own.d + at * own.out, e, rows * own.out * sizeof(float));
  }

  // The same where inputs are those of every step: gradients are summed, and X X^T is known from the first one on.
  void sum_history(long l, long t, const float* x, const float* e) {
    Own& own = this->own[l];
    float* sum = own.d + t * rows * own.out;
    if (step == 0) {
      std::memcpy(own.x + t * rows * own.in, x, rows * own.in * sizeof(float));
      dots(rows, rows, s.layers[l].in, x, own.in, x, own.in, own.gram + t * rows * own.past, own.past);
    }
    for (long i = 0; i < rows * own.out; i += LANES) store(sum + i, step ? load(sum + i) + load(e + i) : load(e + i));
  }

  // Add D^T H of the query samples to the outer gradient.
  void add_gradient(long l) {
    const Layer& of = s.layers[l];
    Own& own = this->own[l];
    if (own.weight_gradient) {
      Target sum(own.weight_gradient, own.in);
      product(of.out, of.in, tasks * rows, {d, 1, own.out}, Right(h[l], own.in), fresh ? NOTHING : Right(sum), sum);
    }
    for (long j = 0; own.bias_gradient && j < of.out; j += LANES) {
      vec before = fresh ? vec{} : load(own.bias_gradient + j);
      store(own.bias_gradient + j, plus_rows(before, d + j, tasks * rows, own.out));
    }
  }
};
