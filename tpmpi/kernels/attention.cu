// softmax(scale Q K^T) V over rings of cache slots.
//
// K and V: [kv_heads, slots, dim], float32 or the bits of bfloat16.  A task is a run of queries of one request; a block
// computes it for a few heads that read one KV head: KEYS keys at a time, a thread for each key in Q K^T, a thread for each
// number of a head in the sum over V, with the running maximum and sum of Milakov and Gimelshein (2018).  Where a step has
// few queries and long texts, the keys are split among blocks (Dao et al., flash-decoding, 2023), and `attend_combine`
// puts the parts together.

#define KEYS 128  // threads of a block, too
// ITEMS: queries times heads of a block; a query that is not there has weight 0.  In the sum over V a thread has eight numbers
// of a head and some of the keys, or, where a head is no multiple of eight, SPANS numbers and all keys.
// runs: [run, 3] KV head, first head, heads.  split: keys of a block.  A task's part goes to parts [splits, tokens, heads, dim]
// and its maximum and sum to stats [splits, tokens, heads, 2]; with one split b itself is written.
template <class Cache, int ITEMS, int SPANS>
__device__ void attend(const float* q, const Cache* k, const Cache* v, const i64* tasks, const i64* blocks, int block,
                       const i64* runs, int heads, int dim, i64 num_slots, i64 tokens, int window, int sinks, float scale,
                       float cap, int split, float* b, float* parts, float* stats) {
    constexpr bool EIGHTS = SPANS == 0;
    constexpr int OUT = EIGHTS ? 8 : SPANS;
    DYNAMIC_SHARED(float, memory);
    float *queries = memory, *scores = queries + ITEMS * dim, *top = scores + ITEMS * KEYS, *sum = top + ITEMS,
          *factor = sum + ITEMS;
    i64* slots = reinterpret_cast<i64*>(factor + ITEMS + (ITEMS * (dim + KEYS + 3)) % 2);
    const i64 *task = tasks + (size_t)blockIdx.x * TASK_SIZE, *run = runs + 3 * blockIdx.y;
    const int t = threadIdx.x, lane = t % WARP, each = (int)run[2], items = (int)task[ROWS] * each;
    const int low = (int)task[LOW], seen_first = (int)task[SINKS], position = (int)task[POSITION];
    const int columns = seen_first + position + (int)task[ROWS] - low, begin = (int)blockIdx.z * split;
    const int end = columns - begin < split ? columns : begin + split;
    const int groups = EIGHTS ? dim / 8 : KEYS, key_steps = KEYS / groups;  // threads of a key; keys that they take at once
    for (int i = t; i < ITEMS * dim; i += KEYS) {
        const int item = i / dim;
        queries[i] = item < items
            ? q[((task[FIRST_ROW] + item / each) * heads + run[1] + item % each) * dim + i % dim] * scale : 0.0f;
    }
    if (t < ITEMS) top[t] = NOTHING_SEEN, sum[t] = 0.0f;
    float out[OUT][ITEMS];
    int from[ITEMS];  // where the queries stand
#pragma unroll
    for (int m = 0; m < ITEMS; m++) {
        from[m] = position + m / each;
#pragma unroll
        for (int s = 0; s < OUT; s++) out[s][m] = 0.0f;
    }
    k += (size_t)run[0] * num_slots * dim;
    v += (size_t)run[0] * num_slots * dim;

    for (int at = begin; at < end; at += KEYS) {
        const int count = end - at < KEYS ? end - at : KEYS;
        __syncthreads();  // the queries are there, and the last keys' scores and slots are no longer read
        if (t < count) {
            const int column = at + t, key = column < seen_first ? column : low + column - seen_first;
            const i64 slot = slot_of(key, task, blocks, block);
            slots[t] = slot;
            const Cache* row = k + (size_t)slot * dim;
            float score[ITEMS], eight[8];
#pragma unroll
            for (int m = 0; m < ITEMS; m++) score[m] = 0.0f;
            if (EIGHTS) {
#pragma unroll 8
                for (int d = 0; d < dim; d += 8) {
                    load_eight(row + d, eight);
#pragma unroll
                    for (int m = 0; m < ITEMS; m++) {
#pragma unroll
                        for (int i = 0; i < 8; i += 4) {
                            const float4 x = *reinterpret_cast<const float4*>(queries + m * dim + d + i);
                            score[m] = fmaf(eight[i + 3], x.w, fmaf(eight[i + 2], x.z,
                                            fmaf(eight[i + 1], x.y, fmaf(eight[i], x.x, score[m]))));
                        }
                    }
                }
            } else {
                for (int d = 0; d < dim; d++) {
                    const float number = cached(row[d]);
#pragma unroll
                    for (int m = 0; m < ITEMS; m++) score[m] = fmaf(number, queries[m * dim + d], score[m]);
                }
            }
#pragma unroll
            for (int m = 0; m < ITEMS; m++) {
                if (cap > 0.0f) score[m] = cap * tanhf(score[m] / cap);
                if (m >= items || key > from[m] || (key <= from[m] - window && key >= sinks)) score[m] = NOTHING_SEEN;
                scores[m * KEYS + t] = score[m];
            }
        } else {
#pragma unroll
            for (int m = 0; m < ITEMS; m++) scores[m * KEYS + t] = NOTHING_SEEN;
        }
        __syncthreads();
        for (int m = t / WARP; m < ITEMS; m += KEYS / WARP) {  // a warp for each item
            float* row = scores + m * KEYS;
            float highest = top[m];
            for (int i = lane; i < KEYS; i += WARP) highest = fmaxf(highest, row[i]);
            highest = warp_max(highest);
            float total = 0.0f;
            for (int i = lane; i < KEYS; i += WARP) {
                row[i] = row[i] == NOTHING_SEEN ? 0.0f : expf(row[i] - highest);
                total += row[i];
            }
            total = warp_sum(total);
            const float kept = expf(top[m] - highest);
            __syncwarp();  // all lanes have read the old maximum
            if (lane == 0) factor[m] = kept, top[m] = highest, sum[m] = fmaf(sum[m], kept, total);
        }
        __syncthreads();
#pragma unroll
        for (int m = 0; m < ITEMS; m++)
#pragma unroll
            for (int s = 0; s < OUT; s++) out[s][m] *= factor[m];
        if (EIGHTS) {
            if (t / groups < key_steps) {
#pragma unroll 4
                for (int i = t / groups; i < count; i += key_steps) {
                    float eight[8];
                    load_eight(v + (size_t)slots[i] * dim + t % groups * 8, eight);
#pragma unroll
                    for (int m = 0; m < ITEMS; m++)
#pragma unroll
                        for (int s = 0; s < 8; s++) out[s % OUT][m] = fmaf(scores[m * KEYS + i], eight[s], out[s % OUT][m]);
                }
            }
        } else {
#pragma unroll
            for (int s = 0; s < OUT; s++) {
                const int d = t + s * KEYS;
                if (d >= dim) break;
#pragma unroll 8
                for (int i = 0; i < count; i++) {
                    const float number = cached(v[(size_t)slots[i] * dim + d]);
#pragma unroll
                    for (int m = 0; m < ITEMS; m++) out[s][m] = fmaf(scores[m * KEYS + i], number, out[s][m]);
                }
            }
        }
    }

    __syncthreads();  // the last maxima and sums are there
    const bool whole = gridDim.z == 1;
    const float total = t < items ? sum[t] : 0.0f, highest = t < items ? top[t] : 0.0f;
    const auto row_of = [&](int item) { return (size_t)(task[FIRST_ROW] + item / each) * heads + run[1] + item % each; };
    const auto put = [&](int item, int d, float x, float divisor) {
        if (whole) b[row_of(item) * dim + d] = x / divisor;
        else if (end > begin) parts[((size_t)blockIdx.z * tokens * heads + row_of(item)) * dim + d] = x;
    };
    if (!whole && t < items) {
        float* stat = stats + 2 * ((size_t)blockIdx.z * tokens * heads + row_of(t));
        stat[0] = highest, stat[1] = end > begin ? total : 0.0f;
    }
    if (EIGHTS) {  // the sums over some of the keys become one, in their order  [key_steps, items, dim]
        float *divisors = sum, *some = reinterpret_cast<float*>(slots);
        if (t / groups < key_steps) {
#pragma unroll
            for (int m = 0; m < ITEMS; m++)
#pragma unroll
                for (int s = 0; s < 8; s++)
                    if (m < items) some[(t / groups * items + m) * dim + t % groups * 8 + s] = out[s % OUT][m];
        }
        __syncthreads();
        for (int i = t; i < items * dim; i += KEYS) {
            float x = 0.0f;
            for (int step = 0; step < key_steps; step++) x += some[step * items * dim + i];
            put(i / dim, i % dim, x, divisors[i / dim]);
        }
    } else {
#pragma unroll
        for (int s = 0; s < OUT; s++) {
            const int d = t + s * KEYS;
            if (d >= dim) break;
#pragma unroll
            for (int m = 0; m < ITEMS; m++)
                if (m < items) put(m, d, out[s][m], sum[m]);
        }
    }
}

// The parts of all splits, in their order.  A block for each token and head.
extern "C" __global__ void attend_combine(const float* parts, const float* stats, int splits, int heads, int dim,
                                          long long tokens, float* b) {
    DYNAMIC_SHARED(float, shares);  // of each split, and room for the sums of warps
    const size_t row = (size_t)blockIdx.x * heads + blockIdx.y, each = (size_t)tokens * heads;
    float highest = NOTHING_SEEN, total = 0.0f;
    for (int s = 0; s < splits; s++) highest = fmaxf(highest, stats[2 * (s * each + row)]);
    for (int s = threadIdx.x; s < splits; s += blockDim.x) {
        const float* stat = stats + 2 * (s * each + row);
        shares[s] = stat[1] > 0.0f ? expf(stat[0] - highest) : 0.0f;
        total = fmaf(stat[1], shares[s], total);
    }
    total = block_sum(total, shares + splits);
    for (int d = threadIdx.x; d < dim; d += blockDim.x) {
        float out = 0.0f;
#pragma unroll 4
        for (int s = 0; s < splits; s++)  // what was not computed is not there to be read
            if (shares[s] > 0.0f) out = fmaf(parts[(s * each + row) * dim + d], shares[s], out);
        b[row * dim + d] = out / total;
    }
}
