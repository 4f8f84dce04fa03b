// softmax(scale Q K^T) V for many queries of a request, on tensor cores, in the manner of Dao et al., FlashAttention-2 (2023).
//
// A block computes ITEMS items, queries times heads that read one KV head, 16 in each warp, over 2 * TILE_KEYS keys at a time:
// the first four warps with the first half of them, the others with the second, and at the end they put their parts together.
// Tensor cores multiply numbers of bfloat16.  ROUNDED: Q and what softmax gives are rounded to it.  Else they, and K and V of
// a cache of float32, are sums of two such numbers, and all products but that of the two small ones are added.
//
// The order of a sum's terms is free.  So a lane reads eight numbers that lie side by side, of Q and K eight of a head, of
// V, which lies transposed, those of eight keys, and they stand where the tensor core has others; the scores of a lane are
// then just those that it needs for the sum over V.

#define TILE_KEYS 32
#define SIDE_THREADS 128  // of either half
#define LOG2_E 1.44269504f  // scores are to the base 2, whose powers the hardware has
#define ITEMS (SIDE_THREADS / WARP * 16)

// 32 numbers of a row of Q as a lane needs them: eight, from its place on, in parts.
template <int PARTS>
__device__ __forceinline__ void load_queries(const float* row, bool there, int at, int dim, float scale, u32 (*out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float low = there && at + 2 * i < dim ? row[at + 2 * i] * scale : 0.0f;
        float high = there && at + 2 * i + 1 < dim ? row[at + 2 * i + 1] * scale : 0.0f;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            out[part][i] = nearest_pair(low, high);
            low -= from_bfloat16(out[part][i]), high -= __uint_as_float(out[part][i] & 0xffff0000u);
        }
    }
}

// Eight numbers of a row of the cache, zeros where there is none; and they as pairs of bfloat16, in parts.
struct Halves {
    uint4 four;
    __device__ __forceinline__ void load(const u16* row, bool there) {
        four = there ? *reinterpret_cast<const uint4*>(row) : make_uint4(0, 0, 0, 0);
    }
    template <int PARTS>
    __device__ __forceinline__ void pairs(u32 (*out)[4]) const {
        out[0][0] = four.x, out[0][1] = four.y, out[0][2] = four.z, out[0][3] = four.w;
    }
};
struct Floats {
    float4 first, second;
    __device__ __forceinline__ void load(const float* row, bool there) {
        first = there ? reinterpret_cast<const float4*>(row)[0] : make_float4(0, 0, 0, 0);
        second = there ? reinterpret_cast<const float4*>(row)[1] : make_float4(0, 0, 0, 0);
    }
    template <int PARTS>
    __device__ __forceinline__ void pairs(u32 (*out)[4]) const {
        float eight[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                out[part][i] = nearest_pair(eight[2 * i], eight[2 * i + 1]);
                eight[2 * i] -= from_bfloat16(out[part][i]), eight[2 * i + 1] -= __uint_as_float(out[part][i] & 0xffff0000u);
            }
    }
};
template <class Cache> struct Eight { typedef Halves Type; };
template <> struct Eight<float> { typedef Floats Type; };

__device__ __forceinline__ float row_max(float x) {  // of the four lanes that have a row
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// tasks, blocks, runs: as for `attend`, with up to ITEMS items in a task.  DIM: a multiple of 32, at least dim.
template <class Cache, int DIM, bool ROUNDED>
__device__ void attend_tiles(const float* q, const Cache* k, const Cache* v, const i64* tasks, const i64* blocks, int block,
                             const i64* runs, int heads, int dim, i64 num_slots, int window, int sinks, float scale, float cap,
                             float* b) {
    constexpr int STRIDE = DIM % 64 == 0 ? DIM + 32 : DIM;  // of a key, in numbers: so that eight lanes read from all banks
    constexpr int Q_PARTS = ROUNDED ? 1 : 2, KV_PARTS = sizeof(Cache) == 4 && !ROUNDED ? 2 : 1, RUNS = DIM / 32;
    constexpr int SIDE = KV_PARTS * TILE_KEYS * (STRIDE + DIM);  // numbers of either half
    DYNAMIC_SHARED(u16, memory);
    const int side_of_keys = threadIdx.x / SIDE_THREADS, t = threadIdx.x % SIDE_THREADS, lane = t % WARP, r = lane / 4, c = lane % 4;
    u16 *keys = memory + side_of_keys * SIDE, *values = keys + KV_PARTS * TILE_KEYS * STRIDE;  // [parts, TILE_KEYS, STRIDE],
    i64* slots = reinterpret_cast<i64*>(memory + 2 * SIDE);  // of these keys and the next       and [parts, DIM, TILE_KEYS]
    const i64 *task = tasks + (size_t)blockIdx.y * TASK_SIZE, *run = runs + 3 * blockIdx.x;
    const int each = (int)run[2], items = (int)task[ROWS] * each, item = t / WARP * 16 + r;  // this lane's, and item + 8
    const int low = (int)task[LOW], seen_first = (int)task[SINKS], position = (int)task[POSITION], queries_here = (int)task[ROWS];
    const int end = seen_first + position + queries_here - low;
    k += (size_t)run[0] * num_slots * dim, v += (size_t)run[0] * num_slots * dim;

    u32 queries[RUNS][2][4];  // of both items; their second parts lie in shared memory, for there are no more registers
    uint4* seconds = reinterpret_cast<uint4*>(slots + 4 * TILE_KEYS) + t;  // and the other half's
    int from[2];  // where their queries stand
#pragma unroll
    for (int side = 0; side < 2; side++) {
        const int which = item + 8 * side;
        from[side] = position + which / each;
        const float* row = q + ((task[FIRST_ROW] + which / each) * heads + run[1] + which % each) * dim;
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            u32 eight[Q_PARTS][4];
            load_queries<Q_PARTS>(row, which < items, 32 * i + 8 * c, dim, cap > 0.0f ? scale : scale * LOG2_E, eight);
#pragma unroll
            for (int j = 0; j < 4; j++) queries[i][side][j] = eight[0][j];
            if (Q_PARTS == 2 && side_of_keys == 0)
                seconds[(2 * i + side) * SIDE_THREADS] = make_uint4(eight[Q_PARTS - 1][0], eight[Q_PARTS - 1][1],
                                                                    eight[Q_PARTS - 1][2], eight[Q_PARTS - 1][3]);
        }
    }
    float out[DIM / 8][4], top[2] = {NOTHING_SEEN, NOTHING_SEEN}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int d = 0; d < DIM / 8; d++) out[d][0] = out[d][1] = out[d][2] = out[d][3] = 0.0f;
    const auto find_slot = [&](int column, int turn) {
        const int key = column < seen_first ? column : low + column - seen_first;
        if (column < end) slots[turn * 2 * TILE_KEYS + threadIdx.x] = slot_of(key, task, blocks, block);
    };
    if (threadIdx.x < 2 * TILE_KEYS) find_slot(threadIdx.x, 0);

    int turn = 0;
    for (int begin = 0; begin < end; begin += 2 * TILE_KEYS, turn ^= 1) {
        const int at = begin + side_of_keys * TILE_KEYS;
        const i64* here = slots + (2 * turn + side_of_keys) * TILE_KEYS;
        __syncthreads();  // the slots are there, and the last keys are no longer read
        typename Eight<Cache>::Type k_eight[RUNS], v_eight[RUNS];  // all are asked for before the first is put down
        const int k_key = t / 4, v_key = t % TILE_KEYS;
        const i64 k_row = at + k_key < end ? here[k_key] * dim : 0, v_row = at + v_key < end ? here[v_key] * dim : 0;
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            const int k_at = 32 * i + t % 4 * 8, v_at = 32 * i + t / TILE_KEYS * 8;
            k_eight[i].load(k + k_row + k_at, at + k_key < end && k_at < dim);
            v_eight[i].load(v + v_row + v_at, at + v_key < end && v_at < dim);
        }
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            const int k_at = 32 * i + t % 4 * 8, v_at = 32 * i + t / TILE_KEYS * 8;
            u32 words[KV_PARTS][4];
            k_eight[i].template pairs<KV_PARTS>(words);
#pragma unroll
            for (int part = 0; part < KV_PARTS; part++)
                *reinterpret_cast<uint4*>(keys + (part * TILE_KEYS + k_key) * STRIDE + k_at) =
                    make_uint4(words[part][0], words[part][1], words[part][2], words[part][3]);
            v_eight[i].template pairs<KV_PARTS>(words);
#pragma unroll
            for (int part = 0; part < KV_PARTS; part++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    values[(part * DIM + v_at + j) * TILE_KEYS + v_key] = (u16)(words[part][j / 2] >> (16 * (j % 2)));
        }
        if (threadIdx.x < 2 * TILE_KEYS) find_slot(begin + 2 * TILE_KEYS + threadIdx.x, turn ^ 1);
        __syncthreads();

        float scores[4][4];  // of the keys 8 c + 2 n and 8 c + 2 n + 1 with either item
#pragma unroll
        for (int n = 0; n < 4; n++) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            const u32 *a = queries[i][0], *a8 = queries[i][1];
            uint4 second[2];
            if (Q_PARTS == 2) second[0] = seconds[2 * i * SIDE_THREADS], second[1] = seconds[(2 * i + 1) * SIDE_THREADS];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int key = r / 2 * 8 + 2 * n + r % 2;
#pragma unroll
                for (int other = 0; other < KV_PARTS; other++) {
                    const uint4 z = *reinterpret_cast<const uint4*>(keys + (other * TILE_KEYS + key) * STRIDE + 32 * i + 8 * c);
                    multiply_tile(scores[n], a[0], a8[0], a[1], a8[1], z.x, z.y);
                    multiply_tile(scores[n], a[2], a8[2], a[3], a8[3], z.z, z.w);
                    if (Q_PARTS == 2 && other == 0) {
                        multiply_tile(scores[n], second[0].x, second[1].x, second[0].y, second[1].y, z.x, z.y);
                        multiply_tile(scores[n], second[0].z, second[1].z, second[0].w, second[1].w, z.z, z.w);
                    }
                }
            }
        }
        if (cap > 0.0f) {
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) scores[n][i] = LOG2_E * cap * tanhf(scores[n][i] / cap);
        }
        const int first_key = at < seen_first ? at : low + at - seen_first, last_query = position + queries_here - 1;
        const bool whole = at + TILE_KEYS <= end && low + at + TILE_KEYS - 1 - seen_first <= position
            && (at >= seen_first ? first_key > last_query - window : low == seen_first && last_query < window);
        if (!whole) {  // some query does not see some key
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int column = at + 8 * c + 2 * n + i % 2, key = column < seen_first ? column : low + column - seen_first;
                    if (column >= end || key > from[i / 2] || (key <= from[i / 2] - window && key >= sinks)) scores[n][i] = NOTHING_SEEN;
                }
        }
        u32 shares[4][2][Q_PARTS];  // of those keys, after softmax, for either item
#pragma unroll
        for (int side = 0; side < 2; side++) {
            float highest = top[side], total = 0.0f;
#pragma unroll
            for (int n = 0; n < 4; n++) highest = fmaxf(highest, fmaxf(scores[n][2 * side], scores[n][2 * side + 1]));
            highest = row_max(highest);
            const float kept = exp2f(top[side] - highest);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float two[2] = {exp2f(scores[n][2 * side] - highest), exp2f(scores[n][2 * side + 1] - highest)};
                if (!whole) {  // where nothing was seen yet, the difference is 0
                    if (scores[n][2 * side] == NOTHING_SEEN) two[0] = 0.0f;
                    if (scores[n][2 * side + 1] == NOTHING_SEEN) two[1] = 0.0f;
                }
                total += two[0] + two[1];
#pragma unroll
                for (int part = 0; part < Q_PARTS; part++) {
                    shares[n][side][part] = nearest_pair(two[0], two[1]);
                    two[0] -= from_bfloat16(shares[n][side][part]);
                    two[1] -= __uint_as_float(shares[n][side][part] & 0xffff0000u);
                }
            }
            sum[side] = fmaf(sum[side], kept, row_sum(total)), top[side] = highest;
#pragma unroll
            for (int d = 0; d < DIM / 8; d++) out[d][2 * side] *= kept, out[d][2 * side + 1] *= kept;
        }
#pragma unroll
        for (int d = 0; d < DIM / 8; d++)
#pragma unroll
            for (int other = 0; other < KV_PARTS; other++) {
                const uint4 z = *reinterpret_cast<const uint4*>(values + (other * DIM + 8 * d + r) * TILE_KEYS + 8 * c);
#pragma unroll
                for (int part = 0; part < Q_PARTS; part++) {
                    if (part + other == 2) continue;
                    multiply_tile(out[d], shares[0][0][part], shares[0][1][part], shares[1][0][part], shares[1][1][part], z.x, z.y);
                    multiply_tile(out[d], shares[2][0][part], shares[2][1][part], shares[3][0][part], shares[3][1][part], z.z, z.w);
                }
            }
    }

    __syncthreads();  // nobody reads keys or values any more: what the second half has takes their place, by lanes
    float* other = reinterpret_cast<float*>(memory) + t;
    if (side_of_keys == 1) {
#pragma unroll
        for (int d = 0; d < DIM / 8; d++)
#pragma unroll
            for (int i = 0; i < 4; i++) other[(4 * d + i) * SIDE_THREADS] = out[d][i];
#pragma unroll
        for (int side = 0; side < 2; side++)
            other[(DIM / 2 + side) * SIDE_THREADS] = top[side], other[(DIM / 2 + 2 + side) * SIDE_THREADS] = sum[side];
    }
    __syncthreads();
    if (side_of_keys == 1) return;
#pragma unroll
    for (int side = 0; side < 2; side++) {
        const int which = item + 8 * side;
        if (which >= items) continue;
        const float other_top = other[(DIM / 2 + side) * SIDE_THREADS], highest = fmaxf(top[side], other_top);
        const float mine = exp2f(top[side] - highest), theirs = exp2f(other_top - highest);
        const float all = fmaf(sum[side], mine, other[(DIM / 2 + 2 + side) * SIDE_THREADS] * theirs);
        float* row = b + ((task[FIRST_ROW] + which / each) * heads + run[1] + which % each) * dim;
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) {
            float two[2];
#pragma unroll
            for (int i = 0; i < 2; i++)
                two[i] = fmaf(out[d][2 * side + i], mine, other[(4 * d + 2 * side + i) * SIDE_THREADS] * theirs) / all;
            if (8 * d < dim) *reinterpret_cast<float2*>(row + 8 * d + 2 * c) = make_float2(two[0], two[1]);
        }
    }
}
