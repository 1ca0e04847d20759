// dW of groups of rows that share their columns (masked_linear.h), part of masked_linear.inl

// GROUP rows and C columns of a shared group, over all tiles before the one sum across lanes
template <int C>
PST_INLINE void sample_block(const Group& g, const uint16_t* column, int64_t first_column, const float* x, int64_t in,
                             const float* dy, int64_t out, int64_t padded, float* products) {
  V sums[W] = {};
  for (int64_t t = 0; t < padded; t += TILE, x += TILE * in, dy += TILE * out) {
    const int64_t lanes = padded - t < TILE ? padded - t : TILE;
    const float *at[C], *d[GROUP];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) at[c] = x + (first_column + column[c * GROUP]) * lanes;
#pragma GCC unroll 4
    for (int r = 0; r < GROUP; ++r) d[r] = dy + g.row[r] * lanes;
#pragma GCC unroll 1
    for (int64_t lane = 0; lane < lanes; lane += W) {
      V v[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) v[c] = load(at[c] + lane);
#pragma GCC unroll 4
      for (int r = 0; r < GROUP; ++r) {
        const V u = load(d[r] + lane);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sums[c * GROUP + r] += u * v[c];
      }
    }
  }
  const V total = reduce_rows(sums);
  if constexpr (C * GROUP == W) {
    store(products, load(products) + total);
  } else {
    for (int i = 0; i < C * GROUP; ++i) products[i] += total[i];
  }
}

// columns of a shared group between two visits of its rows: 4 tiles of them are 32 KB, which all groups read in L1
constexpr int SHARED_BLOCK = 32;

static void sample_shared(const Schedule& s, int column_tile, int chunk, const float* x, int64_t in, const float* dy,
                          int64_t out, int64_t padded, float* products) {
  const int shared = s.part(column_tile, chunk, Schedule::SHARED);
  const Group *begin = s.groups + s.first[shared], *end = s.groups + s.first[shared + 1];
  const int64_t first_column = int64_t(column_tile) * s.columns;
  bool more = begin < end;
  for (int start = 0; more; start += SHARED_BLOCK) {
    more = false;
    int64_t entry = s.position[shared];
    for (const Group* g = begin; g < end; entry += g->entries(), ++g) {
      const int stop = g->length < start + SHARED_BLOCK ? g->length : start + SHARED_BLOCK;
      more |= g->length > stop;
      int j = start;
      const auto run = [&](auto c) {
        constexpr int C = decltype(c)::value;
        for (; j + C <= stop; j += C)
          sample_block<C>(*g, s.column + entry + j * GROUP, first_column, x, in, dy, out, padded,
                          products + entry + j * GROUP);
      };
      run(std::integral_constant<int, SHARED_COLUMNS>());
      run(std::integral_constant<int, 1>());
    }
  }
}

// strips whose sums are in registers together, and vectors of a strip at a time
constexpr int STRIPS_TOGETHER = W == 16 ? 4 : 1;
constexpr int STRIP_VECTORS = W == 16 ? 1 : 2;
// strips of all groups between two visits of a group: STRIP_SAMPLES of them are 32 KB, which all groups read in L1
constexpr int STRIPS_VISITED = 4;

// A few batch tiles of dy, and of x in the order of samples: [samples, ld]
struct StripOperands {
  const float *dy, *x;
  int64_t out, ld;
  int samples;
  bool first;  // of the batch
};

// total[row] += dy[row] * x over the lanes of a batch tile; d: the first row's, x: the strips' first samples
template <int S>
PST_INLINE void add_samples(const float* d, int64_t lanes, const float* const* x, int64_t ld, V (*total)[S * STRIP_VECTORS]) {
  constexpr int N = STRIP_VECTORS;
  int64_t from = 0;  // one register for all strips
#pragma GCC unroll 4
  for (int64_t lane = 0; lane < lanes; ++lane, from += ld) {
    V in[S * N];
#pragma GCC unroll 4
    for (int v = 0; v < S * N; ++v) in[v] = load(x[v / N] + from + v % N * W);
#pragma GCC unroll 4
    for (int r = 0; r < GROUP; ++r) {
      const V w = splat(d[r * lanes + lane]);
#pragma GCC unroll 4
      for (int v = 0; v < S * N; ++v) total[r][v] += w * in[v];
    }
  }
}

// sums[strip][row][16] (+)= dy[row] * x, a strip's columns being those from start[strip] on. Not inlined: its pointers would
// be spilled among its caller's.
template <int S>
__attribute__((noinline)) static void add_strips(const StripOperands& o, int64_t row, const int32_t* start, float* sums) {
  constexpr int N = STRIP_VECTORS;
  for (int offset = 0; offset < 16; offset += N * W) {
    V total[GROUP][S * N];
#pragma GCC unroll 4
    for (int r = 0; r < GROUP; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < S * N; ++v)
        total[r][v] = o.first ? V{} : load(sums + ((v / N) * GROUP + r) * 16 + offset + v % N * W);
    }
    const float *x[S], *dy = o.dy;
#pragma GCC unroll 4
    for (int i = 0; i < S; ++i) x[i] = o.x + start[i] + offset;
    for (int sample = 0; sample < o.samples; sample += TILE, dy += TILE * o.out) {
      if (o.samples - sample >= TILE) {
        add_samples<S>(dy + row * TILE, TILE, x, o.ld, total);
      } else {
        add_samples<S>(dy + row * (o.samples - sample), o.samples - sample, x, o.ld, total);
      }
#pragma GCC unroll 4
      for (int i = 0; i < S; ++i) x[i] += TILE * o.ld;
    }
#pragma GCC unroll 4
    for (int r = 0; r < GROUP; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < S * N; ++v) store(sums + ((v / N) * GROUP + r) * 16 + offset + v % N * W, total[r][v]);
    }
  }
}

// grad of an exact group from its sums[strip][row][16]; the next group's sums
static const float* put_strips(const Exact& e, const Run* run, const int32_t* at, const float* sums, float* grad) {
  int64_t column = 0;
  for (const Run* end = run + e.runs; run < end; ++run) {
    for (int left = run->length; left > 0; left -= 16, sums += GROUP * 16) {
      const int count = left < 16 ? left : 16;
      for (int r = 0; r < GROUP; ++r) {
        if (count == 16) {
          __builtin_memcpy(grad + at[r] + column, sums + r * 16, 16 * sizeof(float));
        } else {
          __builtin_memcpy(grad + at[r] + column, sums + r * 16, count * sizeof(float));
        }
      }
      column += count;
    }
  }
  return sums;
}

// the same of a shared group
static const float* put_strips(const Group& g, const uint16_t* column, const int32_t* source, const float* sums,
                               float* grad) {
  for (int j = 0; j < g.length; sums += GROUP * 16) {
    const int end = end_of_strip(column, j, g.length), count = end - j, start = column[j * GROUP];
    int lane[16];
    for (int i = 0; i < count; ++i) lane[i] = column[(j + i) * GROUP] - start;
    for (int r = 0; r < GROUP; ++r) {
      const int32_t* at = source + j * GROUP + r;
      const float* from = sums + r * 16;
      // a row that has all columns of the strip has them side by side among the values
      const bool all = at[0] >= 0 && at[(count - 1) * GROUP] == at[0] + count - 1;
      if (all && count == 16) {
        __builtin_memcpy(grad + at[0], from, 16 * sizeof(float));
      } else if (all) {
        for (int i = 0; i < count; ++i) grad[at[0] + i] = from[lane[i]];
      } else {
        for (int i = 0; i < count; ++i)
          if (at[i * GROUP] >= 0) grad[at[i * GROUP]] = from[lane[i]];
      }
    }
    j = end;
  }
  return sums;
}

// The groups of a cell that run in strips: its exact ones, then others
struct StripCell {
  const Exact *exact, *exact_end;
  const Group *groups, *groups_end;
  int64_t entry;
  float* sums;      // [strips][row][16]
  int32_t* starts;  // [strips]
  int32_t* ends;    // [groups] into strips
  int count;        // of groups
  int most;         // strips of a group

  PST_INLINE void find(const Schedule& s, int column_tile, int chunk, float*& memory) {
    const int part = s.part(column_tile, chunk, Schedule::STRIPS), cell = part / Schedule::PARTS;
    exact = s.exact + s.exact_first[cell];
    exact_end = s.exact + s.exact_first[cell + 1];
    groups = s.groups + s.first[part];
    groups_end = s.groups + s.first[part + 1];
    entry = s.position[part];
    const Schedule::Strips strips = s.strips(column_tile, chunk);
    sums = memory;
    starts = reinterpret_cast<int32_t*>(sums + strips.most * GROUP * 16);
    ends = starts + strips.most;
    memory += strips.memory();
    int at = 0;
    count = most = 0;
    const auto end = [&] {
      const int own = at - (count ? ends[count - 1] : 0);
      most = own > most ? own : most;
      ends[count++] = at;
    };
    for (const Exact* e = exact; e < exact_end; ++e, end())
      for (const Run* run = s.exact_run + e->run; run < s.exact_run + e->run + e->runs; ++run)
        for (int j = 0; j < run->length; j += 16) starts[at++] = run->column + j;
    const uint16_t* column = s.column + entry;
    for (const Group* g = groups; g < groups_end; column += g->entries(), ++g, end())
      for (int j = 0; j < g->length; j = end_of_strip(column, j, g->length)) starts[at++] = column[j * GROUP];
  }

  PST_INLINE int64_t row(int group) const {
    const int exacts = int(exact_end - exact);
    return group < exacts ? exact[group].row : groups[group - exacts].row[0];
  }

  PST_INLINE void add(const StripOperands& operands) const {
    for (int visit = 0; visit < most; visit += STRIPS_VISITED) {
      int i = visit;
      for (int g = 0; g < count; i = visit + ends[g++]) {
        const int stop = ends[g] < i + STRIPS_VISITED ? ends[g] : i + STRIPS_VISITED;
        const auto run = [&](auto c) {
          constexpr int C = decltype(c)::value;
          for (; i + C <= stop; i += C) add_strips<C>(operands, row(g), starts + i, sums + i * GROUP * 16);
        };
        run(std::integral_constant<int, STRIPS_TOGETHER>());
        if constexpr (STRIPS_TOGETHER > 3) run(std::integral_constant<int, 3>());
        if constexpr (STRIPS_TOGETHER > 2) run(std::integral_constant<int, 2>());
        if constexpr (STRIPS_TOGETHER > 1) run(std::integral_constant<int, 1>());
      }
    }
  }

  PST_INLINE void put(const Schedule& s, float* grad) const {
    const float* from = sums;
    for (const Exact* e = exact; e < exact_end; ++e)
      from = put_strips(*e, s.exact_run + e->run, s.exact_at + e->at, from, grad);
    int64_t at = entry;
    for (const Group* g = groups; g < groups_end; at += g->entries(), ++g)
      from = put_strips(*g, s.column + at, s.source + at, from, grad);
  }
};

static void sample_strips(const Schedule& s, int column_tile, int c0, int c1, const float* x, int64_t in,
                          const float* dy, int64_t out, int64_t padded, float* memory, float* grad) {
  const int64_t first_column = int64_t(column_tile) * s.columns, ld = s.strip_stride();
  const int columns = int(in - first_column < s.columns ? in - first_column : s.columns);
  float* rows = memory;
  // what a strip finds behind the last column goes into sums that nobody reads, but denormal numbers would take microcode
  for (int64_t at = columns; at < STRIP_SAMPLES * ld; at += ld)
    __builtin_memset(rows + at, 0, (ld - columns) * sizeof(float));
  memory += STRIP_SAMPLES * ld;
  StripCell cells[MOST_CHUNKS];
  for (int c = c0; c < c1; ++c) cells[c - c0].find(s, column_tile, c, memory);
  for (int64_t t = 0; t < padded; t += STRIP_SAMPLES, x += STRIP_SAMPLES * in, dy += STRIP_SAMPLES * out) {
    const int samples = int(padded - t < STRIP_SAMPLES ? padded - t : STRIP_SAMPLES);
    for (int sample = 0; sample < samples; sample += TILE) {
      const int lanes = samples - sample < TILE ? samples - sample : TILE;
      // 16 columns at a time lie behind one another in memory
      for (int k = 0; k < columns; k += 16)
        unpack_tile(x + sample * in + first_column * lanes, lanes, lanes, k, k + 16 < columns ? k + 16 : columns, false,
                    rows + sample * ld, ld);
    }
    const StripOperands operands = {dy, rows, out, ld, samples, t == 0};
    for (int c = c0; c < c1; ++c) cells[c - c0].add(operands);
  }
  for (int c = c0; c < c1; ++c) cells[c - c0].put(s, grad);
}
