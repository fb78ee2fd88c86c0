"""Signs of collapse: rules about metrics, and a verdict in words when a run has collapsed.

Objectives return these as metrics of every step:

    feature_std          of the backbone's readout: how much images differ; 1: evenly in all directions, 0: not at all
    effective_rank       of the same: in how many directions they differ
    embedding_std        as feature_std, behind the head of an objective that compares images as directions; behind one
                         that compares them as points, the standard deviation of its output, which should become 1
    teacher_outputs      of a teacher's softmax (DINO): how many outputs it uses for a batch
    teacher_information  of the same: mutual information of image and output, in nats: the entropy of the mean output
                         minus the mean entropy. 0 if all outputs are equal, be they uniform or one-hot
    patch_teacher_outputs, patch_teacher_information    the same of hidden patches (iBOT, DINOv2)
    target_std           of the features that an objective predicts (I-JEPA, data2vec): how much patches differ

Effective rank is the participation ratio (sum l)^2 / sum l^2 of the covariance's eigenvalues l: r equal ones give r. It
is one small product per step, where RankMe (https://arxiv.org/abs/2210.02885) takes a singular value decomposition. It
is logged but has no rule: on small images it is 2 or 3 at the start of a healthy run, and in a collapsed one too.

Limits depend on the run's own first step, because similar images have similar features: at random weights feature_std
is 0.8 for the built-in shapes and 0.2 for small digits.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

PATIENCE = 20  # steps in a row below the limit
SPIKE = 20.0  # times the median gradient norm
LONGEST_HISTORY, SHORTEST_HISTORY = 64, 10  # steps of which this is the median


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
        "Two networks agree best when they output the same for every image, and neither negatives nor a stopped "
        "gradient prevented it, or the steps were too large for them",
        "Check what prevents the trivial solution of this objective; then start again with a third of --lr",
    ),
    Rule(
        "teacher_outputs",
        lambda first: min(3.0, 0.75 * first),
        "the teacher gives nearly all images the same few outputs",
        "Centering prevents one output from dominating, and it did not keep up with the teacher",
        "Start again with a lower --center_momentum, a --momentum nearer 1, or a larger batch",
    ),
    Rule(
        "teacher_information",
        lambda first: 0.005,
        "the teacher's outputs carry no information about the image",
        "A student that cannot predict the teacher's output for another crop predicts the mean, and the teacher "
        "follows it; a low temperature of the teacher works against this",
        "Start again with a constant temperature of 0.04, larger small crops, and a third of --lr",
    ),
    Rule(
        "patch_teacher_outputs",
        lambda first: min(3.0, 0.75 * first),
        "the teacher gives nearly all hidden patches the same few outputs",
        "Centering prevents one output from dominating, and that of patches did not keep up with the teacher",
        "Start again with a lower --center_momentum, a --momentum nearer 1, or a larger batch",
    ),
    Rule(
        "patch_teacher_information",
        lambda first: 0.005,
        "the teacher's outputs carry no information about the patch",
        "A student that cannot predict what was hidden predicts the mean, and the teacher follows it; a low "
        "temperature of the teacher works against this",
        "Start again with a constant temperature of 0.04, smaller --mask_ratios, and a third of --lr",
    ),
    Rule(
        "target_std",
        lambda first: 0.3 * min(first, 1.0),
        "the targets have become nearly the same for all patches",
        "The teacher follows a student that predicts one vector everywhere, and the loss is low because there is "
        "nothing left to predict",
        "Start again with a --momentum nearer 1, a longer --warmup_epochs and a third of --lr",
    ),
    Rule(
        "feature_std",
        lambda first: 0.1 * min(first, 0.2),
        "the backbone's features hardly depend on the image any more",
        "The weights have left the range in which they pass signals on: steps too large, or decay too strong (torch "
        "multiplies weight decay by the learning rate: big_vision's 1e-4 at a rate of 1e-3 is 0.1 here)",
        "Start again with a third of --lr, a longer --warmup_epochs or --clip 1, and look at --weight_decay",
    ),
)


@dataclass
class Watch:
    """Reads the metrics of every step. Plain numbers, so that it can be in a checkpoint: Watch(**asdict(watch))."""

    first: dict[str, float] = field(default_factory=dict)  # each metric's value at the first step
    below: dict[str, int] = field(default_factory=dict)  # for how many steps in a row it has been too low
    norms: list[float] = field(default_factory=list)  # of the gradients of the last steps

    def update(self, metrics: dict[str, float]) -> Verdict | None:
        """The verdict at the step at which a rule has applied PATIENCE times in a row; once, until it recovers."""
        verdict = None
        for rule in RULES:
            value = metrics.get(rule.metric, math.nan)
            if not math.isfinite(value):  # the loop's concern; as a first value it would make every limit useless
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
        median = statistics.median(self.norms) if len(self.norms) >= SHORTEST_HISTORY else math.inf
        if math.isfinite(norm):
            self.norms = [*self.norms, norm][-LONGEST_HISTORY:]
        return norm / median if median > 0 else 0.0
