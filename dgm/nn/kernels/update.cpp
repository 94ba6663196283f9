// What happens to the weights after a backward pass, on a CPU, in as few passes through memory as it
// takes: the norm of the gradient, then AdamW and the moving average at once; update.py has the
// equations. Tensors are dense, in float32, those of a weight all laid out alike. Each is cut into
// parts, and each number is worked on alone or summed in an order that no number of threads changes.

#include <ATen/Parallel.h>
#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr long PART = 16384;  // numbers that a thread takes at once
constexpr long LANES = 64;    // sums side by side

struct Part {
  long tensor, start, size;
};

std::vector<Part> cut(long count, const long* sizes) {
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
  std::vector<Part> parts = cut(count, sizes);
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
                      const float* steps, float one_less_beta1, float beta2, float one_less_beta2,
                      float eps, float share) {
  std::vector<Part> parts = cut(count, sizes);
  at::parallel_for(0, parts.size(), 1, [&](long from, long to) {
    for (long k = from; k < to; k++) {
      const Part& part = parts[k];
      float* __restrict weight = weights[part.tensor] + part.start;
      const float* __restrict grad = grads[part.tensor] + part.start;
      float* __restrict m = exp_avgs[part.tensor] + part.start;
      float* __restrict v = exp_avg_sqs[part.tensor] + part.start;
      const float* given = steps + 3 * part.tensor;
      const float size = given[0], root = given[1], kept = given[2];
#pragma GCC ivdep
      for (long i = 0; i < part.size; i++) {
        m[i] += one_less_beta1 * (grad[i] - m[i]);
        v[i] = beta2 * v[i] + one_less_beta2 * grad[i] * grad[i];
        weight[i] = weight[i] * kept - size * m[i] / (std::sqrt(v[i]) / root + eps);
      }
      if (!averages) continue;
      // What was just written is still at hand.
      float* __restrict average = averages[part.tensor] + part.start;
#pragma GCC ivdep
      for (long i = 0; i < part.size; i++) average[i] += share * (weight[i] - average[i]);
    }
  });
}
