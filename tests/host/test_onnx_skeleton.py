"""Reading an ONNX file without its weights: the model that onnx reads, the constants' bytes left in the file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handheld.export.formats.onnx_skeleton import Skeleton

onnx = pytest.importorskip("onnx")


def _write(path: Path) -> Any:
    """Large and small constants, in raw bytes and in typed fields, and a name that a subgraph uses too."""
    rng = np.random.default_rng(0)
    large = onnx.numpy_helper.from_array(rng.standard_normal((64, 64)).astype(np.float32), "large")
    halves = onnx.numpy_helper.from_array(rng.standard_normal(1000).astype(np.float16), "halves")
    small = onnx.numpy_helper.from_array(np.arange(4, dtype=np.int64), "small")
    typed = onnx.helper.make_tensor("typed", onnx.TensorProto.FLOAT, [600], rng.standard_normal(600))
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["large"], ["in"])],
        "inner",
        [],
        [onnx.helper.make_tensor_value_info("in", 1, [64, 64])],
        [onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "large")],
    )
    nodes = [
        onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner),
        onnx.helper.make_node("Add", ["y", "large"], ["z"]),
    ]
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.BOOL, [])
    z = onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [64, 64])
    graph = onnx.helper.make_graph(nodes, "graph", [x], [z], [large, small, typed, halves])
    model = onnx.helper.make_model(graph, doc_string="after the graph")
    path.write_bytes(model.SerializeToString())
    return model


def test_it_is_what_onnx_reads_and_holds_no_large_constant(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = _write(path)
    skeleton = Skeleton(path)
    constants = {tensor.name: tensor for tensor in skeleton.model.graph.initializer}
    assert {name for name, tensor in constants.items() if tensor.raw_data} == {"small"}
    assert len(constants["typed"].float_data) == 600
    assert skeleton.model.ByteSize() < path.stat().st_size - 64 * 64 * 4 - 2000 + 100
    for tensor, expected in zip(skeleton.model.graph.initializer, model.graph.initializer, strict=True):
        read = onnx.numpy_helper.to_array(skeleton.whole(tensor))
        assert np.array_equal(read, onnx.numpy_helper.to_array(expected))
        tensor.CopyFrom(skeleton.whole(tensor))
    assert skeleton.model.SerializeToString() == model.SerializeToString()


def test_a_file_cut_anywhere_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    _write(path)
    whole = path.read_bytes()
    for size in (1, 5, 30, len(whole) // 3, len(whole) // 2, len(whole) - 20_000):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut short|behind the end|wire type"):
            Skeleton(path)
    path.write_bytes(b"\x0f" + whole)
    with pytest.raises(ValueError, match="wire type 7"):
        Skeleton(path)
    path.write_bytes(b"\x08" + b"\xff" * 12)
    with pytest.raises(ValueError, match="more than ten bytes"):
        Skeleton(path)
