// Runs CUDA kernels on one thread of a CPU, for tests.
//
// Blocks run one after another; the threads of a block are fibers that change places only where
// they wait for each other (__syncthreads, __syncwarp, shuffles), in an order that a seed shuffles
// anew each time. So a missing barrier shows as a result that depends on the seed, or as the NaN
// that shared memory holds before anybody wrote it; a barrier that not all threads reach, as an
// error, as does an access to memory that is not there, such as the page behind the end of dynamic
// shared memory, or to an address that is not a multiple of the size of what is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
enum class Kind : int { kSync, kShuffle };

// Runs `body` once per thread. What a device would refuse becomes the error that
// cudaGetLastError() then returns.
void launch(unsigned grid, unsigned block, size_t shared_bytes, void* stream,
            const std::function<void()>& body);

Index current_thread();
Index current_block();
Index block_size();
Index grid_size();
void* dynamic_shared();

void wait_for_block();
// Waits for all lanes of the mask, then returns what lane `source` brought.
uint32_t exchange(Kind kind, unsigned mask, uint32_t bits, int source);

int take_error();
const char* error_text();

// The order of threads and blocks from here on; 0: ascending.
void set_order(uint64_t seed);
// Kernels see no more blocks than this from here on, as if they had asked for so many; 0: all.
void limit_grid(unsigned most_blocks);

}  // namespace emulator
