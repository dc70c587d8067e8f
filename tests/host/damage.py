"""Damages converted files in every way and runs each: `python damage.py FOLDER COUNT [SEED [FORMAT …]]`.

FOLDER/FORMAT holds what `tiny_artifacts.py` made, or will. Each damaged file is loaded and run by its runtime in a
process of its own, forked from one that has imported the runtime, with a memory and a time limit: what a check does
with a file, but for the start of Python. Prints what became of them. Ends with 1 if anything but our own error came out
of a runtime.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from handheld import runtimes
from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.formats.base import Signature
from handheld.export.process import limit_memory

FORMATS = ("onnx", "litert", "executorch", "coreai")
"""Core ML's damaged packages are in test_coreml_faults.py."""

SECONDS = 20.0
MEMORY_BYTES = 1 << 30
"""What one run may take beyond what the imported runtime has; the whole network needs some hundred kilobytes."""

OUTCOMES = ("refused", "ran, equal", "ran, differs", "out of memory", "not our error")
"""What a run tells by its exit code, 10 and on; a process that ends otherwise crashed or was stopped."""


@dataclass
class Tally:
    """What became of one format's damaged files."""

    outcomes: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """The bytes with one to four things done to them."""
    data = bytearray(whole)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        kind = chance.choice(("bytes", "number", "number", "cut", "zeros", "copy", "swap", "insert", "remove", "head"))
        start = chance.randrange(len(data)) if data else 0
        length = min(chance.choice((1, 4, 16, 256, 4096)), max(0, len(data) - start))
        if kind == "bytes":
            for _ in range(chance.randint(1, 32)):
                data[chance.randrange(len(data))] = chance.randrange(256)
        elif kind == "number":
            place = start // 4 * 4
            data[place : place + 4] = chance.choice(
                (0, 1, 2**31 - 1, 2**31, 2**32 - 1, chance.randrange(2**32))
            ).to_bytes(4, "little")
        elif kind == "cut":
            del data[max(1, start) :]
        elif kind == "zeros":
            data[start : start + length] = bytes(length)
        elif kind == "copy":
            other = chance.randrange(len(data))
            data[start : start + length] = data[other : other + length]
        elif kind == "swap":
            other = chance.randrange(len(data))
            one, two = bytes(data[start : start + length]), bytes(data[other : other + length])
            data[start : start + length], data[other : other + length] = two, one
        elif kind == "insert":
            data[start:start] = chance.randbytes(length)
        elif kind == "remove":
            del data[start : start + length]
        else:
            place = chance.randrange(min(64, len(data)))
            data[place : place + 1] = bytes([chance.randrange(256)])
        if not data:
            return b""
    return bytes(data)


def write_damaged(artifact: Path, to: Path, chance: random.Random) -> None:
    """A damaged copy. Of a bundle one file is; Core AI's hash of its program is made anew three times in four."""
    if artifact.is_file():
        to.write_bytes(damaged(artifact.read_bytes(), chance))
        return
    shutil.copytree(artifact, to)
    victims = sorted(path for path in to.rglob("*") if path.is_file())
    program = to / "main.mlirb"
    victim = program if chance.random() < 0.8 else chance.choice(victims)
    victim.write_bytes(damaged(victim.read_bytes(), chance))
    if victim == program and chance.random() < 0.75:
        import hashlib

        (to / "main.hash").write_bytes(hashlib.sha256(program.read_bytes()).digest())


def run_all(format_name: str, folder: Path, place: Path, count: int, seed: int) -> Tally:
    """Damage and run `count` files of one format."""
    artifact = next(folder.glob("tiny.*"))
    signature = files.read_record(folder / "signature.json", Signature)
    with np.load(folder / "golden.npz", allow_pickle=False) as arrays:
        golden = dict(arrays)
    runtimes.for_format(format_name).start()
    tally = Tally()
    start = time.monotonic()
    for index in range(count):
        chance = random.Random(f"{format_name} {seed} {index}")
        path = place / f"damaged{artifact.suffix}"
        write_damaged(artifact, path, chance)
        outcome, peak = _forked(format_name, path, signature, golden, place / "log.txt")
        tally.outcomes[outcome] += 1
        tally.peak_bytes = max(tally.peak_bytes, peak)
        if outcome == "not our error":
            tally.wrong.append(
                f"{format_name} {seed} {index}: {(place / 'log.txt').read_text(errors='replace')[-500:]}"
            )
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    tally.seconds = time.monotonic() - start
    return tally


def _forked(
    format_name: str, path: Path, signature: Signature, golden: dict[str, np.ndarray], log: Path
) -> tuple[str, int]:
    """What became of one file in a process of its own, and that process's peak memory."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            limit_memory(MEMORY_BYTES)
            outcome = _run(format_name, path, signature, golden)
        except BaseException as error:
            os.write(2, repr(error).encode())
            outcome = "not our error"
        os._exit(10 + OUTCOMES.index(outcome))
    end = time.monotonic() + SECONDS
    pause = 0.001
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            _, _, usage = os.wait4(child, 0)
            return "stopped at the time limit", usage.ru_maxrss * 1024
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)
    if os.WIFSIGNALED(status):
        return f"crashed, {signal.Signals(os.WTERMSIG(status)).name}", usage.ru_maxrss * 1024
    code = os.WEXITSTATUS(status) - 10
    return OUTCOMES[code] if 0 <= code < len(OUTCOMES) else f"ended with {code + 10}", usage.ru_maxrss * 1024


def _run(format_name: str, path: Path, signature: Signature, golden: dict[str, np.ndarray]) -> str:
    try:
        session = runtimes.for_format(format_name).load(path, signature)
        outputs = session.run({spec.name: golden[spec.name] for spec in signature.inputs})
    except HandheldError:
        return "refused"
    except MemoryError:
        return "out of memory"
    same = all(np.allclose(outputs[spec.name], golden[spec.name], atol=1e-5) for spec in signature.outputs)
    return "ran, equal" if same else "ran, differs"


def main() -> int:
    """One process for each format, one after another: runtimes do not all like each other's company after a fork."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    wanted = sys.argv[4:] or list(FORMATS)
    if len(wanted) > 1:
        codes = [os.spawnv(os.P_WAIT, sys.executable, [sys.executable, *_arguments(name, seed)]) for name in wanted]
        return max(codes)
    (name,) = wanted
    if not (folder / name).exists():
        (folder / name).mkdir(parents=True)
        script = Path(__file__).with_name("tiny_artifacts.py")
        subprocess.run([sys.executable, "-W", "ignore", script, name, folder / name], check=True, capture_output=True)
    place = folder / f"damage-{name}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    tally = run_all(name, folder / name, place, count, seed)
    outcomes = ", ".join(f"{outcome} {number}" for outcome, number in sorted(tally.outcomes.items()))
    sys.stdout.write(
        f"{name}: {tally.outcomes.total()} damaged files in {tally.seconds:.0f} s: {outcomes}; "
        f"largest process {tally.peak_bytes / 1e6:.0f} MB\n"
    )
    for wrong in tally.wrong[:10]:
        sys.stdout.write(f"  {wrong}\n")
    shutil.rmtree(place)
    return 1 if tally.wrong else 0


def _arguments(name: str, seed: int) -> list[str]:
    return [__file__, sys.argv[1], sys.argv[2], str(seed), name]


if __name__ == "__main__":
    sys.exit(main())
