"""Makes one tiny artifact with its vendor's own converter: `python tiny_artifacts.py FORMAT FILE`.

In a process of its own, because converters warn, print, and take seconds to import.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from handheld.export import files
from handheld.export.formats.base import Signature
from handheld.export.process import begin_child, end_child
from handheld.export.program import Program
from handheld.models.spec import TensorSpec

INPUTS = (TensorSpec("image", (1, 3, 16, 16)), TensorSpec("tokens", (1, 4), "int64", high=10))
OUTPUTS = (TensorSpec("scores", (1, 8)), TensorSpec("map", (1, 8, 14, 14)))


class Tiny(torch.nn.Module):
    """Two inputs, one of them integer; two outputs. A convolution wide enough to use a second thread."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, 3)
        self.embedding = torch.nn.Embedding(10, 8)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes and dtypes as in `INPUTS` and `OUTPUTS`."""
        features = self.convolution(image).relu()
        return features.mean((2, 3)) + self.embedding(tokens).mean(1), features


class Named(torch.nn.Module):
    """Gives its outputs by name: LiteRT's converter names them so."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `Tiny`."""
        outputs = self.module(image, tokens)
        return {spec.name: output for spec, output in zip(OUTPUTS, outputs, strict=True)}


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of the golden data."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand((1, 3, 16, 16), generator=generator), torch.randint(0, 10, (1, 4), generator=generator)


def program() -> Program:
    """The hub program of a seeded `Tiny`."""
    torch.manual_seed(0)
    return Program(torch.export.export(Tiny().eval(), example()), INPUTS, OUTPUTS)


def onnx(path: Path) -> None:
    names = ([spec.name for spec in INPUTS], [spec.name for spec in OUTPUTS])
    exported = program().exported
    torch.onnx.export(exported, (), path, dynamo=True, input_names=names[0], output_names=names[1], external_data=False)


def litert(path: Path) -> None:
    import litert_torch

    kwargs = {spec.name: tensor for spec, tensor in zip(INPUTS, example(), strict=True)}
    litert_torch.convert(Named(program().module()), sample_kwargs=kwargs).export(str(path))


def executorch(path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program().exported, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def coreai(path: Path) -> None:
    from coreai_torch import TorchConverter, get_decomp_table

    exported = program().exported.run_decompositions(get_decomp_table())
    names = {"input_names": [s.name for s in INPUTS], "output_names": [s.name for s in OUTPUTS]}
    TorchConverter().add_exported_program(exported, **names).to_coreai().save_asset(path)


def pt2(path: Path) -> None:
    program().save(path)


FORMATS: dict[str, tuple[Callable[[Path], None], str]] = {
    "onnx": (onnx, ".onnx"),
    "litert": (litert, ".tflite"),
    "executorch": (executorch, ".pte"),
    "coreai": (coreai, ".aimodel"),
    "pt2": (pt2, ".pt2"),
}
CASTS = {"litert": {"tokens": "int32"}, "coreai": {"tokens": "int32"}}


def main() -> None:
    """Write the artifact, its signature, and the eager model's inputs and outputs."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    convert, suffix = FORMATS[name]
    convert(folder / f"tiny{suffix}")
    signature = Signature.model_validate({"inputs": INPUTS, "outputs": OUTPUTS, "casts": CASTS.get(name, {})})
    files.write_record(folder / "signature.json", signature)
    tensors = [*zip(INPUTS, example(), strict=True), *zip(OUTPUTS, program().run(example()), strict=True)]
    np.savez(folder / "golden.npz", allow_pickle=False, **{spec.name: tensor.numpy() for spec, tensor in tensors})


if __name__ == "__main__":
    begin_child()
    main()
    end_child()
