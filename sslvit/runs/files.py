"""The list of files that a run writes into its folder. Nothing else is deleted there, and no link is followed.

A folder may hold further runs of the same form: the choice of a rate in fine-tuning keeps each in choice/lr-...
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

LOCK, CHECKPOINTS, METRICS = "run.lock", "checkpoints", "metrics.jsonl"
APPENDED = (METRICS, "bad_images.jsonl")  # other files are written whole and renamed
WRITTEN_INTO = (
    "model",
    "best",
    "pictures",
    "stacks",
)  # file by file; checkpoints are swept whenever one is read or saved
_CHECKPOINT = r"checkpoints/(rejected-)?step-\d{8,}(\.\d+)?"
_BAD_STEP = r"bad_steps/step-\d{8,}"
_FILES = (
    r"run\.lock",
    r"(config|environment|cost|ended)\.json",
    r"(metrics|bad_images)\.jsonl",
    r"data\.txt",
    r"first_batch\.png",
    r"report\.(html|md)",
    rf"{_CHECKPOINT}/(tensors\.safetensors|state\.json|MANIFEST\.json)",
    r"model/(model\.safetensors|config\.json|README\.md)",
    r"pictures/(views|reconstructions|neighbours|attention|filters|positions|patches|heads)\.png",
    r"pictures/distances\.svg",
    r"start_features\.safetensors|best/(model\.safetensors|config\.json|README\.md|best\.json)",  # of adapt
    rf"{_BAD_STEP}/(weights\.safetensors|process-\d+\.(safetensors|json))",
    r"stacks/process-\d+\.txt",
    r"test\.json|predictions\.parquet|confusion\.png|lora\.safetensors",  # of fine-tuning
    r"(sslvit|\.aim)/.*",  # of Accelerate's trackers, those that write beside the run: TensorBoard and Aim
)
_FOLDERS = (
    rf"checkpoints|{_CHECKPOINT}|bad_steps|{_BAD_STEP}",
    r"model|best|pictures|stacks|choice|choice/lr-[^/]+|(sslvit|\.aim)(/.*)?",
)
_RUN = r"(choice/lr-[^/]+/)*"
FILE = re.compile(f"{_RUN}({'|'.join(_FILES)})", re.DOTALL)
FOLDER = re.compile(f"{_RUN}({'|'.join(_FOLDERS)})", re.DOTALL)
LEFT_BY_A_KILL = re.compile(r"(.*/)?\.(tmp|del)-[^/]*", re.DOTALL)


def foreign(folder: Path) -> list[str]:
    """Files, links and folders that are not a run's, by their paths in the folder."""
    return sorted(name for name, _, is_file, is_folder in _entries(folder) if not (is_file or is_folder))


def misplaced(folder: Path) -> list[str]:
    """Paths at which a run writes a file or a folder and which are something else, such as a link or a named pipe."""
    return sorted(
        name
        for name, kind, is_file, is_folder in _entries(folder)
        if (is_file or is_folder) and not ((is_file and stat.S_ISREG(kind)) or (is_folder and stat.S_ISDIR(kind)))
    )


def _entries(folder: Path) -> Iterator[tuple[str, int, bool, bool]]:
    """Everything in the folder: its path, its mode, and whether it has the path of a run's file or of a run's folder.
    No link is followed, and other folders are not entered. Leftovers of a kill, which will be deleted, are skipped."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.relpath(os.path.join(parent, name), folder)
            if LEFT_BY_A_KILL.fullmatch(path):
                continue
            yield path, os.lstat(folder / path).st_mode, bool(FILE.fullmatch(path)), bool(FOLDER.fullmatch(path))
        inside = {name: os.path.relpath(os.path.join(parent, name), folder) for name in folders}
        folders[:] = [name for name, path in inside.items() if FOLDER.fullmatch(path)]
