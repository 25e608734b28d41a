"""Texts with something hidden in them and the question for it, of any length, from a seed.

All are made offline. Lengths are in the units of `count`, such as tokens of a tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Count = Callable[[str], int]

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NOUNS = (
    "river", "lantern", "copper", "harbour", "meadow", "violin", "glacier", "pepper",
    "tunnel", "orchard", "saddle", "compass", "thunder", "biscuit", "marble", "falcon",
    "anchor", "velvet", "canyon", "ribbon", "walnut", "beacon", "cactus", "dolphin", "ember",
    "feather", "granite", "hammock", "island", "jigsaw", "kettle", "ladder", "magnet",
    "needle", "oyster", "pebble", "quartz",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One question: the prompt, what has to be in the answer, and where it was hidden.

    length: What was asked for. depth: Share of the text before what is hidden, 0 to 1.
    """

    task: str
    prompt: str
    answers: tuple[str, ...]
    length: int
    depth: float
    details: dict[str, str] = field(default_factory=dict)


@dataclass
class _Text:
    """Filler sentences with facts put between them at given depths."""

    filler: Sequence[str]
    random: random.Random

    def build(
        self, facts: Sequence[tuple[float, str]], before: str, after: str, length: int, count: Count
    ) -> str:
        """before + filler with the facts + after, of at most `length`, nearly that."""
        rest = length - count(before) - count(after) - sum(count(fact) for _, fact in facts)
        if rest < 0:
            raise ValueError(
                f"make_samples: length is {length}, the question alone takes {length - rest}; "
                "expected a longer one"
            )
        start = self.random.randrange(len(self.filler))
        costs = [count(sentence) for sentence in self.filler]
        chosen: list[str] = []
        while True:
            index = (start + len(chosen)) % len(self.filler)
            if costs[index] > rest:
                break
            rest -= costs[index]
            chosen.append(self.filler[index])
        places = sorted((round(depth * len(chosen)), fact) for depth, fact in facts)
        out, done = [before], 0
        for place, fact in places:
            out += [*chosen[done:place], fact]
            done = place
        return "".join([*out, *chosen[done:], after])


def passkey(text: _Text, length: int, depth: float, count: Count) -> Sample:
    """A number among sentences about grass (Landmark attention, section 4.2)."""
    key = str(text.random.randrange(10000, 99999))
    before = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "it. I will quiz you about the important information there. "
    )
    fact = f"The pass key is {key}. Remember it. {key} is the pass key. "
    after = "What is the pass key? The pass key is"
    prompt = text.build([(depth, fact)], before, after, length, count)
    return Sample("passkey", prompt, (key,), length, depth)


def _number(name: str, value: str) -> str:
    return f"One of the special magic numbers for {name} is: {value}. "


def _needles(
    text: _Text, length: int, depth: float, count: Count, task: str, keys: int, values: int
) -> Sample:
    names = text.random.sample(NOUNS, keys)
    numbers = [[str(text.random.randrange(1000000, 9999999)) for _ in range(values)] for _ in names]
    facts = [(depth, _number(names[0], numbers[0][0]))]
    facts += [(text.random.random(), _number(names[0], value)) for value in numbers[0][1:]]
    for name, own in zip(names[1:], numbers[1:], strict=True):
        facts += [(text.random.random(), _number(name, value)) for value in own]
    before = "Some special magic numbers are hidden in the following text. Memorize them. "
    after = (
        f"What are all the special magic numbers for {names[0]} in the text? The special magic "
        f"numbers for {names[0]} are"
    )
    prompt = text.build(facts, before, after, length, count)
    return Sample(task, prompt, tuple(numbers[0]), length, depth, {"key": names[0]})


def needle(text: _Text, length: int, depth: float, count: Count) -> Sample:
    """One key with one number (RULER, single needle)."""
    return _needles(text, length, depth, count, "needle", keys=1, values=1)


def multikey(text: _Text, length: int, depth: float, count: Count) -> Sample:
    """Four keys, one is asked for (RULER, multi-key)."""
    return _needles(text, length, depth, count, "multikey", keys=4, values=1)


def multivalue(text: _Text, length: int, depth: float, count: Count) -> Sample:
    """One key with four numbers (RULER, multi-value)."""
    return _needles(text, length, depth, count, "multivalue", keys=1, values=4)


def variables(text: _Text, length: int, depth: float, count: Count) -> Sample:
    """A chain of assignments; all variables of one value are asked for (RULER, tracking)."""
    names = text.random.sample([a + b + c for a in "XYZ" for b in "QRST" for c in "ABCDE"], 4)
    value = str(text.random.randrange(10000, 99999))
    at = depth
    facts = [(at, f"VAR {names[0]} = {value}. ")]
    for left, right in zip(names[1:], names, strict=False):
        at += (1 - at) * text.random.random()
        facts.append((at, f"VAR {left} = VAR {right}. "))
    before = "Memorize the chain of variable assignments hidden in the following text. "
    after = (
        f"Which variables have the value {value} in the text above? The variables with the value "
        f"{value} are"
    )
    prompt = text.build(facts, before, after, length, count)
    return Sample("variables", prompt, tuple(names), length, depth, {"value": value})


def common_words(text: _Text, length: int, depth: float, count: Count) -> Sample:
    """A list of words, the three commonest are asked for (RULER); depth is not used."""
    names = text.random.sample(NOUNS, len(NOUNS))
    common, rare = names[:3], names[3:]
    before = "Below is a list of words. Memorize the ones that appear most often. "
    after = "What are the three most common words in the list? The most common words are"
    rest = length - count(before) - count(after)
    words: list[str] = []
    while True:
        group = [*common, text.random.choice(rare)]
        text.random.shuffle(group)
        cost = count(" ".join(group) + " ")
        if cost > rest:
            break
        rest -= cost
        words += group
    if not words:
        raise ValueError(
            f"make_samples: length is {length}; expected a longer one for common_words"
        )
    return Sample(
        "common_words", before + " ".join(words) + ". " + after, tuple(common), length, depth
    )


TASKS: dict[str, Callable[[_Text, int, float, Count], Sample]] = {
    "passkey": passkey,
    "needle": needle,
    "multikey": multikey,
    "multivalue": multivalue,
    "variables": variables,
    "common_words": common_words,
}
RULER = ("needle", "multikey", "multivalue", "variables", "common_words")


def make_samples(
    task: str,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    count: Count = len,
    repeats: int = 1,
    seed: int = 0,
    filler: str | None = None,
) -> list[Sample]:
    """Samples of one task for every length and depth.

    Args:
        task: One of TASKS.
        lengths: Lengths of the prompts, in the units of `count`.
        depths: Shares of the text before what is hidden, 0 to 1.
        count: Length of a text; by default its characters. Counted sentence by sentence.
        repeats: Samples of each kind.
        seed: Same seed, same samples.
        filler: A text whose sentences fill the prompts; None is that of the passkey task.

    Raises:
        ValueError: An unknown task, a depth outside of 0 to 1, or a length that is too short.

    Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 4.2; Hsieh et al. 2024 (arXiv
    2404.06654), section 3.

    >>> sample, = make_samples("passkey", [600], [0.5])
    >>> len(sample.prompt) <= 600, sample.answers[0] in sample.prompt
    (True, True)
    """
    if task not in TASKS:
        raise ValueError(f"make_samples: task is {task!r}; expected one of {', '.join(TASKS)}")
    wrong = [depth for depth in depths if not 0 <= depth <= 1]
    if wrong:
        raise ValueError(f"make_samples: depth {wrong[0]}; expected numbers from 0 to 1")
    sentences = _sentences(GRASS if filler is None else filler)
    samples = []
    for length in lengths:
        for depth in depths:
            for repeat in range(repeats):
                source = random.Random(f"{seed} {task} {length} {depth} {repeat}")
                samples.append(TASKS[task](_Text(sentences, source), length, depth, count))
    return samples


def _sentences(text: str) -> list[str]:
    sentences = [s.strip() + ". " for s in " ".join(text.split()).split(". ") if s.strip(" .")]
    if not sentences:
        raise ValueError("make_samples: filler has no sentence; expected a longer text")
    return [s.replace("... ", ". ").replace(".. ", ". ") for s in sentences]
