"""DINOv2, DINOv3, CLIP and SigLIP, opened from the layouts of their releases, of timm and of transformers, compute what
timm's and transformers' classes compute, forward and backward; and go back there."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from dino_twins import release_of, timm_dinov3, transformers_dinov3, under_our_names
from foreign_models import assert_computes, saved, scramble, standardised
from timm.models import save_for_hf
from timm.models.eva import checkpoint_filter_fn as eva_filter
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import Tensor, nn

from sslvit.errors import DataError
from sslvit.models.vit import ViT
from sslvit.weights.foreign.facts import TIMM_CLIP, TIMM_SIGLIP, timm_constants
from sslvit.weights.foreign.open import load_foreign, open_backbone

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CONSTANTS = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
GRIDS = ((16, 16), (24, 24), (8, 20))  # its own size, another, a rectangle


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def with_preprocessor(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    constants = {"image_mean": CONSTANTS["mean"], "image_std": CONSTANTS["std"], "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(constants))
    return folder


def assert_gradients(ours: ViT, theirs: nn.Module, mine: Tensor, tokens: Tensor) -> None:
    """Of all tokens, weighted at random: every parameter of ours has theirs' gradient."""
    weights = torch.randn(tokens.shape)
    (mine * weights).sum().backward()
    (tokens * weights).sum().backward()
    expected = under_our_names({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    for name, parameter in ours.named_parameters():
        if name == "patch_embed.proj.bias" and name not in expected:
            continue  # CLIP's convolution has none
        gradient = expected[name]
        if name == "pos_embed":  # beside registers DINOv2's class token has its position in itself
            gradient = gradient[:, -parameter.shape[1] :]
        limit = float(1e-5 * gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=limit, msg=name)


# DINOv3 --------------------------------------------------------------------------------------------------------------

DINOV3 = {
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_small_plus_patch16_dinov3_qkvb": {},
    "vit_7b_patch16_dinov3": {"mlp_ratio": 2},
}


@pytest.mark.parametrize("name", DINOV3)
def test_a_release_of_dinov3_is_what_timms_loader_makes_of_it(tmp_path, name):
    theirs = timm_dinov3(name, **DINOV3[name])
    state = release_of(theirs)
    again = timm_dinov3(name, **DINOV3[name])
    again.load_state_dict(eva_filter(dict(state), again))
    nothing = {"local_cls_norm.weight": torch.ones(32)} if "7b" in name else {}
    file = saved(tmp_path / "x.safetensors", state | nothing)
    ours, about = load_foreign(file, heads=2)
    for size in GRIDS:
        images = torch.rand(2, 3, *size)
        tokens = again.forward_features(standardised(images, IMAGENET))
        assert_computes(ours, images, tokens)
    assert_gradients(ours, again, ours.forward_features(images), tokens)
    config = ours.config
    assert (config.position, config.epsilon, config.rope_rescale, config.rope_periods) == ("rope", 1e-5, 2.0, ())
    assert config.swiglu == (name != "vit_small_patch16_dinov3_qkvb")
    assert config.key_bias == ("7b" in name)  # which has no bias at all
    assert about["left_behind"] == (["local_cls_norm (1)"] if nothing else []) + ["mask_token (1)"]
    assert about["known"]["rope_base"] == "100.0 (the dinov3 release)"
    # In training it is a part of the teacher, beside heads.
    trained = {f"teacher.backbone.{n}": t for n, t in state.items()} | {"teacher.dino_head.mlp.0.weight": torch.ones(2)}
    images = torch.rand(1, 3, 16, 16)
    opened = load_foreign(saved(tmp_path / "y.safetensors", trained), heads=2)[0]
    assert torch.equal(opened(images).patches, ours(images).patches)


def test_published_sizes_of_dinov3_need_no_facts(tmp_path):
    theirs = timm_dinov3(embed_dim=384, depth=12, num_heads=6, patch_size=16)
    ours, _ = load_foreign(saved(tmp_path / "x.safetensors", release_of(theirs)))
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert_computes(ours, images, theirs.forward_features(standardised(images, IMAGENET)))
    assert ours.name == "DINOv3-S/16"
    assert ours.image_size == (256, 256)


def test_periods_in_a_file_are_used_as_metas_code_does_unless_exact_ones_are_asked_for(tmp_path):
    theirs = timm_dinov3()
    state = release_of(theirs)
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16()
    file = saved(tmp_path / "x.safetensors", state)
    ours, about = load_foreign(file, heads=2)
    exact, quiet = load_foreign(file, heads=2, periods="exact")
    assert "rounded" in about["notes"][0]
    assert not quiet["notes"]
    images = torch.rand(2, 3, 16, 16)
    tokens = theirs.forward_features(standardised(images, IMAGENET))
    assert_computes(exact, images, tokens)
    assert (ours(images).patches - tokens[:, 5:]).abs().max() > 1e-4
    theirs.rope.periods = state["rope_embed.periods"].float()
    assert_computes(ours, images, theirs.forward_features(standardised(images, IMAGENET)))
    with pytest.raises(ValueError, match="periods must be exact"):
        load_foreign(file, heads=2, periods="rough")
    state["rope_embed.periods"] = 10.0 ** torch.arange(4)
    with pytest.raises(DataError, match="not those of base 100"):
        load_foreign(saved(file, state), heads=2)


def test_a_masked_bias_may_hold_what_is_no_number(tmp_path):
    theirs = timm_dinov3()
    state = release_of(theirs)
    for name in state:
        if name.endswith("qkv.bias"):
            state[name][32:64] = float("nan")
    ours, _ = load_foreign(saved(tmp_path / "x.safetensors", state), heads=2)
    images = torch.rand(1, 3, 16, 16)
    assert_computes(ours, images, theirs.forward_features(standardised(images, IMAGENET)))
    assert all(not block.attn.qkv.bias[32:64].any() for block in ours.blocks)  # or weight decay would meet it


@pytest.mark.parametrize("name", [*DINOV3, "vit_small_patch16_dinov3"])
def test_a_folder_of_timms_dinov3_says_everything_and_a_bare_file_that_it_is_said(tmp_path, name):
    theirs = timm_dinov3(name, **DINOV3.get(name, {}))
    arguments = {"num_heads": 2, "embed_dim": 32, "depth": 2, "patch_size": 4, "img_size": 16}
    save_for_hf(theirs, tmp_path, safe_serialization=True, model_args=arguments)
    ours, about = open_backbone(tmp_path)
    given = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    for size in GRIDS:
        images = torch.rand(2, 3, *size)
        tokens = theirs.forward_features(standardised(images, given))
        assert_computes(ours, images, tokens)
    assert_gradients(ours, theirs, ours.forward_features(images), tokens)
    assert about["layout"] == "timm"
    bare = saved(tmp_path / "bare.safetensors", theirs.state_dict())
    with pytest.raises(DataError, match="rotary ones leave no weights, family=dinov3"):
        load_foreign(bare, heads=2, gelu="exact", **IMAGENET)
    opened, _ = load_foreign(bare, heads=2, family="dinov3")
    assert torch.equal(opened(images).patches, ours(images).patches)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"model_args": {"rope_type": "mixed"}})
    )
    with pytest.raises(DataError, match=r"model_args have \['rope_type'\]"):
        open_backbone(tmp_path)


@pytest.mark.parametrize("changes", [{}, {"use_gated_mlp": True}, {"num_register_tokens": 0}, {"rope_theta": 50.0}])
def test_transformers_dinov3_from_disk_and_from_memory(tmp_path, changes):
    pytest.importorskip("transformers")
    theirs = transformers_dinov3(**changes)
    folder = with_preprocessor(theirs, tmp_path / "model")
    ours, about = open_backbone(folder)
    for size in GRIDS:
        images = torch.rand(2, 3, *size)
        tokens = theirs(standardised(images, CONSTANTS)).last_hidden_state
        assert_computes(ours, images, tokens)
    assert_gradients(ours, theirs, ours.forward_features(images), tokens)
    assert ours.config.rope_rescale == 2.0
    assert about["layout"] == "transformers DINOv3"
    saved(folder / "model.safetensors", {n: t for n, t in theirs.state_dict().items() if t.numel()})
    assert torch.equal(open_backbone(folder)[0](images).patches, ours(images).patches)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_gated_mlp": True, "hidden_act": "gelu"}))
    with pytest.raises(DataError, match=r"hidden_act must be one of \['silu'\], got 'gelu'"):
        open_backbone(folder)


# DINOv2's giant ------------------------------------------------------------------------------------------------------


def timm_giant(registers: int) -> nn.Module:
    name = "vit_giant_patch14_reg4_dinov2" if registers else "vit_giant_patch14_dinov2"
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    return scramble(timm.create_model(name, **sizes, dynamic_img_size=True))


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2s_giant_is_what_timms_loader_makes_of_it(tmp_path, registers):
    theirs = timm_giant(registers)
    state = {
        n.replace("fc1", "w12").replace("fc2", "w3").replace("reg_token", "register_tokens"): t.detach().clone()
        for n, t in theirs.state_dict().items()
    }
    state["mask_token"] = torch.zeros(1, 24)
    if registers:
        state["pos_embed"] = torch.cat([torch.randn(1, 1, 24), state["pos_embed"]], 1)
    again = timm_giant(registers)
    again.load_state_dict(vit_filter(dict(state), again))
    ours, about = load_foreign(saved(tmp_path / "x.safetensors", state), heads=3)
    images = torch.rand(2, 3, 16, 16)
    tokens = again.forward_features(standardised(images, IMAGENET))
    assert_computes(ours, images, tokens)
    assert ours.config.swiglu
    assert ours.config.mlp_width == 64
    assert about["known"]["swiglu"] == "True (its names)"
    assert_gradients(ours, again, ours.forward_features(images), tokens)
    # timm's own file shows no gate's kind: its config.json does, or the family.
    bare = saved(tmp_path / "bare.safetensors", theirs.state_dict())
    with pytest.raises(DataError, match="have gates, and nothing shows"):
        load_foreign(bare, heads=3, gelu="exact", **IMAGENET)
    images = torch.rand(2, 3, 24, 12) if registers else images  # without registers Meta's and timm's resizing differ
    tokens = theirs.forward_features(standardised(images, IMAGENET))
    assert_computes(load_foreign(bare, heads=3, family="dinov2")[0], images, tokens)
    arguments = {"num_heads": 3, "embed_dim": 24, "depth": 2, "patch_size": 4, "img_size": 16}
    save_for_hf(theirs, tmp_path / "timm", safe_serialization=True, model_args=arguments)
    images = torch.rand(2, 3, 24, 12)
    assert_computes(
        open_backbone(tmp_path / "timm")[0], images, theirs.forward_features(standardised(images, IMAGENET))
    )


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_transformers_dinov2_with_swiglu_or_without(tmp_path, registers, swiglu):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    more = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{kind}Config")(**sizes, **more, use_swiglu_ffn=swiglu)
    theirs = scramble(getattr(transformers, f"{kind}Model")(config))
    folder = with_preprocessor(theirs, tmp_path / "model")
    ours, _ = open_backbone(folder)
    for size in ((16, 16), (24, 24), (12, 20)):
        images = torch.rand(2, 3, *size)
        tokens = theirs(standardised(images, CONSTANTS)).last_hidden_state
        assert_computes(ours, images, tokens)
    assert_gradients(ours, theirs, ours.forward_features(images), tokens)
    saved(folder / "model.safetensors", theirs.state_dict())  # as they are in memory
    assert torch.equal(open_backbone(folder)[0](images).patches, ours(images).patches)


# CLIP and SigLIP -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_the_image_towers_of_clip_and_siglip(tmp_path, kind, whole):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    vision = sizes | {"image_size": 16, "patch_size": 4}
    if whole:
        text = sizes | {"vocab_size": 30, "max_position_embeddings": 8}
        config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
        model = scramble(getattr(transformers, f"{kind}Model")(config))
        theirs = model.vision_model
    else:
        model = theirs = scramble(
            getattr(transformers, f"{kind}VisionModel")(getattr(transformers, f"{kind}VisionConfig")(**vision))
        )
    folder = with_preprocessor(model, tmp_path / "model")
    ours, about = open_backbone(folder)
    for size in ((16, 16), (24, 24)):
        images = torch.rand(2, 3, *size)
        asked = {"interpolate_pos_encoding": True} if size != (16, 16) else {}
        tokens = theirs(standardised(images, CONSTANTS), **asked).last_hidden_state
        # transformers norms CLIP's class token alone, for its projection; timm norms all.
        tokens = theirs.post_layernorm(tokens) if kind == "CLIP" else tokens
        assert_computes(ours, images, tokens)
    assert ours.config.gelu == ("sigmoid" if kind == "CLIP" else "tanh")
    assert ours.config.stem_norm == (kind == "CLIP")
    assert ours.readouts == (("cls", "mean", "both") if kind == "CLIP" else ("mean",))
    assert [n for n in about["left_behind"] if not n.startswith(("text", "visual", "logit"))] == (
        [] if kind == "CLIP" else ["head (11)"]
    )


CLIP = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}


@pytest.mark.parametrize(
    "name",
    [
        *("vit_base_patch16_clip_quickgelu_224", "vit_large_patch14_clip_224"),
        *("vit_base_patch16_siglip_224", "vit_so400m_patch16_siglip_256"),
    ],
)
def test_timms_towers(tmp_path, name):
    theirs = scramble(timm.create_model(name, **CLIP, dynamic_img_size=True))
    save_for_hf(theirs, tmp_path, safe_serialization=True, model_args={k: CLIP[k] for k in CLIP if k != "num_classes"})
    ours, _ = open_backbone(tmp_path)
    given = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    for size in GRIDS:
        images = torch.rand(2, 3, *size)
        tokens = theirs.forward_features(standardised(images, given))
        assert_computes(ours, images, tokens)
    if "clip" in name:
        assert_gradients(ours, theirs, ours.forward_features(images), tokens)


@pytest.mark.slow
def test_every_known_tower_of_timm_has_the_constants_of_our_tables():
    known = 0
    for name in timm.list_models("vit_*"):
        if not (TIMM_CLIP.fullmatch(name) or TIMM_SIGLIP.fullmatch(name)):
            continue
        with torch.device("meta"):
            theirs = timm.create_model(name)
        constants, block = timm_constants(name), theirs.blocks[0]
        images = torch.linspace(-3, 3, 50)
        act = {"exact": nn.functional.gelu, "sigmoid": lambda x: x * (1.702 * x).sigmoid()}.get(
            constants.gelu, lambda x: nn.functional.gelu(x, approximate="tanh")
        )
        torch.testing.assert_close(block.mlp.act(images), act(images), rtol=0, atol=1e-6)
        assert (constants.heads, constants.depth) == (block.attn.num_heads, len(theirs.blocks)), name
        assert constants.epsilon == block.norm1.eps, name
        known += 1
    assert known >= 25


@pytest.mark.parametrize("said", [{"family": "clip", "heads": 3}, {"heads": 3, "gelu": "sigmoid", "epsilon": 1e-5}])
def test_openais_layout_of_clip_is_what_timms_loader_makes_of_it(tmp_path, said):
    """https://github.com/openai/CLIP, clip/model.py, VisionTransformer, beside the text tower."""
    w = 24
    block = {
        "ln_1.weight": (w,), "ln_1.bias": (w,), "attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,),
        "attn.out_proj.weight": (w, w), "attn.out_proj.bias": (w,), "ln_2.weight": (w,), "ln_2.bias": (w,),
        "mlp.c_fc.weight": (4 * w, w), "mlp.c_fc.bias": (4 * w,), "mlp.c_proj.weight": (w, 4 * w),
        "mlp.c_proj.bias": (w,),
    }  # fmt: skip
    shapes = {"visual.class_embedding": (w,), "visual.positional_embedding": (17, w), "visual.proj": (w, 8)}
    shapes |= {"visual.conv1.weight": (w, 3, 4, 4)}
    shapes |= {f"visual.{norm}.{kind}": (w,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    shapes |= {f"visual.transformer.resblocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    state = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(8), "token_embedding.weight": torch.ones(5, 8)}
    theirs = timm.create_model("vit_base_patch16_clip_quickgelu_224", **(CLIP | {"num_classes": 8})).eval()
    theirs.load_state_dict(vit_filter(dict(state), theirs))
    constants = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    ours, about = load_foreign(
        saved(tmp_path / "x.safetensors", state | text), **said, **({} if "family" in said else constants)
    )
    images = torch.rand(2, 3, 16, 16)
    assert_computes(ours, images, theirs.forward_features(standardised(images, constants)))
    assert about["left_behind"] == ["token_embedding (1)", "transformer (1)", "visual (1)"]
    with pytest.raises(ValueError, match="nothing in it says heads, gelu, epsilon"):
        load_foreign(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["IJepaModel", "ViTMSNModel"])
def test_transformers_ijepa_and_msn_are_its_vit(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    config = getattr(transformers, name.replace("Model", "Config"))(**sizes, image_size=16, patch_size=4)
    theirs = scramble(getattr(transformers, name)(config))
    ours, _ = open_backbone(with_preprocessor(theirs, tmp_path / "model"))
    for size in ((16, 16), (24, 24)):
        images = torch.rand(2, 3, *size)
        asked = {"interpolate_pos_encoding": True} if size != (16, 16) else {}
        assert_computes(ours, images, theirs(standardised(images, CONSTANTS), **asked).last_hidden_state)
    assert ours.config.class_token == (name == "ViTMSNModel")


# What cannot be opened -----------------------------------------------------------------------------------------------

NOTHING = {
    "a text tower": {"text_model.embeddings.token_embedding.weight": (9, 4), "text_model.final_layer_norm.bias": (4,)},
    "a head without the backbone": {"dino_head.mlp.0.weight": (4, 4), "dino_head.last_layer.weight_v": (4, 4)},
    "a network of convolutions": {
        "stages.0.blocks.0.dwconv.weight": (4, 1, 7, 7),
        "downsample_layers.0.0.weight": (4,),
    },
    "holds no ViT and no BiT": {"encoder.something": (4, 4)},
    "queries that share their keys": {"patch_embed.proj.weight": (4, 3, 2, 2), "blocks.0.attn.wq.weight": (4, 4)},
}


@pytest.mark.parametrize("what", NOTHING)
def test_a_file_that_holds_no_backbone_is_named_in_a_sentence(tmp_path, what):
    state: dict[str, Any] = {name: torch.rand(shape) for name, shape in NOTHING[what].items()}
    with pytest.raises(DataError, match=what) as caught:
        load_foreign(saved(tmp_path / "x.safetensors", state))
    assert "\n" not in str(caught.value)
