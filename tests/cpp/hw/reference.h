#pragma once

// The reference architectures and points of tests/data/timeloop_points.json.

#include <string>

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

}  // namespace mixbit::test
