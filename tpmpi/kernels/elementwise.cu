// What is computed row by row or number by number.  A row is a token; one block of threads for each.

// y = x / sqrt(mean(x^2) + eps) * gain, or with the mean taken off first, and a bias (may be null).   x and y may be the same
// STEP: numbers that a thread takes side by side, 4 where n is a multiple and the arrays begin at one.
// high, low: where y goes, too, as the sum of two numbers of bfloat16, for a product by the library; null where it does not
template <int STEP>
__device__ __forceinline__ void norm_row(const float* x, const float* gain, const float* bias, float* y, u16* high, u16* low, int n,
                                         int centred, float eps, float* parts) {
    float mean = 0.0f;
    if (centred) {
        for (int i = STEP * threadIdx.x; i < n; i += STEP * blockDim.x)
            for (int j = 0; j < STEP; j++) mean += x[i + j];
        mean = block_sum(mean, parts) / (float)n;
    }
    float squares = 0.0f, in[STEP], out[STEP];
    for (int i = STEP * threadIdx.x; i < n; i += STEP * blockDim.x) {
        load<STEP>(x + i, in);
        for (int j = 0; j < STEP; j++) squares = fmaf(in[j] - mean, in[j] - mean, squares);
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, parts) / (float)n + eps);
    for (int i = STEP * threadIdx.x; i < n; i += STEP * blockDim.x) {
        load<STEP>(x + i, in), load<STEP>(gain + i, out);
        for (int j = 0; j < STEP; j++) out[j] = (in[j] - mean) * factor * out[j];
        if (bias)
            for (int j = 0; j < STEP; j++) out[j] += bias[i + j];
        store<STEP>(y + i, out);
        if (high) store_halves<STEP>(high + i, low ? low + i : low, out);
    }
}

extern "C" __global__ void norm_rows(const float* x, const float* gain, const float* bias, float* y, unsigned short* high,
                                     unsigned short* low, int n, int centred, float eps) {
    DYNAMIC_SHARED(float, parts);
    const size_t row = (size_t)blockIdx.x * n;
    if (high) high += row;
    if (low) low += row;
    if (n % 4 == 0) norm_row<4>(x + row, gain, bias, y + row, high, low, n, centred, eps, parts);
    else norm_row<1>(x + row, gain, bias, y + row, high, low, n, centred, eps, parts);
}

// part += x, and the norm of it.
template <int STEP>
__device__ __forceinline__ void added_norm_row(const float* x, float* part, const float* gain, const float* bias, float* y,
                                               u16* high, u16* low, int n, int centred, float eps, float* parts) {
    float in[STEP], sum[STEP];
    for (int i = STEP * threadIdx.x; i < n; i += STEP * blockDim.x) {  // each thread reads its own again
        load<STEP>(x + i, in), load<STEP>(part + i, sum);
        for (int j = 0; j < STEP; j++) sum[j] += in[j];
        store<STEP>(part + i, sum);
    }
    norm_row<STEP>(part, gain, bias, y, high, low, n, centred, eps, parts);
}

extern "C" __global__ void added_norm_rows(const float* x, float* part, const float* gain, const float* bias, float* y,
                                           unsigned short* high, unsigned short* low, int n, int centred, float eps) {
    DYNAMIC_SHARED(float, parts);
    const size_t row = (size_t)blockIdx.x * n;
    if (high) high += row;
    if (low) low += row;
    if (n % 4 == 0) added_norm_row<4>(x + row, part + row, gain, bias, y + row, high, low, n, centred, eps, parts);
    else added_norm_row<1>(x + row, part + row, gain, bias, y + row, high, low, n, centred, eps, parts);
}

// Each head of blockIdx.x's row through a norm of its own, in place.  stride: from a row to the next, in numbers
extern "C" __global__ void norm_heads(float* x, long long stride, int head_dim, const float* gain, const float* bias, int centred,
                                      float eps) {
    DYNAMIC_SHARED(float, parts);
    const int head = blockIdx.y * head_dim;
    float* row = x + blockIdx.x * stride + head;
    norm_row<1>(row, gain + head, bias ? bias + head : bias, row, nullptr, nullptr, head_dim, centred, eps, parts);
}

// The sum of squares of columns first … last - 1, into one column of y [tokens, width].
extern "C" __global__ void head_squares(const float* x, long long stride, int first, int last, float* y, int width, int column) {
    DYNAMIC_SHARED(float, parts);
    const float* row = x + blockIdx.x * stride;
    float sum = 0.0f;
    for (int i = first + threadIdx.x; i < last; i += blockDim.x) sum = fmaf(row[i], row[i], sum);
    sum = block_sum(sum, parts);
    if (threadIdx.x == 0) y[(size_t)blockIdx.x * width + column] = sum;
}

// Columns from `first` on times the token's factor and the column's gain, in place.
extern "C" __global__ void scale_columns(float* x, long long stride, int first, int count, const float* factor, const float* gain) {
    float* row = x + blockIdx.x * stride + first;
    for (int i = threadIdx.x; i < count; i += blockDim.x) row[i] *= factor[blockIdx.x] * gain[i];
}

extern "C" __global__ void activate(const float* x, float* y, long long count, int kind) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = activation(x[i], kind);
}

// activation(gate) * up, four numbers for each thread; high, low: see norm_row.
// [tokens, 2 ffn] -> [tokens, ffn]; blockIdx.y is the token
extern "C" __global__ void gated_activation(const float* x, float* y, unsigned short* high, unsigned short* low, int ffn, int kind) {
    const int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    const float *gate = x + (size_t)blockIdx.y * 2 * ffn, *up = gate + ffn;
    const size_t row = (size_t)blockIdx.y * ffn;
    if (ffn % 4 == 0 && i < ffn) {
        float g[4], u[4];
        load<4>(gate + i, g), load<4>(up + i, u);
        for (int j = 0; j < 4; j++) u[j] *= activation(g[j], kind);
        store<4>(y + row + i, u);
        if (high) store_halves<4>(high + row + i, low ? low + row + i : low, u);
    } else {
        for (int j = i; j < i + 4 && j < ffn; j++) {
            const float u = activation(gate[j], kind) * up[j];
            y[row + j] = u;
            if (high) store_halves<1>(high + row + j, low ? low + row + j : low, &u);
        }
    }
}

extern "C" __global__ void softcap(const float* x, float* y, long long count, float cap) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = cap * tanhf(x[i] / cap);
}

// E of a token: the sum over its experts of share * their output, in their order.  [tokens * each, n] -> [tokens, n]
extern "C" __global__ void combine_experts(const float* x, const float* shares, float* y, int each, int n) {
    const size_t token = blockIdx.y;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float sum = 0.0f;
    for (int j = 0; j < each; j++) sum = fmaf(shares[token * each + j], x[(token * each + j) * n + i], sum);
    y[token * n + i] = sum;
}

// cos and sin of position * frequency, times a magnitude.  frequencies: [1 or tokens, pairs]; a block for each token
extern "C" __global__ void rope_table(const long long* positions, const double* frequencies, int each_its_own, int pairs,
                                      double magnitude, float* cosines, float* sines) {
    const double* row = frequencies + (each_its_own ? (size_t)blockIdx.x * pairs : 0);
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        const double angle = (double)positions[blockIdx.x] * row[i];
        cosines[(size_t)blockIdx.x * pairs + i] = (float)(cos(angle) * magnitude);
        sines[(size_t)blockIdx.x * pairs + i] = (float)(sin(angle) * magnitude);
    }
}

// Split a token's fused projection, turn the pairs (x[i], x[i + pairs]) of Q and K, put K and V into the cache.
// A block for each token, whose threads take the numbers of all heads, those of Q, then K, then V.  pairs: 0 where the layer
// has no RoPE
template <class Cache>
__device__ void rope_append(const float* qkv, const float* cosines, const float* sines, int pairs, int heads, int kv_heads,
                            int dim, const long long* slots, long long num_slots, float* q, Cache* k, Cache* v) {
    const size_t token = blockIdx.x, slot = slots[token];
    const float* row = qkv + token * (heads + 2 * kv_heads) * dim;
    for (int at = blockIdx.y * blockDim.x + threadIdx.x; at < (heads + 2 * kv_heads) * dim; at += gridDim.y * blockDim.x) {
        const int head = at / dim, i = at % dim, kv = head - heads, turned = kv < kv_heads ? pairs : 0;
        const float* x = row + head * dim;
        float y = x[i];
        if (i < turned) y = x[i] * cosines[token * pairs + i] - x[i + pairs] * sines[token * pairs + i];
        else if (i < 2 * turned) y = x[i] * cosines[token * pairs + i - pairs] + x[i - pairs] * sines[token * pairs + i - pairs];
        if (kv < 0) q[token * heads * dim + at] = y;
        else if (kv < kv_heads) store(k + ((size_t)kv * num_slots + slot) * dim + i, y);
        else store(v + ((size_t)(kv - kv_heads) * num_slots + slot) * dim + i, y);
    }
}
