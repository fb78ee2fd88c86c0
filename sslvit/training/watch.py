"""Whether what is learned is still worth something: numbers for the log, and a verdict in words when a run collapses.

Objectives return the numbers as metrics of every step; the watch reads them there and knows no objective:

    feature_std          of the backbone's readout: how far images differ; 1: evenly in all directions, 0: not at all
    effective_rank       of the same: in how many directions they differ
    embedding_std        as feature_std, behind the head of an objective that compares images as directions
    teacher_outputs      of a teacher's softmax (DINO): how many outputs it uses for a batch
    teacher_information  of the same: what an output says about the image, in nats; the entropy of the mean answer less
                         the mean entropy of answers. 0 if all are alike, be they uniform or sure

Effective rank is the participation ratio (sum l)^2 / sum l^2 of the covariance's eigenvalues l: r equal ones give r. It
is one small product a step, where RankMe (https://arxiv.org/abs/2210.02885) takes a singular value decomposition. It is
logged and not judged: on small images it is 2 or 3 at the start of a healthy run, and in a collapsed one too.

A rule compares with the run's own first step, because images that hardly differ have features that hardly differ: at
random weights feature_std is 0.8 for the built-in shapes and 0.2 for small digits. Its test measures how
soon collapses are caught, and that healthy runs raise no alarm.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

PATIENCE = 20  # steps in a row below the limit
SPIKE, REMEMBERED, FEW = 20.0, 64, 10  # times the median gradient norm of so many steps, of which there are so many


class Verdict(NamedTuple):
    sentence: str
    cause: str
    next_step: str

    def __str__(self) -> str:
        return f"{self.sentence}. {self.cause}. {self.next_step}"


class Rule(NamedTuple):
    """A metric is too low below limit(its value at the first step)."""

    metric: str
    limit: Callable[[float], float]
    collapsed: str
    cause: str
    next_step: str


RULES = (
    Rule(
        "embedding_std",
        lambda first: 0.3 * min(first, 1.0),
        "the embeddings of different images have become nearly one",
        "Two networks agree best when they say the same of every image, and nothing kept them from it: neither other "
        "images to be told apart nor a stopped gradient, or steps too large for them",
        "Check what keeps this objective from the trivial answer; then start again with a third of --lr",
    ),
    Rule(
        "teacher_outputs",
        lambda first: min(3.0, 0.75 * first),
        "the teacher gives nearly all images the same few outputs",
        "Centring keeps an output from winning everywhere, and it did not keep up with the teacher",
        "Start again with a lower --center_momentum, a --momentum nearer 1, or a larger batch, which makes the centre",
    ),
    Rule(
        "teacher_information",
        lambda first: 0.005,
        "the teacher's outputs say nothing about the image",
        "A student that cannot guess the teacher's view of another crop answers with the mean, and the teacher follows "
        "it there; a low temperature of the teacher is what works against this",
        "Start again with a temperature of 0.04 all the time, larger small crops, and a third of --lr",
    ),
    Rule(
        "feature_std",
        lambda first: 0.1 * min(first, 0.2),
        "the backbone's features hardly depend on the image any more",
        "The weights have left the range in which they pass anything on: steps too large, or decay too strong (torch "
        "multiplies weight decay by the learning rate: what big_vision calls 1e-4 at a rate of 1e-3 is 0.1 here)",
        "Start again with a third of --lr, a longer --warmup_epochs or --clip 1, and look at --weight_decay",
    ),
)


@dataclass
class Watch:
    """Reads the metrics of every step. Plain numbers, so that a checkpoint can hold it: Watch(**asdict(watch))."""

    first: dict[str, float] = field(default_factory=dict)  # each metric's value at the first step
    below: dict[str, int] = field(default_factory=dict)  # how many steps in a row it has been too low
    norms: list[float] = field(default_factory=list)  # of the gradients of the last steps

    def update(self, metrics: dict[str, float]) -> Verdict | None:
        """The verdict at the step at which a rule has applied PATIENCE times in a row; once, until it recovers."""
        verdict = None
        for rule in RULES:
            if rule.metric not in metrics:
                continue
            value = metrics[rule.metric]
            if not math.isfinite(value):  # the loop's concern; as a first value it would leave nothing to compare with
                continue
            first = self.first.setdefault(rule.metric, value)
            limit = rule.limit(first)
            self.below[rule.metric] = self.below.get(rule.metric, 0) + 1 if value < limit else 0
            if self.below[rule.metric] == PATIENCE and verdict is None:
                sentence = (
                    f"The run has collapsed: {rule.collapsed} ({rule.metric} {value:.2g}, below {limit:.2g} for "
                    f"{PATIENCE} steps, {first:.2g} at the start)"
                )
                verdict = Verdict(sentence, rule.cause, rule.next_step)
        return verdict

    def spike(self, norm: float) -> float:
        """How many times the median of the last steps' gradient norms this step's is."""
        median = statistics.median(self.norms) if len(self.norms) >= FEW else math.inf
        if math.isfinite(norm):
            self.norms = [*self.norms, norm][-REMEMBERED:]
        return norm / median if median > 0 else 0.0
