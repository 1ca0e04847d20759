// Included by tiles.inl: batch norm, ReLU and residual add on one plane of one channel, 16 samples a pixel.

static inline __attribute__((always_inline)) V max0(V v) {
  return v > 0.f ? v : V{};
}

template <bool Residual, bool Relu, bool Out, bool Hot>
static void norm_act_plane(const NormPlane& args) {
  const NormPlane a = args;  // a copy, since a store may alias what the reference points at
  for (int sub = 0; sub < kSub; ++sub) {
    const int s = sub * PST_W;
    const V scale = splat(a.scale), shift = splat(a.shift);
    for (int64_t r = 0; r < a.rows; ++r) {
      const float* y = a.y + r * a.y_row + s;
      const float* g = Residual ? a.g + r * a.g_row + s : nullptr;
      float* z = Out ? a.out + r * a.out_row + s : nullptr;
      float* hot = Hot ? a.hot + r * a.hot_row + s : nullptr;
      if (Out)
        for (int64_t i = 1; i <= a.out_halo; ++i) {
          store(z - i * kLanes, V{});
          store(z + (a.cols + i - 1) * kLanes, V{});
        }
#pragma GCC unroll 4
      for (int64_t i = 0; i < a.cols * kLanes; i += kLanes) {
        V v = load(y + i) * scale + shift;
        if (Residual) v += load(g + i);
        if (Relu) v = max0(v);
        if (Out) stream(z + i, v);
        if (Hot) store(hot + i, v);
      }
    }
  }
}

template <bool Out, bool Hot>
static void norm_act_to(const NormPlane& a) {
  if (a.g)
    a.relu ? norm_act_plane<true, true, Out, Hot>(a) : norm_act_plane<true, false, Out, Hot>(a);
  else
    a.relu ? norm_act_plane<false, true, Out, Hot>(a) : norm_act_plane<false, false, Out, Hot>(a);
  if (Out) stream_end();
}

static void norm_act(const NormPlane& a) {
  if (a.hot)
    a.out ? norm_act_to<true, true>(a) : norm_act_to<false, true>(a);
  else
    norm_act_to<true, false>(a);
}

enum Gate { kOpen, kByOutput, kByInput };

// the output gradient where the ReLU let the value through
template <int G>
static inline __attribute__((always_inline)) V gated(const float* g, const float* z, V y, V scale, V shift) {
  const V v = load(g);
  if (G == kByOutput) return load(z) > 0.f ? v : V{};
  if (G == kByInput) return y * scale + shift > 0.f ? v : V{};
  return v;
}

template <int G, bool Write>
static void norm_sums_plane(const NormPlane& args) {
  const NormPlane a = args;  // a copy, since a store may alias what the reference points at
  for (int sub = 0; sub < kSub; ++sub) {
    const int s = sub * PST_W;
    const V scale = splat(a.scale), shift = splat(a.shift), mean = splat(a.mean);
    V sum[2] = {}, product[2] = {};
    for (int64_t r = 0; r < a.rows; ++r) {
      const float* y = a.y + r * a.y_row + s;
      const float* g = a.g + r * a.g_row + s;
      const float* z = G == kByOutput ? a.z + r * a.g_row + s : nullptr;
      float* out = Write ? a.out + r * a.out_row + s : nullptr;
      if (Write)
        for (int64_t i = 1; i <= a.out_halo; ++i) {
          store(out - i * kLanes, V{});
          store(out + (a.cols + i - 1) * kLanes, V{});
        }
#pragma GCC unroll 4
      for (int64_t i = 0; i < a.cols; ++i) {
        const V yv = load(y + i * kLanes), v = gated<G>(g + i * kLanes, z + i * kLanes, yv, scale, shift);
        if (Write) stream(out + i * kLanes, v);
        sum[i % 2] += v;
        product[i % 2] += v * (yv - mean);
      }
    }
    store(a.sums + s, sum[0] + sum[1]);
    store(a.sums + kLanes + s, product[0] + product[1]);
  }
}

static void norm_sums(const NormPlane& a) {
  if (!a.relu)
    a.out ? norm_sums_plane<kOpen, true>(a) : norm_sums_plane<kOpen, false>(a);
  else if (a.z)
    a.out ? norm_sums_plane<kByOutput, true>(a) : norm_sums_plane<kByOutput, false>(a);
  else
    a.out ? norm_sums_plane<kByInput, true>(a) : norm_sums_plane<kByInput, false>(a);
  if (a.out) stream_end();
}

template <int G>
static void norm_grad_plane(const NormPlane& args) {
  const NormPlane a = args;  // a copy, since a store may alias what the reference points at
  for (int sub = 0; sub < kSub; ++sub) {
    const int s = sub * PST_W;
    const V scale = splat(a.scale), shift = splat(a.shift), mean = splat(a.mean);
    const V constant = splat(a.constant), slope = splat(a.slope);
    V live;
    for (int l = 0; l < PST_W; ++l) live[l] = s + l < a.lanes ? 1.f : 0.f;
    for (int64_t r = 0; r < a.rows; ++r) {
      const float* y = a.y + r * a.y_row + s;
      const float* g = a.g + r * a.g_row + s;
      const float* z = G == kByOutput ? a.z + r * a.g_row + s : nullptr;
      float* out = a.out + r * a.out_row + s;
#pragma GCC unroll 4
      for (int64_t i = 0; i < a.cols * kLanes; i += kLanes) {
        const V yv = load(y + i), v = gated<G>(g + i, z + i, yv, scale, shift);
        store(out + i, (v * scale + constant + (yv - mean) * slope) * live);
      }
    }
  }
}

static void norm_grad(const NormPlane& a) {
  if (!a.relu)
    norm_grad_plane<kOpen>(a);
  else if (a.z)
    norm_grad_plane<kByOutput>(a);
  else
    norm_grad_plane<kByInput>(a);
}

static void plane_sum(const float* x, int64_t row, int64_t rows, int64_t cols, float* out) {
  for (int sub = 0; sub < kSub; ++sub) {
    V sum[2] = {};
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int64_t i = 0; i < cols; ++i) sum[i % 2] += load(x + r * row + i * kLanes + sub * PST_W);
    store(out + sub * PST_W, sum[0] + sum[1]);
  }
}
