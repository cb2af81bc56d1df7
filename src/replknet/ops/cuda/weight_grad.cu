// Weight gradient, NCHW.
//
// dw[ky, kx] = sum over images, h, w of x[h + ky - P, w + kx - P] dy[h, w]. Per kernel row pair and delta one 16x8 accumulator:
// its rows are 8 columns of x at kernel row ky and the same 8 columns at ky + 1, its columns 8 columns of dy, and the 16 deep
// reduction runs over lanes (image i, row offset g). Blocks of equal delta add into the same accumulator, and at the end its
// diagonals are summed, in a fixed order.
//
// One block takes one channel and a share of the items (column tile, row tile, group of images). Consumer warps share the kernel
// row pairs (R each) and, in slices, the rows. HB output rows two apart share the rows of x that they have in common.
template <int DT, int NP, int KH, int KW, int CBI, int CBO, int OFF, int NI, int R, int HB, int V, int WARPS, int PROD, int STAGES>
struct WeightGrad {
  using B = Band<KW>;
  static constexpr int LO = cmax(B::LO, -(CBO - 1) - OFF), HI = cmin(B::HI, CBI - 1 - OFF), ND = HI - LO + 1;
  static constexpr int P = KH / 2, KQ = (KH + 1) / 2, GR = 16 / NI, ODD = NI < 8 ? 1 : 0, JP = cdiv(CBO, 2);
  static constexpr int SET_TASKS = GR == 1 && HB > 1 ? 2 : 1, SET_ROWS = GR * HB * SET_TASKS;
  static constexpr int XPITCH = (CBI | ODD) * 16, YPITCH = (CBO | ODD) * 16, ZERO = cdiv(cmax(CBI, CBO + 1) * 16, 128) * 128;
  static constexpr int WG = cdiv(KQ, R), WS = WARPS / WG, HEAD = 256;
  static_assert(HB == 1 || GR <= 2, "shared rows");
  using LoadX = Loader<DT, NP, CBI, XPITCH, V, PROD>;
  using LoadY = Loader<DT, NP, CBO, YPITCH, V, PROD>;
  using Acc = float[R][ND][4];

  // acc += a dy. A tensor core cuts what its sums cannot hold instead of rounding it, so that hundreds of thousands of sums drift
  // towards zero: 1e-4 of the largest gradient at 64 images of 56x56. Where float32 is asked for, the sums are thus the ordinary
  // units', which round to nearest.
  static __device__ __forceinline__ void add(float (&acc)[4], const u32 (&a)[4], const u32 (&y)[2]) {
    if constexpr (NP == 3) {
      float part[4] = {0.f, 0.f, 0.f, 0.f};
      mma<DT>(part, a, y);
#pragma unroll
      for (int e = 0; e < 4; e++) acc[e] += part[e];
    } else
      mma<DT>(acc, a, y);
  }

  // Row pair number q of x against the rows of dy that it meets: kernel row pair q - b for row b.
  template <int Q> static __device__ __forceinline__ void multiply(Acc& acc, u32 at, const u32 (&dy)[HB][JP][4]) {
#pragma unroll
    for (int c = 0; c < CBI; c++) {
      u32 a[4];
      ldsm4t(a, at + c * 16);
#pragma unroll
      for (int b = 0; b < HB; b++)
        if (Q - b >= 0 && Q - b < R)
#pragma unroll
          for (int j = 0; j < CBO; j++) {
            constexpr int last = ND - 1;
            const int d = c - OFF - j - LO, k = Q - b < 0 ? 0 : Q - b >= R ? R - 1 : Q - b;
            const u32 y[2] = {dy[b][j / 2][(j & 1) * 2], dy[b][j / 2][(j & 1) * 2 + 1]};
            if (d >= 0 && d < ND) add(acc[k][d < 0 ? 0 : d > last ? last : d], a, y);
          }
    }
  }
  template <int Q, class Rows> static __device__ __forceinline__ void steps(Acc& acc, const Rows& x, const u32 (&dy)[HB][JP][4], int q_lo, int q_hi, bool all) {
    if constexpr (Q < R + HB - 1) {
      if (all || (Q >= q_lo && Q <= q_hi)) multiply<Q>(acc, x.address(2 * Q), dy);
      steps<Q + 1>(acc, x, dy, q_lo, q_hi, all);
    }
  }

  // Output rows h0 + g + 2 b of lane (image, g), b < HB, against this warp's kernel row pairs, for one pair of planes.
  // x: this lane's input row at row pair 0; ys: its image of dy; q_lo, q_hi: first and last row pair of x with a row inside
  // the image.
  template <class Rows> static __device__ __forceinline__ void accumulate(Acc& acc, const Rows& x, u32 ys, int y_row, int y_rows, u32 zero, int q_lo, int q_hi, int lane) {
    u32 dy[HB][JP][4];
#pragma unroll
    for (int b = 0; b < HB; b++) {
      const int r = y_row + 2 * b;
      const u32 at = ((unsigned)r < (unsigned)y_rows ? ys + r * YPITCH : zero) + (lane >> 4) * 16;
#pragma unroll
      for (int j = 0; j < JP; j++) ldsm4t(dy[b][j], at + j * 32);
    }
    // Straight-line code lets the loads run ahead; it is worth its size where the products of a step do not cover them.
    if (q_lo <= 0 && q_hi >= R + HB - 2) steps<0>(acc, x, dy, q_lo, q_hi, true);
    else steps<0>(acc, x, dy, q_lo, q_hi, false);
  }

  // Sums the diagonals of the accumulators of two kernel rows, in a fixed order, into taps[2][KW]. buffer: SUMS floats of this
  // warp, 2 kernel rows of 8 lines. Element (m, j) of block d lies in line m at 8 (ND - 1 - d) + j: what adds to a tap then lies
  // side by side in the lines, and one place further from line to line. Lines are an odd number of 8 floats apart.
  static constexpr int LINE = 8 * (ND | 1), SUMS = 2 * 8 * LINE;
  static __device__ __forceinline__ void reduce(const float (&acc)[ND][4], float* buffer, float* taps, int lane) {
    float* to = buffer + (lane >> 2) * LINE + 2 * (lane & 3);
    __syncwarp();
#pragma unroll
    for (int d = 0; d < ND; d++)
#pragma unroll
      for (int half = 0; half < 2; half++) *(float2*)(to + half * 8 * LINE + 8 * (ND - 1 - d)) = make_float2(acc[d][2 * half], acc[d][2 * half + 1]);
    __syncwarp();
#pragma unroll
    for (int e = lane; e < 2 * KW; e += 32) {
      const int half = e >= KW, at = 8 * HI + KW / 2 - (e - half * KW);
      const float* from = buffer + half * 8 * LINE + at;
      float sum = 0.f;
#pragma unroll
      for (int m = 0; m < 8; m++) sum += (unsigned)(at + m) < 8u * ND ? from[m * LINE + m] : 0.f;
      taps[e] = sum;
    }
  }
};

// partial: float32 [splits, C, KH, KW]; grid (C, splits).
template <int DT, int NP, int KH, int KW, int CBI, int CBO, int OFF, int NI, int R, int HB, int V, int WARPS, int PROD, int STAGES, int MINB>
__global__ __launch_bounds__((WARPS + PROD) * 32, MINB) void weight_grad_nchw(
    const void* __restrict__ x, const void* __restrict__ dy, float* __restrict__ partial, int N, int C, int H, int W, i64 xsn, i64 xsc, i64 ysn, i64 ysc,
    int item_images, int item_rows, int xstride, int ystride) {
  using K = WeightGrad<DT, NP, KH, KW, CBI, CBO, OFF, NI, R, HB, V, WARPS, PROD, STAGES>;
  static_assert(K::WG * K::WS == WARPS, "warps");
  extern __shared__ __align__(128) u8 smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, c = blockIdx.x;
  const u32 bars = smem_u32(smem), zero = bars + K::HEAD, stages = zero + K::ZERO;
  const int xplane = xstride * item_images, yplane = ystride * item_images, stage_bytes = NP * (xplane + yplane);
  for (int e = tid; e < K::ZERO / 4; e += (WARPS + PROD) * 32) ((u32*)(smem + K::HEAD))[e] = 0;
  if (tid == 0)
    for (int s = 0; s < STAGES; s++) bar_init(bars + s * 16, 2 * PROD * 32), warps_init(bars + s * 16 + 8, WARPS);
  __syncthreads();

  const int n_groups = cdiv(N, item_images), n_rows = cdiv(H, item_rows), n_cols = cdiv(W, CBO * 8);
  const i64 items = (i64)n_groups * n_rows * n_cols;
  const int first = (int)(items * blockIdx.y / gridDim.y), last = (int)(items * (blockIdx.y + 1) / gridDim.y);

  typename K::Acc acc;
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int d = 0; d < K::ND; d++) acc[r][d][0] = acc[r][d][1] = acc[r][d][2] = acc[r][d][3] = 0.f;

  const int kx = (lane & 7) + 8 * (lane >> 4), ky = lane & 15;  // reduction lanes whose rows of x and dy this thread addresses
  const int pair = warp % K::WG * R, slice = warp / K::WG;
  for (int item = first, s = 0, phase = 0; item < last; item++) {
    const int n0 = item % n_groups * item_images, row0 = item / n_groups % n_rows * item_rows, col0 = item / n_groups / n_rows * CBO * 8;
    const int rows = min(item_rows, H - row0), x0 = max(0, row0 - K::P), x_rows = min(H, row0 + rows + K::P) - x0;
    const int images = min(item_images, N - n0), groups = cdiv(images, NI);
    const u32 full = bars + s * 16, xs = stages + s * stage_bytes, ys = xs + NP * xplane;
    if (warp >= WARPS) {
      const int t = tid - WARPS * 32;
      bar_wait(full + 8, phase ^ 1);
      K::LoadX::rows(xs, x, n0 * xsn + c * xsc, images, x0, x_rows, col0 - 8 * OFF, xsn, W, xstride, xplane, t);
      K::LoadY::rows(ys, dy, n0 * ysn + c * ysc, images, row0, rows, col0, ysn, W, ystride, yplane, t);
      if (images < groups * NI) {
        K::LoadX::clear(xs, images, groups * NI, x_rows, xstride, xplane, t);
        K::LoadY::clear(ys, images, groups * NI, rows, ystride, yplane, t);
      }
      bar_arrive_copies(full);
      bar_arrive(full);
    } else {
      const int sets = cdiv(rows, K::SET_ROWS) * K::SET_TASKS;
      u32 xg = xs + kx % NI * xstride, yg = ys + ky % NI * ystride;
      bar_wait(full, phase);
#pragma unroll 1
      for (int set = slice, group = 0;; set += K::WS) {
        for (; set >= sets; set -= sets) group++, xg += NI * xstride, yg += NI * ystride;
        if (group >= groups) break;
        const int h = set / K::SET_TASKS * K::SET_ROWS + set % K::SET_TASKS;
        const int top = row0 + h + 2 * pair - K::P;  // input row of lane g = 0 and row pair 0
        const int q_lo = top + K::GR >= 0 ? 0 : (-top - K::GR + 1) / 2, q_hi = (H - 1 - top) >> 1;
#pragma unroll 1
        for (int i = 0; i < Terms<NP>::N; i++)
          K::accumulate(acc, StageRows<K::XPITCH>(xg + Terms<NP>::x(i) * xplane, top - x0 + kx / NI + ((lane >> 3) & 1), x_rows, zero),
                        yg + Terms<NP>::w(i) * yplane, h + ky / NI, rows, zero, q_lo, q_hi, lane);
      }
      warp_arrive(full + 8, lane);
    }
    if (++s == STAGES) s = 0, phase ^= 1;
  }
  if (warp >= WARPS) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }
  asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
  float* taps = (float*)(smem + K::HEAD + K::ZERO);  // [WS][WG * R * 2][KW]
  constexpr int ROWS = K::WG * R * 2;
  float* buffer = taps + K::WS * ROWS * KW + (K::WS * ROWS * KW & 1) + warp * K::SUMS;
#pragma unroll
  for (int r = 0; r < R; r++) K::reduce(acc[r], buffer, taps + (warp / K::WG * ROWS + (warp % K::WG * R + r) * 2) * KW, lane);
  asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
  float* out = partial + ((i64)blockIdx.y * C + c) * (KH * KW);
  for (int e = tid; e < KH * KW; e += WARPS * 32) {
    float sum = 0.f;
    for (int w = 0; w < K::WS; w++) sum += taps[w * ROWS * KW + e];
    out[e] = sum;
  }
}

// dw = sum of the splits, in order.
template <int DT> __global__ __launch_bounds__(256) void weight_grad_sum(const float* __restrict__ partial, void* __restrict__ dw, int splits, i64 n) {
  for (i64 i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll) {
    float sum = 0.f;
#pragma unroll 8
    for (int s = 0; s < splits; s++) sum += partial[s * n + i];
    if constexpr (DT == F32) ((float*)dw)[i] = sum;
    else ((u16*)dw)[i] = (u16)pack2<DT>(sum, 0.f);
  }
}
