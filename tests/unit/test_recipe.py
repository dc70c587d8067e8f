"""Recipes: what names mean, files that round-trip, rules of which the first counts, and what is refused."""

from pathlib import Path

import pytest

from handheld.errors import HandheldError
from handheld.export import formats, recipe
from handheld.export.formats.base import Options
from handheld.export.recipe import EXAMPLES, Activations, Recipe, Rule, Sparsity, Weights


def _weights(name: str) -> Weights:
    found = recipe.named(name).rules[0].weights
    assert found
    return found


def test_names_decode() -> None:
    assert _weights("w8") == Weights(scheme="integer", bits=8, per="channel")
    assert _weights("w4") == Weights(scheme="integer", bits=4, per="block", block=32)
    assert _weights("w4b64").block == 64
    assert _weights("w4c").per == "channel"
    assert _weights("lut6") == Weights(scheme="table", bits=6, per="tensor")
    assert _weights("lut4g16") == Weights(scheme="table", bits=4, per="channel", group=16)
    assert _weights("lut4-w8").table_bits == 8
    assert _weights("levels2") == Weights(scheme="levels", bits=2)
    assert _weights("sparse30-w8").sparsity == Sparsity(part=0.3)
    assert _weights("sparse2of4").sparsity == Sparsity(n=2, m=4)
    assert recipe.named("w8a16").rules[0].activations == Activations(bits=16)
    assert [recipe.named(name).floats for name in ("w8", "w8-fp16", "lut2-fp32")] == ["default", "float16", "float32"]


def test_floats_that_a_recipe_leaves_open_are_the_formats() -> None:
    assert recipe.resolve("w8", "fp16").floats == "float16"
    assert recipe.resolve("w8-fp32", "fp16").floats == "float32"
    assert recipe.resolve("default", "fp32") == recipe.FLOATS["fp32"]


@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_files_round_trip(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"any{suffix}"
    path.write_text(recipe.text(recipe.named(name), suffix))
    assert recipe.read(path) == recipe.named(name)


def test_a_file_is_named_after_itself_and_the_first_rule_counts(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        """
        [[rules]]
        modules = ["head", "stages.3.*"]
        [[rules]]
        operators = ["depthwise"]
        weights = { scheme = "integer" }
        [[rules]]
        weights = { scheme = "table", bits = 4 }
        """
    )
    mine = recipe.resolve(str(path), "fp32")
    assert mine.name == "mine" and mine.quantizes and not mine.activations
    kept, eight, four = mine.rules
    assert mine.rule("stages.3.blocks.0", "depthwise") is kept
    assert mine.rule("stages.2.mid", "depthwise") is eight
    assert mine.rule("stages.2.mid", "conv") is four


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("w8a9", "Input should be 8 or 16"),
        ("w3", "integers of 3 bits: expected 2, 4 or 8"),
        ("lut5", "tables of 5 bits"),
        ("levels8", "levels have 1 to 7 bits"),
        ("sparse4of2", "0 < n < m"),
        ("w88", "Available: .*w8a8"),
        ("lut44", "Did you mean|Available"),
        ("sparse50-", "Available"),
        ("w8fp16", "Available"),
    ],
)
def test_other_names_are_refused(name: str, says: str) -> None:
    with pytest.raises(HandheldError, match=says):
        recipe.named(name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("schema_version = 2\n", "is a recipe of schema 2; this handheld knows 1"),
        ("rules = [{ weigths = {} }]\n", r"rules\.0\.weigths"),
        ("rules = [{ weights = { scheme = 'integer', bits = 5 } }]\n", "integers of 5 bits"),
        ("[[rules\n", "cannot be read"),
        ("name = 'a/b'\n", "name"),
    ],
)
def test_bad_files_say_where(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(HandheldError, match=says) as raised:
        recipe.read(path)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_said() -> None:
    with pytest.raises(HandheldError, match=r"no recipe at nowhere\.toml"):
        recipe.resolve("nowhere.toml", "fp32")


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_format_says_what_it_makes_of_every_recipe(name: str) -> None:
    """And what is impossible names a recipe that is not."""
    for target in formats.FORMATS.values():
        for deployment_target in ("iOS17", "iOS18"):
            options = Options.model_validate({"deployment_target": deployment_target})
            made = target.support(recipe.resolve(name, target.default_recipe), options)
            assert made.how, (target.name, name)
            if made.level == "impossible":
                assert made.nearest, (target.name, name)
                nearest = target.support(recipe.resolve(made.nearest, target.default_recipe), options)
                assert nearest.level != "impossible", (target.name, name, made.nearest)


def test_a_recipe_without_quantization_needs_nothing() -> None:
    assert not Recipe(name="x", rules=(Rule(modules=("head",)),)).quantizes


def test_a_shipped_recipe_takes_the_floats_of_its_ending() -> None:
    plain, whole = recipe.named("bitsfusion"), recipe.named("bitsfusion-fp32")
    assert (plain.floats, whole.floats, whole.name) == ("default", "float32", "bitsfusion-fp32")
    assert whole.rules == plain.rules
    with pytest.raises(HandheldError, match="bitsfusion-fp64"):
        recipe.named("bitsfusion-fp64")
