"""Whole runs of our samplers lead where diffusers' lead."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers_reference import diffusers

from handheld.models.schedules import Array, Prediction, noise, schedule

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
TOLERANCE, PER_STEP = 1e-6, 2e-8
"""Of the largest value, in float32: both round in every step, and lie about as far from what float64 gives."""


def theirs(sampler: str, prediction: str) -> Any:
    library = diffusers()
    kind = {"epsilon": "epsilon", "v": "v_prediction"}.get(prediction)
    if sampler == "ddim":
        return library.DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, prediction_type=kind)
    if sampler == "pndm":
        return library.PNDMScheduler(**STABLE_DIFFUSION, skip_prk_steps=True, prediction_type=kind)
    return library.FlowMatchEulerDiscreteScheduler()


def network(latents: Array, timestep: int) -> Array:
    """Something that depends on both, as large as the latents."""
    return np.asarray(np.sin(latents * 1.3 + timestep * 0.01) + 0.1 * latents[::-1], np.float32)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 20, 50, 999])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_stable_diffusions_samplers(sampler: str, prediction: Prediction, steps: int) -> None:
    compare(sampler, prediction, steps)


@pytest.mark.parametrize("steps", [2, 4, 10, 28])
def test_rectified_flow(steps: int) -> None:
    compare("flow", "velocity", steps)


def compare(sampler: str, prediction: Prediction, steps: int) -> None:
    reference = theirs(sampler, prediction)
    reference.set_timesteps(steps)
    ours = schedule(sampler, steps, prediction)
    assert list(ours.timesteps) == reference.timesteps.tolist()
    latents, outputs, expected = [noise((1, 4, 8, 8), 3)], [], torch.from_numpy(noise((1, 4, 8, 8), 3))
    for index, timestep in enumerate(reference.timesteps):
        given = torch.from_numpy(network(expected.numpy(), int(timestep)))
        expected = reference.step(given, timestep, expected, return_dict=False)[0]
        outputs.append(network(latents[-1], ours.timesteps[index]))
        latents.append(ours.step(latents, outputs))
        error = np.abs(latents[-1] - expected.numpy()).max() / np.abs(expected.numpy()).max()
        assert error <= TOLERANCE + PER_STEP * steps, f"step {index}: {error}"
