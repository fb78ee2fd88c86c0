"""The configuration of a ViT, and the names that papers gave to some of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sslvit.models.blocks import EPSILON, Gelu
from sslvit.models.init import Init
from sslvit.models.positions import Grid, Position, PositionAt, PositionResize, to_pair
from sslvit.models.resnet import Epsilons

# Width, depth, heads, width of the MLP: the ViT paper's, its code's and big_vision's; S-moco_v3 is MoCo v3's.
VARIANTS = {
    "mu": (32, 1, 2, 128),
    "XS": (128, 6, 4, 512),  # ours: 1.2 million parameters, for images of 28 to 64 pixels and small machines
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "S-moco_v3": (384, 12, 12, 1536),
    "M": (512, 12, 8, 2048),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
    "So400m": (1152, 27, 16, 4304),
    "g": (1408, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
}
# ResNet, transformer, pixels of a patch. R+Ti/16 is so called officially, but 8x8 patches behind a stride of 4 are 32.
HYBRIDS = {
    "R50+B/16": ("R50", "B", 16),
    "R50+L/16": ("R50", "L", 16),
    "R50+B/32": ("R50-4stage", "B", 32),
    "R50+L/32": ("R50-4stage", "L", 32),
    "R26+S/32": ("R26", "S", 32),
    "R26+B/32": ("R26", "B", 32),
    "R+Ti/16": ("R", "Ti", 32),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHOICES = {
    "position": Position,
    "position_at": PositionAt,
    "position_resize": PositionResize,
    "gelu": Gelu,
    "init": Init,
    "hybrid_epsilons": Epsilons,
}


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """All that `ViT(config)` needs. For a changed copy: `ViT(dataclasses.replace(vit.config, drop_path=0.1))`."""

    image_size: int | tuple[int, int]
    """One side, or height and width, which it becomes; so does patch_size."""
    patch_size: int | tuple[int, int]
    width: int
    depth: int
    heads: int
    mlp_width: int = 0
    """0 is 4 times the width."""
    channels: int = 3
    class_token: bool = True
    registers: int = 0
    position: Position = "learned_1d"
    position_at: PositionAt = "stem"
    position_resize: PositionResize = "bicubic"
    class_position: bool = True
    """The class token and the registers have positions too, as in the ViT paper; in big_vision not."""
    gelu: Gelu = "exact"
    qkv_bias: bool = True
    layer_scale: float | None = None
    drop_path: float = 0.0
    """The rate of the last block, to which it grows linearly from 0 at the first."""
    dropout: float = 0.0
    init: Init = "timm"
    seed: int = 0
    mean: tuple[float, ...] = ()
    """Images in [0, 1] are standardised with mean and std: by default ImageNet's for three channels, else 0.5."""
    std: tuple[float, ...] = ()
    hybrid: str | None = None
    """A ResNet (R50, R50-4stage, R26, R) whose features are embedded, not pixels; patch_size stays in pixels."""
    hybrid_epsilons: Epsilons = "google"
    """Of the ResNet's norms and convolutions, see sslvit.models.resnet."""
    final_norm: bool = True
    """A norm after the last block. Fine-tuned classifiers of the mean patch norm the mean instead."""
    epsilon: float = EPSILON
    """Of every LayerNorm. 1e-6 in the papers' code, but 1e-12 in transformers' ViT, DeiT and MAE."""

    def __post_init__(self) -> None:
        rgb = self.channels == 3
        settled: dict[str, Any] = {
            "image_size": to_pair(self.image_size),
            "patch_size": to_pair(self.patch_size),
            "mlp_width": self.mlp_width or 4 * self.width,
            "mean": tuple(self.mean or (IMAGENET_MEAN if rgb else (0.5,) * self.channels)),
            "std": tuple(self.std or (IMAGENET_STD if rgb else (0.5,) * self.channels)),
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if not (0 <= self.drop_path < 1 and 0 <= self.dropout < 1):
            raise ValueError(f"drop_path {self.drop_path} and dropout {self.dropout} must lie in [0, 1)")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean {self.mean} and std {self.std} must have {self.channels} values, one per channel")
        self.grid_of(*settled["image_size"])

    @property
    def grid(self) -> Grid:
        """Height and width of an image of image_size in patches."""
        return self.grid_of(*to_pair(self.image_size))

    def grid_of(self, height: int, width: int) -> Grid:
        p, q = to_pair(self.patch_size)
        if height < p or width < q or height % p or width % q:
            size, patch = (" ".join(map(str, dict.fromkeys(pair))) for pair in ((height, width), (p, q)))
            raise ValueError(f"image_size {size} is not a multiple of patch_size {patch}")
        return height // p, width // q

    @property
    def name(self) -> str:
        """The argument of `variant`, or the sizes in words."""
        shape = (self.width, self.depth, self.heads, self.mlp_width)
        size = next((name for name, sizes in VARIANTS.items() if sizes == shape), None)
        height, width = to_pair(self.patch_size)
        patch = height if height == width else f"{height}x{width}"
        if size is None or height != width:
            return f"ViT of width {self.width}, depth {self.depth}, heads {self.heads}, patches of {patch}"
        official = (name for name, choices in HYBRIDS.items() if choices == (self.hybrid, size, patch))
        return next(official, f"{self.hybrid}+{size}/{patch}" if self.hybrid else f"{size}/{patch}")


def variant(name: str, *, image_size: int | Sequence[int], **changes: Any) -> ViTConfig:
    """By the papers' names: "S/16", "R50+B/16"; other hybrids by stem, width and patch size in pixels: "R+XS/8"."""
    stem, _, rest = name.rpartition("+")
    size, _, patch_text = rest.rpartition("/")
    hybrid, size, patch_size = HYBRIDS.get(name, (stem or None, size, patch_text))
    if size not in VARIANTS or not str(patch_size).isdecimal() or int(patch_size) == 0:
        raise ValueError(
            f"no model {name!r}: it must be a width and a patch size, as S/16, with one of the widths "
            f"{', '.join(VARIANTS)}; or a hybrid, as {', '.join(HYBRIDS)}"
        )
    width, depth, heads, mlp_width = VARIANTS[size]
    options = {"patch_size": int(patch_size), "width": width, "depth": depth, "heads": heads, "hybrid": hybrid}
    if "width" not in changes:  # another width has an MLP of its own
        options["mlp_width"] = mlp_width
    return ViTConfig(image_size=to_pair(image_size), **(options | changes))
