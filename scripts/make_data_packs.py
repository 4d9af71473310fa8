"""Makes the small packs in data/ from the full ones: usage make_data_packs.py FULL_DATA_FOLDER.

The packs hold what the demo, the notebooks and the default tests need; sources and licences are in data/NOTICE.md.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

TARGET = Path(__file__).resolve().parent.parent / "data"
CALIBRATION = 512
IMAGENET = 64
COCO_VAL, COCO_TRAIN = 32, 16
WEIGHTS = (
    "cifar10_resnet20_fp32",
    "cifar10_resnet56_fp32",
    "fastestdet_coco_fp32",
    "mlperf_tiny_resnet8_cifar10_fp32",
    "mlperf_tiny_vww_mobilenetv1_0.25_96_fp32",
    "mobilenet_v1_0.25_128_qat_uint8",
    "mobilenet_v2_1.0_224_qat_uint8",
    "squeezenet1_1_fp16",
)


def unmosaic(data: np.ndarray) -> np.ndarray:
    """Images [N, 32, 32, 3] of a mosaic with 50 images a row."""
    mosaic = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
    return mosaic.reshape(-1, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)


def mosaic(images: np.ndarray) -> np.ndarray:
    """A lossless WebP of images [N, 32, 32, 3], 50 a row (padded with black ones)."""
    rows = -(-len(images) // 50)
    padded = np.zeros((rows * 50, 32, 32, 3), np.uint8)
    padded[: len(images)] = images
    whole = padded.reshape(rows, 50, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(rows * 32, 1600, 3)
    file = io.BytesIO()
    Image.fromarray(whole).save(file, "WEBP", lossless=True, quality=100, method=6)
    return np.frombuffer(file.getvalue(), np.uint8)


def main() -> None:
    full = Path(sys.argv[1])
    (TARGET / "images").mkdir(parents=True, exist_ok=True)
    (TARGET / "weights").mkdir(parents=True, exist_ok=True)
    z = np.load(full / "images/cifar10_lossless_4k1k.npz", allow_pickle=False)
    np.savez(
        TARGET / "images/cifar10_512_1000.npz",
        train_mosaic_webp=mosaic(unmosaic(z["train_mosaic_webp"])[:CALIBRATION]),
        y_train=z["y_train"][:CALIBRATION].astype(np.uint8),
        test_mosaic_webp=z["test_mosaic_webp"],
        y_test=z["y_test"].astype(np.uint8),
    )
    z = np.load(full / "images/nips17_imagenet_compat_911_256px.npz", allow_pickle=False)
    # Evenly spread over the pack, so that many classes are present.
    chosen = np.linspace(0, len(z["label"]) - 1, IMAGENET).astype(int)
    files = [z["data"][z["off"][i] : z["off"][i + 1]] for i in chosen]
    np.savez(
        TARGET / "images/imagenet_compat_64.npz",
        data=np.concatenate(files),
        off=np.concatenate([[0], np.cumsum([len(f) for f in files])]),
        **{key: z[key][chosen] for key in ("label", "image_id", "author", "landing_url", "license")},
    )
    z = np.load(full / "images/coco2017_177val_178train_480px.npz", allow_pickle=False)
    boxes = z["boxes"]
    val = np.flatnonzero(z["split"])
    empty = [i for i in val if not (boxes[:, 0] == i).any()][:1]  # an image without boxes belongs to the tests
    spread = val[np.linspace(0, len(val) - 1, COCO_VAL - len(empty)).astype(int)]
    chosen = np.unique(np.concatenate([spread, empty, np.flatnonzero(~z["split"])[:COCO_TRAIN]]).astype(int))
    files = [z["data"][z["off"][i] : z["off"][i + 1]] for i in chosen]
    own = boxes[np.isin(boxes[:, 0], chosen)].copy()
    own[:, 0] = np.searchsorted(chosen, own[:, 0])
    np.savez(
        TARGET / "images/coco2017_48.npz",
        data=np.concatenate(files),
        off=np.concatenate([[0], np.cumsum([len(f) for f in files])]),
        boxes=own,
        **{key: z[key][chosen] for key in ("split", "file_name", "orig_wh")},
    )
    for name in WEIGHTS:
        shutil.copyfile(full / f"weights/{name}.npz", TARGET / f"weights/{name}.npz")
    for path in sorted(TARGET.rglob("*.npz")):
        print(f"{path.stat().st_size:>9} {path.relative_to(TARGET)}")


if __name__ == "__main__":
    main()
