"""A training step of each objective beside the best peers that have it: seconds and peak memory, in one run, in turns.

    python recipes/benchmarks/steps.py --model S/16 --image_size 224 --batch_size 4

Forward, backward and AdamW (fused, for everybody), and the teacher's move, on the same images; views and reading are
measured elsewhere. Peers take part where they are installed: timm's backbone with a linear head (supervised) or with
nothing on it (mpp, of which there is no faithful peer; vit-pytorch's where it runs), transformers' ViTMAE, and timm's
backbone with lightly's heads, losses and teacher (moco_v3, dino, mae). Every peer is of the same sizes; heads and
decoders are the papers' or, with --heads small, those of our recipes' small presets. "floor" is what our step's
operations would take at the rate at which timm's bare ViT of these sizes does its own, in the same rounds. lightly's
MoCo loss contrasts both views in one matrix, which is not MoCo v3's, and costs about the same.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
import torch.nn.functional as F
import tyro
from timing import OURS, compared, in_turns, line, matrix_rate, save
from torch import Tensor, nn

from sslvit import rng
from sslvit.models.vit import ViT
from sslvit.objectives.dino import DINO
from sslvit.objectives.mae import MAE
from sslvit.objectives.moco_v3 import MoCoV3
from sslvit.objectives.mpp import MPP
from sslvit.objectives.objective import Batch
from sslvit.objectives.supervised import Supervised
from sslvit.training.cost import counting

OBJECTIVES = ("supervised", "mpp", "mae", "moco_v3", "dino")
PEERS = {"timm": ("supervised", "mpp"), "transformers": ("mae",), "lightly": ("mae", "moco_v3", "dino")}
PEERS |= {"vit_pytorch": ("mpp",)}
FLOOR = "floor, by timm"
CLASSES, SMALL_CROPS = 1000, 8
BLOCKS = ("Block", "ViTMAELayer")  # by their names: ours and timm's, and transformers'
TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Heads(NamedTuple):
    hidden: int  # MoCo v3's
    dino: tuple[int, int, int]  # hidden, bottleneck, outputs
    decoder: tuple[int, int, int]  # MAE's width, depth, heads


HEADS = {"paper": Heads(4096, (2048, 256, 65536), (512, 8, 16)), "small": Heads(512, (512, 64, 1024), (128, 2, 4))}


class Sizes(NamedTuple):
    model: str
    image_size: int
    batch_size: int
    heads: Literal["paper", "small"] = "paper"

    @property
    def vit(self) -> ViT:
        return ViT.variant(self.model, image_size=self.image_size)

    @property
    def small_crop(self) -> int:
        """Whole patches, of at most three sevenths, as DINO's 96 of 224."""
        patch = self.vit.patch_size[0]
        return max(self.image_size * 3 // 7 // patch, 1) * patch

    def views(self, objective: str, device: str) -> tuple[Tensor, ...]:
        sizes = [self.image_size] * (2 if objective in ("moco_v3", "dino") else 1)
        sizes += [self.small_crop] * SMALL_CROPS if objective == "dino" else []
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.rand(self.batch_size, 3, s, s, generator=generator).to(device) for s in sizes)


class Contestant(NamedTuple):
    trained: nn.Module
    loss: Callable[[tuple[Tensor, ...]], Tensor]
    after: Callable[[], None] = lambda: None


def ours(name: str, sizes: Sizes, device: str) -> Contestant:
    vit, heads = sizes.vit, HEADS[sizes.heads]
    decoder = dict(zip(("decoder_width", "decoder_depth", "decoder_heads"), heads.decoder, strict=True))
    dino = dict(zip(("hidden", "bottleneck", "outputs"), heads.dino, strict=True))
    objective = {
        "supervised": lambda: Supervised(vit, classes=CLASSES),
        "mpp": lambda: MPP(vit),
        "mae": lambda: MAE(ViT.variant(sizes.model, image_size=sizes.image_size, position="sincos_mae"), **decoder),
        "moco_v3": lambda: MoCoV3(vit, hidden=heads.hidden),
        "dino": lambda: DINO(vit, drop_path=0.0, **dino),
    }[name]()
    objective.to(device).train()
    keys = rng.key(0, torch.arange(sizes.batch_size, device=device))
    labels = torch.arange(sizes.batch_size, device=device)
    return Contestant(
        objective, lambda views: objective(Batch(views, keys, labels), 0.5)[0], lambda: objective.after_step(0.5)
    )


def timm_vit(sizes: Sizes, device: str, **changes: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    vit = sizes.vit
    shape = {"img_size": sizes.image_size, "patch_size": vit.patch_size[0], "embed_dim": vit.width, "num_classes": 0}
    shape |= {"depth": vit.depth, "num_heads": vit.config.heads, "mlp_ratio": vit.config.mlp_width / vit.width}
    return VisionTransformer(**(shape | changes)).to(device).train()


def by_timm(name: str, sizes: Sizes, device: str) -> Contestant:
    if name == "mpp":
        bare = timm_vit(sizes, device)
        return Contestant(bare, lambda views: bare(views[0]).mean())
    model, labels = timm_vit(sizes, device, num_classes=CLASSES), torch.arange(sizes.batch_size, device=device)
    return Contestant(model, lambda views: F.cross_entropy(model(views[0]), labels))


def by_vit_pytorch(name: str, sizes: Sizes, device: str) -> Contestant:
    from vit_pytorch import ViT as Theirs
    from vit_pytorch.mpp import MPP as TheirMPP

    vit, patch = sizes.vit, sizes.vit.patch_size[0]
    heads = vit.config.heads
    shape = {"dim": vit.width, "depth": vit.depth, "heads": heads, "dim_head": vit.width // heads}
    model = Theirs(image_size=sizes.image_size, patch_size=patch, num_classes=1, mlp_dim=vit.config.mlp_width, **shape)
    model = TheirMPP(model, patch_size=patch, dim=vit.width, mask_prob=0.5).to(device).train()
    return Contestant(model, lambda views: model(views[0]))


def by_transformers(name: str, sizes: Sizes, device: str) -> Contestant:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    vit = sizes.vit
    shape = {"hidden_size": vit.width, "num_hidden_layers": vit.depth, "num_attention_heads": vit.config.heads}
    shape |= {"intermediate_size": vit.config.mlp_width, "image_size": sizes.image_size, "norm_pix_loss": True}
    width, depth, count = HEADS[sizes.heads].decoder
    shape |= {"decoder_hidden_size": width, "decoder_num_hidden_layers": depth, "decoder_num_attention_heads": count}
    shape |= {"decoder_intermediate_size": 4 * width}
    model = ViTMAEForPreTraining(ViTMAEConfig(**shape, patch_size=vit.patch_size[0])).to(device).train()
    return Contestant(model, lambda views: model(pixel_values=views[0]).loss)


def by_lightly(name: str, sizes: Sizes, device: str) -> Contestant:
    return {"mae": lightly_mae, "moco_v3": lightly_moco, "dino": lightly_dino}[name](sizes, device)


def lightly_mae(sizes: Sizes, device: str) -> Contestant:
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    patch, backbone = sizes.vit.patch_size[0], timm_vit(sizes, device)
    encoder = MaskedVisionTransformerTIMM(vit=backbone)
    width, depth, heads = HEADS[sizes.heads].decoder
    shape = {"patch_size": patch, "embed_dim": sizes.vit.width, "decoder_embed_dim": width, "decoder_depth": depth}
    decoder = MAEDecoderTIMM(num_patches=backbone.patch_embed.num_patches, decoder_num_heads=heads, **shape).to(device)
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})

    def loss(views: tuple[Tensor, ...]) -> Tensor:
        b, length = sizes.batch_size, encoder.sequence_length
        visible, hidden = utils.random_token_mask(size=(b, length), mask_ratio=0.75, device=device)
        seen = decoder.embed(encoder.encode(images=views[0], idx_keep=visible))
        tokens = utils.repeat_token(decoder.mask_token, (b, length))
        tokens = utils.set_at_index(tokens, visible, seen.type_as(tokens))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(tokens), hidden))
        target = utils.get_at_index(utils.patchify(views[0], patch), hidden - 1)
        target = utils.normalize_mean_var(target, dim=-1)
        return F.mse_loss(predicted, target)

    return Contestant(model, loss)


def lightly_moco(sizes: Sizes, device: str) -> Contestant:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    hidden = HEADS[sizes.heads].hidden
    projector = MoCoProjectionHead(sizes.vit.width, hidden, 256, 3, True)
    student = nn.Sequential(timm_vit(sizes, device), projector).to(device)
    predictor = MoCoProjectionHead(256, hidden, 256, 2, True).to(device)
    teacher, criterion = copy.deepcopy(student), NTXentLoss(temperature=0.2)
    deactivate_requires_grad(teacher)
    student[0].patch_embed.proj.requires_grad_(False)

    def loss(views: tuple[Tensor, ...]) -> Tensor:
        queries = [predictor(student(view)) for view in views]
        with torch.no_grad():
            keys = [teacher(view) for view in views]
        return criterion(queries[0], keys[1]) + criterion(queries[1], keys[0])

    trained = nn.ModuleList([student, predictor])
    return Contestant(trained, loss, lambda: update_momentum(student, teacher, m=0.99))


def lightly_dino(sizes: Sizes, device: str) -> Contestant:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    def both() -> nn.Module:
        vit = timm_vit(sizes, device, dynamic_img_size=True)
        return nn.Sequential(vit, DINOProjectionHead(sizes.vit.width, *heads)).to(device)

    heads = HEADS[sizes.heads].dino
    student, teacher, criterion = both(), both(), DINOLoss(output_dim=heads[-1]).to(device)
    teacher.load_state_dict(student.state_dict())
    deactivate_requires_grad(teacher)

    def loss(views: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            targets = [teacher(view) for view in views[:2]]
        return criterion(targets, [student(view) for view in views], epoch=1)

    return Contestant(student, loss, lambda: update_momentum(student, teacher, m=0.996))


BY = {"timm": by_timm, "transformers": by_transformers, "lightly": by_lightly, "vit_pytorch": by_vit_pytorch}


def compile_blocks(trained: nn.Module, compile: bool) -> None:
    for module in trained.modules():
        if compile and type(module).__name__ in BLOCKS:
            module.compile()


def stepper(
    who: str, name: str, sizes: Sizes, device: str, dtype: torch.dtype = torch.float32, compile: bool = False
) -> Callable[[], None]:
    """Takes one step. The blocks of all contestants are compiled, or of none."""
    contestant = (BY.get(who) or ours)(name, sizes, device)
    compile_blocks(contestant.trained, compile)
    views = sizes.views(name, device)
    optimizer = torch.optim.AdamW([p for p in contestant.trained.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = contestant.loss(views)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        contestant.after()

    return step


def counted(step: Callable[[], None]) -> int:
    """Floating-point operations."""
    with counting() as counter:
        step()
    return counter.get_total_flops()


def peak(who: str, name: str, sizes: Sizes, device: str, threads: int) -> float:
    """MiB that three steps need on a CPU beyond the imports, in a process of their own."""
    options = json.dumps([who, name, sizes, device, threads])
    done = subprocess.run([sys.executable, __file__, "--peak-of", options], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def print_peak(who: str, name: str, sizes: list, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    sizes = Sizes(*sizes)
    if who in BY:
        __import__(who)
    torch.optim.AdamW([nn.Parameter(torch.ones(64, 64) @ torch.ones(64, 64))])  # what torch loads when it is first used
    before = psutil.Process().memory_info().rss
    step = stepper(who, name, sizes, device)
    for _ in range(3):
        step()
    lines = Path("/proc/self/status").read_text().splitlines()
    high = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    print((high - before) / 2**20)


def main(
    model: str = "S/16",
    image_size: int = 224,
    batch_size: int = 4,
    objectives: tuple[str, ...] = OBJECTIVES,
    rounds: int = 7,
    threads: int = 0,
    memory: bool = True,
    precision: Literal["no", "bf16", "fp16"] = "no",
    compile: bool = False,
    heads: Literal["paper", "small"] = "paper",
    out: Path | None = None,
) -> None:
    """Measure a step of each objective, and how many times a peer's seconds it takes: medians (least to most)."""
    torch.set_num_threads(threads or torch.get_num_threads())
    results = []
    device, sizes = "cuda" if torch.cuda.is_available() else "cpu", Sizes(model, image_size, batch_size, heads)
    how = (sizes, device, TYPES[precision], compile)
    rate = matrix_rate(device, TYPES[precision])
    print(
        f"{device}, {torch.get_num_threads()} threads; matrix products: {rate / 1e9:,.0f} GFLOP/s in {TYPES[precision]}"
    )
    for name in objectives:
        steps, mebibytes = {}, {}
        for who in (OURS, *(who for who, has in PEERS.items() if name in has)):
            if who != OURS and not find_spec(who):
                print(f"{who} is not installed and is left out")
                continue
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            try:
                step = stepper(who, name, *how)
                for _ in range(3 if device == "cuda" else 1):
                    step()
            except Exception as error:  # a peer that does not run is part of the result
                if who == OURS:
                    raise
                print(f"{name:11} {who:13} does not run: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
                continue
            steps[who] = step
            if device == "cuda":
                mebibytes[who] = (torch.cuda.max_memory_allocated() - before) / 2**20
            elif memory:
                mebibytes[who] = peak(who, name, sizes, device, torch.get_num_threads())
        if find_spec("timm"):
            steps[FLOOR] = stepper("timm", "mpp", *how)
        operations = {who: counted(steps[who]) for who in (OURS, FLOOR) if who in steps}
        about = {"images": batch_size, "flops": operations[OURS], "rate": rate, "mebibytes": mebibytes}
        case = f"step of {name}, {model} at {image_size} px, batch {batch_size}, {heads} heads"
        seconds = in_turns(steps, rounds=rounds)
        if FLOOR in seconds:
            seconds[FLOOR] = [operations[OURS] / operations[FLOOR] * bare for bare in seconds[FLOOR]]
        measured = compared(case, seconds, **about)
        print("\n".join(map(line, measured)), flush=True)
        results += measured
    save(results, out, "steps")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak-of"]:
        print_peak(*json.loads(sys.argv[2]))
    else:
        tyro.cli(main)
