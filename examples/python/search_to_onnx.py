"""A training loop of your own, from learned bit-widths to an ONNX file that is verified bit by bit, in plain PyTorch.

Three steps: bits are searched with the weights under a budget, the network is trained on at the bits that were found,
and what comes out is exported and compared with the integer reference. Everything between is an ordinary loop: nothing
of mixbit owns the model, the data or the optimizer.

Usage: python examples/python/search_to_onnx.py [--share 0.3] [--search-steps 96] [--output model.onnx]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import mixbit
from mixbit import search


def main() -> int:
    """Runs the example; 0 where the exported file computes what the integer reference does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.3, help="budget as a share of the 8-bit network's BOPs")
    parser.add_argument("--images", type=int, default=512, help="training images")
    parser.add_argument("--test-images", type=int, default=1000, help="test images")
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--search-steps", type=int, default=96, help="steps in which bits and weights are learned")
    parser.add_argument("--train-steps", type=int, default=48, help="steps at the bits that were found")
    parser.add_argument("--verify-images", type=int, default=64, help="test images that the file is verified on")
    parser.add_argument("--output", default="model.onnx", help="where the ONNX file goes")
    options = parser.parse_args()
    torch.manual_seed(0)

    model = mixbit.zoo.resnet8(weights=mixbit.zoo.data_dir() / "weights/mlperf_tiny_resnet8_cifar10_fp32.npz").eval()
    images, labels = mixbit.zoo.cifar10_pixels("train", options.images)
    images = images.float()
    calibration, example = list(images[:256].split(64)), images[:2]
    test_images, test_labels = mixbit.zoo.cifar10_pixels("test", options.test_images)
    test = list(zip(test_images.float().split(100), test_labels.split(100), strict=True))
    print(f"float      {mixbit.evaluate(model, test):6.2f} % top-1")

    # Bits are parameters now: a set of gates for each weight and each input of a layer.
    costs = mixbit.costs.bops(model, example)
    mixbit.prepare_(model, search.Gates(precisions=(2, 4, 8)), example)
    mixbit.calibrate_(model, calibration)
    recipe = searched(model, costs, options.share * costs.uniform(8, 8), images, labels, options)
    recipe.save(f"{options.output}.recipe.json")
    for name, layer in recipe.layers.items():
        print(f"  {name:24s} activation {layer.act} bit, weight {layer.weight} bit")
    print(f"cost {costs.total(recipe) / costs.uniform(8, 8):.3f} of the 8-bit network ({costs.unit})")

    # The same weights and grids at fixed bits; learned steps train the scales with the weights.
    mixbit.prepare_(model, recipe, example)
    trained(model, images, labels, options)

    # Normalization goes into weights and biases; sums and outputs get the grids on which the integer network has them.
    mixbit.fold_batchnorm_(model.eval(), example)
    mixbit.quantizers.record_tensors_(model, calibration, example, quantized=True)
    print(f"trained    {mixbit.evaluate(model, test):6.2f} % top-1 fake-quantized")

    written = mixbit.export.onnx(model, example, options.output, force=True, say=lambda limit: print(f"  {limit}"))
    size = written.bytes
    print(
        f"wrote {written.path}: {size.total} bytes, of these weights {size.weights}, scales {size.scales}, biases "
        f"{size.biases}, the rest {size.overhead}"
    )
    held_out = [(test_images[: options.verify_images].float(), test_labels[: options.verify_images])]
    report = mixbit.export.verify(written.path, model, held_out)
    print(report)
    return 0 if report.in_class else 1


def batches(images: Tensor, labels: Tensor, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches, mirrored at random."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        picked = torch.randperm(len(images), generator=generator)[:size]
        x = images[picked]
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        yield torch.where(mirrored[:, None, None, None], x.flip(3), x), labels[picked]


def searched(
    model: nn.Module,
    costs: mixbit.CostTable,
    budget: float,
    images: Tensor,
    labels: Tensor,
    options: argparse.Namespace,
) -> mixbit.Recipe:
    """Learns bits and weights together; the recipe costs at most the budget."""
    steps = options.search_steps
    penalty = search.Penalty(model, costs, budget=budget, total_steps=steps)
    weights = [p for name, p in model.named_parameters() if "quantizer" not in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(weights, lr=0.002, momentum=0.9),
        # Momentum would make gates coast past the point at which they should stop, hence the betas.
        torch.optim.Adam(search.param_groups(model, lr=0.05, total_steps=steps), betas=(0.5, 0.99)),
    ]
    model.train()
    for step, (x, y) in enumerate(batches(images, labels, options.batch, steps, seed=1)):
        loss = nn.functional.cross_entropy(model(x), y)
        # The penalty is one more term of the loss; each call is a step of its schedule.
        price = penalty()
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss + price).backward()
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % max(1, steps // 4) == 0:
            share = sum(penalty.costs().values()) / costs.uniform(8, 8)
            print(f"search {step + 1:4d}/{steps}: loss {loss.item():.3f}, cost of the bits chosen now {share:.3f}")
    return search.extract(model.eval())


def trained(model: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    """Quantization-aware training at the widths of the recipe."""
    steps = options.train_steps
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    model.train()
    for step, (x, y) in enumerate(batches(images, labels, options.batch, steps, seed=2)):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 4) == 0:
            print(f"train  {step + 1:4d}/{steps}: loss {loss.item():.3f}")


if __name__ == "__main__":
    sys.exit(main())
