"""MAE, the masked autoencoder (https://arxiv.org/abs/2111.06377).

Most patches, chosen at random, are masked: the encoder sees the visible ones alone. A small decoder gets the encoded
patches, a mask token for each masked one, and positions for all; from its outputs at the masked places a linear layer
predicts their pixels. As in the official code (https://github.com/facebookresearch/mae):
- Positions are fixed, in the encoder (with a backbone of position "sincos_mae") and in the decoder.
- Each target patch is normalised by the mean and the unbiased variance of all its values, its channels together. They
  are the values that the backbone sees, standardised per channel, so raw pixels would give other targets.
- The class token goes through encoder and decoder. It has no target, but it is what the paper probes.
- 1e-6 is added to the variance: a flat patch of a grey image, all of whose values are equal, costs nothing when zeros
  are predicted. That of a coloured one costs about 1, as any other, since its channels are standardised apart.
Here, other than there, the loop keeps an epoch's last incomplete batch.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.blocks import EPSILON, Block
from sslvit.models.patches import patchify, unpatchify
from sslvit.models.positions import sincos
from sslvit.models.readout import Encoded, read
from sslvit.models.vit import ViT
from sslvit.objectives.masking import put, random_order, take
from sslvit.objectives.objective import Batch, Objective, check_vit
from sslvit.objectives.spread import spread
from sslvit.processes.device import send


class MAE(Objective):
    """The masked autoencoder: the pixels of masked patches, by a small decoder.

    >>> import sslvit
    >>> objective = sslvit.MAE(sslvit.ViT.variant("mu/8", image_size=16), decoder_width=16, decoder_heads=2)
    >>> objective.readout
    'cls'
    """

    def __init__(
        self,
        backbone: ViT,
        *,
        mask_ratio: float = 0.75,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        norm_pix_loss: bool = True,
        seed: int = 0,
    ):
        """norm_pix_loss: predict patches of mean 0 and variance 1 instead of pixels, like the paper's better models."""
        super().__init__()
        check_vit(backbone, "MAE")
        n = prod(backbone.grid)
        self.visible = int(n * (1 - mask_ratio))
        if not 0 < self.visible < n:
            raise ValueError(
                f"mask_ratio {mask_ratio} of {n} patches leaves {self.visible} visible: it must be some, but not all"
            )
        if backbone.position_at != "stem":
            raise ValueError(f"position_at {backbone.position_at!r} needs all patches in the encoder: use 'stem'")
        if decoder_width % decoder_heads or decoder_width % 4:
            raise ValueError(
                f"decoder_width {decoder_width} is not a multiple of decoder_heads {decoder_heads} and of 4"
            )
        self.backbone, self.norm_pix_loss = backbone, norm_pix_loss
        self.readout = "cls" if "cls" in backbone.readouts else "mean"
        # Only learned weights are saved, under the official names; the table is a constant.
        self.register_buffer("decoder_pos_embed", sincos("sincos_mae", backbone.grid, decoder_width), persistent=False)
        with torch.random.fork_rng(devices=[]):  # torch's layers draw from its global generator when they are made
            self.decoder_embed = nn.Linear(backbone.width, decoder_width)
            self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
            self.decoder_blocks = nn.ModuleList(
                Block(width=decoder_width, heads=decoder_heads, mlp_width=4 * decoder_width)
                for _ in range(decoder_depth)
            )
            self.decoder_norm = nn.LayerNorm(decoder_width, EPSILON)
            self.decoder_pred = nn.Linear(decoder_width, prod(backbone.patch_size) * backbone.channels)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.mask_token, std=0.02, generator=generator)
        for module in (self.decoder_embed, *self.decoder_blocks.modules(), self.decoder_pred):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        encoded, predicted, order = self.predict(batch)
        target = self.target(batch.views[0], order[:, self.visible :])
        loss = F.mse_loss(predicted.to(target.dtype), target)
        return loss, {"loss_of_zeros": target.square().mean()} | spread(read(encoded, self.readout))

    def predict(self, batch: Batch) -> tuple[Encoded, Tensor, Tensor]:
        """The visible patches encoded, the masked ones decoded, and the random order, visible ones first."""
        (images,) = batch.views
        order = send(random_order(rng.fold(batch.key, "dropped"), prod(self.backbone.grid)), images.device)
        tokens = self.backbone.add_positions(self.backbone.embed(images))
        tokens = take(tokens, order[:, : self.visible])
        encoded = self.backbone.encode(tokens, key=rng.fold(batch.key, "backbone"))
        return encoded, self.decode(encoded, order), order

    def decode(self, encoded: Encoded, order: Tensor) -> Tensor:
        """The masked patches: b v d, b n -> b (n - v) (p q c). Attention ignores order, so they simply come last, with
        their positions."""
        visible = self.decoder_embed(encoded.patches)
        masked = self.mask_token.to(visible.dtype).expand(len(order), order.shape[1] - self.visible, -1)
        x = torch.cat([visible, masked], 1) + self.decoder_pos_embed[0, order]
        if encoded.cls is not None:  # its position is zeros
            x = torch.cat([self.decoder_embed(encoded.cls).unsqueeze(1), x], 1)
        for block in self.decoder_blocks:
            x = block(x)
        x = x.narrow(1, x.shape[1] - masked.shape[1], masked.shape[1])
        return self.decoder_pred(self.decoder_norm(x))

    def target(self, images: Tensor, masked: Tensor) -> Tensor:
        """b c H W, b m -> b m (p q c)"""
        patches = take(patchify(self.backbone.standardise(images), self.backbone.patch_size), masked)
        if not self.norm_pix_loss:
            return patches
        variance, mean = torch.var_mean(patches, -1, keepdim=True)
        return (patches - mean) * (variance + 1e-6).rsqrt()

    @torch.no_grad()
    def reconstructed(self, batch: Batch) -> tuple[Tensor, ...]:
        """The images with masked patches grey, and with the predictions in their place. Normalised predictions are
        scaled by the true mean and variance, which the decoder does not predict."""
        (images,), size = batch.views, self.backbone.patch_size
        _, predicted, order = self.predict(batch)
        masked, predicted = order[:, self.visible :], predicted.float()
        standard = patchify(self.backbone.standardise(images), size)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(take(standard, masked), -1, keepdim=True)
            predicted = predicted * (variance + 1e-6).sqrt() + mean
        mean, std = (x.flatten().repeat(prod(size)) for x in (self.backbone.mean, self.backbone.std))
        filled = (put(standard, masked, predicted) * std + mean).clamp(0, 1)
        grey = put(patchify(images, size), masked, torch.full_like(predicted, 0.5))
        return tuple(unpatchify(x, size, self.backbone.grid) for x in (grey, filled))
