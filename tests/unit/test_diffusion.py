"""The calls of a pipeline, with graphs that remember them; a graph in a child process, and its faults."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.formats.base import Signature
from handheld.export.manifest import Schedule as Fixed
from handheld.export.quantize import calibration
from handheld.models import pipelines, zoo
from handheld.models.schedules import guided, noise, schedule
from handheld.models.spec import TensorSpec
from handheld.runtimes.base import Array
from handheld.runtimes.null import Behaviour, expected
from handheld.runtimes.pipelines.contract import Contract, Graph, contract_of
from handheld.runtimes.pipelines.diffusion import Runs, sample
from handheld.runtimes.pipelines.served import Opening, Served

OUTPUTS = {
    "clip_text_tiny": (2, 77, 32),
    "sd15_unet_tiny": (2, 4, 8, 8),
    "sd15_decoder_tiny": (1, 3, 16, 16),
    "snapgenv_unet_tiny": (4, 4, 8, 8),
    "snapgenv_temporal_decoder_tiny": (8, 4, 8, 8),
    "snapgenv_image_decoder_tiny": (2, 3, 16, 16),
}


class Graphs:
    """Stand-ins: each gives a number that grows with every call; `calls` has what each was given."""

    def __init__(self, nan: str = "") -> None:
        self.calls: list[tuple[str, Mapping[str, Array]]] = []
        self.opened: list[str] = []
        self._nan = nan

    @contextmanager
    def open(self, graph: Graph) -> Iterator[Runs]:
        others = [name for name in self.opened if name.partition(".")[0] != graph.model.partition(".")[0]]
        assert not others, f"{graph.model} was opened while {others} was open"
        self.opened.append(graph.model)

        class Running:
            @staticmethod
            def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
                assert {name: array.shape for name, array in inputs.items()} == {
                    spec.name: spec.shape for spec in graph.signature.inputs
                }
                self.calls.append((graph.model, {name: array.copy() for name, array in inputs.items()}))
                value = np.nan if graph.model == self._nan else 0.01 * len(self.calls)
                (output,) = graph.signature.outputs
                along = np.arange(output.shape[0]).reshape(-1, *[1] * (len(output.shape) - 1))
                return {output.name: np.asarray(value + along + np.zeros(output.shape), np.float32)}

        yield Running()
        self.opened.remove(graph.model)

    def named(self, model: str) -> list[Mapping[str, Array]]:
        return [inputs for name, inputs in self.calls if name == model]


def contract(name: str, **changes: Any) -> Contract:
    spec = pipelines.get(name)
    graphs = [
        Graph(
            role=part.role,
            model=part.model,
            format="null",
            recipe="fp16",
            file=part.model,
            sha256="",
            size_bytes=0,
            weights="none",
            signature=Signature(
                inputs=zoo.get(part.model).inputs, outputs=(TensorSpec("output", OUTPUTS[part.model]),)
            ),
            **changes.get(part.role, {}),
        )
        for part in spec.parts
    ]
    return contract_of(spec, graphs)


IDS = np.arange(154, dtype=np.int32).reshape(2, 77)


def test_both_passes_of_guidance_are_one_batch() -> None:
    graphs, made, table = Graphs(), contract("sd15_tiny"), schedule("ddim", 3, "epsilon")
    begin = noise(made.latents, 0)
    done = sample(made, table, IDS, begin, 7.5, graphs.open)
    calls = graphs.named("sd15_unet_tiny")
    assert [int(call["timestep"][0]) for call in calls] == [667, 334, 1]
    assert all(np.array_equal(call["sample"][0], call["sample"][1]) for call in calls)
    assert all(np.array_equal(call["text"], done.text) for call in calls)
    assert np.array_equal(calls[0]["sample"][:1], begin)
    first = np.asarray(0.02 + np.arange(2).reshape(2, 1, 1, 1) + np.zeros((2, 4, 8, 8)), np.float32)
    assert np.array_equal(done.outputs[0], guided(first, 7.5))
    assert np.array_equal(done.latents[1], table.step([begin], [guided(first, 7.5)]))
    assert np.array_equal(graphs.named("sd15_decoder_tiny")[0]["latents"], done.latents[-1])


def test_the_denoisers_inputs_at_every_step_calibrate_it(tmp_path: Path) -> None:
    graphs, made, table = Graphs(), contract("sd15_tiny"), schedule("ddim", 3, "epsilon")
    done = sample(made, table, IDS, noise(made.latents, 0), 7.5, graphs.open)
    np.savez(tmp_path / "trace.npz", **done.arrays())  # type: ignore[arg-type]
    specs = made.graph("denoise").signature.inputs
    found, _ = calibration.load(str(tmp_path / "trace.npz"), specs)
    calls = graphs.named("sd15_unet_tiny")
    assert len(found) == len(calls) == 3
    for batch, call in zip(found, calls, strict=True):
        assert all(np.array_equal(given, call[spec.name]) for given, spec in zip(batch, specs, strict=True))


def test_a_video_sees_the_prompt_alone_and_is_decoded_in_pieces() -> None:
    graphs, made, table = Graphs(), contract("snapgenv_tiny"), schedule("flow", 4, "velocity")
    done = sample(made, table, IDS, noise(made.latents, 0), None, graphs.open)
    calls = graphs.named("snapgenv_unet_tiny")
    assert len(calls) == 4 and np.array_equal(calls[0]["text"], done.text[1:])
    assert [len(call["latents"]) for call in graphs.named("snapgenv_image_decoder_tiny")] == [2, 2, 2, 2]
    assert done.pictures.shape == (8, 3, 16, 16) and done.latents[0].shape == (4, 4, 8, 8)


def test_a_graph_for_fixed_steps_takes_their_places() -> None:
    fixed = Fixed(input="timestep", values=(1.0, 334.0, 667.0))
    graphs, made = Graphs(), contract("sd15_tiny", denoise={"fixed": fixed})
    sample(made, schedule("pndm", 3, "epsilon"), IDS, noise(made.latents, 0), 1.0, graphs.open)
    assert [int(call["timestep"][0]) for call in graphs.named("sd15_unet_tiny")] == [2, 1, 1, 0]


def test_a_denoiser_that_was_cut_passes_on_what_its_parts_give() -> None:
    graphs, whole, table = Graphs(), contract("sd15_tiny"), schedule("ddim", 2, "epsilon")
    text, unet, decoder = whole.graphs
    sample_spec, timestep, text_spec = unet.signature.inputs
    hidden, output = TensorSpec("hidden", (2, 5)), TensorSpec("output", (2, 4, 8, 8))
    halves = [
        unet.model_copy(update={"model": f"{unet.model}.{name}", "signature": Signature(inputs=given, outputs=gives)})
        for name, given, gives in (
            ("1of2", (sample_spec, timestep), (hidden,)),
            ("2of2", (hidden, text_spec), (output,)),
        )
    ]
    made = contract_of(pipelines.get("sd15_tiny"), (text, *halves, decoder))
    done = sample(made, table, IDS, noise(made.latents, 0), 7.5, graphs.open)
    second = graphs.named("sd15_unet_tiny.2of2")
    assert len(second) == 2 and np.array_equal(second[0]["text"], done.text)
    assert second[1]["hidden"][:, 0].tolist() == [np.float32(0.04), np.float32(1.04)]


def test_values_that_are_no_numbers_end_a_run_with_the_step() -> None:
    with pytest.raises(HandheldError, match=r"step 1 of 3: sd15_unet_tiny gave .* no finite numbers(.|\n)*fp32"):
        sample(
            *(contract("sd15_tiny"), schedule("ddim", 3, "epsilon"), IDS, noise((1, 4, 8, 8), 0), 7.5),
            Graphs(nan="sd15_unet_tiny").open,
        )


def test_graphs_of_different_pipelines_do_not_fit() -> None:
    spec, made = pipelines.get("sd15_tiny"), contract("sd15_tiny")
    text, unet, decoder = made.graphs
    wide = Signature(inputs=text.signature.inputs, outputs=(TensorSpec("output", (2, 77, 768)),))
    with pytest.raises(HandheldError, match=r"gives a text of 2x77x768; sd15_unet_tiny takes one of 2x77x32"):
        contract_of(spec, (text.model_copy(update={"signature": wide}), unet, decoder))


def test_every_pipeline_has_a_twin_of_the_same_parts() -> None:
    for name, spec in pipelines.PIPELINES.items():
        assert spec.tiny == name.endswith("_tiny")
        twin = pipelines.get(name.removesuffix("_tiny") + "_tiny")
        assert [part.model.removesuffix("_tiny") + "_tiny" for part in spec.parts] == [p.model for p in twin.parts]


SIGNATURE = Signature(inputs=(TensorSpec("x", (2, 3)),), outputs=(TensorSpec("y", (4,)),))


def served(folder: Path, behaviour: Behaviour, timeout: float = 60) -> Served:
    files.write_record(folder / "x.null", behaviour)
    return Served(Opening(folder / "x.null", "null", SIGNATURE, 1), timeout)


def test_a_served_graph_answers_until_it_is_closed(tmp_path: Path) -> None:
    with served(tmp_path, Behaviour()) as graph:
        for value in (1.0, 2.0):
            inputs = {"x": np.full((2, 3), value, np.float32)}
            assert np.array_equal(graph.run(inputs)["y"], expected(SIGNATURE, inputs)["y"])
        with pytest.raises(HandheldError, match="wrong inputs: expected x=2x3:float32; came z"):
            graph.run({"z": np.zeros(3)})
        child = graph._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        (Behaviour(load="raise"), "cannot load .*told to fail"),
        (Behaviour(load="segfault"), "could not be run: it was killed by SIGSEGV"),
        (Behaviour(run="raise"), "failed while running: RuntimeError: told to fail"),
        (Behaviour(run="exit"), "could not be run: it ended with exit code 3"),
        (Behaviour(run="hang"), "gave nothing within 5 s: it was stopped"),
    ],
)
def test_a_served_graphs_faults_are_told(tmp_path: Path, behaviour: Behaviour, says: str) -> None:
    timeout = 5 if behaviour.run == "hang" else 60
    with pytest.raises(HandheldError, match=says), served(tmp_path, behaviour, timeout) as graph:
        graph.run({"x": np.zeros((2, 3), np.float32)})
