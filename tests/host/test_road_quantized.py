"""Quantization as a user walks it: recipes by name and by file, calibration, five formats, checked; and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_road import FORMATS, TINY, document, handheld

WIDE = TINY.replace("tiny_net.py", "tiny_net.py:wide")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder and cache for all tests here: the network is traced once."""
    return tmp_path_factory.mktemp("quantized")


def _export(place: Path, *arguments: str, network: str = WIDE) -> Any:
    done = handheld("export", network, "--out", str(place / "out"), *arguments, "--json", cache=place / "cache")
    assert done.returncode == 0, done.stderr
    return {cell["format"]: cell for cell in document(done)["cells"]}


def test_integers_in_every_format_are_what_the_quantized_model_computes(place: Path) -> None:
    """Calibrated with arrays of a file; the check tells the conversion from what the recipe costs."""
    rng = np.random.default_rng(0)
    np.savez(place / "inputs.npz", image=3 * rng.standard_normal((6, 1, 3, 16, 16)).astype(np.float32))
    cells = _export(place, "--recipe", "w8a8", "--calibrate", str(place / "inputs.npz"))
    assert {name: cell["status"] for name, cell in cells.items()} == dict.fromkeys(FORMATS, "converted")
    done = handheld("check", str(place / "out"), "--json", cache=place / "cache")
    assert done.returncode == 0, done.stdout
    for cell in document(done)["cells"]:
        # What lies between two integers falls either way: one output by one step is 29.5 dB, alike in three runtimes.
        assert cell["parity"]["psnr_db"] == "Infinity" or cell["parity"]["psnr_db"] > 28, cell["format"]
        assert 20 < cell["cost"]["psnr_db"] < 60, cell["format"]
        assert "quantized by w8a8" in cell["reference"]


def test_a_recipe_of_rules_and_what_a_file_then_holds(place: Path) -> None:
    """The depthwise layer in 8 bits, the head in floats, all else in tables: told by the files themselves."""
    path = place / "mine.toml"
    path.write_text(
        "smallest = 256\n"
        "[[rules]]\nmodules = ['head']\n"
        "[[rules]]\noperators = ['depthwise']\nweights = { scheme = 'integer' }\n"
        "[[rules]]\nweights = { scheme = 'table', bits = 4, per = 'tensor' }\n"
    )
    cells = _export(place, "--recipe", str(path), "--to", "coreml,onnx,executorch")
    assert {name: cell["status"] for name, cell in cells.items()} == {
        "coreml": "converted",
        "onnx": "converted",
        "executorch": "unavailable",
    }
    assert "Nearest: --recipe" in cells["executorch"]["reason"] and "equivalent" in cells["onnx"]["reason"]
    for name in ("coreml", "onnx"):
        shown = document(handheld("show", cells[name]["artifact"], "--json", cache=place / "cache"))
        held = {(layer["scheme"], layer["bits"], layer["elements"]) for layer in shown["layers"]}
        assert {("table", 4, 1728), ("integer", 8, 576), ("table", 4, 4096)} <= held
        assert any(scheme == "float" and elements == 640 for scheme, _, elements in held)
    path.write_text(path.read_text().replace("256", "1024"))  # a recipe of the same name and rules is another
    again = _export(place, "--recipe", str(path), "--to", "onnx")["onnx"]
    shown = document(handheld("show", again["artifact"], "--json", cache=place / "cache"))
    assert [layer["scheme"] for layer in shown["layers"] if layer["elements"] == 576] == ["float"]


def test_attention_biases_are_integers_of_8_bits_beside_weights_that_are(place: Path) -> None:
    """16,384 numbers, unless a rule leaves them in floats; embeddings of places keep theirs."""
    kept = place / "kept.toml"
    kept.write_text(
        "[[rules]]\noperators = ['constant']\n[[rules]]\nweights = { scheme = 'integer' }\nactivations = { bits = 8 }\n"
    )
    network = TINY.replace("tiny_net.py", "tiny_net.py:placed")
    given = ("--calibrate", "drawn:4", "--recipe")
    whole = _export(place, *given, str(kept), network=network)
    small = _export(place, *given, "w8a8", network=network)
    for name in FORMATS:
        floats = 2 if name in ("coreml", "coreai") else 4
        saved = whole[name]["size_bytes"] - small[name]["size_bytes"]
        assert 0.95 * (floats - 1) * 16384 < saved < 1.05 * (floats - 1) * 16384, name
    done = handheld("check", str(place / "out" / "placed"), "--json", cache=place / "cache")
    assert done.returncode == 0, done.stdout
    assert len(document(done)["cells"]) == 2 * len(FORMATS)
    _export(place, "--recipe", "w8", "--to", "litert", network=TINY.replace("tiny_net.py", "tiny_net.py:twice"))
    done = handheld("check", str(place / "out" / "twice"), cache=place / "cache")
    assert done.returncode == 0, "LiteRT's converter adds the two up: the sum is in floats, and the same"


def test_a_dry_run_says_how_each_format_does_it_and_what_is_left_out(place: Path) -> None:
    given = ("export", WIDE, "--out", str(place / "dry"), "--recipe", "lut3", "--to", "onnx,litert,coreml", "--json")
    planned = document(handheld(*given, "--dry-run", cache=place / "cache"))
    assert planned["notes"] == document(handheld(*given, cache=place / "cache"))["notes"] != []
    assert "fewer than 2,048 elements" in planned["notes"][0]
    cells = {cell["format"]: cell for cell in planned["cells"]}
    assert cells["onnx"]["status"] == "planned" and "3 planes of bits" in cells["onnx"]["reason"]
    assert cells["litert"]["status"] == "unavailable" and cells["coreml"]["reason"].startswith("equivalent")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--recipe", "w8a8"), "needs calibration data"),
        (("--recipe", "w8-gptq"), "needs calibration data"),
        (("--recipe", "w8a8", "--calibrate", "nowhere"), "no calibration data at nowhere"),
        (("--recipe", "w9"), "recipe 'w9'"),
        (("--recipe", "none.toml"), r"no recipe at none.toml"),
        (("--recipe", "wrong.toml"), "like no layer of this model"),
    ],
)
def test_refusals(arguments: tuple[str, ...], dry: tuple[str, ...], says: str, place: Path) -> None:
    (place / "wrong.toml").write_text("[[rules]]\nmodules = ['hed']\nweights = { scheme = 'integer' }\n")
    given = ("export", WIDE, "--to", "onnx", "--out", str(place / "no"), *arguments, *dry)
    done = handheld(*given, cache=place / "cache", cwd=place)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_search_goes_on_from_what_was_measured_and_writes_a_recipe(place: Path) -> None:
    """Which is exported like any other."""
    given = ("--calibrate", "drawn:2", "--candidates", "w8,lut4,levels1", "--out", str(place / "out"))
    done = handheld("sensitivity", WIDE, *given, cache=place / "cache")
    assert done.returncode == 0 and (place / "out" / "wide" / "sensitivity.svg").is_file(), done.stderr
    assert len(json.loads((place / "out" / "wide" / "sensitivity.json").read_text())["trials"]) == 12
    found = place / "found.toml"
    done = handheld("search", WIDE, *given, "--bits", "5", "--recipe-out", str(found), "--json", cache=place / "cache")
    assert done.returncode == 0, done.stderr
    assert document(done)["average_bits"] <= 5
    assert _export(place, "--recipe", str(found), "--to", "onnx")["onnx"]["status"] == "converted"


def test_a_search_for_a_latency_times_files_and_keeps_what_it_can_in_floats(place: Path) -> None:
    found = place / "quick.toml"
    given = ("search", WIDE, "--calibrate", "drawn:2", "--out", str(place / "out"), "--recipe-out", str(found))
    done = handheld(*given, "--latency", "1000", "--to", "onnx", "--json", cache=place / "cache")
    assert done.returncode == 0, done.stderr
    told = document(done)
    assert told["chosen"]["kept"] == told["layers"] == 4, "there is time for all of them in floats"
    assert [one["kept"] for one in told["timed"]] == [0, 4]
    assert all(one["basis"] == "host" and one["median_ms"] > 0 for one in told["timed"])
    assert _export(place, "--recipe", str(found), "--to", "onnx")["onnx"]["status"] == "converted"
    for arguments, says in (
        (("--latency", "1e-5", "--to", "onnx"), "with all 4 layers in integers the file takes"),
        (("--latency", "1", "--to", "coreml"), "whose speed means nothing"),
        (("--latency", "1"), "of one format's file"),
        (("--latency", "-1", "--to", "onnx"), "expected more than 0"),
        (("--size", "1MB", "--to", "onnx"), "go with --latency"),
        (("--size", "1MB", "--latency", "1"), "expected one budget"),
        (("--size", "1MB", "--out", "found.toml"), "Type: --recipe-out found.toml"),
    ):
        done = handheld(*given, *arguments, cache=place / "cache")
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_packed_file_takes_what_the_levels_take(place: Path) -> None:
    given = ("pack", WIDE, "--recipe", "levels1", "--out", str(place / "packed.safetensors"), "--json")
    done = document(handheld(*given, cache=place / "cache"))
    point = next(layer for layer in done["layers"] if layer["elements"] == 4096)
    assert 1.6 <= point["bits_per_weight"] < 1.6 + 32 * 64 / 4096 + 0.1
