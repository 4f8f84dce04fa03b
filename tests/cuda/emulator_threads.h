// One std::thread for each CUDA thread, in namespace emulator; see emulator.h.
static std::barrier<>* whole_block;
static std::deque<std::barrier<>>* warps;
static uint32_t values[MOST_THREADS];

[[noreturn]] static void fail(const std::string& message) {  // its own process is at its end
    fprintf(stderr, "%s: %s\n", place().c_str(), message.c_str());
    abort();
}

static uint32_t meet(Wait wait, unsigned mask, uint32_t value, unsigned source, int) {
    if (wait == BARRIER) return whole_block->arrive_and_wait(), 0;
    const unsigned number = own_number(), lanes = std::min(32u, thread_count - number / 32 * 32);
    if (lanes < 32 ? mask != (1u << lanes) - 1 : mask != 0xffffffffu) fail("EMULATOR_THREADS knows only masks of a whole warp");
    std::barrier<>& warp = (*warps)[number / 32];
    if (wait == SHUFFLE) values[number] = value;
    warp.arrive_and_wait();
    if (wait == SHUFFLE) {
        value = values[number / 32 * 32 + source];
        warp.arrive_and_wait();
    }
    return value;
}

static void run_block(const std::vector<unsigned>& order) {
    std::barrier<> all(thread_count);
    std::deque<std::barrier<>> each;
    for (unsigned first = 0; first < thread_count; first += 32) each.emplace_back(std::min(32u, thread_count - first));
    whole_block = &all, warps = &each;
    std::vector<std::thread> threads;
    for (unsigned number : order)
        threads.emplace_back([number, block = blockIdx] {
            threadIdx = position(number), blockIdx = block;
            kernel(arguments);
            (*warps)[number / 32].arrive_and_drop();
            whole_block->arrive_and_drop();
        });
    for (std::thread& thread : threads) thread.join();
}
