// Windows for tensor cores (linear_schedule.h), built on the CPU
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda/linear_schedule.h"

namespace pst::cuda {

constexpr double L2_BYTES = 26;  // a cycle and multiprocessor: 6 TB/s of an H100

struct Windows {
  WindowBudget budget{};
  int columns = 0, stages = 0;
  int64_t reads = 0;  // of eight columns' chunks: cycles of shared memory
  std::vector<int32_t> row{}, first{}, place{};
  std::vector<uint16_t> slot{};

  int32_t groups() const { return first.empty() ? 0 : first.back(); }

  // of a multiprocessor for 64 samples: shared memory and what comes through L1 beside it (512 bytes of weights and 32 of
  // slots a group), tensor cores at 62% of their rate (16 x 8 x 16 in 1.6 cycles), L2
  double cycles(int64_t rows, int64_t width) const {
    const int t = budget.tiles;
    const double shared = double(reads) * CHUNKS * t + 5.0 * groups(), tensor = 8 * 1.6 * t * groups();
    const double bytes = double(budget.chunks(rows)) * double(width) * ROW_BYTES * t + (GROUP_BYTES + 32.0) * groups();
    return std::max({shared, tensor, bytes / L2_BYTES}) / t;
  }
};

// see Builder
struct Rows {
  const int32_t *ptr, *col, *perm;
  int64_t rows, width;
};

// The columns of one window that are in the ring, by slot modulo 8, as the product takes them
struct Waiting {
  std::vector<int32_t> columns[CHUNKS];
  size_t taken[CHUNKS] = {};

  size_t left(int c) const { return columns[c].size() - taken[c]; }
  bool any() const {
    for (int c = 0; c < CHUNKS; ++c)
      if (left(c)) return true;
    return false;
  }
  size_t least() const {
    size_t n = left(0);
    for (int c = 1; c < CHUNKS; ++c) n = std::min(n, left(c));
    return n;
  }
  bool leaves(int64_t before) const {
    for (int c = 0; c < CHUNKS; ++c)
      if (left(c) && columns[c][taken[c]] < before) return true;
    return false;
  }
  // Eight columns, -1 for none, of as many remainders as there are; returns how many share the commonest
  int take(int32_t (&out)[CHUNKS]) {
    int used[CHUNKS] = {}, most = 1;
    for (int32_t& o : out) {
      int best = -1;
      for (int c = 0; c < CHUNKS; ++c)
        if (left(c) && (best < 0 || used[c] < used[best] || (used[c] == used[best] && left(c) > left(best)))) best = c;
      o = best < 0 ? -1 : columns[best][taken[best]++];
      if (best >= 0) most = std::max(most, ++used[best]);
    }
    // padding reads zeros, of remainders that are free
    for (int32_t& o : out)
      if (o < 0) {
        const int c = int(std::min_element(used, used + CHUNKS) - used);
        ++used[c];
        o = -1 - c;
      }
    return most;
  }
};

// the sorted columns in which any of a window's rows has a weight
inline void columns_of(const Rows& m, const int32_t* window, std::vector<int32_t>& out) {
  out.clear();
  for (int i = 0; i < WINDOW; ++i)
    if (window[i] >= 0) out.insert(out.end(), m.col + m.ptr[window[i]], m.col + m.ptr[window[i] + 1]);
  std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
}

inline Windows windows_of(const Rows& m, Budget memory, int tiles) {
  Windows w;
  w.budget = {tiles};
  w.columns = w.budget.columns(memory);
  w.stages = int((m.width + w.columns - 1) / w.columns);
  const int windows = w.budget.windows(), of_chunk = w.budget.rows(), chunks = w.budget.chunks(m.rows);
  w.row.assign(int64_t(chunks) * of_chunk, -1);
  w.place.resize(m.rows ? m.ptr[m.rows] : 0);
  std::vector<int32_t> order(of_chunk), at(m.width);
  std::vector<std::vector<int32_t>> columns(windows);
  int32_t groups = 0;
  for (int c = 0; c < chunks; ++c) {
    const int32_t begin = c * of_chunk, n = int32_t(std::min<int64_t>(of_chunk, m.rows - begin));
    std::iota(order.begin(), order.begin() + n, begin);
    std::fill(order.begin() + n, order.end(), -1);
    std::stable_sort(order.begin(), order.begin() + n,
                     [&](int32_t a, int32_t b) { return m.ptr[a + 1] - m.ptr[a] > m.ptr[b + 1] - m.ptr[b]; });
    for (int warp = 0; warp < WARPS; ++warp) {
      // of two windows one is among the longest, the other among the shortest
      int32_t* const rows = w.row.data() + (int64_t(c) * WARPS + warp) * windows * WINDOW;
      for (int p = 0; p < windows; ++p) {
        const int32_t* from = order.data() + (p ? 2 * WARPS - 1 - warp : warp) * WINDOW;
        std::copy(from, from + WINDOW, rows + p * WINDOW);
        columns_of(m, from, columns[p]);
      }
      std::vector<Waiting> waiting(windows);
      std::vector<size_t> arrived(windows);
      std::vector<std::vector<int32_t>> taken(windows);  // of each window its groups' columns, and where they are
      for (int s = 0; s < w.stages; ++s)
        for (int p = 0; p < windows; ++p) {
          Waiting& queue = waiting[p];
          w.first.push_back(groups);
          for (size_t& a = arrived[p]; a < columns[p].size() && columns[p][a] < int64_t(s + 1) * w.columns; ++a)
            queue.columns[columns[p][a] % CHUNKS].push_back(columns[p][a]);
          const int64_t leaving = int64_t(s - LAG + 1) * w.columns;
          while (s + 1 == w.stages ? queue.any() : queue.least() >= 2 || queue.leaves(leaving)) {
            for (int half = 0; half < GROUP_COLUMNS / CHUNKS; ++half) {
              int32_t eight[CHUNKS];
              w.reads += queue.take(eight);
              for (int i = 0; i < CHUNKS; ++i) {
                const int32_t column = eight[i];
                const int slot = column < 0 ? RING * w.columns - 1 - column : column % (RING * w.columns);
                w.slot.push_back(uint16_t(slot));
                taken[p].push_back(column);
                taken[p].push_back(groups * GROUP_COLUMNS + half * CHUNKS + i);
              }
            }
            ++groups;
          }
        }
      for (int p = 0; p < windows; ++p) {
        for (size_t i = 0; i < taken[p].size(); i += 2)
          if (taken[p][i] >= 0) at[taken[p][i]] = taken[p][i + 1];
        for (int i = 0; i < WINDOW; ++i) {
          const int32_t r = rows[p * WINDOW + i];
          if (r < 0) continue;
          for (int32_t e = m.ptr[r]; e < m.ptr[r + 1]; ++e) {
            // as multiply_matrices wants it: words of the lane, of columns 0 to 7 and 8 to 15 for rows 0 to 7, then 8 to 15
            const int k = at[m.col[e]] % GROUP_COLUMNS, lane = i % 8 * 4 + k % 8 / 2, word = i / 8 * 2 + k / 8;
            w.place[m.perm ? m.perm[e] : e] = (at[m.col[e]] / GROUP_COLUMNS * WARP + lane) * 8 + word * 2 + k % 2;
          }
        }
      }
    }
  }
  w.first.push_back(groups);
  w.slot.insert(w.slot.end(), GROUP_COLUMNS, uint16_t(RING * w.columns));  // read ahead, not used
  return w;
}

// The weight gradient's walk
struct GradientWindows {
  int64_t reads = 0;
  std::vector<int32_t> place{}, column{}, row{}, first{}, base{}, source{};
  std::vector<uint16_t> slot{}, lane{};

  int64_t cells() const { return int64_t(row.size() / CELL_ROWS); }

  // of a multiprocessor for 64 samples, as Windows': a cell's columns and rows are written to shared memory, rows read once
  double cycles() const {
    const double columns = double(column.size()), shared = double(reads) * CHUNKS + columns + 2.0 * CELL_ROWS * cells();
    const double tensor = 8 * 1.6 * double(base.size()), bytes = (columns + double(CELL_ROWS) * cells()) * ROW_BYTES;
    return std::max({shared, tensor, bytes / L2_BYTES});
  }
};

// Columns to places such that of each window's columns about as many have every remainder: those of most windows first, each
// where its windows have the fewest; -1 for a place without one. member: bit w of a column that window w has.
inline std::vector<int32_t> spread(std::vector<int32_t> columns, const std::vector<uint16_t>& member) {
  std::stable_sort(columns.begin(), columns.end(),
                   [&](int32_t a, int32_t b) { return std::popcount(member[a]) > std::popcount(member[b]); });
  const size_t most = columns.size() / CHUNKS + 2;
  int count[WARPS][CHUNKS] = {};
  std::vector<int32_t> of[CHUNKS];
  for (const int32_t column : columns) {
    int best = -1, least = 0;
    for (int c = 0; c < CHUNKS; ++c) {
      int n = 0;
      for (int w = 0; w < WARPS; ++w) n += (member[column] >> w & 1) * count[w][c];
      if (of[c].size() < most && (best < 0 || n < least || (n == least && of[c].size() < of[best].size()))) best = c, least = n;
    }
    for (int w = 0; w < WARPS; ++w) count[w][best] += member[column] >> w & 1;
    of[best].push_back(column);
  }
  size_t longest = 0;
  for (const auto& c : of) longest = std::max(longest, c.size());
  std::vector<int32_t> out;
  for (size_t i = 0; i < longest; ++i)
    for (const auto& c : of) out.push_back(i < c.size() ? c[i] : -1);
  return out;
}

inline GradientWindows gradient_windows_of(const Rows& m, Budget memory) {
  GradientWindows w;
  std::vector<int32_t> order((m.rows + CELL_ROWS - 1) / CELL_ROWS * CELL_ROWS, -1), at(m.width), next(m.ptr, m.ptr + m.rows);
  std::iota(order.begin(), order.begin() + m.rows, 0);
  std::stable_sort(order.begin(), order.begin() + m.rows,
                   [&](int32_t a, int32_t b) { return m.ptr[a + 1] - m.ptr[a] > m.ptr[b + 1] - m.ptr[b]; });
  std::vector<uint16_t> member(m.width);
  std::vector<int32_t> slot_of(m.width), used;
  constexpr size_t MOST = MOST_CELL_GROUPS * GROUP_COLUMNS;
  for (size_t chunk = 0; chunk < order.size(); chunk += CELL_ROWS) {
    std::vector<int32_t> columns[WARPS];
    size_t taken[WARPS] = {}, until[WARPS] = {};
    for (int i = 0; i < WARPS; ++i) columns_of(m, order.data() + chunk + i * WINDOW, columns[i]);
    for (;;) {
      // the next columns that any window has, as many as each window and the memory take
      std::fill(member.begin(), member.end(), 0);
      used.clear();
      for (bool room = true; room && used.size() + 4 * CHUNKS <= size_t(memory.range());) {
        int64_t column = m.width;
        for (int i = 0; i < WARPS; ++i)
          if (until[i] < columns[i].size()) column = std::min<int64_t>(column, columns[i][until[i]]);
        if (column == m.width) break;
        uint16_t has = 0;
        for (int i = 0; i < WARPS; ++i)
          if (until[i] < columns[i].size() && columns[i][until[i]] == column) {
            has |= uint16_t(1u << i);
            room = room && until[i] - taken[i] < MOST;
          }
        if (!room) break;
        for (int i = 0; i < WARPS; ++i) until[i] += has >> i & 1;
        member[column] = has;
        used.push_back(int32_t(column));
      }
      if (used.empty()) break;
      const int64_t to = used.back() + 1;
      const std::vector<int32_t> places = spread(used, member);
      w.place.push_back(int32_t(w.column.size()));
      w.column.insert(w.column.end(), places.begin(), places.end());
      for (size_t i = 0; i < places.size(); ++i)
        if (places[i] >= 0) slot_of[places[i]] = int32_t(i);
      for (int i = 0; i < WARPS; ++i) {
        const int32_t* const rows = order.data() + chunk + i * WINDOW;
        w.row.insert(w.row.end(), rows, rows + WINDOW);
        w.first.push_back(int32_t(w.base.size()));
        Waiting queue;
        for (size_t& n = taken[i]; n < until[i]; ++n)
          queue.columns[slot_of[columns[i][n]] % CHUNKS].push_back(columns[i][n]);
        const size_t first = w.slot.size();
        while (queue.any())
          for (int half = 0; half < GROUP_COLUMNS / CHUNKS; ++half) {
            int32_t eight[CHUNKS];
            w.reads += queue.take(eight);
            for (const int32_t column : eight) {
              if (column >= 0) at[column] = int32_t(w.slot.size() - first);
              w.slot.push_back(uint16_t(column < 0 ? -1 - column : slot_of[column]));  // padding's sums are not stored
            }
          }
        // of each group and lane the weights among its sums, as multiply_matrices has them
        const size_t groups = (w.slot.size() - first) / GROUP_COLUMNS;
        std::vector<int32_t> source(groups * WARP * 8, -1);
        for (int r = 0; r < WINDOW; ++r) {
          if (rows[r] < 0) continue;
          for (int32_t& e = next[rows[r]]; e < m.ptr[rows[r] + 1] && m.col[e] < to; ++e) {
            const int k = at[m.col[e]] % GROUP_COLUMNS, lane = k % 8 * 4 + r % 8 / 2, j = r / 8 * 4 + k / 8 * 2 + r % 2;
            source[(at[m.col[e]] / GROUP_COLUMNS * WARP + lane) * 8 + j] = m.perm ? m.perm[e] : e;
          }
        }
        for (size_t g = 0; g < groups; ++g) {
          w.base.push_back(int32_t(w.source.size()));
          for (int lane = 0; lane < WARP; ++lane) {
            unsigned bits = unsigned(w.source.size() - w.base.back()) << 8;
            for (int j = 0; j < 8; ++j)
              if (const int32_t e = source[(g * WARP + lane) * 8 + j]; e >= 0) {
                bits |= 1u << j;
                w.source.push_back(e);
              }
            w.lane.push_back(uint16_t(bits));
          }
        }
      }
    }
  }
  w.place.push_back(int32_t(w.column.size()));
  w.first.push_back(int32_t(w.base.size()));
  return w;
}

}  // namespace pst::cuda
