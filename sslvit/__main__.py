"""python -m sslvit doctor, report, pair, info, convert: see USAGE."""

import sys
from pathlib import Path

from sslvit.cli import run_cli

USAGE = {
    "doctor": ("[FOLDER]", "checks this machine for training"),
    "report": ("FOLDER", "writes the report of a run (and its model card), a comparison or a study again"),
    "pair": ("A.parquet B.parquet", "compares two files of predictions, image by image"),
    "info": ("MODEL [FACT=VALUE..]", "describes a model, ours or someone else's"),
    "convert": (
        "MODEL OUT --to X",
        "writes a model in timm's, transformers' or torchvision's layout, ONNX, torch.export",
    ),
}


def usage(command: str) -> str:
    return f"{f'{command} {USAGE[command][0]}':<28}{USAGE[command][1]}"


def main() -> None:
    command, *words = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        print("\n".join(map(usage, USAGE)))
    elif command != "convert" and command in USAGE and words in (["-h"], ["--help"]):
        print(usage(command))
    elif command == "doctor" and len(words) <= 1:
        from sslvit.processes.collectives import start
        from sslvit.reports.doctor import examine

        accelerator = start()
        sys.exit(examine(Path(words[0] if words else "runs"), accelerator.print))
    elif command == "report" and len(words) == 1:
        from sslvit.experiments.gather import report_again

        print(report_again(Path(words[0])))
    elif command == "pair" and len(words) == 2:
        from sslvit.evaluate.predictions import pair

        print(pair(*map(Path, words)))
    elif command == "info" and words:
        from sslvit.weights.info import about

        print(about(Path(words[0]), tuple(words[1:])))
    elif command == "convert":
        import tyro

        from sslvit.weights.info import Convert, convert

        if len(words) > 1 and not any(word.startswith("-") for word in words[:2]):
            words = ["--model", words[0], "--out", words[1], *words[2:]]
        print(convert(tyro.cli(Convert, args=words, prog="python -m sslvit convert")))
    elif command in USAGE:
        raise ValueError(f"{command} takes {USAGE[command][0]}, got {' '.join(words)!r}: python -m sslvit --help")
    else:
        raise ValueError(
            f"the command must be doctor, report, pair, info or convert, got {' '.join(sys.argv[1:])!r}; python -m "
            "sslvit --help explains them"
        )


if __name__ == "__main__":
    run_cli(main)
