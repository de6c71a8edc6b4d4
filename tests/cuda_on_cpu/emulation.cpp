// The scheduler of emulation.h. Never compiled with -fsanitize=thread: all fibers share its state on purpose. With
// -DTELL_TSAN or -DTELL_ASAN the sanitizers are told of every switch. On a fiber's path there is no std algorithm,
// growing vector or string: ThreadSanitizer intercepts their memmove and their memory would pass between fibers.
#include "emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <vector>

#ifdef TELL_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define TSAN(...) __VA_ARGS__
#else
#define TSAN(...)
#endif
#ifdef TELL_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void __asan_unpoison_memory_region(void const volatile*, size_t);
}
#define ASAN(...) __VA_ARGS__
#else
#define ASAN(...)
#endif

// Saves the registers that a call must keep, and the stack pointer; takes the other stack up where it was left.
extern "C" void emulation_switch(void** save, void* load);
#if defined(__x86_64__)
asm(".text\n.globl emulation_switch\n.hidden emulation_switch\n.type emulation_switch,@function\nemulation_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size emulation_switch,.-emulation_switch\n");
#else
#error "the stack switch is written for x86-64"
#endif

namespace emulation {
Thread* self = nullptr;
Counters counters = {};
const int fault = std::getenv("EMULATION_FAULT") ? std::atoi(std::getenv("EMULATION_FAULT")) : -1;
namespace {
const bool huge = std::getenv("EMULATION_MEMORY") && !std::strcmp(std::getenv("EMULATION_MEMORY"), "huge");
constexpr size_t kStack = 256 << 10, kPage = 4096;
constexpr unsigned kMostThreads = 1024;

struct Fiber : Thread {
  unsigned number = 0;  // in the block
  void* sp = nullptr;
  char* stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  bool done = true, started = false;
  const char* where = nullptr;  // what it waits for
  void *fake = nullptr, *tsan = nullptr;
};
struct Warp {
  unsigned mask = 0, come = 0, returned = 0, turn = 0;
  const char* where = nullptr;
  Slots slots[2];
};
struct Pool {  // of fibers; blocks alternate between two, so that ThreadSanitizer sees races between blocks
  Fiber* fiber[kMostThreads] = {};
  char barrier[2][16];
};

std::mutex launching;
Pool& pool_of(size_t block) {
  static Pool* pools = new Pool[2];  // they live until the process ends
  return pools[block & 1];
}
Pool* pool = nullptr;
Warp warps[kMostThreads / 32];
uint64_t ready[kMostThreads / 64];  // a bit a runnable thread
Fiber main_fiber;
Fiber* current = nullptr;
char* shared_memory = nullptr;
unsigned threads_, waiting, returned, turn;
const char* barrier_where;
char failure[1024];
void (*body_)(void*);
void* argument_;
[[maybe_unused]] char grid_start, grid_end;
enum { kForward, kReverse, kRandom } order = kForward;
std::minstd_rand random_;

#ifdef TELL_ASAN
bool from_main;
void arrived(void* fake) {  // the bounds of the main stack are known only from here
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(fake, &bottom, &size);
  if (from_main) main_fiber.bottom = bottom, main_fiber.size = size;
}
#endif

void enter(Fiber* to) {
  Fiber* from = current;
  if (to == from) return;
  current = to;
  self = to;
  ASAN(from_main = from == &main_fiber; __sanitizer_start_switch_fiber(&from->fake, to->bottom, to->size);)
  TSAN(__tsan_switch_to_fiber(to->tsan, 1 /* orders nothing */);)
  emulation_switch(&from->sp, to->sp);
  ASAN(arrived(from->fake);)
}
void wake(unsigned number) { ready[number / 64] |= 1ull << (number % 64); }
Fiber* next() {
  const unsigned words = (threads_ + 63) / 64, start = order == kRandom ? unsigned(random_() % words) : 0;
  for (unsigned step = 0; step < words; ++step) {
    const unsigned word = order == kReverse ? words - 1 - step : (start + step) % words;
    if (!ready[word]) continue;
    unsigned bit = unsigned(order == kReverse ? 63 - __builtin_clzll(ready[word]) : __builtin_ctzll(ready[word]));
    if (order == kRandom) {
      const unsigned by = unsigned(random_() & 63);
      const uint64_t turned = by ? ready[word] >> by | ready[word] << (64 - by) : ready[word];
      bit = (unsigned(__builtin_ctzll(turned)) + by) & 63;
    }
    ready[word] &= ~(1ull << bit);
    return pool->fiber[word * 64 + bit];
  }
  return &main_fiber;
}
void wait_at(const char* where) {
  current->where = where;
  enter(next());
  current->where = nullptr;
}
[[noreturn]] void fail(const char* what, const char* more, const char* where) {
  std::snprintf(failure, sizeof failure, "%s: %s%s [block %u, thread %u]", where, what, more, self->block.x, self->index.x);
  TSAN(__tsan_release(&grid_end);)
  enter(&main_fiber);
  __builtin_unreachable();
}

void fiber_main() {
  ASAN(arrived(nullptr);)
  for (;;) {
    TSAN(__tsan_acquire(&grid_start);)
    body_(argument_);
    TSAN(__tsan_release(&grid_end);)
    current->done = true;
    ++returned;
    warps[current->number / 32].returned |= 1u << (current->number % 32);
    enter(next());
  }
}
void make(Fiber* fiber) {
  if (!fiber->stack) {
    fiber->stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(fiber->stack, kPage, PROT_NONE);
    fiber->bottom = fiber->stack + kPage;
    fiber->size = kStack - kPage;
    TSAN(fiber->tsan = __tsan_create_fiber(0);)
  }
  ASAN(__asan_unpoison_memory_region(fiber->bottom, fiber->size);)
  void** sp = reinterpret_cast<void**>(fiber->stack + kStack);
  *--sp = nullptr;  // the stack is then as after a call
  *--sp = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  fiber->sp = sp;
  fiber->started = true;
}
// Of exactly the size asked for, so that AddressSanitizer sees the first byte past it; NaN or huge, so that a read before
// the first write shows.
char* fresh(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes ? bytes : 1)) std::abort();
  return static_cast<char*>(__builtin_memset(p, huge ? 0x7f : 0xff, bytes));
}

void run_block(size_t block, unsigned blocks) {
  waiting = returned = turn = 0;
  for (Warp& warp : warps) warp.come = warp.returned = warp.turn = 0;
  for (uint64_t& word : ready) word = 0;
  for (unsigned t = 0; t < threads_; ++t) {
    Fiber*& fiber = pool->fiber[t];
    if (!fiber) fiber = new Fiber;
    fiber->number = t;
    fiber->done = false;
    fiber->where = nullptr;
    fiber->index = {t, 0, 0};
    fiber->block = {unsigned(block), 0, 0};
    fiber->block_size = dim3(threads_);
    fiber->grid = dim3(blocks);
    if (!fiber->started) make(fiber);
    wake(t);
  }
  TSAN(__tsan_release(&grid_start);)
  enter(next());
  if (failure[0] || returned == threads_) return;
  int at = std::snprintf(failure, sizeof failure, "deadlock, %u of %u threads returned; waiting:", returned, threads_), shown = 0;
  const char* last = nullptr;
  for (unsigned t = 0; t < threads_ && shown < 4; ++t) {
    const Fiber* fiber = pool->fiber[t];
    if (fiber->done || fiber->where == last) continue;
    last = fiber->where;
    at += std::snprintf(failure + at, sizeof failure - size_t(at), "\n  thread %u at %.100s", t, last);
    ++shown;
  }
}
}  // namespace

void* shared() { return shared_memory; }

void count_load(size_t size, bool once_a_warp) {
  if (once_a_warp && current->number % 32 != 0) return;
  counters.loaded += int64_t(size);
  if (size == 16) counters.wide += 16;
}
void count_store(size_t size) { counters.stored += int64_t(size); }
void count_exp() { ++counters.exps; }

void sync_threads(const char* where) {
  if (current->number == 0) ++counters.barriers;
  if (returned) fail("__syncthreads after a thread of the block has returned", "", where);
  if (waiting && std::strcmp(barrier_where, where)) fail("divergent __syncthreads; others wait at ", barrier_where, where);
  barrier_where = where;
  [[maybe_unused]] char* object = pool->barrier[turn & 1];  // two, by turns: the next barrier's must not mix with this one's
  TSAN(__tsan_release(object);)
  if (++waiting == threads_) {
    waiting = 0;
    ++turn;
    for (unsigned t = 0; t < threads_; ++t) wake(t);
  }
  wait_at(where);
  TSAN(__tsan_acquire(object);)
}

const Slots* exchange(unsigned mask, const void* value, size_t size, const char* where) {
  Warp& warp = warps[current->number / 32];
  ++counters.exchanges;
  const unsigned lane = current->number % 32, base = current->number - lane;
  const unsigned exist = threads_ - base >= 32 ? ~0u : (1u << (threads_ - base)) - 1;
  if (!(mask >> lane & 1)) fail("the calling lane is not in the mask", "", where);
  if (mask & ~exist) fail("the mask names lanes that the block does not have", "", where);
  if (mask & warp.returned) fail("the mask names lanes that have returned", "", where);
  if (warp.come && (warp.mask != mask || std::strcmp(warp.where, where))) fail("divergent warp collective; others wait at ", warp.where, where);
  warp.mask = mask;
  warp.where = where;
  Slots& slots = warp.slots[warp.turn & 1];
  for (size_t i = 0; i < size; ++i) slots.lane[lane][i] = static_cast<const unsigned char*>(value)[i];
  if ((warp.come |= 1u << lane) == mask) {
    warp.come = 0;
    ++warp.turn;
    for (unsigned i = 0; i < 32; ++i)
      if (mask >> i & 1) wake(base + i);
  }
  wait_at(where);
  return &slots;
}
void read_slot(const Slots* slots, unsigned lane, void* value, size_t size) {
  for (size_t i = 0; i < size; ++i) static_cast<unsigned char*>(value)[i] = slots->lane[lane][i];
}

void run(unsigned blocks, unsigned threads, size_t shared_bytes, void (*body)(void*), void* argument) {
  const std::lock_guard<std::mutex> lock(launching);
  if (blocks == 0) return;
  if (threads == 0 || threads > kMostThreads || threads % 32) throw std::runtime_error("bad block size");
  if (shared_bytes > 48 << 10) throw std::runtime_error("more shared memory than a launch gets unasked");
  counters.shared.push_back(shared_bytes);
  body_ = body;
  argument_ = argument;
  threads_ = threads;
  failure[0] = 0;
  const char* wanted = std::getenv("EMULATION_ORDER");
  order = !wanted || !std::strcmp(wanted, "forward") ? kForward : !std::strcmp(wanted, "reverse") ? kReverse : kRandom;
  if (order == kRandom) random_.seed(unsigned(std::atoi(wanted)) + 1);
  std::vector<size_t> sequence(blocks);
  for (size_t b = 0; b < blocks; ++b) sequence[b] = order == kReverse ? blocks - 1 - b : b;
  if (order == kRandom) std::shuffle(sequence.begin(), sequence.end(), random_);
  std::vector<char*> used;  // freed when the grid ends: under ThreadSanitizer a free is a write that would race
  used.reserve(blocks);
  TSAN(main_fiber.tsan = __tsan_get_current_fiber();)
  current = &main_fiber;
  for (size_t k = 0; k < blocks && !failure[0]; ++k) {
    pool = &pool_of(k);
    shared_memory = fresh(shared_bytes);
    used.push_back(shared_memory);
    run_block(sequence[k], blocks);
#ifndef TELL_TSAN
    std::free(used.back());
    used.pop_back();
#endif
  }
#ifdef TELL_TSAN
  if (failure[0])  // what threads that never returned did still comes before what the caller does next
    for (size_t p = 0; p < 2; ++p)
      for (Fiber* fiber : pool_of(p).fiber)
        if (fiber && fiber->tsan) {
          __tsan_switch_to_fiber(fiber->tsan, 1);
          __tsan_release(&grid_end);
          __tsan_switch_to_fiber(main_fiber.tsan, 1);
        }
#endif
  TSAN(__tsan_acquire(&grid_end);)
  for (char* p : used) std::free(p);
  self = nullptr;
  if (!failure[0]) return;
  for (size_t p = 0; p < 2; ++p)
    for (Fiber* fiber : pool_of(p).fiber)
      if (fiber) fiber->started = false;  // their stacks are given up
  throw std::runtime_error(failure);
}
}  // namespace emulation
