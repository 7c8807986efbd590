// Blocks of CUDA threads on one CPU thread: a fiber per thread, blocks one after the other.
//
// A fiber runs until it meets a collective (block barrier, shuffle, vote, matrix instruction), so
// between two collectives its accesses are atomic. Seed 0 resumes fibers in a fixed order; any
// other seed picks blocks and fibers at random, which exposes accesses that lack a barrier.
// Detected, with the threads named: lanes of a warp in different collectives, lanes that never
// come, barriers nobody completes, faults on guarded memory, misaligned accesses.

#pragma once

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <type_traits>
#include <unistd.h>
#include <utility>
#include <vector>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// Where `__shared__` variables lie; absent if the kernel has none.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_simt_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) char __stop_simt_shared[];

namespace simt {

constexpr size_t kStackBytes = 96 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr unsigned kMaxThreads = 1024;
// NaN in every floating-point format, -1 as an integer.
constexpr int kPoison = 0xff;

#ifdef SIMT_UCONTEXT
struct Context {
    ucontext_t state;
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#else
struct Context {
    void* stack_pointer = nullptr;
};
extern "C" void simt_switch(void** save, void* load);
// The callee-saved registers of the System V ABI lie on the stack of a fiber that does not run.
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size simt_switch, . - simt_switch
)");
inline void switch_context(Context& from, Context& to) {
    simt_switch(&from.stack_pointer, to.stack_pointer);
}
#endif

enum Collective { kShuffle, kVote, kSyncWarp, kMmaF16, kMmaU8S8, kMmaS8U8, kMovmatrix };
inline const char* name_of(Collective kind) {
    static const char* const names[] = {"shuffle",      "vote",          "sync_warp",
                                        "mma_f16",      "mma_u8s8",      "mma_s8u8",
                                        "movmatrix"};
    return names[kind];
}

// A copy to shared memory that has been issued and not waited for.
struct AsyncCopy {
    void* target;
    const void* source;
    size_t bytes;
    unsigned group;
};

struct Fiber {
    Context context;
    char* stack = nullptr;
    dim3 thread;
    unsigned index = 0, lane = 0;
    // What it waits for inside its warp.
    Collective kind = kShuffle;
    unsigned members = 0;
    void* operand = nullptr;
    unsigned groups = 0;
    std::vector<AsyncCopy> copies;
};

// Lanes by what they are doing; the rest is ready to run.
struct Warp {
    unsigned waiting = 0, at_barrier = 0, gone = 0;
};

struct Machine {
    dim3 grid, block, block_index;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned> ready;
    unsigned live = 0, at_barrier = 0;
    unsigned long long random = 0;  // 0: fixed order
    Context main;
    sigjmp_buf give_up;
    char* message = nullptr;
    size_t capacity = 0;
    char* shared = nullptr;
    void (*invoke)(void**) = nullptr;
    void** params = nullptr;
};

static Machine machine;
static Fiber* current = nullptr;

inline unsigned pick(unsigned count) {
    if (machine.random == 0) return 0;
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return static_cast<unsigned>((machine.random >> 32) * count >> 32);
}

[[noreturn]] inline void fail(const char* format, ...) {
    int used = 0;
    if (current != nullptr) {
        const dim3 b = machine.block_index, t = current->thread;
        used = snprintf(machine.message, machine.capacity,
                        "block (%u, %u, %u) thread (%u, %u, %u): ", b.x, b.y, b.z, t.x, t.y, t.z);
    }
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(machine.message + used, machine.capacity - used, format, arguments);
    va_end(arguments);
    siglongjmp(machine.give_up, 1);
}

inline Warp& warp_of(const Fiber& fiber) { return machine.warps[fiber.index / 32]; }

[[noreturn]] inline void fail_deadlock() {
    unsigned in_warp = 0;
    const Fiber* example = nullptr;
    for (const Fiber& fiber : machine.fibers) {
        if (fiber.index >= machine.block.x * machine.block.y * machine.block.z) break;
        if (warp_of(fiber).waiting >> fiber.lane & 1) {
            ++in_warp;
            example = &fiber;
        }
    }
    fail("deadlock: %u threads at a block barrier, %u in a warp collective (the last in %s with "
         "members %08x)",
         machine.at_barrier, in_warp, example ? name_of(example->kind) : "none",
         example ? example->members : 0);
}

// Leave the running fiber for another that is ready.
inline void run_next() {
    if (machine.ready.empty()) fail_deadlock();
    const unsigned at = pick(static_cast<unsigned>(machine.ready.size()));
    const unsigned next = machine.ready[at];
    machine.ready[at] = machine.ready.back();
    machine.ready.pop_back();
    Fiber* from = current;
    current = &machine.fibers[next];
    if (current != from) switch_context(from->context, current->context);
}

inline void wake(Fiber& fiber) { machine.ready.push_back(fiber.index); }

// Wait for all lanes of `members`; the last to come calls `combine(lanes)`, lanes being the first
// fiber of the warp, and may read and write every member's operand.
template <class Combine>
void rendezvous(Collective kind, unsigned members, void* operand, Combine combine) {
    Fiber& self = *current;
    Warp& warp = warp_of(self);
    const unsigned bit = 1u << self.lane;
    if (!(members & bit)) fail("%s: the members %08x lack the caller", name_of(kind), members);
    if (members & warp.gone) {
        fail("%s: members %08x include lanes %08x, which have exited", name_of(kind), members,
             members & warp.gone);
    }
    if (members & warp.at_barrier) {
        fail("%s: lanes %08x of its members wait at a block barrier", name_of(kind),
             members & warp.at_barrier);
    }
    Fiber* lanes = &machine.fibers[self.index - self.lane];
    if (const unsigned others = members & warp.waiting) {
        const Fiber& other = lanes[__builtin_ctz(others)];
        if (other.kind != kind || other.members != members) {
            fail("divergence: %s with members %08x here, %s with members %08x in lane %u",
                 name_of(kind), members, name_of(other.kind), other.members, other.lane);
        }
    }
    self.kind = kind;
    self.members = members;
    self.operand = operand;
    warp.waiting |= bit;
    if ((warp.waiting & members) != members) {
        run_next();
        return;
    }
    combine(lanes);
    warp.waiting &= ~members;
    for (unsigned rest = members & ~bit; rest != 0; rest &= rest - 1) {
        wake(lanes[__builtin_ctz(rest)]);
    }
    if (machine.random != 0) {
        wake(self);
        run_next();
    }
}

inline void release_barrier() {
    for (unsigned w = 0; w < machine.warps.size(); ++w) {
        for (unsigned rest = machine.warps[w].at_barrier; rest != 0; rest &= rest - 1) {
            wake(machine.fibers[32 * w + __builtin_ctz(rest)]);
        }
        machine.warps[w].at_barrier = 0;
    }
    machine.at_barrier = 0;
}

inline void block_barrier() {
    warp_of(*current).at_barrier |= 1u << current->lane;
    if (++machine.at_barrier == machine.live) release_barrier();
    run_next();
}

inline void fiber_main() {
    machine.invoke(machine.params);
    Fiber& self = *current;
    Warp& warp = warp_of(self);
    warp.gone |= 1u << self.lane;
    for (unsigned rest = warp.waiting; rest != 0; rest &= rest - 1) {
        const Fiber& other = machine.fibers[self.index - self.lane + __builtin_ctz(rest)];
        if (other.members >> self.lane & 1) {
            fail("exited while lane %u waits for it in %s", other.lane, name_of(other.kind));
        }
    }
    if (--machine.live == 0) {
        switch_context(self.context, machine.main);
    }
    // Threads that have returned do not take part in barriers any more.
    if (machine.at_barrier == machine.live) release_barrier();
    run_next();
}

inline char* map_guarded(size_t bytes, size_t guard_before, size_t guard_after) {
    const size_t total = guard_before + bytes + guard_after;
    void* map = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) abort();
    char* base = static_cast<char*>(map);
    if (guard_before) mprotect(base, guard_before, PROT_NONE);
    if (guard_after) mprotect(base + guard_before + bytes, guard_after, PROT_NONE);
    return base + guard_before;
}

// Stacks by thread, one set for all libraries of the process: with a set each, some 120 kernels
// reach the system's limit of mappings. No two kernels run at a time.
static char** stacks = nullptr;

inline char* stack_of(unsigned index) {
    if (stacks[index] == nullptr) stacks[index] = map_guarded(kStackBytes, kGuardBytes, 0);
    return stacks[index];
}

inline void prepare(Fiber& fiber) {
    fiber.stack = stack_of(fiber.index);
#ifdef SIMT_UCONTEXT
    getcontext(&fiber.context.state);
    fiber.context.state.uc_stack.ss_sp = fiber.stack;
    fiber.context.state.uc_stack.ss_size = kStackBytes;
    fiber.context.state.uc_link = nullptr;
    makecontext(&fiber.context.state, fiber_main, 0);
#else
    // Six registers, then the address `ret` takes; the ABI wants the stack off by 8 on entry.
    void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(fiber_main);
    fiber.context.stack_pointer = top;
#endif
}

inline void run_block(dim3 index) {
    const dim3 shape = machine.block;
    const unsigned count = shape.x * shape.y * shape.z;
    machine.block_index = index;
    machine.live = count;
    machine.at_barrier = 0;
    machine.warps.assign((count + 31) / 32, Warp());
    if (count % 32) machine.warps.back().gone = ~0u << count % 32;
    if (machine.fibers.size() < count) machine.fibers.resize(count);
    machine.ready.clear();
    for (unsigned i = 0; i < count; ++i) {
        Fiber& fiber = machine.fibers[i];
        fiber.index = i;
        fiber.lane = i % 32;
        fiber.thread = {i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y)};
        fiber.copies.clear();
        fiber.groups = 0;
        prepare(fiber);
        if (i) machine.ready.push_back(i);
    }
    current = &machine.fibers[0];
    switch_context(machine.main, current->context);
    current = nullptr;
}

}  // namespace simt
