"""Bits for every layer of a trained network, without training: analysis, assignment, evaluation, in one page.

Usage: python examples/python/analyze_and_assign.py [--images 256] [--share 0.4] [--output recipe.json]
"""

from __future__ import annotations

import argparse

import mixbit


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--test-images", type=int, default=1000, help="test images")
    parser.add_argument("--share", type=float, default=0.4, help="budget as a share of the 8-bit network's BOPs")
    parser.add_argument("--output", default="recipe.json", help="where the recipe goes")
    options = parser.parse_args()

    weights = mixbit.zoo.data_dir() / "weights" / "cifar10_resnet20_fp32.npz"
    model = mixbit.zoo.cifar_resnet(20, weights=weights).eval()
    images, _ = mixbit.zoo.cifar10("train", options.images)
    batches = list(images.split(64))
    example = images[:2]
    test_images, test_labels = mixbit.zoo.cifar10("test", options.test_images)
    test = list(zip(test_images.split(100), test_labels.split(100), strict=True))

    print(f"float            {mixbit.evaluate(model, test, metric='top1'):6.2f} % top-1")

    # One table for all questions: SQNR of every layer at every pair of activation and weight bits.
    table = mixbit.analyze(model, batches)
    costs = mixbit.costs.bops(model, example)
    budget = options.share * costs.uniform(8, 8)
    recipe = mixbit.assign(table, costs, budget=budget, method="ilp")
    recipe.save(options.output)
    for name in table.layers:
        print(f"  {name:24s} activation {recipe[name].act} bit, weight {recipe[name].weight} bit")
    print(f"cost {costs.total(recipe) / costs.uniform(8, 8):.3f} of the 8-bit network ({costs.unit})")

    # The network as it will run: batch norm folded, quantizers on, ranges calibrated.
    mixbit.fold_batchnorm_(model, example)
    mixbit.prepare_(model, recipe, example)
    mixbit.calibrate_(model, batches, example=example)
    print(f"fake-quantized   {mixbit.evaluate(model, test, metric='top1'):6.2f} % top-1")
    print(f"integer network  {mixbit.evaluate(model, test, metric='top1', integer=True):6.2f} % top-1")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
