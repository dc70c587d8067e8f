"""Each vendor's own quantizer as its documentation calls it, with nothing of handheld's: the other side.

`python -m handheld.benchmarks.versus.quantized.vendors NAME MODEL FLOAT CALIBRATION ARTIFACT WORK` is one such
quantization; FLOAT is the vendor's own conversion to floats, CALIBRATION a .npz with an array of samples for each input
in the model's order, WORK gets its cost. Quantizers of PyTorch networks do not read FLOAT.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from handheld.export import files
from handheld.export.child import work_since
from handheld.export.process import die_with_parent


@dataclass(frozen=True)
class Given:
    """What a quantizer may start from."""

    name: str
    file: Path
    calibration: Path

    def model(self) -> tuple[Any, tuple[Any, ...]]:
        """The network, and an example of its inputs."""
        from handheld.models.source import load, refer

        loaded = load(refer(self.name))
        return loaded.module, loaded.args or tuple(loaded.kwargs.values())

    def batches(self) -> Iterator[tuple[np.ndarray[Any, Any], ...]]:
        """Inputs to calibrate with."""
        yield from zip(*np.load(self.calibration).values(), strict=True)


def coreml_linear(given: Given, artifact: Path) -> None:
    """coremltools' linear_quantize_weights: int8, symmetric, per channel."""
    import coremltools
    from coremltools.optimize import coreml

    config = coreml.OptimizationConfig(global_config=coreml.OpLinearQuantizerConfig())
    coreml.linear_quantize_weights(coremltools.models.MLModel(str(given.file)), config).save(str(artifact))


def coreml_palettize(bits: int) -> "Quantizer":
    """coremltools' palettize_weights by k-means: a table for each tensor."""

    def quantize(given: Given, artifact: Path) -> None:
        import coremltools
        from coremltools.optimize import coreml

        config = coreml.OptimizationConfig(global_config=coreml.OpPalettizerConfig(mode="kmeans", nbits=bits))
        coreml.palettize_weights(coremltools.models.MLModel(str(given.file)), config).save(str(artifact))

    return quantize


def coreai_linear(given: Given, artifact: Path) -> None:
    """coreai-opt's preset w8."""
    from coreai_opt.quantization import Quantizer, QuantizerConfig

    model, example = given.model()
    quantizer = Quantizer(model, QuantizerConfig.presets.w8())
    quantizer.prepare(example)
    _save_coreai(quantizer.finalize(), example, artifact)


def coreai_palettize(given: Given, artifact: Path) -> None:
    """coreai-opt's preset w4 of palettization: a table for 16 output channels."""
    from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig

    model, example = given.model()
    palettizer = KMeansPalettizer(model, KMeansPalettizerConfig.presets.w4())
    palettizer.prepare(example)
    _save_coreai(palettizer.finalize(), example, artifact)


def _save_coreai(model: Any, example: tuple[Any, ...], artifact: Path) -> None:
    import torch
    from coreai_torch import TorchConverter, get_decomp_table

    program = torch.export.export(model, example).run_decompositions(get_decomp_table())
    TorchConverter().add_exported_program(program).to_coreai().save_asset(artifact)


def litert(recipe: str) -> "Quantizer":
    """ai-edge-quantizer with a recipe of its own. Inputs and outputs stay float32, as everywhere else here."""

    def quantize(given: Given, artifact: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter
        from ai_edge_quantizer import algorithm_manager, qtyping, quantizer
        from ai_edge_quantizer import recipe as recipes

        tool = quantizer.Quantizer(str(given.file), getattr(recipes, recipe)())
        for boundary in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
            untouched = algorithm_manager.AlgorithmName.NO_QUANTIZE
            tool.update_quantization_recipe(".*", boundary, algorithm_key=untouched)
        calibrated = None
        if tool.need_calibration:
            (key, names), *_ = Interpreter(str(given.file)).get_signature_list().items()
            samples = [dict(zip(names["inputs"], batch, strict=True)) for batch in given.batches()]
            calibrated = tool.calibrate({key: samples})
        tool.quantize(calibrated).export_model(str(artifact), overwrite=True)

    return quantize


def executorch_static(given: Given, artifact: Path) -> None:
    """PT2E with XNNPACKQuantizer, symmetric and per channel, as ExecuTorch's XNNPACK page does."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    model, example = given.model()
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
    for batch in given.batches():
        prepared(*map(torch.from_numpy, batch))
    program = torch.export.export(convert_pt2e(prepared), example)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    artifact.write_bytes(lowered.buffer)


def onnx_dynamic(given: Given, artifact: Path) -> None:
    """onnxruntime's quantize_dynamic."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(_preprocessed(given, artifact), artifact)


def onnx_static(given: Given, artifact: Path) -> None:
    """onnxruntime's quantize_static: QDQ, one scale per tensor."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    file = _preprocessed(given, artifact)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            import onnx

            names = [value.name for value in onnx.load(file).graph.input]
            self.left = (dict(zip(names, batch, strict=True)) for batch in given.batches())

        def get_next(self) -> Any:
            return next(self.left, None)

    quantize_static(file, artifact, Reader())


def _preprocessed(given: Given, artifact: Path) -> Path:
    """As onnxruntime advises before it quantizes."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    file = artifact.with_suffix(".preprocessed.onnx")
    quant_pre_process(given.file, file)
    return file


Quantizer = Callable[[Given, Path], None]

QUANTIZERS: dict[str, Quantizer] = {
    "linear_quantize_weights": coreml_linear,
    "palettize_weights 6": coreml_palettize(6),
    "palettize_weights 4": coreml_palettize(4),
    "coreai-opt w8": coreai_linear,
    "coreai-opt palettize w4": coreai_palettize,
    "weight_only_wi8_afp32": litert("weight_only_wi8_afp32"),
    "dynamic_wi8_afp32": litert("dynamic_wi8_afp32"),
    "static_wi8_ai8": litert("static_wi8_ai8"),
    "XNNPACKQuantizer": executorch_static,
    "quantize_dynamic": onnx_dynamic,
    "quantize_static": onnx_static,
}


def main(name: str, model: str, float_file: str, calibration: str, artifact: str, record: str) -> None:
    """Quantize and leave what it cost."""
    start = time.monotonic()
    die_with_parent()
    QUANTIZERS[name](Given(model, Path(float_file), Path(calibration)), Path(artifact))
    files.write_record(Path(record), work_since(start))


if __name__ == "__main__":
    main(*sys.argv[1:])
