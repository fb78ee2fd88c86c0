"""What a GPU is asked for, and whether it was met: one line per target, from the numbers of steps.py and run.py."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from run import ALONE
from timing import OURS, Result

MINUTES = 9


class Target(NamedTuple):
    asked: str
    benchmark: str  # steps or run
    objective: str
    field: str  # of Result
    least: float | None = None
    most: float | None = None
    who: str = OURS

    def measured(self, reports: list[dict[str, Any]]) -> float | None:
        """None if it was not."""
        for report in reports:
            for result in (Result(**one) for one in report["results"] if report["name"] == self.benchmark):
                if self.objective in result.case.replace(",", " ").split() and result.who == self.who:
                    return getattr(result, self.field)
        return None

    def verdict(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        return (
            "met"
            if (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
            else "missed"
        )


SHARES = {"mpp": 0.50, "moco_v3": 0.45, "mae": 0.45}  # of the rate of matrix products
PEERS = {"mpp": "timm", "moco_v3": "lightly", "mae": "transformers"}
TARGETS = [
    *(
        Target(f"B/16, {name}: a step at {share:.0%} of the matrix rate or more", "steps", name, "share", least=share)
        for name, share in SHARES.items()
    ),
    *(
        Target(f"B/16, {name}: 1.05 times the time of {peer} at most", "steps", name, "ratio", most=1.05, who=peer)
        for name, peer in PEERS.items()
    ),
    *(
        Target(f"B/16, {name}: end to end 95% of a step's rate or more", "run", name, "ratio", most=1 / 0.95, who=ALONE)
        for name in ("mpp", "moco_v3")
    ),
]  # fmt: skip


def memory(reports: list[dict[str, Any]]) -> Iterator[tuple[str, float | None, float | None]]:
    """Peak MiB of a step, ours and the peer's."""
    for name, peer in PEERS.items():
        ours, theirs = (Target("", "steps", name, "mebibytes", who=who).measured(reports) for who in (OURS, peer))
        yield f"B/16, {name}: 1.05 times the memory of {peer} at most", ours, theirs


def rows(reports: list[dict[str, Any]], seconds: float) -> list[list[str]]:
    """What is asked, what was measured, and the verdict. seconds: of all benchmarks together."""
    lines = []
    for target in TARGETS:
        value = target.measured(reports)
        lines.append([target.asked, "" if value is None else f"{value:.2f}", target.verdict(value)])
    for asked, ours, theirs in memory(reports):
        both = None if ours is None or theirs is None else ours / theirs
        target = Target(asked, "", "", "", most=1.05)
        lines.append([asked, "" if both is None else f"{both:.2f} ({ours:,.0f} MiB)", target.verdict(both)])
    in_time = "met" if seconds <= 60 * MINUTES else "missed"
    return [*lines, [f"all of it in {MINUTES} minutes", f"{seconds / 60:.1f} min", in_time]]
