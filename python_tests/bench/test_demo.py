import json

import pytest
from typer.testing import CliRunner

from lctx_kernels import cli, demo, demo_show
from lctx_kernels.data.text import Document


def lctx(*arguments):
    return CliRunner().invoke(cli.build_app(), list(arguments))


@pytest.fixture
def short_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Attention over very long contexts, in short. " * 8)
    return path


def run_demo(text, tmp_path, backend="reference"):
    return lctx(
        "demo", "--quick", "--text", str(text), "--out", str(tmp_path / "out"), "--backend", backend
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_demo_runs_checks_and_writes(short_text, tmp_path, backend):
    result = run_demo(short_text, tmp_path, backend)
    assert result.exit_code == 0, result.output
    assert "every check passed" in result.output
    data = json.loads((tmp_path / "out/demo.json").read_text())
    assert data["failures"] == []
    assert data["text"]["bytes"] == short_text.stat().st_size
    methods = [r["method"] for r in data["results"]]
    assert methods == ["sdpa", "infini", "dilated", "landmark", "ring (4 simulated ranks)"]
    for line in data["results"]:
        assert line["error"] < 1e-5
        assert line["gradient_error"] < 1e-5
        assert line["method"].startswith("ring") or line["seconds"] > 0
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out/demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_method_ends_the_demo_with_1(short_text, tmp_path, monkeypatch):
    def wrong(q, k, v, block_size, backend):
        return demo.landmark_attention(q, k, v, block_size=block_size // 2, backend=backend)

    methods = [
        m if m.name != "landmark" else demo.Method("landmark", "landmark", wrong, m.options)
        for m in demo.METHODS
    ]
    monkeypatch.setattr(demo, "METHODS", tuple(methods))
    result = run_demo(short_text, tmp_path)
    assert result.exit_code == 1
    assert "FAILED landmark, 256 tokens, rows of out" in result.output
    assert "FAILED landmark, 256 tokens, gradients" in result.output
    assert "2 checks failed" in result.output
    assert json.loads((tmp_path / "out/demo.json").read_text())["failures"]


@pytest.mark.parametrize("content", [None, b"", b"too short"])
def test_unusable_texts_are_one_line_and_2(tmp_path, content):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    result = run_demo(path, tmp_path)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert result.output.startswith(f"lctx demo: {path}: ")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_is_one_line(short_text, tmp_path):
    (tmp_path / "out").touch()
    result = run_demo(short_text, tmp_path)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1


def test_lengths_follow_the_document():
    assert demo.usable_lengths(Document("d", b"x" * 600), quick=True) == (256, 512)
    assert demo.usable_lengths(Document("d", b"x" * 10**6), quick=False) == demo.LENGTHS


def test_nan_is_a_failure():
    sdpa = demo.Result(1, "sdpa", error=1e-7, gradient_error=1e-7)
    result = demo.Result(1, "infini", error=float("nan"), gradient_error=1e-7)
    demo.judge(result, sdpa)
    assert len(result.failures) == 1


def test_cells_of_the_table():
    result = demo.Result(256, "infini", 0.5, 3 << 20, 2.0, 1e-7, 2e-7, ["bad"])
    row = ("256", "infini", "500.0", "3.0", "2.00", "1.0e-07", "2.0e-07", "FAILED")
    assert demo_show.table_rows([result]) == [row]
    assert demo_show.table_rows([demo.Result(256, "ring")])[0][2:5] == ("-", "-", "-")


def test_without_matplotlib_the_plot_is_left_out_with_a_line(tmp_path, monkeypatch, capsys):
    def missing(*args, **kwargs):
        raise ImportError("no matplotlib")

    monkeypatch.setattr(demo_show, "plot_panels", missing)
    demo_show.write_plot([], tmp_path / "demo.png", "note")
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_info_in_both_forms():
    text, data = lctx("info"), lctx("info", "--json")
    assert text.exit_code == data.exit_code == 0
    assert "torch" in text.output
    assert "ops" in json.loads(data.output)


def test_bench_hands_its_options_on():
    result = lctx("bench", "--list", "--device", "cpu")
    assert result.exit_code == 0
    assert "reach" in result.output


def test_bench_outside_a_checkout_says_where_it_lives(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site/lctx_kernels/cli.py"))
    with pytest.raises(SystemExit) as stop:
        cli.load_bench()
    assert "needs the repository" in str(stop.value)


def test_without_typer_the_command_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert "pip install 'lctx_kernels[cli]'" in str(stop.value)
