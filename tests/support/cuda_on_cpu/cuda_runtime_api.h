// A GPU of one block at a time, in g++ alone: each thread of the block is a fibre, which runs until it waits for others.
// The order in which waiting fibres go on is drawn by a seed, so that a missing barrier shows as a wrong number.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <algorithm>
#include <random>
#include <vector>

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

namespace emulation {

struct Place {
  unsigned x;
};

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool ended = false;
  int waits_for = 0;  // 0: nothing, 1: the block's barrier, 2: its warp
  uint64_t sent;      // what it offers in a shuffle
};

struct Block {
  std::vector<Fibre> fibres;
  ucontext_t scheduler;
  size_t running;
};

inline Block* block;
inline unsigned most_blocks = 1u << 30;  // of a launch; fewer than it asks for makes the kernels stride over rows
inline std::mt19937 order;
inline Place threadIdx, blockIdx, blockDim, gridDim;
inline std::function<void()> kernel_call;

inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::exit(9);
}

inline void wait(int what) {
  Fibre& own = block->fibres[block->running];
  own.waits_for = what;
  const size_t number = block->running;
  swapcontext(&own.context, &block->scheduler);
  threadIdx.x = static_cast<unsigned>(number);
}

inline void start() {
  kernel_call();
  block->fibres[block->running].ended = true;
  swapcontext(&block->fibres[block->running].context, &block->scheduler);
}

// Lets the fibres of [first, last) go on that wait for `what`, if all of them do.
inline bool release(size_t first, size_t last, int what) {
  size_t waiting = 0, ended = 0;
  for (size_t i = first; i < last; ++i) {
    waiting += !block->fibres[i].ended && block->fibres[i].waits_for == what;
    ended += block->fibres[i].ended;
  }
  if (waiting != 0 && waiting + ended == last - first && ended != 0) fail("some threads ended while others wait for them");
  if (waiting != last - first) return false;
  for (size_t i = first; i < last; ++i) block->fibres[i].waits_for = 0;
  return true;
}

inline void run_block() {
  Block own;
  block = &own;
  own.fibres.resize(blockDim.x);
  for (Fibre& fibre : own.fibres) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    makecontext(&fibre.context, start, 0);
  }
  for (;;) {
    std::vector<size_t> ready;
    size_t ended = 0;
    for (size_t i = 0; i < own.fibres.size(); ++i) {
      ended += own.fibres[i].ended;
      if (!own.fibres[i].ended && own.fibres[i].waits_for == 0) ready.push_back(i);
    }
    if (ended == own.fibres.size()) return;
    std::shuffle(ready.begin(), ready.end(), order);
    for (const size_t i : ready) {
      own.running = i;
      threadIdx.x = static_cast<unsigned>(i);
      swapcontext(&own.scheduler, &own.fibres[i].context);
    }
    bool moved = !ready.empty();
    for (size_t warp = 0; warp < own.fibres.size(); warp += 32) moved |= release(warp, warp + 32, 2);
    moved |= release(0, own.fibres.size(), 1);
    if (!moved) fail("threads wait for one another at different places");
  }
}

// In the place of kernel<<<blocks, threads, 0, stream>>>(arguments...)
template <class... Parameters>
auto launch(void (*kernel)(Parameters...), unsigned blocks, int threads) {
  return [=](auto... arguments) {
    gridDim.x = blocks < most_blocks ? blocks : most_blocks;
    blockDim.x = static_cast<unsigned>(threads);
    kernel_call = [=] { kernel(arguments...); };
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block();
  };
}

}  // namespace emulation

using emulation::blockDim;
using emulation::blockIdx;
using emulation::gridDim;
using emulation::threadIdx;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline void __syncthreads() { emulation::wait(1); }

inline float __shfl_down_sync(unsigned mask, float value, int distance) {
  if (mask != 0xffffffffu) emulation::fail("a shuffle of a part of a warp");
  auto& fibres = emulation::block->fibres;
  const size_t own = emulation::block->running;
  __builtin_memcpy(&fibres[own].sent, &value, 4);
  emulation::wait(2);  // until all 32 have sent
  const size_t partner = own % 32 + distance < 32 ? own + distance : own;
  float received;
  __builtin_memcpy(&received, &fibres[partner].sent, 4);
  emulation::wait(2);  // until all 32 have read
  return received;
}
