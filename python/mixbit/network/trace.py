"""The layers of a model in forward order, from one forward pass with hooks: no symbolic tracing, so any model works."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mixbit.errors import MixbitError
from mixbit.network.calling import batch_size, call_model, check_eval_mode, input_tensors


class Shapes(NamedTuple):
    """Shapes of a layer's tensors; input and output of the first call, without the batch dimension."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    output: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or linear layer that mixbit can quantize.

    Attributes:
        name: Module path; of a shared module the first.
        kind: "conv2d" or "linear".
        macs: Multiply-accumulates of one image, all calls.
        weights: Elements of the weight.
        shapes: Shapes of input, weight and output.
        groups: Groups of a convolution, 1 for linear.
        stride: (vertical, horizontal), () for linear.
        padding: (vertical, horizontal), () for linear; strings ("same") as numbers.
        dilation: (vertical, horizontal), () for linear.
        calls: How often one forward pass calls the layer.
        input_group: Layers with the same number read the same tensor; 0 is the network input.
        input_elements: Elements of the input, one image, largest call.
        output_elements: Elements of the output, one image, largest call.
        other_live: Elements of the other tensors that are still needed while the layer runs, one image, largest call.
        consumer: The first layer that reads the output, through operations of one tensor (activations, normalization,
            pools, reshapes); None where there is none.
        joined: Whether the output enters an operation of several tensors, such as an add or a concatenation.
        call_shapes: Shapes of each call, in forward order.
    """

    name: str
    kind: str
    macs: int
    weights: int
    shapes: Shapes
    groups: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    calls: int
    input_group: int
    input_elements: int
    output_elements: int
    other_live: int
    consumer: str | None = None
    joined: bool = False
    call_shapes: tuple[Shapes, ...] = ()

    @property
    def depthwise(self) -> bool:
        """Whether every input channel has a filter of its own."""
        return self.groups > 1 and self.groups == self.shapes.input[0]


class FloatModule(NamedTuple):
    """A module with weights that stays float, and why."""

    name: str
    kind: str
    macs: int
    reason: str


class LayerList(list[Layer]):
    """The layers of a model, and what stays float beside them.

    Attributes:
        float_modules: Modules with weights that are no layers, with the reason.
        total_macs: Multiply-accumulates of one image of the whole model, functional ones included.
    """

    def __init__(self, items: Iterable[Layer], float_modules: tuple[FloatModule, ...], total_macs: int) -> None:
        super().__init__(items)
        self.float_modules = float_modules
        self.total_macs = total_macs

    @property
    def quantized_share(self) -> float:
        """Share of the model's multiply-accumulates that lies in the layers, 0 ... 1."""
        return sum(layer.macs for layer in self) / self.total_macs if self.total_macs else 0.0

    @property
    def names(self) -> list[str]:
        """Names in forward order."""
        return [layer.name for layer in self]


#: Attribute by which the classes of prepared layers say that they are layers (they override forward).
LAYER_MARK = "mixbit_layer"


def is_quantizable(module: nn.Module) -> str | None:
    """None for a layer that can be quantized, else the reason why not."""
    kind = type(module)
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        return "not a Conv2d or Linear"
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "not initialized yet (lazy module)"
    if getattr(kind, LAYER_MARK, False):
        return None
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrized"
    base: type[nn.Module] = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    if kind.forward is not base.forward:
        return f"class {kind.__name__} has a forward of its own"
    # A private name of torch, read and never called: a subclass that replaces it is left float.
    own_convolution = getattr(kind, "_conv_forward", None) is not getattr(nn.Conv2d, "_conv_forward", None)
    if isinstance(module, nn.Conv2d) and own_convolution:
        return f"class {kind.__name__} has a convolution of its own"
    return None


def quantizable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    """(name, module) of all modules that can be quantized, in order of registration; a shared module once."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and is_quantizable(module) is None:
            yield name, module


def conv_padding(module: nn.Conv2d) -> tuple[int, int]:
    """Padding in numbers: of "same" the total's upper half, as PyTorch pads an even total."""
    if module.padding == "valid":
        return (0, 0)
    if isinstance(module.padding, str):
        vertical, horizontal = (d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        return (vertical, horizontal)
    vertical, horizontal = module.padding
    return (int(vertical), int(horizontal))


class _Call(NamedTuple):
    time: int
    input_key: tuple[Any, ...]
    output_key: tuple[Any, ...]
    input_storage: int
    output_storage: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensor_key(tensor: Tensor) -> tuple[Any, ...]:
    """Names the values a tensor holds now: equal keys of living tensors mean the same values.

    Views of the whole of a tensor (reshape, permute) have its key; an in-place operation changes it.
    """
    # _version is how autograd itself tells in-place changes; inference tensors have none.
    version = 0 if tensor.is_inference() else tensor._version
    storage = tensor.untyped_storage()
    if tensor.numel() * tensor.element_size() == storage.nbytes():
        return (storage.data_ptr(), version)
    return (storage.data_ptr(), version, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


class _Dataflow(TorchFunctionMode):
    """Keeps every tensor alive (so that addresses are not used twice) and notes when storages are made and read."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.time = 0
        self.kept: list[Tensor] = list(inputs)
        self.elements = {_storage(t): t.numel() for t in inputs}
        self.made = {_storage(t): 0 for t in inputs}
        self.last_read: dict[int, int] = {}
        self.reads: dict[int, int] = {}
        # Values that come from the network's input, by tensor_key; and what operations outside layers make of them.
        self.values = {tensor_key(t) for t in inputs}
        self.passes: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        self.joins: set[tuple[Any, ...]] = set()
        self.layer_depth = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Before the call: an operation in place changes the key.
        read = {tensor_key(t) for t in _tensors_in((args, kwargs))} & self.values
        result = func(*args, **(kwargs or {}))
        made = list(_tensors_in(result))
        if made and read and not self.layer_depth:
            keys = [tensor_key(t) for t in made]
            self.values.update(keys)
            if len(read) > 1:
                self.joins |= read
            else:
                self.passes.setdefault(next(iter(read)), []).extend(keys)
        if made:
            self.time += 1
            for tensor in _tensors_in((args, kwargs)):
                self.last_read[_storage(tensor)] = self.time
                self.reads[_storage(tensor)] = self.reads.get(_storage(tensor), 0) + 1
            for tensor in made:
                self.kept.append(tensor)
                storage = _storage(tensor)
                self.made.setdefault(storage, self.time)
                self.elements[storage] = max(self.elements.get(storage, 0), tensor.numel())
        return result

    def reached(self, key: tuple[Any, ...]) -> set[tuple[Any, ...]]:
        """The keys of a value and of all that operations of one tensor make of it."""
        found, waiting = {key}, [key]
        while waiting:
            new = set(self.passes.get(waiting.pop(), ())) - found
            found |= new
            waiting.extend(new)
        return found

    def live_elements(self, time: int, without: set[int]) -> int:
        """Elements made before `time` and read after it."""
        return sum(
            self.elements[storage]
            for storage, made in self.made.items()
            if made < time < self.last_read.get(storage, 0) and storage not in without
        )


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter) and value.layout == torch.strided:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)


def layers(model: nn.Module, example: Any) -> LayerList:
    """Lists the layers of a model that can be quantized, in the order in which one forward pass first calls them.

    Args:
        model: In eval mode; float or prepared. Not changed.
        example: An item of `batches` (see `call_model`); costs are divided by its number of images.

    Returns:
        The layers, with `float_modules` (what stays float, and why) and `total_macs` beside them.

    Raises:
        MixbitError: The model is in training mode, or no layer is called.
    """
    check_eval_mode(model)
    images = batch_size(example)
    if images == 0:
        raise MixbitError("example holds no image; expected at least one")
    calls: dict[str, list[_Call]] = {}
    modules = dict(quantizable_modules(model))
    inputs = input_tensors(example)
    flow = _Dataflow(inputs)
    flops = FlopCounterMode(display=False)
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            flow.layer_depth -= 1
            flow.kept += [x, output]
            key = tensor_key(output)
            flow.values.add(key)
            shapes = (tuple(x.shape), tuple(output.shape))
            calls.setdefault(name, []).append(
                _Call(flow.time, keys.pop(name), key, _storage(x), _storage(output), *shapes)
            )

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keys[name] = tensor_key(args[0] if args else kwargs["input"])
            flow.layer_depth += 1

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(note, with_kwargs=True))

    keys: dict[str, tuple[Any, ...]] = {}
    input_keys = {tensor_key(t) for t in inputs}
    try:
        for name, module in modules.items():
            watch(name, module)
        with torch.no_grad(), flops, flow:
            call_model(model, example)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise MixbitError("model: no Conv2d or Linear layer was called; nothing can be quantized")
    order = sorted(calls, key=lambda name: calls[name][0].time)
    groups = _input_groups(order, calls, input_keys)
    readers: dict[tuple[Any, ...], str] = {}
    for name in order:
        for call in calls[name]:
            readers.setdefault(call.input_key, name)
    found = []
    for name in order:
        reached = set().union(*(flow.reached(call.output_key) for call in calls[name]))
        reading = {readers[key] for key in reached & set(readers)}
        layer = _layer(name, modules[name], calls[name], groups[name], flow, images)
        consumer = min(reading, key=order.index, default=None)
        found.append(dataclasses.replace(layer, consumer=consumer, joined=bool(reached & flow.joins)))
    counts = flops.get_flop_counts()
    total = max(flops.get_total_flops() // (2 * images), sum(layer.macs for layer in found))
    return LayerList(found, _float_modules(model, set(calls), counts, images), total)


def _input_groups(order: list[str], calls: dict[str, list[_Call]], input_keys: set[tuple[Any, ...]]) -> dict[str, int]:
    """Numbers the groups of layers that read the same tensors; a layer called on several tensors ties them."""
    parent: dict[Any, Any] = {}

    def root(key: Any) -> Any:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    # All tensors of the network's input are one group, named None.
    for key in input_keys:
        parent[root(key)] = root(None)
    for name in order:
        first = root(calls[name][0].input_key)
        for call in calls[name][1:]:
            parent[root(call.input_key)] = first
            first = root(first)
    numbers: dict[Any, int] = {}
    if not any(root(calls[name][0].input_key) == root(None) for name in order):
        # Models that prepare their images themselves: what the first layer reads is their input.
        parent[root(None)] = root(calls[order[0]][0].input_key)
    numbers[root(None)] = 0
    return {name: numbers.setdefault(root(calls[name][0].input_key), len(numbers)) for name in order}


def _layer(
    name: str, module: nn.Conv2d | nn.Linear, calls: list[_Call], group: int, flow: _Dataflow, images: int
) -> Layer:
    def elements(shape: tuple[int, ...]) -> int:
        return torch.Size(shape).numel() // images

    per_output = module.weight[0].numel()
    macs = sum(torch.Size(call.output_shape).numel() for call in calls) * per_output // images
    conv = isinstance(module, nn.Conv2d)
    weight = tuple(module.weight.shape)
    shapes = tuple(Shapes(call.input_shape[1:], weight, call.output_shape[1:]) for call in calls)
    return Layer(
        name=name,
        kind="conv2d" if conv else "linear",
        macs=macs,
        weights=module.weight.numel(),
        shapes=shapes[0],
        groups=module.groups if isinstance(module, nn.Conv2d) else 1,
        stride=tuple(int(s) for s in module.stride) if isinstance(module, nn.Conv2d) else (),
        padding=conv_padding(module) if isinstance(module, nn.Conv2d) else (),
        dilation=tuple(int(d) for d in module.dilation) if isinstance(module, nn.Conv2d) else (),
        calls=len(calls),
        input_group=group,
        input_elements=max(elements(call.input_shape) for call in calls),
        output_elements=max(elements(call.output_shape) for call in calls),
        other_live=max(
            flow.live_elements(call.time, {call.input_storage, call.output_storage}) // images for call in calls
        ),
        call_shapes=shapes,
    )


def _float_modules(
    model: nn.Module, called: set[str], flop_counts: dict[str, dict[Any, int]], images: int
) -> tuple[FloatModule, ...]:
    found = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        if not own or name in called:
            continue
        reason = is_quantizable(module) or "never called by the forward pass (another module reads its weight)"
        # Own multiply-accumulates: those of the submodules are theirs.
        root = type(model).__name__
        flops = sum(flop_counts.get(f"{root}.{name}" if name else root, {}).values())
        for child, _ in module.named_children():
            flops -= sum(flop_counts.get(f"{root}.{name}.{child}" if name else f"{root}.{child}", {}).values())
        macs = max(flops, 0) // (2 * images)
        found.append(FloatModule(name, type(module).__name__, macs, reason))
    return tuple(found)


def is_batchnorm(module: nn.Module) -> bool:
    """BatchNorm with running statistics, or torchvision's frozen one."""
    frozen = type(module).__name__ == "FrozenBatchNorm2d"
    return frozen or (isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.track_running_stats)


def batchnorm_pairs(model: nn.Module, example: Any) -> list[tuple[str, str]]:
    """(layer, batch normalization) names where the normalization alone reads what the layer returns.

    Found by following the tensors of one forward pass: a layer or a normalization that is called twice, or an output
    that something else reads too, makes no pair.

    Args:
        model: In eval mode.
        example: An item of `batches`.
    """
    check_eval_mode(model)
    flow = _Dataflow(input_tensors(example))
    made_by: dict[int, str] = {}
    calls: dict[str, int] = {}
    read_by: list[tuple[str, int]] = []
    handles = []

    def after_layer(name: str) -> Any:
        def note(_: nn.Module, __: Any, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            made_by[_storage(output)] = name

        return note

    def before_norm(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            read_by.append((name, _storage(args[0])))

        return note

    try:
        for name, module in model.named_modules():
            if is_batchnorm(module):
                handles.append(module.register_forward_pre_hook(before_norm(name)))
            elif isinstance(module, (nn.Conv2d, nn.Linear)) and is_quantizable(module) is None:
                handles.append(module.register_forward_hook(after_layer(name)))
        with torch.no_grad(), flow:
            call_model(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return [
        (made_by[storage], norm)
        for norm, storage in read_by
        if storage in made_by and flow.reads[storage] == 1 and calls[norm] == 1 and calls[made_by[storage]] == 1
    ]
