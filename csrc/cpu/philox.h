// Philox 4x32-10, first word, counter (position, row, bag, 0): survfuse/reference/dropout.py.
#pragma once

#include <cstdint>

namespace survfuse {
namespace {

inline uint32_t philox_word(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2) {
  uint32_t c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// A word below this is dropped; same rounding as keep_threshold() of the reference.
inline uint32_t keep_threshold(double p) {
  const double scaled = p * 4294967296.0;
  double whole = static_cast<double>(static_cast<uint64_t>(scaled));
  const double rest = scaled - whole;
  // Python's round: halves go to the even neighbour
  if (rest > 0.5 || (rest == 0.5 && (static_cast<uint64_t>(whole) & 1))) whole += 1;
  return whole > 4294967295.0 ? 4294967295u : static_cast<uint32_t>(whole);
}

}  // namespace
}  // namespace survfuse
