// The same convolutions on channels_last tensors.
//
// A block works on G groups of 8 neighbouring channels. Loader warps read pixels (16 bytes of each, 32 with two groups), turn
// them into a plane a channel (movmatrix), and put the rows into a ring in shared memory. Consumer warps convolve a channel and a
// set of row tiles at a time and write the results over rows that the channel no longer needs; storer warps turn these back into
// pixels. Nobody waits for anybody but through the barriers of the ring's slots. From sm_90 on two blocks may share the pixels that
// they read: an access costs the same however few bytes of a line it wants.
//
// A slot holds SR rows (those of a set of row tiles) of NI images. The stream of slots of an item (images n0 .., columns col0 ..,
// rows row0 .. row1) is its input rows from row0 - lead SR on; its output rows j SR .. go to the slot that holds the input rows
// LEAD slots above, which set j was the last to need. Slots without output (the last ones) or without input (above the image)
// pass through all the same.

// One 8x8 block of 16-bit values from rows to columns: thread (g, q) gives row g, columns 2q, 2q + 1.
__device__ __forceinline__ u32 transpose(u32 v) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// 16 bytes that nobody reads again.
__device__ __forceinline__ uint4 ldg_once(const void* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
  return r;
}

// CH channels (8, or the first of them) of one pixel in global memory, V bytes at a time; of channels from `limit` on nothing is
// read or written.
template <int DT, int CH, int V> struct Pixel {
  static constexpr int SIZE = DT == F32 ? 4 : 2, PER = V / SIZE, WORDS = cdiv(CH, 2) * SIZE / 2;
  static __device__ __forceinline__ void load(u32 (&v)[WORDS], const u8* p, int limit) {
    if constexpr (CH == 1) v[WORDS - 1] = 0;
#pragma unroll
    for (int i = 0; i < CH / PER; i++) {
      const bool ok = i * PER < limit;
      const u8* at = p + i * V;
      if constexpr (V == 16) {
        uint4 t = make_uint4(0, 0, 0, 0);
        if (ok) t = ldg_once(at);
        v[4 * i] = t.x, v[4 * i + 1] = t.y, v[4 * i + 2] = t.z, v[4 * i + 3] = t.w;
      } else if constexpr (V == 8) {
        uint2 t = ok ? __ldg((const uint2*)at) : make_uint2(0, 0);
        v[2 * i] = t.x, v[2 * i + 1] = t.y;
      } else if constexpr (V == 4) {
        v[i] = ok ? __ldg((const u32*)at) : 0;
      } else {
        const u32 t = ok ? __ldg((const u16*)at) : 0;
        v[i / 2] = i & 1 ? v[i / 2] | t << 16 : t;
      }
    }
  }
  static __device__ __forceinline__ void store(u8* p, const u32 (&v)[WORDS], int limit) {
#pragma unroll
    for (int i = 0; i < CH / PER; i++) {
      if (i * PER >= limit) continue;
      u8* at = p + i * V;
      if constexpr (V == 16) *(uint4*)at = make_uint4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
      else if constexpr (V == 8) *(uint2*)at = make_uint2(v[2 * i], v[2 * i + 1]);
      else if constexpr (V == 4) *(u32*)at = v[i];
      else *(u16*)at = (u16)(v[i / 2] >> 16 * (i & 1));
    }
  }
};

// Where things lie in the ring: bytes between the planes of channels, of groups, and of the bfloat16 planes of float32 (sets),
// and between images. Channels of a group from `channels` on have no plane.
struct RingLayout { u32 base; int channels, stride, plane, group, set; };

// Rows of pixels to planes and back. A line is a row of one image; a warp moves four units (8 pixels of 8 channels of a group, of
// which CH are wanted) at once, CHUNKS times a line, or LINES short lines together. Thread (r, q) has pixel r of unit q in global
// memory, and thread (2 q + b, s) pixels 2 s and 2 s + 1 of channels b, b + 2, .. of unit q in shared memory. A warp has up to
// DEPTH units of 16-bit values, of its share among WARPS of a slot of SR rows, on their way at once.
//
// Lines run through the images first. From one of a warp's lines to the next is a constant number of images and rows, so that an
// address is a sum.
template <int DT, int NP, int CB, int PITCH, int NI, int G, int CH, int V, int SR, int WARPS, int DEPTH> struct Units {
  using P = Pixel<DT, CH, V>;
  static constexpr int LINE = CB * G, LINES = LINE > 2 ? 1 : 4 / LINE, CHUNKS = cdiv(LINE, 4), STEP = LINES * WARPS, PAIRS = cdiv(CH, 2);
  static_assert(STEP % NI == 0 || NI % STEP == 0, "steps of whole rows or of images that divide a row");
  // Batches of whole rows, or of one row's images.
  static constexpr int ROW = NI > STEP ? NI / STEP : 1;
  static constexpr int BATCH = cmax(1, cmin(cdiv(SR * NI, STEP), DEPTH / (DT == F32 ? 2 * CHUNKS : CHUNKS)) / ROW) * ROW;
  static constexpr int PIXELS = 32 / G;  // from a chunk to the next, in columns
  // Unit q of the first chunk, its line among LINES, its column block and group.
  struct Lane {
    int line, block, group;
    __device__ __forceinline__ Lane(int q) : line(LINES > 1 ? q / LINE : 0), block((LINES > 1 ? q % LINE : q) / G), group(q % G) {}
    __device__ __forceinline__ bool in(int chunk) const { return LINES > 1 || block + chunk * (4 / G) < CB; }
  };
  // Images and rows from a batch's first line to its line k.
  static __device__ __forceinline__ constexpr int image_of(int k) { return k * STEP % NI; }
  static __device__ __forceinline__ constexpr int row_of(int k) { return k * STEP / NI; }
  static __device__ __forceinline__ u32 word(const RingLayout& ring, const Lane& u, int lane) {
    return ring.base + u.group * ring.group + ((lane >> 2) & 1) * ring.plane + u.block * 16 + (lane & 3) * 4;
  }
  // Pixels of rows 0 .. rows - 1 from x on (the first pixel of the first image at column 0) into ring rows slot_row .. .
  // wait(): called once before the first value is written.
  template <class Wait> static __device__ __forceinline__ void load(const RingLayout& ring, int slot_row, const u8* x, int images, int rows, int left, int H, int W, int C, int limit,
                                                                    int warp, int lane, Wait wait) {
    const Lane from(lane & 3), to(lane >> 3);
    const int lines = rows * NI, col = left + from.block * 8 + (lane >> 2), mine = limit - from.group * 8, b = lane >> 2 & 1;
    const i64 pixel = (i64)C * P::SIZE, row_bytes = W * pixel, image_bytes = H * row_bytes;
    const u32 target = word(ring, to, lane) + slot_row * PITCH;
    x += col * pixel + from.group * 8 * P::SIZE;
    bool waited = false;
#pragma unroll 1
    for (int l0 = warp * LINES; l0 < lines; l0 += STEP * BATCH) {
      u32 v[BATCH][CHUNKS][P::WORDS];
      const int l = l0 + from.line, image = l % NI, row = l / NI;
      const u8* first = x + image * image_bytes + row * row_bytes;
#pragma unroll
      for (int k = 0; k < BATCH; k++) {
        const bool ok = row + row_of(k) < rows && image + image_of(k) < images;
        const u8* at = first + (image_of(k) * image_bytes + row_of(k) * row_bytes);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
          P::load(v[k][c], at + c * PIXELS * pixel, ok && from.in(c) && (unsigned)(col + c * PIXELS) < (unsigned)W ? mine : 0);
      }
      if (!waited) wait();
      waited = true;
      const int into = l0 + to.line, into_row = into / NI;
      const u32 base = target + into % NI * ring.stride + into_row * PITCH;
#pragma unroll
      for (int k = 0; k < BATCH; k++) {
        const bool ok = into_row + row_of(k) < rows;
        const u32 at = base + image_of(k) * ring.stride + row_of(k) * PITCH;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
          for (int p = 0; p < NP; p++)
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
              u32 w;
              if constexpr (DT == F32) {
                float lo = __uint_as_float(v[k][c][2 * i]), hi = __uint_as_float(v[k][c][2 * i + 1]);
                w = transpose(peel(lo, hi));
                v[k][c][2 * i] = __float_as_uint(lo), v[k][c][2 * i + 1] = __float_as_uint(hi);
              } else
                w = transpose(v[k][c][i]);
              if (ok && to.in(c) && 2 * i + b < ring.channels) sts32(at + c * PIXELS * 2 + p * ring.set + 2 * i * ring.plane, w);
            }
      }
    }
    if (!waited) wait();
  }
  // Ring rows slot_row .. back to pixels. float32 lies in the first two sets: its upper and its lower 16 bits.
  static __device__ __forceinline__ void store(const RingLayout& ring, int slot_row, u8* y, int images, int rows, int columns, int H, int W, int C, int limit, int warp,
                                               int lane) {
    static_assert(CH == 8, "whole groups");
    const Lane from(lane >> 3), to(lane & 3);
    const int lines = rows * NI, col = to.block * 8 + (lane >> 2), mine = limit - to.group * 8, b = lane >> 2 & 1;
    const i64 pixel = (i64)C * P::SIZE, row_bytes = W * pixel, image_bytes = H * row_bytes;
    const u32 source = word(ring, from, lane) + slot_row * PITCH;
    y += col * pixel + to.group * 8 * P::SIZE;
#pragma unroll 1
    for (int l0 = warp * LINES; l0 < lines; l0 += STEP * BATCH) {
      u32 v[BATCH][CHUNKS][P::WORDS];
      const int out_of = l0 + from.line, out_row = out_of / NI;
      const u32 base = source + out_of % NI * ring.stride + out_row * PITCH;
#pragma unroll
      for (int k = 0; k < BATCH; k++) {
        const bool ok = out_row + row_of(k) < rows;
        const u32 at = base + image_of(k) * ring.stride + row_of(k) * PITCH;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const bool there = ok && from.in(c) && 2 * i + b < ring.channels;
            const u32 word = at + c * PIXELS * 2 + 2 * i * ring.plane;
            v[k][c][i] = there ? lds32(word) : 0;
            if constexpr (DT == F32) v[k][c][4 + i] = there ? lds32(word + ring.set) : 0;
          }
      }
      const int l = l0 + to.line, image = l % NI, row = l / NI;
      u8* first = y + image * image_bytes + row * row_bytes;
#pragma unroll
      for (int k = 0; k < BATCH; k++) {
        const bool ok = row + row_of(k) < rows && image + image_of(k) < images;
        u8* at = first + (image_of(k) * image_bytes + row_of(k) * row_bytes);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
          u32 out[P::WORDS];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const u32 w = transpose(v[k][c][i]);
            if constexpr (DT == F32) {
              const u32 low = transpose(v[k][c][4 + i]);
              out[2 * i] = w << 16 | (low & 0xffff), out[2 * i + 1] = (w & 0xffff0000u) | low >> 16;
            } else
              out[i] = w;
          }
          if (ok && to.in(c) && col + c * PIXELS < columns) P::store(at + c * PIXELS * pixel, out, mine);
        }
      }
    }
  }
};

// The same for CLUSTER blocks that share the pixels they read and write: GROUPS groups of CH channels, 16 bytes or fewer of a pixel each,
// of which every block has an equal part, in order. WARPS are those of all. A thread moves a unit by itself: 8 pixels of a line
// become 16 bytes of a plane, which are sent where another block has it (words of 4 bytes, as in `Units`, took up to a quarter longer:
// each is an access of its own). Units run through the groups, the line, the images and the rows.
template <int DT, int NP, int CB, int PITCH, int NI, int GROUPS, int CH, int V, int SR, int WARPS, int DEPTH, int CLUSTER> struct SharedUnits {
  static constexpr int MINE = CH * GROUPS / CLUSTER, SIZE = DT == F32 ? 4 : 2;
  using P = Pixel<DT, CH, V>;
  static constexpr int BATCH = cmax(1, cmin(cdiv(SR * NI * CB * GROUPS, 32 * WARPS), DEPTH / (2 * P::WORDS)));
  static_assert(CH * SIZE <= 16, "one access a pixel");
  static_assert(GROUPS == 1 || GROUPS % CLUSTER == 0, "parts of a group or whole groups");
  // Two neighbouring pixels of channel c: a word, of its next bfloat16 plane if it is float32.
  static __device__ __forceinline__ u32 pair(u32 (&even)[P::WORDS], u32 (&odd)[P::WORDS], int c) {
    if constexpr (DT == F32) {
      float lo = __uint_as_float(even[c]), hi = __uint_as_float(odd[c]);
      const u32 word = peel(lo, hi);
      even[c] = __float_as_uint(lo), odd[c] = __float_as_uint(hi);
      return word;
    } else
      return __byte_perm(even[c / 2], odd[c / 2], c & 1 ? 0x7632 : 0x5410);
  }
  // As Units::load. bar: the barrier that counts what is sent. Returns the bytes that this warp has sent to each of the other blocks.
  template <class Wait> static __device__ __forceinline__ int load(const RingLayout& ring, u32 bar, int rank, int slot_row, const u8* x, int images, int rows, int left, int H, int W, int C,
                                                                   int limit, int warp, int lane, Wait wait) {
    const int units = max(0, rows) * NI * CB * GROUPS, group = lane % GROUPS, owner = group * CH / MINE;
    const i64 pixel = (i64)C * SIZE, row_bytes = W * pixel, image_bytes = H * row_bytes;
    // From this block's memory to that of each; whole groups go to one.
    u32 to[CLUSTER];
#pragma unroll
    for (int b = 0; b < CLUSTER; b++) {
      const int block = GROUPS == 1 ? b : owner;
      to[b] = block == rank ? 0 : peer(ring.base, block) - ring.base;
    }
    const u32 base = ring.base + group * CH % MINE / 8 * ring.group;
    x += group * CH * SIZE;
    int sent = 0;
    bool waited = false;
#pragma unroll 1
    for (int first = warp * 32 + lane; first - lane < units; first += 32 * WARPS * BATCH) {
      u32 v[BATCH][8][P::WORDS];
#pragma unroll
      for (int k = 0; k < BATCH; k++) {
        const int unit = first + k * 32 * WARPS, at_line = unit / GROUPS, line = at_line / CB, image = line % NI;
        const int col = left + at_line % CB * 8, mine = unit < units && image < images ? limit - group * CH : 0;
        const u8* at = x + (image * image_bytes + line / NI * row_bytes + col * pixel);
#pragma unroll
        for (int p = 0; p < 8; p++) P::load(v[k][p], at + p * pixel, (unsigned)(col + p) < (unsigned)W ? mine : 0);
      }
      if (!waited) wait();
      waited = true;
#pragma unroll
      for (int k = 0; k < BATCH; k++) {
        const int unit = first + k * 32 * WARPS, at_line = unit / GROUPS, line = at_line / CB;
        const bool there = unit < units;
        const u32 place = base + line % NI * ring.stride + (slot_row + line / NI) * PITCH + at_line % CB * 16;
        sent += __popc(__ballot_sync(~0u, there && (GROUPS == 1 || owner != rank))) * ((GROUPS == 1 ? MINE : CH) * NP * 16);
#pragma unroll
        for (int p = 0; p < NP; p++)
#pragma unroll
          for (int c = 0; c < CH; c++) {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) words[i] = pair(v[k][2 * i], v[k][2 * i + 1], c);
            const u32 plane = place + p * ring.set + c % MINE * ring.plane, block = to[c / MINE];
            if (!there) continue;
            if (block == 0) sts128(plane, words);
            else send128(plane + block, words, bar + block);
          }
      }
    }
    if (!waited) wait();
    return sent;
  }
  // As Units::store, of the planes of all blocks. Whole groups of 16-bit values.
  static __device__ __forceinline__ void store(const RingLayout& ring, int rank, int slot_row, u8* y, int images, int rows, int columns, int H, int W, int C, int limit, int warp, int lane) {
    static_assert(CH == 8 && DT != F32, "whole groups of 16-bit values");
    const int units = max(0, rows) * NI * CB * GROUPS, group = lane % GROUPS, owner = group * CH / MINE;
    const i64 pixel = (i64)C * SIZE, row_bytes = W * pixel, image_bytes = H * row_bytes;
    const u32 base = (owner == rank ? ring.base : peer(ring.base, owner)) + group * CH % MINE / 8 * ring.group + slot_row * PITCH;
    y += group * CH * SIZE;
#pragma unroll 1
    for (int unit = warp * 32 + lane; unit < units; unit += 32 * WARPS) {
      const int at_line = unit / GROUPS, line = at_line / CB, image = line % NI, col = at_line % CB * 8;
      const u32 place = base + image * ring.stride + line / NI * PITCH + at_line % CB * 16;
      if (image >= images) continue;
      u32 v[8][4];
#pragma unroll
      for (int c = 0; c < 8; c++) {
        if (owner == rank) lds128(v[c], place + c * ring.plane);
        else fetch128(v[c], place + c * ring.plane);
      }
      u8* at = y + (image * image_bytes + line / NI * row_bytes + col * pixel);
#pragma unroll
      for (int p = 0; p < 8; p++) {
        u32 out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = __byte_perm(v[2 * i][p / 2], v[2 * i + 1][p / 2], p & 1 ? 0x7632 : 0x5410);
        if (col + p < columns) P::store(at + p * pixel, out, limit - group * CH);
      }
    }
  }
};

// Pieces of the images in order (group of images, column tile, row range).
struct NhwcPieces {
  int n_rows, n_cols, item_rows, images, columns, H, SR, lead;
  i64 count;
  __device__ NhwcPieces(int N, int H, int W, int images, int columns, int item_rows, int SR, int lead)
      : n_rows(cdiv(H, item_rows)), n_cols(cdiv(W, columns)), item_rows(item_rows), images(images), columns(columns), H(H), SR(SR), lead(lead) {
    count = (i64)cdiv(N, images) * n_rows * n_cols;
  }
};
struct NhwcPiece {
  int n0, col0, row0, row1, sets, slots;
  __device__ __forceinline__ NhwcPiece(const NhwcPieces& p, i64 number) {
    int rest = (int)number;
    row0 = rest % p.n_rows * p.item_rows, rest /= p.n_rows;
    col0 = rest % p.n_cols * p.columns, n0 = rest / p.n_cols * p.images;
    row1 = min(p.H, row0 + p.item_rows);
    sets = cdiv(row1 - row0, p.SR);
    slots = p.lead + min(sets + p.lead, cdiv(p.H - row0, p.SR));
  }
};

// Items in order (channel block, piece). `share` blocks side by side walk the same pieces, each with its own channels, because
// several channel blocks lie in the same bytes of memory that are read and written at once.
struct NhwcWalk {
  NhwcPieces pieces;
  int share, channels;
  i64 first, last;
  __device__ NhwcWalk(const NhwcPieces& pieces, int C, int channels, int share) : pieces(pieces), share(share), channels(channels) {
    const i64 total = pieces.count * cdiv(cdiv(C, channels), share), runs = gridDim.x / share, run = blockIdx.x / share;
    first = total * run / runs, last = total * (run + 1) / runs;
  }
};
struct NhwcItem : NhwcPiece {
  int c0;
  __device__ __forceinline__ NhwcItem(const NhwcWalk& w, i64 item)
      : NhwcPiece(w.pieces, item % w.pieces.count), c0(((int)(item / w.pieces.count) * w.share + blockIdx.x % w.share) * w.channels) {}
};

// A position in the ring: slot and how often it was there before.
struct RingAt {
  int slot = 0, round = 0;
  __device__ __forceinline__ void next(int ring) {
    if (++slot == ring) slot = 0, round++;
  }
};

// A lane's rows in the ring, as StageRows; row counts from the first row that was loaded.
template <int PITCH> struct RingRows {
  u32 at, zero, end;
  int row, rows, bytes;
  __device__ __forceinline__ RingRows(u32 xs, int ring_row, int ring_rows, int row, int rows, u32 zero)
      : at(xs + (ring_row >= ring_rows ? ring_row - ring_rows : ring_row) * PITCH), zero(zero), end(xs + ring_rows * PITCH), row(row), rows(rows), bytes(ring_rows * PITCH) {}
  __device__ __forceinline__ u32 address(int ahead = 0) const {
    const u32 a = at + ahead * PITCH;
    return (unsigned)(row + ahead) < (unsigned)rows ? a >= end ? a - bytes : a : zero;
  }
  __device__ __forceinline__ void next() {
    row += 2, at += 2 * PITCH;
    if (at >= end) at -= bytes;
  }
};

// Loads a slot of a ring, as `Units` or, in a cluster, `SharedUnits`: G groups of CH channels a block, or a part of one group, `limit` channels
// of all blocks. Warps arrive at the barrier `bar`; the slot is free once the phase before this round of the barrier `free` is over.
template <int DT, int NP, int CB, int PITCH, int NI, int G, int CH, int V, int SR, int LOADERS, int DEPTH, int CLUSTER>
__device__ __forceinline__ void load_slot(const RingLayout& ring, u32 bar, u32 free, int round, int rank, int slot_row, const u8* x, int images, int rows, int left, int H, int W, int C,
                                          int limit, int warp, int lane) {
  const auto wait = [&] {
    if (round > 0) bar_wait(free, (round - 1) & 1);
  };
  if constexpr (CLUSTER == 1) {
    Units<DT, NP, CB, PITCH, NI, G, CH, V, SR, LOADERS, DEPTH>::load(ring, slot_row, x, images, rows, left, H, W, C, limit, warp, lane, wait);
    warp_arrive(bar, lane);
  } else {
    // Whole groups, or one of which each block has a part.
    constexpr int GROUPS = CH == 8 ? G * CLUSTER : 1;
    using U = SharedUnits<DT, NP, CB, PITCH, NI, GROUPS, CH == 8 ? 8 : CH * CLUSTER, V, SR, LOADERS * CLUSTER, DEPTH, CLUSTER>;
    const int sent = U::load(ring, bar, rank, slot_row, x, images, rows, left, H, W, C, limit, rank * LOADERS + warp, lane, wait);
    cluster_arrive<CLUSTER>(bar, sent, rank, lane);
  }
}

// Arguments: as forward_nchw; rows an item; channels a block (8 G, or fewer with G = 1); blocks that share sectors; slots of the
// ring and slots of halo; the ring's layout; flags. WARPS convolve.
template <int DT, int NP, int KH, int KW, int CBI, int CBO, int OFF, int NI, int MT, int G, int V, int CLUSTER, int WARPS, int LOADERS, int STORERS, int MINB>
__global__ __launch_bounds__((WARPS + LOADERS + STORERS) * 32, MINB) IN_CLUSTERS_OF(CLUSTER) void forward_nhwc(
    const void* __restrict__ x, const void* __restrict__ weight, const void* __restrict__ bias, void* __restrict__ y, int N, int C, int H, int W,
    int item_rows, int channels, int share, int ring, int lead, int stride, int plane, int group, int set, int flags) {
  using K = Forward<DT, NP, KH, KW, CBI, CBO, OFF, NI, MT, 2, 1, WARPS, LOADERS + STORERS, MINB>;
  using T = typename K::T;
  constexpr int SR = K::TS * MT, SIZE = DT == F32 ? 4 : 2;
  extern __shared__ __align__(128) u8 smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, rank = blockIdx.x % CLUSTER;
  // Barriers of slot s: loaded, convolved, stored; behind those of all slots one a channel, its set has been read, and, where two blocks
  // write pixels together, because a block's channels are half a sector, one a slot: the other block has convolved.
  constexpr bool TOGETHER = CLUSTER > 1 && G == 1;
  const int all_bars = cdiv(ring * ((TOGETHER ? 32 : 24) + channels * 8), 128) * 128;
  const u32 bars = smem_u32(smem), read = bars + ring * 24, others = read + ring * channels * 8, zero = bars + all_bars, tables = zero + K::ZERO;
  const RingLayout layout = {tables + channels * K::TABLE, min(8, channels), stride, plane, group, set};
  if (tid < K::ZERO / 4) ((u32*)(smem + all_bars))[tid] = 0;
  // Whether every warp has channels of its own, and need not wait for others that convolve.
  const bool own = channels % WARPS == 0;
  // A warp makes its barriers one after the other: they are shared out among the warps.
  const int number = lane * (WARPS + LOADERS + STORERS) + warp;
  if (number < ring * 3) warps_init(bars + number * 8, number % 3 == 0 ? LOADERS * CLUSTER : number % 3 == 1 ? WARPS : STORERS * CLUSTER);
  if (TOGETHER && number < ring) bar_init(others + number * 8, 1);
  if (!own && number < ring * channels) warps_init(read + number * 8, 1);
  cluster_sync<CLUSTER>();
  const NhwcWalk walk(NhwcPieces(N, H, W, NI, CBO * 8, item_rows, SR, lead), C, channels, share);
  RingAt p;

  if (warp >= WARPS + LOADERS) {
    for (i64 item = walk.first; item < walk.last; item++) {
      const NhwcItem it(walk, item);
      for (int j = 0; j < it.slots; j++, p.next(ring)) {
        bar_wait(bars + p.slot * 24 + 8, p.round & 1);
        const int h0 = it.row0 + j * SR;
        const int c0 = TOGETHER ? it.c0 - rank * channels : it.c0, rows = min(SR, it.row1 - h0), mover = warp - WARPS - LOADERS;
        const bool stores = j < it.sets && c0 < C;
        u8* to = (u8*)y + ((((i64)it.n0 * H + h0) * W + it.col0) * C + c0) * SIZE;
        if constexpr (TOGETHER) {
          static_assert(CLUSTER == 2, "one other block");
          if (mover == 0 && lane == 0) tell(peer(others + p.slot * 8, 1 - rank));
          using U = SharedUnits<DT, NP, CBO, K::PITCH, NI, G * CLUSTER, 8, V, SR, STORERS * CLUSTER, 4, CLUSTER>;
          if (stores) hear(others + p.slot * 8, p.round & 1);
          if (stores) U::store(layout, rank, p.slot * SR, to, N - it.n0, rows, W - it.col0, H, W, C, C - c0, rank * STORERS + mover, lane);
        } else {
          using U = Units<DT, NP, CBO, K::PITCH, NI, G, 8, V, SR, STORERS, 4>;
          if (stores) U::store(layout, p.slot * SR, to, N - it.n0, rows, W - it.col0, H, W, C, min(C - c0, channels), mover, lane);
        }
        cluster_arrive<CLUSTER>(bars + p.slot * 24 + 16, 0, rank, lane);
      }
    }
  } else if (warp >= WARPS) {
    for (i64 item = walk.first; item < walk.last; item++) {
      const NhwcItem it(walk, item);
      const int lo = max(0, it.row0 - K::P), hi = min(H, it.row1 + K::P + 1);
      for (int j = 0; j < it.slots; j++, p.next(ring)) {
        const int c0 = it.c0 - rank * channels, top = it.row0 + (j - lead) * SR, h0 = max(lo, top), rows = c0 < C ? min(hi, top + SR) - h0 : 0;
        load_slot<DT, NP, CBI, K::PITCH, NI, G, 8, V, SR, LOADERS, 8, CLUSTER>(layout, bars + p.slot * 24, bars + p.slot * 24 + 16, p.round, rank, p.slot * SR + h0 - top,
                                                                               (const u8*)x + (((i64)it.n0 * H + h0) * W * C + c0) * SIZE, N - it.n0, rows, it.col0 - 8 * OFF, H, W, C,
                                                                               min(C - c0, channels * CLUSTER), warp - WARPS, lane);
      }
    }
  } else {
    const int img = (lane & 15) % NI, off = (lane & 15) / NI + (lane >> 4);
    const float floor = flags & RELU ? 0.f : -__int_as_float(0x7f800000);
    // Pairs (slot, channel), in order, go to the warps by turns: this warp's next is `turn` channels ahead.
    RingAt ready, before;
    int ahead = 0, built = -1, turn = warp;
    for (i64 item = walk.first; item < walk.last; item++) {
      const NhwcItem it(walk, item);
      const int lo = max(0, it.row0 - K::P), hi = min(H, it.row1 + K::P + 1);
      if (built != it.c0) {
        if (!own) asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
#pragma unroll 1
        for (int channel = warp; channel < channels; channel += WARPS)
          if (const int c = it.c0 + channel; c < C) T::template build<DT, NP, 32>(tables + channel * K::TABLE, (const u8*)weight + (i64)c * (KH * KW) * SIZE, flags & FLIP, lane);
        if (!own) asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
        __syncwarp();
        built = it.c0;
      }
      for (int j = 0; j < it.slots; j++, p.next(ring), ahead--, turn -= channels) {
        for (const int need = min(j + 2 * lead, it.slots - 1) - j; ahead <= need; ahead++, ready.next(ring)) bar_wait(bars + ready.slot * 24, ready.round & 1);
        const int h0 = it.row0 + j * SR, tiles = min(MT, cdiv(it.row1 - h0, K::TS));
        const int e0 = max(0, K::P - h0 - K::GR) & ~1, e1 = min(K::KHP + K::TS * (tiles - 1), H - h0 + K::P);
#pragma unroll 1
        for (; turn < channels; turn += WARPS) {
          const int c = it.c0 + turn;
          const u32 mine = layout.base + turn / 8 * group + turn % 8 * plane, table = tables + turn * K::TABLE + T::lane_offset(lane);
          const u32 done = read + (p.slot * channels + turn) * 8;
          const bool convolves = j < it.sets && c < C;
          typename K::Acc acc;
          if (convolves) {
#pragma unroll
            for (int t = 0; t < MT; t++)
#pragma unroll
              for (int b = 0; b < CBO; b++) acc[t][b][0] = acc[t][b][1] = acc[t][b][2] = acc[t][b][3] = 0.f;
            const int row = off + e0 - K::P;
#pragma unroll 1
            for (int i = 0; i < Terms<NP>::N; i++) {
              const RingRows<K::PITCH> rows(mine + Terms<NP>::x(i) * set + img * stride, (p.slot + lead) * SR + row, ring * SR, h0 + row - lo, min(hi, h0 + SR + K::P + 1) - lo, zero);
              if constexpr (K::WINDOW || MT <= 2) K::accumulate(acc, rows, table + Terms<NP>::w(i) * T::PLANE, e0, e1, tiles);
              else K::accumulate_apart(acc, rows, table + Terms<NP>::w(i) * T::PLANE, e0, e1, tiles);
            }
          }
          // The channel's slot before, which another warp may have, must have been read before this one's rows are written over.
          if (!own && before.slot != p.slot) bar_wait(read + (before.slot * channels + turn) * 8, before.round & 1);
          __syncwarp();
          if (!own) warp_arrive(done, lane);
          if (!convolves) continue;
          const float shift = bias ? load_float<DT>(bias, c) : 0.f;
#pragma unroll
          for (int t = 0; t < MT; t++)
#pragma unroll
            for (int b = 0; b < CBO; b++)
#pragma unroll
              for (int half = 0; half < 2; half++) {
                const int m = (lane >> 2) + 8 * half;
                const u32 to = mine + m % NI * stride + (p.slot * SR + m / NI + K::TS * t) * K::PITCH + b * 16 + (lane & 3) * 4;
                const float v0 = max_nan(acc[t][b][2 * half] + shift, floor), v1 = max_nan(acc[t][b][2 * half + 1] + shift, floor);
                if constexpr (DT == F32) {
                  const u32 u0 = __float_as_uint(v0), u1 = __float_as_uint(v1);
                  sts32(to, u0 >> 16 | (u1 & 0xffff0000u));
                  sts32(to + set, (u0 & 0xffff) | u1 << 16);
                } else
                  sts32(to, pack2<DT>(v0, v1));
              }
        }
        warp_arrive(bars + p.slot * 24 + 8, lane);
        before = p;
      }
    }
  }
  cluster_leave<CLUSTER>(), cluster_wait<CLUSTER>();
}

// What a run of the weight gradient does, in parts: pieces of one group of channels, of which it has sums of its own.
//
// While there are at least as many groups as runs, a run takes a whole one. What is left is dealt out in the order (group, piece),
// `share` pieces to a run, each of which begins with a multiple of `share`, if it has one: runs side by side then go through the same
// images at the same time, different channels of which lie in the same bytes of memory.
struct WeightGradWalk {
  int pieces, groups, share, runs, run, whole;
  __device__ WeightGradWalk(i64 pieces, int groups, int share) : pieces((int)pieces), groups(groups), share(share), runs(gridDim.y), run(blockIdx.y), whole(groups / runs) {}
  // The pieces of the groups that are not dealt whole, the run's first, and behind its last.
  __device__ i64 rest() const { return (i64)(groups - whole * runs) * pieces; }
  __device__ i64 first() const { return min(rest(), (i64)run * share); }
  __device__ i64 last() const { return min(rest(), (i64)(run + 1) * share); }
  __device__ int parts() const { return whole + (first() < last() ? (int)((last() - 1) / pieces - first() / pieces) + 1 : 0); }
};
struct WeightGradPart {
  int group, begin, count, turn, split;
  bool ends;  // with the group's last piece
  __device__ __forceinline__ WeightGradPart(const WeightGradWalk& w, int part) {
    if (part < w.whole) {
      group = part * w.runs + w.run, begin = turn = split = 0, count = w.pieces, ends = true;
    } else {
      const int number = (int)(w.first() / w.pieces) + part - w.whole;
      const i64 from = (i64)number * w.pieces, first = max(w.first(), from), last = min(w.last(), from + w.pieces);
      group = w.whole * w.runs + number, begin = (int)(first - from), count = (int)(last - first), ends = last == from + w.pieces;
      turn = (w.share - begin % w.share) % w.share, turn = turn < count ? turn : 0;
      split = w.run - (int)(from / w.share);
    }
  }
  __device__ __forceinline__ int piece(int i) const { return begin + (i + turn < count ? i + turn : i + turn - count); }
};

// partial: float32 [splits, C, KH, KW], one for each run that has pieces of a channel, zeros where there are fewer; grid (CLUSTER, runs,
// groups of WG R kernel row pairs). Rings of x and of dy: a slot holds SR rows; the stream of x is that of forward_nhwc, the stream of
// dy has the rows of the sets alone.
//
// A block has 8 / WG channels, which lie in few bytes of a pixel. CLUSTER neighbours go through the same slots together: the loaders
// of each read a part of the lines, in the channels of all, and write a plane to the block whose channel it is.
template <int DT, int NP, int KH, int KW, int CBI, int CBO, int OFF, int NI, int R, int HB, int WG, int SR, int V, int CLUSTER, int LOADERS, int TAKEN, int MINB>
__global__ __launch_bounds__((8 + LOADERS) * 32, MINB) IN_CLUSTERS_OF(CLUSTER) void weight_grad_nhwc(
    const void* __restrict__ x, const void* __restrict__ dy, float* __restrict__ partial, int N, int C, int H, int W, int item_rows, int lead, int share, int splits, int xring,
    int xstride, int xplane, int xset, int yring, int ystride, int yplane, int yset) {
  using K = WeightGrad<DT, NP, KH, KW, CBI, CBO, OFF, NI, R, HB, 2, 8, 1, 1>;
  constexpr int CH = 8 / WG, ALL = CH * CLUSTER, SIZE = DT == F32 ? 4 : 2, BARS = 512, DEPTH = TAKEN ? 8 : 16;
  // A block of twelve warps has 168 registers a thread. Those that multiply take TAKEN each, and the loaders are left with the rest.
  constexpr int LEFT = TAKEN ? 3 * 168 - 2 * TAKEN : 0;
  static_assert(SR % K::SET_ROWS == 0, "whole sets");
  static_assert(!TAKEN || LOADERS == 4, "a group of four warps");
  extern __shared__ __align__(128) u8 smem[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, rank = blockIdx.x;
  // Barriers of slot s: loaded, used; those of dy behind those of x.
  const u32 xbars = smem_u32(smem), ybars = xbars + xring * 16, zero = xbars + BARS;
  const RingLayout xs = {zero + K::ZERO, CH, xstride, xplane, 0, xset};
  const RingLayout ys = {xs.base + NP * xset, CH, ystride, yplane, 0, yset};
  for (int e = tid; e < K::ZERO / 4; e += (8 + LOADERS) * 32) ((u32*)(smem + BARS))[e] = 0;
  if (const int number = lane * (8 + LOADERS) + warp; number < 2 * (xring + yring)) warps_init(xbars + number * 8, (number % 2 == 0 ? LOADERS : 8) * CLUSTER);
  cluster_sync<CLUSTER>();
  const NhwcPieces pieces(N, H, W, NI, CBO * 8, item_rows, SR, lead);
  const WeightGradWalk walk(pieces.count, cdiv(C, ALL), share);
  const int parts = walk.parts();
  RingAt p, q;

  if (warp >= 8) {
    leave_registers<LEFT>();
    for (int number = 0; number < parts; number++) {
      const WeightGradPart part(walk, number);
      const int c0 = part.group * ALL, limit = min(C - c0, ALL);
      for (int i = 0; i < part.count; i++) {
        const NhwcPiece it(pieces, part.piece(i));
        const int lo = max(0, it.row0 - K::P), hi = min(H, it.row1 + K::P + 1);
        const i64 image = (i64)it.n0 * H;
        for (int j = 0, set = 0; j < it.slots; j++, p.next(xring)) {
          const int top = it.row0 + (j - lead) * SR, h0 = max(lo, top);
          load_slot<DT, NP, CBI, K::XPITCH, NI, 1, CH, V, SR, LOADERS, DEPTH, CLUSTER>(xs, xbars + p.slot * 16, xbars + p.slot * 16 + 8, p.round, rank, p.slot * SR + h0 - top, (const u8*)x + ((image + h0) * W * C + c0) * SIZE, N - it.n0,
                                                                             min(hi, top + SR) - h0, it.col0 - 8 * OFF, H, W, C, limit, warp - 8, lane);
          for (; set < it.sets && min(set + 2 * lead, it.slots - 1) <= j; set++, q.next(yring)) {
            const int h = it.row0 + set * SR;
            load_slot<DT, NP, CBO, K::YPITCH, NI, 1, CH, V, SR, LOADERS, DEPTH, CLUSTER>(ys, ybars + q.slot * 16, ybars + q.slot * 16 + 8, q.round, rank, q.slot * SR, (const u8*)dy + ((image + h) * W * C + c0) * SIZE, N - it.n0,
                                                                               min(it.row1 - h, SR), it.col0, H, W, C, limit, warp - 8, lane);
          }
        }
      }
      // The rings are where the consumers sum their diagonals, before the next channels come.
      if (number + 1 < parts) cluster_sync<CLUSTER>();
    }
    cluster_leave<CLUSTER>();
    return;
  }

  take_registers<TAKEN>();
  const int kx = (lane & 7) + 8 * (lane >> 4), ky = lane & 15, pair = (blockIdx.z * WG + warp / CH) * R;
  const u32 xmine = xs.base + warp % CH * xplane + kx % NI * xstride, ymine = ys.base + warp % CH * yplane + ky % NI * ystride;
  RingAt ready;
  int ahead = 0;
  for (int number = 0; number < parts; number++) {
    const WeightGradPart part(walk, number);
    typename K::Acc acc;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int d = 0; d < K::ND; d++) acc[r][d][0] = acc[r][d][1] = acc[r][d][2] = acc[r][d][3] = 0.f;
    for (int i = 0; i < part.count; i++) {
      const NhwcPiece it(pieces, part.piece(i));
      const int lo = max(0, it.row0 - K::P), hi = min(H, it.row1 + K::P + 1);
      for (int j = 0; j < it.slots; j++, p.next(xring), ahead--) {
        for (const int need = min(j + 2 * lead, it.slots - 1) - j; ahead <= need; ahead++, ready.next(xring)) bar_wait(xbars + ready.slot * 16, ready.round & 1);
        if (j < it.sets) {
          bar_wait(ybars + q.slot * 16, q.round & 1);
          const int h0 = it.row0 + j * SR, rows = min(it.row1 - h0, SR);
          if (2 * pair < KH)
#pragma unroll 1
            for (int set = 0; set < cdiv(rows, K::SET_ROWS) * K::SET_TASKS; set++) {
              const int h = set / K::SET_TASKS * K::SET_ROWS + set % K::SET_TASKS, top = h0 + h + 2 * pair - K::P;
              const int q_lo = top + K::GR >= 0 ? 0 : (-top - K::GR + 1) / 2, q_hi = (hi - 1 - top) >> 1;
              const int row = h + 2 * pair - K::P + kx / NI + ((lane >> 3) & 1);
#pragma unroll 1
              for (int i = 0; i < Terms<NP>::N; i++)
                K::accumulate(acc, RingRows<K::XPITCH>(xmine + Terms<NP>::x(i) * xset, (p.slot + lead) * SR + row, xring * SR, h0 + row - lo, hi - lo, zero),
                              ymine + Terms<NP>::w(i) * yset + q.slot * SR * K::YPITCH, h + ky / NI, rows, zero, q_lo, q_hi, lane);
            }
          cluster_arrive<CLUSTER>(ybars + q.slot * 16 + 8, 0, rank, lane);
          q.next(yring);
        }
        cluster_arrive<CLUSTER>(xbars + p.slot * 16 + 8, 0, rank, lane);
      }
    }
    // The rings are done with: every warp sums its diagonals in a corner of its own.
    asm volatile("bar.sync 1, 256;" ::: "memory");
    float* buffer = (float*)(smem + BARS + K::ZERO) + warp * (K::SUMS + R * 2 * KW);
    float* taps = buffer + K::SUMS;
#pragma unroll
    for (int r = 0; r < R; r++) K::reduce(acc[r], buffer, taps + 2 * r * KW, lane);
    __syncwarp();
    const int c = part.group * ALL + rank * CH + warp % CH, count = min(R * 2, KH - 2 * pair) * KW, until = part.ends ? splits : part.split + 1;
    if (c < C)
      for (int s = part.split; s < until; s++) {
        float* out = partial + ((i64)s * C + c) * (KH * KW) + 2 * pair * KW;
        for (int e = lane; e < count; e += 32) out[e] = s == part.split ? taps[e] : 0.f;
      }
    if (number + 1 < parts) cluster_sync<CLUSTER>();
  }
  // A block's memory lasts until the others have left it alone.
  cluster_leave<CLUSTER>(), cluster_wait<CLUSTER>();
}
