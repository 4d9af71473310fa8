// Whether products of bit planes (and + population count) would beat 4-way dot products of bytes: the inner loops
// alone, everything in the first-level cache, 2-bit activations that are already cut into planes (which the byte
// kernels do not need). Usage: bench_bit_planes. Needs AVX-512 with VNNI and VPOPCNTDQ, otherwise it says so.

#include <chrono>
#include <cstdint>
#include <cstdio>

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

constexpr int64_t kDepth = 4096;  // products of one output
constexpr int kRows = 4;
constexpr int kTimes = 2000;

alignas(64) uint8_t activations[kRows * kDepth];
alignas(64) uint8_t weights[4 * kDepth];

// kRows outputs, activations of 2 bits, weights of kWeightBits: sums of 2^(i + j) popcount(x_i & w_j).
template <int kWeightBits>
__attribute__((target("avx512f,avx512vpopcntdq"))) int64_t bit_planes() {
  __m512i sums[kRows][kWeightBits + 1];
  for (auto& row : sums) {
    for (__m512i& sum : row) sum = _mm512_setzero_si512();
  }
  for (int64_t block = 0; block < kDepth / 512; ++block) {
    __m512i w[kWeightBits];
    for (int j = 0; j < kWeightBits; ++j) w[j] = _mm512_load_si512(weights + (block * kWeightBits + j) * 64);
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < 2; ++i) {
        const __m512i x = _mm512_load_si512(activations + ((block * kRows + r) * 2 + i) * 64);
        for (int j = 0; j < kWeightBits; ++j) {
          const __m512i ones = _mm512_popcnt_epi64(_mm512_and_si512(x, w[j]));
          sums[r][i + j] = _mm512_add_epi64(sums[r][i + j], ones);
        }
      }
    }
  }
  int64_t total = 0;
  for (auto& row : sums) {
    for (int p = 0; p <= kWeightBits; ++p) total += _mm512_reduce_add_epi64(row[p]) << p;
  }
  return total;
}

// kRows outputs of 16 channels each, in bytes; fields of kWeightBits cut out where they lie.
template <int kWeightBits>
__attribute__((target("avx512f,avx512bw,avx512vnni"))) int64_t dot_products() {
  constexpr int kFields = 8 / kWeightBits;
  __m512i sums[kRows][4];
  for (auto& row : sums) {
    for (__m512i& sum : row) sum = _mm512_setzero_si512();
  }
  const __m512i mask = _mm512_set1_epi8((1 << kWeightBits) - 1);
  for (int64_t block = 0; block < kDepth / 64; ++block) {
    const __m512i stored = _mm512_load_si512(weights + block * 64 / kFields * kFields % (2 * kDepth));
    for (int f = 0; f < kFields; ++f) {
      const __m512i w = _mm512_and_si512(_mm512_srli_epi16(stored, static_cast<unsigned>(f * kWeightBits)), mask);
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        __builtin_memcpy(&four, activations + r * kDepth + (block * kFields + f) % (kDepth / 4) * 4, 4);
        sums[r][f % 4] = _mm512_dpbusd_epi32(sums[r][f % 4], _mm512_set1_epi32(four), w);
      }
    }
  }
  int64_t total = 0;
  for (auto& row : sums) {
    for (const __m512i& sum : row) total += _mm512_reduce_add_epi32(sum);
  }
  return total;
}

volatile int64_t sink;

template <typename F>
void report(const char* name, double macs, const F& f) {
  using Clock = std::chrono::steady_clock;
  double best = 1e9;
  for (int i = 0; i < kTimes; ++i) {
    const auto start = Clock::now();
    sink = f();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    best = seconds < best ? seconds : best;
  }
  std::printf("%-28s %7.1f GMAC/s\n", name, macs / best * 1e-9);
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx512vpopcntdq") || !__builtin_cpu_supports("avx512vnni")) {
    std::printf("bench_bit_planes: this processor has no AVX-512 VPOPCNTDQ and VNNI\n");
    return 0;
  }
  for (auto& byte : activations) byte = 2;
  for (auto& byte : weights) byte = 0x5a;
  const double planes = static_cast<double>(kRows * kDepth);
  report("2x2 bit planes", planes, bit_planes<2>);
  report("2x4 bit planes", planes, bit_planes<4>);
  report("dot products, 2-bit weights", planes / 64 * 256, dot_products<2>);
  report("dot products, 4-bit weights", planes / 64 * 128, dot_products<4>);
}
#else
int main() { std::printf("bench_bit_planes: x86 only\n"); }
#endif
