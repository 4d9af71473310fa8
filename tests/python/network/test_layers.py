"""Layers, input groups, calling conventions, batch-norm pairs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import mixbit
from mixbit.errors import MixbitError
from mixbit.network import batch_size, batchnorm_pairs, call_model, check_batches, flatten_outputs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, Shared, seeded


def test_layers_in_forward_order_with_groups_and_costs() -> None:
    model = seeded(Residual)
    found = mixbit.layers(model, torch.randn(4, 3, 6, 6))
    assert found.names == ["stem", "a", "b", "side", "head"]
    assert [layer.input_group for layer in found] == [0, 1, 2, 1, 3]
    stem, _, b, _, head = found
    assert stem.macs == 36 * 8 * 27
    assert b.macs == 36 * 8 * 9 * 4
    assert (b.kind, b.groups, b.stride, b.padding) == ("conv2d", 2, (1, 1), (1, 1))
    assert (head.kind, head.macs, head.weights, head.shapes.input) == ("linear", 40, 40, (8,))
    assert stem.input_elements == 108
    assert b.other_live == 8 * 36  # the tensor that side reads later
    assert found.total_macs == sum(layer.macs for layer in found)
    assert found.float_modules == ()


def test_who_reads_an_output() -> None:
    """Through activations, normalization, pools and reshapes; adds and concatenations join."""
    residual = mixbit.layers(seeded(Residual), torch.randn(2, 3, 6, 6))
    assert {layer.name: (layer.consumer, layer.joined) for layer in residual} == {
        "stem": ("a", False),
        "a": ("b", False),
        "b": (None, True),
        "side": (None, True),
        "head": (None, False),
    }
    # Shared: again reads its own output.
    assert [layer.consumer for layer in mixbit.layers(seeded(Shared), torch.randn(3, 6))] == ["again", "again"]
    resnet = mixbit.layers(torchvision.models.resnet18(weights=None).eval(), torch.randn(1, 3, 32, 32))
    reads = {layer.name: (layer.consumer, layer.joined) for layer in resnet}
    # relu in place, max pool; the pooled tensor is read by the layer and by the sum.
    assert reads["conv1"] == ("layer1.0.conv1", True)
    assert reads["layer1.0.conv1"] == ("layer1.0.conv2", False)
    assert reads["layer2.0.conv2"] == reads["layer2.0.downsample.0"] == (None, True)
    assert reads["fc"] == (None, False)
    mobile = mixbit.layers(torchvision.models.mobilenet_v2(weights=None).eval(), torch.randn(1, 3, 32, 32))
    order = mobile.names
    assert all(a.consumer in (b, None) for a, b in zip(mobile, order[1:], strict=False))
    # Ten residual sums of fifteen outputs, five of which the next layer reads too.
    assert sum(layer.joined for layer in mobile) == 15
    assert sum(layer.consumer is None for layer in mobile) == 11


def test_a_shared_layer_appears_once_and_ties_what_it_reads() -> None:
    found = mixbit.layers(seeded(Shared), {"values": torch.randn(3, 6)})
    assert found.names == ["first", "again"]
    again = found[1]
    assert again.calls == 3
    assert again.macs == 3 * 36
    assert [m.name for m in found.float_modules] == ["unused"]
    assert "never called" in found.float_modules[0].reason


@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (lambda: _Reads(lambda m, x: m.a(x) + m.b(x)), [0, 0]),
        (lambda: _Reads(lambda m, x: m.a(x.view(-1, 4)) + m.b(x)), [0, 0]),  # a view of the whole
        (lambda: _Reads(lambda m, x: m.a(x) + m.b(x + 0)), [0, 1]),  # another tensor
        (lambda: _Reads(lambda m, x: (lambda y: m.a(y) + m.b(y.mul_(2)))(x * 1)), [0, 1]),  # changed in place
        (lambda: _Reads(lambda m, x: m.a(m.drop(x)) + m.b(x)), [0, 0]),  # dropout in eval is the tensor itself
    ],
)
def test_what_is_the_same_tensor(make, groups: list[int]) -> None:
    found = mixbit.layers(make().eval(), torch.randn(2, 4))
    assert [layer.input_group for layer in found] == groups


class _Reads(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def test_a_model_that_prepares_its_images_itself_starts_at_group_zero() -> None:
    found = mixbit.layers(_Reads(lambda m, x: m.b(m.a(x / 255))).eval(), torch.randn(2, 4))
    assert [layer.input_group for layer in found] == [0, 1]


def test_overridden_forwards_stay_float_with_the_reason() -> None:
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    found = mixbit.layers(nn.Sequential(nn.Linear(4, 4), Odd(4, 4), nn.ReLU()).eval(), torch.randn(2, 4))
    assert found.names == ["0"]
    assert found.float_modules[0].reason == "class Odd has a forward of its own"
    assert found.quantized_share == 0.5


def test_the_model_is_left_as_it_was_even_when_it_raises() -> None:
    model = seeded(Residual)
    with pytest.raises(RuntimeError):
        mixbit.layers(model, torch.randn(2, 4, 6, 6))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: seeded(Residual).train(), "training mode; call model.eval"),
        (lambda: nn.Sequential(nn.ReLU()).eval(), "no Conv2d or Linear layer was called"),
    ],
)
def test_bad_models_are_named(make, message: str) -> None:
    with pytest.raises(MixbitError, match=message):
        mixbit.layers(make(), torch.randn(2, 3, 6, 6))


def test_calling_conventions() -> None:
    model = seeded(Shared)
    x = torch.randn(3, 6)
    expected = model(x)["out"]
    for item in (x, (x, 1), [x], {"values": x}):
        assert torch.equal(call_model(model, item)["out"], expected)
        assert batch_size(item) == 3
    assert [path for path, _ in flatten_outputs(model(x))] == ["out", "hidden.0"]
    with pytest.raises(MixbitError, match="an item is a int"):
        call_model(model, 3)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ((torch.ones(1) for _ in range(2)), "one-shot iterator"),
        (iter([torch.ones(1)]), "one-shot iterator"),
        ([], "is empty"),
        (torch.ones(2, 3), "is a Tensor; expected a list"),
        (3, "is a int"),
    ],
)
def test_bad_batches_are_named(batches, message: str) -> None:
    with pytest.raises(MixbitError, match=message):
        check_batches(batches)


def test_batchnorm_pairs_follow_tensors_not_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.conv = nn.Conv2d(3, 3, 1)
            self.both = nn.Conv2d(3, 3, 1)
            self.norm2 = nn.BatchNorm2d(3)
            self.norm3 = nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.norm(self.conv(x))
            y = self.both(x)
            return self.norm2(y) + y + self.norm3(torch.relu(x))

    assert batchnorm_pairs(Net().eval(), torch.randn(2, 3, 4, 4)) == [("conv", "norm")]


@pytest.mark.parametrize(
    ("name", "count", "gmacs"), [("resnet18", 21, 1.814073), ("mobilenet_v2", 53, 0.300774), ("resnet50", 54, 4.089184)]
)
def test_known_networks(name: str, count: int, gmacs: float) -> None:
    found = mixbit.layers(torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224))
    assert len(found) == count
    assert sum(layer.macs for layer in found) / 1e9 == pytest.approx(gmacs, abs=1e-6)
