"""The exported graph of a float network, reduced to the operations that an integer network has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mixbit.errors import MixbitError
from mixbit.network.calling import input_of, input_tensor

#: Operations that compute with weights.
LAYER_OPS = ("conv2d", "linear")
#: Operations that move or select values without computing: codes pass through them.
PASS_OPS = ("max_pool2d", "reshape", "permute", "pixel_unshuffle", "slice", "pad", "repeat", "identity")
#: Functions of one element, which the integer network looks up in a table; `options["function"]` of a "lookup" node.
LOOKUPS: dict[str, Callable[..., Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "clamp": torch.clamp,
    "affine": lambda x, factor, offset: x * factor + offset,
}


class UnsupportedOperation(MixbitError):
    """The integer network lacks an operation of the model."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One value of the network and the operation that makes it.

    Attributes:
        name: Unique; the name of the tensor.
        op: "input", "conv2d", "linear", "relu", "relu6", "lookup", "softmax", "add", "mul", "cat", "avg_pool2d", or one
            of PASS_OPS.
        inputs: Names of the values it reads.
        module: Path of the module that owns the weights of a layer, or whose forward adds or concatenates; else None.
        options: The operation's arguments.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    module: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Graph:
    """A network as a list of nodes in order of execution, with one input.

    Attributes:
        nodes: Every value once.
        outputs: Names of the values that the network returns.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    def consumers(self, name: str) -> list[Node]:
        """The nodes that read a value."""
        return [node for node in self.nodes if name in node.inputs]

    def __getitem__(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)


def capture(model: nn.Module, example: Any) -> Graph:
    """Exports a float network (torch.export, any batch size) and reduces the graph.

    Args:
        model: In eval mode, batch normalization folded; its layers must behave as float ones.
        example: An item of `batches` with one input tensor; a dict of keyword arguments may hold it.

    Raises:
        UnsupportedOperation: The integer network does not have an operation of the model (named with its module).
        MixbitError: The network cannot be exported or has several inputs.
    """
    x, given = input_tensor(example, "example").detach(), input_of(example)
    if x.shape[0] < 2:
        # A batch of one would be taken for a constant by the exporter.
        x = torch.cat([x, x])[:2] if x.shape[0] else x
    arguments: tuple[Any, ...] = (x,)
    keywords: dict[str, Any] = {}
    if isinstance(given, Mapping):
        arguments, keywords = (), {name: x if isinstance(value, Tensor) else value for name, value in given.items()}
    shapes = {name: {0: Dim.AUTO} if isinstance(value, Tensor) else None for name, value in keywords.items()}
    try:
        with torch.no_grad():
            program = torch.export.export(model, arguments, keywords, dynamic_shapes=shapes or ({0: Dim.AUTO},))
            # No decomposition but functionalization: in-place operations become plain ones.
            program = program.run_decompositions({})
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MixbitError(f"model: torch.export cannot capture the network: {first}") from error
    return _reduce(program)


def _reduce(program: ExportedProgram) -> Graph:
    parameters = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    nodes: list[Node] = []
    outputs: tuple[str, ...] = ()
    values: set[str] = set()
    for fx in program.graph.nodes:
        if fx.op == "placeholder":
            if fx.name not in parameters and isinstance(fx.meta.get("val"), Tensor):  # a number is no input
                nodes.append(Node(fx.name, "input", ()))
                values.add(fx.name)
        elif fx.op == "output":
            outputs = tuple(a.name for a in _flat(fx.args))
        elif fx.op == "call_function" and str(fx.target).startswith("aten.sym_size"):
            continue
        else:
            node = _node(fx, parameters)
            for name in node.inputs:
                if name not in values:
                    raise UnsupportedOperation(
                        f"the integer network has no {fx.target} of {name!r} (module {_module(fx)!r}): expected "
                        "operands that are values of the network"
                    )
            nodes.append(node)
            values.add(fx.name)
    if sum(node.op == "input" for node in nodes) != 1:
        raise MixbitError("model: the integer network has one input tensor")
    return Graph(tuple(nodes), outputs)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [f for v in value.values() for f in _flat(v)]
    if isinstance(value, (tuple, list)):
        return [f for v in value for f in _flat(v)]
    return [] if value is None else [value]


def _module(fx: Any) -> str:
    """Path of the innermost module that made a node."""
    stack = fx.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    return (int(value[0]), int(value[-1]))


def _node(fx: Any, parameters: dict[str, str]) -> Node:
    """A node of the exported graph as one of ours."""
    target = str(fx.target).removeprefix("aten.")
    op = target.split(".")[0].rstrip("_")
    # Arguments by name, defaults included.
    names = [a.name for a in fx.target._schema.arguments] if hasattr(fx.target, "_schema") else []
    defaults = {a.name: a.default_value for a in fx.target._schema.arguments if a.has_default_value()} if names else {}
    given = {**defaults, **dict(zip(names, fx.args, strict=False)), **fx.kwargs}

    def of(*inputs: str, kind: str = op, module: str | None = None, **options: Any) -> Node:
        return Node(fx.name, kind, inputs, module, options)

    def owner(argument: str) -> str:
        path = parameters.get(given[argument].name, "")
        if not path.endswith(".weight"):
            raise unsupported("a weight that is no module's parameter")
        return path.removesuffix(".weight")

    def unsupported(what: str) -> UnsupportedOperation:
        return UnsupportedOperation(f"the integer network has no {what} (module {_module(fx)!r}, node {fx.name!r})")

    if op == "conv2d":
        padding = given["padding"]
        if isinstance(padding, str):
            raise unsupported(f"conv2d with padding={padding!r}")
        return of(
            given["input"].name,
            module=owner("weight"),
            stride=_pair(given["stride"]),
            padding=_pair(padding),
            dilation=_pair(given["dilation"]),
            groups=int(given["groups"]),
        )
    if op == "linear":
        return of(given["input"].name, module=owner("weight"))
    if op in ("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"):
        raise MixbitError(
            f"module {_module(fx)!r} is a batch normalization; call mixbit.fold_batchnorm_(model, example) before "
            "prepare_"
        )
    if op == "relu":
        return of(given["self"].name)
    if op in ("relu6", "hardtanh", "clamp"):
        low = given.get("min_val", given.get("min", 0))
        high = given.get("max_val", given.get("max", 6))
        if low != 0 or (op != "relu6" and high not in (6, None)):
            if not all(bound is None or isinstance(bound, (int, float)) for bound in (low, high)):
                raise unsupported(f"{op} to bounds that are values")
            return of(given["self"].name, kind="lookup", function="clamp", min=low, max=high)
        return of(given["self"].name, kind="relu6" if high is not None else "relu")
    if (
        op in ("add", "sub", "mul", "div")
        and isinstance(given["other"], (int, float))
        and hasattr(given["self"], "name")
    ):
        if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
            raise unsupported(f"{op} with alpha or rounding_mode")
        constant = float(given["other"])
        factor = {"mul": constant, "div": 1 / constant if constant else 0.0}.get(op, 1.0)
        offset = {"add": constant, "sub": -constant}.get(op, 0.0)
        if op == "div" and not constant:
            raise unsupported("division by zero")
        return of(given["self"].name, kind="lookup", function="affine", factor=factor, offset=offset)
    if op in ("add", "mul"):
        if given.get("alpha", 1) != 1 or not hasattr(given["other"], "name"):
            raise unsupported(f"{op} with alpha")
        return of(given["self"].name, given["other"].name, module=_module(fx))
    if op in ("sigmoid", "tanh", "silu", "hardsigmoid", "hardswish"):
        return of(given["self"].name, kind="lookup", function=op)
    if op == "leaky_relu":
        slope = float(given["negative_slope"])
        return of(given["self"].name, kind="lookup", function=op, negative_slope=slope)
    if op == "elu":
        if given["scale"] != 1 or given["input_scale"] != 1:
            raise unsupported("elu with scales")
        return of(given["self"].name, kind="lookup", function=op, alpha=float(given["alpha"]))
    if op == "gelu":
        if given["approximate"] != "none":
            raise unsupported(f"gelu with approximate={given['approximate']!r}")
        return of(given["self"].name, kind="lookup", function=op)
    if op == "softmax":
        dim = int(given["dim"]) % fx.meta["val"].dim()
        if dim == 0:
            raise unsupported("softmax over the batch")
        return of(given["self"].name, dim=dim)
    if op in ("cat", "concat"):
        if given["dim"] not in (1, -3):
            raise unsupported(f"concatenation along dimension {given['dim']}")
        return of(*(t.name for t in given["tensors"]), kind="cat", module=_module(fx))
    if op == "max_pool2d":
        kernel = _pair(given["kernel_size"])
        return of(
            given["self"].name,
            kernel=kernel,
            stride=_pair(given["stride"]) if given["stride"] else kernel,
            padding=_pair(given["padding"]),
            dilation=_pair(given["dilation"]),
            ceil_mode=bool(given["ceil_mode"]),
        )
    if op == "avg_pool2d":
        kernel = _pair(given["kernel_size"])
        if given["ceil_mode"] or given["divisor_override"] is not None:
            raise unsupported("avg_pool2d with ceil_mode or divisor_override")
        return of(
            given["self"].name,
            kernel=kernel,
            stride=_pair(given["stride"]) if given["stride"] else kernel,
            padding=_pair(given["padding"]),
            count_include_pad=bool(given["count_include_pad"]),
        )
    if op == "adaptive_avg_pool2d":
        if _pair(given["output_size"]) != (1, 1):
            raise unsupported(f"adaptive_avg_pool2d to {given['output_size']}")
        return of(given["self"].name, kind="avg_pool2d", kernel=None, stride=None, keepdim=True)
    if op == "mean":
        if sorted(d % 4 for d in given["dim"] or ()) != [2, 3]:
            raise unsupported(f"mean over {given['dim']}")
        return of(given["self"].name, kind="avg_pool2d", kernel=None, stride=None, keepdim=bool(given["keepdim"]))
    if op == "flatten":
        if given["start_dim"] != 1:
            raise unsupported("flatten that does not keep the batch")
        return of(given["self"].name, kind="reshape", shape=(-1,))
    if op in ("view", "reshape", "_unsafe_view"):
        sizes = list(given["size"] if "size" in given else given["shape"])[1:]
        if not all(isinstance(s, int) for s in sizes):
            raise unsupported("reshape to sizes that depend on the batch")
        return of(given["self"].name, kind="reshape", shape=tuple(sizes))
    if op in ("squeeze", "unsqueeze"):
        return of(given["self"].name, kind="reshape", shape=tuple(int(s) for s in fx.meta["val"].shape[1:]))
    if op == "pixel_unshuffle":
        return of(given["self"].name, factor=int(given["downscale_factor"]))
    if op in ("permute", "transpose"):
        dims = list(range(fx.meta["val"].dim()))
        if op == "permute":
            dims = [int(d) % len(dims) for d in given["dims"]]
        else:
            a, b = int(given["dim0"]) % len(dims), int(given["dim1"]) % len(dims)
            dims[a], dims[b] = b, a
        if dims[0] != 0:
            raise unsupported("permutation that moves the batch")
        return of(given["self"].name, kind="permute", dims=tuple(dims))
    if op == "slice":
        if given["dim"] == 0 and given["start"] in (0, None) and given["step"] == 1:
            return of(given["self"].name, kind="identity")
        if given["dim"] == 0:
            raise unsupported("slice of the batch")
        return of(given["self"].name, dim=given["dim"], start=given["start"] or 0, end=given["end"], step=given["step"])
    if op in ("pad", "constant_pad_nd"):
        if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0, 0.0):
            raise unsupported("padding with anything but zeros")
        return of(given["self"].name, kind="pad", amounts=tuple(int(a) for a in given["pad"]))
    if op == "upsample_nearest2d":
        sizes = [(new, old) for new, old in zip(fx.meta["val"].shape, given["input"].meta["val"].shape, strict=True)][
            2:
        ]
        if any(new % old for new, old in sizes):
            raise unsupported(f"nearest upsampling of {sizes[0][1]} x {sizes[1][1]} to {sizes[0][0]} x {sizes[1][0]}")
        return of(given["input"].name, kind="repeat", counts=tuple(int(new // old) for new, old in sizes))
    if op in ("dropout", "clone", "contiguous", "alias", "detach"):
        return of(given[names[0]].name, kind="identity")
    raise unsupported(target)


def run_node(node: Node, inputs: list[Tensor], weights: Mapping[str, Any]) -> Tensor:
    """Computes a node in float; `weights` holds the modules of layers by path."""
    o = node.options
    if node.op == "conv2d":
        module = weights[str(node.module)]
        return F.conv2d(
            inputs[0],
            module.weight,
            module.bias,
            o["stride"],
            o["padding"],
            o["dilation"],
            o["groups"],
        )
    if node.op == "linear":
        module = weights[str(node.module)]
        return F.linear(inputs[0], module.weight, module.bias)
    if node.op == "relu":
        return F.relu(inputs[0])
    if node.op == "relu6":
        return F.relu6(inputs[0])
    if node.op == "lookup":
        return run_lookup(node, inputs[0])
    if node.op == "softmax":
        return inputs[0].softmax(o["dim"])
    if node.op == "add":
        return inputs[0] + inputs[1]
    if node.op == "mul":
        return inputs[0] * inputs[1]
    if node.op == "cat":
        return torch.cat(inputs, 1)
    if node.op == "avg_pool2d":
        if o["kernel"] is None:
            return inputs[0].mean((2, 3), keepdim=o["keepdim"])
        return F.avg_pool2d(inputs[0], o["kernel"], o["stride"], o["padding"], count_include_pad=o["count_include_pad"])
    return run_pass(node, inputs[0], 0.0)


def run_lookup(node: Node, x: Tensor) -> Tensor:
    """The function of a "lookup" node, elementwise in the type of x."""
    options = dict(node.options)
    return LOOKUPS[options.pop("function")](x, **options)


def run_pass(node: Node, x: Tensor, zero: float) -> Tensor:
    """A node of PASS_OPS on values or codes; `zero` is what padding adds."""
    o = node.options
    if node.op == "max_pool2d":
        return F.max_pool2d(x, o["kernel"], o["stride"], o["padding"], o["dilation"], o["ceil_mode"])
    if node.op == "reshape":
        return x.reshape(x.shape[0], *o["shape"])
    if node.op == "pixel_unshuffle":
        return F.pixel_unshuffle(x, o["factor"])
    if node.op == "permute":
        return x.permute(o["dims"])
    if node.op == "slice":
        index = [slice(None)] * x.dim()
        index[o["dim"]] = slice(o["start"], o["end"], o["step"])
        return x[tuple(index)]
    if node.op == "pad":
        return F.pad(x, o["amounts"], value=zero)
    if node.op == "repeat":
        return x.repeat_interleave(o["counts"][0], 2).repeat_interleave(o["counts"][1], 3)
    return x
