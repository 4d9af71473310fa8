"""Exported programs equal the integer reference (mixbit) or are a code away from it (pt2e), with and without mixbit."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

import mixbit
from mixbit import LayerPrecision, Recipe, zoo
from mixbit.errors import MixbitError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, seeded


class Several(nn.Module):
    """Most operations, two outputs, and a layer beyond 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.wide = nn.Conv2d(16, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        y = F.relu6(self.stem(x))
        z = F.relu(self.depthwise(y))
        up = F.interpolate(F.avg_pool2d(z, 2), scale_factor=2.0)
        v = self.wide(torch.cat([F.max_pool2d(F.pad(y + up, (0, 1, 0, 1)), 2, 1), z], 1))
        return self.head(v.mean((2, 3))), v[:, 1:3]


class Gated(nn.Module):
    """Looked-up functions, a product, softmax over boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x):
        y = F.hardswish(self.stem(x))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return self.head(y).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 3).softmax(-1)


def ready(model: nn.Module, x: torch.Tensor, recipe: Recipe | None = None) -> nn.Module:
    mixbit.prepare_(model, recipe or Recipe.uniform(mixbit.layers(model, x).names))
    return mixbit.calibrate_(model, [x], example=x)


@pytest.fixture(scope="module")
def several() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 16, 16)
    layers = {"stem": (8, 7), "depthwise": (4, 8), "wide": (12, 10), "head": (5, 8)}
    recipe = Recipe(layers={k: LayerPrecision(weight=w, act=a) for k, (w, a) in layers.items()})
    return ready(Several().eval(), x, recipe), x


def steps(reference: mixbit.export.IntegerReference, got: list[torch.Tensor], x: torch.Tensor) -> np.ndarray:
    """Differences of the outputs in codes."""
    found = []
    for name, mine, theirs in zip(reference.outputs, reference(x), got, strict=True):
        assert theirs.dtype == torch.float32
        assert mine.shape == tuple(theirs.shape)
        found.append(np.abs(mine - theirs.numpy()).ravel() / reference.grids[name].scale)
    return np.concatenate(found)


@pytest.mark.parametrize("dialect", mixbit.export.DIALECTS)
def test_programs_of_a_small_network_run_any_batch_and_reload(several, dialect: str) -> None:
    model, x = several
    reference = mixbit.export.reference(model, x)
    program = mixbit.export.program(model, x[:1], dialect)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for run in (mixbit.export.runner(program), mixbit.export.runner(loaded)):
        assert run.dialect == dialect
        for n in (1, 3, 6):
            apart = steps(reference, run(x[:n]), x[:n])
            if dialect == "mixbit":
                assert (apart == 0).all()
            else:
                assert apart.max() <= 1.01
                assert (apart > 0.5).mean() < 0.05
    # Weights are stored as codes, in the smallest type.
    state = program.state_dict
    assert state["layers.stem.weight"].dtype == torch.int8
    assert state["layers.wide.weight"].dtype == torch.int16
    assert int(state["layers.depthwise.weight"].abs().max()) == 7
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("mixbit" in name for name in names)
    assert any("quantized_decomposed" in name for name in names) == (dialect == "pt2e")


def test_a_fixed_batch_is_one_image(several) -> None:
    model, x = several
    for example in (x[:3], x[:1]):
        run = mixbit.export.runner(mixbit.export.program(model, example, dynamic_batch=False))
        assert run.batch == 1
        assert (steps(mixbit.export.reference(model, x), run(x[:1]), x[:1]) == 0).all()
        with pytest.raises(MixbitError, match=r"artifact: it refuses an input of shape \(2, .*== 1"):
            run(x[:2])
    assert mixbit.export.runner(mixbit.export.program(model, x)).batch is None


def test_a_damaged_program_is_named(several, tmp_path: Path) -> None:
    model, x = several
    torch.export.save(mixbit.export.program(model, x), tmp_path / "m.pt2")
    with zipfile.ZipFile(tmp_path / "m.pt2") as whole, zipfile.ZipFile(tmp_path / "d.pt2", "w") as damaged:
        for name in whole.namelist():
            damaged.writestr(name, b"{}" if "/models/" in name and name.endswith(".json") else whole.read(name))
    with pytest.raises(MixbitError, match=r"cannot load the program .*d.pt2"):
        mixbit.export.runner(tmp_path / "d.pt2")


@pytest.mark.parametrize("weight", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_resnet8_equals_the_reference_on_real_images(weight: int) -> None:
    model = zoo.resnet8(zoo.data_dir() / "weights/mlperf_tiny_resnet8_cifar10_fp32.npz")
    x = zoo.cifar10("train", 48)[0]
    mixbit.fold_batchnorm_(model, x[:2])
    ready(model, x, Recipe.uniform(mixbit.layers(model, x[:2]).names, weight=weight, act=8))
    reference = mixbit.export.reference(model, x[:2])
    test = zoo.cifar10("test", 48)[0]
    run = mixbit.export.runner(mixbit.export.program(model, x))
    assert (steps(reference, run(test), test) == 0).all()
    if weight == 8:
        standard = mixbit.export.runner(mixbit.export.program(model, x, "pt2e"))
        apart = steps(reference, standard(test), test)
        print(f"pt2e: {(apart > 0.5).sum()} of {apart.size} outputs differ, by at most {apart.max():.0f} codes")
        assert apart.max() <= 2.01
        assert (apart > 0.5).mean() < 0.1


@pytest.mark.parametrize("dialect", mixbit.export.DIALECTS)
def test_functions_and_softmax_are_exported(dialect: str) -> None:
    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(4, 3, 6, 6)
    ready(model, x)
    run = mixbit.export.runner(mixbit.export.program(model, x, dialect))
    apart = steps(mixbit.export.reference(model, x), run(x[:3]), x[:3])
    assert apart.max() <= (0 if dialect == "mixbit" else 1.01)


def test_networks_compile_as_one_graph_for_any_batch() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 8, 8)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    model = ready(nn.Sequential(*layers).eval(), x)
    frozen = copy.deepcopy(model).requires_grad_(False)
    program = mixbit.export.program(model, x).module()
    for network, training in ((model, False), (model, True), (frozen, False), (program, False)):
        if network is not program:
            network.train(training)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=counter)
        for n in (4, 6):  # not 3, the number of channels, which would share its symbol
            y = compiled(x[:n])
            assert torch.equal(y, network(x[:n]))
            if training:
                y.square().mean().backward()
        assert counter.frame_count == 1
    assert model[0].act_quantizer.scale.grad is not None


WITHOUT_MIXBIT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "mixbit" or name.startswith("mixbit."):
            raise ImportError("mixbit is blocked")
sys.meta_path.insert(0, Blocked())
import numpy as np, torch
try:
    import mixbit
    raise SystemExit("mixbit is not blocked")
except ImportError:
    pass
folder = sys.argv[1]
x = torch.from_numpy(np.load(folder + "/x.npy"))
plain = torch.export.load(folder + "/mixbit.pt2").module()(x)
import torch.ao.quantization.fx._decomposed
standard = torch.export.load(folder + "/pt2e.pt2").module()(x)
np.savez(folder + "/out.npz", *plain, *standard)
"""


def test_programs_load_where_mixbit_cannot_be_imported(several, tmp_path: Path) -> None:
    model, x = several
    expected = []
    for dialect in mixbit.export.DIALECTS:
        program = mixbit.export.program(model, x, dialect)
        torch.export.save(program, tmp_path / f"{dialect}.pt2")
        # The file is found to be a program.
        expected += mixbit.export.runner(tmp_path / f"{dialect}.pt2")(x)
    np.save(tmp_path / "x.npy", x.numpy())
    done = subprocess.run([sys.executable, "-c", WITHOUT_MIXBIT, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as found:
        for i, value in enumerate(expected):
            assert np.array_equal(found[f"arr_{i}"], value.numpy())


def test_bad_input_is_named(several, tmp_path: Path) -> None:
    model, x = several
    with pytest.raises(MixbitError, match=r"dialect.*'pt2'.*pt2e"):
        mixbit.export.program(model, x, "pt2")
    small, y = seeded(Residual), torch.randn(4, 3, 6, 6)
    with pytest.raises(MixbitError, match="no prepared layers"):
        mixbit.export.program(small, y)
    with pytest.raises(MixbitError, match=r"'bn' is a batch normalization; call mixbit.fold_batchnorm_"):
        mixbit.export.program(mixbit.prepare_(copy.deepcopy(small), Recipe.uniform(["stem"])), y)
    folded = mixbit.fold_batchnorm_(copy.deepcopy(small), y)
    names = mixbit.layers(folded, y).names
    with pytest.raises(MixbitError, match="no scales yet; call mixbit.calibrate_"):
        mixbit.export.program(mixbit.prepare_(copy.deepcopy(folded), Recipe.uniform(names)), y)
    searched = mixbit.prepare_(copy.deepcopy(folded), mixbit.search.Gates(precisions=(2, 4, 8)), example=y)
    with pytest.raises(MixbitError, match=r"under search.*prepare_\(model, mixbit.search.extract\(model\)\)"):
        mixbit.export.program(searched, y)
    (tmp_path / "noise.pt2").write_bytes(b"no archive")
    with pytest.raises(MixbitError, match=r"noise.pt2.*not a .pt2 archive"):
        mixbit.export.runner(tmp_path / "noise.pt2")
    with pytest.raises(MixbitError, match=r"missing.pt2.*No such file"):
        mixbit.export.runner(tmp_path / "missing.pt2")
    np.savez(tmp_path / "arrays.npz", x.numpy())
    with pytest.raises(MixbitError, match="neither an exported program nor a compiled package"):
        mixbit.export.runner(tmp_path / "arrays.npz")
