// Products of few rows of x with packed matrices, y = x W, on tensor cores.
//
// A matrix lies by outputs, as in products.cu.  Tensor cores multiply numbers of bfloat16 and add float32: a weight of
// bfloat16, int8 or int4 is such a number, one of float16 the sum of two, and a float32 of x the sum of three, which are
// columns of their own.  So every product is exact, and the rows of x, up to 16, cost little more than one.
//
// A block computes 16 outputs.  Its 8 warps share the contraction axis, and each goes through its part by groups of 32: a
// lane reads 8 weights of two outputs, as they lie, and what the tensor core calls columns 2c, 2c + 1, 2c + 8 and 2c + 9 of 16
// are four of these 8, since the order of the axis is free as long as x has the same.  The warps' sums, and the three parts of
// x, are added in their order, which depends on nothing but the length of the axis.

#define WARPS 8
#define PARTS 3  // of x

// For each kind: what a lane reads of an output and a group, and that as four pairs of bfloat16, of FACTORS summands each.
// GROUPS: how many of them it reads before it computes.  SCALED: whether groups have a scale; OFFSET: and an offset.

struct Bfloat16 {
    typedef uint4 Eight;
    static const int FACTORS = 1, GROUPS = 4;
    static const bool SCALED = false, OFFSET = false;
    __device__ static __forceinline__ void pairs(uint4 w, int, u32* out) { out[0] = w.x, out[1] = w.y, out[2] = w.z, out[3] = w.w; }
    __device__ static __forceinline__ int place(int i) { return i; }
};

struct Float16 {
    typedef uint4 Eight;
    static const int FACTORS = 2, GROUPS = 4;
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
    __device__ static __forceinline__ int place(int i) { return i; }
};

struct Int8 {  // 128 + the lower seven bits, less 128, or 256 where the sign is set
    typedef uint2 Eight;
    static const int FACTORS = 1, GROUPS = 8;
    static const bool SCALED = true, OFFSET = false;
    __device__ static __forceinline__ u32 pair(u32 bytes) {
        return add_pairs((bytes & 0x007f007fu) | 0x43004300u, (bytes & 0x00800080u) | 0xc300c300u);
    }
    __device__ static __forceinline__ void pairs(uint2 w, int, u32* out) {
        out[0] = pair(__byte_perm(w.x, 0, 0x4140)), out[1] = pair(__byte_perm(w.x, 0, 0x4342));
        out[2] = pair(__byte_perm(w.y, 0, 0x4140)), out[3] = pair(__byte_perm(w.y, 0, 0x4342));
    }
    __device__ static __forceinline__ int place(int i) { return i; }
};

struct Int4 {  // 128 + q, less 128; the weights 0 and 4, 1 and 5, … make pairs
    typedef u32 Eight;
    static const int FACTORS = 1, GROUPS = 8;
    static const bool SCALED = true, OFFSET = true;
    __device__ static __forceinline__ void pairs(u32 w, int, u32* out) {
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = add_pairs((w >> (4 * i) & 0x000f000fu) | 0x43004300u, 0xc300c300u);
    }
    __device__ static __forceinline__ int place(int i) { return i / 8 * 8 + i % 4 * 2 + i % 8 / 4; }  // of x among its eight
};

// Numbers of bfloat16 from one column of x in shared memory to the next: so that eight lanes read from all banks.
__host__ __device__ constexpr int column_stride(int groups) { return 32 * groups + (groups % 2 == 0 ? 32 : 0); }

// Columns `first` … of rows `from` … of x for a warp, in three parts, zeros behind the end of a row.
template <class Kind, int GROUPS>
__device__ __forceinline__ void stage_x(const float* x, int from, int rows, int k, int first, u16* columns) {
    constexpr int FOURS = 8 * GROUPS, STRIDE = column_stride(GROUPS);
    for (int i = threadIdx.x % WARP; i < rows * FOURS; i += WARP) {
        const int row = i / FOURS, at = i % FOURS * 4, column = first + at;
        const float* source = x + (size_t)(from + row) * k + column;
        float four[4];
        if (k % 4 == 0 && column < k) {
            const float4 loaded = *reinterpret_cast<const float4*>(source);
            four[0] = loaded.x, four[1] = loaded.y, four[2] = loaded.z, four[3] = loaded.w;
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) four[j] = column + j < k ? source[j] : 0.0f;
        }
        u16* out = columns + PARTS * row * STRIDE;
#pragma unroll
        for (int part = 0; part < PARTS; part++, out += STRIDE) {
            if (Kind::OFFSET) {
#pragma unroll
                for (int j = 0; j < 4; j++) out[Kind::place(at + j)] = (u16)(__float_as_uint(four[j]) >> 16);
            } else {
                *reinterpret_cast<uint2*>(out + at) = make_uint2(upper_halves(four[0], four[1]), upper_halves(four[2], four[3]));
            }
#pragma unroll
            for (int j = 0; j < 4; j++) four[j] = rest(four[j]);
        }
    }
}

// Up to TILES * 8 / PARTS rows of x, from row blockIdx.y times as many on.
// GATED: gate and up lie side by side, a block computes 8 of either, and y is activation(gate) * up  [rows, outputs / 2]
template <class Kind, int TILES, bool GATED>
__device__ void multiply_tensor(const float* x, int rows, int k, const u8* w, int row_bytes, int outputs, int kind, float* y) {
    constexpr int GROUPS = TILES == 1 ? Kind::GROUPS : TILES <= 3 ? 2 : 1, STRIDE = column_stride(GROUPS), ROWS = TILES * 8 / PARTS;
    typedef typename Kind::Eight Eight;
    DYNAMIC_SHARED(u16, shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, r = lane / 4, c = lane % 4, half = outputs / 2;
    const int from = blockIdx.y * ROWS, here = rows - from < ROWS ? rows - from : ROWS;
    const int groups = (k + 31) / 32, share = (groups + WARPS * 8 - 1) / (WARPS * 8) * 8;  // of a warp, by 8 since these lie together
    const int last = (warp + 1) * share < groups ? (warp + 1) * share : groups;
    int top = GATED ? blockIdx.x * 8 + r : blockIdx.x * 16 + r, bottom = GATED ? top + half : top + 8;
    if (GATED && top >= half) top = half - 1, bottom = outputs - 1;  // computed and not stored
    if (!GATED) top = top < outputs ? top : outputs - 1, bottom = bottom < outputs ? bottom : outputs - 1;
    const u8 *a = w + (size_t)top * row_bytes, *b = w + (size_t)bottom * row_bytes;
    const u8 *a_scales = a + groups * 4 * sizeof(Eight), *b_scales = b + groups * 4 * sizeof(Eight);
    u16* columns = shared + warp * PARTS * ROWS * STRIDE;
    float total[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; t++) total[t][0] = total[t][1] = total[t][2] = total[t][3] = 0.0f;

    for (int group = warp * share; group < last; group += GROUPS) {
        Eight a_eight[GROUPS], b_eight[GROUPS];
        u32 a_scale[GROUPS], b_scale[GROUPS];
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const int at = group + g < last ? group + g : last - 1;
            a_eight[g] = reinterpret_cast<const Eight*>(a)[4 * at + c], b_eight[g] = reinterpret_cast<const Eight*>(b)[4 * at + c];
            if (Kind::OFFSET) {
                a_scale[g] = reinterpret_cast<const u32*>(a_scales)[at], b_scale[g] = reinterpret_cast<const u32*>(b_scales)[at];
            } else if (Kind::SCALED) {
                a_scale[g] = reinterpret_cast<const u16*>(a_scales)[at], b_scale[g] = reinterpret_cast<const u16*>(b_scales)[at];
            }
        }
        __syncwarp();  // the last columns are no longer read
        stage_x<Kind, GROUPS>(x, from, here, k, 32 * group, columns);
        __syncwarp();
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            if (group + g >= last) break;
            float part[TILES][4], plain[TILES][4];
            u32 top_pairs[4], bottom_pairs[4];
            uint4 z[TILES];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const int n = 8 * t + r < PARTS * here ? 8 * t + r : PARTS * here - 1;
                z[t] = *reinterpret_cast<const uint4*>(columns + n * STRIDE + 32 * g + 8 * c);
                part[t][0] = part[t][1] = part[t][2] = part[t][3] = 0.0f;
                plain[t][0] = plain[t][1] = plain[t][2] = plain[t][3] = 0.0f;
            }
#pragma unroll
            for (int factor = 0; factor < Kind::FACTORS; factor++) {
                Kind::pairs(a_eight[g], factor, top_pairs), Kind::pairs(b_eight[g], factor, bottom_pairs);
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    float* sum = Kind::SCALED ? part[t] : total[t];
                    multiply_tile(sum, top_pairs[0], bottom_pairs[0], top_pairs[1], bottom_pairs[1], z[t].x, z[t].y);
                    multiply_tile(sum, top_pairs[2], bottom_pairs[2], top_pairs[3], bottom_pairs[3], z[t].z, z[t].w);
                }
            }
            if (Kind::SCALED) {
                const float a_factor = from_float16(a_scale[g] & 0xffffu), b_factor = from_float16(b_scale[g] & 0xffffu);
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    total[t][0] = fmaf(a_factor, part[t][0], total[t][0]), total[t][1] = fmaf(a_factor, part[t][1], total[t][1]);
                    total[t][2] = fmaf(b_factor, part[t][2], total[t][2]), total[t][3] = fmaf(b_factor, part[t][3], total[t][3]);
                }
            }
            if (Kind::OFFSET) {  // times the sum of x, which is a product with ones
                const float a_factor = from_float16(a_scale[g] >> 16), b_factor = from_float16(b_scale[g] >> 16);
                const u32 ones = 0x3f803f80u;
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    multiply_tile(plain[t], ones, ones, ones, ones, z[t].x, z[t].y);
                    multiply_tile(plain[t], ones, ones, ones, ones, z[t].z, z[t].w);
                    total[t][0] = fmaf(a_factor, plain[t][0], total[t][0]), total[t][1] = fmaf(a_factor, plain[t][1], total[t][1]);
                    total[t][2] = fmaf(b_factor, plain[t][2], total[t][2]), total[t][3] = fmaf(b_factor, plain[t][3], total[t][3]);
                }
            }
        }
    }

    __syncthreads();  // no columns are read any more: the sums of all warps take their place  [WARPS, columns, 16]
    float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[((size_t)warp * 8 * TILES + 8 * t + 2 * c + i % 2) * 16 + r + i / 2 * 8] = total[t][i];
    __syncthreads();
    for (int i = threadIdx.x; i < here * (GATED ? 8 : 16); i += blockDim.x) {
        const int row = i / (GATED ? 8 : 16), output = i % (GATED ? 8 : 16);
        float found[2] = {0.0f, 0.0f};
        for (int side = 0; side < (GATED ? 2 : 1); side++)
            for (int part = PARTS - 1; part >= 0; part--)  // from the small to the large
                for (int other = 0; other < WARPS; other++)
                    found[side] += sums[((size_t)other * 8 * TILES + PARTS * row + part) * 16 + output + 8 * side];
        if (GATED && blockIdx.x * 8 + output < half)
            y[(size_t)(from + row) * half + blockIdx.x * 8 + output] = activation(found[0], kind) * found[1];
        if (!GATED && blockIdx.x * 16 + output < outputs)
            y[(size_t)(from + row) * outputs + blockIdx.x * 16 + output] = found[0];
    }
}
