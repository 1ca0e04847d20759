// The order in which the kernels of masked_linear.h walk a pattern
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/linear_product.h"

namespace pst {
namespace {

// header of a schedule tensor, followed by chunk_row, first, position, exact_first, groups, exact, exact_run, exact_at, source
// and column (masked_linear.h)
enum Header { ROWS, WIDTH, NNZ, COLUMNS, CHUNKS, GROUPS, EXACT, RUNS, EXACT_AT, BY_COLUMNS, HEADER };

constexpr int ROWS_A_CHUNK = 256;
constexpr int64_t WIDEST_TILE = 65536;  // a column within its tile is a uint16
// What a column of a shared group costs, in nonzeros of interleaved rows: measured 2.6 forward and dX, 3.9 dW
constexpr double SHARED_COST = 3.0;
// Strips of a cell for each 16 columns of it: with fewer, bringing x into the order of samples costs dW more than it gains
constexpr int STRIPS_REUSED = 5;

}  // namespace

Schedule read_schedule(const Tensor& t, int64_t rows, int64_t width, int64_t nnz) {
  const int32_t* p = t.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(t.numel() > HEADER && p[ROWS] == rows && p[WIDTH] == width && p[NNZ] == nnz,
                  "the schedule is of another pattern: make it with linear_schedule(pattern)");
  Schedule s;
  s.columns = p[COLUMNS];
  s.column_tiles = int(std::max<int64_t>(1, (width + s.columns - 1) / s.columns));
  s.chunks = p[CHUNKS];
  const int64_t parts = Schedule::PARTS * s.cells();
  s.chunk_row = p + HEADER;
  s.first = s.chunk_row + s.chunks + 1;
  s.position = s.first + parts + 1;
  s.exact_first = s.position + parts + 1;
  s.groups = reinterpret_cast<const Group*>(s.exact_first + s.cells() + 1);
  s.exact = reinterpret_cast<const Exact*>(s.groups + p[GROUPS]);
  s.exact_run = reinterpret_cast<const Run*>(s.exact + p[EXACT] + 1);
  s.exact_at = reinterpret_cast<const int32_t*>(s.exact_run + p[RUNS]);
  s.source = s.exact_at + p[EXACT_AT];
  s.column = reinterpret_cast<const uint16_t*>(s.source + s.entries());
  s.by_columns = p[BY_COLUMNS];
  return s;
}

namespace {

// A row's nonzeros in a cell: [start, start + length) of the pattern's
struct Part {
  int32_t row, start, length;
};

// The groups of a schedule as they are found
struct Builder {
  const int32_t* col;
  const int32_t* from;  // where the pattern's nonzeros are in the layer's values, or null: the same
  int32_t tile_start = 0;
  std::vector<int32_t> first{0}, position{0}, source{};
  std::vector<Group> groups{};
  std::vector<uint16_t> column{};
  std::vector<int32_t> exact_first{0}, exact_at{};
  std::vector<Exact> exact{};
  std::vector<Run> exact_run{};
  int64_t exact_weights = 0;

  int32_t value(int32_t at) const { return from ? from[at] : at; }

  void add(int32_t at, int32_t c) {
    source.push_back(at < 0 ? at : value(at));
    column.push_back(uint16_t(c - tile_start));
  }

  void interleaved(const Part* parts, int width) {
    Group g{{}, parts[0].length, width};
    for (int m = 0; m < width; ++m) g.row[m] = parts[m].row;
    for (int j = 0; j < g.entries() / width; ++j)
      for (int m = 0; m < width; ++m) {
        const int32_t at = parts[m].start + j;
        j < parts[m].length ? add(at, col[at]) : add(-1, tile_start);
      }
    groups.push_back(g);
  }

  // the next column that any of the rows has, or INT32_MAX; `at` counts how far each row is
  int32_t next_column(const Part* parts, const int32_t* at) const {
    int32_t c = INT32_MAX;
    for (int m = 0; m < GROUP; ++m)
      if (at[m] < parts[m].length) c = std::min(c, col[parts[m].start + at[m]]);
    return c;
  }

  // f(column, for each row its nonzero there or -1) for all columns that any of the rows has
  template <class F>
  void for_columns(const Part* parts, F f) const {
    int32_t at[GROUP] = {};
    for (int32_t c; (c = next_column(parts, at)) != INT32_MAX;) {
      int32_t found[GROUP];
      for (int m = 0; m < GROUP; ++m) {
        const bool has = at[m] < parts[m].length && col[parts[m].start + at[m]] == c;
        found[m] = has ? parts[m].start + at[m]++ : -1;
      }
      f(c, found);
    }
  }

  bool worth_sharing(const Part* parts) const {
    int64_t nonzeros = 0, columns = 0;
    for (int m = 0; m < GROUP; ++m) nonzeros += parts[m].length;
    for_columns(parts, [&](int32_t, const int32_t*) { ++columns; });
    return columns * SHARED_COST < double(nonzeros);
  }

  static std::vector<Run> runs(const int32_t* col, int length, int32_t tile_start) {
    std::vector<Run> found;
    for (int j = 0; j < length; ++j) {
      if (!j || col[j] != col[j - 1] + 1 || found.back().length == UINT16_MAX)
        found.push_back({uint16_t(col[j] - tile_start), 0});
      ++found.back().length;
    }
    return found;
  }

  // strips of the runs that all rows have, or 0: where they have others, too short ones or, by columns, values of a column
  // that do not lie side by side
  int64_t exact_strips(const Part* parts) const {
    const Part& a = parts[0];
    for (int m = 1; m < GROUP; ++m) {
      const Part& b = parts[m];
      if (b.length != a.length || !std::equal(col + a.start, col + a.start + a.length, col + b.start)) return 0;
      for (int j = 0; from && j < a.length; ++j)
        if (value(b.start + j) != value(a.start + j) + m) return 0;
    }
    int64_t strips = 0;
    for (const Run& run : runs(col + a.start, a.length, tile_start)) strips += run.strips();
    return double(strips * 16) <= STRIP_WASTE * a.length ? strips : 0;
  }

  void add_exact(const Part* parts) {
    const Part& a = parts[0];
    const std::vector<Run> found = runs(col + a.start, a.length, tile_start);
    exact.push_back({a.row, a.length, int32_t(exact_weights), int32_t(exact_at.size()), int32_t(exact_run.size()),
                     int32_t(found.size()), int32_t(exact_strips(parts))});
    exact_run.insert(exact_run.end(), found.begin(), found.end());
    exact_weights += a.length * GROUP;
    for (int j = 0; from && j < a.length; ++j) exact_at.push_back(value(a.start + j));
    for (int m = 0; !from && m < GROUP; ++m) exact_at.push_back(parts[m].start);
  }

  void shared(const Part* parts) {
    Group g{{}, 0, GROUP};
    for (int m = 0; m < GROUP; ++m) g.row[m] = parts[m].row;
    for_columns(parts, [&](int32_t c, const int32_t* found) {
      for (int m = 0; m < GROUP; ++m) add(found[m], c);
      ++g.length;
    });
    groups.push_back(g);
  }

  void end_part() {
    while (source.size() % 16) add(-1, tile_start);
    STD_TORCH_CHECK(int64_t(source.size()) + exact_weights <= INT32_MAX, "the packed weights of a layer are indexed with 32 bits; this mask leaves "
                    "more than 2147483647 with their padding: split the layer");
    first.push_back(int32_t(groups.size()));
    position.push_back(int32_t(source.size()));
  }

  // strips of a group, or 0 where its columns are too far apart
  int64_t strips(const Part* parts) const {
    int64_t strips = 0, columns = 0;
    int32_t stop = -1;
    for_columns(parts, [&](int32_t c, const int32_t*) {
      ++columns;
      if (c < stop) return;
      stop = c + 16;
      ++strips;
    });
    return double(strips * 16) <= STRIP_WASTE * double(columns) ? strips : 0;
  }

  void part(const std::vector<const Part*>& groups) {
    for (const Part* parts : groups) shared(parts);
    end_part();
  }

  // rows in ascending order, each once; columns: the tile's
  void cell(std::vector<Part>& parts, bool first_tile, int64_t columns) {
    std::vector<Part> rest;
    std::vector<const Part*> same, dense, scattered;
    int64_t dense_strips = 0;
    for (size_t i = 0; i < parts.size();) {
      if (parts[i].row % GROUP == 0 && i + GROUP <= parts.size() && worth_sharing(&parts[i])) {
        const int64_t exact = exact_strips(&parts[i]), n = exact ? exact : strips(&parts[i]);
        (exact ? same : n ? dense : scattered).push_back(&parts[i]);
        dense_strips += n;
        i += GROUP;
      } else if (parts[i].length || first_tile) {
        rest.push_back(parts[i++]);
      } else {
        ++i;
      }
    }
    if (dense_strips * 16 < columns * STRIPS_REUSED) {
      for (auto* some : {&dense, &same}) {
        if (some == &same && from) break;  // a transposed pattern's dW does not run
        scattered.insert(scattered.begin(), some->begin(), some->end());
        some->clear();
      }
    }
    for (const Part* group : same) add_exact(group);
    exact_first.push_back(int32_t(exact.size()));
    part(dense);
    part(scattered);
    std::stable_sort(rest.begin(), rest.end(), [](const Part& a, const Part& b) { return a.length > b.length; });
    for (size_t i = 0; i < rest.size();) {
      const int n = rest.size() - i >= GROUP ? GROUP : 1;
      interleaved(&rest[i], n);
      i += n;
    }
    end_part();
  }
};

// perm (or null): where the pattern's nonzeros are in the layer's values
Tensor build_schedule(Tensor row_ptr, Tensor col, std::optional<Tensor> perm, int64_t width, int64_t columns) {
  STD_TORCH_CHECK(columns > 0 && columns <= WIDEST_TILE, "a column tile has 1 to 65536 columns, not ", columns);
  const int rows = int(row_ptr.numel() - 1);
  const int chunks = std::clamp(rows / ROWS_A_CHUNK, 1, MOST_CHUNKS);
  const int tiles = int(std::max<int64_t>(1, (width + columns - 1) / columns));
  const int32_t *ptr = row_ptr.const_data_ptr<int32_t>(), *c = col.const_data_ptr<int32_t>();
  const int64_t nnz = ptr[rows];
  std::vector<int32_t> chunk_row{0};
  for (int k = 1; k <= chunks; ++k) {
    // a row weighs one more than its nonzeros, so empty rows are shared out too; blocks of 16 rows for the unpacking
    const int64_t target = (nnz + rows) * k / chunks;
    int r = chunk_row.back();
    while (r < rows && (k == chunks || ptr[r] + r < target)) r = std::min(rows, r + 16);
    chunk_row.push_back(r);
  }
  Builder b{.col = c, .from = perm ? perm->const_data_ptr<int32_t>() : nullptr};
  std::vector<int32_t> next(ptr, ptr + rows);
  for (int t = 0; t < tiles; ++t) {
    b.tile_start = int32_t(t * columns);
    for (int k = 0; k < chunks; ++k) {
      std::vector<Part> parts;
      for (int r = chunk_row[k]; r < chunk_row[k + 1]; ++r) {
        const int32_t start = next[r];
        while (next[r] < ptr[r + 1] && c[next[r]] < (t + 1) * columns) ++next[r];
        parts.push_back({r, start, next[r] - start});
      }
      b.cell(parts, t == 0, std::min(columns, width - t * columns));
    }
  }
  const int32_t header[HEADER] = {rows, int32_t(width), int32_t(nnz), int32_t(columns), chunks, int32_t(b.groups.size()),
                                  int32_t(b.exact.size()), int32_t(b.exact_run.size()), int32_t(b.exact_at.size()),
                                  perm.has_value()};
  b.exact.push_back({rows, 0, int32_t(b.exact_weights)});
  std::vector<int32_t> ints(header, header + HEADER);
  const auto append = [&](const auto& part) {
    const size_t bytes = part.size() * sizeof(part[0]), before = ints.size();
    ints.resize(before + bytes / sizeof(int32_t));
    if (bytes) std::memcpy(ints.data() + before, part.data(), bytes);
  };
  append(chunk_row), append(b.first), append(b.position), append(b.exact_first), append(b.groups), append(b.exact);
  append(b.exact_run), append(b.exact_at), append(b.source), append(b.column);
  Tensor out = torch::stable::new_empty(col, {int64_t(ints.size())});
  std::memcpy(out.mutable_data_ptr<int32_t>(), ints.data(), ints.size() * sizeof(int32_t));
  return out;
}

}  // namespace
}  // namespace pst

STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CPU, m) { m.impl("linear_schedule", TORCH_BOX(&pst::build_schedule)); }
