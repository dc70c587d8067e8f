"""handheld generate and bundle as a user types them: weights in diffusers' layout, ONNX, a bundle, and mistakes."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers_pipeline import GUIDANCE, NEGATIVE, PROMPT, SEED, STEPS, eager, their_pipeline
from test_road import document, handheld

from handheld import api
from handheld.errors import HandheldError
from handheld.export import files
from handheld.export.manifest import MANIFEST, Boundary, Manifest
from handheld.export.manifest import Schedule as Fixed
from handheld.export.metrics import psnr_db
from handheld.models import probe
from handheld.runtimes.pipelines import generate, pictures
from handheld.runtimes.pipelines.contract import Contract

ASKED = (PROMPT, "--seed", str(SEED), "--guidance", str(GUIDANCE), "--negative", NEGATIVE)


class Made:
    """What one run left: `out`, the artifacts; `picture`, `trace`, `report`; `expected`, diffusers' latents."""

    def __init__(self, place: Path) -> None:
        self.out, self.cache = place / "out", place / "cache"
        self.picture, self.trace, self.checkpoint = place / "picture.png", place / "trace.npz", place / "checkpoint"
        theirs = their_pipeline("pndm", place)
        for part, folder in ((theirs.text_encoder, "text_encoder"), (theirs.unet, "unet"), (theirs.vae, "vae")):
            probe.apply_probe_weights(part, seed=5)
            part.save_pretrained(self.checkpoint / folder)
        self.expected = eager(theirs, "pndm")
        done = handheld(
            *("generate", *ASKED, "--model", "sd15_tiny", "--steps", str(STEPS["pndm"]), "--json"),
            *("--checkpoint", str(self.checkpoint), "--artifacts", str(self.out)),
            *("--out", str(self.picture), "--trace", str(self.trace)),
            cache=self.cache,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.report = document(done)

    def generate(self, *arguments: str) -> Any:
        """The command line, with the artifacts that are there: the report."""
        done = handheld("generate", *ASKED, *arguments, "--json", cache=self.cache)
        assert done.returncode == 0, done.stdout + done.stderr
        return document(done)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def bundled(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundled") / "bundle"
    done = api.bundle(str(made.out), out=folder, steps=(STEPS["pndm"], 2), archive=True)
    assert done.archive and done.archive.is_file()
    return folder


@pytest.fixture
def no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is started now finds a torch that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not to be imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def test_every_step_of_a_checkpoint_is_that_of_diffusers(made: Made) -> None:
    with np.load(made.trace) as trace:
        found = {name: psnr_db(array, trace[name]) for name, array in made.expected.items() if name != "picture"}
    assert len(found) == STEPS["pndm"] + 2 and min(found.values()) >= 80, found
    seen, expected = pictures.load(made.picture).astype(int), np.rint(made.expected["picture"][0] * 255).astype(int)
    assert np.abs(seen - expected).max() <= 1
    assert {graph["weights"].split()[0] for graph in made.report["graphs"]} == {"checkpoint"}
    assert [stage["name"] for stage in made.report["stages"]][1:3] == ["load sd15_unet_tiny", "step 1 of 4"]


def test_quantized_networks_follow_the_float_ones(made: Made, tmp_path: Path) -> None:
    """From the same noise: near them at every step, and not the same."""
    given = (
        "--model",
        "sd15_tiny",
        "--steps",
        str(STEPS["pndm"]),
        "--recipe",
        "w8",
        "--trace",
        str(tmp_path / "w8.npz"),
    )
    weights = ("--checkpoint", str(made.checkpoint), "--artifacts", str(tmp_path / "out"))
    report = made.generate(*given, *weights, "--out", str(tmp_path / "w8.png"))
    assert {graph["recipe"] for graph in report["graphs"]} == {"w8"}
    floats, integers = np.load(made.trace), np.load(tmp_path / "w8.npz")
    for step in range(1, STEPS["pndm"] + 2):
        assert 35 < psnr_db(floats[f"latents/{step}"], integers[f"latents/{step}"]) < 80, step


@pytest.mark.usefixtures("no_torch")
def test_what_is_there_is_used_without_torch(made: Made, tmp_path: Path) -> None:
    again = tmp_path / "again.png"
    made.generate(
        *("--model", "sd15_tiny", "--steps", str(STEPS["pndm"]), "--artifacts", str(made.out), "--out", str(again))
    )
    assert again.read_bytes() == made.picture.read_bytes()


@pytest.mark.usefixtures("no_torch")
def test_a_bundle_is_enough(made: Made, bundled: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(bundled, tmp_path / "moved")
    report = made.generate("--bundle", str(moved), "--out", str(tmp_path / "bundled.png"))
    assert (tmp_path / "bundled.png").read_bytes() == made.picture.read_bytes()
    assert report["timesteps"] == made.report["timesteps"]


def test_a_bundle_holds_what_its_contract_names(bundled: Path) -> None:
    contract = files.read_record(bundled / "bundle.json", Contract)
    assert [graph.role for graph in contract.graphs] == ["text", "denoise", "decode"]
    assert [table.steps for table in contract.schedules] == [STEPS["pndm"], 2]
    there = {path for path in files.file_hashes(bundled) if not path.startswith("graphs/")}
    names = {"tokenizer/tokenizer.json", "tokenizer/vocab.json", "tokenizer/merges.txt"}
    assert there == names | {"bundle.json", "licences/handheld.txt", "licences/vocabulary.txt"}
    assert "Apache" in (bundled / "licences/handheld.txt").read_text()
    schema = json.loads((Path(__file__).parents[2] / "schemas" / "bundle.schema.json").read_text())
    written = json.loads((bundled / "bundle.json").read_text())
    assert set(schema["required"]) <= set(written) <= set(schema["properties"])


@pytest.mark.parametrize("damage", ["altered", "missing", "added", "contract", "steps", "sampler"])
def test_a_bundle_that_is_not_whole_is_refused(bundled: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(bundled, tmp_path / "bundle")
    merges = folder / "tokenizer" / "merges.txt"
    options: dict[str, Any] = {}
    if damage == "altered":
        merges.write_text(merges.read_text().replace("t h\n", "h t\n"))
    elif damage == "missing":
        merges.unlink()
    elif damage == "added":
        (folder / "more.txt").write_text("")
    elif damage == "contract":
        (folder / "bundle.json").write_text("{}")
    else:
        options = {"steps": 20} if damage == "steps" else {"sampler": "ddim"}
    says = {
        "altered": "merges.txt was altered since it was bundled",
        "missing": "lacks tokenizer/merges.txt",
        "added": "more.txt does not belong to the bundle",
        "contract": "bundle.json is no valid Contract",
        "steps": r"no schedule of 20 steps for pndm; it has 3 \(pndm\), 2 \(pndm\)",
        "sampler": "no schedule of 3 steps for ddim",
    }
    with pytest.raises(HandheldError, match=says[damage]):
        api.generate(PROMPT, bundle=folder, out=tmp_path / "x.png", **options)
    assert not (tmp_path / "x.png").exists()


def test_what_of_a_long_prompt_is_dropped_is_told(made: Made, tmp_path: Path) -> None:
    said: list[tuple[str, str]] = []
    done = api.generate(
        "fox " * 75 + "and Snow",
        "sd15_tiny",
        steps=1,
        artifacts=made.out,
        out=tmp_path / "x.png",
        progress=lambda *what: said.append(what),
    )
    assert done.dropped == "and Snow"
    assert ("prompt", 'too long for 77 tokens, so this was dropped: "and Snow"') in said


def test_an_altered_graph_is_refused(made: Made, tmp_path: Path) -> None:
    out = shutil.copytree(made.out, tmp_path / "out")
    graph = next(out.glob("sd15_decoder_tiny/*/*.onnx"))
    graph.write_bytes(graph.read_bytes() + b"\0")
    with pytest.raises(HandheldError, match="was altered since it was exported"):
        api.generate(PROMPT, "sd15_tiny", artifacts=out, out=tmp_path / "x.png")


def test_too_little_memory_is_told_before_the_start(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "available_bytes", lambda: 2**20)
    with pytest.raises(HandheldError, match=r"needs at least 0\.01 GB of memory; 0\.00 GB is free"):
        api.generate(PROMPT, "sd15_tiny", artifacts=made.out, out=tmp_path / "x.png")


def test_a_denoiser_for_fixed_steps_serves_those_only(made: Made, tmp_path: Path) -> None:
    out = shutil.copytree(made.out, tmp_path / "out")
    fixed = (out / "sd15_unet_tiny").rename(out / "sd15_unet_tiny.5steps") / "onnx-fp32" / MANIFEST
    manifest = files.read_record(fixed, Manifest)
    schedule = Fixed(input="timestep", values=(801.0, 601.0, 401.0, 201.0, 1.0))
    files.write_record(fixed, manifest.model_copy(update={"boundary": Boundary(schedule=schedule)}))
    with pytest.raises(HandheldError) as caught:
        api.generate(PROMPT, "sd15_tiny", steps=4, artifacts=out, out=tmp_path / "x.png")
    assert "(onnx-fp32) is made for 5 timesteps, not for those of 4 steps of pndm: 751, 501, 501" in str(caught.value)
    assert "Type: --steps 5, or --fixed-steps to export" in str(caught.value)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "pipeline": ({"model": "sd16"}, r"unknown pipeline 'sd16'\. Did you mean sd15"),
    "format": ({"to": "onix"}, r"unknown format 'onix'\. Did you mean onnx"),
    "recipe": ({"recipe": "fp12"}, r"unknown recipe 'fp12'"),
    "steps": ({"steps": 1000}, "expected 1 to 999 steps; came 1000"),
    "sampler": ({"sampler": "flow"}, "unknown sampler 'flow'.*Available: ddim, pndm"),
    "prompt": ({"prompt": "  "}, "the prompt is empty"),
    "unicode": ({"prompt": "a\udcff"}, "no valid Unicode"),
    "out": ({"out": Path("x.jpg")}, r"cannot write x\.jpg"),
    "trace": ({"trace": Path("x.txt")}, r"cannot write the trace to x\.txt: expected an \.npz"),
    "neither": ({"model": None}, "name a pipeline or a bundle"),
    "both": ({"bundle": Path("b")}, "name a pipeline or a bundle"),
    "bundle": ({"model": None, "bundle": Path("nothing")}, r"nothing is no bundle: it has no bundle\.json"),
    "checkpoint": ({"checkpoint": Path("nothing")}, "it has no folder text_encoder, unet, vae"),
    "no guidance": ({"model": "snapgenv_tiny", "negative": "fog"}, "this pipeline works without guidance"),
    "cut bundle": ({"model": None, "bundle": Path("b"), "parts": 2}, "a bundle has its networks"),
    "cut and fixed": ({"parts": 2, "fixed_steps": True}, "cut into parts or made for fixed steps, not both"),
    "guidance": ({"guidance": float("nan")}, "expected a finite --guidance; came nan"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_sentences(made: Made, tmp_path: Path, mistake: str) -> None:
    given, says = WRONG[mistake]
    options: dict[str, Any] = {
        "prompt": PROMPT,
        "model": "sd15_tiny",
        "out": tmp_path / "x.png",
        "artifacts": made.out,
        **given,
    }
    with pytest.raises(HandheldError, match=says):
        api.generate(options.pop("prompt"), options.pop("model"), **options)


def test_a_folder_that_is_no_bundle_is_left_alone(made: Made, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(HandheldError, match="is there and is no bundle"):
        api.bundle("sd15_tiny", out=tmp_path, artifacts=made.out)
    with pytest.raises(HandheldError, match="holds no whole pipeline as litert-fp32; it has nothing of those"):
        api.bundle(str(made.out), out=tmp_path / "bundle", to="litert")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
