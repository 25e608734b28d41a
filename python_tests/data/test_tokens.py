import sys

import pytest

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from lctx_kernels.data.text import Document, standard_library
from lctx_kernels.data.tokens import Collator, pack, train_tokenizer

TEXTS = [
    Document("a", ("the quick brown fox " * 40).encode()),
    Document("b", "größer, 数学 and ∫ symbols\n\n".encode() * 5),
    Document("c", b"x"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def test_any_text_comes_back(tokenizer):
    for text in ("the fox", "数学 ∫ 🦊", " two  spaces\n\ttab", "\x00\x7f"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 300 and tokenizer.padding_side == "left"


def test_training_compresses(tokenizer, tmp_path):
    fox = tokenizer("the quick brown fox", add_special_tokens=False)["input_ids"]
    assert len(fox) < 8
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("the quick brown fox", add_special_tokens=False)["input_ids"] == fox
    with pytest.raises(ValueError, match="vocab_size is 100; expected at least 259"):
        train_tokenizer(TEXTS, 100)


def test_rows_are_documents_cut(tokenizer):
    packed = pack(TEXTS, tokenizer, 16, keep_shorter=1)
    rows = list(packed["input_ids"])
    documents = [[]]
    for row in rows:
        assert len(row) <= 16
        if row[0] == 1:
            documents.append([])
        documents[-1] += row
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in documents[1:]]
    assert texts == [d.data.decode() for d in TEXTS]
    assert all(ids[0] == 1 and ids[-1] == 2 for ids in documents[1:])
    assert sum(packed["bytes"]) == sum(len(d.data) for d in TEXTS)


def test_prompts_have_no_labels(tokenizer):
    prompt, text = "größer? the fox " * 3, "the quick brown fox"
    asked = Document("q", (prompt + text).encode(), len(prompt.encode()))
    whole = pack([asked, TEXTS[2]], tokenizer, 200)
    ids, labels = whole["input_ids"][0], whole["labels"][0]
    learned = [label for label in labels if label != -100]
    assert (
        tokenizer.decode(learned, skip_special_tokens=True).strip() == text
    )  # " the" is one token
    assert learned[-1] == 2
    assert ids[len(ids) - len(learned) :] == learned
    assert whole["labels"][1] == whole["input_ids"][1]  # it has no prompt
    cut = pack([asked], tokenizer, 8)
    assert len(cut) < len(pack([Document("t", asked.data)], tokenizer, 8))  # rows of prompts alone
    assert all(set(row) != {-100} for row in cut["labels"])
    assert "labels" not in pack(TEXTS, tokenizer, 16).column_names


def test_short_rows_are_dropped(tokenizer):
    kept = pack(TEXTS, tokenizer, 16, keep_shorter=16)
    assert {len(row) for row in kept["input_ids"]} == {16}
    with pytest.raises(ValueError, match="no document has 9 tokens"):
        pack(TEXTS[2:], tokenizer, 16, keep_shorter=9)
    with pytest.raises(ValueError, match="seq_len is 1"):
        pack(TEXTS, tokenizer, 1)


def test_real_text(tokenizer):
    document = Document("library", standard_library().data[:20000])
    packed = pack([document], tokenizer, 128)
    assert sum(packed["bytes"]) == pytest.approx(len(document.data), rel=0.02)


def test_collator_keeps_labels_that_are_given():
    batch = Collator(9)([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7, 8, 3]}])
    assert batch["input_ids"].tolist() == [[5, 6, 9], [7, 8, 3]]
    assert batch["labels"].tolist() == [[-100, 6, -100], [7, 8, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_missing_packages_are_named(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"datasets is missing.*pip install 'lctx_kernels\[train"):
        pack(TEXTS, tokenizer, 16)
