"""Writes CIFAR-10 images as the binary records that examples/cpp/qat reads: one label byte, 3072 pixel bytes.

Usage: python scripts/cifar_binary.py OUTPUT [--split train|test]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mixbit.files import write_bytes
from mixbit.zoo.data import cifar10_pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    options = parser.parse_args()
    images, labels = cifar10_pixels(options.split)
    records = torch.cat([labels.to(torch.uint8)[:, None], images.flatten(1)], 1)
    write_bytes(options.output, records.numpy().tobytes())
    print(f"{len(records)} images in {options.output}")


if __name__ == "__main__":
    main()
