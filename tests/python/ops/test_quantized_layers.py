"""quantized_conv2d and quantized_linear: equal to the composition of their parts, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from mixbit import ops
from mixbit.ops import _reference as twin

CONVS = [
    {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "groups": 2},
    {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 6},
]


def operands(groups: int = 1) -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(2, 6, 9, 8),
        "weight": torch.randn(6, 6 // groups, 3, 3),
        "bias": torch.randn(6),
        "x_scale": torch.tensor([0.2]),
        "x_zero_point": torch.tensor([1.0]),
        "x_bits": torch.tensor([4.0]),
        "w_scale": torch.rand(6) * 0.2 + 0.1,
        "w_bits": torch.tensor([3.0]),
    }


LEARNED = ("x", "weight", "bias", "x_scale", "x_zero_point", "w_scale")


@pytest.mark.parametrize("options", CONVS, ids=str)
@pytest.mark.parametrize("rounding", ["half_even", "half_up"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_conv2d_equals_the_composition(options: dict, rounding: str, layout: torch.memory_format) -> None:
    given = operands(options["groups"])
    given["x"] = given["x"].contiguous(memory_format=layout)
    results = []
    for function in (ops.quantized_conv2d, twin.quantized_conv2d):
        leaves = {k: v.clone().requires_grad_() if k in LEARNED else v for k, v in given.items()}
        y = function(**leaves, signed_x=True, rounding=rounding, **options)
        (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
        results.append([y.detach(), *(leaves[k].grad for k in LEARNED)])
    assert torch.equal(results[0][0], results[1][0])
    for got, expected in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


CLIPS = [{"x_gradient": "clip"}, {"w_gradient": "clip"}, {"x_gradient": "clip", "w_gradient": "clip"}]


@pytest.mark.parametrize("gradients", CLIPS, ids=str)
@pytest.mark.parametrize("signed", [True, False])
def test_clipping_of_either_operand_equals_the_composition(gradients: dict, signed: bool) -> None:
    for function in ("quantized_conv2d", "quantized_linear"):
        given = operands()
        if function == "quantized_linear":
            given |= {"x": torch.randn(4, 5, 12), "weight": torch.randn(6, 12)}
        results = []
        for room, kinds in ((ops, gradients), (twin, gradients), (ops, {})):
            leaves = {k: v.clone().requires_grad_() if k in LEARNED else v for k, v in given.items()}
            y = getattr(room, function)(**leaves, signed_x=signed, **kinds)
            (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
            results.append([y.detach(), *(leaves[k].grad for k in LEARNED)])
        assert torch.equal(results[0][0], results[1][0])
        for got, expected in zip(results[0][1:], results[1][1:], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        # Of the scales, those of the operands asked for differ from a learned step's, and no others.
        for name, operand in (("x_scale", "x_gradient"), ("w_scale", "w_gradient")):
            at = 1 + LEARNED.index(name)
            assert torch.equal(results[0][at], results[2][at]) != (operand in gradients)


def test_linear_equals_the_composition() -> None:
    given = operands() | {"x": torch.randn(4, 5, 12), "weight": torch.randn(6, 12)}
    results = []
    for function in (ops.quantized_linear, twin.quantized_linear):
        leaves = {k: v.clone().requires_grad_() if k in LEARNED else v for k, v in given.items()}
        y = function(**leaves, signed_x=True)
        (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
        results.append([y.detach(), *(leaves[k].grad for k in LEARNED)])
    assert torch.equal(results[0][0], results[1][0])
    for got, expected in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [LEARNED, ("weight",), ("x_scale",), ("x", "bias"), ("w_scale",)])
def test_only_the_gradients_asked_for_exist(wanted: tuple[str, ...]) -> None:
    leaves = {k: v.requires_grad_(k in wanted) for k, v in operands().items()}
    ops.quantized_conv2d(**leaves, signed_x=True, padding=1).sum().backward()
    assert {k for k, v in leaves.items() if v.grad is not None} == set(wanted)


def test_the_backward_keeps_no_quantized_copy() -> None:
    kept = []
    leaves = {k: v.requires_grad_(k in LEARNED) for k, v in operands().items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.quantized_conv2d(**leaves, signed_x=True, padding=1)
    own = {t.data_ptr() for t in leaves.values()}
    assert kept
    assert all(t.data_ptr() in own for t in kept)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("gradient", ["learned_step", "clip"])
def test_an_image_without_gradient_still_teaches_its_scale(
    layout: torch.memory_format, signed: bool, gradient: str
) -> None:
    options = {"signed_x": signed, "x_gradient": gradient, "padding": 1, "stride": 2}
    grads = []
    for image_gradient in (True, False):
        torch.manual_seed(0)
        leaves = {k: v.requires_grad_(k in LEARNED and k != "x_zero_point") for k, v in operands().items()}
        x = leaves.pop("x").detach().contiguous(memory_format=layout).requires_grad_(image_gradient)
        ops.quantized_conv2d(x, **leaves, **options).square().sum().backward()
        grads.append([leaves[k].grad for k in ("x_scale", "weight", "w_scale", "bias")])
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-5, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(grads[0][1:], grads[1][1:], strict=True))


def test_autocast_multiplies_in_bfloat16_and_keeps_the_codes() -> None:
    leaves = {k: v.requires_grad_(k in LEARNED) for k, v in operands().items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.quantized_conv2d(**leaves, signed_x=True, padding=1)
        mixed = {**leaves, "x": leaves["x"].detach().bfloat16()}
        assert ops.quantized_conv2d(**mixed, signed_x=True).dtype == torch.bfloat16
        quantized = ops.fake_quantize(leaves["x"], leaves["x_scale"], 0, 4)
        assert quantized.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    xq = ops.fake_quantize(leaves["x"], leaves["x_scale"], leaves["x_zero_point"], leaves["x_bits"])
    wq = ops.fake_quantize(leaves["weight"], leaves["w_scale"], 0, leaves["w_bits"], narrow_range=True, axis=0)
    expected = torch.nn.functional.conv2d(xq.bfloat16(), wq.bfloat16(), leaves["bias"].bfloat16(), padding=1)
    assert torch.equal(y, expected)
    y.float().square().sum().backward()
    for name in LEARNED:
        assert leaves[name].grad.dtype == torch.float32
    got = {name: leaves[name].grad.clone() for name in LEARNED}
    for name in LEARNED:
        leaves[name].grad = None
    ops.quantized_conv2d(**leaves, signed_x=True, padding=1).square().sum().backward()
    for name in LEARNED:
        close = (got[name] - leaves[name].grad).norm() / leaves[name].grad.norm()
        assert close < 0.03, name


def test_autocast_of_a_linear_layer_and_types_that_differ() -> None:
    x, weight, bias = torch.randn(3, 6), torch.randn(6, 6), torch.randn(6)
    arguments = (torch.tensor([0.1]), 0, 8, torch.full((6,), 0.1), 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.quantized_linear(x, weight, bias, *arguments, signed_x=True)
    assert y.dtype == torch.bfloat16
    same = ops.quantized_linear(x, weight, bias, *arguments, signed_x=True, out_dtype=torch.bfloat16)
    assert torch.equal(y, same)
    with pytest.raises(ValueError, match="expected one dtype, or out_dtype given"):
        ops.quantized_linear(x.bfloat16(), weight, bias, *arguments, signed_x=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(bias: bool, requires_grad: bool, layout: torch.memory_format) -> None:
    given = {k: v.requires_grad_(requires_grad and k in LEARNED) for k, v in operands().items()}
    x = given.pop("x").detach().contiguous(memory_format=layout).requires_grad_(requires_grad)
    arguments = (x, given["weight"], given["bias"] if bias else None, *list(given.values())[2:])
    opcheck(torch.ops.mixbit.quantized_conv2d.default, arguments, {"signed_x": True, "padding": [1, 1]})
    keywords = {"signed_x": True, "padding": [1, 1], "out_dtype": torch.bfloat16, "x_gradient": 1, "w_gradient": 1}
    opcheck(torch.ops.mixbit.quantized_conv2d.default, arguments, keywords)
    flat = (torch.randn(3, 6).requires_grad_(requires_grad), torch.randn(6, 6).requires_grad_(requires_grad))
    opcheck(torch.ops.mixbit.quantized_linear.default, (*flat, *arguments[2:]), {"signed_x": True})
    keywords = {"signed_x": True, "x_gradient": 1}
    opcheck(torch.ops.mixbit.quantized_linear.default, (*flat, *arguments[2:]), keywords)


def test_one_compiled_graph_covers_all_ops_and_bits_move_without_a_new_one() -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def statistics(x, scale, bits):
        """A number that comes out of every op without a gradient, small enough not to disturb the rest."""
        grid = {"signed": True, "narrow_range": False}
        _, noise = ops.quantization_noise(x, scale, bits, **grid)
        _, noises = ops.quantization_noise_foreach([x, x], [scale, scale], [bits, bits], **grid)
        low, high, total, squares, histogram = ops.observe(x, bins=8)
        found = ops.mse_scales(x, bits, **grid) + ops.mse_scales_from_histogram(histogram, low, high, bits, **grid)
        estimate = ops.quantization_noise_from_histogram(histogram, low, high, scale, bits, **grid)
        signal, power = ops.noise_power(x, x + 1)
        return 1e-6 * (noise + sum(noises) + total + squares + found + estimate + signal + power).float()

    def step(x, conv, linear, scale, bits):
        y = ops.fake_quantize(x, scale, 0, bits)
        y = sum(ops.fake_quantize_foreach([y, x], [scale, scale], [0, 0], [bits, bits]))
        y = y + statistics(y.detach(), scale.detach(), bits)
        y = ops.quantized_conv2d(y, conv, None, scale, 0, bits, scale, bits, signed_x=True, padding=1)
        return ops.quantized_linear(y.flatten(1), linear, None, scale, 0, bits, scale, bits, signed_x=True)

    counted = torch.compile(step, fullgraph=True, backend=backend)
    checked = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, conv, linear = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3), torch.randn(6, 80)
    for width in (8.0, 4.0, 2.0):
        scale, bits = torch.tensor([width / 40]), torch.tensor([width])
        counted(x, conv, linear, scale, bits)
        results = []
        for function in (step, checked):
            leaves = [t.clone().requires_grad_() for t in (x, conv, linear, scale)]
            y = function(*leaves, bits)
            y.square().sum().backward()
            results.append([y.detach(), *(t.grad for t in leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(graphs) == 1


def test_bad_operands_are_named() -> None:
    given = operands()
    with pytest.raises(ValueError, match="weight has dtype Half and x Float"):
        ops.quantized_conv2d(**{**given, "weight": given["weight"].half()}, signed_x=True)
    with pytest.raises(ValueError, match="weight has shape"):
        ops.quantized_conv2d(**{**given, "weight": torch.randn(6, 6)}, signed_x=True)
    with pytest.raises(ValueError, match=r"scale has shape \[5\]"):
        ops.quantized_conv2d(**{**given, "w_scale": torch.ones(5)}, signed_x=True)
    with pytest.raises(ValueError, match="w_gradient='clips' is not known"):
        ops.quantized_conv2d(**given, signed_x=True, w_gradient="clips")
