"""Fisher sensitivity: a written-out linear model, a real network against the rise of its loss, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import mixbit
from mixbit import ops, zoo
from mixbit.analysis import fisher
from mixbit.errors import MixbitError
from mixbit.quantizers import weight_scales


def data(count: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    x = torch.randn(count, 6)
    return [(x[:5], torch.arange(5) % 3), (x[5:], torch.arange(count - 5) % 3)]


def test_a_linear_model_written_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    table = fisher(model, data(), (2, 4))
    weight = model[0].weight.detach()
    expected_w, expected_x = np.zeros(2), np.zeros(2)
    grids = weight_scales(weight, [2, 4], per_channel=True, narrow_range=True)
    every = torch.cat([x for x, _ in data()])
    statistics = mixbit.quantizers.TensorStatistics()
    statistics.update(every)
    scales = statistics.scales([2, 4], signed=True, narrow_range=False)
    count = 0
    for x, labels in data():
        for row, label in zip(x, labels, strict=True):
            share = torch.softmax(model(row), 0).detach()
            share[label] -= 1  # d loss / d logits
            for k, bits in enumerate((2, 4)):
                dw = ops.fake_quantize(weight, grids[k], 0, bits, narrow_range=True, axis=0) - weight
                dx = ops.fake_quantize(row, scales[k : k + 1], 0, bits) - row
                expected_w[k] += float(((share[:, None] * row[None]) * dw).square().sum()) / 2
                expected_x[k] += float(((weight.T @ share) * dx).square().sum()) / 2
            count += 1
    assert count == 12
    expected = -10 * np.log10((expected_x[:, None] + expected_w[None]) / count)
    np.testing.assert_allclose(table.sqnr_db[0], expected, rtol=1e-4)
    np.testing.assert_allclose(table.weight_sqnr_db[0], -10 * np.log10(expected_w / count), rtol=1e-4)
    assert table.point == "fisher"
    assert table.options["images"] == 12


def test_a_real_network_is_ranked_like_its_loss_rises() -> None:
    from scipy.stats import spearmanr

    model = zoo.cifar_resnet(20, zoo.data_dir() / "weights/cifar10_resnet20_fp32.npz")
    images, labels = zoo.cifar10("train", 96)
    batches = list(zip(images.split(48), labels.split(48), strict=True))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    table = fisher(model, batches, (4, 8))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (np.diff(table.sqnr_db, axis=1) >= 0).all()
    mixbit.fold_batchnorm_(model, images[:1])

    def loss() -> float:
        with torch.no_grad():
            return float(sum(nn.functional.cross_entropy(model(x), y, reduction="sum") for x, y in batches)) / 96

    exact, rises = loss(), []
    for name in table.layers:
        mixbit.prepare_(model, mixbit.Recipe(layers={name: mixbit.LayerPrecision(weight=4, act=None)}))
        mixbit.calibrate_(model, [images[:8]])
        rises.append(loss() - exact)
        mixbit.restore_(model)
    assert spearmanr(-table.weight_sqnr_db[:, 0], rises).statistic > 0.4  # 0.67 on 128 images
    costs = mixbit.costs.bops(model, images[:1])
    recipe = mixbit.assign(table, costs, budget=0.5 * costs.uniform(8, 8))
    assert costs.total(recipe) <= 0.5 * costs.uniform(8, 8)


def test_a_detector_brings_its_loss() -> None:
    model = zoo.fastestdet(zoo.data_dir() / "weights/fastestdet_coco_fp32.npz")
    images, boxes = zoo.coco("val", 4, "fastestdet")
    table = fisher(model, [(images[:2], boxes[:2]), (images[2:], boxes[2:])], (4, 8))
    assert np.isfinite(table.sqnr_db).all()
    assert (table.sqnr_db[:, 1, 1] > table.sqnr_db[:, 0, 0]).all()
    assert table.options["images"] == 4


def test_a_loss_of_ones_own() -> None:
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    items = [(x, list(range(len(x)))) for x, _ in data()]
    seen = []

    def loss(output: torch.Tensor, item) -> torch.Tensor:
        seen.append(item[1])
        return output.square().sum()

    assert np.isfinite(fisher(model, items, (4,), loss=loss).sqnr_db).all()
    assert [s[0] for s in seen[:6]] == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize(
    ("items", "options", "complaint"),
    [
        ([torch.zeros(2, 6)], {}, "needs items"),
        ([(torch.zeros(2, 6), torch.zeros(3, dtype=torch.int64))], {}, "2 images and 3 labels"),
        ([(torch.zeros(2, 6), torch.full((2,), 3))], {}, "labels run from 3 to 3; expected classes from 0 to 2"),
        ([], {}, "empty"),
        (data(), {"precisions": (4, 2)}, "precisions"),
        (data(), {"ranges": "mce"}, "did you mean 'mse'"),
    ],
)
def test_bad_input_is_named(items, options: dict, complaint: str) -> None:
    with pytest.raises(MixbitError, match=complaint):
        fisher(nn.Sequential(nn.Linear(6, 3)).eval(), items, **options)
