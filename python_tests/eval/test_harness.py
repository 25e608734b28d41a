"""Converted models in lm_eval: likelihoods are those of their logits."""

import json

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

import lm_eval
from hf.tiny import converted
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lctx_kernels.eval import harness_model
from lctx_kernels.eval.harness import register

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(50))]


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def text(*numbers):
    return " ".join(f"w{n % 50}" for n in numbers)


@pytest.mark.parametrize("read_cached", [False, True])
@pytest.mark.parametrize("method", ["infini", "landmark", "dilated"])
def test_likelihoods_are_those_of_the_logits(method, read_cached, tokenizer):
    options = {"block_size": 5, "top_k": 2, "chunk_len": 9} if method == "landmark" else None
    model = converted(method, dtype=torch.float32, options=options)
    lm = harness_model(
        model, tokenizer, read_cached=read_cached, device="cpu", batch_size=1, max_length=64
    )
    context, rest = text(*range(3, 40)), " " + text(7, 9, 11)
    request = Instance("loglikelihood", {}, (context, rest), 0)
    ((ours, greedy),) = lm.loglikelihood([request], disable_tqdm=True)
    ids = torch.tensor([tokenizer(context + rest, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = model(ids[:, :-1], use_cache=read_cached).logits[0, -3:].float()
    want = logits.log_softmax(-1).gather(1, ids[0, -3:, None]).sum().item()
    assert ours == pytest.approx(want, abs=1e-3)
    assert greedy == bool((logits.argmax(-1) == ids[0, -3:]).all())


def test_a_saved_model_by_name(tokenizer, tmp_path):
    converted("infini", dtype=torch.float32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": text(*range(i, i + 9)), "answer": text(i)} for i in range(4)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "words", "dataset_path": "json", "test_split": "train",
        "dataset_kwargs": {
            "data_files": str(tmp_path / "rows.json"), "cache_dir": str(tmp_path / "cache"),
        },
        "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": ["w1", "w2"], "doc_to_target": 0, "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    register()
    register()
    results = lm_eval.simple_evaluate(
        model="lctx", model_args=f"pretrained={tmp_path / 'model'},dtype=float32",
        tasks=[task], device="cpu", bootstrap_iters=0,
    )  # fmt: skip
    assert 0 <= results["results"]["words"]["acc,none"] <= 1
    assert results["n-samples"]["words"]["effective"] == 4
