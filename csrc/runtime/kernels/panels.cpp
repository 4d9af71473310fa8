#include "panels.h"

#include <algorithm>
#include <cstring>

#include <mixbit/common/packing.h>

namespace mixbit::runtime {

namespace {

void place_channel_data(PanelLayout* layout) {
  layout->bias_at = round_up(layout->bytes, kAlignment);
  layout->sums_at = layout->bias_at + layout->channels * 4;
  layout->multiplier_at = layout->sums_at + layout->channels * 4;
  layout->bytes = layout->multiplier_at + layout->channels * 4;
}

// Calls f(k, code) for the codes of one output channel in the order [kernel row, kernel column, group input].
template <typename F>
void for_codes(const Convolution& c, const Weights& weights, int64_t channel, const F& f) {
  const int64_t kernel = c.kernel_height * c.kernel_width, inputs = c.group_inputs();
  const uint8_t* row = weights.codes + channel * weights.row_bytes;
  const auto all = [&](const auto& code) {
    int64_t k = 0;
    for (int64_t place = 0; place < kernel; ++place) {
      for (int64_t i = 0; i < inputs; ++i, ++k) {
        f(k, code(i * kernel + place));
      }
    }
  };
  // The widths that packages have most without a loop over bits.
  switch (weights.bits) {
    case 8:
      return all([&](int64_t i) { return int32_t{static_cast<int8_t>(row[i])}; });
    case 4:
      return all([&](int64_t i) { return static_cast<int8_t>(row[i / 2] << (4 - i % 2 * 4)) >> 4; });
    case 2:
      return all([&](int64_t i) { return static_cast<int8_t>(row[i / 4] << (6 - i % 4 * 2)) >> 6; });
    default:
      return all([&](int64_t i) { return unpacked_code(row, weights.bits, i, true); });
  }
}

struct ChannelArrays {
  int32_t* bias;
  int32_t* sums;
  float* multiplier;

  ChannelArrays(const PanelLayout& layout, void* packed)
      : bias(reinterpret_cast<int32_t*>(static_cast<char*>(packed) + layout.bias_at)),
        sums(reinterpret_cast<int32_t*>(static_cast<char*>(packed) + layout.sums_at)),
        multiplier(reinterpret_cast<float*>(static_cast<char*>(packed) + layout.multiplier_at)) {}

  void set(int64_t at, const Weights& weights, int64_t channel, uint32_t sum) const {
    bias[at] = weights.bias == nullptr ? 0 : weights.bias[channel];
    sums[at] = static_cast<int32_t>(sum);
    multiplier[at] = weights.multiplier[channel];
  }
};

}  // namespace

PanelLayout panel_layout(const Convolution& c) {
  PanelLayout layout = {};
  layout.width = c.weight_bits <= 2 ? 2 : c.weight_bits <= 4 ? 4 : 8;
  layout.depth = round_up(c.taps(), kDepthStep);
  layout.panels_of_group = round_up(c.group_outputs(), kPanel) / kPanel;
  layout.panel_bytes = layout.depth * kPanel * layout.width / 8;
  layout.channels = c.groups * layout.panels_of_group * kPanel;
  layout.bytes = c.groups * layout.panels_of_group * layout.panel_bytes;
  place_channel_data(&layout);
  return layout;
}

// Plain bytes of 1 x 1 kernels, most weights of a network: a panel is written front to back.
void pack_plain(const Convolution& c, const PanelLayout& layout, const Weights& weights, void* packed) {
  const ChannelArrays arrays(layout, packed);
  const int64_t outputs = c.group_outputs(), taps = c.taps();
  for (int64_t first = 0; first < c.out_channels;) {
    const int64_t panel = first / outputs * layout.panels_of_group + first % outputs / kPanel;
    const int64_t count = std::min(kPanel, outputs - first % outputs);
    const uint8_t* rows = weights.codes + first * weights.row_bytes;
    uint8_t* to = static_cast<uint8_t*>(packed) + panel * layout.panel_bytes;
    for (int64_t k = 0; k < taps; k += 4, to += kPanel * 4) {
      const auto size = static_cast<size_t>(std::min<int64_t>(4, taps - k));
      if (size == 4) {
        for (int64_t n = 0; n < count; ++n) std::memcpy(to + n * 4, rows + n * weights.row_bytes + k, 4);
      } else {
        for (int64_t n = 0; n < count; ++n) std::memcpy(to + n * 4, rows + n * weights.row_bytes + k, size);
      }
    }
    for (int64_t n = 0; n < count; ++n) {
      const uint8_t* row = rows + n * weights.row_bytes;
      uint32_t sum = 0;
      for (int64_t k = 0; k < taps; ++k) sum += static_cast<uint32_t>(static_cast<int8_t>(row[k]));
      arrays.set(panel * kPanel + n, weights, first + n, sum);
    }
    first += count;
  }
}

void pack_panels(const Convolution& c, const Weights& weights, void* packed) {
  const PanelLayout layout = panel_layout(c);
  std::memset(packed, 0, static_cast<size_t>(layout.bytes));
  if (layout.width == 8 && weights.bits == 8 && c.kernel_height * c.kernel_width == 1) {
    pack_plain(c, layout, weights, packed);
    return;
  }
  const ChannelArrays arrays(layout, packed);
  const int64_t outputs = c.group_outputs();
  const int32_t fields = 8 / layout.width, shift = fields / 2;  // of one byte: 1, 2, 4 are shifts by 0, 1, 2
  const uint32_t all_bits = 0x01010101u * ((1u << layout.width) - 1), top_bits = 0x01010101u << (layout.width - 1);
  for (int64_t channel = 0; channel < c.out_channels; ++channel) {
    const int64_t panel = channel / outputs * layout.panels_of_group + channel % outputs / kPanel;
    const int64_t n = channel % outputs % kPanel;
    uint8_t* codes = static_cast<uint8_t*>(packed) + panel * layout.panel_bytes;
    uint32_t sum = 0;  // modulo 2^32, as all totals
    // Four k at a time: the codes of a group, one a byte. Lower fields are code + 2^(width - 1), which turns the top
    // bit.
    const auto place_group = [&](int64_t group, uint32_t word, int64_t valid) {
      const int64_t place = group & (fields - 1);
      const uint32_t within = valid < 4 ? (uint32_t{1} << (8 * valid)) - 1 : ~uint32_t{0};
      const uint32_t turned = place < fields - 1 ? top_bits & within : 0;
      uint8_t* to = codes + ((group >> shift) * kPanel + n) * 4;
      uint32_t stored;
      std::memcpy(&stored, to, 4);
      stored |= ((word & all_bits) ^ turned) << (place * layout.width);
      std::memcpy(to, &stored, 4);
    };
    uint32_t word = 0;
    if (weights.bits == 8 && c.kernel_height * c.kernel_width == 1) {  // as they lie: most weights of a network
      const uint8_t* row = weights.codes + channel * weights.row_bytes;
      for (int64_t k = 0; k + 4 <= c.taps(); k += 4) {
        std::memcpy(&word, row + k, 4);
        place_group(k / 4, word, 4);
      }
      word = 0;
      std::memcpy(&word, row + c.taps() / 4 * 4, static_cast<size_t>(c.taps() % 4));
      for (int64_t k = 0; k < c.taps(); ++k) {
        sum += static_cast<uint32_t>(static_cast<int8_t>(row[k]));
      }
    } else {
      for_codes(c, weights, channel, [&](int64_t k, int32_t code) {
        sum += static_cast<uint32_t>(code);
        word |= static_cast<uint32_t>(static_cast<uint8_t>(code)) << (8 * (k & 3));
        if ((k & 3) == 3) {
          place_group(k / 4, word, 4);
          word = 0;
        }
      });
    }
    if (c.taps() % 4 != 0) {
      place_group(c.taps() / 4, word, c.taps() % 4);
    }
    arrays.set(panel * kPanel + n, weights, channel, sum);
  }
}

PanelLayout depthwise_layout(const Convolution& c, int64_t block) {
  PanelLayout layout = {};
  layout.width = 8;
  layout.depth = round_up(depthwise_place(c, c.kernel_height - 1, c.kernel_width - 1) + 1, 4);
  layout.channels = round_up(c.out_channels, block);
  if (layout.channels - c.out_channels >= 32) {
    layout.channels -= 32;
  }
  layout.bytes = layout.channels * layout.depth;
  place_channel_data(&layout);
  return layout;
}

void pack_depthwise(const Convolution& c, const Weights& weights, void* packed, int64_t block) {
  const PanelLayout layout = depthwise_layout(c, block);
  std::memset(packed, 0, static_cast<size_t>(layout.bytes));
  const ChannelArrays arrays(layout, packed);
  for (int64_t channel = 0; channel < c.out_channels; ++channel) {
    const int64_t first = channel / block * block;
    const int64_t size = layout.channels - first < block ? layout.channels - first : block;
    // Lane l of a register has channels 16 l ... 16 l + 15, quarter q of the unpacked ones 4 q ... 4 q + 3 of them.
    const int64_t lane = (channel - first) / 16, quarter = channel % 16 / 4;
    const int64_t within = (quarter * (size / 16) + lane) * 4 + channel % 4;
    uint8_t* codes = static_cast<uint8_t*>(packed) + first * layout.depth;
    uint32_t sum = 0;  // modulo 2^32, as all totals
    for_codes(c, weights, channel, [&](int64_t k, int32_t code) {
      const int64_t place = depthwise_place(c, k / c.kernel_width, k % c.kernel_width);
      sum += static_cast<uint32_t>(code);
      codes[(place / 4 * size + within) * 4 + place % 4] = static_cast<uint8_t>(code);
    });
    arrays.set(first + within, weights, channel, sum);
  }
}

bool fits_simd(const Convolution& c) {
  const auto reaches_outside = [](int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t dilation,
                                  int64_t pad) {
    return pad > 0 || (out - 1) * stride - pad + dilation * (kernel - 1) >= in;
  };
  const int32_t z = c.x.zero_point;
  const bool is_code = c.x.is_signed ? z >= -128 && z <= 127 : z >= 0 && z <= 255;
  const bool pads =
      reaches_outside(c.in_height, c.out_height, c.kernel_height, c.stride_height, c.dilation_height, c.pad_top) ||
      reaches_outside(c.in_width, c.out_width, c.kernel_width, c.stride_width, c.dilation_width, c.pad_left);
  return (is_code || !pads) && c.y.zero_point > -16384 && c.y.zero_point < 16384;
}

}  // namespace mixbit::runtime
