// CUDA C++ on the CPU: a source compiled by g++ -std=c++20 behind this header runs block by block, for tests.
//
// By default each CUDA thread is a fiber: all run until they wait, then what is complete is released; a barrier or a shuffle
// that can never be complete is an error with the kernel's name.  With EMULATOR_THREADS each is a std::thread, and with
// -fsanitize=thread a missing barrier is a reported race; there what can never be complete hangs, so run fibers first.
// Neither speed, nor tensor cores, nor several blocks at once are modelled.
#pragma once
#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <vector>
#ifdef EMULATOR_THREADS
#include <barrier>
#include <deque>
#include <thread>
#else
#include <sys/mman.h>
#include <ucontext.h>

#include <csetjmp>
#endif

// ---- the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// not filled before each block where it stands in a template: GCC before 14 ignores the section there
#define __shared__ static __attribute__((section("fixed_shared")))
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulator::shared)

#define EMULATOR_VECTORS(T, name)                                                                            \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                                       \
    struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };                            \
    [[maybe_unused]] static inline name##2 make_##name##2(T x, T y) { return {x, y}; }                       \
    [[maybe_unused]] static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(double, double)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
EMULATOR_VECTORS(short, short)
EMULATOR_VECTORS(unsigned short, ushort)
EMULATOR_VECTORS(signed char, char)
EMULATOR_VECTORS(unsigned char, uchar)
EMULATOR_VECTORS(long long, longlong)
struct uint3 { unsigned x, y, z; };
typedef uint3 dim3;

#ifdef EMULATOR_THREADS
static thread_local uint3 threadIdx, blockIdx;
#else
static uint3 threadIdx, blockIdx;
#endif
static dim3 blockDim, gridDim;
[[maybe_unused]] static const int warpSize = 32;

#define __expf expf  // glibc declares this name, and has no such function
#define __logf logf
#define __fdividef(a, b) ((a) / (b))
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class To, class From>
static inline To emulator_bits(From x) { static_assert(sizeof(To) == sizeof(From)); To y; memcpy(&y, &x, sizeof y); return y; }
static inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
static inline float __int_as_float(int x) { return emulator_bits<float>(x); }
static inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
static inline int __float_as_int(float x) { return emulator_bits<int>(x); }
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= unsigned((uint64_t(y) << 32 | x) >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return out;
}
template <class T> static inline T __ldg(const T* x) { return *x; }
#define EMULATOR_ORDER(T)                                              \
    static inline T min(T a, T b) { return b < a ? b : a; }            \
    static inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_ORDER(int)
EMULATOR_ORDER(unsigned)
EMULATOR_ORDER(long long)
EMULATOR_ORDER(unsigned long long)
static inline float min(float a, float b) { return fminf(a, b); }  // of a number and a NaN the number, as on the GPU
static inline float max(float a, float b) { return fmaxf(a, b); }

// ---- a block's state

extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_fixed_shared[], __stop_fixed_shared[];

namespace emulator {

constexpr unsigned MOST_THREADS = 1024, MOST_SHARED = 99 << 10, GUARD = 4096, GUARD_WORD = 0x7ff5a5c5;  // a NaN, too

struct Launch { unsigned grid[3], block[3], shared_bytes, seed; };

alignas(128) static unsigned char shared[MOST_SHARED + GUARD + 4];
static std::string error;
static void (*kernel)(void**);
static void** arguments;
static const char* kernel_name;
static unsigned thread_count;

static std::string place() {
    char text[200];
    snprintf(text, sizeof text, "kernel %.100s, block (%u, %u, %u)", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z);
    return text;
}
static uint3 position(unsigned number) {
    return {number % blockDim.x, number / blockDim.x % blockDim.y, number / blockDim.x / blockDim.y};
}
static unsigned own_number() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
static unsigned char guard_byte(unsigned i) { return GUARD_WORD >> (8 * (i % 4)); }

enum Wait { RUNNING, BARRIER, SHUFFLE, SYNC_WARP, ENDED };
static const char* const CALLED[] = {"", "__syncthreads", "a shuffle", "__syncwarp"};

#ifdef EMULATOR_THREADS
#include "emulator_threads.h"
#else
#include "emulator_fibers.h"
#endif

// Returns null, or what went wrong.  seed: of the order of blocks and threads; 0: ascending.
[[maybe_unused]] static const char* run(const char* name, const Launch& launch, void (*function)(void**), void** values) {
    kernel_name = name, kernel = function, arguments = values;
    gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]}, blockDim = {launch.block[0], launch.block[1], launch.block[2]};
    thread_count = blockDim.x * blockDim.y * blockDim.z;
    error.clear();
    std::vector<uint64_t> blocks(uint64_t(gridDim.x) * gridDim.y * gridDim.z);
    std::vector<unsigned> order(thread_count);
    std::iota(blocks.begin(), blocks.end(), 0), std::iota(order.begin(), order.end(), 0);
    uint64_t state = launch.seed;  // Fisher-Yates with Knuth's generator
    const auto below = [&](uint64_t n) { return ((state = state * 6364136223846793005u + 1442695040888963407u) >> 33) % n; };
    for (uint64_t n = launch.seed ? blocks.size() : 0; n > 1; n--) std::swap(blocks[n - 1], blocks[below(n)]);
    for (unsigned n = launch.seed ? thread_count : 0; n > 1; n--) std::swap(order[n - 1], order[below(n)]);
    for (uint64_t block : blocks) {
        const uint64_t row = block / gridDim.x;
        blockIdx = {unsigned(block % gridDim.x), unsigned(row % gridDim.y), unsigned(row / gridDim.y)};
        memset(shared, 0xff, launch.shared_bytes);
        for (unsigned i = 0; i < GUARD; i++) shared[launch.shared_bytes + i] = guard_byte(i);
        if (__start_fixed_shared) memset(__start_fixed_shared, 0xff, __stop_fixed_shared - __start_fixed_shared);
        run_block(order);
        for (unsigned i = 0; i < GUARD && error.empty(); i++)
            if (shared[launch.shared_bytes + i] != guard_byte(i))
                error = place() + ": byte " + std::to_string(launch.shared_bytes + i) + " of dynamic shared memory was " +
                        "written; " + std::to_string(launch.shared_bytes) + " were asked for";
        if (!error.empty()) return error.c_str();
    }
    return nullptr;
}

}  // namespace emulator

// ---- where threads meet; the line is the caller's

static inline void __syncthreads(int line = __builtin_LINE()) { emulator::meet(emulator::BARRIER, 0, 0, 0, line); }
static inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    emulator::meet(emulator::SYNC_WARP, mask, 0, 0, line);
}
// from: the lane that is read, of `lane`, `other`, and the `first` of its segment of `width` lanes
#define EMULATOR_SHUFFLE(name, from)                                                                            \
    template <class T>                                                                                          \
    static inline T name(unsigned mask, T x, int other, int width = 32, int line = __builtin_LINE()) {          \
        const int lane = emulator::own_number() % 32, first = lane / width * width, source = (from);            \
        const bool inside = source >= first && source < first + width;                                          \
        const uint32_t bits = emulator_bits<uint32_t>(x);                                                       \
        return emulator_bits<T>(emulator::meet(emulator::SHUFFLE, mask, bits, inside ? source : lane, line));   \
    }
EMULATOR_SHUFFLE(__shfl_sync, first + other % width)
EMULATOR_SHUFFLE(__shfl_xor_sync, lane ^ other)
EMULATOR_SHUFFLE(__shfl_down_sync, lane + other)
EMULATOR_SHUFFLE(__shfl_up_sync, lane - other)

// Registers that all lanes of a warp read: for what tensor cores do, which by shuffles takes a dozen meetings more.
static uint32_t emulator_registers[32][32][6];
#define SHOW_REGISTERS(own)                                                                                                   \
    memcpy(emulator_registers[emulator::own_number() / 32][emulator::own_number() % 32], own, sizeof own), __syncwarp()
#define REGISTER_OF(own, number, lane) emulator_registers[emulator::own_number() / 32][lane][number]
#define HIDE_REGISTERS() __syncwarp()
