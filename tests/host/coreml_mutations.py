"""Breaks the most used operators of the Core ML runtime, one way at a time, and runs their tests: `make mutations`.

Every way must be noticed: results off by a factor of 1.01 (booleans and integers inverted or off by one), each optional
input ignored, each number among the inputs off by one. Those that change nothing are listed, with the reason.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings

from handheld.runtimes.coreml.operators import TABLE
from handheld.runtimes.coreml.operators.base import Ints, Operator

_OPERATORS = """
add avg_pool batch_norm cast clip concat conv conv_transpose cos exp expand_dims gather gelu greater_equal layer_norm
linear matmul max_pool mul pad pow real_div reduce_mean reduce_sum relu reshape resize_bilinear rsqrt
scaled_dot_product_attention select sigmoid silu sin slice_by_index softmax split sqrt square squeeze stack sub tanh
tile transpose upsample_bilinear upsample_nearest_neighbor
"""
OPERATORS = _OPERATORS.split()
"""Those of vision transformers, diffusion networks, decoders and text encoders, and their nearest kin."""

TESTS = {"elementwise_unary": "elementwise", "elementwise_binary": "elementwise"}
"""Family -> its tests, where they have another name."""

CHANGE_NOTHING = {
    ("expand_dims", "axes reversed"): "their order has no meaning",
}
"""(operator, mutation) -> why no test can tell."""

Function = Callable[..., Any]


def spoilt(value: Any) -> Any:
    """A result that is a little wrong."""
    if isinstance(value, (tuple, list)):
        return tuple(map(spoilt, value))
    if value.dtype == torch.bool:
        return ~value
    return value * 1.01 if value.is_floating_point() else value + 1


def _without(given: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != name}


def mutations(operator: Operator) -> Iterator[tuple[str, Function]]:
    """Ways to break an operator: what is done, and the function that does it."""
    function = operator.function
    yield "its result spoilt", lambda **given: spoilt(function(**given))
    for name, parameter in operator.parameters.items():
        if not parameter.required:
            yield (
                f"without {name}",
                lambda name=name, **given: function(**{k: v for k, v in given.items() if k != name}),
            )
        elif parameter.form is int:
            yield f"{name} + 1", lambda name=name, **given: function(**{**given, name: given[name] + 1})
        elif parameter.form == Ints:
            yield f"{name} reversed", lambda name=name, **given: function(**{**given, name: given[name][::-1]})


def noticed(operator: Operator) -> bool:
    """Whether the operator's tests fail."""
    family = operator.function.__module__.rpartition(".")[2]
    file = Path(__file__).with_name(f"test_coreml_{TESTS.get(family, family)}.py")
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = pytest.main([*options, str(file)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"the tests of {operator.name} could not be run: {code!r}")
    return code == pytest.ExitCode.TESTS_FAILED


def main() -> int:
    """Try them all; gives how many were not noticed."""
    settings.register_profile("mutations", phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("mutations")
    count, survived = 0, []
    for name in sys.argv[1:] or OPERATORS:
        original = TABLE[name]
        for label, function in mutations(original):
            if (name, label) in CHANGE_NOTHING:
                continue
            count += 1
            TABLE[name] = replace(original, function=function)
            if not noticed(original):
                survived.append(f"{name}: {label}")
                print("not noticed:", survived[-1], flush=True)  # noqa: T201
        TABLE[name] = original
    print(f"{count} mutations of {len(sys.argv[1:] or OPERATORS)} operators, {len(survived)} not noticed")  # noqa: T201
    return len(survived)


if __name__ == "__main__":
    sys.exit(main())
