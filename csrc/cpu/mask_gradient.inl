// bytes are 0 or 1, so that the compiler may select by vectors
static void mask_range(float* grad, const uint8_t* mask, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) grad[i] = mask[i] ? grad[i] : 0.f;
}
