"""Contestants made of timm's backbone and lightly's heads, losses and teacher, put together as in lightly's examples.

Each function is named after its objective. What differs from ours:
- simmim: patches are hidden one by one, ours in squares; as many to a patch or two.
- ijepa: the blocks are the very same, but drawn once, as lightly draws them in the loader; ours draws them in the step.
- moco_v3: its loss contrasts both views in one matrix, which is not MoCo v3's, and costs about the same.
- simclr, lejepa: batch norm sees one view (simclr) or the views of one size (lejepa) at a time, ours all of them.
- dino: each view goes through the student by itself, ours those of one size together.
- ibot: exactly half of the large crops have hidden patches, in ours half on average. The patches' centre follows the
  hidden patches alone; in ours it follows all, so the teacher's head reads all.
- dinov2: KoLeo compares an image with all of the batch, ours with those of its group of 64.

Ours also computes its metrics in the step and, where autocast is on, similarities and DINO's last layer in float32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from contestants import HEADS, PROGRESS, Contestant, Sizes
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss, LeJEPALoss, NTXentLoss, VICRegLoss
from lightly.models import utils
from lightly.models.modules import (
    DINOProjectionHead,
    IJEPAPredictorTIMM,
    LeJEPAProjectionHead,
    MAEDecoderTIMM,
    MaskedVisionTransformerTIMM,
    MoCoProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.modules.heads import VICRegProjectionHead
from peers import timm_vit
from torch import Tensor, nn

from sslvit import rng
from sslvit.objectives.multiblock import draw_blocks

Views = tuple[Tensor, ...]


def mae(sizes: Sizes, device: str) -> Contestant:
    patch, backbone = sizes.vit.patch_size[0], timm_vit(sizes, device)
    encoder = MaskedVisionTransformerTIMM(vit=backbone)
    width, depth, heads = HEADS[sizes.heads].decoder
    shape = {"patch_size": patch, "embed_dim": sizes.vit.width, "decoder_embed_dim": width, "decoder_depth": depth}
    decoder = MAEDecoderTIMM(num_patches=backbone.patch_embed.num_patches, decoder_num_heads=heads, **shape).to(device)

    def loss(views: Views) -> Tensor:
        b, length = sizes.batch_size, encoder.sequence_length
        visible, hidden = utils.random_token_mask(size=(b, length), mask_ratio=0.75, device=device)
        seen = decoder.embed(encoder.encode(images=views[0], idx_keep=visible))
        tokens = utils.repeat_token(decoder.mask_token, (b, length))
        tokens = utils.set_at_index(tokens, visible, seen.type_as(tokens))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(tokens), hidden))
        target = utils.get_at_index(utils.patchify(views[0], patch), hidden - 1)
        target = utils.normalize_mean_var(target, dim=-1)
        return F.mse_loss(predicted, target)

    return Contestant(nn.ModuleList([encoder, decoder]), loss)


def simmim(sizes: Sizes, device: str) -> Contestant:
    patch, width = sizes.vit.patch_size[0], sizes.vit.width
    encoder = MaskedVisionTransformerTIMM(vit=timm_vit(sizes, device), pos_embed_initialization="learn").to(device)
    head = nn.Linear(width, 3 * patch**2).to(device)

    def loss(views: Views) -> Tensor:
        shape = (sizes.batch_size, encoder.sequence_length)
        _, hidden = utils.random_token_mask(size=shape, mask_ratio=0.6, device=device)
        encoded = encoder.encode(images=views[0], idx_mask=hidden)
        target = utils.get_at_index(utils.patchify(views[0], patch), hidden - 1)
        return F.l1_loss(head(utils.get_at_index(encoded, hidden)), target)

    return Contestant(nn.ModuleList([encoder, head]), loss)


def ijepa(sizes: Sizes, device: str) -> Contestant:
    def encoder() -> nn.Module:
        return MaskedVisionTransformerTIMM(vit=timm_vit(sizes, device, class_token=False, global_pool="")).to(device)

    student, teacher = student_and_teacher(encoder)
    width, depth = HEADS[sizes.heads].predictor
    shape = {"mlp_dim": sizes.vit.width, "predictor_embed_dim": width, "num_heads": sizes.vit.config.heads}
    predictor = IJEPAPredictorTIMM(num_patches=student.sequence_length, depth=depth, **shape).to(device)
    context, targets = draw_blocks(rng.fold(sizes.keys(device), "blocks"), PROGRESS, sizes.vit.grid)
    context, targets = [context], list(targets.unbind(1))

    def loss(views: Views) -> Tensor:
        with torch.no_grad():
            wanted = utils.apply_masks(F.layer_norm(teacher.encode(views[0]), (sizes.vit.width,)), targets)
        seen = student.encode(views[0], idx_keep=context[0])
        return F.smooth_l1_loss(predictor(seen, context, targets), wanted)

    return Contestant(
        nn.ModuleList([student, predictor]), loss, lambda: utils.update_momentum(student, teacher, m=0.996)
    )


def moco_v3(sizes: Sizes, device: str) -> Contestant:
    hidden = HEADS[sizes.heads].moco_v3

    def both() -> nn.Module:
        projector = MoCoProjectionHead(sizes.vit.width, hidden, 256, 3, True)
        return nn.Sequential(timm_vit(sizes, device), projector).to(device)

    (student, teacher), criterion = student_and_teacher(both), NTXentLoss(temperature=0.2)
    predictor = MoCoProjectionHead(256, hidden, 256, 2, True).to(device)
    student[0].patch_embed.proj.requires_grad_(False)

    def loss(views: Views) -> Tensor:
        queries = [predictor(student(view)) for view in views]
        with torch.no_grad():
            keys = [teacher(view) for view in views]
        return criterion(queries[0], keys[1]) + criterion(queries[1], keys[0])

    trained = nn.ModuleList([student, predictor])
    return Contestant(trained, loss, lambda: utils.update_momentum(student, teacher, m=0.99))


def simclr(sizes: Sizes, device: str) -> Contestant:
    head = SimCLRProjectionHead(sizes.vit.width, *HEADS[sizes.heads].simclr)
    model, criterion = nn.Sequential(timm_vit(sizes, device), head).to(device), NTXentLoss(temperature=0.1)
    return Contestant(model, lambda views: criterion(model(views[0]), model(views[1])))


def vicreg(sizes: Sizes, device: str) -> Contestant:
    dimension = HEADS[sizes.heads].vicreg
    head = VICRegProjectionHead(sizes.vit.width, dimension, dimension, num_layers=3)
    model, criterion = nn.Sequential(timm_vit(sizes, device), head).to(device), VICRegLoss()
    return Contestant(model, lambda views: criterion(model(views[0]), model(views[1])))


def lejepa(sizes: Sizes, device: str) -> Contestant:
    hidden, dimension, directions = HEADS[sizes.heads].lejepa
    head = LeJEPAProjectionHead(sizes.vit.width, hidden, dimension)
    model = nn.Sequential(timm_vit(sizes, device, dynamic_img_size=True), head).to(device)
    criterion = LeJEPALoss(lambda_param=0.02, sigreg_num_vectors=directions).to(device)

    def loss(views: Views) -> Tensor:
        large, small = (model(torch.cat(some)).unflatten(0, (len(some), -1)) for some in (views[:2], views[2:]))
        return criterion(local_proj=small, global_proj=large)

    return Contestant(model, loss)


def dino(sizes: Sizes, device: str) -> Contestant:
    heads = HEADS[sizes.heads].dino

    def both() -> nn.Module:
        backbone = timm_vit(sizes, device, dynamic_img_size=True)
        return nn.Sequential(backbone, DINOProjectionHead(sizes.vit.width, *heads)).to(device)

    (student, teacher), criterion = student_and_teacher(both), DINOLoss(output_dim=heads[-1]).to(device)

    def loss(views: Views) -> Tensor:
        with torch.no_grad():
            targets = [teacher(view) for view in views[:2]]
        return criterion(targets, [student(view) for view in views], epoch=1)

    return Contestant(student, loss, lambda: utils.update_momentum(student, teacher, m=0.996))


def ibot(sizes: Sizes, device: str) -> Contestant:
    return with_hidden_patches(sizes, device, HEADS[sizes.heads].ibot, koleo_weight=0.0)


def dinov2(sizes: Sizes, device: str) -> Contestant:
    return with_hidden_patches(sizes, device, HEADS[sizes.heads].dino, koleo_weight=0.1)


def with_hidden_patches(sizes: Sizes, device: str, heads: tuple[int, int, int], *, koleo_weight: float) -> Contestant:
    def both() -> nn.Module:
        backbone = timm_vit(sizes, device, dynamic_img_size=True)
        encoder = MaskedVisionTransformerTIMM(vit=backbone, antialias=False, pos_embed_initialization="skip")
        head = DINOProjectionHead(sizes.vit.width, *heads, norm_last_layer=False)
        return nn.ModuleList([encoder, head]).to(device)

    student, teacher = student_and_teacher(both)
    of_crops, of_patches = DINOLoss(output_dim=heads[-1]).to(device), IBOTPatchLoss(output_dim=heads[-1]).to(device)
    koleo, (height, width) = KoLeoLoss(), sizes.vit.grid

    def loss(views: Views) -> Tensor:
        large, small = torch.cat(views[:2]), torch.cat(views[2:])
        # Its default for max_num_masks_per_block is an error where fewer than 4 patches are to be hidden.
        shape = (len(large), height, width)
        blocks = utils.random_block_mask(shape, max_num_masks_per_block=height * width, device=device)
        mask = F.pad(blocks.flatten(1), (1, 0))  # never the class token
        with torch.no_grad():
            seen = teacher[0].encode(large)
            targets, patch_targets = teacher[1](seen[:, 0]), teacher[1](seen[mask])
        encoded = student[0].encode(large, mask=mask)
        features = torch.cat([encoded[:, 0], student[0].encode(small)[:, 0]])
        total = of_crops(targets.chunk(2), student[1](features).chunk(len(views)))
        total = total + of_patches(patch_targets, student[1](encoded[mask]), blocks)
        if koleo_weight:
            total = total + koleo_weight * sum(koleo(crop) for crop in encoded[:, 0].chunk(2))
        return total

    return Contestant(student, loss, lambda: utils.update_momentum(student, teacher, m=0.992))


def student_and_teacher(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Made twice, as a layer with weight norm cannot be copied."""
    student, teacher = make(), make()
    teacher.load_state_dict(student.state_dict())
    utils.deactivate_requires_grad(teacher)
    return student, teacher
