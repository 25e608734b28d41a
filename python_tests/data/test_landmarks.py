import itertools

import pytest
import torch
from torch.nn import functional

from lctx_kernels.data.landmarks import (
    LandmarkCollator,
    gather,
    insert_landmarks,
    insertion,
    spread,
)

MARK = 99


@pytest.mark.parametrize("mem_freq", [1, 3, 7])
@pytest.mark.parametrize("cuts", [[20], [1] * 20, [5, 1, 0, 9, 5]])
def test_pieces_get_the_landmarks_of_the_whole(mem_freq, cuts):
    ids, whole, seen = torch.arange(20)[None], [], 0
    for part in ids.split(cuts, dim=1):
        inserted = insertion(part.shape[1], mem_freq, [seen], None)
        with_marks = spread(part, inserted, torch.tensor(MARK), None)
        assert torch.equal(gather(with_marks, inserted), part)
        whole += with_marks[0].tolist()
        seen += part.shape[1]
    want = [x for i in range(20) for x in ([i, MARK] if (i + 1) % mem_freq == 0 else [i])]
    assert whole == want


def test_padded_rows_get_landmarks_of_their_own():
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 3, 4], [1, 2, 0, 0]])
    spans = [(0, 4), (2, 4), (0, 2)]
    inserted = insertion(4, 2, [1, 0, 5], spans)
    with_marks = spread(ids, inserted, torch.tensor(MARK), spans)
    assert inserted.spans == [(0, 6), (0, 3), (0, 3)]
    assert with_marks[0].tolist() == [5, MARK, 6, 7, MARK, 8]
    assert with_marks[1, :3].tolist() == [3, 4, MARK]
    assert with_marks[2, :3].tolist() == [1, MARK, 2]
    back = gather(with_marks, inserted)
    for row, (start, end) in enumerate(spans):
        assert torch.equal(back[row, start:end], ids[row, start:end])


def test_gradients_reach_the_tokens_and_the_landmark():
    x = torch.randn(2, 5, 3, requires_grad=True)
    mark = torch.randn(3, requires_grad=True)
    inserted = insertion(5, 2, [0], None)
    spread(x, inserted, mark, None).sum().backward()
    assert (x.grad == 1).all() and (mark.grad == 4).all()  # two rows, two landmarks each


@pytest.mark.parametrize("mem_freq", [1, 2, 4])
def test_labels_predict_every_ordinary_token_once_from_the_one_before(mem_freq):
    text = list(range(10, 23))
    ids, labels = insert_landmarks(text, MARK, mem_freq)
    assert [i for i in ids if i != MARK] == text and len(ids) == len(labels)
    pairs = [(ids[j], labels[j + 1]) for j in range(len(ids) - 1) if labels[j + 1] != -100]
    assert pairs == list(itertools.pairwise(text))  # none from a landmark, none to one


def test_loss_over_the_labels_is_that_of_the_ordinary_tokens():
    text = torch.randint(0, 50, (13,)).tolist()
    ids, labels = insert_landmarks(text, MARK, 4)
    logits = torch.randn(len(ids), 100)
    inserted = functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]))
    ordinary = logits[torch.tensor(ids) != MARK]
    want = functional.cross_entropy(ordinary[:-1], torch.tensor(text[1:]))
    torch.testing.assert_close(inserted, want)


def test_labels_given_and_landmarks_predicted():
    ids, labels = insert_landmarks([5, 6, 7, 8], MARK, 2, [-100, 6, 7, 8])
    assert (ids, labels) == ([5, 6, MARK, 7, 8], [-100, 6, 7, -100, 8])
    ids, labels = insert_landmarks([5, 6, 7, 8], MARK, 2, predict_landmarks=True)
    assert labels == ids == [5, 6, MARK, 7, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5, MARK], MARK, 2), "the text holds token 99, the landmark"),
        (([5, 6], MARK, 0), "mem_freq is 0; expected at least 1"),
        (([5, 6], MARK, 2, [5]), "2 tokens and 1 labels"),
    ],
)
def test_wrong_texts(arguments, message):
    with pytest.raises(ValueError, match=message):
        insert_landmarks(*arguments)


def test_collator():
    rows = [{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [6, 7], "labels": [-100, 7]}]
    batch = LandmarkCollator(MARK, 2, pad_id=8)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, MARK, 3, 4, MARK, 5], [6, 7, 8, 8, 8, 8, 8]]
    assert batch["labels"][1].tolist() == [-100, 7, -100, -100, -100, -100, -100]
    assert batch["attention_mask"].sum(1).tolist() == [7, 2]
