// The first-order meta-step of a batch of tasks on the cores of a CPU.
//
// Samples are rows. A layer in the dual form never builds a task's weights: of its history of inputs X and of gradients
// D times minus the learning rate, (H X^T) D is what they would add to the product of the shared ones. In the primal
// form they are built from the first step on. What a few tasks need stays in the cache of the core that has them.
#include <omp.h>

#include <atomic>
#include <vector>

#include "worker.h"

extern "C" {

// Bytes that a step works in; of the tensors no more is asked than which there are.
int64_t scratch_size(const Plan* plan, void* const* tensors) {
  const Step s(*plan, tensors, 1.0f);
  Arena arena{nullptr};
  Shared shared(s, arena);
  for (long i = 0; i < s.threads; i++) Worker(s, shared, arena);
  return arena.used;
}

void run_step(const Plan* plan, void* const* tensors, float share, char* scratch) {
  const Step s(*plan, tensors, share);
  Arena arena{scratch};
  Shared shared(s, arena);
  long blocks = (s.tasks + s.block - 1) / s.block;
  std::atomic<long> next{0};
  std::vector<Worker*> workers;
  for (long i = 0; i < s.threads; i++) workers.push_back(new Worker(s, shared, arena));
#pragma omp parallel num_threads(s.threads)
  {
    long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    shared.pack(s, thread, threads);
#pragma omp barrier
    // Where each thread sums the gradients of its tasks, which tasks these are must not depend on who is faster.
    auto turn = [&](long b) { return s.gathers ? next++ : b; };
    long end = s.gathers ? blocks : blocks * (thread + 1) / threads;
    for (long b = turn(blocks * thread / threads); b < end; b = turn(b + 1)) {
      long start = b * s.block;
      workers[thread]->run(start, std::min(s.block, s.tasks - start));
    }
#pragma omp barrier
    for (long l = s.lowest, panel = 0; l < s.depth; l++) {
      const Layer& of = s.layers[l];
      if (!s.gathers) {
        Worker::reduce(s, workers.data(), workers.size(), l, of.out * thread / threads, of.out * (thread + 1) / threads);
        continue;
      }
      for (long column = 0; column < of.in; column += PANEL, panel++)
        if (panel % threads == thread) workers[thread]->gather(l, column);
    }
  }
  double value = 0.0;
  for (long t = 0; t < s.tasks; t++) value += (double)shared.losses[t] * (s.shares ? s.shares[t] : s.share);
  *s.value = value;
  for (Worker* worker : workers) delete worker;
}
}
