"""iBOT and DINOv2 as their official code trains: the networks are copies of ours, losses lightly's or written out."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from sslvit import rng
from sslvit.models.vit import ViT
from sslvit.objectives.block_mask import Hidden
from sslvit.objectives.distillation import Distillation
from sslvit.objectives.objective import Batch

LARGE = 2


def batch_of(b: int = 6, sizes: tuple[int, ...] = (16, 16, 8, 8), seed: int = 0) -> Batch:
    ids = torch.arange(b)
    views = (rng.uniform(rng.key(seed, view, ids), 3, size, size).double() for view, size in enumerate(sizes))
    return Batch(tuple(views), rng.key(seed, "forward", ids))


@torch.no_grad()
def apart(objective: Distillation) -> Distillation:
    """Centres that are not zero, a mask token that is none, and a teacher that is not the student."""
    for teacher, _ in objective.pairs():
        for name, p in teacher.named_parameters():
            if name != "weight_g":
                p += 0.02 * rng.normal(rng.key("apart", name), *p.shape)
    for name in ("centre", "patch_centre", "mask_token"):
        value = getattr(objective, name)
        value += 0.1 * rng.normal(rng.key(name), *value.shape)
    return objective


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return -(target * (logits - logits.exp().sum(-1, keepdim=True).log())).sum(-1)


def written_out_pairs(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    """Targets and logits by view: the mean over all pairs of different views."""
    terms = [cross_entropy(t, s).mean() for i, t in enumerate(teacher) for j, s in enumerate(student) if i != j]
    return torch.stack(terms).mean()


def written_out_patches(targets: list[Tensor], logits: list[Tensor]) -> Tensor:
    """Of the hidden patches of each crop: iBOT's loop over images (main_ibot.py), with 0 where none is hidden."""
    terms = [cross_entropy(t, s).sum() / max(len(t), 1) for t, s in zip(targets, logits, strict=True)]
    return torch.stack(terms).mean()


class Twin:
    """losses: of the teacher's and the student's logits, of class tokens by view and of hidden patches by crop, with
    the masks, b h w, and the teacher's temperature; it also moves the centres."""

    def __init__(self, objective: Distillation, losses: Callable[..., Tensor], lr: float):
        self.networks, self.losses = copy.deepcopy(objective), losses
        trained = [p for p in self.networks.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=lr)

    def loss(self, batch: Batch, hidden: Hidden, temperature: float) -> Tensor:
        """One view at a time."""
        twin = self.networks
        head, teacher_head = twin.student_head, twin.head
        patch_head = getattr(twin, "student_patch_head", None) or head
        teacher_patch_head = getattr(twin, "patch_head", None) or teacher_head
        classes, logits, seen, features = [], [], [], []
        masks = hidden.mask.chunk(LARGE)
        with torch.no_grad():
            for view in batch.views[:LARGE]:
                cls, patches = twin.backbone(view)[:2]
                classes.append(teacher_head(cls))
                seen += list(teacher_patch_head(patches))
        for number, view in enumerate(batch.views):
            if number < LARGE:
                cls, patches = masked(twin.student, view, masks[number], twin.mask_token)
                logits += [patch_head(one[mask]) for one, mask in zip(patches, masks[number], strict=True)]
            else:
                cls = twin.student(view).cls
            features.append(cls)
        student = [head(cls) for cls in features]
        return self.losses(classes, student, seen, logits, hidden.mask, features[:LARGE], temperature)

    def step(self, loss: Tensor, momentum: float) -> dict[str, Tensor]:
        """Returns the gradients by name."""
        self.optimizer.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.networks.named_parameters() if p.grad is not None}
        self.optimizer.step()
        with torch.no_grad():
            for teacher, student in self.networks.pairs():
                for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                    t.mul_(momentum).add_((1 - momentum) * s)
        return gradients


def masked(vit: ViT, images: Tensor, mask: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    tokens = vit.embed(images).clone()
    tokens[mask] = token.flatten()
    encoded = vit.encode(tokens + vit.pos_embed[:, 1:])
    assert encoded.cls is not None
    return encoded.cls, encoded.patches


def train_both(objective: Distillation, twin: Twin, steps: int, hide: Callable[[Batch], Hidden], lr: float) -> None:
    """Asserts after each step that loss, gradients, centres and teacher agree to 1e-6."""
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        batch, progress = batch_of(seed=step), step / steps
        start, end = objective.teacher_temperature
        temperature = min(start + (end - start) * progress / objective.temperature_warmup, end)
        expected = twin.loss(batch, hide(batch), temperature)
        loss, _ = objective(batch, progress)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        optimizer.zero_grad()
        loss.backward()
        momentum = 1 + 0.5 * (objective.momentum - 1) * (1 + math.cos(math.pi * progress))
        theirs = twin.step(expected, momentum)
        ours = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            scale = float(theirs[name].abs().max())
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-6, atol=max(1e-6 * scale, 1e-12), msg=name)
        optimizer.step()
        objective.after_step((step + 1) / steps)
        state = twin.networks.state_dict()
        for name, value in objective.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=1e-6, atol=1e-6, msg=f"{name}, step {step}")
