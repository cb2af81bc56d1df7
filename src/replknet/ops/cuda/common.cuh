// Shared pieces of the depthwise convolution kernels: element types, asynchronous copies, barriers, tensor-core products,
// and the table of Toeplitz fragments. Compiled by NVRTC; no header is included.
//
// Vocabulary. A plane is the image of one channel. A column block is 8 columns. delta = (input column block) - (output
// column block): an 8x8 block of the Toeplitz matrix depends on delta alone. A lane is one of the 16 rows of an mma tile:
// it stands for one image and one row offset, so that all 16 lanes use the same kernel row at the same time.
// A kernel row pair (ky, ky + 1), ky even, fills the 16 deep reduction of one m16n8k16: 8 columns of row r with ky, and the
// same 8 columns of row r + 1 with ky + 1.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

enum { F16 = 0, BF16 = 1, F32 = 2 };
// Flags of a forward kernel: turn the weight by 180 degrees; ReLU.
enum { FLIP = 1, RELU = 2 };

__host__ __device__ constexpr int cdiv(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int cmax(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int cmin(int a, int b) { return a < b ? a : b; }

// ---- conversions. float32 is carried as a sum of NP bfloat16 planes: 2 planes hold 16 bits, 3 planes all 24.
template <int DT> __device__ __forceinline__ u32 pack2(float lo, float hi) {
  u32 r;
  if constexpr (DT == F16) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
__device__ __forceinline__ float bf16_low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float bf16_high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
template <int DT> __device__ __forceinline__ float to_float(u16 v) {
  float r;
  if constexpr (DT == F16) asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  else r = __uint_as_float((u32)v << 16);
  return r;
}
// Next bfloat16 plane of two floats, which lose what it holds. Infinities and NaN stay in the first plane alone.
__device__ __forceinline__ u32 peel(float& lo, float& hi) {
  u32 r = pack2<BF16>(lo, hi);
  float a = lo - bf16_low(r), b = hi - bf16_high(r);
  lo = (a - a == 0.f) ? a : 0.f;
  hi = (b - b == 0.f) ? b : 0.f;
  return r;
}
// Maximum that keeps NaN.
__device__ __forceinline__ float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
template <int DT> __device__ __forceinline__ float load_float(const void* p, i64 i) {
  if constexpr (DT == F32) return __ldg((const float*)p + i);
  else return to_float<DT>(__ldg((const u16*)p + i));
}

// An element of BYTES bytes, or 0. Volatile reads stay in their order, and before the next __syncwarp; others the compiler puts
// off until they are used.
template <int BYTES> __device__ __forceinline__ u32 load_volatile(const void* p, bool ok) {
  u32 v;
  if constexpr (BYTES == 4) asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.b32 %0, 0; @p ld.global.b32 %0, [%1]; }" : "=r"(v) : "l"(p), "r"((u32)ok));
  else asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.b32 %0, 0; @p ld.global.u16 %0, [%1]; }" : "=r"(v) : "l"(p), "r"((u32)ok));
  return v;
}

// ---- shared memory
__device__ __forceinline__ u32 smem_u32(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void sts16(u32 a, u32 v) { asm volatile("st.shared.b16 [%0], %1;" ::"r"(a), "h"((u16)v) : "memory"); }
__device__ __forceinline__ void sts32(u32 a, u32 v) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(a), "r"(v) : "memory"); }
__device__ __forceinline__ void sts64(u32 a, u32 v, u32 w) { asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(a), "r"(v), "r"(w) : "memory"); }
__device__ __forceinline__ void sts128(u32 a, const u32 (&v)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}
__device__ __forceinline__ u32 lds32(u32 a) {
  u32 r;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(a));
  return r;
}
__device__ __forceinline__ void lds128(u32 (&r)[4], u32 a) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a));
}
__device__ __forceinline__ void lds64(u32 (&r)[2], u32 a) { asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(a)); }
__device__ __forceinline__ void ldsm4(u32 (&r)[4], u32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a));
}
__device__ __forceinline__ void ldsm4t(u32 (&r)[4], u32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a));
}
// Copies V bytes, or writes V zero bytes where ok is false.
template <int V> __device__ __forceinline__ void copy_async(u32 s, const void* g, bool ok) {
  int n = ok ? V : 0;
  if constexpr (V == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(s), "l"(g), "r"(n) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(s), "l"(g), "n"(V), "r"(n) : "memory");
}

// Two neighbouring elements on their way from global to shared memory, where float32 becomes bfloat16 planes, a word a plane.
template <int DT> struct Pair {
  u16 lo, hi;
  static __device__ __forceinline__ Pair load(const void* p, i64 i, i64 j, bool has_lo, bool has_hi) {
    return {has_lo ? __ldg((const u16*)p + i) : (u16)0, has_hi ? __ldg((const u16*)p + j) : (u16)0};
  }
  static __device__ __forceinline__ Pair load(const u8* lo, const u8* hi, bool ok) { return {ok ? __ldg((const u16*)lo) : (u16)0, ok ? __ldg((const u16*)hi) : (u16)0}; }
  __device__ __forceinline__ u32 next_plane() const { return (u32)lo | (u32)hi << 16; }
};
template <> struct Pair<F32> {
  float lo, hi;
  static __device__ __forceinline__ Pair load(const void* p, i64 i, i64 j, bool has_lo, bool has_hi) {
    return {has_lo ? __ldg((const float*)p + i) : 0.f, has_hi ? __ldg((const float*)p + j) : 0.f};
  }
  static __device__ __forceinline__ Pair load(const u8* lo, const u8* hi, bool ok) { return {ok ? __ldg((const float*)lo) : 0.f, ok ? __ldg((const float*)hi) : 0.f}; }
  __device__ __forceinline__ u32 next_plane() { return peel(lo, hi); }
};

// ---- barriers
__device__ __forceinline__ void bar_init(u32 b, int n) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(b), "r"(n) : "memory"); }
__device__ __forceinline__ void bar_arrive(u32 b) { asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(b) : "memory"); }
// A barrier that whole warps arrive at. One lane arrives for its warp, after the warp has met; ARRIVALS = 32 lets every
// lane arrive, for tools that follow accesses lane by lane.
#ifndef ARRIVALS
#define ARRIVALS 1
#endif
__device__ __forceinline__ void warps_init(u32 b, int warps) { bar_init(b, warps * ARRIVALS); }
__device__ __forceinline__ void warp_arrive(u32 b, int lane) {
  __syncwarp();
  if (lane < ARRIVALS) bar_arrive(b);
}
__device__ __forceinline__ void bar_arrive_copies(u32 b) { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(b) : "memory"); }
__device__ __forceinline__ void bar_wait(u32 b, int parity) {
  u32 done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }" : "=r"(done) : "r"(b), "r"(parity) : "memory");
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }" : "=r"(done) : "r"(b), "r"(parity) : "memory");
#endif
  } while (!done);
}

// ---- registers: the warps of a group of four leave all but N of their registers to others, or take as many as N (sm_90a and newer)
template <int N> __device__ __forceinline__ void leave_registers() {
#if __CUDA_ARCH__ >= 900
  if constexpr (N > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N> __device__ __forceinline__ void take_registers() {
#if __CUDA_ARCH__ >= 900
  if constexpr (N > 0) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// ---- clusters: blocks that read and write each other's shared memory (sm_90 and newer; a cluster of one block is none)
#if __CUDA_ARCH__ >= 900
#define IN_CLUSTERS_OF(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define IN_CLUSTERS_OF(blocks)
#endif
// From an address in shared memory to the same place in another block of the cluster.
__device__ __forceinline__ u32 peer(u32 a, int rank) {
  u32 r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(rank));
  return r;
}
// 16 bytes for another block, on their way when this returns; when they are there, a barrier of that block has so much less to expect.
__device__ __forceinline__ void send128(u32 a, const u32 (&v)[4], u32 b) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(a), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(b) : "memory");
}
// 16 bytes of another block.
__device__ __forceinline__ void fetch128(u32 (&r)[4], u32 a) {
  asm volatile("ld.shared::cluster.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a));
}
// One thread lets another block know of all that its own block has written, as far as it knows of it; and waits for such a message.
__device__ __forceinline__ void tell(u32 b) { asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(b) : "memory"); }
__device__ __forceinline__ void hear(u32 b, int parity) {
  u32 done;
  do asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }" : "=r"(done) : "r"(b), "r"(parity) : "memory");
  while (!done);
}
// A warp arrives at the barrier b of every block of its cluster, and lets those of the others expect `sent` bytes from it. What it
// has read and written in its own block is done by then; a release at the scope of the cluster, which costs a fence of the whole
// GPU, is not needed: what goes to others is counted by their barriers.
template <int CLUSTER> __device__ __forceinline__ void cluster_arrive(u32 b, int sent, int rank, int lane) {
  if constexpr (CLUSTER == 1) warp_arrive(b, lane);
  else {
    __syncwarp();
    if (lane < ARRIVALS) bar_arrive(b);
#pragma unroll
    for (int to = 0; to < CLUSTER; to++)
      if (to != rank && lane < ARRIVALS)
        asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(peer(b, to)), "r"(lane == 0 ? sent : 0) : "memory");
  }
}
// All threads of a cluster meet, in two steps.
template <int CLUSTER> __device__ __forceinline__ void cluster_leave() {
  if constexpr (CLUSTER > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
template <int CLUSTER> __device__ __forceinline__ void cluster_wait() {
  if constexpr (CLUSTER > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
// The same in one, after which each block sees the barriers that the others have made.
template <int CLUSTER> __device__ __forceinline__ void cluster_sync() {
  if constexpr (CLUSTER == 1) __syncthreads();
  else {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    cluster_leave<CLUSTER>(), cluster_wait<CLUSTER>();
  }
}

// ---- tensor cores: d += a b, float32 accumulators
template <int DT> __device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  if constexpr (DT == F16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- bands
// Deltas whose 8x8 Toeplitz block is not zero: |8 delta| - 7 <= P.
template <int K> struct Band {
  static constexpr int P = K / 2, HI = (P + 7) / 8, LO = -HI, ND = 2 * HI + 1;
};

// Table of Toeplitz fragments of one channel, blocks LO .. HI. Thread (g, q) = (lane / 4, lane % 4) needs for block delta the taps
// t = 8 delta + 2 q - g + P and t + 1, as one word, of kernel rows ky and ky + 1. Words of even and odd t lie in two copies,
// so that a word is always aligned; the words of ky and ky + 1 lie side by side. The copies lie 64 bytes apart modulo the banks.
template <int KH, int KW, int LO, int HI> struct Table {
  static constexpr int P = KW / 2, ND = HI - LO + 1, KQ = (KH + 1) / 2;
  static constexpr int TMIN = 8 * LO - 7 + P, TMAX = 8 * HI + 6 + P;
  static constexpr int OFFSET = TMIN < 0 ? ((1 - TMIN) / 2) * 2 : -(TMIN / 2) * 2;
  static constexpr int NU = (TMAX + OFFSET) / 2 + 1;
  static constexpr int COPY = cdiv(KQ * NU * 8, 128) * 128 + 64;
  static constexpr int PLANE = 2 * COPY;

  // Written by THREADS threads. weight points at the channel's KH x KW taps; flip turns them by 180 degrees.
  template <int DT, int NP, int THREADS> static __device__ __forceinline__ void build(u32 table, const u8* weight, bool flip, int tid) {
    if (flip) fill<DT, NP, THREADS, true>(table, weight, tid);
    else fill<DT, NP, THREADS, false>(table, weight, tid);
  }
  template <int DT, int NP, int THREADS, bool TURNED> static __device__ __forceinline__ void fill(u32 table, const u8* weight, int tid) {
    using W = Words<DT, NP, THREADS>;
#pragma unroll 1
    for (int t = tid % W::LANES; t < 2 * NU; t += W::LANES) {
      W words(table, weight, TURNED, t, tid);
#pragma unroll
      for (int q0 = 0; q0 < W::COUNT; q0 += W::U) words.template load<TURNED>(q0), words.store(q0);
    }
  }
  // A thread has the words of one t, and of t + LANES and so on, of every LINES-th row pair, U of them at once. Where t or t + 1
  // lies outside the kernel row, the nearest tap is read and masked; a thread without a row pair reads the last, and writes nothing.
  template <int DT, int NP, int THREADS> struct Words {
    static constexpr int LANES = 2 * NU > 16 ? 32 : 2 * NU > 8 ? 16 : 8, LINES = THREADS / LANES, COUNT = cdiv(KQ, LINES), U = cmin(COUNT, 8);
    static constexpr int SIZE = DT == F32 ? 4 : 2;
    // All words of a thread are read at once.
    static constexpr bool ONCE = 2 * NU <= LANES && COUNT == U;
    const u8 *left, *right;
    u32 to, mask;
    int line;
    Pair<DT> even[U], odd[U];

    __device__ __forceinline__ Words(u32 table, const u8* weight, bool turned, int t, int tid) {
      const int kx = t - OFFSET, lo = min(max(kx, 0), KW - 1), hi = min(max(kx + 1, 0), KW - 1);
      line = tid / LANES;
      mask = ((unsigned)kx < (unsigned)KW ? 0xffffu : 0) | ((unsigned)(kx + 1) < (unsigned)KW ? 0xffff0000u : 0);
      left = weight + (turned ? KH * KW - 1 - lo : lo) * SIZE, right = weight + (turned ? KH * KW - 1 - hi : hi) * SIZE;
      // Hides the pointers' origin: every read below is then at a constant from one of them.
      asm("" : "+l"(left), "+l"(right));
      to = table + (t & 1) * COPY + (t >> 1) * 8;
    }
    template <bool TURNED> __device__ __forceinline__ void load(int q0) {
      constexpr int ROW = TURNED ? -KW * SIZE : KW * SIZE;
#pragma unroll
      for (int k = 0; k < U; k++) {
        const int last = (q0 + k) * LINES + LINES - 1, own = (q0 + k) * LINES + line, q = last < KQ ? own : min(own, KQ - 1);
        const u8 *a = left + q * (2 * ROW), *b = right + q * (2 * ROW);
        even[k] = Pair<DT>::load(a, b, true), odd[k] = Pair<DT>::load(a + ROW, b + ROW, 2 * last + 1 < KH || 2 * q + 1 < KH);
      }
    }
    __device__ __forceinline__ void store(int q0) {
#pragma unroll
      for (int k = 0; k < U; k++) {
        const int q = (q0 + k) * LINES + line;
        if ((q0 + k) * LINES + LINES <= KQ || q < KQ)
#pragma unroll
          for (int p = 0; p < NP; p++) {
            const u32 word = even[k].next_plane() & mask;
            sts64(to + q * (NU * 8) + p * PLANE, word, odd[k].next_plane() & mask);
          }
      }
    }
  };
  // This lane's offset of block LO of row pair 0; block d lies 32 (d - LO) bytes on, row pair q NU * 8 q bytes on.
  static __device__ __forceinline__ u32 lane_offset(int lane) {
    int t = 8 * LO + 2 * (lane & 3) - (lane >> 2) + P + OFFSET;
    return (t & 1) * COPY + (t >> 1) * 8;
  }
};

// Products of bfloat16 planes that make up a float32 product: those whose plane numbers add up to at most NP - 1.
template <int NP> struct Terms {
  static constexpr int N = NP * (NP + 1) / 2;
  // Smallest terms first.
  static __device__ __forceinline__ int x(int i) { return NP == 1 ? 0 : NP == 2 ? (0x001 >> (4 * i)) & 15 : (0x001012 >> (4 * i)) & 15; }
  static __device__ __forceinline__ int w(int i) { return NP == 1 ? 0 : NP == 2 ? (0x010 >> (4 * i)) & 15 : (0x010210 >> (4 * i)) & 15; }
};

// ---- loading
// Brings rows of images into shared memory, PITCH bytes apart, columns left .. left + 8 CB - 1, zeros outside the image. PROD
// warps share the work: a warp takes blocks of rows of one image. Where an element of a block comes from and goes to is computed
// once an item. V bytes are copied at once; V = 2 and float32 go through registers two columns at a time.
template <int DT, int NP, int CB, int PITCH, int V, int PROD> struct Loader {
  static constexpr bool ASYNC = V >= 4 && DT != F32;
  static constexpr int BLOCK = ASYNC || CB > 1 ? 16 : 8, STEP = ASYNC ? V / 2 : 2, CH = CB * 8 / STEP;
  static constexpr int ITER = cdiv(BLOCK * CH, 32), BATCH = ASYNC ? 1 : cmax(1, 8 / ITER);

  // base: element offset of the first image; step: elements between images; stride, plane: bytes between images and planes.
  static __device__ __forceinline__ void rows(u32 to, const void* x, i64 base, int images, int row0, int n_rows, int left, i64 step, int W, int stride, int plane, int tid) {
    const int lane = tid & 31, warp = tid >> 5;
    const int image_step = images >= PROD ? PROD : 1, row_step = images >= PROD ? 1 : PROD;
    base += (i64)row0 * W + left;
    for (int row = (images >= PROD ? 0 : warp) * BLOCK; row < n_rows; row += row_step * BLOCK)
      if constexpr (ASYNC) copies(to + row * PITCH, (const u16*)x + base + (i64)row * W, min(BLOCK, n_rows - row), left, W, images >= PROD ? warp : 0, images, image_step, step, stride, lane);
      else pairs(to + row * PITCH, x, base + (i64)row * W, min(BLOCK, n_rows - row), left, W, images >= PROD ? warp : 0, images, image_step, step, stride, plane, lane);
  }
  static __device__ __forceinline__ void copies(u32 to, const u16* x, int n, int left, int W, int im, int images, int image_step, i64 step, int stride, int lane) {
    int from[ITER];
    u32 at[ITER];
#pragma unroll
    for (int k = 0; k < ITER; k++) {
      const int e = lane + 32 * k, r = e / CH, col = (e % CH) * STEP;
      from[k] = (unsigned)(left + col) < (unsigned)W ? r * W + col : -1 << 30;
      at[k] = r * PITCH + col * 2;
    }
    for (; im < images; im += image_step) {
      const u16* g = x + im * step;
      const u32 s = to + im * stride;
#pragma unroll
      for (int k = 0; k < ITER; k++)
        if ((lane + 32 * k) / CH < n) copy_async<V>(s + at[k], from[k] == -1 << 30 ? x - left : g + from[k], from[k] != -1 << 30);
    }
  }
  static __device__ __forceinline__ void pairs(u32 to, const void* x, i64 base, int n, int left, int W, int im, int images, int image_step, i64 step, int stride, int plane, int lane) {
    for (; im < images; im += image_step * BATCH)
#pragma unroll 1
      for (int k0 = 0; k0 < ITER; k0 += 4) {
        constexpr int U = cmin(4, ITER);
        Pair<DT> v[BATCH][U];
#pragma unroll
        for (int b = 0; b < BATCH; b++)
#pragma unroll
          for (int k = 0; k < U; k++) {
            const int e = lane + 32 * (k0 + k), r = e / CH, col = (e % CH) * 2, image = im + b * image_step;
            const bool in = r < n && image < images;
            const i64 at = base + image * step + r * W + col;
            v[b][k] = Pair<DT>::load(x, at, at + 1, in && (unsigned)(left + col) < (unsigned)W, in && (unsigned)(left + col + 1) < (unsigned)W);
          }
#pragma unroll
        for (int b = 0; b < BATCH; b++)
#pragma unroll
          for (int k = 0; k < U; k++) {
            const int e = lane + 32 * (k0 + k), r = e / CH, image = im + b * image_step;
            if (r < n && image < images)
#pragma unroll
              for (int p = 0; p < NP; p++) sts32(to + image * stride + r * PITCH + (e % CH) * 4 + p * plane, v[b][k].next_plane());
          }
      }
  }
  // Rows of W <= 8 CB columns of 16-bit elements, n_rows of every image, that follow each other in x: an image's are a span, read
  // in aligned words wherever it begins. The columns past W stay as they are. A lane has the same word of AT_ONCE images, all on
  // their way before the first is stored, and the ends of one image, where a word is not all the span's.
  template <int AT_ONCE> static __device__ __forceinline__ void spans(u32 to, const u16* x, int images, int n_rows, i64 step, int W, int stride, int tid) {
    static_assert(PROD % 2 == 0);
    const int lane = tid & 31, warp = tid >> 5, elements = n_rows * W;
    // A warp takes every second image at most, so that all of its spans begin with a word, or all within one.
    const bool many = images >= PROD;
    const int image_step = many ? PROD : 2;
    for (int start = many ? warp : 0; start < (many ? warp + 1 : min(images, 2)); start++)
      for (int first = many ? 0 : warp * 64; first <= elements; first += many ? 64 : PROD * 64) {
        const int odd = (u32)(i64)(x + start * step) >> 1 & 1, e = first + 2 * lane - odd;
        const bool whole = e >= 0 && e + 1 < elements;
        const u16* from = x + start * step + e;
        u32 lo = to + start * stride + e / W * PITCH + e % W * 2, hi = to + start * stride + (e + 1) / W * PITCH + (e + 1) % W * 2;
        for (int im = start; im < images; im += AT_ONCE * image_step) {
          u32 word[AT_ONCE];
#pragma unroll
          for (int b = 0; b < AT_ONCE; b++, from += image_step * step) word[b] = load_volatile<4>(from, whole && im + b * image_step < images);
          const int mine = im + lane * image_step;
          const bool ends = first == 0 && lane < AT_ONCE && mine < images, has_head = ends && odd, has_tail = ends && (elements - odd & 1);
          const u32 head = load_volatile<2>(x + mine * step, has_head), tail = load_volatile<2>(x + mine * step + elements - 1, has_tail);
          __syncwarp();
#pragma unroll
          for (int b = 0; b < AT_ONCE; b++, lo += image_step * stride, hi += image_step * stride)
            if (whole && im + b * image_step < images) sts16(lo, word[b]), sts16(hi, word[b] >> 16);
          if (has_head) sts16(to + mine * stride, head);
          if (has_tail) sts16(to + mine * stride + (n_rows - 1) * PITCH + (W - 1) * 2, tail);
        }
      }
  }
  // Zeros instead of images first .. last - 1.
  static __device__ __forceinline__ void clear(u32 to, int first, int last, int n_rows, int stride, int plane, int tid) {
    const int words = n_rows * (PITCH / 4);
    for (int im = first; im < last; im++)
      for (int e = tid; e < words; e += PROD * 32)
#pragma unroll
        for (int p = 0; p < NP; p++) sts32(to + im * stride + p * plane + e * 4, 0);
  }
};

// Addresses of a lane's row and of rows ahead of it: rows 0 .. rows - 1 of an image at xs, a row of zeros above and below them.
template <int PITCH> struct StageRows {
  u32 at, zero;
  int row, rows;
  __device__ __forceinline__ StageRows(u32 xs, int row, int rows, u32 zero) : at(xs + row * PITCH), zero(zero), row(row), rows(rows) {}
  __device__ __forceinline__ u32 address(int ahead = 0) const { return (unsigned)(row + ahead) < (unsigned)rows ? at + ahead * PITCH : zero; }
  __device__ __forceinline__ void next() { row += 2, at += 2 * PITCH; }
};
