"""Keras files and SavedModels to LiteRT, by TensorFlow's own converter, and TensorFlow itself as the reference.

Not a `Format`: these models never are a PyTorch program. TensorFlow is an extra, and this runs in a child process.
"""

import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from handheld.errors import HandheldError, missing_extra
from handheld.export.formats.base import Signature, UnsupportedOperatorError
from handheld.export.formats.litert import LiteRT
from handheld.export.recipe import Recipe
from handheld.models.spec import TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]
Run = Callable[[Mapping[str, Array]], dict[str, Array]]

SIGNATURE = "serving_default"

_MISSING = re.compile(r"^\s*tf\.(\w+)\(", re.MULTILINE)


def convert_foreign(source: Path, destination: Path, recipe: Recipe) -> Signature:
    """Convert a `.keras` or `.h5` file or a SavedModel folder to the `.tflite` at `destination`.

    Its inputs and outputs keep their names. A batch dimension that the model leaves open becomes 1. `fp16` stores
    weights in float16, which TensorFlow's converter does itself. Raises `HandheldError` for a model that cannot be
    read, has other open dimensions, or holds code (Keras `Lambda` layers), and `UnsupportedOperatorError`.
    """
    tensorflow = _tensorflow()
    model = _Model(source)
    with tempfile.TemporaryDirectory() as folder:
        tensorflow.saved_model.save(tensorflow.Module(), folder, signatures={SIGNATURE: model.frozen()})
        converter = tensorflow.lite.TFLiteConverter.from_saved_model(folder, signature_keys=[SIGNATURE])
        if recipe.floats == "float16":
            converter.optimizations = [tensorflow.lite.Optimize.DEFAULT]
            converter.target_spec.supported_types = [tensorflow.float16]
        try:
            content = converter.convert()
        except Exception as error:  # ConverterError's module is private
            missing = dict.fromkeys(_MISSING.findall(str(error)))
            if not missing:
                raise
            raise UnsupportedOperatorError("LiteRT", [f"tf.{name}" for name in missing]) from error
    destination.write_bytes(content)
    written = LiteRT().inspect(destination)
    order = [spec.name for spec in model.inputs]
    inputs = sorted(written.inputs, key=lambda spec: order.index(spec.name))
    return Signature(inputs=tuple(inputs), outputs=written.outputs)


def reference(source: Path) -> tuple[Run, str]:
    """A function that runs the model in TensorFlow itself, from inputs by name to outputs by name; and what it is."""
    tensorflow = _tensorflow()
    model = _Model(source)

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = model.concrete(**{name: tensorflow.constant(array) for name, array in inputs.items()})
        return {name: output.numpy() for name, output in outputs.items()}

    return run, f"TensorFlow {tensorflow.__version__}"


class _Model:
    """A loaded model as one function with a static signature, by name: `concrete`, of the inputs `inputs`."""

    def __init__(self, source: Path) -> None:
        tensorflow = _tensorflow()
        self._loaded, call, specs = _saved_model(source) if source.is_dir() else _keras(source)  # owns the variables
        self.inputs = [TensorSpec(name, _static(name, spec.shape), spec.dtype.name) for name, spec in specs.items()]
        self._specs = {spec.name: tensorflow.TensorSpec(spec.shape, spec.dtype, name=spec.name) for spec in self.inputs}
        self.concrete = tensorflow.function(lambda **inputs: call(inputs)).get_concrete_function(**self._specs)

    def frozen(self) -> Any:
        """The function with constants in place of variables.

        TensorFlow 2.21's converter leaves the variables of a model inside a module in the file, without their values:
        what it computes is then memory's garbage.
        """
        tensorflow = _tensorflow()
        from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

        constant = convert_variables_to_constants_v2(self.concrete)

        def call(**inputs: Any) -> Any:
            outputs = constant(*tensorflow.nest.flatten(inputs))
            return tensorflow.nest.pack_sequence_as(self.concrete.structured_outputs, outputs)

        return tensorflow.function(call).get_concrete_function(**self._specs)


def _keras(source: Path) -> tuple[Any, Any, dict[str, Any]]:
    """A Keras model, how to call it with inputs by name, and the specs of its inputs."""
    tensorflow = _tensorflow()
    try:
        model = tensorflow.keras.models.load_model(source, compile=False, safe_mode=True)
    except Exception as error:  # zipfile, h5py, json and keras each raise their own
        if "lambda" in str(error).lower():
            raise HandheldError(
                f"{source} holds code of its own (a Lambda layer), which loading it would run.",
                hint="Replace the layer by one of Keras's own, and save the model again.",
            ) from error
        raise HandheldError(f"{source} is not a whole Keras file: {_first_line(error)}") from error
    specs = {tensor.name: tensor for tensor in model.inputs}
    taken = {name: tensorflow.TensorSpec(t.shape, t.dtype) for name, t in specs.items()}
    # A functional model names its outputs after the layers that give them; a Sequential has one, and no such list.
    names = getattr(model, "output_names", None) or [model.layers[-1].name]

    def call(inputs: Mapping[str, Any]) -> dict[str, Any]:
        tensors = [inputs[name] for name in specs]
        values = model(tensors if len(tensors) > 1 else tensors[0], training=False)
        return dict(zip(names, tensorflow.nest.flatten(values), strict=True))

    return model, call, taken


def _saved_model(source: Path) -> tuple[Any, Any, dict[str, Any]]:
    """A SavedModel, how to call its signature with inputs by name, and the specs of its inputs."""
    tensorflow = _tensorflow()
    try:
        loaded = tensorflow.saved_model.load(str(source))
    except Exception as error:  # OSError, protobuf's and TensorFlow's own
        raise HandheldError(f"{source} is not a whole SavedModel: {_first_line(error)}") from error
    if SIGNATURE not in loaded.signatures:
        available = ", ".join(loaded.signatures) or "none"
        raise HandheldError(
            f"{source} has no signature {SIGNATURE}; it has {available}.",
            hint=f"Save it with signatures={{{SIGNATURE!r}: function}}.",
        )
    signature = loaded.signatures[SIGNATURE]
    return loaded, lambda inputs: signature(**inputs), signature.structured_input_signature[1]


def _static(name: str, shape: Any) -> tuple[int, ...]:
    """The shape, an open batch dimension as 1. Raises `HandheldError` if another dimension is open."""
    if shape.rank is None or any(size is None for size in list(shape)[1:]):
        raise HandheldError(
            f"the input {name} has the shape {shape}: every dimension but the first must be fixed.",
            hint="Save the model with an input of the size that it will have on the phone.",
        )
    return tuple(1 if size is None else int(size) for size in shape)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tensorflow() -> Any:
    """TensorFlow, without its messages and without a GPU."""
    if importlib.util.find_spec("tensorflow") is None:
        raise missing_extra("converting Keras files and SavedModels", "tensorflow", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    import tensorflow

    return tensorflow
