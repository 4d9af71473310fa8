"""The quantized weights of a model, as the ops that watch their levels take them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixbit.errors import MixbitError, did_you_mean
from mixbit.quantizers import Quantizer
from mixbit.retrain.shards import local, local_extra, local_scale, local_scales
from mixbit.retrain.thresholds import quantized_weights


class TrackedWeights:
    """Layers whose weights are watched, and what is kept of each weight.

    Args:
        model: Prepared and calibrated.
        most_bits: Layers of more weight bits are left out.
        kept: Names and dtypes of the tensors that are kept, each of the weight's shape; zeros at first. Of sharded
            weights (FSDP2) each process keeps those of its part.

    Attributes:
        layers: By name, in order of registration.
        state: Of each layer the kept tensors by name.

    Raises:
        MixbitError: No layer is left; one is not calibrated, its bits are still being searched, or its channels have
            bits of their own.
    """

    def __init__(self, model: nn.Module, most_bits: int, kept: Mapping[str, torch.dtype]) -> None:
        self.layers: dict[str, Any] = {}
        for name, layer in quantized_weights(model).items():
            quantizer = layer.weight_quantizer
            if quantizer.enabled and quantizer.by_channel:
                raise MixbitError(
                    f"layer {name!r}: its channels have bits of their own; levels are watched in layers of one width"
                )
            if quantizer.enabled and int(quantizer.bit_width) <= most_bits:
                self.layers[name] = layer
        if not self.layers:
            raise MixbitError(f"model has no quantized weights of at most {most_bits} bits")
        self.state = {
            name: {k: torch.zeros_like(local(layer.weight.detach()), dtype=dtype) for k, dtype in kept.items()}
            for name, layer in self.layers.items()
        }
        self._none: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def quantizer(self, name: str) -> Quantizer:
        """The weight quantizer of a layer.

        Raises:
            MixbitError: The layer is not watched.
        """
        self.check(name)
        quantizer = getattr(self.layers[name], "weight_quantizer", None)
        if quantizer is None:
            raise MixbitError(f"layer {name!r} has lost its weight quantizer since it is watched")
        return quantizer

    def check(self, name: str) -> None:
        """Refuses a layer that is not watched."""
        if name not in self.layers:
            raise MixbitError(f"layer {name!r} is not one of the watched layers{did_you_mean(name, self.layers)}")

    def extra_bits(self, name: str) -> Tensor | None:
        """The extra bits of a layer's weights, uint8, or None."""
        return self.quantizer(name).extra_bits

    def none(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """An empty tensor: what a score does not keep, and weights without extra levels."""
        key = (like.device, dtype)
        if key not in self._none:
            self._none[key] = torch.empty(0, dtype=dtype, device=like.device)
        return self._none[key]

    @torch.no_grad()
    def call(self, op: Callable[..., Tensor], states: Iterable[tuple[str, torch.dtype]], **options: Any) -> Tensor:
        """op(weights, scales, bit_widths, extra_bits, *states) for all layers: one call for all grids of a kind.

        Args:
            op: Of `mixbit.ops`.
            states: Names of kept tensors in the order of the op's arguments, with the dtype that an absent one has.
            options: Of the op.

        Returns:
            What the op returned for each layer, int64 [layers].
        """
        kinds: dict[Any, list[int]] = {}
        entries = []
        states = list(states)
        quantizers = [self.quantizer(name) for name in self.layers]
        scales = local_scales(quantizers)
        for i, ((name, layer), quantizer, scale) in enumerate(
            zip(self.layers.items(), quantizers, scales, strict=True)
        ):
            weight, extra = local(layer.weight.detach()), local_extra(layer.weight, quantizer)
            kept = self.state[name]
            entries.append(
                (
                    weight,
                    scale,
                    local_scale(quantizer.bit_width),
                    self.none(weight, torch.uint8) if extra is None else extra,
                    *(kept[k] if k in kept else self.none(weight, dtype) for k, dtype in states),
                )
            )
            kinds.setdefault((weight.device, quantizer.narrow_range, quantizer.rounding, quantizer.axis), []).append(i)
        results: list[Tensor] = []
        order: list[int] = []
        for (_, narrow_range, rounding, axis), members in kinds.items():
            lists = zip(*(entries[i] for i in members), strict=True)
            results.append(op(*map(list, lists), narrow_range=narrow_range, rounding=rounding, axis=axis, **options))
            order += members
        if len(results) == 1:
            return results[0]
        back = torch.tensor(order, device=results[0].device).argsort()
        return torch.cat([r.to(results[0].device) for r in results])[back]

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What is kept, by layer, with the bits of its weights."""
        return {
            name: {"bit_width": int(self.quantizer(name).bit_width), **{k: v.clone() for k, v in kept.items()}}
            for name, kept in self.state.items()
        }

    def check_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuses the state of another model.

        Raises:
            MixbitError: Names the first layer that differs.
        """
        for name in [*self.layers, *state]:
            if name not in state:
                raise MixbitError(f"layer {name!r} of the model is not in the state; expected the state of this model")
            self_has = name in self.layers
            if not self_has:
                raise MixbitError(f"layer {name!r} of the state is not watched here; expected the state of this model")
            given = state[name]
            width = int(self.quantizer(name).bit_width)
            if int(given.get("bit_width", width)) != width:
                raise MixbitError(f"layer {name!r} has {width} bits and {given['bit_width']} in the state")
            for key, own in self.state[name].items():
                value = given.get(key)
                if not isinstance(value, Tensor) or value.shape != own.shape or value.dtype != own.dtype:
                    found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else "missing"
                    raise MixbitError(
                        f"layer {name!r}: {key} is {found} in the state; expected {own.dtype} {list(own.shape)}"
                    )

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes over what `state_dict` gave, after `check_state`."""
        self.check_state(state)
        for name, kept in self.state.items():
            for key, own in kept.items():
                own.copy_(state[name][key])
