"""Checkpoints: what is loaded, what is refused, and the sentences that people read then."""

import argparse
import json
import os
import pickle
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from handheld.errors import HandheldError
from handheld.models import checkpoint, efficientformerv2, zoo
from handheld.models.probe import apply_probe_weights


def network() -> nn.Sequential:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    apply_probe_weights(module)
    return module


def weights() -> dict[str, torch.Tensor]:
    module = network()
    apply_probe_weights(module, seed=1)
    return module.state_dict()


def error_of(path: Path, module: nn.Module | None = None) -> str:
    with pytest.raises(HandheldError) as caught:
        checkpoint.load(module or network(), path)
    return str(caught.value)


def assert_loads(path: Path, expected: dict[str, torch.Tensor]) -> None:
    module = network()
    checkpoint.load(module, path)
    for name, tensor in module.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, expected[name].float()), name


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_pytorch_files(tmp_path: Path, suffix: str, wrapper: str | None) -> None:
    state = weights()
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / f"weights{suffix}")
    assert_loads(tmp_path / f"weights{suffix}", state)


def test_safetensors(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "weights.safetensors")
    assert_loads(tmp_path / "weights.safetensors", weights())


def test_the_form_of_before_1_6(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
    assert_loads(tmp_path / "weights.pt", weights())


def test_what_the_authors_training_script_saves(tmp_path: Path) -> None:
    """The arguments of the run lie beside the weights; so does a moving average, which is not what they evaluate."""
    extra = {"epoch": 1, "scaler": {"scale": 65536.0}, "args": argparse.Namespace(model="s0", lr=2e-3)}
    ema = {name: tensor + 1 for name, tensor in weights().items()}
    torch.save({"model": weights(), "model_ema": ema, **extra}, tmp_path / "checkpoint.pth")
    assert_loads(tmp_path / "checkpoint.pth", weights())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    half = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights().items()}
    save_file(half, tmp_path / "weights.safetensors")
    assert_loads(tmp_path / "weights.safetensors", half)


def test_training_counters_may_be_there_or_not(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in weights().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pt")
    assert_loads(tmp_path / "weights.pt", state)


def test_unit_axes_at_the_end_do_not_matter(tmp_path: Path) -> None:
    state = weights()
    torch.save(state | {"1.weight": state["1.weight"][:, None, None]}, tmp_path / "weights.pt")
    assert_loads(tmp_path / "weights.pt", state)


def test_misfits_are_counted_and_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = weights()
    del state["0.bias"], state["2.weight"]
    state |= {"2.bias": torch.zeros(3), "1.weight": torch.zeros(4, dtype=torch.int8), "fc.weight": torch.zeros(2, 5)}
    torch.save(state, tmp_path / "weights.pt")
    module = network()
    assert error_of(tmp_path / "weights.pt", module) == (
        f"{tmp_path}/weights.pt does not fit Sequential: 2 tensors missing, 1 unexpected, 2 of another shape or kind.\n"
        "    missing 0.bias: expected 4 float32\n"
        "    missing 2.weight: expected 2x4 float32\n"
        "    unexpected fc.weight: came 2x5 float32\n"
        "    unfit 1.weight: expected 4 float32, came 4 int8\n"
        "    unfit 2.bias: expected 2 float32, came 3 float32\n"
        "  Is it the checkpoint of another model or size? handheld models lists those that there are."
    )
    for name, tensor in network().state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name])


def test_no_more_than_20_misfits_are_named(tmp_path: Path) -> None:
    """All of another size's, with the name in the file where it is not ours."""
    torch.save({"model": {"network.0.0.mlp.fc1.weight": torch.zeros(128, 32, 1, 2)}}, tmp_path / "weights.pt")
    with pytest.raises(HandheldError) as caught:
        efficientformerv2.build("s0", tmp_path / "weights.pt")
    lines = caught.value.message.splitlines()
    assert "does not fit EfficientFormerV2: 492 tensors missing, 0 unexpected, 1 of another shape or kind." in lines[0]
    assert len(lines) == 1 + 20 + 1 and lines[-1] == "    and 473 more"

    state = efficientformerv2.build("s0").state_dict()
    del state["stages.0.blocks.0.mlp.fc1.conv.weight"]
    torch.save({**state, "network.0.0.mlp.fc1.weight": torch.zeros(128, 32, 1, 2)}, tmp_path / "weights.pt")
    with pytest.raises(HandheldError, match=r"conv\.weight \(network\.0\.0\.mlp\.fc1\.weight in the file\): expected"):
        efficientformerv2.build("s0", tmp_path / "weights.pt")


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    state = efficientformerv2.build("s0").state_dict()
    torch.save({**state, "dist_head.bias": torch.zeros(1000)}, tmp_path / "weights.pt")
    with pytest.raises(HandheldError, match=r"unexpected head_dist\.bias \(dist_head\.bias in the file\)"):
        efficientformerv2.build("s0", tmp_path / "weights.pt")


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    contents = {"model": weights(), "extra": Hostile(target)}
    torch.save(contents, tmp_path / "zip.pt")
    torch.save(contents, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare2.pt").write_bytes(pickle.dumps(Hostile(target), protocol=2))
    (tmp_path / "bare4.pt").write_bytes(pickle.dumps(Hostile(target), protocol=4))
    for name in ("zip", "legacy", "bare2"):
        assert error_of(tmp_path / f"{name}.pt") == (
            f"{tmp_path}/{name}.pt was refused: loading it would call {os.system.__module__}.system, and a checkpoint "
            "needs nothing but tensors.\n  If you trust it, re-save its tensors where it was made: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors'); then load that file."
        )
    assert "was refused: its pickle holds more than tensors" in error_of(tmp_path / "bare4.pt")
    assert not target.exists()

    class Unguarded(pickle.Unpickler):
        """The same bytes do run where nobody guards: the test would notice."""

    with (tmp_path / "bare4.pt").open("rb") as file:
        Unguarded(file).load()
    assert target.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "module.pt")
    assert "was refused: loading it would call torch.nn.modules.container.Sequential" in error_of(
        tmp_path / "module.pt"
    )


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript itself is deprecated
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")  # type: ignore[no-untyped-call]
    assert "was refused: it is a TorchScript program, not a state dict." in error_of(tmp_path / "script.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, suffix: str, part: float) -> None:
    path = tmp_path / f"weights{suffix}"
    save_file(weights(), path) if suffix == ".safetensors" else torch.save(weights(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    message = error_of(path)
    assert "is truncated" in message or "is not a checkpoint: it starts with b''" in message


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """PyTorch itself loads such a file, with a wrong weight in it."""
    path = tmp_path / "weights.pt"
    torch.save(weights(), path)
    data = bytearray(path.read_bytes())
    data[data.index(weights()["2.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    assert not torch.equal(torch.load(path, weights_only=True)["2.weight"], weights()["2.weight"])
    message = error_of(path)
    assert "is corrupt: the checksum of weights/data/" in message and "Copy or download it again." in message


def test_files_without_checksums_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "get_crc32_options", lambda: False)
    torch.save(weights(), tmp_path / "weights.pt")
    with zipfile.ZipFile(tmp_path / "weights.pt") as archive:
        assert not any(entry.CRC for entry in archive.infolist())
    assert_loads(tmp_path / "weights.pt", weights())


def test_any_damage_is_an_error_of_ours(tmp_path: Path) -> None:
    draw = random.Random(0)
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"weights{suffix}"
        save_file(weights(), path) if suffix == ".safetensors" else torch.save(
            weights(), path, _use_new_zipfile_serialization=False
        )
        whole = path.read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(3):
                data[draw.randrange(len(data))] = draw.randrange(256)
            path.write_bytes(data)
            try:
                checkpoint.load(network(), path)
            except HandheldError as error:
                assert str(path) in str(error)


@pytest.mark.parametrize(
    ("contents", "came"),
    [
        (torch.zeros(3), "came a Tensor."),
        ([1, 2], "came a list."),
        ({}, "came an empty one."),
        ({"epoch": 1, "lr": 2.0}, "came a dictionary with 'epoch', 'lr' in it."),
        ({"model": {"weight": torch.zeros(1), "name": "s0"}}, "came a dictionary with 'name' in it."),
    ],
)
def test_other_things_in_a_pytorch_file(tmp_path: Path, contents: object, came: str) -> None:
    torch.save(contents, tmp_path / "weights.pt")
    assert error_of(tmp_path / "weights.pt") == (
        f"{tmp_path}/weights.pt is not a checkpoint: expected a dictionary of tensors, alone or under "
        f"'model' or 'state_dict'; {came}"
    )


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    assert "text.pth is not a checkpoint: it starts with b'hell', neither a zip" in error_of(tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    assert "is truncated, or no safetensors file: " in error_of(tmp_path / "text.safetensors")
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("photos/cat.txt", "cat")
    assert "photos.pt is truncated, corrupt or no checkpoint: " in error_of(tmp_path / "photos.pt")
    assert error_of(tmp_path / "weights.h5") == (
        f"{tmp_path}/weights.h5: expected a checkpoint that ends in .safetensors, .pt, .pth, .bin, .ckpt or "
        ".safetensors.index.json, or a folder with one."
    )
    assert error_of(tmp_path / "absent.pt") == (
        f"cannot read the checkpoint {tmp_path}/absent.pt: No such file or directory."
    )
    (tmp_path / "folder.pt").mkdir()
    assert "folder.pt: expected a folder with one checkpoint" in error_of(tmp_path / "folder.pt")


def sharded(folder: Path, state: dict[str, torch.Tensor], suffix: str = ".index.json") -> Path:
    """Two shards and the index that diffusers and transformers write beside them."""
    folder.mkdir()
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, inside in shards.items():
        save_file({name: state[name] for name in inside}, folder / shard)
    index = folder / f"model.safetensors{suffix}"
    index.write_text(json.dumps({"weight_map": {name: shard for shard, inside in shards.items() for name in inside}}))
    return index


def test_sharded_and_half(tmp_path: Path) -> None:
    state = {name: t.half() if t.is_floating_point() else t for name, t in weights().items()}
    index = sharded(tmp_path / "unet", state)
    assert_loads(index, state)
    assert_loads(tmp_path / "unet", state)
    assert len(checkpoint.parts(tmp_path / "unet")) == 2
    (tmp_path / "unet" / "model-00002-of-00002.safetensors").unlink()
    assert "1 of its 2 files are not there: model-00002-of-00002.safetensors" in error_of(index)


def test_a_folder_holds_one_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert "it holds config.json" in error_of(tmp_path)
    save_file(weights(), tmp_path / "a.safetensors")
    assert_loads(tmp_path, weights())
    save_file(weights(), tmp_path / "b.safetensors")
    assert "it holds a.safetensors, b.safetensors" in error_of(tmp_path)


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "expected .safetensors files beside it" in error_of(index)
    index.write_text("[]")
    assert "is no index of a sharded checkpoint" in error_of(index)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("sd15_unet_tiny", "It looks like a UNet in diffusers' names (widths 32, 64; text 32 wide)."),
        ("sd15_decoder_tiny", "It looks like an autoencoder in diffusers' names (widths 64, 32)."),
        ("efficientformerv2_s0", "It looks like EfficientFormer in timm's names."),
        ("mobiler2l_forward", "It looks like MobileR2L."),
        ("clip_text_tiny", "It looks like CLIP's text encoder."),
    ],
)
def test_what_a_misfit_looks_like(tmp_path: Path, model: str, said: str) -> None:
    save_file(zoo.get(model).build(None).state_dict(), tmp_path / "weights.safetensors")
    assert said in error_of(tmp_path / "weights.safetensors")


def test_other_widths_are_named(tmp_path: Path) -> None:
    save_file(zoo.get("snapfusion_unet_tiny").build(None).state_dict(), tmp_path / "weights.safetensors")
    said = error_of(tmp_path / "weights.safetensors", zoo.get("sd15_unet_tiny").build(None))
    assert "does not fit UNet" in said and "tensors missing" in said
    wide = {name: t.repeat(2, *[1] * (t.ndim - 1)) for name, t in weights().items() if t.ndim}
    save_file(wide, tmp_path / "wide.safetensors")
    assert "unfit 0.weight: expected 4x3x3x3 float32, came 8x3x3x3 float32" in error_of(tmp_path / "wide.safetensors")
