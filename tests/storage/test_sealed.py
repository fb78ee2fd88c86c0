"""Of every JSON file that is read back, flipped bits and odd contents: refused or made again, and never believed."""

import contextlib
import copy
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from bad_step import bad_step, dino, part
from image_folder import images
from made_up_comparison import comparison
from noise_source import source
from random_models import ABOUT, vit
from tiny_run import tiny_run
from toy_jobs import Settings

from sslvit.data.spec import open_source
from sslvit.errors import BAD_CONFIGURATION, BAD_DATA
from sslvit.evaluate.predictions import Predictions, load_predictions, save_predictions
from sslvit.evaluate.stored import stored
from sslvit.experiments.compare import ComparisonConfig, passes
from sslvit.experiments.jobs import check_settings
from sslvit.experiments.report import as_markdown as told
from sslvit.experiments.results import collect
from sslvit.processes.collectives import start
from sslvit.reports.run import RunFolder, as_markdown
from sslvit.storage import checkpoint, durable, sealed
from sslvit.training.bad_steps import replay
from sslvit.views.pretraining import EvalView
from sslvit.weights.exports.export import export
from sslvit.weights.exports.programs import described as of_program
from sslvit.weights.folder import save_backbone
from sslvit.weights.foreign.open import load_foreign, open_backbone
from sslvit.weights.info import about


class Case(NamedTuple):
    file: Path
    read: Callable[[], Any]  # all that a command takes as true of it


def of_model(opened: tuple[torch.nn.Module, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    return durable.tensors_hash(opened[0].state_dict()), opened[1]


def cache(place: Path) -> Case:
    """Three of its images are bad, each in a way of its own."""
    spec = images(place / "set", 12)
    for number, data in ((2, b""), (5, b"no image"), (7, (place / "set/007.png").read_bytes()[:40])):
        (place / "set" / f"{number:03}.png").write_bytes(data)
    os.environ["SSLVIT_CACHE"] = str(place / "cache")

    def read() -> Any:
        samples = open_source(spec, image_size=8).read(np.arange(12))
        return samples.pixels.tolist(), samples.bad

    read()
    (file,) = (place / "cache").glob("*/about.json")
    return Case(file, read)


def model(place: Path) -> Case:
    save_backbone(vit(), place / "model", ABOUT | {"objective": "MPP", "data": "shapes"})
    return Case(
        place / "model" / "config.json", lambda: (about(place / "model"), *of_model(open_backbone(place / "model")))
    )


def run(place: Path, name: str) -> Case:
    tiny_run(place / "run", epochs=0.25)
    config = place / "run" / "config.json"
    sealed.write(config, sealed.read(config) | {"image_size": 32})  # which recipes have

    def read() -> Any:
        found = RunFolder(place / "run")
        return getattr(found, name), as_markdown(found), about(place / "run")

    return Case(place / "run" / f"{name}.json", read)


def of_comparison(place: Path, name: str) -> Case:
    comparison(place, {"scratch": [0.6], "mae": [0.8]}, fractions=(1,), places=("own",))
    models = {f"{name}-0": place / "models" / f"{name}-0" for name in ("scratch", "scratch-cls", "mae")}
    file = place / name
    sealed.write(file, json.loads(file.read_text()))

    def read() -> Any:
        results = {"data": "noise", "settings": {}} | collect(place, {"mae": "MAE"}, [0], ["own"], models)
        return results, told(results)

    return Case(file, read)


def settings(place: Path) -> Case:
    chosen = Settings(methods=("mpp", "mae"), transfer=("idx:/a", "idx:/b"))

    def read() -> Any:
        kinds = {"free": ("out",), "grows": ("methods",), "appended": ("transfer",)}
        return check_settings(chosen, place / "compare.json", **kinds)

    read()
    return Case(place / "compare.json", read)


def measured(place: Path) -> Case:
    config = ComparisonConfig(
        data="shapes:n=300", out=place, methods=("supervised", "mpp"), fractions=(0.1,), budget="flops"
    )
    for method, flops in (("supervised", 123456789.5), ("mpp", 23456789.25)):
        durable.make_folder(place / "measured" / f"{method}-dry_run")
        file = place / "measured" / f"{method}-dry_run" / "measured.json"
        sealed.write(file, {"seconds_per_image": 0.0123456, "flops_per_image": flops})
    return Case(file, lambda: passes(config, place / "start"))


def features(place: Path) -> Case:
    backbone = vit(image_size=16)
    given = {"backbone": backbone, "source": source(), "view": EvalView(16), "accelerator": start(threads=1)}

    def read() -> Any:
        found = stored(place / "kept", **given)
        return [found.labels.tolist(), found.ids.tolist(), *(x.tolist() for x in found.by_readout.values())]

    read()
    (file,) = (place / "kept").glob("*/about.json")
    return Case(file, read)


def step(place: Path) -> Case:
    parts = [part(0)]
    parts[0][1].views[3][2, 0, 1, 1] = torch.nan
    folder, _ = bad_step(dino(), parts, place)
    return Case(folder / "process-0.json", lambda: repr(replay(folder, dino())))


def exported(place: Path, layout: str) -> Case:
    if layout == "model":
        (place / "out").mkdir()
        sealed.write(place / "out" / "model.json", of_program(vit(), "cls", False))
        return Case(place / "out" / "model.json", lambda: about(place / "out"))
    export(vit(), ABOUT, place / "out", layout)
    return Case(place / "out" / f"{layout}.json", lambda: of_model(load_foreign(place / "out")))


def predictions(place: Path) -> Case:
    draw = torch.Generator().manual_seed(0)
    ids, labels = torch.randperm(50, generator=draw), torch.arange(50) % 3
    told = {"model": "runs/mpp", "data": "shapes", "protocol": "logistic regression", "lr": 0.1}
    probabilities = torch.rand(50, 3, generator=draw).softmax(-1)
    save_predictions(place / "predictions.parquet", Predictions(ids, labels, probabilities, told))

    def read() -> Any:
        found = load_predictions(place / "predictions.parquet")
        return [*(tensor.tolist() for tensor in found[:3]), found.about]

    return Case(place / "predictions.parquet", read)


def of_checkpoint(place: Path, name: str) -> Case:
    state = {"progress": {"step": 1200, "seconds": 90.0}, "config": {"model": "Ti/16", "data": "folder:x", "start": ""}}
    made = checkpoint.save(place / "run" / "checkpoints", 1200, {"objective.a": torch.zeros(10)}, state)
    return Case(made / name, lambda: about(made))


CASES: dict[str, Callable[[Path], Case]] = {
    "about.json of the cache": cache,
    "config.json of a model": model,
    "config.json of a run": partial(run, name="config"),
    "environment.json of a run": partial(run, name="environment"),
    "cost.json of a run": partial(run, name="cost"),
    "cost.json in a comparison": partial(of_comparison, name="models/mae-0/cost.json"),
    "numbers.json": partial(of_comparison, name="probes/scratch-0/own/numbers.json"),
    "test.json": partial(of_comparison, name="finetuned/scratch-0/own/1/test.json"),
    "compare.json": settings,
    "measured.json": measured,
    "about.json of features": features,
    "process-0.json of a bad step": step,
    "model.json of a program": partial(exported, layout="model"),
    "torchvision.json": partial(exported, layout="torchvision"),
    "MANIFEST.json, shown": partial(of_checkpoint, name="MANIFEST.json"),
    "state.json, shown": partial(of_checkpoint, name="state.json"),
    "predictions.parquet": predictions,
}


@pytest.fixture(params=CASES)
def case(request, tmp_path, monkeypatch) -> Case:
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    return CASES[request.param](tmp_path)


def outcome(case: Case, truth: Any, damaged: bytes, whole: bytes, codes: tuple[int, ...] = (BAD_DATA,)) -> str:
    """Refused in our own words, or made again, or of the same content; and the file is as it was before."""
    case.file.write_bytes(damaged)
    found, refused = None, None
    try:
        found = case.read()
    except ValueError as error:
        refused = error
    made_again = case.file.read_bytes() != damaged
    case.file.write_bytes(whole)
    if refused is not None:
        assert getattr(refused, "code", BAD_CONFIGURATION) in codes
        assert case.file.name in str(refused) or str(case.file.parent) in str(refused)
        assert str(refused).isprintable()
        return "refused"
    assert found == truth, "believed"
    if made_again:
        return "made again"
    assert case.file.suffix == ".parquet" or json.loads(damaged) == json.loads(whole), "not noticed"
    return "of the same content"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("flips", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_any_file_that_is_read_back_is_never_believed(case, request, flips, capsys):
    whole, truth = case.file.read_bytes(), case.read()
    name = request.node.callspec.params["case"]
    draw, counts = random.Random(f"seals of {name}"), Counter()
    for _ in range(flips):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        counts[outcome(case, truth, bytes(damaged), whole)] += 1
    with capsys.disabled():
        print(f"\n{name}, {len(whole):,} bytes, {flips:,} flipped bits: {dict(counts)}")


def test_every_flipped_bit_of_a_sealed_file_is_found_also_in_the_seal_and_its_name():
    whole = sealed.text({"images": 500, "seconds": 2.25, "device": "CPU", "flops": None, "rates": {0.1: (1, 2)}})
    assert sealed.opened(whole)["rates"] == {"0.1": [1, 2]}
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            with pytest.raises(ValueError, match=r"."):
                sealed.opened(bytes(damaged))


ODD = [
    "",
    "null",
    "[]",
    "{}",
    '"x"',
    "0",
    "NaN",
    "1e999",
    "9" * 5000,
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"a": 1, "a": 2}',
]
ODD += [
    f'"{"x" * 10_000_000}"',
    f'{{"seal": "{"x" * 10_000_000}"}}',
    '{"seal": null}',
    "\ufeff{}",
    "\0",
    "{" + "\0" * 1000,
]
VALUES = [None, True, -1, 0.5, 10**12, 10**400, math.nan, -math.inf, "x", "", [], ["x"], {}, {"x": None}]


def test_odd_contents_of_any_file_end_in_a_sentence_or_are_written_again(case, capsys):
    whole, truth = case.file.read_bytes(), case.read()
    codes = (BAD_DATA, BAD_CONFIGURATION)  # an empty object can be another's, or settings that were others
    for odd in [*(text.encode() for text in ODD), b"\xff\xfe", whole[:-5], whole[: len(whole) // 2]]:
        assert outcome(case, truth, odd, whole, codes) in ("refused", "made again"), odd[:20]


def places(content: Any, *path: str | int) -> Iterator[tuple[str | int, ...]]:
    """The way to everything that is in it."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in inside:
        yield *path, name
        yield from places(value, *path, name)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "case", [name for name in CASES if "shown" not in name and "parquet" not in name], indirect=True
)
def test_a_file_without_a_seal_and_with_any_content_ends_in_a_sentence_at_worst(case, capsys):
    """As an earlier version could have left it, or somebody who has deleted the seal."""
    whole = case.file.read_bytes()
    plain = sealed.opened(whole)
    for path in places(plain):
        for value in [*VALUES, places]:  # which stands for nothing at all
            changed = copy.deepcopy(plain)
            inside = changed
            for name in path[:-1]:
                inside = inside[name]
            inside[path[-1]] = value
            if value is places:
                del inside[path[-1]]
            case.file.write_text(json.dumps(changed))
            try:
                with contextlib.suppress(ValueError):  # of which DataError is one
                    case.read()
            except Exception as error:
                raise AssertionError(f"{path} as {value!r:.40}: {error!r}") from error
            case.file.write_bytes(whole)
