import gzip

import pytest
import torch

from lctx_kernels.data import text
from lctx_kernels.data.text import TextError, default_document, embed, read_document


def test_files_are_read_and_unpacked(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xffabc")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"abc"))
    assert read_document(tmp_path / "a.txt").data == b"\xffabc"
    assert read_document(tmp_path / "b.txt.gz").data == b"abc"
    assert len(read_document(tmp_path / "a.txt").sha256) == 64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "no such file"),
        ("folder", "is a directory"),
        ("empty.txt", "the file is empty"),
        ("broken.txt.gz", "cannot be read"),
        ("cut.txt.gz", "cannot be read"),
    ],
)
def test_unusable_files_are_one_clear_line(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken.txt.gz").write_bytes(b"no gzip")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"abc" * 1000)[:20])
    with pytest.raises(TextError, match=message) as error:
        read_document(tmp_path / name)
    assert "\n" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_an_unreadable_file_names_the_reason(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text("x")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(TextError, match=r"secret\.txt: cannot be read: Permission denied"):
        read_document(path)


def test_the_longest_installed_text_is_the_default(tmp_path):
    policy = tmp_path / "usr/share/doc/debian-policy/policy.txt.gz"
    pod = tmp_path / "usr/share/perl/5.36/pod/perlapi.pod"
    for path in (policy, pod):
        path.parent.mkdir(parents=True)
    policy.write_bytes(gzip.compress(b"policy " * 1000))
    pod.write_bytes(b"=head1 " * 10)
    assert default_document(tmp_path).name == str(policy)
    policy.write_bytes(b"broken")
    assert default_document(tmp_path).name == str(pod)


def test_without_installed_texts_the_standard_library_serves(tmp_path):
    document = default_document(tmp_path)
    assert "standard library" in document.name
    assert len(document.data) > 100_000


def test_the_default_is_long_enough_for_the_demo():
    from lctx_kernels.demo import LENGTHS

    assert len(default_document().data) >= max(LENGTHS)


def test_a_broken_bible_tool_is_passed_over(monkeypatch):
    monkeypatch.setattr(text.shutil, "which", lambda name: "/bin/false")
    assert text._bible() is None
    monkeypatch.setattr(text.shutil, "which", lambda name: None)
    assert text._bible() is None


def test_the_embedding_is_seeded_positional_and_of_unit_variance():
    data = default_document().data[:2000]
    q, k, v = embed(data, heads=4, head_dim=16)
    again = embed(data, heads=4, head_dim=16)
    assert q.shape == k.shape == v.shape == (1, 2000, 4, 16)
    assert q.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), again, strict=True))
    assert not torch.equal(q, embed(data, heads=4, head_dim=16, seed=1)[0])
    assert all(0.8 < x.std() < 1.2 for x in (q, k, v))
    same_bytes = embed(b"a" * 50, heads=4, head_dim=16)[0]
    assert not torch.equal(same_bytes[:, 10], same_bytes[:, 40])


def test_a_prefix_embeds_to_a_prefix():
    data = default_document().data[:100]
    short, full = embed(data[:40], 2, 8)[0], embed(data, 2, 8)[0]
    torch.testing.assert_close(short, full[:, :40])


def test_documents_of_any_bytes_embed():
    assert embed(bytes(range(256)), 1, 4)[0].isfinite().all()
    assert embed(b"x", 1, 4)[0].shape == (1, 1, 1, 4)
    assert embed(b"", 1, 4)[0].shape == (1, 0, 1, 4)
