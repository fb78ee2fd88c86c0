"""Attentive probe: a learned query reads all patches, and one linear layer classifies what it gathered.

For objectives that never train the class token (MAE, MPP), where cls means little and the mean buries what a few
patches know. As in AIM (https://arxiv.org/abs/2401.08541): batch norm without scale and shift (eps 1e-6) on the tokens,
keys and values linear without bias, one query per head, a linear layer (AIM's has no bias); no other output projection.
AIM averages its last blocks' tokens before the final norm; here the tokens are `extract`'s patches.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sslvit import rng
from sslvit.evaluate.metrics import top
from sslvit.evaluate.split import hold_out
from sslvit.objectives import schedule


@dataclass(frozen=True)
class Settings:
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)  # AdamW's
    decay: float = 0.05
    batch_size: int = 1024
    epochs: int = 30
    heads: int = 4


class AttentiveHead(nn.Module):
    """b p d -> b classes"""

    def __init__(self, width: int, classes: int, *, heads: int, seed: int = 0):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        with torch.random.fork_rng(devices=[]):  # torch's layers draw from its global generator when they are made
            torch.manual_seed(seed)
            self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
            self.query = nn.Parameter(0.02 * torch.randn(heads, 1, width // heads))
            self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
            self.classify = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens.mT).mT
        key, value = (rearrange(to(tokens), "b p (k d) -> b k p d", k=self.heads) for to in (self.key, self.value))
        gathered = F.scaled_dot_product_attention(self.query.expand(len(tokens), -1, -1, -1), key, value)
        return self.classify(rearrange(gathered, "b k 1 d -> b (k d)"))

    @torch.no_grad()
    def probabilities(self, tokens: Tensor) -> Tensor:
        assert not self.training
        return torch.cat([self(batch).softmax(-1) for batch in tokens.split(1024)])


def attentive_probe(
    tokens: Tensor, labels: Tensor, settings: Settings, *, seed: int = 0
) -> tuple[AttentiveHead, dict[float, float]]:
    """A head trained on all of these labels, in eval mode, at the rate that is best on a held-out tenth of them, and
    the held-out accuracy by rate, empty for a single rate: n p d, n."""
    if tokens.ndim != 3 or labels.shape != tokens.shape[:1]:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} and labels {tuple(labels.shape)} are not n p d and n")
    best, accuracy = settings.rates[0], {}
    if len(settings.rates) > 1:
        rows, held = hold_out(labels, seed=seed)
        for rate in settings.rates:
            head = _train(tokens, labels, rows, rate, settings, seed)
            accuracy[rate] = top(head.probabilities(tokens[held]), labels[held])
        best = max(accuracy, key=accuracy.__getitem__)
    return _train(tokens, labels, torch.arange(len(labels)), best, settings, seed), accuracy


def _train(tokens: Tensor, labels: Tensor, rows: Tensor, rate: float, settings: Settings, seed: int) -> AttentiveHead:
    head = AttentiveHead(tokens.shape[2], int(labels.max()) + 1, heads=settings.heads, seed=seed).to(tokens.device)
    groups = [
        {"params": [p for p in head.parameters() if p.ndim == 2], "weight_decay": settings.decay},
        {"params": [p for p in head.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    step, steps = 0, settings.epochs * -(-len(rows) // settings.batch_size)
    for epoch in range(settings.epochs):
        order = rows[rng.permutation(rng.key(seed, "attentive", epoch), len(rows)).to(rows.device)]
        for batch in order.split(settings.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = schedule.warmup_cosine(step / steps, rate, warmup=0.1)
            F.cross_entropy(head(tokens[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return head.eval()
