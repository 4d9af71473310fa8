"""Writing ONNX: nodes, initializers that are shared where they are equal, checks, and the file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mixbit._build_info import VERSION
from mixbit.errors import MixbitError
from mixbit.export.onnx_functions import DOMAIN as FUNCTIONS
from mixbit.export.onnx_functions import fold
from mixbit.files import write_bytes

#: Opset -> the IR version that came with it; files say the oldest that holds them.
IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}

#: The IR version that has functions.
FUNCTIONS_IR = 8


def packages(*names: str, extra: str = "onnx") -> Any:
    """Imports modules of packages that an extra installs.

    Raises:
        MixbitError: One is not installed.
    """
    import importlib

    try:
        found = [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise MixbitError(
            f"ONNX needs the package {error.name or names[0]!r}, which is not installed: pip install 'mixbit[{extra}]'"
        ) from error
    return found[0] if len(found) == 1 else found


class Bytes(NamedTuple):
    """Bytes of an ONNX file by what they are for.

    Attributes:
        weights: Packed weight codes.
        scales: Scales of weights and their biases' scales, one float32 a channel.
        biases: Bias codes.
        overhead: Everything else: nodes, names, grids of activations.
    """

    weights: int
    scales: int
    biases: int
    overhead: int

    @property
    def total(self) -> int:
        """The whole file."""
        return sum(self)


class GraphBuilder:
    """Collects the parts of an ONNX graph.

    Args:
        opset: Of the default domain.

    Raises:
        MixbitError: onnx is missing, or older than the opset.
    """

    def __init__(self, opset: int) -> None:
        self.onnx = packages("onnx")
        newest = self.onnx.defs.onnx_opset_version()
        if opset > newest:
            raise MixbitError(
                f"opset {opset} is newer than onnx {self.onnx.__version__} has ({newest}); upgrade onnx, or pass an "
                "older opset, which stores narrow weights wider"
            )
        self.opset = opset
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.sizes = {"weights": 0, "scales": 0, "biases": 0}
        self._shared: dict[tuple[Any, ...], str] = {}
        self._made = 0
        self._parts = [0]
        self._names: set[str] = set()

    def part(self) -> None:
        """The nodes that follow are a part of the graph: what `compact` makes a function of where it recurs."""
        self._parts.append(len(self.nodes))

    def fresh(self) -> str:
        """A name for what nobody asks for by name: short, since every name stands in a file twice or more.

        A number in base 36 behind a digit, which the names of inputs, values and layers do not start with.
        """
        number, digits = self._made, ""
        while number >= 10:
            number, rest = divmod(number - 10, 36)
            digits = "0123456789abcdefghijklmnopqrstuvwxyz"[rest] + digits
        self._made += 1
        return f"{number}{digits}"

    def node(
        self, op: str, inputs: list[str], output: str = "", *, domain: str = "", name: str = "", **attributes: Any
    ) -> str:
        """Adds a node with one output, which has a short name without one given, and returns the output's name.

        A node's name that is taken gets the output's.
        """
        output = output or self.fresh()
        if name in self._names:
            name = f"{name}.{output}"
        if name:
            self._names.add(name)
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [output], name=name, domain=domain, **attributes))
        return output

    def shared(self, value: Any, dtype: Any) -> str:
        """A small constant; equal ones are one initializer."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._shared:
            self._shared[key] = self.tensor(self.fresh(), array)
        return self._shared[key]

    def tensor(self, name: str, array: npt.NDArray[Any], use: str = "") -> str:
        """An initializer; `use` names an entry of `sizes` that it counts for."""
        proto = self.onnx.numpy_helper.from_array(array, name)
        self.initializers[name] = proto
        if use:
            self.sizes[use] += len(proto.raw_data)
        return name

    def codes(self, name: str, codes: npt.NDArray[Any], bits: int) -> str:
        """Weight codes in a container of 2, 4 or 8 bits, packed."""
        if bits == 8:
            return self.tensor(name, codes.astype(np.int8), "weights")
        import ml_dtypes  # a requirement of onnx

        kind = {2: "int2", 4: "int4"}[bits]
        return self.tensor(name, codes.astype(getattr(ml_dtypes, kind)), "weights")

    def model(
        self,
        name: str,
        inputs: dict[str, list[Any]],
        outputs: dict[str, list[Any]],
        *,
        domains: tuple[str, ...] = (),
        compact: bool = False,
        notes: dict[str, Any],
    ) -> Any:
        """The ModelProto, checked.

        Args:
            name: Of the graph.
            inputs: Shapes by name; a string is a size that may vary.
            outputs: Likewise.
            domains: Of operators beside the standard ones, version 1 each; their shapes cannot be inferred.
            compact: Parts that recur are functions.
            notes: What the file says about itself, under the key "mixbit".
        """
        helper, proto = self.onnx.helper, self.onnx.TensorProto

        def values(shapes: dict[str, list[Any]]) -> list[Any]:
            return [helper.make_tensor_value_info(n, proto.FLOAT, shape) for n, shape in shapes.items()]

        nodes, version = self.nodes, IR_VERSIONS[self.opset]
        functions: list[Any] = []
        if compact:
            parts = [nodes[a:b] for a, b in itertools.pairwise([*self._parts, len(nodes)])]
            nodes, functions = fold(self.onnx, parts, outputs, self.opset)
            domains, version = (*domains, FUNCTIONS), max(version, FUNCTIONS_IR)
        graph = helper.make_graph(nodes, name, values(inputs), values(outputs), list(self.initializers.values()))
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=version, functions=functions)
        model.producer_name, model.producer_version = "mixbit", VERSION
        helper.set_model_props(model, {"mixbit": json.dumps(notes, separators=(",", ":"))})
        self.onnx.checker.check_model(model, full_check=compact or not domains, check_custom_domain=False)
        return model

    def bytes_of(self, data: bytes) -> Bytes:
        """What the file's bytes are for."""
        used = sum(self.sizes.values())
        return Bytes(**self.sizes, overhead=len(data) - used)


def write_model(model: Any, path: Path) -> bytes:
    """Writes a ModelProto atomically and returns its bytes.

    Raises:
        MixbitError: It is too large for one file, or cannot be written.
    """
    if model.ByteSize() >= 2**31 - 1:
        raise MixbitError(f"{str(path)!r}: the network takes {model.ByteSize()} bytes; one ONNX file holds below 2 GiB")
    data: bytes = model.SerializeToString()
    write_bytes(path, data)
    return data
