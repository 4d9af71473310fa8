"""analyze: what it measures, what it leaves alone, resuming, real networks."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mixbit
from mixbit import Recipe, ops, zoo
from mixbit.analysis import network_sqnr
from mixbit.analysis.power import monotone, sqnr_db
from mixbit.errors import MixbitError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nets import Residual, Shared, seeded


def data(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(count)]


def db(reference: torch.Tensor, got: torch.Tensor) -> float:
    noise = float((got.double() - reference.double()).square().sum())
    return 10 * math.log10(float(reference.double().square().sum()) / noise)


def test_each_entry_is_the_layer_run_with_both_operands_quantized() -> None:
    model = seeded(Residual)
    table = mixbit.analyze(model, data(), precisions=(3, 5, 8))
    assert table.sqnr_db.shape == (5, 3, 3)
    assert table.input_group == (0, 1, 2, 1, 3)
    folded = mixbit.fold_batchnorm_(copy.deepcopy(model), data()[0])
    x = torch.cat(data())
    mid = torch.relu(folded.stem(x))
    for a, w in ((3, 8), (8, 3), (5, 5)):
        quantized = mixbit.prepare_(copy.deepcopy(folded), Recipe.uniform(["a"], weight=w, act=a))
        mixbit.calibrate_(quantized, data())
        expected = db(folded.a(mid), quantized.a(mid))
        assert table.entry("a", a, w) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("point", ["layer_output", "tensor", "network_output", "cumulative"])
@pytest.mark.parametrize("joint", [True, False])
def test_every_point_is_monotone_and_leaves_the_model_alone(point: str, joint: bool) -> None:
    model = seeded(Residual)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    table = mixbit.analyze(model, data(), precisions=(2, 4, 8), point=point, joint=joint)
    assert table.joint == joint
    assert table.point == point
    for axis in (1,) if joint else (1, 2):
        assert (np.diff(table.sqnr_db, axis=axis) >= 0).all()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(not m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    if joint:
        full = mixbit.analyze(model, data(), precisions=(2, 4, 8), point=point)
        diagonal = np.stack([full.sqnr_db[:, i, i] for i in range(3)], 1)
        assert np.allclose(table.sqnr_db[:, -1], diagonal[:, -1], atol=1e-6)


def test_network_points_are_measured_at_the_output() -> None:
    model = seeded(Residual)
    folded = mixbit.fold_batchnorm_(copy.deepcopy(model), data()[0])
    x = torch.cat(data())
    single = mixbit.analyze(model, data(), precisions=(4,), point="network_output", joint=True)
    chain = mixbit.analyze(model, data(), precisions=(4,), point="cumulative", joint=True)
    for names, table, layer in ((["b"], single, "b"), (["stem", "a", "b"], chain, "b")):
        quantized = mixbit.prepare_(copy.deepcopy(folded), Recipe.uniform(names, weight=4, act=4))
        mixbit.calibrate_(quantized, data())
        assert table.entry(layer, 4, 4) == pytest.approx(db(folded(x), quantized(x)), abs=1e-3)


def test_importance_weighs_the_squared_elements_of_the_output() -> None:
    model = seeded(Residual)
    folded = mixbit.fold_batchnorm_(copy.deepcopy(model), data()[0])
    x = torch.cat(data())
    quantized = mixbit.prepare_(copy.deepcopy(folded), Recipe.uniform(["b"], weight=4, act=4))
    mixbit.calibrate_(quantized, data())
    with torch.no_grad():
        reference, got = folded(x).double(), quantized(x).double()
    weight = torch.tensor([4.0, 0.0, 1.0, 0.0, 0.5])
    noise, signal = ((weight * t.square()).sum() for t in (got - reference, reference))
    table = mixbit.analyze(model, data(), (4,), "network_output", joint=True, importance=lambda y: weight)
    assert table.entry("b", 4, 4) == pytest.approx(10 * math.log10(float(signal / noise)), abs=1e-3)
    assert table.options["importance"] == "callable"
    recipe = Recipe.uniform(["b"], weight=4, act=4)
    assert network_sqnr(model, recipe, data(), importance=lambda y: weight) == pytest.approx(
        table.entry("b", 4, 4), abs=1e-3
    )
    ones = mixbit.analyze(model, data(), (4,), "network_output", joint=True, importance=torch.ones_like)
    plain = mixbit.analyze(model, data(), (4,), "network_output", joint=True)
    assert np.allclose(ones.sqnr_db, plain.sqnr_db)


def test_a_detector_is_weighted_by_its_confidence() -> None:
    model = zoo.fastestdet(zoo.data_dir() / "weights/fastestdet_coco_fp32.npz")
    images, _ = zoo.coco("val", 2, "fastestdet")
    names = ["detect_head.reg_layers.conv5x5.3", "detect_head.obj_layers.conv5x5.3"]
    tables = [
        mixbit.analyze(model, [images], (4,), "network_output", True, names=names, importance=importance)
        for importance in (None, "confidence")
    ]
    assert tables[1].options["importance"] == "confidence"
    assert np.isfinite(tables[1].sqnr_db).all()
    assert not np.allclose(tables[0].sqnr_db, tables[1].sqnr_db, atol=0.05)
    # By hand: the least over objectness, box values and class shares, each cell counting as much as its best score.
    folded = mixbit.fold_batchnorm_(copy.deepcopy(model), images)
    quantized = mixbit.prepare_(copy.deepcopy(folded), Recipe.uniform(names[1:], weight=4, act=4))
    mixbit.calibrate_(quantized, [images])
    with torch.no_grad():
        reference, got = folded(images), quantized(images)
    weight = (reference[:, :1] * reference[:, 5:]).amax(1, keepdim=True)
    noise = (weight * (got - reference)[:, :1].square()).sum()
    expected = 10 * torch.log10((weight * reference[:, :1].square()).sum() / noise)
    assert tables[1].entry(names[1], 4, 4) == pytest.approx(float(expected), abs=1e-2)


def test_tensor_adds_the_noise_ratios_of_both_operands() -> None:
    table = mixbit.analyze(seeded(Residual), data(), precisions=(3, 6), point="tensor")
    expected = -10 * np.log10(
        10 ** (-table.act_sqnr_db[:, :, None] / 10) + 10 ** (-table.weight_sqnr_db[:, None, :] / 10)
    )
    assert np.allclose(table.sqnr_db, expected)


def test_quantization_noise_is_what_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(Residual)
    honest = {p: mixbit.analyze(model, data(), (4, 8), p) for p in ("tensor", "layer_output")}
    real = ops.quantization_noise

    def doubled(*args, **keywords):
        s, n = real(*args, **keywords)
        return s, 2 * n

    monkeypatch.setattr(ops, "quantization_noise", doubled)
    tensor = mixbit.analyze(model, data(), (4, 8), "tensor")
    assert np.allclose(tensor.sqnr_db, honest["tensor"].sqnr_db - 10 * math.log10(2))
    layer = mixbit.analyze(model, data(), (4, 8), "layer_output")
    assert np.allclose(layer.act_sqnr_db, honest["layer_output"].act_sqnr_db - 10 * math.log10(2))
    assert np.allclose(layer.weight_sqnr_db, honest["layer_output"].weight_sqnr_db - 10 * math.log10(2))


def test_order_of_images_and_powers_of_two_do_not_matter() -> None:
    model = seeded(Residual)
    table = mixbit.analyze(model, data(), (3, 6))
    turned = mixbit.analyze(model, [b.flip(0) for b in reversed(data())], (3, 6))
    assert np.allclose(table.sqnr_db, turned.sqnr_db, atol=1e-4)
    bigger = copy.deepcopy(model)
    with torch.no_grad():
        bigger.head.weight *= 8
        bigger.head.bias *= 8
    assert np.array_equal(mixbit.analyze(bigger, data(), (3, 6)).sqnr_db[-1], table.sqnr_db[-1])


def test_exact_layers_are_infinite_and_silent_ones_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.zero_()
        model[1].weight.zero_()
        model[1].bias.zero_()
    table = mixbit.analyze(model, [torch.tensor([[7.0, -7.0, 3.0, 1.0]])], (4, 8), ranges="maxabs")
    assert table.sqnr_db[0, 0, 0] == np.inf
    assert table.sqnr_db[1, 0, 0] == np.inf


def test_sqnr_conventions() -> None:
    assert sqnr_db([1, 0, 0, 100], [0, 1, 0, 1]).tolist() == [np.inf, -np.inf, np.inf, 20.0]
    raised, moved = monotone(np.array([[1.0, 3, 2, 4]]), (1,))
    assert raised.tolist() == [[1, 3, 3, 4]]
    assert moved == 1


def test_dict_inputs_shared_modules_and_several_outputs() -> None:
    table = mixbit.analyze(seeded(Shared), [{"values": torch.randn(8, 6)}], (4, 8), "network_output", joint=True)
    assert table.layers == ("first", "again")
    assert np.isfinite(table.sqnr_db).all()


def test_ranges_and_selected_layers() -> None:
    model = seeded(Residual)
    mse = mixbit.analyze(model, data(), (3,), joint=True)
    for ranges in ("maxabs", "qformat"):
        assert mixbit.analyze(model, data(), (3,), joint=True, ranges=ranges).sqnr_db.mean() < mse.sqnr_db.mean()
    assert mixbit.analyze(model, data(), (3,), names=["s*"]).layers == ("stem", "side")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"batches": iter(data())}, "one-shot iterator"),
        ({"batches": []}, "batches is empty"),
        ({"batches": [data()[0] * math.nan]}, "layer 'stem': its input holds NaN"),
        ({"batches": [data()[0] * math.inf]}, "layer 'stem': its input holds NaN or infinity"),
        ({"precisions": (8, 4)}, "ascending whole numbers"),
        ({"precisions": (1, 4)}, "from 2 to 16"),
        ({"precisions": (4, 17)}, "from 2 to 16"),
        ({"precisions": ()}, "ascending whole numbers"),
        ({"point": "layer"}, "did you mean 'layer_output'"),
        ({"ranges": "max"}, "did you mean 'maxabs'"),
        ({"names": ["stm"]}, "did you mean 'stem'"),
        ({"model": seeded(Residual).train()}, "training mode"),
        ({"joint": True, "act_precisions": (4,)}, "needs the same act_precisions"),
        ({"importance": torch.ones_like}, "importance is for the points"),
        ({"point": "network_output", "importance": "confidence"}, "Residual has none"),
        ({"point": "network_output", "importance": "score"}, "importance='score'"),
        ({"point": "network_output", "importance": lambda y: []}, "gave 0 tensors for 1"),
        ({"point": "network_output", "importance": lambda y: y[:, :2].abs()}, r"has shape \(4, 2\); expected"),
        ({"point": "network_output", "importance": lambda y: -y.abs()}, "holds negative or not finite values"),
    ],
)
def test_bad_input_is_named(change: dict, complaint: str) -> None:
    given = {"model": seeded(Residual), "batches": data(), **change}
    with pytest.raises(MixbitError, match=complaint):
        mixbit.analyze(**given)


def test_bad_weights_are_named() -> None:
    model = seeded(Residual)
    with torch.no_grad():
        model.b.weight[0] = math.inf
    with pytest.raises(MixbitError, match="parameter 'b.weight' holds NaN or infinity"):
        mixbit.analyze(model, data())


@pytest.mark.parametrize("point", ["layer_output", "network_output"])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, point: str) -> None:
    model = seeded(Residual)
    mixbit.analyze(model, data(4), (2, 4), point).save(tmp_path / "whole.json")

    class Stop(Exception):
        pass

    checkpoint = tmp_path / "partial"
    for limit in (1, 2, 3, 2, 5) if point == "layer_output" else (1, 7, 30, 50, 20):
        steps = 0

        def stop(done: int, total: int, text: str, limit: int = limit) -> None:
            nonlocal steps
            steps += 1
            if steps == limit:
                raise Stop

        with pytest.raises(Stop):
            mixbit.analyze(model, data(4), (2, 4), point, checkpoint=checkpoint, progress=stop)
        assert checkpoint.exists()
        if point == "layer_output" and limit == 2:
            break
    mixbit.analyze(model, data(4), (2, 4), point, checkpoint=checkpoint).save(tmp_path / "resumed.json")
    assert (tmp_path / "resumed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not checkpoint.exists()


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "partial"

    def stop(done: int, total: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mixbit.analyze(seeded(Residual), data(), (2, 4), checkpoint=checkpoint, progress=stop)
    with pytest.raises(MixbitError, match="belongs to another model or other options"):
        mixbit.analyze(seeded(Residual), data(), (2, 8), checkpoint=checkpoint)
    checkpoint.write_bytes(b"rubbish")
    with pytest.raises(MixbitError, match="is damaged or no checkpoint"):
        mixbit.analyze(seeded(Residual), data(), (2, 4), checkpoint=checkpoint)


def test_additivity_of_a_deep_network() -> None:
    """Isolated noise ratios add up to that of the whole network: within 0.6 dB from 8 to 4 bits."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(6):
        linear = nn.Linear(256, 256, bias=False)
        nn.init.kaiming_normal_(linear.weight)
        parts += [linear, nn.ReLU()]
    model = nn.Sequential(*parts).eval()
    batches = [torch.randn(512, 256)]
    table = mixbit.analyze(model, batches, (4, 6, 8), "network_output", joint=True)
    # Best steps for Gaussian weights (symmetric grid) and for rectified Gaussians (unsigned grid), in dB.
    for bits, weight, act in ((8, 40.540, 46.019), (6, 29.709, 35.106), (4, 18.898, 24.326)):
        expected = -10 * math.log10(10 ** (-weight / 10) + 10 ** (-act / 10))
        # The first layer reads signed values, which cost one bit; the others read rectified ones.
        for name in table.layers[1:]:
            # Finite rows have no far tail: nearly 2 dB better than the closed form at 8 bits.
            assert table.entry(name, bits, bits) == pytest.approx(expected, abs=2.0)
        recipe = Recipe.uniform(table.layers, weight=bits, act=bits)
        measured = network_sqnr(model, recipe, batches)
        assert measured == pytest.approx(table.predicted_sqnr_db(recipe), abs=0.6)


@pytest.fixture(scope="module")
def resnet20() -> tuple[nn.Module, list[torch.Tensor]]:
    model = zoo.cifar_resnet(20, zoo.data_dir() / "weights/cifar10_resnet20_fp32.npz")
    return model, list(zoo.cifar10("train", 128)[0].split(64))


def test_prediction_against_measurement_on_resnet20(resnet20) -> None:
    model, batches = resnet20
    table = mixbit.analyze(model, batches, (4, 5, 6, 7, 8), joint=True)
    for bits in (4, 5, 6, 7, 8):
        recipe = Recipe.uniform(table.layers, weight=bits, act=bits)
        difference = network_sqnr(model, recipe, batches) - table.predicted_sqnr_db(recipe)
        assert -1.0 < difference < 6.0


def test_killed_runs_of_the_analysis_end_with_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, mixbit; from nets import Residual, seeded\n"
        "torch.set_num_threads(1); g = torch.Generator().manual_seed(1)\n"
        "d = [torch.randn(4, 3, 6, 6, generator=g) for _ in range(30)]\n"
        "print('ready', flush=True)\n"
        "mixbit.analyze(seeded(Residual), d, (2, 4, 8), checkpoint=sys.argv[2]).save(sys.argv[3])\n"
    )
    folder = str(Path(__file__).resolve().parents[1])

    def start(checkpoint: Path, out: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, folder, str(checkpoint), str(out)], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        return process

    assert start(tmp_path / "c1", tmp_path / "whole.json").wait() == 0
    rng = np.random.default_rng(0)
    for _ in range(3):
        process = start(tmp_path / "c2", tmp_path / "killed.json")
        time.sleep(float(rng.uniform(0.05, 0.5)))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "c2", tmp_path / "killed.json").wait() == 0
    assert (tmp_path / "whole.json").read_bytes() == (tmp_path / "killed.json").read_bytes()
