// The accelerator model: dicts and lists in and out (docs/mapper.md has the notation), no tensors, so no torch op.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <mixbit/hw/arch.h>
#include <mixbit/hw/mapping.h>
#include <mixbit/hw/mapspace.h>
#include <mixbit/hw/model.h>
#include <mixbit/hw/search.h>
#include <mixbit/hw/workload.h>

namespace py = pybind11;

namespace {

namespace hw = mixbit::hw;
using hw::Arch;
using hw::Evaluation;
using hw::kAllTensors;
using hw::kOutputs;
using hw::kTensorNames;
using hw::Layer;
using hw::Level;
using hw::Mapping;
using hw::ModelOptions;
using hw::Tensor;
using hw::Widths;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string shown(const py::handle& value) { return py::repr(value).cast<std::string>(); }

// A dict that knows what it is called in messages.
class Reader {
 public:
  Reader(const py::handle& value, std::string where) : where_(std::move(where)) {
    if (!py::isinstance<py::dict>(value)) fail(where_ + ": " + shown(value) + ", expected a dict");
    dict_ = py::reinterpret_borrow<py::dict>(value);
  }

  const std::string& where() const { return where_; }
  const py::dict& dict() const { return dict_; }
  bool has(const char* key) const { return dict_.contains(key) && !dict_[key].is_none(); }

  // Every key must be one of these.
  void only(std::initializer_list<const char*> keys) const {
    for (const auto& item : dict_) {
      const std::string key = py::str(item.first);
      if (std::find(keys.begin(), keys.end(), key) != keys.end()) continue;
      std::string known;
      for (const char* name : keys) known.append(known.empty() ? "" : ", ").append(name);
      fail(where_ + ": unknown key " + key + ", expected one of " + known);
    }
  }

  template <typename T>
  T get(const char* key) const {
    if (!has(key)) fail(where_ + ": no " + key);
    return convert<T>(dict_[key], key);
  }
  template <typename T>
  T get(const char* key, T otherwise) const {
    return has(key) ? convert<T>(dict_[key], key) : otherwise;
  }
  template <typename T>
  std::optional<T> maybe(const char* key) const {
    return has(key) ? std::optional<T>(convert<T>(dict_[key], key)) : std::nullopt;
  }
  Reader reader(const char* key) const { return {get<py::object>(key), where_ + "." + key}; }

  template <typename T>
  T convert(const py::handle& value, const std::string& key) const {
    try {
      // bool is an int to Python, but no number of words or bits.
      if (py::isinstance<py::bool_>(value) && !std::is_same_v<T, bool>) throw py::cast_error();
      return value.cast<T>();
    } catch (const py::cast_error&) {
      const char* expected = std::is_same_v<T, int64_t> || std::is_same_v<T, int> ? "an integer"
                             : std::is_same_v<T, double>                          ? "a number"
                             : std::is_same_v<T, std::string>                     ? "a string"
                                                                                  : "another type";
      fail(where_ + "." + key + ": " + shown(value) + ", expected " + expected);
    }
  }

 private:
  std::string where_;
  py::dict dict_;
};

using Names = std::vector<std::string>;

Names names(const Reader& from, const char* key) {
  const auto value = from.get<py::object>(key);
  if (!py::isinstance<py::list>(value) && !py::isinstance<py::tuple>(value)) {
    fail(from.where() + "." + key + ": " + shown(value) + ", expected a list of names");
  }
  Names result;
  for (const auto& item : value) result.push_back(from.convert<std::string>(item, key));
  return result;
}

Tensor tensor(const std::string& name, const std::string& where) {
  for (const Tensor t : kAllTensors) {
    if (name == kTensorNames[t]) return t;
  }
  fail(where + ": unknown tensor " + name + ", expected one of Weights, Inputs, Outputs");
}

hw::LoopConstraint read_loop_constraint(const Reader& from) {
  from.only({"dims", "factors", "max", "order"});
  hw::LoopConstraint result;
  if (from.has("dims")) result.dims = names(from, "dims");
  if (from.has("order")) result.order = names(from, "order");
  const auto factors = [&](const char* key, std::map<std::string, int64_t>* into) {
    if (!from.has(key)) return;
    const Reader given = from.reader(key);
    for (const auto& [name, value] : given.dict()) {
      const std::string dim = py::str(name);
      const bool whole = py::isinstance<py::str>(value) && value.cast<std::string>() == "all";
      (*into)[dim] = whole ? hw::kWholeDim : given.convert<int64_t>(value, dim);
    }
  };
  factors("factors", &result.factors);
  factors("max", &result.max_factors);
  return result;
}

hw::LevelConstraints read_constraints(const Reader& from) {
  from.only({"keep", "bypass", "temporal", "spatial_x", "spatial_y"});
  hw::LevelConstraints result;
  const auto mark = [&](const char* key, bool value) {
    if (!from.has(key)) return;
    for (const std::string& name : names(from, key)) {
      auto& keep = result.keep[tensor(name, from.where() + "." + key)];
      if (keep) fail(from.where() + ": " + name + " is both kept and bypassed, or named twice");
      keep = value;
    }
  };
  mark("keep", true);
  mark("bypass", false);
  for (int kind = 0; kind < hw::kLoopKinds; ++kind) {
    const char* key = hw::kLoopKindNames[kind];
    if (from.has(key)) result.loops[kind] = read_loop_constraint(from.reader(key));
  }
  return result;
}

// A mesh given by instances alone is a row.
void read_mesh(const Reader& from, int64_t row, int64_t* mesh_x, int64_t* mesh_y) {
  const auto instances = from.maybe<int64_t>("instances");
  const auto y = from.get<int64_t>("meshY", instances ? row : 1);
  *mesh_y = y;
  *mesh_x = from.get<int64_t>("meshX", instances && y > 0 ? *instances / y : 1);
  if (instances && (y < 1 || *instances % y != 0 || *instances / y != *mesh_x)) {
    fail(from.where() + ": " + std::to_string(*instances) + " instances, but a mesh of " + std::to_string(*mesh_x) +
         " x " + std::to_string(*mesh_y));
  }
}

Level read_level(const Reader& from) {
  from.only({"name", "size", "word_bits", "block", "cluster", "instances", "meshX", "meshY", "read_bw", "write_bw",
             "shared_bw", "Er", "Ew", "constraints"});
  Level level;
  level.name = from.get<std::string>("name");
  level.size = from.maybe<int64_t>("size");
  level.word_bits = from.get<int64_t>("word_bits");
  level.block = from.get<int64_t>("block", 1);
  level.cluster = from.get<int64_t>("cluster", 1);
  read_mesh(from, 1, &level.mesh_x, &level.mesh_y);
  level.read_bw = from.maybe<double>("read_bw");
  level.write_bw = from.maybe<double>("write_bw");
  level.shared_bw = from.maybe<double>("shared_bw");
  level.read_pj = from.get<double>("Er");
  level.write_pj = from.get<double>("Ew");
  if (from.has("constraints")) level.constraints = read_constraints(from.reader("constraints"));
  return level;
}

Arch read_arch(const py::dict& dict) {
  const Reader from(dict, "arch");
  from.only({"name", "mac", "levels"});
  Arch arch;
  const auto levels = from.get<py::object>("levels");
  if (!py::isinstance<py::list>(levels)) fail("arch.levels: " + shown(levels) + ", expected a list of levels");
  for (const auto& item : levels) {
    const Reader unnamed(item, "arch.levels[" + std::to_string(arch.levels.size()) + "]");
    arch.levels.push_back(
        read_level({item, unnamed.has("name") ? "arch: level " + unnamed.get<std::string>("name") : unnamed.where()}));
  }
  const Reader mac = from.reader("mac");
  mac.only({"energy", "instances", "meshX", "meshY", "scaling"});
  arch.mac_pj = mac.get<double>("energy");
  read_mesh(mac, arch.levels.empty() ? 1 : arch.levels[0].mesh_y, &arch.mac_mesh_x, &arch.mac_mesh_y);
  if (mac.has("scaling")) {
    const Reader scaling = mac.reader("scaling");
    scaling.only({"multiplier", "adder", "reference_bits"});
    arch.mac_scaling = {scaling.get<double>("multiplier"), scaling.get<double>("adder"),
                        scaling.get<double>("reference_bits", 32.0)};
  }
  hw::check(arch);
  return arch;
}

Layer read_projections(const Reader& from) {
  from.only({"dims", "projections", "bitwidths"});
  Layer layer;
  for (const auto& [name, bound] : from.reader("dims").dict()) {
    layer.dims.push_back(py::str(name));
    layer.bounds.push_back(from.convert<int64_t>(bound, layer.dims.back()));
  }
  const Reader projections = from.reader("projections");
  projections.only({"Weights", "Inputs", "Outputs"});
  for (const Tensor t : kAllTensors) {
    using Terms = std::vector<std::vector<std::pair<std::string, int64_t>>>;
    for (const auto& rank : projections.get<Terms>(kTensorNames[t])) {
      layer.tensors[t].emplace_back();
      for (const auto& [dim, coefficient] : rank) layer.tensors[t].back().push_back({layer.dim(dim), coefficient});
    }
  }
  hw::check(layer);
  return layer;
}

Layer read_layer(const py::dict& dict) {
  const Reader from(dict, "problem");
  if (from.has("projections")) return read_projections(from);
  if (from.has("K")) {
    from.only({"M", "N", "K", "bitwidths"});
    return hw::gemm(from.get<int64_t>("M"), from.get<int64_t>("N"), from.get<int64_t>("K"));
  }
  from.only({"C", "M", "R", "S", "N", "P", "Q", "G", "Wstride", "Hstride", "Wdilation", "Hdilation", "bitwidths"});
  hw::ConvShape shape;
  shape.c = from.get<int64_t>("C");
  shape.m = from.get<int64_t>("M");
  shape.r = from.get<int64_t>("R", 1);
  shape.s = from.get<int64_t>("S", 1);
  shape.n = from.get<int64_t>("N", 1);
  shape.p = from.get<int64_t>("P", 1);
  shape.q = from.get<int64_t>("Q", 1);
  shape.g = from.get<int64_t>("G", 1);
  shape.w_stride = from.get<int64_t>("Wstride", 1);
  shape.h_stride = from.get<int64_t>("Hstride", 1);
  shape.w_dilation = from.get<int64_t>("Wdilation", 1);
  shape.h_dilation = from.get<int64_t>("Hdilation", 1);
  return hw::conv(shape);
}

int width(const Reader& from, const char* key) {
  const auto bits = from.get<int>(key, 0);
  if (from.has(key) && bits < 1) fail(from.where() + "." + key + ": " + std::to_string(bits) + ", expected at least 1");
  return bits;
}

// `bits` (act, weight, out, partial), or the problem's own "bitwidths", or native words.
Widths read_widths(const std::optional<py::dict>& bits, const py::dict& problem) {
  Widths widths;
  if (bits) {
    const Reader from(*bits, "bits");
    from.only({"act", "weight", "out", "partial"});
    widths.bits[hw::kInputs] = width(from, "act");
    widths.bits[hw::kWeights] = width(from, "weight");
    widths.bits[hw::kOutputs] = width(from, "out");
    widths.partial_bits = width(from, "partial");
  } else if (const Reader from(problem, "problem"); from.has("bitwidths")) {
    const Reader own = from.reader("bitwidths");
    own.only({"Weights", "Inputs", "Outputs"});
    for (const Tensor t : kAllTensors) widths.bits[t] = width(own, kTensorNames[t]);
  }
  return widths;
}

std::vector<hw::Loop> read_loops(const Reader& from, const char* key, const Layer& layer) {
  std::vector<hw::Loop> loops;
  if (!from.has(key)) return loops;
  for (const auto& item : from.get<py::object>(key)) {
    if (!py::isinstance<py::sequence>(item) || py::len(item) != 2) {
      fail(from.where() + "." + key + ": " + shown(item) + ", expected a pair of dimension and factor");
    }
    const auto pair = py::reinterpret_borrow<py::sequence>(item);
    loops.push_back({layer.dim(from.convert<std::string>(pair[0], key)), from.convert<int64_t>(pair[1], key)});
  }
  return loops;
}

// Levels are matched by name; one that is not listed holds nothing.
Mapping read_mapping(const py::list& list, const Arch& arch, const Layer& layer) {
  Mapping mapping(arch.levels.size());
  std::vector<bool> seen(arch.levels.size(), false);
  for (const auto& item : list) {
    const Reader unnamed(item, "mapping");
    const auto name = unnamed.get<std::string>("level");
    const Reader from(item, "mapping: level " + name);
    from.only({"level", "keep", "temporal_inner_to_outer", "spatial_x", "spatial_y"});
    const int l = arch.level(name);
    if (seen[l]) fail("mapping: level " + name + " is listed twice");
    seen[l] = true;
    if (from.has("keep")) {
      for (const std::string& kept : names(from, "keep")) mapping[l].keep[tensor(kept, from.where())] = true;
    }
    mapping[l].temporal = read_loops(from, "temporal_inner_to_outer", layer);
    mapping[l].spatial_x = read_loops(from, "spatial_x", layer);
    mapping[l].spatial_y = read_loops(from, "spatial_y", layer);
  }
  return mapping;
}

ModelOptions read_options(const std::string& semantics, const std::string& reuse, bool scale_mac) {
  ModelOptions options;
  if (semantics != "v3" && semantics != "v4") fail("semantics: " + semantics + ", expected v3 or v4");
  if (reuse != "sampled" && reuse != "walked" && reuse != "window") {
    fail("reuse: " + reuse + ", expected sampled, walked or window");
  }
  options.semantics = semantics == "v3" ? hw::Semantics::kV3 : hw::Semantics::kV4;
  options.reuse = reuse == "sampled"  ? hw::Reuse::kSampled
                  : reuse == "walked" ? hw::Reuse::kWalked
                                      : hw::Reuse::kWindow;
  options.scale_mac = scale_mac;
  return options;
}

py::dict to_python(const Evaluation& e, const Arch& arch) {
  py::list levels;
  for (size_t l = 0; l < arch.levels.size(); ++l) {
    py::dict data;
    for (const Tensor t : kAllTensors) {
      const hw::TensorCounts& c = e.levels[l].tensors[t];
      if (!c.kept) continue;
      data[kTensorNames[t]] =
          py::dict(py::arg("tile_words") = c.tile_words, py::arg("operands_per_word") = c.operands_per_word,
                   py::arg("partition") = c.partition, py::arg("instances") = c.instances,
                   py::arg("reads_words_per_instance") = c.reads, py::arg("updates_words_per_instance") = c.updates,
                   py::arg("fills_words_per_instance") = c.fills, py::arg("energy_total_pJ") = c.energy_pj);
    }
    levels.append(py::dict(py::arg("name") = arch.levels[l].name, py::arg("cycles") = e.levels[l].cycles,
                           py::arg("data") = data));
  }
  return py::dict(py::arg("energy_pj") = e.energy_pj, py::arg("cycles") = e.cycles, py::arg("edp") = e.edp,
                  py::arg("last_level_accesses") = e.last_level_accesses, py::arg("utilization") = e.utilization,
                  py::arg("mac") = py::dict(py::arg("energy_pJ") = e.mac_energy_pj, py::arg("computes") = e.macs,
                                            py::arg("utilized_instances") = e.utilized_instances),
                  py::arg("levels") = levels);
}

py::list to_python(const Mapping& mapping, const Arch& arch, const Layer& layer) {
  const auto loops = [&](const std::vector<hw::Loop>& from) {
    py::list list;
    for (const hw::Loop& loop : from) {
      py::list pair;
      pair.append(layer.dims[loop.dim]);
      pair.append(loop.factor);
      list.append(pair);
    }
    return list;
  };
  py::list levels;
  for (size_t l = 0; l < mapping.size(); ++l) {
    py::list keep;
    for (const Tensor t : kAllTensors) {
      if (mapping[l].keep[t]) keep.append(kTensorNames[t]);
    }
    levels.append(py::dict(py::arg("level") = arch.levels[l].name, py::arg("keep") = keep,
                           py::arg("temporal_inner_to_outer") = loops(mapping[l].temporal),
                           py::arg("spatial_x") = loops(mapping[l].spatial_x),
                           py::arg("spatial_y") = loops(mapping[l].spatial_y)));
  }
  return levels;
}

// Counts beyond 2^63 are Python integers too.
py::object whole(double count) { return py::reinterpret_steal<py::object>(PyLong_FromDouble(count)); }

py::dict to_python(const hw::MappingCounts& counts) {
  return py::dict(py::arg("total") = whole(counts.total), py::arg("fanout_invalid") = whole(counts.fanout_invalid),
                  py::arg("capacity_invalid") = whole(counts.capacity_invalid), py::arg("valid") = whole(counts.valid));
}

py::dict to_python(const hw::Certificate& c) {
  py::dict result(py::arg("total") = whole(c.total), py::arg("fanout_invalid") = whole(c.fanout_invalid),
                  py::arg("capacity_invalid") = whole(c.capacity_invalid),
                  py::arg("bound_pruned") = whole(c.bound_pruned),
                  py::arg("dominance_pruned") = whole(c.dominance_pruned), py::arg("evaluated") = whole(c.evaluated),
                  py::arg("nodes") = c.nodes);
  result["least_open_bound"] = c.bound_pruned > 0.0 ? py::object(py::float_(c.least_open_bound)) : py::none();
  return result;
}

py::dict to_python(const hw::Found& found, const Arch& arch, const Layer& layer) {
  py::dict result = to_python(found.evaluation, arch);
  result["mapping"] = to_python(found.mapping, arch, layer);
  return result;
}

hw::Objective read_objective(const std::string& name) {
  if (name == "energy") return hw::Objective::kEnergy;
  if (name == "delay") return hw::Objective::kDelay;
  if (name == "edp") return hw::Objective::kEdp;
  if (name == "last_level_accesses") return hw::Objective::kLastLevelAccesses;
  fail("objective: " + name + ", expected energy, delay, edp or last_level_accesses");
}

hw::SearchOptions read_search(const std::string& objective, int threads, const std::string& method,
                              const std::string& semantics, bool scale_mac) {
  hw::SearchOptions options;
  options.objective = read_objective(objective);
  if (threads < 1) fail("threads: " + std::to_string(threads) + ", expected at least 1");
  options.threads = threads;
  if (method == "exhaustive") {
    options.method = hw::Method::kExhaustive;
  } else if (method != "bounded") {
    fail("method: " + method + ", expected bounded or exhaustive");
  }
  options.model = read_options(semantics, "sampled", scale_mac);
  return options;
}

// One list of bits for all tensors, or lists under act, weight, out (and a partial width).
hw::WidthLists read_width_lists(const py::object& given) {
  hw::WidthLists lists;
  const auto list = [](const py::handle& value, const char* name) {
    if (!py::isinstance<py::sequence>(value) || py::isinstance<py::str>(value)) {
      fail(std::string("widths.") + name + ": " + shown(value) + ", expected a list of bits");
    }
    std::vector<int> bits;
    for (const auto& item : value) {
      const Reader one(py::dict(py::arg("bits") = item), std::string("widths.") + name);
      bits.push_back(width(one, "bits"));
    }
    return bits;
  };
  if (!py::isinstance<py::dict>(given)) {
    for (auto& bits : lists.bits) bits = list(given, "all");
    return lists;
  }
  const Reader from(given, "widths");
  from.only({"act", "weight", "out", "partial"});
  lists.bits[hw::kInputs] = list(from.get<py::object>("act"), "act");
  lists.bits[hw::kWeights] = list(from.get<py::object>("weight"), "weight");
  lists.bits[hw::kOutputs] = list(from.get<py::object>("out"), "out");
  lists.partial_bits = width(from, "partial");
  return lists;
}

// Equal numbers for equal mappings.
std::vector<int64_t> numbers(const Mapping& mapping) {
  std::vector<int64_t> found;
  for (const hw::LevelMapping& level : mapping) {
    found.insert(found.end(), level.keep.begin(), level.keep.end());
    for (const auto* loops : {&level.temporal, &level.spatial_x, &level.spatial_y}) {
      found.push_back(static_cast<int64_t>(loops->size()));
      for (const hw::Loop& loop : *loops) found.insert(found.end(), {loop.dim, loop.factor});
    }
  }
  return found;
}

py::dict to_python(const hw::SweepResult& sweep, const hw::WidthLists& widths, const Arch& arch, const Layer& layer) {
  const std::vector<py::ssize_t> shape = {static_cast<py::ssize_t>(widths.bits[hw::kInputs].size()),
                                          static_cast<py::ssize_t>(widths.bits[hw::kWeights].size()),
                                          static_cast<py::ssize_t>(widths.bits[kOutputs].size())};
  // Floats, for a triple that nothing fits is NaN.
  const auto table = [&](const auto& value) {
    py::array_t<double> array(shape);
    double* to = array.mutable_data();
    for (const int64_t i : sweep.index) {
      *to++ = i < 0 ? std::numeric_limits<double>::quiet_NaN()
                    : static_cast<double>(value(sweep.found[static_cast<size_t>(i)].evaluation));
    }
    return array;
  };
  // Many triples share a mapping; a mapping as dicts takes longer to make than most layers to search.
  py::list mappings;
  std::map<std::vector<int64_t>, int64_t> known;
  std::vector<int64_t> place;
  for (const hw::Found& found : sweep.found) {
    const auto [entry, is_new] = known.try_emplace(numbers(found.mapping), static_cast<int64_t>(known.size()));
    if (is_new) mappings.append(to_python(found.mapping, arch, layer));
    place.push_back(entry->second);
  }
  py::array_t<int64_t> index(shape);
  std::transform(sweep.index.begin(), sweep.index.end(), index.mutable_data(),
                 [&](int64_t i) { return i < 0 ? i : place[static_cast<size_t>(i)]; });
  return py::dict(py::arg("energy_pj") = table([](const Evaluation& e) { return e.energy_pj; }),
                  py::arg("cycles") = table([](const Evaluation& e) { return e.cycles; }),
                  py::arg("edp") = table([](const Evaluation& e) { return e.edp; }),
                  py::arg("last_level_accesses") = table([](const Evaluation& e) { return e.last_level_accesses; }),
                  py::arg("mapping") = index, py::arg("mappings") = mappings, py::arg("classes") = sweep.classes,
                  py::arg("certificate") = to_python(sweep.certificate), py::arg("relaxed") = sweep.relaxed);
}

// Runs f without the GIL.
template <typename F>
auto released(const F& f) {
  py::gil_scoped_release release;
  return f();
}

}  // namespace

void bind_hw(py::module_& parent) {
  py::module_ m = parent.def_submodule("hw", "Accelerator cost and optimal mappings; docs/mapper.md has the notation.");
  m.def(
      "evaluate",
      [](const py::dict& arch, const py::dict& problem, const py::list& mapping, const std::optional<py::dict>& bits,
         const std::string& semantics, const std::string& reuse, bool scale_mac) {
        const Arch a = read_arch(arch);
        const Layer layer = read_layer(problem);
        return to_python(hw::evaluate(a, layer, read_mapping(mapping, a, layer), read_widths(bits, problem),
                                      read_options(semantics, reuse, scale_mac)),
                         a);
      },
      py::arg("arch"), py::arg("problem"), py::arg("mapping"), py::arg("bits") = py::none(),
      py::arg("semantics") = "v3", py::arg("reuse") = "sampled", py::arg("scale_mac") = false);
  m.def(
      "elements",
      [](const py::dict& problem) {
        const Layer layer = read_layer(problem);
        py::dict result(py::arg("macs") = layer.macs());
        for (const Tensor t : kAllTensors) result[kTensorNames[t]] = layer.elements(t);
        return result;
      },
      py::arg("problem"));
  m.def(
      "count_mappings",
      [](const py::dict& arch, const py::dict& problem, const std::optional<py::dict>& bits, int threads) {
        const Arch a = read_arch(arch);
        const Layer layer = read_layer(problem);
        const Widths widths = read_widths(bits, problem);
        py::dict result = to_python(released([&] { return hw::count_mappings(a, layer, widths, threads); }));
        result["relaxed"] = hw::MapSpace(a, layer).relaxed();
        return result;
      },
      py::arg("arch"), py::arg("problem"), py::arg("bits") = py::none(), py::arg("threads") = 1);
  m.def(
      "search",
      [](const py::dict& arch, const py::dict& problem, const std::optional<py::dict>& bits,
         const std::string& objective, int threads, const std::string& method, const std::string& semantics,
         bool scale_mac) {
        const Arch a = read_arch(arch);
        const Layer layer = read_layer(problem);
        const Widths widths = read_widths(bits, problem);
        const hw::SearchOptions options = read_search(objective, threads, method, semantics, scale_mac);
        const hw::SearchResult found = released([&] { return hw::search(a, layer, widths, options); });
        py::dict result = to_python(found.best, a, layer);
        result["certificate"] = to_python(found.certificate);
        result["relaxed"] = found.relaxed;
        return result;
      },
      py::arg("arch"), py::arg("problem"), py::arg("bits") = py::none(), py::arg("objective") = "edp",
      py::arg("threads") = 1, py::arg("method") = "bounded", py::arg("semantics") = "v3", py::arg("scale_mac") = false);
  m.def(
      "sweep",
      [](const py::dict& arch, const py::dict& problem, const py::object& widths, const std::string& objective,
         int threads, const std::string& method, const std::string& semantics, bool scale_mac) {
        const Arch a = read_arch(arch);
        const Layer layer = read_layer(problem);
        const hw::WidthLists lists = read_width_lists(widths);
        const hw::SearchOptions options = read_search(objective, threads, method, semantics, scale_mac);
        return to_python(released([&] { return hw::sweep(a, layer, lists, options); }), lists, a, layer);
      },
      py::arg("arch"), py::arg("problem"), py::arg("widths"), py::arg("objective") = "edp", py::arg("threads") = 1,
      py::arg("method") = "bounded", py::arg("semantics") = "v3", py::arg("scale_mac") = false);
  m.def(
      "pareto",
      [](const py::dict& arch, const py::dict& problem, const std::optional<py::dict>& bits, const Names& objectives,
         int threads, const std::string& method, const std::string& semantics, bool scale_mac) {
        const Arch a = read_arch(arch);
        const Layer layer = read_layer(problem);
        const Widths widths = read_widths(bits, problem);
        const hw::SearchOptions options = read_search("edp", threads, method, semantics, scale_mac);
        std::vector<hw::Objective> wanted;
        for (const std::string& name : objectives) wanted.push_back(read_objective(name));
        const hw::ParetoResult front = released([&] { return hw::pareto(a, layer, widths, wanted, options); });
        py::list points;
        for (const hw::Found& point : front.points) points.append(to_python(point, a, layer));
        return py::dict(py::arg("points") = points, py::arg("certificate") = to_python(front.certificate),
                        py::arg("relaxed") = front.relaxed);
      },
      py::arg("arch"), py::arg("problem"), py::arg("bits") = py::none(),
      py::arg("objectives") = Names{"energy", "delay", "last_level_accesses"}, py::arg("threads") = 1,
      py::arg("method") = "bounded", py::arg("semantics") = "v3", py::arg("scale_mac") = false);
  m.def(
      "random_search",
      [](const py::dict& arch, const py::dict& problem, const std::optional<py::dict>& bits,
         const std::string& objective, uint64_t seed, int64_t victory, int64_t timeout, int64_t orders,
         const std::string& semantics, bool scale_mac) {
        const Arch a = read_arch(arch);
        const Layer layer = read_layer(problem);
        const Widths widths = read_widths(bits, problem);
        const hw::SearchOptions options = read_search(objective, 1, "bounded", semantics, scale_mac);
        const hw::RandomResult found =
            released([&] { return hw::random_search(a, layer, widths, options, {seed, victory, timeout, orders}); });
        py::dict result = to_python(found.best, a, layer);
        result["counts"] = to_python(found.counts);
        result["relaxed"] = found.relaxed;
        return result;
      },
      py::arg("arch"), py::arg("problem"), py::arg("bits") = py::none(), py::arg("objective") = "edp",
      py::arg("seed") = 0, py::arg("victory") = 500, py::arg("timeout") = 15000, py::arg("orders") = 16,
      py::arg("semantics") = "v3", py::arg("scale_mac") = false);
}
