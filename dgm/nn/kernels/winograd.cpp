// Convolutions of 3 x 3, stride 1 and padding 1, on a CPU, by Winograd's minimal filtering F(4x4, 3x3)
// (Lavin and Gray 2015, "Fast algorithms for convolutional neural networks", section 4.3): a tile of
// 4 x 4 positions takes 36 multiplications for each pair of channels instead of 144,
//
//     Y = A^T [(G w G^T) * (B^T x B)] A,    x the 6 x 6 positions around the tile, * elementwise,
//
// which for all tiles and channels are 36 matrix products. Both gradients use the transposes.
//
// Images are [B, H, W, C] in memory (channels_last), H and W multiples of 4; weights [K, 3, 3, C].
// Channels are multiples of 2 LANES. The order of every sum is independent of the number of threads
// and of the batch.

#include <ATen/Parallel.h>
#include <algorithm>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;  // 24 sums and their operands fill 32 registers
#else
constexpr int LANES = 8, ROWS = 6;
#endif
constexpr int TILE = 4, PATCH = 6, POINTS = PATCH * PATCH;
constexpr int PANEL = 2 * LANES;  // columns of a matrix that are contiguous, row by row
constexpr long CACHED = 400'000;      // bytes of transformed tiles that a thread processes at once
constexpr long SHARED = 2'000'000;   // the same for all threads, for the gradient of weights

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4)));

inline Vector load(const float* from) { return *(const Unaligned*)from; }
inline void store(float* to, Vector value) { *(Unaligned*)to = value; }

// c[r][0 : PANEL] = sum over p of a[r * a_row + p * a_step] b[p][0 : PANEL], added to c if `add`
template <int rows, bool add>
void block(long depth, const float* a, long a_row, long a_step, const float* b, float* c,
           long c_row) {
  Vector sum[rows][2];
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < 2; j++) sum[r][j] = add ? load(c + r * c_row + j * LANES) : Vector{};
  for (long p = 0; p < depth; p++) {
    Vector b0 = load(b + p * PANEL), b1 = load(b + p * PANEL + LANES);
    for (int r = 0; r < rows; r++) {
      float s = a[r * a_row + p * a_step];
      sum[r][0] += s * b0;
      sum[r][1] += s * b1;
    }
  }
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < 2; j++) store(c + r * c_row + j * LANES, sum[r][j]);
}

template <int rows, bool add>
void up_to_rows(long count, long depth, const float* a, long a_row, long a_step, const float* b,
               float* c, long c_row) {
  if (count == rows)
    block<rows, add>(depth, a, a_row, a_step, b, c, c_row);
  else if constexpr (rows > 1)
    up_to_rows<rows - 1, add>(count, depth, a, a_row, a_step, b, c, c_row);
}

// c [rows, columns] = a [rows, depth] b [depth, columns], added to c if `add`; b in panels of
// `panel_rows` rows each, so that reads are contiguous and spread over the cache's sets
template <bool add>
void product(long rows, long columns, long depth, const float* a, long a_row, long a_step,
             const float* b, long panel_rows, float* c) {
  for (long j = 0; j < columns; j += PANEL)
    for (long i = 0; i < rows; i += ROWS)
      up_to_rows<ROWS, add>(std::min<long>(ROWS, rows - i), depth, a + i * a_row, a_row, a_step,
                           b + j * panel_rows, c + i * columns + j, columns);
}

// The one-dimensional transforms and their transposes, with input stride `from` and output stride `to`.

inline void image_in(const Vector* d, int from, Vector* o, int to) {  // B^T d: 6 to 6
  Vector d1 = d[from], d2 = d[2 * from], d3 = d[3 * from], d4 = d[4 * from];
  Vector p = d4 - 4.0f * d2, q = d3 - 4.0f * d1, u = d4 - d2, w = 2.0f * (d3 - d1);
  o[0] = 4.0f * d[0] - 5.0f * d2 + d4;
  o[to] = p + q, o[2 * to] = p - q, o[3 * to] = u + w, o[4 * to] = u - w;
  o[5 * to] = 4.0f * d1 - 5.0f * d3 + d[5 * from];
}

inline void image_in_back(const Vector* e, int from, Vector* o, int to) {  // B e: 6 to 6
  Vector e0 = e[0], e5 = e[5 * from];
  Vector a = e[from] + e[2 * from], b = e[from] - e[2 * from];
  Vector c = e[3 * from] + e[4 * from], d = 2.0f * (e[3 * from] - e[4 * from]);
  o[0] = 4.0f * e0, o[to] = -4.0f * b - d + 4.0f * e5, o[2 * to] = -5.0f * e0 - 4.0f * a - c;
  o[3 * to] = b + d - 5.0f * e5, o[4 * to] = e0 + a + c, o[5 * to] = e5;
}

inline void image_out(const Vector* m, int from, Vector* o, int to) {  // A^T m: 6 to 4
  Vector a = m[from] + m[2 * from], b = m[from] - m[2 * from];
  Vector c = m[3 * from] + m[4 * from], d = m[3 * from] - m[4 * from];
  o[0] = m[0] + a + c, o[to] = b + 2.0f * d, o[2 * to] = a + 4.0f * c;
  o[3 * to] = b + 8.0f * d + m[5 * from];
}

inline void image_out_back(const Vector* y, int from, Vector* o, int to) {  // A y: 4 to 6
  Vector y0 = y[0], y1 = y[from], y2 = y[2 * from], y3 = y[3 * from];
  Vector e = y0 + y2, f = y1 + y3, g = y0 + 4.0f * y2, h = 2.0f * y1 + 8.0f * y3;
  o[0] = y0, o[to] = e + f, o[2 * to] = e - f, o[3 * to] = g + h, o[4 * to] = g - h, o[5 * to] = y3;
}

inline void weight_in(const Vector* w, int from, Vector* o, int to) {  // G w: 3 to 6
  Vector w0 = w[0], w1 = w[from], w2 = w[2 * from];
  Vector a = (w0 + w2) * (-1.0f / 6), b = w1 * (1.0f / 6);
  Vector c = w0 * (1.0f / 24) + w2 * (1.0f / 6), d = w1 * (1.0f / 12);
  o[0] = w0 * 0.25f, o[to] = a - b, o[2 * to] = a + b, o[3 * to] = c + d, o[4 * to] = c - d;
  o[5 * to] = w2;
}

inline void weight_in_back(const Vector* u, int from, Vector* o, int to) {  // G^T u: 6 to 3
  Vector a = u[from] + u[2 * from], b = u[2 * from] - u[from];
  Vector c = u[3 * from] + u[4 * from], d = u[3 * from] - u[4 * from];
  o[0] = 0.25f * u[0] - (1.0f / 6) * a + (1.0f / 24) * c, o[to] = (1.0f / 6) * b + (1.0f / 12) * d;
  o[2 * to] = (1.0f / 6) * (c - a) + u[5 * from];
}

struct Tiles {
  long batch, height, width;
  long down() const { return height / TILE; }
  long across() const { return width / TILE; }
  long each() const { return down() * across(); }  // of an image
  long all() const { return batch * each(); }

  // The position [image, row, column] of a tile's first element, and the offset of a position.
  void at(long tile, long& image, long& row, long& column) const {
    image = tile / each(), row = tile / across() % down() * TILE, column = tile % across() * TILE;
  }
  long offset(long image, long row, long column, long channels) const {
    return ((image * height + row) * width + column) * channels;
  }
  bool contains(long row, long column) const {
    return row >= 0 && row < height && column >= 0 && column < width;
  }

  // B^T x B around a tile; the 36 values of a channel are `stride` apart, panels of channels `panel`.
  void take_in(long tile, long channels, const float* x, float* to, long stride,
               long panel = PANEL) const {
    long image, row, column;
    at(tile, image, row, column);
    for (long c = 0; c < channels; c += LANES) {
      Vector d[POINTS], e[POINTS];
      for (int i = 0; i < PATCH; i++)
        for (int j = 0; j < PATCH; j++) {
          long y = row + i - 1, z = column + j - 1;
          d[PATCH * i + j] = contains(y, z) ? load(x + offset(image, y, z, channels) + c) : Vector{};
        }
      for (int j = 0; j < PATCH; j++) image_in(d + j, PATCH, e + j, PATCH);
      for (int i = 0; i < PATCH; i++) image_in(e + PATCH * i, 1, d + PATCH * i, 1);
      float* out = to + c / PANEL * panel + c % PANEL;
      for (int k = 0; k < POINTS; k++) store(out + k * stride, d[k]);
    }
  }

  // The transpose, added to the gradient of x.
  void take_in_back(long tile, long channels, const float* from, long stride, float* dx) const {
    long image, row, column;
    at(tile, image, row, column);
    for (long c = 0; c < channels; c += LANES) {
      Vector d[POINTS], e[POINTS];
      for (int k = 0; k < POINTS; k++) d[k] = load(from + k * stride + c);
      for (int j = 0; j < PATCH; j++) image_in_back(d + j, PATCH, e + j, PATCH);
      for (int i = 0; i < PATCH; i++) image_in_back(e + PATCH * i, 1, d + PATCH * i, 1);
      for (int i = 0; i < PATCH; i++)
        for (int j = 0; j < PATCH; j++)
          if (long y = row + i - 1, z = column + j - 1; contains(y, z)) {
            float* out = dx + offset(image, y, z, channels) + c;
            store(out, load(out) + d[PATCH * i + j]);
          }
    }
  }

  // A^T m A and the bias, into a tile of y.
  void give_out(long tile, long channels, const float* m, long stride, const float* bias,
                float* y) const {
    long image, row, column;
    at(tile, image, row, column);
    for (long c = 0; c < channels; c += LANES) {
      Vector d[POINTS], e[TILE * PATCH], o[TILE];
      for (int k = 0; k < POINTS; k++) d[k] = load(m + k * stride + c);
      for (int j = 0; j < PATCH; j++) image_out(d + j, PATCH, e + j, PATCH);
      Vector added = load(bias + c);
      for (int i = 0; i < TILE; i++) {
        image_out(e + PATCH * i, 1, o, 1);
        float* out = y + offset(image, row + i, column, channels) + c;
        for (int j = 0; j < TILE; j++) store(out + j * channels, o[j] + added);
      }
    }
  }

  // The transpose: A dy A^T of a tile.
  void give_out_back(long tile, long channels, const float* dy, float* to, long stride) const {
    long image, row, column;
    at(tile, image, row, column);
    for (long c = 0; c < channels; c += LANES) {
      Vector d[TILE * TILE], e[PATCH * TILE], o[POINTS];
      for (int i = 0; i < TILE; i++)
        for (int j = 0; j < TILE; j++)
          d[TILE * i + j] = load(dy + offset(image, row + i, column + j, channels) + c);
      for (int j = 0; j < TILE; j++) image_out_back(d + j, TILE, e + j, TILE);
      for (int i = 0; i < PATCH; i++) image_out_back(e + TILE * i, 1, o + PATCH * i, 1);
      for (int k = 0; k < POINTS; k++) store(to + k * stride + c, o[k]);
    }
  }
};

// The number of tiles that fit in `bytes`: a multiple of ROWS.
long tiles_in(long bytes, long channels) {
  return std::max<long>(ROWS, bytes / (POINTS * 4 * channels) / ROWS * ROWS);
}

// The stride between the matrices of `rows` tiles: a cache line more than their size, so that the 36
// values of a tile and channel, which are written in succession, spread over the cache's sets.
long matrix_stride(long rows, long channels) { return rows * channels + 16; }

float* scratch(long count) {
  static thread_local std::vector<float> buffer;
  if ((long)buffer.size() < count) buffer.resize(count);
  return buffer.data();
}

}  // namespace

extern "C" {

// The number of floats of `work` in `gradient_of_weight`.
long work_size(long inputs, long outputs) {
  long chunk = tiles_in(SHARED, inputs + outputs);
  return POINTS * (matrix_stride(chunk, inputs) + matrix_stride(chunk, outputs));
}

// G w G^T of w [outputs, 3, 3, inputs], 36 matrices in panels: u [outputs, inputs] or u_t [inputs,
// outputs]; the other is null.
void transform_weight(long inputs, long outputs, const float* w, float* u, float* u_t) {
  auto at = [](long rows, long row, long column) {
    return (column / PANEL * rows + row) * PANEL + column % PANEL;
  };
  at::parallel_for(0, outputs / LANES, 1, [&](long first, long last) {
    std::vector<float> buffer(POINTS * LANES * LANES);
    for (long k0 = first * LANES; k0 < last * LANES; k0 += LANES)
      for (long c = 0; c < inputs; c += LANES) {
        for (long k = 0; k < LANES; k++) {
          Vector d[9], e[PATCH * 3], o[POINTS];
          for (int i = 0; i < 9; i++) d[i] = load(w + ((k0 + k) * 9 + i) * inputs + c);
          for (int j = 0; j < 3; j++) weight_in(d + j, 3, e + j, 3);
          for (int i = 0; i < PATCH; i++) weight_in(e + 3 * i, 1, o + PATCH * i, 1);
          for (int i = 0; i < POINTS; i++) {
            if (u) store(u + i * outputs * inputs + at(outputs, k0 + k, c), o[i]);
            else store(buffer.data() + (i * LANES + k) * LANES, o[i]);
          }
        }
        for (int i = 0; i < POINTS && u_t; i++)
          for (int j = 0; j < LANES; j++)
            for (int k = 0; k < LANES; k++)
              u_t[i * outputs * inputs + at(inputs, c + j, k0 + k)] =
                  buffer[(i * LANES + k) * LANES + j];
      }
  });
}

void convolve(long batch, long height, long width, long inputs, long outputs, const float* x,
              const float* u_t, const float* bias, float* y) {
  Tiles tiles{batch, height, width};
  long chunk = tiles_in(CACHED, inputs + outputs), all = tiles.all();
  long v_stride = matrix_stride(chunk, inputs), m_stride = matrix_stride(chunk, outputs);
  at::parallel_for(0, (all + chunk - 1) / chunk, 1, [&](long begin, long end) {
    float* v = scratch(POINTS * (v_stride + m_stride));
    float* m = v + POINTS * v_stride;
    for (long part = begin; part < end; part++) {
      long first = part * chunk, count = std::min(chunk, all - first);
      for (long i = 0; i < count; i++)
        tiles.take_in(first + i, inputs, x, v + i * inputs, v_stride);
      for (long k = 0; k < POINTS; k++)
        product<false>(count, outputs, inputs, v + k * v_stride, inputs, 1,
                       u_t + k * inputs * outputs, inputs, m + k * m_stride);
      for (long i = 0; i < count; i++)
        tiles.give_out(first + i, outputs, m + i * outputs, m_stride, bias, y);
    }
  });
}

void gradient_of_image(long batch, long height, long width, long inputs, long outputs,
                       const float* dy, const float* u, float* dx) {
  Tiles tiles{batch, height, width};
  long chunk = tiles_in(CACHED, inputs + outputs), each = tiles.each();
  long v_stride = matrix_stride(chunk, inputs), m_stride = matrix_stride(chunk, outputs);
  long size = height * width * inputs, group = std::max<long>(1, chunk / each);  // images
  // Whole images to each thread, since their tiles overlap.
  at::parallel_for(0, (batch + group - 1) / group, 1, [&](long begin, long end) {
    float* v = scratch(POINTS * (v_stride + m_stride));
    float* m = v + POINTS * v_stride;
    for (long part = begin; part < end; part++) {
      long image = part * group, stop = std::min(batch, image + group);
      std::memset(dx + image * size, 0, (stop - image) * size * sizeof(float));
      for (long first = image * each; first < stop * each; first += chunk) {
        long count = std::min(chunk, stop * each - first);
        for (long i = 0; i < count; i++)
          tiles.give_out_back(first + i, outputs, dy, m + i * outputs, m_stride);
        for (long k = 0; k < POINTS; k++)
          product<false>(count, inputs, outputs, m + k * m_stride, outputs, 1,
                         u + k * inputs * outputs, outputs, v + k * v_stride);
        for (long i = 0; i < count; i++)
          tiles.take_in_back(first + i, inputs, v + i * inputs, v_stride, dx);
      }
    }
  });
}

// dw [outputs, 3, 3, inputs]; du [36, outputs, inputs] and `work` are buffers.
void gradient_of_weight(long batch, long height, long width, long inputs, long outputs,
                        const float* x, const float* dy, float* du, float* work, float* dw) {
  Tiles tiles{batch, height, width};
  long chunk = tiles_in(SHARED, inputs + outputs), all = tiles.all();
  long v_stride = matrix_stride(chunk, inputs), m_stride = matrix_stride(chunk, outputs);
  float* v = work;
  float* m = v + POINTS * v_stride;
  constexpr long rows = 4 * ROWS;  // that a thread multiplies at once
  long parts = (outputs + rows - 1) / rows;
  for (long first = 0; first < all; first += chunk) {
    long count = std::min(chunk, all - first);
    at::parallel_for(0, count, ROWS, [&](long begin, long end) {
      for (long i = begin; i < end; i++) {
        tiles.take_in(first + i, inputs, x, v + i * PANEL, v_stride, chunk * PANEL);
        tiles.give_out_back(first + i, outputs, dy, m + i * outputs, m_stride);
      }
    });
    at::parallel_for(0, POINTS * parts, 1, [&](long begin, long end) {
      for (long job = begin; job < end; job++) {
        long k = job / parts, row = job % parts * rows, num_rows = std::min(rows, outputs - row);
        const float* a = m + k * m_stride + row;
        const float* b = v + k * v_stride;
        float* c = du + (k * outputs + row) * inputs;
        if (first == 0)
          product<false>(num_rows, inputs, count, a, 1, outputs, b, chunk, c);
        else
          product<true>(num_rows, inputs, count, a, 1, outputs, b, chunk, c);
      }
    });
  }
  at::parallel_for(0, outputs, 1, [&](long begin, long end) {
    for (long k = begin; k < end; k++)
      for (long c = 0; c < inputs; c += LANES) {
        Vector d[POINTS], e[3 * PATCH], o[9];
        for (int i = 0; i < POINTS; i++) d[i] = load(du + (i * outputs + k) * inputs + c);
        for (int j = 0; j < PATCH; j++) weight_in_back(d + j, PATCH, e + j, PATCH);
        for (int i = 0; i < 3; i++) weight_in_back(e + PATCH * i, 1, o + 3 * i, 1);
        for (int i = 0; i < 9; i++) store(dw + (k * 9 + i) * inputs + c, o[i]);
      }
  });
}

}  // extern "C"
