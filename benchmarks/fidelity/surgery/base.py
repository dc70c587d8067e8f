"""What a converted file looks like when it is taken apart."""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from handheld import runtimes
from handheld.export import formats
from handheld.export.formats.base import Signature
from handheld.models.spec import TensorSpec
from handheld.record import Record
from handheld.runtimes.base import Array


class Operation(Record):
    """One operator of a file.

    `name` is unique in the file: the first of `outputs`, unless the format names operations. `inputs` are the values
    that it takes, constants left out; `outputs` the values that it gives.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class OpenFile(ABC):
    """A converted file taken apart. Opening it runs nothing; `cut` makes files that the format's own runtime runs.

    `operations` are in the order of execution, those inside delegates included. `inputs` and `outputs` are the names of
    the file's values that the signature's inputs and outputs are, in its order. `specs` has the shape and dtype of
    every value, as the file stores it, by name.
    """

    format: ClassVar[str]
    merges_constants: ClassVar[bool] = True
    """Whether the converter computes new weights from the model's: then those that it stores in half are not the
    model's own, each rounded by itself."""
    operations: tuple[Operation, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    specs: Mapping[str, TensorSpec]

    @abstractmethod
    def cut(self, inputs: Sequence[str], outputs: Sequence[str], destination: Path) -> Signature:
        """Write the piece that computes the values `outputs` from the values `inputs`, with the constants it needs.

        An input need not be one of the file's: operations that `outputs` do not need when it is given are left out.
        With the file's own inputs and more outputs than it has, the piece is the file with more of its values to be
        seen. The signature's tensors are named as the values, in the order given; unused inputs stay. What is opened is
        unchanged.

        Raises `HandheldError` if `outputs` need a value that `inputs` do not lead to.
        """

    def compute(self, given: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        """What the format's runtime computes for the values `names` when those in `given` are what they are."""
        target = formats.get(self.format)
        with tempfile.TemporaryDirectory(prefix="handheld-values-") as place:
            piece = Path(place) / f"piece{target.suffix}"
            signature = self.cut(tuple(given), names, piece)
            session = runtimes.for_format(self.format).load(piece, signature)
            return session.run({spec.name: given[spec.name].astype(spec.dtype) for spec in signature.inputs})

    def needed(self, inputs: Iterable[str], outputs: Iterable[str]) -> tuple[Operation, ...]:
        """The operations that compute `outputs` when `inputs` are given, in order."""
        given, wanted = set(inputs), set(outputs)
        found = []
        for operation in reversed(self.operations):
            if wanted.intersection(operation.outputs) - given:
                found.append(operation)
                wanted.update(operation.inputs)
        return tuple(reversed(found))

    def signature(self, inputs: Sequence[str], outputs: Sequence[str]) -> Signature:
        """The signature of the piece from `inputs` to `outputs`."""
        return Signature(
            inputs=tuple(self.specs[name] for name in inputs), outputs=tuple(self.specs[name] for name in outputs)
        )
