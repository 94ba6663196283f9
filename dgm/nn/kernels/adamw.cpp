// The optimizer step on a CPU in as few passes through memory as possible: the norm of the gradient,
// then AdamW fused with the moving average; adamw.py has the equations. Tensors are dense float32;
// a weight and its gradient, moments and average have equal strides. The order of every sum is
// independent of the number of threads.

#include <ATen/Parallel.h>
#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr long PART = 16384;  // elements that a thread processes at once
constexpr long LANES = 64;    // partial sums

struct Part {
  long tensor, start, size;
};

std::vector<Part> split(long count, const long* sizes) {
  std::vector<Part> parts;
  for (long tensor = 0; tensor < count; tensor++)
    for (long start = 0; start < sizes[tensor]; start += PART)
      parts.push_back({tensor, start, std::min(PART, sizes[tensor] - start)});
  return parts;
}

double sum_of_squares(const float* x, long size) {
  float lanes[LANES] = {};
  long whole = size / LANES * LANES;
  for (long i = 0; i < whole; i += LANES)
    for (long lane = 0; lane < LANES; lane++) lanes[lane] += x[i + lane] * x[i + lane];
  double sum = 0;
  for (float lane : lanes) sum += lane;
  for (long i = whole; i < size; i++) sum += double(x[i]) * x[i];
  return sum;
}

}  // namespace

extern "C" void gradient_norm(long count, const long* sizes, float* const* grads, float* norm) {
  std::vector<Part> parts = split(count, sizes);
  std::vector<double> sums(parts.size());
  at::parallel_for(0, parts.size(), 1, [&](long from, long to) {
    for (long i = from; i < to; i++)
      sums[i] = sum_of_squares(grads[parts[i].tensor] + parts[i].start, parts[i].size);
  });
  double sum = 0;
  for (double part : sums) sum += part;
  *norm = std::sqrt(sum);
}

// `steps` holds three floats per weight: lr / (1 - beta1^t), sqrt(1 - beta2^t), and the factor
// 1 - lr weight_decay (1 without decay). `averages` is null if no moving average is kept.
extern "C" void adamw(long count, const long* sizes, float* const* weights, float* const* grads,
                      float* const* exp_avgs, float* const* exp_avg_sqs, float* const* averages,
                      const float* steps, float one_minus_beta1, float beta2, float one_minus_beta2,
                      float eps, float ema_weight) {
  std::vector<Part> parts = split(count, sizes);
  at::parallel_for(0, parts.size(), 1, [&](long from, long to) {
    for (long k = from; k < to; k++) {
      const Part& part = parts[k];
      float* __restrict weight = weights[part.tensor] + part.start;
      const float* __restrict grad = grads[part.tensor] + part.start;
      float* __restrict m = exp_avgs[part.tensor] + part.start;
      float* __restrict v = exp_avg_sqs[part.tensor] + part.start;
      const float* step = steps + 3 * part.tensor;
      const float step_size = step[0], root = step[1], decay = step[2];
#pragma GCC ivdep
      for (long i = 0; i < part.size; i++) {
        m[i] += one_minus_beta1 * (grad[i] - m[i]);
        v[i] = beta2 * v[i] + one_minus_beta2 * grad[i] * grad[i];
        weight[i] = weight[i] * decay - step_size * m[i] / (std::sqrt(v[i]) / root + eps);
      }
      if (!averages) continue;
      // The new weights are still cached.
      float* __restrict average = averages[part.tensor] + part.start;
#pragma GCC ivdep
      for (long i = 0; i < part.size; i++) average[i] += ema_weight * (weight[i] - average[i]);
    }
  });
}
