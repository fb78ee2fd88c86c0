"""The Vision Transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929).

An objective works between `embed` and `encode`: it replaces tokens and then adds positions (MPP), or adds positions and
then drops tokens (MAE). Parameter names are timm's, so weights travel both ways; the head is apart, in `Classifier`.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sslvit import rng
from sslvit.models.blocks import EPSILON, Block, Gelu, drop_path, dropout, wide
from sslvit.models.init import Init, initialise
from sslvit.models.patches import PatchEmbed, patchify, unpatchify
from sslvit.models.positions import FIXED, Grid, Position, PositionAt, PositionResize, join_2d, position_tables, resize
from sslvit.models.readout import Classifier, Encoded, Readout, read
from sslvit.models.resnet import Epsilons, set_epsilons

__all__ = ["HYBRIDS", "VARIANTS", "Classifier", "Encoded", "Readout", "ViT", "patchify", "read", "unpatchify"]

Given = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # a block's position, relative, path and key

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
}


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


class ViT(nn.Module):
    """Attributes: width, depth, heads, channels; image_size, patch_size and grid, each (height, width); readouts, those
    it has; prefix, how many tokens come before the patches."""

    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        patch_size: int | Sequence[int],
        width: int,
        depth: int,
        heads: int,
        mlp_width: int | None = None,
        channels: int = 3,
        class_token: bool = True,
        registers: int = 0,
        position: Position = "learned_1d",
        position_at: PositionAt = "stem",
        position_resize: PositionResize = "bicubic",
        class_position: bool = True,
        gelu: Gelu = "exact",
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        init: Init = "timm",
        seed: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        hybrid: str | None = None,
        hybrid_epsilons: Epsilons = "google",
        final_norm: bool = True,
        epsilon: float = EPSILON,
    ) -> None:
        """Sizes are one integer or (height, width); mlp_width is 4 width if not given.

        class_position: the class token and the registers have positions too, as in the ViT paper; in big_vision not.
        drop_path: the rate of the last block, to which it grows linearly from 0 at the first.
        mean, std: what images in [0, 1] are standardised with; ImageNet's for three channels, else .5, if not given.
        final_norm: a norm after the last block. Fine-tuned classifiers of the mean patch norm the mean instead.
        epsilon: of every LayerNorm. 1e-6 in the papers' code, but 1e-12 in transformers' ViT, DeiT and MAE.
        hybrid_epsilons: of the ResNet's norms and convolutions, see sslvit.models.resnet.
        hybrid: a ResNet (R50, R50-4stage, R26, R) whose features are embedded, not pixels; patch_size stays in pixels.
        """
        mlp_width = mlp_width or 4 * width
        mean = mean or (IMAGENET_MEAN if channels == 3 else (0.5,) * channels)
        std = std or (IMAGENET_STD if channels == 3 else (0.5,) * channels)
        # Taken before there are other locals: ViT(**vit.config) rebuilds this model. Lists, since JSON has no tuples.
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
        for name, choices in CHOICES.items():
            if given[name] not in get_args(choices):
                raise ValueError(f"{name} {given[name]!r} is none of {get_args(choices)}")
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        if not (0 <= drop_path < 1 and 0 <= dropout < 1):
            raise ValueError(f"drop_path {drop_path} and dropout {dropout} must lie in [0, 1)")
        if not len(mean) == len(std) == channels:
            raise ValueError(f"mean {mean} and std {std} do not have {channels} values, one a channel")
        self.image_size, self.patch_size = _pair(image_size), _pair(patch_size)
        self.grid = self._grid_of_size(*self.image_size)
        self.width, self.depth, self.heads, self.channels = width, depth, heads, channels
        self.registers, self.prefix = registers, class_token + registers  # the tokens before the patches
        self.prefix_positions = self.prefix if class_position else 0
        self._at_stem = position_at == "stem" and position != "none"
        self.position, self.position_at, self.position_resize = position, position_at, position_resize
        self.drop_path, self.dropout = drop_path, dropout
        self.readouts: tuple[str, ...] = get_args(Readout) if class_token else ("mean",)
        self.grad_checkpointing = False
        # Not persistent: the config has them, and timm's weights have no such names.
        self.register_buffer("mean", rearrange(torch.tensor(mean), "c -> c 1 1"), persistent=False)
        self.register_buffer("std", rearrange(torch.tensor(std), "c -> c 1 1"), persistent=False)
        sizes = {"width": width, "heads": heads, "mlp_width": mlp_width, "prefix": self.prefix}
        options = {"gelu": gelu, "qkv_bias": qkv_bias, "layer_scale": layer_scale, "dropout": dropout}
        with torch.random.fork_rng(devices=[]):  # torch's layers draw from its global generator when they are made
            self.patch_embed = PatchEmbed(self.patch_size, channels, width, hybrid, seed)
            self.blocks = nn.ModuleList(Block(**sizes, **options) for _ in range(depth))
            self.norm = nn.LayerNorm(width, EPSILON) if final_norm else nn.Identity()
        set_epsilons(self.patch_embed, hybrid_epsilons)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = epsilon
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        tables = position_tables(position, position_at, self.grid, width, depth, self.prefix_positions)
        for name, table in tables.items():
            if position in FIXED:
                self.register_buffer(name, table)  # saved, so that timm finds it and fine-tuning may train it
            else:
                self.register_parameter(name, nn.Parameter(table))
        initialise(self, init, seed)

    @classmethod
    def variant(cls, name: str, *, image_size: int | Sequence[int], **changes: Any) -> "ViT":
        """By the papers' names: "S/16", "R50+B/16"; other hybrids by stem, width and patch size in pixels: "R+XS/8"."""
        stem, _, rest = name.rpartition("+")
        size, _, patch_size = rest.rpartition("/")
        hybrid, size, patch_size = HYBRIDS.get(name, (stem or None, size, patch_size))
        if size not in VARIANTS or not str(patch_size).isdecimal() or int(patch_size) == 0:
            raise ValueError(
                f"no variant {name!r}: it is one of {[*VARIANTS]} with /patch_size, or one of {[*HYBRIDS]}"
            )
        sizes = dict(zip(("width", "depth", "heads", "mlp_width"), VARIANTS[size], strict=True))
        if "width" in changes:
            del sizes["mlp_width"]  # another width has its own
        return cls(**({"image_size": image_size, "patch_size": int(patch_size), "hybrid": hybrid} | sizes | changes))

    @property
    def name(self) -> str:
        """What `variant` would be given, or the sizes in words."""
        shape = (self.width, self.depth, self.heads, self.config["mlp_width"])
        size = next((name for name, sizes in VARIANTS.items() if sizes == shape), None)
        height, width = self.patch_size
        patch = height if height == width else f"{height}x{width}"
        if size is None or height != width:
            return f"ViT of width {self.width}, depth {self.depth}, heads {self.heads}, patches of {patch}"
        stem = self.config["hybrid"]
        official = (name for name, parts in HYBRIDS.items() if parts == (stem, size, patch))
        return next(official, f"{stem}+{size}/{patch}" if stem else f"{size}/{patch}")

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | Path, *, revision: str | None = None) -> "ViT":
        """A run's or a model's folder, or OWNER/NAME on the Hugging Face Hub."""
        from sslvit.weights.hub import from_pretrained  # upstairs: only who calls this goes there

        return from_pretrained(folder_or_repo, revision=revision)

    def save_pretrained(self, folder: str | Path, *, readout: str, **about: Any) -> None:
        """As a model folder, which timm opens too. about: what else to say of it."""
        from sslvit.weights.hub import save_pretrained

        save_pretrained(self, folder, readout=readout, **about)

    def push_to_hub(self, repo: str, *, readout: str, private: bool = True, **about: Any) -> str:
        """To OWNER/NAME on the Hugging Face Hub, with a model card; returns its address."""
        from sslvit.weights.hub import push_to_hub, save_pretrained

        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(self, f"{folder}/model", readout=readout, **about)
            return push_to_hub(f"{folder}/model", repo, private=private)

    def resized(self, image_size: int | Sequence[int]) -> "ViT":
        """A copy whose position table is resized for good, so that fine-tuning trains the new one, as in the ViT paper.
        (`forward` takes images of any size, and resizes the table that was trained each time.)"""
        other = ViT(**(self.config | {"image_size": image_size}))
        (h, w), (new_h, new_w) = self.grid, self._check_grid(other.grid, other.grid[0] * other.grid[1])
        state = self.state_dict()
        if self.position == "learned_2d":
            state["pos_embed_x"] = resize(self.pos_embed_x, (1, w), (1, new_w), self.position_resize)
            state["pos_embed_y"] = resize(self.pos_embed_y, (h, 1), (new_h, 1), self.position_resize)
        elif "pos_embed" in state:
            state["pos_embed"] = torch.cat(self._positions(other.grid), 1)
        other.load_state_dict(state)
        return other.to(self.patch_embed.proj.weight).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for the backward pass, which then computes the block again."""
        self.grad_checkpointing = enable

    def grid_of(self, images: Tensor) -> Grid:
        """How many patches high and wide these images are."""
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images of shape {tuple(images.shape)} are not b {self.channels} H W")
        return self._grid_of_size(*images.shape[2:])

    def standardise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def embed(self, images: Tensor) -> Tensor:
        """What each patch holds, not where it is; images in [0, 1]: `b c H W -> b n d`."""
        self.grid_of(images)
        return self.patch_embed(self.standardise(images))

    def add_positions(self, tokens: Tensor, grid: Grid | None = None) -> Tensor:
        """All patches of a grid (the trained one, if not given): `b n d -> b n d`. Positions at every layer are left
        to `encode`."""
        grid = self._check_grid(grid, tokens.shape[1])
        return tokens + self._positions(grid)[1] if self._at_stem else tokens

    def encode(self, tokens: Tensor, grid: Grid | None = None, key: Tensor | None = None) -> Encoded:
        """Tokens that carry their positions, of all patches or of some, `b n d`, through the blocks.

        Positions at every layer need all patches, and their grid if it is not the trained one. Drop path and dropout
        need a key while training, `b`, one a sample.
        """
        return self._named(self._tokens(tokens, grid, key))

    def _tokens(self, tokens: Tensor, grid: Grid | None, key: Tensor | None) -> Tensor:
        x, inputs = self._start(tokens, grid, key)
        for block, given in zip(self.blocks, inputs, strict=True):
            x = self._run(block, x, given)
        return self.norm(x)

    def forward(self, images: Tensor, key: Tensor | None = None) -> Encoded:
        grid = self.grid_of(images)
        return self.encode(self.add_positions(self.embed(images), grid), grid, key)

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens as one sequence, as timm's: class token, registers, patches, `b c H W -> b n d`."""
        grid = self.grid_of(images)
        return self._tokens(self.add_positions(self.embed(images), grid), grid, None)

    def no_weight_decay(self) -> set[str]:
        """Names of the tokens and positions, which timm's optimizers ask for; vectors are spared anyway."""
        looked_up = ("_token", "_embed", "_embed_x", "_embed_y")
        return {name for name, _ in self.named_parameters() if name.endswith(looked_up)}

    def feature_map(self, images: Tensor) -> Tensor:
        """The patches where they lie, for detection and segmentation: `b c H W -> b d h w`."""
        h, _ = self.grid_of(images)
        return rearrange(self(images).patches, "b (h w) d -> b d h w", h=h)

    def freeze(self, blocks: int | None = None) -> "ViT":
        """Only the last so many blocks and the norm after them are trained from here on, or nothing at all."""
        if not 0 <= (blocks or 0) <= self.depth:
            raise ValueError(f"freeze all but the last {blocks} blocks of {self.depth}")
        kept = (*self.blocks[-blocks:], self.norm) if blocks else ()
        still = {id(parameter) for module in kept for parameter in module.parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in still)
        return self

    def intermediate(self, images: Tensor, layers: int | Sequence[int], norm: bool = True) -> list[Encoded]:
        """The outputs of the last so many blocks, or of these (from 0), in order of depth, by default normed."""
        steps = self._steps(images, layers)
        return [self._named(self.norm(after) if norm else after) for _, _, _, after in steps]

    def attention(self, images: Tensor, layers: int | Sequence[int]) -> list[Tensor]:
        """The probabilities in the last so many blocks, or in these (from 0): `b k n n` each, a row for each query. The
        class token comes first, then registers, then patches."""
        return [
            block.probabilities(before, position, relative)
            for block, before, (position, relative, _, _), _ in self._steps(images, layers)
        ]

    def _steps(self, images: Tensor, layers: int | Sequence[int]) -> Iterator[tuple[Block, Tensor, Given, Tensor]]:
        """These blocks, with what goes in and what comes out."""
        chosen = range(self.depth - layers, self.depth) if isinstance(layers, int) else layers
        if not chosen or min(chosen) < 0 or max(chosen) >= self.depth:
            raise ValueError(f"layers {layers} of {self.depth}")
        grid = self.grid_of(images)
        x, inputs = self._start(self.add_positions(self.embed(images), grid), grid, None)
        for i, (block, given) in enumerate(zip(self.blocks, inputs, strict=True)):
            before, x = x, self._run(block, x, given)
            if i in chosen:
                yield block, before, given, x

    def _start(self, tokens: Tensor, grid: Grid | None, key: Tensor | None) -> tuple[Tensor, list[Given]]:
        """The sequence for the first block, and what each block is given besides."""
        x = tokens
        if self.prefix:
            prefix = torch.cat([token for token in (self.cls_token, self.reg_token) if token is not None], 1)
            if self._at_stem and self.prefix_positions:
                prefix = prefix + self._positions(self.grid)[0]
            x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], 1)
        paths = keys = [None] * self.depth
        if self.training and (self.drop_path or self.dropout):
            if key is None or key.shape != (len(x),):
                given = None if key is None else tuple(key.shape)
                raise ValueError(f"drop path and dropout need a key of shape ({len(x)},) while training, not {given}")
            paths = drop_path(self.drop_path, self.depth, rng.fold(key, "drop_path"), wide(x.dtype))
            if self.dropout:
                key = rng.fold(key, "dropout")
                x = dropout(x, self.dropout, key)  # the paper's, directly after positions are added
                keys = [rng.fold(key, i) for i in range(self.depth)]
        positions, relative = self._in_blocks(tokens, grid)
        return x, list(zip(positions, relative, paths, keys, strict=True))

    def _in_blocks(self, tokens: Tensor, grid: Grid | None) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """For each block, the positions to add, `1 n d`, and the table of relative attention."""
        nothing = [None] * self.depth
        if self.position_at == "stem":
            return nothing, nothing
        grid = self._check_grid(grid, tokens.shape[1])
        if self.position == "relative":
            return nothing, self.relative_embed.expand(self.depth, -1, -1).unbind()
        without = self.prefix - self.prefix_positions
        table = F.pad(torch.cat(self._positions(grid), 1), (0, 0, without, 0))
        return table.expand(self.depth, -1, -1).split(1), nothing

    def _positions(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Of the class token and the registers, `l prefix d`, and of the patches of this grid, `l n d`."""
        if self.position == "learned_2d":
            patches = join_2d(self.pos_embed_x, self.pos_embed_y)
            prefix = self.pos_embed if self.prefix_positions else patches[:, :0]
        else:
            prefix, patches = self.pos_embed.split([self.prefix_positions, self.grid[0] * self.grid[1]], 1)
        return prefix, resize(patches, self.grid, grid, self.position_resize)

    def _check_grid(self, grid: Grid | None, patches: int) -> Grid:
        grid = self.grid if grid is None else tuple(grid)
        if patches != grid[0] * grid[1]:
            raise ValueError(f"position {self.position!r} needs all patches of the grid {grid}, not {patches} tokens")
        if self.position == "relative" and grid != self.grid:
            raise ValueError(f"position 'relative' knows the offsets of its own grid {self.grid}, not those of {grid}")
        return grid

    def _grid_of_size(self, height: int, width: int) -> Grid:
        p, q = self.patch_size
        if height < p or width < q or height % p or width % q:
            raise ValueError(f"image_size {(height, width)} is not a multiple of patch_size {(p, q)}")
        return height // p, width // q

    def _run(self, block: Block, x: Tensor, given: Given) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            # Nothing in a block draws from torch's generators, so there is no state of theirs to keep.
            return checkpoint(block, x, *given, use_reentrant=False, preserve_rng_state=False)
        return block(x, *given)

    def _named(self, x: Tensor) -> Encoded:
        classes = self.prefix - self.registers
        cls, _, patches = x.split([classes, self.registers, x.shape[1] - self.prefix], 1)
        return Encoded(cls.squeeze(1) if classes else None, patches)
