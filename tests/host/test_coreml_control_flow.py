"""Core ML's branches, loops, lists, states and classifiers, in programs written by hand."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_one import Array, compute, immediate, value_type
from hypothesis import given, settings
from hypothesis import strategies as st

from handheld.export.formats.coreml_package import schema
from handheld.runtimes.coreml import open_package
from handheld.runtimes.coreml.errors import CoreMLError
from handheld.runtimes.coreml.operators import TABLE, control_flow
from handheld.runtimes.coreml.operators.base import TensorList

CASES = settings(max_examples=30, deadline=None, derandomize=True)

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
seeds = st.integers(0, 2**31)


class Written:
    """A program in the making. Names stand for values, everything else for constants."""

    def __init__(self, opset: int = 18, **inputs: Array) -> None:
        self.model = schema("Model_pb2").Model(specificationVersion=opset - 9)
        self.model.mlProgram.version = 1
        self.function = self.model.mlProgram.functions["main"]
        self.function.opset = f"CoreML{opset - 10}"
        self.block = self.function.block_specializations[self.function.opset]
        self.fed = {name: np.atleast_1d(array) for name, array in inputs.items()}
        for name, array in inputs.items():
            value_type(self.function.inputs.add(name=name).type, array)
            described = self.model.description.input.add(name=name).type.multiArrayType
            described.shape.extend(array.shape or (1,))
            described.dataType = type(described).FLOAT32

    def state(self, name: str, like: Array) -> None:
        wrapped = schema("MIL_pb2").ValueType()
        value_type(wrapped, like)
        self.function.inputs.add(name=name).type.stateType.wrappedType.CopyFrom(wrapped)
        array = self.model.description.state.add(name=name).type.stateType.arrayType
        array.shape.extend(like.shape)
        array.dataType = type(array).FLOAT16

    def add(self, block: Any, operator: str, output: str | None, like: Array | None, **inputs: Any) -> Any:
        """One operation; without `like`, the output is a list."""
        operation = block.operations.add(type=operator)
        for key, given_input in inputs.items():
            for one in given_input if isinstance(given_input, list) else [given_input]:
                binding = operation.inputs[key].arguments.add()
                if isinstance(one, str) and key != "dtype":
                    binding.name = one
                else:
                    immediate(binding.value, one)
        if output is not None:
            typed = operation.outputs.add(name=output).type
            if like is None:
                value_type(typed.listType.type, np.zeros(2, np.float32))
            else:
                value_type(typed, like)
        return operation

    def run(self, outputs: dict[str, Array], state: Any = None) -> dict[str, Any]:
        """What is made, by name."""
        for name, like in outputs.items():
            self.block.outputs.append(name)
            described = self.model.description.output.add(name=name).type.multiArrayType
            described.shape.extend(like.shape)
            described.dataType = type(described).FLOAT32
        seen: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "one.mlmodel"
            path.write_bytes(self.model.SerializeToString())
            model = open_package(path)
            model.predict(self.fed, state, observe=lambda _, name, value: seen.update({name: value}))
        return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in seen.items()}


@CASES
@given(shapes, st.sampled_from(["float32", "float16", "int32", "bool"]), st.data())
def test_select(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(seeds))
    sizes = [[size if data.draw(st.booleans()) else 1 for size in shape] for _ in range(3)]
    sizes = [size[data.draw(st.integers(0, len(size))) :] for size in sizes]
    cond, a, b = (
        np.asarray(random.integers(0, 2, sizes[0])).astype(bool),
        *(np.asarray(random.integers(-9, 9, size)).astype(dtype) for size in sizes[1:]),
    )
    expected = np.where(cond, a, b)
    (found,) = compute("select", {"cond": cond, "a": a, "b": b}, expected)
    np.testing.assert_array_equal(found, expected)


def test_select_of_nothing_is_where_the_condition_holds() -> None:
    cond = np.array([[True, False], [True, True]])
    expected = np.argwhere(cond).astype(np.int32)
    (found,) = compute("select", {"cond": cond}, expected)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("pred", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int32])
def test_cond(pred: bool, dtype: Any) -> None:
    """Blocks see what is around them, and what they make is not rounded or widened on the way out."""
    x = np.array([1, 2, 3], dtype)
    program = Written(pred=np.array(pred), x=x)
    program.add(program.block, "reverse", "y", x, x="x")
    operation = program.add(program.block, "cond", "out", x, pred="pred")
    value_type(operation.outputs.add(name="other").type, np.zeros(6, dtype))
    for first, second in (("x", "y"), ("y", "x")):
        block = operation.blocks.add()
        program.add(block, "identity", f"{first}_kept", x, x=first)
        program.add(block, "concat", f"{first}_joined", np.zeros(6, dtype), values=[first, second], axis=0)
        block.outputs.extend([f"{first}_kept", f"{first}_joined"])
    found = program.run({"out": x, "other": np.zeros(6, dtype)})
    pair = (x, x[::-1]) if pred else (x[::-1], x)
    assert found["out"].dtype == dtype
    np.testing.assert_array_equal(found["out"], pair[0])
    np.testing.assert_array_equal(found["other"], np.concatenate(pair))


def loop(limit: int, dtype: Any = np.float32) -> dict[str, Any]:
    """Doubles x and counts from 0 until `limit` is reached."""
    x, number = np.array([1, 3], dtype), np.array(0, np.int32)
    program = Written(count=number, x=x, limit=np.array(limit, np.int32))
    operation = program.add(program.block, "while_loop", "last", number, loop_vars=["count", "x"])
    value_type(operation.outputs.add(name="doubled").type, x)
    goes_on, body = operation.blocks.add(), operation.blocks.add()
    for block, prefix in ((goes_on, "a"), (body, "b")):
        value_type(block.inputs.add(name=f"{prefix}_count").type, number)
        value_type(block.inputs.add(name=f"{prefix}_x").type, x)
    program.add(goes_on, "less", "goes_on", np.array(True), x="a_count", y="limit")
    goes_on.outputs.append("goes_on")
    program.add(body, "add", "b_next", number, x="b_count", y=1)
    program.add(body, "add", "b_double", x, x="b_x", y="b_x")
    body.outputs.extend(["b_next", "b_double"])
    return program.run({"last": number, "doubled": x})


@pytest.mark.parametrize("rounds", [0, 1, 7])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_while_loop(rounds: int, dtype: Any) -> None:
    found = loop(rounds, dtype)
    assert found["last"] == rounds and found["doubled"].dtype == dtype
    assert found["doubled"].tolist() == [2**rounds, 3 * 2**rounds]


def test_a_loop_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_flow, "ROUNDS", 20)
    loop(19)
    with pytest.raises(CoreMLError, match="20 rounds"):
        loop(20)


def test_lists_in_a_program() -> None:
    """iOS14 test_control_flow.py, TestList, in a program of our own: zeros at first, grows, scatters, gathers."""
    a, b = np.array([1, 3], np.float32), np.array([2, 4], np.float32)
    program = Written(a=a, b=b)
    block = program.block
    program.add(block, "make_list", "ls0", None, init_length=2, elem_shape=[2], dynamic_length=True, dtype="fp32")
    program.add(block, "list_read", "first", a, ls="ls0", index=0)
    program.add(block, "list_write", "ls1", None, ls="ls0", index=0, value="a")
    program.add(block, "list_write", "ls2", None, ls="ls1", index=4, value="b")
    program.add(block, "list_scatter", "ls3", None, ls="ls2", indices=(2, 1), value=((-1.0, -2.0), (-4.0, -5.0)))
    program.add(block, "list_read", "written", a, ls="ls3", index=0)
    program.add(block, "list_gather", "gathered", np.zeros((4, 2), np.float32), ls="ls3", indices=(4, 2, 3, 1))
    program.add(block, "list_length", "length", np.array(0, np.int32), ls="ls3")
    program.add(block, "list_length", "before", np.array(0, np.int32), ls="ls1")
    found = program.run({"first": a})
    assert found["first"].tolist() == [0, 0] and found["written"].tolist() == [1, 3]
    assert found["gathered"].tolist() == [[2, 4], [-1, -2], [0, 0], [-4, -5]]
    assert (found["length"], found["before"]) == (5, 2)


def op(name: str, *operands: Any, **options: Any) -> Any:
    return TABLE[name].function(*operands, **options)


def test_lists_by_themselves() -> None:
    open_shape = (torch.tensor(2, dtype=torch.int32), "s0")
    ls: TensorList = op("make_list", open_shape, init_length=3, dynamic_length=False, dtype="fp16")
    assert (ls.length, ls.dtype, ls.shape, ls.grows) == (3, torch.float16, (2, -1), False)
    with pytest.raises(ValueError, match="is open"):
        op("list_read", ls, 0)
    half = torch.ones(2, 3, dtype=torch.float16)
    written = op("list_write", ls, -1, half)
    assert not ls.items and torch.equal(op("list_read", written, 2), half)
    assert torch.equal(op("list_read", written, 0), torch.zeros_like(half))
    with pytest.raises(ValueError, match="no element 3"):
        op("list_write", written, 3, half)
    with pytest.raises(ValueError, match="of shape"):
        op("list_write", written, 0, half[:1])
    with pytest.raises(ValueError, match="no element 3"):
        op("list_gather", written, torch.tensor([0, 3]))
    assert op("make_list", ()).length == 1 and op("make_list", ()).grows
    assert op("list_gather", op("make_list", (torch.tensor(4),)), torch.tensor([], dtype=torch.int32)).shape == (0, 4)


def test_lists_that_are_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        op("make_list", (torch.tensor(1),), init_length=2**30)
    ls = op("make_list", (torch.tensor(1),), init_length=2)
    with pytest.raises(ValueError, match="at most"):
        op("list_write", ls, 2**30, torch.ones(1))
    with pytest.raises(ValueError, match="at most"):
        op("make_list", (torch.tensor(2**31 - 1),))
    with pytest.raises(ValueError, match="not supported"):
        op("make_list", (), dtype="complex64")


def test_states_are_read_and_written() -> None:
    x = np.array([1, 2], np.float16)
    program = Written(x=x)
    program.state("memory", x)
    program.add(program.block, "read_state", "before", x, input="memory")
    program.add(program.block, "add", "sum", x, x="before", y="x")
    program.add(program.block, "write_state", None, None, input="memory", data="sum")
    program.add(program.block, "read_state", "after", x, input="memory")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.mlmodel"
        program.block.outputs.append("before")
        described = program.model.description.output.add(name="before").type.multiArrayType
        described.shape.extend(x.shape)
        described.dataType = type(described).FLOAT16
        path.write_bytes(program.model.SerializeToString())
        model = open_package(path)
        state, other = model.make_state(), model.make_state()
        for rounds in range(3):
            before = model.predict({"x": x}, state)["before"]
            np.testing.assert_array_equal(before, x * rounds)
        np.testing.assert_array_equal(state.read_state("memory"), x * 3)
        np.testing.assert_array_equal(other.read_state("memory"), x * 0)
        state.write_state("memory", x * 10)
        np.testing.assert_array_equal(model.predict({"x": x}, state)["before"], x * 10)


def test_a_state_keeps_its_shape() -> None:
    x = np.array([1, 2], np.float16)
    program = Written(x=x)
    program.state("memory", np.zeros(3, np.float16))
    program.add(program.block, "write_state", None, None, input="memory", data="x")
    with pytest.raises(CoreMLError, match="shape"):
        program.run({"x": x})


def test_classify() -> None:
    probabilities = torch.tensor([[0.25, 0.5, 0.125, 0.5]])
    label, shares = op("classify", probabilities, ("cat", "dog", "cow", "hen"))
    assert label == "dog" and shares == {"cat": 0.25, "dog": 0.5, "cow": 0.125, "hen": 0.5}
    label, shares = op("classify", probabilities, tuple(torch.tensor([3, 5, 7, 9])))
    assert label == 5 and shares[7] == 0.125
    with pytest.raises(ValueError, match="2 classes for 4"):
        op("classify", probabilities, ("cat", "dog"))
