"""Samplers: how a network's outputs lead from noise to latents, step by step. numpy alone.

Every deterministic sampler here is a table of numbers. The latents after step i are

    keep[i] · latents[start[i]] + add[i] · (mix[i][0] · output[i] + mix[i][1] · output[i - 1] + …)

in float32, where latents[0] is the noise and output[i] is what the network gives for latents[i] at timesteps[i].
So an app needs the table and one line. `ddim` and `pndm` are Stable Diffusion's (arXiv 2010.02502 and 2202.09778):
1000 training steps, betas linear in their roots from 0.00085 to 0.012, the last step leads to the first of them,
timesteps counted from 1. `flow` is Euler's method for rectified flow (arXiv 2209.03003). All are equal to diffusers'.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from handheld.errors import HandheldError, unknown
from handheld.models.inputs import draw
from handheld.models.spec import TensorSpec

Sampler = Literal["ddim", "pndm", "flow"]
Prediction = Literal["epsilon", "v", "velocity"]
"""What the network gives: the noise; alpha · noise - sigma · picture; or, for `flow`, noise - picture."""

TRAINED = 1000
BETAS = (0.00085, 0.012)
ADAMS = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Adams' and Bashforth's weights of the last outputs, for as many as there are."""

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """The table of one sampler for one number of steps; the module's docstring says how it is used."""

    sampler: Sampler
    prediction: Prediction
    steps: int
    """As asked for; `pndm` calls the network once more than that."""
    timesteps: tuple[int, ...]
    keep: tuple[float, ...]
    add: tuple[float, ...]
    start: tuple[int, ...]
    mix: tuple[tuple[float, ...], ...]

    def step(self, latents: Sequence[Array], outputs: Sequence[Array]) -> Array:
        """The next latents, from all latents so far (the noise first) and all outputs so far."""
        index = len(outputs) - 1
        output = outputs[index]
        if self.mix[index] != (1.0,):
            pairs = zip(self.mix[index], reversed(outputs), strict=False)
            output = sum((np.float32(weight) * given for weight, given in pairs), np.zeros_like(output))
        kept = np.float32(self.keep[index]) * latents[self.start[index]]
        return np.asarray(kept + np.float32(self.add[index]) * output, np.float32)


def schedule(sampler: str, steps: int, prediction: Prediction) -> Schedule:
    """The table of a sampler. Raises `HandheldError` for an unknown one, one that does not fit, or too many steps."""
    made: dict[str, Callable[[int, Any], Schedule]] = {"ddim": ddim, "pndm": pndm, "flow": flow}
    fitting = ["flow"] if prediction == "velocity" else ["ddim", "pndm"]
    if sampler not in fitting:
        raise unknown("sampler", sampler, fitting, hint=f"The network predicts {prediction}: others do not fit it.")
    if not 1 <= steps < TRAINED:
        raise HandheldError(f"expected 1 to {TRAINED - 1} steps; came {steps}.")
    return made[sampler](steps, prediction)


def ddim(steps: int, prediction: Literal["epsilon", "v"]) -> Schedule:
    """DDIM without noise between steps."""
    timesteps = _leading(steps)
    keep, add = _coefficients(timesteps, timesteps - TRAINED // steps, prediction)
    return Schedule("ddim", prediction, steps, _ints(timesteps), keep, add, tuple(range(steps)), ((1.0,),) * steps)


def pndm(steps: int, prediction: Literal["epsilon", "v"]) -> Schedule:
    """The linear multistep form that Stable Diffusion uses.

    The first step is made twice: once to learn what the network gives where it leads, then from the noise again with
    the mean of both outputs. That second output is not used later.
    """
    once = _leading(steps)
    came_from = np.concatenate([once[:1], once])[: steps + (steps > 1)]
    timesteps = np.concatenate([once[:2], once[1:]])
    keep, add = _coefficients(came_from, came_from - TRAINED // steps, prediction)
    start, mix = [0, 0, *range(2, steps + 1)], [(1.0,), (0.5, 0.5)]
    for index in range(2, steps + 1):
        weights = list(ADAMS[min(index, 4) - 1])
        if index <= len(ADAMS):
            weights.insert(index - 1, 0.0)
        mix.append(tuple(weights))
    count = len(timesteps)
    return Schedule("pndm", prediction, steps, _ints(timesteps), keep, add, tuple(start[:count]), tuple(mix[:count]))


def flow(steps: int, prediction: Literal["velocity"]) -> Schedule:
    """Euler's method at times that are evenly spaced from 1 to 1/1000, then 0.

    Timesteps are whole numbers, so they are rounded (of 4 steps none needs it).
    """
    times = np.append(np.linspace(1, 1 / TRAINED, steps), 0.0)
    timesteps = _ints(np.rint(times[:-1] * TRAINED).astype(np.int64))
    add = _floats(np.diff(times.astype(np.float32)))
    return Schedule("flow", prediction, steps, timesteps, (1.0,) * steps, add, tuple(range(steps)), ((1.0,),) * steps)


def noise(shape: tuple[int, ...], seed: int) -> Array:
    """The latents to begin with: mean 0, variance 1, the same bits for a seed on every machine."""
    return np.asarray(draw(TensorSpec("latents", shape), seed, "normal"), np.float32)


def guided(output: Array, guidance: float) -> Array:
    """From the network's outputs without and with the prompt (the first axis), as far beyond the latter as asked."""
    without, prompted = np.split(output, 2)
    return np.asarray(without + np.float32(guidance) * (prompted - without), np.float32)


def _leading(steps: int) -> npt.NDArray[np.int64]:
    """Evenly spaced, the largest first, the last one 1."""
    return np.arange(steps)[::-1] * (TRAINED // steps) + 1


def _coefficients(
    at: npt.NDArray[np.int64], to: npt.NDArray[np.int64], prediction: Prediction
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the latents and the output are multiplied by, on the way from timesteps `at` to `to`.

    With the cumulated alpha `a` at a timestep, the picture is (latents - sqrt(1 - a) · noise) / sqrt(a), and the next
    latents are sqrt(a') · picture + sqrt(1 - a') · noise: equations 9 and 12 of arXiv 2010.02502, which are linear.
    """
    alphas = _alphas()
    signal, sigma = np.sqrt(alphas[at]), np.sqrt(1 - alphas[at])
    after = alphas[np.maximum(to, 0)]
    next_signal, next_sigma = np.sqrt(after), np.sqrt(1 - after)
    if prediction == "epsilon":
        return _floats(next_signal / signal), _floats(next_sigma - next_signal * sigma / signal)
    return _floats(next_signal * signal + next_sigma * sigma), _floats(next_sigma * signal - next_signal * sigma)


def _alphas() -> Floats:
    """The products of 1 - beta up to each timestep, to the bit as diffusers has them in float32.

    Near the last step 1 - alpha is a thousandth of alpha, and shows each rounding. So the roots of the betas are spaced
    as torch.linspace does it: a float32 step, counted from either end up to the middle.
    """
    low, high = np.sqrt(np.array(BETAS)).astype(np.float32)
    step, index = np.float64((high - low) / np.float32(TRAINED - 1)), np.arange(TRAINED)
    roots = np.where(index < TRAINED // 2, low + step * index, high - step * (TRAINED - 1 - index)).astype(np.float32)
    return np.cumprod((1 - roots**2).astype(np.float64)).astype(np.float32).astype(np.float64)


def _ints(values: npt.NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(map(int, values))


def _floats(values: npt.NDArray[Any]) -> tuple[float, ...]:
    """The nearest float32s: what is computed with, so that they can be written down exactly."""
    return tuple(map(float, values.astype(np.float32)))
