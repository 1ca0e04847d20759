// Builds the schedule of linear_schedule.h on the CPU, once per mask
#include "cuda/linear_schedule.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "cuda/device.h"
#include "cuda/windows.h"

namespace pst::cuda {
namespace {

// the wider, the fewer times the gradient's rows are read and the fewer sums a row of a cell may have
constexpr int CELL_COLUMNS[] = {512, 448, 384, 320, 256, 192, 128, 96, 64, 32, 16, 8};

// Some of a row's nonzeros in a cell's columns: a thread's
struct Piece {
  int32_t row, begin, count;
};
// bringing a piece's gradients and widening them, in groups
constexpr double PIECE = 1.5;

struct Lists {
  std::vector<int32_t> source{};
  std::vector<uint16_t> slot{};

  int32_t groups() const { return int32_t(source.size() / WARP); }
  void add(int32_t from, int at) {
    source.push_back(from);
    slot.push_back(uint16_t(at));
  }
};

struct Builder {
  const int32_t *ptr, *col, *perm;  // perm: where the pattern's nonzeros are in the layer's values, or null: the same
  int64_t rows, width;
  int columns, stages;
  Lists product{}, cells{};
  std::vector<int32_t> row{}, first{}, cell_from{}, cell_row{}, cell_first{};
  int cell_columns = 0;
  double cell_cycles = 0;  // estimated
  Windows windows{};
  GradientWindows gradient{};

  int32_t source(int32_t e) const { return perm ? perm[e] : e; }

  // rows of a chunk, longest first, -1 above the last
  void sort_rows(int chunk, int32_t* out) const {
    const int32_t begin = chunk * ROWS, n = int32_t(std::min<int64_t>(ROWS, rows - begin));
    std::iota(out, out + n, begin);
    std::fill(out + n, out + ROWS, -1);
    std::stable_sort(out, out + n, [&](int32_t a, int32_t b) { return ptr[a + 1] - ptr[a] > ptr[b + 1] - ptr[b]; });
  }

  // one warp's lists: in each stage as many nonzeros of each row, from those that have arrived and soonest those that leave
  void walk(const int32_t* warp_row) {
    int32_t next[WARP], end[WARP];
    int64_t total = 0, longest = 0;
    for (int i = 0; i < WARP; ++i) {
      const int32_t r = warp_row[i];
      next[i] = r < 0 ? 0 : ptr[r];
      end[i] = r < 0 ? 0 : ptr[r + 1];
      total += end[i] - next[i];
      longest = std::max<int64_t>(longest, end[i] - next[i]);
    }
    const double stretch = total ? double(longest) * WARP / double(total) : 0;
    std::vector<int64_t> arrived(stages);  // nonzeros of all rows with columns up to a stage's
    for (int i = 0; i < WARP; ++i)
      for (int32_t e = next[i]; e < end[i]; ++e) ++arrived[col[e] / columns];
    for (int s = 1; s < stages; ++s) arrived[s] += arrived[s - 1];
    int64_t done = 0;
    for (int s = 0; s < stages; ++s) {
      first.push_back(product.groups());
      const bool last = s + 1 == stages;
      const int64_t leaving = int64_t(s - LAG + 1) * columns, here = int64_t(s + 1) * columns;
      // half way between what has arrived and what leaves: each row may be ahead or behind by LAG / 2 stages
      const double pace = stretch / WARP * (double(arrived[s]) + (s >= LAG ? double(arrived[s - LAG]) : 0)) / 2;
      int64_t n = std::max<int64_t>(0, int64_t(pace) - done);
      for (int i = 0; i < WARP; ++i) {
        int64_t must = 0;
        while (next[i] + must < end[i] && (last || col[next[i] + must] < leaving)) ++must;
        n = std::max(n, must);
      }
      int64_t most = 0;  // no group of padding alone
      for (int i = 0; i < WARP; ++i) {
        int64_t can = 0;
        while (can < n && next[i] + can < end[i] && col[next[i] + can] < here) ++can;
        most = std::max(most, can);
      }
      for (int64_t j = 0; j < most; ++j)
        for (int i = 0; i < WARP; ++i) {
          const bool has = next[i] < end[i] && col[next[i]] < here;
          has ? product.add(source(next[i]), col[next[i]] % (RING * columns)) : product.add(-1, RING * columns);
          next[i] += has;
        }
      done += most;
    }
  }

  void products() {
    row.resize(int64_t(chunks_of(rows)) * ROWS);
    for (int c = 0; c < chunks_of(rows); ++c) {
      int32_t* of_chunk = row.data() + int64_t(c) * ROWS;
      sort_rows(c, of_chunk);
      for (int w = 0; w < WARPS; ++w) walk(of_chunk + w * WARP);
    }
    first.push_back(product.groups());
  }

  // of each range of columns, longest first; rows longer than `most` in several
  std::vector<std::vector<Piece>> pieces_of(int of_columns, int most) const {
    std::vector<std::vector<Piece>> pieces((width + of_columns - 1) / of_columns);
    std::vector<int32_t> next(ptr, ptr + rows);
    for (size_t i = 0; i < pieces.size(); ++i) {
      for (int32_t r = 0; r < rows; ++r) {
        const int32_t begin = next[r];
        int32_t& end = next[r];
        while (end < ptr[r + 1] && col[end] < int64_t(i + 1) * of_columns) ++end;
        const int32_t n = end - begin, parts = (n + most - 1) / most;
        for (int32_t p = 0; p < parts; ++p) {
          const int32_t from = int32_t(int64_t(n) * p / parts), to = int32_t(int64_t(n) * (p + 1) / parts);
          pieces[i].push_back({r, begin + from, to - from});
        }
      }
      std::stable_sort(pieces[i].begin(), pieces[i].end(), [](Piece a, Piece b) { return a.count > b.count; });
    }
    return pieces;
  }

  // a warp's pieces are of about one length however the rows' are; cells of the columns that promise the least time
  void cells_of(Budget budget) {
    double least = HUGE_VAL;
    std::vector<std::vector<Piece>> best;
    for (const int of_columns : CELL_COLUMNS) {
      const int most = budget.cell_sums(of_columns) / ROWS;
      if (most < 1) continue;
      auto pieces = pieces_of(of_columns, most);
      double cycles = 0;
      for (const auto& p : pieces) {
        double groups = 0;
        for (size_t i = 0; i < p.size(); i += WARP) groups += PIECE + p[i].count;
        const double cells = double(chunks_of(int64_t(p.size())));
        cycles += std::max(43 * groups, cells * (ROWS + of_columns) * ROW_BYTES / L2_BYTES);
      }
      if (cycles >= least) continue;
      least = cycles;
      best = std::move(pieces);
      cell_columns = of_columns;
    }
    cell_cycles = least;
    for (size_t i = 0; i < best.size(); ++i)
      for (size_t from = 0; from < best[i].size(); from += ROWS) {
        best[i].resize(std::max(best[i].size(), from + ROWS), {-1, 0, 0});
        cell_from.push_back(int32_t(i) * cell_columns);
        for (int w = 0; w < WARPS; ++w) {
          const Piece* const piece = best[i].data() + from + w * WARP;
          cell_first.push_back(cells.groups());
          for (int t = 0; t < WARP; ++t) cell_row.push_back(piece[t].row);
          for (int32_t j = 0; j < piece[0].count; ++j)
            for (int t = 0; t < WARP; ++t) {
              const int32_t e = piece[t].begin + j;
              j < piece[t].count ? cells.add(source(e), int(col[e] - cell_from.back())) : cells.add(-1, 0);
            }
        }
      }
    cell_first.push_back(cells.groups());
  }

  std::vector<int32_t> words(int64_t nnz) const {
    Header h{};
    std::vector<int32_t> out(HEADER);
    auto put = [&](const auto& v) {
      const int32_t at = int32_t(out.size());
      out.resize(out.size() + (v.size() * sizeof(v[0]) + 3) / 4);
      if (!v.empty()) std::memcpy(out.data() + at, v.data(), v.size() * sizeof(v[0]));
      return at;
    };
    h.rows = int32_t(rows);
    h.width = int32_t(width);
    h.nnz = int32_t(nnz);
    h.columns = columns;
    h.stages = stages;
    h.groups = product.groups();
    h.row = put(row);
    h.first = put(first);
    h.source = put(product.source);
    h.slot = put(product.slot);
    h.cells = int32_t(cell_from.size());
    h.cell_columns = cell_columns;
    h.cell_groups = cells.groups();
    h.cell_from = put(cell_from);
    h.cell_row = put(cell_row);
    h.cell_first = put(cell_first);
    h.cell_source = put(cells.source);
    h.cell_slot = put(cells.slot);
    h.window_tiles = windows.budget.tiles;
    h.window_columns = windows.columns;
    h.window_stages = windows.stages;
    h.window_groups = windows.groups();
    h.window_row = put(windows.row);
    h.window_first = put(windows.first);
    h.window_slot = put(windows.slot);
    h.window_place = put(windows.place);
    h.gradient_cells = int32_t(gradient.cells());
    h.gradient_place = put(gradient.place);
    h.gradient_column = put(gradient.column);
    h.gradient_row = put(gradient.row);
    h.gradient_first = put(gradient.first);
    h.gradient_slot = put(gradient.slot);
    h.gradient_lane = put(gradient.lane);
    h.gradient_base = put(gradient.base);
    h.gradient_source = put(gradient.source);
    std::memcpy(out.data(), &h, sizeof(h));
    int64_t length = int64_t(out.size());
    while (!length_fits(length, rows, width, nnz) || window_tiles(length) != h.window_tiles ||
           gradient_windows(length) != (h.gradient_cells > 0))
      ++length;
    out.resize(length);
    return out;
  }
};

// Cycles of a multiprocessor for 64 samples. Groups of the multiply-adds take 40 each (docs/gpu.md); both wait for L2 too.
double cycles_of(const Builder& b) {
  const int64_t bytes = int64_t(chunks_of(b.rows)) * b.width * ROW_BYTES + int64_t(b.product.groups()) * WARP * 8;
  return std::max(40.0 * b.product.groups(), bytes / L2_BYTES);
}

// windows: tiles of samples a block, 0 for none, -1 for what is fastest
void choose_windows(Builder& b, Budget budget, int64_t nnz, int windows) {
  if (windows == 0 || !nnz) return;
  double least = windows < 0 ? 0.9 * cycles_of(b) : HUGE_VAL;  // an estimate: more than a little
  for (int tiles = 1; tiles <= MOST_TILES; ++tiles) {
    if (windows > 0 && tiles != windows) continue;
    Windows w = windows_of({b.ptr, b.col, b.perm, b.rows, b.width}, budget, tiles);
    if (w.cycles(b.rows, b.width) >= least || w.groups() > most_groups(nnz)) continue;
    least = w.cycles(b.rows, b.width);
    b.windows = std::move(w);
  }
  if (b.perm) return;
  GradientWindows g = gradient_windows_of({b.ptr, b.col, b.perm, b.rows, b.width}, budget);
  if (windows > 0 || g.cycles() < 0.9 * b.cell_cycles) b.gradient = std::move(g);
}

// columns is the CPU's affair, below zero it asks for windows of -1 - columns tiles; perm is given for the transposed pattern,
// whose schedule has no walk of the weight gradient
Tensor build_schedule(Tensor row_ptr, Tensor col, std::optional<Tensor> perm, int64_t width, int64_t columns) {
  const Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor ptr = torch::stable::to(row_ptr, cpu), c = torch::stable::to(col, cpu);
  const std::optional<Tensor> p = perm ? std::optional(torch::stable::to(*perm, cpu)) : std::nullopt;
  const Budget budget = budget_of(col);
  const int stage = budget.columns();
  Builder b{.ptr = ptr.const_data_ptr<int32_t>(),
            .col = c.const_data_ptr<int32_t>(),
            .perm = p ? p->const_data_ptr<int32_t>() : nullptr,
            .rows = ptr.numel() - 1,
            .width = width,
            .columns = stage,
            .stages = int((width + stage - 1) / stage)};
  b.products();
  if (!perm) b.cells_of(budget);
  choose_windows(b, budget, c.numel(), columns < 0 ? int(-1 - columns) : -1);
  STD_TORCH_CHECK(int64_t(b.product.source.size()) + int64_t(b.cells.source.size()) < INT32_MAX / 2,
                  "the packed weights of a layer are indexed with 32 bits; this mask leaves too many: split the layer");
  const std::vector<int32_t> words = b.words(c.numel());
  Tensor out = torch::stable::new_empty(c, {int64_t(words.size())});
  std::memcpy(out.mutable_data_ptr<int32_t>(), words.data(), words.size() * 4);
  return torch::stable::to(out, col.device());
}

}  // namespace
}  // namespace pst::cuda

STABLE_TORCH_LIBRARY_IMPL(pysparse_ticket, CUDA, m) {
  m.impl("linear_schedule", TORCH_BOX(&pst::cuda::build_schedule));
}
