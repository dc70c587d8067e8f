"""The fuzzer on all formats: clean networks come out clean; known faults are avoided, and there without us."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest

from handheld.benchmarks.fuzz.children import Child, EndedError
from handheld.benchmarks.fuzz.network import Layer, Network, Value
from handheld.benchmarks.fuzz.protocol import Converting, Drawing, Kind, Making, Outcome
from handheld.benchmarks.fuzz.worker import MAKER
from handheld.export.formats import FORMATS

FAULTS = sorted((Path(__file__).parents[1] / "faults").glob("*.json"))
SEED = 1000
CLEAN = 5
"""Networks in the default suite; `make false-alarms` runs many more."""
FORMATS_HERE = ("coreml", "coreai", "litert", "executorch", "onnx")
TIMEOUT = 300.0


class Fuzzing:
    """A child for each format and one that makes networks, shared by the tests of this file."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.children = {n: stack.enter_context(Child(n, folder / f"{n}.log")) for n in (MAKER, *FORMATS_HERE)}
        self.made = 0

    def make(self, network: Network) -> Path | None:
        """The folder of its program; None if it proves nothing."""
        self.made += 1
        folder = self.folder / str(self.made)
        reply = self.children[MAKER].ask(Making(network=network, folder=folder, weights="float32"), TIMEOUT)
        return folder if reply.values else None

    def convert(self, folder: Path, format_name: str, without: str = "") -> Outcome:
        request = Converting(folder=folder, recipe="fp32", without=without)
        outcome = self.children[format_name].ask(request, TIMEOUT).outcome
        assert outcome
        return outcome

    def draw(self, index: int) -> Network:
        network = self.children[MAKER].ask(Drawing(seed=f"{SEED}/{index}"), TIMEOUT).network
        assert network
        return network


@pytest.fixture(scope="module")
def fuzzing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzing]:
    with ExitStack() as stack:
        yield Fuzzing(tmp_path_factory.mktemp("fuzz"), stack)


def test_no_false_alarm(fuzzing: Fuzzing) -> None:
    """A few random networks on every format: right, or clearly refused."""
    seen: list[tuple[int, str, Outcome]] = []
    index = 0
    while len(seen) < CLEAN * len(FORMATS_HERE):
        folder = fuzzing.make(fuzzing.draw(index))
        if folder:
            seen += [(index, name, fuzzing.convert(folder, name)) for name in FORMATS_HERE]
        index += 1
    assert [found for found in seen if found[2].is_finding] == []
    assert sum(outcome.kind == "agrees" for *_, outcome in seen) > 0.7 * len(seen)


@pytest.mark.parametrize("path", FAULTS, ids=lambda path: path.stem)
def test_known_fault(path: Path, fuzzing: Fuzzing) -> None:
    """Right through handheld; wrong as before without the rewrite that avoids it, else it may go."""
    fault = json.loads(path.read_text())
    assert fault["format"] in FORMATS and fault["what"] and fault["versions"]
    folder = fuzzing.make(Network.model_validate(fault["network"]))
    assert folder
    assert fuzzing.convert(folder, fault["format"]).kind == "agrees"
    if fault["rewrite"]:
        without = fuzzing.convert(folder, fault["format"], fault["rewrite"]).kind
        assert without == cast(Kind, fault["without"]), (
            f"{path.name}: without {fault['rewrite']} it {without}; if the vendor mended it, remove the rewrite."
        )


def test_a_child_that_does_not_answer_is_killed_and_comes_back(fuzzing: Fuzzing) -> None:
    network = Network(inputs=(Value(shape=(2, 3)),), layers=(Layer(operator="relu", operands=(0,)),), outputs=(1,))
    folder = fuzzing.make(network)
    assert folder
    with pytest.raises(EndedError, match="no answer within 0 s") as caught:
        fuzzing.children[MAKER].ask(Making(network=network, folder=fuzzing.folder / "late", weights="float32"), 1e-4)
    assert caught.value.timed_out
    assert fuzzing.make(network)
