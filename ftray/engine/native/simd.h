// Sixteen floats at once, in the compiler's own vector type: AVX-512, AVX2, NEON or whatever the target has.
#pragma once
#include <c10/util/BFloat16.h>
#include <cstdint>
#include <cstring>

namespace ftray {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IVec __attribute__((vector_size(64)));
typedef uint16_t Half16 __attribute__((vector_size(32)));
typedef uint32_t UVec __attribute__((vector_size(64)));

inline Vec splat(float value) { return value - Vec{}; }

inline Vec load(const float* from) {
  Vec out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}

inline Vec load(const c10::BFloat16* from) {
  Half16 raw;
  std::memcpy(&raw, from, sizeof(raw));
  return (Vec)(__builtin_convertvector(raw, UVec) << 16);
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }

inline void store(c10::BFloat16* to, Vec value) {
  // Round to nearest even. A NaN would turn into an infinity by the carry, so it keeps its upper half instead.
  UVec bits = (UVec)value;
  UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  UVec kept = (bits >> 16) | 0x40;
  UVec mask = (UVec)(value != value);
  Half16 raw = __builtin_convertvector((kept & mask) | (rounded & ~mask), Half16);
  std::memcpy(to, &raw, sizeof(raw));
}

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

inline float sum(Vec value) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
  return total;
}

inline float largest(Vec value) {
  float best = value[0];
  for (int lane = 1; lane < kLanes; ++lane) best = value[lane] > best ? value[lane] : best;
  return best;
}

// exp for arguments of at most 0, relative error about 1e-7 (Cephes' polynomial); 0 below -87.
inline Vec exp_nonpositive(Vec x) {
  IVec far = x < -87.0f;
  x = maximum(x, splat(-87.0f));
  Vec scaled = x * 1.44269504f - 0.5f;
  IVec whole = __builtin_convertvector(scaled, IVec);
  Vec n = __builtin_convertvector(whole, Vec);
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Vec power = (Vec)((whole + 127) << 23);
  return far ? Vec{} : p * power;
}

// Sums of sixteen vectors as one: lane i of the result is the sum of v[i].
inline Vec sums(Vec (&v)[kLanes]) {
  for (int i = 0; i < 8; ++i)
    v[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(v[2 * i], v[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; ++i)
    v[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(v[2 * i], v[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  for (int i = 0; i < 2; ++i)
    v[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  return __builtin_shufflevector(v[0], v[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(v[0], v[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

}  // namespace ftray
