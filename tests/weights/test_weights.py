"""Other people's files compute here what they compute there, or are refused.

Where a library is at hand (timm, transformers, torchvision) it makes the weights and is the oracle. Files of releases
whose code is not here are written below, by the names that their code gives (the links say where), and read by timm's
own loaders or as timm's models: never by an inverse of ours.
"""

import argparse
import io
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import scipy.ndimage
import timm
import torch
from examples import NUMBER, OBJECTS, Call, Payload, hostile_headers, payloads
from foreign_models import assert_computes, saved, scramble, standardised
from timm.models import save_for_hf
from timm.models.resnetv2 import _create_resnetv2_bit
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from sslvit.__main__ import main
from sslvit.errors import DataError, NoInput
from sslvit.models.positions import resize
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.weights.exports.export import export
from sslvit.weights.folder import load_backbone, save_backbone
from sslvit.weights.foreign.facts import ARCHITECTURE, FAMILIES, TIMM_HEADS
from sslvit.weights.foreign.files import read
from sslvit.weights.foreign.open import load_foreign, open_backbone, start_from
from sslvit.weights.foreign.unpickle import tensors_of

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SAID = {"heads": 3, "gelu": "exact"} | HALF
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def tiny(**changes: Any) -> VisionTransformer:
    return scramble(VisionTransformer(**(TINY | {"dynamic_img_size": True} | changes)))


def flat(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The state dicts of a checkpoint as one, for which no process needs to be started."""
    return {
        f"{part}.{name}": tensor
        for part, tensors in checkpoint.items()
        if isinstance(tensors, dict)
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    }


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


# timm ----------------------------------------------------------------------------------------------------------------

TIMM = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "class token without position": {"no_embed_class": True},
    "registers": {"reg_tokens": 4},
    "registers without positions": {"reg_tokens": 2, "no_embed_class": True},
    "layer scale": {"init_values": 0.1},
    "no bias of queries, keys and values": {"qkv_bias": False},
    "narrow MLP": {"mlp_ratio": 1.5},
    "deep and of one head": {"depth": 4, "num_heads": 1},
}


@pytest.mark.parametrize("changes", TIMM.values(), ids=TIMM)
def test_a_bare_file_of_timm_computes_what_timm_computes_at_every_size(tmp_path, changes):
    theirs = tiny(**changes)
    file = saved(tmp_path / "x.safetensors", theirs.state_dict())
    said = SAID | {"heads": changes.get("num_heads", 3)}
    ours, about = load_foreign(file, **said)
    assert not ours.training
    assert about["left_behind"] == about["notes"] == []
    for size in ((16, 16), (24, 24), (8, 12)):
        images = torch.rand(2, 3, *size)
        tokens = theirs.forward_features(standardised(images, HALF))
        assert_computes(ours, images, tokens)
        assert_computes(load_foreign(file, **said)[0].resized(size), images, tokens)


def test_images_and_patches_may_be_oblong_and_of_any_channels(tmp_path):
    theirs = tiny(img_size=(8, 24), patch_size=(4, 8), in_chans=2, act_layer=partial(nn.GELU, "tanh"))
    file = saved(tmp_path / "x.safetensors", theirs.state_dict())
    said = {"heads": 3, "gelu": "tanh", "mean": (0.1, 0.2), "std": (0.3, 0.4)}
    with pytest.raises(ValueError, match=r"7 rows, 1 tokens .* no square grid.*image_size="):
        load_foreign(file, **said)
    ours, _ = load_foreign(file, image_size=(8, 24), **said)
    images = torch.rand(2, 2, 8, 24)
    assert_computes(ours, images, theirs.forward_features(standardised(images, said)))


FOLDERS = {
    "vit_tiny_patch16_224": {"img_size": 48},
    "vit_small_patch16_384": {"img_size": 32, "act_layer": "gelu_tanh"},
    "vit_small_patch32_224": {"img_size": (32, 96), "num_heads": 12},
    "deit_tiny_distilled_patch16_224": {"img_size": 48},
    "deit3_small_patch16_224": {"img_size": 32},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "vit_small_patch14_dinov2": {"img_size": 42},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_timm_says_everything(tmp_path, name):
    theirs = scramble(timm.create_model(name, depth=2, num_classes=0, **FOLDERS[name]))
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    ours, about = open_backbone(tmp_path)
    given = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    images = torch.rand(2, 3, *ours.image_size)
    assert_computes(ours, images, theirs.forward_features(standardised(images, given)))
    assert about["layout"] == "timm"
    assert "config.json" in about["known"]["heads"]


def test_the_hubs_cache_of_links_is_read(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    theirs = scramble(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=0))
    save_for_hf(theirs, tmp_path / "blobs", safe_serialization=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).symlink_to(tmp_path / "blobs" / name)
    assert open_backbone(tmp_path / "model")[0].heads == 3


def test_a_run_can_start_from_somebody_elses_weights_at_its_own_size(tmp_path):
    theirs = scramble(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=0))
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    ours = start_from(str(tmp_path), image_size=48, channels=3)
    assert ours.training
    images, theirs = torch.rand(2, 3, 48, 48), theirs.eval()
    theirs.set_input_size((48, 48))
    assert_computes(ours.eval(), images, theirs.forward_features(2 * images - 1))
    with torch.enable_grad():
        ours(images).cls.sum().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="takes images of 3 channels, these have 1"):
        start_from(str(tmp_path), image_size=32, channels=1)


def test_facts_that_init_from_lacks_can_be_given_to_convert_as_its_error_says(tmp_path, monkeypatch, capsys):
    classifier = scramble(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5))
    save_for_hf(classifier, tmp_path / "classifier", safe_serialization=True)
    bare = saved(tmp_path / "bare.safetensors", tiny().state_dict())
    two = saved(tmp_path / "two.safetensors", flat({"model": tiny().state_dict(), "model_ema": tiny().state_dict()}))
    monkeypatch.chdir(tmp_path)
    mine = "heads=3 gelu=exact mean=.5,.5,.5 std=.5,.5,.5"
    cases = {tmp_path / "classifier": "leave_head=true", bare: mine, two: f"part=model_ema {mine}"}
    for path, words in cases.items():
        with pytest.raises(ValueError, match="sslvit convert") as stopped:
            start_from(str(path), image_size=32, channels=3)
        said = str(stopped.value)
        assert "(--foreign" not in said  # which no recipe that trains has
        command = re.search(rf"sslvit (convert {path} (\S+) --foreign) \S+", said)
        assert f"--init_from {command[2]}" in said
        monkeypatch.setattr(sys, "argv", ["sslvit", *command[1].split(), *words.split()])
        main()
        assert start_from(command[2], image_size=32, channels=3).depth in (1, 2)
        shutil.rmtree(command[2])
    saved(tmp_path / "cut.safetensors", tiny().state_dict())
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-9])
    with pytest.raises(DataError) as stopped:
        start_from(str(tmp_path / "cut.safetensors"), image_size=32, channels=3)
    assert "convert" not in str(stopped.value)


LARGER = pytest.param("vit_small_r26_s32_224", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", LARGER])
def test_a_hybrid_of_timm_goes_in_and_out_with_its_epsilons(tmp_path, name):
    theirs = scramble(timm.create_model(name, depth=1, img_size=64, num_classes=0), kernel_std=0.03)
    save_for_hf(theirs, tmp_path / "in", safe_serialization=True)
    ours, about = open_backbone(tmp_path / "in")
    assert "timm's" in about["notes"][0]
    said = export(ours, about, tmp_path / "out", "timm")
    assert re.search(r"pretrained=True\) computes the same to \de-\d\d", said)
    again, back = open_backbone(tmp_path / "out")[0], timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True)
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)  # so many layers round by more than 1e-5 in float32
    for side in (64, 96):
        images = torch.rand(1, 3, side, side, dtype=torch.float64)
        theirs.set_input_size((side, side)), back.eval().set_input_size((side, side))
        tokens = theirs.double().forward_features(2 * images - 1)
        assert_computes(ours.double(), images, tokens)
        assert_computes(again.double(), images, tokens)
        torch.testing.assert_close(back.double().forward_features(2 * images - 1), tokens, rtol=0, atol=1e-9)
    google = ViT(replace(ours.config, hybrid_epsilons="google")).double().eval()
    google.load_state_dict(ours.state_dict())
    assert (google(images).patches - tokens[:, 1:]).abs().max() > 1e-5


@pytest.mark.slow
def test_every_known_timm_architecture_has_the_heads_gelu_and_epsilon_of_our_tables():
    names = [name for name in timm.list_models(["vit_*", "deit*"]) if ARCHITECTURE.fullmatch(name)]
    assert len(names) > 40
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name, depth=1, num_classes=0)
        match, block = ARCHITECTURE.fullmatch(name), model.blocks[0]
        assert block.attn.num_heads == TIMM_HEADS[match[1] or match[2]], name
        assert type(block.mlp.act) is nn.GELU, name
        assert block.mlp.act.approximate == "none", name
        assert block.norm1.eps == model.norm.eps == 1e-6, name


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_gap_224", "vit_base_patch16_gap_224", "vit_base_patch16_xp"])
def test_an_architecture_whose_function_is_not_known_is_refused_by_name(tmp_path, name):
    saved(tmp_path / "model.safetensors", tiny().state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "pretrained_cfg": HALF}))
    with pytest.raises(DataError, match=name):
        open_backbone(tmp_path)


def test_an_option_of_timm_that_is_not_known_is_refused_by_name(tmp_path):
    saved(tmp_path / "model.safetensors", tiny().state_dict())
    for arguments, named in (({"qk_norm": True}, "qk_norm"), ({"act_layer": "quick_gelu"}, "quick_gelu")):
        config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "pretrained_cfg": HALF}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(DataError, match=named):
            open_backbone(tmp_path)


# torchvision ---------------------------------------------------------------------------------------------------------


def torchvision_vit(image_size: int) -> nn.Module:
    from torchvision.models import VisionTransformer as Theirs

    sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48, "num_classes": 5}
    return Theirs(image_size=image_size, patch_size=8, **sizes).eval()


def torchvision_tokens(theirs: nn.Module, images: Tensor) -> Tensor:
    kept: list[Tensor] = []
    theirs.encoder.register_forward_hook(lambda _, __, output: kept.append(output))
    theirs(standardised(images, IMAGENET))
    return kept.pop()


def test_torchvisions_vit_at_its_size_and_at_another_as_torchvision_resizes_it(tmp_path):
    from torchvision.models.vision_transformer import interpolate_embeddings

    theirs = scramble(torchvision_vit(32))
    file = saved(tmp_path / "x.safetensors", theirs.state_dict())
    ours, about = load_foreign(file, heads=4, leave_head=True)
    images = torch.rand(2, 3, 32, 32)
    assert_computes(ours, images, torchvision_tokens(theirs, images))
    assert about["left_behind"] == ["heads (2)"]
    larger = torchvision_vit(48)
    larger.load_state_dict(interpolate_embeddings(48, 8, theirs.state_dict()))
    images = torch.rand(2, 3, 48, 48)
    tokens = torchvision_tokens(larger, images)
    assert_computes(load_foreign(file, heads=4, leave_head=True)[0].resized(48), images, tokens)
    assert_computes(ours, images, tokens)


def test_torchvisions_old_names_and_published_sizes_are_known(tmp_path):
    old = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
        for name, tensor in scramble(torchvision_vit(16)).state_dict().items()
    }
    assert sum("linear_" in name for name in old) == 8
    assert load_foreign(saved(tmp_path / "x.safetensors", old), heads=4, leave_head=True)[0].depth == 2
    assert FAMILIES["torchvision"].heads[768, 12] == 12


# transformers --------------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def transformers_model(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    logging = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sizes = SIZES if "Dinov2" in name else SIZES | {"intermediate_size": 48}
    more = {"mask_ratio": 0.0, "decoder_num_hidden_layers": 1} if "MAE" in name else {}
    config = re.sub("(Model|For.*)$", "Config", name)
    return scramble(getattr(transformers, name)(getattr(transformers, config)(**sizes, **more)))


def transformers_folder(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    constants = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(constants))
    return folder


CONSTANTS = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
RESIZES = {
    "ViTModel": True,
    "DeiTModel": True,
    "ViTMAEModel": True,
    "Dinov2Model": False,
    "Dinov2WithRegistersModel": False,
}


@pytest.mark.parametrize("name", RESIZES)
def test_transformers_folders_compute_the_same_at_their_size_and_at_another(tmp_path, name):
    theirs = transformers_model(name)
    folder = transformers_folder(theirs, tmp_path / "model")
    for size in (32, 48):
        images = torch.rand(2, 3, size, size)
        ours, about = open_backbone(folder)
        # Those that resize without being asked have no such argument.
        asked = {"interpolate_pos_encoding": True} if RESIZES[name] and size != 32 else {}
        if "MAE" in name:  # it shuffles the patches, even when it hides none
            asked["noise"] = torch.arange((size // 8) ** 2).expand(2, -1) / 100
        tokens = theirs(standardised(images, CONSTANTS), **asked).last_hidden_state
        assert_computes(ours, images, tokens)
    assert ours.config.epsilon == (1e-6 if "Dinov2" in name else 1e-12)
    assert "config.json" in about["known"]["epsilon"]


def test_epsilon_counts_where_what_is_normed_is_small(tmp_path):
    theirs = transformers_model("ViTModel")
    for parameter in theirs.embeddings.parameters():
        parameter *= 1e-3
    ours, _ = open_backbone(transformers_folder(theirs, tmp_path / "model"))
    images = torch.rand(2, 3, 32, 32)
    tokens = theirs(standardised(images, CONSTANTS)).last_hidden_state
    assert_computes(ours, images, tokens)
    wrong = ViT(replace(ours.config, epsilon=1e-6)).eval()
    wrong.load_state_dict(ours.state_dict())
    assert not torch.allclose(wrong(images).patches, tokens[:, 1:], atol=1e-2)


def test_transformers_classifiers_and_decoders_are_left_behind_when_it_is_said(tmp_path):
    classifier = transformers_folder(transformers_model("ViTForImageClassification"), tmp_path / "classifier")
    with pytest.raises(DataError, match=r"classifier\.bias.*leave_head=true"):
        open_backbone(classifier)
    assert open_backbone(classifier, leave_head=True)[1]["left_behind"] == ["classifier (2)"]
    pretraining = transformers_folder(transformers_model("ViTMAEForPreTraining"), tmp_path / "mae")
    assert open_backbone(pretraining)[1]["left_behind"] == ["decoder (24)"]


@pytest.mark.processes
def test_transformers_names_in_memory_are_those_on_disk(tmp_path):
    theirs = transformers_model("DeiTModel")
    folder = transformers_folder(theirs, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    images = torch.rand(2, 3, 32, 32)
    ours, about = open_backbone(folder)
    assert_computes(ours, images, theirs(standardised(images, CONSTANTS)).last_hidden_state)
    assert about["left_behind"] == ["pooler (2)"]


def test_missing_and_contradicting_facts_of_a_transformers_folder_are_refused(tmp_path):
    folder = transformers_folder(transformers_model("ViTModel"), tmp_path / "model")
    for said in ({"heads": 2}, {"gelu": "tanh"}, {"epsilon": 1e-6}, {"mean": (0.5, 0.5, 0.5)}, {"image_size": 64}):
        with pytest.raises(ValueError, match=f"{next(iter(said))} is .* by its .*json, and .* by you"):
            open_backbone(folder, **said)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"nothing in it says mean, std.*mean=\.\.\., std=\.\.\."):
        open_backbone(folder)
    assert open_backbone(folder, **HALF)[0].config.mean == (0.5, 0.5, 0.5)
    config = json.loads((folder / "config.json").read_text())
    for change, named in (({"hidden_act": "quick_gelu"}, "quick_gelu"), ({"model_type": "levit"}, "levit")):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(DataError, match=named):
            open_backbone(folder, **HALF)


# The official releases of MoCo v3, DINO, MAE and DINOv2 --------------------------------------------------------------


def sincos(first: Tensor, second: Tensor, width: int) -> Tensor:
    angles = [x.flatten()[:, None] / 10000 ** (torch.arange(width // 4) / (width // 4)) for x in (first, second)]
    table = torch.cat([part for a in angles for part in (a.sin(), a.cos())], 1)
    return torch.cat([torch.zeros(1, width), table])[None]


SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 9}


def stepped(lr: Any, weight_decay: Any) -> dict[str, Any]:
    """The state of an AdamW whose rate and decay the loop sets in every step, from its schedules."""
    weight = torch.rand(2, 3, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.rand(2, 3)
    optimizer.param_groups[0] |= {"lr": lr, "weight_decay": weight_decay}
    optimizer.step()
    return optimizer.state_dict()


def of_a_cluster(**options: Any) -> argparse.Namespace:
    """A run's arguments as run_with_submitit.py of DINO, MAE and DeiT leaves them: its folder is a Path."""
    return argparse.Namespace(output_dir=Path("/checkpoint/1234"), dist_url="file:///checkpoint/init", **options)


def moco_v3(model: VisionTransformer, other: VisionTransformer) -> dict[str, Any]:
    """https://github.com/facebookresearch/moco-v3: main_moco.py saves a MoCo (moco/builder.py) inside DDP."""
    rows, columns = torch.meshgrid(*(torch.arange(n).float() for n in model.patch_embed.grid_size), indexing="ij")
    model.pos_embed.copy_(sincos(rows, columns, model.embed_dim))
    head = {"head.0.weight": torch.rand(8, 24), "head.1.running_mean": torch.rand(8), "head.3.weight": torch.rand(8, 8)}
    state = with_prefix("module.base_encoder.", model.state_dict() | head)
    state |= with_prefix("module.momentum_encoder.", other.state_dict() | head)
    state |= {"module.predictor.0.weight": torch.rand(8, 8), "module.predictor.1.num_batches_tracked": torch.tensor(3)}
    optimizer = stepped(1.5e-4, 0.1)
    return {"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": optimizer, "scaler": dict(SCALER)}


@pytest.mark.processes
def test_moco_v3_gives_its_base_encoder_or_the_momentum_encoder(tmp_path):
    models = tiny(), tiny()
    checkpoint, images = moco_v3(*models), torch.rand(2, 3, 16, 16)
    torch.save(checkpoint, tmp_path / "vit-s-300ep.pth.tar")
    saved(tmp_path / "x.safetensors", flat(checkpoint))
    cases = ("vit-s-300ep.pth.tar", {}), ("x.safetensors", {"part": "momentum_encoder"})
    for model, (name, asked) in zip(models, cases, strict=True):
        ours, about = load_foreign(tmp_path / name, heads=3, **asked)
        assert_computes(ours, images, model.forward_features(standardised(images, IMAGENET)))
        assert ours.position == ("learned_1d" if asked else "sincos_moco_v3")
        assert about["part"].endswith(f"module.{asked.get('part', 'base_encoder')}.")
        assert about["readout"] == "cls"
    with pytest.raises(ValueError, match=r"base_encoder.*momentum_encoder.*part="):
        load_foreign(tmp_path / "x.safetensors", heads=3, part="teacher")


def test_moco_v3s_vit_s_has_12_heads_and_nothing_else_is_believed(tmp_path):
    theirs = scramble(timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0))
    other = {"module.momentum_encoder.patch_embed.proj.weight": torch.zeros(1)}
    file = saved(tmp_path / "x.safetensors", with_prefix("module.base_encoder.", theirs.state_dict()) | other)
    with pytest.raises(ValueError, match="heads is 12 by the moco_v3 release, and 6 by you"):
        load_foreign(file, heads=6)
    ours, _ = load_foreign(file)
    images = torch.rand(1, 3, 224, 224)
    tokens = theirs.forward_features(standardised(images, IMAGENET))
    assert_computes(ours, images, tokens)
    six = ViT(replace(ours.config, heads=6)).eval()
    six.load_state_dict(ours.state_dict())  # without an error: nothing in the weights would have told
    assert not torch.allclose(six(images).cls, tokens[:, 0], atol=0.1)


def test_the_same_names_without_a_prefix_do_not_say_whose_they_are(tmp_path):
    state = timm.create_model("vit_small_patch16_224", depth=12, img_size=16, num_classes=0).state_dict()
    file = saved(tmp_path / "x.safetensors", state)
    with pytest.raises(ValueError, match=r"nothing in it says heads, gelu, mean, std.*'moco_v3': 12, 'dino': 6"):
        load_foreign(file)
    for family, heads in (("dino", 6), ("moco_v3", 12), ("augreg", 6)):
        ours, about = load_foreign(file, family=family)
        assert ours.heads == heads
        assert about["known"]["heads"] == f"{heads} (the {family} release)"
        assert ours.config.mean == tuple((HALF if family == "augreg" else IMAGENET)["mean"])
    with pytest.raises(ValueError, match=r"family must be one of deit, moco_v3.*got 'dinov5'"):
        load_foreign(file, family="dinov5")
    with pytest.raises(ValueError, match="heads is 6 by the dino release, and 12"):
        load_foreign(file, family="dino", heads=12)
    with pytest.raises(ValueError, match=r"nothing in it says heads\. "):  # no MAE of this size was published
        load_foreign(file, family="mae")


def dino(student: VisionTransformer, teacher: VisionTransformer) -> dict[str, Any]:
    """https://github.com/facebookresearch/dino: main_dino.py saves two MultiCropWrappers, the student inside DDP. Its
    schedules (utils.cosine_scheduler) are arrays of numpy, so the optimizer holds numpy's numbers."""
    head = {"head.mlp.0.weight": torch.rand(8, 24), "head.last_layer.weight_g": torch.ones(8, 1)}
    head |= {"head.last_layer.weight_v": torch.rand(8, 8)}
    schedule = 5e-4 * 0.5 * (1 + np.cos(np.pi * np.arange(10) / 10))
    return {
        "student": with_prefix("module.", with_prefix("backbone.", student.state_dict()) | head),
        "teacher": with_prefix("backbone.", teacher.state_dict()) | head,
        "optimizer": stepped(schedule[3], 0.4 - schedule[3]),
        "epoch": 100,
        "args": of_a_cluster(arch="vit_small", patch_size=16, local_crops_scale=(0.05, 0.4)),
        "dino_loss": {"center": torch.rand(1, 8)},
        "fp16_scaler": dict(SCALER),
    }


def as_the_other_numpy_wrote_it(file: Path) -> Path:
    """The same checkpoint with the name that numpy 1, or 2, gave the module of its numbers: numpy.core, numpy._core."""
    other = file.with_name(f"other-numpy-{file.name}")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(other, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                names = [b"cnumpy._core.multiarray\nscalar\n", b"cnumpy.core.multiarray\nscalar\n"]
                here, there = sorted(names, key=lambda name: name not in content)
                assert here in content
                content = content.replace(here.removesuffix(b"scalar\n"), there.removesuffix(b"scalar\n"))
            new.writestr(entry, content)
    return other


@pytest.mark.processes
def test_dinos_own_files_hold_numbers_of_numpy_1_or_2_and_paths_and_are_read(tmp_path):
    student, teacher = tiny(), tiny()
    file = tmp_path / "checkpoint.pth"
    torch.save(dino(student, teacher), file)
    images = torch.rand(2, 3, 16, 16)
    expected = teacher.forward_features(standardised(images, IMAGENET))
    for written in (file, as_the_other_numpy_wrote_it(file)):
        ours, about = load_foreign(written, heads=3)
        assert_computes(ours, images, expected)
        assert about["left_behind"] == ["dino_loss: center (1)", "head (3)", "student: module (33)"]


@pytest.mark.processes
def test_dino_gives_its_teacher_or_the_student_and_resizes_with_its_offset(tmp_path):
    student, teacher = tiny(), tiny()
    checkpoint, file = dino(student, teacher), tmp_path / "dino_deitsmall16_pretrain_full_checkpoint.pth"
    torch.save(checkpoint, file)
    images = torch.rand(2, 3, 16, 16)
    ours, about = load_foreign(file, heads=3)
    assert_computes(ours, images, teacher.forward_features(standardised(images, IMAGENET)))
    assert about["left_behind"] == ["dino_loss: center (1)", "head (3)", "student: module (33)"]
    assert about["notes"] == []
    file = saved(tmp_path / "x.safetensors", flat(checkpoint))
    other = load_foreign(file, heads=3, part="student")[0].resized(24)
    assert_computes(
        load_foreign(file, heads=3, part="student")[0], images, student.forward_features(standardised(images, IMAGENET))
    )
    table = resize(student.pos_embed[:, 1:], (4, 4), (6, 6), "bicubic_offset")
    assert torch.equal(other.pos_embed, torch.cat([student.pos_embed[:, :1], table], 1))


def mae(model: VisionTransformer) -> dict[str, Any]:
    """https://github.com/facebookresearch/mae: models_mae.py, whose decoder has a mask token and positions too."""
    columns, rows = torch.meshgrid(*(torch.arange(n).float() for n in model.patch_embed.grid_size), indexing="xy")
    model.pos_embed.copy_(sincos(columns, rows, model.embed_dim))
    decoder = VisionTransformer(**(TINY | {"embed_dim": 16, "num_heads": 2})).blocks.state_dict()
    rest = {
        "mask_token": torch.rand(1, 1, 16),
        "decoder_pos_embed": torch.rand(1, 17, 16),
        "decoder_embed.weight": torch.rand(16, 24),
        "decoder_embed.bias": torch.rand(16),
        "decoder_norm.weight": torch.rand(16),
        "decoder_pred.weight": torch.rand(48, 16),
    }
    state = model.state_dict() | rest | with_prefix("decoder_blocks.", decoder)
    optimizer, args = (
        stepped(1.5e-4, 0.05),
        of_a_cluster(model="mae_vit_base_patch16", log_dir=Path("/checkpoint/1234")),
    )
    return {"model": state, "optimizer": optimizer, "epoch": 799, "scaler": dict(SCALER), "args": args}


@pytest.mark.processes
def test_mae_gives_its_encoder_and_reports_the_decoder(tmp_path):
    theirs = tiny()
    torch.save(mae(theirs), tmp_path / "checkpoint-799.pth")
    ours, about = load_foreign(tmp_path / "checkpoint-799.pth", heads=3)
    images = torch.rand(2, 3, 16, 16)
    assert_computes(ours, images, theirs.forward_features(standardised(images, IMAGENET)))
    assert ours.position == "sincos_mae"
    assert about["left_behind"] == [
        "decoder_blocks (24)", "decoder_embed (2)", "decoder_norm (1)", "decoder_pos_embed (1)", "decoder_pred (1)",
        "mask_token (1)",
    ]  # fmt: skip


def dinov2(width: int, registers: int) -> dict[str, Tensor]:
    """https://github.com/facebookresearch/dinov2: dinov2/models/vision_transformer.py and dinov2/layers/block.py."""
    block = {
        "norm1.weight": (width,), "norm1.bias": (width,), "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
        "ls1.gamma": (width,), "norm2.weight": (width,), "norm2.bias": (width,), "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,), "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
        "ls2.gamma": (width,),
    }  # fmt: skip
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 17, width), "mask_token": (1, width)}
    shapes |= {"register_tokens": (1, registers, width)} if registers else {}
    shapes |= {"patch_embed.proj.weight": (width, 3, 4, 4), "patch_embed.proj.bias": (width,)}
    for i in range(2):
        shapes |= with_prefix(f"blocks.{i}.", block)
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_is_what_timms_loader_makes_of_it(tmp_path, registers):
    state = dinov2(24, registers)
    theirs = VisionTransformer(**TINY, init_values=1.0, reg_tokens=registers, no_embed_class=registers > 0).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    images = torch.rand(2, 3, 16, 16)
    tokens = theirs.forward_features(standardised(images, IMAGENET))
    ours, about = load_foreign(saved(tmp_path / "x.safetensors", state), heads=3)
    assert_computes(ours, images, tokens)
    assert about["left_behind"] == ["mask_token (1)"]
    # In training its blocks lie in chunks, numbered twice: dinov2/models/vision_transformer.py, block_chunks.
    chunked = {re.sub(r"^blocks\.", "blocks.0.", name): tensor for name, tensor in state.items()}
    file = saved(tmp_path / "x.safetensors", with_prefix("teacher.backbone.", chunked))
    assert_computes(load_foreign(file, heads=3)[0], images, tokens)


def dinov2s_positions(patches: Tensor, grid: tuple[int, int], registers: int) -> Tensor:
    """dinov2/models/vision_transformer.py, interpolate_pos_encoding, with what dinov2/hub/backbones.py gives it: models
    with registers have interpolate_antialias=True and interpolate_offset=0.0, those without False and 0.1."""
    side = round(patches.shape[1] ** 0.5)
    if registers:
        options = {"size": grid, "antialias": True}
    else:
        options = {"scale_factor": tuple((new + 0.1) / side for new in grid), "antialias": False}
    table = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return nn.functional.interpolate(table, mode="bicubic", **options).permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("grid", [(6, 6), (3, 3), (5, 7)])
def test_dinov2s_positions_are_resized_as_its_code_does_with_registers_and_without(tmp_path, registers, grid):
    state = dinov2(24, registers)
    file, size = saved(tmp_path / "x.safetensors", state), tuple(4 * side for side in grid)
    expected = dinov2s_positions(state["pos_embed"][:, 1:], grid, registers)
    ours = load_foreign(file, heads=3)[0].resized(size)
    torch.testing.assert_close(ours.pos_embed[:, -grid[0] * grid[1] :], expected, rtol=0, atol=1e-5)
    if registers:  # timm resizes so whatever it opens
        theirs = VisionTransformer(**TINY, init_values=1.0, reg_tokens=4, no_embed_class=True, dynamic_img_size=True)
        theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
        images = torch.rand(2, 3, *size)
        tokens = theirs.eval().forward_features(standardised(images, IMAGENET))
        assert_computes(load_foreign(file, heads=3)[0], images, tokens)


# How positions are resized -------------------------------------------------------------------------------------------


def cubic_convolution(values: np.ndarray, count: int, step: float, a: float = -0.75) -> np.ndarray:
    """Keys's kernel along the first axis, the edge repeated: output i is read at (i + 1/2) step - 1/2."""
    result = []
    for i in range(count):
        at = (i + 0.5) * step - 0.5
        total = np.zeros_like(values[0])
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            d = abs(at - j)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            total = total + (near if d <= 1 else far) * values[min(max(j, 0), len(values) - 1)]
        result.append(total)
    return np.stack(result)


@pytest.mark.parametrize(("rule", "offset"), [("bicubic_plain", 0.0), ("bicubic_offset", 0.1)])
@pytest.mark.parametrize("new", [(6, 9), (3, 4), (5, 5)])
def test_plain_and_offset_rules_are_keyss_cubic_convolution(rule, offset, new):
    table = torch.randn(1, 20, 3, dtype=torch.float64)
    grid = cubic_convolution(table.reshape(4, 5, 3).numpy(), new[0], 4 / (new[0] + offset))
    grid = cubic_convolution(grid.swapaxes(0, 1), new[1], 5 / (new[1] + offset)).swapaxes(0, 1)
    expected = torch.from_numpy(grid).reshape(1, -1, 3)
    torch.testing.assert_close(resize(table, (4, 5), new, rule), expected, rtol=0, atol=1e-9)


# Google's .npz -------------------------------------------------------------------------------------------------------


def google_vit(
    width: int, heads: int, rows: int, kernel: tuple[int, ...], *, new: bool, cls: bool
) -> dict[str, np.ndarray]:
    """As https://github.com/google-research/vision_transformer (vit_jax/models_vit.py) names and shapes it; new: as
    https://github.com/google-research/big_vision (big_vision/models/vit.py) does."""
    attention, mlp, second = (0, 0, 1) if new else (1, 3, 2)
    shapes: dict[str, tuple[int, ...]] = {"embedding/kernel": kernel, "embedding/bias": (width,)}
    shapes |= {"cls": (1, 1, width)} if cls else {}
    shapes["pos_embedding" if new else "Transformer/posembed_input/pos_embedding"] = (1, rows, width)
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        for name in ("query", "key", "value"):
            shapes[f"{block}/MultiHeadDotProductAttention_{attention}/{name}/kernel"] = (width, heads, width // heads)
            shapes[f"{block}/MultiHeadDotProductAttention_{attention}/{name}/bias"] = (heads, width // heads)
        shapes[f"{block}/MultiHeadDotProductAttention_{attention}/out/kernel"] = (heads, width // heads, width)
        shapes[f"{block}/MultiHeadDotProductAttention_{attention}/out/bias"] = (width,)
        for dense, (inner, outer) in enumerate(((width, 4 * width), (4 * width, width))):
            shapes[f"{block}/MlpBlock_{mlp}/Dense_{dense}/kernel"] = (inner, outer)
            shapes[f"{block}/MlpBlock_{mlp}/Dense_{dense}/bias"] = (outer,)
        for norm in ("LayerNorm_0", f"LayerNorm_{second}"):
            shapes |= {f"{block}/{norm}/scale": (width,), f"{block}/{norm}/bias": (width,)}
    shapes |= {"Transformer/encoder_norm/scale": (width,), "Transformer/encoder_norm/bias": (width,)}
    chance = np.random.default_rng(0)
    return {name: chance.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


GOOGLE = {
    "vision_transformer": (False, True, 17, {}),
    "vision_transformer, mean": (False, False, 16, {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "big_vision": (True, True, 16, {"no_embed_class": True}),
    "big_vision, mean": (True, False, 16, {"class_token": False, "global_pool": "avg", "fc_norm": False}),
}


# timm takes "params/" for a sign of big_vision.
@pytest.mark.parametrize(
    ("case", "prefix"), [(case, p) for case in GOOGLE for p in ("", "params/" if GOOGLE[case][0] else "opt/target/")]
)
def test_googles_vits_are_what_timms_loader_makes_of_them_with_the_tanh_gelu(tmp_path, case, prefix):
    new, cls, rows, changes = GOOGLE[case]
    arrays = google_vit(24, 3, rows, (4, 4, 3, 24), new=new, cls=cls)
    np.savez(tmp_path / "x.npz", **{prefix + name: array for name, array in arrays.items()})
    theirs = VisionTransformer(**TINY, act_layer=partial(nn.GELU, "tanh"), **changes).eval()
    theirs.load_pretrained(str(tmp_path / "x.npz"))
    images = torch.rand(2, 3, 16, 16)
    tokens = theirs.forward_features(standardised(images, HALF))
    ours, about = load_foreign(tmp_path / "x.npz")
    assert_computes(ours, images, tokens)
    assert (ours.heads, ours.config.gelu) == (3, "tanh")
    assert about["readout"] == ("cls" if cls else "mean")
    with pytest.raises(ValueError, match="gelu is tanh by the google release, and exact by you"):
        load_foreign(tmp_path / "x.npz", gelu="exact")
    with pytest.raises(ValueError, match="heads is 3 by the shape of its kernels, and 6 by you"):
        load_foreign(tmp_path / "x.npz", heads=6)
    exact = ViT(replace(ours.config, gelu="exact")).eval()
    exact.load_state_dict(ours.state_dict())
    assert not torch.allclose(exact(images).patches, ours(images).patches, atol=1e-4)


def test_googles_positions_are_resized_as_scipy_zooms(tmp_path):
    arrays = google_vit(24, 3, 17, (4, 4, 3, 24), new=False, cls=True)
    np.savez(tmp_path / "x.npz", **arrays)
    ours, about = load_foreign(tmp_path / "x.npz")
    larger = ours.resized(28)
    table = arrays["Transformer/posembed_input/pos_embedding"][0, 1:].reshape(4, 4, 24)
    zoomed = torch.from_numpy(scipy.ndimage.zoom(table, (7 / 4, 7 / 4, 1), order=1)).reshape(1, 49, 24)
    torch.testing.assert_close(larger.pos_embed[:, 1:], zoomed, rtol=0, atol=1e-6)
    images = torch.rand(2, 3, 28, 28)
    torch.testing.assert_close(ours(images).patches, larger(images).patches, rtol=0, atol=1e-5)
    assert about["notes"] == []


def test_big_visions_stacked_blocks_and_fixed_positions(tmp_path):
    arrays = google_vit(24, 3, 16, (4, 4, 3, 24), new=True, cls=False)
    np.savez(tmp_path / "x.npz", **arrays)
    plain, _ = load_foreign(tmp_path / "x.npz")
    blocks = {name: array for name, array in arrays.items() if "encoderblock_0" in name}
    stacked = {name: array for name, array in arrays.items() if "encoderblock_" not in name} | {
        name.replace("block_0", "block"): np.stack([array, arrays[name.replace("block_0", "block_1")]])
        for name, array in blocks.items()
    }
    np.savez(tmp_path / "stacked.npz", **stacked)
    again, _ = load_foreign(tmp_path / "stacked.npz")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in plain.state_dict().items())
    # posemb "sincos2d" leaves no array, so no size either.
    del arrays["pos_embedding"]
    np.savez(tmp_path / "fixed.npz", **arrays)
    with pytest.raises(ValueError, match="say image_size="):
        load_foreign(tmp_path / "fixed.npz")
    fixed, _ = load_foreign(tmp_path / "fixed.npz", image_size=16)
    assert fixed.position == "sincos_big_vision"
    y, x = np.mgrid[:4, :4]  # the formula of big_vision/models/vit.py
    omega = 1 / 10000 ** (np.arange(6) / 5)
    angles = [np.outer(part.flatten(), omega) for part in (x, y)]
    expected = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1)
    np.testing.assert_allclose(fixed.pos_embed[0].numpy(), expected, atol=1e-6)


def google_resnet(blocks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """https://github.com/google-research/vision_transformer, vit_jax/models_vit.py and models_resnet.py; kernels so
    large that timm's and Google's epsilons both vanish."""
    shapes = {"conv_root/kernel": (7, 7, 3, 64), "gn_root/scale": (1, 1, 1, 64), "gn_root/bias": (1, 1, 1, 64)}
    channels = 64
    for i, count in enumerate(blocks):
        inner = 64 * 2**i
        for j in range(count):
            unit = f"block{i + 1}/unit{j + 1}"
            kernels = {
                "conv1": (1, 1, channels, inner),
                "conv2": (3, 3, inner, inner),
                "conv3": (1, 1, inner, 4 * inner),
            }
            norms = {"gn1": inner, "gn2": inner, "gn3": 4 * inner}
            if j == 0:
                kernels["conv_proj"], norms["gn_proj"] = (1, 1, channels, 4 * inner), 4 * inner
            shapes |= {f"{unit}/{name}/kernel": shape for name, shape in kernels.items()}
            shapes |= {f"{unit}/{name}/{kind}": (size,) for name, size in norms.items() for kind in ("scale", "bias")}
            channels = 4 * inner
    chance = np.random.default_rng(1)
    return {
        name: chance.normal(0, 100 if name.endswith("kernel") else 0.5, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("name", "blocks", "kernel"),
    [("vit_tiny_r_s16_p8_224", (), (8, 8, 64, 192)), ("vit_small_r26_s32_224", (2, 2, 2, 2), (1, 1, 2048, 384))],
)
def test_googles_hybrids_are_what_timms_loader_makes_of_them(tmp_path, name, blocks, kernel):
    width, heads = kernel[-1], kernel[-1] // 64
    arrays = google_vit(width, heads, 5, kernel, new=False, cls=True) | google_resnet(blocks)
    arrays["embedding/kernel"] *= 0.1
    np.savez(tmp_path / "x.npz", **arrays)
    theirs = timm.create_model(name, depth=2, img_size=64, num_classes=0, act_layer=partial(nn.GELU, "tanh")).eval()
    theirs.load_pretrained(str(tmp_path / "x.npz"))
    ours, _ = load_foreign(tmp_path / "x.npz")
    assert ours.heads == heads
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    assert_computes(ours.double(), images, theirs.double().forward_features(2 * images - 1))


def google_bit() -> dict[str, np.ndarray]:
    """https://github.com/google-research/big_transfer: the names of bit_pytorch/models.py's load_from."""
    shapes = {
        "root_block/standardized_conv2d/kernel": (7, 7, 3, 64),
        "group_norm/gamma": (2048,),
        "group_norm/beta": (2048,),
    }
    shapes |= {"head/conv2d/kernel": (1, 1, 2048, 5), "head/conv2d/bias": (5,)}
    channels = 64
    for i in range(4):
        inner, unit = 64 * 2**i, f"block{i + 1}/unit01"
        shapes |= {
            f"{unit}/a/standardized_conv2d/kernel": (1, 1, channels, inner),
            f"{unit}/b/standardized_conv2d/kernel": (3, 3, inner, inner),
            f"{unit}/c/standardized_conv2d/kernel": (1, 1, inner, 4 * inner),
            f"{unit}/a/proj/standardized_conv2d/kernel": (1, 1, channels, 4 * inner),
        }
        for part, size in (("a", channels), ("b", inner), ("c", inner)):
            shapes |= {f"{unit}/{part}/group_norm/gamma": (size,), f"{unit}/{part}/group_norm/beta": (size,)}
        channels = 4 * inner
    chance = np.random.default_rng(2)
    return {f"resnet/{name}": chance.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def timm_bit() -> nn.Module:
    """timm's own maker of them, of one block a stage."""
    small = {"layers": [1, 1, 1, 1], "width_factor": 1, "num_classes": 0, "global_pool": ""}
    return _create_resnetv2_bit("resnetv2_50x1_bit", **small).eval()


def with_googles_epsilon(theirs: nn.Module) -> nn.Module:
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d):
            module.eps = 1e-10
    return theirs.double()


def test_googles_bit_is_what_timms_loader_makes_of_it(tmp_path):
    arrays, theirs = google_bit(), timm_bit()
    np.savez(tmp_path / "BiT-M-R50x1.npz", **arrays)
    theirs.load_pretrained(str(tmp_path / "BiT-M-R50x1.npz"))
    with pytest.raises(DataError, match=r"head/conv2d/bias.*leave_head=true"):
        load_foreign(tmp_path / "BiT-M-R50x1.npz")
    ours, about = load_foreign(tmp_path / "BiT-M-R50x1.npz", leave_head=True)
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    expected = with_googles_epsilon(theirs).forward_features(2 * images - 1)
    torch.testing.assert_close(ours.double().features(images), expected, rtol=0, atol=1e-9)
    assert about["readout"] == "mean"
    numbered = {name.replace("b/standardized_conv2d/", "b/standardized_conv2d_7/"): a for name, a in arrays.items()}
    np.savez(tmp_path / "numbered.npz", **numbered)
    again, _ = load_foreign(tmp_path / "numbered.npz", leave_head=True)
    assert torch.equal(again.stages[0].blocks[0].conv2.weight, ours.stages[0].blocks[0].conv2.weight.float())
    with pytest.raises(ValueError, match="is a BiT: it has no heads"):
        load_foreign(tmp_path / "BiT-M-R50x1.npz", leave_head=True, heads=6)


def test_timms_bit_in_its_own_names(tmp_path):
    theirs = scramble(timm_bit(), kernel_std=0.1)
    saved(tmp_path / "model.safetensors", theirs.state_dict())
    config = {"architecture": "resnetv2_50x1_bit", "pretrained_cfg": HALF | {"input_size": [3, 448, 448]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, about = open_backbone(tmp_path)
    assert isinstance(ours, BiT)
    assert ours.image_size == (448, 448)
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    expected = theirs.double().forward_features(2 * images - 1)
    torch.testing.assert_close(ours.double().features(images), expected, rtol=0, atol=1e-9)
    assert "timm's" in about["notes"][0]
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "resnetv2_50"}))
    with pytest.raises(DataError, match="'resnetv2_50' is not one of those"):
        open_backbone(tmp_path)


# What goes by other names, and what is ours --------------------------------------------------------------------------


@pytest.mark.processes
def test_deits_distillation_token_becomes_a_register(tmp_path):
    theirs = scramble(timm.create_model("deit_tiny_distilled_patch16_224", depth=2, img_size=48, num_classes=0))
    # https://github.com/facebookresearch/deit, main.py; lr_scheduler: the attributes of timm's CosineLRScheduler.
    rest = {"optimizer": stepped(1e-3, 0.05), "lr_scheduler": {"param_group_field": "lr", "base_values": [1e-3]}}
    rest |= {"epoch": 299, "scaler": dict(SCALER), "args": of_a_cluster(model="deit_tiny_distilled_patch16_224")}
    torch.save({"model": theirs.state_dict()} | rest, tmp_path / "deit.pth")
    images = torch.rand(2, 3, 48, 48)
    ours, about = load_foreign(tmp_path / "deit.pth", heads=3)
    tokens = theirs.forward_features(standardised(images, IMAGENET))
    assert_computes(ours, images, tokens)
    assert ours.registers == 1
    assert "distillation token became a register" in about["notes"][0]


def test_deit_iiis_own_names_of_layer_scale(tmp_path):
    theirs = tiny(init_values=0.1, no_embed_class=True)
    state = {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): tensor for name, tensor in theirs.state_dict().items()}
    ours, _ = load_foreign(saved(tmp_path / "x.safetensors", state), heads=3)
    images = torch.rand(2, 3, 16, 16)
    assert_computes(ours, images, theirs.forward_features(standardised(images, IMAGENET)))


def test_open_backbone_takes_models_of_any_origin_and_its_result_can_be_saved(tmp_path):
    theirs = tiny(reg_tokens=1)
    file = saved(tmp_path / "x.safetensors", theirs.state_dict())
    foreign, about = open_backbone(file, **SAID)
    save_backbone(foreign, tmp_path / "run" / "model", about)
    images = torch.rand(2, 3, 16, 16)
    for place in (tmp_path / "run", tmp_path / "run" / "model"):
        ours, told = open_backbone(place)
        assert torch.equal(ours(images).patches, foreign(images).patches)
        assert told["readout"] == "cls"
        assert told["known"]["heads"] == "3 (you)"
        with pytest.raises(ValueError, match="is a model of sslvit, which says everything itself: leave out heads"):
            open_backbone(place, heads=3)
    assert load_backbone(tmp_path / "run").heads == 3


def test_of_two_backbones_in_a_file_one_must_be_named(tmp_path):
    models = {"model": tiny(), "model_ema": tiny()}
    tensors = {f"{name}.{key}": t for name, model in models.items() for key, t in model.state_dict().items()}
    file = saved(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError, match=r"': model\. \(timm\)', ': model_ema\. \(timm\)'.*part="):
        load_foreign(file, **SAID)
    images = torch.rand(1, 3, 16, 16)
    for name, model in models.items():
        ours, _ = load_foreign(file, part=name, **SAID)
        assert_computes(ours, images, model.forward_features(standardised(images, HALF)))


# What is refused -----------------------------------------------------------------------------------------------------


def refused(
    tmp_path: Path, state: dict[str, Tensor], message: str, error: type[Exception] = DataError, **said: Any
) -> None:
    with pytest.raises(error, match=message):
        load_foreign(saved(tmp_path / "x.safetensors", state), **(SAID | said))


def test_missing_and_unexpected_weights_are_listed(tmp_path):
    state = tiny().state_dict()
    without = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    refused(tmp_path, without, r"missing norm\.weight, the norm after the last block")
    for name in ("norm.bias", "blocks.1.attn.proj.bias", "patch_embed.proj.bias", "blocks.0.mlp.fc1.weight"):
        refused(tmp_path, {other: t for other, t in state.items() if other != name}, f"missing {re.escape(name)}")
    refused(tmp_path, state | {"blocks.0.adapter.weight": torch.rand(2)}, r"unexpected blocks\.0\.adapter\.weight")
    refused(tmp_path, {n: t for n, t in state.items() if not n.startswith("blocks.0.")}, r"missing blocks\.0\.attn")
    refused(tmp_path, state | {"norm.weight": torch.full((24,), torch.nan)}, r"not finite: norm\.weight")


def test_a_file_without_any_known_name_is_refused_with_some_of_its_names(tmp_path):
    state = {f"trunk.layer{i}.w": torch.rand(2) for i in range(30)}
    refused(
        tmp_path, state, r"no ViT and no BiT in a layout that is known.* 30 tensors, trunk\.layer0\.w, trunk\.layer1"
    )


def test_a_probe_or_classifier_is_not_taken_for_the_pretraining(tmp_path):
    # DINO's eval_linear.py saves its linear layer alone, MoCo v3's main_lincls.py the whole model in DDP, MAE's
    # main_linprobe.py a batch norm before the layer.
    alone = {"module.linear.weight": torch.rand(5, 24), "module.linear.bias": torch.rand(5)}
    refused(tmp_path, alone, r"a linear probe holds none either.*module\.linear\.bias")
    state = tiny().state_dict()
    linear = {"head.weight": torch.rand(5, 24), "head.bias": torch.rand(5)}
    refused(tmp_path, with_prefix("module.", state | linear), r"holds a classifier \(head\.bias, head\.weight\)")
    normed = {"head.0.running_mean": torch.rand(24), "head.1.weight": torch.rand(5, 24), "head.1.bias": torch.rand(5)}
    refused(tmp_path, state | normed, "holds a classifier", family="mae", mean=None, std=None)
    beside = with_prefix("backbone.", state) | with_prefix("classifier.", {"weight": torch.rand(5, 24)})
    refused(tmp_path, beside, r"holds a classifier \(classifier\.weight\)")
    ours, about = load_foreign(saved(tmp_path / "x.safetensors", state | linear), leave_head=True, **SAID)
    assert about["left_behind"] == ["head (2)"]
    assert ours.depth == 2


@pytest.mark.parametrize(
    "name",
    [
        "linear_probe",
        "classifier.1",
        "cls_head",
        "probe",
        "lin",
        "classifier_head",
        "linear_head",
        "output",
        "mlp_head.1",
        "heads.0",
        "last_linear",
        "classif",
        "logits",
        "head",
        "fc",
        "module.fc",
        "head.fc",
    ],
)
def test_a_linear_layer_is_no_pretraining_under_any_of_its_names(tmp_path, name):
    linear = with_prefix(f"{name}.", {"weight": torch.rand(5, 24), "bias": torch.rand(5)})
    refused(tmp_path, with_prefix("backbone.", tiny().state_dict()) | linear, "holds a classifier.*leave_head=true")


def test_a_probe_of_moco_v3_or_dino_is_not_the_pretraining(tmp_path):
    state = with_prefix("module.base_encoder.", tiny().state_dict())
    own = {"module.base_encoder.head.0.weight": torch.rand(64, 24), "module.predictor.0.weight": torch.rand(64, 64)}
    said = {"gelu": None, "mean": None, "std": None}
    assert load_foreign(saved(tmp_path / "x.safetensors", state | own), heads=3)[0].depth == 2
    probe = {"module.base_encoder.head.weight": torch.rand(5, 24), "module.base_encoder.head.bias": torch.rand(5)}
    refused(tmp_path, state | probe, "holds a classifier", **said)
    dino = with_prefix("teacher.backbone.", tiny().state_dict()) | {"teacher.head.mlp.0.weight": torch.rand(64, 24)}
    dino["teacher.head.last_layer.weight_v"] = torch.rand(99, 64)
    assert load_foreign(saved(tmp_path / "x.safetensors", dino), heads=3)[0].depth == 2
    refused(tmp_path, dino | {"linear_classifier.linear.weight": torch.rand(5, 24)}, "holds a classifier", **said)


def test_lost_layers_are_noticed_by_the_config_beside_them(tmp_path):
    def without(folder: Path, pattern: str) -> Path:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        saved(folder / "model.safetensors", {n: t for n, t in tensors.items() if not re.search(pattern, n)})
        return folder

    folder = transformers_folder(transformers_model("ViTModel"), tmp_path / "a")
    with pytest.raises(DataError, match=r"says depth 2 \(the weights: 1\): weights are missing"):
        open_backbone(without(folder, r"layers?\.1\."))
    folder = transformers_folder(transformers_model("ViTModel"), tmp_path / "b")
    with pytest.raises(DataError, match=r"says qkv_bias True \(the weights: False\)"):
        open_backbone(without(folder, r"(query|key|value|[qkv]_proj)\.bias"))
    folder = transformers_folder(transformers_model("Dinov2WithRegistersModel"), tmp_path / "c")
    with pytest.raises(DataError, match=r"says .*registers 4 \(the weights: 0\)"):
        open_backbone(without(folder, "register_tokens"))
    folder = transformers_folder(transformers_model("Dinov2Model"), tmp_path / "d")
    with pytest.raises(DataError, match=r"says layer_scale True \(the weights: False\)"):
        open_backbone(without(folder, "layer_scale"))
    arguments = {"embed_dim": 24, "num_heads": 3, "img_size": 16, "patch_size": 4, "depth": 2}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "pretrained_cfg": HALF}
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.json").write_text(json.dumps(config))
    saved(tmp_path / "e" / "model.safetensors", tiny().state_dict())
    assert open_backbone(tmp_path / "e")[1]["readout"] == "cls"
    with pytest.raises(DataError, match=r"says depth 2 \(the weights: 1\)"):
        open_backbone(without(tmp_path / "e", r"blocks\.1\."))
    saved(tmp_path / "e" / "model.safetensors", tiny(fc_norm=False, global_pool="avg").state_dict())
    config["model_args"]["global_pool"] = "avg"
    (tmp_path / "e" / "config.json").write_text(json.dumps(config))
    assert open_backbone(tmp_path / "e")[1]["readout"] == "mean"


def test_preprocessors_that_leave_images_at_255_and_numbers_that_no_model_has(tmp_path):
    folder = transformers_folder(transformers_model("ViTModel"), tmp_path / "model")
    constants = {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(constants))
    ours, _ = open_backbone(folder)
    assert (ours.config.mean, ours.config.std) == ((0.5,) * 3, (0.2,) * 3)
    for wrong, said in (({"image_std": [0.0, 1, 1]}, "std is"), ({"image_mean": [1e999, 0, 0]}, "mean is")):
        (folder / "preprocessor_config.json").write_text(json.dumps(constants | wrong))
        with pytest.raises(DataError, match=f"{said} .* by its preprocessor_config.json, which no model has"):
            open_backbone(folder)
    (folder / "preprocessor_config.json").unlink()
    for wrong in ({"num_attention_heads": -3}, {"image_size": [16]}, {"layer_norm_eps": "x"}):
        config = json.loads((folder / "config.json").read_text()) | wrong
        (folder / "wrong").mkdir(exist_ok=True)
        (folder / "wrong" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        (folder / "wrong" / "config.json").write_text(json.dumps(config))
        with pytest.raises(DataError, match=f"{next(iter(wrong))[-4:]}|size of|which no model has"):
            open_backbone(folder / "wrong", **HALF)


@pytest.mark.processes
def test_a_file_that_is_something_else_is_called_by_its_name(tmp_path):
    tar = b"x".ljust(257, b"\0") + b"ustar"
    kinds = {
        b"": "empty",
        b"<!DOCTYPE html>": "HTML",
        b"version https://git-lfs": "git-lfs",
        b"\x1f\x8b": "gzip",
        tar: "tar",
    }
    for content, said in kinds.items():
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(DataError, match=f"x.pth is .*{said}"):
            load_foreign(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError) as caught:
        load_foreign(tmp_path / "x.pth")
    assert "arbitrary code" not in str(caught.value)


def test_constants_of_another_training_are_said_where_only_names_give_a_release_away(tmp_path):
    state = {"model." + name: tensor for name, tensor in mae(tiny())["model"].items()}
    file = saved(tmp_path / "x.safetensors", state)
    assert load_foreign(file, heads=3)[0].config.mean == tuple(IMAGENET["mean"])
    assert load_foreign(file, heads=3, **HALF)[0].config.mean == (0.5,) * 3
    with pytest.raises(ValueError, match="gelu is exact by the mae release, and tanh by you"):
        load_foreign(file, heads=3, gelu="tanh")
    with pytest.raises(ValueError, match=r"mean is .* by the mae release, and .* by you"):
        load_foreign(file, heads=3, family="mae", **HALF)


def test_two_layouts_in_one_file_must_be_told_apart(tmp_path):
    tensors = with_prefix("mine.", tiny().state_dict())
    tensors |= with_prefix("yours.", transformers_model("ViTModel").state_dict())
    file = saved(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError, match=r"': mine\. \(timm\)', ': yours\. \(transformers\)'.*part="):
        load_foreign(file, **SAID)
    assert load_foreign(file, part="mine", **SAID)[0].width == 24


def test_a_classifier_of_the_mean_patch_has_its_norm_in_its_head(tmp_path):
    theirs = tiny(global_pool="avg", num_classes=5)
    state = theirs.state_dict()
    assert "fc_norm.weight" in state
    assert "norm.weight" not in state
    refused(tmp_path, state, r"fc_norm\.bias.*leave_head")
    ours, about = load_foreign(tmp_path / "x.safetensors", leave_head=True, **SAID)
    images = torch.rand(2, 3, 16, 16)
    assert_computes(ours, images, theirs.forward_features(standardised(images, HALF)))
    assert "norm of the mean was left behind" in about["notes"][0]


def test_a_table_of_positions_of_another_grid_is_refused(tmp_path):
    state = tiny().state_dict()
    refused(tmp_path, state, r"17 rows.*not the grid of image_size \(24, 24\).*image_size=", ValueError, image_size=24)
    refused(tmp_path, state, r"not the grid of image_size \(8, 16\)", ValueError, image_size=(8, 16))
    refused(tmp_path, state, r"image size \(18, 18\) is not a multiple", ValueError, image_size=18)
    shorter = state | {"pos_embed": state["pos_embed"][:, :12]}
    refused(tmp_path, shorter, "12 rows.*no square grid", ValueError)
    # Four registers and a class token: nine rows are nine patches, or four with positions for all.
    ambiguous = tiny(reg_tokens=4, img_size=8).state_dict()
    refused(tmp_path, ambiguous, "9 rows, 5 tokens.*or more than one", ValueError)
    assert load_foreign(tmp_path / "x.safetensors", image_size=8, **SAID)[0].grid == (2, 2)
    refused(tmp_path, {n: t for n, t in state.items() if n != "pos_embed"}, "missing pos_embed.*rotary")


LACKED = {
    "norms of queries and keys": {"qk_norm": True},
}


@pytest.mark.parametrize("what", LACKED)
def test_what_this_vit_lacks_is_refused_by_name(tmp_path, what):
    refused(tmp_path, tiny(**LACKED[what]).state_dict(), what)


def test_gates_of_an_unknown_kind_and_a_convolutional_stem_are_refused(tmp_path):
    state = {n: t for n, t in tiny().state_dict().items() if ".mlp." not in n}
    packed = {"fc1.weight": (32, 24), "fc1.bias": (32,), "fc2.weight": (24, 16), "fc2.bias": (24,)}
    mlps = {f"blocks.{i}.mlp.{name}": torch.rand(shape) for i in range(2) for name, shape in packed.items()}
    refused(tmp_path, state | mlps, r"from \(32, 24\) to \(24, 16\), so they have gates, and nothing shows")
    stem = {n: t for n, t in tiny().state_dict().items() if "patch_embed" not in n}
    refused(tmp_path, stem | {"patch_embed.proj.0.weight": torch.rand(8, 3, 3, 3)}, "a convolutional stem")


def test_a_small_file_cannot_ask_for_a_large_model(tmp_path):
    state = tiny().state_dict()
    refused(tmp_path, state | {"blocks.99999999.norm1.weight": torch.rand(24)}, "names 100000000 blocks, and has")
    wide = {n: t for n, t in state.items() if "mlp" not in n and "patch_embed.proj" not in n}
    wide |= {"patch_embed.proj.weight": torch.rand(300_000, 3, 1, 1)}
    wide |= {"blocks.0.mlp.fc1.weight": torch.rand(300_000, 1), "blocks.0.mlp.fc2.weight": torch.rand(1, 300_000)}
    refused(tmp_path, wide, "the weights do not fit the backbone")
    refused(tmp_path, state | {"patch_embed.proj.weight": torch.rand(24, 3, 0, 4)}, "empty or not finite: patch_embed")
    stages = {
        "stem.conv.weight": torch.rand(64, 3, 7, 7),
        "norm.weight": torch.rand(8),
        "stages.9999999.blocks.0.x": torch.rand(1),
    }
    with pytest.raises(DataError, match="are no BiT's"):
        load_foreign(saved(tmp_path / "x.safetensors", stages))


def test_whatever_shapes_a_file_has_it_loads_or_is_refused_in_a_sentence(tmp_path):
    layouts = {
        "x.safetensors": (dinov2(24, 2), {"heads": 3}),
        "y.safetensors": (tiny().state_dict(), SAID),
        "z.npz": (google_vit(24, 3, 17, (4, 4, 3, 24), new=False, cls=True), {}),
    }
    for file, (state, said) in layouts.items():
        for i, name in enumerate(state):
            for shape in ((), (1,), (2, 3, 1, 1), (1, 1, 24), None)[i % 5 :: 2]:
                changed = {other: value for other, value in state.items() if other != name}
                if file.endswith("npz"):
                    np.savez(
                        tmp_path / file, **changed, **({} if shape is None else {name: np.ones(shape, np.float32)})
                    )
                else:
                    saved(tmp_path / file, changed | ({} if shape is None else {name: torch.ones(shape)}))
                try:
                    load_foreign(tmp_path / file, **said)
                    message = None
                except ValueError as error:
                    message = str(error)
                # Other numbers of tokens, and Google's vectors with axes of length one, are no mistakes.
                fine = name in ("mask_token", "register_tokens", "pos_embed") or shape == (1, 1, 24)
                assert fine if message is None else str(tmp_path / file) in message, (name, shape, message)


# Files that mean harm, or are not whole ------------------------------------------------------------------------------


@pytest.fixture
def empty_after(tmp_path, monkeypatch):
    """The folder of temporary files, which must be empty in the end."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield
    assert list((tmp_path / "temporary").iterdir()) == []


def assert_harmless(tmp_path: Path, payload: bytes, suffix: str) -> str:
    (tmp_path / f"attack{suffix}").write_bytes(payload)
    with pytest.raises(DataError) as stopped:
        load_foreign(tmp_path / f"attack{suffix}")
    assert not (tmp_path / "canary").exists()
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["pickle 2", "torch zip in a dict"])
def test_a_pickle_that_would_run_a_program_does_not(tmp_path, name, empty_after):
    said = assert_harmless(tmp_path, payloads(tmp_path, tmp_path / "canary")[name], ".pth")
    assert re.search(r"asks for \w+\.system, which is no tensor and might run code: nothing of it was executed", said)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_payload_by_the_name_of_a_pickle_is_ever_executed(tmp_path, empty_after):
    for payload in payloads(tmp_path, tmp_path / "canary").values():  # a process for each
        assert_harmless(tmp_path, payload, ".pth")


def test_payloads_by_the_names_of_safetensors_and_npz_are_not_executed_either(tmp_path):
    for payload in payloads(tmp_path, tmp_path / "canary").values():
        for suffix in (".npz", ".safetensors"):
            assert_harmless(tmp_path, payload, suffix)


def misused(canary: Path) -> dict[str, Any]:
    """Calls of what stands beside the weights in official files, with what numpy or pathlib would stumble over or, as
    numpy 1 did with bytes of objects, unpickle."""
    evil = pickle.dumps(Payload(canary))
    return {
        "objects": Call(NUMBER, OBJECTS, evil),
        "record": Call(NUMBER, np.dtype([("a", "O"), ("b", "<f8")]), evil * 2),
        "state of a dtype": Call(np.dtype, "O8", False, True, state=(3, "|", None, ("a",), {"a": evil}, -1, -1, 63)),
        "class by state": Call(PosixPath, "a", state=(None, {"__class__": argparse.Namespace, "__setstate__": evil})),
        "odd arguments": Call(PosixPath, 3, None, torch.ones(2), {"a": evil}),
        "many arguments": Call(PosixPath, *range(10_000)),
        "a number's number": Call(NUMBER, Call(NUMBER, OBJECTS, evil), Call(PosixPath)),
    }


@pytest.mark.processes
def test_numbers_of_numpy_and_paths_are_not_made_whatever_they_are_given(tmp_path, empty_after):
    theirs = tiny()
    torch.save(mae(theirs) | {"args": argparse.Namespace(**misused(tmp_path / "canary"))}, tmp_path / "x.pth")
    ours, _ = load_foreign(tmp_path / "x.pth", heads=3)
    images = torch.rand(2, 3, 16, 16)
    assert_computes(ours, images, theirs.forward_features(standardised(images, IMAGENET)))
    assert not (tmp_path / "canary").exists()


def endless(levels: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"x": torch.zeros(1)}
    for _ in range(levels):
        inner = {f"{i}": inner for i in range(20)}
    return inner


HARMFUL: dict[str, tuple[Callable[[], Any], str]] = {
    "many paths": (lambda: endless(5), "more than 20000 tensors"),
    "many entries": (lambda: {"x": torch.zeros(1), **{f"{i}": 0 for i in range(100_000)}}, "more than 100000 entries"),
    "nested": (lambda: endless(9), "entries or is nested deeper"),
    "much of little": (lambda: {"x": torch.zeros(1).expand(1 << 34)}, "more than 34359738368 bytes"),
    "sparse": (lambda: {"x": torch.eye(2).to_sparse()}, "no plain weight"),
    "nothing": (lambda: {"epoch": 3}, "no tensors that names lead to"),
}


@pytest.mark.parametrize("what", HARMFUL)
def test_pickles_of_tensors_can_ask_for_too_much(what):
    make, message = HARMFUL[what]
    with pytest.raises(ValueError, match=message):
        tensors_of(make())


@pytest.mark.processes
def test_and_then_the_sentence_comes_from_the_process_that_reads(tmp_path, empty_after):
    torch.save(endless(5), tmp_path / "x.pth")
    with pytest.raises(DataError, match=r"x\.pth is not a PyTorch file.*more than 20000 tensors"):
        load_foreign(tmp_path / "x.pth")


def test_only_tensors_that_names_lead_to_are_taken():
    x = torch.rand(2)
    found = tensors_of({"model": {"a.b": x}, "optimizer": {"state": {0: {"exp_avg": x}}}, "list": [x], "epoch": 3})
    assert {name: tensor is x for name, tensor in found.items()} == {'["model", "a.b"]': True}


@pytest.mark.processes
def test_truncated_files_are_refused_and_leave_nothing(tmp_path, empty_after):
    state = tiny().state_dict()
    saved(tmp_path / "x.safetensors", state)
    np.savez(tmp_path / "x.npz", **google_vit(24, 3, 17, (4, 4, 3, 24), new=False, cls=True))
    torch.save(state, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.npz", "x.pth"):
        whole = (tmp_path / name).read_bytes()
        for length in (len(whole) // 2,) if name == "x.pth" else (0, 7, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(DataError, match="whole" if length else "is empty"):
                load_foreign(tmp_path / name)


@pytest.mark.processes
def test_time_is_limited(tmp_path, empty_after):
    torch.save(tiny().state_dict(), tmp_path / "x.pth")
    with pytest.raises(DataError, match=r"longer than 0\.01 seconds"):
        read(tmp_path / "x.pth", seconds=0.01)


def test_hostile_headers_of_safetensors_are_refused(tmp_path):
    for raw in hostile_headers(300):
        (tmp_path / "x.safetensors").write_bytes(raw)
        with pytest.raises(DataError):
            load_foreign(tmp_path / "x.safetensors")


def headed(path: Path, header: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


def empty_tensors(count: int, key: str = "data_offsets") -> bytes:
    return (
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"%s":[0,0]}' % (i, key.encode()) for i in range(count)) + b"}"
    )


def test_safetensors_with_long_headers_or_too_many_tensors_are_refused(tmp_path):
    hidden = "data_offset" + r"\u0073"  # the same key to whoever parses it
    headers = {
        "more than the 4,194,304 that are read": [b'{"a":"' + b"x" * 99_000_000 + b'"}', empty_tensors(1_000_000)],
        "names 60,000 tensors, more than the 20,000 that are read": [
            empty_tensors(60_000),
            empty_tensors(60_000, hidden),
        ],
        "whole": [b'{"a":"' + b"x" * 4_000_000 + b'"}', b'{"a":{"dtype":"' + b"x" * 4_000_000 + b'"}}'],
        "holds no ViT": [empty_tensors(19_000)],
    }
    for message, several in headers.items():
        for header in several:
            file, began = headed(tmp_path / "x.safetensors", header), time.process_time()
            with pytest.raises(DataError, match=message) as stopped:
                load_foreign(file)
            assert time.process_time() - began < 2
            assert len(str(stopped.value)) < 2200


def test_no_error_repeats_a_file_at_length_and_each_keeps_its_end(tmp_path):
    long, state = "x" * 50_000, tiny().state_dict()
    cases = {
        "that is known": {long: torch.rand(2)},
        "unexpected": state | {f"blocks.0.{long}": torch.rand(2)},
        "say part= one word that only the wanted one has": with_prefix("a.", state) | with_prefix(f"{long}.", state),
        "not finite": state | {long: torch.full((2,), torch.nan)},
    }
    for said, tensors in cases.items():
        with pytest.raises(ValueError, match=said) as stopped:
            load_foreign(saved(tmp_path / "x.safetensors", tensors), **SAID)
        assert len(str(stopped.value)) < 2200
    saved(tmp_path / "model.safetensors", state)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": long}))
    with pytest.raises(DataError, match="under another name, and say what it needs") as stopped:
        open_backbone(tmp_path)
    assert len(str(stopped.value)) < 2200


def npy(shape: str, data: bytes = b"", dtype: str = "<f4") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (npy("(1000000000, 1000000000)"), "claims shape"),
        (npy("(-4,)", bytes(16)), "claims shape"),
        (npy("(4,)", bytes(12)), "claims shape"),
        (npy("(2,)", bytes(16), dtype="|O"), "not numbers"),
        (npy("(2,)", bytes(4), dtype="|V2"), "not numbers"),
        (npy("(2,)" + " " * 20_000, bytes(8)), "not a whole"),
        (b"no array", "not a whole"),
        (b"", "not a whole"),
    ],
)
def test_an_npz_is_not_believed(tmp_path, entry, message):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("embedding/kernel.npy", entry)
    with pytest.raises(DataError, match=message):
        load_foreign(tmp_path / "x.npz")


def test_an_npz_that_would_unpack_to_more_than_there_is_is_refused_before_it_is(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", npy("(4,)", bytes(16)))
    raw = bytearray((tmp_path / "x.npz").read_bytes())
    directory = raw.rindex(b"PK\x01\x02")
    raw[directory + 24 : directory + 28] = (0xFFFFFFF0).to_bytes(4, "little")  # the size that it claims
    (tmp_path / "x.npz").write_bytes(raw)
    with pytest.raises(DataError, match=r"claim to unpack to 4,294,967,280, .* store it without compression"):
        load_foreign(tmp_path / "x.npz")
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w") as archive:
        for i in range(5):
            archive.writestr(f"{i}.npy", npy("(4,)", bytes(16)))
    raw = bytearray(many.getvalue())
    for match in re.finditer(b"PK\x01\x02", bytes(raw)):
        raw[match.start() + 24 : match.start() + 28] = (0xFFFFFFF0).to_bytes(4, "little")
    (tmp_path / "x.npz").write_bytes(raw)
    with pytest.raises(DataError, match=r"claim to unpack to 21,474,836,400, "):
        load_foreign(tmp_path / "x.npz")


def test_what_is_no_file_of_weights_is_named(tmp_path):
    with pytest.raises(NoInput, match=r"none\.pth"):
        load_foreign(tmp_path / "none.pth")
    with pytest.raises(NoInput, match=r"a folder without model\.safetensors or pytorch_model\.bin"):
        open_backbone(tmp_path)
    (tmp_path / "x.onnx").write_text("onnx")
    with pytest.raises(DataError, match=r"must be one of \.safetensors"):
        load_foreign(tmp_path / "x.onnx")
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(DataError, match="not a regular file"):
        load_foreign(tmp_path / "pipe.pth")
    saved(tmp_path / "model.safetensors", tiny().state_dict())
    for text in ("", "[]", "[" * 100_000, "{" + " " * (1 << 20)):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match=r"config\.json"):
            load_foreign(tmp_path / "model.safetensors")
