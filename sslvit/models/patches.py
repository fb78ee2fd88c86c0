"""Images as patches, and patches as tokens."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sslvit.models.resnet import HybridStem


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """The pixels of each patch in MAE's order: `b c (h p) (w q) -> b (h w) (p q c)`."""
    p, q = patch_size
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=q)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """`b (h w) (p q c) -> b c (h p) (w q)`."""
    (h, w), (p, q) = grid, patch_size
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=q)


class PatchEmbed(nn.Module):
    """Patches of the image, or of a ResNet's feature map, to tokens: `b c H W -> b n d`. patch_size is in pixels."""

    def __init__(self, patch_size: tuple[int, int], channels: int, width: int, hybrid: str | None, seed: int) -> None:
        super().__init__()
        self.backbone = nn.Identity()
        if hybrid is not None:
            self.backbone = HybridStem(hybrid, channels, seed)
            channels, stride = self.backbone.width, self.backbone.stride
            if patch_size[0] % stride or patch_size[1] % stride:
                raise ValueError(
                    f"patch_size {patch_size} is not a multiple of {stride}, the stride of hybrid {hybrid!r}"
                )
            patch_size = (patch_size[0] // stride, patch_size[1] // stride)
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        p, q = self.proj.kernel_size
        # A convolution whose patches do not overlap is one matrix product, and faster as one.
        patches = rearrange(self.backbone(images), "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)
        return F.linear(patches, rearrange(self.proj.weight, "d c p q -> d (c p q)"), self.proj.bias)
