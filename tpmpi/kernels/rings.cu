// What both kernels of attention share: tasks, and where the keys of a ring lie.

enum { FIRST_ROW, ROWS, POSITION, LOW, SINKS, RING, RING_BLOCKS, PINNED, TASK_SIZE };  // numbers of a task

// The cache slot of a position (see kv_cache.Ring).
__device__ __forceinline__ i64 slot_of(i64 position, const i64* task, const i64* blocks, int block) {
    const u32 place = (u32)position, size = (u32)block;  // 32 bits: to divide 64 takes a hundred instructions
    const u32 pinned = (u32)task[PINNED], turning = (u32)task[RING_BLOCKS] - pinned;
    u32 number = place / size;
    if (number >= pinned && turning > 0) number = pinned + (number - pinned) % turning;
    return blocks[task[RING] + number] * block + place % size;
}

// Eight numbers that lie side by side, by 16 bytes at a time.
__device__ __forceinline__ void load_eight(const float* x, float* out) {
    const float4 a = *reinterpret_cast<const float4*>(x), b = *reinterpret_cast<const float4*>(x + 4);
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}
__device__ __forceinline__ void load_eight(const u16* x, float* out) {
    const uint4 four = *reinterpret_cast<const uint4*>(x);
    out[0] = from_bfloat16(four.x), out[1] = __uint_as_float(four.x & 0xffff0000u);
    out[2] = from_bfloat16(four.y), out[3] = __uint_as_float(four.y & 0xffff0000u);
    out[4] = from_bfloat16(four.z), out[5] = __uint_as_float(four.z & 0xffff0000u);
    out[6] = from_bfloat16(four.w), out[7] = __uint_as_float(four.w & 0xffff0000u);
}
