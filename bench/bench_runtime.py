"""Single layers of the integer runtime against ONNX Runtime's int8 kernels, one thread.

Layers of MobileNetV1 (224 x 224), ResNet-18 and ResNet-20 at every pair of widths, interleaved, minimum of repeats.
ONNX Runtime runs one QLinearConv in its NHWC form (QGemm for linear layers), so that it converts no layout; what a call
costs before its kernel starts (measured on a layer of one multiplication) is taken off its time. Weights "cached": the
same layer again and again; "cold": copies of the weights take turns and have left the second-level cache, as in a
network that does not fit it. Rows of layers with few weights are "cached" only.

Usage: python bench/bench_runtime.py [--program PATH] [--isa amx|vnni|avx2] [--again]
"""

from __future__ import annotations

import argparse
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from rows import measure, versions

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (8, 4, 2)
ROUNDS = 40
REPEATS = 6
# Copies that take turns hold at least this many bytes of 8-bit weights: several second-level caches even at 2 bits.
COLD_BYTES = 32 << 20
# Layers with fewer weights are not measured cold.
COLD_WEIGHTS = 256 << 10


class Layer(NamedTuple):
    """A square convolution with half its kernel as padding; size 1, kernel 1: a linear layer."""

    size: int
    inputs: int
    outputs: int
    kernel: int
    stride: int
    groups: int

    @property
    def out(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs // self.groups * self.kernel**2

    @property
    def macs(self) -> int:
        return self.out**2 * self.weights

    def __str__(self) -> str:
        kind = "depthwise" if self.groups > 1 else "linear" if self.size == 1 else "conv"
        return (
            f"{kind} {self.size}x{self.size}x{self.inputs} -> {self.outputs}, {self.kernel}x{self.kernel}/{self.stride}"
        )


def separable(size: int, inputs: int, outputs: int, stride: int) -> list[Layer]:
    return [Layer(size, inputs, inputs, 3, stride, inputs), Layer(size // stride, inputs, outputs, 1, 1, 1)]


def basic_block(size: int, inputs: int, outputs: int, stride: int) -> list[Layer]:
    layers = [Layer(size, inputs, outputs, 3, stride, 1), Layer(size // stride, outputs, outputs, 3, 1, 1)]
    return layers if stride == 1 else [*layers, Layer(size, inputs, outputs, 1, stride, 1)]


NETWORKS: dict[str, list[Layer]] = {
    "MobileNetV1": [
        Layer(224, 3, 32, 3, 2, 1),
        *separable(112, 32, 64, 1),
        *separable(112, 64, 128, 2),
        *separable(56, 128, 128, 1),
        *separable(56, 128, 256, 2),
        *separable(28, 256, 256, 1),
        *separable(28, 256, 512, 2),
        *(5 * separable(14, 512, 512, 1)),
        *separable(14, 512, 1024, 2),
        *separable(7, 1024, 1024, 1),
        Layer(1, 1024, 1000, 1, 1, 1),
    ],
    "ResNet-18": [
        Layer(224, 3, 64, 7, 2, 1),
        *(2 * basic_block(56, 64, 64, 1)),
        *basic_block(56, 64, 128, 2),
        *basic_block(28, 128, 128, 1),
        *basic_block(28, 128, 256, 2),
        *basic_block(14, 256, 256, 1),
        *basic_block(14, 256, 512, 2),
        *basic_block(7, 512, 512, 1),
        Layer(1, 512, 1000, 1, 1, 1),
    ],
    "ResNet-20": [
        Layer(32, 3, 16, 3, 1, 1),
        *(3 * basic_block(32, 16, 16, 1)),
        *basic_block(32, 16, 32, 2)[:2],
        *(2 * basic_block(16, 32, 32, 1)),
        *basic_block(16, 32, 64, 2)[:2],
        *(2 * basic_block(8, 64, 64, 1)),  # (the last layer, 640 products, is below what can be measured)
    ],
    "linear": [Layer(1, 4096, 4096, 1, 1, 1)],
}


class Program:
    """build/tests/cpp/time_runtime_layers, asked over a pipe."""

    def __init__(self, path: Path, isa: str) -> None:
        self._process = subprocess.Popen([str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._isa = isa

    def seconds(self, layer: Layer, act_bits: int, weight_bits: int, copies: int) -> float:
        request = (*layer, act_bits, 0, weight_bits, self._isa, copies, REPEATS)
        assert self._process.stdin is not None and self._process.stdout is not None
        print(*request, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


class Peer:
    """A layer in ONNX Runtime, in some copies that take turns."""

    def __init__(self, layer: Layer, copies: int) -> None:
        model = _model(layer).SerializeToString()
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._bound = []
        random = np.random.default_rng(0)
        linear = layer.size == 1
        in_shape = (1, layer.inputs) if linear else (1, layer.size, layer.size, layer.inputs)
        out_shape = (1, layer.outputs) if linear else (1, layer.out, layer.out, layer.outputs)
        x = ort.OrtValue.ortvalue_from_numpy(random.integers(0, 256, in_shape).astype(np.uint8))
        y = ort.OrtValue.ortvalue_from_numpy(np.zeros(out_shape, np.uint8))
        for _ in range(copies):
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            binding = session.io_binding()
            binding.bind_ortvalue_input("x", x)
            binding.bind_ortvalue_output("y", y)
            self._bound.append((session, binding))
        self._next = 0

    def seconds(self) -> float:
        best = float("inf")
        for _ in range(REPEATS):
            session, binding = self._bound[self._next % len(self._bound)]
            self._next += 1
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            best = min(best, time.perf_counter() - start)
        return best


def _model(layer: Layer) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    linear = layer.size == 1
    shape = (layer.outputs, layer.inputs // layer.groups, layer.kernel, layer.kernel)
    weight = random.integers(-127, 128, shape[:2] if linear else shape).astype(np.int8)
    values = {
        "x_scale": np.float32(0.02),
        "x_zero": np.uint8(0),
        "w": weight,
        "w_scale": np.full(layer.outputs, 0.01, np.float32),
        "w_zero": np.zeros(layer.outputs, np.int8),
        "y_scale": np.float32(0.1),
        "y_zero": np.uint8(0),
        "b": random.integers(-1000, 1000, layer.outputs).astype(np.int32),
    }
    inputs = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero"]
    if linear:
        node = helper.make_node("QGemm", [*inputs, "b", "y_scale", "y_zero"], ["y"], domain="com.microsoft", transB=1)
    else:
        node = helper.make_node(
            "QLinearConv",
            [*inputs, "y_scale", "y_zero", "b"],
            ["y"],
            domain="com.microsoft",
            channels_last=1,
            kernel_shape=[layer.kernel] * 2,
            strides=[layer.stride] * 2,
            pads=[layer.kernel // 2] * 4,
            group=layer.groups,
        )
    in_shape = [1, layer.inputs] if linear else [1, layer.size, layer.size, layer.inputs]
    out_shape = [1, layer.outputs] if linear else [1, layer.out, layer.out, layer.outputs]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, in_shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, out_shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 8
    return model


@cache
def call_overhead(linear: bool) -> Peer:
    return Peer(Layer(1, 1, 1, 1, 1, 1) if linear else Layer(2, 1, 1, 1, 1, 1), 1)


def figures(program: Program, layer: Layer, copies: int) -> dict[str, Any]:
    """Smallest microseconds of both, and how many times faster than ONNX Runtime each pair of widths is."""
    peer, empty = Peer(layer, copies), call_overhead(layer.size == 1)
    pairs = [(act, weight) for act in WIDTHS for weight in WIDTHS]
    ours = dict.fromkeys(pairs, float("inf"))
    theirs = overhead = float("inf")
    for _ in range(ROUNDS):
        theirs = min(theirs, peer.seconds())
        overhead = min(overhead, empty.seconds())
        for pair in pairs:
            ours[pair] = min(ours[pair], program.seconds(layer, *pair, copies))
    net = theirs - overhead
    return {
        "ONNX Runtime us": round(net * 1e6, 2),
        "8/8 us": round(ours[8, 8] * 1e6, 2),
        "GMAC/s at 8/8": round(layer.macs / ours[8, 8] * 1e-9, 1),
        **{f"{act}/{weight}": round(net / seconds, 2) for (act, weight), seconds in ours.items()},
    }


def network_figures(layers: list[Layer], results: dict[Layer, dict[str, Any]]) -> dict[str, Any]:
    theirs = sum(results[layer]["ONNX Runtime us"] for layer in layers)
    sums = {
        f"{act}/{weight}": sum(
            results[layer]["ONNX Runtime us"] / results[layer][f"{act}/{weight}"] for layer in layers
        )
        for act in WIDTHS
        for weight in WIDTHS
    }
    return {
        "ONNX Runtime us": round(theirs, 1),
        "8/8 us": round(sums["8/8"], 1),
        "slowest layer at 8/8": min(results[layer]["8/8"] for layer in layers),
        **{pair: round(theirs / ours, 2) for pair, ours in sums.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=ROOT / "build" / "tests" / "cpp" / "time_runtime_layers")
    parser.add_argument("--isa", default="amx", choices=("scalar", "avx2", "vnni", "amx"))
    parser.add_argument("--again", action="store_true", help="measure rows that exist again")
    options = parser.parse_args()
    if not options.program.exists():
        parser.error(f"--program {options.program} is missing; build it: cmake --build build -t time_runtime_layers")
    versions()  # fails before the measurements where mixbit is not installed
    program = Program(options.program, options.isa)
    peer = f"ONNX Runtime {ort.__version__}"
    every = list(dict.fromkeys(layer for layers in NETWORKS.values() for layer in layers))
    results: dict[Layer, dict[str, Any]] = {}
    for weights in ("cached", "cold"):
        for layer in every:
            if weights == "cold" and layer.weights < COLD_WEIGHTS:
                continue
            copies = 1 if weights == "cached" else max(2, -(-COLD_BYTES // layer.weights))
            config = {"layer": str(layer), "weights": weights, "isa": options.isa, "peer": peer}
            row = measure("runtime", config, lambda: figures(program, layer, copies), again=options.again)  # noqa: B023
            results.setdefault(layer, row["figures"])
            print(f"{layer!s:40} {weights:7}", row["figures"], flush=True)
    for name, layers in NETWORKS.items():
        if len(layers) > 1:
            config = {"network": f"sum of the layers of {name}", "isa": options.isa, "peer": peer}
            row = measure("runtime", config, lambda: network_figures(layers, results), again=options.again)  # noqa: B023
            print(f"{name:40}", row["figures"], flush=True)


if __name__ == "__main__":
    main()
