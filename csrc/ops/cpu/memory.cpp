#include "memory.h"

#include <unistd.h>

#include <fstream>

namespace mixbit::ops {

namespace {

// Bytes of the last level of cache that this process can use. sysconf counts all sockets on some machines, so the
// kernel's own description comes first.
int64_t last_level_cache() {
  static const int64_t bytes = [] {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    int64_t kibibytes = 0;
    if (file >> kibibytes && kibibytes > 0) {
      return kibibytes << 10;
    }
    const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return size > 0 ? static_cast<int64_t>(size) : int64_t{32} << 20;
  }();
  return bytes;
}

}  // namespace

bool beyond_cache(const at::Tensor& y, int64_t tensors) {
  constexpr int64_t kFreshPages = int64_t{32} << 20;
  const auto bytes = static_cast<int64_t>(y.nbytes());
  return 4 * tensors * bytes > 3 * last_level_cache() && bytes <= kFreshPages;
}

}  // namespace mixbit::ops
