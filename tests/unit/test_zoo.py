"""The zoo: its facts counted again, its errors, models that other packages add."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from handheld.errors import HandheldError
from handheld.models import zoo
from handheld.models.efficientformerv2 import CONFIGS, EfficientFormerV2

PUBLISHED_GMACS = {"s0": 0.40, "s1": 0.65, "s2": 1.25, "l": 2.56}


@pytest.mark.parametrize("size", CONFIGS)
def test_parameters_and_macs_are_counted(size: str) -> None:
    spec = zoo.get(f"efficientformerv2_{size}")
    with torch.device("meta"):
        network = EfficientFormerV2(CONFIGS[size]).eval()
        image = torch.empty(spec.inputs[0].shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = network(image)
    assert output.shape == (1, 1000)
    assert counter.get_total_flops() == 2 * spec.macs
    assert spec.macs / 1e9 == pytest.approx(PUBLISHED_GMACS[size], abs=0.01)
    assert sum(parameter.numel() for parameter in network.parameters()) == spec.parameters


def test_build_gives_the_same_network_each_time() -> None:
    spec = zoo.get("efficientformerv2_s0")
    first, again = spec.build(None), spec.build(None)
    assert not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_every_model_says_what_is_published_of_it() -> None:
    for spec in zoo.specs():
        assert "arXiv" in spec.paper
        assert all(figure.source and figure.device and figure.latency_ms > 0 for figure in spec.published)


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(HandheldError) as caught:
        zoo.get("efficientformer_s0")
    assert str(caught.value) == (
        "unknown model 'efficientformer_s0'. Did you mean efficientformerv2_s0 or efficientformerv2_s2 or "
        f"efficientformerv2_s1? Available: {', '.join(zoo.ZOO)}.\n  Type: handheld models"
    )


def test_no_torch_to_list_the_zoo() -> None:
    code = "import sys; from handheld.models import zoo, inputs, probe, checkpoint; zoo.specs(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "handheld.models.zoo" in modules
    assert not {"torch", "safetensors", "PIL"} & set(modules)


Install = Callable[..., None]

PLUGIN = """
from handheld.models.spec import ModelSpec, TensorSpec
tiny = ModelSpec("tiny", "Tiny", "none", (TensorSpec("x", (1,)),), lambda checkpoint: None, 1, 1)
number = 7
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a package on the path that adds models; a function of its entry points, `NAME = MODULE:ATTRIBUTE`."""

    def put(*entries: str, package: str = "plugin_a", source: str = PLUGIN) -> None:
        (tmp_path / f"{package}.py").write_text(source)
        info = tmp_path / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text("\n".join(["[handheld.models]", *entries]))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, package, raising=False)

    return put


def test_other_packages_add_models(install: Install) -> None:
    assert zoo.provider_version("efficientformerv2_s0") is None
    install("tiny = plugin_a:tiny")
    assert zoo.get("tiny").family == "Tiny"
    assert [spec.name for spec in zoo.specs()] == [*zoo.ZOO, "tiny"]
    assert zoo.provider_version("tiny") == "plugin_a 1.2"
    with pytest.raises(HandheldError, match=r"Did you mean tiny\?.*mobiler2l_forward, .*, tiny\."):
        zoo.get("tinyy")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("tiny = plugin_a:number", "(plugin_a:number) of plugin_a 1.2: expected a ModelSpec of that name; came int."),
        (
            "small = plugin_a:tiny",
            "(plugin_a:tiny) of plugin_a 1.2: expected a ModelSpec of that name; came one called",
        ),
        ("tiny = plugin_a:absent", "the model tiny of plugin_a 1.2 cannot be loaded: AttributeError"),
        ("efficientformerv2_l = plugin_a:tiny", "called efficientformerv2_l: one of handheld, one of plugin_a 1.2.\n"),
    ],
)
def test_a_bad_package_is_named(install: Install, entry: str, message: str) -> None:
    install(entry)
    with pytest.raises(HandheldError) as caught:
        zoo.specs()
    assert message in str(caught.value)
    assert zoo.get("efficientformerv2_s0").name == "efficientformerv2_s0"


def test_two_packages_with_one_name(install: Install) -> None:
    install("tiny = plugin_a:tiny")
    install("tiny = plugin_b:tiny", package="plugin_b")
    with pytest.raises(HandheldError, match=r"two models are called tiny: one of plugin_. 1.2, one of plugin_. 1.2\."):
        zoo.get("tiny")
