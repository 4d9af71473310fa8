"""Integer packages in the C++ runtime: every value equals the integer reference; bad input is named."""

from __future__ import annotations

import copy
import json
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mixbit
from mixbit import LayerPrecision, MixbitError, Recipe, zoo
from mixbit.runtime import Network

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))
from nets import Residual, seeded
from networks import Functions

WEIGHTS = zoo.data_dir() / "weights"
ISAS = ("scalar", "avx2", "avx512", "vnni", "amx")


def mixed(model: nn.Module, x: torch.Tensor) -> Recipe:
    """All widths of weights from 1 to 8, of inputs from 3 to 8, one input width a group."""
    acts: dict[int, int] = {}
    layers = {}
    for i, layer in enumerate(mixbit.layers(model, x)):
        act = acts.setdefault(layer.input_group, (8, 6, 7, 4, 5, 3)[i % 6])
        narrow = i % 7 != 6
        layers[layer.name] = LayerPrecision(weight=(8, 4, 2, 6, 3, 5, 1)[i % 7], act=act, narrow_range=narrow)
    return Recipe(layers=layers)


def ready(model: nn.Module, batches: list[torch.Tensor], kind: str = "8/8", method: str = "maxabs") -> nn.Module:
    """Folded, prepared and calibrated at "weight/act" or "mixed"."""
    model = mixbit.fold_batchnorm_(copy.deepcopy(model), batches[0])
    if kind == "mixed":
        recipe = mixed(model, batches[0])
    else:
        weight, act = (int(part) for part in kind.split("/"))
        recipe = Recipe.uniform(mixbit.layers(model, batches[0]).names, weight=weight, act=act)
    mixbit.prepare_(model, recipe, batches[0])
    return mixbit.calibrate_(model, batches, method, example=batches[0])


def check(model: nn.Module, x: torch.Tensor, path: Path, **options) -> Network:
    """Every value of the network, planned for speed and to keep all, on each instruction set, for one thread and three."""
    reference = mixbit.export.reference(model, x)
    assert mixbit.export.integer(model, x, path) == path
    tensors = reference.tensors(x)
    values = Network(path, keep_values=True, **options).values(x.numpy())
    assert list(values) == list(tensors)
    for name, codes in tensors.items():
        assert values[name].shape == codes.shape, name
        assert np.array_equal(values[name], codes), name
    expected = [reference.dequantize(name, tensors[name]) for name in reference.outputs]
    network = Network(path, **options)
    others = [Network(path, threads=3, **options), *(Network(path, threads=2, isa=isa) for isa in ISAS)]
    for planned in (network, *others):
        outputs = planned(x.numpy())
        assert len(outputs) == len(expected)
        for got, wanted in zip(outputs, expected, strict=True):
            assert got.dtype == np.float32
            assert np.array_equal(got, wanted)
    return network


class Everything(nn.Module):
    """All operations of the integer network, read in several ways, with three outputs."""

    def __init__(self, channels: int = 8, groups: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, 1, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=False)
        self.grouped = nn.Conv2d(2 * channels, channels, (1, 3), (1, 2), (0, 2), (1, 2), groups=groups)
        self.side = nn.Conv2d(channels, channels, 1)
        self.rows = nn.Linear(5, 5)
        self.last = nn.Linear(6, 3)
        self.linear = nn.Linear(channels, 7)
        self.eval()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = F.relu6(self.conv(x))  # [8, 9, 9]
        z = F.max_pool2d(F.relu(self.depthwise(y)), 2, 1, 1, ceil_mode=True)  # [8, 6, 6]
        w = F.avg_pool2d(F.pad(y, (0, 3, 0, 3)), 3, 2, 1)[:, :, :6, :6]
        v = self.grouped(torch.cat([z, w], 1))  # [8, 6, 4]
        side = self.side(F.avg_pool2d(v, 3, 1, 1, count_include_pad=False))
        s = F.relu(side + v)
        up = F.interpolate(s[:, :, 1:6:2, :2], scale_factor=(2.0, 3.0), mode="nearest")  # [8, 6, 6]
        wide = torch.cat([up, z], 1)[:, 4:12] + F.relu6(w)
        flat = self.rows(wide[:, :, :5, :5].reshape(x.shape[0], 40, 5)).flatten(1)
        return self.linear(wide.mean((2, 3)) + side.mean((2, 3))), flat, self.last(wide)


@pytest.mark.parametrize(("kind", "groups"), [("8/8", 1), ("4/4", 2), ("mixed", 4)])
def test_every_operation_equals_the_reference(kind: str, groups: int, tmp_path: Path) -> None:
    torch.manual_seed(groups)
    batches = [torch.randn(3, 3, 9, 9) for _ in range(2)]
    model = ready(Everything(8, groups), batches, kind)
    network = check(model, batches[1], tmp_path / "m.mixbit")
    assert [shape for _, shape in network.outputs] == [(7,), (200,), (8, 6, 3)]
    ops = {node["op"] for node in network.manifest["nodes"]}
    assert ops == {
        "input", "conv2d", "linear", "add", "cat", "avg_pool2d", "max_pool2d", "relu", "relu6", "reshape", "slice", "pad",
        "repeat", "identity",
    }  # fmt: skip


@pytest.mark.parametrize("bits", [8, 5])
def test_functions_products_softmax_and_orders_equal_the_reference(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(3, 3, 6, 6) for _ in range(2)]
    recipe = Recipe.uniform(mixbit.layers(Functions().eval(), batches[0]).names)
    recipe.tensors["default"] = {"act": bits}
    model = mixbit.prepare_(Functions().eval(), recipe, batches[0])
    mixbit.calibrate_(model, batches, "maxabs", example=batches[0])
    network = check(model, batches[1], tmp_path / "m.mixbit")
    assert len(network.outputs) == 12
    ops = {node["op"] for node in network.manifest["nodes"]}
    assert ops >= {"lookup", "mul", "softmax", "permute", "pixel_unshuffle"}


class Broadcast(nn.Module):
    """Operands that are repeated along one axis or several, left or right, in images and rows; orders of both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.rows = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(5, 5)

    def forward(self, x):
        x = F.relu(self.conv(x))  # [4, 6, 5]
        mean = self.gate(x.mean((2, 3), keepdim=True))
        y = F.relu(x + mean) * mean  # the sum's relu is fused
        z = mean * y[:, :1] + x[:, :, :1]
        turned = z.permute(0, 3, 1, 2)  # [5, 4, 6]
        rows = self.rows(z.flatten(1, 2))  # [24, 5]
        wide = rows.transpose(1, 2) * rows[:, :1].transpose(1, 2)  # [5, 24] by [5, 1]
        return y, turned.softmax(1), turned + turned[:, 2:3, :, 3:4], wide.softmax(-1), (z * z).softmax(3)


@pytest.mark.parametrize("kind", ["8/8", "mixed"])
def test_operands_are_repeated_as_the_reference_does(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    batches = [torch.randn(3, 3, 6, 5) for _ in range(2)]
    check(ready(Broadcast().eval(), batches, kind), batches[1], tmp_path / "m.mixbit")


def test_tables_that_are_equal_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            x = self.conv(x)
            return x.sigmoid(), x.sigmoid().sigmoid(), x.softmax(1), x.softmax(2)

    network = check(ready(Same().eval(), [x]), x, tmp_path / "m.mixbit")
    kinds = [tensor["dtype"] for tensor in network.manifest["tensors"]]
    assert (kinds.count("uint8"), kinds.count("int32")) == (2, 2)  # of three and two tables; a bias is int32, too


def test_residual_network_with_bits_of_its_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(5, 3, 8, 8) for _ in range(2)]
    model = mixbit.fold_batchnorm_(seeded(Residual), batches[0])
    recipe = mixed(model, batches[0])
    recipe.tensors["add*"] = {"act": 5}
    mixbit.prepare_(model, recipe, batches[0])
    mixbit.calibrate_(model, batches, example=batches[0])
    check(model, batches[1], tmp_path / "m.mixbit")


def test_offset_grids(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6) + 0.5
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)).eval()
    mixbit.prepare_(model, Recipe.uniform(["0", "1"], weight=4, act=8), x, act_quantizer="lsq+")
    mixbit.calibrate_(model, [x], "maxabs", example=x)
    for name, zero_point in (("0", 100.0), ("1", 7.0)):
        quantizer = model.get_submodule(name).act_quantizer
        quantizer.set_(quantizer.scale.detach(), signed=False, zero_point=zero_point)
    check(model, x, tmp_path / "m.mixbit")
    model[1].act_quantizer.set_(model[1].act_quantizer.scale.detach(), signed=False, zero_point=-3.0)
    with pytest.raises(MixbitError, match=r"has zero point -3 outside its codes 0 to 255"):
        mixbit.export.integer(model, x, tmp_path / "other.mixbit")
    assert not (tmp_path / "other.mixbit").exists()


REAL = {
    "resnet8": lambda: (
        zoo.resnet8(WEIGHTS / "mlperf_tiny_resnet8_cifar10_fp32.npz"),
        zoo.cifar10_pixels("train", 16)[0].float(),
        zoo.cifar10_pixels("test", 6)[0].float(),
    ),
    "resnet20": lambda: (
        zoo.cifar_resnet(20, WEIGHTS / "cifar10_resnet20_fp32.npz"),
        zoo.cifar10("train", 16)[0],
        zoo.cifar10("test", 3)[0],
    ),
    "mobilenet_v1": lambda: (
        zoo.mobilenet_v1(0.25, WEIGHTS / "mobilenet_v1_0.25_128_qat_uint8.npz"),
        zoo.imagenet_compat(4)[0][:, :, :128, :128],
        zoo.imagenet_compat(6)[0][4:, :, 32:160, 32:160],
    ),
    "vww": lambda: (
        zoo.vww_mobilenet(WEIGHTS / "mlperf_tiny_vww_mobilenetv1_0.25_96_fp32.npz"),
        (zoo.imagenet_compat(4)[0][:, :, :96, :96] + 1) / 2,
        (zoo.imagenet_compat(6)[0][4:, :, 32:128, 32:128] + 1) / 2,
    ),
}


#: The other pairs take as long again and are of the long run.
QUICK = {("resnet8", "8/8"), ("resnet8", "4/4"), ("resnet20", "mixed"), ("mobilenet_v1", "mixed"), ("vww", "4/4")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if (name, kind) in QUICK else pytest.mark.slow)
        for name in REAL
        for kind in ("8/8", "4/4", "mixed")
    ],
)
def test_real_networks_equal_the_reference(name: str, kind: str, tmp_path: Path) -> None:
    model, calibration, test = REAL[name]()
    model = ready(model, list(calibration.split(8)), kind)
    network = check(model, test.contiguous(), tmp_path / "m.mixbit")
    macs = sum(layer.macs for layer in mixbit.layers(REAL[name]()[0], test))
    assert sum(step["macs"] for step in network.steps) == macs


def test_sizes_of_the_file(tmp_path: Path) -> None:
    model, calibration, _ = REAL["mobilenet_v1"]()
    model = ready(model, [calibration], "4/4")
    path = mixbit.export.integer(model, calibration, tmp_path / "m.mixbit")
    tensors = Network(path).manifest["tensors"]
    packed = sum(t["bytes"] for t in tensors if t["dtype"] == "packed")
    assert packed >= sum(np.prod(t["shape"]) * t["bits"] / 8 for t in tensors if t["dtype"] == "packed")
    assert packed < 1.01 * sum(layer.weights for layer in mixbit.layers(model, calibration)) / 2
    channels = sum(t["bytes"] for t in tensors if t["dtype"] != "packed")
    assert channels == 8 * sum(t["shape"][0] for t in tensors if t["dtype"] == "packed")
    # What is left, the manifest above all, does not grow with the network's width.
    assert path.stat().st_size - packed - channels < 0.03 * (packed + channels)


class Padded(nn.Module):
    """Paddings that convolutions take over, and paddings that they must not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, groups=8)
        self.c, self.d = nn.Conv2d(8, 8, (3, 2), padding=(0, 1)), nn.Conv2d(8, 4, 1)
        self.e, self.f = nn.Conv2d(10, 4, 3), nn.Conv2d(4, 4, 3)
        self.eval()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.relu6(self.a(F.pad(x, (0, 1, 0, 1))))  # taken over
        x = F.relu(self.b(F.pad(x, (1, 2, 3, 1))))  # taken over, below, above and beside
        both = F.pad(x, (2, 0, 0, 2))  # by both of its readers
        y, z = self.c(both), self.d(both)
        w = self.e(F.pad(y, (1, 1, 1, 1, 1, 1)))  # of channels, too: stays
        v = F.pad(w, (1, 1, 1, 1))  # an output: stays
        return v, self.f(v).mean((2, 3)) + F.max_pool2d(F.pad(z, (1, 0, 1, 0)), 2).mean((2, 3))  # read by a pool: stays


@pytest.mark.parametrize("kind", ["8/8", "4/4"])
def test_paddings_that_convolutions_take_over(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(3, 3, 11, 10) for _ in range(2)]
    model = ready(Padded(), batches, kind)
    network = check(model, batches[1], tmp_path / "m.mixbit")
    pads = [node["name"] for node in network.manifest["nodes"] if node["op"] == "pad"]
    assert len(pads) == 6
    kept = Network(tmp_path / "m.mixbit", keep_values=True)
    for planned, expected in ((network, pads[3:]), (kept, pads)):
        assert list(dict.fromkeys(s["node"] for s in planned.steps if s["op"] == "pad")) == expected


def test_the_arena_reuses_memory(tmp_path: Path) -> None:
    model, calibration, _ = REAL["resnet8"]()
    path = mixbit.export.integer(ready(model, [calibration]), calibration, tmp_path / "m.mixbit")
    assert Network(path).arena_bytes < 0.5 * Network(path, keep_values=True).arena_bytes


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, torch.Tensor, Path]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = ready(seeded(Residual), [x], "4/8")
    path = tmp_path_factory.mktemp("package") / "m.mixbit"
    mixbit.export.integer(model, x, path)
    return model, x, path


def test_wrong_inputs_are_named(small) -> None:
    _, x, path = small
    network = Network(path)
    with pytest.raises(MixbitError, match=r"input has dtype float64, expected float32"):
        network(x.numpy().astype(np.float64))
    with pytest.raises(MixbitError, match=r"input has shape \(4, 3, 8, 9\), expected \(batch, 3, 8, 8\)"):
        network(np.zeros((4, 3, 8, 9), np.float32))
    with pytest.raises(MixbitError, match=r"input has shape \(3, 8, 8\), expected"):
        network(np.zeros((3, 8, 8), np.float32))
    with pytest.raises(MixbitError, match=r"values need a network that keeps them"):
        network.values(x.numpy())
    with pytest.raises(MixbitError, match=r"threads is 0, expected 1 to 1024"):
        Network(path, threads=0)
    with pytest.raises(MixbitError, match=r"isa=sse is not known: expected scalar, avx2"):
        Network(path, isa="sse")
    for options, complaint in (
        ({"threads": "2"}, "threads='2': expected a whole number from 1 to 1024"),
        ({"threads": True}, "threads=True: expected a whole number"),
        ({"isa": 3}, "isa=3: expected a text or None"),
        ({"keep_values": "no"}, "keep_values='no': expected True or False"),
    ):
        for make in (Network, lambda at, **given: Network.from_bytes(at.read_bytes(), **given)):
            with pytest.raises(MixbitError, match=complaint):
                make(path, **options)
    assert network(np.zeros((0, 3, 8, 8), np.float32))[0].shape == (0, 5)
    assert Network(path, isa="scalar").isa == "scalar"
    # NaN counts as the lowest code, infinities saturate; slices are copied.
    odd = x.numpy().copy()
    odd[0, 0, 0] = [np.nan, np.inf, -np.inf, 0, 0, 0, 0, 0]
    plain = odd.copy()
    plain[0, 0, 0, :3] = [-1e9, 1e9, -1e9]
    assert np.array_equal(network(odd)[0], network(plain)[0])
    assert np.array_equal(network(x.numpy()[::2])[0], network(x.numpy())[0][::2])
    # A view into a buffer may begin at any byte.
    buffer = b"\0" + x.numpy().tobytes()
    crooked = np.frombuffer(buffer, np.float32, offset=1).reshape(x.shape)
    assert not crooked.flags.aligned
    assert np.array_equal(network(crooked)[0], network(x.numpy())[0])


def test_steps_and_their_times(small) -> None:
    _, x, path = small
    steps = Network(path).profile(x.numpy())
    assert [s["kernel"] for s in steps].count("convolve") == 5
    assert all(s["seconds"] >= 0 for s in steps)
    convolution = next(s for s in steps if s["module"] == "a")
    assert (convolution["act_bits"], convolution["weight_bits"], convolution["macs"]) == (8, 4, 8 * 8 * 8 * 8 * 9)


def test_a_package_in_memory(small) -> None:
    _, x, path = small
    data = path.read_bytes()
    network = Network.from_bytes(data, threads=2, isa="scalar", keep_values=True)
    assert (network.threads, network.isa, network.input_shape) == (2, "scalar", (3, 8, 8))
    assert np.array_equal(network(x.numpy())[0], Network(path)(x.numpy())[0])
    with pytest.raises(MixbitError, match=r"bytes, expected \d+: it was cut or added to"):
        Network.from_bytes(data[:-1])
    with pytest.raises(MixbitError, match="data is a bytearray, expected bytes"):
        Network.from_bytes(bytearray(data))


def test_peaks_bound_what_a_layer_reaches(small) -> None:
    _, x, path = small
    network = Network(path, isa="scalar")
    macs, moved = network.peaks()
    assert 1e6 < macs < 1e14
    assert 1e6 < moved < 1e14
    assert Network(path, isa="scalar", threads=2).peaks()[0] > 0
    assert np.array_equal(network(x.numpy())[0], Network(path)(x.numpy())[0])


def rewritten(data: bytes, change) -> bytes:
    """A package whose manifest, all of it spelled out, was changed, with lengths and checksum that fit."""
    length = struct.unpack_from("<Q", data, 16)[0]
    with tempfile.NamedTemporaryFile(suffix=".mixbit") as file:
        file.write(data)
        file.flush()
        manifest = Network(file.name).manifest
    text = json.dumps(change(manifest) or manifest).encode()
    body = data[-(-(32 + length) // 64) * 64 :]
    start = -(-(32 + len(text)) // 64) * 64
    head = data[:12] + struct.pack("<IQQ", zlib.crc32(text), len(text), start + len(body))
    return (head + text).ljust(start, b"\0") + body


def edit(**changes):
    def change(manifest):
        for path, value in changes.items():
            *keys, last = path.split("__")
            place = manifest
            for key in keys:
                place = place[int(key) if key.isdigit() else key]
            place[int(last) if last.isdigit() else last] = value

    return lambda data: rewritten(data, change)


def joined(manifest: dict) -> None:
    x = manifest["nodes"][0]
    manifest["nodes"].insert(1, {"name": "joined", "op": "cat", "inputs": [x["name"]] * (2**16 + 1), "grid": x["grid"]})


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda d: d[:-1], r"bytes, expected \d+: it was cut or added to"),
        (lambda d: d + b"\0", r"bytes, expected \d+: it was cut or added to"),
        (lambda d: d[:20], "it does not start as one"),
        (lambda d: b"PK" + d[2:], "it does not start as one"),
        (lambda d: b"", "it does not start as one"),
        (lambda d: d[:8] + struct.pack("<I", 3) + d[12:], r"has format version 3, this mixbit reads 1 to 2; upgrade mixbit"),
        (lambda d: d[:40] + b"X" + d[41:], "manifest is damaged: its checksum differs"),
        (lambda d: d[:-1] + bytes([d[-1] ^ 1]), r"tensor '\w+\.multiplier' is damaged: its checksum differs"),
        (lambda d: d[:16] + struct.pack("<Q", 2**60) + d[24:], "manifest has 1152921504606846976 bytes"),
        (edit(nodes__1__op="winograd"), r"node 'conv2d': operation 'winograd' is unknown to this mixbit"),
        (edit(nodes__1__inputs=["nothing"]), "'nothing' is no node before it"),
        (edit(nodes__1__shape=[8, 8, 9]), r"states shape \[8, 8, 9\], but its operation makes \[8, 8, 8\]"),
        (edit(nodes__1__stride=[0, 1]), "stride is 0, expected 1 to"),
        (edit(nodes__1__padding=[2**40, 1]), "padding is 1099511627776, expected 0 to"),
        (edit(nodes__1__groups=7), "3 channels in 7 groups"),
        (edit(nodes__1__grid__scale=0.0), "scale 0, expected a positive fp32 number"),
        (edit(nodes__1__grid__scale=1e60), "expected a positive fp32 number"),
        (edit(nodes__1__grid__high=256), "high is 256, expected"),
        (edit(nodes__1__grid__zero_point=-1000), "zero_point is -1000"),
        (edit(nodes__1__surprise=1), "unknown key 'surprise'"),
        (edit(nodes__0__shape=[3, 2**31, 2**31]), "expected 1 to 1073741824"),
        (edit(nodes__0__shape=[3, 2**29, 2**29]), "has more than 1073741824 elements"),
        (edit(nodes=[]), "has no nodes"),
        (edit(outputs=[]), "has no outputs"),
        # Each of these would make a plan far larger than the file.
        (edit(outputs=["x"] * (2**14 + 1)), "has 16385 outputs, expected at most 16384"),
        (lambda d: rewritten(d, joined), "node 'joined': nodes have more than 65536 inputs together"),
        (edit(nodes__1__name="n" * 1025), "node 1: name has 1025 bytes, expected at most 1024"),
        (edit(nodes__1__module="m" * 1025), "node 'conv2d': module has 1025 bytes, expected at most 1024"),
        (edit(outputs=["gone"]), "'gone' is no node before it"),
        (edit(tensors__1__offset=0), r"tensor 'stem.bias': offset 0, expected \d+ \(tensors follow each other"),
        (edit(tensors__0__bits=9), "bits is 9, expected 1 to 8"),
        (edit(tensors__0__shape=[8, 3, 3, 4]), r"108 bytes, expected 144|bytes, expected"),
        (edit(tensors__0__dtype="float16"), "dtype 'float16', expected packed, int32, float32 or uint8"),
        (edit(version=7), "its version is not the file's"),
        (edit(format="zip"), "format is no mixbit-package"),
        (lambda d: rewritten(d, lambda m: [m]), "the manifest is a list, expected an object"),
    ],
)  # fmt: skip
def test_a_damaged_package_is_refused(small, damage, complaint: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.mixbit"
    bad.write_bytes(damage(small[2].read_bytes()))
    with pytest.raises(MixbitError, match=complaint):
        Network(bad)


def with_first_number(path: Path, name: str, value: int) -> bytes:
    """A package in which the first number of an int32 tensor is another one; checksums fit."""
    data, tensors = path.read_bytes(), Network(path).manifest["tensors"]
    index = next(i for i, tensor in enumerate(tensors) if tensor["name"] == name)
    offset, size = tensors[index]["offset"], tensors[index]["bytes"]

    def start(data: bytes) -> int:
        return -(-(32 + struct.unpack_from("<Q", data, 16)[0]) // 64) * 64 + offset

    changed = struct.pack("<i", value) + data[start(data) + 4 : start(data) + size]
    bad = edit(**{f"tensors__{index}__crc32": zlib.crc32(changed)})(data)
    return bad[: start(bad)] + changed + bad[start(bad) + size :]


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            x = self.conv(x)
            return x * x.mean((2, 3), keepdim=True), F.pixel_unshuffle(x.sigmoid(), 2), x.permute(0, 2, 3, 1).softmax(3)

    path = tmp_path_factory.mktemp("functions") / "m.mixbit"
    return mixbit.export.integer(ready(Net().eval(), [x]), x, path)


@pytest.mark.parametrize(
    ("op", "changes", "complaint"),
    [
        ("mul", {"inputs": ["conv2d", "x"]}, "expected equal ones but for sizes of 1"),
        ("pixel_unshuffle", {"factor": 3}, r"factor 3 does not divide \[4, 4, 4\]"),
        ("permute", {"dims": [0, 2, 2, 1]}, r"dims \[0, 2, 2, 1\], expected 0 and an order of 1 to 3"),
        ("permute", {"dims": [1, 0, 2, 3]}, "expected 0 and an order of 1 to 3"),
        ("permute", {"dims": [0, 2, 1]}, "expected 0 and an order of 1 to 3"),
        ("softmax", {"dim": 0}, "dim 0 is the batch"),
        ("softmax", {"table": "sigmoid.table"}, "table 'sigmoid.table' is not int32"),
        ("softmax", {"table": "conv.bias"}, r"table 'conv.bias' has shape \[4\], expected \[256\]"),
        ("sigmoid", {"table": "softmax.table"}, "table 'softmax.table' is not uint8"),
        ("sigmoid", {"function": "sigmoid"}, "unknown key 'function'"),
        ("sigmoid", {"grid": {"scale": 0.1, "zero_point": 0, "low": 0, "high": 1}}, r"its table holds the code \d+, expected 0 to 1"),
    ],
)  # fmt: skip
def test_damaged_functions_are_refused(functions: Path, op: str, changes: dict, complaint: str, tmp_path: Path) -> None:
    def change(manifest: dict) -> dict:
        node = next(n for n in manifest["nodes"] if n["name"].startswith(op))
        node.update(changes)
        return manifest

    bad = tmp_path / "bad.mixbit"
    bad.write_bytes(rewritten(functions.read_bytes(), change))
    with pytest.raises(MixbitError, match=complaint):
        Network(bad)


@pytest.mark.parametrize("first", [0, 70000])
def test_powers_that_are_none_are_refused(functions: Path, first: int, tmp_path: Path) -> None:
    bad = tmp_path / "bad.mixbit"
    bad.write_bytes(with_first_number(functions, "softmax.table", first))
    with pytest.raises(MixbitError, match=f"node 'softmax': its table begins with {first} and holds"):
        Network(bad)


def test_packages_of_the_first_version_are_read(small, tmp_path: Path) -> None:
    _, x, path = small
    old, new = Network(Path(__file__).parents[2] / "data" / "residual_version1.mixbit"), Network(path)
    assert (old.manifest["version"], new.manifest["version"]) == (1, 2)
    assert np.array_equal(old(x.numpy())[0], new(x.numpy())[0])
    for key in ("nodes", "outputs"):
        assert old.manifest[key] == new.manifest[key]
    assert [t | {"offset": 0} for t in old.manifest["tensors"]] == [t | {"offset": 0} for t in new.manifest["tensors"]]


def stored(data: bytes) -> dict:
    """The manifest as it stands in a file."""
    return json.loads(data[32 : 32 + struct.unpack_from("<Q", data, 16)[0]])


def test_manifests_leave_out_what_is_clear(functions: Path, small) -> None:
    manifest, whole = stored(functions.read_bytes()), Network(functions).manifest
    assert manifest["nodes"][1] == {
        "name": "conv2d", "op": "conv2d", "module": "conv", "grid": 1, "act": 0, "weight": 0,
    }  # fmt: skip
    assert [tensor[0] for tensor in manifest["tensors"]] == ["int8", "int32", "float32", "uint8", "int32"]
    assert [tensor["name"] for tensor in whole["tensors"]] == [
        "conv.weight", "conv.bias", "conv2d.multiplier", "sigmoid.table", "softmax.table",
    ]  # fmt: skip
    assert whole["nodes"][1]["inputs"] == ["x"]
    assert whole["nodes"][1]["stride"] == [1, 1]
    for grid, (scale, *rest) in zip((n["grid"] for n in whole["nodes"][:2]), manifest["grids"], strict=False):
        assert np.float32(scale) == np.float32(grid["scale"])
        assert rest == [grid["zero_point"], grid["low"], grid["high"]]
    nodes = stored(small[2].read_bytes())["nodes"]
    assert [node["padding"] for node in nodes if "padding" in node] == [[1, 1]] * 3
    assert not any(key in node for node in nodes for key in ("stride", "dilation", "bias", "multiplier"))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda m: m["nodes"][1].update(grid=99), r"grid is 99, expected 0 to \d+"),
        (lambda m: m["nodes"][1].update(grid=-1), r"grid is -1, expected 0 to \d+"),
        (lambda m: m["nodes"][1].update(inputs=[1]), "1 is no node before it, expected 0 to 0"),
        (lambda m: m["nodes"][1].update(inputs=[-1]), "-1 is no node before it"),
        (lambda m: m["nodes"][1].update(weight=99), "weight 99 is no tensor of the package, which has 5"),
        (lambda m: m["nodes"][1].update(weight=4), "weight 'conv.weight' is not packed"),
        (lambda m: m["nodes"][1].update(bias=-2), "bias -2 is no tensor of the package"),
        (lambda m: m["nodes"][0].pop("grid"), "node 'x': no grid"),
        (lambda m: m["nodes"][1].pop("act"), "node 'conv2d': no act"),
        (lambda m: m["outputs"].append(99), "outputs: 99 is no node before it"),
        (lambda m: m["grids"].append([1.0, 0, 0]), r"grid \d+: expected scale, zero point, low and high"),
        (lambda m: m["grids"].append([0, 0, 0, 1]), r"grid \d+: scale 0, expected a positive fp32 number"),
        (lambda m: m["grids"].append([1.0, 0, 0, 256]), r"grid \d+: high is 256, expected 0 to 255"),
        (lambda m: m["grids"].append([1.0, 5, 0, 4]), r"grid \d+: zero_point is 5, expected 0 to 4"),
        (lambda m: m["tensors"][0].pop(), "tensor 0: expected a type, a shape and a checksum"),
        (lambda m: m["tensors"].__setitem__(0, ["int9", [4, 3, 1, 1], 0]), "type 'int9', expected int1 to int8"),
        (lambda m: m["tensors"].__setitem__(0, ["int8", [4, 3, 1, 0], 0]), "has a size below 1"),
        (lambda m: m["tensors"].__setitem__(0, ["int8", [4, 3, 1, 1], -1]), "crc32 is -1"),
    ],
)  # fmt: skip
def test_damaged_short_forms_are_refused(functions: Path, damage, complaint: str, tmp_path: Path) -> None:
    data = functions.read_bytes()
    manifest = stored(data)
    damage(manifest)
    length, text = struct.unpack_from("<Q", data, 16)[0], json.dumps(manifest).encode()
    body, start = data[-(-(32 + length) // 64) * 64 :], -(-(32 + len(text)) // 64) * 64
    head = data[:12] + struct.pack("<IQQ", zlib.crc32(text), len(text), start + len(body))
    bad = tmp_path / "bad.mixbit"
    bad.write_bytes((head + text).ljust(start, b"\0") + body)
    with pytest.raises(MixbitError, match=complaint):
        Network(bad)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(MixbitError, match=r"cannot open '.*none.mixbit': No such file"):
        Network(tmp_path / "none.mixbit")
    with pytest.raises(MixbitError, match=r"it is no regular file"):
        Network(tmp_path)


def test_an_accumulator_that_overflows_is_refused_when_the_package_is_read(tmp_path: Path, small) -> None:
    bad = tmp_path / "bad.mixbit"
    bad.write_bytes(with_first_number(small[2], "stem.bias", 2**31 - 1))
    with pytest.raises(MixbitError, match=r"node 'conv2d': its accumulator can exceed 32 bits \(up to 21474"):
        Network(bad)


def test_what_cannot_be_exported_is_named_and_nothing_is_written(small, tmp_path: Path) -> None:
    model, x, path = small
    before = path.read_bytes()
    with pytest.raises(MixbitError, match=r"m.mixbit' exists; pass force=True to replace it"):
        mixbit.export.integer(model, x, path)
    assert mixbit.export.integer(model, x, path, force=True).read_bytes() == before
    target = tmp_path / "new.mixbit"
    with pytest.raises(MixbitError, match="no prepared layers"):
        mixbit.export.integer(seeded(Residual), x, target)
    wide = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    mixbit.prepare_(wide, Recipe.uniform(["0"], weight=9, act=8))
    mixbit.calibrate_(wide, [x], example=x)
    with pytest.raises(MixbitError, match=r"layer '0': weights of 9 bits; a package holds 1 to 8"):
        mixbit.export.integer(wide, x, target)
    wide = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    mixbit.prepare_(wide, Recipe.uniform(["0"], weight=8, act=9))
    mixbit.calibrate_(wide, [x], example=x)
    with pytest.raises(MixbitError, match=r"codes from -256 to 255; a package holds grids of 1 to 8 bits"):
        mixbit.export.integer(wide, x, target)
    searching = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    mixbit.prepare_(searching, mixbit.search.Gates(precisions=(2, 4, 8)), x)
    with pytest.raises(MixbitError, match="under search"):
        mixbit.export.integer(searching, x, target)
    with pytest.raises(MixbitError, match="folder .* does not exist"):
        mixbit.export.integer(model, x, tmp_path / "none" / "m.mixbit")
    with pytest.raises(MixbitError, match=r"ends in '.onnx'; expected '.mixbit'"):
        mixbit.export.integer(model, x, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
