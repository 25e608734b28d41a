"""The commands that work on models, as a user calls them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("datasets")
pytest.importorskip("transformers")
from typer.testing import CliRunner

from lctx_kernels import cli
from lctx_kernels.commands.train import last_complete_checkpoint

TINY = ["--model", "tiny", "--vocab-size", "300", "--seq-len", "64", "--batch", "2",
        "--device", "cpu", "--report", "none", "--warmup", "2", "--lr", "3e-3"]  # fmt: skip


def lctx(*arguments, expect=0, **options):
    result = CliRunner().invoke(cli.build_app(), [str(a) for a in arguments], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == expect, result.output
    output = result.output if expect else result.stdout
    return " ".join(output.replace("│", " ").split())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {i} of {i * i} sheep, counted by hand. " for i in range(400)))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    """A folder with a small trained infini model."""
    out = tmp_path_factory.mktemp("runs") / "infini"
    lctx("train", out, *TINY, "--text", text, "--steps", 24, "--save-every", 8, "--eval-every", 12,
         "--method", "infini", "--set", "segment_len=16", "--set", "update=delta")  # fmt: skip
    return out


def history(folder):
    states = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    log = json.loads((states[-1] / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def test_training_learns_and_writes_safetensors(trained):
    losses = history(trained)
    assert list(losses) == list(range(1, 25)) and losses[24] < 0.8 * losses[1]
    config = json.loads((trained / "config.json").read_text())
    assert config["lctx"]["options"]["segment_len"] == 16
    assert (trained / "model.safetensors").is_file() and (trained / "tokenizer.json").is_file()
    assert not list(trained.rglob("pytorch_model*"))
    record = json.loads((trained / "run.json").read_text())
    assert len(record["text_sha256"]) == 64 and record["settings"]["seq_len"] == 64


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_the_losses_are_the_same(tmp_path, text):
    options = [*TINY, "--text", str(text), "--steps", "40", "--save-every", "6",
               "--eval-every", "100", "--method", "infini", "--set", "segment_len=16",
               "--segmentwise"]  # fmt: skip
    lctx("train", tmp_path / "whole", *options)
    run = subprocess.Popen(
        [sys.executable, "-m", "lctx_kernels.cli", "train", str(tmp_path / "cut"), *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    for _ in range(3000):
        if (tmp_path / "cut" / "checkpoint-12").exists() or run.poll() is not None:
            break
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert run.returncode == -signal.SIGKILL and not (tmp_path / "cut" / "config.json").exists()
    output = lctx("train", tmp_path / "cut", "--resume")  # with the options of the beginning
    assert "resumed from checkpoint-" in output
    assert history(tmp_path / "cut") == history(tmp_path / "whole")


def test_killed_after_its_last_step_a_run_takes_no_other(trained, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(trained, cut)
    (cut / "model.safetensors").unlink()
    lctx("train", cut, "--resume")
    assert last_complete_checkpoint(cut).name == "checkpoint-24"
    assert (cut / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_half_written_checkpoints_are_passed_over(trained, tmp_path):
    whole = last_complete_checkpoint(trained)
    assert whole.name == "checkpoint-24"
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                 "trainer_state.json"):  # fmt: skip
        for size in (None, 0.5):
            folder = tmp_path / f"{name}{size}"
            shutil.copytree(whole, folder / "checkpoint-16")
            shutil.copytree(whole, folder / "checkpoint-24")
            file = folder / "checkpoint-24" / name
            data = file.read_bytes()
            file.unlink()
            if size is not None:
                file.write_bytes(data[: int(len(data) * size)])
            assert last_complete_checkpoint(folder).name == "checkpoint-16", (name, size)
    assert last_complete_checkpoint(tmp_path) is None


def test_a_run_is_not_overwritten_nor_mixed(trained, text, tmp_path):
    arguments = ["train", trained, *TINY, "--text", text, "--steps", 24, "--method", "infini",
                 "--set", "segment_len=16", "--set", "update=delta"]  # fmt: skip
    assert "holds a run; expected --resume" in lctx(*arguments, expect=2)
    changed = lctx(*arguments, "--seed", 5, "--resume", expect=2)
    assert "--seed" in changed and "5; the run in" in changed and "began with 0" in changed
    other = lctx(*[a if a != "segment_len=16" else "segment_len=8" for a in arguments], "--resume",
                 expect=2)  # fmt: skip
    assert "Invalid value for --set" in other
    assert "no run in" in lctx("train", tmp_path / "new", *TINY, "--resume", expect=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "is not empty" in lctx("train", tmp_path / "full", *TINY, expect=2)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("landmark", ["block_size=9"]),
        ("dilated", ["segment_lengths=[16,64]", "dilation_rates=[1,2]"]),
    ],
)
def test_other_methods_train_generate_and_are_evaluated(method, options, text, tmp_path):
    out = tmp_path / method
    pairs = [part for option in options for part in ("--set", option)]
    lctx("train", out, *TINY, "--text", text, "--steps", 6, "--save-every", 2, "--keep-every", 4,
         "--method", method, *pairs)  # fmt: skip
    assert [path.name for path in out.glob("milestone-*")] == ["milestone-4"]
    assert lctx("generate", out / "milestone-4", "Line", "--max-new-tokens", 2, "--device", "cpu")
    assert lctx("generate", out, "Line 3", "--max-new-tokens", 6, "--device", "cpu")
    lctx("eval", "perplexity", out, "--text", text, "--lengths", "64", "--max-pieces", 2,
         "--device", "cpu")  # fmt: skip


def test_lora_and_tensorboard(trained, text, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "lora"
    lctx("train", out, "--model", trained, "--text", text, "--seq-len", 64, "--steps", 3,
         "--lora", 2, "--device", "cpu", "--batch", 2)  # fmt: skip
    assert (out / "adapter_model.safetensors").is_file()
    assert list(out.rglob("events.out.tfevents*"))


def test_config_file(tmp_path, text):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: tiny\nvocab-size: 300\nseq_len: 32\nbatch: 2\ndevice: cpu\nreport: none\n"
        f"text: {text}\nsteps: 50\nmethod: infini\nset:\n  segment_len: 8\n  update: delta\n"
    )
    lctx("train", tmp_path / "out", "--config", config, "--steps", 2)
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert settings["steps"] == 2 and settings["seq_len"] == 32
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["lctx"]["options"]
    assert (saved["segment_len"], saved["update"]) == (8, "delta")
    for content, message in (
        ("seq_length: 4\n", "seq_length is no option; expected some of accumulate, batch"),
        ("- a\n", "expected options as `name: value`"),
        ("a: [\n", "while parsing"),
        ("steps: none\n", "--steps"),
    ):
        config.write_text(content)
        output = lctx("train", tmp_path / "bad", "--config", config, expect=2)
        assert message in output, output
    assert "No such file" in lctx("train", tmp_path / "bad", "--config", tmp_path / "x", expect=2)


def test_generate(trained, text):
    out = lctx("generate", trained, "Line 3 of", "--max-new-tokens", 8, "--device", "cpu")
    assert out
    chunks = lctx("generate", trained, "Line 3 of", "--max-new-tokens", 8, "--chunk", 2,
                  "--device", "cpu")  # fmt: skip
    assert chunks == out
    piped = lctx("generate", trained, "-", "--max-new-tokens", 8, "--device", "cpu",
                 input="Line 3 of")  # fmt: skip
    assert piped == out
    sampled = [
        lctx("generate", trained, "--prompt-file", text, "--temperature", 1.5, "--top-k", 40,
             "--seed", seed, "--max-new-tokens", 12, "--device", "cpu")
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert sampled[0] == sampled[1] != sampled[2]


def test_evaluation(trained, text, tmp_path):
    pytest.importorskip("matplotlib")
    result, plot = tmp_path / "needle.json", tmp_path / "needle.png"
    output = lctx("eval", "needle", trained, "--lengths", "300,400", "--depths", "0,1",
                  "--repeats", 1, "--max-new-tokens", 3, "--out", result, "--plot", plot,
                  "--device", "cpu")  # fmt: skip
    scores = json.loads(result.read_text())["scores"]
    assert len(scores) == 4 and "depth 300 400" in output and plot.stat().st_size > 1000
    assert all(0.8 * s["length"] < s["tokens"] <= s["length"] + 1 for s in scores)
    output = lctx("eval", "ruler", trained, "--lengths", "500", "--depths", "0.5", "--repeats", 1,
                  "--max-new-tokens", 2, "--device", "cpu")  # fmt: skip
    assert all(name in output for name in ("multikey", "variables", "common_words"))
    result = tmp_path / "perplexity.json"
    lctx("eval", "perplexity", trained, "--text", text, "--lengths", "32,64", "--chunk", 16,
         "--out", result, "--device", "cpu")  # fmt: skip
    results = json.loads(result.read_text())
    assert [r["length"] for r in results["results"]] == [32, 64]
    assert 0.2 < results["results"][1]["bits_per_byte"] < 8 and len(results["sha256"]) == 64


def test_convert(trained, tmp_path):
    import transformers

    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4))  # fmt: skip
    dense.save_pretrained(tmp_path / "dense")
    transformers.AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "dense")
    output = lctx("convert", tmp_path / "dense", tmp_path / "out", "--method", "landmark",
                  "--set", "block_size=16")  # fmt: skip
    assert "LandmarkLlamaForCausalLM: layers [0, 1]" in output
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<landmark>") == 300
    one = lctx("convert", tmp_path / "dense", tmp_path / "one", "--method", "infini",
               "--layers", "-1")  # fmt: skip
    assert "layers [1]" in one
    assert lctx("generate", tmp_path / "out", "Line", "--max-new-tokens", 4, "--device", "cpu",
                "--set", "top_k=2")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "OUT", "--method", "infini", "--set", "segment_len=0"],
            "Invalid value for --set: segment_len is 0; expected an int >= 1",
        ),
        (["train", "OUT", "--method", "dilated"], "--set: dilated needs segment_lengths"),
        (["train", "OUT", "--method", "infini", "--layers", "9"], "layers"),
        (["train", "OUT", "--keep-every", "50"], "50; expected a multiple of --save-every, 100"),
        (["train", "OUT", "--device", "tpu"], "--device: 'tpu'; expected auto or cpu"),
        (["train", "OUT", "--method", "infini", "--set", "segment_len"], "Invalid value for --set"),
        (["train", "OUT", "--method", "swing"], "--method: 'swing'; expected one of infini"),
        (["train", "OUT", "--method", "ring"], "ring needs processes of its own"),
        (["train", "OUT", "--set", "segment_len=4"], "Invalid value for --method"),
        (["train", "OUT", "--segmentwise"], "Invalid value for --segmentwise"),
        (["train", "OUT", "--steps", "0"], "Invalid value for '--steps'"),
        (["train", "OUT", "--text", "/nowhere.txt"], "--text: /nowhere.txt: no such file"),
        (["train", "OUT", "--model", "/nowhere"], "Invalid value for --model: "),
        (["train", "OUT", "--held-out", "2"], "Invalid value for --held-out: "),
        (["generate", "/nowhere", "hello"], "MODEL: no folder /nowhere; as a name on the"),
        (["generate", "MODEL", "x", "--dtype", "int8"], "--dtype: 'int8'; expected one of auto"),
        (["generate", "MODEL", "x", "--device", "tpu"], "Invalid value for --device: "),
        (["generate", "MODEL", "--prompt-file", "/nowhere"], "Invalid value for --prompt-file: "),
        (["eval", "needle", "MODEL", "--plot", "x.txt"], "--plot: x.txt; expected an image"),
        (["eval", "needle", "MODEL", "--filler", "/nowhere"], "Invalid value for --filler: "),
        (["eval", "needle", "MODEL", "--set", "top_k=4"], "--set: hf.make_cache: infini has no"),
        (["generate", "MODEL"], "expected exactly one of the two"),
        (["generate", "MODEL", "x", "--set", "top_k=4"], "infini has no option top_k"),
        (["eval", "passkey", "MODEL", "--lengths", "long"], "Invalid value for --lengths"),
        (["eval", "passkey", "MODEL", "--lengths", "5"], "lctx eval passkey: make_samples: length"),
        (["eval", "passkey", "MODEL", "--depths", "2"], "depth 2.0; expected numbers from 0 to 1"),
        (["eval", "perplexity", "MODEL", "--lengths", "9999999"], "expected at least length"),
        (["eval", "perplexity", "MODEL", "--set", "top_k=4"], "Invalid value for --chunk"),
        (["convert", "MODEL", "OUT", "--method", "landmark"], "is converted already, to infini"),
        (["convert", "MODEL", "MODEL", "--method", "landmark"], "is not empty"),
    ],
)  # fmt: skip
def test_errors_are_one_line_that_names_the_option(arguments, message, trained, tmp_path, text):
    places = {"OUT": str(tmp_path / "out"), "MODEL": str(trained)}
    arguments = [places.get(a, a) for a in arguments]
    if arguments[0] == "train" and "--text" not in arguments:
        arguments += ["--text", str(text)]
    output = lctx(*arguments, expect=2)
    assert message in output and "Traceback" not in output
    assert not (tmp_path / "out" / "run.json").exists()  # OUT may be used for another attempt


def test_questions_to_train_on(trained, tmp_path):
    out = tmp_path / "keys.jsonl"
    arguments = ["samples", "passkey", out, "--model", trained, "--lengths", "260,300"]
    assert "6 samples" in lctx(*arguments, "--count", 3)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({line["text"] for line in lines}) == 6
    assert all(f"The pass key is{line['text']}. " in line["prompt"] for line in lines)
    assert "exists" in lctx(*arguments, expect=2)
    assert "expected one of passkey" in lctx("samples", "x", tmp_path / "y.jsonl", expect=2)
    model = tmp_path / "model"
    lctx("train", model, "--model", trained, "--text", out, "--seq-len", 400, "--steps", 2,
         "--batch", 1, "--device", "cpu", "--report", "none")  # fmt: skip
    assert len(history(model)) == 2
