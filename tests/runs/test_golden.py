"""Runs that older versions left are still read, and go on: one for each schema of checkpoints and models.

python tests/runs/test_golden.py FOLDER makes one, with the version at hand; it is kept in tests/runs/golden and never
made again.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from sslvit.config import TrainConfig
from sslvit.data.labels import Labels
from sslvit.data.source import ArraySource
from sslvit.models.readout import read
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.objectives.mpp import MPP
from sslvit.processes.collectives import start
from sslvit.storage import checkpoint
from sslvit.train import pretrain
from sslvit.views.pretraining import CropFlip
from sslvit.weights.folder import load_backbone

GOLDEN = Path(__file__).parent / "golden"
RUNS = sorted(GOLDEN.glob("schema-*"))
LEFT, STEPS = 4, 8  # its newest checkpoint, and how long it is


def train(out: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 3, 16, 16), np.uint8)
    source = ArraySource(pixels, name="noise", fingerprint="noise", labels=Labels(np.arange(16) % 4, None, ""))
    given = {"epochs": 4.0, "batch_size": 8, "lr": 1e-3, "clip": 1.0, "log_every": 1, "save_every": LEFT, "threads": 1}
    backbone = ViT(ViTConfig(image_size=16, patch_size=4, width=8, depth=2, heads=2))
    pretrain(MPP(backbone), source, CropFlip(16), TrainConfig(out=out, resume=True, **given), start(threads=1))


def hashed(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def features(backbone: ViT) -> torch.Tensor:
    images = torch.linspace(0, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    with torch.no_grad():
        return read(backbone.eval()(images), "both")


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_its_tensors_are_read_bit_for_bit_and_its_model_computes_what_timm_computes(run):
    expected = json.loads((run / "expected.json").read_text())
    found = checkpoint.latest(run / "checkpoints")
    assert found.step == LEFT
    assert hashed(found.tensors) == expected["checkpoint"]
    backbone = load_backbone(run)
    assert hashed(backbone.state_dict()) == expected["model"]
    # Sums of products depend on the processor, so what it computes is the same to rounding, by our record and by timm.
    assert features(backbone).flatten().tolist() == pytest.approx(expected["features"], abs=1e-5)
    oracle = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    images = torch.linspace(0, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    with torch.no_grad():
        tokens = oracle.forward_features((images - backbone.mean) / backbone.std)
    torch.testing.assert_close(features(backbone), torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], -1))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_it_goes_on_as_the_version_that_left_it_did(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("model", "expected.json"))
    train(out)
    assert len(losses(out)) == STEPS
    assert losses(out) == pytest.approx(losses(run), rel=1e-5)
    for name, tensor in load_backbone(run).state_dict().items():
        torch.testing.assert_close(load_backbone(out).state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def main() -> None:
    out = Path(sys.argv[1])
    train(out)
    shutil.rmtree(out / f"checkpoints/step-{STEPS:08d}")
    kept = ("checkpoints", "model", "metrics.jsonl", "config.json")
    for file in [path for path in out.iterdir() if path.name not in kept]:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    found, backbone = checkpoint.latest(out / "checkpoints"), load_backbone(out)
    expected = {"checkpoint": hashed(found.tensors), "model": hashed(backbone.state_dict())}
    expected["features"] = features(backbone).flatten().tolist()
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
