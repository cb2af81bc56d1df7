// The same convolutions on channels_last tensors, 16-bit types.
//
// A block works on 8 neighbouring channels, which are 16 bytes of every pixel. Producer warps copy pixels as they are; the 8
// consumer warps turn them into 8 planes in shared memory (ldmatrix.trans), then each convolves one plane, writes its result over
// it, and together they turn the planes back and store pixels.

// Pixels and planes of images in shared memory. A stage of pixels holds rows of 8 CB pixels of 16 bytes without gaps.
template <int CB, int PITCH, int V, int PROD> struct Pixels {
  static constexpr int ROW = CB * 8;

  static __device__ __forceinline__ void load(u32 to, const u16* x, int images, int row0, int n_rows, int left, int H, int W, int C, int c0, int tid) {
    const int lane = tid & 31, warp = tid >> 5;
    const bool many = images >= PROD;
    for (int im = many ? warp : 0; im < images; im += many ? PROD : 1) {
      const u16* g = x + ((i64)im * H + row0) * W * C + (i64)left * C + c0;
      const u32 s = to + im * n_rows * ROW * 16;
#pragma unroll 4
      for (int e = lane + (many ? 0 : warp * 32); e < n_rows * ROW * (16 / V); e += 32 * (many ? 1 : PROD)) {
        const int part = e % (16 / V), pixel = e / (16 / V), r = pixel / ROW, col = pixel % ROW;
        const bool ok = (unsigned)(left + col) < (unsigned)W && c0 + part * (V / 2) < C;
        const u16* from = ok ? g + (i64)(r * W + col) * C + part * (V / 2) : x;
        if constexpr (V > 2) copy_async<V>(s + e * V, from, ok);
        else sts16(s + e * 2, ok ? __ldg(from) : (u16)0);
      }
    }
  }
  // Address of 8 pixels in the plane of channel 0.
  static __device__ __forceinline__ u32 block(u32 planes, int b) { return planes + b / CB * PITCH + b % CB * 16; }

  // Pixels of one image to 8 planes; warp of 8.
  static __device__ __forceinline__ void to_planes(u32 planes, u32 pixels, int n_rows, int plane, int warp, int lane) {
    const int blocks = n_rows * CB;
    for (int b = warp * 4; b < blocks; b += 32) {
      u32 r[4];
      // Past the last block: any address of the stage, its values are dropped.
      ldsm4t(r, pixels + (b * 8 + lane < blocks * 8 ? b * 8 + lane : 0) * 16);
      const u32 to = (lane >> 2) * plane + (lane & 3) * 4;
#pragma unroll
      for (int k = 0; k < 4; k++)
        if (b + k < blocks) sts32(block(planes, b + k) + to, r[k]);
    }
  }
  // 8 planes of one image to pixels in global memory.
  static __device__ __forceinline__ void from_planes(u16* y, u32 planes, int n_rows, int cols, int W, int C, int c0, int plane, int warp, int lane) {
    const int blocks = n_rows * CB, channel = c0 + 2 * (lane & 3);
    const bool wide = (C & 1) == 0;
    for (int b = warp * 4; b < blocks; b += 32) {
      const int mine = b + (lane >> 3);
      u32 r[4];
      ldsm4t(r, block(planes, mine < blocks ? mine : 0) + (lane & 7) * plane);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int row = (b + k) / CB, col = (b + k) % CB * 8 + (lane >> 2);
        u16* to = y + (i64)(row * W + col) * C + channel;
        if (row < n_rows && col < cols && channel < C) {
          if (wide) *(u32*)to = r[k];
          else {
            to[0] = (u16)r[k];
            if (channel + 1 < C) to[1] = (u16)(r[k] >> 16);
          }
        }
      }
    }
  }
};

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// Items are (group of images, column tile, row tile, channel block); a block takes every step-th or a contiguous run, so that it
// changes its channels, and with them its 8 tables, as rarely as can be.
struct ChannelsLastItem { int cb, col0, row0, rows, n0; };
__device__ __forceinline__ ChannelsLastItem channels_last_item(int item, bool channels_fastest, int n_blocks, int n_groups, int n_rows, int n_cols, int item_rows, int item_images, int columns, int H) {
  ChannelsLastItem it;
  const int rest = n_groups * n_rows * n_cols;
  it.cb = channels_fastest ? item % n_blocks : item / rest;
  item = channels_fastest ? item / n_blocks : item % rest;
  it.row0 = item % n_rows * item_rows; item /= n_rows;
  it.col0 = item % n_cols * columns; item /= n_cols;
  it.n0 = item * item_images;
  it.rows = min(item_rows, H - it.row0);
  return it;
}

template <int DT, int KH, int KW, int CBI, int CBO, int OFF, int NI, int MT, int V, int PROD, int STAGES, int MINB>
__global__ __launch_bounds__((8 + PROD) * 32, MINB) void forward_nhwc(
    const void* __restrict__ x, const void* __restrict__ weight, const void* __restrict__ bias, void* __restrict__ y, int N, int C, int H, int W,
    int item_images, int item_rows, int stride, int plane, int flags) {
  using K = Forward<DT, 1, KH, KW, CBI, CBO, OFF, NI, MT, V, 1, 8, PROD, STAGES>;
  using T = typename K::T;
  using X = Pixels<CBI, K::PITCH, V, PROD>;
  extern __shared__ __align__(128) u8 smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int stage_bytes = item_images * min(H, item_rows + 2 * K::P) * X::ROW * 16;
  const u32 bars = smem_u32(smem), zero = bars + K::HEAD, tables = zero + K::ZERO, planes = tables + 8 * K::TABLE, stages = planes + cdiv(8 * plane, 128) * 128;
  if (tid < K::ZERO / 4) ((u32*)(smem + K::HEAD))[tid] = 0;
  if (tid == 0)
    for (int s = 0; s < STAGES; s++) bar_init(bars + s * 16, 2 * PROD * 32), bar_init(bars + s * 16 + 8, 8);
  __syncthreads();

  const int n_groups = cdiv(N, item_images), n_rows = cdiv(H, item_rows), n_cols = cdiv(W, CBO * 8), n_blocks = cdiv(C, 8);
  const i64 items = (i64)n_groups * n_rows * n_cols * n_blocks;
  const bool strided = gridDim.x % n_blocks == 0;
  const int first = strided ? blockIdx.x : (int)(items * blockIdx.x / gridDim.x), step = strided ? gridDim.x : 1;
  const int last = strided ? (int)items : (int)(items * (blockIdx.x + 1) / gridDim.x);

  int built = -1;
  for (int item = first, s = 0, phase = 0; item < last; item += step) {
    const ChannelsLastItem it = channels_last_item(item, strided, n_blocks, n_groups, n_rows, n_cols, item_rows, item_images, CBO * 8, H);
    const int x0 = max(0, it.row0 - K::P), x_rows = min(H, it.row0 + it.rows + K::P) - x0, images = min(item_images, N - it.n0), c0 = it.cb * 8;
    const u32 full = bars + s * 16, pixels = stages + s * stage_bytes;
    if (warp >= 8) {
      bar_wait(full + 8, phase ^ 1);
      X::load(pixels, (const u16*)x + (i64)it.n0 * H * W * C, images, x0, x_rows, it.col0 - 8 * OFF, H, W, C, c0, tid - 256);
      bar_arrive_copies(full);
      bar_arrive(full);
    } else {
      const int c = c0 + warp;
      if (built != it.cb && c < C)
        T::template build<DT, 1>(tables + warp * K::TABLE, (const u16*)weight + (i64)c * (KH * KW), flags & FLIP, lane, 32);
      built = it.cb;
      bar_wait(full, phase);
      for (int im = 0; im < images; im++) X::to_planes(planes + im * stride, pixels + im * x_rows * X::ROW * 16, x_rows, plane, warp, lane);
      consumers_sync();
      if (lane == 0) bar_arrive(full + 8);

      const int img = (lane & 15) % NI, off = (lane & 15) / NI + (lane >> 4);
      const int e0 = max(0, K::P - it.row0 - K::GR) & ~1, e1 = min(K::KHP + K::TS * (MT - 1), H - it.row0 + K::P);
      const float shift = bias && c < C ? load_float<DT>(bias, c) : 0.f, floor = flags & RELU ? 0.f : -__int_as_float(0x7f800000);
      const u32 mine = planes + warp * plane, table = tables + warp * K::TABLE + T::lane_offset(lane);
#pragma unroll 1
      for (int g = 0; g < images; g += NI) {
        typename K::Acc acc;
#pragma unroll
        for (int t = 0; t < MT; t++)
#pragma unroll
          for (int j = 0; j < CBO; j++) acc[t][j][0] = acc[t][j][1] = acc[t][j][2] = acc[t][j][3] = 0.f;
        const u32 xs = mine + (g + img) * stride;
        const int row = it.row0 + off + e0 - K::P - x0;
        if constexpr (K::WINDOW) K::accumulate(acc, xs, row, x_rows, zero, table, e0, e1);
        else K::accumulate_apart(acc, xs, row, x_rows, zero, table, e0, e1);
        __syncwarp();
#pragma unroll
        for (int t = 0; t < MT; t++)
#pragma unroll
          for (int j = 0; j < CBO; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const int m = (lane >> 2) + 8 * half, h = m / NI + K::TS * t;
              if (h < it.rows)
                sts32(mine + (g + m % NI) * stride + h * K::PITCH + j * 16 + (lane & 3) * 4,
                      pack2<DT>(max_nan(acc[t][j][2 * half] + shift, floor), max_nan(acc[t][j][2 * half + 1] + shift, floor)));
            }
      }
      consumers_sync();
      using Y = Pixels<CBO, K::PITCH, V, PROD>;
      for (int im = 0; im < images; im++)
        Y::from_planes((u16*)y + (((i64)(it.n0 + im) * H + it.row0) * W + it.col0) * C, planes + im * stride, it.rows, W - it.col0, W, C, c0, plane, warp, lane);
      consumers_sync();
    }
    if (++s == STAGES) s = 0, phase ^= 1;
  }
  if (warp >= 8) asm volatile("cp.async.wait_all;" ::: "memory");
}

// partial: float32 [splits, C, KH, KW]; grid (channel blocks, splits, groups of R kernel row pairs).
template <int DT, int KH, int KW, int CBI, int CBO, int OFF, int NI, int R, int HB, int V, int PROD, int STAGES, int MINB>
__global__ __launch_bounds__((8 + PROD) * 32, MINB) void weight_grad_nhwc(
    const void* __restrict__ x, const void* __restrict__ dy, float* __restrict__ partial, int N, int C, int H, int W, int item_images, int item_rows,
    int xstride, int ystride, int xplane, int yplane) {
  using K = WeightGrad<DT, 1, KH, KW, CBI, CBO, OFF, NI, R, HB, V, 8, PROD, STAGES>;
  using X = Pixels<CBI, K::XPITCH, V, PROD>;
  using Y = Pixels<CBO, K::YPITCH, V, PROD>;
  extern __shared__ __align__(128) u8 smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, c0 = blockIdx.x * 8, pair = blockIdx.z * R;
  // Rows of x that these kernel rows reach from an item's rows: from row0 + above to row0 + rows + below.
  const int above = 2 * pair - K::P, below = min(KH, 2 * (pair + R)) - 1 - K::P;
  const int x_bytes = item_images * min(H, item_rows + below - above) * X::ROW * 16, stage_bytes = x_bytes + item_images * item_rows * Y::ROW * 16;
  const u32 bars = smem_u32(smem), zero = bars + K::HEAD, xplanes = zero + K::ZERO, yplanes = xplanes + cdiv(8 * xplane, 128) * 128;
  const u32 stages = yplanes + cdiv(8 * yplane + 128, 128) * 128;
  for (int e = tid; e < K::ZERO / 4; e += (8 + PROD) * 32) ((u32*)(smem + K::HEAD))[e] = 0;
  if (tid == 0)
    for (int s = 0; s < STAGES; s++) bar_init(bars + s * 16, 2 * PROD * 32), bar_init(bars + s * 16 + 8, 8);
  __syncthreads();

  const int n_groups = cdiv(N, item_images), n_rows = cdiv(H, item_rows), n_cols = cdiv(W, CBO * 8);
  const i64 items = (i64)n_groups * n_rows * n_cols;
  const int first = (int)(items * blockIdx.y / gridDim.y), last = (int)(items * (blockIdx.y + 1) / gridDim.y);
  typename K::Acc acc;
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int d = 0; d < K::ND; d++) acc[r][d][0] = acc[r][d][1] = acc[r][d][2] = acc[r][d][3] = 0.f;

  const int kx = (lane & 7) + 8 * (lane >> 4), ky = lane & 15;
  for (int item = first, s = 0, phase = 0; item < last; item++) {
    const int n0 = item % n_groups * item_images, row0 = item / n_groups % n_rows * item_rows, col0 = item / n_groups / n_rows * CBO * 8;
    const int rows = min(item_rows, H - row0), x0 = min(H, max(0, row0 + above)), x_rows = max(0, min(H, row0 + rows + below) - x0);
    const int images = min(item_images, N - n0), groups = cdiv(images, NI);
    const u32 full = bars + s * 16, xpixels = stages + s * stage_bytes, ypixels = xpixels + x_bytes;
    if (warp >= 8) {
      bar_wait(full + 8, phase ^ 1);
      X::load(xpixels, (const u16*)x + (i64)n0 * H * W * C, images, x0, x_rows, col0 - 8 * OFF, H, W, C, c0, tid - 256);
      Y::load(ypixels, (const u16*)dy + (i64)n0 * H * W * C, images, row0, rows, col0, H, W, C, c0, tid - 256);
      bar_arrive_copies(full);
      bar_arrive(full);
    } else {
      bar_wait(full, phase);
      for (int im = 0; im < images; im++) {
        X::to_planes(xplanes + im * xstride, xpixels + im * x_rows * X::ROW * 16, x_rows, xplane, warp, lane);
        Y::to_planes(yplanes + im * ystride, ypixels + im * rows * Y::ROW * 16, rows, yplane, warp, lane);
      }
      const u32 xs = xplanes + warp * xplane, ys = yplanes + warp * yplane;
      for (int im = images; im < groups * NI; im++) {
        for (int e = lane; e < x_rows * (K::XPITCH / 4); e += 32) sts32(xs + im * xstride + e * 4, 0);
        for (int e = lane; e < rows * (K::YPITCH / 4); e += 32) sts32(ys + im * ystride + e * 4, 0);
      }
      consumers_sync();
      if (lane == 0) bar_arrive(full + 8);
#pragma unroll 1
      for (int g = 0; g < groups; g++)
#pragma unroll 1
        for (int set = 0; set < cdiv(rows, K::SET_ROWS) * K::SET_TASKS; set++) {
          const int h = set / K::SET_TASKS * K::SET_ROWS + set % K::SET_TASKS, top = row0 + h + above;
          const int q_lo = top + K::GR >= 0 ? 0 : (-top - K::GR + 1) / 2, q_hi = (H - 1 - top) >> 1;
          K::accumulate(acc, xs + (g * NI + kx % NI) * xstride, top - x0 + kx / NI + ((lane >> 3) & 1), x_rows, ys + (g * NI + ky % NI) * ystride, h + ky / NI,
                        rows, zero, q_lo, q_hi, lane);
        }
      consumers_sync();
    }
    if (++s == STAGES) s = 0, phase ^= 1;
  }
  if (warp >= 8) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }
  // The planes are done with: every warp sums its diagonals in a corner of its own.
  float* buffer = (float*)(smem + K::HEAD + K::ZERO) + warp * (K::ND * 64 + R * 2 * KW + (R * 2 * KW & 1));
  float* taps = buffer + K::ND * 64;
#pragma unroll
  for (int r = 0; r < R; r++) {
    K::template reduce<0>(acc[r], buffer, taps + 2 * r * KW, lane);
    K::template reduce<1>(acc[r], buffer, taps + (2 * r + 1) * KW, lane);
  }
  const int c = c0 + warp, count = min(R * 2, KH - 2 * pair) * KW;
  float* out = partial + ((i64)blockIdx.y * C + c) * (KH * KW) + 2 * pair * KW;
  if (c < C)
    for (int e = lane; e < count; e += 32) out[e] = taps[e];
}
