// Products with packed matrices: y = x W.
//
// A matrix lies by outputs: a row of bytes for each, its weights along the contraction axis, padded with zeros to a
// multiple of 32, then the float16 scales of its groups of 32 (int4: scale and offset of each).  A warp computes two
// outputs at a time: each lane reads 16 bytes of either row, so that the warp reads 512 bytes side by side, several times
// before it computes, since memory is slow to answer.  x lies in shared memory, where the gaps of `padded` let all lanes read
// at once.  The order of the sum is that of the lanes' own parts, then a tree over the lanes: the same for one row of x or
// for many.

#define COLUMNS_OF_A_WARP 1024  // of x, at most, in one reading: a run of columns in shared memory is a multiple of it

// What the groups of 32 have: nothing, a scale, or a scale and an offset.
struct NoScale {
    __device__ __forceinline__ float sum(float part, float, float sum) const { return sum + part; }
};
struct Scale {
    u16 scale;
    __device__ __forceinline__ float sum(float part, float, float sum) const { return fmaf(from_float16(scale), part, sum); }
};
struct ScaleAndOffset {
    u32 both;
    __device__ __forceinline__ float sum(float part, float plain, float sum) const {
        return fmaf(from_float16(both >> 16), plain, fmaf(from_float16(both & 0xffffu), part, sum));
    }
};

// For each kind: how many values 16 bytes hold, four of them as float32, and one by itself.  groups: what lies behind the
// row's weights.

struct Float32 {
    static const int VALUES = 4;
    typedef NoScale Group;
    __device__ static __forceinline__ float4 four(uint4 w, int) {
        return make_float4(__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z), __uint_as_float(w.w));
    }
    __device__ static __forceinline__ Group group(const u16*, int) { return Group(); }
    __device__ static __forceinline__ float value(const u8* row, const u16*, int at) {
        return reinterpret_cast<const float*>(row)[at];
    }
};

struct Bfloat16 {
    static const int VALUES = 8;
    typedef NoScale Group;
    __device__ static __forceinline__ float4 four(uint4 w, int i) {
        const u32 low = i == 0 ? w.x : w.z, high = i == 0 ? w.y : w.w;
        return make_float4(from_bfloat16(low), __uint_as_float(low & 0xffff0000u), from_bfloat16(high),
                           __uint_as_float(high & 0xffff0000u));
    }
    __device__ static __forceinline__ Group group(const u16*, int) { return Group(); }
    __device__ static __forceinline__ float value(const u8* row, const u16*, int at) {
        return from_bfloat16(reinterpret_cast<const u16*>(row)[at]);
    }
};

struct Float16 {
    static const int VALUES = 8;
    typedef NoScale Group;
    __device__ static __forceinline__ float4 four(uint4 w, int i) {
        const u32 low = i == 0 ? w.x : w.z, high = i == 0 ? w.y : w.w;
        return make_float4(from_float16(low & 0xffffu), from_float16(low >> 16), from_float16(high & 0xffffu),
                           from_float16(high >> 16));
    }
    __device__ static __forceinline__ Group group(const u16*, int) { return Group(); }
    __device__ static __forceinline__ float value(const u8* row, const u16*, int at) {
        return from_float16(reinterpret_cast<const u16*>(row)[at]);
    }
};

__device__ __forceinline__ u32 word_of(uint4 w, int i) { return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w; }

struct Int8 {  // value = scale * q
    static const int VALUES = 16;
    typedef Scale Group;
    __device__ static __forceinline__ float4 four(uint4 w, int i) {
        const u32 q = word_of(w, i);
        return make_float4((float)(i8)(q & 0xffu), (float)(i8)(q >> 8 & 0xffu), (float)(i8)(q >> 16 & 0xffu), (float)(i8)(q >> 24));
    }
    __device__ static __forceinline__ Group group(const u16* groups, int at) { return {groups[at / 32]}; }
    __device__ static __forceinline__ float value(const u8* row, const u16* groups, int at) {
        return from_float16(groups[at / 32]) * (float)reinterpret_cast<const i8*>(row)[at];
    }
};

struct Int4 {  // value = scale * q + offset; column 2j in the low four bits of a byte
    static const int VALUES = 32;
    typedef ScaleAndOffset Group;
    __device__ static __forceinline__ float4 four(uint4 w, int i) {
        const u32 q = word_of(w, i / 2) >> (16 * (i % 2));
        return make_float4((float)(q & 0xfu), (float)(q >> 4 & 0xfu), (float)(q >> 8 & 0xfu), (float)(q >> 12 & 0xfu));
    }
    __device__ static __forceinline__ Group group(const u16* groups, int at) {
        return {reinterpret_cast<const u32*>(groups)[at / 32]};
    }
    __device__ static __forceinline__ float value(const u8* row, const u16* groups, int at) {
        float q = (float)(row[at / 2] >> (4 * (at % 2)) & 0xf);
        return from_float16(groups[at / 32 * 2]) * q + from_float16(groups[at / 32 * 2 + 1]);
    }
};

template <class Kind>
__device__ __forceinline__ int weight_bytes(int k) {  // of a row, before its scales
    return (k + 31) / 32 * 32 / Kind::VALUES * 16;
}

// Four numbers of a row of k, zeros behind its end.
__device__ __forceinline__ float4 four_of(const float* row, int at, int k) {
    if (at + 4 <= k && k % 4 == 0) return *reinterpret_cast<const float4*>(row + at);
    return make_float4(at < k ? row[at] : 0.0f, at + 1 < k ? row[at + 1] : 0.0f, at + 2 < k ? row[at + 2] : 0.0f,
                       at + 3 < k ? row[at + 3] : 0.0f);
}

// Where column i lies in shared memory: lanes that read four numbers each, 4, 8, 16 or 32 columns apart, meet no bank twice.
__device__ __forceinline__ int padded(int i) { return i + i / 32 * 4; }

// Columns first … first + count - 1 of ROWS rows of x, from row `from` on, zeros where there is nothing; and the sums of
// groups of 32, behind them.  count: a multiple of COLUMNS_OF_A_WARP.  Every thread of the block takes part.
template <int ROWS>
__device__ __forceinline__ void load_x(const float* x, int from, int rows, int k, int first, int count, float* shared) {
    float* plain = shared + ROWS * padded(count);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        for (int i = 4 * threadIdx.x; i < count; i += 4 * blockDim.x) {
            const float4 four = from + r < rows ? four_of(x + (size_t)(from + r) * k, first + i, k) : make_float4(0, 0, 0, 0);
            *reinterpret_cast<float4*>(shared + r * padded(count) + padded(i)) = four;
            float sum = (four.x + four.y) + (four.z + four.w);
            for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
            if (i % 32 == 0) plain[r * (count / 32) + i / 32] = sum;
        }
    }
}

// READINGS times 16 bytes of the rows a and b, from byte `at` on, with x: added to the lane's part of both sums.
template <class Kind, int ROWS, int READINGS>
__device__ __forceinline__ void add_readings(const u8* a, const u8* b, int end, int at, const float* shared, int column, int chunk,
                                             float* a_sum, float* b_sum) {
    constexpr int SPAN = 16 * WARP;
    const u16 *a_groups = reinterpret_cast<const u16*>(a + end), *b_groups = reinterpret_cast<const u16*>(b + end);
    uint4 a_bytes[READINGS], b_bytes[READINGS];
    typename Kind::Group a_group[READINGS], b_group[READINGS];
#pragma unroll
    for (int i = 0; i < READINGS; i++) {
        a_bytes[i] = *reinterpret_cast<const uint4*>(a + at + i * SPAN);
        b_bytes[i] = *reinterpret_cast<const uint4*>(b + at + i * SPAN);
        a_group[i] = Kind::group(a_groups, (at + i * SPAN) / 16 * Kind::VALUES);
        b_group[i] = Kind::group(b_groups, (at + i * SPAN) / 16 * Kind::VALUES);
    }
#pragma unroll
    for (int i = 0; i < READINGS; i++) {
        const int there = (at + i * SPAN) / 16 * Kind::VALUES - column;
        float a_part[ROWS], b_part[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) a_part[r] = b_part[r] = 0.0f;
#pragma unroll
        for (int j = 0; j < Kind::VALUES; j += 4) {
            const float4 c = Kind::four(a_bytes[i], j / 4), d = Kind::four(b_bytes[i], j / 4);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float4 z = *reinterpret_cast<const float4*>(shared + r * padded(chunk) + padded(there + j));
                a_part[r] = fmaf(c.w, z.w, fmaf(c.z, z.z, fmaf(c.y, z.y, fmaf(c.x, z.x, a_part[r]))));
                b_part[r] = fmaf(d.w, z.w, fmaf(d.z, z.z, fmaf(d.y, z.y, fmaf(d.x, z.x, b_part[r]))));
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float plain = Kind::VALUES == 32 ? shared[ROWS * padded(chunk) + r * (chunk / 32) + there / 32] : 0.0f;
            a_sum[r] = a_group[i].sum(a_part[r], plain, a_sum[r]);
            b_sum[r] = b_group[i].sum(b_part[r], plain, b_sum[r]);
        }
    }
}

// ROWS rows of x at once, from row blockIdx.y * ROWS on; the blocks along x take the outputs in turn.  chunk: columns of x in
// shared memory at a time, a multiple of COLUMNS_OF_A_WARP.
// GATED: gate and up lie side by side, a warp computes one of either, and y is activation(gate) * up  [rows, outputs / 2]
template <class Kind, int ROWS, bool GATED>
__device__ void multiply(const float* x, int rows, int k, const u8* w, int row_bytes, int outputs, int kind, int chunk, float* y) {
    DYNAMIC_SHARED(float, shared);
    constexpr int READINGS = ROWS <= 2 ? 4 : 2, SPAN = 16 * WARP;
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP, half = outputs / 2;
    const int pairs = GATED ? half : (outputs + 1) / 2, from = blockIdx.y * ROWS, end = weight_bytes<Kind>(k);
    for (int begin = blockIdx.x * warps; begin < pairs; begin += gridDim.x * warps) {  // the same for all warps of a block
        const int pair = begin + threadIdx.x / WARP, first = GATED ? pair : 2 * pair;
        const int second = GATED ? first + half : first + 1 < outputs ? first + 1 : first;
        const u8 *a = w + (size_t)first * row_bytes, *b = w + (size_t)second * row_bytes;
        float a_sum[ROWS], b_sum[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) a_sum[r] = b_sum[r] = 0.0f;
        for (int column = 0; column < k; column += chunk) {
            if (k > chunk || begin == blockIdx.x * warps) {
                __syncthreads();  // the last run of columns is no longer read
                load_x<ROWS>(x, from, rows, k, column, chunk, shared);
                __syncthreads();
            }
            const int stop = pair < pairs ? min(end, (column + chunk) / Kind::VALUES * 16) : 0;
            int at = column / Kind::VALUES * 16 + 16 * lane;
            for (; at + (READINGS - 1) * SPAN < stop; at += READINGS * SPAN)
                add_readings<Kind, ROWS, READINGS>(a, b, end, at, shared, column, chunk, a_sum, b_sum);
            for (; at < stop; at += SPAN) add_readings<Kind, ROWS, 1>(a, b, end, at, shared, column, chunk, a_sum, b_sum);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float a_total = warp_sum(a_sum[r]), b_total = warp_sum(b_sum[r]);
            if (lane != 0 || from + r >= rows || pair >= pairs) continue;
            if (GATED) {
                y[(size_t)(from + r) * half + first] = activation(a_total, kind) * b_total;
            } else {
                y[(size_t)(from + r) * outputs + first] = a_total;
                if (second != first) y[(size_t)(from + r) * outputs + second] = b_total;
            }
        }
    }
}

// The matrix that a token was sent to: pair blockIdx.y of row blockIdx.y / shared_by of x and matrix choice[blockIdx.y].
template <class Kind>
__device__ void multiply_chosen(const float* x, int shared_by, int k, const u8* w, int row_bytes, int outputs,
                                const i64* choice, float* y) {
    const size_t pair = blockIdx.y;
    const u8* chosen = w + (size_t)choice[pair] * outputs * row_bytes;
    const int lane = threadIdx.x % WARP, output = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (output >= outputs) return;
    const u8* row = chosen + (size_t)output * row_bytes;
    const int end = weight_bytes<Kind>(k);
    const u16* groups = reinterpret_cast<const u16*>(row + end);
    float sum = 0.0f;
    for (int at = 16 * lane; at < end; at += 16 * WARP) {
        const int column = at / 16 * Kind::VALUES;
        const uint4 bytes = *reinterpret_cast<const uint4*>(row + at);
        float part = 0.0f, plain = 0.0f;
#pragma unroll
        for (int j = 0; j < Kind::VALUES; j += 4) {
            const float4 c = Kind::four(bytes, j / 4), z = four_of(x + pair / shared_by * k, column + j, k);
            part = fmaf(c.w, z.w, fmaf(c.z, z.z, fmaf(c.y, z.y, fmaf(c.x, z.x, part))));
            plain += (z.x + z.y) + (z.z + z.w);
        }
        sum = Kind::group(groups, column).sum(part, plain, sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) y[pair * outputs + output] = sum;
}

// Rows of the matrix as float32: a token's embedding, zeros where another rank holds it.  One block for each token.
template <class Kind>
__device__ void embed(const i64* tokens, i64 start, i64 stop, const u8* w, int row_bytes, int k, float* y) {
    const i64 token = tokens[blockIdx.x];
    const bool mine = token >= start && token < stop;
    const u8* row = w + (size_t)(mine ? token - start : 0) * row_bytes;
    const u16* groups = reinterpret_cast<const u16*>(row + weight_bytes<Kind>(k));
    for (int i = threadIdx.x; i < k; i += blockDim.x) y[(size_t)blockIdx.x * k + i] = mine ? Kind::value(row, groups, i) : 0.0f;
}

// For the library's product of many rows: numbers as the sum of two of bfloat16.  low may be null: only the nearest is kept.

__device__ __forceinline__ void split(float x, u16* high, u16* low, size_t at) {
    high[at] = to_bfloat16(x);
    if (low) low[at] = to_bfloat16(x - from_bfloat16(high[at]));
}

extern "C" __global__ void split_rows(const float* x, long long count, unsigned short* high, unsigned short* low) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) split(x[i], high, low, i);
}

// A run of outputs, [outputs, k].  One block for each.
template <class Kind>
__device__ void unpack(const u8* w, int row_bytes, int k, u16* high, u16* low) {
    const u8* row = w + (size_t)blockIdx.x * row_bytes;
    const u16* groups = reinterpret_cast<const u16*>(row + weight_bytes<Kind>(k));
    for (int i = threadIdx.x; i < k; i += blockDim.x) split(Kind::value(row, groups, i), high, low, (size_t)blockIdx.x * k + i);
}
