"""Pure parts of the comparison with vendors' quantizers."""

import numpy as np
import pytest

from handheld.benchmarks.versus.compare import Latency
from handheld.benchmarks.versus.quantized.compare import PAIRS, Figures, Outcome, QuantizedVersus, closeness
from handheld.benchmarks.versus.quantized.page import markdown
from handheld.benchmarks.versus.quantized.vendors import QUANTIZERS
from handheld.export import formats, recipe
from handheld.runtimes.job import Device


def test_every_pair_can_be_made() -> None:
    assert {pair.vendor for pair in PAIRS if not pair.ours} == set(QUANTIZERS)
    for pair in PAIRS:
        formats.get(pair.format)
        assert recipe.named(pair.recipe).quantizes
        assert not pair.ours or not recipe.named(pair.vendor).quantizes


def test_closeness_against_arithmetic_by_hand() -> None:
    expected = np.log(np.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]))
    same, other = closeness(expected, expected), closeness(expected, expected[:, ::-1] + 3)
    assert same == {"agreement": 1, "kl_median": 0, "psnr_db": np.inf}
    assert other["agreement"] == 0
    by_hand = [0.7 * np.log(7) + 0.1 * np.log(1 / 7), 0.25 * np.log(0.5) + 0.5 * np.log(2)]
    assert other["kl_median"] == pytest.approx(np.mean(by_hand))


def test_page() -> None:
    sides = {"default": (1000, 0.95), "handheld": (900, 0.97)}
    figures = {
        side: Figures(size_bytes=size, seconds=2, agreement=a, kl_median=0.01, psnr_db=30)
        for side, (size, a) in sides.items()
    }
    latency = Latency(threads=1, default_ns=(4e6, 2e6), handheld_ns=(2e6, 1.5e6))
    pair = {"format": "onnx", "recipe": "w8"}
    record = QuantizedVersus(
        model="net",
        weights="seeded",
        inputs=2,
        calibration=3,
        device=Device(name="n", os="o", machine="m", processor="p", cores=2),
        versions={"torch": "2"},
        outcomes=(
            Outcome.model_validate({**pair, "vendor": "q", "figures": figures, "latency": latency, "load": 1.25}),
            Outcome.model_validate({**pair, "vendor": "broken", "failed": "no such thing"}),
        ),
    )
    page = markdown([record])
    assert "| onnx | q | w8 | 1 → 1 | 95.0 → 97.0 | 0.0100 → 0.0100 | 30.0 → 30.0 | 2 → 2 |" in page
    assert "| onnx | q | w8 | 3.00 | 1.75 | 0.625 [0.500, 0.750] | 0.650 | 2 | 1.2 |" in page
    assert "- onnx, broken, w8: no such thing" in page
