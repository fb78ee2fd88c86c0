"""Models with rotary positions or SwiGLU go to timm's and transformers' classes, compute the same there, and return."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from dino_twins import release_of, timm_dinov3
from foreign_models import saved, standardised
from random_models import ABOUT, vit
from torch import nn

from sslvit.models.readout import Classifier
from sslvit.models.vit import ViT
from sslvit.weights.exports.export import export
from sslvit.weights.exports.layouts import mlp_ratio
from sslvit.weights.folder import load_backbone, save_backbone
from sslvit.weights.foreign.open import load_foreign, open_backbone

DINOV3 = {
    "width": 32, "heads": 2, "registers": 4, "layer_scale": 0.5, "position": "rope",
    "position_at": "every_layer_shared", "key_bias": False, "epsilon": 1e-5,
}  # fmt: skip
KINDS = {
    "DINOv3": DINOV3,
    "DINOv3, SwiGLU": DINOV3 | {"swiglu": True, "mlp_width": 44, "rope_rescale": 2.0},
    "DINOv3 without biases, oblong": DINOV3 | {"qkv_bias": False, "image_size": (32, 48)},
    "DINOv3 without scale and registers": DINOV3 | {"layer_scale": None, "registers": 0, "rope_base": 50.0},
    "giant": {"swiglu": True, "layer_scale": 0.5},
    "giant with registers": {"swiglu": True, "layer_scale": 0.5, "registers": 4, "class_position": False},
    "giant without scale": {"swiglu": True},
    "masked keys and a table": {"key_bias": False},
}
SIZES = ((32, 32), (48, 48), (16, 40))


def images_of(size: tuple[int, int]) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(7))


def assert_close(ours: ViT, tokens: torch.Tensor, images: torch.Tensor) -> None:
    encoded = ours(images)
    torch.testing.assert_close(encoded.patches, tokens[:, ours.prefix :], rtol=0, atol=1e-5)
    torch.testing.assert_close(encoded.cls, tokens[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_timm_computes_the_same_at_any_size(kind, tmp_path):
    ours = vit(**KINDS[kind])
    said = export(ours, ABOUT | {"readout": "cls"}, tmp_path / "out", "timm")
    assert "computes the same" in said
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, dynamic_img_size=True).eval()
    rotary = ours.position == "rope"
    for size in SIZES if rotary else SIZES[:1]:
        images = images_of(size if size != (32, 32) else tuple(ours.image_size))
        assert_close(ours, peer.forward_features(ours.standardise(images)), images)
    again, about = open_backbone(tmp_path / "out")
    assert torch.equal(again(images).patches, ours(images).patches)
    assert about["readout"] == "cls"
    assert replace(again.config, rope_rescale=1.0).swiglu == ours.config.swiglu


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_transformers_computes_the_same_at_any_size(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = vit(**KINDS[kind])
    export(ours, ABOUT, tmp_path / "out", "transformers")
    peer, loading = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["unexpected_keys"]
    assert not [n for n in loading["missing_keys"] if not n.startswith("pooler.")]
    for size in SIZES if ours.position == "rope" else SIZES[:1]:
        images = images_of(size if size != (32, 32) else tuple(ours.image_size))
        assert_close(ours, peer.eval()(pixel_values=ours.standardise(images)).last_hidden_state, images)
    again, about = open_backbone(tmp_path / "out")
    torch.testing.assert_close(again(images).patches, ours(images).patches, rtol=0, atol=1e-6)
    assert about["readout"] == ABOUT["readout"]
    if ours.position == "rope":
        assert again.config.rope_rescale == ours.config.rope_rescale
        assert again.config.rope_base == ours.config.rope_base


CLIP = {"stem_norm": True, "epsilon": 1e-5, "gelu": "sigmoid"}
TOWERS = {
    "CLIP": CLIP,
    "exact GELU, mean and standard deviation": CLIP | {"gelu": "exact", "mean": (0.1, 0.2, 0.3)},
    "scale, masked keys, fixed positions": CLIP | {"layer_scale": 0.5, "key_bias": False, "position": "sincos_mae"},
}


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_a_tower_of_clip_goes_to_timm_and_back_with_its_bias_of_patches(kind, tmp_path):
    ours = vit(**TOWERS[kind])
    assert ours.patch_embed.proj.bias.abs().max() > 0.1
    said = export(ours, ABOUT | {"readout": "cls"}, tmp_path / "out", "timm")
    assert "is in the layout of timm's CLIP" in said
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = images_of((32, 32))
    assert_close(ours, peer.forward_features(ours.standardise(images)), images)
    again, about = open_backbone(tmp_path / "out")
    torch.testing.assert_close(again(images).patches, ours(images).patches, rtol=0, atol=1e-5)
    assert (again.config.gelu, again.config.stem_norm, about["readout"]) == (ours.config.gelu, True, "cls")
    assert again.config.mean == pytest.approx(ours.config.mean)


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_a_tower_of_clip_goes_to_transformers_and_back(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = vit(**TOWERS[kind])
    said = export(ours, ABOUT, tmp_path / "out", "transformers")
    assert "clip_vision_model" in said
    peer, loading = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = images_of((32, 32))
    cls = peer.eval()(pixel_values=ours.standardise(images)).pooler_output
    torch.testing.assert_close(ours(images).cls, cls, rtol=0, atol=1e-5)
    again, about = open_backbone(tmp_path / "out")
    torch.testing.assert_close(again(images).patches, ours(images).patches, rtol=0, atol=1e-5)
    assert about["readout"] == ABOUT["readout"]


@torch.no_grad()
def test_a_classifier_of_a_tower_goes_to_timm_with_its_head(tmp_path):
    for readout in ("cls", "mean"):
        model = Classifier(vit(**CLIP), readout=readout, classes=5).eval()
        nn.init.normal_(model.head.weight)
        export(model, ABOUT | {"readout": readout}, tmp_path / readout, "timm")
        peer = timm.create_model(f"local-dir:{tmp_path / readout}", pretrained=True).eval()
        images = images_of((32, 32))
        torch.testing.assert_close(peer(model.backbone.standardise(images)), model(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("to", "changes", "reason"),
    [
        ("timm", {"epsilon": 1e-6}, "timm's CLIP has no other epsilon"),
        ("timm", {"registers": 2}, "registers"),
        ("transformers", {"class_token": False}, "models without a class token"),
        ("transformers", {"image_size": (32, 48)}, "oblong images"),
        ("torchvision", {}, "norm before the blocks"),
    ],
)
def test_what_their_clip_lacks_is_refused_by_name(to, changes, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export(vit(**CLIP | changes), ABOUT, tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_a_release_goes_to_both_libraries_only_with_exact_periods(tmp_path):
    theirs = timm_dinov3()
    state = release_of(theirs)
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16()
    file = saved(tmp_path / "x.safetensors", state)
    rounded, about = load_foreign(file, heads=2)
    for to in ("timm", "transformers"):
        with pytest.raises(ValueError, match=r"no rounded periods \(open the release with periods=exact\)"):
            export(rounded, about, tmp_path / to, to)
        exact, about = load_foreign(file, heads=2, periods="exact")
        export(exact, about, tmp_path / to, to)
        assert not list(tmp_path.glob("*.partial"))
    images = images_of((16, 16))
    assert_close(
        open_backbone(tmp_path / "timm")[0],
        theirs.forward_features(standardised(images, {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})),
        images,
    )


@torch.no_grad()
def test_a_classifier_of_a_rotary_model_goes_to_timm_with_its_head(tmp_path):
    for readout in ("cls", "mean"):
        model = Classifier(vit(**DINOV3), readout=readout, classes=5).eval()
        nn.init.normal_(model.head.weight)
        export(model, ABOUT | {"readout": readout}, tmp_path / readout, "timm")
        peer = timm.create_model(f"local-dir:{tmp_path / readout}", pretrained=True).eval()
        images = images_of((32, 32))
        expected = model(images)
        torch.testing.assert_close(peer(model.backbone.standardise(images)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["DINOv3", "DINOv3, SwiGLU", "giant with registers"])
@torch.no_grad()
def test_a_model_folder_keeps_it_and_says_how_timm_would_open_it(kind, tmp_path):
    ours = vit(**KINDS[kind])
    save_backbone(ours, tmp_path / "model", ABOUT)
    again = load_backbone(tmp_path / "model")
    assert again.config == ours.config
    assert torch.equal(again(images_of((32, 32))).patches, ours(images_of((32, 32))).patches)
    architecture = json.loads((tmp_path / "model" / "config.json").read_text())["architecture"]
    assert architecture == (
        "vit_giant_patch14_dinov2"
        if "giant" in kind
        else "sslvit only (timm's DINOv3 has other names: sslvit convert --to timm writes them)"
    )


@pytest.mark.parametrize("to", [pytest.param(to, marks=pytest.mark.slow) for to in ("torch_export", "onnx")])
@torch.no_grad()
def test_a_rotary_model_becomes_a_program_for_any_size(to, tmp_path):
    said = export(vit(**KINDS["DINOv3, SwiGLU"]), ABOUT, tmp_path / "out", to, any_size=True)
    assert "the same" in said


REFUSED = [
    ("timm", {"epsilon": 1e-6}, "epsilon of norms other than 1e-05"),
    ("timm", {"key_bias": True}, "bias of keys"),
    ("timm", {"class_norm": True}, "class token with a norm of its own"),
    ("transformers", {"class_token": False}, "models without a class token"),
    ("transformers", {"rope_periods": (1.0, 3.0, 10.0, 32.0)}, "rounded periods"),
    ("torchvision", {}, "rotary positions"),
]


@pytest.mark.parametrize(("to", "changes", "reason"), REFUSED)
def test_what_their_dinov3_lacks_is_refused_by_name(to, changes, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export(vit(**DINOV3 | changes), ABOUT, tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("width", "mlp_width", "ratio"), [(1536, 4096, 4), (24, 64, 4), (32, 44, None), (384, 1536, 6)]
)
def test_whole_ratios_of_swiglu_are_found_or_not(width, mlp_width, ratio):
    with torch.device("meta"):
        config = {"image_size": 8, "patch_size": 8, "width": width, "depth": 1, "heads": 2}
        assert mlp_ratio(ViT(ViT.Config(**config, swiglu=True, mlp_width=mlp_width))) == ratio
