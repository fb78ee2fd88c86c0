"""Evaluation: extraction against the bare forward pass, nearest neighbours against scikit-learn's and lightly's, a
linear probe of 13 rates against one, logistic regression against scikit-learn's; in one run, in turns.

    python recipes/benchmarks/evaluation.py
    python recipes/benchmarks/evaluation.py --train 60000 --test 10000 --width 128

Features for all but the first are random, in ten clouds that overlap; accuracies are printed, so that no one is fast by
being wrong. scikit-learn's neighbours are those of the cosine, by brute force, unweighted.
"""

import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
import tyro
from timing import OURS, Result, compared, in_turns, line, save
from torch import Tensor

from sslvit.cli import run_cli
from sslvit.data.spec import open_source
from sslvit.evaluate.features import extract
from sslvit.evaluate.knn import knn
from sslvit.evaluate.linear import probe
from sslvit.evaluate.logistic import logistic
from sslvit.evaluate.metrics import top
from sslvit.evaluate.protocols import PROTOCOLS
from sslvit.models.vit import ViT
from sslvit.processes.collectives import start
from sslvit.views.pretraining import EvalView


def extraction(model: str, image_size: int, images: int, rounds: int) -> list[Result]:
    accelerator, vit = start(), ViT.variant(model, image_size=image_size).eval()
    vit.to(accelerator.device)
    source = open_source(f"shapes:n={images}", image_size=image_size)
    source.read(torch.arange(images).numpy())  # the built-in images are drawn when they are first read
    batches = [torch.rand(256, 3, image_size, image_size, device=accelerator.device)] * (images // 256)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            vit(batch)

    runs = {OURS: lambda: extract(vit, source, EvalView(image_size), accelerator), "bare forward": forward}
    seconds = in_turns(runs, rounds=rounds, warm=1)
    return compared(f"extraction of {images:,} images, {model} at {image_size} px", seconds, images=images)


def clouds(count: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    centres = torch.randn(10, width, generator=torch.Generator().manual_seed(0))
    return 0.35 * centres[labels] + torch.randn(count, width, generator=draw), labels


def neighbours(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], rounds: int) -> list[Result]:
    accuracies = {}
    runs = {OURS: lambda: accuracies.update({OURS: knn(*train, *test)})}
    if find_spec("sklearn"):
        from sklearn.neighbors import KNeighborsClassifier

        def theirs() -> None:
            peer = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(*(x.numpy() for x in train))
            accuracies["scikit-learn"] = peer.score(*(x.numpy() for x in test))

        runs["scikit-learn"] = theirs
    if find_spec("lightly"):
        from lightly.utils.benchmarking import knn_predict

        def of_lightly() -> None:
            bank = torch.nn.functional.normalize(train[0]).T.contiguous()
            chunks = torch.nn.functional.normalize(test[0]).split(512)
            predicted = torch.cat([knn_predict(x, bank, train[1], 10, knn_k=20, knn_t=0.07)[:, 0] for x in chunks])
            accuracies["lightly"] = (predicted == test[1]).float().mean().item()

        runs["lightly"] = of_lightly
    measured = compared(
        f"20-nn, {len(train[0]):,} and {len(test[0]):,} of {train[0].shape[1]}", in_turns(runs, rounds=rounds)
    )
    print("20-nn accuracy: " + ", ".join(f"{who} {value:.4f}" for who, value in accuracies.items()))
    return measured


def heads(train: tuple[Tensor, Tensor], rounds: int) -> list[Result]:
    grid = replace(PROTOCOLS["grid"], epochs=10, decays=(0.0,))
    rates = PROTOCOLS["dinov2"].rates
    runs = {
        OURS: lambda: probe(*train, replace(grid, rates=rates)),
        "one rate": lambda: probe(*train, replace(grid, rates=(0.1,))),
    }
    return compared(f"linear probe of {len(rates)} rates, {len(train[0]):,}", in_turns(runs, rounds=rounds, warm=1))


def regression(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], rounds: int) -> list[Result]:
    accuracies = {}
    runs = {OURS: lambda: accuracies.update({OURS: top(logistic(*train, test[0]), test[1])})}
    if find_spec("sklearn"):
        from sklearn.linear_model import LogisticRegressionCV

        def theirs() -> None:
            # As ours: four strengths, one held-out tenth to choose by, then fitted to all.
            n, strengths = len(train[0]), [0.001, 0.01, 0.1, 1.0]
            held_out = [(torch.arange(n // 10, n).numpy(), torch.arange(n // 10).numpy())]
            peer = LogisticRegressionCV(Cs=strengths, cv=held_out, max_iter=1000)
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                peer.fit(*(x.numpy() for x in train))
            accuracies["scikit-learn"] = peer.score(*(x.numpy() for x in test))

        runs["scikit-learn"] = theirs
    measured = compared(f"logistic regression, {len(train[0]):,}", in_turns(runs, rounds=rounds, warm=1))
    print("logistic regression's accuracy: " + ", ".join(f"{who} {value:.4f}" for who, value in accuracies.items()))
    return measured


def main(
    model: str = "XS/7",
    image_size: int = 28,
    images: int = 10_240,
    train: int = 60_000,
    test: int = 10_000,
    width: int = 128,
    rounds: int = 3,
    threads: int = 0,
    out: Path | None = None,
) -> None:
    """Measure extraction, nearest neighbours, a linear probe and logistic regression."""
    torch.set_num_threads(threads or torch.get_num_threads())
    learned, asked = clouds(train, width, 1), clouds(test, width, 2)
    some = tuple(x[:10_000] for x in learned)
    results = []
    for measured in (
        extraction(model, image_size, images, rounds),
        neighbours(learned, asked, rounds),
        heads(some, rounds),
        regression(some, asked, rounds),
    ):
        print("\n".join(map(line, measured)), flush=True)
        results += measured
    save(results, out, "evaluation")


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
