"""Other libraries' models with random weights, their files, and what ours must compute from them."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sslvit.models.vit import ViT


def scramble(module: nn.Module, kernel_std: float | None = None) -> nn.Module:
    """Weights at random, so that none can be mistaken for another."""
    for name, parameter in module.named_parameters():
        if kernel_std is not None and parameter.ndim == 4 and "patch_embed.proj" not in name:
            nn.init.normal_(parameter, std=kernel_std)
        elif parameter.ndim in (2, 4):
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and name.endswith("weight")), std=0.3)
    return module.eval()


def standardised(images: Tensor, constants: dict[str, Any]) -> Tensor:
    mean, std = (torch.tensor(constants[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std


def assert_computes(backbone: ViT, images: Tensor, tokens: Tensor) -> None:
    """tokens: the other side's, all of them."""
    encoded = backbone(images)
    torch.testing.assert_close(encoded.patches, tokens[:, backbone.prefix :], rtol=0, atol=1e-5)
    if encoded.cls is not None:
        torch.testing.assert_close(encoded.cls, tokens[:, 0], rtol=0, atol=1e-5)


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    safetensors.torch.save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path
