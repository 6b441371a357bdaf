// Low-rank updates of a step's tokens, each stretch of tokens by its slot: y += (x A[slot]) B[slot].
//
// A slot's A factors lie side by side, column by column of the parts, a part being one of the linear layers that share
// their input; its B factors lie one after another. So few tokens share a slot in decoding that a general matrix product
// spends its time on set-up, and reading the factors is most of what is left: here they are read once per eight tokens,
// in the order they lie in.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "simd.h"

namespace ftray {
namespace {

constexpr int64_t kTile = 64;
constexpr int64_t kTokens = 8;  // of one block: as many accumulators as hide a fused multiply-add's latency

struct Layout {
  int64_t inputs, columns;  // of x; of A
  int64_t parts;
  const int64_t* bounds;  // [parts + 1]: a part's outputs in a row of y
};

// inner[m, 0:16 C] = x[m] A for M tokens and C vectors of columns, with as many sums at once as hide the latency.
template <int M, int C, typename T>
void project_some(const float* const* x, const T* a, float* inner, const Layout& layout) {
  constexpr int kUnroll = M * C >= 8 ? 1 : (8 + M * C - 1) / (M * C);
  Vec acc[M][C][kUnroll] = {};
  int64_t k = 0;
  for (; k + kUnroll <= layout.inputs; k += kUnroll)
    for (int u = 0; u < kUnroll; ++u)
      for (int c = 0; c < C; ++c) {
        Vec row = load(a + (k + u) * layout.columns + c * kLanes);
        for (int m = 0; m < M; ++m) acc[m][c][u] += row * x[m][k + u];
      }
  for (; k < layout.inputs; ++k)
    for (int c = 0; c < C; ++c) {
      Vec row = load(a + k * layout.columns + c * kLanes);
      for (int m = 0; m < M; ++m) acc[m][c][0] += row * x[m][k];
    }
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < C; ++c) {
      Vec total = acc[m][c][0];
      for (int u = 1; u < kUnroll; ++u) total += acc[m][c][u];
      store(inner + m * layout.columns + c * kLanes, total);
    }
}

// inner[m, 0:columns] = x[m] A for M tokens; A is read once, row after row, where its rows are short.
template <int M, typename T>
void project(const float* const* x, const T* a, float* inner, const Layout& layout, int64_t columns) {
  int64_t column = 0;
  for (; column + 2 * kLanes < columns; column += 3 * kLanes) project_some<M, 3>(x, a + column, inner + column, layout);
  for (; column + kLanes < columns; column += 2 * kLanes) project_some<M, 2>(x, a + column, inner + column, layout);
  if (column < columns) project_some<M, 1>(x, a + column, inner + column, layout);
}

// y[m, at:at + 64] += inner[m, 0:rank] b for M tokens; b [rank, 64].
template <int M, typename T>
void expand_tile(T* const* y, int64_t at, const float* inner, const T* b, int64_t inner_stride, int64_t rank) {
  constexpr int N = M >= 8 ? 2 : 4;
  for (int64_t first = 0; first < kTile; first += N * kLanes) {
    Vec acc[M][N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) acc[m][n] = load(y[m] + at + first + n * kLanes);
    for (int64_t j = 0; j < rank; ++j)
      for (int n = 0; n < N; ++n) {
        Vec row = load(b + j * kTile + first + n * kLanes);
        for (int m = 0; m < M; ++m) acc[m][n] += row * inner[m * inner_stride + j];
      }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) store(y[m] + at + first + n * kLanes, acc[m][n]);
  }
}

// y[m, 0:width] += inner[m, 0:rank] B for M tokens. B lies in tiles of 64 columns, a tile's ranks one after another.
template <int M, typename T>
void expand(T* const* y, const float* inner, const T* b, const Layout& layout, int64_t rank, int64_t width) {
  for (int64_t at = 0; at < width; at += kTile, b += rank * kTile) {
    if (at + kTile <= width) {
      expand_tile<M>(y, at, inner, b, layout.columns, rank);
      continue;
    }
    for (int64_t o = at; o < width; ++o)
      for (int m = 0; m < M; ++m) {
        float total = static_cast<float>(y[m][o]);
        for (int64_t j = 0; j < rank; ++j)
          total += inner[m * layout.columns + j] * static_cast<float>(b[j * kTile + o - at]);
        y[m][o] = static_cast<T>(total);
      }
  }
}

template <int M, typename T>
void add_block(const T* x, int64_t x_stride, T* y, int64_t y_stride, const T* a, const T* b, const int64_t* ranks,
               const Layout& layout, std::vector<float>& scratch) {
  int64_t columns = 0;
  for (int64_t part = 0; part < layout.parts; ++part) columns += ranks[part];
  if (!columns) return;
  scratch.resize(M * (layout.columns + layout.inputs));
  float* inner = scratch.data();
  const float* rows[M];
  for (int m = 0; m < M; ++m) {
    if constexpr (std::is_same_v<T, float>) {
      rows[m] = x + m * x_stride;
    } else {
      float* wide = inner + M * layout.columns + m * layout.inputs;
      for (int64_t k = 0; k < layout.inputs; ++k) wide[k] = static_cast<float>(x[m * x_stride + k]);
      rows[m] = wide;
    }
  }
  project<M>(rows, a, inner, layout, columns);
  for (int64_t part = 0, first = 0; part < layout.parts; first += ranks[part++]) {
    const int64_t rank = ranks[part], width = layout.bounds[part + 1] - layout.bounds[part];
    if (!rank) continue;
    T* out[M];
    for (int m = 0; m < M; ++m) out[m] = y + m * y_stride + layout.bounds[part];
    expand<M>(out, inner + first, b, layout, rank, width);
    b += rank * ((width + kTile - 1) / kTile * kTile);
  }
}

template <typename T>
void add_all(at::Tensor& y, const at::Tensor& x, const at::Tensor& a, const at::Tensor& b, const at::Tensor& ranks,
             const at::Tensor& bounds, const at::Tensor& segments) {
  const Layout layout{a.size(1), a.size(2), ranks.size(1), bounds.data_ptr<int64_t>()};
  struct Block {
    int64_t slot, first;
    int count;
  };
  std::vector<Block> blocks;
  const int64_t* segment = segments.data_ptr<int64_t>();
  for (int64_t i = 0; i < segments.size(0); ++i, segment += 3) {
    TORCH_CHECK(segment[1] >= 0 && segment[2] <= x.size(0), "a segment goes beyond the tokens");
    for (int64_t at = segment[1]; segment[0] >= 0 && segment[0] < a.size(0) && at < segment[2];) {
      int64_t left = segment[2] - at;
      int count = left >= kTokens ? kTokens : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      blocks.push_back({segment[0], at, count});
      at += count;
    }
  }
  const T* xs = x.data_ptr<T>();
  T* ys = y.data_ptr<T>();
  const T *as = a.data_ptr<T>(), *bs = b.data_ptr<T>();
  const int64_t* rank = ranks.data_ptr<int64_t>();
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    for (int64_t i = begin; i < end; ++i) {
      const Block& block = blocks[i];
      auto run = [&](auto tokens) {
        add_block<decltype(tokens)::value>(
            xs + block.first * x.stride(0), x.stride(0), ys + block.first * y.stride(0), y.stride(0),
            as + block.slot * a.stride(0), bs + block.slot * b.stride(0), rank + block.slot * layout.parts, layout,
            scratch);
      };
      switch (block.count) {
        case 8: run(std::integral_constant<int, 8>{}); break;
        case 4: run(std::integral_constant<int, 4>{}); break;
        case 2: run(std::integral_constant<int, 2>{}); break;
        default: run(std::integral_constant<int, 1>{});
      }
    }
  });
}

// y [T, outputs] and x [T, inputs] with contiguous rows; a [slots, inputs, columns]; b [slots, >= what the ranks need];
// ranks [slots, parts]; bounds [parts + 1]; segments [n, 3] of (slot, first token, token after the last); a
// slot that is not there adds nothing.
void lora_add(at::Tensor y, const at::Tensor& x, const at::Tensor& a, const at::Tensor& b, const at::Tensor& ranks,
              const at::Tensor& bounds, const at::Tensor& segments) {
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.stride(1) == 1 && y.stride(1) == 1, "rows must be contiguous");
  TORCH_CHECK(a.is_contiguous() && b.is_contiguous() && a.size(0) == b.size(0) && a.size(2) % kLanes == 0, "factors");
  TORCH_CHECK(a.size(1) == x.size(1) && x.size(0) == y.size(0), "shapes of x, y and A differ");
  TORCH_CHECK(y.scalar_type() == x.scalar_type() && a.scalar_type() == x.scalar_type() &&
              b.scalar_type() == x.scalar_type(), "one type for all");
  TORCH_CHECK(ranks.size(0) == a.size(0), "ranks of every slot");
  TORCH_CHECK(segments.is_contiguous() && ranks.is_contiguous() && bounds.numel() == ranks.size(1) + 1, "layout");
  if (x.scalar_type() == at::kFloat) {
    add_all<float>(y, x, a, b, ranks, bounds, segments);
  } else {
    TORCH_CHECK(x.scalar_type() == at::kBFloat16, "float32 and bfloat16 only");
    add_all<at::BFloat16>(y, x, a, b, ranks, bounds, segments);
  }
}

}  // namespace
}  // namespace ftray

TORCH_LIBRARY_FRAGMENT(ftray_engine, library) {
  library.def("lora_add(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor ranks, Tensor bounds, Tensor segments) -> ()");
}
TORCH_LIBRARY_IMPL(ftray_engine, CPU, library) { library.impl("lora_add", &ftray::lora_add); }
