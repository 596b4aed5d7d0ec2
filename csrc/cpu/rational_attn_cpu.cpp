// SPDX-License-Identifier: Apache-2.0
// rational_attn_fwd and rational_attn_bwd for CPU tensors.
#include <algorithm>
#include <optional>
#include <tuple>

#include "common/register.h"
#include "cpu/common/attn_host.h"

namespace vtclip::cpu {

constexpr int kMatrixKinds = 2;  // text, pair: queries with one row per class

// Queries, keys and values; shape.L == shape.K, shape.query_shared is about the text.
struct RationalInputs {
  AttnShape shape;
  bool has_image;
  bool has[kMatrixKinds];
  HeadsView image, query[kMatrixKinds], key, value;
  int64_t num_kinds;  // how many queries there are, the image's included
};

// A task is one (image, head) or, where these are few, a range of its query blocks.
struct RationalForward {
  RationalInputs in;
  HeadsView out;
  bool keep_parts;
  HeadsView parts[kMatrixKinds];
  void* image_out;  // [B, H, D] acc
  void* stats;      // [3, 2, B, H] acc
  int64_t num_chunks, chunk_blocks;
  void* block_stats;  // [B, H, kind, 2, blocks] acc: maximum and sum of every query block
  void* rows;         // more than one chunk only: [B, H, kind, K, D padded] acc
};

// A task is (head, chunk of images, chunk of query blocks); at most one of the chunks is split.
struct RationalBackward {
  RationalInputs in;
  HeadsView grad_out, parts[kMatrixKinds];
  HeadsView d_image, d_query[kMatrixKinds], d_key, d_value;
  HeadsView stats;  // [3, 2, B, H] acc
  int64_t chunk_images, num_image_chunks;
  int64_t num_chunks, chunk_blocks;
  void* means;         // [B, H, kind, blocks] double: c of every query block
  void* text_partial;  // shared text only: [image chunks, H, K, D padded] acc
  void* key_partial;   // more than one chunk only: [chunks, B, H, 2, K, D padded] acc
};

}  // namespace vtclip::cpu

#define VTCLIP_KERNEL "cpu/rational_attn_kernel.h"
#include "cpu/common/foreach_capability.h"

namespace vtclip::cpu {
namespace {

using Query = std::optional<Tensor>;

// A map of at most 256 KiB with its gradient is one tile. Larger ones: blocks of at most 96 queries
// (a multiple of the register tile's 6 rows) and tiles of at most 256 keys (whole register tiles),
// both evened out. Blocks depend on the shape only, so results do not depend on the threads.
void set_map_blocks(AttnShape& s) {
  const int64_t item = s.dtype == Dtype::kFloat64 ? 8 : 4;
  if (3 * item * s.K * s.K <= (int64_t{256} << 10)) {
    s.query_block = s.key_tile = std::max<int64_t>(1, s.K);
    return;
  }
  const int64_t keys = ceil_div(s.K, ceil_div(s.K, 1024 / item));
  s.key_tile = ceil_div(keys, 64) * 64;
  const int64_t queries = ceil_div(s.K, ceil_div(s.K, 96));
  s.query_block = ceil_div(queries, 6) * 6;
}

RationalInputs rational_inputs(const char* op, const Query& image, const Query& text,
                               const Query& pair, const Tensor& key, const Tensor& value,
                               double scale) {
  RationalInputs in{};
  const ScalarType type = check_float(op, "key", key);
  check_rank(op, "key", key, 4);
  AttnShape& s = in.shape;
  s.B = key.size(0);
  s.H = key.size(1);
  s.K = s.L = key.size(2);
  s.d = key.size(3);
  s.dtype = dtype_of(type);
  s.scale = scale;
  check_same(op, "value", value, type, {s.B, s.H, s.K, s.d});
  in.key = heads_view(key);
  in.value = heads_view(value);
  if (image.has_value()) {
    check_same(op, "image_query", *image, type, {s.B, s.H, 1, s.d});
    in.has_image = true;
    in.image = heads_view(*image);
  }
  if (text.has_value()) {
    check_same(op, "text_query", *text, type);
    check_shape_or_shared(op, "text_query", *text, {s.B, s.H, s.K, s.d});
    s.query_shared = text->size(0) == 1;
    in.has[0] = true;
    in.query[0] = heads_view(*text);
  }
  if (pair.has_value()) {
    check_same(op, "pair_query", *pair, type, {s.B, s.H, s.K, s.d});
    in.has[1] = true;
    in.query[1] = heads_view(*pair);
  }
  in.num_kinds = in.has_image + in.has[0] + in.has[1];
  if (in.num_kinds == 0) {
    fail(op, "one of image_query, text_query, pair_query must be a tensor, got none");
  }
  set_map_blocks(s);
  return in;
}

// Multiply-adds of one product between a query block and all keys.
int64_t map_block_work(const AttnShape& s) { return s.query_block * (s.K + 8) * (s.d + 8); }

// [m, B, H, K, D] with the heads inner, for the matrix kinds there are; views in the order of
// kinds.
void set_parts(const RationalInputs& in, const Tensor& parts, HeadsView* views) {
  const int64_t item = item_bytes(in.shape.dtype);
  int64_t m = 0;
  for (int x = 0; x < kMatrixKinds; ++x) {
    if (!in.has[x]) continue;
    char* data = static_cast<char*>(parts.data_ptr()) + m++ * parts.stride(0) * item;
    views[x] = {data, parts.stride(1) * item, parts.stride(2) * item, parts.stride(3) * item,
                parts.stride(4) * item};
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rational_attn_fwd(Query image, Query text, Query pair,
                                                             Tensor key, Tensor value, double scale,
                                                             bool keep_parts) {
  RationalForward p{};
  p.in = rational_inputs("rational_attn_fwd", image, text, pair, key, value, scale);
  const AttnShape& s = p.in.shape;
  const int64_t kinds = p.in.has[0] + p.in.has[1], pairs = s.B * s.H, blocks = s.num_blocks();
  const ScalarType acc = acc_type(key.scalar_type());

  Tensor out = new_heads(key, s.B, s.H, s.K, s.d);
  Tensor parts =
      torch::stable::transpose(new_empty(key, {keep_parts ? kinds : 0, s.B, s.K, s.H, s.d}), 2, 3);
  Tensor image_out = new_empty(key, {p.in.has_image ? s.B : 0, s.H, s.d}, acc);
  Tensor stats = new_empty(key, {3, 2, s.B, s.H}, acc);
  torch::stable::zero_(stats);
  if (pairs * s.K == 0) {
    torch::stable::zero_(image_out);
    return {out, parts, image_out, stats};
  }
  p.out = heads_view(out);
  p.keep_parts = keep_parts;
  if (keep_parts) set_parts(p.in, parts, p.parts);
  p.image_out = image_out.data_ptr();
  p.stats = stats.data_ptr();
  Workspace workspace(key);
  p.block_stats = workspace.take({pairs * kMatrixKinds * 2 * blocks});

  // Sums are formed block by block, in whichever task: the split does not change them.
  const int64_t wanted = kinds == 0 ? 1 : ceil_div(4 * torch::stable::get_num_threads(), pairs);
  p.chunk_blocks = ceil_div(blocks, std::min(wanted, blocks));
  p.num_chunks = ceil_div(blocks, p.chunk_blocks);
  if (p.num_chunks > 1) {
    p.rows = workspace.take({pairs * kMatrixKinds * s.K * panel_width(s.d)});
  }
  run(VTCLIP_PICK(rational_attn_fwd_units), p, pairs * p.num_chunks,
      (2 * kinds + 1) * p.chunk_blocks * map_block_work(s));
  if (p.num_chunks > 1) {
    run(VTCLIP_PICK(rational_attn_finish_units), p, pairs * blocks, 4 * s.query_block * s.d);
  }
  return {out, parts, image_out, stats};
}

// Where there are few (image, head), the query blocks of one are split, and dk and dv are sums over
// the parts: into 64 tasks in all, with at most 256 MiB of partial sums.
int64_t backward_chunks(const AttnShape& s) {
  const int64_t item = s.dtype == Dtype::kFloat64 ? 8 : 4, pairs = s.B * s.H;
  const int64_t bytes = std::max<int64_t>(1, 2 * pairs * s.K * s.d * item);
  const int64_t affordable = (int64_t{256} << 20) / bytes;
  return std::max<int64_t>(1, std::min({64 / pairs, affordable, s.num_blocks()}));
}

// Tensor `index` of those side by side in [B, K, count, H, D], seen as [B, H, K, D].
HeadsView packed_view(const Tensor& packed, int64_t index) {
  const int64_t item = item_bytes(dtype_of(packed.scalar_type()));
  char* data = static_cast<char*>(packed.data_ptr()) + index * packed.stride(2) * item;
  return {data, packed.stride(0) * item, packed.stride(3) * item, packed.stride(1) * item,
          packed.stride(4) * item};
}

std::tuple<Tensor, Tensor, Tensor> rational_attn_bwd(Tensor grad_out, Query image, Query text,
                                                     Query pair, Tensor key, Tensor value,
                                                     Tensor parts, Tensor image_out, Tensor stats,
                                                     double scale) {
  const char* op = "rational_attn_bwd";
  RationalBackward p{};
  p.in = rational_inputs(op, image, text, pair, key, value, scale);
  const AttnShape& s = p.in.shape;
  const ScalarType type = key.scalar_type(), acc = acc_type(type);
  const int64_t kinds = p.in.has[0] + p.in.has[1], pairs = s.B * s.H, blocks = s.num_blocks();
  check_same(op, "grad_out", grad_out, type, {s.B, s.H, s.K, s.d});
  check_same(op, "parts", parts, type, {kinds, s.B, s.H, s.K, s.d});
  check_same(op, "image_out", image_out, acc, {p.in.has_image ? s.B : 0, s.H, s.d});
  check_same(op, "stats", stats, acc, {3, 2, s.B, s.H});

  const auto grad = [&](const Query& query) {
    if (query.has_value()) return new_heads(key, query->size(0), s.H, query->size(2), s.d);
    return new_empty(key, {0});
  };
  Tensor d_image = grad(image), d_text = grad(text);
  Tensor d_pairs = new_empty(key, {s.B, s.K, pair.has_value() ? 3 : 2, s.H, s.d});
  if (pairs * s.K == 0) {
    zero_all({&d_image, &d_text});
    return {d_image, d_text, d_pairs};
  }
  p.grad_out = heads_view(grad_out);
  set_parts(p.in, parts, p.parts);
  if (image.has_value()) p.d_image = heads_view(d_image);
  if (text.has_value()) p.d_query[0] = heads_view(d_text);
  int64_t next = 0;
  if (pair.has_value()) p.d_query[1] = packed_view(d_pairs, next++);
  p.d_key = packed_view(d_pairs, next++);
  p.d_value = packed_view(d_pairs, next);
  p.stats = heads_view(stats);

  Tensor means = new_empty(key, {pairs * kMatrixKinds * blocks}, ScalarType::Double);
  p.means = means.data_ptr();
  p.chunk_blocks = ceil_div(blocks, kinds == 0 ? 1 : backward_chunks(s));
  p.num_chunks = ceil_div(blocks, p.chunk_blocks);
  p.chunk_images = s.query_shared ? images_per_chunk(s) : 1;
  p.num_image_chunks = ceil_div(s.B, p.chunk_images);
  Workspace workspace(key);
  Tensor text_partial;
  if (s.query_shared) {
    text_partial = new_partials(s, key, p.num_image_chunks);
    p.text_partial = text_partial.data_ptr();
  }
  if (p.num_chunks > 1) {
    p.key_partial = workspace.take({p.num_chunks * pairs * 2 * s.K * panel_width(s.d)});
    run(VTCLIP_PICK(rational_attn_mean_units), p, pairs * blocks, 4 * s.query_block * s.d);
  }
  run(VTCLIP_PICK(rational_attn_bwd_units), p, s.H * p.num_image_chunks * p.num_chunks,
      (4 * kinds + 1) * p.chunk_images * p.chunk_blocks * map_block_work(s));
  if (p.num_chunks > 1) {
    run(VTCLIP_PICK(rational_attn_sum_units), p, pairs * s.K, 2 * p.num_chunks * s.d);
  }
  if (s.query_shared) sum_partials(s, text_partial, p.num_image_chunks, d_text);
  return {d_image, d_text, d_pairs};
}

}  // namespace
}  // namespace vtclip::cpu

VTCLIP_REGISTER(CPU, cpu, rational_attn)
