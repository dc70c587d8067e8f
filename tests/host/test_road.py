"""The whole road as a user walks it, on a tiny network of their own: export, check, bench, report, run, show."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handheld.benchmarks.cells import find
from handheld.benchmarks.fidelity.runs import Part, execute
from handheld.export.golden import GoldenData
from handheld.export.metrics import worst
from handheld.runtimes.jobfolder import read_case
from handheld.runtimes.targets import HostTarget

TINY = str(Path(__file__).resolve().parent / "tiny_net.py")
FORMATS = ("coreml", "coreai", "litert", "executorch", "onnx")


def handheld(
    *arguments: str, cache: Path, timeout: float = 400, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a process of its own."""
    environment = {**os.environ, "HANDHELD_CACHE": str(cache), "COLUMNS": "200"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2] / "src"), *sys.path])
    return subprocess.run(
        [sys.executable, "-m", "handheld.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        cwd=cwd,
        check=False,
    )


def document(done: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON document on standard output."""
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """The tiny network shipped to all five formats once: (folder, cache, the report)."""
    place = tmp_path_factory.mktemp("road")
    out, cache = place / "out", place / "cache"
    done = handheld("ship", f"{TINY}:tiny", "--out", str(out), "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    return out / "tiny", cache, document(done)


def test_every_format_is_made_checked_and_told(road: tuple[Path, Path, Any]) -> None:
    folder, _, report = road
    assert [c["format"] for c in report["export"]["cells"]] == list(FORMATS)
    assert {c["status"] for c in report["export"]["cells"]} == {"converted"}
    checks = {c["format"]: c for c in report["check"]["cells"]}
    assert {f: c["status"] for f, c in checks.items()} == dict.fromkeys(FORMATS, "passed")
    for name, check in checks.items():
        assert float(check["parity"]["psnr_db"]) > (50 if name in ("coreai", "coreml") else 100)
        assert (check["basis"], check["parity"]["cases"]) == ("host", 8)
    benches = {c["format"]: c["status"] for c in report["bench"]["cells"]}
    assert benches["coreai"] == "not timed"
    assert benches["coreml"] == ("measured" if sys.platform == "darwin" else "not timed")
    assert [benches[name] for name in ("litert", "executorch", "onnx")] == ["measured"] * 3
    assert "weights: as tiny gives them" in (folder / "report.md").read_text().lower()


def test_names_and_dtypes_are_stable_on_every_format(road: tuple[Path, Path, Any]) -> None:
    folder, _, _ = road
    for manifest_path in folder.glob("*/manifest.json"):
        manifest = json.loads(manifest_path.read_text())
        signature = manifest["signature"]
        assert [s["name"] for s in signature["inputs"]] == ["image", "ids"]
        assert [s["name"] for s in signature["outputs"]] == ["scores", "features"]
        assert signature["inputs"][1]["dtype"] == "int64"
        if manifest["format"] in ("coreml", "coreai"):
            assert signature["casts"]["ids"] == "int32"
        if manifest["format"] != "executorch":  # which has inputs by position only
            assert [s["name"] for s in manifest["inspection"]["inputs"]] == ["image", "ids"]
        # What LiteRT's converter decomposes, it decomposes by itself.
        last = [] if manifest["format"] == "litert" else ["decomposed"]
        assert [stage["name"] for stage in manifest["stages"]] == ["exported", "rewritten", *last]
        assert all(float(stage["psnr_db"]) > 55 for stage in manifest["stages"])
        assert manifest["conversion"]["peak_memory_bytes"] > 50e6
        assert (manifest_path.parent / "conversion.log").is_file()


def test_a_second_export_comes_from_the_cache_and_copies_whole_files(
    road: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    folder, cache, _ = road
    done = handheld("export", f"{TINY}:tiny", "--out", str(tmp_path), "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    assert {c["status"] for c in document(done)["cells"]} == {"cached"}
    for name in ("onnx-fp32/tiny.onnx", "coreml-fp16/tiny.mlpackage/Manifest.json", "golden.npz"):
        assert (tmp_path / "tiny" / name).read_bytes() == (folder / name).read_bytes()
        assert not (tmp_path / "tiny" / name).is_symlink()


def test_an_altered_file_fails_and_is_called_altered(road: tuple[Path, Path, Any], tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    folder, cache, _ = road
    shutil.copytree(folder, tmp_path / "tiny", ignore=shutil.ignore_patterns("core*", "lite*", "exec*"))
    path = tmp_path / "tiny" / "onnx-fp32" / "tiny.onnx"
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    array = numpy_helper.to_array(weight).copy()
    array.flat[0] += 1
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)
    done = handheld("check", str(tmp_path), "--json", cache=cache)
    assert done.returncode == 1
    (cell,) = document(done)["cells"]
    assert (cell["status"], cell["altered"]) == ("failed", True)
    assert "below 80 dB" in cell["reason"]


def test_required_formats_that_did_not_run_are_exit_code_2(road: tuple[Path, Path, Any]) -> None:
    folder, cache, _ = road
    done = handheld("check", str(folder), "--require", "onnx,executorch-coreml", "--json", cache=cache)
    assert done.returncode == 2
    assert document(done)["required_but_not_run"] == ["executorch-coreml"]


def test_an_onnx_file_is_checked_by_onnx_itself_and_run(road: tuple[Path, Path, Any], tmp_path: Path) -> None:
    folder, cache, _ = road
    source = folder / "onnx-fp32" / "tiny.onnx"
    done = handheld("ship", str(source), "--input", "ids=1x4:int64:11", "--out", str(tmp_path), "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    (cell,) = document(done)["check"]["cells"]
    assert cell["status"] == "passed" and "reference evaluator" in cell["reference"]
    assert (tmp_path / "tiny" / "onnx-fp32" / "tiny.onnx").read_bytes() == source.read_bytes()
    done = handheld("ship", str(source), "--to", "litert", "--out", str(tmp_path), cache=cache)
    assert done.returncode == 2 and "can become onnx only" in done.stderr
    (tmp_path / "broken.onnx").write_bytes(source.read_bytes()[:300])
    done = handheld("ship", str(tmp_path / "broken.onnx"), "--out", str(tmp_path), cache=cache)
    assert done.returncode == 2 and "is no whole ONNX model" in done.stderr and "Traceback" not in done.stderr


def test_pictures_in_nhwc_with_preprocessing_in_the_file(road: tuple[Path, Path, Any], tmp_path: Path) -> None:
    """The same picture gives the same outputs as the plain file gives on the normalised tensor."""
    from PIL import Image

    folder, cache, _ = road
    baked = ("--layout", "nhwc", "--bake-preprocessing", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")
    arguments = ("ship", f"{TINY}:tiny", *baked, "--to", "onnx,litert,coreml", "--out", str(tmp_path), "--json")
    done = handheld(*arguments, cache=cache)
    assert done.returncode == 0, done.stderr
    cells = {c["format"]: c for c in document(done)["check"]["cells"]}
    assert cells["onnx"]["status"] == cells["litert"]["status"] == "passed"
    place = tmp_path / "tiny.nhwc.picture"
    manifest = json.loads((place / "litert-fp32" / "manifest.json").read_text())
    assert manifest["inspection"]["inputs"][0]["shape"] == [1, 16, 16, 3]
    assert manifest["inspection"]["inputs"][0]["dtype"] == "uint8"
    assert manifest["inspection"]["outputs"][1]["shape"] == [1, 8, 8, 8]
    assert json.loads((place / "coreml-fp16" / "manifest.json").read_text())["options"]["image_input"] == "image"
    pixels = np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    normalised = ((pixels / 255 - 0.5) / 0.25).astype(np.float32).transpose(2, 0, 1)[None].copy()
    np.save(tmp_path / "image.npy", normalised)
    np.save(tmp_path / "ids.npy", np.array([[1, 2, 3, 4]]))
    results = []
    for cell, image in ((folder / "onnx-fp32", "image.npy"), (place / "litert-fp32", "picture.png")):
        done = handheld(
            "run", str(cell), "--input", f"image={tmp_path / image}", "--input", f"ids={tmp_path / 'ids.npy'}",
            "--output", str(tmp_path / "out.npz"), cache=cache,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / "out.npz") as outputs:
            results.append(dict(outputs))
    np.testing.assert_allclose(results[0]["scores"], results[1]["scores"], atol=2e-5)
    np.testing.assert_allclose(results[0]["features"].transpose(0, 2, 3, 1), results[1]["features"], atol=2e-5)


def test_a_timm_network_is_shipped_beside_a_torchvision_that_does_not_fit(
    road: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install --no-deps timm torchvision")
    _, cache, _ = road
    arguments = ("ship", "timm:mobilenetv3_small_050", "--to", "onnx", "--out", str(tmp_path), "--json")
    done = handheld(*arguments, cache=cache)
    assert done.returncode == 0, done.stderr
    cells = document(done)["check"]["cells"]
    assert {c["status"] for c in cells} == {"passed"} and "probe" in cells[0]["weights"]
    assert cells[0]["parity"]["top1_decidable"] > 0
    done = handheld("export", "timm:mobilnetv3_small_050", "--out", str(tmp_path), cache=cache)
    assert done.returncode == 2 and "Did you mean mobilenetv3_small_050" in done.stderr


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "manifest", "golden"])
def test_damage_costs_its_own_cell(road: tuple[Path, Path, Any], tmp_path: Path, damage: str) -> None:
    folder, cache, _ = road
    shutil.copytree(folder, tmp_path / "tiny", ignore=shutil.ignore_patterns("core*", "exec*"))
    cell = tmp_path / "tiny" / "litert-fp32"
    path = cell / "tiny.tflite"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    elif damage == "manifest":
        (cell / "manifest.json").write_text("{")
    else:
        (tmp_path / "tiny" / "golden.npz").write_bytes(b"rubbish")
    done = handheld("check", str(tmp_path), "--json", cache=cache)
    assert done.returncode == 2
    cells = {c["format"]: c for c in document(done)["cells"]}
    assert cells["litert"]["status"] == "error" and cells["litert"]["reason"]
    assert cells["onnx"]["status"] == ("error" if damage == "golden" else "passed")
    assert "Traceback" not in done.stderr


def test_run_takes_arrays_and_gives_what_the_model_gives(road: tuple[Path, Path, Any], tmp_path: Path) -> None:
    import torch
    from tiny_net import tiny

    folder, cache, _ = road
    network, sample = tiny()
    np.save(tmp_path / "image.npy", sample["image"].numpy())
    np.save(tmp_path / "ids.npy", sample["ids"].numpy())
    for cell in ("onnx-fp32", "litert-fp32", "executorch-fp32"):
        done = handheld(
            "run", str(folder / cell), "--input", f"image={tmp_path / 'image.npy'}", "--input",
            f"ids={tmp_path / 'ids.npy'}", "--output", str(tmp_path / "out.npz"), "--top", "2", "--json", cache=cache,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with torch.no_grad():
            expected = network(**sample)
        with np.load(tmp_path / "out.npz") as outputs:
            for name, tensor in expected.items():
                np.testing.assert_allclose(outputs[name], tensor.numpy(), atol=1e-5)
        best = [ranked["index"] for ranked in document(done)["top"]]
        assert best == expected["scores"][0].topk(2).indices.tolist()


def test_show_reads_a_file_without_its_manifest(road: tuple[Path, Path, Any], tmp_path: Path) -> None:
    folder, cache, _ = road
    manifest = json.loads((folder / "litert-fp32" / "manifest.json").read_text())
    shutil.copy(folder / "litert-fp32" / "tiny.tflite", tmp_path / "stray.tflite")
    shown = document(handheld("show", str(tmp_path / "stray.tflite"), "--json", cache=cache))
    assert shown["manifest"] is None
    assert shown["inspection"] == manifest["inspection"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", f"{TINY}:untraceable"], ["cannot trace", "tiny_net.py", "if x.sum() > 0:"]),
        (["export", f"{TINY}:tiny", "--to", "onx"], ["unknown format 'onx'. Did you mean onnx?"]),
        (["export", f"{TINY}:tiny", "--recipe", "fp8"], ["unknown recipe 'fp8'"]),
        (["export", f"{TINY}:tiny", "--bake-preprocessing"], ["needs to know the mean and std"]),
        (["export", f"{TINY}:tiny", "--mean", "a,b"], ["cannot read --mean 'a,b'"]),
        (["check", "no/such/folder"], ["no folder at no/such/folder", "handheld export MODEL"]),
        (["show", "no_such.onnx"], ["no file at no_such.onnx"]),
        (["bench", "{road}", "--profile", "smok"], ["unknown profile 'smok'. Did you mean smoke?"]),
        (["check", "{road}", "--on", "hots"], ["unknown target 'hots'. Did you mean host?"]),
        (["check", "{road}", "--require", "tflight"], ["unknown format 'tflight'"]),
        (["report", "{road}", "--out", "x.pdf"], ["cannot write a report as .pdf"]),
        (["run", "{road}/onnx-fp32", "--input", "imag=x.npy"], ["unknown input 'imag'. Did you mean image?"]),
        (["run", "{road}/onnx-fp32"], ["no file for the input image=1x3x16x16:float32"]),
    ],
)
def test_errors_are_sentences(
    road: tuple[Path, Path, Any], arguments: list[str], said: list[str], tmp_path: Path
) -> None:
    folder, cache, _ = road
    filled = [argument.replace("{road}", str(folder)) for argument in arguments]
    out = ["--out", str(tmp_path)] if arguments[0] == "export" else []
    done = handheld(*filled, *out, cache=cache)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for words in said:
        assert words in done.stderr, done.stderr


def test_an_operator_that_a_format_lacks_is_named_with_the_users_line(
    road: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    _, cache, _ = road
    done = handheld("export", f"{TINY}:unsupported", "--to", "coreml,onnx", "--out", str(tmp_path), cache=cache)
    assert done.returncode == 2
    assert "svd" in done.stdout and "tiny_net.py" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_unwritable_places_are_sentences(road: tuple[Path, Path, Any], tmp_path: Path) -> None:
    _, cache, _ = road
    (tmp_path / "file").write_text("")
    done = handheld("export", f"{TINY}:tiny", "--to", "onnx", "--out", str(tmp_path / "file" / "out"), cache=cache)
    assert done.returncode == 2 and "part of the path is a file" in done.stderr
    done = handheld("export", f"{TINY}:tiny", "--to", "onnx", "--out", str(tmp_path), cache=tmp_path / "file")
    assert done.returncode == 2 and "part of the path is a file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_converts_nothing_and_estimates(road: tuple[Path, Path, Any], tmp_path: Path) -> None:
    _, cache, _ = road
    done = handheld(
        "export", f"{TINY}:tiny", "--dry-run", "--recipe", "fp16", "--out", str(tmp_path), "--json", cache=cache
    )
    cells = {c["format"]: c for c in document(done)["cells"]}
    assert {c["status"] for name, c in cells.items() if name != "executorch"} == {"planned"}
    assert cells["executorch"]["status"] == "unavailable" and cells["executorch"]["reason"]
    assert all(c["estimated_memory_bytes"] > 1e8 for c in cells.values())
    assert not list(tmp_path.iterdir())


def test_each_file_is_right_when_it_is_executed_plainly(road: tuple[Path, Path, Any], tmp_path: Path) -> None:
    """ONNX Runtime without optimisations, LiteRT's reference kernels, Core ML in float32; others have no such form."""
    folder, _, _ = road
    golden = GoldenData(folder)
    for found in find(folder):
        job: Any = {"cases": [2], "threads": 1, "timeout": 120}
        plainly = execute(tmp_path / found.folder.name, found, golden, HostTarget(), plain=True, **job)
        if found.format in ("onnx", "litert", "coreml"):
            assert plainly.result.error is None
            as_ever = execute(tmp_path / f"{found.folder.name} as ever", found, golden, HostTarget(), **job)
            values = [worst_db(golden, part) for part in (plainly, as_ever)]
            assert values[0] > 65 and values[0] >= values[1] - 6  # weights are stored in half in Core ML's
        else:
            assert plainly.result.error and "has no plain form" in plainly.result.error.message


def worst_db(golden: GoldenData, part: Part) -> float:
    """The lowest PSNR of the one case that ran."""
    given, expected = read_case(part.folder, part.result, 0), golden.outputs(2)
    return worst((expected[name], given[name]) for name in expected)[0]
