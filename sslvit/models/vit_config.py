"""The configuration of a ViT, and the names that papers gave to some of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sslvit.models.blocks import EPSILON, Gelu, swiglu_width
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
# Releases of Meta, whose architectures are more than sizes.
_DINOV2 = {"patch_size": 14, "layer_scale": 1e-5, "position_resize": "bicubic_offset"}
_DINOV2_REG = _DINOV2 | {"registers": 4, "class_position": False, "position_resize": "bicubic"}
_DINOV3: dict[str, Any] = {
    "patch_size": 16, "layer_scale": 1e-5, "registers": 4, "position": "rope", "position_at": "every_layer_shared",
    "rope_rescale": 2.0, "key_bias": False, "epsilon": 1e-5, "init": "dino",
}  # fmt: skip
_SIZES: dict[str, dict[str, Any]] = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
}
_GIANT = {"width": 1536, "depth": 40, "heads": 24, "swiglu": True}
RELEASES: dict[str, dict[str, Any]] = {
    **{f"DINOv2-{size}/14": _DINOV2 | sizes for size, sizes in (_SIZES | {"g": _GIANT}).items()},
    **{f"DINOv2-{size}/14-reg": _DINOV2_REG | sizes for size, sizes in (_SIZES | {"g": _GIANT}).items()},
    **{f"DINOv3-{size}/16": _DINOV3 | sizes for size, sizes in _SIZES.items()},
    "DINOv3-S+/16": _DINOV3 | _SIZES["S"] | {"swiglu": True, "mlp_width": 1536},
    "DINOv3-H+/16": _DINOV3 | {"width": 1280, "depth": 32, "heads": 20, "swiglu": True, "mlp_width": 5120},
    "DINOv3-7B/16": _DINOV3
    | {"width": 4096, "depth": 40, "heads": 32, "swiglu": True, "mlp_width": 8192, "qkv_bias": False},
}
# The attention of BEiT, SimMIM and data2vec while they pretrain.
SHARED_BIAS: dict[str, Any] = {
    "position": "relative_bias", "position_at": "every_layer_shared", "position_resize": "geometric", "key_bias": False,
}  # fmt: skip
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
    """0 is 4 times the width, with swiglu DINOv2's rule."""
    channels: int = 3
    class_token: bool = True
    registers: int = 0
    position: Position = "learned_1d"
    position_at: PositionAt = "stem"
    position_resize: PositionResize = "bicubic"
    class_position: bool = True
    """The class token and the registers have positions too, as in the ViT paper; in big_vision not."""
    gelu: Gelu = "exact"
    swiglu: bool = False
    """A gated MLP instead of one with GELU, as in DINOv2's g and DINOv3's S+, H+ and 7B."""
    qkv_bias: bool = True
    key_bias: bool = True
    """False masks the keys' part of qkv_bias to zero, as in DINOv3 and BEiT."""
    rope_base: float = 100.0
    """Of position rope, see sslvit.models.rope."""
    rope_periods: tuple[float, ...] = ()
    """Instead of those that follow from the base: DINOv3's files hold them, rounded."""
    rope_shift: float = 0.0
    """Training moves rotary positions: up to this far, of an image of side 2, and by up to these factors."""
    rope_jitter: float = 1.0
    rope_rescale: float = 1.0
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
    stem_norm: bool = False
    """A norm of all tokens before the first block, as in CLIP."""
    final_norm: bool = True
    """A norm after the last block. Fine-tuned classifiers of the mean patch norm the mean instead."""
    class_norm: bool = False
    """The class token and the registers have a final norm of their own, DINOv3's untied one."""
    epsilon: float = EPSILON
    """Of every LayerNorm. 1e-6 in the papers' code, but 1e-12 in transformers' ViT, DeiT and MAE."""

    def __post_init__(self) -> None:
        rgb = self.channels == 3
        settled: dict[str, Any] = {
            "image_size": to_pair(self.image_size),
            "patch_size": to_pair(self.patch_size),
            "mlp_width": self.mlp_width or (swiglu_width(self.width) if self.swiglu else 4 * self.width),
            "rope_periods": tuple(self.rope_periods),
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
        if self.position == "rope":
            self._check_rope()
        if self.position == "relative_bias" and self.registers:
            raise ValueError(f"position 'relative_bias' has no entries for registers: {self.registers} must be 0")
        if self.position_resize == "geometric" and self.position != "relative_bias":
            raise ValueError(f"position_resize 'geometric' is for 'relative_bias', not for {self.position!r}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean {self.mean} and std {self.std} must have {self.channels} values, one per channel")
        self.grid_of(*settled["image_size"])

    def _check_rope(self) -> None:
        head = self.width // self.heads
        if head % 4 or len(self.rope_periods) not in (0, head // 4):
            raise ValueError(
                f"position 'rope' needs heads whose width is a multiple of 4, and a quarter as many rope_periods or "
                f"none: the width is {head}, the periods are {len(self.rope_periods)}"
            )
        if not (self.rope_base > 0 and all(period > 0 for period in self.rope_periods)):
            raise ValueError(f"rope_base {self.rope_base} and rope_periods {self.rope_periods} must be positive")
        if not (self.rope_shift >= 0 and self.rope_jitter >= 1 and self.rope_rescale >= 1):
            raise ValueError(
                f"rope_shift {self.rope_shift} must be at least 0, rope_jitter {self.rope_jitter} and rope_rescale "
                f"{self.rope_rescale} at least 1"
            )

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
        apart = self.swiglu or self.position == "rope"  # a name of sizes alone would promise another model
        if apart and (release := _release(self)):
            return release
        if size is None or height != width or apart:
            return f"ViT of width {self.width}, depth {self.depth}, heads {self.heads}, patches of {patch}"
        official = (name for name, choices in HYBRIDS.items() if choices == (self.hybrid, size, patch))
        return next(official, f"{self.hybrid}+{size}/{patch}" if self.hybrid else f"{size}/{patch}")


def _release(config: ViTConfig) -> str | None:
    """The name of a release of this architecture."""
    fields = ("patch_size", "width", "depth", "heads", "mlp_width", "swiglu", "registers", "position")
    for name, options in RELEASES.items():
        other = ViTConfig(image_size=options["patch_size"], **options)
        if all(getattr(config, field) == getattr(other, field) for field in fields):
            return name
    return None


def variant(name: str, *, image_size: int | Sequence[int], **changes: Any) -> ViTConfig:
    """By the papers' names: "S/16", "R50+B/16"; other hybrids by stem, width and patch size in pixels: "R+XS/8"; or a
    release, "DINOv3-S+/16", "DINOv2-g/14-reg"."""
    if name in RELEASES:
        options = RELEASES[name]
        if changes.get("position", options.get("position")) != options.get("position", changes.get("position")):
            raise ValueError(f"{name} has rotary positions: position {changes['position']!r} would be another model")
        resized = "width" in changes  # another width has an MLP of its own
        options = {field: value for field, value in options.items() if not (resized and field == "mlp_width")}
        return ViTConfig(image_size=to_pair(image_size), **(options | changes))
    stem, _, rest = name.rpartition("+")
    size, _, patch_text = rest.rpartition("/")
    hybrid, size, patch_size = HYBRIDS.get(name, (stem or None, size, patch_text))
    if size not in VARIANTS or not str(patch_size).isdecimal() or int(patch_size) == 0:
        raise ValueError(
            f"no model {name!r}: it must be a width and a patch size, as S/16, with one of the widths "
            f"{', '.join(VARIANTS)}; or a hybrid, as {', '.join(HYBRIDS)}; or {', '.join(RELEASES)}"
        )
    width, depth, heads, mlp_width = VARIANTS[size]
    options = {"patch_size": int(patch_size), "width": width, "depth": depth, "heads": heads, "hybrid": hybrid}
    if "width" not in changes:  # another width has an MLP of its own
        options["mlp_width"] = mlp_width
    return ViTConfig(image_size=to_pair(image_size), **(options | changes))
