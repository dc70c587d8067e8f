"""Each converter as its own documentation calls it, with nothing of handheld's: the other side of the comparison.

`python -m handheld.benchmarks.versus.defaults FORMAT MODEL ARTIFACT WORK` is one such conversion; WORK gets its cost.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from handheld.export import files
from handheld.export.child import work_since
from handheld.export.process import die_with_parent
from handheld.models.source import load, refer

Model = Any
"""A torch.nn.Module."""


def onnx(model: Model, example: tuple[Any, ...], path: Path) -> None:
    """torch.onnx.export with the dynamo exporter, which is its default."""
    import torch

    torch.onnx.export(model, example, str(path), dynamo=True, external_data=False)


def litert(model: Model, example: tuple[Any, ...], path: Path) -> None:
    """litert_torch.convert."""
    import litert_torch

    litert_torch.convert(model, example).export(str(path))


def executorch(model: Model, example: tuple[Any, ...], path: Path) -> None:
    """XNNPACK through to_edge_transform_and_lower, as ExecuTorch's getting-started page does."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(model, example)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    path.write_bytes(lowered.buffer)


def coreml(model: Model, example: tuple[Any, ...], path: Path) -> None:
    """coremltools.convert of an exported program: an ML Program in float16."""
    import coremltools
    import torch

    program = torch.export.export(model, example).run_decompositions({})
    coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS17).save(str(path))


def coreai(model: Model, example: tuple[Any, ...], path: Path) -> None:
    """coreai-torch's TorchConverter: float32."""
    import torch
    from coreai_torch import TorchConverter, get_decomp_table

    program = torch.export.export(model, example).run_decompositions(get_decomp_table())
    TorchConverter().add_exported_program(program).to_coreai().save_asset(path)


DEFAULTS: dict[str, Callable[[Model, tuple[Any, ...], Path], None]] = {
    "onnx": onnx,
    "litert": litert,
    "executorch": executorch,
    "coreml": coreml,
    "coreai": coreai,
}

RECIPES = {"onnx": "fp32", "litert": "fp32", "executorch": "fp32", "coreml": "fp16", "coreai": "fp32"}
"""What numbers each converter's defaults store: handheld's artifact is made with the same."""


def main(format_name: str, model_name: str, artifact: Path, record: Path) -> None:
    """Convert and leave what it cost."""
    start = time.monotonic()
    die_with_parent()
    model = load(refer(model_name))
    DEFAULTS[format_name](model.module, model.args or tuple(model.kwargs.values()), artifact)
    files.write_record(record, work_since(start))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
