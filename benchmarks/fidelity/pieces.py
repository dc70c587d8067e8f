"""The smallest piece of a converted file that shows a departure, written as a folder that `handheld check` checks.

PIECE/README.md, reproduce.py                     what is wrong, and the same without handheld
PIECE/golden.json, golden.npz                     what the piece takes, and what the model computes from it
PIECE/<format>-<recipe>/piece.<suffix>, manifest.json
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from handheld.benchmarks.fidelity.departures import Departure
from handheld.benchmarks.fidelity.references import Array, Expected, Seen, reordered
from handheld.benchmarks.fidelity.surgery.base import OpenFile
from handheld.export import files, formats, golden
from handheld.export.manifest import MANIFEST, Case, Golden, Manifest

MOST = 40
"""Operations of a piece: where more are needed to show a fault, it is not looked for further."""


@dataclass(frozen=True)
class Piece:
    """What a piece takes and gives, and what the model computes in place of what it gives."""

    inputs: tuple[str, ...]
    output: str
    expected: Expected


def smallest(opened: OpenFile, seen: Seen, departure: Departure, expected: Expected | None) -> Piece | None:
    """The fewest operations before and with the one that departs that still depart when they are run alone.

    None if its result has no counterpart, or none of the pieces tried departs.
    """
    operation = next(each for each in opened.operations if each.name == departure.operation)
    output = operation.outputs[0]
    if expected is None or expected.array.size != seen.arrays[output].size:
        return None
    makers = {name: each for each in opened.operations for name in each.outputs}
    group = {operation.name, *departure.since}
    made = {name for each in opened.operations if each.name in group for name in each.outputs}
    taken = [name for each in opened.operations if each.name in group for name in each.inputs if name not in made]
    inputs = tuple(dict.fromkeys(taken))
    while len(opened.needed(inputs, [output])) <= MOST:
        given = {name: seen.arrays[name] for name in inputs}
        if not seen.agrees(expected, opened.compute(given, [output])[output]):
            return Piece(inputs, output, expected)
        wider = dict.fromkeys(
            before for name in inputs for before in (makers[name].inputs if name in makers else (name,))
        )
        if tuple(wider) == inputs:
            return None
        inputs = tuple(wider)
    return None


def write(
    folder: Path,
    piece: Piece,
    opened: OpenFile,
    seen: Mapping[str, Array],
    departure: Departure,
    manifest: Manifest,
    reference: Golden,
) -> Path:
    """Write a piece to `folder`, in place of what is there; gives `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    cell = folder / f"{manifest.format}-{manifest.recipe.name}"
    with files.disk_errors(folder):
        cell.mkdir(parents=True)
    target = formats.get(manifest.format)
    artifact = cell / f"piece{target.suffix}"
    signature = opened.cut(piece.inputs, [piece.output], artifact)
    arrays = [seen[spec.name].astype(spec.dtype) for spec in signature.inputs]
    (spec,) = signature.outputs
    expected = reordered(piece.expected.array, spec.shape)
    assert expected is not None  # `smallest` compared it
    golden.write(
        folder,
        Golden(
            model=f"{manifest.model}: {departure.operation}",
            program_sha256=manifest.program_sha256,
            weights=manifest.weights,
            reference=f"{reference.reference}, on the piece's inputs",
            inputs=signature.inputs,
            outputs=signature.outputs,
            quality="psnr",
            parameters=None,
            cases=(Case(kind="stored", sha256=golden.hash_of(arrays)),),
            arrays_sha256="",
        ),
        [tuple(arrays)],
        [(expected.astype(spec.dtype),)],
    )
    described = manifest.model_copy(
        update={
            "artifact": artifact.name,
            "sha256": files.sha256_of(artifact),
            "size_bytes": files.size_bytes(artifact),
            "signature": signature,
            "inspection": target.inspect(artifact),
            "stages": (),
        }
    )
    files.write_record(cell / MANIFEST, described)
    script = SCRIPTS[manifest.format]
    (folder / "reproduce.py").write_text(_script(script, artifact.relative_to(folder), piece, spec.name))
    (folder / "README.md").write_text(_readme(departure, opened, piece, manifest))
    return folder


def _readme(departure: Departure, opened: OpenFile, piece: Piece, manifest: Manifest) -> str:
    operations = opened.needed(piece.inputs, [piece.output])
    versions = "\n".join(f"- {name} {version}" for name, version in manifest.versions.items())
    listed = "\n".join(
        f"- {op.operator} {op.name}: {', '.join(op.inputs)} -> {', '.join(op.outputs)}" for op in operations
    )
    cell = f"{manifest.format}-{manifest.recipe.name}"
    return f"""# {departure.operator} {departure.operation} of {manifest.model} in {cell}

What it gives differs from what the model computes by {departure.error:.3g} of the largest value, although what it takes
is right. The model computes {departure.node}{f", at {departure.line}" if departure.line else ""}.

The piece's operations:

{listed}

`golden.npz` holds what the piece takes and what {piece.expected.name} is, computed by PyTorch in float32.

    handheld check .          the piece beside the model
    python reproduce.py       the same without handheld

Versions when it was converted ({manifest.platform}):

{versions}
"""


def _script(text: str, artifact: Path, piece: Piece, output: str) -> str:
    return (
        text.replace("ARTIFACT", repr(str(artifact)))
        .replace("INPUTS", repr(list(piece.inputs)))
        .replace("OUTPUT", repr(output))
    )


_HEAD = '''"""Run the piece with its vendor's runtime alone, and compare with what PyTorch computes."""

from pathlib import Path

import numpy as np
'''
_TAIL = """
print("largest error", np.abs(got.astype(np.float64) - expected).max(), "of", np.abs(expected).max())
"""
_DATA = """
here = Path(__file__).parent
arrays = np.load(here / "golden.npz")
inputs = {name: arrays[f"0/input/{name}"] for name in INPUTS}
expected = arrays["0/output/" + OUTPUT]
"""

SCRIPTS: Mapping[str, str] = {
    "onnx": _HEAD
    + "import onnxruntime\n"
    + _DATA
    + "session = onnxruntime.InferenceSession(here / ARTIFACT, providers=['CPUExecutionProvider'])\n"
    "(got,) = session.run([OUTPUT], inputs)\n" + _TAIL,
    "litert": _HEAD
    + "from ai_edge_litert.interpreter import Interpreter\n"
    + _DATA
    + "runner = Interpreter(str(here / ARTIFACT)).get_signature_runner()\n"
    "got = runner(**inputs)[OUTPUT]\n" + _TAIL,
    "executorch": _HEAD
    + "import torch\nfrom executorch.runtime import Runtime\n"
    + _DATA
    + "method = Runtime.get().load_program(here / ARTIFACT).load_method('forward')\n"
    "got = method.execute([torch.from_numpy(array) for array in inputs.values()])[0].numpy()\n" + _TAIL,
    "coreai": _HEAD.replace("from pathlib", "import asyncio\nfrom pathlib")
    + "from coreai.authoring import AIModelAsset\nfrom coreai.runtime import NDArray\n"
    + _DATA
    + """

async def run():
    async with AIModelAsset.load(here / ARTIFACT).executable() as model:
        function = model.load_function("main")
        outputs = await function(inputs={name: NDArray(array) for name, array in inputs.items()})
        return outputs[OUTPUT].numpy()


got = asyncio.run(run())
"""
    + _TAIL,
    "coreml": _HEAD
    + "import coremltools  # predicts on macOS; on Linux: from handheld.runtimes.coreml import enable; enable()\n"
    + _DATA
    + "got = coremltools.models.MLModel(str(here / ARTIFACT)).predict(inputs)[OUTPUT]\n"
    + _TAIL,
}
"""Format -> a script that runs a piece without handheld."""
