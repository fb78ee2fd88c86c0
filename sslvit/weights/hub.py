"""Model folders from and to the Hugging Face Hub."""

import tempfile
from pathlib import Path

from sslvit.errors import NoInput
from sslvit.models.resnet import BiT
from sslvit.models.vit import ViT
from sslvit.storage import sealed
from sslvit.weights.folder import CARD, CONFIG, WEIGHTS, config_of, load_backbone, publishable

FILES = [WEIGHTS, CONFIG, CARD]


def load_model(folder_or_repo: str | Path, *, revision: str | None = None) -> ViT | BiT:
    """The backbone, in evaluation mode, of a run's folder, a model's folder, or OWNER/NAME on the Hub."""
    return load_backbone(here(folder_or_repo, revision))


def here(folder_or_repo: str | Path, revision: str | None = None) -> Path:
    """A place on this machine, or the folder that OWNER/NAME on the Hub was downloaded to."""
    text = str(folder_or_repo)
    if Path(text).exists():
        return Path(text)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise NoInput(f"{text} is neither a folder here nor OWNER/NAME on the Hub")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(text, revision=revision, allow_patterns=FILES))
    except Exception as error:  # of its network library's own kinds
        raise NoInput(
            f"{text} is no folder here and was not downloaded from the Hub ({_in_short(error)}). Offline, give a folder"
        ) from error


def push_to_hub(folder: str | Path, repo: str, *, private: bool = True) -> str:
    """Verifies and uploads a model folder with its card; returns its address. The token is huggingface_hub's own."""
    folder = Path(folder) / "model" if (Path(folder) / "model" / "config.json").exists() else Path(folder)
    load_backbone(folder)
    if not (folder / CARD).exists():
        raise NoInput(f"{folder} has no model card, {CARD}: write one (`sslvit report RUN` does, for a run)")
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        with tempfile.TemporaryDirectory(prefix="sslvit-") as copy:
            copy_without_paths(folder, Path(copy))
            api.upload_folder(folder_path=copy, repo_id=repo, allow_patterns=FILES)
    except Exception as error:
        raise NoInput(
            f"{repo} cannot be written on the Hub ({_in_short(error)}). Check the network and `hf auth login`"
        ) from error
    return address


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def copy_without_paths(folder: Path, copy: Path) -> None:
    """A model's files without the local paths of its data and file, which older versions wrote."""
    (copy / WEIGHTS).symlink_to((folder / WEIGHTS).resolve())
    config, text = config_of(folder), (folder / CARD).read_text("utf-8")
    about = publishable(config["sslvit"])
    for name, value in config["sslvit"].items():
        if value != about[name]:
            text = text.replace(value, about[name])
    (copy / CONFIG).write_bytes(sealed.text(config | {"sslvit": about}, indent=2))
    (copy / CARD).write_text(text, "utf-8")
