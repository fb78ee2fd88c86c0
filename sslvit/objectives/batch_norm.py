"""Batch norm over the whole batch of all processes (https://arxiv.org/abs/1502.03167).

torch's SyncBatchNorm is for GPUs alone; this one runs wherever torch.distributed does. On one process it is
nn.BatchNorm1d to the last bit, and everywhere its parameters and buffers have that module's names.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sslvit.processes.collectives import all_gather, processes


class BatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        """b d -> b d"""
        if not self.training:
            return super().forward(x)
        rows = len(x) * processes()  # every process has the same number
        if rows == 1:
            raise ValueError("batch norm needs two images at least: a single one becomes zeros")
        if processes() == 1:
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            y = F.batch_norm(x, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
        else:
            y, mean, variance = self.normalize_together(x)
            mean = self.running_mean.lerp(mean.detach(), self.momentum)
            variance = self.running_var.lerp(variance.detach() * rows / (rows - 1), self.momentum)
        self.remember(mean, variance)
        return y

    def normalize_together(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised rows of this process; mean and variance over the rows of all: b d -> b d, d, d"""
        wide = x.to(self.running_mean.dtype)  # full precision for the statistics
        local = torch.stack([wide.mean(0), wide.var(0, correction=0)])
        # Variances are combined around the common mean. Sums of squares would lose digits where the mean is large.
        means, variances = all_gather(rearrange(local, "s d -> 1 s d")).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        scale = (variance + self.eps).rsqrt()
        y = (wide - mean) * (scale if self.weight is None else scale * self.weight)
        return (y if self.bias is None else y + self.bias).to(x.dtype), mean, variance

    @torch.no_grad()
    def remember(self, mean: Tensor, variance: Tensor) -> None:
        """Updates the running statistics, unless they are not finite: one bad batch would spoil them forever."""
        finite = (mean + variance).isfinite().all()
        self.running_mean.copy_(torch.where(finite, mean, self.running_mean))
        self.running_var.copy_(torch.where(finite, variance, self.running_var))
        self.num_batches_tracked += 1
