"""What the published code of the searches gets wrong, tested as absent; and what of it can be asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixbit
from mixbit import MixbitError, search
from mixbit.quantizers import quantized_layers
from mixbit.training import Images

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, seeded

#: Specification T5, limit 1.
X5 = torch.tensor([-1.2, -1, -0.8, -0.3, -0.06, 0, 0.06, 0.24, 0.26, 0.49, 0.51, 0.9, 1])


def under_search(space: Any) -> tuple[nn.Module, Tensor]:
    model = seeded(Residual)
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    mixbit.prepare_(model, space, x)
    return mixbit.calibrate_(model, [x]), x


@pytest.mark.parametrize(
    ("mask", "gradient"),
    [("widest", [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]), ("narrowest", [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0])],
)
def test_weights_train_in_the_range_of_the_widest_grid_unless_asked_otherwise(mask: str, gradient: list[int]) -> None:
    space = search.Gates(ranges="calibrated", mask=mask, granularity="per_tensor")
    quantizer = space.weight_quantizer(1, None, torch.device("cpu")).set_(torch.tensor([2.0**-7]))
    x = X5.clone().requires_grad_()
    with torch.no_grad():
        quantizer.gate_logits.fill_(30.0)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == gradient
    assert torch.equal(quantizer(x).detach(), mixbit.ops.fake_quantize(X5, torch.tensor([2.0**-7]), 0, 8))


def test_the_legacy_mask_of_channels_and_of_unsigned_grids() -> None:
    space = search.Gates(ranges="calibrated", mask="narrowest")
    quantizer = space.weight_quantizer(2, None, torch.device("cpu")).set_(torch.tensor([2.0**-7, 2.0**-6]))
    x = torch.stack([X5, 2 * X5]).requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad[0].tolist() == x.grad[1].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    act = space.act_quantizer(torch.device("cpu")).set_(torch.tensor([1 / 255]), signed=False)
    y = torch.tensor([[-0.1, 0.0, 0.5, 1.0, 1.1]]).requires_grad_()
    act(y).sum().backward()
    assert y.grad.tolist() == [[0, 1, 1, 1, 0]]
    with pytest.raises(MixbitError, match="mask='all' is not known"):
        search.Gates(mask="all")


def test_gradients_of_gates_are_cleared_with_all_others() -> None:
    """The published loop adds them up over the whole search."""
    model, x = under_search(search.Gates())
    penalty = search.Penalty(model, mixbit.costs.bops(seeded(Residual), x), strength=1.0)
    groups = [{**group, "lr": 0.0} for group in search.param_groups(model)]
    together = search.Together(
        {
            "weights": torch.optim.SGD([p for n, p in model.named_parameters() if "quantizer" not in n], lr=0.0),
            "search": torch.optim.Adam(groups),
        }
    )
    gates = [p for n, p in model.named_parameters() if n.endswith("gate_logits")]
    found = []
    for _ in range(2):
        together.zero_grad()
        assert all(p.grad is None for p in gates)
        penalty().backward()  # without noise: the same in each step
        together.step()
        found.append([p.grad.clone() for p in gates])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_search_of_fit_sees_fresh_gradients_in_every_step() -> None:
    model, x = under_search(search.Gates())
    costs = mixbit.costs.bops(seeded(Residual), x)
    data = Images(x, torch.arange(6) % 5, 3, seed=0)
    seen: list[float] = []
    weight = quantized_layers(model)["stem"].weight_quantizer
    weight.gate_logits.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.abs().max())))
    search.fit(model, data, costs, epochs=4, strength=1.0, objective=lambda m, _: m.stem.weight.sum() * 0)
    assert len(seen) == 8
    assert seen[-1] < max(seen)  # as a gate closes its gradient falls again; a sum of them never does


def test_a_pointwise_convolution_on_one_pixel_is_no_linear_layer() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(6, 3)).eval()
    kinds = [layer.kind for layer in mixbit.layers(model, torch.zeros(1, 4, 1, 1))]
    assert kinds == ["conv2d", "linear"]


def test_every_reader_of_a_shared_tensor_is_tied() -> None:
    """The published code leaves the second one untied without a word."""
    model, _ = under_search(search.Gates(tie=True))
    layers = quantized_layers(model)
    a, side = layers["a"], layers["side"]
    assert a.act_quantizer is side.act_quantizer
    assert a.weight_quantizer.gate_logits is side.weight_quantizer.gate_logits is a.act_quantizer.gate_logits


@pytest.mark.parametrize(
    "space", [search.Gates(), search.Mixture(), search.Fractional()], ids=lambda s: type(s).__name__
)
def test_an_input_without_a_batch_is_a_batch_of_one(space: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(-3), nn.Linear(5 * 4 * 4, 2)
    ).eval()
    x = torch.randn(6, 3, 8, 8)
    mixbit.prepare_(model, space, x)
    mixbit.calibrate_(model, [x])
    model.train()
    found = []
    for item in (x[:1], x[0]):
        torch.manual_seed(5)
        model.zero_grad()
        y = model(item)
        y.square().sum().backward()
        found.append((y.detach().flatten(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(found[0][0], found[1][0])
    assert len(found[0][1]) == len(found[1][1])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
