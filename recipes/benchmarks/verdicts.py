"""What a GPU is asked for, and whether it was met: one line per target, from the numbers of steps.py and run.py."""

import math
from typing import Any, NamedTuple

from run import ALONE
from timing import OURS, Result

MINUTES = 9


class Target(NamedTuple):
    asked: str
    benchmark: str  # steps or run
    objective: str
    field: str  # of Result; mebibytes: ours in multiples of theirs
    least: float = -math.inf
    most: float = math.inf
    who: str = OURS

    def measured(self, reports: list[dict[str, Any]]) -> float | None:
        """None if it was not."""
        found = {}
        for report in reports:
            for result in (Result(**one) for one in report["results"] if report["name"] == self.benchmark):
                if self.objective in result.case.replace(",", " ").split():
                    found[result.who] = getattr(result, self.field)
        value = found.get(self.who)
        if self.field == "mebibytes":
            return found[OURS] / value if value and found.get(OURS) else None
        return value

    def row(self, reports: list[dict[str, Any]]) -> list[str]:
        value = self.measured(reports)
        if value is None:
            return [self.asked, "", "not measured"]
        return [self.asked, f"{value:.2f}", "met" if self.least <= value <= self.most else "missed"]


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
        Target(
            f"B/16, {name}: 1.05 times the memory of {peer} at most", "steps", name, "mebibytes", most=1.05, who=peer
        )
        for name, peer in PEERS.items()
    ),
    *(
        Target(f"B/16, {name}: end to end 95% of a step's rate or more", "run", name, "ratio", most=1 / 0.95, who=ALONE)
        for name in ("mpp", "moco_v3")
    ),
]


def rows(reports: list[dict[str, Any]], seconds: float) -> list[list[str]]:
    """What is asked, what was measured, and the verdict. seconds: of all benchmarks together."""
    in_time = "met" if seconds <= 60 * MINUTES else "missed"
    together = [f"all of it in {MINUTES} minutes", f"{seconds / 60:.1f} min", in_time]
    return [*(target.row(reports) for target in TARGETS), together]
