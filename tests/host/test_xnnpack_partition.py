"""ExecuTorch's XNNPACK backend: what our rewrites make of EfficientFormerV2, and the fault that they step around."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from handheld.export.program import Program
from handheld.export.rewrites import apply
from handheld.models.spec import TensorSpec

pytest.importorskip("executorch")
