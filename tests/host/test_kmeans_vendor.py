"""Our tables against those of Apple's own palettizer, whose one-dimensional k-means is exact and slow."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from handheld.export.quantize.kmeans import kmeans


@pytest.mark.filterwarnings("ignore")  # of the vendor's imports
@pytest.mark.parametrize(("bits", "percent"), [(2, 0.05), (4, 0.05), (6, 0.5), (8, 0.5)])
@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_the_square_error_is_the_optimum_within_half_a_percent(
    kind: str, bits: int, percent: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It compiles itself when it is first asked, and waits for whoever seems to, even for one that was killed.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    vendor: Any = pytest.importorskip("coreai_opt.deps._kmeans1d", reason="needs Apple's coreai-opt")
    values = getattr(np.random.default_rng(0), kind)(size=8000).astype(np.float32)
    best = np.array(vendor.cluster(values.tolist(), 2**bits).centroids)
    ours = kmeans(torch.from_numpy(values), bits).numpy().astype(np.float64)
    errors = [(np.abs(values[:, None] - table).min(1) ** 2).sum() for table in (ours, best)]
    assert errors[0] <= errors[1] * (1 + percent / 100)
