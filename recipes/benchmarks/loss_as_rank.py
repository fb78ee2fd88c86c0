"""Does LeJEPA's loss order models as a linear probe does, so that one could be chosen without labels?

    sslvit compare --data shapes:n=4000 --epochs 3 --fractions 1 --finetune_steps 0 --out runs/lejepa --methods \
        lejepa:base_lr=1e-4,weight_decay=0.01 lejepa:base_lr=1e-4,weight_decay=0.3 ...
    python recipes/benchmarks/loss_as_rank.py --comparison runs/lejepa

The runs of a comparison differ in what does not change the loss's scale. Prints Spearman's correlation of the mean loss
of each run's last tenth with the accuracy of a linear probe, with a bootstrap interval over runs, and what
choosing by the loss would have cost. Writes COMPARISON/loss.json.
"""

from pathlib import Path
from statistics import mean
from typing import Any

import torch
import tyro

from sslvit.cli import run_cli
from sslvit.experiments.compare import names_of
from sslvit.reports.run import markdown_table
from sslvit.storage import sealed
from sslvit.storage.jsonl import read_lines

LEAST, RESAMPLES = 8, 10_000
PROBE = "linear 100 %"


def ranks(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Spearman's correlation of the last dimension; equal values share the mean of their ranks."""

    def ranked(x: torch.Tensor) -> torch.Tensor:
        less, same = (x[..., :, None] > x[..., None, :]).sum(-1), (x[..., :, None] == x[..., None, :]).sum(-1)
        centred = less.double() + (same - 1) / 2 - (x.shape[-1] - 1) / 2
        return centred / centred.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    return (ranked(a) * ranked(b)).sum(-1)


def correlation(losses: list[float], accuracies: list[float]) -> tuple[float, float, float]:
    """Of all runs, with its 95% interval over resampled ones."""
    a, b = -torch.tensor(losses).double(), torch.tensor(accuracies).double()
    chosen = torch.randint(len(a), (RESAMPLES, len(a)), generator=torch.Generator().manual_seed(0))
    low, high = ranks(a[chosen], b[chosen]).quantile(torch.tensor([0.025, 0.975], dtype=a.dtype)).tolist()
    return ranks(a, b).item(), low, high


def last_loss(run: Path) -> float:
    """The mean over the last tenth of a run's log."""
    losses = [line["loss"] for line in read_lines(run / "metrics.jsonl") if line.get("loss") is not None]
    return mean(losses[-max(len(losses) // 10, 1) :])


def told(results: dict[str, Any]) -> list[str]:
    runs = sorted(results["runs"], key=lambda run: run["loss"])
    rows = [[run["name"], f"{run['loss']:.4f}", f"{100 * run['accuracy']:.1f}"] for run in runs]
    best = max(runs, key=lambda run: run["accuracy"])
    behind = 100 * (best["accuracy"] - runs[0]["accuracy"])
    return [
        *markdown_table(["run", "loss at the end", PROBE.replace(" %", "%")], rows),
        "",
        f"- Rank correlation of a low loss with accuracy, over {len(runs)} runs: {results['correlation']:.2f}, "
        f"95% CI [{results['low']:.2f}, {results['high']:.2f}].",
        f"- The run of the lowest loss is {behind:.1f} points behind the best one.",
    ]


def main(comparison: Path) -> None:
    """Compare the order of runs by their loss with that by a linear probe."""
    found = sealed.read(comparison / "results.json", longest=1 << 28)
    names = names_of(tuple(found["settings"]["methods"]))
    probed = found["values"][PROBE]
    runs: list[dict[str, Any]] = [
        {"name": name, "loss": last_loss(comparison / "runs" / f"{folder}-0"), "accuracy": probed[name][0]}
        for folder, name in names.items()
    ]
    if len(runs) < LEAST:
        raise ValueError(f"{comparison} has {len(runs)} runs: a correlation needs {LEAST} or more")
    middle, low, high = correlation([run["loss"] for run in runs], [run["accuracy"] for run in runs])
    results = {"runs": runs, "correlation": middle, "low": low, "high": high}
    sealed.write(comparison / "loss.json", results)
    print("\n".join(told(results)))


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
