"""What commands share: their arguments and options, and how they speak."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from handheld.errors import HandheldError

if TYPE_CHECKING:
    from pydantic import BaseModel

COULD_NOT = 2
"""The exit code when something could not be done; 1 is a parity failure."""

INTERRUPTED = 130

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A zoo name (see `handheld models`), an architecture's .toml, FILE.py:FUNCTION, timm:NAME, a .pt2, an "
        ".onnx, a .keras file or a SavedModel folder.",
    ),
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `handheld export` or `ship` wrote.")]
ArtifactPath = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A converted file, or its folder.")]
To = Annotated[
    str,
    typer.Option(
        help="Formats, separated by commas: coreml, coreai, litert (or tflite), executorch, executorch-coreml, onnx; "
        "pt2 is the PyTorch program itself, which a simulated crossbar runs."
    ),
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe", help="A name (default, fp16, w8, lut4g16, …: see `handheld recipes`), or a .toml or .yaml of rules."
    ),
]
Calibrate = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="For recipes with integer activations: a folder of pictures, a .npz of inputs by name, FILE.py:FUNCTION "
        "that gives batches, or drawn:N, seeded noise.",
    ),
]
Out = Annotated[Path, typer.Option(help="Where the artifacts go.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Weights for a zoo model, a .toml, timm:NAME or FILE.py:FUNCTION (which is given the path): .safetensors, "
        ".pt/.pth with tensors only, or a folder as diffusers and transformers write it."
    ),
]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", help="NAME=SHAPE[:DTYPE[:HIGH]], for example image=1x3x224x224 or ids=1x77:int64:49408."),
]
Quality = Annotated[
    Literal["top1", "psnr"] | None,
    typer.Option(help="What matters of the outputs: top1 for a classifier. The zoo and timm models know theirs."),
]
Layout = Annotated[
    Literal["nchw", "nhwc"], typer.Option(help="Of image inputs and outputs; the weights stay as the runtime likes.")
]
Bake = Annotated[
    bool, typer.Option("--bake-preprocessing", help="Take uint8 pictures: scaling, mean and std go into the file.")
]
Mean = Annotated[str | None, typer.Option(help="Per channel, of pictures in [0, 1]: 0.485,0.456,0.406.")]
Std = Annotated[str | None, typer.Option(help="Per channel, of pictures in [0, 1]: 0.229,0.224,0.225.")]
FixedSchedule = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        metavar="NAME=V,V,…",
        help="The values that a one-number input takes, such as timestep=981,961,941: the file takes their places in "
        "this list, and holds a table of what depends on nothing else.",
    ),
]
DeploymentTarget = Annotated[
    Literal["iOS15", "iOS16", "iOS17", "iOS18"], typer.Option(help="The oldest iOS that the Core ML file must run on.")
]
NeuralEngine = Annotated[
    bool,
    typer.Option(
        "--neural-engine",
        help="Layers as 1x1 convolutions and attention head by head, as Apple advises for its Neural Engine. "
        "Compare on the phone: on processors it is slower.",
    ),
]
Jobs = Annotated[int, typer.Option(min=1, help="Conversions at a time.")]
Timeout = Annotated[float, typer.Option(help="Seconds until a conversion or a run is stopped.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, with estimated memory; convert nothing.")
]
Trust = Annotated[bool, typer.Option("--trust", help="Open a .pt2 that may run code: only if you know who made it.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else there.")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of the runtime.")]
Profile = Annotated[str, typer.Option(help="How long to measure: smoke, ci or report.")]
OneFormat = Annotated[str, typer.Option(help="A format: coreml, coreai, litert, executorch or onnx.")]
FixedSteps = Annotated[
    bool, typer.Option("--fixed-steps", help="Export the denoiser for these steps alone: it is smaller then.")
]
DenoiserParts = Annotated[int, typer.Option(min=1, help="Cut the denoiser into so many, as `handheld split` does.")]
Artifacts = Annotated[Path, typer.Option(metavar="DIR", help="Where exports are, and where missing ones go.")]
PipelineCheckpoint = Annotated[Path | None, typer.Option(metavar="DIR", help="Weights, in diffusers' layout.")]
On = Annotated[
    str,
    typer.Option(
        help="Targets, separated by commas (see `handheld devices`); pim:native-adc7 is a simulated crossbar, "
        "docs/pim.md says how to name others."
    ),
]


@contextmanager
def speaking() -> Iterator[None]:
    """Errors become sentences and exit codes."""
    try:
        yield
    except HandheldError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("interrupted: nothing half-written was left; run it again to go on.", file=sys.stderr)  # noqa: T201
        raise typer.Exit(INTERRUPTED) from None


def fail(message: str) -> NoReturn:
    """Print an error for a person and exit with 2."""
    print(f"handheld: {message}", file=sys.stderr)  # noqa: T201
    raise typer.Exit(COULD_NOT)


def say(text: str) -> None:
    """Print to standard output."""
    print(text)  # noqa: T201


def document(record: "BaseModel") -> None:
    """Print a record as the one JSON document."""
    say(record.model_dump_json(indent=2))


def names_of(text: str) -> tuple[str, ...]:
    """Names that commas separate."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers_of(text: str | None, what: str) -> tuple[float, ...] | None:
    """Numbers that commas separate. Raises `HandheldError` for what is none, naming the option `what`."""
    try:
        return tuple(float(number) for number in names_of(text)) if text else None
    except ValueError:
        raise HandheldError(f"cannot read --{what} {text!r}.", hint=f"Type: --{what} 0.5,0.5,0.5") from None
