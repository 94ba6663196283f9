// GroupNorm, scale and shift, SiLU and dropout of channels_last images on a CPU, forward and
// backward; norm.py has the equations. Images are [B, positions, C] in memory; the number of
// positions is a multiple of 8.
//
// A thread processes some whole groups of one image, few enough for its cache, in several passes over
// the positions. These are split into eight equal segments, since the eight 16-bit halves of one
// Philox block decide the dropout of one element in each (`Draws.keep_mask`). The order of every sum
// is independent of the number of threads and of the batch.

#include <ATen/Parallel.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr long SEGMENTS = 8;
constexpr long CACHED = 200'000;    // bytes of an image that a thread processes at once
constexpr long MIN_CHANNELS = 32;  // so that whole cache lines are read

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// 1 / (1 + exp(-z)), relative error 2e-7: exp by range reduction to a power of two and a polynomial
// (Cephes). Branch-free, so that the compiler vectorizes it.
inline float sigmoid(float z) {
  uint32_t bits = bits_of(z), size = bits & 0x7FFFFFFFu;
  size = std::min(size, 0x42AE0000u);  // 87.0, whose exponential is not subnormal
  float x = from_bits(((bits ^ 0x80000000u) & 0x80000000u) | size);
  float shifted = x * 1.44269504f + 12582912.0f;  // rounds: the power is in the lowest bits
  float power = shifted - 12582912.0f;
  float r = x - power * 0.693359375f + power * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f, p = p * r + 5.0000001201e-1f;
  float e = p * r * r + r + 1.0f;
  return 1.0f / (1.0f + e * from_bits((bits_of(shifted) << 23) + 0x3F800000u));
}

struct Shape {
  long batch, positions, channels, groups;
  long group() const { return channels / groups; }
  long segment() const { return positions / SEGMENTS; }
  // The number of channels processed at once: whole groups.
  long width() const {
    long target = std::max(MIN_CHANNELS, CACHED / (4 * positions));
    return std::min(channels, (target + group() - 1) / group() * group());
  }
};

// The inputs of norm.py; optional ones are null where absent.
struct Inputs {
  const float *x, *added, *weight, *bias, *scale, *shift;
};

struct Dropping {
  const int64_t *key, *index, *step;
  long step_each, purpose, threshold;
  float factor;
};

// Dropout factors [segment][width] at position `row` of all segments: 0 where an element is dropped.
void draw_kept(const Dropping& drop, long image, long first_block, long width, float* kept) {
  const uint32_t index = drop.index[image], purpose = drop.purpose;
  const uint32_t step = drop.step[drop.step_each ? image : 0];
  const uint32_t key0 = drop.key[0], key1 = drop.key[1], threshold = drop.threshold;
  const float factor = drop.factor;
#pragma GCC ivdep
  for (long c = 0; c < width; c++) {
    uint32_t c0 = first_block + c, c1 = index, c2 = step, c3 = purpose, k0 = key0, k1 = key1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
      uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
      c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)p1;
      c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)p0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    kept[c] = (c0 & 0xFFFF) >= threshold ? factor : 0.0f;
    kept[c + width] = (c0 >> 16) >= threshold ? factor : 0.0f;
    kept[c + 2 * width] = (c1 & 0xFFFF) >= threshold ? factor : 0.0f;
    kept[c + 3 * width] = (c1 >> 16) >= threshold ? factor : 0.0f;
    kept[c + 4 * width] = (c2 & 0xFFFF) >= threshold ? factor : 0.0f;
    kept[c + 5 * width] = (c2 >> 16) >= threshold ? factor : 0.0f;
    kept[c + 6 * width] = (c3 & 0xFFFF) >= threshold ? factor : 0.0f;
    kept[c + 7 * width] = (c3 >> 16) >= threshold ? factor : 0.0f;
  }
}

// Some whole groups of one image, and values of each of their channels.
struct Part {
  const Shape& shape;
  const Inputs& inputs;
  long image, first, width;
  float *more, *gain, *offset, *g, *inverse, *shifted;  // z = x gain + offset, x_hat = x inverse + shifted

  static constexpr long NUM_VALUES = 6;

  Part(const Shape& shape, const Inputs& inputs, long image, long first, float* buffer)
      : shape(shape), inputs(inputs), image(image), first(first),
        width(std::min(shape.width(), shape.channels - first)) {
    float** all[] = {&more, &gain, &offset, &g, &inverse, &shifted};
    for (float** one : all) *one = buffer, buffer += shape.width();
    for (long c = 0; c < width; c++) more[c] = inputs.added ? inputs.added[own() + c] : 0.0f;
  }
  long own() const { return image * shape.channels + first; }
  // The offset of the first of these channels at position `row` of a segment.
  long at(long segment, long row) const {
    return (image * shape.positions + segment * shape.segment() + row) * shape.channels + first;
  }

  void prepare(const float* mean, const float* rstd) {
    for (long c = 0; c < width; c++) {
      long k = first + c, group = image * shape.groups + k / shape.group();
      float factor = inputs.scale ? 1.0f + inputs.scale[own() + c] : 1.0f;
      g[c] = inputs.weight[k] * factor, inverse[c] = rstd[group];
      shifted[c] = (more[c] - mean[group]) * rstd[group], gain[c] = rstd[group] * g[c];
      float moved = inputs.shift ? inputs.shift[own() + c] : 0.0f;
      offset[c] = (more[c] - mean[group]) * gain[c] + inputs.bias[k] * factor + moved;
    }
  }

  // Sums over positions, for each channel, of x + less, or of its square.
  template <bool squared>
  void sum(const float* less, float* total) const {
    std::fill(total, total + width, 0.0f);
    for (long row = 0; row < shape.segment(); row++) {
      const float* from = inputs.x + at(0, row);
      const long stride = shape.segment() * shape.channels;
#pragma GCC ivdep
      for (long c = 0; c < width; c++) {
        float eight = 0.0f;
        for (int s = 0; s < SEGMENTS; s++) {
          float u = from[s * stride + c] + less[c];
          eight += squared ? u * u : u;
        }
        total[c] += eight;
      }
    }
  }

  // Mean and inverse standard deviation of each group; two passes, so that nothing cancels.
  void moments(float eps, float* mean, float* rstd) {
    const long size = shape.group();
    const double count = (double)shape.positions * size;
    float *total = gain, *less = offset;  // not used yet
    sum<false>(more, total);
    for (long c = 0; c < width; c += size) {
      double sum = 0;
      for (long k = 0; k < size; k++) sum += total[c + k];
      float middle = sum / count;
      mean[image * shape.groups + (first + c) / size] = middle;
      for (long k = 0; k < size; k++) less[c + k] = more[c + k] - middle;
    }
    sum<true>(less, total);
    for (long c = 0; c < width; c += size) {
      double sum = 0;
      for (long k = 0; k < size; k++) sum += total[c + k];
      rstd[image * shape.groups + (first + c) / size] = 1.0 / std::sqrt(sum / count + eps);
    }
  }

  template <bool silu, bool drops>
  void apply(const Dropping& drop, float* kept, float* y) const {
    const float *gains = gain, *offsets = offset;
    for (long row = 0; row < shape.segment(); row++) {
      if (drops) draw_kept(drop, image, row * shape.channels + first, width, kept);
      for (long s = 0; s < SEGMENTS; s++) {
        const float *from = inputs.x + at(s, row), *keep = kept + s * width;
        float* to = y + at(s, row);
#pragma GCC ivdep
        for (long c = 0; c < width; c++) {
          float z = from[c] * gains[c] + offsets[c];
          if (silu) z *= sigmoid(z);
          to[c] = drops ? z * keep[c] : z;
        }
      }
    }
  }

  // Write dz into dx, and sum dz, dz x_hat and x_hat over positions, for each channel.
  template <bool silu, bool drops>
  void gradient_z(const Dropping& drop, float* kept, const float* grad, float* dx, float* sums) const {
    const long stride = shape.segment() * shape.channels, wide = width;
    const float *gains = gain, *offsets = offset, *inverses = inverse, *shifts = shifted;
    std::fill(sums, sums + 3 * wide, 0.0f);
    for (long row = 0; row < shape.segment(); row++) {
      if (drops) draw_kept(drop, image, row * shape.channels + first, width, kept);
      const float *from = inputs.x + at(0, row), *dy = grad + at(0, row);
      float* to = dx + at(0, row);
#pragma GCC ivdep
      for (long c = 0; c < wide; c++) {
        float sum_1 = 0.0f, sum_2 = 0.0f, sum_3 = 0.0f;
#pragma GCC unroll 8
        for (int s = 0; s < SEGMENTS; s++) {
          float x = from[s * stride + c], dz = dy[s * stride + c];
          if (drops) dz *= kept[s * wide + c];
          if (silu) {
            float z = x * gains[c] + offsets[c], s_z = sigmoid(z);
            dz *= s_z * (1.0f + z * (1.0f - s_z));
          }
          float x_hat = x * inverses[c] + shifts[c];
          sum_1 += dz, sum_2 += dz * x_hat, sum_3 += x_hat;
          to[s * stride + c] = dz;
        }
        sums[c] += sum_1, sums[wide + c] += sum_2, sums[2 * wide + c] += sum_3;
      }
    }
  }

  // Turn dz into du = rstd (g dz - mean(g dz) - x_hat mean(g dz x_hat)), means over a group.
  void gradient_x(const float* sums, float* dx, float* sum_du) const {
    const float *sum_1 = sums, *sum_2 = sums + width, *sum_3 = sums + 2 * width;
    float *mean_1 = more, *mean_2 = offset;  // no longer needed
    const long size = shape.group();
    for (long c = 0; c < width; c += size) {
      double one = 0, two = 0;
      for (long k = c; k < c + size; k++) one += g[k] * sum_1[k], two += g[k] * sum_2[k];
      float a = one / ((double)shape.positions * size), b = two / ((double)shape.positions * size);
      for (long k = c; k < c + size; k++) mean_1[k] = a, mean_2[k] = b;
    }
    for (long c = 0; c < width && inputs.added; c++)
      sum_du[own() + c] =
          inverse[c] * (g[c] * sum_1[c] - shape.positions * mean_1[c] - sum_3[c] * mean_2[c]);
    for (long s = 0; s < SEGMENTS; s++)
      for (long row = 0; row < shape.segment(); row++) {
        const float* from = inputs.x + at(s, row);
        float* to = dx + at(s, row);
#pragma GCC ivdep
        for (long c = 0; c < width; c++) {
          float x_hat = from[c] * inverse[c] + shifted[c];
          to[c] = inverse[c] * (g[c] * to[c] - mean_1[c] - x_hat * mean_2[c]);
        }
      }
  }
};

// Call `work(part, buffer)` for every part; the buffer holds `extra` values per channel.
template <typename Work>
void each_part(const Shape& shape, const Inputs& inputs, long extra, Work work) {
  const long width = shape.width(), parts = (shape.channels + width - 1) / width;
  at::parallel_for(0, shape.batch * parts, 1, [&](long begin, long end) {
    std::vector<float> buffer((Part::NUM_VALUES + extra) * width);
    for (long i = begin; i < end; i++) {
      Part part(shape, inputs, i / parts, i % parts * width, buffer.data());
      work(part, buffer.data() + Part::NUM_VALUES * width);
    }
  });
}

}  // namespace

extern "C" {

// y [B, positions, C], and mean and rstd [B, groups] of u = x + added.
void norm_act(long batch, long positions, long channels, long groups, const float* x,
              const float* added, const float* weight, const float* bias, const float* scale,
              const float* shift, const int64_t* key, const int64_t* index, const int64_t* step,
              long step_each, long purpose, long threshold, float factor, long silu, float eps,
              float* y, float* mean, float* rstd) {
  Shape shape{batch, positions, channels, groups};
  Inputs inputs{x, added, weight, bias, scale, shift};
  Dropping drop{key, index, step, step_each, purpose, threshold, factor};
  each_part(shape, inputs, SEGMENTS, [&](Part& part, float* kept) {
    part.moments(eps, mean, rstd);
    part.prepare(mean, rstd);
    if (silu && key) part.apply<true, true>(drop, kept, y);
    else if (silu) part.apply<true, false>(drop, kept, y);
    else if (key) part.apply<false, true>(drop, kept, y);
    else part.apply<false, false>(drop, kept, y);
  });
}

// dx [B, positions, C], and sums over positions, [B, C]: of dz, of dz x_hat, and of du with `added`.
void norm_act_backward(long batch, long positions, long channels, long groups, const float* x,
                       const float* added, const float* weight, const float* bias,
                       const float* scale, const float* shift, const int64_t* key,
                       const int64_t* index, const int64_t* step, long step_each, long purpose,
                       long threshold, float factor, long silu, const float* mean,
                       const float* rstd, const float* grad, float* dx, float* sum_dz,
                       float* sum_dz_x_hat, float* sum_du) {
  Shape shape{batch, positions, channels, groups};
  Inputs inputs{x, added, weight, bias, scale, shift};
  Dropping drop{key, index, step, step_each, purpose, threshold, factor};
  each_part(shape, inputs, SEGMENTS + 3, [&](Part& part, float* kept) {
    float* sums = kept + SEGMENTS * shape.width();
    part.prepare(mean, rstd);
    if (silu && key) part.gradient_z<true, true>(drop, kept, grad, dx, sums);
    else if (silu) part.gradient_z<true, false>(drop, kept, grad, dx, sums);
    else if (key) part.gradient_z<false, true>(drop, kept, grad, dx, sums);
    else part.gradient_z<false, false>(drop, kept, grad, dx, sums);
    std::memcpy(sum_dz + part.own(), sums, part.width * sizeof(float));
    std::memcpy(sum_dz_x_hat + part.own(), sums + part.width, part.width * sizeof(float));
    part.gradient_x(sums, dx, sum_du);
  });
}

}  // extern "C"
