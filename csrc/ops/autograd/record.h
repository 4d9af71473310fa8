#pragma once

// What the autograd functions of the ops share.

#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <optional>

namespace mixbit::ops {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// An optional gradient: undefined if it was not asked for.
inline Variable if_needed(const at::Tensor& gradient, bool needed) { return needed ? gradient : Variable(); }

inline void keep_int(AutogradContext* ctx, const char* key, std::optional<int64_t> value) {
  if (value.has_value()) {
    ctx->saved_data[key] = *value;
  } else {
    ctx->saved_data[key] = c10::IValue();
  }
}

inline std::optional<int64_t> kept_int(AutogradContext* ctx, const char* key) {
  const c10::IValue& value = ctx->saved_data[key];
  return value.isNone() ? std::nullopt : std::optional<int64_t>(value.toInt());
}

// Whether a call has to be recorded. Without a gradient to record, a Function costs as much as a small kernel. Tangents
// of forward mode keep the way through the Function, which refuses them; _fw_grad, though spelled like a private name,
// is what generated code asks for them.
inline bool recorded(const at::Tensor& t) { return t.defined() && (t.requires_grad() || t._fw_grad(0).defined()); }

template <typename... Tensors>
bool any_recorded(const Tensors&... tensors) {
  return (recorded(tensors) || ...) && (at::GradMode::is_enabled() || (tensors._fw_grad(0).defined() || ...));
}

}  // namespace mixbit::ops
