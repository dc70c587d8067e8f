"""Samplers: what they refuse, noise, guidance, JSON. (Whole runs against diffusers': tests/host.)"""

from dataclasses import asdict

import numpy as np
import pytest
from pydantic import TypeAdapter

from handheld.errors import HandheldError
from handheld.models.schedules import Schedule, guided, noise, schedule


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_the_right_noise_leads_to_the_picture(sampler: str) -> None:
    """If the network knows the noise, or alpha · noise - sigma · picture, the latents end at what they were made of."""
    table, v_table = schedule(sampler, 7, "epsilon"), schedule(sampler, 7, "v")
    alpha = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    picture, grain = noise((1, 4, 3, 3), 1), noise((1, 4, 3, 3), 2)
    signal, sigma = np.sqrt(alpha[table.timesteps[0]]), np.sqrt(1 - alpha[table.timesteps[0]])
    begin = np.asarray(signal * picture + sigma * grain, np.float32)
    end = np.sqrt(alpha[0]) * picture + np.sqrt(1 - alpha[0]) * grain
    latents, outputs = [begin], []
    for _ in table.timesteps:
        outputs.append(grain)
        latents.append(table.step(latents, outputs))
    assert np.abs(latents[-1] - end).max() <= 1e-5
    if sampler == "ddim":
        latents, outputs = [begin], []
        for timestep in v_table.timesteps:
            outputs.append(np.asarray(np.sqrt(alpha[timestep]) * grain - np.sqrt(1 - alpha[timestep]) * picture))
            latents.append(v_table.step(latents, outputs))
        assert np.abs(latents[-1] - end).max() <= 1e-5


def test_flow_goes_straight_to_the_picture() -> None:
    table, picture, begin = schedule("flow", 4, "velocity"), noise((4, 4, 3, 3), 1), noise((4, 4, 3, 3), 2)
    assert table.timesteps == (1000, 667, 334, 1)
    latents, outputs = [begin], []
    for _ in table.timesteps:
        outputs.append(begin - picture)
        latents.append(table.step(latents, outputs))
    assert np.abs(latents[-1] - picture).max() <= 1e-6


def test_noise_is_decided_by_its_seed() -> None:
    drawn = noise((1, 4, 64, 64), 0)
    assert drawn.dtype == np.float32 and abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02
    assert np.array_equal(drawn, noise((1, 4, 64, 64), 0)) and not np.array_equal(drawn, noise((1, 4, 64, 64), 1))
    assert drawn[0, 0, 0, :3].tolist() == [1.2441864013671875, 0.2358551025390625, 0.714111328125]


def test_guidance_goes_beyond_the_prompt() -> None:
    both = np.array([[1.0, 2.0], [3.0, 2.0]], np.float32)
    assert guided(both, 7.5).tolist() == [[16.0, 2.0]] and guided(both, 1).tolist() == [[3.0, 2.0]]


def test_a_table_survives_json() -> None:
    adapter = TypeAdapter(Schedule)
    table = schedule("pndm", 20, "v")
    assert adapter.validate_json(adapter.dump_json(table)) == table
    assert all(np.float32(number) == number for number in asdict(table)["keep"])


@pytest.mark.parametrize(
    ("sampler", "steps", "prediction", "message"),
    [
        ("ddmi", 8, "v", "unknown sampler 'ddmi'. Did you mean ddim or pndm? Available: ddim, pndm."),
        ("flow", 8, "epsilon", "unknown sampler 'flow'. Available: ddim, pndm."),
        ("ddim", 8, "velocity", "unknown sampler 'ddim'. Available: flow."),
        ("ddim", 0, "v", "expected 1 to 999 steps; came 0."),
        ("pndm", 1000, "epsilon", "expected 1 to 999 steps; came 1000."),
    ],
)
def test_what_does_not_fit_is_refused(sampler: str, steps: int, prediction: str, message: str) -> None:
    with pytest.raises(HandheldError) as caught:
        schedule(sampler, steps, prediction)  # type: ignore[arg-type]
    assert message in str(caught.value)
