"""The order of runs by their loss beside that by a probe, against SciPy's rank correlation."""

import json

import loss_as_rank
import pytest
import torch

from sslvit.storage import sealed

LOSSES, ACCURACIES = [0.5, 0.4, 0.3, 0.2, 0.1, 0.6, 0.7, 0.3], [0.2, 0.3, 0.35, 0.3, 0.6, 0.25, 0.1, 0.5]


def test_the_correlation_is_scipys_ties_included():
    scipy = pytest.importorskip("scipy.stats")
    middle, low, high = loss_as_rank.correlation(LOSSES, ACCURACIES)
    assert middle == pytest.approx(-scipy.spearmanr(LOSSES, ACCURACIES).statistic, abs=1e-12)
    assert low < middle < high <= 1
    opposite = loss_as_rank.ranks(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 4.0, 2.0]))
    assert opposite.item() == pytest.approx(-1)


def test_a_comparison_is_read(tmp_path, capsys):
    rates = [f"1e-{number}" for number in range(8)]
    names = [f"LeJEPA (base_lr {rate})" for rate in rates]
    values = {"linear 100 %": {name: [accuracy] for name, accuracy in zip(names, ACCURACIES, strict=True)}}
    methods = [f"lejepa:base_lr={rate}" for rate in rates]
    sealed.write(tmp_path / "results.json", {"settings": {"methods": methods}, "values": values})
    for rate, loss in zip(rates, LOSSES, strict=True):
        run = tmp_path / "runs" / f"lejepa-base_lr-{rate}-0"
        run.mkdir(parents=True)
        lines = [{"step": n, "loss": loss if n > 18 else 9.0} for n in range(1, 21)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 0}, *lines]))
    loss_as_rank.main(tmp_path)
    told = capsys.readouterr().out
    assert "| LeJEPA (base_lr 1e-4) | 0.1000 | 60.0 |" in told  # the lowest loss and the best
    assert "over 8 runs" in told
    assert "0.0 points behind the best" in told
    sealed.write(tmp_path / "results.json", {"settings": {"methods": methods[1:]}, "values": values})
    with pytest.raises(ValueError, match="has 7 runs"):
        loss_as_rank.main(tmp_path)
