"""A ViT's weights in transformers' and torchvision's own layouts, read back by their libraries.

What a layout has no place for is folded into weights that it has, which changes no output, or refused: LayerScale goes
into the layers before it, registers' positions into the registers.
"""

import re
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
from sslvit.weights.exports.checks import CLOSE, compare, elsewhere, refuse, sample, write_json
from sslvit.weights.folder import TIMM_OPENS, config_of, load_backbone, load_classifier, write_model

READOUT = "sslvit_readout"  # in a config.json of transformers, which keeps what it does not know
TRANSFORMERS = (
    (r"^(cls_token|reg_token|mask_token)$", r"embeddings.\1"),
    (r"^embeddings\.reg_token$", "embeddings.register_tokens"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.(query|key|value)\.", r".attention.attention.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"^norm\.", "layernorm."),
)
ITS_VIT = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
ITS_DINOV2 = ((r"\.ls([12])\.gamma", r".layer_scale\1.lambda1"),)
TORCHVISION = (
    (r"^cls_token$", "class_token"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"^norm\.", "encoder.ln."),
)


def common(backbone: ViT) -> dict[str, bool]:
    """What neither of the two has."""
    config = backbone.config
    return {
        "models without a class token": not config.class_token,
        "hybrid stems": config.hybrid is not None,
        "positions in the blocks": config.position == "relative" or config.position_at != "stem",
        "models without a final norm": not config.final_norm,
    }


def only_vit(backbone: ViT | BiT, layout: str) -> ViT:
    if isinstance(backbone, ViT):
        return backbone
    raise ValueError(f"{layout} has no such ResNets, which this {backbone.name} needs")


def plain(backbone: ViT, *, fold_scale: bool) -> dict[str, Tensor]:
    """The weights by timm's names, positions as one table of the class token and the patches."""
    weights = {name: tensor.float() for name, tensor in backbone.state_dict().items() if "pos_embed" not in name}
    count = backbone.grid[0] * backbone.grid[1]
    if backbone.position == "none":
        before, table = torch.zeros(1, 0, backbone.width), torch.zeros(1, count, backbone.width)
    else:
        before, table = backbone._positions(backbone.grid)
    if not before.shape[1]:
        before = torch.zeros(1, backbone.prefix, backbone.width)
    first = backbone.prefix - backbone.registers
    if backbone.registers:
        weights["reg_token"] = weights["reg_token"] + before[:, first:]
    weights["pos_embed"] = torch.cat([before[:, :first], table], 1)
    for i in range(backbone.depth) if fold_scale and backbone.config.layer_scale is not None else ():
        for scale, layer in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
            gamma = weights.pop(f"blocks.{i}.{scale}")
            weights[f"blocks.{i}.{layer}.weight"] = gamma[:, None] * weights[f"blocks.{i}.{layer}.weight"]
            weights[f"blocks.{i}.{layer}.bias"] = gamma * weights[f"blocks.{i}.{layer}.bias"]
    return {name: tensor.detach().contiguous() for name, tensor in weights.items()}


def renamed(weights: dict[str, Tensor], *rules: tuple[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in weights.items():
        for old, new in rules:
            name = re.sub(old, new, name)
        found[name] = tensor
    return found


def as_transformers(backbone: ViT | BiT, readout: str, folder: Path, any_size: bool) -> str:
    backbone = only_vit(backbone, "transformers")
    config, registers, hidden = backbone.config, backbone.registers, backbone.config.mlp_width
    lacks = {"MLP beside registers that is no multiple of the width": registers > 0 and hidden % backbone.width > 0}
    refuse(backbone, "transformers", common(backbone) | lacks)
    weights = plain(backbone, fold_scale=not registers)
    for i in range(backbone.depth):
        for kind in ("weight", "bias"):
            if (joined := weights.pop(f"blocks.{i}.attn.qkv.{kind}", None)) is not None:
                for part, tensor in zip(("query", "key", "value"), joined.chunk(3), strict=True):
                    weights[f"blocks.{i}.attn.{part}.{kind}"] = tensor.contiguous()
        if registers and config.layer_scale is None:
            weights |= {f"blocks.{i}.ls{n}.gamma": torch.ones(backbone.width) for n in (1, 2)}
    size = list(backbone.image_size)
    described: dict[str, Any] = {
        "hidden_size": backbone.width,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.heads,
        "hidden_act": "gelu" if config.gelu == "exact" else "gelu_pytorch_tanh",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.epsilon,
        "image_size": size[0] if size[0] == size[1] else size,
        "patch_size": backbone.patch_size[0] if len(set(backbone.patch_size)) == 1 else list(backbone.patch_size),
        "num_channels": backbone.channels,
        "qkv_bias": config.qkv_bias,
        READOUT: readout,
    }
    if registers:
        weights["mask_token"] = torch.zeros(1, backbone.width)
        described |= {"model_type": "dinov2_with_registers", "architectures": ["Dinov2WithRegistersModel"]}
        described |= {"num_register_tokens": registers, "mlp_ratio": hidden // backbone.width, "layerscale_value": 1.0}
        names = renamed(weights, *TRANSFORMERS, *ITS_DINOV2)
    else:
        described |= {"model_type": "vit", "architectures": ["ViTModel"], "intermediate_size": hidden}
        names = renamed(weights, *TRANSFORMERS, *ITS_VIT)
    durable.write(folder / "model.safetensors", durable.tensor_pieces(names))
    write_json(folder / "config.json", described)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": size[0], "width": size[1]},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(config.mean),
            "image_std": list(config.std),
        },
    )
    images = sample(backbone, backbone.image_size)
    expected, who = backbone(images), "our reader of transformers' layout, which is not installed"
    if find_spec("transformers"):
        from transformers import AutoModel
        from transformers.utils import logging

        who, progress = "transformers", logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        pooler = {} if registers else {"add_pooling_layer": False}
        peer, loading = AutoModel.from_pretrained(str(folder), output_loading_info=True, **pooler)
        if progress:
            logging.enable_progress_bar()
        if left := [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loading[kind]]:
            raise DataError(f"transformers does not find its weights: {sorted(left)[:5]}: not written")
        tokens = peer.eval()(pixel_values=backbone.standardise(images)).last_hidden_state
        found = tokens[:, 0], tokens[:, backbone.prefix :]
    else:
        from sslvit.weights.foreign.open import load_foreign

        found = load_foreign(folder, mean=config.mean, std=config.std)[0](images)
    worst = compare(tuple(expected), tuple(found), CLOSE, "what transformers would open")
    return (
        f"{{out}} is in transformers' layout ({described['model_type']}): AutoModel.from_pretrained('{{out}}'). It "
        f"computes the same to {worst:.0e}, by {who}. Its preprocessor standardises; the readout to use is {readout}."
        f"{elsewhere(backbone, 'transformers', 'bicubic_plain')}"
    )


def as_timm(model: ViT | BiT | Classifier, about: dict[str, Any], folder: Path) -> str:
    """A model folder of ours, which timm opens where it has words for this model."""
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
    tokens = peer.forward_features(standardised)
    expected, found = backbone(images).patches, tokens[:, backbone.prefix :]
    pairs = [(expected, found)] + [(backbone(images).cls, tokens[:, 0])] * ("cls" in backbone.readouts)
    pairs += [(model(images), peer(standardised))] if head else []
    ours, theirs = zip(*pairs, strict=True)
    worst = compare(ours, theirs, CLOSE, "what timm would open")
    return f"{opens} computes the same to {worst:.0e}.{elsewhere(backbone, 'timm', 'bicubic')}"


def as_torchvision(backbone: ViT | BiT, readout: str, folder: Path, any_size: bool) -> str:
    from torchvision.models.vision_transformer import VisionTransformer

    backbone = only_vit(backbone, "torchvision")
    config, oblong = backbone.config, len({*backbone.image_size}) + len({*backbone.patch_size}) > 2
    lacks = {"registers": backbone.registers > 0, "GELU by tanh": config.gelu != "exact", "oblong images": oblong}
    lacks |= {"images but of three channels": backbone.channels != 3, "other epsilon": config.epsilon != EPSILON}
    refuse(backbone, "torchvision", common(backbone) | lacks)
    weights = plain(backbone, fold_scale=True)
    for i in range(backbone.depth):
        weights.setdefault(f"blocks.{i}.attn.qkv.bias", torch.zeros(3 * backbone.width))
    names = renamed(weights, *TORCHVISION)
    arguments = {
        "image_size": backbone.image_size[0],
        "patch_size": backbone.patch_size[0],
        "num_layers": backbone.depth,
        "num_heads": backbone.heads,
        "hidden_dim": backbone.width,
        "mlp_dim": config.mlp_width,
    }
    durable.write(folder / "model.safetensors", durable.tensor_pieces(names))
    constants = {"mean": list(config.mean), "std": list(config.std), READOUT: readout}
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
        f"standardises. The readout to use is {readout}."
    )
