// SPDX-License-Identifier: Apache-2.0
//
// y[i] = W norm(x[i]) for 1 to 8 rows x[i], W in blocks: bound by the memory of W, which is read
// once.
//
// A CTA goes through segments of blocks, a segment being 32 rows of one matrix. Its warps take the
// blocks of a segment in turn, and their sums are added in the order of the warps: no atomics, and
// a row of x has the same bits in any batch. Three things run beside each other:
//
//   Ring      each warp requests its blocks long before it needs them, the first ones before the
//             kernel knows x. Nobody but the warp itself waits for them.
//   stage()   x becomes halves with a power of two for each 64 columns, in one pass that does not
//             wait for the norm: a norm over the whole row is a factor of the result.
//   addBlocks the tensor cores sum the 64 products of a block in float32.
#ifndef EC_CUDA_GEMV_CUH
#define EC_CUDA_GEMV_CUH

#include "ahead.cuh"
#include "rows.cuh"

namespace ec::cuda {

constexpr int kChunk = 32, kChunkBlocks = kChunk / 8;  // octets, blocks that a warp stages at once

// Warps of a CTA: more where there are few CTAs. A property of the matrix, since the order of sums
// depends on it.
constexpr int kFewWarps = 8, kManyWarps = 16;
inline int warpsFor(int rowsOfBlocks) { return rowsOfBlocks <= 256 ? kManyWarps : kFewWarps; }

// Blocks that each warp has in flight: 52 or 70 KB a CTA.
template <class Codec, int kWarps>
constexpr int kDepth = (kWarps == kFewWarps ? 6 : 4) / (Codec::kBytes > kU4BlockBytes ? 2 : 1);

__host__ __device__ inline int groupsOf(const ec_norm& norm) {
  return norm.gamma ? norm.groups : 1;
}

// CTAs that a multiprocessor's registers must do for: in INT4, one or two more than run at once, so
// that those of the next launch can begin beside them.
template <class Codec, int kWarps>
constexpr int kCtasAtOnce = 1024 / (kWarps * kWarp) - (Codec::kBytes > kU4BlockBytes ? 1 : 0);

// Geometry and shared memory of a CTA, the host's choice; no bit of a result depends on it.
struct GemvShape {
  int rows;    // of x at most
  int staged;  // blocks of columns whose activations are held at once, a multiple of kChunkBlocks
  int slots;   // blocks of weights
  int slotBytes;  // of each
  int gamma;      // columns of the norm's gamma that are held, all or none
  int pitch;      // octets from row to row: 4 more than there are, so that no two rows share a bank
  int pairs;      // of rows
  int chunks;     // of 32 octets in a row
  // Bytes from the start of the shared memory, which begins with the slots, and all of it.
  int octetsAt, zeroAt, startsAt, factorsAt, sumsAt, squaresAt, gammaAt, inverseAt, sourceAt, bytes;

  // `rows` rows of k columns: as many columns at once as a CTA has room for beside `others` bytes,
  // 64 KB of them at most, and gamma.
  GemvShape() = default;
  GemvShape(int rowsOfX, int warps, int slotsOfRing, int bytesOfSlot, int k, const ec_norm& norm,
            int others = 0)
      : rows(rowsOfX),
        slots(slotsOfRing),
        slotBytes(bytesOfSlot),
        pairs(ceilDiv(rows, 2)),
        chunks(ceilDiv(ceilDiv(k, kGroup), kChunkBlocks)) {
    const int most = 512 / rows / kChunkBlocks;
    staged = (chunks < most ? chunks : most) * kChunkBlocks;
    gamma = norm.gamma ? chunks * kChunkBlocks * kGroup : 0;
    const int room = limits().shared - others;
    place(warps, norm);
    for (; bytes > room && staged > kChunkBlocks; place(warps, norm)) staged -= kChunkBlocks;
    if (bytes > room) gamma = 0;
    place(warps, norm);
  }

 private:
  void place(int warps, const ec_norm& norm) {
    bytes = slots * slotBytes;
    const auto take = [&](int& at, int size) {
      at = bytes;
      bytes += ceilDiv(size, 16) * 16;
    };
    pitch = staged * 8 + 4;
    take(octetsAt, rows * pitch * 16);
    take(zeroAt, 16);
    take(startsAt, staged * pairs * 16);
    take(factorsAt, staged * pairs * 8);
    take(sumsAt, warps * rows * 33 * 4);
    take(squaresAt, norm.gamma ? rows * chunks * 4 : 0);
    take(gammaAt, gamma * 4);
    take(inverseAt, rows * groupsOf(norm) * 4);
    take(sourceAt, rows * 4);
  }
};

// Shared memory of one CTA.
struct GemvShared {
  unsigned char* base;
  const GemvShape& shape;

  __device__ explicit GemvShared(const GemvShape& of)
      : base(dynamicShared<unsigned char>()), shape(of) {}
  template <class T>
  __device__ __forceinline__ T* at(int bytes) const {
    return reinterpret_cast<T*>(base + bytes);
  }
  // [rows][pitch] halves
  __device__ __forceinline__ uint4* octets() const { return at<uint4>(shape.octetsAt); }
  // [1] an octet of nothing
  __device__ __forceinline__ uint4* zero() const { return at<uint4>(shape.zeroAt); }
  // [staged blocks][pairs] where the sums of a block start: of both rows, twice
  __device__ __forceinline__ float4* starts() const { return at<float4>(shape.startsAt); }
  // [staged blocks][pairs] what they are multiplied by: of both rows
  __device__ __forceinline__ float2* factors() const { return at<float2>(shape.factorsAt); }
  // [warps][rows][33]
  __device__ __forceinline__ float* sums() const { return at<float>(shape.sumsAt); }
  // [rows][chunks]
  __device__ __forceinline__ float* squares() const { return at<float>(shape.squaresAt); }
  // [columns] of the norm
  __device__ __forceinline__ float* gamma() const { return at<float>(shape.gammaAt); }
  // [rows][groups] 1 / sqrt(mean + eps) of the norm
  __device__ __forceinline__ float* inverse() const { return at<float>(shape.inverseAt); }
  // [rows] which row of x a row is, or -1
  __device__ __forceinline__ int* source() const { return at<int>(shape.sourceAt); }
};

// One launch: a CTA for each row of blocks, but no more than the device runs at once. `behind`:
// bytes of shared memory that follow the shape's; `others`: those and static ones.
struct GemvCall {
  GemvShape shape;
  int ctas;
  size_t shared;
};
template <class Codec, int kWarps, class Kernel>
GemvCall gemvCall(Kernel kernel, int rows, int rowsOfBlocks, int k, const ec_norm& norm,
                  int behind = 0, int others = 0) {
  const int perRow = ceilDiv(k, kGroup), most = kWarps * kDepth<Codec, kWarps>;
  const auto callWith = [&](int slots) {
    GemvCall call;
    call.shape = GemvShape(rows, kWarps, slots, Codec::kBytes, k, norm, others);
    call.shared = call.shape.bytes + behind;
    const int resident = residentBlocks(kernel, kWarps * kWarp, call.shared);
    call.ctas = rowsOfBlocks < resident ? rowsOfBlocks : resident;
    return call;
  };
  const GemvCall single = callWith(perRow < most ? perRow : most);
  return single.ctas == rowsOfBlocks ? single : callWith(most);
}

// One warp's blocks on their way through shared memory. A lane copies the pieces that it will read,
// so that reading them meets no bank twice; only the scales are copied by some for all.
//
// Segments: int size(); int blocks(i) of segment i; const uint8_t* base(i), int bytes(i) where they
// are; int start(i, warp) the warp's first block in it, the others are kWarps apart; void copy(i,
// from, to) copies one with copyBlock<Codec>(). base() is the lane's firstPiece(). size() may grow
// until finish().
template <int kWarps, int kSlots>
class Ring {
 public:
  __device__ Ring(unsigned char* slots, int slotBytes)
      : warp_(warpIndex()),
        stride_(kWarps * slotBytes),
        first_(slots + warp_ * slotBytes + threadIdx.x % kWarp * 16) {}

  // Requests what there is room for.
  template <class Segments>
  __device__ __forceinline__ void fill(const Segments& segments) {
    while (pending_ < kSlots && seek(segments)) {
      request(segments, first_ + pending_++ * stride_);
      commitAsync();
    }
  }
  // The same, once all segments are known.
  template <class Segments>
  __device__ __forceinline__ void finish(const Segments& segments) {
    fill(segments);
    for (; pending_ < kSlots; ++pending_) commitAsync();
  }
  // The next block, once it is there. What it says is read before pop() gives its place to another.
  __device__ __forceinline__ const unsigned char* front() const {
    waitAsync<kSlots - 1>();
    __syncwarp();
    return first_ + head_;
  }
  template <class Segments>
  __device__ __forceinline__ void pop(const Segments& segments) {
    __syncwarp();
    if (seek(segments)) request(segments, first_ + head_);
    commitAsync();
    head_ = head_ == (kSlots - 1) * stride_ ? 0 : head_ + stride_;
  }
  __device__ __forceinline__ void drain() const { waitAsync<0>(); }

 private:
  template <class Segments>
  __device__ __forceinline__ bool seek(const Segments& segments) {
    if (left_ > 0) return true;
    while (next_ < segments.size()) {
      const int start = segments.start(next_, warp_);
      left_ = ceilDiv(segments.blocks(next_) - start, kWarps);
      at_ = segments.base(next_) + int64_t(start) * segments.bytes(next_);
      ++next_;
      if (left_ > 0) return true;
    }
    return false;
  }
  template <class Segments>
  __device__ __forceinline__ void request(const Segments& segments, unsigned char* slot) {
    segments.copy(next_ - 1, at_, slot);
    at_ += kWarps * segments.bytes(next_ - 1);
    --left_;
  }

  int warp_, stride_, pending_ = 0, head_ = 0;  // head_: bytes from the first slot to the next
  unsigned char* first_;                        // the lane's first piece in the warp's first slot
  const uint8_t* at_ = nullptr;                 // the lane's first piece of what is requested next
  int next_ = 0, left_ = 0;                     // segment; blocks left of the one before
};

// The lane's first piece of a block.
template <class Codec>
__device__ __forceinline__ const uint8_t* firstPiece(const uint8_t* block) {
  const int lane = threadIdx.x % kWarp;
  return block + Codec::piece(0, lane / 4, lane % 4);
}

// The lane's pieces; those with t = 0 and g < 4 copy the scales, from where their others are.
template <class Codec>
__device__ __forceinline__ void copyBlock(const uint8_t* from, unsigned char* to) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < Codec::kPieces; ++i) {
    copyAsync(reinterpret_cast<uint4*>(to) + i * kWarp,
              reinterpret_cast<const uint4*>(from + Codec::piece(i, 0, 0)));
  }
  if (lane % 4 == 0 && lane < 16) {
    copyAsync(reinterpret_cast<uint4*>(to + Codec::kScales - 12 * lane),
              reinterpret_cast<const uint4*>(from + Codec::kScales));
  }
}

// A block in registers, from the lane's first piece.
template <class Codec>
struct Block {
  typename Codec::Codes codes;
  uint2 scales;  // of rows 4g .. 4g+3
  __device__ __forceinline__ explicit Block(const unsigned char* piece) {
    const int lane = threadIdx.x % kWarp;
    codes = Codec::fromPieces(reinterpret_cast<const uint4*>(piece));
    scales = *reinterpret_cast<const uint2*>(piece + Codec::kScales + (lane / 4 * 8 - lane * 16));
  }
};

// Where a lane finds what belongs to a block of x: octets t and t + 4 of its column, and its pair
// of columns. They go on by strides.
struct Columns {
  const uint4* octets;
  const float4* starts;
  const float2* factors;
  int octetStride, pairStride;

  // Of column `column`, from block `held` of those that are held on; zeros where it does not count.
  __device__ __forceinline__ Columns(const GemvShared& shared, int column, int held, int warps,
                                     bool counts = true)
      : octetStride(counts ? warps * 8 : 0), pairStride(warps * shared.shape.pairs) {
    const int t = threadIdx.x % 4, pairs = shared.shape.pairs, pair = t < pairs ? t : pairs - 1;
    octets = counts ? shared.octets() + column * shared.shape.pitch + held * 8 + t : shared.zero();
    starts = shared.starts() + held * pairs + pair;
    factors = shared.factors() + held * pairs + pair;
  }
  __device__ __forceinline__ void advance() {
    octets += octetStride;
    starts += pairStride;
    factors += pairStride;
  }
};

// sum += the warp's blocks kb, kb + kWarps, .. below `end` times columns 2t and 2t + 1, whose part
// of block kb is at `columns`. Returns the block that comes next.
template <class Codec, int kWarps, class RingOf, class Segments>
__device__ __forceinline__ int addBlocks(RingOf& ring, const Segments& segments, int kb, int end,
                                         Columns columns, float (&sum)[2][4]) {
#pragma unroll 1
  for (; kb < end; kb += kWarps) {
    const Block<Codec> block(ring.front());
    const uint4 b[2] = {columns.octets[0], columns.octets[columns.octetStride ? 4 : 0]};
    const float4 start = *columns.starts;
    const float2 factor = *columns.factors;
    ring.pop(segments);
    columns.advance();
    float c[2][4];
    multiplyBlock<Codec>(block.codes, b, start, c);
    const float2 scale[2] = {__half22float2(asHalves(block.scales.x)),
                             __half22float2(asHalves(block.scales.y))};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i][0] = fmaf(c[i][0], scale[i].x * factor.x, sum[i][0]);
      sum[i][1] = fmaf(c[i][1], scale[i].x * factor.y, sum[i][1]);
      sum[i][2] = fmaf(c[i][2], scale[i].y * factor.x, sum[i][2]);
      sum[i][3] = fmaf(c[i][3], scale[i].y * factor.y, sum[i][3]);
    }
  }
  return kb;
}

// What belongs to one staged block of row i of x.
__device__ __forceinline__ void storeFactor(const GemvShared& shared, int block, int i,
                                            float factor, float start) {
  const int pair = block * shared.shape.pairs + i / 2, j = i % 2;
  float* starts = reinterpret_cast<float*>(shared.starts() + pair);
  starts[j] = starts[j + 2] = start;
  reinterpret_cast<float*>(shared.factors() + pair)[j] = factor;
}

// Eight activations of row i, of a block whose octets lie in eight lanes, are octet `octet` of what
// is held.
//
// The largest of the 64 lies just below 2^12, so that the 16ths are far from subnormal. The factor
// takes that, and the 2^24 of the codes, back.
template <class Codec>
__device__ __forceinline__ void packBlock(const GemvShared& shared, float (&v)[8], int octet, int i,
                                          float weight) {
  float largest = 0.f;
#pragma unroll
  for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(v[j]));
#pragma unroll
  for (int bits = 1; bits < 8; bits <<= 1)
    largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, bits));
  const float scale = rowScale(largest), inverse = 4096.f * powerInverse(scale);
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] *= j < 4 ? inverse : inverse * Codec::kUpper;
  const uint4 packed = packOctet(v);
  shared.octets()[i * shared.shape.pitch + octet] = packed;
  const float2 a = __half22float2(asHalves(packed.x)), b = __half22float2(asHalves(packed.y)),
               c = __half22float2(asHalves(packed.z)), d = __half22float2(asHalves(packed.w));
  float total = (a.x + a.y) + (b.x + b.y) + ((c.x + c.y) + (d.x + d.y)) * (1 / Codec::kUpper);
#pragma unroll
  for (int bits = 1; bits < 8; bits <<= 1) total += __shfl_xor_sync(kAll, total, bits);
  if (threadIdx.x % 8 == 0) {
    storeFactor(shared, octet / 8, i, scale * (weight * 4096.f),
                total * (-Codec::kOffset / (1 << 24)));
  }
}

// Columns [first, first + 8) of a row of k; zero beyond its end. Aligned: 16 bytes a load.
struct EightColumns {
  float v[8];
  __device__ __forceinline__ void load(const float* row, int first, int k, bool aligned) {
    if (aligned && first + 8 <= k) {
      const float4 low = *reinterpret_cast<const float4*>(row + first),
                   high = *reinterpret_cast<const float4*>(row + first + 4);
      v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
      v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = first + i < k ? row[first + i] : 0.f;
    }
  }
  __device__ __forceinline__ float squares() const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(v[i], v[i], sum);
    return sum;
  }
};
__device__ __forceinline__ bool isAligned(const float* rows, int k) {
  return k % 4 == 0 && reinterpret_cast<uintptr_t>(rows) % 16 == 0;
}

// Tasks of a warp, each 32 octets of a row: loads of several are in flight before the first is
// packed.
template <int kAhead, class Load, class Pack>
__device__ __forceinline__ void stageTasks(int tasks, int warp, int warps, const Load& load,
                                           const Pack& pack) {
#pragma unroll 1
  for (int task = warp; task < tasks; task += kAhead * warps) {
    decltype(load(0)) loaded[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (task + j * warps < tasks) loaded[j] = load(task + j * warps);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (task + j * warps < tasks) pack(task + j * warps, loaded[j]);
    }
  }
}

// Activations of 1 to 8 rows before a product with a norm of its own: rowOf(i) is row i.
template <class RowOf>
struct NormedRows {
  RowOf rowOf;
  ec_norm norm;
  int n, k;

  // What does not depend on the rows: gamma into shared memory. A barrier follows.
  __device__ __forceinline__ void holdGamma(const GemvShared& shared,
                                            const GemvShape& shape) const {
    for (int i = threadIdx.x; i < shape.gamma; i += blockDim.x)
      shared.gamma()[i] = i < k ? norm.gamma[i] : 0.f;
  }

  // The share of warp `warp` of `warps` in 1 / sqrt(mean + eps) of a norm of several groups.
  __device__ __forceinline__ void findInverses(const GemvShared& shared, int warp,
                                               int warps) const {
    if (groupsOf(norm) == 1) return;
    const int lane = threadIdx.x % kWarp, size = k / norm.groups;
    for (int i = warp; i < n * norm.groups; i += warps) {
      const float* from = rowOf(i / norm.groups) + i % norm.groups * size;
      const bool aligned = isAligned(from, size);
      float sum = 0.f;
      for (int first = 8 * lane; first < size; first += 8 * kWarp) {
        EightColumns x;
        x.load(from, first, size, aligned);
        sum += x.squares();
      }
      sum = warpSum(sum);
      if (lane == 0) shared.inverse()[i] = 1.f / sqrtf(sum / size + norm.eps);
    }
  }

  // The share of warp `warp` of `warps` in blocks [origin, origin + staged) of all rows.
  template <class Codec>
  __device__ __forceinline__ void stage(const GemvShared& shared, int origin, int staged, int warp,
                                        int warps) const {
    const int lane = threadIdx.x % kWarp;
    const int left = ceilDiv(ceilDiv(k, kGroup) - origin, kChunkBlocks);
    const int chunks = min(staged / kChunkBlocks, left);
    const auto columnOf = [&](int task) {
      return (origin + task % chunks * kChunkBlocks) * kGroup + 8 * lane;
    };
    const auto load = [&](int task) {
      const float* row = rowOf(task / chunks);
      EightColumns x;
      x.load(row, columnOf(task), k, isAligned(row, k));
      return x;
    };
    stageTasks<1>(n * chunks, warp, warps, load, [&](int task, EightColumns& x) {
      const int i = task / chunks, octet = task % chunks * kChunk + lane;
      if (norm.gamma) normalise(shared, x, i, columnOf(task));
      packBlock<Codec>(shared, x.v, octet, i, 1.f);
    });
  }

  // Warp i < n, after all columns have been staged: what a norm over the whole of row i multiplies
  // its results by.
  __device__ __forceinline__ void findFactor(const GemvShared& shared, int i) const {
    if (!norm.gamma || norm.groups > 1 || i >= n) return;
    float sum = 0.f;
    for (int c = threadIdx.x % kWarp; c < shared.shape.chunks; c += kWarp)
      sum += shared.squares()[i * shared.shape.chunks + c];
    sum = warpSum(sum);
    if (threadIdx.x % kWarp == 0) shared.inverse()[i] = 1.f / sqrtf(sum / k + norm.eps);
  }
  __device__ __forceinline__ float factor(const GemvShared& shared, int i) const {
    return norm.gamma && norm.groups == 1 ? shared.inverse()[i] : 1.f;
  }

 private:
  __device__ __forceinline__ void normalise(const GemvShared& shared, EightColumns& x, int i,
                                            int column) const {
    if (norm.groups > 1) {
      const float* inverse = shared.inverse() + i * norm.groups;
      const int size = k / norm.groups, group = column / size;
      const bool oneGroup = column + 8 <= (group + 1) * size;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (column + j < k) x.v[j] *= inverse[oneGroup ? group : (column + j) / size];
      }
    } else {
      const float sum = warpSum(x.squares());
      if (threadIdx.x % kWarp == 0)
        shared.squares()[i * shared.shape.chunks + column / (8 * kChunk)] = sum;
    }
    EightColumns gamma;
    if (shared.shape.gamma) {
      gamma.load(shared.gamma(), column, column + 8, true);
    } else {
      gamma.load(norm.gamma, column, k, isAligned(norm.gamma, k));
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) x.v[j] *= gamma.v[j];
  }
};

template <class RowOf>
__device__ __forceinline__ NormedRows<RowOf> normedRows(const RowOf& rowOf, const ec_norm& norm,
                                                        int n, int k) {
  return {rowOf, norm, n, k};
}

// Adds up the warps' sums of 32 rows and hands (column, row, value) to `take`, a warp to a column.
template <int kWarps, class Take>
__device__ __forceinline__ void reduceWarps(const float (&sum)[2][4], const GemvShared& shared,
                                            int n, const Take& take) {
  const int lane = threadIdx.x % kWarp, warp = warpIndex(), g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (2 * t + j >= n) continue;
    float* mine = shared.sums() + (warp * n + 2 * t + j) * 33 + 4 * g;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mine[2 * i] = sum[i][j];
      mine[2 * i + 1] = sum[i][2 + j];
    }
  }
  __syncthreads();
  if (warp >= n) return;
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += shared.sums()[(w * n + warp) * 33 + lane];
  take(warp, lane, total);
}

// The CTA's segments, all of the same k columns, times the rows. take(segment, i, r, y) gets row r
// of a segment times row i. What is `ahead` is asked for before the last segment is added: the ring
// has requested it by then, or nearly.
template <class Codec, int kWarps, class RingOf, class Segments, class Rows, class Take>
__device__ __forceinline__ void multiplySegments(RingOf& ring, const Segments& segments,
                                                 const Rows& rows, const GemvShared& shared,
                                                 const Ahead& ahead, const Take& take) {
  const int warp = warpIndex(), g = threadIdx.x % kWarp / 4;
  const int blocks = ceilDiv(rows.k, kGroup), n = rows.n, staged = shared.shape.staged;
  const int column = g < n ? g : n - 1;  // what it adds there is never read
  if (groupsOf(rows.norm) > 1) {
    rows.findInverses(shared, warp, kWarps);
    __syncthreads();
  }
#pragma unroll 1
  for (int segment = 0; segment < segments.size(); ++segment) {
    if (segment + 1 == segments.size()) prefetch(ahead);
    float sum[2][4] = {};
    int kb = warp;
#pragma unroll 1
    for (int origin = 0; origin < blocks; origin += staged) {
      if (staged < blocks || segment == 0) {
        if (segment > 0 || origin > 0) __syncthreads();
        rows.template stage<Codec>(shared, origin, staged, warp, kWarps);
        __syncthreads();
      }
      const int end = min(origin + staged, blocks);
      if (segment == 0 && end == blocks) rows.findFactor(shared, warp);
      const Columns columns(shared, column, kb - origin, kWarps);
      kb = addBlocks<Codec, kWarps>(ring, segments, kb, end, columns, sum);
    }
    if (segment > 0) __syncthreads();  // the sums of the one before have been read
    reduceWarps<kWarps>(sum, shared, n, [&](int i, int r, float total) {
      take(segment, i, r, total * rows.factor(shared, i));
    });
  }
}

}  // namespace ec::cuda

#endif  // EC_CUDA_GEMV_CUH
