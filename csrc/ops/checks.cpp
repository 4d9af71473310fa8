#include "checks.h"

#include <ATen/Functions.h>
#include <ATen/WrapDimUtils.h>

#include <cmath>
#include <cstdlib>

#include <mixbit/common/packing.h>

namespace mixbit::ops {

std::optional<int64_t> checked_axis(const at::Tensor& x, std::optional<int64_t> axis) {
  if (!axis.has_value()) {
    return std::nullopt;
  }
  TORCH_CHECK_VALUE(*axis >= -x.dim() && *axis < x.dim(), "axis=", *axis, " is out of range: x has ", x.dim(),
                    " dimensions, expected ", -x.dim(), " to ", x.dim() - 1);
  return *axis < 0 ? *axis + x.dim() : *axis;
}

int64_t channel_count(const at::Tensor& x, std::optional<int64_t> axis) { return axis.has_value() ? x.size(*axis) : 1; }

void check_parameter(const at::Tensor& parameter, const char* name, const at::Tensor& x, int64_t channels) {
  TORCH_CHECK_VALUE(parameter.scalar_type() == at::kFloat, name, " has dtype ", parameter.scalar_type(),
                    ": expected float32");
  TORCH_CHECK_VALUE(parameter.dim() == 1 && (parameter.numel() == 1 || parameter.numel() == channels), name,
                    " has shape ", parameter.sizes(), ": expected [1]",
                    channels == 1 ? std::string() : " or [" + std::to_string(channels) + "] (the size of axis)");
  TORCH_CHECK_VALUE(parameter.device() == x.device(), name, " is on ", parameter.device(), " and x on ", x.device(),
                    ": expected one device");
}

void check_lists(at::TensorList xs, std::initializer_list<NamedList> others, const char* xs_name) {
  for (const auto& [list, name] : others) {
    TORCH_CHECK_VALUE(list.size() == xs.size(), name, " has ", list.size(), " tensors and ", xs_name, " ", xs.size(),
                      ": expected one for each");
  }
}

void check_floating(const at::Tensor& x, const char* name) {
  const auto type = x.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, name, " has dtype ", type,
                    ": expected float32, float16 or bfloat16");
}

void check_group_size(std::optional<int64_t> group_size) {
  TORCH_CHECK_VALUE(!group_size.has_value(), "group_size=", *group_size,
                    " is reserved and not built yet: expected None");
}

Rounding checked_rounding(int64_t rounding) {
  TORCH_CHECK_VALUE(rounding == 0 || rounding == 1, "rounding=", rounding,
                    " is not known: expected 0 (half_even) or 1 (half_up)");
  return static_cast<Rounding>(rounding);
}

Gradient checked_gradient(int64_t gradient, const char* name) {
  TORCH_CHECK_VALUE(gradient == 0 || gradient == 1, name, "=", gradient,
                    " is not known: expected 0 (learned_step) or 1 (clip)");
  return static_cast<Gradient>(gradient);
}

void check_scale_values(const at::Tensor& scale, const char* name) {
  const at::Tensor values = scale.contiguous();
  const float* data = values.const_data_ptr<float>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    TORCH_CHECK_VALUE(data[i] > 0.0f && std::isfinite(data[i]), name, "[", i, "]=", data[i],
                      ": expected a positive finite number");
  }
}

void check_bit_width_values(const at::Tensor& bit_width, const char* name, bool is_signed, bool narrow_range) {
  const at::Tensor values = bit_width.contiguous();
  const float* data = values.const_data_ptr<float>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    TORCH_CHECK_VALUE(is_valid_bit_width(data[i]), name, "[", i, "]=", data[i], ": expected a whole number from ",
                      kMinBitWidth, " to ", kMaxBitWidth);
    TORCH_CHECK_VALUE(!(is_signed && narrow_range && data[i] == 1.0f), name, "[", i,
                      "]=1 with signed and narrow_range leaves only the level 0: expected at least 2 bits, or "
                      "narrow_range=False");
  }
}

void check_bit_width_list(const at::Tensor& bit_widths, const at::Tensor& x) {
  TORCH_CHECK_VALUE(bit_widths.scalar_type() == at::kFloat && bit_widths.dim() == 1, "bit_widths is ",
                    bit_widths.scalar_type(), " ", bit_widths.sizes(), ": expected float32 [K]");
  TORCH_CHECK_VALUE(bit_widths.device() == x.device(), "bit_widths is on ", bit_widths.device(), " and the data on ",
                    x.device(), ": expected one device");
}

std::optional<int64_t> check_noise_arguments(const at::Tensor& x, const at::Tensor& scales,
                                             const at::Tensor& bit_widths, std::optional<int64_t> axis) {
  check_floating(x, "x");
  axis = checked_axis(x, axis);
  check_bit_width_list(bit_widths, x);
  const int64_t channels = channel_count(x, axis);
  const int64_t count = bit_widths.numel();
  TORCH_CHECK_VALUE(scales.scalar_type() == at::kFloat, "scales has dtype ", scales.scalar_type(),
                    ": expected float32");
  TORCH_CHECK_VALUE(
      (scales.dim() == 1 && scales.size(0) == count) ||
          (axis.has_value() && scales.dim() == 2 && scales.size(0) == count && scales.size(1) == channels),
      "scales has shape ", scales.sizes(), ": expected [", count, "]",
      axis.has_value() ? " or [" + std::to_string(count) + ", " + std::to_string(channels) + "]" : std::string());
  TORCH_CHECK_VALUE(scales.device() == x.device(), "scales is on ", scales.device(), " and x on ", x.device(),
                    ": expected one device");
  return axis;
}

std::optional<int64_t> check_observe_arguments(const at::Tensor& x, std::optional<int64_t> axis, int64_t bins) {
  check_floating(x, "x");
  TORCH_CHECK_VALUE(bins >= 0 && bins % 2 == 0, "bins=", bins, ": expected an even number, 0 for no histogram");
  return checked_axis(x, axis);
}

GatedArguments check_gated_arguments(const at::Tensor& x, const at::Tensor& scale_range, const at::Tensor& gates,
                                     at::IntArrayRef precisions, bool is_signed, std::optional<int64_t> axis,
                                     int64_t form) {
  check_floating(x, "x");
  axis = checked_axis(x, axis);
  check_parameter(scale_range, "scale_range", x, channel_count(x, axis));
  TORCH_CHECK_VALUE(form == 0 || form == 1, "form=", form, " is not known: expected 0 (difference) or 1 (residual)");
  const auto count = static_cast<int64_t>(precisions.size());
  TORCH_CHECK_VALUE(count >= 2, "precisions=", precisions, ": expected two bit-widths or more");
  for (int64_t k = 0; k < count; ++k) {
    const int64_t bits = precisions[static_cast<size_t>(k)];
    TORCH_CHECK_VALUE(bits >= kMinBitWidth && bits <= kMaxBitWidth, "precisions[", k, "]=", bits,
                      ": expected a whole number from ", kMinBitWidth, " to ", kMaxBitWidth);
    if (k > 0) {
      const int64_t before = precisions[static_cast<size_t>(k - 1)];
      TORCH_CHECK_VALUE(bits > before, "precisions=", precisions, ": expected ascending bit-widths");
      TORCH_CHECK_VALUE(form == 0 || is_signed || bits % before == 0, "precisions=", precisions,
                        ": the residual form of unsigned grids needs each to be a multiple of the one before");
    }
  }
  TORCH_CHECK_VALUE(gates.scalar_type() == at::kFloat, "gates has dtype ", gates.scalar_type(), ": expected float32");
  TORCH_CHECK_VALUE(gates.device() == x.device(), "gates is on ", gates.device(), " and x on ", x.device(),
                    ": expected one device");
  const bool by_sample = gates.dim() == 2 && x.dim() > 0 && gates.size(1) == x.size(0);
  TORCH_CHECK_VALUE((gates.dim() == 1 || by_sample) && gates.size(0) == count - 1, "gates has shape ", gates.sizes(),
                    ": expected [", count - 1, "]",
                    x.dim() > 0 ? " or [" + std::to_string(count - 1) + ", " + std::to_string(x.size(0)) + "]" : "");
  const bool by_channel = by_sample && axis == 0;
  return {by_channel ? std::nullopt : axis, by_sample, by_channel, static_cast<GateForm>(form)};
}

std::optional<int64_t> check_mixture_arguments(const at::Tensor& x, const at::Tensor& scales, const at::Tensor& weights,
                                               const at::Tensor& bit_widths, std::optional<int64_t> axis) {
  axis = check_noise_arguments(x, scales, bit_widths, axis);
  const int64_t count = bit_widths.numel();
  TORCH_CHECK_VALUE(count >= 1 && count <= kernels::cpu::kMaxGrids, "bit_widths has ", count,
                    " elements: expected 1 to ", kernels::cpu::kMaxGrids);
  TORCH_CHECK_VALUE(weights.scalar_type() == at::kFloat && weights.dim() == 1 && weights.numel() == count,
                    "weights is ", weights.scalar_type(), " ", weights.sizes(), ": expected float32 [", count, "]");
  TORCH_CHECK_VALUE(weights.device() == x.device(), "weights is on ", weights.device(), " and x on ", x.device(),
                    ": expected one device");
  return axis;
}

std::optional<int64_t> check_extra_arguments(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& bit_width,
                                             const at::Tensor& extra_bits, std::optional<int64_t> axis) {
  check_floating(x, "x");
  axis = checked_axis(x, axis);
  const int64_t channels = channel_count(x, axis);
  check_parameter(scale, "scale", x, channels);
  check_parameter(bit_width, "bit_width", x, channels);
  TORCH_CHECK_VALUE(extra_bits.scalar_type() == at::kByte && extra_bits.sizes() == x.sizes(), "extra_bits is ",
                    extra_bits.scalar_type(), " ", extra_bits.sizes(), ": expected uint8 ", x.sizes(), " like x");
  TORCH_CHECK_VALUE(extra_bits.device() == x.device(), "extra_bits is on ", extra_bits.device(), " and x on ",
                    x.device(), ": expected one device");
  return axis;
}

void check_histogram(const at::Tensor& histogram, const at::Tensor& min, const at::Tensor& max) {
  TORCH_CHECK_VALUE(
      histogram.scalar_type() == at::kDouble && histogram.dim() == 2 && histogram.size(0) == 3 && histogram.size(1) > 0,
      "histogram is ", histogram.scalar_type(), " ", histogram.sizes(), ": expected float64 [3, bins] from observe");
  TORCH_CHECK_VALUE(
      min.scalar_type() == at::kDouble && min.numel() == 1 && max.scalar_type() == at::kDouble && max.numel() == 1,
      "min and max: expected float64 [] from observe");
  TORCH_CHECK_VALUE(min.device() == histogram.device() && max.device() == histogram.device(), "min is on ",
                    min.device(), ", max on ", max.device(), " and histogram on ", histogram.device(),
                    ": expected one device");
}

void check_histogram_scales(const at::Tensor& scales, const at::Tensor& bit_widths) {
  TORCH_CHECK_VALUE(scales.scalar_type() == at::kFloat && scales.sizes() == bit_widths.sizes() &&
                        scales.device() == bit_widths.device(),
                    "scales is ", scales.scalar_type(), " ", scales.sizes(), " on ", scales.device(),
                    ": expected float32 ", bit_widths.sizes(), " on ", bit_widths.device());
}

namespace {

void check_packed_bits(int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 1 && bits <= kMaxPackedBits, "bits=", bits, ": expected a whole number from 1 to ",
                    kMaxPackedBits);
}

PackedShape packed_shape(at::IntArrayRef sizes, int64_t n, int64_t bits) {
  PackedShape shape{1, n, packed_bytes(n, static_cast<int>(bits)), sizes.vec(), sizes.vec()};
  for (const int64_t size : sizes.slice(0, sizes.size() - 1)) {
    shape.rows *= size;
  }
  shape.codes.back() = n;
  shape.packed.back() = shape.row_bytes;
  return shape;
}

}  // namespace

PackedShape check_pack_arguments(const at::Tensor& codes, int64_t bits) {
  check_packed_bits(bits);
  const auto type = codes.scalar_type();
  TORCH_CHECK_VALUE(
      type == at::kByte || type == at::kChar || type == at::kShort || type == at::kInt || type == at::kLong,
      "codes has dtype ", type, ": expected uint8, int8, int16, int32 or int64");
  TORCH_CHECK_VALUE(codes.dim() >= 1, "codes has no dimension: expected at least one to pack along");
  return packed_shape(codes.sizes(), codes.size(-1), bits);
}

PackedShape check_unpack_arguments(const at::Tensor& packed, int64_t bits, int64_t n) {
  check_packed_bits(bits);
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kByte, "packed has dtype ", packed.scalar_type(), ": expected uint8");
  TORCH_CHECK_VALUE(packed.dim() >= 1, "packed has no dimension: expected what pack_bits returned");
  TORCH_CHECK_VALUE(n >= 0 && n <= int64_t{1} << 48, "n=", n, ": expected a number of codes from 0 to 2^48");
  PackedShape shape = packed_shape(packed.sizes(), n, bits);
  TORCH_CHECK_VALUE(packed.size(-1) == shape.row_bytes, "packed has ", packed.size(-1), " bytes a row: expected ",
                    shape.row_bytes, " for n=", n, " codes of ", bits, " bits");
  return shape;
}

at::ScalarType unpacked_type(int64_t bits, bool is_signed) {
  if (bits <= 8) {
    return is_signed ? at::kChar : at::kByte;
  }
  return bits < 16 || is_signed ? at::kShort : at::kInt;
}

void check_like_x(const at::Tensor& other, const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(other.sizes() == x.sizes() && other.scalar_type() == x.scalar_type(), name, " is ",
                    other.scalar_type(), " ", other.sizes(), ": expected ", x.scalar_type(), " ", x.sizes(), " like x");
  TORCH_CHECK_VALUE(other.device() == x.device(), name, " is on ", other.device(), " and x on ", x.device(),
                    ": expected one device");
}

std::vector<kernels::cpu::Quantizer> channel_quantizers(const at::Tensor& scale, const at::Tensor& zero_point,
                                                        const at::Tensor& bit_width, bool is_signed, bool narrow_range,
                                                        Rounding rounding, int64_t channels, Gradient gradient) {
  check_scale_values(scale, "scale");
  check_bit_width_values(bit_width, "bit_width", is_signed, narrow_range);
  const at::Tensor scales = scale.contiguous();
  const at::Tensor zero_points = zero_point.contiguous();
  const at::Tensor bit_widths = bit_width.contiguous();
  std::vector<kernels::cpu::Quantizer> quantizers(static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; ++c) {
    auto at_channel = [c](const at::Tensor& t) { return t.const_data_ptr<float>()[t.numel() == 1 ? 0 : c]; };
    quantizers[static_cast<size_t>(c)] = {
        at_channel(scales), round_half_even(at_channel(zero_points)),
        quant_range(static_cast<int>(at_channel(bit_widths)), is_signed, narrow_range), rounding, gradient};
  }
  return quantizers;
}

kernels::StorageType storage_type(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kHalf:
      return kernels::StorageType::kFloat16;
    case at::kBFloat16:
      return kernels::StorageType::kBFloat16;
    default:
      return kernels::StorageType::kFloat32;
  }
}

at::Tensor dense(const at::Tensor& x) { return x.is_non_overlapping_and_dense() ? x : at::empty_like(x).copy_(x); }

at::Tensor with_strides_of(const at::Tensor& x, const at::Tensor& like) {
  return x.strides() == like.strides() ? x : at::empty_like(like, like.options().dtype(x.scalar_type())).copy_(x);
}

AxisView axis_view(const at::Tensor& dense_x, std::optional<int64_t> axis) {
  const int64_t channels = channel_count(dense_x, axis);
  if (channels <= 1) {
    return {1, channels, dense_x.numel()};
  }
  const int64_t inner = dense_x.stride(*axis);
  return {dense_x.numel() == 0 ? 0 : dense_x.numel() / (channels * inner), channels, inner};
}

void bump_versions(at::TensorList written) {
  for (const at::Tensor& t : written) {
    if (t.defined() && !t.is_inference()) {
      t.unsafeGetTensorImpl()->bump_version();
    }
  }
}

const kernels::cpu::KernelTable& cpu_kernels() {
  static const kernels::cpu::KernelTable& table = [&]() -> const kernels::cpu::KernelTable& {
    const char* text = std::getenv("MIXBIT_CPU_ISA");
    Isa cap;
    TORCH_CHECK_VALUE(text == nullptr || parse_isa(text, &cap), "MIXBIT_CPU_ISA=", text,
                      " is not known: expected scalar, avx2, avx512, vnni or amx");
    return kernels::cpu::kernels(kernels::cpu::detected_isa());
  }();
  return table;
}

}  // namespace mixbit::ops
