// SPDX-License-Identifier: Apache-2.0
// Backward of rational_attn for one instruction set. Included by rational_attn_kernel.h.
//
// G = dO v^T                        shared by the kinds; dO is the gradient of out over their
// number c = (1/K) sum_i dO_i . O_i = sum_ij A_ij G_ij / K                          one number for
// each map dS = A (G - c) dv = sum_kinds A^T dO ;  dk = sum_kinds scale dS^T q ;  dq = scale dS k
// image: p = softmax_j ;  dO1 = sum_i dO_i ;  ds1 = p (dO1 . v_j - c1) ;  dv += p dO1^T ;
//        dk += scale ds1 q^T ;  dq = scale sum_j ds1_j k_j
//
// A is recomputed from scores with the bits of the forward, its maximum and its sum. c comes from
// the stored O, except where a map has one tile only, or few entries carry it: there dS is a
// difference of nearly equal numbers, and c from the same A and G cancels it exactly.

// A map whose weights, relative to the largest, sum to less than this is carried by few entries.
constexpr int kFewEntries = 64;

// One map while its tiles are recomputed.
template <class T>
struct MapState {
  int kind;
  T top, total;
  T norm;  // K / total
  T mean;  // c
  T* weights;
  T* queries;  // rows of the current block, times scale
};

// What a thread keeps for one (image, head).
template <class T>
struct BackwardPanels {
  const AttnShape& s;
  const int64_t ldd = leading_dim<T>(s.d), ldk = leading_dim<T>(s.K);
  const int64_t rows = s.query_block * ldd, tile = s.query_block * leading_dim<T>(s.key_tile);
  const Scratch<T> key_rows{s.K * ldd}, key_columns{s.d * ldk}, value_columns{s.d * ldk};
  const Scratch<T> out_rows{max_of(s.query_block, 64) * ldd}, text_rows{rows}, pair_rows{rows};
  const Scratch<T> grads{tile}, text_weights{tile}, pair_weights{tile};
};

template <class T>
static T load_stat(const RationalBackward& p, int kind, int which, int64_t b, int64_t h) {
  T value;
  const char* at = p.stats.at(kind, which) + b * p.stats.row + h * p.stats.column;
  __builtin_memcpy(&value, at, sizeof(T));
  return value;
}

// The matrix kinds that (b, h) has; returns how many.
template <class T>
static int map_states(const RationalBackward& p, const BackwardPanels<T>& panels, int64_t b,
                      int64_t h, MapState<T>* maps) {
  int n = 0;
  for (int x = 0; x < kMatrixKinds; ++x) {
    if (!p.in.has[x]) continue;
    const T top = load_stat<T>(p, 1 + x, 0, b, h), total = load_stat<T>(p, 1 + x, 1, b, h);
    const T norm = static_cast<T>(p.in.shape.K) / total;
    T* weights = x == 0 ? panels.text_weights : panels.pair_weights;
    maps[n++] = {x, top, total, norm, 0, weights, x == 0 ? panels.text_rows : panels.pair_rows};
  }
  return n;
}

template <class T>
static void pack_panels(const RationalBackward& p, const BackwardPanels<T>& panels, int64_t b,
                        int64_t h) {
  const AttnShape& s = p.in.shape;
  const int64_t ldd = leading_dim<T>(s.d), ldk = leading_dim<T>(s.K);
  pack_block<T>(s, panels.key_rows, ldd, p.in.key, b, h, 0, s.K, 1);
  pack_columns<T>(s, panels.key_columns, ldk, panels.key_rows, ldd, s.K);
  pack_transposed<T>(s, panels.value_columns, ldk, p.in.value, b, h, s.K, panels.out_rows);
}

// dO and the queries of one block.
template <class T>
static void pack_rows_of_block(const RationalBackward& p, const BackwardPanels<T>& panels,
                               int64_t b, int64_t h, int64_t block, const MapState<T>* maps,
                               int num_maps) {
  const AttnShape& s = p.in.shape;
  const int64_t ldd = leading_dim<T>(s.d);
  const int64_t first = block * s.query_block, count = min_of(s.query_block, s.K - first);
  const T share = T{1} / static_cast<T>(p.in.num_kinds);
  pack_block<T>(s, panels.out_rows, ldd, p.grad_out, b, h, first, count, share);
  for (int i = 0; i < num_maps; ++i) {
    pack_block<T>(s, maps[i].queries, ldd, p.in.query[maps[i].kind], b, h, first, count,
                  static_cast<T>(s.scale));
  }
}

// Scores of every map and G, for keys l .. l + n of the packed block.
template <class T>
static void make_tiles(const AttnShape& s, const BackwardPanels<T>& panels, const MapState<T>* maps,
                       int num_maps, int64_t count, int64_t l, int64_t n) {
  const int64_t ldk = leading_dim<T>(s.K), ldt = leading_dim<T>(s.key_tile);
  for (int i = 0; i < num_maps; ++i) {
    score_rows<T>(s, maps[i].weights, ldt, maps[i].queries, count, panels.key_columns, ldk, l, n);
  }
  score_rows<T>(s, panels.grads, ldt, panels.out_rows, count, panels.value_columns, ldk, l, n);
}

// In place: score -> exp(score - top). Returns the sum of exp(score - top) * G.
template <class T>
static double mean_of_tile(T* weights, const T* grads, int64_t ld, int64_t rows, int64_t n, T top) {
  const auto behind = lanes_behind<T>(n);
  const int64_t last = round_up(n, kLanes<T>) - kLanes<T>;
  const Vec<T> shift = splat(top);
  Vec<T> total{};
  for (int64_t q = 0; q < rows; ++q) {
    T* row = weights + q * ld;
    const T* grad = grads + q * ld;
    Vec<T> sum{};
    for (int64_t c = 0; c < last; c += kLanes<T>) {
      const Vec<T> w = exp_below<T>(load(row + c), shift);
      store(row + c, w);
      sum = fma(w, load(grad + c), sum);
    }
    const Vec<T> w = exp_below<T>(load(row + last), shift);
    store(row + last, w);
    total += sum + (behind ? Vec<T>{} : w * load(grad + last));
  }
  return static_cast<double>(sum_lanes<T>(total));
}

// In place: weights (scores, or exp(score - top) where kReady) -> dS; G -> sum of A over the maps.
template <class T, int N, bool kReady>
static void grad_of_tile(const MapState<T>* maps, T* grads, int64_t ld, int64_t rows, int64_t n) {
  Vec<T> top[N], norm[N], mean[N];
#pragma GCC unroll 2
  for (int i = 0; i < N; ++i) {
    top[i] = splat(maps[i].top);
    norm[i] = splat(maps[i].norm);
    mean[i] = splat(maps[i].mean);
  }
  for (int64_t q = 0; q < rows; ++q) {
    T* grad = grads + q * ld;
    for (int64_t c = 0; c < n; c += kLanes<T>) {
      const Vec<T> g = load(grad + c);
      Vec<T> sum{};
#pragma GCC unroll 2
      for (int i = 0; i < N; ++i) {
        T* weight = maps[i].weights + q * ld + c;
        const Vec<T> score = load(weight);
        const Vec<T> a = (kReady ? score : exp_below<T>(score, top[i])) * norm[i];
        sum = i == 0 ? a : sum + a;
        store(weight, a * (g - mean[i]));
      }
      store(grad + c, sum);
    }
  }
}

template <class T>
static void grad_tiles(const MapState<T>* maps, int num_maps, bool ready, T* grads, int64_t ld,
                       int64_t rows, int64_t n) {
  if (num_maps == 2) {
    ready ? grad_of_tile<T, 2, true>(maps, grads, ld, rows, n)
          : grad_of_tile<T, 2, false>(maps, grads, ld, rows, n);
  } else {
    ready ? grad_of_tile<T, 1, true>(maps, grads, ld, rows, n)
          : grad_of_tile<T, 1, false>(maps, grads, ld, rows, n);
  }
}

// What one query block adds to c of every map, into p.means.
template <class T>
static void block_means(const RationalBackward& p, const BackwardPanels<T>& panels, int64_t pair,
                        int64_t block, const MapState<T>* maps, int num_maps) {
  const AttnShape& s = p.in.shape;
  const int64_t b = pair / s.H, h = pair % s.H, blocks = s.num_blocks();
  const int64_t first = block * s.query_block, count = min_of(s.query_block, s.K - first);
  const int64_t ldd = leading_dim<T>(s.d), ldt = leading_dim<T>(s.key_tile);
  MapState<T> few[kMatrixKinds]{};
  int num_few = 0;
  for (int i = 0; i < num_maps; ++i) {
    if (maps[i].total < kFewEntries) few[num_few++] = maps[i];
  }
  pack_rows_of_block<T>(p, panels, b, h, block, few, num_few);
  const Scratch<T> row(s.d);
  for (int i = 0; i < num_maps; ++i) {
    double sum = 0;
    if (!(maps[i].total < kFewEntries)) {
      const HeadsView& part = p.parts[maps[i].kind];
      for (int64_t q = 0; q < count; ++q) {
        const char* source = part.at(b, h) + (first + q) * part.row;
        const int64_t ahead = min_of(kRowsAhead, count - 1 - q);
        prefetch_row(source + ahead * part.row, s.d * item_bytes(s.dtype));
        const T* o = view_row<T>(row, s.d, source, part.column, s.dtype);
        sum += static_cast<double>(dot_rows<T>(panels.out_rows + q * ldd, o, s.d));
      }
    }
    static_cast<double*>(p.means)[(pair * kMatrixKinds + maps[i].kind) * blocks + block] =
        sum / static_cast<double>(s.K);
  }
  for (int64_t l = 0; num_few != 0 && l < s.K; l += s.key_tile) {
    const int64_t n = min_of(s.key_tile, s.K - l);
    make_tiles<T>(s, panels, few, num_few, count, l, n);
    for (int i = 0; i < num_few; ++i) {
      const double sum = mean_of_tile<T>(few[i].weights, panels.grads, ldt, count, n, few[i].top);
      static_cast<double*>(p.means)[(pair * kMatrixKinds + few[i].kind) * blocks + block] +=
          sum / static_cast<double>(few[i].total);
    }
  }
}

// The image's query: its map has one row.
template <class T>
static void image_backward(const RationalBackward& p, const BackwardPanels<T>& panels, int64_t b,
                           int64_t h, bool accumulate, T* d_keys, T* d_values) {
  const AttnShape& s = p.in.shape;
  const int64_t width = round_up(s.d, kLanes<T>), ldk = leading_dim<T>(s.K);
  const int64_t ldd = leading_dim<T>(s.d);
  const Scratch<T> weights(ldk), grads(ldk), query(ldd), grad(ldd), sum(ldd);
  const MapStats<T> map = image_weights<T>(p.in, b, h, panels.key_columns, query, weights);
  for (int64_t c = 0; c < ldd; ++c) grad[c] = 0;
  const T share = T{1} / static_cast<T>(p.in.num_kinds);
  for (int64_t first = 0; first < s.K; first += s.query_block) {
    const int64_t count = min_of(s.query_block, s.K - first);
    pack_block<T>(s, panels.out_rows, ldd, p.grad_out, b, h, first, count, share);
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      Vec<T> part{};
      for (int64_t q = 0; q < count; ++q) part += load(panels.out_rows + q * ldd + c);
      store(grad + c, load(grad + c) + part);
    }
  }
  score_rows<T>(s, grads, ldk, grad, 1, panels.value_columns, ldk, 0, s.K);
  const T mean = dot_rows<T>(weights, grads, s.K) / map.total;
  for (int64_t l = 0; l < s.K; l += kLanes<T>) {
    const Vec<T> w = load(weights + l) / splat(map.total);
    store(weights + l, w);
    store(grads + l, w * (load(grads + l) - splat(mean)));
  }
  gemm(Gemm<T>{s.K, width, 1, weights, 1, false, grad, ldd, d_values, width, accumulate});
  gemm(Gemm<T>{s.K, width, 1, grads, 1, false, query, ldd, d_keys, width, accumulate});
  weigh_rows<T>(s, grads, panels.key_rows, sum);
  store_row<T>(p.d_image.at(b, h), s.d, s.dtype, sum, static_cast<T>(s.scale));
}

// Adds the part of blocks first .. last of one (image, head) to d_keys, d_values and stores dQ.
template <class T>
static void matrix_backward(const RationalBackward& p, const BackwardPanels<T>& panels,
                            int64_t pair, int64_t first_block, int64_t last_block,
                            const MapState<T>* states, int num_maps, T* d_keys, T* d_values,
                            T* text_partial, bool add_text, T* d_rows) {
  const AttnShape& s = p.in.shape;
  const int64_t b = pair / s.H, h = pair % s.H;
  const int64_t width = round_up(s.d, kLanes<T>), ldd = leading_dim<T>(s.d);
  const int64_t ldt = leading_dim<T>(s.key_tile), tiles = (s.K + s.key_tile - 1) / s.key_tile;
  const bool whole = s.num_blocks() == 1 && tiles == 1;
  MapState<T> maps[kMatrixKinds]{};
  for (int i = 0; i < num_maps; ++i) maps[i] = states[i];
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t first = block * s.query_block, count = min_of(s.query_block, s.K - first);
    pack_rows_of_block<T>(p, panels, b, h, block, maps, num_maps);
    T* d_query[kMatrixKinds];
    bool partial[kMatrixKinds];
    for (int i = 0; i < num_maps; ++i) {
      partial[i] = maps[i].kind == 0 && text_partial != nullptr;
      d_query[i] = partial[i] ? text_partial + first * width : d_rows + i * s.query_block * width;
    }
    for (int64_t l = 0; l < s.K; l += s.key_tile) {
      const int64_t n = min_of(s.key_tile, s.K - l);
      make_tiles<T>(s, panels, maps, num_maps, count, l, n);
      for (int i = 0; whole && i < num_maps; ++i) {
        const double sum =
            mean_of_tile<T>(maps[i].weights, panels.grads, ldt, count, n, maps[i].top);
        maps[i].mean = static_cast<T>(sum / static_cast<double>(maps[i].total));
      }
      grad_tiles<T>(maps, num_maps, whole, panels.grads, ldt, count, n);
      const bool again = block != first_block;
      gemm(Gemm<T>{n, width, count, panels.grads, ldt, true, panels.out_rows, ldd,
                   d_values + l * width, width, again});
      for (int i = 0; i < num_maps; ++i) {
        gemm(Gemm<T>{n, width, count, maps[i].weights, ldt, true, maps[i].queries, ldd,
                     d_keys + l * width, width, again || i != 0});
        gemm(Gemm<T>{count, width, n, maps[i].weights, ldt, false, panels.key_rows + l * ldd, ldd,
                     d_query[i], width, l != 0 || (partial[i] && add_text)});
      }
    }
    for (int i = 0; i < num_maps; ++i) {
      if (partial[i]) continue;
      store_rows<T>(s, p.d_query[maps[i].kind], b, h, first, count, d_query[i], width,
                    static_cast<T>(s.scale));
    }
  }
}

template <class T>
static void rational_backward_units(const RationalBackward& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.in.shape;
  const int64_t blocks = s.num_blocks(), width = round_up(s.d, kLanes<T>);
  const int64_t pairs = s.B * s.H, own = p.key_partial == nullptr ? s.K * width : 0;
  const BackwardPanels<T> panels{s};
  const Scratch<T> own_keys(own), own_values(own), d_rows(kMatrixKinds * s.query_block * width);
  const bool whole = blocks == 1 && s.key_tile >= s.K;

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t chunk = unit % p.num_chunks, task = unit / p.num_chunks;
    const int64_t h = task / p.num_image_chunks, image_chunk = task % p.num_image_chunks;
    const int64_t first = chunk * p.chunk_blocks, last = min_of(blocks, first + p.chunk_blocks);
    T* text_partial = nullptr;
    if (p.text_partial != nullptr) {
      text_partial = static_cast<T*>(p.text_partial) + (image_chunk * s.H + h) * s.K * width;
    }
    const int64_t start = image_chunk * p.chunk_images;
    for (int64_t b = start; b < min_of(s.B, start + p.chunk_images); ++b) {
      const int64_t pair = b * s.H + h;
      pack_panels<T>(p, panels, b, h);
      MapState<T> maps[kMatrixKinds]{};
      const int num_maps = map_states<T>(p, panels, b, h, maps);
      if (!whole) {
        for (int64_t i = 0; p.num_chunks == 1 && num_maps != 0 && i < blocks; ++i) {
          block_means<T>(p, panels, pair, i, maps, num_maps);
        }
        for (int i = 0; i < num_maps; ++i) {
          const double* means =
              static_cast<double*>(p.means) + (pair * kMatrixKinds + maps[i].kind) * blocks;
          double mean = 0;
          for (int64_t j = 0; j < blocks; ++j) mean += means[j];
          maps[i].mean = static_cast<T>(mean);
        }
      }
      T *d_keys = own_keys, *d_values = own_values;
      if (p.key_partial != nullptr) {
        d_keys = static_cast<T*>(p.key_partial) + (chunk * pairs + pair) * 2 * s.K * width;
        d_values = d_keys + s.K * width;
      }
      if (num_maps != 0) {
        matrix_backward<T>(p, panels, pair, first, last, maps, num_maps, d_keys, d_values,
                           text_partial, b != start, d_rows);
      }
      if (chunk == 0 && p.in.has_image) {
        image_backward<T>(p, panels, b, h, num_maps != 0, d_keys, d_values);
      }
      if (p.key_partial == nullptr) {
        store_rows<T>(s, p.d_key, b, h, 0, s.K, d_keys, width, 1);
        store_rows<T>(s, p.d_value, b, h, 0, s.K, d_values, width, 1);
      }
    }
  }
}

// Units of (image, head, query block): c, where the main pass is split.
template <class T>
static void rational_mean_units(const RationalBackward& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.in.shape;
  const int64_t blocks = s.num_blocks();
  const BackwardPanels<T> panels{s};
  MapState<T> maps[kMatrixKinds]{};
  int num_maps = 0;
  int64_t packed = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t pair = unit / blocks;
    if (pair != packed) {
      pack_panels<T>(p, panels, pair / s.H, pair % s.H);
      num_maps = map_states<T>(p, panels, pair / s.H, pair % s.H, maps);
      packed = pair;
    }
    block_means<T>(p, panels, pair, unit % blocks, maps, num_maps);
  }
}

// Units of (image, head, class): dk and dv are sums over the chunks in ascending order.
template <class T>
static void rational_sum_units(const RationalBackward& p, int64_t begin, int64_t end) {
  const AttnShape& s = p.in.shape;
  const int64_t width = round_up(s.d, kLanes<T>), pairs = s.B * s.H;
  const Scratch<T> total(width);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t pair = unit / s.K, row = unit % s.K;
    for (int which = 0; which < 2; ++which) {
      for (int64_t c = 0; c < width; c += kLanes<T>) {
        Vec<T> sum{};
        for (int64_t chunk = 0; chunk < p.num_chunks; ++chunk) {
          const int64_t at = ((chunk * pairs + pair) * 2 + which) * s.K + row;
          sum += load(static_cast<const T*>(p.key_partial) + at * width + c);
        }
        store(total + c, sum);
      }
      const HeadsView& view = which == 0 ? p.d_key : p.d_value;
      store_row<T>(view.at(pair / s.H, pair % s.H) + row * view.row, s.d, s.dtype, total, 1);
    }
  }
}
