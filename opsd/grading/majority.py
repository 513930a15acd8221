"""Find the answer that most of a problem's rollouts give, to replace a missing solution (U-OPSD,
arXiv 2608.06296). The grader decides which answers are equal."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opsd.grading.grader import Grader

LEAST = 2
"""The least votes of a majority: a single rollout agrees with nobody."""


@dataclass(frozen=True)
class Majority:
    """answer: the majority's, "" if there is none. share: the part of all rollouts that gives the
    most frequent answer. why: the reason why there is no majority, one of WHY. correct: whether the
    majority's answer is the row's own; None if one of them is missing."""

    answer: str
    share: float
    why: str = ""
    correct: bool | None = None


WHY = ("unanswered", "tied", "unsure")
"""No rollout has an answer; several answers have the most votes; these are too few."""


def majority(
    answers: Sequence[str | None], grader: Grader, agreement: float = 0.0, own: str = ""
) -> Majority:
    """Count the votes of one problem's rollouts. A rollout without an answer, None or blank, does
    not vote. agreement: the least share of all rollouts, with or without an answer. own: the row's
    own answer, if it has one."""
    given = [answer.strip() for answer in answers if answer is not None and answer.strip()]
    if not given:
        return Majority("", 0.0, "unanswered")

    def same(one: str, other: str) -> bool:
        return grader.grade([f"\\boxed{{{one}}}"], [other])[0].correct

    numbers = groups_of_equals(given, same)
    (first, votes), *others = Counter(numbers).most_common()
    share = votes / len(answers)
    if others and others[0][1] == votes:
        return Majority("", share, "tied")
    if votes < LEAST or share < agreement:
        return Majority("", share, "unsure")
    texts = (text for text, number in zip(given, numbers, strict=True) if number == first)
    answer = Counter(texts).most_common(1)[0][0]
    return Majority(answer, share, correct=same(answer, own) if own.strip() else None)


def groups_of_equals(texts: Sequence[str], same: Callable[[str, str], bool]) -> list[int]:
    """For each text, the number of its group of texts that `same` finds equal."""
    groups: dict[str, int] = {}
    heads: list[str] = []
    for text in texts:
        if text not in groups:
            match = next((i for i, head in enumerate(heads) if same(text, head)), len(heads))
            if match == len(heads):
                heads.append(text)
            groups[text] = match
    return [groups[text] for text in texts]
