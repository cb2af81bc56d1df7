// Small kernels on channels_last tensors, without tensor cores: there is too little to multiply to pay for turning pixels into
// planes and back.
//
// A thread has two neighbouring channels and a strip of TW columns, walks down the rows of its part of an image and reads the
// pixels that the strip needs of each row once; those of the next rows are on their way meanwhile. Row r takes part in the output
// rows r - P .. r + P, so the forward pass holds the sums of KH rows and the weight gradient KH rows of dy in registers, row o in
// slot o modulo KH: the loop over rows is unrolled KH times to make the slots known to the compiler.
//
// The number of channels is a template argument, which makes every address a constant behind a pointer; columns are checked only
// where they can lie outside the image.
//
// Threads of a block that have the same channels take neighbouring strips, of the next image behind the last of one. Arithmetic
// is float32's in every dtype.

// Two neighbouring channels of a pixel, at once where the memory is aligned for it; `high`: whether there is a second one.
template <int DT, bool WIDE> struct Two {
  using Word = u32;
  static __device__ __forceinline__ u32 zero() { return 0; }
  static __device__ __forceinline__ u32 load(const u8* p, bool high) {
    if constexpr (WIDE) return __ldg((const u32*)p);
    const u32 lo = __ldg((const u16*)p), hi = high ? __ldg((const u16*)p + 1) : 0;
    return lo | hi << 16;
  }
  static __device__ __forceinline__ float2 floats(u32 w) {
    return make_float2(DT == F16 ? to_float<DT>((u16)w) : bf16_low(w), DT == F16 ? to_float<DT>((u16)(w >> 16)) : bf16_high(w));
  }
  template <bool RELU_TOO> static __device__ __forceinline__ void store(u8* p, float2 v, bool high) {
    u32 w;
    if constexpr (!RELU_TOO) w = pack2<DT>(v.x, v.y);
    else if constexpr (DT == F16) asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(v.y), "f"(v.x));
    else asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(v.y), "f"(v.x));
    if constexpr (WIDE) *(u32*)p = w;
    else {
      *(u16*)p = (u16)w;
      if (high) *((u16*)p + 1) = (u16)(w >> 16);
    }
  }
};
template <bool WIDE> struct Two<F32, WIDE> {
  using Word = float2;
  static __device__ __forceinline__ float2 zero() { return make_float2(0.f, 0.f); }
  static __device__ __forceinline__ float2 load(const u8* p, bool high) {
    if constexpr (WIDE) return __ldg((const float2*)p);
    return make_float2(__ldg((const float*)p), high ? __ldg((const float*)p + 1) : 0.f);
  }
  static __device__ __forceinline__ float2 floats(float2 w) { return w; }
  template <bool RELU_TOO> static __device__ __forceinline__ void store(u8* p, float2 v, bool high) {
    if constexpr (RELU_TOO) v.x = max_nan(v.x, 0.f), v.y = max_nan(v.y, 0.f);
    if constexpr (WIDE) *(float2*)p = v;
    else {
      *(float*)p = v.x;
      if (high) *((float*)p + 1) = v.y;
    }
  }
};

// What is known when a kernel is compiled. A block has LANES pairs of channels side by side.
template <int DT, int KH, int KW, int TW, int C> struct Direct {
  static constexpr int TAPS = KH * KW, PH = KH / 2, PW = KW / 2, SIZE = DT == F32 ? 4 : 2, PIXEL = C * SIZE;
  static constexpr int CHANNEL_BLOCKS = cdiv(cdiv(C, 2), 32), LANES = cdiv(cdiv(C, 2), CHANNEL_BLOCKS);
  // Channels c and c + 1 (c0: the block's first), columns col0 .. of image n. Threads without work have no channel or no image.
  struct Strip {
    int c0, c, n, col0;
    __device__ __forceinline__ Strip(int channel_block, int strip_block, int W) {
      const int strips = cdiv(W, TW), strip = strip_block * (blockDim.x / LANES) + threadIdx.x / LANES;
      c0 = 2 * channel_block * LANES, c = c0 + 2 * (threadIdx.x % LANES), n = strip / strips, col0 = strip % strips * TW;
    }
  };

  // Pixels of a strip's columns, HALO more on either side, row by row, DEPTH rows on their way: zeros outside rows
  // row0 .. row1 - 1 and outside the image. WHOLE: strips lie in the image, and so does a neighbour's halo.
  template <int HALO, int DEPTH, bool WHOLE, bool WIDE> struct Rows {
    using T = Two<DT, WIDE>;
    static constexpr int N = TW + 2 * HALO;
    const u8* at;
    i64 row_bytes;
    int row, row0, row1;
    u32 inside;
    bool left, right, high;
    typename T::Word word[DEPTH][N];

    __device__ __forceinline__ Rows(const void* x, const Strip& strip, int row, int row0, int row1, int H, int W)
        : row_bytes((i64)W * PIXEL), row(row), row0(row0), row1(row1), inside(0), left(strip.col0 > 0), right(strip.col0 + TW < W), high(strip.c + 1 < C) {
      at = (const u8*)x + (((i64)strip.n * H + row) * W + strip.col0 - HALO) * PIXEL + strip.c * SIZE;
#pragma unroll
      for (int i = 0; i < N; i++) inside |= (u32)((unsigned)(strip.col0 - HALO + i) < (unsigned)W) << i;
#pragma unroll
      for (int d = 0; d < DEPTH; d++) load(d);
    }
    __device__ __forceinline__ void load(int d) {
      const bool there = row + d >= row0 && row + d < row1, here_left = there && left, here_right = there && right;
#pragma unroll
      for (int i = 0; i < N; i++) {
        const bool ok = !WHOLE ? there && (inside >> i & 1) : i < HALO ? here_left : i >= HALO + TW ? here_right : there;
        word[d][i] = T::zero();
        if (ok) word[d][i] = T::load(at + d * row_bytes + i * PIXEL, high);
      }
    }
    __device__ __forceinline__ void take(float2 (&values)[N]) {
#pragma unroll
      for (int i = 0; i < N; i++) values[i] = T::floats(word[0][i]);
#pragma unroll
      for (int d = 0; d + 1 < DEPTH; d++)
#pragma unroll
        for (int i = 0; i < N; i++) word[d][i] = word[d + 1][i];
      row++, at += row_bytes;
      load(DEPTH - 1);
    }
  };
};

// Grid: (strip block, row block, channel block), the last fastest. rows: output rows of a row block.
template <int DT, int KH, int KW, int TW, int C, int WHOLE, int WIDE, int FLAGS, int MINB>
__global__ __launch_bounds__(128, MINB) void forward_direct(const void* __restrict__ x, const void* __restrict__ weight, const void* __restrict__ bias, void* __restrict__ y,
                                                            int N, int H, int W, int rows) {
  using K = Direct<DT, KH, KW, TW, C>;
  // Two rows on their way where a thread's registers leave few warps to wait with.
  constexpr int TAPS = K::TAPS, P = K::PH, IN = TW + KW - 1, DEPTH = TAPS > 15 ? 2 : 1;
  extern __shared__ __align__(128) u8 smem[];
  const int row_blocks = cdiv(H, rows), rest = blockIdx.x / K::CHANNEL_BLOCKS;
  const typename K::Strip at(blockIdx.x % K::CHANNEL_BLOCKS, rest / row_blocks, W);
  // Neighbouring channels' taps lie side by side: they are read together, and sorted out in shared memory.
  const int count = min(2 * K::LANES, C - at.c0) * TAPS;
  for (int e = threadIdx.x; e < count; e += blockDim.x)
    if constexpr (DT == F32) ((float*)smem)[e] = __ldg((const float*)weight + at.c0 * TAPS + e);
    else ((u16*)smem)[e] = __ldg((const u16*)weight + at.c0 * TAPS + e);
  __syncthreads();
  if (at.c >= C || at.n >= N) return;
  const bool high = at.c + 1 < C;
  const int row0 = rest % row_blocks * rows, row1 = min(H, row0 + rows);

  float2 w[TAPS];
#pragma unroll
  for (int i = 0; i < TAPS; i++) {
    const int e = (at.c - at.c0) * TAPS + (FLAGS & FLIP ? TAPS - 1 - i : i);
    if constexpr (DT == F32) w[i] = make_float2(((const float*)smem)[e], high ? ((const float*)smem)[e + TAPS] : 0.f);
    else w[i] = make_float2(to_float<DT>(((const u16*)smem)[e]), high ? to_float<DT>(((const u16*)smem)[e + TAPS]) : 0.f);
  }
  const float2 shift = make_float2(bias ? load_float<DT>(bias, at.c) : 0.f, bias && high ? load_float<DT>(bias, at.c + 1) : 0.f);
  float2 sums[KH][TW];
#pragma unroll
  for (int k = 0; k < KH; k++)
#pragma unroll
    for (int j = 0; j < TW; j++) sums[k][j] = shift;

  typename K::template Rows<KW / 2, DEPTH, WHOLE, WIDE> in(x, at, row0 - P, max(0, row0 - P), min(H, row1 + P), H, W);
  u8* out = (u8*)y + (((i64)at.n * H + row0) * W + at.col0) * K::PIXEL + at.c * K::SIZE;
  while (in.row < row1 + P)
#pragma unroll
    for (int s = 0; s < KH; s++) {
      const int r = in.row;
      float2 v[IN];
      in.take(v);
      // The row that begins here is the first to be added to, so that it need not be set before.
      if ((unsigned)r < (unsigned)in.row1) {
#pragma unroll
        for (int ky = 0; ky < KH; ky++)
#pragma unroll
          for (int kx = 0; kx < KW; kx++)
#pragma unroll
            for (int j = 0; j < TW; j++) {
              float2& sum = sums[(s + KH - 1 - ky) % KH][j];
              const float2 before = ky || kx ? sum : shift;
              sum.x = fmaf(v[j + kx].x, w[ky * KW + kx].x, before.x), sum.y = fmaf(v[j + kx].y, w[ky * KW + kx].y, before.y);
            }
      } else
#pragma unroll
        for (int j = 0; j < TW; j++) sums[(s + KH - 1) % KH][j] = shift;
      if (r - P >= row0 && r - P < row1) {
#pragma unroll
        for (int j = 0; j < TW; j++)
          if (WHOLE || at.col0 + j < W) Two<DT, WIDE>::template store<(FLAGS & RELU) != 0>(out + j * K::PIXEL, sums[s][j], high);
        out += in.row_bytes;
      }
    }
}

// partial: float32 [splits, C, KH, KW]; grid (channel blocks, splits). A block takes a share of the items (strip block, row block).
template <int DT, int KH, int KW, int TW, int C, int WHOLE, int WIDE, int MINB>
__global__ __launch_bounds__(128, MINB) void weight_grad_direct(const void* __restrict__ x, const void* __restrict__ dy, float* __restrict__ partial, int N, int H, int W,
                                                                int rows) {
  using K = Direct<DT, KH, KW, TW, C>;
  constexpr int TAPS = K::TAPS, P = K::PH, IN = TW + KW - 1;
  extern __shared__ __align__(128) u8 smem[];
  const int row_blocks = cdiv(H, rows), threads = blockDim.x / K::LANES;
  const i64 items = (i64)cdiv(N * cdiv(W, TW), threads) * row_blocks;
  float2 sums[TAPS];
#pragma unroll
  for (int i = 0; i < TAPS; i++) sums[i] = make_float2(0.f, 0.f);
  for (int item = (int)(items * blockIdx.y / gridDim.y), end = (int)(items * (blockIdx.y + 1) / gridDim.y); item < end; item++) {
    const typename K::Strip at(blockIdx.x, item / row_blocks, W);
    if (at.c >= C || at.n >= N) continue;
    const int row0 = item % row_blocks * rows, row1 = min(H, row0 + rows), last = min(H, row1 + P);
    typename K::template Rows<KW / 2, 1, WHOLE, WIDE> in(x, at, row0 - P, max(0, row0 - P), last, H, W);
    typename K::template Rows<0, 1, WHOLE, WIDE> out(dy, at, row0, row0, row1, H, W);
    float2 window[KH][TW];
#pragma unroll
    for (int k = 0; k < KH; k++)
#pragma unroll
      for (int j = 0; j < TW; j++) window[k][j] = make_float2(0.f, 0.f);
    while (in.row < last)
#pragma unroll
      for (int s = 0; s < KH; s++) {
        const int r = in.row;
        float2 v[IN];
        in.take(v), out.take(window[(s + KH - 1) % KH]);
        if ((unsigned)r < (unsigned)last)
#pragma unroll
          for (int j = 0; j < TW; j++)
#pragma unroll
            for (int ky = 0; ky < KH; ky++)
#pragma unroll
              for (int kx = 0; kx < KW; kx++) {
                const float2 g = window[(s + KH - 1 - ky) % KH][j];
                float2& sum = sums[ky * KW + kx];
                sum.x = fmaf(v[j + kx].x, g.x, sum.x), sum.y = fmaf(v[j + kx].y, g.y, sum.y);
              }
      }
  }
  // Threads of the same channels add their sums one after the other.
  float* total = (float*)smem;
  const int c0 = 2 * blockIdx.x * K::LANES, mine = threadIdx.x % K::LANES * 2 * TAPS;
  for (int turn = 0; turn < threads; turn++) {
    if (threadIdx.x / K::LANES == turn)
#pragma unroll
      for (int i = 0; i < TAPS; i++) {
        total[mine + i] = sums[i].x + (turn ? total[mine + i] : 0.f);
        total[mine + TAPS + i] = sums[i].y + (turn ? total[mine + TAPS + i] : 0.f);
      }
    __syncthreads();
  }
  const int count = min(2 * K::LANES, C - c0) * TAPS;
  float* sum = partial + ((i64)blockIdx.y * C + c0) * TAPS;
  for (int e = threadIdx.x; e < count; e += blockDim.x) sum[e] = total[e];
}
