// What all kernels of this folder share.  Plain CUDA C++ without headers: the same source runs on a CPU in the tests.

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(T, name)                              \
    extern __shared__ __align__(16) unsigned char name##_bytes[]; \
    T* name = reinterpret_cast<T*>(name##_bytes)
#endif

#define WARP 32
#define ALL_LANES 0xffffffffu
#define NOTHING_SEEN (-3.0e38f)  // a score below every real one, and finite: its difference to itself is 0

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

// bfloat16 and float16 are carried as their bits.

__device__ __forceinline__ float from_bfloat16(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ u16 to_bfloat16(float x) {  // to nearest, ties to even; a NaN stays a NaN
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)((bits >> 16) | 0x40u);
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__device__ __forceinline__ float from_float16(u32 bits) {
#ifdef __CUDA_ARCH__  // CuPy compiles with -ftz=true: shifted bits of a small number would be one that becomes 0
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((u16)bits));
    return x;
#else
    const u32 sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
    if (rest >= 0x7c00u << 13) return __uint_as_float(sign | 0x7f800000u | rest);  // infinity, or no number
    return __uint_as_float(sign | rest) * 5.192296858534828e33f;  // 2^112
#endif
}

// Sums and maxima in one fixed order, the same on every lane or thread afterwards.

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

__device__ __forceinline__ float block_sum(float x, float* parts) {  // parts: one float for each warp, in shared memory
    x = warp_sum(x);
    __syncthreads();  // an earlier sum may still be read
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < (int)blockDim.x / WARP; warp++) total += parts[warp];
    return total;
}

// One number of a cache of float32 or bfloat16.
__device__ __forceinline__ float cached(float x) { return x; }
__device__ __forceinline__ float cached(u16 x) { return from_bfloat16(x); }
__device__ __forceinline__ void store(float* at, float x) { *at = x; }
__device__ __forceinline__ void store(u16* at, float x) { *at = to_bfloat16(x); }

enum { IDENTITY, SILU, RELU, GELU, GELU_TANH };

__device__ __forceinline__ float activation(float x, int kind) {
    if (kind == SILU) return x / (1.0f + expf(-x));  // exp may reach infinity, and x / infinity is the right 0
    if (kind == RELU) return fmaxf(x, 0.0f);
    if (kind == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    if (kind == GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    return x;
}
