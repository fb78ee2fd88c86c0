"""I-JEPA (https://arxiv.org/abs/2301.08243): features of hidden blocks, predicted from the rest of the image.

A context encoder sees some patches. From them and the position of a target block, a small predictor predicts what the
target encoder, its moving average, makes of the patches of that block; the target encoder sees the whole image. Four
blocks are predicted, each by itself. multiblock.py draws them. As in the official code
(https://github.com/facebookresearch/ijepa):
- Positions are fixed, with a backbone of position "sincos_mae" and in the predictor. Its ViTs have no class token; that
  of a backbone with one takes part in attention, and is neither predicted nor predicted from.
- Targets are normalised over their features, without weights, behind the encoder's own norm.
- The loss is smooth L1 with beta 1, the mean over everything; the paper says the squared distance.
- After the optimizer's step i of T the target encoder keeps the share m(i / T) of itself, which rises linearly to 1.
- There is no augmentation besides random crops, which the recipe's views are.

The target encoder is the backbone, which is exported. A low loss is no sign of health, as equal targets have one:
target_std is watched.
"""

from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.blocks import EPSILON, Block
from sslvit.models.positions import sincos
from sslvit.models.readout import Encoded
from sslvit.models.vit import ViT
from sslvit.objectives import schedule
from sslvit.objectives.masking import take
from sslvit.objectives.multiblock import Blocks, draw_blocks
from sslvit.objectives.objective import Batch, Objective, check_shares, check_views, check_vit
from sslvit.objectives.spread import scale, spread
from sslvit.objectives.teacher import ema_update
from sslvit.processes.device import send_together
from sslvit.views.batching import Size
from sslvit.views.pretraining import CropFlip


class IJEPA(Objective):
    """Prediction of the features of hidden blocks, in the space of a moving average of the encoder.

    >>> import sslvit
    >>> vit = sslvit.ViT.variant("mu/8", image_size=32, class_token=False)
    >>> objective = sslvit.IJEPA(vit, predictor_width=16, predictor_depth=1)
    >>> objective.readout
    'mean'
    """

    readout = "mean"
    couples_samples = True  # contexts are cut to the shortest

    def __init__(
        self,
        backbone: ViT,
        *,
        predictor_width: int = 384,
        predictor_depth: int = 6,
        predictor_heads: int | None = None,
        targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        momentum: float = 0.996,
        drop_path: float = 0.0,
        seed: int = 0,
    ):
        """predictor_heads: by default the encoder's. Scales are shares of the patches. momentum: of the target
        encoder, at the start."""
        super().__init__()
        check_vit(backbone, "I-JEPA")
        if backbone.drop_path or backbone.dropout:
            raise ValueError(
                f"the backbone becomes the target encoder, from which nothing is dropped, but it has drop_path "
                f"{backbone.drop_path} and dropout {backbone.dropout}: build it without (drop_path is the student's)"
            )
        if backbone.position_at != "stem":
            raise ValueError(f"position_at {backbone.position_at!r} needs all patches in the encoder: use 'stem'")
        if min(backbone.grid) < 2:
            raise ValueError(f"{backbone.grid} patches are too few to hide blocks of them: 2 x 2 are needed at least")
        heads = predictor_heads or backbone.config.heads
        if predictor_width % heads or predictor_width % 4:
            raise ValueError(f"predictor_width {predictor_width} is not a multiple of its {heads} heads and of 4")
        if targets < 1:
            raise ValueError(f"targets {targets} must be at least 1")
        check_shares(momentum=momentum, target_scale=max(target_scale), context_scale=max(context_scale))
        self.student = type(backbone)(replace(backbone.config, drop_path=drop_path))
        self.student.load_state_dict(backbone.state_dict())
        self.backbone = backbone.requires_grad_(False)
        self.targets, self.momentum = targets, momentum
        self.scales = {"scale": target_scale, "aspect": target_aspect, "context": context_scale}
        table = sincos("sincos_mae", backbone.grid, predictor_width)[:, -prod(backbone.grid) :]
        self.register_buffer("predictor_pos_embed", table, persistent=False)  # a constant
        with torch.random.fork_rng(devices=[]):  # torch's layers draw from its global generator when they are made
            self.predictor_embed = nn.Linear(backbone.width, predictor_width)
            self.mask_token = nn.Parameter(torch.empty(1, 1, predictor_width))
            self.predictor_blocks = nn.ModuleList(
                Block(width=predictor_width, heads=heads, mlp_width=4 * predictor_width) for _ in range(predictor_depth)
            )
            self.predictor_norm = nn.LayerNorm(predictor_width, EPSILON)
            self.predictor_proj = nn.Linear(predictor_width, backbone.width)
        generator = torch.Generator().manual_seed(seed)
        nn.init.trunc_normal_(self.mask_token, std=0.02, generator=generator)
        for module in (self.predictor_embed, *self.predictor_blocks.modules(), self.predictor_proj):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
        self.seen_progress: float | None = None  # of the newest forward, for `after_step`; never saved

    @property
    def learner(self) -> ViT:
        return self.student

    def default_views(self, image_size: Size, channels: int) -> CropFlip:
        return CropFlip(image_size, scale=(0.3, 1.0), interpolation="bilinear", flip=0.0)

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        check_views(batch, 1, self.backbone.image_size)
        (images,) = batch.views
        self.seen_progress = progress
        with torch.no_grad():
            whole = self.backbone(images)
            blocks = draw_blocks(
                rng.fold(batch.key, "blocks"),
                progress,
                self.backbone.grid,
                targets=self.targets,
                device=images.device,
                **self.scales,
            )
            blocks = send_together(blocks, images.device)
            wanted = F.layer_norm(take(whole.patches, blocks.targets.flatten(1)), (self.backbone.width,))
            wanted = rearrange(wanted, "b (t m) d -> b t m d", t=self.targets)
        predicted = self.predict(self.see(images, blocks, batch.key), blocks)
        loss = F.smooth_l1_loss(predicted.to(wanted.dtype), wanted)
        metrics = {"target_std": scale(wanted.flatten(0, 2)), "context": loss.new_full((), blocks.context.shape[1])}
        return loss, metrics | spread(whole.patches.mean(1))

    def see(self, images: Tensor, blocks: Blocks, key: Tensor) -> Encoded:
        """The context alone, encoded."""
        tokens = self.student.add_positions(self.student.embed(images))
        return self.student.encode(take(tokens, blocks.context), key=rng.fold(key, "student"))

    def predict(self, context: Encoded, blocks: Blocks) -> Tensor:
        """The features of each target block: b c d, b t m -> b t m d"""
        t, positions = self.targets, self.predictor_pos_embed[0]
        seen = self.predictor_embed(context.patches)
        seen = repeat(seen + positions[blocks.context].to(seen.dtype), "b c d -> (b t) c d", t=t)
        hidden = rearrange(self.mask_token + positions[blocks.targets], "b t m d -> (b t) m d")
        x = torch.cat([seen, hidden.to(seen.dtype)], 1)
        for block in self.predictor_blocks:
            x = block(x)
        x = x[:, seen.shape[1] :]
        return rearrange(self.predictor_proj(self.predictor_norm(x)), "(b t) m d -> b t m d", t=t)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Moves the target encoder, by the progress of the step just taken."""
        assert self.seen_progress is not None, "after_step follows a forward"
        ema_update(self.backbone, self.student, schedule.linear(self.seen_progress, self.momentum, 1.0))
        self.seen_progress = None
