// Activations of 32 or 16 bits, read 16 bytes at a time
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace pst::cuda {

using bf16 = __nv_bfloat16;
using half = __half;

template <class T>
constexpr int LANES = 16 / int(sizeof(T));  // of 16 bytes

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ half from_float<half>(float x) {
  return __float2half_rn(x);
}

template <class T>
struct Words;
template <>
struct Words<float> {
  __device__ __forceinline__ static void floats(uint32_t word, float* out) { out[0] = __uint_as_float(word); }
  __device__ __forceinline__ static uint32_t word(const float* in) { return __float_as_uint(in[0]); }
};
template <>
struct Words<bf16> {
  __device__ __forceinline__ static void floats(uint32_t word, float* out) {
    out[0] = __uint_as_float(word << 16);
    out[1] = __uint_as_float(word & 0xffff0000u);
  }
  __device__ __forceinline__ static uint32_t word(const float* in) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};
template <>
struct Words<half> {
  __device__ __forceinline__ static void floats(uint32_t word, float* out) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    out[0] = pair.x;
    out[1] = pair.y;
  }
  __device__ __forceinline__ static uint32_t word(const float* in) {
    const __half2 pair = __floats2half2_rn(in[0], in[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <class T>
__device__ __forceinline__ void unpack(uint4 chunk, float (&out)[LANES<T>]) {
  constexpr int N = LANES<T> / 4;
  Words<T>::floats(chunk.x, out);
  Words<T>::floats(chunk.y, out + N);
  Words<T>::floats(chunk.z, out + 2 * N);
  Words<T>::floats(chunk.w, out + 3 * N);
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&in)[LANES<T>]) {
  constexpr int N = LANES<T> / 4;
  return make_uint4(Words<T>::word(in), Words<T>::word(in + N), Words<T>::word(in + 2 * N), Words<T>::word(in + 3 * N));
}

}  // namespace pst::cuda
