"""The ops against their limits and rivals, side by side in one run, one thread.

Limits: fake_quantize forward against `out.copy_(x)`; forward and backward against that plus `torch.mul(x, g, out=)`;
quantization_noise against one pure read, `x.sum()`.

Usage: python bench/bench_ops.py [--again] [--no-compile]
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

import torch
from rows import measure
from timing import side_by_side
from torch import Tensor

from mixbit import ops

SHAPES = {"activations 32x64x56x56": ((32, 64, 56, 56), None), "weights 512x512x3x3": ((512, 512, 3, 3), 0)}


class Straight(torch.autograd.Function):
    """A hand-written learned-step quantizer in plain PyTorch: what torch.compile gets to fuse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.range = (low, high)
        return torch.clamp(torch.round(x / scale), low, high) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        x, scale = ctx.saved_tensors
        low, high = ctx.range
        v = x / scale
        q = torch.clamp(torch.round(v), low, high)
        inside = (v >= low) & (v <= high)
        dscale = grad * torch.where(inside, q - v, q)
        dims = tuple(d for d in range(x.dim()) if scale.dim() == 0 or d >= scale.dim() or scale.shape[d] == 1)
        return torch.where(inside, grad, 0), dscale.sum(dims, keepdim=True).view(scale.shape), None, None


def setting(shape: tuple[int, ...], axis: int | None, bits: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape)
    channels = 1 if axis is None else shape[axis]
    scale = torch.full((channels,), 3.0 / 2 ** (bits - 1))
    return {
        "x": x,
        "scale": scale,
        "zero": torch.zeros(1),
        "bits": torch.full((1,), float(bits)),
        "g": torch.randn(shape),
    }


def forward(shape: tuple[int, ...], axis: int | None, bits: int, compiled: bool) -> dict[str, Any]:
    s = setting(shape, axis, bits)
    x, out = s["x"], torch.empty_like(s["x"])
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    broadcast = s["scale"].view(-1, *[1] * (x.dim() - 1)) if axis is not None else s["scale"]
    zeros = torch.zeros(s["scale"].numel(), dtype=torch.int32)

    def plain(x: Tensor, scale: Tensor) -> Tensor:
        return torch.clamp(torch.round(x / scale), low, high) * scale

    candidates = {
        "copy": lambda: out.copy_(x),
        "mixbit": lambda: ops.fake_quantize(x, s["scale"], s["zero"], s["bits"], axis=axis),
        "aten": (
            (lambda: torch.fake_quantize_per_tensor_affine(x, s["scale"][0], zeros[0], low, high))
            if axis is None
            else (lambda: torch.fake_quantize_per_channel_affine(x, s["scale"], zeros, axis, low, high))
        ),
        "eager": lambda: plain(x, broadcast),
    }
    if compiled:
        fused = torch.compile(plain, dynamic=False)
        candidates["compiled"] = lambda: fused(x, broadcast)
    with torch.no_grad():
        return ratios(side_by_side(candidates), "copy")


def training(shape: tuple[int, ...], axis: int | None, bits: int, compiled: bool) -> dict[str, Any]:
    s = setting(shape, axis, bits)
    x, g, out = s["x"].requires_grad_(), s["g"], torch.empty_like(s["x"])
    scale = s["scale"].clone().requires_grad_()
    broadcast = (s["scale"].view(-1, *[1] * (x.dim() - 1)) if axis is not None else s["scale"]).clone().requires_grad_()
    zeros = torch.zeros(s["scale"].numel(), requires_grad=True)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    leaves = (x, scale, broadcast, zeros)

    def limit() -> None:
        with torch.no_grad():
            out.copy_(x)
            torch.mul(x, g, out=out)

    def step(run: Any) -> Any:
        def both() -> None:
            for leaf in leaves:
                leaf.grad = None
            run().backward(g)

        return both

    candidates = {
        "copy+mul": limit,
        "mixbit": step(lambda: ops.fake_quantize(x, scale, s["zero"], s["bits"], axis=axis)),
        "aten": step(
            (lambda: torch._fake_quantize_learnable_per_tensor_affine(x, scale, zeros, low, high))
            if axis is None
            else (lambda: torch._fake_quantize_learnable_per_channel_affine(x, scale, zeros, axis, low, high))
        ),
        "eager": step(lambda: Straight.apply(x, broadcast, low, high)),
    }
    if compiled:
        fused = torch.compile(lambda x, scale: Straight.apply(x, scale, low, high), dynamic=False)
        candidates["compiled"] = step(lambda: fused(x, broadcast))
    return ratios(side_by_side(candidates, repeats=20), "copy+mul")


def noise(shape: tuple[int, ...], axis: int | None) -> dict[str, Any]:
    bits = [2, 3, 4, 5, 6, 7, 8, 16]
    torch.manual_seed(0)
    x = torch.randn(shape)
    widths = torch.tensor([float(b) for b in bits])
    high = 2.0 ** (widths - 1) - 1
    scales = 3.0 / high if axis is None else (3.0 / high)[:, None].expand(-1, shape[axis]).contiguous()

    def loop() -> None:
        for b, scale in zip(bits, scales, strict=True):
            s = scale if axis is None else scale.view(-1, *[1] * (x.dim() - 1))
            y = torch.clamp(torch.round(x / s), 1 - 2 ** (b - 1), 2 ** (b - 1) - 1) * s
            (x - y).square().sum()

    candidates = {
        "x.sum()": lambda: x.sum(),
        "mixbit": lambda: ops.quantization_noise(x, scales, widths, signed=True, narrow_range=True, axis=axis),
        "pytorch loop": loop,
    }
    return ratios(side_by_side(candidates, repeats=20, warmup=1), "x.sum()")


def ratios(seconds: dict[str, float], limit: str) -> dict[str, Any]:
    """Milliseconds of the limit, and every other time as a multiple of it."""
    others = {name: round(t / seconds[limit], 3) for name, t in seconds.items() if name != limit}
    return {f"{limit} ms": round(seconds[limit] * 1e3, 3), **others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure rows that exist anew")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(1)
    compiled = not options.no_compile
    for name, (shape, axis) in SHAPES.items():
        for what, run in (
            ("fake_quantize forward", lambda s=shape, a=axis: forward(s, a, 4, compiled)),
            ("fake_quantize forward + backward", lambda s=shape, a=axis: training(s, a, 4, compiled)),
            ("quantization_noise 2..8 and 16", lambda s=shape, a=axis: noise(s, a)),
        ):
            config = {
                "what": what,
                "tensor": name,
                "dtype": "float32",
                "isa": os.environ.get("MIXBIT_CPU_ISA", "widest"),
            }
            row = measure("ops", config, run, again=options.again)
            print(what, name, row["figures"], flush=True)


if __name__ == "__main__":
    main()
