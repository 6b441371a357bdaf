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
  int64_t heads, kv_heads, groups, size, value_size, block_size;
  float scale, softcap;
  int64_t window;
};

// scores[0:16] = q . k[i] of up to sixteen keys, `stride` apart.
template <typename T>
Vec score_chunk(const float* q, const T* keys, int64_t stride, int count, int64_t size) {
  Vec acc[kLanes] = {};
  for (int i = 0; i < count; ++i)
    for (int64_t c = 0; c < size; c += kLanes) acc[i] += load(q + c) * load(keys + i * stride + c);
  return sums(acc);
}

// out[0:size] += sum_i weights[i] v[i], for two heads that share their values if `second` is not null.
template <int kChunk, typename T>
void weigh_chunk(const float* first, const float* second, const T* values, int64_t stride, int count, int64_t size,
                 float* out_first, float* out_second) {
  for (int64_t c = 0; c < size; c += kChunk * kLanes) {
    Vec one[kChunk], two[kChunk] = {};
    for (int n = 0; n < kChunk; ++n) {
      one[n] = load(out_first + c + n * kLanes);
      if (second) two[n] = load(out_second + c + n * kLanes);
    }
    for (int i = 0; i < count; ++i)
      for (int n = 0; n < kChunk; ++n) {
        Vec value = load(values + i * stride + c + n * kLanes);
        one[n] += value * first[i];
        if (second) two[n] += value * second[i];
      }
    for (int n = 0; n < kChunk; ++n) {
      store(out_first + c + n * kLanes, one[n]);
      if (second) store(out_second + c + n * kLanes, two[n]);
    }
  }
}

// Scores of one head to weights, in place; returns what they are to be multiplied by to sum to one, or to less where
// a sink takes its part.
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

// One token's heads that belong to the key heads [from, to). The cache is read in the order it lies in: all heads of
// a block before the next block.
template <typename T>
class Row {
 public:
  Row(const Shape& shape, const T* keys, const T* values) : shape_(shape), keys_(keys), values_(values) {}

  void attend(const T* q, int64_t q_stride, const int64_t* table, int64_t length, int64_t from, int64_t to,
              const float* sinks, T* out) {
    const int64_t heads = (to - from) * shape_.groups, head = from * shape_.groups;
    table_ = table;
    first_ = shape_.window > 0 ? std::max<int64_t>(0, length - shape_.window) : 0;
    count_ = length - first_;
    padded_ = (count_ + kLanes - 1) / kLanes * kLanes;
    scores_.resize(heads * padded_);
    query_.resize(heads * shape_.size);
    out_.assign(heads * shape_.value_size, 0.0f);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t c = 0; c < shape_.size; ++c)
        query_[h * shape_.size + c] = static_cast<float>(q[(head + h) * q_stride + c]) * shape_.scale;
    chunks([&](int64_t slot, int64_t t, int count) { score(slot, t, count, from, to); });
    norms_.resize(heads);
    for (int64_t h = 0; h < heads; ++h) {
      float* mine = scores_.data() + h * padded_;
      const float sink = sinks ? sinks[head + h] : -std::numeric_limits<float>::infinity();
      for (int64_t t = count_; t < padded_; ++t) mine[t] = -std::numeric_limits<float>::infinity();
      norms_[h] = soften(mine, padded_, sink);
    }
    chunks([&](int64_t slot, int64_t t, int count) { weigh(slot, t, count, from, to); });
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t c = 0; c < shape_.value_size; ++c)
        out[(head + h) * shape_.value_size + c] = static_cast<T>(out_[h * shape_.value_size + c] * norms_[h]);
  }

 private:
  // Calls work(cache slot of the first token, its place among those seen, how many) for up to sixteen at once.
  template <typename Work>
  void chunks(Work work) {
    for (int64_t t = 0; t < count_;) {
      const int64_t at = first_ + t, within = at % shape_.block_size;
      const int count = static_cast<int>(std::min({int64_t{kLanes}, count_ - t, shape_.block_size - within}));
      work(table_[at / shape_.block_size] * shape_.block_size + within, t, count);
      t += count;
    }
  }

  void score(int64_t slot, int64_t t, int count, int64_t from, int64_t to) {
    const int64_t stride = shape_.kv_heads * shape_.size;
    for (int64_t k = from; k < to; ++k)
      for (int64_t g = 0; g < shape_.groups; ++g) {
        const int64_t h = (k - from) * shape_.groups + g;
        Vec found = score_chunk(query_.data() + h * shape_.size, keys_ + slot * stride + k * shape_.size, stride,
                                count, shape_.size);
        if (shape_.softcap > 0)
          for (int i = 0; i < count; ++i) found[i] = std::tanh(found[i] / shape_.softcap) * shape_.softcap;
        std::memcpy(scores_.data() + h * padded_ + t, &found, count * sizeof(float));
      }
  }

  void weigh(int64_t slot, int64_t t, int count, int64_t from, int64_t to) {
    const int64_t size = shape_.value_size, stride = shape_.kv_heads * size;
    for (int64_t k = from; k < to; ++k)
      for (int64_t g = 0; g < shape_.groups; g += 2) {
        const int64_t h = (k - from) * shape_.groups + g;
        const float* one = scores_.data() + h * padded_ + t;
        const float* two = g + 1 < shape_.groups ? one + padded_ : nullptr;
        float* out = out_.data() + h * size;
        const T* values = values_ + slot * stride + k * size;
        if (size % (4 * kLanes) == 0)
          weigh_chunk<4>(one, two, values, stride, count, size, out, out + size);
        else
          weigh_chunk<1>(one, two, values, stride, count, size, out, out + size);
      }
  }

  const Shape& shape_;
  const T *keys_, *values_;
  const int64_t* table_ = nullptr;
  int64_t first_ = 0, count_ = 0, padded_ = 0;
  std::vector<float> scores_, query_, out_, norms_;
};

template <typename T>
void attend_all(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& table,
                const at::Tensor& lengths, const float* sinks, const Shape& shape, at::Tensor& out) {
  const T* qs = q.data_ptr<T>();
  const int64_t *tables = table.data_ptr<int64_t>(), *length = lengths.data_ptr<int64_t>();
  T* outs = out.data_ptr<T>();
  // Fewer rows than threads: the heads of a row are shared out too.
  const int64_t rows = q.size(0), threads = at::get_num_threads();
  const int64_t shares = std::min(shape.kv_heads, rows >= threads ? 1 : (threads + rows - 1) / rows);
  at::parallel_for(0, rows * shares, 1, [&](int64_t begin, int64_t end) {
    Row<T> worker(shape, keys.data_ptr<T>(), values.data_ptr<T>());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / shares, share = task % shares;
      worker.attend(qs + row * q.stride(0), q.stride(1), tables + row * table.stride(0), length[row],
                    shape.kv_heads * share / shares, shape.kv_heads * (share + 1) / shares, sinks,
                    outs + row * shape.heads * shape.value_size);
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
  const int64_t* length = lengths.data_ptr<int64_t>();
  for (int64_t row = 0; row < q.size(0); ++row)
    TORCH_CHECK(length[row] <= table.size(1) * block_size, "a row is longer than its blocks");
  TORCH_CHECK(q.scalar_type() == keys.scalar_type() && q.scalar_type() == values.scalar_type(), "one type for all");
  const int64_t kv_heads = keys.size(1);
  const Shape shape{q.size(1), kv_heads, q.size(1) / kv_heads, q.size(2), values.size(2), block_size,
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
