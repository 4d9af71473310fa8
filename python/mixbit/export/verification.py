"""Exported artifacts against the integer reference: how many outputs differ, by how much, and where it starts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mixbit.errors import MixbitError, check_choice
from mixbit.export.program import runner
from mixbit.export.reference import Codes, IntegerReference, Reals
from mixbit.network import LAYER_OPS, check_batches, check_labels, input_tensor
from mixbit.runtime import Network

#: What an artifact promises: codes equal to the reference's, or each layer within one code of what the reference makes
#: of the same inputs (floating point between codes; a tie rounds the other way now and then).
PROMISES = ("exact", "one_code")
#: Where an artifact that promises one code a layer shows no layers (a compiled package of the dialect "pt2e"), its
#: outputs may be so many codes off: differences of one code add up behind each other. A rule of thumb, not a proof.
OPAQUE_CODES = 4


@dataclasses.dataclass(frozen=True)
class Artifact:
    """Something exported that can be run.

    Attributes:
        kind: What it is, for people.
        promise: One of PROMISES.
        outputs: Of an input float32 [N, ...]: the network's outputs in the reference's order.
        codes: Of an input: the codes of the values that the artifact shows, by name of the value; None where it shows
            nothing but outputs.
    """

    kind: str
    promise: str
    outputs: Callable[[Tensor], list[Reals]]
    codes: Callable[[Tensor], dict[str, Codes]] | None = None


#: Opens a file (or an object) as an artifact of the network that a reference computes.
Opener = Callable[[Any, IntegerReference], Artifact]
#: Openers of files by suffix.
OPENERS: dict[str, Opener] = {}


def opener(suffix: str) -> Callable[[Opener], Opener]:
    """Registers what opens files of a suffix."""

    def register(function: Opener) -> Opener:
        OPENERS[suffix] = function
        return function

    return register


@dataclasses.dataclass(frozen=True)
class Difference:
    """How the values of an output or a tensor differ.

    Attributes:
        name: Of the output; of a layer its module path, else the name of the value.
        values: Compared.
        mismatches: That differ.
        largest: Difference; of tensors in codes, of outputs in the output's own unit. NaN where one side is NaN.
        step: What one code of the grid means in that unit.
    """

    name: str
    values: int
    mismatches: int
    largest: float
    step: float = 1.0

    def joined(self, other: Difference) -> Difference:
        """Both together."""
        largest = float(np.maximum(self.largest, other.largest))  # a NaN stays
        return Difference(self.name, self.values + other.values, self.mismatches + other.mismatches, largest, self.step)


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What a comparison found.

    Attributes:
        kind: Of the artifact.
        promise: What the artifact promises: "exact" or "one_code".
        images: Compared.
        outputs: One entry an output of the network.
        layers: The values that the artifact shows, each against what the reference makes of the artifact's own inputs,
            so that a fault shows where it is and nowhere behind; None where the artifact shows none.
        accuracy: Of the artifact, top-1 in percent; None without labels.
        reference_accuracy: Likewise of the reference.
    """

    kind: str
    promise: str
    images: int
    outputs: tuple[Difference, ...]
    layers: tuple[Difference, ...] | None
    accuracy: float | None
    reference_accuracy: float | None

    @property
    def values(self) -> int:
        """Output values compared."""
        return sum(output.values for output in self.outputs)

    @property
    def mismatches(self) -> int:
        """Output values that differ."""
        return sum(output.mismatches for output in self.outputs)

    @property
    def max_abs_diff(self) -> float:
        """Largest difference of an output value."""
        return float(np.max([output.largest for output in self.outputs], initial=0.0))

    @property
    def first_layer(self) -> str | None:
        """The first value, in order of execution, that differs; None where none does or the artifact shows none."""
        return next((layer.name for layer in self.layers or () if layer.mismatches), None)

    @property
    def fault(self) -> str | None:
        """The first value, in order of execution, that breaks the promise; None where none does or none is shown."""
        allowed = 0 if self.promise == "exact" else 1
        return next(
            (layer.name for layer in self.layers or () if layer.mismatches and not layer.largest <= allowed), None
        )

    @property
    def codes(self) -> int:
        """Codes between that were compared, outputs included."""
        return sum(layer.values for layer in self.layers or ())

    @property
    def codes_that_differ(self) -> int:
        """Codes that differ from what the reference makes of the artifact's own inputs."""
        return sum(layer.mismatches for layer in self.layers or ())

    @property
    def in_class(self) -> bool:
        """Whether the artifact keeps its promise."""
        if self.promise == "exact":
            return self.mismatches == 0 and self.fault is None
        if self.layers is None:
            # Half a code beside the bound: values are rounded to float32.
            return all(output.largest <= (OPAQUE_CODES + 0.5) * output.step for output in self.outputs)
        return self.fault is None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        keys = (
            "mismatches",
            "values",
            "max_abs_diff",
            "codes",
            "codes_that_differ",
            "first_layer",
            "fault",
            "in_class",
        )
        found = dataclasses.asdict(self) | {key: getattr(self, key) for key in keys}
        return dict(found)

    def __str__(self) -> str:
        differ = f"{self.mismatches} of {self.values} output values differ from the integer reference"
        parts = [f"{self.kind}, {self.images} images: {differ} (by up to {self.max_abs_diff:.4g})"]
        if self.codes_that_differ:
            largest = float(np.max([layer.largest for layer in self.layers or ()]))
            parts.append(
                f"{self.codes_that_differ} of {self.codes} codes are not what the reference makes of their inputs "
                f"(by up to {largest:g})"
            )
        named = self.fault or self.first_layer
        if named is not None:
            counts = next(layer for layer in self.layers or () if layer.name == named and layer.mismatches)
            what = "breaks the promise" if self.fault and self.promise == "one_code" else "differs"
            parts.append(
                f"the first layer that {what} is {named!r} ({counts.mismatches} of {counts.values} codes, by up to "
                f"{counts.largest:g})"
            )
        if self.accuracy is not None:
            parts.append(f"top-1 {self.accuracy:.2f} %, reference {self.reference_accuracy:.2f} %")
        promise = {"exact": "equality", "one_code": "at most one code a layer"}[self.promise]
        parts.append(f"{'keeps' if self.in_class else 'BREAKS'} its promise of {promise}")
        return "; ".join(parts)


def verify(
    artifact: Any,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    promise: str | None = None,
    reference: IntegerReference | None = None,
) -> VerifyReport:
    """See `mixbit.export.verify`; `reference` is the model's, where several artifacts are held against one."""
    check_batches(batches)
    if promise is not None:
        check_choice("promise", promise, PROMISES)
    first = next(iter(batches))
    reference = reference or IntegerReference(model, first)
    opened = open_artifact(artifact, reference)
    if promise is not None:
        opened = dataclasses.replace(opened, promise=promise)
    outputs: dict[str, Difference] = {}
    layers: dict[str, Difference] | None = None if opened.codes is None else {}
    images, hits = 0, [0, 0]
    labelled = True
    for item in batches:
        x = input_tensor(item)
        codes = reference.tensors(x)
        expected = [reference.dequantize(name, codes[name]) for name in reference.outputs]
        got = opened.outputs(x)
        if len(got) != len(expected):
            raise MixbitError(f"artifact: it has {len(got)} outputs; the network has {len(expected)}")
        for name, a, b in zip(reference.outputs, got, expected, strict=True):
            _count(outputs, name, _difference(name, a, b, reference.grids[name].scale))
        if opened.codes is not None and layers is not None:
            held = _compare_layers(layers, reference, codes, opened.codes(x))
            for name, values in zip(reference.outputs, got, strict=True):
                # What is returned is what the last codes mean.
                grid = reference.grids[name]
                meant = np.rint(values.astype(np.float64) / np.float32(grid.scale)) + grid.zero_point
                _count(layers, f"{name} (output)", _difference(f"{name} (output)", meant, held[name]))
        images += len(x)
        labels = _labels(item, expected[0])
        labelled = labelled and labels is not None
        if labels is not None:
            for i, logits in enumerate((got[0], expected[0])):
                hits[i] += int((np.argmax(logits, 1) == labels.numpy()).sum())
    shares = [100.0 * h / images for h in hits] if labelled and images else [None, None]
    found = None if layers is None else tuple(layers.values())
    return VerifyReport(opened.kind, opened.promise, images, tuple(outputs.values()), found, *shares)


def open_artifact(artifact: Any, reference: IntegerReference) -> Artifact:
    """An artifact by the suffix of its file.

    Raises:
        MixbitError: There is no such file, or nothing opens its kind.
    """
    if isinstance(artifact, Artifact):
        return artifact
    if isinstance(artifact, ExportedProgram):
        return open_program(artifact, reference)
    path = Path(artifact)
    if not path.exists():
        raise MixbitError(f"artifact: there is no file {str(path)!r}")
    if path.suffix not in OPENERS:
        raise MixbitError(
            f"artifact: {str(path)!r} is of no known kind; expected a file of {', '.join(sorted(OPENERS))}"
        )
    return OPENERS[path.suffix](path, reference)


def _labels(item: Any, logits: Reals) -> Tensor | None:
    """Class labels of an item, where it has some and the first output is logits."""
    given = item[1] if isinstance(item, (tuple, list)) and len(item) > 1 else None
    if not isinstance(given, Tensor) or given.is_floating_point() or given.dim() != 1 or logits.ndim != 2:
        return None
    return check_labels(given, torch.from_numpy(logits))


def _difference(name: str, a: npt.NDArray[Any], b: npt.NDArray[Any], step: float = 1.0) -> Difference:
    if a.shape != b.shape:
        raise MixbitError(f"artifact: {name!r} has shape {a.shape}; the network has {b.shape}")
    apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return Difference(name, a.size, int((a != b).sum()), float(apart.max(initial=0.0)), step)


def _count(found: dict[str, Difference], key: str, more: Difference) -> None:
    found[key] = found[key].joined(more) if key in found else more


def _compare_layers(
    found: dict[str, Difference], reference: IntegerReference, expected: dict[str, Codes], shown: dict[str, Codes]
) -> dict[str, Codes]:
    """Each value against what the reference makes of the artifact's own inputs; returns the artifact's values."""
    held: dict[str, Codes] = {}
    for node in reference.nodes:
        same = all(np.array_equal(held[name], expected[name]) for name in node.inputs)
        own = expected[node.name] if same else reference.step(node, held)
        held[node.name] = shown.get(node.name, own)
        if node.name in shown:
            label = str(node.module) if node.op in LAYER_OPS else node.name
            _count(found, node.name, _difference(label, held[node.name], own))
    return held


# ----------------------------------------------------------------------------------------------------------- artifacts


@opener(".pt2")
def open_program(artifact: Any, reference: IntegerReference) -> Artifact:
    """An exported program or a compiled package; the dialect "pt2e" promises one code a layer, the other equality.

    A program is also run node by node, which shows the codes between; a package is machine code and shows none.
    """
    run = runner(artifact)
    watcher = run.watcher
    promise = "one_code" if run.dialect == "pt2e" else "exact"

    def parts(x: Tensor) -> list[Tensor]:
        return [x] if run.batch is None else list(x.split(run.batch))

    def outputs(x: Tensor) -> list[Reals]:
        found = [run(part) for part in parts(x)]
        return [torch.cat(values).numpy() for values in zip(*found, strict=True)]

    if watcher is None:
        return Artifact("compiled package", promise, outputs)
    known = {node.name for node in reference.nodes}
    if not known.intersection(watcher.names.values()):
        return Artifact("exported program", promise, outputs)

    def codes(x: Tensor) -> dict[str, Codes]:
        found = [watcher.codes(part.detach().float().cpu()) for part in parts(x)]
        return {name: torch.cat([part[name] for part in found]).long().numpy() for name in found[0] if name in known}

    return Artifact("exported program", promise, outputs, codes)


@opener(".mixbit")
def open_integer(path: Any, reference: IntegerReference) -> Artifact:
    """An integer package in the C++ runtime, which shows the codes of every value."""
    network = Network(path)

    @functools.cache
    def keeping() -> Network:
        return Network(path, keep_values=True)

    def array(x: Tensor) -> Reals:
        return x.detach().float().cpu().numpy()

    def codes(x: Tensor) -> dict[str, Codes]:
        return {name: value.astype(np.int64) for name, value in keeping().values(array(x)).items()}

    return Artifact(f"integer package, {network.isa} kernels", "exact", lambda x: network(array(x)), codes)


@opener(".onnx")
def open_onnx(path: Any, reference: IntegerReference) -> Artifact:
    """An ONNX file in ONNX Runtime on the CPU; a twin with the codes as outputs shows what lies between.

    Raises:
        MixbitError: It is no ONNX file, its inputs do not fit, or ONNX Runtime refuses it.
    """
    from mixbit.export.onnx_graph import packages
    from mixbit.export.qdq import offset_of
    from mixbit.export.qonnx import DOMAIN as QONNX_DOMAIN

    onnx, runtime = packages("onnx", "onnxruntime")
    try:
        proto = onnx.load(str(path))
    except Exception as error:
        raise MixbitError(f"artifact: {str(path)!r} is no ONNX file ({' '.join(str(error).split())[:200]})") from error
    if any(node.domain == QONNX_DOMAIN for node in proto.graph.node):
        return _open_qonnx(proto, reference)
    notes = {p.key: p.value for p in proto.metadata_props}.get("mixbit", "")
    exact = '"class":"exact"' in notes
    names = _shown(proto, reference) if notes else []  # in files of other tools a name means nothing

    @functools.cache
    def session(debug: bool) -> Any:
        twin = proto
        if debug:
            twin = onnx.ModelProto()
            twin.CopyFrom(proto)
            outputs = {output.name for output in twin.graph.output}
            kind = onnx.TensorProto.UINT8
            for name in names:
                if f"{name}_q" not in outputs:
                    twin.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}_q", kind, None))
        # On x86 without VNNI the kernels for uint8 x int8 saturate sums of two products; "1" keeps them exact. But with
        # it ONNX Runtime 1.32 cannot load a convolution's weight that two nodes share.
        for precision in ("1", "0"):
            options = runtime.SessionOptions()
            options.log_severity_level = 4
            options.intra_op_num_threads = torch.get_num_threads()
            options.add_session_config_entry("session.x64quantprecision", precision)
            try:
                return runtime.InferenceSession(twin.SerializeToString(), options, providers=["CPUExecutionProvider"])
            except Exception as error:
                refused = error
        reason = " ".join(str(refused).split())[:300]
        raise MixbitError(f"artifact: ONNX Runtime {runtime.__version__} refuses {str(path)!r}: {reason}") from refused

    def run(debug: bool, wanted: list[str] | None, x: Tensor) -> list[npt.NDArray[Any]]:
        inputs = session(debug).get_inputs()
        if len(inputs) != 1:
            raise MixbitError(f"artifact: {str(path)!r} has {len(inputs)} inputs; the network has one")
        array = x.detach().float().cpu().numpy()
        size = inputs[0].shape[0]
        parts = [array] if not isinstance(size, int) else [array[i : i + size] for i in range(0, len(array), size)]
        try:
            found = [session(debug).run(wanted, {inputs[0].name: part}) for part in parts]
        except Exception as error:
            raise MixbitError(f"artifact: {str(path)!r}: {' '.join(str(error).split())[:300]}") from error
        return [np.concatenate(values) for values in zip(*found, strict=True)]

    def outputs(x: Tensor) -> list[Reals]:
        return run(False, None, x)

    def codes(x: Tensor) -> dict[str, Codes]:
        values = run(True, [f"{name}_q" for name in names], x)
        return {
            name: value.astype(np.int64) - offset_of(reference.grids[name])
            for name, value in zip(names, values, strict=True)
        }

    kind = f"ONNX under ONNX Runtime {runtime.__version__}"
    return Artifact(kind, "exact" if exact else "one_code", outputs, codes if names else None)


def _shown(proto: Any, reference: IntegerReference) -> list[str]:
    """The values whose codes or levels are tensors of an ONNX graph."""
    made = {output for node in proto.graph.node for output in node.output}
    return [node.name for node in reference.nodes if f"{node.name}_q" in made]


def _open_qonnx(proto: Any, reference: IntegerReference) -> Artifact:
    """A QONNX graph in qonnx's own executor, node by node."""
    from mixbit.export.onnx_graph import packages

    modelwrapper, executor, shapes = packages(
        "qonnx.core.modelwrapper", "qonnx.core.onnx_exec", "qonnx.transformation.infer_shapes", extra="qonnx"
    )
    names = _shown(proto, reference)
    outputs = [output.name for output in proto.graph.output]

    @functools.cache
    def wrapped(batch: int) -> Any:
        fixed = type(proto)()
        fixed.CopyFrom(proto)
        for value in (*fixed.graph.input, *fixed.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
        return modelwrapper.ModelWrapper(fixed).transform(shapes.InferShapes())

    last: list[Any] = [None, {}]

    def tensors(x: Tensor) -> dict[str, npt.NDArray[Any]]:
        if last[0] is not x:
            array = x.detach().float().cpu().numpy()
            last[:] = x, executor.execute_onnx(wrapped(len(array)), {proto.graph.input[0].name: array}, True)
        return dict(last[1])

    def codes(x: Tensor) -> dict[str, Codes]:
        found = tensors(x)
        held = {}
        for name in names:
            grid = reference.grids[name]
            levels = np.rint(found[f"{name}_q"].astype(np.float64) / np.float32(grid.scale))
            held[name] = levels.astype(np.int64) + grid.zero_point
        return held

    return Artifact("QONNX in qonnx's executor", "one_code", lambda x: [tensors(x)[name] for name in outputs], codes)
