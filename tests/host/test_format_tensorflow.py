"""Keras files and SavedModels, converted by TensorFlow's converter and compared with TensorFlow."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handheld.errors import HandheldError
from handheld.export.formats.base import Signature, UnsupportedOperatorError
from handheld.export.formats.litert import LiteRT
from handheld.export.formats.tensorflow import convert_foreign, reference
from handheld.export.metrics import Array, psnr_db
from handheld.export.recipe import FLOATS
from handheld.models.spec import TensorSpec

tf: Any = pytest.importorskip("tensorflow", reason='needs TensorFlow: pip install "handheld[tensorflow]"')
interpreters = pytest.importorskip("ai_edge_litert.interpreter")

# Keras 3.15 reads TensorFlow's variables by a protocol that numpy 2 has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

IMAGE, IDS = TensorSpec("image", (1, 16, 16, 3)), TensorSpec("ids", (1, 5), "int32")
OUTPUTS = {TensorSpec("scores", (1, 6)), TensorSpec("map", (1, 8, 8, 12))}


def keras_model() -> Any:
    """Two inputs, two outputs; batch-norm statistics and biases of its own."""
    layers = tf.keras.layers
    tf.keras.utils.set_random_seed(0)
    image, ids = tf.keras.Input((16, 16, 3), name="image"), tf.keras.Input((5,), name="ids", dtype="int32")
    x = layers.Conv2D(12, 3, strides=2, padding="same", bias_initializer="random_normal")(image)
    moving = {"moving_mean_initializer": "random_normal", "moving_variance_initializer": "random_uniform"}
    x = layers.Activation("gelu", name="map")(layers.BatchNormalization(epsilon=0.1, **moving)(x))
    tokens = layers.GlobalAveragePooling1D()(layers.Embedding(50, 12)(ids))
    scores = layers.Dense(6, name="scores")(layers.Add()([layers.GlobalAveragePooling2D()(x), tokens]))
    return tf.keras.Model([image, ids], {"scores": scores, "map": x})


@pytest.fixture(scope="module")
def keras_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keras") / "model.keras"
    keras_model().save(path)
    return path


def saved_model(folder: Path, function: Any, *specs: Any) -> Path:
    module = tf.Module()
    module.serve = tf.function(function)
    concrete = module.serve.get_concrete_function(*specs)
    tf.saved_model.save(module, str(folder), signatures=concrete)
    return folder


def run(path: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    outputs: dict[str, Array] = interpreters.Interpreter(str(path)).get_signature_runner("serving_default")(**inputs)
    return outputs


def draw(signature: Signature) -> dict[str, Array]:
    generator = np.random.default_rng(0)
    return {
        spec.name: generator.standard_normal(spec.shape, np.float32)
        if spec.dtype == "float32"
        else generator.integers(0, 50, spec.shape).astype(spec.dtype)
        for spec in signature.inputs
    }


@pytest.mark.parametrize(("recipe", "gate_db"), [("fp32", 100), ("fp16", 50)])
def test_a_keras_file(keras_file: Path, tmp_path: Path, recipe: str, gate_db: float) -> None:
    path = tmp_path / "model.tflite"
    signature = convert_foreign(keras_file, path, FLOATS[recipe])
    assert signature.inputs == (IMAGE, IDS) and set(signature.outputs) == OUTPUTS and signature.casts == {}
    inspection = LiteRT().inspect(path)
    assert (set(inspection.inputs), set(inspection.outputs)) == ({IMAGE, IDS}, OUTPUTS)
    assert ("float16" in inspection.weights) == (recipe == "fp16")
    inputs = draw(signature)
    expected = keras_model()(inputs, training=False)
    compute, what = reference(keras_file)
    assert what == f"TensorFlow {tf.__version__}"
    theirs, ours = compute(inputs), run(path, inputs)
    for name in ("scores", "map"):
        np.testing.assert_allclose(theirs[name], expected[name].numpy(), atol=1e-6)
        assert psnr_db(theirs[name], ours[name]) >= gate_db


def test_a_saved_model(tmp_path: Path) -> None:
    def serve(x: Any, unused: Any) -> dict[str, Any]:  # noqa: ARG001
        return {"double": x * 2.0, "order": tf.argsort(x, axis=-1), "same": x}

    specs = tf.TensorSpec((None, 4), tf.float32, name="x"), tf.TensorSpec((2,), tf.int64, name="unused")
    source = saved_model(tmp_path / "source", serve, *specs)
    signature = convert_foreign(source, tmp_path / "model.tflite", FLOATS["fp32"])
    assert {str(spec) for spec in signature.inputs} == {"x=1x4:float32", "unused=2:int64"}
    assert {str(spec) for spec in signature.outputs} == {"double=1x4:float32", "order=1x4:int32", "same=1x4:float32"}
    inputs = draw(signature)
    theirs, ours = reference(source)[0](inputs), run(tmp_path / "model.tflite", inputs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


def test_an_operator_that_litert_lacks(tmp_path: Path) -> None:
    source = saved_model(
        tmp_path / "source", lambda x: {"values": tf.linalg.svd(x, compute_uv=False)}, tf.TensorSpec((4, 4), name="x")
    )
    with pytest.raises(UnsupportedOperatorError) as caught:
        convert_foreign(source, tmp_path / "model.tflite", FLOATS["fp32"])
    assert caught.value.message == "LiteRT has no operator for tf.Svd."
    assert not (tmp_path / "model.tflite").exists()


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_code_in_a_keras_file_is_not_run(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"model{suffix}"
    inner = tf.keras.layers.Lambda(lambda x: x + 1)
    model = tf.keras.Sequential([tf.keras.Input((4,)), inner])
    model.save(source)
    with pytest.raises(HandheldError, match=r"holds code of its own \(a Lambda layer\)"):
        convert_foreign(source, tmp_path / "model.tflite", FLOATS["fp32"])


def test_a_sequential_model_has_its_last_layers_output(tmp_path: Path) -> None:
    source = tmp_path / "sequential.keras"
    tf.keras.Sequential([tf.keras.Input((4,), name="x"), tf.keras.layers.Dense(3, name="scores")]).save(source)
    signature = convert_foreign(source, tmp_path / "model.tflite", FLOATS["fp32"])
    assert [(s.name, s.shape) for s in (*signature.inputs, *signature.outputs)] == [("x", (1, 4)), ("scores", (1, 3))]


def test_damage(keras_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.keras"
    whole = keras_file.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(HandheldError, match=r"half\.keras is not a whole Keras file"):
            convert_foreign(path, tmp_path / "model.tflite", FLOATS["fp32"])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(whole[:100])
    with pytest.raises(HandheldError, match="folder is not a whole SavedModel"):
        reference(folder)


def test_what_the_phone_cannot_know(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "a", lambda x: {"y": x + 1.0}, tf.TensorSpec((1, None), name="x"))
    with pytest.raises(HandheldError, match="every dimension but the first must be fixed"):
        reference(source)
    module = tf.Module()
    tf.saved_model.save(module, str(tmp_path / "b"))
    with pytest.raises(HandheldError, match="has no signature serving_default; it has none"):
        reference(tmp_path / "b")
