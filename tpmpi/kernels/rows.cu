// Numbers of a row, 1 or 4 that lie side by side.

template <int STEP>
__device__ __forceinline__ void load(const float* x, float* out) {  // 1 or 4 numbers that lie side by side
    if (STEP == 4) {
        const float4 four = *reinterpret_cast<const float4*>(x);
        out[0] = four.x, out[STEP / 4] = four.y, out[STEP / 2] = four.z, out[STEP - 1] = four.w;
    } else {
        out[0] = x[0];
    }
}
template <int STEP>
__device__ __forceinline__ void store(float* x, const float* in) {
    if (STEP == 4) *reinterpret_cast<float4*>(x) = make_float4(in[0], in[STEP / 4], in[STEP / 2], in[STEP - 1]);
    else x[0] = in[0];
}
// For the library's product of many rows: as the sum of two of bfloat16.  low may be null: only the nearest is kept.
template <int STEP>
__device__ __forceinline__ void store_halves(u16* high, u16* low, const float* in) {
    u16 first[STEP], second[STEP];
    for (int j = 0; j < STEP; j++) first[j] = to_bfloat16(in[j]), second[j] = to_bfloat16(in[j] - from_bfloat16(first[j]));
    if (STEP == 4) {
        *reinterpret_cast<ushort4*>(high) = make_ushort4(first[0], first[STEP / 4], first[STEP / 2], first[STEP - 1]);
        if (low) *reinterpret_cast<ushort4*>(low) = make_ushort4(second[0], second[STEP / 4], second[STEP / 2], second[STEP - 1]);
    } else {
        high[0] = first[0];
        if (low) low[0] = second[0];
    }
}
