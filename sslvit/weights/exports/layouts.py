"""A model in the layouts of timm, transformers and torchvision, read back by these libraries.

Features that a layout lacks are folded into weights that it has, which changes no output, or refused: LayerScale into
the layers before it, positions of registers into the registers.
"""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sslvit.errors import DataError
from sslvit.models.blocks import EPSILON
from sslvit.models.readout import Classifier
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.storage import durable, sealed
from sslvit.weights.exports.checks import CLOSE, compare, elsewhere, refuse, sample
from sslvit.weights.folder import config_of, load_backbone, load_classifier, write_model
from sslvit.weights.foreign.names import TORCHVISION, TRANSFORMERS, TRANSFORMERS_VIT
from sslvit.weights.timm_config import TIMM_OPENS

READOUT = "sslvit_readout"  # in transformers' config.json, which may have further entries


def common(backbone: ViT) -> dict[str, bool]:
    """Features that neither transformers nor torchvision has."""
    config = backbone.config
    return {
        "models without a class token": not config.class_token,
        "hybrid stems": config.hybrid is not None,
        "positions in the blocks": config.position == "relative" or config.position_at != "stem",
        "models without a final norm": not config.final_norm,
        "norm before the blocks": config.stem_norm,
        "class token with a norm of its own": config.class_norm,
        "GELU by a sigmoid": config.gelu == "sigmoid",
    }


def only_vit(backbone: ViT | BiT, layout: str) -> ViT:
    if isinstance(backbone, ViT):
        return backbone
    raise ValueError(f"{layout} has no such ResNets, which this {backbone.name} needs")


def plain(backbone: ViT, *, fold_scale: bool) -> dict[str, Tensor]:
    """The weights by timm's names, with one table of positions for the class token and the patches."""
    weights = {name: tensor.float() for name, tensor in backbone.state_dict().items() if "pos_embed" not in name}
    if backbone.position == "none":
        before, table = torch.zeros(1, 0, backbone.width), torch.zeros(1, *backbone.grid, backbone.width).flatten(1, 2)
    else:
        before, table = backbone._positions(backbone.grid)
    if not before.shape[1]:
        before = torch.zeros(1, backbone.prefix, backbone.width)
    classes = backbone.prefix - backbone.registers
    if backbone.registers:
        weights["reg_token"] = weights["reg_token"] + before[:, classes:]
    weights["pos_embed"] = torch.cat([before[:, :classes], table], 1)
    if not backbone.config.key_bias:
        for name in [name for name in weights if name.endswith("attn.qkv.bias")]:
            queries, keys, values = weights[name].chunk(3)
            weights[name] = torch.cat([queries, torch.zeros_like(keys), values])
    for i in range(backbone.depth) if fold_scale and backbone.config.layer_scale is not None else ():
        for scale, layer in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
            gamma = weights.pop(f"blocks.{i}.{scale}")
            weights[f"blocks.{i}.{layer}.weight"] = gamma[:, None] * weights[f"blocks.{i}.{layer}.weight"]
            weights[f"blocks.{i}.{layer}.bias"] = gamma * weights[f"blocks.{i}.{layer}.bias"]
    return weights


def write_weights(file: Path, weights: dict[str, Tensor], table: tuple[tuple[str, str], ...]) -> None:
    """table: their names and ours, as in sslvit.weights.foreign.names."""
    renamed = {}
    for name, tensor in weights.items():
        for theirs, ours in table:
            name = name.replace(ours, theirs)
        renamed[name] = tensor.detach().contiguous()
    durable.write(file, durable.tensor_pieces(renamed))


def write_json(file: Path, content: dict[str, Any]) -> None:
    durable.write(file, [(json.dumps(content, indent=2) + "\n").encode()])


def as_timm(model: ViT | BiT | Classifier, about: dict[str, Any], folder: Path) -> str:
    """A model folder of sslvit, which timm opens unless it lacks something."""
    backbone = model.backbone if isinstance(model, Classifier) else model
    head = {} if model is backbone else {n: t for n, t in model.state_dict().items() if not n.startswith("backbone.")}
    write_model(backbone, folder, about, head)
    images = sample(backbone, backbone.image_size)
    again = load_classifier(folder) if head else load_backbone(folder)

    def outputs(of: nn.Module) -> tuple[Tensor, ...]:
        return (of(images),) if head else tuple(x for x in of(images) if x is not None)

    compare(outputs(model), outputs(again), CLOSE, "what sslvit would open")
    architecture = config_of(folder)["architecture"]
    if architecture not in TIMM_OPENS:
        return f"{{out}} is a model folder that sslvit opens. timm would not: {architecture}."
    opens = "{out} is a model folder: timm.create_model('local-dir:{out}', pretrained=True)"
    if not find_spec("timm"):
        return f"{opens}. timm is not installed, so only sslvit has read it back."
    import timm

    peer = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    standardised = backbone.standardise(images)
    tokens, encoded = peer.forward_features(standardised), backbone(images)
    pairs = [(encoded.patches, tokens[:, backbone.prefix :])]
    pairs += [(encoded.cls, tokens[:, 0])] if "cls" in backbone.readouts else []
    pairs += [(model(images), peer(standardised))] if head else []
    ours, theirs = zip(*pairs, strict=True)
    worst = compare(ours, theirs, CLOSE, "what timm would open")
    return f"{opens} computes the same to {worst:.0e}.{elsewhere(backbone, 'timm', 'bicubic')}"


def read_back_by_timm(model: nn.Module, backbone: ViT, folder: Path, where: str) -> str:
    """What timm opens from a folder that is not ours is compared with the model. where: the sentence's beginning."""
    from sslvit.weights.foreign.open import load_foreign

    opens = "timm.create_model('local-dir:{out}', pretrained=True)"
    images, head = sample(backbone, backbone.image_size), isinstance(model, Classifier)
    encoded = backbone(images)
    if not find_spec("timm"):
        again = load_foreign(folder, leave_head=head)[0](images)
        compare(tuple(encoded[:2]), tuple(again[:2]), CLOSE, "what sslvit would open")
        return f"{where}: {opens}. timm is not installed: read by sslvit alone."
    import timm

    peer = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    standardised = backbone.standardise(images)
    tokens = peer.forward_features(standardised)
    pairs = [(encoded.cls, tokens[:, 0]), (encoded.patches, tokens[:, backbone.prefix :])]
    pairs += [(model(images), peer(standardised))] if head else []
    ours, theirs = zip(*pairs, strict=True)
    worst = compare(ours, theirs, CLOSE, "what timm would open")
    return f"{where}, which sslvit opens too: {opens} computes the same to {worst:.0e}."


def as_transformers(backbone: ViT | BiT, about: dict[str, Any], folder: Path) -> str:
    backbone = only_vit(backbone, "transformers")
    config, registers = backbone.config, backbone.registers
    as_dinov2 = registers > 0 or config.swiglu
    odd = as_dinov2 and not mlp_ratio(backbone)
    lacks = {
        "MLP beside registers that is no multiple of the width": odd and not config.swiglu,
        "SwiGLU but of two thirds of a multiple of the width": odd and config.swiglu,
    }
    refuse(backbone, "transformers", common(backbone) | lacks)
    weights = plain(backbone, fold_scale=not as_dinov2)
    for i in range(backbone.depth):
        for kind in ("weight", "bias"):
            if (joined := weights.pop(f"blocks.{i}.attn.qkv.{kind}", None)) is not None:
                for which, tensor in zip(("query", "key", "value"), joined.chunk(3), strict=True):
                    weights[f"blocks.{i}.attn.{which}.{kind}"] = tensor
        if as_dinov2 and config.layer_scale is None:
            weights |= {f"blocks.{i}.ls{n}.gamma": torch.ones(backbone.width) for n in (1, 2)}
    if registers:
        weights["register_tokens"] = weights.pop("reg_token")
    if as_dinov2:
        weights["mask_token"] = torch.zeros(1, backbone.width)
    gates = (("mlp.weights_in.", "mlp.fc1."), ("mlp.weights_out.", "mlp.fc2.")) if config.swiglu else ()
    names = (*TRANSFORMERS, *gates) if as_dinov2 else (*TRANSFORMERS, *TRANSFORMERS_VIT)
    write_weights(folder / "model.safetensors", weights, names)
    description = _transformers_config(backbone) | {READOUT: about["readout"]}
    write_json(folder / "config.json", description)
    write_json(folder / "preprocessor_config.json", transformers_preprocessor(backbone))
    images = sample(backbone, backbone.image_size)
    if find_spec("transformers"):
        reader, outputs = "transformers", outputs_of_transformers(folder, backbone, images)
    else:
        from sslvit.weights.foreign.open import load_foreign

        reader = "our reader of transformers' layout, which is not installed"
        outputs = tuple(load_foreign(folder, mean=config.mean, std=config.std)[0](images))
    worst = compare(tuple(backbone(images)), outputs, CLOSE, "what transformers would open")
    return (
        f"{{out}} is in transformers' layout ({description['model_type']}): AutoModel.from_pretrained('{{out}}'). It "
        f"computes the same to {worst:.0e}, by {reader}. Its preprocessor standardises; the readout to use is "
        f"{about['readout']}.{elsewhere(backbone, 'transformers', 'bicubic_plain')}"
    )


def _transformers_config(backbone: ViT) -> dict[str, Any]:
    config, size, patch_size = backbone.config, list(backbone.image_size), list(backbone.patch_size)
    entries = {
        "hidden_size": backbone.width,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.heads,
        "hidden_act": "gelu" if config.gelu == "exact" else "gelu_pytorch_tanh",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.epsilon,
        "image_size": size[0] if size[0] == size[1] else size,
        "patch_size": patch_size[0] if patch_size[0] == patch_size[1] else patch_size,
        "num_channels": backbone.channels,
        "qkv_bias": config.qkv_bias,
    }
    if not (backbone.registers or config.swiglu):
        return entries | {"model_type": "vit", "architectures": ["ViTModel"], "intermediate_size": config.mlp_width}
    entries |= {"mlp_ratio": mlp_ratio(backbone) or 0, "use_swiglu_ffn": config.swiglu, "layerscale_value": 1.0}
    if not backbone.registers:
        return entries | {"model_type": "dinov2", "architectures": ["Dinov2Model"]}
    return entries | {
        "model_type": "dinov2_with_registers",
        "architectures": ["Dinov2WithRegistersModel"],
        "num_register_tokens": backbone.registers,
    }


def mlp_ratio(backbone: ViT) -> int | None:
    """transformers' DINOv2 has whole ratios, of which SwiGLU takes two thirds in eights."""
    config, width = backbone.config, backbone.width
    if not config.swiglu:
        return config.mlp_width // width if config.mlp_width % width == 0 else None
    return next((r for r in range(1, 17) if (int(width * r * 2 / 3) + 7) // 8 * 8 == config.mlp_width), None)


def transformers_preprocessor(backbone: ViT) -> dict[str, Any]:
    height, width = backbone.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(backbone.config.mean),
        "image_std": list(backbone.config.std),
    }


def read_back_by_transformers(
    backbone: ViT, folder: Path, outputs: Callable[[Path, ViT, Tensor], tuple[Tensor, ...]]
) -> str:
    """How close class token and patches are to those that `outputs` has of the folder by transformers, or without it to
    our own reading of it: the end of a sentence."""
    from sslvit.weights.foreign.open import load_foreign

    images = sample(backbone, backbone.image_size)
    if find_spec("transformers"):
        reader, theirs = "transformers", outputs(folder, backbone, images)
    else:
        reader, theirs = "sslvit, without transformers", tuple(load_foreign(folder)[0](images)[:2])
    worst = compare(tuple(backbone(images)[:2]), theirs, CLOSE, "what transformers would open")
    return f"{worst:.0e}, by {reader}"


def outputs_of_transformers(folder: Path, backbone: ViT, images: Tensor) -> tuple[Tensor, Tensor]:
    dino = backbone.registers or backbone.config.swiglu or backbone.position == "rope"
    peer = opened_by_transformers(folder, **{} if dino else {"add_pooling_layer": False})
    tokens = peer(pixel_values=backbone.standardise(images)).last_hidden_state
    return tokens[:, 0], tokens[:, backbone.prefix :]


def opened_by_transformers(folder: Path, **options: Any) -> nn.Module:
    """With all its weights and no others."""
    from transformers import AutoModel
    from transformers.utils import logging

    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    peer, loading = AutoModel.from_pretrained(str(folder), output_loading_info=True, **options)
    if progress:
        logging.enable_progress_bar()
    if left := [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loading[kind]]:
        raise DataError(f"transformers does not find its weights: {sorted(left)[:5]}: not written")
    return peer.eval()


def as_torchvision(backbone: ViT | BiT, about: dict[str, Any], folder: Path) -> str:
    from torchvision.models.vision_transformer import VisionTransformer

    backbone = only_vit(backbone, "torchvision")
    config, (height, width), (p, q) = backbone.config, backbone.image_size, backbone.patch_size
    lacks = {
        "registers": backbone.registers > 0,
        "rotary positions": backbone.position == "rope",
        "SwiGLU": config.swiglu,
        "GELU by tanh": config.gelu != "exact",
        "oblong images": height != width or p != q,
        "images of other than three channels": backbone.channels != 3,
        "other epsilon": config.epsilon != EPSILON,
    }
    refuse(backbone, "torchvision", common(backbone) | lacks)
    weights = plain(backbone, fold_scale=True)
    for i in range(backbone.depth):
        weights.setdefault(f"blocks.{i}.attn.qkv.bias", torch.zeros(3 * backbone.width))
    write_weights(folder / "model.safetensors", weights, TORCHVISION)
    arguments = {
        "image_size": height,
        "patch_size": p,
        "num_layers": backbone.depth,
        "num_heads": backbone.heads,
        "hidden_dim": backbone.width,
        "mlp_dim": config.mlp_width,
    }
    constants = {"mean": list(config.mean), "std": list(config.std), READOUT: about["readout"]}
    sealed.write(folder / "torchvision.json", {"VisionTransformer": arguments} | constants)

    peer = VisionTransformer(**arguments)
    peer.heads = nn.Identity()
    peer.load_state_dict(load_file(folder / "model.safetensors"))
    peer.eval()
    images = sample(backbone, backbone.image_size)
    x = peer._process_input(backbone.standardise(images))
    tokens = peer.encoder(torch.cat([peer.class_token.expand(len(x), -1, -1), x], 1))
    worst = compare(tuple(backbone(images)), (tokens[:, 0], tokens[:, 1:]), CLOSE, "what torchvision would open")
    return (
        "{out} is in torchvision's layout: VisionTransformer(**arguments of torchvision.json), its heads an Identity, "
        f"and load_state_dict of model.safetensors. It computes the same to {worst:.0e}, of images that the caller "
        f"standardises. The readout to use is {about['readout']}."
    )
