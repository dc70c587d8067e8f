"""`python -m handheld.benchmarks.quantize`: how fast weights are quantized and packed, on this machine.

With `--unet RECIPE` Stable Diffusion v1.5's UNet instead, whole (860 million seeded weights, the 50 steps of a sampler
fixed): seconds and peak memory of what `handheld export --recipe` does in the hub, and the packed file, read back and
compared tensor by tensor. `bitsfusion` is the published assignment.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from handheld.console import console, show_table
from handheld.errors import HandheldError
from handheld.export import recipe as recipes
from handheld.export.process import peak_memory_bytes
from handheld.export.quantize import packing
from handheld.record import Record

WEIGHTS = (1280, 1280, 3, 3)
"""Of the convolutions that Stable Diffusion's UNet has most of."""
UNET_WEIGHTS = 859_099_840
RECIPES = ("w8", "w4", "w4c", "lut8", "lut6", "lut4", "lut4g16", "levels1", "levels2", "levels4", "sparse50-w8")
BASES = (2, 3, 4, 5, 8, 9, 16, 17, 33, 65, 129, 256)
STEPS = 49
"""PNDM makes one step twice: 50 runs of the UNet."""
STAGES = ("trace", "prepare", "quantize", "write", "read")


class UNetRun(Record):
    """One recipe on the whole UNet; `ideal` figures are of information, as the paper counts."""

    recipe: str
    seconds: dict[str, float]
    peak_memory_bytes: int
    quantize_peak_memory_bytes: int
    file_bytes: int
    ideal_bytes: int
    average_bits: float
    average_bits_of_what_is_left: float
    removed: int
    cached: int
    tensors: int
    differing: int


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _arithmetic() -> None:
    import torch

    from handheld.export.quantize.weights import store

    weight = torch.randn(WEIGHTS, generator=torch.Generator().manual_seed(0)) / 100
    rows = []
    for name in RECIPES:
        how = recipes.named(name).rules[0].weights
        assert how
        start, used = time.perf_counter(), time.process_time()
        stored = store(weight, how)
        seconds, used = time.perf_counter() - start, time.process_time() - used
        error = stored.dense().sub_(weight).square().mean()
        kept = weight * stored.mask if stored.mask is not None else weight
        snr = 10 * math.log10(float(kept.square().mean() / (stored.dense() - kept).square().mean().clamp_min(1e-30)))
        whole = used * UNET_WEIGHTS / weight.numel()
        rows.append([name, f"{seconds:.2f}", f"{used:.2f}", f"{whole:.0f}", f"{snr:.1f}", f"{float(error):.3g}"])
    columns = [
        "recipe",
        ">s",
        ">CPU s",
        ">CPU s for the UNet's weights",
        ">SNR of what is kept, dB",
        ">mean square error",
    ]
    threads = torch.get_num_threads()
    caption = f"measured on host, {threads} threads; normal weights of {'x'.join(map(str, WEIGHTS))}"
    show_table(console(), "Quantizing weights", columns, rows, caption=caption)


def _packing() -> None:
    rows = []
    for base in BASES:
        symbols = np.random.default_rng(0).integers(0, base, math.prod(WEIGHTS), dtype=np.uint8)
        packed = packing.pack(symbols, base)
        pack = min(_seconds(partial(packing.pack, symbols, base)) for _ in range(3))
        unpack = min(_seconds(partial(packing.unpack, packed, base, symbols.size)) for _ in range(3))
        bits, limit = 8 * packed.size / symbols.size, math.log2(base)
        speeds = [f"{symbols.nbytes / seconds / 1e6:.0f}" for seconds in (pack, unpack)]
        rows.append([str(base), f"{bits:.3f}", f"{100 * (bits / limit - 1):.1f}", *speeds])
    columns = [">symbols", ">bits each", ">% above the limit", ">pack MB/s", ">unpack MB/s"]
    caption = "measured on host, 1 thread; MB of unpacked symbols, one byte each; best of 3"
    show_table(console(), "Packing", columns, rows, caption=caption)


def _unet(name: str, path: Path) -> UNetRun:
    """Trace, prepare, quantize, write, read back. Golden data, which take the time of two runs, are not made."""
    import torch

    from handheld.export.manifest import Boundary, Schedule
    from handheld.export.program import Program
    from handheld.export.quantize import apply, bitsfusion, packed
    from handheld.export.quantize.weights import StoredTensor
    from handheld.export.trace import Boundaried, boundary_specs
    from handheld.models import schedules, source

    how = bitsfusion.recipe() if name == "bitsfusion" else recipes.named(name)
    times = [time.perf_counter()]
    steps = tuple(map(float, schedules.pndm(STEPS, "epsilon").timesteps))
    model = source.load(source.refer("sd15_unet"))
    boundary = Boundary(schedule=Schedule(input="timestep", values=steps))
    inputs = boundary_specs(model.specs, boundary)
    module = Boundaried(model, [spec.name for spec in inputs], boundary).eval()
    example = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in inputs)
    program = Program(torch.export.export(module, example, strict=False), inputs, ())
    del model, module
    times.append(time.perf_counter())
    prepared = apply.prepared(program)
    made = bitsfusion.account(program, prepared, how)
    del program
    prepared = bitsfusion.cached_in_half(prepared)
    times.append(time.perf_counter())
    quantized = apply.quantize(prepared, how)
    times.append(time.perf_counter())
    del prepared
    peak = peak_memory_bytes()
    size = packed.write(quantized, path, how.name)
    times.append(time.perf_counter())
    file, state = packed.PackedFile(path), quantized.module().state_dict()

    def dense(parts: packed.PackedWeight) -> Callable[[], Any]:
        tensors = [None if part is None else state[part] for part in (parts.scale, parts.table, parts.mask)]
        return StoredTensor(state[parts.values], parts.bits, *tensors).dense

    meant = {name: dense(parts) for name, parts in packed.weights(quantized.module())}
    differing = sum(not np.array_equal(file.tensor(n), state[n].numpy()) for n in file.header.tensors)
    differing += sum(
        not np.array_equal(weight.dense(), meant[weight.name]().numpy()) for weight in file.stored().weights
    )
    times.append(time.perf_counter())
    return UNetRun(
        recipe=name,
        seconds=dict(zip(STAGES, np.diff(times).tolist(), strict=True)),
        peak_memory_bytes=peak_memory_bytes(),
        quantize_peak_memory_bytes=peak,
        file_bytes=size,
        ideal_bytes=made.size_bytes,
        average_bits=made.average_bits,
        average_bits_of_what_is_left=made.average_bits_of_what_is_left,
        removed=made.removed,
        cached=made.cached,
        tensors=len(file.header.tensors),
        differing=differing,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unet", metavar="RECIPE", help="the whole UNet with this recipe, or bitsfusion")
    parser.add_argument("--out", type=Path, help="where to leave its packed file")
    asked = parser.parse_args()
    if not asked.unet:
        _arithmetic()
        _packing()
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(_unet(asked.unet, asked.out or Path(folder) / "unet.safetensors").model_dump_json(indent=2))  # noqa: T201
    except HandheldError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
