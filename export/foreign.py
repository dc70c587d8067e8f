"""Models that are no PyTorch programs: an `.onnx`, a Keras file, a SavedModel. Runs in a child process.

Each becomes one artifact, with golden data from its own framework: an `.onnx` is checked, copied and compared with
ONNX's reference evaluator (numpy, no code shared with onnxruntime); Keras files and SavedModels are converted by
TensorFlow and compared with TensorFlow.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from handheld.errors import HandheldError
from handheld.export import files, formats, golden
from handheld.export.formats.base import Inspection, Signature
from handheld.export.manifest import Case, Golden
from handheld.export.recipe import Recipe
from handheld.models import inputs as drawing
from handheld.models.source import INPUT_HELP, ModelReference
from handheld.models.spec import TensorSpec

Run = Callable[[dict[str, golden.Array]], dict[str, golden.Array]]


def take_in(model: ModelReference, recipe: Recipe, folder: Path, artifact: str) -> tuple[Signature, Inspection]:
    """Put the artifact and its golden data into `folder`."""
    source, destination = Path(model.target), folder / artifact
    if model.kind == "onnx":
        signature = _copy_onnx(source, destination, model)
        run, reference = _onnx_reference(source)
    else:
        from handheld.export.formats import tensorflow

        signature = tensorflow.convert_foreign(source, destination, recipe)
        run, reference = tensorflow.reference(source)
    signature = _bounded(signature, model)
    _write_golden(folder, model, signature, run, reference)
    inspection = formats.get("onnx" if model.kind == "onnx" else "litert").inspect(destination)
    return signature, inspection


def _bounded(signature: Signature, model: ModelReference) -> Signature:
    """Integer inputs get the bounds that --input gives them."""
    bounds = {spec.name: spec.high for spec in model.inputs}
    inputs = tuple(TensorSpec(s.name, s.shape, s.dtype, bounds.get(s.name, s.high)) for s in signature.inputs)
    return signature.model_copy(update={"inputs": inputs})


def _write_golden(folder: Path, model: ModelReference, signature: Signature, run: Run, reference: str) -> None:
    record = Golden(
        model=model.label,
        program_sha256=files.sha256_of(Path(model.target)),
        weights=f"as in {Path(model.target).name}",
        reference=reference,
        inputs=signature.inputs,
        outputs=signature.outputs,
        quality="psnr",
        parameters=None,
        cases=(),
        arrays_sha256="",
    )
    cases, results = [], []
    for case in drawing.cases(None):
        arrays = golden.draw(record, Case(kind=case.kind, seed=case.seed, sha256=""))
        cases.append(Case(kind=case.kind, seed=case.seed, sha256=golden.hash_of(arrays)))
        outputs = run({spec.name: array for spec, array in zip(signature.inputs, arrays, strict=True)})
        results.append(tuple(np.asarray(outputs[spec.name]) for spec in signature.outputs))
    record = record.model_copy(update={"cases": tuple(cases)})
    golden.write(folder, record, [None] * len(cases), results)


def _copy_onnx(source: Path, destination: Path, model: ModelReference) -> Signature:
    import onnx

    try:
        onnx.checker.check_model(str(source))
        loaded = onnx.load(str(source))
    except Exception as error:  # the checker, protobuf and the external-data reader each raise their own
        raise HandheldError(f"{source} is no whole ONNX model: {str(error).strip().splitlines()[0]}") from error
    asked = {spec.name: spec for spec in model.inputs}
    constants = {tensor.name for tensor in loaded.graph.initializer}
    inputs = tuple(_spec(value, asked) for value in loaded.graph.input if value.name not in constants)
    outputs = _inferred_outputs(loaded, inputs, source)
    external = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in loaded.graph.initializer)
    if external or loaded.ByteSize() > 2**31 - 1:
        onnx.save(loaded, str(destination), save_as_external_data=True, location=f"{destination.name}.data")
    else:
        destination.write_bytes(source.read_bytes())
    return Signature(inputs=inputs, outputs=outputs)


def _spec(value: Any, asked: dict[str, TensorSpec]) -> TensorSpec:
    import onnx

    tensor = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    shape = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    wanted = asked.get(value.name)
    if wanted and len(wanted.shape) == len(shape):
        shape = [size if size is not None else w for size, w in zip(shape, wanted.shape, strict=True)]
    if any(size is None for size in shape):
        text = "x".join("?" if size is None else str(size) for size in shape)
        raise HandheldError(f"the input {value.name} has an open shape ({text}).", hint=f"Fix it: {INPUT_HELP}")
    made: Any = TensorSpec(value.name, tuple(shape), dtype, wanted.high if wanted else None)  # type: ignore[arg-type]
    return made  # type: ignore[no-any-return]


def _inferred_outputs(loaded: Any, inputs: tuple[TensorSpec, ...], source: Path) -> tuple[TensorSpec, ...]:
    """The outputs as the reference gives them on zeros: a file may leave their shapes open."""
    run, _ = _onnx_reference(source)
    given = run({spec.name: np.zeros(spec.shape, spec.dtype) for spec in inputs})
    names = [value.name for value in loaded.graph.output]
    made: Any = tuple(TensorSpec(name, given[name].shape, given[name].dtype.name) for name in names)  # type: ignore[arg-type]
    return made  # type: ignore[no-any-return]


def _onnx_reference(source: Path) -> tuple[Run, str]:
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(source))

    def run(inputs: dict[str, golden.Array]) -> dict[str, golden.Array]:
        try:
            values = evaluator.run(None, inputs)
        except Exception as error:  # operators raise whatever numpy raises
            raise HandheldError(f"ONNX's reference evaluator fails on {source.name}: {error}") from error
        return dict(zip(evaluator.output_names, map(np.asarray, values), strict=True))

    return run, f"onnx {onnx.__version__} reference evaluator (numpy)"
