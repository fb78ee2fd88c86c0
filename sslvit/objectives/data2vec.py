"""data2vec for images (https://arxiv.org/abs/2202.03555): a teacher's features of hidden patches, from the rest.

The student sees an image with blocks of its patches hidden, the teacher sees it whole. The student's last block
predicts, at each hidden patch, what the teacher's last blocks make of it. As in the official code (fairseq):
- The teacher's blocks are the moving average of the student's. All before them, from the patch projection to the class
  token, is the student's own, with nothing hidden. Nothing is dropped from the teacher.
- A target is the mean of the outputs of the last 6 of 12 blocks, normalised over its features, without weights.
- The prediction is the last block's output behind the final norm, without a head. (Targets are of outputs before that
  norm. Fine-tuning there leaves the norm out.)
- The loss is smooth L1 with beta 2, summed over the D features, over sqrt(D), and over the number of hidden patches of
  the batch of all processes.
- Blocks as in BEiT, to 120 of 196 patches or a little less, as in the paper (the code's settings say 75), 16 patches or
  more each; here of other grids as large shares. The mask token stands for a patch before positions are added.
- After step i = 1, ..., T the teacher keeps m(i / T) of itself, from .999 to .9998 along a line.
- Any ViT will do; the preset "paper" of the recipe has theirs, with a bias of attention by offset, the same in all
  blocks, instead of positions. It belongs to the teacher's average, like all such tables.

Here, other than there:
- There the mask token and the class token begin as N(.02, 1), since .02 was given where the mean goes; here the mask
  token begins as N(0, .02), which BEiT has and was probably meant, and the class token as the backbone's.
- Attention probabilities are not dropped.

The student is exported. A low loss is no sign of health, as equal targets have one: target_std is watched.
"""

from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.blocks import at_least_float32
from sslvit.models.vit import ViT
from sslvit.objectives import schedule
from sslvit.objectives.block_mask import Hidden, block_mask, check_masks
from sslvit.objectives.objective import Batch, Objective, check_shares, check_views, check_vit
from sslvit.objectives.spread import scale, spread
from sslvit.objectives.teacher import ema_update
from sslvit.processes import collectives
from sslvit.processes.device import send_together
from sslvit.views.batching import Size
from sslvit.views.pretraining import CropFlip

BEFORE_BLOCKS = ("patch_embed.", "cls_token", "reg_token", "pos_embed", "norm_pre.")  # names of the student's own
LEAST = 16 / 196  # of the patches, in a block


class Data2Vec(Objective):
    """Prediction of a teacher's features of hidden patches, by the student's output at these patches.

    >>> import sslvit
    >>> objective = sslvit.Data2Vec(sslvit.ViT.variant("mu/8", image_size=32))
    >>> objective.readout
    'mean'
    """

    readout = "mean"
    couples_samples = True  # a patch counts as one of all that are hidden in the batch

    def __init__(
        self,
        backbone: ViT,
        *,
        average_layers: int = 0,
        mask_ratio: float = 0.612,
        momentum: tuple[float, float] = (0.999, 0.9998),
        beta: float = 2.0,
        seed: int = 0,
    ):
        """average_layers: of how many last blocks a target is the mean; 0: of half of them. mask_ratio: the most that
        is hidden. momentum: the teacher's, at the start and at the end. beta: where the loss turns from a square into a
        line."""
        super().__init__()
        check_vit(backbone, "data2vec")
        average_layers = average_layers or max(backbone.depth // 2, 1)
        if not 0 < average_layers <= backbone.depth:
            raise ValueError(
                f"average_layers {average_layers} must be from 1 to {backbone.depth}, the blocks there are"
            )
        if not (0 < mask_ratio <= 1 and beta > 0):
            raise ValueError(f"mask_ratio {mask_ratio} must be above 0 and at most 1, beta {beta} above 0")
        check_masks(backbone.grid, (mask_ratio, mask_ratio))
        check_shares(**{"momentum at the start": momentum[0], "momentum at the end": momentum[1]})
        self.backbone, self.average_layers, self.momentum, self.beta = backbone, average_layers, momentum, beta
        self.target = type(backbone)(replace(backbone.config, drop_path=0.0, dropout=0.0))
        self.target.load_state_dict(backbone.state_dict())
        self.target.requires_grad_(False)
        if backbone.cls_norm is not None:  # no class token is predicted from
            backbone.cls_norm.requires_grad_(False)
        self.wanted = max(round(mask_ratio * prod(backbone.grid)), 1)
        self.mask_token = nn.Parameter(torch.empty(1, 1, backbone.width))
        nn.init.normal_(self.mask_token, std=0.02, generator=torch.Generator().manual_seed(seed))

    @property
    def teacher(self) -> ViT:
        return self.target

    def default_views(self, image_size: Size, channels: int) -> CropFlip:
        return CropFlip(image_size, scale=(0.08, 1.0))

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        check_views(batch, 1, self.backbone.image_size)
        (images,) = batch.views
        hidden = send_together(self.hidden(batch.key), images.device)
        wanted = self.targets(images, hidden)
        tokens = self.backbone.embed(images)
        tokens = torch.where(hidden.mask.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        tokens, key = self.backbone.add_positions(tokens), rng.fold(batch.key, "backbone")
        patches = self.backbone.encode(tokens, key=key).patches
        predicted = hidden.of(patches).to(wanted.dtype)
        total = F.smooth_l1_loss(predicted, wanted, beta=self.beta, reduction="sum") * self.backbone.width**-0.5
        loss = total / collectives.all_mean(total.new_full((), len(wanted))).clamp(min=1e-6)
        metrics = {"target_std": scale(wanted), "hidden": hidden.mask.to(wanted.dtype).mean()}
        return loss, metrics | spread(patches.mean(1))

    def hidden(self, key: Tensor) -> Hidden:
        """What is hidden of each image: b -> b n"""
        wanted = torch.full((len(key),), float(self.wanted), dtype=torch.float64)
        grid = self.backbone.grid
        return block_mask(rng.fold(key, "hidden"), wanted, grid, least=max(LEAST * prod(grid), 1.0))

    @torch.no_grad()
    def targets(self, images: Tensor, hidden: Hidden) -> Tensor:
        """Of the hidden patches: m d"""
        outputs = self.target.intermediate(images, self.average_layers, norm=False)
        kind = at_least_float32(outputs[0].patches.dtype)
        mean = torch.stack([hidden.of(output.patches).to(kind) for output in outputs]).mean(0)
        return F.layer_norm(mean, (self.backbone.width,))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Moves the teacher's blocks, and gives it the student's embeddings."""
        ema_update(self.target, self.backbone, schedule.linear(progress, *self.momentum))
        own = dict(self.backbone.named_parameters())
        for name, parameter in self.target.named_parameters():
            if name.startswith(BEFORE_BLOCKS):
                parameter.copy_(own[name])
