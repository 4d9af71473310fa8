#pragma once

// The reference architectures and points of tests/data/timeloop_points.json.

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include <mixbit/hw/arch.h>
#include <mixbit/hw/mapping.h>
#include <mixbit/hw/model.h>
#include <mixbit/hw/workload.h>

#include "json.h"

namespace mixbit::test {

inline const Json& reference() {
  static const Json data = JsonReader::file(MIXBIT_SOURCE_DIR "/tests/data/timeloop_points.json");
  return data;
}

inline hw::Arch reference_arch(const std::string& name) {
  const Json& data = reference()["architectures"][name];
  hw::Arch arch;
  for (const Json& from : data["levels"].array()) {
    hw::Level level;
    level.name = from["name"].string();
    if (!from["size"].is_null()) level.size = from["size"].integer();
    level.word_bits = from["word_bits"].integer();
    level.block = from["block"].integer();
    level.cluster = from["cluster"].integer();
    level.mesh_x = from["meshX"].integer();
    level.mesh_y = from["meshY"].integer();
    if (!from["read_bw"].is_null()) level.read_bw = from["read_bw"].number();
    if (!from["write_bw"].is_null()) level.write_bw = from["write_bw"].number();
    level.read_pj = from["Er"].number();
    level.write_pj = from["Ew"].number();
    arch.levels.push_back(level);
  }
  arch.mac_pj = data["mac"]["energy"].number();
  arch.mac_mesh_y = arch.levels[0].mesh_y;
  arch.mac_mesh_x = data["mac"]["instances"].integer() / arch.mac_mesh_y;
  return arch;
}

inline hw::Layer reference_layer(const Json& problem) {
  hw::ConvShape shape;
  shape.c = problem["C"].integer();
  shape.m = problem["M"].integer();
  shape.r = problem["R"].integer();
  shape.s = problem["S"].integer();
  shape.n = problem["N"].integer();
  shape.p = problem["P"].integer();
  shape.q = problem["Q"].integer();
  shape.w_stride = problem["Wstride"].integer();
  shape.h_stride = problem["Hstride"].integer();
  shape.w_dilation = problem["Wdilation"].integer();
  shape.h_dilation = problem["Hdilation"].integer();
  return hw::conv(shape);
}

inline hw::Widths reference_widths(const Json& problem) {
  hw::Widths widths;
  if (problem.has("bitwidths")) {
    for (const hw::Tensor t : hw::kAllTensors) {
      widths.bits[t] = static_cast<int>(problem["bitwidths"][hw::kTensorNames[t]].integer());
    }
  }
  return widths;
}

inline hw::Mapping reference_mapping(const Json& point, const hw::Arch& arch, const hw::Layer& layer) {
  hw::Mapping mapping(arch.levels.size());
  for (const Json& from : point.array()) {
    hw::LevelMapping& to = mapping[arch.level(from["level"].string())];
    for (const Json& name : from["keep"].array()) {
      for (const hw::Tensor t : hw::kAllTensors) to.keep[t] |= name.string() == hw::kTensorNames[t];
    }
    const auto loops = [&](const char* key) {
      std::vector<hw::Loop> result;
      for (const Json& loop : from[key].array()) {
        result.push_back({layer.dim(loop.array()[0].string()), loop.array()[1].integer()});
      }
      return result;
    };
    to.temporal = loops("temporal_inner_to_outer");
    to.spatial_x = loops("spatial_x");
    to.spatial_y = loops("spatial_y");
  }
  return mapping;
}

// The published constraints, as docs/mapper.md writes them.
inline void constrain(hw::Level* level, const std::vector<hw::Tensor>& kept, const hw::LoopConstraint& temporal,
                      const hw::LoopConstraint& spatial_x = {}, const hw::LoopConstraint& spatial_y = {}) {
  hw::LevelConstraints& to = level->constraints;
  for (const hw::Tensor t : hw::kAllTensors) {
    to.keep[t] = std::find(kept.begin(), kept.end(), t) != kept.end();
  }
  to.loops[hw::kTemporal] = temporal;
  to.loops[hw::kSpatialX] = spatial_x;
  to.loops[hw::kSpatialY] = spatial_y;
}

using DimNames = std::vector<std::string>;

inline hw::Arch eyeriss() {
  using namespace hw;
  Arch arch = reference_arch("eyeriss_16bit");
  std::vector<Level>& at = arch.levels;
  constrain(&at[0], {kOutputs}, {.dims = DimNames{"M"}});
  constrain(&at[1], {kWeights},
            {.dims = DimNames{"C", "R"}, .factors = {{"R", kWholeDim}}, .order = DimNames{"C", "R"}});
  constrain(&at[2], {kInputs}, {.dims = DimNames{}});
  constrain(&at[3], {}, {.dims = DimNames{}}, {}, {.dims = DimNames{"S", "C", "M"}, .factors = {{"S", kWholeDim}}});
  constrain(
      &at[4], {kInputs, kOutputs},
      {.dims = DimNames{"C", "P", "N", "M"}, .factors = {{"P", kWholeDim}}, .order = DimNames{"C", "P", "N", "M"}},
      {.dims = DimNames{"Q", "M"}});
  constrain(&at[5], {kWeights, kInputs, kOutputs},
            {.dims = DimNames{"C", "M", "N", "Q"}, .order = DimNames{"C", "M", "N", "Q"}});
  return arch;
}

inline hw::Arch simba() {
  using namespace hw;
  Arch arch = reference_arch("simba_16bit");
  std::vector<Level>& at = arch.levels;
  const LoopConstraint outer = {.dims = DimNames{"C", "M", "N", "P", "Q"}, .order = DimNames{"C", "M", "N", kAnyOrder}};
  constrain(&at[0], {kWeights}, {.dims = DimNames{"P", "Q"}});
  constrain(&at[1], {kOutputs}, {.dims = DimNames{"M"}}, {}, {.dims = DimNames{"C"}, .factors = {{"C", 4}}});
  constrain(&at[2], {kWeights}, {.dims = DimNames{"C", "R", "S"}});
  constrain(&at[3], {kInputs}, {.dims = DimNames{}}, {}, {.dims = DimNames{"M"}, .factors = {{"M", 4}}});
  constrain(&at[4], {kInputs, kOutputs}, outer, {.dims = DimNames{"C", "M"}});
  constrain(&at[5], {kWeights, kInputs, kOutputs}, outer);
  return arch;
}

// MobileNetV1 at 224 x 224 with 100 classes, depthwise layers as full convolutions.
inline std::vector<hw::ConvShape> mobilenet_v1() {
  std::vector<hw::ConvShape> layers = {
      {.c = 3, .m = 32, .r = 3, .s = 3, .p = 112, .q = 112, .w_stride = 2, .h_stride = 2}};
  const std::vector<std::array<int64_t, 3>> blocks = {
      // channels, filters, stride
      {32, 64, 1},   {64, 128, 2},  {128, 128, 1}, {128, 256, 2}, {256, 256, 1},  {256, 512, 2},  {512, 512, 1},
      {512, 512, 1}, {512, 512, 1}, {512, 512, 1}, {512, 512, 1}, {512, 1024, 2}, {1024, 1024, 1}};
  int64_t size = 112;
  for (const auto& [c, m, stride] : blocks) {
    size /= stride;
    layers.push_back({.c = c, .m = c, .r = 3, .s = 3, .p = size, .q = size, .w_stride = stride, .h_stride = stride});
    layers.push_back({.c = c, .m = m, .p = size, .q = size});
  }
  layers.push_back({.c = 1024, .m = 100});
  return layers;
}

}  // namespace mixbit::test
