// Weight gradient of small kernels on channels_last tensors, on tensor cores, with pixels as they lie in memory.
//
// An mma has 16 pixels for its reduction: rows 0 .. 7 are 8 channels of X at one tap, rows 8 .. 15 the same channels of X at the
// tap beside it, columns the 8 channels of dY, and of every 8x8 block of the result the diagonal counts. Seven of eight products
// are for nothing, but pixels need not be turned into planes.
//
// Streams. The 16 pixels are 8 of each of two streams: parts of images, rows row0 .. row1 - 1, that are walked down side by side.
// Step t of an item reads row row0 - P + t of X of both, with the halo of its columns, zeros outside the image, and row row0 + t of
// dY. It takes part in rows t - KH + 1 .. t of dY (from row0), which are kept in registers, row o in place o - 1 modulo KH: the loop
// over steps is unrolled KH times to make the places known to the compiler. Steps lo .. hi - 1 are those in which a stream has a row
// of X.
//
// A block has G groups of 8 channels and U units of 8 columns, a consumer warp each. Loader warps bring rows into a ring of slots, R
// steps in each, because a barrier costs as much as a step's products.

__device__ __forceinline__ void ldsm2t(u32 (&r)[2], u32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(a));
}

// Parts of images, two by two, in order (pair of streams, column tile).
struct Streams {
  int N, H, W, item_rows, columns, parts, tiles;
  i64 count;
  __device__ Streams(int N, int H, int W, int item_rows, int columns)
      : N(N), H(H), W(W), item_rows(item_rows), columns(columns), parts(cdiv(H, item_rows)), tiles(cdiv(W, columns)) {
    count = ((i64)N * parts + 1) / 2 * tiles;
  }
};
// Stream i has a row in steps from[i] .. to[i] - 1. row1 = row0, and no step, for a stream that does not exist.
template <int P> struct StreamPair {
  int n[2], row0[2], row1[2], from[2], to[2], col0, lo, hi;
  __device__ __forceinline__ StreamPair(const Streams& s, i64 number) {
    const i64 pair = number / s.tiles;
    col0 = (int)(number % s.tiles) * s.columns;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const i64 stream = 2 * pair + i;
      n[i] = (int)(stream / s.parts), row0[i] = (int)(stream % s.parts) * s.item_rows;
      row1[i] = n[i] < s.N ? min(s.H, row0[i] + s.item_rows) : row0[i];
      from[i] = max(0, P - row0[i]), to[i] = row1[i] > row0[i] ? min(s.H, row1[i] + P) - row0[i] + P : 0;
    }
    // The first stream exists.
    lo = to[1] ? min(from[0], from[1]) : from[0], hi = max(to[0], to[1]);
  }
  __device__ __forceinline__ bool has(int i, int t) const { return t >= from[i] && t < to[i]; }
};

// A position in a ring. Waiting with `parity` lasts until the slot is filled; with the other parity until it is empty, as it is at
// first.
struct SlotAt {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void next(int slots) {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

template <int KH, int KW, int U, int G> struct Diagonal {
  static constexpr int TAPS = KH * KW, PH = KH / 2, PW = KW / 2, WARPS = U * G, COLUMNS = 8 * U, CHANNELS = 8 * G;
  // Pixels of a row of a stream, bytes from one to the next (16 times an odd number: eight lanes never meet in a bank).
  static constexpr int PIXELS = COLUMNS + KW - 1, PITCH = (G | 1) * 16;
  static constexpr int IN = PIXELS * PITCH, OUT = COLUMNS * PITCH, BARS = 256;

  // Rows of both streams, PX pixels from column col0 - LEFT on, shared out among LOADERS warps: 16 bytes of a pixel at a time. Where
  // a thread's pieces lie in a row, in both memories, does not change.
  template <int PX, int LEFT, int LOADERS> struct Pieces {
    static constexpr int N = PX * G, STEP = 32 * LOADERS, ITER = cdiv(N, STEP);
    const u8* row[2];
    i64 row_bytes;
    int offset[ITER], first;
    u32 shared[ITER], inside;
    __device__ __forceinline__ Pieces(int W, int C, int thread) : row_bytes(2 * (i64)W * C), first(thread) {
#pragma unroll
      for (int k = 0; k < ITER; k++) {
        const int e = thread + STEP * k;
        offset[k] = 2 * (e / G * C + e % G * 8), shared[k] = e / G * PITCH + e % G * 16;
      }
    }
    __device__ __forceinline__ bool has(int k) const { return (k + 1) * STEP <= N || first + STEP * k < N; }
    __device__ __forceinline__ void begin(const void* x, const StreamPair<PH>& it, int first_row, int H, int W, int C, int c0) {
#pragma unroll
      for (int i = 0; i < 2; i++) row[i] = (const u8*)x + 2 * ((((i64)it.n[i] * H + it.row0[i] + first_row) * W + it.col0 - LEFT) * C + c0);
      inside = 0;
#pragma unroll
      for (int k = 0; k < ITER; k++) {
        const int e = first + STEP * k;
        inside |= (u32)(has(k) && (unsigned)(it.col0 - LEFT + e / G) < (unsigned)W && c0 + e % G * 8 < C) << k;
      }
    }
    // Asks for the next rows; zeros in the place of a row that is not there, and outside the image.
    __device__ __forceinline__ void load(u32 to, bool first_there, bool second_there) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u32 wanted = (i ? second_there : first_there) ? inside : 0;
#pragma unroll
        for (int k = 0; k < ITER; k++)
          if (has(k)) copy_async<16>(to + i * PX * PITCH + shared[k], row[i] + offset[k], wanted >> k & 1);
        row[i] += row_bytes;
      }
    }
  };
};

// partial: float32 [splits, C, KH, KW]; grid (channel blocks, splits). A slot of the ring has rows of x and of dy.
template <int DT, int KH, int KW, int U, int G, int R, int LOADERS>
__global__ __launch_bounds__((U * G + LOADERS) * 32, 1) void weight_grad_diagonal(
    const void* __restrict__ x, const void* __restrict__ dy, float* __restrict__ partial, int N, int C, int H, int W, int item_rows, int slots) {
  using K = Diagonal<KH, KW, U, G>;
  constexpr int WARPS = K::WARPS, PAIRS = (KW + 1) / 2, ROW = 2 * K::IN + 2 * K::OUT, SLOT = R * ROW;
  extern __shared__ __align__(128) u8 smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, c0 = blockIdx.x * K::CHANNELS;
  const u32 bars = smem_u32(smem), ring = bars + K::BARS;
  const int number = lane * (WARPS + LOADERS) + warp;
  if (number < slots) bar_init(bars + number * 16, LOADERS * 32), warps_init(bars + number * 16 + 8, WARPS);
  __syncthreads();
  const Streams streams(N, H, W, item_rows, K::COLUMNS);
  const i64 first = streams.count * blockIdx.y / gridDim.y, last = streams.count * (blockIdx.y + 1) / gridDim.y;
  SlotAt p;

  if (warp >= WARPS) {
    typename K::template Pieces<K::PIXELS, K::PW, LOADERS> xs(W, C, tid - WARPS * 32);
    typename K::template Pieces<K::COLUMNS, 0, LOADERS> ys(W, C, tid - WARPS * 32);
    for (i64 item = first; item < last; item++) {
      const StreamPair<K::PH> it(streams, item);
      xs.begin(x, it, it.lo - K::PH, H, W, C, c0);
      ys.begin(dy, it, 0, H, W, C, c0);
      for (int t = 0, steps = max(item_rows, it.hi); t < steps; p.next(slots)) {
        bar_wait(bars + p.slot * 16 + 8, p.parity ^ 1);
        for (int r = 0; r < R && t < steps; r++, t++) {
          const u32 to = ring + p.slot * SLOT + r * ROW;
          if (t >= it.lo && t < it.hi) xs.load(to, it.has(0, t), it.has(1, t));
          if (t < item_rows) ys.load(to + 2 * K::IN, it.row0[0] + t < it.row1[0], it.row0[1] + t < it.row1[1]);
        }
        bar_arrive_copies(bars + p.slot * 16);
      }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }

  const int unit = warp / G, group = warp % G, g = lane >> 2, quad = lane & 3;
  // Matrices 0 .. 3 of a fragment of x: both taps of the first stream, both of the second. The last tap of a row is alone.
  const u32 mine = ring + (lane >> 4) * K::IN + (unit * 8 + (lane & 7)) * K::PITCH + group * 16, second = (lane >> 3 & 1) * K::PITCH;
  const u32 mine_y = ring + 2 * K::IN + (lane >> 3 & 1) * K::OUT + (unit * 8 + (lane & 7)) * K::PITCH + group * 16;
  float acc[KH][PAIRS][4];
#pragma unroll
  for (int ky = 0; ky < KH; ky++)
#pragma unroll
    for (int j = 0; j < PAIRS; j++) acc[ky][j][0] = acc[ky][j][1] = acc[ky][j][2] = acc[ky][j][3] = 0.f;
  for (i64 item = first; item < last; item++) {
    const StreamPair<K::PH> it(streams, item);
    u32 window[KH][2];
#pragma unroll
    for (int k = 0; k < KH; k++) window[k][0] = window[k][1] = 0;
    const int lo = it.lo, hi = it.hi, steps = max(item_rows, hi);
    int t = 0;
    while (t < steps)
#pragma unroll
      for (int s = 0; s < KH; s++, t++) {
        if (t >= steps) break;
        const int r = t % R;
        if (r == 0) bar_wait(bars + p.slot * 16, p.parity);
        const u32 row = p.slot * SLOT + r * ROW, at = mine + row;
        u32(&newest)[2] = window[(s + KH - 1) % KH];
        newest[0] = newest[1] = 0;
        if (t < item_rows) ldsm2t(newest, mine_y + row);
        if (t >= lo && t < hi) {
          // The next fragment is on its way during the products of the one before.
          u32 a[2][4];
          ldsm4t(a[0], at + (KW > 1 ? second : 0));
#pragma unroll
          for (int j = 0; j < PAIRS; j++) {
            if (j + 1 < PAIRS) ldsm4t(a[(j + 1) % 2], at + 2 * (j + 1) * K::PITCH + (2 * j + 3 < KW ? second : 0));
#pragma unroll
            for (int ky = 0; ky < KH; ky++) mma<DT>(acc[ky][j], a[j % 2], window[(s + KH - 1 - ky) % KH]);
          }
        }
        if (r == R - 1 || t == steps - 1) warp_arrive(bars + p.slot * 16 + 8, lane), p.next(slots);
      }
  }
  // The ring is done with: the units' sums go there, and are added one after the other.
  asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
  float* sums = (float*)(smem + K::BARS);
  if (g >> 1 == quad)
#pragma unroll
    for (int ky = 0; ky < KH; ky++)
#pragma unroll
      for (int kx = 0; kx < KW; kx++) {
        const float(&block)[4] = acc[ky][kx / 2];
        sums[(warp * 8 + g) * K::TAPS + ky * KW + kx] = g & 1 ? block[2 * (kx % 2) + 1] : block[2 * (kx % 2)];
      }
  asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
  const int count = min(C - c0, K::CHANNELS) * K::TAPS;
  float* out = partial + ((i64)blockIdx.y * C + c0) * K::TAPS;
  for (int e = tid; e < count; e += WARPS * 32) {
    float total = 0.f;
    for (int u = 0; u < U; u++) total += sums[u * K::CHANNELS * K::TAPS + e];
    out[e] = total;
  }
}
