"""What a run says that it cost: operations by arithmetic, and nothing is moved by counting them."""

import json

import pytest
import torch
import torch.nn.functional as F
from tiny_run import objective as tiny_objective, source, tiny_run

from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.mpp import MPP
from sslvit.training.cost import IMAGES, counting, flops_per_image, peak_memory
from sslvit.views.pretraining import CropFlip

CPU = torch.device("cpu")


def test_the_operations_of_a_step_are_those_of_its_matrix_products():
    d, depth, patch, channels = 32, 3, 8, 3
    n = (32 // patch) ** 2
    objective = MPP(ViT(ViTConfig(image_size=32, patch_size=patch, width=d, depth=depth, heads=2)))
    found = flops_per_image(objective, CropFlip(32), source().read(torch.arange(8).numpy()), CPU)
    tokens = n + 1
    block = 2 * tokens * d * (3 * d + d + 4 * d + 4 * d)  # qkv, projection, and the two layers of the MLP
    head, embedding = 2 * (n // 2) * d * 512, 2 * n * patch * patch * channels * d
    linear = 3 * (depth * block + head) + 2 * embedding  # backward twice as much; images need no gradient
    attention = depth * 2 * 2 * tokens * tokens * d
    # Backward costs twice as much again, and half a forward more where a fused kernel computes attention anew.
    rank = 2 * IMAGES * d  # the product of which health takes the effective rank
    assert linear + 3 * attention <= found - rank <= linear + 3.5 * attention


@pytest.mark.parametrize("case", ["itself", "others", "bfloat16", "masked"])
def test_attention_is_two_products_forward_and_five_back(case):
    b, heads, d, n, m = 2, 3, 16, 17, 5 if case == "others" else 17
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    q = torch.randn(b, heads, n, d, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(b, heads, m, d, dtype=dtype, requires_grad=True) for _ in "kv")
    mask = torch.ones(n, m, dtype=torch.bool).tril() if case == "masked" else None
    product = 2 * b * heads * n * m * d
    with counting() as forward:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with counting() as backward:
        attended.sum().backward()
    assert (forward.get_total_flops(), backward.get_total_flops()) == (2 * product, 5 * product)


def test_counting_changes_neither_the_objective_nor_the_run(tmp_path):
    objective = tiny_objective()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    flops_per_image(objective, CropFlip(32), source().read(torch.arange(IMAGES).numpy()), CPU)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_a_run_leaves_its_cost_and_one_that_goes_on_counts_the_whole(tmp_path):
    tiny_run(tmp_path / "run")
    cost = json.loads((tmp_path / "run" / "cost.json").read_text())
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert cost["images"] == 4 * 32
    assert cost["seconds"] == logged["seconds"] > 0
    assert cost["images_per_second"] == pytest.approx(128 / cost["seconds"])
    assert cost["flops"] == 128 * cost["flops_per_image"] > 0
    assert cost["processes"] == 1


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory(CPU)
    held = torch.ones(64 << 20)  # 256 MiB
    assert peak_memory(CPU) >= max(before, 4 * held.numel())
