"""BiT ResNets: group norm and weight-standardised convolutions, no batch statistics.

Two different networks have this name:

v1  post-activation bottlenecks, the convolutional part of the ViT hybrids (https://arxiv.org/abs/2010.11929, code in
    google-research/vision_transformer). Convolutions are divided by std + 1e-5, group norm has eps 1e-6 (flax's
    default), padding is TensorFlow's SAME, the last scale of every block starts at zero.
v2  pre-activation bottlenecks, Big Transfer (https://arxiv.org/abs/1912.11370, code in google-research/big_transfer).
    Convolutions are divided by sqrt(variance + 1e-10), group norm has eps 1e-5, padding is symmetric, the max pool is
    padded with zeros although its input has negative values (big_vision's port pads with -inf), and a last group
    norm with ReLU ends the network.

Parameter names are timm's. Its epsilons are others, for both 1e-8 under the square root and 1e-5 in group norm, which
changes outputs of v1 by about 1e-4 of their spread. We follow Google, or timm (epsilons="timm") with weights of timm.

Two roots: "7x7" (stride 2, then a 3x3 max pool: stride 4) as in the papers, and "3x3" (stride 1, no pool) with three
stages as for CIFAR in https://arxiv.org/abs/1603.05027, because 28 to 64 pixels do not survive a stride of 32.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sslvit.models.init import lecun_normal
from sslvit.models.positions import to_pair
from sslvit.models.readout import Encoded

Version = Literal["v1", "v2"]
Root = Literal["7x7", "3x3"]
Epsilons = Literal["google", "timm"]

BLOCKS = {
    # Three stages behind the 3x3 root, total stride 4: for small images.
    11: (1, 1, 1),
    20: (2, 2, 2),
    29: (3, 3, 3),
    # Four stages behind the 7x7 root, total stride 32.
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
# In front of hybrid ViTs: "R50" moves its fourth stage's blocks to the third, for B/16 and L/16; "R" is the root alone.
STEMS = {"R": (), "R26": (2, 2, 2, 2), "R50": (3, 4, 9), "R50-4stage": (3, 4, 6, 3)}


def pad_same(images: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's SAME with zeros: ceil(H / stride) outputs, and the odd pixel goes right and below."""
    height, width = (max(kernel - (n % stride or stride), 0) for n in images.shape[-2:])
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))


class StandardizedConv(nn.Conv2d):
    """A convolution without bias whose filters have mean 0 and (biased) variance 1, https://arxiv.org/abs/1903.10520."""

    def __init__(self, version: Version, channels: int, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, width, kernel, stride, padding=kernel // 2 if version == "v2" else 0, bias=False)
        self.version, self.timm = version, False

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        if self.timm:
            deviation = (variance + 1e-8).sqrt()
        else:
            deviation = variance.sqrt() + 1e-5 if self.version == "v1" else (variance + 1e-10).sqrt()
        if self.version == "v1":
            x = pad_same(x, self.kernel_size[0], self.stride[0])
        return F.conv2d(x, (self.weight - mean) / deviation, stride=self.stride, padding=self.padding)


class Norm(nn.GroupNorm):
    def __init__(self, version: Version, width: int) -> None:
        super().__init__(32, width, eps=1e-6 if version == "v1" else 1e-5)


class NormReLU(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Pool(nn.Module):
    """The root's 3x3 max pool of stride 2. v1's input is not negative, so that padding with zeros acts as -inf."""

    def __init__(self, version: Version) -> None:
        super().__init__()
        self.version = version

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(pad_same(x, 3, 2) if self.version == "v1" else F.pad(x, (1, 1, 1, 1)), 3, 2)


class PostActivationBottleneck(nn.Module):
    """v1: conv, norm, ReLU, three times, the last ReLU after the shortcut is added."""

    def __init__(self, channels: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = StandardizedConv("v1", channels, width, 1)
        self.norm1 = NormReLU("v1", width)
        self.conv2 = StandardizedConv("v1", width, width, 3, stride)
        self.norm2 = NormReLU("v1", width)
        self.conv3 = StandardizedConv("v1", width, 4 * width, 1)
        self.norm3 = Norm("v1", 4 * width)
        projection = {"conv": StandardizedConv("v1", channels, 4 * width, 1, stride), "norm": Norm("v1", 4 * width)}
        self.downsample = nn.Sequential(OrderedDict(projection)) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return F.relu(self.downsample(x) + self.norm3(self.conv3(residual)))


class PreActivationBottleneck(nn.Module):
    """v2: norm, ReLU, conv, three times; a projected shortcut starts after the first ReLU, an identity before it."""

    def __init__(self, channels: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.norm1 = NormReLU("v2", channels)
        self.conv1 = StandardizedConv("v2", channels, width, 1)
        self.norm2 = NormReLU("v2", width)
        self.conv2 = StandardizedConv("v2", width, width, 3, stride)
        self.norm3 = NormReLU("v2", width)
        self.conv3 = StandardizedConv("v2", width, 4 * width, 1)
        projection = {"conv": StandardizedConv("v2", channels, 4 * width, 1, stride)}
        self.downsample = nn.Sequential(OrderedDict(projection)) if project else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(activated)
        return shortcut + self.conv3(self.norm3(self.conv2(self.norm2(self.conv1(activated)))))


def build_root(version: Version, kind: Root, channels: int, width: int) -> nn.Sequential:
    """The first convolution, its norm (v2 leaves that to the first block) and, after a 7x7, the pool."""
    kernel, stride = (7, 2) if kind == "7x7" else (3, 1)
    layers: dict[str, nn.Module] = {"conv": StandardizedConv(version, channels, width, kernel, stride)}
    if version == "v1":
        layers["norm"] = NormReLU(version, width)
    if kind == "7x7":
        layers["pool"] = Pool(version)
    return nn.Sequential(OrderedDict(layers))


def build_stages(version: Version, blocks: Sequence[int], width: int) -> nn.Sequential:
    """`blocks[i]` bottlenecks of inner width `width * 2**i`; all stages but the first start with stride 2."""
    bottleneck = PostActivationBottleneck if version == "v1" else PreActivationBottleneck
    result, channels = nn.Sequential(), width
    for i, count in enumerate(blocks):
        stage = nn.Sequential()
        for j in range(count):
            stage.append(bottleneck(channels, width * 2**i, 2 if i and not j else 1, project=not j))
            channels = 4 * width * 2**i
        result.append(nn.Sequential(OrderedDict(blocks=stage)))
    return result


def set_epsilons(network: nn.Module, epsilons: Epsilons) -> None:
    for module in network.modules() if epsilons == "timm" else ():
        if isinstance(module, StandardizedConv):
            module.timm = True
        elif isinstance(module, Norm):
            module.eps = 1e-5


@torch.no_grad()
def initialize(network: nn.Module, seed: int) -> None:
    """flax's defaults, from a seed: LeCun normal kernels, scales 1, shifts 0; but the last scale of a v1 block is 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, StandardizedConv):
            lecun_normal(module.weight, generator)
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for module in network.modules():  # a block comes before its layers, hence a second round
        if isinstance(module, PostActivationBottleneck):
            nn.init.zeros_(module.norm3.weight)


class HybridStem(nn.Sequential):
    """The v1 network in front of a hybrid ViT's patch embedding: `b c H W -> b width h w`, h = ceil(H / stride)."""

    def __init__(self, kind: str, channels: int, seed: int = 0) -> None:
        if kind not in STEMS:
            raise ValueError(f"hybrid must be one of {tuple(STEMS)}, got {kind!r}")
        blocks = STEMS[kind]
        with torch.random.fork_rng(devices=[]):  # torch's layers draw from the global generator when they are built
            stem = build_root("v1", "7x7", channels, 64)
            # As in timm, whose names these are, the root is nested only where stages follow it.
            layers = {"stem": stem, "stages": build_stages("v1", blocks, 64)} if blocks else dict(stem.named_children())
        super().__init__(OrderedDict(layers))
        self.stride = 2 ** (len(blocks) + 1) if blocks else 4
        self.width = 128 * 2 ** len(blocks) if blocks else 64
        initialize(self, seed)


@dataclass(frozen=True, kw_only=True)
class BiTConfig:
    """All that `BiT(config)` needs."""

    image_size: int | tuple[int, int]
    """Sets `grid`; images of any size are accepted."""
    blocks: tuple[int, ...]
    """The number in each stage."""
    version: Version = "v2"
    width_factor: float = 1
    """The N of R50xN: all widths times N."""
    root: Root = "7x7"
    channels: int = 3
    seed: int = 0
    mean: tuple[float, ...] = ()
    """Images in [0, 1] are standardised with mean and std: by default 0.5, as in BiT."""
    std: tuple[float, ...] = ()
    epsilons: Epsilons = "google"

    def __post_init__(self) -> None:
        half = (0.5,) * self.channels
        settled = {
            "image_size": to_pair(self.image_size),
            "blocks": tuple(self.blocks),
            "mean": tuple(self.mean or half),
            "std": tuple(self.std or half),
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        for name, choices in (("version", Version), ("root", Root), ("epsilons", Epsilons)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")
        if not self.blocks or min(self.blocks) < 1:
            raise ValueError(f"blocks {self.blocks} must have at least one stage, and at least one block in each")
        base = 64 * self.width_factor
        if base < 32 or base % 32:
            raise ValueError(f"width_factor {self.width_factor} gives {base:g} channels, not a multiple of 32")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean {self.mean} and std {self.std} must have {self.channels} values, one per channel")


class BiT(nn.Module):
    """A BiT ResNet as a backbone of its own. Its readout, the mean, is the papers' global average pool.

    >>> import sslvit, torch
    >>> bit = sslvit.BiT.variant("R20x0.5", image_size=16)  # or R50x1, ...
    >>> bit(torch.rand(2, 3, 16, 16)).patches.mean(1).shape
    torch.Size([2, 512])
    """

    Config = BiTConfig
    declared: str = ""  # as of a ViT
    readouts = ("mean",)

    def __init__(self, config: BiTConfig) -> None:
        super().__init__()
        self.config = config
        for name, values in (("mean", config.mean), ("std", config.std)):
            # Not persistent: the config has them, and timm's weights have no such names.
            self.register_buffer(name, rearrange(torch.tensor(values), "c -> c 1 1"), persistent=False)
        version, blocks, base = config.version, config.blocks, int(64 * config.width_factor)
        with torch.random.fork_rng(devices=[]):
            self.stem = build_root(version, config.root, config.channels, base)
            self.stages = build_stages(version, blocks, base)
            self.width = 4 * base * 2 ** (len(blocks) - 1)
            self.norm = NormReLU("v2", self.width) if version == "v2" else nn.Identity()
        self.channels, self.grad_checkpointing = config.channels, False
        self.image_size = to_pair(config.image_size)
        self.stride = (4 if config.root == "7x7" else 1) * 2 ** (len(blocks) - 1)
        self.grid = tuple(math.ceil(n / self.stride) for n in self.image_size)
        set_epsilons(self, config.epsilons)
        initialize(self, config.seed)

    @classmethod
    def variant(cls, name: str, *, image_size: int | Sequence[int], **changes: Any) -> "BiT":
        """By the papers' names: "R50x1" has 50 layers, width factor 1 and is v2; "R50x1-v1" is its v1."""
        match = re.fullmatch(r"R(\d+)x(\d+(?:\.\d+)?)(-v1)?", name)
        if match is None or int(match[1]) not in BLOCKS:
            depths = ", ".join(f"R{depth}" for depth in BLOCKS)
            raise ValueError(f"no model {name!r}: it must be like R50x1, R20x0.5 or R50x1-v1, with one of {depths}")
        blocks = BLOCKS[int(match[1])]
        options: dict[str, Any] = {
            "version": "v1" if match[3] else "v2",
            "blocks": blocks,
            "width_factor": float(match[2]),
            "root": "3x3" if len(blocks) == 3 else "7x7",
        }
        return cls(BiTConfig(image_size=to_pair(image_size), **(options | changes)))

    @property
    def name(self) -> str:
        """The argument of `variant`."""
        blocks = self.config.blocks
        layers = next((layers for layers, known in BLOCKS.items() if known == blocks), blocks)
        return f"R{layers}x{self.config.width_factor:g}" + ("-v1" if self.config.version == "v1" else "")

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage.blocks]

    def features(self, images: Tensor) -> Tensor:
        """The map that is pooled: `b c H W -> b width h w`."""
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images of shape {tuple(images.shape)} are not b {self.channels} H W")
        x = self.stem((images - self.mean) / self.std)
        for block in self.blocks:
            again = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return self.norm(x)

    def forward(self, images: Tensor, key: Tensor | None = None) -> Encoded:
        """`b c H W` in [0, 1] -> patches `b (h w) width`. The key is for a ViT's drop path; nothing is random here."""
        return Encoded(cls=None, patches=rearrange(self.features(images), "b d h w -> b (h w) d"))
