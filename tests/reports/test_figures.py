"""The pictures of an analysis show what they are given; the recipe writes the numbers of the images that it read."""

import base64
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sslvit.cli import run_cli
from sslvit.data.spec import open_source
from sslvit.evaluate.analysis import (
    attention_maps,
    filters,
    mean_attention_distance,
    position_similarity,
    position_structure,
)
from sslvit.evaluate.monitor import draw_ids
from sslvit.models.resnet import BiT, BiTConfig
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.recipes import analyse
from sslvit.reports.figures import (
    GAP,
    LARGEST,
    RIGHT,
    STOPS,
    WRONG,
    attention_sheet,
    draw_confusion,
    filter_sheet,
    heat,
    similarity_tiles,
)
from sslvit.weights.folder import load_backbone, save_backbone

SMALL = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}
SVG = "{http://www.w3.org/2000/svg}"


def test_heat_passes_through_its_stops_and_rises_in_brightness():
    assert heat(np.linspace(0, 1, 5)).tolist() == STOPS.tolist()
    brightness = heat(np.linspace(0, 1, 50)) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(brightness) > 0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_twenty_eight_filters_are_four_rows_of_seven_the_first_one_top_left(channels):
    components = torch.arange(28).reshape(28, 1, 1, 1).expand(28, 16, 8, channels) / 27
    sheet = np.asarray(filter_sheet(components))
    assert sheet.shape == (4 * (64 + GAP) + GAP, 7 * (32 + GAP) + GAP, 3)
    middles = sheet[GAP + 32 :: 64 + GAP, GAP + 16 :: 32 + GAP]
    assert middles[..., 0].flatten().tolist() == [round(255 * i / 27) for i in range(28)]


def test_a_filter_lies_as_its_weights_do():
    component = torch.zeros(1, 2, 4, 3)
    component[0, 0, 3, 0] = 1  # first row, last column, red
    sheet = np.asarray(filter_sheet(component))[GAP : GAP + 32, GAP : GAP + 64]
    assert (sheet[:16, 48:] == [255, 0, 0]).all()
    assert sheet.sum() == 16 * 16 * 255


def test_each_tile_of_positions_is_bright_where_the_patch_is_itself():
    similarity = torch.eye(15).reshape(3, 5, 3, 5) * 2 - 1
    sheet = np.asarray(similarity_tiles(similarity, least=-1.0))
    bright, cell, bar = (sheet == STOPS[-1]).all(-1), 24, round(92 * 5 * (5 * 24 + GAP) / 300)
    rows, columns = np.flatnonzero(bright[:, :-bar].any(1)), np.flatnonzero(bright[:, :-bar].any(0))
    assert bright[:, :-bar].sum() == 15 * cell**2
    # Tile i begins i tiles and gaps further on, and its own patch lies i patches further in.
    assert np.flatnonzero(np.diff(rows) > 1).size == 2
    assert rows[::cell].tolist() == [rows[0] + i * (3 * cell + GAP + cell) for i in range(3)]
    assert columns[::cell].tolist() == [columns[0] + i * (5 * cell + GAP + cell) for i in range(5)]


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (14, 14), (37, 37), (64, 16)])
def test_tiles_of_any_grid_fit_a_screen(grid):
    similarity = torch.rand(*grid, *grid).clamp_min(0.3)
    assert max(similarity_tiles(similarity).size) < 1250


@pytest.mark.parametrize(("channels", "size"), [(3, (32, 64)), (1, (32, 64)), (3, (256, 512))])
def test_a_map_is_shown_beside_and_over_its_image(channels, size):
    maps = torch.zeros(2, 2, 4)
    maps[0, 1, 3], maps[1] = 0.2, 0.3  # the first image's last patch alone; the second evenly
    sheet = np.asarray(attention_sheet(torch.ones(2, channels, *size), {"rollout": maps}))
    top = len(sheet) - 2 * (128 + GAP)  # below the names
    assert 10 < top < 100
    assert sheet.shape[1:] == (3 * (256 + GAP) + GAP, 3)
    image, beside, over = (sheet[top:, GAP + i * (256 + GAP) :][:, :256] for i in range(3))
    assert (image[:128] == 255).all()
    assert (beside[64:128, 192:] == STOPS[-1]).all()
    assert (beside[:64] == STOPS[0]).all()
    assert (beside[64:128, :192] == STOPS[0]).all()
    assert (beside[128 + GAP :][:128] == STOPS[-1]).all()
    assert over[127, 255].min() >= 250
    assert over[:128, :128].max() == 0
    assert (over[128 + GAP :][:128] == 255).all()
    assert attention_sheet(torch.ones(2, channels, *size), {"rollout": maps}, over=False).size[0] == 2 * 260 + GAP


def test_a_confusion_matrix_shows_rare_mistakes_and_colors_right_and_wrong(tmp_path):
    counts = torch.tensor([[90, 10], [0, 0]])  # a class of which there is no image
    draw_confusion(counts, None, tmp_path / "new" / "c.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "c.png")).reshape(-1, 3).astype(int)
    shares = {"right": (0.9, RIGHT), "wrong": (0.1, WRONG)}
    for share, ink in shares.values():
        expected = (255 - share**0.5 * (255 - ink)).astype(int)
        assert (abs(pixels - expected).max(1) <= 1).sum() > 200  # of a cell of 36 x 36, less what the number covers


@pytest.mark.parametrize("classes", [1, 10, 100, 1000, 2000])
def test_a_confusion_matrix_of_any_number_of_classes_fits_a_screen(classes, tmp_path):
    draw_confusion(torch.eye(classes).long(), tuple("x" * 99 for _ in range(classes)), tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert max(picture.size) <= max(LARGEST, classes) + 200


def run(words: str) -> None:
    """The recipe, as if started with these words."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["analyse", *words.split(), "--threads", "1"])
        run_cli(analyse.main, analyse.Config)


def test_the_recipe_writes_the_numbers_and_pictures_of_both_starts(tmp_path, capsys):
    vit = ViT(ViTConfig(**SMALL))
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter)
    save_backbone(vit, tmp_path / "model", {"readout": "cls"})
    run(f"--model {tmp_path / 'model'} --data shapes:n=60 --images 40 --shown 3 --out {tmp_path / 'new' / 'out'}")
    actual = json.loads((tmp_path / "new" / "out" / "analysis.json").read_text())
    source = open_source("shapes:n=60", image_size=16)
    images = source.read(draw_ids(source, 40)).pixels / 255
    for name, model in {
        "random start": ViT(ViTConfig(**SMALL)),
        "pretrained": load_backbone(tmp_path / "model"),
    }.items():
        distances = mean_attention_distance(model, [images])
        assert actual[name]["images"] == distances.images == 40
        for kind in ("renormalised", "plain", "on_patches"):
            np.testing.assert_allclose(actual[name]["attention distance"][kind], getattr(distances, kind), rtol=1e-5)
        assert actual[name]["filter variance"] == pytest.approx(filters(model).variance.tolist())
        assert actual[name]["position similarity"] == position_structure(position_similarity(model))
        with Image.open(tmp_path / "new" / "out" / f"{name.split()[0]}-attention.png") as picture:
            shares = attention_maps(model, images[:3]).rollout
            shown = np.asarray(attention_sheet(images[:3], {"rollout": shares}))[-3 * (128 + GAP) :]
            assert (np.asarray(picture)[-len(shown) :, : shown.shape[1]] == shown).all()
    even = np.mean([4 * math.hypot(i - y, j - x) for i, j, y, x in np.ndindex(4, 4, 4, 4)])
    assert actual["spread evenly"] == pytest.approx(even)
    files = {file.name for file in (tmp_path / "new" / "out").iterdir()}
    each = {f"{name}-{what}.png" for name in ("random", "pretrained") for what in ("filters", "positions", "heads")}
    assert files >= each | {"distances.svg"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "mean attention distance, pixels"
    mean = np.mean(actual["pretrained"]["attention distance"]["renormalised"], 1)
    assert [line.split()[7] for line in lines[1:3]] == [f"{value:.1f}" for value in mean]
    assert "Attention spread evenly over the image would give 8.0. 40 images of shapes" in lines[3]


def test_the_recipe_leaves_out_what_a_model_does_not_have_and_what_cannot_be_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for number in range(12):
        Image.fromarray(np.full((16, 16, 3), 20 * number, np.uint8)).save(tmp_path / "set" / f"{number}.png")
    (tmp_path / "set" / "x.png").write_bytes(b"")
    vit = ViT(ViTConfig(**(SMALL | {"hybrid": "R", "position": "none", "class_token": False})))
    save_backbone(vit, tmp_path / "model", {"readout": "mean"})
    run(f"--model {tmp_path / 'model'} --data {tmp_path / 'set'} --out {tmp_path / 'out'}")
    printed, actual = capsys.readouterr().out, json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert "1 of 13 images cannot be read and are left out" in printed
    assert "No filters: hybrid 'R' embeds features of a ResNet" in printed
    assert "No positions: position 'none' has no table" in printed
    assert actual["pretrained"]["images"] == 12
    assert {"filter variance", "position similarity"}.isdisjoint(actual["pretrained"])
    assert not list((tmp_path / "out").glob("*-filters.png"))


def test_what_the_recipe_cannot_do_is_refused_in_one_sentence(tmp_path, capsys):
    save_backbone(ViT(ViTConfig(**SMALL)), tmp_path / "model", {"readout": "cls"})
    save_backbone(BiT(BiTConfig(blocks=(1, 1, 1), root="3x3", image_size=16)), tmp_path / "bit", {"readout": "mean"})
    (tmp_path / "file").touch()
    for words, code, sentence in (
        (f"--model {tmp_path / 'bit'}", 78, "is a BiT, which has no attention to look at"),
        (f"--model {tmp_path / 'model'} --shown 0", 78, "--shown is 0; it must be above 0"),
        (f"--model {tmp_path / 'model'} --shown 33", 78, "--shown is 33; it must be at most 32"),
        (f"--model {tmp_path / 'model'} --patch 0 1 1", 78, "--patch is 0; it must be at least 1"),
        (f"--model {tmp_path / 'model'} --patch 9 1 1", 78, "--patch 9 1 1: image 9 is not one of 1 to 8"),
        (f"--model {tmp_path / 'model'} --patch 8 4 5", 78, "--patch 8 4 5: column 5 is not one of 1 to 4"),
        (f"--model {tmp_path / 'model'} --image_size 18", 78, "image_size 18 is not a multiple of patch_size"),
        (f"--model {tmp_path / 'model'} --out {tmp_path / 'file'}", 73, f"--out {tmp_path / 'file'} cannot be written"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(f"--data shapes:n=20 --out {tmp_path / 'out'} {words}")
        error = capsys.readouterr().err
        assert stopped.value.code == code
        assert sentence in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_the_page_shows_every_picture_of_both_models_and_the_chosen_patch(tmp_path, capsys):
    save_backbone(ViT(ViTConfig(**SMALL)), tmp_path / "model", {"readout": "cls"})
    out = tmp_path / "out"
    run(f"--model {tmp_path / 'model'} --data shapes:n=20 --images 12 --shown 3 --patch 2 3 4 --out {out}")
    html, text, numbers = (
        (out / "report.html").read_text(),
        (out / "report.md").read_text(),
        json.loads((out / "analysis.json").read_text()),
    )
    kinds = ("patches", "nearest", "map", "heads", "attention", "filters", "positions")
    pictures = {f"{name}-{kind}.png" for name in ("pretrained", "random") for kind in kinds}
    assert {file.name for file in out.glob("*.png")} == pictures
    for file in pictures:
        assert base64.b64encode((out / file).read_bytes()).decode() in html
        assert f"]({file})" in text
    source = open_source("shapes:n=20", image_size=16)
    ids = draw_ids(source, 12)
    with torch.no_grad():
        patches = load_backbone(tmp_path / "model")(source.read(ids).pixels / 255).patches.double()
    patches /= patches.norm(dim=-1, keepdim=True)
    cosines = patches @ patches[1, 2 * 4 + 3]
    cosines[1] = -1
    best = numbers["pretrained"]["nearest patches"][0]
    assert numbers["pretrained"]["chosen patch"] == {"image": ids[1], "row": 3, "column": 4}
    assert best["cosine"] == pytest.approx(cosines.max().item(), abs=1e-6)
    assert best["image"] == ids[int(cosines.amax(1).argmax())]
    assert 4 * (best["row"] - 1) + best["column"] - 1 == int(cosines.flatten().argmax()) % 16
    assert numbers["random start"]["chosen patch"] == numbers["pretrained"]["chosen patch"]
    assert "The chosen patch: --patch 2 3 4 (image, row, column)" in capsys.readouterr().out
