// Attention of single new tokens over the paged key-value cache (Kwon et al., arXiv:2309.06180), read where it lies.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace ftray {
namespace {

struct Shape {
  int64_t heads, kv_heads, groups, size, value_size, block_size, blocks;
  float scale, softcap;
  int64_t window;
};

// scores[0:16] = q . k[i] of up to sixteen keys.
template <typename T>
Vec score_block(const float* q, const T* const* keys, int count, int64_t size) {
  Vec acc[kLanes] = {};
  for (int i = 0; i < count; ++i)
    for (int64_t c = 0; c < size; c += kLanes) acc[i] += load(q + c) * load(keys[i] + c);
  return sums(acc);
}

// out[0:size] = sum_t weights[t] v[t], for two heads that share their values if `second` is not null.
template <typename T, int kChunk>
void weigh(const float* first, const float* second, const std::vector<const T*>& values, int64_t size, float* out_first,
           float* out_second) {
  for (int64_t c = 0; c < size; c += kChunk * kLanes) {
    Vec one[kChunk] = {}, two[kChunk] = {};
    for (size_t t = 0; t < values.size(); ++t)
      for (int n = 0; n < kChunk; ++n) {
        Vec value = load(values[t] + c + n * kLanes);
        one[n] += value * first[t];
        if (second) two[n] += value * second[t];
      }
    for (int n = 0; n < kChunk; ++n) {
      store(out_first + c + n * kLanes, one[n]);
      if (second) store(out_second + c + n * kLanes, two[n]);
    }
  }
}

struct Scratch {
  std::vector<float> scores, query, out;
};

// Scores of one head to weights that sum to one, or to less where a sink takes its part.
float soften(float* scores, int64_t padded, float sink) {
  Vec top = splat(sink);
  for (int64_t t = 0; t < padded; t += kLanes) top = maximum(top, load(scores + t));
  const float best = largest(top);
  Vec total{};
  for (int64_t t = 0; t < padded; t += kLanes) {
    Vec weight = exp_nonpositive(load(scores + t) - best);
    store(scores + t, weight);
    total += weight;
  }
  const float rest = std::isinf(sink) ? 0.0f : std::exp(sink - best);
  return 1.0f / (sum(total) + rest);
}

template <typename T>
void attend_row(const T* q, int64_t q_stride, const T* keys, const T* values, const int64_t* table, int64_t length,
                int64_t kv_head, const float* sinks, const Shape& shape, T* out, Scratch& scratch) {
  const int64_t first = shape.window > 0 ? std::max<int64_t>(0, length - shape.window) : 0;
  const int64_t count = length - first, padded = (count + kLanes - 1) / kLanes * kLanes;
  std::vector<const T*> key_rows(count), value_rows(count);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = first + t;
    const int64_t slot = table[at / shape.block_size] * shape.block_size + at % shape.block_size;
    key_rows[t] = keys + (slot * shape.kv_heads + kv_head) * shape.size;
    value_rows[t] = values + (slot * shape.kv_heads + kv_head) * shape.value_size;
  }
  scratch.scores.resize(shape.groups * padded);
  scratch.query.resize(shape.groups * shape.size);
  scratch.out.resize(shape.groups * shape.value_size);
  std::vector<float> norm(shape.groups);
  for (int64_t g = 0; g < shape.groups; ++g)
    for (int64_t c = 0; c < shape.size; ++c)
      scratch.query[g * shape.size + c] = static_cast<float>(q[(kv_head * shape.groups + g) * q_stride + c]) * shape.scale;
  for (int64_t t = 0; t < count; t += kLanes) {
    const int some = static_cast<int>(std::min<int64_t>(kLanes, count - t));
    for (int64_t g = 0; g < shape.groups; ++g) {
      float* at = scratch.scores.data() + g * padded + t;
      store(at, score_block(scratch.query.data() + g * shape.size, key_rows.data() + t, some, shape.size));
      if (shape.softcap > 0)
        for (int i = 0; i < some; ++i) at[i] = std::tanh(at[i] / shape.softcap) * shape.softcap;
      for (int i = some; i < kLanes; ++i) at[i] = -std::numeric_limits<float>::infinity();
    }
  }
  for (int64_t g = 0; g < shape.groups; ++g) {
    const float sink = sinks ? sinks[kv_head * shape.groups + g] : -std::numeric_limits<float>::infinity();
    norm[g] = soften(scratch.scores.data() + g * padded, padded, sink);
  }
  for (int64_t g = 0; g < shape.groups; g += 2) {
    const float* one = scratch.scores.data() + g * padded;
    const float* two = g + 1 < shape.groups ? one + padded : nullptr;
    float* to = scratch.out.data() + g * shape.value_size;
    if (shape.value_size % (4 * kLanes) == 0)
      weigh<T, 4>(one, two, value_rows, shape.value_size, to, to + shape.value_size);
    else
      weigh<T, 1>(one, two, value_rows, shape.value_size, to, to + shape.value_size);
  }
  for (int64_t g = 0; g < shape.groups; ++g)
    for (int64_t c = 0; c < shape.value_size; ++c)
      out[(kv_head * shape.groups + g) * shape.value_size + c] =
          static_cast<T>(scratch.out[g * shape.value_size + c] * norm[g]);
}

template <typename T>
void attend_all(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& table,
                const at::Tensor& lengths, const float* sinks, const Shape& shape, at::Tensor& out) {
  const T *qs = q.data_ptr<T>(), *ks = keys.data_ptr<T>(), *vs = values.data_ptr<T>();
  const int64_t *tables = table.data_ptr<int64_t>(), *length = lengths.data_ptr<int64_t>();
  T* outs = out.data_ptr<T>();
  at::parallel_for(0, q.size(0) * shape.kv_heads, 4, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / shape.kv_heads;
      attend_row<T>(qs + row * q.stride(0), q.stride(1), ks, vs, tables + row * table.stride(0), length[row],
                    task % shape.kv_heads, sinks, shape, outs + row * shape.heads * shape.value_size, scratch);
    }
  });
}

// q [rows, H, D]; keys [slots, K, D] and values [slots, K, E] flat caches; table [rows, >= blocks] of block numbers;
// lengths [rows]: tokens to see, the new one included. window 0 and softcap 0: none. Returns [rows, H, E].
at::Tensor paged_decode(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& table,
                        const at::Tensor& lengths, int64_t block_size, double scale, int64_t window, double softcap,
                        const std::optional<at::Tensor>& sinks) {
  TORCH_CHECK(q.dim() == 3 && q.stride(2) == 1 && keys.is_contiguous() && values.is_contiguous(), "layout of q or cache");
  TORCH_CHECK(q.size(2) % kLanes == 0 && values.size(2) % kLanes == 0, "sizes of heads must be multiples of 16");
  TORCH_CHECK(table.stride(1) == 1 && lengths.is_contiguous() && table.size(0) == q.size(0), "table");
  TORCH_CHECK(q.scalar_type() == keys.scalar_type() && q.scalar_type() == values.scalar_type(), "one type for all");
  const int64_t kv_heads = keys.size(1);
  const Shape shape{q.size(1), kv_heads, q.size(1) / kv_heads, q.size(2), values.size(2), block_size, table.size(1),
                    static_cast<float>(scale), static_cast<float>(softcap), window};
  at::Tensor out = at::empty({q.size(0), q.size(1), values.size(2)}, q.options());
  at::Tensor wide;
  if (sinks) wide = sinks->to(at::kFloat).contiguous();
  const float* sink = sinks ? wide.data_ptr<float>() : nullptr;
  if (q.scalar_type() == at::kFloat) {
    attend_all<float>(q, keys, values, table, lengths, sink, shape, out);
  } else {
    TORCH_CHECK(q.scalar_type() == at::kBFloat16, "float32 and bfloat16 only");
    attend_all<at::BFloat16>(q, keys, values, table, lengths, sink, shape, out);
  }
  return out;
}

}  // namespace
}  // namespace ftray

TORCH_LIBRARY_FRAGMENT(ftray_engine, library) {
  library.def(
      "paged_decode(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor lengths, int block_size, float scale, "
      "int window, float softcap, Tensor? sinks) -> Tensor");
}
TORCH_LIBRARY_IMPL(ftray_engine, CPU, library) { library.impl("paged_decode", &ftray::paged_decode); }
