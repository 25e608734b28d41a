import pytest

from lctx_kernels.eval import TASKS, Score, make_samples, table
from lctx_kernels.eval.score import share_found


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_of_the_length_and_hold_the_answer(task):
    for sample in make_samples(task, [900, 4000], [0.0, 0.3, 1.0], repeats=2):
        assert 0.85 * sample.length < len(sample.prompt) <= sample.length
        assert all(answer in sample.prompt for answer in sample.answers)
        assert not sample.prompt.endswith(" ")


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_samples(task):
    a, b = (make_samples(task, [1000], [0.5], repeats=3, seed=1) for _ in range(2))
    assert a == b and len({sample.prompt for sample in a}) == 3
    assert a != make_samples(task, [1000], [0.5], repeats=3, seed=2)


@pytest.mark.parametrize("task", ["passkey", "needle", "multikey"])
def test_depth_is_where_the_answer_stands(task):
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        (sample,) = make_samples(task, [20_000], [depth])
        place = sample.prompt.index(sample.answers[0]) / len(sample.prompt)
        assert abs(place - depth) < 0.04


def test_needles_of_many_keys_and_values():
    (keys,) = make_samples("multikey", [3000], [0.5])
    assert keys.prompt.count("One of the special magic numbers for") == 4
    (values,) = make_samples("multivalue", [3000], [0.5])
    assert len(set(values.answers)) == 4
    assert values.prompt.count(f"numbers for {values.details['key']} is") == 4
    (chain,) = make_samples("variables", [3000], [0.2])
    places = [chain.prompt.index(f"VAR {name} =") for name in chain.answers]
    assert places == sorted(places)  # an assignment stands after the one that it copies
    (words,) = make_samples("common_words", [3000], [0.0])
    listed = words.prompt.split(". ")[2].split()
    counts = sorted(listed.count(word) for word in set(listed))
    assert sorted(listed.count(word) for word in words.answers) == counts[-3:]


def test_units_and_filler():
    count = lambda text: len(text.split())  # noqa: E731
    (sample,) = make_samples("passkey", [200], [0.5], count=count, filler="Rain fell. Snow fell. ")
    assert 190 < count(sample.prompt) <= 200 and "Snow fell. Rain fell." in sample.prompt


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("sliding", [500]), {}, "task is 'sliding'; expected one of passkey, needle"),
        (("passkey", [500], [1.5]), {}, "depth 1.5; expected numbers from 0 to 1"),
        (("passkey", [100]), {}, "length is 100, the question alone takes"),
        (("common_words", [100]), {}, "length is 100"),
        (("passkey", [500]), {"filler": " . "}, "filler has no sentence"),
    ],
)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        make_samples(*arguments, **options)


def test_scores():
    assert share_found("Zra and yrd", ("YRD", "ZRA", "XSA", "QQQ")) == 0.5
    scores = [
        Score("passkey", n, d, n, "", ("1",), float(n == 64 or d > 0.6))
        for n in (64, 128) for d in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    rows = [line.split() for line in table(scores).splitlines()]
    assert rows == [
        ["depth", "64", "128"], ["0.00", "100%", "0%"], ["0.50", "100%", "0%"],
        ["1.00", "100%", "100%"], ["mean", "100%", "33%"],
    ]  # fmt: skip


def test_heat_map(tmp_path):
    pytest.importorskip("matplotlib")
    from lctx_kernels.eval.plot import heat_map

    scores = [Score("passkey", n, d, n, "", ("1",), d) for n in (64, 128) for d in (0.0, 1.0)]
    heat_map(scores, tmp_path / "map.svg", "model")
    image = (tmp_path / "map.svg").read_text()
    assert image.count("<path") > 4
