#include "cpu/linear_product.h"

#include <cstdlib>

namespace pst {
namespace {

// aligned floats of the calling thread, kept from call to call
float* scratch(int which, int64_t count) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[5];
  Buffer& b = buffers[which];
  if (b.size < count) {
    std::free(b.data);
    b.size = (count + 15) / 16 * 16;
    b.data = static_cast<float*>(std::aligned_alloc(64, b.size * sizeof(float)));
    STD_TORCH_CHECK(b.data, "out of memory for a tile of ", count, " floats");
  }
  return b.data;
}

constexpr int64_t SUMS_TOGETHER = 1 << 16;
constexpr int64_t TILES_SHARED = 4;  // in dW of shared groups: 8 would land on the same sets of L1

}  // namespace

const void* Product::row(const void* base, int64_t sample, int64_t ld) const {
  return base ? static_cast<const char*>(base) + sample * ld * (type == Scalar::f32 ? 4 : 2) : nullptr;
}

// features [k0, k1) of tile t
void Product::prepare(int64_t t, int k0, int k1, float* tile) const {
  float* sums = column_sums ? column_sums + t * in : nullptr;
  const void *from = row(source, t * TILE, in), *open = row(gate, t * TILE, in);
  if (!tiled) {
    kernels.pack(type, from, open, in, batch.valid(t), batch.lanes(t), k0, k1, tile, sums);
  } else if (gate || sums) {
    kernels.gate(static_cast<const float*>(from), static_cast<const float*>(open), batch.lanes(t), k0, k1, tile, sums);
  }
}

// tiles [t0, t1), chunks [c0, c1); tile(t) is where tile t lies packed. A column tile's weights serve all tiles in turn.
template <class F>
void Product::multiply(int64_t t0, int64_t t1, int c0, int c1, F tile) const {
  float* y = tiled ? static_cast<float*>(target) + t0 * out * TILE : scratch(0, (t1 - t0) * out * TILE);
  const int64_t cells = int64_t(schedule.column_tiles) * (c1 - c0);
  for (int k = 0; k < schedule.column_tiles; ++k)
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t next = t + t1 - t0;
      Ahead ahead;
      if (tiled && next < batch.tiles())
        ahead = {static_cast<const float*>(source) + next * TILE * in, batch.lanes(next) * in};
      for (int c = c0; c < c1; ++c)
        kernels.multiply(schedule, k, c, weights, bias, tile(t), batch.lanes(t), y + (t - t0) * out * TILE,
                         ahead.part(int64_t(k) * (c1 - c0) + c - c0, cells));
    }
  const int r0 = schedule.chunk_row[c0], r1 = schedule.chunk_row[c1];
  for (int64_t t = t0; t < t1; ++t, y += out * TILE) {
    if (!tiled) {
      kernels.unpack(type, y, batch.lanes(t), batch.valid(t), r0, r1, relu, const_cast<void*>(row(target, t * TILE, out)),
                     out);
    } else if (relu) {
      kernels.relu(y + int64_t(r0) * batch.lanes(t), int64_t(r1 - r0) * batch.lanes(t));
    } else if (target_gate) {
      kernels.gate(y, target_gate + t * out * TILE, batch.lanes(t), r0, r1, y, nullptr);
    }
  }
}

void Product::run() const {
  const int64_t count = batch.tiles(), threads = torch::stable::get_num_threads();
  const bool kept = packed || as_is();
  const bool whole = !target || schedule.chunks == 1 || !kept || count % threads == 0 || count >= 4 * threads;
  if (whole) {
    // as many tiles together as keep their sums within 256 KB: a column tile's weights are read once for all of them,
    // but at 1 MB of sums the inputs leave a 2 MB L2 and a pass takes 1.4 times as long
    const int64_t together = std::clamp<int64_t>(SUMS_TOGETHER / std::max<int64_t>(1, out * TILE), 1, 8);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t0 = begin; t0 < end; t0 += together) {
        const int64_t t1 = std::min(end, t0 + together);
        float* own = as_is() ? nullptr : packed ? packed + t0 * TILE * in : scratch(1, (t1 - t0) * in * TILE);
        const float* base = own ? own : tiles() + t0 * TILE * in;
        for (int64_t t = t0; t < t1; ++t) prepare(t, 0, int(in), own ? own + (t - t0) * TILE * in : nullptr);
        if (target) multiply(t0, t1, 0, schedule.chunks, [&](int64_t t) { return base + (t - t0) * TILE * in; });
      }
    });
    return;
  }
  const int64_t blocks = (in + TILE - 1) / TILE;
  torch::stable::parallel_for(0, count * blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int k0 = int(i % blocks * TILE);
      const int64_t t = i / blocks;
      prepare(t, k0, int(std::min<int64_t>(in, k0 + TILE)), as_is() ? nullptr : packed + t * TILE * in);
    }
  });
  torch::stable::parallel_for(0, count * schedule.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / schedule.chunks;
      const int c = int(i % schedule.chunks);
      multiply(t, t + 1, c, c + 1, [&](int64_t) { return tiles() + t * TILE * in; });
    }
  });
}

const float* in_order(const Tensor& values, const Schedule& s) {
  const float* from = values.const_data_ptr<float>();
  float* to = scratch(2, s.in_order());
  const LinearKernels& kernels = linear_kernels();
  torch::stable::parallel_for(0, s.entries(), 16384,
                              [&](int64_t begin, int64_t end) { kernels.gather(from, s.source, begin, end, to); });
  torch::stable::parallel_for(0, s.exact_first[s.cells()], 64,
                              [&](int64_t begin, int64_t end) { kernels.gather_exact(s, from, begin, end, to); });
  return to;
}

namespace {

// chunks of a column tile together, so that x is brought into the order of samples once for all of them
void sample_strips(const LinearKernels& kernels, const Batch& batch, const float* x, int64_t in, const float* dy,
                   int64_t out, const Schedule& s, float* grad) {
  torch::stable::parallel_for(0, batch.samples ? s.cells() : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, next; i < end; i = next) {
      next = std::min(end, (i / s.chunks + 1) * s.chunks);
      const int k = int(i / s.chunks), c0 = int(i % s.chunks), c1 = c0 + int(next - i);
      int64_t groups = 0, memory = STRIP_SAMPLES * s.strip_stride();
      for (int c = c0; c < c1; ++c) {
        const Schedule::Strips strips = s.strips(k, c);
        groups += strips.groups;
        memory += strips.memory();
      }
      if (groups) kernels.sample_strips(s, k, c0, c1, x, in, dy, out, batch.padded(), scratch(4, memory), grad);
    }
  });
}

}  // namespace

Tensor weight_gradient(const Batch& batch, const float* x, int64_t in, const float* dy, int64_t out, const Tensor& values,
                       const Schedule& s) {
  const LinearKernels& kernels = linear_kernels();
  const int64_t cells = s.cells();
  Tensor grad = empty(values, {values.numel()});
  float *g = grad.mutable_data_ptr<float>(), *sums = scratch(3, s.entries());
  if (!batch.samples) std::fill(g, g + values.numel(), 0.0f);
  sample_strips(kernels, batch, x, in, dy, out, s, g);
  torch::stable::parallel_for(0, batch.samples ? cells : 0, 1, [&](int64_t begin, int64_t end) {
    const auto each_cell = [&](auto f) {
      for (int64_t i = begin; i < end; ++i) f(int(i % s.column_tiles), int(i / s.column_tiles));
    };
    each_cell([&](int k, int c) {
      const int strips = s.part(k, c, Schedule::STRIPS);
      std::fill(sums + s.position[strips + 1], sums + s.position[strips + Schedule::PARTS], 0.0f);
    });
    for (int64_t t = 0; t < batch.tiles(); t += TILES_SHARED) {
      const int64_t start = t * TILE, padded = std::min(batch.padded() - start, TILES_SHARED * TILE);
      each_cell([&](int k, int c) {
        kernels.sample_shared(s, k, c, x + start * in, in, dy + start * out, out, padded, sums);
      });
    }
    for (int64_t t = 0; t < batch.tiles(); ++t) {
      Ahead x_next, dy_next;
      if (t + 1 < batch.tiles()) {
        x_next = {x + (t + 1) * TILE * in, batch.lanes(t + 1) * in};
        dy_next = {dy + (t + 1) * TILE * out, batch.lanes(t + 1) * out};
      }
      each_cell([&](int k, int c) {
        kernels.sample(s, k, c, x + t * TILE * in, dy + t * TILE * out, batch.lanes(t), sums,
                       x_next.part(k * s.chunks + c, cells), dy_next.part(c * s.column_tiles + k, cells));
      });
    }
    each_cell([&](int k, int c) {
      const int strips = s.part(k, c, Schedule::STRIPS);
      for (int e = s.position[strips + 1]; e < s.position[strips + Schedule::PARTS]; ++e)
        if (s.source[e] >= 0) g[s.source[e]] = sums[e];
    });
  });
  return grad;
}

Tensor sum_of_tiles(const Tensor& sums, int64_t tiles, int64_t features) {
  Tensor total = torch::stable::new_zeros(sums, {features});
  const float* from = sums.const_data_ptr<float>();
  float* to = total.mutable_data_ptr<float>();
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t f = 0; f < features; ++f) to[f] += from[t * features + f];
  return total;
}

}  // namespace pst
