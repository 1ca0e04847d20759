// The order in which the kernels of masked_linear.h walk a pattern
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/linear_product.h"

namespace pst {
namespace {

// header of a schedule tensor, followed by chunk_row, first, position, groups, source and column (masked_linear.h)
enum Header { ROWS, WIDTH, NNZ, COLUMNS, CHUNKS, GROUPS, HEADER };

constexpr int ROWS_A_CHUNK = 256;
constexpr int64_t WIDEST_TILE = 65536;  // a column within its tile is a uint16

}  // namespace

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

namespace {

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

}  // namespace
}  // namespace pst

STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CPU, m) { m.impl("linear_schedule", TORCH_BOX(&pst::build_schedule)); }
