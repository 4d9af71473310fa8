#pragma once

// The order in which an op walks through a tensor with an axis; the same on every device, since masks are kept in it.

#include <ATen/Functions.h>

#include "checks.h"

namespace mixbit::ops {

// Rows shorter than this are not worth a vector: the axis is moved to the front first (python/mixbit/ops/_fakes.py
// knows this number too).
constexpr int64_t kShortRow = 16;

// Whether a dense x with this view is better handled with its axis moved to the front of memory.
inline bool short_rows(const AxisView& view) { return view.channels > 1 && view.outer > 1 && view.inner < kShortRow; }

// x with its axis moved to the front of memory, seen with the original order of dimensions.
inline at::Tensor channel_major(const at::Tensor& x, int64_t axis) {
  return x.movedim(axis, 0).contiguous().movedim(0, axis);
}

// An x and how its memory is walked.
struct Walk {
  at::Tensor source;
  AxisView view;

  // A dense x; channels go to the front where rows would be short.
  Walk(const at::Tensor& dense_x, std::optional<int64_t> axis) : source(dense_x), view(axis_view(dense_x, axis)) {
    if (short_rows(view)) {
      source = channel_major(dense_x, *axis);
      view = axis_view(source, axis);
    }
  }

  // `y` if it has the order of the walk, else a new tensor that has.
  at::Tensor target(const at::Tensor& y) const { return y.strides() == source.strides() ? y : at::empty_like(source); }
};

// A walk of one sample (dimension 0) after the other where each has parameters of its own, else of all as one.
struct SampleWalk {
  at::Tensor source;
  AxisView view;  // of a sample
  int64_t samples = 1;

  // axis: not 0 if by_sample.
  SampleWalk(const at::Tensor& dense_x, std::optional<int64_t> axis, bool by_sample) : source(dense_x), view{} {
    if (!by_sample) {
      const Walk walk(dense_x, axis);
      source = walk.source;
      view = walk.view;
      return;
    }
    samples = source.size(0);
    if (source.numel() == 0) {
      view = {0, 0, 0};
      return;
    }
    const auto view_of_sample = [&] {
      return axis_view(source.select(0, 0), axis.has_value() ? std::optional(*axis - 1) : std::nullopt);
    };
    if (source.stride(0) * samples != source.numel()) {
      source = source.contiguous();
    }
    view = view_of_sample();
    if (short_rows(view)) {
      source = source.movedim(*axis, 1).contiguous().movedim(1, *axis);
      view = view_of_sample();
    }
  }

  int64_t sample_size() const { return view.outer * view.channels * view.inner; }
  at::Tensor target(const at::Tensor& y) const { return y.strides() == source.strides() ? y : at::empty_like(source); }
};

// Bytes of a row's bits, which start at a byte of their own.
inline int64_t mask_bytes_per_row(const AxisView& view) { return (view.inner + 7) / 8; }
inline int64_t mask_bytes(const AxisView& view) { return view.outer * view.channels * mask_bytes_per_row(view); }

inline void check_mask(const at::Tensor& mask, const AxisView& view) {
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kByte && mask.is_contiguous() && mask.numel() == mask_bytes(view),
                    "mask is ", mask.scalar_type(), " ", mask.sizes(), ": expected what _fake_quantize_mask returned");
}

}  // namespace mixbit::ops
