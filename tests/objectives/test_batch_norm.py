"""Batch norm on one process is torch's, and on two processes it is that of the whole batch."""

import copy
from pathlib import Path

import preloaded
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sslvit import rng
from sslvit.objectives.batch_norm import BatchNorm


def batch(step: int, b: int = 12, d: int = 5) -> Tensor:
    """Columns with means far from zero and scales far from one; the halves of the batch differ, too."""
    x = rng.normal(rng.key(step), b, d).double()
    return (
        x * torch.tensor([1.0, 10.0, 0.1, 3.0, 1e-3])
        + torch.tensor([0.0, 5.0, -300.0, 1.0, 2.0])
        + torch.arange(b)[:, None] / b
    )


def twins(affine: bool) -> tuple[BatchNorm, nn.BatchNorm1d]:
    theirs = nn.BatchNorm1d(5, affine=affine).double()
    if affine:
        theirs.weight.data += 0.3 * torch.arange(5)
        theirs.bias.data -= 0.2 * torch.arange(5)
    ours = BatchNorm(5, affine=affine).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def loss_of(y: Tensor, first_row: int = 0) -> Tensor:
    """Not symmetric in rows or columns, so that every gradient counts. A sum: over processes, the sum of theirs."""
    rows = torch.arange(first_row, first_row + len(y))[:, None]
    return (y * (rows + 1.0).sin() + (0.1 * y * (torch.arange(5) + rows)).cos()).sum()


@pytest.mark.parametrize("affine", [True, False])
def test_on_one_process_it_is_torchs_to_the_last_bit(affine):
    ours, theirs = twins(affine)
    for step in range(3):
        x = batch(step).requires_grad_()
        y = copy.deepcopy(x)
        loss_of(ours(x)).backward()
        loss_of(theirs(y)).backward()
        assert torch.equal(x.grad, y.grad)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    for mine, p in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad, p.grad)
    assert torch.equal(ours.eval()(batch(9)), theirs.eval()(batch(9)))


def together(rank: int, folder: Path) -> None:
    """Half of each batch on each process; writes what this one got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    results = {}
    for affine in (True, False):
        ours, _ = twins(affine)
        for step in range(3):
            x = batch(step).chunk(2)[rank].clone().requires_grad_()
            y = ours(x)
            loss_of(y, first_row=6 * rank).backward()
            results |= {f"{affine} {step} output": y.detach(), f"{affine} {step} gradient": x.grad}
        results |= {f"{affine} {name}": value for name, value in ours.state_dict().items()}
        results |= {f"{affine} gradient of {name}": p.grad for name, p in ours.named_parameters()}
    half = BatchNorm(5).to(torch.float32)(batch(0).chunk(2)[rank].bfloat16())
    results["bfloat16"] = half.detach()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.processes
def test_on_two_processes_it_is_torchs_of_the_whole_batch_in_float64(tmp_path):
    preloaded.spawn(together, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for affine in (True, False):
        _, theirs = twins(affine)
        for step in range(3):
            x = batch(step).requires_grad_()
            y = theirs(x)
            loss_of(y).backward()
            for name, expected in (("output", y), ("gradient", x.grad)):
                both = torch.cat([results[f"{affine} {step} {name}"] for results in (first, second)])
                scale = expected.detach().abs().amax(0)
                assert ((both - expected).abs() <= 1e-9 * scale).all(), (affine, step, name)
        for name, value in theirs.state_dict().items():
            assert torch.equal(first[f"{affine} {name}"], second[f"{affine} {name}"])
            torch.testing.assert_close(first[f"{affine} {name}"], value, rtol=1e-12, atol=0)
        for name, p in theirs.named_parameters():
            ours = first[f"{affine} gradient of {name}"] + second[f"{affine} gradient of {name}"]
            torch.testing.assert_close(ours, p.grad, rtol=1e-9, atol=1e-9)
    assert first["bfloat16"].dtype == torch.bfloat16
    expected = nn.BatchNorm1d(5)(batch(0).bfloat16().float()).bfloat16()
    torch.testing.assert_close(torch.cat([first["bfloat16"], second["bfloat16"]]), expected)


def test_a_batch_that_is_not_finite_leaves_the_running_statistics():
    ours, _ = twins(affine=True)
    ours(batch(0))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    bad = batch(1)
    bad[3, 2] = torch.nan
    assert ours(bad).isnan().any()
    for name in ("running_mean", "running_var"):
        assert torch.equal(ours.state_dict()[name], before[name])


def test_one_image_has_no_statistics():
    with pytest.raises(ValueError, match="two images at least"):
        BatchNorm(3)(torch.zeros(1, 3))
