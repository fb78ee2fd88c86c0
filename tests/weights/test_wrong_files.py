"""What is no ViT that this package computes is refused in one sentence, by what it is."""

import json
import re

import pytest
import timm
import torch
import torchvision
from foreign_models import saved
from recipes_run import run
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    SiglipTextConfig,
    SiglipTextModel,
)

from sslvit.errors import DataError
from sslvit.weights.folder import load_backbone
from sslvit.weights.foreign import files
from sslvit.weights.foreign.open import load_foreign

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
TOWER = "holds a text tower: the images' one is another file, or was left out"
CONVOLUTIONS = "holds a network of convolutions, and no ViT"
SMALL_SWIN = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}
OTHERS = {
    "timm's ResNet": (lambda: timm.create_model("resnet18"), CONVOLUTIONS),
    "torchvision's ResNet": (lambda: torchvision.models.resnet18(), CONVOLUTIONS),
    "a ResNet of self-supervision": (lambda: {"module.encoder_q.layer1.0.conv1.weight": torch.ones(1)}, CONVOLUTIONS),
    "ConvNeXt": (lambda: timm.create_model("convnext_atto"), CONVOLUTIONS),
    "Swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", **SMALL_SWIN), "relative positions other"),
    "norms of queries": (lambda: vit(qk_norm=True), "has norms of queries and keys (blocks.0.attn.k_norm.bias)"),
    "CLIP's text": (lambda: CLIPTextModel(CLIPTextConfig(**TEXT)), TOWER),
    "SigLIP's text": (lambda: SiglipTextModel(SiglipTextConfig(**TEXT)), TOWER),
    "BERT": (lambda: BertModel(BertConfig(**TEXT)), TOWER),
    "DINO's head": (lambda: {"dino_head.last_layer.weight": torch.ones(2, 2)}, "holds a head without the backbone"),
}


def vit(**changes):
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0, **changes)


@pytest.mark.parametrize("other", OTHERS)
def test_another_network_is_named(tmp_path, other):
    model, sentence = OTHERS[other]
    made = model()
    state = made if isinstance(made, dict) else made.state_dict()
    file = saved(tmp_path / "x.safetensors", {name: tensor.contiguous() for name, tensor in state.items()})
    with pytest.raises(DataError, match=re.escape(sentence)) as refused:
        load_foreign(file)
    assert str(file) in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors", ".npz"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "is empty"), (b"<!DOCTYPE html><html>", "is a page of HTML"), (b"version https://git-lfs.git", "git-lfs")],
)
def test_a_file_that_holds_nothing_is_named_whatever_it_is_called(tmp_path, suffix, content, sentence):
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load_foreign(tmp_path / f"x{suffix}")


def test_the_largest_release_is_not_too_large_to_be_read(tmp_path):
    """DINOv3's 7B in float32: 6.7 billion parameters of four bytes. The files here are holes."""
    for size, sentence in (
        (4 * 6_720_000_000, "is not a whole safetensors file"),
        (files.MOST_BYTES + 1, "bytes, more"),
    ):
        with (tmp_path / "x.safetensors").open("wb") as stream:
            stream.truncate(size)
        with pytest.raises(DataError, match=sentence):
            load_foreign(tmp_path / "x.safetensors")


def test_a_config_of_another_patch_size_is_not_believed(tmp_path):
    timm.models.save_for_hf(vit(), tmp_path, safe_serialization=True, model_args={"depth": 1, "img_size": 32})
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["patch_size"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"model.safetensors: the config.json beside it says patch_size \(8, 8\)"):
        load_foreign(tmp_path)


def test_a_classifier_is_adapted_without_its_head_which_is_said(tmp_path, capsys):
    folder = tmp_path / "classifier"
    classifier = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    timm.models.save_for_hf(classifier, folder, safe_serialization=True, model_args={"depth": 1, "img_size": 32})
    words = (
        f"--init_from {folder} --data shapes:n=32 --batch_size 16 --threads 1 --objective mpp --epochs 2 --keep_data="
    )
    run("adapt", f"{words} --out {tmp_path / 'run'}")
    assert (
        "its classifier (head.bias) is left out: a linear probe's, or it was trained on labels"
        in capsys.readouterr().out
    )
    assert not [name for name in load_backbone(tmp_path / "run" / "model").state_dict() if "head" in name]
