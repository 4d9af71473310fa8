#include "statistics.cuh"

#include "launch.h"

namespace mixbit::kernels::cuda {

void launch_moments(StorageType storage, int64_t outer, int64_t channels, int64_t inner, const void* x,
                    double* partials, double* moments, CUstream_st* stream) {
  const int64_t blocks = reduce_blocks(outer * inner);
  with_element(storage, [&](auto element) {
    using T = decltype(element);
    moments_kernel<T><<<static_cast<unsigned>(channels * blocks), kThreads, 0, stream>>>(
        outer, channels, inner, blocks, static_cast<const T*>(x), is_aligned(x), partials);
  });
  join_moments_kernel<<<blocks_for(channels, kThreads), kThreads, 0, stream>>>(partials, channels, blocks, moments);
}

void launch_histogram(int64_t channels, int64_t n, const float* sorted, const double* moments, int64_t bins,
                      double* histogram, CUstream_st* stream) {
  histogram_kernel<<<static_cast<unsigned>(channels * bins), kThreads, 0, stream>>>(n, sorted, moments, bins,
                                                                                    histogram);
}

void launch_prefix_sums(int64_t channels, int64_t n, const float* values, double* partials, double* prefix,
                        double* squares, CUstream_st* stream) {
  const int64_t blocks = reduce_blocks(n);
  const auto grid = static_cast<unsigned>(channels * blocks);
  row_sums_kernel<<<grid, kThreads, 0, stream>>>(n, blocks, values, partials);
  add_blocks_kernel<<<blocks_for(channels, kThreads), kThreads, 0, stream>>>(partials, channels, blocks, 2, 1, 1,
                                                                             squares);
  prefix_sums_kernel<<<grid, kThreads, 0, stream>>>(n, blocks, values, partials, prefix);
}

namespace {

template <typename Data>
void search(const SearchArguments& a, const Data& data, double* errors, float* scales, CUstream_st* stream) {
  const int64_t wanted = a.count * a.channels;
  candidate_errors_kernel<<<static_cast<unsigned>(wanted * kScaleCandidates), kThreads, 0, stream>>>(a, data, errors);
  pick_scales_kernel<<<blocks_for(wanted, kThreads), kThreads, 0, stream>>>(a, data, errors, scales);
}

}  // namespace

void launch_scale_search(const SearchArguments& a, const SortedRows& rows, double* errors, float* scales,
                         CUstream_st* stream) {
  search(a, rows, errors, scales, stream);
}

void launch_scale_search(const SearchArguments& a, const HistogramRow& row, double* errors, float* scales,
                         CUstream_st* stream) {
  histogram_starts_kernel<<<1, 1, 0, stream>>>(row);
  search(a, row, errors, scales, stream);
}

void launch_histogram_noise(const SearchArguments& a, const HistogramRow& row, const float* scales, double* noise,
                            CUstream_st* stream) {
  histogram_starts_kernel<<<1, 1, 0, stream>>>(row);
  given_errors_kernel<<<static_cast<unsigned>(a.count), kThreads, 0, stream>>>(a, row, scales, noise);
}

}  // namespace mixbit::kernels::cuda
