"""BEiT and data2vec, opened from the layouts of their releases, of timm and of transformers, compute what timm's and
transformers' classes compute, forward and backward, at any size; and go back there."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from foreign_models import assert_computes, saved, scramble, standardised
from random_models import ABOUT, vit
from timm.models import save_for_hf
from torch import Tensor, nn

from sslvit.errors import DataError
from sslvit.models.readout import Classifier
from sslvit.models.vit import ViT
from sslvit.weights.exports.export import export
from sslvit.weights.folder import load_backbone, save_backbone
from sslvit.weights.foreign.facts import TIMM_BEIT, timm_constants
from sslvit.weights.foreign.open import load_foreign, open_backbone

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CONSTANTS = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
GRIDS = ((16, 16), (24, 24), (8, 20))  # its own size, another, a rectangle
PER_BLOCK, SHARED = {"use_rel_pos_bias": True}, {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # of timm's


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def timm_beit(name: str = "beit_base_patch16_224", **changes: Any) -> nn.Module:
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 4, "img_size": 16, "num_classes": 0}
    return scramble(timm.create_model(name, **(sizes | {"use_fc_norm": False} | changes)))


def tokens_of_timm(theirs: nn.Module, images: Tensor, constants: dict[str, Any] = HALF) -> Tensor:
    """Of these images' size, to which timm resizes the tables for good."""
    resized = copy.deepcopy(theirs)
    resized.set_input_size(tuple(images.shape[2:]))
    return resized.forward_features(standardised(images, constants))


def transformers_beit(kind: str = "Beit", *, shared: bool = False, **changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    sizes |= {"patch_size": 4, "image_size": 16, "use_mean_pooling": False, "drop_path_rate": 0.0}
    biases = {"use_relative_position_bias": not shared, "use_shared_relative_position_bias": shared}
    model = "Model" if "For" not in kind else ""
    config = getattr(transformers, kind.partition("For")[0] + "Config")(**(sizes | biases | changes))
    return scramble(getattr(transformers, kind + model)(config))


def with_preprocessor(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    constants = {"image_mean": CONSTANTS["mean"], "image_std": CONSTANTS["std"], "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(constants))
    return folder


def assert_gradients(ours: ViT, theirs: nn.Module, mine: Tensor, tokens: Tensor) -> None:
    """Of all tokens, weighted at random: every parameter of ours has theirs' gradient, to 1e-5 of its largest."""
    weights = torch.randn(tokens.shape)
    (mine * weights).sum().backward()
    (tokens * weights).sum().backward()
    expected: dict[str, Tensor] = {}
    for name, parameter in theirs.named_parameters():
        for old, new in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("embeddings.", ""),
            ("encoder.layer.", "blocks."), ("layers.", "blocks."), ("gamma_", "ls_"), ("lambda_", "ls_"),
            ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("layernorm", "norm"),
            ("attention.output.dense", "attn.proj"), ("o_proj", "proj"), ("attention.attention", "attn"),
            ("attention.", "attn."), ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
            ("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"),
            ("q_bias", "q_proj.bias"), ("v_bias", "v_proj.bias"),
        ):  # fmt: skip
            name = name.replace(old, new)
        name = re.sub(r"ls_(\d)", r"ls\1.gamma", name)
        if name.endswith("bias_table"):
            block = re.match(r"blocks\.(\d+)", name)
            name = f"relative_bias.{block[1]}" if block else "relative_bias"
        expected[name] = parameter.grad
    for base in [f"blocks.{i}.attn." for i in range(ours.depth)]:
        for kind in ("weight", "bias"):
            q, k, v = (expected.pop(f"{base}{which}_proj.{kind}", None) for which in "qkv")
            if q is not None:
                expected[f"{base}qkv.{kind}"] = torch.cat([q, torch.zeros_like(q) if k is None else k, v])
    for name, parameter in ours.named_parameters():
        gradient = expected[name].view_as(parameter)
        assert gradient.abs().max() > 0
        limit = float(1e-5 * gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=limit, msg=name)


# Opening -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beitv2_large_patch16_224"])
@pytest.mark.parametrize("kind", [PER_BLOCK, SHARED])
def test_a_folder_of_timms_says_everything_and_a_bare_file_needs_its_family(tmp_path, name, kind):
    theirs = timm_beit(name, **kind)
    arguments = {"num_heads": 3, "embed_dim": 24, "depth": 2, "patch_size": 4, "img_size": 16, "use_fc_norm": False}
    save_for_hf(theirs, tmp_path, safe_serialization=True, model_args=arguments | kind)
    ours, about = open_backbone(tmp_path)
    given = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    for size in GRIDS:
        images = torch.rand(2, 3, *size)
        assert_computes(ours, images, tokens_of_timm(theirs, images, given))
    assert about["readout"] == "mean"
    assert ours.config.position_at == ("every_layer" if kind is PER_BLOCK else "every_layer_shared")
    assert (ours.config.key_bias, ours.config.position_resize, ours.config.epsilon) == (False, "geometric", 1e-6)
    images = torch.rand(2, 3, 16, 16)
    assert_gradients(ours, theirs, ours.forward_features(images), theirs.forward_features(standardised(images, given)))
    bare = saved(tmp_path / "bare.safetensors", theirs.state_dict())
    with pytest.raises(ValueError, match="nothing in it says gelu, mean, std"):
        load_foreign(bare)
    opened, _ = load_foreign(bare, family="beitv2" if "v2" in name else "beit")
    assert torch.equal(opened(images).patches, ours(images).patches)


@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_a_release_with_its_indices_mask_token_and_predictor_of_tokens(tmp_path, size):
    """microsoft/unilm, beit/modeling_pretrain.py and beit2/modeling_pretrain.py: indices are buffers of theirs."""
    theirs = timm_beit(img_size=size, **SHARED)
    state = dict(theirs.state_dict()) | {
        "rel_pos_bias.relative_position_index": theirs.rel_pos_bias.relative_position_index,
        "mask_token": torch.zeros(1, 1, 24),
        "lm_head.weight": torch.zeros(8, 24),
        "cls_pt_layers.0.norm1.weight": torch.ones(24),
    }
    file = saved(tmp_path / "x.safetensors", state)
    square = size == (16, 16)
    if not square:
        with pytest.raises(ValueError, match=r"a bias of 30 entries for each head, not those of a square grid"):
            load_foreign(file, family="beit")
    ours, about = load_foreign(file, family="beit", **({} if square else {"image_size": size}))
    images = torch.rand(2, 3, *size)
    assert_computes(ours, images, theirs.forward_features(standardised(images, HALF)))
    expected = ["cls_pt_layers (1)", "lm_head (1)", "mask_token (1)", "rel_pos_bias (1)"]
    assert about["left_behind"] == expected
    with pytest.raises(ValueError, match=r"heads is 3 by the shape of its kernels, and 4 by you"):
        load_foreign(file, family="beit", heads=4)


def test_a_classifier_of_timms_norms_the_mean_and_must_be_confirmed(tmp_path):
    theirs = timm_beit(num_classes=5, use_fc_norm=True)
    file = saved(tmp_path / "x.safetensors", theirs.state_dict())
    with pytest.raises(DataError, match="holds a classifier"):
        load_foreign(file, family="beit")
    ours, about = load_foreign(file, family="beit", leave_head=True)
    images = torch.rand(2, 3, 16, 16)
    assert_computes(ours, images, theirs.forward_features(standardised(images, HALF)))
    assert about["readout"] == "mean"
    assert "norm of the mean was left behind" in about["notes"][0]


@pytest.mark.parametrize("kind", ["Beit", "Data2VecVision"])
@pytest.mark.parametrize("shared", [False, True])
def test_transformers_from_disk_and_from_memory(tmp_path, kind, shared):
    theirs = transformers_beit(kind, shared=shared, layer_norm_eps=1e-5)
    folder = with_preprocessor(theirs, tmp_path / "model")
    ours, about = open_backbone(folder)
    for size in GRIDS:
        images = torch.rand(2, 3, *size)
        interpolated = theirs(standardised(images, CONSTANTS), interpolate_pos_encoding=True)
        assert_computes(ours, images, interpolated.last_hidden_state)
    images = torch.rand(2, 3, 16, 16)
    tokens = theirs(standardised(images, CONSTANTS)).last_hidden_state
    assert_gradients(ours, theirs, ours.forward_features(images), tokens)
    assert (about["layout"], about["readout"]) == ("transformers", "mean")
    assert (ours.config.epsilon, ours.config.position_resize) == (1e-5, "bilinear")
    saved(folder / "model.safetensors", theirs.state_dict())  # as the names are in memory
    assert torch.equal(open_backbone(folder)[0](images).patches, ours(images).patches)


def test_transformers_norm_beside_a_predictor_of_tokens_is_the_backbones(tmp_path):
    """As microsoft/beit-base-patch16-224-pt22k is stored: the only self-supervised BEiT there."""
    theirs = transformers_beit("BeitForMaskedImageModeling", shared=True, use_mask_token=True, use_mean_pooling=True)
    folder = with_preprocessor(theirs, tmp_path / "model")
    ours, about = open_backbone(folder)
    images = torch.rand(2, 3, 16, 16)
    tokens = theirs.layernorm(theirs.beit(standardised(images, CONSTANTS)).last_hidden_state)
    assert_computes(ours, images, tokens)
    assert about["left_behind"] == ["lm_head (2)", "mask_token (1)"]


@pytest.mark.parametrize("kind", ["Beit", "Data2VecVision"])
def test_transformers_classifiers_norm_the_mean_and_must_be_confirmed(tmp_path, kind):
    theirs = transformers_beit(f"{kind}ForImageClassification", use_mean_pooling=True)
    folder = with_preprocessor(theirs, tmp_path / "model")
    with pytest.raises(DataError, match="holds a classifier"):
        open_backbone(folder)
    ours, about = open_backbone(folder, leave_head=True)
    images = torch.rand(2, 3, 16, 16)
    inner = theirs.beit if kind == "Beit" else theirs.data2vec_vision
    assert_computes(ours, images, inner(standardised(images, CONSTANTS)).last_hidden_state)
    assert about["readout"] == "mean"


def test_two_kinds_of_positions_are_refused(tmp_path):
    for name, changes, what in (
        ("absolute", {"use_abs_pos_emb": True}, "and pos_embed too"),
        ("both", {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True}, "and a table of all blocks too"),
    ):
        file = saved(tmp_path / f"{name}.safetensors", timm_beit(**changes).state_dict())
        with pytest.raises(DataError, match=what if name == "both" else f"{what}|beside a table of positions"):
            load_foreign(file, family="beit")


def test_sizes_that_a_name_implies_are_timms():
    names = [
        name for name in timm.list_models("beit*") if not name.startswith("beit3")
    ]  # which is another architecture
    assert all(TIMM_BEIT.fullmatch(name) for name in names)
    assert len(names) >= 7
    with torch.device("meta"):
        for name in ("beit_base_patch16_384", "beitv2_large_patch16_224"):
            theirs, constants = timm.create_model(name), timm_constants(name)
            block = theirs.blocks[0]
            assert (constants.heads, constants.depth) == (block.attn.num_heads, len(theirs.blocks))
            assert (constants.epsilon, constants.gelu) == (block.norm1.eps, "exact")
            assert isinstance(block.mlp.act, nn.GELU)
            assert block.mlp.act.approximate == "none"


# Going back ----------------------------------------------------------------------------------------------------------

OURS = {"position": "relative_bias", "key_bias": False, "layer_scale": 0.5}
KINDS = {
    "per block": OURS | {"position_at": "every_layer", "position_resize": "geometric"},
    "shared, a bias of keys, no scale": OURS
    | {"position_at": "every_layer_shared", "key_bias": True, "layer_scale": None},
    "oblong, without biases": OURS | {"position_at": "every_layer", "qkv_bias": False, "image_size": (32, 48)},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_goes_to_timm_and_back(kind, tmp_path):
    ours = vit(**KINDS[kind])
    said = export(ours, ABOUT | {"readout": "mean"}, tmp_path / "out", "timm")
    assert "is in the layout of timm's BEiT" in said
    assert ("resizes positions its own way" in said) == (kind != "per block")
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.rand(2, 3, *ours.image_size)
    assert_computes(ours, images, peer.forward_features(ours.standardise(images)))
    again, about = open_backbone(tmp_path / "out", **({"image_size": (32, 48)} if "oblong" in kind else {}))
    torch.testing.assert_close(again(images).patches, ours(images).patches, rtol=0, atol=1e-6)
    assert about["readout"] == "mean"
    if kind == "per block":
        larger = torch.rand(2, 3, 48, 16)
        assert_computes(ours, larger, tokens_of_timm(peer, larger, {"mean": ours.config.mean, "std": ours.config.std}))


@pytest.mark.parametrize("readout", ["cls", "mean", "normed mean"])
@torch.no_grad()
def test_a_classifier_goes_to_timm_with_its_head(readout, tmp_path):
    normed = {"final_norm": False} if readout == "normed mean" else {}
    readout = readout.removeprefix("normed ")
    backbone = vit(**KINDS["per block"] | normed)
    model = Classifier(backbone, readout=readout, classes=5, fresh_norm=bool(normed)).eval()
    scramble(model.head)
    export(model, ABOUT | {"readout": readout}, tmp_path / "out", "timm")
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(peer(model.backbone.standardise(images)), model(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "oblong" not in kind])
@torch.no_grad()
def test_a_model_goes_to_transformers_and_back(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = vit(**KINDS[kind])
    export(ours, ABOUT, tmp_path / "out", "transformers")
    peer = transformers.BeitModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    images = torch.rand(2, 3, 32, 32)
    assert_computes(ours, images, peer(ours.standardise(images)).last_hidden_state)
    again, about = open_backbone(tmp_path / "out")
    torch.testing.assert_close(again(images).patches, ours(images).patches, rtol=0, atol=1e-5)
    assert about["readout"] == ABOUT["readout"]


@pytest.mark.parametrize(
    ("to", "changes", "reason"),
    [
        ("timm", {"epsilon": 1e-5}, "epsilon of norms other than 1e-06"),
        ("timm", {"gelu": "tanh"}, "GELU but the exact one"),
        ("timm", {"final_norm": False}, "norm before its pooling and after it, nor none"),
        ("timm", {"class_token": False}, "models without a class token"),
        ("transformers", {"image_size": (32, 48)}, "oblong images"),
        ("transformers", {"swiglu": True}, "SwiGLU"),
        ("torchvision", {}, "positions in the blocks"),
    ],
)
def test_what_their_beit_lacks_is_refused_by_name(to, changes, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export(vit(**KINDS["per block"] | changes), ABOUT, tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_a_model_folder_keeps_it_and_says_how_timm_would_open_it(tmp_path):
    for kind in KINDS:
        ours = vit(**KINDS[kind])
        save_backbone(ours, tmp_path / kind, ABOUT)
        assert load_backbone(tmp_path / kind).config == ours.config
        architecture = json.loads((tmp_path / kind / "config.json").read_text())["architecture"]
        assert architecture == "sslvit only (timm's BEiT has other names: sslvit convert --to timm writes them)"


@pytest.mark.parametrize("to", [pytest.param(to, marks=pytest.mark.slow) for to in ("torch_export", "onnx")])
@torch.no_grad()
def test_a_model_becomes_a_program_of_its_size_alone(to, tmp_path):
    said = export(vit(**KINDS["per block"]), ABOUT, tmp_path / "out", to)
    assert "the same" in said
    with pytest.raises(ValueError, match="positions in the blocks"):
        export(vit(**KINDS["per block"]), ABOUT, tmp_path / "any", to, any_size=True)
