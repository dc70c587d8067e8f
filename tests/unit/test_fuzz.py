"""The fuzzer's own parts: networks as data, drawing, shrinking, and what is printed of them."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from handheld.benchmarks.fuzz import grow, make, shrink
from handheld.benchmarks.fuzz.fuzz import fuzz
from handheld.benchmarks.fuzz.network import Layer, Network, Value
from handheld.benchmarks.fuzz.operators import TABLE
from handheld.benchmarks.fuzz.source import source
from handheld.errors import HandheldError

IMAGE = Value(shape=(1, 4, 6, 6))


def network(*layers: Layer, outputs: tuple[int, ...]) -> Network:
    return Network(inputs=(IMAGE,), layers=layers, outputs=outputs)


def layer(operator: str, *operands: int) -> Layer:
    return Layer(operator=operator, operands=operands)


def test_a_seed_gives_the_same_network_everywhere() -> None:
    """Held to what was once drawn, of operators that other tables cannot disturb."""
    only = ("conv2d", "relu", "linear", "softmax", "add", "reshape")
    assert grow.network("7/3", only) == Network(
        inputs=(Value(shape=(2, 3, 10, 8)),),
        layers=(
            Layer(operator="reshape", operands=(0,), attributes={"shape": (48, 1, 10)}),
            Layer(operator="softmax", operands=(1,), attributes={"axis": 2}),
            Layer(operator="reshape", operands=(2,), attributes={"shape": (2, 1, 30, 8)}),
            Layer(operator="linear", operands=(3,), attributes={"features": 8, "out": 1, "bias": False}, weights=3),
        ),
        outputs=(4,),
    )


def test_every_network_runs_and_survives_a_file() -> None:
    seen: Counter[str] = Counter()
    for index in range(40):
        drawn = grow.network(f"1/{index}")
        assert Network.model_validate_json(drawn.model_dump_json()) == drawn
        names: dict[str, object] = {}
        exec(source(drawn), names)
        module, inputs = names["build"]()  # type: ignore[operator]
        with torch.no_grad():
            assert len(module(*inputs)) == len(drawn.outputs)
        seen.update(one.operator for one in drawn.layers)
    assert len(seen) > 50


def test_only_the_operators_asked_for() -> None:
    drawn = [grow.network(f"2/{index}", ("relu", "linear")) for index in range(5)]
    assert {one.operator for made in drawn for one in made.layers} == {"relu", "linear"}


def test_pruning_keeps_what_outputs_need() -> None:
    whole = network(layer("relu", 0), layer("abs", 0), layer("tanh", 2), outputs=(3,))
    assert whole.pruned() == network(layer("abs", 0), layer("tanh", 1), outputs=(2,))


def test_values_from_outside() -> None:
    whole = network(layer("relu", 0), layer("abs", 1), layer("add", 2, 1), outputs=(3,))
    cut = whole.with_inputs_for((IMAGE,) * 4, frozenset({2}))
    assert cut == Network(inputs=(IMAGE, IMAGE), layers=(layer("relu", 0), layer("add", 1, 2)), outputs=(3,))


def test_shrinking_finds_the_layers_at_fault() -> None:
    """A fault that needs `neg` somewhere after `abs` is left with these two."""
    chain = ("relu", "abs", "tanh", "sigmoid", "neg", "relu")
    whole = network(*(layer(name, number) for number, name in enumerate(chain)), outputs=(6,))

    def still_wrong(smaller: Network) -> tuple[Value, ...] | None:
        operators = [one.operator for one in smaller.layers]
        wrong = "abs" in operators and "neg" in operators[operators.index("abs") :]
        return (*smaller.inputs, *[smaller.inputs[0]] * len(operators)) if wrong else None

    smallest = shrink.shrink(whole, (IMAGE,) * 7, still_wrong, seconds=30)
    assert [one.operator for one in smallest.layers] == ["abs", "neg"]
    assert smallest.inputs[0].shape == (1, 1, 1, 1)


def test_shrinking_ends_in_time() -> None:
    whole = network(*(layer("relu", number) for number in range(8)), outputs=(8,))
    assert shrink.shrink(whole, (IMAGE,) * 9, lambda _: (IMAGE,) * 9, seconds=0) == whole


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (Layer(operator="mul_scalar", operands=(0,), attributes={"scalar": 0}), "dead, constant, huge"),
        (Layer(operator="mul_scalar", operands=(0,), attributes={"scalar": 1e9}), "dead, constant, huge"),
        (Layer(operator="cat", operands=(0,), attributes={"axis": 9}), "Dimension out of range"),
        (Layer(operator="greater_scalar", operands=(0,), attributes={"scalar": -9.0}), "dead, constant, huge"),
    ],
)
def test_networks_that_prove_nothing_are_rejected(made: Layer, reason: str, tmp_path: Path) -> None:
    with pytest.raises(HandheldError, match=reason):
        make.make(network(made, outputs=(1,)), tmp_path / "made", "float32")


def test_what_is_steep_is_rejected(tmp_path: Path) -> None:
    steep = network(
        layer("tanh", 0), Layer(operator="greater_scalar", operands=(1,), attributes={"scalar": 0}), outputs=(2,)
    )
    with pytest.raises(make.RejectedError, match="rounding alone"):
        make.make(steep.model_copy(update={"inputs": (Value(shape=(1, 8, 40, 40)),)}), tmp_path / "made", "float16")


def test_unknown_names_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(HandheldError, match=r"unknown operator 'conv3d'\. Did you mean .*conv2d"):
        fuzz(only=["conv3d"], out=tmp_path)
    with pytest.raises(HandheldError, match="ExecuTorch has no fp16"):
        fuzz(to=["executorch"], recipe="fp16", out=tmp_path)


def test_known_faults_are_networks() -> None:
    for path in (Path(__file__).parents[1] / "faults").glob("*.json"):
        fault = json.loads(path.read_text())
        assert all(one.operator in TABLE for one in Network.model_validate(fault["network"]).layers)
