#pragma once

// Argument checks and views shared by the ops. Errors name the argument, what came and what was expected.

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <mixbit/common/gates.h>
#include <mixbit/common/levels.h>
#include <mixbit/common/numerics.h>
#include <mixbit/kernels/cpu.h>

namespace mixbit::ops {

// x seen as [outer, channels, inner] in memory order; per tensor: channels = 1.
struct AxisView {
  int64_t outer;
  int64_t channels;
  int64_t inner;
};

// Wraps a negative axis; refuses one out of range.
std::optional<int64_t> checked_axis(const at::Tensor& x, std::optional<int64_t> axis);

// Elements along the axis, 1 per tensor.
int64_t channel_count(const at::Tensor& x, std::optional<int64_t> axis);

// float32, [1] or [channels], on x's device.
void check_parameter(const at::Tensor& parameter, const char* name, const at::Tensor& x, int64_t channels);

// Lists of a list op have one length.
struct NamedList {
  at::TensorList list;
  const char* name;
};
void check_lists(at::TensorList xs, std::initializer_list<NamedList> others, const char* xs_name = "xs");

// f(i) for every tensor of a list; an error says which tensor it was.
template <typename F>
void for_each_in_list(at::TensorList xs, const F& f) {
  for (size_t i = 0; i < xs.size(); ++i) {
    try {
      f(i);
    } catch (c10::Error& error) {
      error.add_context("tensor " + std::to_string(i) + " of the list");
      throw;
    }
  }
}

using TensorLists = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>>;

void check_floating(const at::Tensor& x, const char* name);
void check_group_size(std::optional<int64_t> group_size);
Rounding checked_rounding(int64_t rounding);
Gradient checked_gradient(int64_t gradient, const char* name = "gradient");

// Values, CPU only: scales positive and finite; bit-widths whole numbers in 1..16 and not one signed narrow bit.
void check_scale_values(const at::Tensor& scale, const char* name);
void check_bit_width_values(const at::Tensor& bit_width, const char* name, bool is_signed, bool narrow_range);

// float32 [K] on x's device.
void check_bit_width_list(const at::Tensor& bit_widths, const at::Tensor& x);
// The arguments of quantization_noise but for the values of scales and bit-widths; returns the checked axis.
std::optional<int64_t> check_noise_arguments(const at::Tensor& x, const at::Tensor& scales,
                                             const at::Tensor& bit_widths, std::optional<int64_t> axis);
// The arguments of observe; returns the checked axis.
std::optional<int64_t> check_observe_arguments(const at::Tensor& x, std::optional<int64_t> axis, int64_t bins);
// Arguments of gated_fake_quantize, checked but for the values of tensors.
struct GatedArguments {
  std::optional<int64_t> axis;
  bool by_sample;   // gates [K - 1, size of dimension 0]
  bool by_channel;  // that dimension is the axis given: every channel is walked as a sample, and `axis` is none
  GateForm form;
};
GatedArguments check_gated_arguments(const at::Tensor& x, const at::Tensor& scale_range, const at::Tensor& gates,
                                     at::IntArrayRef precisions, bool is_signed, std::optional<int64_t> axis,
                                     int64_t form);
// Arguments of mixture_fake_quantize but for the values of tensors; returns the checked axis.
std::optional<int64_t> check_mixture_arguments(const at::Tensor& x, const at::Tensor& scales, const at::Tensor& weights,
                                               const at::Tensor& bit_widths, std::optional<int64_t> axis);
// Arguments of extra_level_fake_quantize but for the values of tensors; returns the checked axis.
std::optional<int64_t> check_extra_arguments(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& bit_width,
                                             const at::Tensor& extra_bits, std::optional<int64_t> axis);
// A histogram [3, bins] of observe with its min and max.
void check_histogram(const at::Tensor& histogram, const at::Tensor& min, const at::Tensor& max);
// One scale for each width.
void check_histogram_scales(const at::Tensor& scales, const at::Tensor& bit_widths);
// Shapes of codes [..., n] and of their packed form [..., row_bytes].
struct PackedShape {
  int64_t rows;
  int64_t n;
  int64_t row_bytes;
  std::vector<int64_t> codes;
  std::vector<int64_t> packed;
};
PackedShape check_pack_arguments(const at::Tensor& codes, int64_t bits);
PackedShape check_unpack_arguments(const at::Tensor& packed, int64_t bits, int64_t n);
// The smallest of int8, uint8, int16 and int32 that holds every code.
at::ScalarType unpacked_type(int64_t bits, bool is_signed);
// `other` has x's shape, dtype and device.
void check_like_x(const at::Tensor& other, const char* name, const at::Tensor& x);

// One quantizer per channel from CPU parameters of 1 or `channels` elements, values checked.
std::vector<kernels::cpu::Quantizer> channel_quantizers(const at::Tensor& scale, const at::Tensor& zero_point,
                                                        const at::Tensor& bit_width, bool is_signed, bool narrow_range,
                                                        Rounding rounding, int64_t channels,
                                                        Gradient gradient = Gradient::kLearnedStep);

kernels::StorageType storage_type(const at::Tensor& x);

// x itself if it is dense in some order of its dimensions, else a copy that is.
at::Tensor dense(const at::Tensor& x);
// x with the strides of `like` (copied if they differ).
at::Tensor with_strides_of(const at::Tensor& x, const at::Tensor& like);

// A tensor that an op writes to, in the memory order of another one: itself, or a copy that finish() writes back.
class Ordered {
 public:
  Ordered() = default;
  Ordered(const at::Tensor& given, const at::Tensor& like) : given_(given), used_(with_strides_of(given, like)) {}

  const at::Tensor& given() const { return given_; }
  const at::Tensor& tensor() const { return used_; }
  template <typename T>
  T* data() const {
    return used_.defined() ? used_.mutable_data_ptr<T>() : nullptr;
  }
  void finish() const {
    if (used_.defined() && !used_.is_same(given_)) {
      given_.copy_(used_);
    }
  }

 private:
  at::Tensor given_;
  at::Tensor used_;
};

// Autograd is to notice that tensors were written to; undefined ones are passed over.
void bump_versions(at::TensorList written);

// The memory order of a dense x around `axis`.
AxisView axis_view(const at::Tensor& dense_x, std::optional<int64_t> axis);

// The kernels that this process uses.
const kernels::cpu::KernelTable& cpu_kernels();

}  // namespace mixbit::ops
