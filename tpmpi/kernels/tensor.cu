// Products of few rows of x with packed matrices, y = x W, on tensor cores.
//
// A matrix lies by outputs, as in products.cu.  Tensor cores multiply numbers of bfloat16 and add float32: a weight of
// bfloat16, int8 or int4 is such a number, one of float16 the sum of two, and a float32 of x the sum of three, which are
// columns of their own.  So every product is exact.
//
// A block computes 16 outputs at a time, and then others.  Its 8 warps share the contraction axis, and each goes through its
// part by groups of 32: a lane reads 8 weights of two outputs, as they lie, and what the tensor core calls columns 2c, 2c + 1,
// 2c + 8 and 2c + 9 of 16 are four of these 8, since the order of the axis is free as long as x has the same.  Memory is slow to
// answer: the next DEPTH groups are asked for, of the next outputs, too, before it computes with the last.  The warps' sums, and
// the three parts of x, are added in their order, which depends on nothing but the length of the axis.

#define WARPS 8
#define PARTS 3  // of x

// For each kind: what a lane reads of an output and a group, and that as four pairs of bfloat16, of FACTORS summands each.
// SCALED: whether groups have a scale; OFFSET: and an offset.

struct Bfloat16 {
    typedef uint4 Eight;
    static const int FACTORS = 1;
    static const bool SCALED = false, OFFSET = false;
    __device__ static __forceinline__ void pairs(uint4 w, int, u32* out) {
        out[0] = w.x, out[1] = w.y, out[2] = w.z, out[3] = w.w;
    }
};

struct Float16 {
    typedef uint4 Eight;
    static const int FACTORS = 2;
    static const bool SCALED = false, OFFSET = false;
    __device__ static __forceinline__ void pairs(uint4 w, int factor, u32* out) {
        const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float low = from_float16(words[i] & 0xffffu), high = from_float16(words[i] >> 16);
            if (factor == 1) low = rest(low), high = rest(high);
            out[i] = upper_halves(low, high);
        }
    }
};

struct Int8 {  // 128 + the lower seven bits, less 128, or 256 where the sign is set
    typedef uint2 Eight;
    static const int FACTORS = 1;
    static const bool SCALED = true, OFFSET = false;
    __device__ static __forceinline__ u32 pair(u32 bytes) {
        return add_pairs((bytes & 0x007f007fu) | 0x43004300u, (bytes & 0x00800080u) | 0xc300c300u);
    }
    __device__ static __forceinline__ void pairs(uint2 w, int, u32* out) {
        out[0] = pair(__byte_perm(w.x, 0, 0x4140)), out[1] = pair(__byte_perm(w.x, 0, 0x4342));
        out[2] = pair(__byte_perm(w.y, 0, 0x4140)), out[3] = pair(__byte_perm(w.y, 0, 0x4342));
    }
};

struct Int4 {  // 128 + q, less 128; the weights 0 and 4, 1 and 5, … make pairs
    typedef u32 Eight;
    static const int FACTORS = 1;
    static const bool SCALED = true, OFFSET = true;
    __device__ static __forceinline__ void pairs(u32 w, int, u32* out) {
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = add_pairs((w >> (4 * i) & 0x000f000fu) | 0x43004300u, 0xc300c300u);
    }
    __device__ static __forceinline__ int place(int i) { return i / 8 * 8 + i % 4 * 2 + i % 8 / 4; }  // of x among its eight
};

// Numbers of bfloat16 from one column of x in shared memory to the next: so that eight lanes read from all banks.
__device__ __forceinline__ int column_stride(int groups) { return 32 * groups + (groups % 2 == 0 ? 32 : 0); }

// Groups of a warp's part of the axis: a multiple of 8, whose weights and scales fill whole sectors of memory.
__device__ __forceinline__ int warp_groups(int k) { return ((k + 31) / 32 + WARPS * 8 - 1) / (WARPS * 8) * 8; }

// Four numbers of a row, of which `left` are there and the others are 0.
template <bool ALIGNED>
__device__ __forceinline__ float4 four_of(const float* source, int left) {
    if (ALIGNED) return left > 0 ? *reinterpret_cast<const float4*>(source) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    return make_float4(left > 0 ? source[0] : 0.0f, left > 1 ? source[1] : 0.0f, left > 2 ? source[2] : 0.0f,
                       left > 3 ? source[3] : 0.0f);
}

// They, in three parts, at columns `at` … of a row in shared memory.
template <class Kind>
__device__ __forceinline__ void put_down(float4 numbers, u16* out, int at, int stride) {
    float four[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
#pragma unroll
    for (int part = 0; part < PARTS; part++, out += stride) {
        if constexpr (Kind::OFFSET) {
#pragma unroll
            for (int j = 0; j < 4; j++) out[Kind::place(at + j)] = (u16)(__float_as_uint(four[j]) >> 16);
        } else {
            *reinterpret_cast<uint2*>(out + at) = make_uint2(upper_halves(four[0], four[1]), upper_halves(four[2], four[3]));
        }
#pragma unroll
        for (int j = 0; j < 4; j++) four[j] = rest(four[j]);
    }
}

// Columns `first` … of rows `from` … of x for a warp, `count` groups, or COUNT of many rows.
template <class Kind, int COUNT, bool ALIGNED>
__device__ __forceinline__ void stage_x(const float* x, int from, int rows, int k, int first, int count, int stride, u16* columns) {
    x += (size_t)from * k + first;
    if (COUNT > 0) {
        constexpr int FOURS = 8 * (COUNT > 0 ? COUNT : 1);
#pragma unroll 4
        for (int i = threadIdx.x % WARP; i < rows * FOURS; i += WARP) {
            const int row = i / FOURS, at = i % FOURS * 4;
            put_down<Kind>(four_of<ALIGNED>(x + (size_t)row * k + at, k - first - at), columns + PARTS * row * stride, at, stride);
        }
    } else {
        for (int row = 0; row < rows; row++, x += k) {
#pragma unroll 4
            for (int at = threadIdx.x % WARP * 4; at < 32 * count; at += 4 * WARP)
                put_down<Kind>(four_of<ALIGNED>(x + at, k - first - at), columns + PARTS * row * stride, at, stride);
        }
    }
}

// What a lane reads of its two outputs for a group.
template <class Kind>
struct Reading {
    typename Kind::Eight top, bottom;
    u32 top_scale, bottom_scale;  // and the offset above it

    // a, b: the outputs' rows; their scales begin behind all groups
    __device__ __forceinline__ void read(const u8* a, const u8* b, int groups, int group) {
        typedef typename Kind::Eight Eight;
        const u8 *a_scales = a + groups * 4 * sizeof(Eight), *b_scales = b + groups * 4 * sizeof(Eight);
        const int at = 4 * group + threadIdx.x % 4;
        top = reinterpret_cast<const Eight*>(a)[at], bottom = reinterpret_cast<const Eight*>(b)[at];
        if (Kind::OFFSET)
            top_scale = reinterpret_cast<const u32*>(a_scales)[group], bottom_scale = reinterpret_cast<const u32*>(b_scales)[group];
        else if (Kind::SCALED)
            top_scale = reinterpret_cast<const u16*>(a_scales)[group], bottom_scale = reinterpret_cast<const u16*>(b_scales)[group];
    }
};

// Their product with a group of x, added to the sums.  z: this lane's part of the columns of x
template <class Kind, int TILES>
__device__ __forceinline__ void multiply_group(const Reading<Kind>& w, const uint4* z, float (*total)[4]) {
    float part[TILES][4];
    u32 top[4], bottom[4];
#pragma unroll
    for (int t = 0; t < TILES; t++) part[t][0] = part[t][1] = part[t][2] = part[t][3] = 0.0f;
#pragma unroll
    for (int factor = 0; factor < Kind::FACTORS; factor++) {
        Kind::pairs(w.top, factor, top), Kind::pairs(w.bottom, factor, bottom);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            float* sum = Kind::SCALED ? part[t] : total[t];
            multiply_tile(sum, top[0], bottom[0], top[1], bottom[1], z[t].x, z[t].y);
            multiply_tile(sum, top[2], bottom[2], top[3], bottom[3], z[t].z, z[t].w);
        }
    }
    if (!Kind::SCALED) return;
    const float a = from_float16(w.top_scale & 0xffffu), b = from_float16(w.bottom_scale & 0xffffu);
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        total[t][0] = fmaf(a, part[t][0], total[t][0]), total[t][1] = fmaf(a, part[t][1], total[t][1]);
        total[t][2] = fmaf(b, part[t][2], total[t][2]), total[t][3] = fmaf(b, part[t][3], total[t][3]);
    }
    if (!Kind::OFFSET) return;  // which counts times the sum of x, a product with ones
    const float c = from_float16(w.top_scale >> 16), d = from_float16(w.bottom_scale >> 16);
    const u32 ones = 0x3f803f80u;
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        float plain[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        multiply_tile(plain, ones, ones, ones, ones, z[t].x, z[t].y);
        multiply_tile(plain, ones, ones, ones, ones, z[t].z, z[t].w);
        total[t][0] = fmaf(c, plain[0], total[t][0]), total[t][1] = fmaf(c, plain[1], total[t][1]);
        total[t][2] = fmaf(d, plain[2], total[t][2]), total[t][3] = fmaf(d, plain[3], total[t][3]);
    }
}

// Up to TILES * 8 / PARTS rows of x, from row blockIdx.y times as many on.  DEPTH: so many groups are read before they are used.
// resident: a warp's part of x stays in shared memory, where else there are DEPTH groups of it.
// GATED: gate and up lie side by side, a block computes 8 of either, and y is activation(gate) * up  [rows, outputs / 2]
template <class Kind, int TILES, int DEPTH, bool GATED>
__device__ void multiply_tensor(const float* x, int rows, int k, const u8* w, int row_bytes, int outputs, int kind,
                                int resident, float* y) {
    constexpr int ROWS = TILES * 8 / PARTS, EACH = GATED ? 8 : 16;
    DYNAMIC_SHARED(float, shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, r = lane / 4, c = lane % 4, half = outputs / 2;
    const int from = blockIdx.y * ROWS, here = rows - from < ROWS ? rows - from : ROWS, wanted = GATED ? half : outputs;
    const int groups = (k + 31) / 32, share = warp_groups(k), first = warp * share;
    const int last = first + share < groups ? first + share : groups, stride = column_stride(resident ? share : DEPTH);
    float* sums = shared;  // of all warps, for these outputs and the last ones  [2, WARPS, columns, 16]
    u16* columns = reinterpret_cast<u16*>(sums + 2 * WARPS * 8 * TILES * 16) + warp * PARTS * here * stride;
    const auto read = [&](Reading<Kind>* readings, int tile, int group) {  // behind an end the last is read again, and not used
        const int top = tile * EACH + r, bottom = top + (GATED ? 0 : 8);
        const u8* a = w + (size_t)(top < wanted ? top : wanted - 1) * row_bytes;
        const u8* b = w + (size_t)((bottom < wanted ? bottom : wanted - 1) + (GATED ? half : 0)) * row_bytes;
#pragma unroll
        for (int g = 0; g < DEPTH; g++) readings[g].read(a, b, groups, group + g < last ? group + g : last - 1);
    };
    const auto stage = [&](int group) {
        if (k % 4 != 0) stage_x<Kind, 0, false>(x, from, here, k, 32 * group, resident ? last - first : DEPTH, stride, columns);
        else if (resident) stage_x<Kind, 0, true>(x, from, here, k, 32 * group, last - first, stride, columns);
        else stage_x<Kind, DEPTH, true>(x, from, here, k, 32 * group, DEPTH, stride, columns);
    };
    Reading<Kind> now[DEPTH], next[DEPTH];
    if (first < last) {
        read(now, blockIdx.x, first);
        if (resident) stage(first);
        __syncwarp();
    }
    int turn = 0;
    for (int tile = blockIdx.x; tile * EACH < wanted; tile += gridDim.x, turn ^= 1) {
        float total[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; t++) total[t][0] = total[t][1] = total[t][2] = total[t][3] = 0.0f;
        for (int group = first; group < last; group += DEPTH) {
            const bool on = group + DEPTH < last;
            const int following = on ? tile : tile + gridDim.x;
            if (following * EACH < wanted) read(next, following, on ? group + DEPTH : first);
            if (!resident) {
                __syncwarp();  // the last columns are no longer read
                stage(group);
                __syncwarp();
            }
            const u16* from_here = columns + (resident ? 32 * (group - first) : 0) + 8 * c;
#pragma unroll
            for (int g = 0; g < DEPTH; g++) {
                if (group + g >= last) break;
                uint4 z[TILES];
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    const int n = 8 * t + r < PARTS * here ? 8 * t + r : PARTS * here - 1;
                    z[t] = *reinterpret_cast<const uint4*>(from_here + n * stride + 32 * g);
                }
                multiply_group<Kind, TILES>(now[g], z, total);
            }
#pragma unroll
            for (int g = 0; g < DEPTH; g++) now[g] = next[g];
        }
        float* mine = sums + (turn * WARPS + warp) * 8 * TILES * 16;
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) mine[(8 * t + 2 * c + i % 2) * 16 + r + i / 2 * 8] = total[t][i];
        __syncthreads();  // and so nobody reads the sums of the outputs before the last ones, whose place is the next
        for (int i = threadIdx.x; i < here * EACH; i += blockDim.x) {
            const int row = i / EACH, output = tile * EACH + i % EACH;
            float found[2] = {0.0f, 0.0f};
#pragma unroll
            for (int side = 0; side < (GATED ? 2 : 1); side++)
#pragma unroll
                for (int part = PARTS - 1; part >= 0; part--)  // from the small to the large
#pragma unroll
                    for (int other = 0; other < WARPS; other++)
                        found[side] += sums[((turn * WARPS + other) * 8 * TILES + PARTS * row + part) * 16 + i % EACH + 8 * side];
            if (output >= wanted) continue;
            y[(size_t)(from + row) * wanted + output] = GATED ? activation(found[0], kind) * found[1] : found[0];
        }
    }
}
