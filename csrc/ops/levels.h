#pragma once

// What the ops on the levels of a model's weights (update_level_switches_, freeze_oscillating_) check and share.

#include <ATen/Functions.h>

#include <optional>
#include <vector>

#include <mixbit/common/switches.h>

#include "checks.h"
#include "walk.h"

namespace mixbit::ops {

inline void check_state(const at::Tensor& state, const char* name, at::ScalarType type, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(state.scalar_type() == type && state.sizes() == weight.sizes(), name, " is ", state.scalar_type(),
                    " ", state.sizes(), ": expected ", type, " ", weight.sizes(), " like the weight");
  TORCH_CHECK_VALUE(state.device() == weight.device(), name, " is on ", state.device(), " and the weight on ",
                    weight.device(), ": expected one device");
}

// Defined where a score needs it, else nothing; then the caller has to pass an empty tensor.
inline Ordered state_of(bool needed, const at::Tensor& given, const char* name, at::ScalarType type,
                        const at::Tensor& weight, const at::Tensor& source) {
  if (needed) {
    check_state(given, name, type, weight);
    return Ordered(given, source);
  }
  TORCH_CHECK_VALUE(given.numel() == 0, name, " has shape ", given.sizes(),
                    ": the score keeps none, expected an empty tensor");
  return {};
}

// A weight of the list with its grid and extra bits, checked but for the values of tensors.
struct LevelWeight {
  at::Tensor weight;
  at::Tensor scale;
  at::Tensor bit_width;
  Walk walk;
  at::Tensor extra_bits;  // in the order of the walk; undefined: none

  LevelWeight(const at::Tensor& given, const at::Tensor& given_scale, const at::Tensor& given_bit_width,
              const at::Tensor& given_extra_bits, std::optional<int64_t> axis)
      : weight(given),
        scale(given_scale.contiguous()),
        bit_width(given_bit_width.contiguous()),
        walk(dense(given), checked(given, given_scale, given_bit_width, axis)) {
    if (given_extra_bits.numel() > 0) {
      check_state(given_extra_bits, "extra_bits", at::kByte, weight);
      extra_bits = with_strides_of(given_extra_bits, walk.source);
    } else {
      TORCH_CHECK_VALUE(given_extra_bits.scalar_type() == at::kByte, "extra_bits is ", given_extra_bits.scalar_type(),
                        ": expected uint8");
    }
  }

  const uint8_t* extra_data() const { return extra_bits.defined() ? extra_bits.const_data_ptr<uint8_t>() : nullptr; }

  // After the weight has been changed in the order of the walk.
  void finish_weight() const {
    if (!walk.source.is_same(weight)) {
      weight.copy_(walk.source);
    }
    bump_versions(weight);
  }

 private:
  static std::optional<int64_t> checked(const at::Tensor& weight, const at::Tensor& scale, const at::Tensor& bit_width,
                                        std::optional<int64_t> axis) {
    check_floating(weight, "weight");
    axis = checked_axis(weight, axis);
    check_parameter(scale, "scale", weight, channel_count(weight, axis));
    check_parameter(bit_width, "bit_width", weight, channel_count(weight, axis));
    return axis;
  }
};

inline float checked_momentum(double momentum) {
  TORCH_CHECK_VALUE(momentum > 0.0 && momentum <= 1.0, "momentum=", momentum, ": expected above 0, at most 1");
  return static_cast<float>(momentum);
}

inline SwitchScore checked_score(int64_t score) {
  TORCH_CHECK_VALUE(score >= 0 && score <= 3, "score=", score, " is not known: expected 0 (adj), 1 (pair), 2 (osc) or ",
                    "3 (ema)");
  return static_cast<SwitchScore>(score);
}

inline float checked_threshold(double threshold) {
  TORCH_CHECK_VALUE(threshold >= 0.0 && threshold <= 1.0, "threshold=", threshold,
                    ": expected a frequency from 0 (freeze nothing new) to 1");
  return static_cast<float>(threshold);
}

// What counting keeps of one weight.
struct SwitchJob : LevelWeight {
  Ordered codes, marks, counts, runs, frequencies;

  SwitchJob(const at::Tensor& weight_, const at::Tensor& scale_, const at::Tensor& bit_width_,
            const at::Tensor& extra_bits_, const at::Tensor& given_codes, const at::Tensor& given_marks,
            const at::Tensor& given_counts, const at::Tensor& given_runs, std::optional<int64_t> axis,
            SwitchScore score)
      : LevelWeight(weight_, scale_, bit_width_, extra_bits_, axis) {
    const auto state = [&](bool needed, const at::Tensor& given, const char* name, at::ScalarType type) {
      return state_of(needed, given, name, type, weight, walk.source);
    };
    codes = state(true, given_codes, "codes", at::kChar);
    marks = state(score != SwitchScore::kAdjacent, given_marks, "marks", at::kChar);
    if (score == SwitchScore::kEma) {
      frequencies = state(true, given_counts, "counts", at::kFloat);
    } else {
      counts = state(true, given_counts, "counts", at::kShort);
    }
    runs = state(score == SwitchScore::kPair, given_runs, "runs", at::kShort);
  }

  kernels::cpu::SwitchStates states() const {
    return {codes.data<int8_t>(), marks.data<int8_t>(), counts.data<int16_t>(), runs.data<int16_t>(),
            frequencies.data<float>()};
  }
  void finish() const {
    for (const Ordered* state : {&codes, &marks, &counts, &runs, &frequencies}) {
      state->finish();
      bump_versions(state->given());
    }
  }
};

// What freezing keeps of one weight.
struct FreezeJob : LevelWeight {
  Ordered codes, marks, frequencies, averages;

  FreezeJob(const at::Tensor& weight_, const at::Tensor& scale_, const at::Tensor& bit_width_,
            const at::Tensor& extra_bits_, const at::Tensor& given_codes, const at::Tensor& given_marks,
            const at::Tensor& given_frequencies, const at::Tensor& given_averages, std::optional<int64_t> axis)
      : LevelWeight(weight_, scale_, bit_width_, extra_bits_, axis),
        codes(state_of(true, given_codes, "codes", at::kChar, weight, walk.source)),
        marks(state_of(true, given_marks, "marks", at::kChar, weight, walk.source)),
        frequencies(state_of(true, given_frequencies, "frequencies", at::kFloat, weight, walk.source)),
        averages(state_of(true, given_averages, "averages", at::kFloat, weight, walk.source)) {}

  kernels::cpu::FreezeStates states() const {
    return {codes.data<int8_t>(), marks.data<int8_t>(), frequencies.data<float>(), averages.data<float>()};
  }
  void finish() const {
    finish_weight();
    for (const Ordered* state : {&codes, &marks, &frequencies, &averages}) {
      state->finish();
      bump_versions(state->given());
    }
  }
};

// The weights of update_level_switches_ with their states, checked.
inline std::vector<SwitchJob> switch_jobs(at::TensorList weights, at::TensorList scales, at::TensorList bit_widths,
                                          at::TensorList extra_bits, at::TensorList codes, at::TensorList marks,
                                          at::TensorList counts, at::TensorList runs, std::optional<int64_t> axis,
                                          SwitchScore score) {
  check_lists(weights,
              {{scales, "scales"},
               {bit_widths, "bit_widths"},
               {extra_bits, "extra_bits"},
               {codes, "codes"},
               {marks, "marks"},
               {counts, "counts"},
               {runs, "runs"}},
              "weights");
  std::vector<SwitchJob> jobs;
  for_each_in_list(weights, [&](size_t i) {
    jobs.emplace_back(weights[i], scales[i], bit_widths[i], extra_bits[i], codes[i], marks[i], counts[i], runs[i], axis,
                      score);
  });
  return jobs;
}

// The same for freeze_oscillating_.
inline std::vector<FreezeJob> freeze_jobs(at::TensorList weights, at::TensorList scales, at::TensorList bit_widths,
                                          at::TensorList extra_bits, at::TensorList codes, at::TensorList marks,
                                          at::TensorList frequencies, at::TensorList averages,
                                          std::optional<int64_t> axis) {
  check_lists(weights,
              {{scales, "scales"},
               {bit_widths, "bit_widths"},
               {extra_bits, "extra_bits"},
               {codes, "codes"},
               {marks, "marks"},
               {frequencies, "frequencies"},
               {averages, "averages"}},
              "weights");
  std::vector<FreezeJob> jobs;
  for_each_in_list(weights, [&](size_t i) {
    jobs.emplace_back(weights[i], scales[i], bit_widths[i], extra_bits[i], codes[i], marks[i], frequencies[i],
                      averages[i], axis);
  });
  return jobs;
}

}  // namespace mixbit::ops
