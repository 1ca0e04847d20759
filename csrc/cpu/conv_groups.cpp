#include "cpu/conv_groups.h"

#include <list>
#include <mutex>

namespace pst {

constexpr int kPatterns = 1 << kGroup;
constexpr int64_t kL1Lines = 36 * 1024 / 64;
constexpr int64_t kKeptEntries = int64_t(1) << 23;  // of all plans that are kept: 200 MB at most

static int bits(int pattern) { return __builtin_popcount(unsigned(pattern)); }

// Cycles a column of a pattern and 2 x 3 pixels, and the end of a pattern's loop: from 130 GF at full patterns, 125 at half of
// the weights and 65 at a tenth, where outputs one by one run at 130 / 1.25, 100 and 65 (kAlone)
constexpr double kColumn[kGroup + 1] = {0, 6, 8.5, 12, 16};
constexpr double kLoop = 12;
constexpr double kAlone = 6.7;
// The weight gradient of a group whose columns are less full is faster one by one: 63 of 80 GF at half of the weights
constexpr double kGradFill = 0.75;

struct Column {
  int64_t block, off;
  int pattern;
  int32_t source[kGroup];
};

static std::vector<Column> columns_of(const Walk& w, int64_t out0, int64_t out1, int64_t channels_a_block) {
  std::vector<Column> each, merged;
  for (int64_t o = out0; o < out1; ++o)
    for (int32_t k = w.row_begin[o]; k < w.row_begin[o + 1]; ++k) {
      Column c{w.channel[k] / channels_a_block, w.off[k], 1 << (o - out0), {-1, -1, -1, -1}};
      c.source[o - out0] = w.source[k];
      each.push_back(c);
    }
  std::sort(each.begin(), each.end(), [](const Column& a, const Column& b) {
    return a.block != b.block ? a.block < b.block : a.off < b.off;
  });
  for (const Column& c : each) {
    if (merged.empty() || merged.back().block != c.block || merged.back().off != c.off) {
      merged.push_back(c);
      continue;
    }
    merged.back().pattern |= c.pattern;
    for (int g = 0; g < kGroup; ++g)
      if (c.source[g] >= 0) merged.back().source[g] = c.source[g];
  }
  return merged;
}

// Fills few columns of a pattern up with zeros where that costs less than a loop of their own; -> cycles of the block
static double merge_patterns(Column* begin, Column* end) {
  int count[kPatterns] = {};
  for (Column* c = begin; c != end; ++c) ++count[c->pattern];
  int becomes[kPatterns];
  for (int p = 0; p < kPatterns; ++p) becomes[p] = p;
  for (int size = 1; size < kGroup; ++size)
    for (int p = 1; p < kPatterns; ++p) {
      if (bits(p) != size || !count[p]) continue;
      int best = p;
      double cost = kLoop;
      for (int q = p + 1; q < kPatterns; ++q)
        if ((q & p) == p && count[q] && count[p] * (kColumn[bits(q)] - kColumn[size]) < cost) {
          best = q;
          cost = count[p] * (kColumn[bits(q)] - kColumn[size]);
        }
      if (best == p) continue;
      becomes[p] = best;
      count[best] += count[p];
      count[p] = 0;
    }
  double total = 0;
  for (int p = 1; p < kPatterns; ++p) total += count[p] ? count[p] * kColumn[bits(p)] + kLoop : 0;
  for (Column* c = begin; c != end; ++c)
    while (becomes[c->pattern] != c->pattern) c->pattern = becomes[c->pattern];
  return total;
}

static void extend(Runs& runs, int64_t out0, int64_t out1, bool grouped) {
  if (!runs.empty() && runs.back().grouped == grouped)
    runs.back().out1 = out1;
  else
    runs.push_back({out0, out1, grouped});
}

static void plan_groups(ConvPlan& plan, int64_t channels, int64_t lines) {
  const Walk& w = plan.walk;
  Groups& groups = plan.groups;
  const int64_t a_block = std::max<int64_t>(1, kL1Lines / std::max<int64_t>(1, lines));
  groups.blocks = int(std::max<int64_t>(1, (channels + a_block - 1) / a_block));
  const int64_t size = (channels + groups.blocks - 1) / groups.blocks;
  groups.count = (plan.outputs + kGroup - 1) / kGroup;
  std::vector<std::vector<Column>> kept(groups.count);
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t out0 = g * kGroup, out1 = std::min(plan.outputs, out0 + kGroup);
    std::vector<Column> columns = columns_of(w, out0, out1, size);
    double cost = 0;
    for (size_t i = 0; i < columns.size();) {
      size_t j = i;
      while (j < columns.size() && columns[j].block == columns[i].block) ++j;
      cost += merge_patterns(columns.data() + i, columns.data() + j);
      i = j;
    }
    const int64_t weights = w.row_begin[out1] - w.row_begin[out0];
    const bool grouped = cost < kAlone * double(weights);
    const bool grad_grouped = double(weights) >= kGradFill * kGroup * double(columns.size()) && weights;
    if (grouped || grad_grouped) kept[g] = std::move(columns);
    extend(plan.runs, out0, out1, grouped);
    extend(plan.grad_runs, out0, out1, grad_grouped);
  }
  for (int b = 0; b < groups.blocks; ++b)
    for (int64_t g = 0; g < groups.count; ++g) {
      groups.first.push_back(int32_t(groups.source.size()));
      groups.seg.push_back(int32_t(groups.off.size()));
      for (int p = 1; p < kPatterns; ++p) {
        for (const Column& c : kept[g]) {
          if (c.block != b || c.pattern != p) continue;
          groups.off.push_back(int32_t(c.off));
          for (int i = 0; i < kGroup; ++i)
            if (p >> i & 1) groups.source.push_back(c.source[i]);
        }
        groups.seg.push_back(int32_t(groups.off.size()));
      }
    }
}

// What a plan depends on besides the pattern
struct Key {
  int64_t at[32] = {};
  Key(int kind, const ConvShape& s, const Plane& x, const Plane& y) {
    int n = 0;
    const auto plane = [&](const Plane& p) {
      for (int64_t v : {p.h, p.w, p.top, p.left, p.bottom, p.right}) at[n++] = v;
    };
    for (int64_t v : {int64_t(kind), int64_t(isa()), s.c, s.h, s.w, s.o, s.kh, s.kw, s.sh, s.sw, s.ph, s.pw, s.dh, s.dw})
      at[n++] = v;
    plane(x);
    plane(y);
  }
  bool operator==(const Key& other) const { return std::memcmp(at, other.at, sizeof at) == 0; }
};

using Plans = std::shared_ptr<const std::vector<ConvPlan>>;

struct KeptPlans {
  Key key;
  std::vector<int32_t> ptr, col, perm;
  Plans plans;
};

template <class Make>
static Plans find_plans(const Key& key, const Rows& rows, int64_t count, const int32_t* perm, const Make& make) {
  static std::mutex mutex;
  static std::list<KeptPlans> kept;  // latest first
  static int64_t entries = 0;
  const int64_t nnz = rows.ptr[count];
  const auto same = [](const std::vector<int32_t>& a, const int32_t* b, int64_t n) {
    return int64_t(a.size()) == n && std::memcmp(a.data(), b, n * sizeof(int32_t)) == 0;
  };
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto i = kept.begin(); i != kept.end(); ++i)
      if (i->key == key && same(i->ptr, rows.ptr, count + 1) && same(i->col, rows.col, nnz) &&
          same(i->perm, perm, perm ? nnz : 0)) {
        kept.splice(kept.begin(), kept, i);
        return i->plans;
      }
  }
  KeptPlans made{key, {rows.ptr, rows.ptr + count + 1}, {rows.col, rows.col + nnz}, {}, make()};
  if (perm) made.perm.assign(perm, perm + nnz);
  const Plans plans = made.plans;
  const std::lock_guard<std::mutex> lock(mutex);
  kept.push_front(std::move(made));
  entries += nnz;
  while (entries > kKeptEntries && kept.size() > 1) {
    entries -= int64_t(kept.back().col.size());
    kept.pop_back();
  }
  return plans;
}

static std::vector<float> gather(const std::vector<int32_t>& source, const float* values) {
  std::vector<float> out(source.size());
  for (size_t i = 0; i < source.size(); ++i) out[i] = source[i] < 0 ? 0.f : values[source[i]];
  return out;
}

// rows and columns of pixels
static std::pair<int64_t, int64_t> register_block(const Walk& w) {
  return {std::min<int64_t>(w.rows, group_kernels().max_rows), std::min<int64_t>(w.cols, group_kernels().max_cols)};
}

ConvWalks ConvWalks::forward(const ConvShape& s, const Rows& rows, const float* values, const Plane& x, const Plane& y) {
  ConvWalks w;
  w.plans_ = find_plans(Key(0, s, x, y), rows, s.o, nullptr, [&] {
    auto plans = std::make_shared<std::vector<ConvPlan>>(1);
    ConvPlan& plan = plans->front();
    plan.walk = forward_walk(s, rows, x, y);
    plan.outputs = s.o;
    const auto [r, q] = register_block(plan.walk);
    plan_groups(plan, s.c, ((r - 1) * s.sh + (s.kh - 1) * s.dh + 1) * ((q - 1) * s.sw + (s.kw - 1) * s.dw + 1));
    return Plans(plans);
  });
  w.given_ = values;
  w.values_.emplace_back();
  w.group_values_.push_back(gather(w.plans_->front().groups.source, values));
  w.longest_ = longest_row(w.walk(0), s.o);
  return w;
}

ConvWalks ConvWalks::input_grad(const ConvShape& s, const Rows& rows, const int32_t* perm, const float* values, const Plane& x,
                                const Plane& y) {
  ConvWalks w;
  w.plans_ = find_plans(Key(1, s, x, y), rows, s.c, perm, [&] {
    auto plans = std::make_shared<std::vector<ConvPlan>>();
    for (Walk& walk : input_grad_walks(s, rows, perm, x, y)) {
      ConvPlan& plan = plans->emplace_back();
      plan.walk = std::move(walk);
      plan.outputs = s.c;
      const auto [r, q] = register_block(plan.walk);
      plan_groups(plan, s.o, (r + (s.kh - 1) * s.dh / s.sh) * (q + (s.kw - 1) * s.dw / s.sw));
    }
    return Plans(plans);
  });
  for (const ConvPlan& plan : *w.plans_) {
    w.values_.push_back(gather(plan.walk.source, values));
    w.group_values_.push_back(gather(plan.groups.source, values));
  }
  return w;
}

RowsArgs ConvWalks::args(int64_t i, const float* x, float* y, int64_t y_plane, const float* bias) const {
  const ConvPlan& plan = (*plans_)[i];
  RowsArgs a = rows_args(plan.walk, x, y, plan.outputs, y_plane, bias);
  a.val = given_ ? given_ : values_[i].data();
  a.group_blocks = plan.groups.blocks;
  a.groups = int(plan.groups.count);
  a.group_seg = plan.groups.seg.data();
  a.group_first = plan.groups.first.data();
  a.group_off = plan.groups.off.data();
  a.group_val = group_values_[i].data();
  return a;
}

void ConvWalks::rows(int64_t i, RowsArgs a) const {
  const int out0 = a.out0, out1 = a.out1;
  for (const Run& run : (*plans_)[i].runs) {
    a.out0 = std::max<int>(out0, int(run.out0));
    a.out1 = std::min<int>(out1, int(run.out1));
    if (a.out0 < a.out1) run.grouped ? group_kernels().rows(a) : tile_kernels().rows(a);
  }
}

static int64_t group_begin(int64_t output) { return (output + kGroup - 1) / kGroup * kGroup; }

// values of the groups of outputs [out0, out1)
static int64_t group_values(const Groups& g, int64_t out0, int64_t out1) {
  int64_t total = 0;
  for (int b = 0; b < g.blocks; ++b) {
    const int64_t end = b * g.count + (out1 + kGroup - 1) / kGroup;
    total += (end < int64_t(g.first.size()) ? g.first[end] : int64_t(g.source.size())) - g.first[b * g.count + out0 / kGroup];
  }
  return total;
}

int64_t ConvWalks::grad_scratch() const {
  int64_t most = std::max(kAccEntries, longest_);
  const ConvPlan& plan = plans_->front();
  for (const Run& run : plan.grad_runs)
    for (int64_t o = run.out0; run.grouped && o < run.out1; o += kGroup)
      most = std::max(most, group_values(plan.groups, o, std::min(o + kGroup, run.out1)));
  return most * (kLanes + 1);
}

void ConvWalks::weight_grad(const float* x_tile, const float* grad_tile, const Plane& y, int64_t out0, int64_t out1, int64_t row0,
                            int64_t row1, float* scratch, float* grad) const {
  const ConvPlan& plan = plans_->front();
  const Groups& groups = plan.groups;
  RowsArgs a = args(0, x_tile, const_cast<float*>(grad_tile), y.floats(), nullptr);
  a.row0 = int(row0);
  a.row1 = int(row1);
  a.acc = scratch;
  const int64_t room = grad_scratch() / (kLanes + 1);
  float* sums = scratch + room * kLanes;
  for (const Run& run : plan.grad_runs) {
    if (!run.grouped) {
      weight_grad_rows(plan.walk, a, std::max(out0, run.out0), std::min(out1, run.out1), kAccEntries, scratch, grad);
      continue;
    }
    // a group goes to the range that has its first output
    const int64_t first = std::max(group_begin(out0), run.out0), last = std::min(group_begin(out1), run.out1);
    for (int64_t o = first; o < last;) {
      int64_t next = std::min(o + kGroup, last), count = group_values(groups, o, next);
      while (next < last) {
        const int64_t further = std::min(next + kGroup, last), more = group_values(groups, o, further);
        if (more > room) break;
        next = further;
        count = more;
      }
      if (count) {
        std::memset(sums, 0, count * sizeof(float));
        a.out0 = int(o);
        a.out1 = int(next);
        group_kernels().weight_grad(a, count, sums);
        const float* sum = sums;
        // the kernel's order: group, block, weight
        for (int64_t g = o / kGroup; g * kGroup < next; ++g)
          for (int b = 0; b < groups.blocks; ++b) {
            const int64_t at = b * groups.count + g;
            const int64_t end = at + 1 < int64_t(groups.first.size()) ? groups.first[at + 1] : int64_t(groups.source.size());
            for (int64_t k = groups.first[at]; k < end; ++k, ++sum)
              if (groups.source[k] >= 0) grad[groups.source[k]] += *sum;
          }
      }
      o = next;
    }
  }
}

}  // namespace pst
