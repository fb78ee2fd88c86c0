"""The Vision Transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929).

An objective works between `embed` and `encode`: it replaces tokens and then adds positions (MPP), or adds positions and
then drops tokens (MAE). Parameter names are timm's, so weights travel both ways; the head is apart, in `Classifier`.
Shapes: b images of c channels and H W pixels, n patches on a grid h w, tokens of width d, k heads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sslvit import rng
from sslvit.models.blocks import Block, at_least_float32, drop_path, dropout
from sslvit.models.init import initialize
from sslvit.models.patches import PatchEmbed
from sslvit.models.positions import (
    FIXED,
    Grid,
    join_2d,
    offset_bias,
    position_tables,
    resize,
    resize_offsets,
    to_pair,
)
from sslvit.models.readout import Encoded, Readout
from sslvit.models.resnet import set_epsilons
from sslvit.models.rope import coordinates, moved, periods_of, turns
from sslvit.models.vit_config import ViTConfig, variant
from sslvit.processes.device import send


class BlockInputs(NamedTuple):
    """Arguments of a block besides its tokens."""

    position: Tensor | None  # added first, `1 n d`
    relative: Tensor | None  # the attention's table of offsets, or the bias of its logits, `k n n`
    path: Tensor | None  # drop path's factors of the two branches, `b 2`
    key: Tensor | None  # dropout's, `b`
    rope: Tensor | None  # rotary positions, see sslvit.models.rope


class ViT(nn.Module):
    """Attributes: width, depth, heads, channels; image_size, patch_size and grid, each (height, width); the readouts it
    has; prefix, the number of tokens before the patches.

    >>> import sslvit, torch
    >>> vit = sslvit.ViT.variant("mu/8", image_size=16)  # or S/16, B/16, R50+B/16, ...
    >>> cls, patches = vit(torch.rand(2, 3, 16, 16))  # images in [0, 1]
    >>> cls.shape, patches.shape
    (torch.Size([2, 32]), torch.Size([2, 4, 32]))
    """

    Config = ViTConfig
    declared: str = ""  # the readout that its objective declared, of a model that was trained or loaded

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size, self.patch_size = to_pair(config.image_size), to_pair(config.patch_size)
        self.grid, self.width, self.depth, self.heads = config.grid, config.width, config.depth, config.heads
        self.channels, self.registers = config.channels, config.registers
        self.prefix = config.class_token + config.registers
        self.prefix_positions = self.prefix if config.class_position or config.position == "relative_bias" else 0
        self.position, self.position_at = config.position, config.position_at
        self._at_stem = config.position_at == "stem" and config.position != "none"
        self.drop_path, self.dropout = config.drop_path, config.dropout
        self.readouts: tuple[str, ...] = get_args(Readout) if config.class_token else ("mean",)
        self.grad_checkpointing = False
        # Not persistent: the config has them, and timm's weights have no such names.
        self.register_buffer("mean", rearrange(torch.tensor(config.mean), "c -> c 1 1"), persistent=False)
        self.register_buffer("std", rearrange(torch.tensor(config.std), "c -> c 1 1"), persistent=False)
        with torch.random.fork_rng(devices=[]):  # torch's layers draw from its global generator when they are made
            self.patch_embed = PatchEmbed(self.patch_size, config.channels, config.width, config.hybrid, config.seed)
            self.blocks = nn.ModuleList(self._new_block(config) for _ in range(config.depth))
            self.norm = nn.LayerNorm(config.width, config.epsilon) if config.final_norm else nn.Identity()
            self.norm_pre = nn.LayerNorm(config.width, config.epsilon) if config.stem_norm else None
            untied = config.class_norm and config.final_norm
            self.cls_norm = nn.LayerNorm(config.width, config.epsilon) if untied else None
        set_epsilons(self.patch_embed, config.hybrid_epsilons)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, config.registers, config.width)) if config.registers else None
        tables = position_tables(
            config.position, config.position_at, self.grid, config.width, config.depth, self.prefix_positions,
            config.heads,
        )  # fmt: skip
        for name, table in tables.items():
            if config.position in FIXED:
                self.register_buffer(name, table)  # saved, so that timm finds it and fine-tuning may train it
            elif name == "relative_bias" and config.position_at == "every_layer":  # a layer's is trained with the layer
                self.relative_bias = nn.ParameterList(one.clone() for one in table)
            else:
                self.register_parameter(name, nn.Parameter(table))
        initialize(self, config.init, config.seed)

    @classmethod
    def variant(cls, name: str, *, image_size: int | Sequence[int], **changes: Any) -> "ViT":
        """By the papers' names: "S/16", "R50+B/16"; other hybrids by stem, width and patch size in pixels: "R+XS/8"."""
        return cls(variant(name, image_size=image_size, **changes))

    @property
    def name(self) -> str:
        """The argument of `variant`, or the sizes in words."""
        return self.config.name

    def forward(self, images: Tensor, key: Tensor | None = None) -> Encoded:
        """Images in [0, 1] to a class token and patches: `b c H W -> b d, b n d`. key: for `encode`."""
        tokens, grid = self._with_positions(images)
        return self.encode(tokens, grid, key)

    def embed(self, images: Tensor) -> Tensor:
        """The content of each patch without its position; images in [0, 1]: `b c H W -> b n d`."""
        self.grid_of(images)
        return self.patch_embed(self.standardise(images))

    def add_positions(self, tokens: Tensor, grid: Grid | None = None) -> Tensor:
        """All patches of a grid (by default the trained one): `b n d -> b n d`. Positions at every layer are left to
        `encode`."""
        grid = self._check_grid(grid, tokens.shape[1])
        return tokens + self._positions(grid)[1] if self._at_stem else tokens

    def encode(self, tokens: Tensor, grid: Grid | None = None, key: Tensor | None = None) -> Encoded:
        """Tokens with their positions, of all patches or of some, `b n d`, through the blocks and the final norm.

        Positions at every layer need all patches, and their grid if it is not the trained one. Drop path and dropout
        need a key per image in training, `b`.
        """
        return self._named(self._through_blocks(tokens, grid, key))

    def standardise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def grid_of(self, images: Tensor) -> Grid:
        """Height and width of these images in patches."""
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images of shape {tuple(images.shape)} are not b {self.channels} H W")
        return self.config.grid_of(*images.shape[2:])

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens as one sequence, as timm's: class token, registers, patches, `b c H W -> b n d`."""
        tokens, grid = self._with_positions(images)
        return self._through_blocks(tokens, grid, None)

    def feature_map(self, images: Tensor) -> Tensor:
        """The patches on their grid, for detection and segmentation: `b c H W -> b d h w`."""
        h, _ = self.grid_of(images)
        return rearrange(self(images).patches, "b (h w) d -> b d h w", h=h)

    def intermediate(
        self, images: Tensor, layers: int | Sequence[int], norm: bool = True, key: Tensor | None = None
    ) -> list[Encoded]:
        """The outputs of the last `layers` blocks, or of these blocks (from 0), in order of depth; by default after the
        final norm. key: as of `encode`."""
        return [self._named(self._normed(x) if norm else x) for _, _, _, x in self._steps(images, layers, key)]

    def attention(self, images: Tensor, layers: int | Sequence[int]) -> list[Tensor]:
        """The attention weights in the last `layers` blocks, or in these blocks (from 0): `b k n n` each, one row per
        query. The class token comes first, then registers, then patches."""
        return [
            block.probabilities(before, inputs.position, inputs.relative, inputs.rope)
            for block, before, inputs, _ in self._steps(images, layers)
        ]

    def resized(self, image_size: int | Sequence[int]) -> "ViT":
        """A copy with a resized position table, so that fine-tuning trains the new one, as in the ViT paper. (`forward`
        takes images of any size, and resizes the trained table each time.)"""
        other = ViT(replace(self.config, image_size=to_pair(image_size)))
        (h, w), (new_h, new_w) = self.grid, self._check_grid(other.grid, other.grid[0] * other.grid[1])
        state = self.state_dict()
        if self.position == "learned_2d":
            state["pos_embed_x"] = resize(self.pos_embed_x, (1, w), (1, new_w), self.config.position_resize)
            state["pos_embed_y"] = resize(self.pos_embed_y, (h, 1), (new_h, 1), self.config.position_resize)
        elif "pos_embed" in state:
            state["pos_embed"] = torch.cat(self._positions(other.grid), 1)
        elif self.position == "relative_bias":
            tables = {name: table for name, table in state.items() if name.startswith("relative_bias")}
            how = self.config.position_resize
            for name, table in tables.items():
                resized = resize_offsets(table.view(-1, self.heads), self.grid, other.grid, how)
                state[name] = resized.view(*table.shape[:-2], *resized.shape)
        other.load_state_dict(state)
        return other.to(self.patch_embed.proj.weight).train(self.training)

    def freeze(self, blocks: int | None = None) -> "ViT":
        """From here on only the last `blocks` blocks and the norm after them are trained, by default nothing."""
        if not 0 <= (blocks or 0) <= self.depth:
            raise ValueError(f"freeze all but the last {blocks} blocks of {self.depth}")
        self.requires_grad_(False)
        norms = [norm for norm in (self.norm, self.cls_norm) if norm is not None]
        for module in (*self.blocks[-blocks:], *norms) if blocks else ():
            module.requires_grad_(True)
        if blocks and self.position == "relative_bias" and self.position_at == "every_layer":
            for table in self.relative_bias[-blocks:]:
                table.requires_grad_(True)
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of the tokens and positions, for timm's optimizers; they exempt vectors by themselves."""
        tables = ("_token", "_embed", "_embed_x", "_embed_y")
        names = [name for name, _ in self.named_parameters()]
        return {name for name in names if name.endswith(tables) or name.startswith("relative_bias")}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for the backward pass, which then computes the block again."""
        self.grad_checkpointing = enable

    def _new_block(self, config: ViTConfig) -> Block:
        return Block(
            width=config.width,
            heads=config.heads,
            mlp_width=config.mlp_width,
            prefix=self.prefix,
            gelu=config.gelu,
            swiglu=config.swiglu,
            qkv_bias=config.qkv_bias,
            key_bias=config.key_bias,
            layer_scale=config.layer_scale,
            dropout=config.dropout,
            epsilon=config.epsilon,
        )

    def _with_positions(self, images: Tensor) -> tuple[Tensor, Grid]:
        grid = self.grid_of(images)
        return self.add_positions(self.embed(images), grid), grid

    def _through_blocks(self, tokens: Tensor, grid: Grid | None, key: Tensor | None) -> Tensor:
        x, inputs = self._start(tokens, grid, key)
        for block, arguments in zip(self.blocks, inputs, strict=True):
            x = self._run(block, x, arguments)
        return self._normed(x)

    def _normed(self, x: Tensor) -> Tensor:
        """The final norm; with class_norm the class token and the registers have their own."""
        if self.cls_norm is None:
            return self.norm(x)
        return torch.cat([self.cls_norm(x[:, : self.prefix]), self.norm(x[:, self.prefix :])], 1)

    def _steps(
        self, images: Tensor, layers: int | Sequence[int], key: Tensor | None = None
    ) -> Iterator[tuple[Block, Tensor, BlockInputs, Tensor]]:
        """These blocks, with their inputs and outputs."""
        chosen = range(self.depth - layers, self.depth) if isinstance(layers, int) else layers
        if not chosen or min(chosen) < 0 or max(chosen) >= self.depth:
            raise ValueError(f"layers {layers} must be among the {self.depth} blocks")
        tokens, grid = self._with_positions(images)
        x, inputs = self._start(tokens, grid, key)
        for i, (block, arguments) in enumerate(zip(self.blocks, inputs, strict=True)):
            before, x = x, self._run(block, x, arguments)
            if i in chosen:
                yield block, before, arguments, x

    def _start(self, tokens: Tensor, grid: Grid | None, key: Tensor | None) -> tuple[Tensor, list[BlockInputs]]:
        """The sequence that enters the first block, and the other arguments of each block."""
        x = tokens
        if self.prefix:
            tokens_before = [token for token in (self.cls_token, self.reg_token) if token is not None]
            prefix = torch.cat(tokens_before, 1) if len(tokens_before) > 1 else tokens_before[0]
            if self._at_stem and self.prefix_positions:
                prefix = prefix + self._positions(self.grid)[0]
            x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], 1)
        x = x if self.norm_pre is None else self.norm_pre(x)
        paths: Sequence[Tensor | None] = [None] * self.depth
        keys: Sequence[Tensor | None] = [None] * self.depth
        ropes = [self._rope(tokens, grid, key)] * self.depth
        if self.training and (self.drop_path or self.dropout):
            if key is None or key.shape != (len(x),):
                shape = None if key is None else tuple(key.shape)
                raise ValueError(f"drop path and dropout need a key of shape ({len(x)},) while training, not {shape}")
            kind = at_least_float32(x.dtype)
            paths = drop_path(self.drop_path, self.depth, rng.fold(key, "drop_path"), kind, x.device)
            if self.dropout:
                key = send(rng.fold(key, "dropout"), x.device)  # whose draws are many
                x = dropout(x, self.dropout, key)  # as in the paper, directly after positions are added
                keys = [rng.fold(key, i) for i in range(self.depth)]
        positions, relative = self._in_blocks(tokens, grid)
        return x, [BlockInputs(*each) for each in zip(positions, relative, paths, keys, ropes, strict=True)]

    def _in_blocks(self, tokens: Tensor, grid: Grid | None) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """For each block, the positions to add, `1 n d`, and what relative attention adds."""
        nothing: Sequence[Tensor | None] = [None] * self.depth
        if self.position_at == "stem" or self.position == "rope":
            return nothing, nothing
        grid = self._check_grid(grid, tokens.shape[1])
        if self.position == "relative":
            return nothing, self.relative_embed.expand(self.depth, -1, -1).unbind()
        if self.position == "relative_bias":
            how = self.config.position_resize
            tables = [resize_offsets(table, self.grid, grid, how) for table in self.relative_bias]
            biases = [offset_bias(table, grid) for table in tables]
            return nothing, biases * (self.depth // len(biases))
        without_position = self.prefix - self.prefix_positions
        table = F.pad(torch.cat(self._positions(grid), 1), (0, 0, without_position, 0))
        return table.expand(self.depth, -1, -1).split(1), nothing

    def _rope(self, tokens: Tensor, grid: Grid | None, key: Tensor | None) -> Tensor | None:
        """Rotary positions of all patches of a grid. While training, a key moves them; a teacher, which gets none, sees
        them as they are."""
        if self.position != "rope":
            return None
        config, dtype = self.config, at_least_float32(tokens.dtype)
        places = coordinates(self._check_grid(grid, tokens.shape[1]), dtype, tokens.device)
        if (
            self.training
            and key is not None
            and (config.rope_shift, config.rope_jitter, config.rope_rescale) != (0, 1, 1)
        ):
            if key.shape != (len(tokens),):
                raise ValueError(
                    f"rotary positions are moved by a key of shape ({len(tokens)},), not {tuple(key.shape)}"
                )
            places = moved(places, key, config.rope_shift, config.rope_jitter, config.rope_rescale)
        return turns(places, periods_of(config.rope_base, self.width // self.heads, config.rope_periods, places))

    def _positions(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Positions of the class token and the registers, `l prefix d`, and of the patches of this grid, `l n d`."""
        if self.position == "learned_2d":
            patches = join_2d(self.pos_embed_x, self.pos_embed_y)
            prefix = self.pos_embed if self.prefix_positions else patches[:, :0]
        else:
            prefix, patches = self.pos_embed.split([self.prefix_positions, self.grid[0] * self.grid[1]], 1)
        return prefix, resize(patches, self.grid, grid, self.config.position_resize)

    def _check_grid(self, grid: Grid | None, patches: int) -> Grid:
        height, width = grid or self.grid
        if patches != height * width:
            raise ValueError(
                f"position {self.position!r} needs all of the grid {(height, width)}, got {patches} tokens"
            )
        if self.position == "relative" and (height, width) != self.grid:
            raise ValueError(f"position 'relative' is for its own grid {self.grid}, not for {(height, width)}")
        return height, width

    def _run(self, block: Block, x: Tensor, arguments: BlockInputs) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            # Nothing in a block draws from torch's generators, so their state need not be saved.
            return checkpoint(block, x, *arguments, use_reentrant=False, preserve_rng_state=False)
        return block(x, *arguments)

    def _named(self, x: Tensor) -> Encoded:
        """The sequence as class token, patches and registers."""
        classes = self.prefix - self.registers
        cls, registers, patches = x.split([classes, self.registers, x.shape[1] - self.prefix], 1)
        return Encoded(cls.squeeze(1) if classes else None, patches, registers if self.registers else None)
