"""What is exported computes the same where it is opened: in transformers, torchvision, onnxruntime and torch.export."""

import copy
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import preloaded
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from random_models import ABOUT, vit
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer
from transformers import AutoImageProcessor, AutoModel

from sslvit.__main__ import main
from sslvit.cli import run_cli
from sslvit.errors import CannotWrite, DataError, NoInput
from sslvit.models.readout import Classifier, read
from sslvit.models.resnet import BiT, BiTConfig
from sslvit.models.vit import ViT
from sslvit.storage import checkpoint, sealed
from sslvit.training.optim import parameter_groups
from sslvit.weights.exports import layouts
from sslvit.weights.exports.checks import compare
from sslvit.weights.exports.export import FORMATS, export
from sslvit.weights.exports.layouts import plain
from sslvit.weights.folder import load_backbone, load_classifier, save_backbone, write_model
from sslvit.weights.foreign.open import load_foreign, open_backbone
from sslvit.weights.hub import load_model, push_to_hub
from sslvit.weights.info import Convert, about, convert

ROOT = Path(__file__).parents[2]


KINDS = {
    "plain": {},
    "S/16 in small": {"patch_size": 16, "width": 48, "depth": 3, "heads": 6, "image_size": 64},
    "registers": {"registers": 4, "layer_scale": 0.1},
    "registers without scale": {"registers": 2, "gelu": "tanh"},
    "layer scale, tanh, no bias": {"layer_scale": 0.3, "gelu": "tanh", "qkv_bias": False},
    "oblong": {"image_size": (32, 48)},
    "learned_2d": {"position": "learned_2d"},
    "sincos": {"position": "sincos_mae"},
    "no positions": {"position": "none"},
    "a class token without position": {"class_position": False},
    "other epsilon and constants": {"epsilon": 1e-12, "mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.1)},
    "one channel": {"channels": 1},
}
PROGRAMS = KINDS | {
    "no class token": {"class_token": False},
    "hybrid": {"hybrid": "R", "patch_size": 8},
    "positions at every layer": {"position_at": "every_layer"},
}


def images_of(backbone: ViT, count: int = 3, size: tuple[int, int] | None = None) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.rand(count, backbone.channels, *(size or backbone.image_size), generator=draw)


def close(mine: torch.Tensor, theirs: torch.Tensor, limit: float = 1e-5) -> bool:
    return bool((mine - theirs).abs().max() <= limit * mine.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_transformers_computes_the_same_from_its_own_layout_its_processor_included(kind, tmp_path):
    backbone = vit(**KINDS[kind])
    export(backbone, ABOUT, tmp_path / "out", "transformers")
    peer, loading = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not [n for n in loading["missing_keys"] if not n.startswith("pooler.")]
    assert not loading["unexpected_keys"]
    pixels = (images_of(backbone) * 255).round().to(torch.uint8)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    encoded = backbone(pixels / 255)
    if backbone.channels == 3:
        given = processor(list(pixels.permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
    else:
        given = backbone.standardise(pixels / 255)
    tokens = peer.eval()(pixel_values=given).last_hidden_state
    assert close(encoded.cls, tokens[:, 0])
    assert close(encoded.patches, tokens[:, backbone.prefix :])
    again, said = load_foreign(tmp_path / "out")
    assert said["layout"] == "transformers"
    assert close(encoded.patches, again(pixels / 255).patches)


@pytest.mark.parametrize("kind", ["plain", "S/16 in small", "learned_2d", "sincos", "no positions"])
@torch.no_grad()
def test_torchvision_computes_the_same_from_its_own_layout(kind, tmp_path):
    backbone = vit(**KINDS[kind])
    export(backbone, ABOUT, tmp_path / "out", "torchvision")
    described = json.loads((tmp_path / "out" / "torchvision.json").read_text())
    peer = VisionTransformer(**described["VisionTransformer"])
    peer.heads = nn.Identity()
    peer.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    images = images_of(backbone)
    mean, std = (torch.tensor(described[name])[:, None, None] for name in ("mean", "std"))
    assert close(backbone(images).cls, peer.eval()((images - mean) / std))


OFTEN = [("no class token", "torch_export"), ("registers", "onnx")]
RARELY = [(kind, to) for kind in PROGRAMS for to in ("torch_export", "onnx") if (kind, to) not in OFTEN]


@pytest.mark.parametrize(("kind", "to"), [*OFTEN, *(pytest.param(*one, marks=pytest.mark.slow) for one in RARELY)])
@torch.no_grad()
def test_a_program_computes_the_same_for_any_batch(kind, to, tmp_path):
    backbone = vit(**PROGRAMS[kind])
    export(backbone, ABOUT, tmp_path / "out", to)
    for count in (1, 2, 7):
        images = images_of(backbone, count)
        features, patches = program(tmp_path / "out", to)(images)
        encoded = backbone(images)
        assert close(read(encoded, "mean"), features, 1e-4 if to == "onnx" else 1e-5)
        assert close(encoded.patches, patches, 1e-4 if to == "onnx" else 1e-5)
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    assert (described["outputs"], described["readout"]) == (["features", "patches"], "mean")


def program(folder: Path, to: str):
    if to == "torch_export":
        return torch.export.load(folder / "model.pt2").module()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    return lambda images: [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]


@pytest.mark.parametrize("to", [pytest.param("torch_export", marks=pytest.mark.slow), "onnx"])
@torch.no_grad()
def test_a_program_for_any_size_resizes_positions_as_the_backbone_does(to, tmp_path):
    backbone = vit()
    export(backbone, ABOUT, tmp_path / "out", to, any_size=True)
    run = program(tmp_path / "out", to)
    for size in ((32, 32), (64, 32), (24, 56), (128, 96)):
        images = images_of(backbone, 2, size)
        assert close(read(backbone(images), "mean"), run(images)[0], 1e-4 if to == "onnx" else 1e-5), size


@pytest.mark.slow
@pytest.mark.parametrize("to", ["transformers", "torchvision", "torch_export", "onnx"])
@pytest.mark.parametrize("size", [224, 288])
def test_s_16_is_exported_at_its_own_and_at_another_size(to, size, tmp_path):
    save_backbone(ViT.variant("S/16", image_size=224), tmp_path / "model", ABOUT)
    said = convert(Convert(tmp_path / "model", tmp_path / "out", to=to, image_size=size * (size != 224)))
    print(said)


@torch.no_grad()
def test_a_size_to_resize_to_may_be_height_and_width(tmp_path):
    save_backbone(vit(), tmp_path / "model", ABOUT)
    convert(Convert(tmp_path / "model", tmp_path / "out", image_size=(16, 40)))
    images = torch.rand(2, 3, 16, 40)
    assert load_backbone(tmp_path / "out").image_size == (16, 40)
    torch.testing.assert_close(load_backbone(tmp_path / "out")(images), load_backbone(tmp_path / "model")(images))
    with pytest.raises(ValueError, match="--image_size 0 40: it must be from 1 to"):
        convert(Convert(tmp_path / "model", tmp_path / "bad", image_size=(0, 40)))


@torch.no_grad()
def test_a_classifier_becomes_a_program_of_scores(tmp_path):
    model = Classifier(vit(), readout="cls", classes=5).eval()
    nn.init.normal_(model.head.weight)
    head = {name: value for name, value in model.state_dict().items() if name.startswith("head.")}
    save_backbone(model.backbone, tmp_path / "model", ABOUT | {"readout": "cls", "classes": list("abcde")}, head=head)
    convert(Convert(tmp_path / "model", tmp_path / "out", to="onnx", head=True))
    images = images_of(model.backbone)
    assert close(model(images), program(tmp_path / "out", "onnx")(images)[0], 1e-4)


REFUSED = [
    ("transformers", {"class_token": False}, "models without a class token"),
    ("transformers", {"hybrid": "R"}, "hybrid stems"),
    ("transformers", {"position_at": "every_layer"}, "positions in the blocks"),
    ("transformers", {"final_norm": False}, "models without a final norm"),
    ("transformers", {"registers": 1, "mlp_width": 100}, "MLP beside registers that is no multiple"),
    ("torchvision", {"registers": 1}, "registers"),
    ("torchvision", {"gelu": "tanh"}, "GELU by tanh"),
    ("torchvision", {"image_size": (32, 48)}, "oblong images"),
    ("torchvision", {"channels": 1}, "images of other than three channels"),
    ("torchvision", {"epsilon": 1e-12}, "other epsilon"),
]


@pytest.mark.parametrize(("to", "changes", "reason"), REFUSED)
def test_features_that_a_layout_lacks_are_refused_and_nothing_is_written(to, changes, reason, tmp_path):
    with pytest.raises(ValueError, match=f"{to} has no {reason}"):
        export(vit(**changes), ABOUT, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_read_back_with_other_outputs_is_not_written(tmp_path, monkeypatch):
    def spoilt(backbone, **options):
        weights = plain(backbone, **options)
        return weights | {"norm.bias": weights["norm.bias"] + 0.1}

    monkeypatch.setattr("sslvit.weights.exports.layouts.plain", spoilt)
    for to in ("torchvision", "transformers"):
        with pytest.raises(DataError, match=r"differs by .* of the largest output: not written"):
            export(vit(), ABOUT, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


def scaled(model: nn.Module, by: float) -> nn.Module:
    """All that it gives out larger by this share: its last layer is an affine norm."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        norm = getattr(model, "model", model).norm
        norm.weight *= 1 + by
        norm.bias *= 1 + by
    return model


def planted(monkeypatch, to: str, by: float) -> str:
    """What is written, or opened, is this much off; returns the layout."""
    real, create = (torch.onnx if to == "onnx" else torch.export).export, timm.create_model

    def of_weights(backbone: ViT, **options):
        return plain(scaled(backbone, by), **options)

    if to in ("transformers", "torchvision"):
        monkeypatch.setattr(layouts, "plain", of_weights)
    elif to == "timm":
        monkeypatch.setattr(layouts, "write_model", lambda backbone, *rest: write_model(scaled(backbone, by), *rest))
    elif to == "timm, in timm alone":
        monkeypatch.setattr(timm, "create_model", lambda *given, **options: scaled(create(*given, **options), by))
    else:
        where = torch.onnx if to == "onnx" else torch.export
        monkeypatch.setattr(
            where, "export", lambda reading, *rest, **options: real(scaled(reading, by), *rest, **options)
        )
    return to.partition(",")[0]


# Of the largest output: what the README promises, and not what the code says.
PROMISED = dict.fromkeys(("timm", "timm, in timm alone", "transformers", "torchvision", "torch_export"), 1e-5)
PROMISED |= {"onnx": 1e-4}


@pytest.mark.parametrize("to", PROMISED)
def test_an_export_is_written_only_if_it_differs_by_less_than_is_promised(to, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(DataError, match="differs by") as stopped:
        export(vit(), ABOUT, tmp_path / "more", planted(patched, to, 1.5 * PROMISED[to]))
    found = float(re.search(r"by (\S+) of", str(stopped.value))[1])
    assert found == pytest.approx(1.5 * PROMISED[to], rel=0.25)
    with monkeypatch.context() as patched:
        export(vit(), ABOUT, tmp_path / "less", planted(patched, to, 0.5 * PROMISED[to]))
    assert [path.name for path in tmp_path.iterdir()] == ["less"]


def test_nothing_is_overwritten_and_other_mistakes_are_sentences(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "letter.txt").write_text("dear")
    with pytest.raises(CannotWrite, match="there exists: choose another place"):
        export(vit(), ABOUT, tmp_path / "there", "transformers")
    with pytest.raises(
        ValueError, match="--to must be one of timm, transformers, torchvision, onnx, torch_export, got pickle"
    ):
        export(vit(), ABOUT, tmp_path / "out", "pickle")
    with pytest.raises(ValueError, match="--any_size is for onnx and torch_export"):
        export(vit(), ABOUT, tmp_path / "out", "transformers", any_size=True)
    with pytest.raises(ValueError, match="no such ResNets"):
        export(
            BiT(BiTConfig(blocks=(1, 1), width_factor=0.5, root="3x3", image_size=32)),
            ABOUT,
            tmp_path / "out",
            "torchvision",
        )
    with pytest.raises(DataError, match="not written"):
        compare((torch.ones(2),), (torch.full((2,), torch.nan),), 1e-5, "it")
    assert set(FORMATS) == {"timm", "transformers", "torchvision", "onnx", "torch_export"}


def test_a_foreign_checkpoint_becomes_a_model_folder_at_another_size(tmp_path):
    backbone = vit(image_size=32)
    export(backbone, ABOUT, tmp_path / "theirs", "transformers")
    said = convert(Convert(tmp_path / "theirs", tmp_path / "ours", to="timm", readout="mean", image_size=64))
    assert "timm.create_model('local-dir:" in said
    again = load_model(tmp_path / "ours")
    images = images_of(backbone, size=(64, 64))
    assert again.image_size == (64, 64)
    with torch.no_grad():  # transformers' rule of positions came along
        other = ViT(replace(backbone.config, position_resize="bicubic_plain")).eval()
        other.load_state_dict(backbone.state_dict())
        assert close(other(images).patches, again(images).patches)
    text = about(tmp_path / "ours")
    assert "readout     mean, of cls, mean, both" in text
    assert "ViT of width 32, depth 2, heads 4, patches of 8, 0.0 million parameters" in text


@torch.no_grad()
def test_a_model_folder_is_read_back_by_timm_or_says_that_timm_would_not(tmp_path):
    said = export(vit(), ABOUT, tmp_path / "a", "timm")
    assert re.search(r"pretrained=True\) computes the same to \de-\d\d\.$", said)
    said = export(vit(epsilon=1e-12), ABOUT, tmp_path / "b", "timm")
    assert "that sslvit opens. timm would not: sslvit only (timm's configuration has no epsilon" in said
    said = export(vit(position_resize="bicubic_offset"), ABOUT, tmp_path / "c", "timm")
    assert "At other image sizes timm resizes positions its own way, this model bicubic_offset" in said
    bit = BiT(BiTConfig(blocks=(1, 1), width_factor=0.5, root="3x3", image_size=32)).eval()
    assert "timm would not" in export(bit, ABOUT, tmp_path / "d", "timm")
    export(bit, ABOUT, tmp_path / "e", "torch_export")
    assert "any multiple" not in about(tmp_path / "e")
    assert "layout      a program" in about(tmp_path / "e" / "model.pt2")


@torch.no_grad()
def test_a_head_goes_along_into_a_model_folder_and_is_said_to_stay_elsewhere(tmp_path):
    classifier = Classifier(vit(), readout="mean", classes=3)
    nn.init.normal_(classifier.head.weight)
    head = {name: t for name, t in classifier.state_dict().items() if name.startswith("head.")}
    save_backbone(classifier.backbone, tmp_path / "tuned", ABOUT | {"classes": ["a", "b", "c"]}, head=head)
    said = convert(Convert(tmp_path / "tuned", tmp_path / "larger", to="timm", image_size=48))
    assert "Its head" not in said
    images = images_of(classifier.backbone, size=(48, 48))
    assert close(classifier.eval()(images), load_classifier(tmp_path / "larger")(images))
    assert timm.create_model(f"local-dir:{tmp_path}/larger", pretrained=True).head.weight.equal(head["head.weight"])
    for number, to in enumerate(("transformers", "torch_export")):
        said = convert(Convert(tmp_path / "tuned", tmp_path / f"{number}", to=to))
        assert said.endswith("Its head of classes stays behind.")
    with pytest.raises(ValueError, match="--head: its classes are read from mean"):
        convert(Convert(tmp_path / "tuned", tmp_path / "x", to="torch_export", readout="cls", head=True))


def test_the_readout_comes_back_from_the_layouts_of_others(tmp_path):
    for to in ("transformers", "torchvision"):
        export(vit(mean=(0.4, 0.5, 0.6)), ABOUT, tmp_path / to, to)
        again, said = open_backbone(tmp_path / to)
        assert said["readout"] == "mean"
        assert again.config.mean == (0.4, 0.5, 0.6)


def test_no_folder_is_written_over_however_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("words")
    with pytest.raises(CannotWrite, match="thesis exists: choose another place"):
        export(vit(), ABOUT, tmp_path / "new" / ".." / "thesis", "transformers")

    def late(*given):
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "chapter").write_text("words")
        return "written"

    monkeypatch.setitem(FORMATS, "transformers", late)
    with pytest.raises(CannotWrite, match="late: the export was not written: Directory not empty"):
        export(vit(), ABOUT, tmp_path / "late", "transformers")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["chapter", "chapter", "late", "thesis"]
    with pytest.raises(CannotWrite, match="File name too long"):
        export(vit(), ABOUT, tmp_path / ("x" * 300), "transformers")


@pytest.mark.parametrize("to", ["timm", "torch_export"])
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, to):
    def full(path, pieces):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sslvit.storage.durable.write", full)
    with pytest.raises(CannotWrite, match="out: the export was not written: No space left on device"):
        export(vit(), ABOUT, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


def test_damaged_folders_of_ours_are_told_in_a_sentence(tmp_path):
    save_backbone(vit(), tmp_path / "run" / "model", ABOUT)
    (tmp_path / "run" / "cost.json").write_text("{}")
    assert "run         its cost.json or metrics.jsonl is damaged: ValueError: it has no 'images'" in about(
        tmp_path / "run"
    )
    config = sealed.read(tmp_path / "run/model/config.json")
    for wrong in ({"readout": "most"}, {"config": config["sslvit"]["config"] | {"heads": 0}}, {"readout": None}):
        changed = config | {"sslvit": config["sslvit"] | wrong}
        (tmp_path / "run/model/config.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match="is not a model as sslvit writes it"):
            about(tmp_path / "run")


@torch.no_grad()
def test_a_backbone_has_the_names_that_other_code_asks_for():
    backbone, peer = (
        vit(registers=2),
        timm.models.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, reg_tokens=2, num_classes=0
        ),
    )
    peer.load_state_dict(backbone.state_dict())
    images = images_of(backbone)
    tokens = peer.eval().forward_features(backbone.standardise(images))
    assert close(tokens, backbone.forward_features(images))
    assert backbone.no_weight_decay() == {"cls_token", "reg_token", "pos_embed"}
    groups = parameter_groups(backbone, 0.05, layer_decay=0.5)
    assert sorted({group["scale"] for group in groups}) == [0.125, 0.25, 0.5, 1.0]
    assert sum(len(group["params"]) for group in groups) == len([*backbone.parameters()])


@torch.no_grad()
def test_the_hubs_cache_of_links_is_read(tmp_path, monkeypatch):
    save_backbone(vit(), tmp_path / "model", {"readout": "cls"})
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for file in (tmp_path / "model").iterdir():
        (blobs / f"{file.name}-hash").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}-hash")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *given, **options: str(snapshot))
    images = images_of(vit())
    assert torch.equal(load_model("somebody/something")(images).cls, vit()(images).cls)
    assert "layout      sslvit" in about(snapshot)
    assert "layout      sslvit" in about(tmp_path / "model" / "model.safetensors")


@pytest.mark.processes
def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch, tmp_path):
    program = (
        "from sslvit.cli import run_cli; from sslvit.weights.hub import push_to_hub\n"
        "run_cli(lambda: push_to_hub('model', 'nobody/nothing'))"
    )
    save_backbone(vit(), tmp_path / "model", {"readout": "cls"})
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_none", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 66
    assert done.stderr.startswith("error: nobody/nothing cannot be written on the Hub (")
    assert "Traceback" not in done.stderr


def test_offline_the_hub_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NoInput, match=r"nobody/nothing is no folder here and was not downloaded .* Offline, give"):
        load_model("nobody/nothing")
    with pytest.raises(NoInput, match="is neither a folder here nor OWNER/NAME"):
        load_model("./nothing")
    save_backbone(vit(), tmp_path / "model", {"readout": "cls"})
    with pytest.raises(NoInput, match="nobody/nothing cannot be written on the Hub"):
        push_to_hub(tmp_path / "model", "nobody/nothing")


@torch.no_grad()
def test_the_feature_map_has_the_patches_where_they_lie():
    backbone = vit(image_size=(32, 48))
    images = images_of(backbone)
    maps, patches = backbone.feature_map(images), backbone(images).patches
    assert maps.shape == (3, 32, 4, 6)
    assert torch.equal(maps[:, :, 2, 5], patches[:, 2 * 6 + 5])


def test_freezing_leaves_the_last_blocks_to_train():
    def trained(model: ViT) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained(vit().freeze()) == set()
    assert trained(vit().freeze(0)) == set()
    assert {name.rsplit(".", 1)[0].split(".")[0] for name in trained(vit().freeze(1))} == {"blocks", "norm"}
    assert all(name.startswith(("blocks.1.", "norm.")) for name in trained(vit().freeze(1)))
    assert trained(vit().freeze().freeze(1)) == trained(vit().freeze(1))
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=f"the last {wrong} blocks of 2"):
            vit().freeze(wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root, draw = tmp_path_factory.mktemp("examples"), np.random.default_rng(0)
    for number in range(24):
        (root / "set" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 128, (32, 32, 3), np.uint8) + 100 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(root / "set" / "ab"[number % 2] / f"{number:02d}.png")
    save_backbone(vit(depth=4), root / "model", ABOUT)
    return root


@pytest.mark.processes
@pytest.mark.parametrize(
    ("example", "words", "said"),
    [
        ("features", "model set out.parquet", "24 of 24 images, readout mean, in out.parquet"),
        ("classifier", "model set", "2 classes, the last loss is 0."),
        ("pyramid", "model", "level 0: (2, 32, 32, 32)"),
        pytest.param("retrieval", "model set 3", "set/a/06.png", marks=pytest.mark.slow),
    ],
)
def test_each_example_runs_and_is_short(example, words, said, folder):
    script = ROOT / "recipes" / "examples" / f"{example}.py"
    code = [line for line in script.read_text().splitlines() if line and not line.startswith(('"', "import", "from"))]
    assert len(code) <= 20
    done = preloaded.run([sys.executable, script, *words.split()], cwd=folder, text=True)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def example(name: str, *words: str, cwd: Path) -> subprocess.CompletedProcess:
    script = ROOT / "recipes" / "examples" / f"{name}.py"
    return preloaded.run([sys.executable, script, *words], cwd=cwd, text=True)


@pytest.mark.processes
def test_features_of_a_folder_count_and_name_each_image_that_cannot_be_read(folder, tmp_path):
    shutil.copytree(folder / "set", tmp_path / "set")
    (tmp_path / "set/a/zero.png").write_bytes(b"")
    (tmp_path / "set/b/text.jpg").write_text("no image")
    said = example("features", str(folder / "model"), "set", "out.parquet", cwd=tmp_path).stdout.splitlines()
    assert said[0] == "24 of 26 images, readout mean, in out.parquet"
    assert [line.split("/set/")[1] for line in said[1:]] == [
        "a/zero.png: empty file",
        "b/text.jpg: not JPEG, PNG, WebP, BMP, GIF or TIFF: begins with b'no image'",
    ]
    assert len(pq.read_table(tmp_path / "out.parquet")) == 24


@pytest.mark.processes
def test_retrieval_finds_a_picture_of_ones_own_that_is_in_the_folder_first(folder, tmp_path):
    shutil.copy(folder / "set/b/07.png", tmp_path / "mine.png")
    done = example("retrieval", "model", "set", str(tmp_path / "mine.png"), cwd=folder)
    assert done.stdout.splitlines()[0] == f"1.000 {folder}/set/b/07.png"
    done = example("retrieval", "model", "set", "nowhere.png", cwd=folder)
    assert done.returncode == 78
    assert "nowhere.png is neither a file nor the number of an image, 0 to 23" in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize(("words", "code"), [pytest.param("", 78, marks=pytest.mark.slow), ("nowhere", 66)])
def test_an_example_given_wrong_words_says_so_in_a_line(words, code, folder):
    command = [sys.executable, ROOT / "recipes" / "examples" / "pyramid.py", *words.split()]
    done = preloaded.run(command, cwd=folder, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.processes
def test_the_command_line_converts_and_tells(folder, tmp_path):
    def said(words: str) -> subprocess.CompletedProcess:
        return preloaded.run([sys.executable, "-m", "sslvit", *words.split()], cwd=folder, text=True)

    done = said(f"convert model {tmp_path}/out --to torchvision --readout cls")
    assert done.returncode == 0, done.stderr
    assert "in torchvision's layout" in done.stdout
    told = said("info model")
    assert "objective   MPP" in told.stdout
    for unbuffered in ("", "1"):  # what reads has gone before anything is written
        read, write = os.pipe()
        os.close(read)
        env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        command = [sys.executable, "-m", "sslvit", "info", "model"]
        gone = subprocess.run(command, cwd=folder, stdout=write, stderr=subprocess.PIPE, env=env, timeout=120)
        os.close(write)
        assert (gone.returncode, gone.stderr) == (128 + signal.SIGPIPE, b"")


def test_info_reports_known_facts_of_a_file_that_cannot_be_opened_yet(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=7)
    save_file(theirs.state_dict(), tmp_path / "x.safetensors")
    told = about(tmp_path / "x.safetensors")
    count = sum(p.numel() for name, p in theirs.named_parameters() if not name.startswith("head."))
    for line in (
        "layout      timm",
        f"variant     width 192, depth 2, {count / 1e6:.1f} million parameters",
        "images      3 channels, in patches of 16 x 16 px",
        "positions   a table of 5 rows",
        "left behind ['head (2)']",
        "not known   heads, gelu, mean, std",
    ):
        assert line in told.splitlines()
    said = about(tmp_path / "x.safetensors", ("heads=3", "gelu=exact", "mean=.5,.5,.5", "std=.5,.5,.5"))
    assert "its classifier (head.bias) is left out" in said
    with pytest.raises(DataError, match="holds a classifier"):  # to be opened it must be meant
        open_backbone(tmp_path / "x.safetensors", heads=3, gelu="exact", mean=(0.5,) * 3, std=(0.5,) * 3)


def test_info_describes_a_checkpoint(tmp_path, monkeypatch):
    state = {"progress": {"step": 1200, "seconds": 90.0}, "config": {"model": "Ti/16", "data": "folder:x", "start": ""}}
    made = checkpoint.save(tmp_path / "run" / "checkpoints", 1200, {"objective.a": torch.zeros(1000)}, state)
    for path in (made, made / "tensors.safetensors"):
        told = about(path)
        assert "steps       1,200, after 2 min" in told
        assert "variant     Ti/16" in told
        assert "the model   not written yet; until then it is " in told
    (tmp_path / "run" / "model").mkdir()
    monkeypatch.chdir(made)
    for path in (".", "tensors.safetensors", f"../{made.name}"):
        assert f"the model   {tmp_path / 'run' / 'model'}" in about(Path(path))
    for damaged in ("{}", '{"progress": {"step": 1, "seconds": 1}, "config": []}'):
        (made / "state.json").write_text(damaged)
        with pytest.raises(DataError, match="is no whole checkpoint"):
            about(made)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("info nowhere", 66),
        ("convert model there --to torchvision", 73),
        ("convert model", 78),
        ("convert model x --to y", 78),
    ],
)
def test_a_mistaken_command_line_is_one_sentence(folder, words, code, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "there").mkdir(exist_ok=True)
    (folder / "there" / "letter.txt").write_text("dear")
    monkeypatch.setattr(sys, "argv", ["sslvit", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        run_cli(main)
    assert stopped.value.code == code
