"""Quantizes tiny networks and converts them: `python quantized_files.py FORMAT FOLDER NETWORK:RECIPE…`.

In a process of its own, as handheld does it. Each case leaves NETWORK.RECIPE and the format's suffix, and
NETWORK.RECIPE.npz: an input, what the quantized program of the hub makes of it, and the hub's integers and scales.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from handheld.export import formats
from handheld.export.formats.stored import Stored, StoredWeight
from handheld.export.process import begin_child, end_child
from handheld.export.recipe import SMALLEST, Recipe, Rule, resolve

Array = np.ndarray[Any, np.dtype[Any]]

IMAGE, IDS = (1, 3, 16, 16), (1, 4)
DEPTHWISE = "depthwise.weight"


def recipe_of(name: str, floats: str = "fp32") -> Recipe:
    """The recipe called `name`, for small weights too; `kept-…` keeps the layer `middle` in floats, `linear-…` all
    convolutions."""
    return _recipe_of(name, floats).model_copy(update={"smallest": SMALLEST})


def _recipe_of(name: str, floats: str) -> Recipe:
    if name.startswith("linear-"):
        rest = resolve(name.removeprefix("linear-"), floats)
        rule = rest.rules[0].model_copy(update={"operators": ("linear", "embedding")})
        return rest.model_copy(update={"name": name, "rules": (rule,)})
    if not name.startswith("kept-"):
        return resolve(name, floats)
    rest = resolve(name.removeprefix("kept-"), floats)
    return rest.model_copy(update={"name": name, "rules": (Rule(modules=("middle",)), *rest.rules)})


def main(format_name: str, folder: Path, cases: list[str]) -> None:
    """Convert the cases."""
    for blocked in formats.get(format_name).blocked_imports:
        sys.modules[blocked] = None  # type: ignore[assignment]
    import torch
    from torch import nn
    from torch.nn import functional

    from handheld.export import rewrites
    from handheld.export.formats import integer_graph
    from handheld.export.formats.base import Options
    from handheld.export.formats.overhead import without_overhead
    from handheld.export.program import Program
    from handheld.export.quantize import apply, ops
    from handheld.models.spec import TensorSpec

    class Plain(nn.Module):
        """Every kind of layer, a residual addition, activations that kernels fuse and one that they do not."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 64, 3, 2, 1)
            self.depthwise = nn.Conv2d(64, 64, 3, 1, 1, groups=64)
            self.point = nn.Conv2d(64, 64, 1)
            self.wide = nn.Linear(64, 96)
            self.narrow = nn.Linear(96, 32)
            self.table = nn.Embedding(40, 64)

        def forward(self, image: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = torch.relu(self.stem(image))
            x = x + self.point(functional.relu6(self.depthwise(x)))
            x = x.flatten(2).transpose(1, 2)
            return self.narrow(functional.gelu(self.wide(x))), self.table(ids)

    class Odd(nn.Module):
        """A layer of one channel, weights of nothing but 0, an outlier, a layer to be kept, a weight used twice, an
        embedding that takes 32-bit integers."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 3, 2, 1)
            self.zero = nn.Conv2d(32, 32, 1)
            nn.init.zeros_(self.zero.weight)
            self.one = nn.Conv2d(32, 1, 3, 1, 1)
            self.middle = nn.Conv2d(32, 32, 1)
            self.tied = nn.Linear(32, 32)
            self.outlier = nn.Linear(32, 32)
            nn.init.constant_(self.outlier.weight[3:4, 5:6], 1e6)
            self.table = nn.Embedding(40, 64)

        def forward(self, image: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = torch.relu(self.stem(image))
            x = x + self.zero(x)
            x = torch.relu(self.middle(x + self.one(x))).flatten(2).transpose(1, 2)
            return self.outlier(self.tied(torch.relu(self.tied(x)))), self.table(ids.int())

    class Normed(nn.Module):
        """Layers behind a norm and before attention, whose scales a converter may be tempted to put into theirs."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 3, 2, 1)
            self.norm, self.last = nn.LayerNorm(32), nn.LayerNorm(32)
            self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
            for norm in (self.norm, self.last):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.uniform_(norm.bias, -0.5, 0.5)

        def forward(self, image: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = self.norm(self.stem(image).flatten(2).transpose(1, 2))
            query, key, value = (layer(x)[:, None] for layer in (self.query, self.key, self.value))
            x = x + functional.scaled_dot_product_attention(query, key, value)[:, 0]
            return self.out(self.last(x)), ids + 1

    converter = formats.FORMATS[format_name]
    inputs = (TensorSpec("image", IMAGE), TensorSpec("ids", IDS, "int64"))
    generator = torch.Generator().manual_seed(3)
    batches = [
        (torch.randn(IMAGE, generator=generator), torch.randint(0, 40, IDS, generator=generator)) for _ in range(3)
    ]
    with without_overhead():
        for case in cases:
            network, name = case.split(":")
            torch.manual_seed(1)
            module = {"plain": Plain, "odd": Odd, "normed": Normed}[network]().eval()
            exported = torch.export.export(module, (torch.zeros(IMAGE), torch.zeros(IDS, dtype=torch.int64)))
            outputs = tuple(
                TensorSpec(label, tuple(value.shape), str(value.dtype).removeprefix("torch."))  # type: ignore[arg-type]
                for label, value in zip(("features", "rows"), module(*batches[0]), strict=True)
            )
            recipe = recipe_of(name)
            quantized = apply.quantize(apply.prepared(Program(exported, inputs, outputs)), recipe, batches)
            held: dict[str, Any] = {"image": batches[0][0].numpy(), "ids": batches[0][1].numpy()}
            held["features"], held["rows"] = (tensor.numpy() for tensor in quantized.run(batches[0]))
            for weight in integer_graph.weights(quantized.module()):
                held[f"values:{weight.path}"] = weight.values.numpy()
                if weight.scale is not None:
                    held[f"scale:{weight.path}"] = weight.scale.numpy()
            held["activations"] = np.array(
                [node.args[1:3] for node in quantized.exported.graph.nodes if node.target is ops.ACTIVATIONS[0]]
            )
            path = folder / f"{network}.{name}{converter.suffix}"
            program, _ = rewrites.apply(quantized, format_name)
            converter.convert(program, recipe, path, Options())
            np.savez(path.with_name(f"{network}.{name}.npz"), **held)


class Files:
    """What `main` left in a folder."""

    def __init__(self, format_name: str, folder: Path, cases: list[str]) -> None:
        self.folder = folder
        done = subprocess.run(
            [sys.executable, __file__, format_name, str(folder), *cases],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"

    def path(self, case: str, suffix: str) -> Path:
        return self.folder / f"{case.replace(':', '.')}{suffix}"

    def held(self, case: str) -> dict[str, Array]:
        """Inputs, outputs, integers and scales of the hub."""
        with np.load(self.path(case, ".npz")) as file:
            return dict(file)


def weights_of_hub(held: dict[str, Array]) -> dict[str, tuple[Array, Array | None]]:
    """Path -> integers (or floats) and scales, in the order in which the hub uses them."""
    paths = [key.removeprefix("values:") for key in held if key.startswith("values:")]
    return {path: (held[f"values:{path}"], held.get(f"scale:{path}")) for path in paths}


def in_channels_last(path: str, values: Array) -> Array:
    """A convolution's weight, or its scales, in the order of axes that the formats have: OHWI, or 1HWO depthwise."""
    if values.ndim != 4:
        return values
    return values.transpose((1, 2, 3, 0) if path.endswith(DEPTHWISE) else (0, 2, 3, 1))


def assert_holds(found: StoredWeight, path: str, values: Array, scale: Array | None) -> None:
    """The file has the hub's very integers and scales, and zero points of 0."""
    assert np.array_equal(found.values, in_channels_last(path, values)), path
    assert (found.scale is None) == (scale is None), path
    if scale is not None and found.scale is not None:
        assert (found.scale == in_channels_last(path, scale)).all(), path
        assert found.size_bytes <= found.bits * values.size / 8 + 12 * scale.size, "with zero points of 64 bits"
    assert found.zero_point is None or not found.zero_point.any()


def assert_scales(stored: Stored, held: dict[str, Array], dtype: str) -> None:
    """All integer values between operators have a scale and a zero point of the hub's."""
    expected = {(float(np.float32(scale)), int(zero)) for scale, zero in held["activations"]}
    found = {(float(np.float32(value.scale)), value.zero_point) for value in stored.activations}
    assert len(found) >= 5 and found <= expected
    assert {value.dtype for value in stored.activations} == {dtype}


def assert_size(path: Path, held: dict[str, Array], bits: int) -> None:
    """The file has as many bytes as the hub's integers and scales need, within 3 % and 64 KB."""
    weights = weights_of_hub(held).values()
    needed = sum(bits * values.size / 8 + (0 if scale is None else 4 * scale.size) for values, scale in weights)
    assert path.stat().st_size <= 1.03 * needed + 65536


if __name__ == "__main__":
    begin_child()
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
    end_child()
