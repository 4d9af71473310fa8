// Codes packed along the last dimension (mixbit/common/packing.h).
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>

#include <mixbit/common/packing.h>

#include "../checks.h"
#include "../parallel.h"

namespace mixbit::ops {
namespace {

// Pieces of rows: f(row, begin, end) with places inside the row.
template <typename F>
void for_each_piece(int64_t rows, int64_t row_size, const F& f) {
  if (rows == 0 || row_size == 0) {
    return;
  }
  at::parallel_for(0, rows * row_size, 32768, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / row_size;
      const int64_t place = begin % row_size;
      const int64_t stop = std::min(row_size, place + end - begin);
      f(row, place, stop);
      begin += stop - place;
    }
  });
}

at::Tensor pack_bits(const at::Tensor& codes, int64_t bits) {
  const PackedShape shape = check_pack_arguments(codes, bits);
  at::Tensor packed = at::empty(shape.packed, codes.options().dtype(at::kByte));
  if (packed.numel() == 0) {
    return packed;
  }
  const auto [low, high] = at::aminmax(codes);
  const int64_t least = low.item<int64_t>();
  const int64_t most = high.item<int64_t>();
  const int64_t half = int64_t{1} << (bits - 1);
  TORCH_CHECK_VALUE(least >= -half && most < (least < 0 ? half : 2 * half), "codes lie between ", least, " and ", most,
                    ": expected ", -half, " to ", half - 1, " (signed) or 0 to ", 2 * half - 1, " at bits=", bits);
  const at::Tensor source = codes.contiguous();
  auto* out = packed.mutable_data_ptr<uint8_t>();
  AT_DISPATCH_INTEGRAL_TYPES(source.scalar_type(), "pack_bits", [&] {
    const auto* data = source.const_data_ptr<scalar_t>();
    for_each_piece(shape.rows, shape.row_bytes, [&](int64_t row, int64_t begin, int64_t end) {
      pack_row(data + row * shape.n, shape.n, static_cast<int>(bits), begin, end, out + row * shape.row_bytes);
    });
  });
  return packed;
}

at::Tensor unpack_bits(const at::Tensor& packed, int64_t bits, int64_t n, bool is_signed) {
  const PackedShape shape = check_unpack_arguments(packed, bits, n);
  at::Tensor codes = at::empty(shape.codes, packed.options().dtype(unpacked_type(bits, is_signed)));
  const at::Tensor source = packed.contiguous();
  const auto* data = source.const_data_ptr<uint8_t>();
  AT_DISPATCH_INTEGRAL_TYPES(codes.scalar_type(), "unpack_bits", [&] {
    auto* out = codes.mutable_data_ptr<scalar_t>();
    for_each_piece(shape.rows, n, [&](int64_t row, int64_t begin, int64_t end) {
      unpack_row(data + row * shape.row_bytes, static_cast<int>(bits), is_signed, begin, end, out + row * n);
    });
  });
  return codes;
}

}  // namespace

TORCH_LIBRARY_IMPL(mixbit, CPU, m) {
  m.impl("pack_bits", pack_bits);
  m.impl("unpack_bits", unpack_bits);
}

}  // namespace mixbit::ops
