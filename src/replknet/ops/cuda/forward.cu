// Forward convolution, NCHW. The input gradient is the same kernel with the weight turned by 180 degrees.
//
// One block walks over items (channel, column tile, row tile, group of images). Producer warps bring the rows of an item into
// a ring of shared-memory stages; consumer warps take tasks (16 lanes x MT output rows x all columns) from the item's counter.
// An output row tile of lane (image i, row offset g) at step e multiplies input rows h0 + g + e - P and the next one with the
// kernel row pair ky = e - TS t of tile t; rows outside the image are a row of zeros, and steps in which every lane is outside
// are skipped.
//
// Template: DT element type, NP bfloat16 planes of float32 (1 otherwise), KH x KW kernel, CBI input and CBO output column
// blocks with output block j at input block j + OFF, NI images a tile, MT tiles a task, V bytes a copy (2: through registers),
// SV columns a store (1, 2, 4), consumer and producer warps, blocks a multiprocessor.

template <int DT, int NP, int KH, int KW, int CBI, int CBO, int OFF, int NI, int MT, int V, int SV, int WARPS, int PROD, int MINB>
struct Forward {
  using B = Band<KW>;
  // Deltas that meet both a column block of the input and one of the output.
  static constexpr int LO = cmax(B::LO, -(CBO - 1) - OFF), HI = cmin(B::HI, CBI - 1 - OFF), ND = HI - LO + 1;
  using T = Table<KH, KW, LO, HI>;
  using Acc = float[MT][CBO][4];
  using Fragments = u32[MT][ND][2];
  static constexpr int P = KH / 2, KHP = (KH + 1) & ~1, GR = 16 / NI, TS = GR > 2 ? GR : 2;
  static constexpr int SET_ROWS = GR == 1 ? 2 * MT : GR * MT, SET_TASKS = GR == 1 ? 2 : 1;
  static constexpr int PITCH = (NI < 8 ? (CBI | 1) : CBI) * 16, ZERO = cdiv(CBI * 16, 128) * 128;
  static constexpr int TABLE = cdiv(NP * T::PLANE, 128) * 128, HEAD = 256;
  static constexpr bool WINDOW = TS == 2;
  // Narrow maps of 16-bit elements whose rows begin anywhere. Where a tile has two rows of an image or more, those of a task follow
  // each other in y: each image's are a span. A consumer warp lays its spans out in shared memory, SPAN bytes apart (eight images
  // never meet in a bank), and copies them to y in aligned words.
  static constexpr bool NARROW = DT != F32 && CBI <= 2 && V == 2, STAGED = NARROW && GR > 1;
  static constexpr int SPAN = SET_ROWS * CBO * 16 + 16, STAGING = STAGED ? NI * SPAN : 0;
  // Registers that a thread can have, and how many column blocks of x are loaded ahead in those that the products leave, where
  // a step has so many products that it pays.
  static constexpr int REGISTERS = cmin(255, 65536 / (32 * MINB * 4 * cdiv(WARPS + PROD, 4)));
  static constexpr int AHEAD = MT != 2 || (WINDOW && CBI < 7) ? 1 : cmax(1, cmin(CBI, (REGISTERS - 44 - MT * CBO * 4 - (WINDOW ? 2 : 4) * MT * ND) / 4 - 1));
  // Whether fragments of the next step have registers of their own.
  static constexpr bool EARLY = !WINDOW && REGISTERS - 44 - MT * CBO * 4 - 4 * MT * ND >= 0;
  using Load = Loader<DT, NP, CBI, PITCH, V, PROD>;
  using Words = typename T::template Words<DT, NP, PROD * 32>;

  struct Item { int c, col0, row0, rows, n0, x0, x_rows; };

  static __device__ __forceinline__ Item decode(int item, int n_groups, int n_rows, int n_cols, int item_rows, int item_images, int H) {
    Item it;
    int g = item % n_groups; item /= n_groups;
    int r = item % n_rows; item /= n_rows;
    it.col0 = (item % n_cols) * CBO * 8;
    it.c = item / n_cols;
    it.row0 = r * item_rows;
    it.rows = min(item_rows, H - it.row0);
    it.n0 = g * item_images;
    it.x0 = max(0, it.row0 - P);
    it.x_rows = min(H, it.row0 + it.rows + P) - it.x0;
    return it;
  }

  static __device__ __forceinline__ void load_rows(u32 to, const void* x, const Item& it, int N, i64 xsn, i64 xsc, int W, int item_images, int stride, int plane, int tid) {
    const i64 base = it.n0 * xsn + it.c * xsc;
    const int images = min(item_images, N - it.n0);
    // Where few registers are free, fewer images at once.
    if constexpr (NARROW) Load::template spans<REGISTERS < 80 ? 8 : 16>(to, (const u16*)x + base + (i64)it.x0 * W, images, it.x_rows, xsn, W, stride, tid);
    else Load::rows(to, x, base, images, it.x0, it.x_rows, it.col0 - 8 * OFF, xsn, W, stride, plane, tid);
  }

  // Whether steps without a kernel row pair are skipped. Then anything may be read for one; else it is zeros.
  static constexpr bool SKIPS = MT == 1 || (MT == 2 && KHP >= TS);
  static __device__ __forceinline__ void load_fragments(u32 (&b)[ND][2], u32 table, int e) {
    if (SKIPS || (unsigned)e < (unsigned)KHP) {
      const int pair = SKIPS ? min(max(e, 0), KHP - 2) >> 1 : e >> 1;
#pragma unroll
      for (int d = 0; d < ND; d++) lds64(b[d], table + pair * (T::NU * 8) + d * 32);
    } else {
#pragma unroll
      for (int d = 0; d < ND; d++) b[d][0] = b[d][1] = 0;
    }
  }

  // One step: two input rows against one row pair of tiles T0 .. T1. a holds the first AHEAD column blocks and receives those of
  // the next step. Tile t's fragments are `turn` places before its own.
  template <int T0, int T1> static __device__ __forceinline__ void multiply(Acc& acc, u32 (&a)[AHEAD][4], u32 row, u32 next, const Fragments& b, int turn) {
#pragma unroll
    for (int c = 0; c < CBI; c++) {
      u32 fresh[4];
      ldsm4(fresh, c + AHEAD < CBI ? row + (c + AHEAD) * 16 : next + (c + AHEAD - CBI) * 16);
#pragma unroll
      for (int t = T0; t <= T1; t++)
#pragma unroll
        for (int j = 0; j < CBO; j++) {
          const int d = c - OFF - j - LO;
          if (d >= 0 && d < ND) mma<DT>(acc[t][j], a[0], b[(t + MT - turn) % MT][d]);
        }
#pragma unroll
      for (int k = 0; k < AHEAD; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) a[k][i] = k + 1 < AHEAD ? a[k + 1 < AHEAD ? k + 1 : k][i] : fresh[i];
    }
  }

  // Steps e .. e_end of the first `tiles` tiles. x: this lane's input row at step e. Tiles a row pair apart share fragments: tile t
  // needs at a step those of tile t - 1 at the step before, so they stay in their registers and the tiles take turns. Tiles further
  // apart share none: where registers are free, those of the next step are on their way during this one, and two sets of registers
  // take turns. The loop is unrolled to make the turns known to the compiler.
  template <class Rows> static __device__ __forceinline__ void accumulate(Acc& acc, Rows x, u32 table, int e, int e_end, int tiles) {
    constexpr int TURNS = WINDOW ? MT : EARLY ? 2 : 1;
    Fragments b[EARLY ? 2 : 1];
    u32 a[AHEAD][4], row = x.address();
#pragma unroll
    for (int c = 0; c < AHEAD; c++) ldsm4(a[c], row + c * 16);
#pragma unroll
    for (int t = 0; t < MT; t++) load_fragments(b[0][t], table, e - TS * t);
#pragma unroll 1
    while (true)
#pragma unroll
      for (int turn = 0; turn < TURNS; turn++) {
        Fragments &mine = b[EARLY ? turn : 0], &next_step = b[EARLY ? 1 - turn : 0];
        const int shift = WINDOW ? turn : 0;
        x.next();
        const u32 next = x.address();
        if constexpr (EARLY)
#pragma unroll
          for (int t = 0; t < MT; t++) load_fragments(next_step[t], table, e + 2 - TS * t);
        if constexpr (MT == 2) {
          if (e < TS || tiles == 1) multiply<0, 0>(acc, a, row, next, mine, shift);
          else if (e >= KHP) multiply<1, 1>(acc, a, row, next, mine, shift);
          else multiply<0, 1>(acc, a, row, next, mine, shift);
        } else
          multiply<0, MT - 1>(acc, a, row, next, mine, shift);
        row = next, e += 2;
        if (e >= e_end) return;
        if constexpr (WINDOW) load_fragments(mine[(2 * MT - 1 - turn) % MT], table, e);
        else if constexpr (!EARLY)
#pragma unroll
          for (int t = 0; t < MT; t++) load_fragments(mine[t], table, e - TS * t);
      }
  }

  // The same where many tiles lie more than a row pair apart: few of them are active at a step, and each needs its own fragments.
  template <class Rows> static __device__ __forceinline__ void accumulate_apart(Acc& acc, Rows x, u32 table, int e, int e_end, int tiles) {
#pragma unroll 1
    for (; e < e_end; e += 2, x.next()) {
      const u32 row = x.address();
      u32 a[CBI][4];
#pragma unroll
      for (int c = 0; c < CBI; c++) ldsm4(a[c], row + c * 16);
#pragma unroll
      for (int t = 0; t < MT; t++) {
        if (t >= tiles || (unsigned)(e - TS * t) >= (unsigned)KHP) continue;
        u32 b[ND][2];
        load_fragments(b, table, e - TS * t);
#pragma unroll
        for (int c = 0; c < CBI; c++)
#pragma unroll
          for (int j = 0; j < CBO; j++) {
            const int d = c - OFF - j - LO;
            if (d >= 0 && d < ND) mma<DT>(acc[t][j], a[c], b[d]);
          }
      }
    }
  }

  template <int N> static __device__ __forceinline__ void store(void* y, i64 at, const float (&v)[N]) {
    if constexpr (DT == F32) {
      if constexpr (N == 1) ((float*)y)[at] = v[0];
      else *(float2*)((float*)y + at) = make_float2(v[0], v[1]);
    } else if constexpr (N == 1) ((u16*)y)[at] = (u16)pack2<DT>(v[0], 0.f);
    else *(u32*)((u16*)y + at) = pack2<DT>(v[0], v[1]);
  }
  // The four threads of a row exchange their pairs so that each holds four columns of two blocks: whole sectors go out at once.
  static __device__ __forceinline__ uint2 exchange(u32 a, u32 b, int q) {
    u32 keep = q < 2 ? a : b, got = __shfl_xor_sync(0xffffffffu, q < 2 ? b : a, 2);
    u32 even = q < 2 ? keep : got, odd = q < 2 ? got : keep;
    got = __shfl_xor_sync(0xffffffffu, q & 1 ? even : odd, 1);
    return q & 1 ? make_uint2(got, odd) : make_uint2(even, got);
  }
  // Rows 8 HALF .. 8 HALF + 7 of the tiles: this thread's lane is (lane / 4) + 8 HALF, its columns 2 (lane % 4) and the next.
  template <int HALF> static __device__ __forceinline__ void store_half(void* y, const Acc& acc, const Item& it, int N, i64 ysn, i64 ysc, int h0, int group,
                                                                        int lane, float bias, float floor, int W) {
    const int m = (lane >> 2) + 8 * HALF, n = it.n0 + group * NI + m % NI, q = lane & 3;
    const int h1 = h0 + m / NI, h_end = n < N ? it.row0 + it.rows : 0, left = W - it.col0;
    const i64 at = n * ysn + it.c * ysc + (i64)h1 * W + it.col0;
#pragma unroll
    for (int t = 0; t < MT; t++) {
      const bool ok = h1 + TS * t < h_end;
      const i64 row = at + TS * t * W;
#pragma unroll
      for (int j = 0; j < CBO; j++) {
        float v[2] = {max_nan(acc[t][j][2 * HALF] + bias, floor), max_nan(acc[t][j][2 * HALF + 1] + bias, floor)};
        const int col = 8 * j + 2 * q;
        if (SV == 4 && (j & 1) == 0 && j + 1 < CBO) {
          const int j1 = j + 1 < CBO ? j + 1 : j, c4 = 8 * j + (q >> 1) * 8 + (q & 1) * 4;
          const uint2 r = exchange(pack2<DT == F32 ? F16 : DT>(v[0], v[1]),
                                   pack2<DT == F32 ? F16 : DT>(max_nan(acc[t][j1][2 * HALF] + bias, floor), max_nan(acc[t][j1][2 * HALF + 1] + bias, floor)), q);
          if (ok && c4 < left) *(uint2*)((u16*)y + row + c4) = r;
        } else if (SV == 4 && (j & 1)) {
          continue;
        } else if (SV >= 2) {
          if (ok && col < left) store<2>(y, row + col, v);
        } else {
          const float v0[1] = {v[0]}, v1[1] = {v[1]};
          if (ok && col < left) store<1>(y, row + col, v0);
          if (ok && col + 1 < left) store<1>(y, row + col + 1, v1);
        }
      }
    }
  }
  // The same for a task whose results are staged at `buffer`. A span begins there as many bytes behind a word as in y.
  static __device__ __forceinline__ void store_spans(void* y, u32 buffer, const Acc& acc, const Item& it, int N, i64 ysn, i64 ysc, int h0, int group, int lane,
                                                     float bias, float floor, int W) {
    const int n0 = it.n0 + group * NI, q = lane & 3, bytes = min(SET_ROWS, it.row0 + it.rows - h0) * W * 2;
    const i64 step = 2 * ysn;
    u8* const span = (u8*)((u16*)y + n0 * ysn + it.c * ysc + (i64)h0 * W);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int m = (lane >> 2) + 8 * half, image = m % NI;
      u32 to = buffer + image * SPAN + ((u32)(i64)(span + image * step) & 2) + m / NI * W * 2 + q * 4;
      // Rows past the last have room as well, and are not copied.
#pragma unroll
      for (int t = 0; t < MT; t++, to += TS * W * 2)
#pragma unroll
        for (int j = 0; j < CBO; j++) {
          const u32 v = pack2<DT>(max_nan(acc[t][j][2 * half] + bias, floor), max_nan(acc[t][j][2 * half + 1] + bias, floor));
          const int col = 8 * j + 2 * q;
          if (j + 1 < CBO || col < W) sts16(to + j * 16, v);
          if (j + 1 < CBO || col + 1 < W) sts16(to + j * 16 + 2, v >> 16);
        }
    }
    __syncwarp();
    const int images = N - n0, end = bytes + (((u32)(i64)span | (u32)step) & 2);
#pragma unroll 1
    for (int k = lane * 4; k < end; k += 32 * 4) {
      u32 v[NI];
#pragma unroll
      for (int i = 0; i < NI; i++) v[i] = lds32(buffer + i * SPAN + k);
#pragma unroll
      for (int i = 0; i < NI; i++) {
        u8* const image = span + i * step;
        const int at = k - ((u32)(i64)image & 2);
        if (i >= images) continue;
        if (at >= 0 && at + 4 <= bytes) *(u32*)(image + at) = v[i];
        // The second half of a word is the span's first element, or its first half the last.
        else if (at < bytes) *(u16*)(image + max(at, 0)) = (u16)(v[i] >> (at < 0 ? 16 : 0));
      }
    }
    __syncwarp();
  }
};

// Arguments: x, weight [C, KH, KW] contiguous, bias [C] or null, y; sizes; strides of image and channel in elements (rows are W
// apart); images and rows an item; bytes between images in shared memory; flags.
template <int DT, int NP, int KH, int KW, int CBI, int CBO, int OFF, int NI, int MT, int V, int SV, int WARPS, int PROD, int STAGES, int MINB>
__global__ __launch_bounds__((WARPS + PROD) * 32, MINB) void forward_nchw(
    const void* __restrict__ x, const void* __restrict__ weight, const void* __restrict__ bias, void* __restrict__ y, int N, int C, int H, int W,
    i64 xsn, i64 xsc, i64 ysn, i64 ysc, int item_images, int item_rows, int stride, int flags) {
  using K = Forward<DT, NP, KH, KW, CBI, CBO, OFF, NI, MT, V, SV, WARPS, PROD, MINB>;
  using T = typename K::T;
  extern __shared__ __align__(128) u8 smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const u32 bars = smem_u32(smem), zero = bars + K::HEAD, tables = zero + K::ZERO, stages = tables + STAGES * K::TABLE;
  int* counter = (int*)(smem + 128);
  const int plane = stride * item_images, stage_bytes = NP * plane;
  if (tid < K::ZERO / 4) ((u32*)(smem + K::HEAD))[tid] = 0;
  // Nobody writes the columns past W.
  if constexpr (K::NARROW)
    for (int i = tid * 8; i < STAGES * stage_bytes; i += (WARPS + PROD) * 32 * 8) sts64(stages + i, 0, 0);
  if (tid == 0)
    for (int s = 0; s < STAGES; s++) bar_init(bars + s * 16, 2 * PROD * 32), warps_init(bars + s * 16 + 8, WARPS);
  __syncthreads();

  const int n_groups = cdiv(N, item_images), n_rows = cdiv(H, item_rows), n_cols = cdiv(W, CBO * 8), per_channel = n_groups * n_rows * n_cols;
  const i64 items = (i64)per_channel * C;
  const int first = (int)(items * blockIdx.x / gridDim.x), last = (int)(items * (blockIdx.x + 1) / gridDim.x);

  if (warp >= WARPS) {
    const int t = tid - WARPS * 32;
    for (int item = first, k = 0, s = 0, phase = 1; item < last; item++, k++) {
      const typename K::Item it = K::decode(item, n_groups, n_rows, n_cols, item_rows, item_images, H);
      const u32 full = bars + s * 16;
      if constexpr (K::NARROW && K::Words::ONCE) {
        // Small items take little longer than a read from memory: the taps are on their way before the rows.
        const bool turned = flags & FLIP, same = k >= STAGES && (item - STAGES) / per_channel == it.c;
        typename K::Words words(tables + s * K::TABLE, (const u8*)weight + (i64)it.c * (KH * KW) * 2, turned, t % K::Words::LANES, t);
        if (!same && turned) words.template load<true>(0);
        if (!same && !turned) words.template load<false>(0);
        bar_wait(full + 8, phase);
        if (t == 0) counter[s] = 0;
        K::load_rows(stages + s * stage_bytes, x, it, N, xsn, xsc, W, item_images, stride, plane, t);
        if (!same && t % K::Words::LANES < 2 * T::NU) words.store(0);
      } else {
        bar_wait(full + 8, phase);
        if (t == 0) counter[s] = 0;
        K::load_rows(stages + s * stage_bytes, x, it, N, xsn, xsc, W, item_images, stride, plane, t);
        if (k < STAGES || (item - STAGES) / per_channel != it.c)
          T::template build<DT, NP, PROD * 32>(tables + s * K::TABLE, (const u8*)weight + (i64)it.c * (KH * KW) * (DT == F32 ? 4 : 2), flags & FLIP, t);
      }
      bar_arrive_copies(full);
      bar_arrive(full);
      if (++s == STAGES) s = 0, phase ^= 1;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }

  const int img = (lane & 15) % NI, off = (lane & 15) / NI + (lane >> 4);
  const float floor = flags & RELU ? 0.f : -__int_as_float(0x7f800000);
  for (int item = first, s = 0, phase = 0; item < last; item++) {
    const u32 full = bars + s * 16, table = tables + s * K::TABLE + T::lane_offset(lane);
    const typename K::Item it = K::decode(item, n_groups, n_rows, n_cols, item_rows, item_images, H);
    const int sets = cdiv(it.rows, K::SET_ROWS) * K::SET_TASKS, groups = cdiv(min(item_images, N - it.n0), NI);
    const float shift = bias ? load_float<DT>(bias, it.c) : 0.f;
    u32 xs = stages + s * stage_bytes + img * stride;
    int group = 0, set = 0, taken = 0;
    bar_wait(full, phase);
    while (true) {
      int task = 0;
      if (lane == 0) task = atomicAdd(counter + s, 1);
      task = __shfl_sync(0xffffffffu, task, 0);
      for (set += task - taken, taken = task; set >= sets && group < groups; set -= sets) group++, xs += NI * stride;
      if (group >= groups) break;
      const int h0 = it.row0 + set / K::SET_TASKS * K::SET_ROWS + set % K::SET_TASKS;
      const int e0 = max(0, K::P - h0 - K::GR) & ~1, e1 = min(K::KHP + K::TS * (MT - 1), H - h0 + K::P);
      typename K::Acc acc;
#pragma unroll
      for (int t = 0; t < MT; t++)
#pragma unroll
        for (int j = 0; j < CBO; j++) acc[t][j][0] = acc[t][j][1] = acc[t][j][2] = acc[t][j][3] = 0.f;
#pragma unroll 1
      for (int i = 0; i < Terms<NP>::N; i++)
        K::accumulate(acc, StageRows<K::PITCH>(xs + Terms<NP>::x(i) * plane, h0 + off + e0 - K::P - it.x0, it.x_rows, zero),
                      table + Terms<NP>::w(i) * T::PLANE, e0, e1, MT);
      if constexpr (K::STAGED) {
        K::store_spans(y, stages + STAGES * stage_bytes + warp * K::STAGING, acc, it, N, ysn, ysc, h0, group, lane, shift, floor, W);
      } else {
        K::template store_half<0>(y, acc, it, N, ysn, ysc, h0, group, lane, shift, floor, W);
        K::template store_half<1>(y, acc, it, N, ysn, ysc, h0, group, lane, shift, floor, W);
      }
    }
    warp_arrive(full + 8, lane);
    if (++s == STAGES) s = 0, phase ^= 1;
  }
}
