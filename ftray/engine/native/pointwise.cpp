// Norms and gates of a step's tokens in one pass over them, where a graph of small operations makes five to eight.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

#include "simd.h"

namespace ftray {
namespace {

constexpr int64_t kGrain = 8;

Vec sigmoid(Vec x) {
  IVec negative = x < 0.0f;
  Vec e = exp_nonpositive(negative ? x : -x);
  return (negative ? e : splat(1.0f)) / (1.0f + e);
}

template <typename T>
void norm_row(const T* x, const T* weight, int64_t size, float eps, T* out) {
  Vec squares{};
  for (int64_t c = 0; c < size; c += kLanes) {
    Vec value = load(x + c);
    squares += value * value;
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
  for (int64_t c = 0; c < size; c += kLanes) store(out + c, load(x + c) * scale * load(weight + c));
}

template <typename T>
void gate_row(const T* x, int64_t size, T* out) {
  for (int64_t c = 0; c < size; c += kLanes) {
    Vec gate = load(x + c);
    store(out + c, gate * sigmoid(gate) * load(x + size + c));
  }
}

template <typename Work>
void each_type(const at::Tensor& x, Work work) {
  if (x.scalar_type() == at::kFloat) {
    work(float{});
  } else {
    TORCH_CHECK(x.scalar_type() == at::kBFloat16, "float32 and bfloat16 only");
    work(at::BFloat16{});
  }
}

// Root mean square norm (Zhang and Sennrich, arXiv:1910.07467) over the last axis of a contiguous x, times weight.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const int64_t size = x.size(-1);
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && weight.numel() == size && size % kLanes == 0, "layout");
  TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "one type for both");
  at::Tensor out = at::empty_like(x);
  each_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T *from = x.data_ptr<T>(), *by = weight.data_ptr<T>();
    T* to = out.data_ptr<T>();
    at::parallel_for(0, x.numel() / size, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        norm_row(from + row * size, by, size, static_cast<float>(eps), to + row * size);
    });
  });
  return out;
}

// silu(x[..., :n]) * x[..., n:] of a contiguous x [..., 2n] (Shazeer, arXiv:2002.05202).
at::Tensor silu_gate(const at::Tensor& x) {
  const int64_t size = x.size(-1) / 2;
  TORCH_CHECK(x.is_contiguous() && x.size(-1) == 2 * size && size % kLanes == 0, "layout");
  auto shape = x.sizes().vec();
  shape.back() = size;
  at::Tensor out = at::empty(shape, x.options());
  each_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T* from = x.data_ptr<T>();
    T* to = out.data_ptr<T>();
    at::parallel_for(0, out.numel() / size, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) gate_row(from + 2 * row * size, size, to + row * size);
    });
  });
  return out;
}

}  // namespace
}  // namespace ftray

TORCH_LIBRARY_FRAGMENT(ftray_engine, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("silu_gate(Tensor x) -> Tensor");
}
TORCH_LIBRARY_IMPL(ftray_engine, CPU, library) {
  library.impl("rms_norm", &ftray::rms_norm);
  library.impl("silu_gate", &ftray::silu_gate);
}
