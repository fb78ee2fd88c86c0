"""python -m sslvit doctor [FOLDER] | report RUN | pair FIRST.parquet SECOND.parquet"""

import sys
from pathlib import Path

from sslvit.errors import BAD_CONFIGURATION, NoInput, at_the_door


def main() -> None:
    command, *words = sys.argv[1:] or [""]
    if command == "doctor" and len(words) <= 1:
        from sslvit.distributed import start
        from sslvit.doctor import examine

        accelerator = start()
        code = examine(Path(words[0] if words else "runs"), accelerator.print)
        sys.exit(code)
    if command == "report" and len(words) == 1:
        from sslvit.report import write_report

        run = Path(words[0])
        if not (run / "cost.json").exists():
            raise NoInput(f"{run} holds no run that has ended")
        write_report(run)
        print(run / "report.html")
        return
    if command == "pair" and len(words) == 2:
        from sslvit.evaluate.predictions import pair

        print(pair(*map(Path, words)))
        return
    usage = "python -m sslvit doctor [FOLDER], report RUN, or pair FIRST.parquet SECOND.parquet"
    print(f"error: {' '.join(sys.argv[1:])!r} is no command: {usage}", file=sys.stderr)
    sys.exit(BAD_CONFIGURATION)


if __name__ == "__main__":
    at_the_door(main)
