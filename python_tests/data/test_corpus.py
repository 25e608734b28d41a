import gzip
import json

import pytest

from lctx_kernels.data.corpus import digest, read_corpus, split
from lctx_kernels.data.text import Document, TextError


def test_files_folders_and_json_lines(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md.gz").write_bytes(gzip.compress(b"first"))
    (tmp_path / "sub").mkdir()
    lines = [json.dumps({"text": "third"}), "", json.dumps({"text": "", "id": 3})]
    (tmp_path / "sub" / "c.jsonl").write_text("\n".join(lines))
    (tmp_path / "image.png").write_bytes(b"no text")
    documents = read_corpus(tmp_path)
    assert [d.data for d in documents] == [b"first", b"second", b"third"]
    assert documents[2].name.endswith("c.jsonl:1")
    assert digest(documents) == digest(read_corpus(tmp_path)) != digest(documents[:2])
    assert [d.data for d in read_corpus(tmp_path / "b.txt")] == [b"second"]


def test_prompts_of_json_lines(tmp_path):
    entry = {"prompt": "größer? ", "text": "ja"}
    (tmp_path / "a.jsonl").write_text(json.dumps(entry))
    (document,) = read_corpus(tmp_path / "a.jsonl")
    assert document.data.decode() == "größer? ja" and document.data[document.prompt :] == b"ja"
    assert document.sha256 != Document("", document.data).sha256
    start, end = (part[0] for part in split([document], 0.5))
    assert (len(start.data), start.prompt) == (6, 6) and (len(end.data), end.prompt) == (6, 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", "{}\n", r'bad.jsonl:1: expected a JSON object with "text"'),
        ("bad.jsonl", '{"text": "x"}\n[', r"bad.jsonl:2: expected a JSON object"),
        ("bad.jsonl", '{"text": 5}', r"bad.jsonl:1: expected a JSON object"),
        ("bad.jsonl", '{"text": "x", "prompt": 5}', r"bad.jsonl:1: expected a JSON object"),
        ("bad.jsonl", "[5]", r"bad.jsonl:1: expected a JSON object"),
        ("x.png", "x", r"no text in this folder"),
    ],
)
def test_unusable_corpora(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=message):
        read_corpus(tmp_path)


def test_split_is_by_document_and_stays():
    documents = [Document(str(i), str(i).encode()) for i in range(100)]
    train, held = split(documents, 0.2)
    assert {d.name for d in train} | {d.name for d in held} == {d.name for d in documents}
    assert not {d.name for d in train} & {d.name for d in held} and 8 < len(held) < 35
    more = split([*documents, Document("new", b"new")], 0.2)[1]
    assert {d.name for d in more} - {"new"} == {d.name for d in held}
    one = split([Document("x", b"0123456789")], 0.3)
    assert [d.data for part in one for d in part] == [b"0123456", b"789"]
    two = split(documents[:2], 0.001)
    assert [len(part) for part in two] == [1, 1]
    with pytest.raises(ValueError, match="held_out is 1; expected a number between 0 and 1"):
        split(documents, 1)
