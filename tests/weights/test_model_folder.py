"""A backbone's folder computes the same here, in timm and in transformers, or is refused."""

import json
import logging
import shutil
import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import timm.data
import torch
from crashes import killed_at, list_changes
from examples import hostile_headers, payloads
from PIL import Image
from random_models import make

from sslvit.errors import BAD_DATA, CannotWrite, DataError
from sslvit.models.readout import read
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.models.vit_config import VARIANTS, ViTConfig
from sslvit.storage import durable, sealed
from sslvit.views.pretraining import eval_view
from sslvit.weights.folder import described, load_backbone, save_backbone
from sslvit.weights.timm_config import mlp_ratio

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

FOR_TIMM = {
    "class token": {},
    "mean": {"readout": "mean"},
    "no class token": {"readout": "mean", "class_token": False},
    "registers": {"registers": 3},
    "registers, mean": {"registers": 3, "readout": "mean"},
    "registers without positions": {"registers": 2, "class_position": False},
    "no class token but registers": {"class_token": False, "registers": 2, "readout": "mean"},
    "moco v3": {"position": "sincos_moco_v3", "init": "moco_v3"},
    "mae": {"position": "sincos_mae", "init": "mae", "readout": "mean"},
    "big_vision": {"position": "sincos_big_vision", "class_token": False, "readout": "mean", "init": "jax"},
    "no positions": {"position": "none"},
    "details": {"gelu": "tanh", "layer_scale": 0.1, "qkv_bias": False, "mlp_width": 43},
    "grey": {"channels": 1, "image_size": 28, "patch_size": 4},
    "two channels": {"channels": 2},
    "five channels": {"channels": 5, "mean": [0.1, 0.2, 0.3, 0.4, 0.5], "std": [0.5, 0.6, 0.7, 0.8, 0.9]},
    "oblong": {"image_size": [16, 48], "patch_size": [8, 4]},
    "drop path": {"drop_path": 0.5, "dropout": 0.1},
    "width of Ti": {"width": 192, "heads": 3},
}
FOR_US = {
    "learned 2-D": {"position": "learned_2d"},
    "learned 2-D at every layer": {"position": "learned_2d", "position_at": "every_layer"},
    "relative": {"position": "relative", "position_at": "every_layer_shared"},
    "relative bias": {"position": "relative_bias", "position_at": "every_layer", "key_bias": False},
    "another epsilon": {"epsilon": 1e-12},
    "every layer": {"position_at": "every_layer"},
    "every layer shared": {"position_at": "every_layer_shared"},
    "sin-cos at every layer": {"position": "sincos_mae", "position_at": "every_layer_shared"},
    "both": {"readout": "both"},
    "hybrid": {"hybrid": "R", "patch_size": 4, "image_size": 16},
}


def images_for(backbone: ViT | BiT) -> torch.Tensor:
    return torch.rand(2, backbone.channels, *backbone.image_size, generator=torch.Generator().manual_seed(1))


def config_of(folder: Path) -> dict[str, Any]:
    return sealed.read(folder / "config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vit, readout = make()
    save_backbone(vit, tmp_path / "model", {"readout": readout})
    return tmp_path / "model"


# The same function


@pytest.mark.parametrize("changes", FOR_TIMM.values(), ids=FOR_TIMM)
@torch.no_grad()
def test_timm_computes_the_same_tokens_and_readout_from_the_folder(tmp_path, changes):
    vit, readout = make(**changes)
    save_backbone(vit, tmp_path / "model", {"readout": readout})
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    images = images_for(vit)
    given = theirs.pretrained_cfg
    mean, std = (torch.tensor(given[name]).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    encoded = vit(images)
    tokens = theirs.forward_features((images - mean) / std)
    torch.testing.assert_close(tokens[:, vit.prefix :], encoded.patches, rtol=0, atol=1e-5)
    if encoded.cls is not None:
        torch.testing.assert_close(tokens[:, 0], encoded.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs((images - mean) / std), read(encoded, readout), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [*FOR_TIMM.values(), *FOR_US.values()], ids=[*FOR_TIMM, *FOR_US])
@torch.no_grad()
def test_a_loaded_model_computes_what_was_saved_bit_for_bit(tmp_path, changes):
    vit, readout = make(**changes)
    save_backbone(vit, tmp_path / "model", {"readout": readout})
    loaded = load_backbone(tmp_path / "model")
    assert not loaded.training
    assert loaded.config == vit.config
    images = images_for(vit)
    for ours, theirs in zip(vit(images), loaded(images), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@torch.no_grad()
def test_a_residual_network_is_saved_and_loaded_too_and_refused_by_timm(tmp_path):
    network = BiT.variant("R11x0.5", image_size=16).eval()
    save_backbone(network, tmp_path / "model", {"readout": "mean"})
    loaded = load_backbone(tmp_path / "model")
    assert torch.equal(loaded(images_for(network)).patches, network(images_for(network)).patches)
    with pytest.raises(RuntimeError, match="sslvit only"):
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)


@pytest.mark.parametrize("changes", FOR_US.values(), ids=FOR_US)
def test_timm_refuses_by_name_models_that_it_would_compute_differently(tmp_path, changes):
    vit, readout = make(**changes)
    save_backbone(vit, tmp_path / "model", {"readout": readout})
    with pytest.raises(RuntimeError, match=r"Unknown model \(sslvit only \("):
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)


@torch.no_grad()
def test_transformers_computes_the_same_from_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name in ("class token", "no class token", "mae"):
        vit, readout = make(**FOR_TIMM[name])
        save_backbone(vit, tmp_path / name, {"readout": readout})
        theirs = transformers.AutoModel.from_pretrained(tmp_path / name).eval()
        output = theirs(vit.standardise(images_for(vit)))
        torch.testing.assert_close(output.pooler_output, read(vit(images_for(vit)), readout), rtol=0, atol=1e-5)


@torch.no_grad()
def test_timm_adapts_the_folder_to_other_images_as_any_of_its_own(folder):
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=32, num_classes=7)
    assert theirs(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_the_width_of_the_mlp_survives_timms_ratio():
    widths = [(width, mlp) for width, _, _, mlp in VARIANTS.values()]
    widths += [(width, mlp) for width in (31, 43, 1152) for mlp in range(1, 5000)]
    for width, mlp_width in widths:
        assert int(width * mlp_ratio(width, mlp_width)) == mlp_width


# What the folder says


def test_the_folder_describes_its_model(tmp_path):
    vit, _ = make()
    extra = {"readout": "mean", "objective": "MPP", "steps": 300, "data": "shapes", "cost": {"hours": 0.1}}
    save_backbone(vit, tmp_path / "model", extra)
    ours = config_of(tmp_path / "model")["sslvit"]
    assert {name: ours[name] for name in extra} == extra
    assert ours["backbone"] == "ViT"
    assert ours["config"] == json.loads(json.dumps(asdict(vit.config)))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (
        "- objective: MPP\n- data: shapes\n- The readout to use is mean" in (tmp_path / "model/README.md").read_text()
    )
    assert safetensors.torch.load_file(tmp_path / "model" / "model.safetensors").keys() == vit.state_dict().keys()


@pytest.mark.parametrize("extra", [{}, {"readout": "max"}, {"readout": None}])
def test_a_readout_that_the_backbone_does_not_have_is_refused(tmp_path, extra):
    with pytest.raises(ValueError, match=r"readout .* is not one of this backbone's"):
        save_backbone(make()[0], tmp_path / "model", extra)
    assert list(tmp_path.iterdir()) == []


def test_an_older_model_is_replaced_and_anything_else_refused(folder, tmp_path):
    vit, _ = make(depth=1)
    save_backbone(vit, folder, {"readout": "mean"})
    assert load_backbone(folder).depth == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "other", tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(CannotWrite, match=str(place)):
            save_backbone(vit, place, {"readout": "mean"})
    (tmp_path / "empty").mkdir()
    save_backbone(vit, tmp_path / "empty", {"readout": "mean"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "model", "other"]


@pytest.mark.processes
def test_a_kill_while_a_model_is_written_never_leaves_half_of_one(tmp_path):
    vit, _ = make(depth=1)

    def work(parent: Path) -> None:
        save_backbone(vit, parent / "model", {"readout": "cls"})

    for replaced in (False, True):
        (tmp_path / f"counted-{replaced}").mkdir()
        if replaced:
            work(tmp_path / "counted-True")
        for moment in range(len(list_changes(partial(work, tmp_path / f"counted-{replaced}")))):
            parent = tmp_path / f"{replaced}-{moment}"
            parent.mkdir()
            if replaced:
                work(parent)
            assert killed_at(partial(work, parent), moment, "before") == signal.SIGKILL
            if (parent / "model").exists():
                load_backbone(parent / "model")
            work(parent)
            load_backbone(parent / "model")


# What is refused


def reseal(folder: Path) -> None:
    """The config fits the weights again, as someone could make it who meant harm."""
    config = config_of(folder)
    config["sslvit"]["files"]["model.safetensors"] = durable.fingerprint(folder / "model.safetensors")
    (folder / "config.json").write_bytes(sealed.text(config))


def test_any_changed_byte_of_the_weights_is_found(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for position in range(0, len(whole), len(whole) // 200):
        weights.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(DataError, match="hash differs"):
            load_backbone(folder)
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(DataError, match=f"has {length} bytes instead of {len(whole)}"):
            load_backbone(folder)
    weights.unlink()
    with pytest.raises(DataError, match=r"No such file.*model.safetensors"):
        load_backbone(folder)
    assert DataError.code == BAD_DATA


def test_missing_unexpected_misshaped_and_mistyped_weights_are_all_listed(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["blocks.0.attn.query.weight"] = tensors.pop("blocks.0.attn.qkv.weight")
    tensors["norm.weight"] = torch.ones(33)
    tensors["norm.bias"] = torch.ones(32, dtype=torch.int64)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    reseal(folder)
    with pytest.raises(DataError) as refused:
        load_backbone(folder)
    assert str(refused.value) == (
        f"{folder}: the weights do not fit the backbone: missing blocks.0.attn.qkv.weight; norm.bias of torch.int64 "
        "instead of torch.float32; norm.weight of shape (33,) instead of (32,); unexpected blocks.0.attn.query.weight"
    )


@pytest.mark.parametrize(
    "config",
    [
        "",
        "null",
        "[]",
        "{}",
        '"sslvit"',
        "[" * 100_000,
        '{"sslvit": null}',
        '{"sslvit": {"backbone": "ViT"}}',
        '{"sslvit": {"backbone": "os.system", "config": {}, "files": {"model.safetensors": {}}}}',
        '{"sslvit": {"backbone": ["ViT"], "config": {}, "files": {"model.safetensors": {}}}}',
        '{"sslvit": {"backbone": "ViT", "config": [], "files": {"model.safetensors": {"size": 1}}}}',
    ],
)
def test_a_config_that_is_none_of_ours_is_refused(folder, config):
    (folder / "config.json").write_text(config)
    with pytest.raises(DataError, match=str(folder)):
        load_backbone(folder)


@pytest.mark.parametrize(
    "changes",
    [{"depth": 3}, {"width": 64}, {"heads": 5}, {"patch_size": 7}, {"position": "x"}, {"more": 1}, {"width": "32"},
     {"depth": None}, {"mean": [1]}, {"class_token": False}, {"registers": 1}, {"width": 10**9}],
)  # fmt: skip
def test_a_config_that_does_not_fit_the_weights_is_refused(folder, changes):
    config = config_of(folder)
    config["sslvit"]["config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=str(folder)):
        load_backbone(folder)


def test_an_edited_config_is_refused_and_one_without_a_seal_is_read(folder):
    file = folder / "config.json"
    edited = file.read_text().replace('"readout": "cls"', '"readout": "mean"')
    file.write_text(edited)
    with pytest.raises(DataError, match=rf'{file} is not as .* its seal: it is damaged, or was edited.* line "seal"'):
        described(folder)
    first, seal, *others = edited.splitlines()
    assert seal.startswith('  "seal": "xxh3_128:')
    file.write_text("\n".join([first, *others]))
    assert described(folder)["readout"] == "mean"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path / "none")):
        load_backbone(tmp_path / "none")


def test_hostile_weights_are_refused(folder):
    for raw in hostile_headers(300):
        (folder / "model.safetensors").write_bytes(raw)
        reseal(folder)
        with pytest.raises(DataError):
            load_backbone(folder)


def test_no_payload_in_the_place_of_the_weights_or_the_config_is_ever_executed(folder, tmp_path):
    canary = tmp_path / "canary"
    for payload in payloads(tmp_path, canary).values():
        for name in ("model.safetensors", "config.json"):
            attacked = tmp_path / "attacked"
            shutil.copytree(folder, attacked)
            (attacked / name).write_bytes(payload)
            if name == "model.safetensors":
                reseal(attacked)
            with pytest.raises(DataError):
                load_backbone(attacked)
            assert not canary.exists()
            shutil.rmtree(attacked)


@pytest.fixture(autouse=True)
def quiet_timm():
    """It logs whatever it loads."""
    logging.getLogger("timm").setLevel(logging.ERROR)


@pytest.mark.parametrize("side", [112, 32])
def test_timms_transform_shows_an_oblong_photograph_as_it_is_evaluated_here(side, tmp_path):
    save_backbone(
        ViT(ViTConfig(image_size=side, patch_size=16, width=16, depth=1, heads=1)),
        tmp_path / "model",
        {"readout": "cls"},
    )
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    blocks = np.random.default_rng(0).integers(64, 192, (15, 20, 3), np.uint8).repeat(10, 0).repeat(10, 1)
    seen = transform(Image.fromarray(blocks)) * torch.tensor(theirs.pretrained_cfg["std"])[:, None, None]
    seen += torch.tensor(theirs.pretrained_cfg["mean"])[:, None, None]
    (ours,) = eval_view(side)(torch.from_numpy(blocks).permute(2, 0, 1)[None], torch.zeros(1, dtype=torch.int64))
    # timm resizes uint8, which rounds twice and clips what overshoots.
    assert (ours[0] - seen).abs().max() < 2 / 255
