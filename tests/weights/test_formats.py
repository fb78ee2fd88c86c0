"""Models of full size into and out of each library, at the size they have and at another: the README's table.

The libraries make the weights, all of them at random, and open what is exported; each is asked for its own answer at
the other size. Smaller models in more variants are in test_weights.py and test_exports.py.
"""

import json
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from foreign_models import assert_computes, saved, scramble, standardised
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings
from transformers import AutoModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTConfig, ViTModel

from sslvit.models.readout import read
from sslvit.models.vit import ViT
from sslvit.weights.exports.export import export
from sslvit.weights.foreign.open import open_backbone

SIZE, OTHER = 224, 448  # multiples of 14, 16 and 32
TIMM = {
    "S/16": ("vit_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "no class token": ("vit_small_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {}),
}
S_16 = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": SIZE}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
LACKS = {
    ("transformers", "no class token"): "models without a class token",
    ("transformers", "hybrid"): "hybrid stems",
    ("torchvision", "registers"): "registers",
    ("torchvision", "no class token"): "models without a class token",
    ("torchvision", "hybrid"): "hybrid stems",
}


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def of_timm(kind: str, folder: Path) -> Callable[[Tensor], Tensor]:
    """Writes a model of timm's, and returns what gives its tokens."""
    name, changes = TIMM[kind]
    theirs = scramble(timm.create_model(name, img_size=SIZE, num_classes=0, **changes), 0.03)
    save_for_hf(theirs, folder, model_args=changes, safe_serialization=True)
    constants = json.loads((folder / "config.json").read_text())["pretrained_cfg"]

    def tokens(images: Tensor) -> Tensor:
        theirs.to(images.dtype).set_input_size(tuple(images.shape[2:]))
        return theirs.forward_features(standardised(images, constants).to(images.dtype))

    return tokens


def of_torchvision(kind: str, folder: Path) -> Callable[[Tensor], Tensor]:
    sizes = {"patch_size": 16, "num_layers": 12, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536}
    theirs = scramble(VisionTransformer(image_size=SIZE, **sizes))
    theirs.heads = nn.Identity()
    folder.mkdir()
    saved(folder / "model.safetensors", theirs.state_dict())
    described = {"VisionTransformer": sizes | {"image_size": SIZE}} | HALF
    (folder / "torchvision.json").write_text(json.dumps(described))

    def tokens(images: Tensor) -> Tensor:
        side = images.shape[-1]
        peer = VisionTransformer(image_size=side, **sizes).eval()
        peer.heads = nn.Identity()
        peer.load_state_dict(interpolate_embeddings(side, 16, theirs.state_dict()))
        return torchvision_tokens(peer, standardised(images, HALF))

    return tokens


def torchvision_tokens(peer: VisionTransformer, images: Tensor) -> Tensor:
    x = peer._process_input(images)
    return peer.encoder(torch.cat([peer.class_token.expand(len(x), -1, -1), x], 1))


def of_transformers(kind: str, folder: Path) -> Callable[[Tensor], Tensor]:
    if kind == "registers":
        theirs = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**S_16, patch_size=14, num_register_tokens=4))
    else:
        theirs = ViTModel(ViTConfig(**S_16, patch_size=16, intermediate_size=1536), add_pooling_layer=False)
    scramble(theirs).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255})
    )

    def tokens(images: Tensor) -> Tensor:
        asked = {"interpolate_pos_encoding": True} if kind == "S/16" else {}  # the other resizes without being asked
        return theirs(standardised(images, HALF), **asked).last_hidden_state

    return tokens


IN = [(of_timm, kind) for kind in TIMM]
IN += [(of_torchvision, "S/16"), (of_transformers, "S/16"), (of_transformers, "registers")]


@pytest.mark.slow
@pytest.mark.parametrize(("library", "kind"), IN)
def test_what_a_library_saved_computes_the_same_here_at_both_sizes(library, kind, tmp_path):
    tokens = library(kind, tmp_path / "in")
    ours, _ = open_backbone(tmp_path / "in")
    for side in (SIZE, OTHER):
        # So many layers as the hybrid's round by more than 1e-5 in float32.
        images = torch.rand(1, 3, side, side, dtype=torch.float64 if kind == "hybrid" else torch.float32)
        assert_computes(ours.to(images.dtype), images, tokens(images))
        assert_computes(open_backbone(tmp_path / "in")[0].to(images.dtype).resized(side), images, tokens(images))


def opened(folder: Path, to: str, backbone: ViT) -> Callable[[Tensor], Tensor]:
    """What gives the tokens of images by the library that the export is for: all, or of a program the readout before
    the patches."""
    standardise = backbone.standardise
    if to == "timm":
        peer = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return lambda images: peer.forward_features(standardise(images))
    if to == "transformers":
        peer = AutoModel.from_pretrained(folder).eval()
        return lambda images: peer(standardise(images)).last_hidden_state
    if to == "torchvision":
        peer = VisionTransformer(**json.loads((folder / "torchvision.json").read_text())["VisionTransformer"]).eval()
        peer.heads = nn.Identity()
        peer.load_state_dict(load_file(folder / "model.safetensors"))
        return lambda images: torchvision_tokens(peer, standardise(images))
    if to == "torch_export":
        program = torch.export.load(folder / "model.pt2").module()
        return lambda images: joined(*program(images))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    return lambda images: joined(*map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


def joined(readout: Tensor, patches: Tensor) -> Tensor:
    return torch.cat([readout.unsqueeze(1), patches], 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TIMM)
@pytest.mark.parametrize("to", ["timm", "transformers", "torchvision", "torch_export", "onnx"])
def test_an_export_computes_the_same_where_it_is_opened_at_both_sizes_or_is_refused(to, kind, tmp_path):
    of_timm(kind, tmp_path / "in")
    ours, about = open_backbone(tmp_path / "in")
    if lacks := LACKS.get((to, kind)):
        with pytest.raises(ValueError, match=f"{to} has no .*{lacks}"):
            export(ours, about, tmp_path / "out", to)
        return
    for side in (SIZE, OTHER):
        backbone, out = ours if side == SIZE else ours.resized(side), tmp_path / f"out-{side}"
        said = export(backbone, about, out, to)
        assert "the same to" in said
        images = torch.rand(2, 3, side, side)
        program, encoded = to in ("torch_export", "onnx"), backbone(images)
        outputs = joined(read(encoded, about["readout"]), encoded.patches)
        mine = outputs if program else backbone.forward_features(images)
        theirs = opened(out, to, backbone)(images)
        limit = 1e-4 if to == "onnx" else 1e-5
        assert (mine - theirs).abs().max() <= limit * mine.abs().max()
