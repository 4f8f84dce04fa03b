// softmax(scale Q K^T) V for many queries of a request, on tensor cores, in the manner of Dao et al., FlashAttention-2 (2023).
//
// A block computes ITEMS items, queries times heads that read one KV head, 16 in each warp, over TILE_KEYS keys at a time.
// Tensor cores multiply numbers of bfloat16.  ROUNDED: Q and what softmax gives are rounded to it.  Else they, and K and V of
// a cache of float32, are sums of two such numbers, and all products but that of the two small ones are added.
//
// The order of a sum's terms is free.  So a lane reads eight numbers that lie side by side, of Q and K eight of a head, of
// V, which lies transposed, those of eight keys, and they stand where the tensor core has others; the scores of a lane are
// then just those that it needs for the sum over V.

#define TILE_KEYS 32
#define TILE_THREADS 128
#define ITEMS (TILE_THREADS / WARP * 16)

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

// Eight numbers of a row of the cache as pairs of bfloat16, in parts; zeros where there is none.
template <int PARTS>
__device__ __forceinline__ void load_cached(const u16* row, bool there, uint4* out) {
    out[0] = there ? *reinterpret_cast<const uint4*>(row) : make_uint4(0, 0, 0, 0);
}
template <int PARTS>
__device__ __forceinline__ void load_cached(const float* row, bool there, uint4* out) {
    float eight[8];
    u32 words[PARTS][4];
    if (there) load_eight(row, eight);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float low = there ? eight[2 * i] : 0.0f, high = there ? eight[2 * i + 1] : 0.0f;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            words[part][i] = nearest_pair(low, high);
            low -= from_bfloat16(words[part][i]), high -= __uint_as_float(words[part][i] & 0xffff0000u);
        }
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) out[part] = make_uint4(words[part][0], words[part][1], words[part][2], words[part][3]);
}

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
                             const i64* runs, int heads, int dim, i64 num_slots, i64 window, int sinks, float scale, float cap,
                             float* b) {
    constexpr int STRIDE = DIM % 64 == 0 ? DIM + 32 : DIM;  // of a key, in numbers: so that eight lanes read from all banks
    constexpr int Q_PARTS = ROUNDED ? 1 : 2, KV_PARTS = sizeof(Cache) == 4 && !ROUNDED ? 2 : 1, RUNS = DIM / 32;
    DYNAMIC_SHARED(u16, memory);
    u16 *keys = memory, *values = keys + KV_PARTS * TILE_KEYS * STRIDE;  // [parts, TILE_KEYS, STRIDE], [parts, DIM, TILE_KEYS]
    i64* slots = reinterpret_cast<i64*>(values + KV_PARTS * DIM * TILE_KEYS);  // of this tile and the next
    const i64 *task = tasks + (size_t)blockIdx.x * TASK_SIZE, *run = runs + 3 * blockIdx.y;
    const int t = threadIdx.x, lane = t % WARP, r = lane / 4, c = lane % 4;
    const int each = (int)run[2], items = (int)task[ROWS] * each, item = t / WARP * 16 + r;  // this lane's, and item + 8
    const i64 low = task[LOW], seen_first = task[SINKS], position = task[POSITION], end = seen_first + position + task[ROWS] - low;
    k += (size_t)run[0] * num_slots * dim, v += (size_t)run[0] * num_slots * dim;

    u32 queries[RUNS][2][4];  // of both items; their second parts lie in shared memory, for there are no more registers
    uint4* seconds = reinterpret_cast<uint4*>(slots + 2 * TILE_KEYS) + t;
    i64 from[2];  // where their queries stand
#pragma unroll
    for (int side = 0; side < 2; side++) {
        const int which = item + 8 * side;
        from[side] = position + which / each;
        const float* row = q + ((task[FIRST_ROW] + which / each) * heads + run[1] + which % each) * dim;
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            u32 eight[Q_PARTS][4];
            load_queries<Q_PARTS>(row, which < items, 32 * i + 8 * c, dim, scale, eight);
#pragma unroll
            for (int j = 0; j < 4; j++) queries[i][side][j] = eight[0][j];
            if (Q_PARTS == 2)
                seconds[(2 * i + side) * TILE_THREADS] = make_uint4(eight[Q_PARTS - 1][0], eight[Q_PARTS - 1][1],
                                                                    eight[Q_PARTS - 1][2], eight[Q_PARTS - 1][3]);
        }
    }
    float out[DIM / 8][4], top[2] = {NOTHING_SEEN, NOTHING_SEEN}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int d = 0; d < DIM / 8; d++) out[d][0] = out[d][1] = out[d][2] = out[d][3] = 0.0f;
    if (t < TILE_KEYS && t < end) slots[t] = slot_of(t < seen_first ? t : low + t - seen_first, task, blocks, block);

    for (i64 at = 0; at < end; at += TILE_KEYS) {
        const i64 *here = slots + at / TILE_KEYS % 2 * TILE_KEYS, next = at + TILE_KEYS + t;
        __syncthreads();  // the slots are there, and the last tile is no longer read
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            const int key = t / 4, d = 32 * i + t % 4 * 8;
            const bool there = at + key < end && d < dim;
            uint4 eight[KV_PARTS];
            load_cached<KV_PARTS>(k + (there ? here[key] * dim + d : 0), there, eight);
#pragma unroll
            for (int part = 0; part < KV_PARTS; part++)
                *reinterpret_cast<uint4*>(keys + (part * TILE_KEYS + key) * STRIDE + d) = eight[part];
        }
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            const int key = t % TILE_KEYS, d = 32 * i + t / TILE_KEYS * 8;
            const bool there = at + key < end && d < dim;
            uint4 eight[KV_PARTS];
            load_cached<KV_PARTS>(v + (there ? here[key] * dim + d : 0), there, eight);
#pragma unroll
            for (int part = 0; part < KV_PARTS; part++) {
                const u32 words[4] = {eight[part].x, eight[part].y, eight[part].z, eight[part].w};
#pragma unroll
                for (int j = 0; j < 8; j++)
                    values[(part * DIM + d + j) * TILE_KEYS + key] = (u16)(words[j / 2] >> (16 * (j % 2)));
            }
        }
        if (t < TILE_KEYS && next < end)
            slots[(at / TILE_KEYS + 1) % 2 * TILE_KEYS + t] =
                slot_of(next < seen_first ? next : low + next - seen_first, task, blocks, block);
        __syncthreads();

        float scores[4][4];  // of the keys 8 c + 2 n and 8 c + 2 n + 1 with either item
#pragma unroll
        for (int n = 0; n < 4; n++) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            const u32 *a = queries[i][0], *a8 = queries[i][1];
            uint4 second[2];
            if (Q_PARTS == 2) second[0] = seconds[2 * i * TILE_THREADS], second[1] = seconds[(2 * i + 1) * TILE_THREADS];
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
        u32 shares[4][2][Q_PARTS];  // of those keys, after softmax, for either item
#pragma unroll
        for (int side = 0; side < 2; side++) {
            float highest = top[side];
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float& score = scores[n][2 * side + i];
                    const i64 column = at + 8 * c + 2 * n + i, key = column < seen_first ? column : low + column - seen_first;
                    if (cap > 0.0f) score = cap * tanhf(score / cap);
                    if (column >= end || key > from[side] || (key <= from[side] - window && key >= sinks)) score = NOTHING_SEEN;
                    highest = fmaxf(highest, score);
                }
            highest = row_max(highest);
            const float kept = expf(top[side] - highest);
            float total = 0.0f;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float two[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    two[i] = scores[n][2 * side + i] == NOTHING_SEEN ? 0.0f : expf(scores[n][2 * side + i] - highest);
                    total += two[i];
                }
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

#pragma unroll
    for (int side = 0; side < 2; side++) {
        const int which = item + 8 * side;
        if (which >= items) continue;
        float* row = b + ((task[FIRST_ROW] + which / each) * heads + run[1] + which % each) * dim;
#pragma unroll
        for (int d = 0; d < DIM / 8; d++)
            if (8 * d < dim)
                *reinterpret_cast<float2*>(row + 8 * d + 2 * c) = make_float2(out[d][2 * side] / sum[side],
                                                                              out[d][2 * side + 1] / sum[side]);
    }
}
