// Running a grid of blocks, with faults caught, and the entry points that Python calls.

#pragma once

#include <sys/time.h>

#include "fibers.h"

// Processor seconds after which a launch counts as endless: a thread that spins until another one
// writes never lets that one run.
#ifndef SIMT_SECONDS
#define SIMT_SECONDS 300
#endif

namespace simt {

inline void on_fault(int number, siginfo_t* info, void*) {
    if (number == SIGSEGV || number == SIGBUS) fail("fault at address %p", info->si_addr);
    if (number == SIGVTALRM) fail("no end after %d s: a thread waits in a loop", SIMT_SECONDS);
    fail("undefined behaviour (signal %d): misaligned access, shift or index out of range", number);
}

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGVTALRM};
constexpr int kNumSignals = sizeof(kSignals) / sizeof(int);

// Catches faults while a kernel runs; fibers may have overflowed their stack, hence its own.
class FaultHandler {
public:
    FaultHandler() {
        static char* stack = map_guarded(kStackBytes, 0, 0);
        stack_t alternative = {};
        alternative.ss_sp = stack;
        alternative.ss_size = kStackBytes;
        sigaltstack(&alternative, &old_stack_);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < kNumSignals; ++i) sigaction(kSignals[i], &action, &old_[i]);
        set_timer(SIMT_SECONDS);
    }
    ~FaultHandler() {
        set_timer(0);
        for (int i = 0; i < kNumSignals; ++i) sigaction(kSignals[i], &old_[i], nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

private:
    static void set_timer(int seconds) {
        const itimerval time = {{0, 0}, {seconds, 0}};
        setitimer(ITIMER_VIRTUAL, &time, nullptr);
    }

    stack_t old_stack_ = {};
    struct sigaction old_[kNumSignals] = {};
};

inline void run_grid(size_t shared_bytes) {
    const dim3 grid = machine.grid;
    std::vector<unsigned> order(grid.x * grid.y * grid.z);
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    for (unsigned i = static_cast<unsigned>(order.size()); i > 1; --i) {
        if (machine.random) std::swap(order[i - 1], order[pick(i)]);
    }
    for (const unsigned i : order) {
        memset(machine.shared, kPoison, shared_bytes);
        if (__start_simt_shared) {
            memset(__start_simt_shared, kPoison, __stop_simt_shared - __start_simt_shared);
        }
        run_block({i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)});
    }
}

// Run a kernel; returns 0, or 1 with the reason in `message`.
inline int launch(void (*invoke)(void**), const unsigned* grid, const unsigned* block,
                  size_t shared_bytes, unsigned long long seed, void** params, char* message,
                  size_t capacity) {
    machine.message = message;
    machine.capacity = capacity;
    machine.grid = {grid[0], grid[1], grid[2]};
    machine.block = {block[0], block[1], block[2]};
    machine.random = seed * 0x9E3779B97F4A7C15ull;
    machine.invoke = invoke;
    machine.params = params;
    // Dynamic shared memory ends at a guard page.
    shared_bytes = (shared_bytes + 15) / 16 * 16;
    const size_t pages = (shared_bytes + kGuardBytes - 1) / kGuardBytes * kGuardBytes;
    char* region = map_guarded(pages, kGuardBytes, kGuardBytes);
    machine.shared = region + pages - shared_bytes;
    const FaultHandler handler;
    current = nullptr;
    const volatile int failed = sigsetjmp(machine.give_up, 1);
    if (!failed) run_grid(shared_bytes);
    current = nullptr;
    munmap(region - kGuardBytes, pages + 2 * kGuardBytes);
    return failed;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** params, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<A>*>(params[I])...);
}
template <class... A>
void call(void (*kernel)(A...), void** params) {
    call(kernel, params, std::index_sequence_for<A...>());
}
template <class... A>
constexpr unsigned count_params(void (*)(A...)) {
    return sizeof...(A);
}
template <class... A>
void size_params(void (*)(A...), unsigned* sizes) {
    ((*sizes++ = sizeof(A)), ...);
}

}  // namespace simt

// Where the stacks of `kMaxThreads` threads are noted; set before the first launch.
extern "C" void simt_use_stacks(char** table) { simt::stacks = table; }

// The entry points Python calls for one kernel.
#define SIMT_EXPORT(kernel)                                                                       \
    extern "C" int simt_launch_##kernel(const unsigned* grid, const unsigned* block,              \
                                        size_t shared_bytes, unsigned long long seed,             \
                                        void** params, char* message, size_t capacity) {          \
        return simt::launch([](void** p) { simt::call(kernel, p); }, grid, block, shared_bytes,   \
                            seed, params, message, capacity);                                     \
    }                                                                                             \
    extern "C" unsigned simt_params_##kernel(unsigned* sizes) {                                   \
        if (sizes) simt::size_params(kernel, sizes);                                              \
        return simt::count_params(kernel);                                                        \
    }
