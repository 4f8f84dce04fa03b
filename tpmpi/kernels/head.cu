// The largest numbers of each row of logits, largest first and equal ones by lower column, and the row's log-sum-exp.
//
// A number and its column are one key of 64 bits: the number's bits, so turned that their order is that of numbers, above
// the column's complement.  No two keys are equal, and their descending order is the order wanted.  A block sorts CHUNK keys
// (Batcher's bitonic network, 1968) and keeps the first `keep`; what the blocks of a row keep is sorted in the same way, until
// one block is left.

#define CHUNK 2048  // keys of a block, at most

__device__ __forceinline__ u64 key_of(float x, u32 column) {  // above 0, which stands for nothing
    const u32 bits = __float_as_uint(x + 0.0f);  // -0 is 0
    return (u64)(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | (0xffffffffu - column);
}

__device__ __forceinline__ u32 column_of(u64 key) { return 0xffffffffu - (u32)key; }

__device__ __forceinline__ float block_max(float x, float* parts) {  // parts: one float for each warp, in shared memory
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    for (int warp = 0; warp < (int)blockDim.x / WARP; warp++) x = fmaxf(x, parts[warp]);
    return x;
}

// n keys in descending order; n: a power of two.  Every thread of the block takes part.
__device__ void sort_keys(u64* keys, int n) {
    for (int size = 2; size <= n; size *= 2) {
        for (int step = size / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
                const int a = 2 * i - (i & (step - 1)), b = a + step;
                const u64 first = keys[a], second = keys[b];
                if ((first < second) == ((a & size) == 0)) keys[a] = second, keys[b] = first;
            }
        }
    }
    __syncthreads();
}

// The largest of n keys becomes the first.  Every thread of the block takes part.
__device__ void largest_key(u64* keys, int n) {
    for (int step = n / 2; step > 0; step /= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < step; i += blockDim.x)
            if (keys[i + step] > keys[i]) keys[i] = keys[i + step];
    }
    __syncthreads();
}

// A run of CHUNK columns of row blockIdx.y, divided by the row's divisor (may be null: 1): its keys, and to stats the maximum
// and the sum of exponentials below it.  n: a power of two, at least the keys of a run
extern "C" __global__ void best_of_logits(const float* x, int columns, const float* divisors, int keep, int n,
                                          unsigned long long* out, float* stats) {
    DYNAMIC_SHARED(u64, keys);
    float* parts = reinterpret_cast<float*>(keys + n);
    const size_t block = (size_t)blockIdx.y * gridDim.x + blockIdx.x;
    const int first = blockIdx.x * CHUNK, count = columns - first < CHUNK ? columns - first : CHUNK;
    const float divisor = divisors ? divisors[blockIdx.y] : 1.0f;
    x += (size_t)blockIdx.y * columns + first;
    float top = __uint_as_float(0xff800000u), sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float number = i < count ? x[i] / divisor : 0.0f;
        keys[i] = i < count ? key_of(number, first + i) : 0;
        if (i < count) top = fmaxf(top, number);
    }
    top = block_max(top, parts);
    const float shift = top < NOTHING_SEEN ? 0.0f : top;  // a run of nothing but -infinity adds nothing
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += expf(x[i] / divisor - shift);
    sum = block_sum(sum, parts);
    if (threadIdx.x == 0) stats[2 * block] = top, stats[2 * block + 1] = sum;
    if (keep == 1) largest_key(keys, n);
    else sort_keys(keys, n);
    for (int i = threadIdx.x; i < keep; i += blockDim.x) out[block * keep + i] = i < n ? keys[i] : 0;
}

// The same of a run of CHUNK keys out of a row of `count`.
extern "C" __global__ void best_of_keys(const unsigned long long* x, int count, int keep, int n, unsigned long long* out) {
    DYNAMIC_SHARED(u64, keys);
    const int first = blockIdx.x * CHUNK;
    for (int i = threadIdx.x; i < n; i += blockDim.x) keys[i] = first + i < count ? x[(size_t)blockIdx.y * count + first + i] : 0;
    if (keep == 1) largest_key(keys, n);
    else sort_keys(keys, n);
    for (int i = threadIdx.x; i < keep; i += blockDim.x)
        out[((size_t)blockIdx.y * gridDim.x + blockIdx.x) * keep + i] = i < n ? keys[i] : 0;
}

// What goes to the host, [rows, 1 + 2 keep]: the bits of the log-sum-exp, of the numbers as they were, then the columns.
extern "C" __global__ void best_rows(const float* x, int columns, const unsigned long long* keys, int keep, const float* stats,
                                     int runs, unsigned int* out) {
    DYNAMIC_SHARED(float, parts);
    const size_t row = blockIdx.x;
    out += row * (1 + 2 * keep), stats += row * 2 * runs, keys += row * keep, x += row * columns;
    for (int i = threadIdx.x; i < keep; i += blockDim.x) {
        const u32 column = column_of(keys[i]);
        out[1 + i] = __float_as_uint(x[column]);
        out[1 + keep + i] = column;
    }
    float top = __uint_as_float(0xff800000u), sum = 0.0f;
    for (int i = threadIdx.x; i < runs; i += blockDim.x) top = fmaxf(top, stats[2 * i]);
    top = block_max(top, parts);
    for (int i = threadIdx.x; i < runs; i += blockDim.x) sum += stats[2 * i + 1] * expf(stats[2 * i] - top);
    sum = block_sum(sum, parts);
    if (threadIdx.x == 0) out[0] = __float_as_uint(top + logf(sum));
}
