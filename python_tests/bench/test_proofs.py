"""The proofs' rows, metrics, commands and tables, at tiny sizes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from typer.testing import CliRunner

from bench.proofs import graphs, models, tables
from bench.proofs.__main__ import app
from bench.proofs.evaluate import passkey_accuracy
from bench.proofs.models import METHODS, SHAPES, build
from bench.proofs.rows import DIGITS, VOCAB, load_text, passkey_rows
from bench.proofs.train import Recipe, Stepper


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_bytes(bytes(97 + (i + j * j) % 26 for j in range(1600)))
    return folder


def test_rows_hold_the_key_once_more_and_ask_for_it(text):
    source = load_text(text, "cpu").train
    T = 200
    batch = passkey_rows(source, 64, T, torch.Generator().manual_seed(0))
    places = set()
    for row, hidden, echoes, answers in zip(*vars(batch).values(), strict=True):
        written = bytes(row.tolist()).decode()
        key = bytes(row[hidden].tolist()).decode()
        fact = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
        question = f"\nWhat is the pass key? The pass key is {key}"
        assert len(key) == DIGITS and key.isdigit()
        assert written.count(fact) == 1 and written.endswith(question)
        assert bytes(row[echoes].tolist()).decode() == key
        assert bytes(row[answers].tolist()).decode() == key and answers[-DIGITS:].all()
        rest = written.removesuffix(question).replace(fact, "")
        assert rest.encode() in bytes(source.tolist())  # one window of the text
        places.add(written.index(fact))
    assert min(places) < 20 and max(places) > T - len(fact) - len(question) - 20
    with pytest.raises(ValueError, match="T is 90; expected at least 104"):
        passkey_rows(source, 1, 90, torch.Generator())


def test_documents_are_trained_on_or_held_out(text):
    split = load_text(text, "cpu")
    assert 0 < len(split.held_out) < 20
    trained = bytes(split.train.tolist())
    assert not any(bytes(document.tolist()) in trained for document in split.held_out)


@pytest.mark.parametrize("method", ["infini", "infini-delta", "landmark"])
def test_the_layers_alone_give_the_logits_of_the_model(method):
    model, ids = build(method, "tiny", 0), torch.randint(97, 123, (2, 300))
    expected = model(ids, use_cache=False).logits[..., :VOCAB]
    torch.testing.assert_close(graphs.logits(model, ids)[..., :VOCAB], expected)


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["infini", "landmark"])
def test_recorded_gradients_are_those_of_the_model(method):
    source, shape = torch.randint(97, 123, (9999,), dtype=torch.uint8, device="cuda"), "30m"
    draws = torch.Generator("cuda").manual_seed(0)
    models = [build(method, shape, 0).cuda().train() for _ in range(2)]
    steps = [Stepper(model, Recipe(method, recorded=x == 0)) for x, model in enumerate(models)]
    for _ in range(2):
        batch = passkey_rows(source, 8, 254, draws)
        models[1].zero_grad()
        found = [step.backward(batch, True).clone() for step in steps]
        torch.testing.assert_close(*found, atol=0.02, rtol=0.01)
        for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
            cosine = torch.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0)
            assert cosine > 0.95


class Oracle:
    """Knows the first `known` digits of every key."""

    def __init__(self, known):
        self.known = known

    def __call__(self, ids, use_cache):
        logits = torch.zeros(*ids.shape, 256)
        for row, out in zip(ids, logits, strict=True):
            written = bytes(row.tolist())
            start = written.index(b"The pass key is ") + 16
            for digit in range(self.known):
                out[len(row) - DIGITS + digit, written[start + digit]] = 1
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(("known", "accuracy"), [(5, 1.0), (4, 0.0)])
def test_accuracy_counts_whole_keys(known, accuracy):
    filler = torch.full((900,), ord("x"), dtype=torch.uint8)
    found = passkey_accuracy(Oracle(known), filler, 300, 10, None, 0)
    assert found["accuracy"] == accuracy and found["samples"] == 10
    assert found["digits"] == pytest.approx(known / 5)


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_commands_and_tables(text, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "30m", SHAPES["tiny"] | {"num_hidden_layers": 1})
    monkeypatch.setattr(models, "SHAPES", SHAPES)
    recipe, out = tmp_path / "recipe.json", tmp_path / "proofs"
    recipe.write_text(
        json.dumps({"lengths": [140, 160], "steps": 50, "tokens": 256, "advance": 9.0})
    )
    for method in METHODS:
        run("train", method, "--text", text, "--config", recipe, "--out", out, "--lengths", 4,
            "--samples", 2, "--documents", 1)  # fmt: skip
        result = json.loads((out / f"train-{method}.json").read_text())
        assert result["recipe"]["seed"] == 0 and len(result["text_sha256"]) == 64
        assert bool(result["gates"]) == method.startswith("infini")
        names = [f"{method}, k = {k}" for k in (2, 4)] if method == "landmark" else [method]
        assert list(result["passkey"]) == names
        for name in names:
            for kind in ("passkey", "passkey_among_grass"):
                assert [x["length"] for x in result[kind][name]] == [160, 320, 640]
            assert [x["context"] for x in result["bits_per_byte"][name]] == [128, 256, 512, 1024]
    weights, result = tmp_path / "weights", out / "train-landmark.json"
    run("train", "landmark", "--text", text, "--config", recipe, "--out", out, "--lengths", 4,
        "--samples", 2, "--documents", 1, "--weights", weights)  # fmt: skip
    before = json.loads(result.read_text())
    run("evaluate", weights, result, "--text", text, "--lengths", 4, "--samples", 2,
        "--documents", 1)  # fmt: skip
    after = json.loads(result.read_text())
    assert after["curve"] == before["curve"] and "evaluated_on" in after
    for name, found in before["bits_per_byte"].items():
        for a, b in zip(found, after["bits_per_byte"][name], strict=True):
            assert a["bits_per_byte"] == pytest.approx(b["bits_per_byte"], abs=0.05)  # bf16
    names = ["gemma-32k", "stream", "histories", "prompt-32k", "steps", "steps-gemma", "llama-1m"]
    run("measure", ",".join(names), "--tiny", "--out", out)
    for name in names:
        assert "error" not in json.loads((out / f"{name}.json").read_text())["found"], name
    sources = [out / f"train-{method}.json" for method in tables.ORDER]
    pytest.importorskip("matplotlib")
    tables.plot(sources, tmp_path / "proofs.png", {})
    assert (tmp_path / "proofs.png").stat().st_size > 10_000
    trained = tables.training(out).splitlines()
    assert len(trained) == 2 + len(METHODS) + 1 + 2 and trained[0].count("|") == 8
    assert tables.steps(out).count("**") == 2 * 3 * 4
    assert "1k of" not in tables.headline(out) and tables.headline(out).count("landmark") == 2
    assert tables.generation(out).count("infini") == 2
    assert tables.training(tmp_path) == tables.steps(tmp_path) == tables.MISSING


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_add_up(tmp_path):
    root = Path(__file__).resolve().parents[2]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    measure = ["bench.proofs", "measure", "gemma-32k,prompt-32k", "--tiny", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, *launcher, *measure], cwd=root, env=environment, capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    step = json.loads((tmp_path / "gemma-32k-2-gpus.json").read_text())["found"]
    assert step["gpus"] == 2 and step["segments_done"] == 4
    alone = step["segments_done"] * step["segment"] / step["seconds_of_text"]
    assert step["tokens_per_second"] >= 2 * alone * 0.999  # the slower one's time
    assert "error" not in json.loads((tmp_path / "prompt-32k-2-gpus.json").read_text())["found"]
