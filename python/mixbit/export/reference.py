"""The integer network in NumPy int64: slow, readable, and the ground truth of every other way to run it.

The semantics are those of docs/integer_semantics.md. Nothing here is shared with the simulation or an exporter but the
captured graph and the reading of scales: a slip in one place must show as a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mixbit.errors import MixbitError
from mixbit.export.grid import Grid, captured, layer_grid, tensor_grids
from mixbit.network import LAYER_OPS, Node, input_tensor

Codes = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float32]

_INT32 = 2**31 - 1


def requantized(values: Codes, multiplier: Any, grid: Grid) -> Codes:
    """clamp(rne(fp32(values) * multiplier) + zero_point); fp32 arithmetic as ONNX Runtime has it."""
    scaled = np.rint(values.astype(np.float32) * np.asarray(multiplier, np.float32))
    return np.clip(scaled.astype(np.int64) + grid.zero_point, grid.low, grid.high)


#: Functions of one element, in float64.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
    "tanh": np.tanh,
    "silu": lambda v: v / (1 + np.exp(-v)),
    "gelu": lambda v: v * np.vectorize(math.erfc, [float])(-v / math.sqrt(2)) / 2,
    "elu": lambda v, alpha: np.where(v > 0, v, alpha * np.expm1(v)),
    "hardsigmoid": lambda v: np.clip(v + 3, 0, 6) / 6,
    "hardswish": lambda v: v * np.clip(v + 3, 0, 6) / 6,
    "leaky_relu": lambda v, negative_slope: np.where(v > 0, v, negative_slope * v),
    "clamp": lambda v, min, max: np.clip(v, min, max),
    "affine": lambda v, factor, offset: v * factor + offset,
}


class IntegerReference:
    """Runs the integer network of a prepared and calibrated model.

    Attributes:
        nodes: The operations in order.
        grids: Grid of every value by name.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        graph, modules = captured(model, example)
        self.nodes = graph.nodes
        self.outputs = graph.outputs
        self._readers: dict[str, list[Node]] = {
            node.name: [n for n in graph.nodes if node.name in n.inputs] for node in graph.nodes
        }
        self._acts = {n.name: modules[str(n.module)].act_quantizer for n in graph.nodes if n.op in LAYER_OPS}
        own = tensor_grids(model, graph)
        wish = self._wishes()
        self.grids: dict[str, Grid] = {}
        for node in graph.nodes:
            self.grids[node.name] = self._grid(node, wish, own)
        self._weights: dict[str, Codes] = {}
        self._bias: dict[str, Codes] = {}
        self._multiplier: dict[str, Reals] = {}
        for node in graph.nodes:
            if node.op in LAYER_OPS:
                self._take_layer(node, modules[str(node.module)])

    # -------------------------------------------------------------------------------------------------------- planning

    def _wishes(self) -> dict[str, Any]:
        """For each value the act quantizer that all its readers agree on, or None; from the end to the beginning."""
        wish: dict[str, Any] = {}
        for node in reversed(self.nodes):
            asked = []
            for reader in self._readers[node.name]:
                if reader.op in LAYER_OPS:
                    asked.append(self._acts[reader.name])
                elif reader.op in ("add", "mul", "cat", "avg_pool2d", "lookup", "softmax"):
                    asked.append(None)
                else:
                    asked.append(wish[reader.name])
            agree = bool(asked) and node.name not in self.outputs and all(a is asked[0] for a in asked)
            wish[node.name] = asked[0] if agree else None
        return wish

    def _grid(self, node: Node, wish: dict[str, Any], own: dict[str, Grid]) -> Grid:
        if wish[node.name] is not None:
            return layer_grid(wish[node.name])
        readers = self._readers[node.name]
        if node.name not in self.outputs and len(readers) == 1 and readers[0].op.startswith("relu"):
            # The activation is fused: what it makes decides.
            return self._grid(readers[0], wish, own)
        if node.op in ("max_pool2d", "reshape", "permute", "pixel_unshuffle", "slice", "pad", "repeat", "identity"):
            return self.grids[node.inputs[0]]
        if node.name not in own:
            raise MixbitError(
                f"tensor {node.name!r} has no range; call mixbit.calibrate_(model, batches, example=example) again"
            )
        return own[node.name]

    def _take_layer(self, node: Node, module: Any) -> None:
        """Weight codes, bias codes and multipliers of a layer."""
        quantizer = module.weight_quantizer
        with torch.no_grad():
            scale = quantizer.effective_scale().double().cpu().numpy().astype(np.float32)
            weight = module.weight.detach().float().cpu().numpy()
        # A weight with e extra bits has the step scale / 2^e; all codes count the finest step of the layer.
        extra = np.zeros((1,), np.uint8) if quantizer.extra_bits is None else quantizer.extra_bits.cpu().numpy()
        parts = np.int64(1) << extra.astype(np.int64)
        # One width for all, or one for each output channel.
        bits = quantizer.bit_width.cpu().numpy().astype(np.int64)
        half = (np.int64(1) << (bits - 1)).reshape(-1, *([1] * (weight.ndim - 1)))
        lowest = -half * parts + int(quantizer.narrow_range)
        highest = half * parts - 1
        coarser = parts.max() // parts
        scale = np.broadcast_to(scale, (len(weight),)) / np.float32(parts.max())
        act = layer_grid(self._acts[node.name])
        largest = max(abs(act.low - act.zero_point), abs(act.high - act.zero_point))
        real_bias = (
            np.zeros(len(weight), np.float32) if module.bias is None else module.bias.detach().float().cpu().numpy()
        )
        dead: npt.NDArray[np.bool_] | None = None
        while True:
            ratio = weight / (scale.reshape(-1, *([1] * (weight.ndim - 1))) * coarser.astype(np.float32))
            rounded = np.rint(ratio) if quantizer.rounding == "half_even" else np.floor(ratio + np.float32(0.5))
            codes = np.clip(rounded, lowest, highest).astype(np.int64) * coarser
            product = np.float32(act.scale) * scale
            steps = np.rint(np.divide(real_bias, product, out=np.zeros_like(product), where=real_bias != 0))
            products = np.abs(codes).reshape(len(codes), -1).sum(1) * largest
            if dead is None:
                # Dead but for a bias that would not fit: coarser steps for weights that hardly matter.
                dead = (np.abs(steps) > 2**30) & (256.0 * products < np.abs(steps).astype(np.float64))
            over = dead & (np.abs(steps) > 2**30)
            if not over.any():
                break
            scale[over] *= 2
        if np.abs(steps).max() > _INT32:
            raise MixbitError(f"layer {node.module!r}: its bias does not fit 32 bits at the scales of the layer")
        bias = steps.astype(np.int64)
        reach = products + np.abs(bias)
        if reach.max() > _INT32:
            raise MixbitError(f"layer {node.module!r}: its accumulator can exceed 32 bits (up to {int(reach.max())})")
        self._weights[node.name] = codes
        self._bias[node.name] = bias
        self._multiplier[node.name] = (product / np.float32(self.grids[node.name].scale)).astype(np.float32)

    # --------------------------------------------------------------------------------------------------------- running

    def tensors(self, x: Any) -> dict[str, Codes]:
        """Codes of every value for an input.

        Args:
            x: float32 [N, ...], a Tensor or array, or an item of `batches`.
        """
        array = x if isinstance(x, np.ndarray) else np.asarray(input_tensor(x).detach().float().cpu())
        values: dict[str, Codes] = {}
        for node in self.nodes:
            grid = self.grids[node.name]
            if node.op == "input":
                scaled = np.rint(array.astype(np.float32) / np.float32(grid.scale))
                values[node.name] = np.clip(scaled + np.float32(grid.zero_point), grid.low, grid.high).astype(np.int64)
            else:
                values[node.name] = self.step(node, values)
        return values

    def step(self, node: Node, values: Mapping[str, Codes]) -> Codes:
        """Codes of one value, from the codes of those that its operation reads."""
        run: Callable[..., Codes] = getattr(self, f"_{node.op}")
        return run(node, self.grids[node.name], *((values[name], self.grids[name]) for name in node.inputs))

    def __call__(self, x: Any) -> list[Reals]:
        """The network's outputs, dequantized to float32."""
        values = self.tensors(x)
        return [self.dequantize(name, values[name]) for name in self.outputs]

    def dequantize(self, name: str, codes: Codes) -> Reals:
        """(code - zero_point) * scale in float32."""
        grid = self.grids[name]
        return np.asarray((codes - grid.zero_point).astype(np.float32) * np.float32(grid.scale))

    def entering(self, node: Node, tensors: dict[str, Codes]) -> Codes:
        """Codes of a layer's input on its own act grid, from what `tensors` returned."""
        name = node.inputs[0]
        return self._moved((tensors[name], self.grids[name]), layer_grid(self._acts[node.name]))

    def _requantized(self, values: Codes, multiplier: Any, grid: Grid) -> Codes:
        """Whole numbers times a multiplier, as codes."""
        return requantized(values, multiplier, grid)

    def _moved(self, value: tuple[Codes, Grid], grid: Grid) -> Codes:
        """Codes on another grid."""
        codes, old = value
        if old == grid:
            return codes
        return self._requantized(codes - old.zero_point, np.float32(old.scale) / np.float32(grid.scale), grid)

    def _layer_input(self, node: Node, value: tuple[Codes, Grid]) -> Codes:
        act = layer_grid(self._acts[node.name])
        return self._moved(value, act) - act.zero_point

    def _conv2d(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        x = self._layer_input(node, value)
        weight = self._weights[node.name]
        (sh, sw), (ph, pw), (dh, dw) = (node.options[k] for k in ("stride", "padding", "dilation"))
        groups = node.options["groups"]
        # Zero padding adds codes of value zero; the zero point is already subtracted.
        x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
        kh, kw = weight.shape[2:]
        window = (dh * (kh - 1) + 1, dw * (kw - 1) + 1)
        windows = np.lib.stride_tricks.sliding_window_view(x, window, axis=(2, 3))[:, :, ::sh, ::sw, ::dh, ::dw]
        n, channels, h, w = windows.shape[:4]
        outputs = weight.shape[0]
        # float64 products and sums of these integers are exact: all partial sums stay far below 2^53, since the
        # accumulator fits 32 bits.
        if groups == channels == outputs:
            acc = np.einsum("nchwij,cij->nchw", windows.astype(np.float64), weight[:, 0].astype(np.float64))
        else:
            columns = windows.reshape(n, groups, channels // groups, h, w, kh, kw).astype(np.float64)
            columns = columns.transpose(1, 0, 3, 4, 2, 5, 6).reshape(groups, n * h * w, -1)
            rows = weight.reshape(groups, outputs // groups, -1).astype(np.float64)
            product = columns @ rows.transpose(0, 2, 1)
            acc = product.reshape(groups, n, h, w, outputs // groups).transpose(1, 0, 4, 2, 3).reshape(n, outputs, h, w)
        total = np.rint(acc).astype(np.int64) + self._bias[node.name].reshape(-1, 1, 1)
        return self._requantized(total, self._multiplier[node.name].reshape(-1, 1, 1), grid)

    def _linear(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        acc = self._layer_input(node, value) @ self._weights[node.name].T + self._bias[node.name]
        return self._requantized(acc, self._multiplier[node.name], grid)

    def _relu(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        return np.maximum(self._moved(value, grid), grid.zero_point)

    def _relu6(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        six = int(np.rint(np.float32(6.0) / np.float32(grid.scale))) + grid.zero_point
        return np.minimum(self._relu(node, grid, value), six)

    def _add(self, node: Node, grid: Grid, a: tuple[Codes, Grid], b: tuple[Codes, Grid]) -> Codes:
        reals = [(codes - g.zero_point).astype(np.float32) * np.float32(g.scale) for codes, g in (a, b)]
        scaled = np.rint((reals[0] + reals[1]) / np.float32(grid.scale))
        return np.clip(scaled.astype(np.int64) + grid.zero_point, grid.low, grid.high)

    def _mul(self, node: Node, grid: Grid, a: tuple[Codes, Grid], b: tuple[Codes, Grid]) -> Codes:
        product = (a[0] - a[1].zero_point) * (b[0] - b[1].zero_point)
        scale = np.float32(a[1].scale) * np.float32(b[1].scale)
        return self._requantized(product, scale / np.float32(grid.scale), grid)

    def _lookup(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        codes, old = value
        every = np.arange(old.low, old.high + 1) - old.zero_point
        reals = (every.astype(np.float32) * np.float32(old.scale)).astype(np.float64)
        options = dict(node.options)
        results = FUNCTIONS[options.pop("function")](reals, **options).astype(np.float32)
        table = np.rint(results / np.float32(grid.scale)).astype(np.int64) + grid.zero_point
        return np.asarray(np.clip(table, grid.low, grid.high)[codes - old.low])

    def _softmax(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        codes, old = value
        dim = node.options["dim"]
        distances = np.arange(old.high - old.low + 1)
        table = np.rint(65536 * np.exp(-distances * float(old.scale))).astype(np.int64)
        powers = table[codes.max(dim, keepdims=True) - codes]
        shares = powers.astype(np.float32) / powers.sum(dim, keepdims=True).astype(np.float32)
        scaled = np.rint(shares / np.float32(grid.scale))
        return np.clip(scaled.astype(np.int64) + grid.zero_point, grid.low, grid.high)

    def _cat(self, node: Node, grid: Grid, *values: tuple[Codes, Grid]) -> Codes:
        return np.concatenate([self._moved(value, grid) for value in values], axis=1)

    def _avg_pool2d(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        codes, old = value
        x = codes - old.zero_point
        kernel, stride = node.options["kernel"], node.options["stride"]
        if kernel is None:
            kernel = stride = x.shape[2:]
        ph, pw = node.options.get("padding", (0, 0))

        def sums(values: Codes, border: int) -> Codes:
            """Sums over the windows; the padding has the value `border`."""
            padded = np.pad(values, ((0, 0), (0, 0), (ph, ph), (pw, pw)), constant_values=border)
            windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=(2, 3))
            return np.asarray(windows[:, :, :: stride[0], :: stride[1]].sum((4, 5)))

        counts = sums(np.ones_like(x[:1, :1]), int(node.options.get("count_include_pad", True)))
        multiplier = np.float32(old.scale) / (counts.astype(np.float32) * np.float32(grid.scale))
        pooled = self._requantized(sums(x, 0), multiplier, grid)
        return pooled if node.options.get("keepdim", True) else pooled[:, :, 0, 0]

    def _max_pool2d(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        x = self._moved(value, grid)
        o = node.options
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (o[k] for k in ("kernel", "stride", "padding", "dilation"))
        height, width = dh * (kh - 1) + 1, dw * (kw - 1) + 1
        extra = [0, 0]
        if o["ceil_mode"]:
            for axis, (size, span, step, pad) in enumerate(((x.shape[2], height, sh, ph), (x.shape[3], width, sw, pw))):
                count = -(-(size + 2 * pad - span) // step) + 1
                if (count - 1) * step >= size + pad:  # a window must start inside the input or its left padding
                    count -= 1
                extra[axis] = max(0, (count - 1) * step + span - size - 2 * pad)
        lowest = np.iinfo(np.int64).min
        x = np.pad(x, ((0, 0), (0, 0), (ph, ph + extra[0]), (pw, pw + extra[1])), constant_values=lowest)
        windows = np.lib.stride_tricks.sliding_window_view(x, (height, width), axis=(2, 3))
        return windows[:, :, ::sh, ::sw, ::dh, ::dw].max((4, 5))

    def _reshape(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        x = self._moved(value, grid)
        return x.reshape(x.shape[0], *node.options["shape"])

    def _permute(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        return self._moved(value, grid).transpose(node.options["dims"])

    def _pixel_unshuffle(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        x, factor = self._moved(value, grid), node.options["factor"]
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // factor, factor, w // factor, factor).transpose(0, 1, 3, 5, 2, 4)
        return x.reshape(n, c * factor**2, h // factor, w // factor)

    def _slice(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        o = node.options
        x = np.moveaxis(self._moved(value, grid), o["dim"], 0)[o["start"] : o["end"] : o["step"]]
        return np.moveaxis(x, 0, o["dim"])

    def _pad(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        x = self._moved(value, grid)
        amounts = node.options["amounts"]  # pairs from the last dimension backwards
        widths = [(0, 0)] * (x.ndim - len(amounts) // 2)
        widths += [(amounts[i], amounts[i + 1]) for i in range(len(amounts) - 2, -1, -2)]
        return np.pad(x, widths, constant_values=grid.zero_point)

    def _repeat(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        height, width = node.options["counts"]
        return self._moved(value, grid).repeat(height, axis=2).repeat(width, axis=3)

    def _identity(self, node: Node, grid: Grid, value: tuple[Codes, Grid]) -> Codes:
        return self._moved(value, grid)


class FixedPointReference(IntegerReference):
    """The integer network with multipliers of 32 bits and shifts in place of fp32 arithmetic.

    A multiplier m is M 2^-n with 2^30 <= M < 2^31, which holds every fp32 number exactly; a value v becomes
    `clamp(floor((v M + 2^(n-1)) / 2^n) + zero_point)`: v m exactly, rounded half up, with a 64-bit product. A sum of
    two values is `floor((a M_a + b M_b + 2^(n-1)) / 2^n)`: the larger multiplier sets n, the other one is rounded to
    its steps. The input, tables and softmax are those of `IntegerReference`. (Multipliers and shifts: Jacob et al.,
    arXiv 1712.05877, section 2.2.)
    """

    def _requantized(self, values: Codes, multiplier: Any, grid: Grid) -> Codes:
        factor, shift = fixed_point(multiplier)
        # Beyond 62 the exact product is below one half in magnitude, and both ways of rounding give 0.
        half, most = np.int64(1), np.minimum(shift, 62)
        scaled = np.where(shift > 62, 0, (values * factor + (half << (most - 1))) >> most)
        return np.clip(scaled + grid.zero_point, grid.low, grid.high)

    def _add(self, node: Node, grid: Grid, a: tuple[Codes, Grid], b: tuple[Codes, Grid]) -> Codes:
        multipliers = [np.float32(g.scale) / np.float32(grid.scale) for _, g in (a, b)]
        shift = min(int(fixed_point(max(multipliers))[1]), 62)
        factors = [int(np.rint(float(m) * 2.0**shift)) for m in multipliers]
        total = sum((codes - g.zero_point) * factor for (codes, g), factor in zip((a, b), factors, strict=True))
        return np.clip(((total + (1 << (shift - 1))) >> shift) + grid.zero_point, grid.low, grid.high)


def fixed_point(multiplier: Any) -> tuple[Codes, Codes]:
    """M and n with multiplier = M 2^-n and 2^30 <= M < 2^31, for positive fp32 numbers; 0 is 0 2^-31.

    Raises:
        MixbitError: A multiplier is 2^30 or larger: no shift to the right is left.
    """
    fraction, exponent = np.frexp(np.asarray(multiplier, np.float32).astype(np.float64))
    factor, shift = (fraction * 2.0**31).astype(np.int64), 31 - exponent.astype(np.int64)
    if (shift < 1).any():
        raise MixbitError(f"multiplier {float(np.max(multiplier))} is too large for a fixed point: expected below 2^30")
    return factor, shift
