"""SimMIM (https://arxiv.org/abs/2111.09886): the pixels of hidden patches by L1, from one linear layer.

As in the official code (https://github.com/microsoft/SimMIM), squares of 32 px are hidden, 60% of them rounded up, one
random order per image. A learned token stands for each hidden patch before positions are added, so the encoder sees all
places. Targets are the values that the backbone sees, standardised per channel. Any ViT will do; the preset "paper" of
the recipe has theirs, with a bias of attention by offset instead of positions. Here, other than there:
- The sum over hidden pixels is divided by their number, there by 1e-5 more. An epoch's last incomplete batch is kept.
- At other sizes a square's side is the number of patches that divides the grid and is nearest to a seventh of the image
  (32 of 224 px). Where nothing near does, as with 37 x 37 patches, single patches are hidden.
"""

from math import ceil, gcd, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.patches import patchify, unpatchify
from sslvit.models.readout import Encoded, read
from sslvit.models.vit import ViT
from sslvit.objectives.masking import put, random_order, take
from sslvit.objectives.objective import Batch, Objective, check_views, check_vit
from sslvit.objectives.spread import spread
from sslvit.processes.device import send
from sslvit.views.batching import Size
from sslvit.views.pretraining import CropFlip


class SimMIM(Objective):
    """Masked image modelling: the standardised pixels of hidden patches, by a linear head.

    >>> import sslvit
    >>> objective = sslvit.SimMIM(sslvit.ViT.variant("mu/8", image_size=16))
    >>> objective.readout
    'mean'
    """

    def __init__(self, backbone: ViT, *, mask_ratio: float = 0.6, unit: int = 0, seed: int = 0):
        """unit: the side of the hidden squares in patches; it divides the grid. 0: what is nearest to 32 of 224 px."""
        super().__init__()
        check_vit(backbone, "SimMIM")
        (h, w), common = backbone.grid, gcd(*backbone.grid)
        fitting = [side for side in range(1, common + 1) if common % side == 0]
        self.unit = unit or min(fitting, key=lambda side: abs(side - min(h, w) * 32 / 224))
        if self.unit not in fitting:
            raise ValueError(f"unit {unit} must divide the grid of {h} x {w} patches: it may be {fitting}, or 0")
        self.units = h * w // self.unit**2
        self.count = ceil(mask_ratio * self.units)
        if not 0 < self.count < self.units:
            raise ValueError(f"mask_ratio {mask_ratio} would hide {self.count} of {self.units} squares, not just some")
        self.backbone, self.readout = backbone, "mean"
        generator, bound = torch.Generator().manual_seed(seed), backbone.width**-0.5
        with torch.random.fork_rng(devices=[]):  # torch's layers draw from its global generator when they are made
            self.head = nn.Linear(backbone.width, prod(backbone.patch_size) * backbone.channels)
        for parameter in self.head.parameters():  # torch's own rule, by the seed
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        self.mask_token = nn.Parameter(torch.empty(1, 1, backbone.width))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02, generator=generator)

    def default_views(self, image_size: Size, channels: int) -> CropFlip:
        return CropFlip(image_size, scale=(0.67, 1.0), interpolation="bilinear")

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        encoded, predicted, hidden = self.predict(batch)
        pixels = patchify(self.backbone.standardise(batch.views[0]), self.backbone.patch_size)
        targets = take(pixels, hidden)
        loss = F.l1_loss(predicted.to(targets.dtype), targets)
        return loss, {"loss_of_zeros": targets.abs().mean()} | spread(read(encoded, self.readout))

    def predict(self, batch: Batch) -> tuple[Encoded, Tensor, Tensor]:
        """The images encoded, the head's outputs for the hidden patches, b m (p q c), and their places, b m."""
        check_views(batch, 1, self.backbone.image_size)
        hidden = send(self.hidden(batch.key), batch.views[0].device)
        tokens = self.backbone.embed(batch.views[0])
        tokens = put(tokens, hidden, self.mask_token.to(tokens.dtype).expand(*hidden.shape, -1))
        encoded = self.backbone.encode(self.backbone.add_positions(tokens), key=rng.fold(batch.key, "backbone"))
        return encoded, self.head(take(encoded.patches, hidden)), hidden

    def hidden(self, key: Tensor) -> Tensor:
        """The places of the hidden patches, square by square: b -> b m"""
        chosen, (_, width), side = random_order(rng.fold(key, "hidden"), self.units), self.backbone.grid, self.unit
        chosen, columns = chosen[:, : self.count, None], width // side
        corner = chosen // columns * side * width + chosen % columns * side
        inside = torch.arange(side, device=key.device)
        return (corner + (inside.unsqueeze(1) * width + inside).flatten()).flatten(1)

    @torch.no_grad()
    def reconstructed(self, batch: Batch) -> tuple[Tensor, ...]:
        """The images with hidden patches grey, and with the predictions in their place."""
        _, predicted, hidden = self.predict(batch)
        size, grid = self.backbone.patch_size, self.backbone.grid
        mean, std = (x.flatten().repeat(prod(size)) for x in (self.backbone.mean, self.backbone.std))
        predicted, patches = (predicted.float() * std + mean).clamp(0, 1), patchify(batch.views[0], size)
        filled = (put(patches, hidden, x) for x in (torch.full_like(predicted, 0.5), predicted))
        return tuple(unpatchify(x, size, grid) for x in filled)
