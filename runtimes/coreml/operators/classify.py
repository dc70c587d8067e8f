"""A classifier's last operation."""

from typing import Any

from torch import Tensor

from handheld.runtimes.coreml.operators.base import Value, operator


@operator("classify")
def classify(probabilities: Tensor, classes: Value) -> tuple[Any, dict[Any, float]]:
    """The label of the greatest probability, and every label's (iOS15 classify.py). Of equal ones the first."""
    labels = [label.item() if isinstance(label, Tensor) else label for label in _each(classes)]
    numbers = probabilities.reshape(-1).tolist()
    if not labels or len(labels) != len(numbers):
        raise ValueError(f"{len(labels)} classes for {len(numbers)} probabilities")
    return labels[int(probabilities.reshape(-1).argmax())], dict(zip(labels, numbers, strict=True))


def _each(classes: Value) -> Any:
    return classes.reshape(-1) if isinstance(classes, Tensor) else classes
