// What the tensor cores do, and bfloat16 in pairs, the first number in the lower half.

#ifndef REGISTER_OF  // another lane's; the emulator of the tests has a shorter way
#define SHOW_REGISTERS(own)
#define REGISTER_OF(own, number, lane) __shfl_sync(ALL_LANES, own[number], lane)
#define HIDE_REGISTERS()
#endif

// d += a b, for a [16, 16] by rows and b [16, 8] by columns: PTX ISA, mma.m16n8k16.
__device__ __forceinline__ void multiply_tile(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else  // what it does, on older GPUs and on a CPU: lane 4 r + c has rows r and r + 8 of a, and columns 2 c and 2 c + 1 of d
    const u32 own[6] = {a0, a1, a2, a3, b0, b1};
    SHOW_REGISTERS(own);
    const int lane = threadIdx.x % WARP, row = lane / 4 * 4, column = lane % 4 * 8;
    for (int j = 0; j < 4; j++) {
        const u32 top[2] = {REGISTER_OF(own, 0, row + j), REGISTER_OF(own, 2, row + j)};
        const u32 bottom[2] = {REGISTER_OF(own, 1, row + j), REGISTER_OF(own, 3, row + j)};
        for (int n = 0; n < 2; n++) {
            const u32 b[2] = {REGISTER_OF(own, 4, column + 4 * n + j), REGISTER_OF(own, 5, column + 4 * n + j)};
            for (int i = 0; i < 2; i++) {
                const float low = from_bfloat16(b[i]), high = __uint_as_float(b[i] & 0xffff0000u);
                d[n] = fmaf(from_bfloat16(top[i]), low, fmaf(__uint_as_float(top[i] & 0xffff0000u), high, d[n]));
                d[2 + n] = fmaf(from_bfloat16(bottom[i]), low, fmaf(__uint_as_float(bottom[i] & 0xffff0000u), high, d[2 + n]));
            }
        }
    }
    HIDE_REGISTERS();
#endif
}

// Two sums of bfloat16, where they are exact.
__device__ __forceinline__ u32 add_pairs(u32 a, u32 b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u32 sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));  // a * 1 + b
    return sum;
#else
    const float low = from_bfloat16(a) + from_bfloat16(b);
    const float high = __uint_as_float(a & 0xffff0000u) + __uint_as_float(b & 0xffff0000u);
    return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);
#endif
}

// The upper halves of two numbers, side by side: bfloat16 cut off.
__device__ __forceinline__ u32 upper_halves(float low, float high) {
    return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);
}
__device__ __forceinline__ float rest(float x) { return x - __uint_as_float(__float_as_uint(x) & 0xffff0000u); }

// The nearest bfloat16 of two numbers, side by side.
__device__ __forceinline__ u32 nearest_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return to_bfloat16(low) | (u32)to_bfloat16(high) << 16;
#endif
}
