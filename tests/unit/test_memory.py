"""Memory: refusals before an impossible conversion, and conversions side by side only while there is room."""

import threading
import time
from pathlib import Path

import pytest
import quantizing
import torch

from handheld.errors import HandheldError
from handheld.export import files, formats, memory, programs, recipe
from handheld.export.cache import Cache
from handheld.export.manifest import PROGRAM_RECORD, ProgramRecord, Stage, Work
from handheld.export.process import Children
from handheld.export.program import Program
from handheld.export.quantize import apply
from handheld.export.request import Context, Request, disk_refusal
from handheld.export.run import export
from handheld.export.trace import activation_bytes, weight_bytes
from handheld.models.source import refer


def test_what_cannot_fit_is_refused_with_the_figures() -> None:
    gate = memory.Gate(2_000_000_000)
    assert gate.refusal(2_000_000_000) is None
    said = gate.refusal(3_500_000_000)
    assert said and "3.5 GB" in said and "2.0 GB" in said


def test_two_that_fit_run_together_and_a_third_waits() -> None:
    gate, running, most = memory.Gate(100), [], []

    def work() -> None:
        with gate.reserve(50):
            running.append(1)
            most.append(len(running))
            time.sleep(0.05)
            running.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(most) == 6 and max(most) == 2


def test_one_alone_may_always_run() -> None:
    with memory.Gate(10).reserve(1000):
        pass


def test_a_full_disk_is_foreseen(tmp_path: Path) -> None:
    assert disk_refusal(tmp_path / "not" / "there" / "yet", 1000) is None
    said = disk_refusal(tmp_path, 10**18)
    assert said and "may need 1500000000.00 GB" in said and "--out" in said


def test_a_large_network_is_refused_before_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 4_000_000_000)
    request = Request(model=refer("sd15_unet"), to=("onnx",), out=tmp_path)
    with pytest.raises(HandheldError, match=r"sd15_unet was not traced: tracing is estimated to need 4\.6 GB"):
        export(request, cache=Cache(tmp_path / "cache"))


def test_quantizing_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 4_000_000_000)
    request = Request(model=refer("sd15_unet"), recipe="w8", out=tmp_path)
    exported = Stage(name="exported", psnr_db=100, max_error=0)
    work = Work(seconds=1, peak_memory_bytes=1, peak_memory_method="")
    record = ProgramRecord(
        model="unet", sha256="", weight_bytes=3_440_000_000, operators={}, exported=exported, work=work, versions={}
    )
    files.write_record(tmp_path / PROGRAM_RECORD, record)
    context = Context(request, lambda *_: None, Cache(tmp_path / "cache"), Children())
    with pytest.raises(HandheldError, match=r"was not quantized: quantizing is estimated to need [45]\.\d GB"):
        programs.quantized(context, tmp_path, recipe.named("w8"))
    assert programs.departures(context, tmp_path, recipe.named("w8")) == (), "a dry run does not even look"


MEASURED: dict[str, tuple[int, int, int, dict[str, int]]] = {
    "efficientformerv2_s0": (
        14_598_872, 3_612_672, 327, {"coreml": 488, "coreai": 559, "litert": 821, "executorch": 596, "onnx": 506}
    ),
    "efficientformerv2_l": (
        106_076_304, 4_515_840, 810, {"coreml": 796, "coreai": 1057, "litert": 1400, "executorch": 1090, "onnx": 723}
    ),
    "mobiler2l_synthetic": (
        17_346_108, 122_880_000, 218, {"coreml": 847, "coreai": 908, "litert": 895, "executorch": 856, "onnx": 872}
    ),
    "snapfusion_decoder": (
        49_549_916, 402_653_184, 127, {"coreml": 962, "coreai": 1013, "litert": 962, "executorch": 968, "onnx": 1030}
    ),
    "sd15_unet": (
        3_438_083_856, 209_720_320, 1073,
        {"coreml": 4400, "coreai": 11200, "litert": 13000, "executorch": 11500, "onnx": 4500},
    ),
}  # fmt: skip
"""Bytes of weights and of values of a run, operators, and MB of an fp32 conversion at its peak (docs/networks.md)."""


@pytest.mark.parametrize("model", MEASURED)
def test_estimates_are_within_a_quarter_of_what_was_measured(model: str) -> None:
    weight_bytes, activation_bytes, operators, measured = MEASURED[model]
    record = ProgramRecord(
        model=model,
        sha256="",
        weight_bytes=weight_bytes,
        activation_bytes=activation_bytes,
        operators={"any": operators},
        exported=Stage(name="exported", psnr_db=100, max_error=0),
        work=Work(seconds=1, peak_memory_bytes=1, peak_memory_method=""),
        versions={},
    )
    estimated = {name: formats.get(name).memory_bytes(record, recipe.named("fp32"), None) / 1e6 for name in measured}
    assert estimated == {name: pytest.approx(mb, rel=0.25) for name, mb in measured.items()}


class Wide(torch.nn.Module):
    """One linear layer of 384 to 96 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.only = torch.nn.Linear(384, 96, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        """Of the first values."""
        return (self.only(x.reshape(1, -1)[:, :384]),)


def test_what_is_stored_is_foreseen() -> None:
    floats, program = 4 * 384 * 96, quantizing.program(Wide())
    for name, part in {
        "w8": 1 / 4,
        "lut4": 1 / 4,
        "w4": 1 / 4 + 1 / 32,
        "sparse50": 5 / 4,
        "sparse50-w8": 1 / 2,
    }.items():
        quantized = apply.quantize(program, quantizing.named(name))
        assert memory.stored_bytes(floats, recipe.named(name)) == floats * part
        assert weight_bytes(quantized) == pytest.approx(floats * part, rel=0.03)


def test_the_values_of_a_run_are_counted_while_they_are_alive() -> None:
    class Chain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = x + 1
            second = first.view(-1) * 2  # of the first only a view, which keeps it alive
            return second.view(4, 250).sum()

    exported = torch.export.export(Chain(), (torch.zeros(1000),))
    assert activation_bytes(Program(exported, (), ())) == 2 * 4000


def test_available_memory_is_plausible() -> None:
    assert 10**7 < memory.available_bytes() < 10**14
