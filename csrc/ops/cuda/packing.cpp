// Packing on the device. Whether codes fit would take a synchronization to know: the low bits count.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <mixbit/kernels/cuda.h>
#include <torch/library.h>

#include "../checks.h"

namespace mixbit::ops {
namespace {

at::Tensor pack_bits(const at::Tensor& codes, int64_t bits) {
  const c10::cuda::CUDAGuard guard(codes.device());
  const PackedShape shape = check_pack_arguments(codes, bits);
  at::Tensor packed = at::empty(shape.packed, codes.options().dtype(at::kByte));
  if (packed.numel() > 0) {
    const at::Tensor source = codes.to(at::kInt).contiguous();
    kernels::cuda::launch_pack_bits(source.const_data_ptr<int32_t>(), shape.rows, shape.n, static_cast<int>(bits),
                                    packed.mutable_data_ptr<uint8_t>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return packed;
}

at::Tensor unpack_bits(const at::Tensor& packed, int64_t bits, int64_t n, bool is_signed) {
  const c10::cuda::CUDAGuard guard(packed.device());
  const PackedShape shape = check_unpack_arguments(packed, bits, n);
  at::Tensor codes = at::empty(shape.codes, packed.options().dtype(at::kInt));
  if (codes.numel() > 0) {
    const at::Tensor source = packed.contiguous();
    kernels::cuda::launch_unpack_bits(source.const_data_ptr<uint8_t>(), shape.rows, n, static_cast<int>(bits),
                                      is_signed, codes.mutable_data_ptr<int32_t>(), c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return codes.to(unpacked_type(bits, is_signed));
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CUDA, m) {
  m.impl("pack_bits", pack_bits);
  m.impl("unpack_bits", unpack_bits);
}

}  // namespace mixbit::ops
