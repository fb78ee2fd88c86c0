"""What leaves the machine has no secret and no local path, and what anybody named cannot be markup."""

import json
import re
import sys
from pathlib import Path

import huggingface_hub
import pytest
from random_models import make
from recipes_run import TINY, run
from started import draw_images

from sslvit.data import spec
from sslvit.runs import log
from sslvit.runs.public import public, without_secrets
from sslvit.storage import sealed
from sslvit.weights.folder import card, described, save_backbone
from sslvit.weights.hub import push_to_hub

SECRETS = {
    "https://me:pass@host.org/set.tar": "https://host.org/set.tar",
    "https://me:pa/s?s@host.org/set.tar": "https://host.org/set.tar",
    "s3://bucket/x?X-Amz-Credential=AKIA&X-Amz-Signature=abc": "s3://bucket/x?***",
    "https://host.org/x#token=abc": "https://host.org/x?***",
    "hf:me/set?token=abc&x=1": "hf:me/set?***",
    "webdataset:https://me:pass@host.org/x-{0..9}.tar?sig=abc": "webdataset:https://host.org/x-{0..9}.tar?***",
    "HF_TOKEN=abc": "HF_TOKEN=***",
    "--api_key=abc": "--api_key=***",
    "password=abc,x=1": "password=***,x=1",
    "hf_abcdefghijklmnop": "***",
}
KEPT = [
    "parquet:/data/part-?.parquet", "mpp:class_token=True,target=pixels", "--no_weight_decay", "tokens_and_vectors",
    "hf:me/set:en", "no_weight_decay=tokens_and_vectors", "https://host.org/set.tar", "a@b.org", "[0.1, 0.2]",
    "R50+B/16", "1e-3", "?", "a = b",
]  # fmt: skip
LOCAL = {
    "folder:/home/me/secret project/flowers (20 of its 40)": "folder:flowers (20 of its 40)",
    "folder:/home/me/a,/home/me/b": "folder:a,b",
    "folder:../secret/flowers": "folder:flowers",
    "list:/home/me/list.txt,/home/me/images (test)": "list:list.txt,images (test)",
    "csv:/home/me/secret project/a.csv,/home/me/images (train)": "csv:a.csv,images (train)",
    "parquet:/home/me/set/*.parquet (train)": "parquet:*.parquet (train)",
    "npz:~/set.npz (train)": "npz:set.npz (train)",
    "webdataset:/home/me/a, b/x.tar (train, streamed)": "webdataset:x.tar (train, streamed)",
    "/home/me/vit.pth": "vit.pth",
    "/home/me/runs/": "runs",
    "C:\\Users\\me\\vit.pth": "vit.pth",
    "file:///home/me/vit.pth": "vit.pth",
    "from '/home/me/vit.pth', by (~/x/y)": "from 'vit.pth', by (y)",
    "out=/home/me/runs": "out=runs",
    "https://me:pass@host.org/x.tar?token=abc": "https://host.org/x.tar",
}
PUBLIC = [
    "shapes (64 labelled by shape)", "hf:me/set:en (train)", "R50+B/16", "mean 1/2 and/or 3 / 4", "opt/target/",
    "state_dict: module.base_encoder.", "https://host.org/a/b", "3 (its config.json)",
    "in the ResNet epsilons are timm's",
]  # fmt: skip


@pytest.mark.parametrize("text", [*SECRETS, *KEPT])
def test_records_keep_all_but_credentials_queries_and_tokens(text):
    assert without_secrets(text) == SECRETS.get(text, text)


@pytest.mark.parametrize("text", [*LOCAL, *PUBLIC])
def test_of_a_local_path_others_are_told_the_last_name(text):
    assert public(text) == LOCAL.get(text, text)


@pytest.mark.parametrize("kind", sorted(set(spec.KINDS) - {"shapes", "hf"}))
def test_of_every_kind_of_data_that_lies_here_others_are_told_the_last_name(kind):
    assert public(f"{kind}:/home/me/secret project/flowers (train)") == f"{kind}:flowers (train)"


def test_the_record_of_the_command_has_no_secret(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/home/me/mpp.py", "--data", "hf:me/set?token=abc", "--out=https://me:pw@h/x?sig=abc"]
    )
    assert log.environment()["command"] == ["mpp.py", "--data", "hf:me/set?***", "--out=https://h/x?***"]


def uploaded(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, str]:
    """The texts that the Hub would be sent."""
    sent = {}

    class Hub:
        def create_repo(self, repo, **_):
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, *, folder_path, allow_patterns, **_):
            for name in allow_patterns:
                sent[name] = (Path(folder_path) / name).read_bytes().decode(errors="replace")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    push_to_hub(folder, "me/model")
    assert sorted(sent) == ["README.md", "config.json", "model.safetensors"]
    return sent


def test_uploads_contain_no_path_of_this_machine_and_show_names_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "secret-project" / "<b>_[x](y)?token=abc123"
    images.mkdir(parents=True)
    draw_images(images)
    run("mpp", f"{TINY} --out {tmp_path}/run --data folder:{images}")
    sent = uploaded(monkeypatch, tmp_path / "run")
    private = re.compile(f"secret-project|abc123|{tmp_path}")
    assert not [name for name, text in sent.items() if private.search(text)]
    assert json.loads(sent["config.json"])["sslvit"]["data"] == "folder:<b>_[x](y)"
    assert r"on folder:\<b>\_[x]\(y): 32 images" in sent["README.md"]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["source"] == f"folder:{images}".replace("token=abc123", "***")
    assert "abc123" not in json.dumps(environment)


def test_models_that_were_written_with_paths_are_uploaded_and_told_of_without(tmp_path, monkeypatch):
    vit, readout = make()
    about = {"readout": readout, "objective": "MPP", "data": "shapes", "file": "x.pth"}
    save_backbone(vit, tmp_path / "model", about)
    data, file = f"folder:{tmp_path}/secret project/flowers (20 of its 40)", f"{tmp_path}/secret project/vit.pth"
    config = json.loads((tmp_path / "model/config.json").read_text())
    del config["seal"]  # as in models of earlier versions
    config["sslvit"] |= {"data": data, "file": file}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    card = (tmp_path / "model/README.md").read_text()
    (tmp_path / "model/README.md").write_text(card.replace("shapes", data).replace("x.pth", file))
    sent = uploaded(monkeypatch, tmp_path / "model")
    assert not [name for name, text in sent.items() if "secret" in text or str(tmp_path) in text]
    assert "- data: folder:flowers (20 of its 40)\n- file: vit.pth\n" in sent["README.md"]
    assert sealed.opened(sent["config.json"].encode(), require_seal=True) == config | {
        "sslvit": config["sslvit"] | {"data": "folder:flowers (20 of its 40)", "file": "vit.pth"}
    }
    assert described(tmp_path / "model")["data"] == "folder:flowers (20 of its 40)"
    assert "secret project" in (tmp_path / "model/config.json").read_text()  # what is here stays as it is


def test_what_is_said_of_a_model_is_written_without_paths_and_secrets(tmp_path, monkeypatch):
    about = {"file": "/home/me/vit.pth", "data": "https://me:pw@h.org/set?sig=1", "comment": "of ~/mine/x", "steps": 3}
    made = {"part": "a/b", "classes": ["/m/01g317", "<b>"], "known": {"heads": "3 (you)"}}
    vit, readout = make()
    save_backbone(vit, tmp_path / "model", about | made | {"readout": readout})
    ours = json.loads((tmp_path / "model/config.json").read_text())["sslvit"]
    public = {"file": "vit.pth", "data": "https://h.org/set", "comment": "of x", "steps": 3}
    assert {name: ours[name] for name in about | made} == public | made
    sent = uploaded(monkeypatch, tmp_path / "model")
    assert "- data: https://h.org/set\n- file: vit.pth\n" in sent["README.md"]


def test_the_heading_of_a_card_is_a_name_and_not_markup(tmp_path):
    text = card("<b>run\n---\nlicense: mit", ["data: | [x](y) |"], "mean", "none")
    lines = text.splitlines()
    assert lines.count("---") == 2
    assert r"# \<b>run --- license: mit" in lines
    assert r"- data: \| [x]\(y) \|" in lines
