"""Evaluation of converted models."""

import math

import pytest
import torch
from hf.tiny import METHODS, VOCAB, converted, hf, tokens

from lctx_kernels.eval import evaluate, make_samples, perplexity


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk", [None, 1, 7, 16])
def test_perplexity_counts_every_token_of_every_chunk(method, chunk):
    model, ids = converted(method, dtype=torch.float32), tokens(1, 55)[0]
    result = perplexity(model, ids, 25, chunk=chunk, n_bytes=110)
    pieces = ids[:50].view(2, 25)
    logits = model(pieces, use_cache=False).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten()).item()
    assert result.tokens == 48 and result.length == 25
    assert result.loss == pytest.approx(want, rel=1e-4)
    assert result.perplexity == pytest.approx(math.exp(want), rel=1e-3)
    assert result.bits_per_byte == pytest.approx(want / math.log(2) / 2, rel=1e-4)


def test_perplexity_with_retrieval():
    model, ids = converted("landmark", dtype=torch.float32), tokens(1, 60)[0]
    whole = perplexity(model, ids, 60)
    every = perplexity(model, ids, 60, chunk=12, make_cache=lambda: hf.make_cache(model, top_k=20))
    few = perplexity(model, ids, 60, chunk=12, make_cache=lambda: hf.make_cache(model, top_k=1))
    assert every.loss == pytest.approx(whole.loss, rel=1e-4)
    assert few.loss != pytest.approx(whole.loss, rel=1e-4)


def test_wrong_lengths():
    model, ids = converted("infini"), tokens(1, 20)[0]
    with pytest.raises(ValueError, match="the text has 20 tokens; expected at least length = 30"):
        perplexity(model, ids, 30)
    with pytest.raises(ValueError, match="length is 1, chunk is None"):
        perplexity(model, ids, 1)


class Letters:
    """A tokenizer of letters."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 0

    def __call__(self, text, **options):
        return {"input_ids": [2 + ord(c) % (VOCAB - 2) for c in text]}

    def decode(self, ids, **options):
        return "".join(chr(ord("0") + int(i) % 10) for i in ids)


def test_evaluate():
    model, samples = converted("infini"), make_samples("passkey", [300], [0.5], repeats=2)
    seen = []
    scores = evaluate(
        model, Letters(), samples, max_new_tokens=5, on_score=seen.append, prefill_chunk_size=64
    )
    assert scores == seen and [len(s.answer) for s in scores] == [5, 5]
    answer = scores[0].answer
    right = [type(samples[0])("passkey", samples[0].prompt, (answer[1:4],), 300, 0.5)]
    assert evaluate(model, Letters(), right, max_new_tokens=5)[0].score == 1.0
    assert scores[0].as_dict()["expected"] == samples[0].answers
