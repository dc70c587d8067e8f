"""Making and removing operations of an MLIR program of Core AI. Callers hold its context and a location."""

from typing import Any

import numpy as np

from handheld.benchmarks.faults.base import Array
from handheld.export.formats.coreai_asset import CONSTANT


def kind_of(op: Any) -> str:
    """The last part of an operator's name."""
    return str(op.name.rpartition(".")[2])


def maker_of(value: Any) -> Any:
    """The operation that makes a value; None if it is an argument."""
    return value.owner if hasattr(value.owner, "operands") else None


def forget(constant: Any) -> None:
    """Remove a constant that nothing uses any more: it would not be saved, and it counts in the names of values."""
    if not any(True for _ in constant.results[0].uses):
        constant.operation.erase()


def tensor_type(shape: list[int], element: Any) -> Any:
    """The type of a tensor of that shape and type of elements."""
    from coreai._compiler.ir import RankedTensorType

    return RankedTensorType.get(shape, element)


def constant_value(array: Array, element: Any) -> Any:
    """An array as the value of a constant whose elements are of a type, to which it is cast."""
    from coreai._compiler.ir import DenseElementsAttr

    dtypes = {"f16": np.float16, "f32": np.float32, "si8": np.int8, "si32": np.int32, "ui32": np.uint32}
    cast = np.array(array, dtypes[str(element)], order="C")
    return DenseElementsAttr.get(cast, type=element, shape=list(cast.shape))


def create(kind: str, result: Any, operands: list[Any], *, before: Any, attributes: Any = None) -> Any:
    """A new operation of one result before another."""
    from coreai._compiler.ir import InsertionPoint, Operation

    place = InsertionPoint(before)
    return Operation.create(kind, results=[result], operands=operands, attributes=attributes or {}, ip=place)


def constant(array: Array, element: Any, before: Any) -> Any:
    """The value of a new constant before an operation; its elements are cast to the type `element`."""
    value = constant_value(array, element)
    result = tensor_type(list(array.shape), element)
    return create(CONSTANT, result, [], before=before, attributes={"value": value}).results[0]
