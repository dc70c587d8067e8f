"""The hub: one exported program with flat, named inputs and outputs, from which every converter starts."""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handheld.errors import HandheldError
from handheld.models.pt2 import open_program
from handheld.models.spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Interpreter, Node

META = "handheld.json"
"""The extra file inside a saved program that holds the signature."""


@dataclass(frozen=True)
class Program:
    """An `ExportedProgram` that takes tensors by position, named as `inputs`, and returns a tuple, as `outputs`."""

    exported: "ExportedProgram"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def module(self) -> "GraphModule":
        """A fresh unlifted module: ATen operators, parameters as attributes. Callable with tensors, gives a tuple."""
        # Guards would only repeat the shape checks that Session.run makes, as a node that converters do not know.
        module: Any = self.exported.module(check_guards=False)
        return module  # type: ignore[no-any-return]

    def example(self) -> "tuple[torch.Tensor, ...]":
        """Zero tensors of the inputs' shapes and dtypes, for converters that want to see some."""
        import torch

        return tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in self.inputs)

    def retraced(self, module: "torch.nn.Module") -> "Program":
        """The program of `module`, a changed form of this one's: same inputs, same outputs."""
        import torch

        return Program(torch.export.export(module, self.example()), self.inputs, self.outputs)

    def run(self, inputs: "Sequence[torch.Tensor]") -> "tuple[torch.Tensor, ...]":
        """What the program computes, in eager PyTorch."""
        import torch

        with torch.no_grad():
            return tuple(self.module()(*inputs))

    def save(self, path: Path) -> None:
        """Write to a `.pt2`."""
        import torch

        signature = {"inputs": [asdict(s) for s in self.inputs], "outputs": [asdict(s) for s in self.outputs]}
        torch.export.save(self.exported, path, extra_files={META: json.dumps(signature)})

    @classmethod
    def load(cls, path: Path) -> "Program":
        """Read what `save` wrote. Only for our own files: a `.pt2` may run code when it is loaded."""
        import torch

        from handheld.export.quantize import ops  # noqa: F401 registers the operators of quantized programs

        extra = {META: ""}
        return cls._of(torch.export.load(path, extra_files=extra), extra[META])

    @classmethod
    def opened(cls, path: Path) -> "Program":
        """Read what `save` wrote, here or elsewhere: no code of the file's is run.

        Raises `HandheldError` if it is no whole file of ours, or would have to run code.
        """
        from handheld.export.quantize import ops  # noqa: F401 registers the operators of quantized programs

        exported = open_program(path)
        with zipfile.ZipFile(path) as archive:
            found = [name for name in archive.namelist() if name.endswith(f"/extra/{META}")]
            if not found:
                raise HandheldError(f"{path} was not written by handheld: it says no names of inputs and outputs.")
            return cls._of(exported, archive.read(found[0]))

    @classmethod
    def _of(cls, exported: "ExportedProgram", text: str | bytes) -> "Program":
        signature = json.loads(text)
        inputs, outputs = (
            tuple(TensorSpec(**(spec | {"shape": tuple(spec["shape"])})) for spec in signature[side])
            for side in ("inputs", "outputs")
        )
        return cls(exported, inputs, outputs)


def interpreter(module: "GraphModule") -> "Interpreter":
    """What runs a functional graph node by node, with every tensor contiguous.

    Operators like native_group_norm want that; in a model, the operator around them sees to it.
    """
    import torch
    from torch.fx import Interpreter

    class Contiguous(Interpreter):
        def run_node(self, n: "Node") -> Any:
            value = super().run_node(n)
            return value.contiguous() if isinstance(value, torch.Tensor) else value

    return Contiguous(module)
