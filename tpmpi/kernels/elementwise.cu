// What is computed row by row or number by number.  A row is a token; one block of threads for each.

// y = x / sqrt(mean(x^2) + eps) * gain, or with the mean taken off first, and a bias (may be null).   x and y may be the same
__device__ __forceinline__ void norm_row(const float* x, const float* gain, const float* bias, float* y, int n, int centred,
                                         float eps, float* parts) {
    float mean = 0.0f;
    if (centred) {
        for (int i = threadIdx.x; i < n; i += blockDim.x) mean += x[i];
        mean = block_sum(mean, parts) / (float)n;
    }
    float squares = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float d = x[i] - mean;
        squares = fmaf(d, d, squares);
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, parts) / (float)n + eps);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float z = (x[i] - mean) * factor * gain[i];
        y[i] = bias ? z + bias[i] : z;
    }
}

extern "C" __global__ void norm_rows(const float* x, const float* gain, const float* bias, float* y, int n, int centred, float eps) {
    DYNAMIC_SHARED(float, parts);
    const size_t row = (size_t)blockIdx.x * n;
    norm_row(x + row, gain, bias, y + row, n, centred, eps, parts);
}

// part += x, and the norm of it.
extern "C" __global__ void added_norm_rows(const float* x, float* part, const float* gain, const float* bias, float* y, int n,
                                           int centred, float eps) {
    DYNAMIC_SHARED(float, parts);
    const size_t row = (size_t)blockIdx.x * n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) part[row + i] += x[row + i];  // each thread reads its own again
    norm_row(part + row, gain, bias, y + row, n, centred, eps, parts);
}

// Each head of blockIdx.x's row through a norm of its own, in place.  stride: from a row to the next, in numbers
extern "C" __global__ void norm_heads(float* x, long long stride, int head_dim, const float* gain, const float* bias, int centred,
                                      float eps) {
    DYNAMIC_SHARED(float, parts);
    const int head = blockIdx.y * head_dim;
    float* row = x + blockIdx.x * stride + head;
    norm_row(row, gain + head, bias ? bias + head : bias, row, head_dim, centred, eps, parts);
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

// activation(gate) * up.  [tokens, 2 ffn] -> [tokens, ffn]; blockIdx.y is the token
extern "C" __global__ void gated_activation(const float* x, float* y, int ffn, int kind) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const float* row = x + (size_t)blockIdx.y * 2 * ffn;
    if (i < ffn) y[(size_t)blockIdx.y * ffn + i] = activation(row[i], kind) * row[ffn + i];
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
// A block for each token and head; heads: those of Q, then K, then V.  pairs: 0 where the layer has no RoPE
template <class Cache>
__device__ void rope_append(const float* qkv, const float* cosines, const float* sines, int pairs, int heads, int kv_heads,
                            int dim, const long long* slots, long long num_slots, float* q, Cache* k, Cache* v) {
    const size_t token = blockIdx.x;
    const int head = blockIdx.y, kv = head - heads, turned = kv < kv_heads ? pairs : 0;
    const float* x = qkv + (token * (heads + 2 * kv_heads) + head) * dim;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
        float y = x[i];
        if (i < turned) y = x[i] * cosines[token * pairs + i] - x[i + pairs] * sines[token * pairs + i];
        else if (i < 2 * turned) y = x[i] * cosines[token * pairs + i - pairs] + x[i - pairs] * sines[token * pairs + i - pairs];
        if (kv < 0) q[(token * heads + head) * dim + i] = y;
        else if (kv < kv_heads) store(k + ((size_t)kv * num_slots + slots[token]) * dim + i, y);
        else store(v + ((size_t)(kv - kv_heads) * num_slots + slots[token]) * dim + i, y);
    }
}
