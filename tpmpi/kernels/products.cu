// Products with packed matrices, y = x W: of few rows with float32 (tensor.cu has the other kinds), and of experts.
//
// A matrix lies by outputs: a row of bytes for each, its weights along the contraction axis, padded with zeros to a
// multiple of 32, then the float16 scales of its groups of 32 (int4: scale and offset of each).  A warp computes two
// outputs: each lane reads 16 bytes of either row at a time, so that the warp reads 512 bytes side by side.  The order of
// the sum is that of the lanes' own parts, then a tree over the lanes: the same for one row of x or for many.

template <int VALUES>
__device__ __forceinline__ void load_x(const float* x, int at, int k, float* out) {  // zeros behind the end of a row
    if (at + VALUES <= k && k % 4 == 0) {
#pragma unroll
        for (int i = 0; i < VALUES; i += 4) {
            float4 four = *reinterpret_cast<const float4*>(x + at + i);
            out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < VALUES; i++) out[i] = at + i < k ? x[at + i] : 0.0f;
    }
}

// For each kind: how many values 16 bytes hold, and what they add to a sum.  groups: the scales behind the row's weights.

struct Float32 {
    static const int VALUES = 4;
    __device__ static __forceinline__ float add(uint4 w, const u16*, int, const float* x, float sum) {
        sum = fmaf(__uint_as_float(w.x), x[0], sum);
        sum = fmaf(__uint_as_float(w.y), x[1], sum);
        sum = fmaf(__uint_as_float(w.z), x[2], sum);
        return fmaf(__uint_as_float(w.w), x[3], sum);
    }
    __device__ static __forceinline__ float value(const u8* row, const u16*, int at) {
        return reinterpret_cast<const float*>(row)[at];
    }
};

struct Bfloat16 {
    static const int VALUES = 8;
    __device__ static __forceinline__ float add(uint4 w, const u16*, int, const float* x, float sum) {
        const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum = fmaf(from_bfloat16(words[i] & 0xffffu), x[2 * i], sum);
            sum = fmaf(__uint_as_float(words[i] & 0xffff0000u), x[2 * i + 1], sum);
        }
        return sum;
    }
    __device__ static __forceinline__ float value(const u8* row, const u16*, int at) {
        return from_bfloat16(reinterpret_cast<const u16*>(row)[at]);
    }
};

struct Float16 {
    static const int VALUES = 8;
    __device__ static __forceinline__ float add(uint4 w, const u16*, int, const float* x, float sum) {
        const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum = fmaf(from_float16(words[i] & 0xffffu), x[2 * i], sum);
            sum = fmaf(from_float16(words[i] >> 16), x[2 * i + 1], sum);
        }
        return sum;
    }
    __device__ static __forceinline__ float value(const u8* row, const u16*, int at) {
        return from_float16(reinterpret_cast<const u16*>(row)[at]);
    }
    __device__ static __forceinline__ void four(const u8* row, const u16*, int at, float* out) {  // from a multiple of 4 on
        const uint2 two = *reinterpret_cast<const uint2*>(row + 2 * at);
        out[0] = from_float16(two.x & 0xffffu), out[1] = from_float16(two.x >> 16);
        out[2] = from_float16(two.y & 0xffffu), out[3] = from_float16(two.y >> 16);
    }
};

struct Int8 {  // value = scale * q
    static const int VALUES = 16;
    __device__ static __forceinline__ float add(uint4 w, const u16* groups, int at, const float* x, float sum) {
        const u32 words[4] = {w.x, w.y, w.z, w.w};
        float part = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; i++) part = fmaf((float)(i8)(words[i / 4] >> (8 * (i % 4)) & 0xffu), x[i], part);
        return fmaf(from_float16(groups[at / 32]), part, sum);
    }
    __device__ static __forceinline__ float value(const u8* row, const u16* groups, int at) {
        return from_float16(groups[at / 32]) * (float)reinterpret_cast<const i8*>(row)[at];
    }
    __device__ static __forceinline__ void four(const u8* row, const u16* groups, int at, float* out) {
        const u32 q = *reinterpret_cast<const u32*>(row + at);
        const float scale = from_float16(groups[at / 32]);
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = scale * (float)(i8)(q >> (8 * i) & 0xffu);
    }
};

struct Int4 {  // value = scale * q + offset; column 2j in the low four bits of a byte
    static const int VALUES = 32;
    __device__ static __forceinline__ float add(uint4 w, const u16* groups, int at, const float* x, float sum) {
        const u32 words[4] = {w.x, w.y, w.z, w.w};
        float part = 0.0f, plain = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            part = fmaf((float)(words[i / 8] >> (4 * (i % 8)) & 0xfu), x[i], part);
            plain += x[i];
        }
        sum = fmaf(from_float16(groups[at / 32 * 2]), part, sum);
        return fmaf(from_float16(groups[at / 32 * 2 + 1]), plain, sum);
    }
    __device__ static __forceinline__ float value(const u8* row, const u16* groups, int at) {
        float q = (float)(row[at / 2] >> (4 * (at % 2)) & 0xf);
        return from_float16(groups[at / 32 * 2]) * q + from_float16(groups[at / 32 * 2 + 1]);
    }
    __device__ static __forceinline__ void four(const u8* row, const u16* groups, int at, float* out) {
        const u32 q = *reinterpret_cast<const u16*>(row + at / 2);
        const float scale = from_float16(groups[at / 32 * 2]), offset = from_float16(groups[at / 32 * 2 + 1]);
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = scale * (float)(q >> (4 * i) & 0xfu) + offset;
    }
};

template <class Kind>
__device__ __forceinline__ int weight_bytes(int k) {  // of a row, before its scales
    return (k + 31) / 32 * 32 / Kind::VALUES * 16;
}

// ROWS rows of x at once, from row blockIdx.y * ROWS on; blockDim: 32 times the warps.
// GATED: gate and up lie side by side, a warp computes one of either, and y is activation(gate) * up  [rows, outputs / 2]
template <class Kind, int ROWS, bool GATED>
__device__ void multiply(const float* x, int rows, int k, const u8* w, int row_bytes, int outputs, int kind, float* y) {
    const int lane = threadIdx.x % WARP, warp = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    const int half = outputs / 2, first = GATED ? warp : 2 * warp;
    if (first >= (GATED ? half : outputs)) return;
    const int second = GATED ? first + half : first + 1 < outputs ? first + 1 : first;
    const int from = blockIdx.y * ROWS, end = weight_bytes<Kind>(k);
    const u8 *a = w + (size_t)first * row_bytes, *b = w + (size_t)second * row_bytes;
    const u16 *a_groups = reinterpret_cast<const u16*>(a + end), *b_groups = reinterpret_cast<const u16*>(b + end);
    float a_sum[ROWS], b_sum[ROWS], part[Kind::VALUES];
#pragma unroll
    for (int r = 0; r < ROWS; r++) a_sum[r] = b_sum[r] = 0.0f;
    for (int at = 16 * lane; at < end; at += 16 * WARP) {
        const uint4 a_bytes = *reinterpret_cast<const uint4*>(a + at), b_bytes = *reinterpret_cast<const uint4*>(b + at);
        const int column = at / 16 * Kind::VALUES;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = from + r < rows ? from + r : rows - 1;
            load_x<Kind::VALUES>(x + (size_t)row * k, column, k, part);
            a_sum[r] = Kind::add(a_bytes, a_groups, column, part, a_sum[r]);
            b_sum[r] = Kind::add(b_bytes, b_groups, column, part, b_sum[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float a_total = warp_sum(a_sum[r]), b_total = warp_sum(b_sum[r]);
        if (lane != 0 || from + r >= rows) continue;
        if (GATED) {
            y[(size_t)(from + r) * half + first] = activation(a_total, kind) * b_total;
        } else {
            y[(size_t)(from + r) * outputs + first] = a_total;
            if (second != first) y[(size_t)(from + r) * outputs + second] = b_total;
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
    float sum = 0.0f, part[Kind::VALUES];
    for (int at = 16 * lane; at < end; at += 16 * WARP) {
        const int column = at / 16 * Kind::VALUES;
        load_x<Kind::VALUES>(x + pair / shared_by * k, column, k, part);
        sum = Kind::add(*reinterpret_cast<const uint4*>(row + at), groups, column, part, sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) y[pair * outputs + output] = sum;
}

// Rows of the matrix as float32: a token's embedding, zeros where another rank holds it.  blockIdx.x: the token
template <class Kind>
__device__ void embed(const i64* tokens, i64 start, i64 stop, const u8* w, int row_bytes, int k, float* y) {
    const i64 token = tokens[blockIdx.x];
    const bool mine = token >= start && token < stop;
    const u8* row = w + (size_t)(mine ? token - start : 0) * row_bytes;
    const u16* groups = reinterpret_cast<const u16*>(row + weight_bytes<Kind>(k));
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < k; i += gridDim.y * blockDim.x)
        y[(size_t)blockIdx.x * k + i] = mine ? Kind::value(row, groups, i) : 0.0f;
}

extern "C" __global__ void split_rows(const float* x, long long count, unsigned short* high, unsigned short* low) {
    const long long i = 4 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    if (i + 4 <= count) {
        float four[4];
        load<4>(x + i, four);
        store_halves<4>(high + i, low ? low + i : low, four);
    } else {
        for (long long j = i; j < count; j++) store_halves<1>(high + j, low ? low + j : low, x + j);
    }
}

// A run of outputs, [outputs, k].  One block for each.
template <class Kind>
__device__ void unpack(const u8* w, int row_bytes, int k, u16* high, u16* low) {
    const u8* row = w + (size_t)blockIdx.x * row_bytes;
    const u16* groups = reinterpret_cast<const u16*>(row + weight_bytes<Kind>(k));
    high += (size_t)blockIdx.x * k;
    if (low) low += (size_t)blockIdx.x * k;
    for (int i = 4 * threadIdx.x; i < k; i += 4 * blockDim.x) {
        float four[4];
        if (k % 4 == 0) Kind::four(row, groups, i, four);
        else for (int j = 0; j < 4; j++) four[j] = i + j < k ? Kind::value(row, groups, i + j) : 0.0f;
        if (k % 4 == 0) store_halves<4>(high + i, low ? low + i : low, four);
        else for (int j = 0; j < 4 && i + j < k; j++) store_halves<1>(high + i + j, low ? low + i + j : low, four + j);
    }
}
