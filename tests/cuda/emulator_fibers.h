// One fiber for each CUDA thread, in namespace emulator; see emulator.h.
#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT
#endif

constexpr size_t STACK = 128 << 10, PAGE = 4096;

struct Thread {
    Wait wait;
    int line;
    unsigned mask, source;
    uint32_t value, result;
#ifdef EMULATOR_UCONTEXT
    ucontext_t context;
    jmp_buf jump;
    bool started;
#else
    void* stack_pointer;
#endif
};

static Thread threads[MOST_THREADS];
static Thread* current;
static unsigned char* stacks;
static void body();

#ifdef EMULATOR_UCONTEXT  // a context only to begin with: swapcontext makes two system calls
static jmp_buf scheduler;
static void prepare(Thread& thread, unsigned char* stack) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stack, thread.context.uc_stack.ss_size = STACK, thread.context.uc_link = nullptr;
    makecontext(&thread.context, body, 0);
    thread.started = false;
}
static void resume(Thread& thread) {
    if (_setjmp(scheduler)) return;
    if (thread.started) _longjmp(thread.jump, 1);
    thread.started = true;
    setcontext(&thread.context);
}
static void leave() {
    if (!_setjmp(current->jump)) _longjmp(scheduler, 1);
}
#else
asm(R"(
.text
emulator_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** save, void* to);
static void* scheduler;
static void prepare(Thread& thread, unsigned char* stack) {
    void** top = reinterpret_cast<void**>(stack + STACK);
    top[-1] = nullptr, top[-2] = reinterpret_cast<void*>(&body);
    std::fill(top - 8, top - 2, nullptr);  // the registers that emulator_switch takes back
    thread.stack_pointer = top - 8;
}
static void resume(Thread& thread) { emulator_switch(&scheduler, thread.stack_pointer); }
static void leave() { emulator_switch(&current->stack_pointer, scheduler); }
#endif

static void body() {
    kernel(arguments);
    current->wait = ENDED;
    leave();
}

static void fail(const std::string& message) {  // nobody resumes this thread
    error = place() + ", thread " + std::to_string(current - threads) + ": " + message;
    leave();
    abort();
}

static uint32_t meet(Wait wait, unsigned mask, uint32_t value, unsigned source, int line) {
    Thread& me = *current;
    const unsigned lane = (&me - threads) % 32;
    if (wait != BARRIER && !(mask >> lane & 1)) fail("its own lane is not in the mask, line " + std::to_string(line));
    if (wait == SHUFFLE && !(mask >> source & 1))
        fail("a shuffle reads a lane that is not in the mask, line " + std::to_string(line));
    me.wait = wait, me.mask = mask, me.value = value, me.source = source, me.line = line;
    leave();
    return me.result;
}

static bool complete(const Thread& one, unsigned first) {  // all lanes of its mask are there
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(one.mask >> lane & 1)) continue;
        const bool gone = first + lane >= thread_count || threads[first + lane].wait == ENDED;
        if (gone && one.wait == SYNC_WARP) continue;
        if (gone || threads[first + lane].wait != one.wait || threads[first + lane].mask != one.mask) return false;
    }
    return true;
}

static bool release() {
    const auto end = threads + thread_count;
    const auto live = std::find_if(threads, end, [](Thread& t) { return t.wait != ENDED; });
    if (std::all_of(live, end, [&](Thread& t) { return t.wait == ENDED || (t.wait == BARRIER && t.line == live->line); })) {
        std::for_each(live, end, [](Thread& t) { if (t.wait == BARRIER) t.wait = RUNNING; });
        return true;
    }
    bool any = false;
    for (unsigned number = 0; number < thread_count; number++) {
        const Thread one = threads[number];
        const unsigned first = number / 32 * 32;
        if ((one.wait != SHUFFLE && one.wait != SYNC_WARP) || !complete(one, first)) continue;
        any = true;
        for (unsigned lane = 0; lane < 32; lane++) {
            Thread& other = threads[first + lane];
            if (!(one.mask >> lane & 1) || first + lane >= thread_count || other.wait == ENDED) continue;
            other.result = threads[first + other.source].value, other.wait = RUNNING;
        }
    }
    return any;
}

static std::string waiting() {
    std::map<std::pair<int, int>, unsigned> counts;
    for (unsigned number = 0; number < thread_count; number++)
        counts[{threads[number].wait, threads[number].wait == ENDED ? 0 : threads[number].line}]++;
    std::string text = "not all threads of a barrier, or lanes of a shuffle, reach it:";
    for (const auto& [at, count] : counts)
        text += " " + std::to_string(count) + (at.first == ENDED ? " have ended" : std::string(" at ") + CALLED[at.first] +
                " in line " + std::to_string(at.second) + ",");
    return text;
}

static void run_block(const std::vector<unsigned>& order) {
    if (!stacks) {  // an unreadable page below each
        stacks = static_cast<unsigned char*>(mmap(nullptr, MOST_THREADS * (STACK + PAGE), PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (stacks == MAP_FAILED) abort();
        for (unsigned i = 0; i < MOST_THREADS; i++) mprotect(stacks + i * (STACK + PAGE), PAGE, PROT_NONE);
    }
    for (unsigned number : order) {
        prepare(threads[number], stacks + number * (STACK + PAGE) + PAGE);
        threads[number].wait = RUNNING;
    }
    for (unsigned live = thread_count; live;) {
        for (unsigned number : order) {
            if (threads[number].wait != RUNNING) continue;
            current = threads + number, threadIdx = position(number);
            resume(*current);
            if (!error.empty()) return;
            live -= threads[number].wait == ENDED;
        }
        if (live && !release()) {
            error = place() + ": " + waiting();
            return;
        }
    }
}

// ---- -fsanitize=alignment,null,bounds without its library: what faults on a GPU, and not on a CPU

struct EmulatorWhere { const char* file; unsigned line, column; };
extern "C" void __ubsan_handle_type_mismatch_v1(EmulatorWhere* where, uintptr_t pointer) {
    fail((pointer ? "misaligned address, line " : "null pointer, line ") + std::to_string(where->line));
}
extern "C" void __ubsan_handle_out_of_bounds(EmulatorWhere* where, uintptr_t index) {
    fail("index " + std::to_string(intptr_t(index)) + " of an array is out of bounds, line " +
         std::to_string(where->line));
}
