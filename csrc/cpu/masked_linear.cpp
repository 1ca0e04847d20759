#include "cpu/masked_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/isa.h"

namespace pst {

namespace portable {
#define PST_W 4
#include "cpu/masked_linear.inl"
#undef PST_W
}  // namespace portable

#if PST_X86
PST_TARGET_BEGIN_AVX2
namespace avx2 {
#define PST_W 8
#include "cpu/masked_linear.inl"
#undef PST_W
}  // namespace avx2
PST_TARGET_END

PST_TARGET_BEGIN_AVX512
namespace avx512 {
#define PST_W 16
#include "cpu/masked_linear.inl"
#undef PST_W
}  // namespace avx512
PST_TARGET_END
#endif

const LinearKernels& linear_kernels() {
#if PST_X86
  if (isa() == Isa::avx512) return avx512::KERNELS;
  if (isa() == Isa::avx2) return avx2::KERNELS;
#endif
  return portable::KERNELS;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// header of a schedule tensor, followed by chunk_row, first, position, groups, source and column (masked_linear.h)
enum Header { ROWS, WIDTH, NNZ, COLUMNS, CHUNKS, GROUPS, HEADER };

constexpr int ROWS_A_CHUNK = 256;
constexpr int64_t WIDEST_TILE = 65536;  // a column within its tile is a uint16

Schedule read_schedule(const Tensor& t, int64_t rows, int64_t width, int64_t nnz) {
  const int32_t* p = t.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(t.numel() > HEADER && p[ROWS] == rows && p[WIDTH] == width && p[NNZ] == nnz,
                  "the schedule is of another pattern: make it with linear_schedule(pattern)");
  Schedule s;
  s.columns = p[COLUMNS];
  s.column_tiles = int(std::max<int64_t>(1, (width + s.columns - 1) / s.columns));
  s.chunks = p[CHUNKS];
  const int cells = s.column_tiles * s.chunks;
  s.chunk_row = p + HEADER;
  s.first = s.chunk_row + s.chunks + 1;
  s.position = s.first + cells + 1;
  s.groups = reinterpret_cast<const Group*>(s.position + cells + 1);
  s.source = s.position + cells + 1 + p[GROUPS] * int64_t(sizeof(Group) / 4);
  s.column = reinterpret_cast<const uint16_t*>(s.source + s.entries());
  return s;
}

// perm (or null): where the pattern's nonzeros are in the layer's values
Tensor build_schedule(Tensor row_ptr, Tensor col, std::optional<Tensor> perm, int64_t width, int64_t columns) {
  STD_TORCH_CHECK(columns > 0 && columns <= WIDEST_TILE, "a column tile has 1 to 65536 columns, not ", columns);
  struct Part {
    int32_t row, start, length;
  };
  const int rows = int(row_ptr.numel() - 1);
  const int chunks = std::clamp(rows / ROWS_A_CHUNK, 1, 8);
  const int tiles = int(std::max<int64_t>(1, (width + columns - 1) / columns));
  const int32_t *ptr = row_ptr.const_data_ptr<int32_t>(), *c = col.const_data_ptr<int32_t>();
  const int32_t* from = perm ? perm->const_data_ptr<int32_t>() : nullptr;
  const int64_t nnz = ptr[rows];
  std::vector<int32_t> chunk_row{0}, first{0}, position{0}, source;
  std::vector<Group> groups;
  std::vector<uint16_t> column;
  for (int k = 1; k <= chunks; ++k) {
    // a row weighs one more than its nonzeros, so empty rows are shared out too; blocks of 16 rows for the unpacking
    const int64_t target = (nnz + rows) * k / chunks;
    int r = chunk_row.back();
    while (r < rows && (k == chunks || ptr[r] + r < target)) r = std::min(rows, r + 16);
    chunk_row.push_back(r);
  }
  std::vector<int32_t> next(ptr, ptr + rows);
  for (int t = 0; t < tiles; ++t) {
    for (int k = 0; k < chunks; ++k) {
      std::vector<Part> parts;
      for (int r = chunk_row[k]; r < chunk_row[k + 1]; ++r) {
        const int32_t start = next[r];
        while (next[r] < ptr[r + 1] && c[next[r]] < (t + 1) * columns) ++next[r];
        if (next[r] > start || t == 0) parts.push_back({r, start, next[r] - start});
      }
      std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.length > b.length; });
      for (size_t i = 0; i < parts.size();) {
        const int n = parts.size() - i >= GROUP ? GROUP : 1;
        Group g{{}, parts[i].length, n};
        for (int m = 0; m < n; ++m) g.row[m] = parts[i + m].row;
        for (int j = 0; j < g.length; ++j) {
          for (int m = 0; m < n; ++m) {
            const bool real = j < parts[i + m].length;
            const int32_t at = parts[i + m].start + j;
            source.push_back(!real ? -1 : from ? from[at] : at);
            column.push_back(real ? uint16_t(c[at] - t * columns) : 0);
          }
        }
        groups.push_back(g);
        i += n;
      }
      while (source.size() % 16) {
        source.push_back(-1);
        column.push_back(0);
      }
      first.push_back(int32_t(groups.size()));
      position.push_back(int32_t(source.size()));
    }
  }
  const int32_t header[HEADER] = {rows, int32_t(width), int32_t(nnz), int32_t(columns), chunks, int32_t(groups.size())};
  const size_t ints = HEADER + chunk_row.size() + first.size() + position.size() + groups.size() * sizeof(Group) / 4 +
                      source.size() + column.size() / 2;
  Tensor out = torch::stable::new_empty(col, {int64_t(ints)});
  int32_t* p = std::copy(header, header + HEADER, out.mutable_data_ptr<int32_t>());
  for (const auto& part : {chunk_row, first, position}) p = std::copy(part.begin(), part.end(), p);
  std::memcpy(p, groups.data(), groups.size() * sizeof(Group));
  p = std::copy(source.begin(), source.end(), p + groups.size() * sizeof(Group) / 4);
  std::memcpy(p, column.data(), column.size() * sizeof(uint16_t));
  return out;
}

// aligned floats of the calling thread, kept from call to call
float* scratch(int which, int64_t count) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[2];
  Buffer& b = buffers[which];
  if (b.size < count) {
    std::free(b.data);
    b.size = (count + 15) / 16 * 16;
    b.data = static_cast<float*>(std::aligned_alloc(64, b.size * sizeof(float)));
    STD_TORCH_CHECK(b.data, "out of memory for a tile of ", count, " floats");
  }
  return b.data;
}

Scalar scalar_of(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  STD_TORCH_CHECK(s == ScalarType::Float || s == ScalarType::BFloat16,
                  "masked_linear takes float32 or bfloat16 activations on the cpu backend; use backend='reference'");
  return s == ScalarType::Float ? Scalar::f32 : Scalar::bf16;
}

struct Batch {
  int64_t samples;
  int64_t tiles() const { return (samples + TILE - 1) / TILE; }
  int64_t padded() const { return (samples + 15) / 16 * 16; }
  int valid(int64_t t) const { return int(std::min<int64_t>(TILE, samples - t * TILE)); }
  int lanes(int64_t t) const { return (valid(t) + 15) / 16 * 16; }
};

Batch batch_of(const Tensor& t) { return {t.numel() ? t.numel() / t.size(t.dim() - 1) : 0}; }

constexpr int64_t SUMS_TOGETHER = 1 << 16;

// packs source tile by tile and, where target is given, multiplies it by the rows of the schedule
struct Product {
  const LinearKernels& kernels = linear_kernels();
  Batch batch;
  Scalar type;
  int64_t in, out;
  const void *source, *gate = nullptr;
  float* packed = nullptr;       // [padded batch * in], or null: not kept
  float* column_sums = nullptr;  // [tiles, in], zeroed, or null
  void* target = nullptr;
  Schedule schedule;
  const float *weights = nullptr, *bias = nullptr;
  bool relu = false;

  const void* row(const void* base, int64_t sample, int64_t ld) const {
    return base ? static_cast<const char*>(base) + sample * ld * (type == Scalar::f32 ? 4 : 2) : nullptr;
  }
  void pack(int64_t t, int k0, int k1, float* tile) const {
    kernels.pack(type, row(source, t * TILE, in), row(gate, t * TILE, in), in, batch.valid(t), batch.lanes(t), k0, k1,
                 tile, column_sums ? column_sums + t * in : nullptr);
  }
  // tiles [t0, t1), chunks [c0, c1); tile(t) is where tile t lies packed. A column tile's weights serve all tiles in turn.
  template <class F>
  void multiply(int64_t t0, int64_t t1, int c0, int c1, F tile) const {
    float* y = scratch(0, (t1 - t0) * out * TILE);
    for (int k = 0; k < schedule.column_tiles; ++k)
      for (int64_t t = t0; t < t1; ++t)
        for (int c = c0; c < c1; ++c)
          kernels.multiply(schedule, k, c, weights, bias, tile(t), batch.lanes(t), y + (t - t0) * out * TILE);
    for (int64_t t = t0; t < t1; ++t)
      kernels.unpack(type, y + (t - t0) * out * TILE, batch.lanes(t), batch.valid(t), schedule.chunk_row[c0],
                     schedule.chunk_row[c1], relu, const_cast<void*>(row(target, t * TILE, out)), out);
  }
  void run() const {
    const int64_t tiles = batch.tiles(), threads = torch::stable::get_num_threads();
    const bool whole = !target || schedule.chunks == 1 || !packed || tiles % threads == 0 || tiles >= 4 * threads;
    if (whole) {
      // as many tiles together as keep their sums within 256 KB: a column tile's weights are read once for all of them,
      // but at 1 MB of sums the inputs leave a 2 MB L2 and a pass takes 1.4 times as long
      const int64_t together = std::clamp<int64_t>(SUMS_TOGETHER / std::max<int64_t>(1, out * TILE), 1, 8);
      torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t0 = begin; t0 < end; t0 += together) {
          const int64_t t1 = std::min(end, t0 + together);
          float* base = packed ? packed + t0 * TILE * in : scratch(1, (t1 - t0) * in * TILE);
          const auto tile = [&](int64_t t) { return base + (t - t0) * TILE * in; };
          for (int64_t t = t0; t < t1; ++t) pack(t, 0, int(in), tile(t));
          if (target) multiply(t0, t1, 0, schedule.chunks, tile);
        }
      });
      return;
    }
    const int64_t blocks = (in + TILE - 1) / TILE;
    torch::stable::parallel_for(0, tiles * blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int k0 = int(i % blocks * TILE);
        pack(i / blocks, k0, int(std::min<int64_t>(in, k0 + TILE)), packed + i / blocks * TILE * in);
      }
    });
    torch::stable::parallel_for(0, tiles * schedule.chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i / schedule.chunks;
        const int c = int(i % schedule.chunks);
        multiply(t, t + 1, c, c + 1, [&](int64_t) { return packed + t * TILE * in; });
      }
    });
  }
};

Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape.back() = last;
  return shape;
}

// the values in the order of a schedule's entries
Tensor in_order(const Tensor& values, const Schedule& s) {
  Tensor weights = empty(values, {s.entries()}, ScalarType::Float);
  const float* from = values.const_data_ptr<float>();
  float* to = weights.mutable_data_ptr<float>();
  const LinearKernels& kernels = linear_kernels();
  torch::stable::parallel_for(0, s.entries(), 16384,
                              [&](int64_t begin, int64_t end) { kernels.gather(from, s.source, begin, end, to); });
  return weights;
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor values, std::optional<Tensor> bias, Tensor schedule,
                                   Tensor t_schedule, int64_t out_features, bool relu, bool keep) {
  x = torch::stable::contiguous(x);
  values = torch::stable::contiguous(values);
  if (bias) bias = torch::stable::contiguous(*bias);
  Product p{.batch = batch_of(x), .type = scalar_of(x), .in = x.size(x.dim() - 1), .out = out_features};
  Tensor y = empty(x, with_last(x, p.out), x.scalar_type());
  if (!p.in) p.batch.samples = p.out ? y.numel() / p.out : 0;
  Tensor packed = empty(x, {keep ? p.batch.padded() * p.in : 0}, ScalarType::Float);
  p.source = x.const_data_ptr();
  p.packed = keep ? packed.mutable_data_ptr<float>() : nullptr;
  p.target = y.mutable_data_ptr();
  p.schedule = read_schedule(schedule, p.out, p.in, values.numel());
  const Tensor weights = in_order(values, p.schedule);
  p.weights = weights.const_data_ptr<float>();
  p.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  p.relu = relu;
  p.run();
  return {y, packed};
}

// products at the mask, each a sum over the batch
Tensor weight_gradient(const Batch& batch, const float* x, int64_t in, const float* dy, int64_t out, const Tensor& values,
                       const Schedule& s) {
  const LinearKernels& kernels = linear_kernels();
  const int64_t cells = int64_t(s.column_tiles) * s.chunks;
  Tensor grad = empty(values, {values.numel()}, ScalarType::Float);
  Tensor products = empty(values, {s.entries()}, ScalarType::Float);
  float *g = grad.mutable_data_ptr<float>(), *sums = products.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, cells, 1, [&](int64_t begin, int64_t end) {
    const auto each_cell = [&](auto f) {
      for (int64_t i = begin; i < end; ++i) f(int(i % s.column_tiles), int(i / s.column_tiles));
    };
    each_cell([&](int k, int c) {
      const int cell = s.cell(k, c);
      std::fill(sums + s.position[cell], sums + s.position[cell + 1], 0.0f);
    });
    for (int64_t t = 0; t < batch.tiles(); ++t) {
      each_cell([&](int k, int c) {
        kernels.sample(s, k, c, x + t * TILE * in, dy + t * TILE * out, batch.lanes(t), sums);
      });
    }
    each_cell([&](int k, int c) {
      const int cell = s.cell(k, c);
      for (int e = s.position[cell]; e < s.position[cell + 1]; ++e)
        if (s.source[e] >= 0) g[s.source[e]] = sums[e];
    });
  });
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_y, Tensor packed_x, Tensor values, std::optional<Tensor> y,
                                            Tensor schedule, Tensor t_schedule, int64_t in_features, bool need_x,
                                            bool need_values, bool need_bias) {
  grad_y = torch::stable::contiguous(grad_y);
  values = torch::stable::contiguous(values);
  if (y) y = torch::stable::contiguous(*y);
  Product p{.batch = batch_of(grad_y), .type = scalar_of(grad_y), .in = grad_y.size(grad_y.dim() - 1), .out = in_features};
  const int64_t out_features = p.in, nnz = values.numel(), tiles = p.batch.tiles();
  std::vector<int64_t> x_shape = need_x ? with_last(grad_y, in_features) : std::vector<int64_t>{0};
  Tensor grad_x = empty(grad_y, x_shape, grad_y.scalar_type());
  Tensor packed = empty(grad_y, {p.batch.padded() * out_features}, ScalarType::Float);
  Tensor sums = torch::stable::new_zeros(packed, {need_bias ? tiles * out_features : 0});
  Tensor transposed;
  p.source = grad_y.const_data_ptr();
  p.gate = y ? y->const_data_ptr() : nullptr;
  p.packed = packed.mutable_data_ptr<float>();
  p.column_sums = need_bias ? sums.mutable_data_ptr<float>() : nullptr;
  if (need_x) {
    p.target = grad_x.mutable_data_ptr();
    p.schedule = read_schedule(t_schedule, in_features, out_features, nnz);
    transposed = in_order(values, p.schedule);
    p.weights = transposed.const_data_ptr<float>();
  }
  p.run();
  Tensor grad_bias = torch::stable::new_zeros(packed, {need_bias ? out_features : 0});
  if (need_bias) {
    float* b = grad_bias.mutable_data_ptr<float>();
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t o = 0; o < out_features; ++o) b[o] += p.column_sums[t * out_features + o];
  }
  Tensor grad_values = empty(values, {0}, ScalarType::Float);
  if (need_values) {
    STD_TORCH_CHECK(packed_x.numel() == p.batch.padded() * in_features, "the packed input was not kept by forward");
    grad_values = weight_gradient(p.batch, packed_x.const_data_ptr<float>(), in_features, p.packed, out_features, values,
                                  read_schedule(schedule, out_features, in_features, nnz));
  }
  return {grad_x, grad_values, grad_bias};
}

}  // namespace
}  // namespace pst

STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CPU, m) {
  m.impl("linear_schedule", TORCH_BOX(&pst::build_schedule));
  m.impl("masked_linear", TORCH_BOX(&pst::forward));
  m.impl("masked_linear_backward", TORCH_BOX(&pst::backward));
}
