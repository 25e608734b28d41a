"""Generation with the caches of converted models against forwards over the whole text."""

import pytest
import torch
from hf.tiny import LAYERS, METHODS, VOCAB, base, close, converted, hf, tokens
from transformers import DynamicCache

from lctx_kernels.hf._compat import FAMILIES

GREEDY = {"do_sample": False, "pad_token_id": 0}
MODELS = {
    "infini": ("infini", {"segment_len": 8, "gate_init": 0.5, "update": "delta"}, None),
    "infini, last layer": ("infini", {"segment_len": 8, "gate_init": 0.5}, [1]),
    "landmark": ("landmark", {"block_size": 5}, None),
    "retrieval of all": ("landmark", {"block_size": 5, "top_k": 30, "offload": True}, None),
    "dilated": ("dilated", {"segment_lengths": [8, 16], "dilation_rates": [1, 2]}, None),
    "dilated, first layer": (
        "dilated", {"segment_lengths": [8, 16], "dilation_rates": [1, 3]}, [0],
    ),
}  # fmt: skip


class ExactRotary(torch.nn.Module):
    """The default rotary embedding in fp64: a retrieved block meets a query by the difference of
    two positions, which transformers' fp32 angles give up to their rounding alone."""

    def __init__(self, inv_freq):
        super().__init__()
        self.inv_freq = inv_freq.double()

    def forward(self, x, position_ids):
        angle = position_ids[..., None].double() * self.inv_freq
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()


def exact(name):
    model = make(name)
    model.model.rotary_emb = ExactRotary(model.model.rotary_emb.inv_freq)
    return model


def make(name, family="llama", **changes):
    method, options, layers = MODELS[name]
    return converted(method, family, options=options, layers=layers, **changes)


def greedy(model, ids):
    """Tokens that follow each prefix of ids, by one forward over all of it."""
    logits = model(ids, use_cache=False).logits
    return logits[..., :VOCAB].argmax(-1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(name, family):
    model, ids = make(name, family), tokens(2, 21)
    out = model.generate(ids, max_new_tokens=20, **GREEDY)
    assert torch.equal(greedy(model, out)[:, 20:-1], out[:, 21:])


@pytest.mark.parametrize("name", MODELS)
def test_a_cached_forward_gives_the_logits_of_the_whole_text(name):
    model, ids = exact(name), tokens(2, 40)
    cache, parts = hf.make_cache(model), []
    for part in ids.split([11, 1, 1, 16, 11], dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        parts.append(out.logits)
    close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits, rtol=1e-6, atol=1e-6)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("name", MODELS)
def test_chunked_prefill(name):
    model, ids = make(name), tokens(2, 33)
    want = model.generate(ids, max_new_tokens=9, **GREEDY)
    for chunk in (8, 5):
        out = model.generate(ids, max_new_tokens=9, prefill_chunk_size=chunk, **GREEDY)
        assert torch.equal(out, want)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [None, 7])
def test_padded_batches(name, chunk):
    model, rows = make(name), [tokens(1, n, seed=n) for n in (23, 9, 16)]
    alone = [model.generate(row, max_new_tokens=12, **GREEDY)[0, row.shape[1] :] for row in rows]
    ids = torch.zeros(3, 23, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(rows):
        ids[row, -text.shape[1] :] = text[0]
        mask[row, -text.shape[1] :] = 1
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, prefill_chunk_size=chunk, **GREEDY
    )
    assert [row.tolist() for row in out[:, 23:]] == [row.tolist() for row in alone]
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    for row, text in enumerate(rows):
        want = model(text, use_cache=False).logits[0]
        close(logits[row, -text.shape[1] :], want, rtol=1e-5, atol=1e-5)  # cos and sin are fp32


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_beam_search(name, padded):
    model, ids = make(name), tokens(2, 14)
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :6], mask[1, :6] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "num_beams": 3, **GREEDY}
    with_cache = model.generate(ids, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))
    assert not torch.equal(with_cache, model.generate(ids, **options | {"num_beams": 1}))


@pytest.mark.parametrize("name", MODELS)
def test_sampling(name):
    model, ids = make(name), tokens(2, 14)
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outs.append(model.generate(ids, max_new_tokens=10, do_sample=True, top_k=20,
                                   num_return_sequences=2, use_cache=use_cache,
                                   pad_token_id=0))  # fmt: skip
    assert torch.equal(*outs) and outs[0].shape == (4, 24)


@pytest.mark.parametrize("name", MODELS)
def test_going_on_with_a_cache(name):
    model, ids = make(name), tokens(1, 14)
    cache = hf.make_cache(model)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=6, **GREEDY)
    prompt = torch.cat([first, tokens(1, 7, seed=5)], dim=1)
    out = model.generate(prompt, past_key_values=cache, max_new_tokens=9, **GREEDY)
    assert torch.equal(out, model.generate(prompt, max_new_tokens=9, **GREEDY))


@pytest.mark.parametrize("name", MODELS)
def test_caches_are_reordered_repeated_selected_and_reset(name):
    model, ids = exact(name), tokens(2, 19)

    def after(act, rows):
        cache = hf.make_cache(model)
        model(ids[:, :17], past_key_values=cache, use_cache=True)
        act(cache)
        out = model(ids[rows, 17:], past_key_values=cache, use_cache=True).logits
        close(out, model(ids[rows], use_cache=False).logits[:, 17:], rtol=1e-6, atol=1e-6)

    after(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0])
    after(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1])
    after(lambda cache: cache.batch_select_indices(torch.tensor([1])), [1])
    cache = hf.make_cache(model)
    if type(cache) is DynamicCache:  # transformers' own
        return
    model(ids, past_key_values=cache, use_cache=True)
    cache.reset()
    assert cache.get_seq_length() == 0
    out = model(ids, past_key_values=cache, use_cache=True).logits
    close(out, model(ids, use_cache=False).logits, rtol=1e-6, atol=1e-6)


def test_infini_generates_in_constant_memory():
    model = converted("infini")
    cache, sizes = hf.make_cache(model), set()
    for step in range(30):
        with torch.no_grad():
            model(tokens(1, 8, seed=step), past_key_values=cache, use_cache=True)
        states = [layer.rows.states[0] for layer in cache.layers]
        held = [x for state in states for x in (*state.mem, *state.open)]
        sizes.add(sum(x.untyped_storage().nbytes() for x in held))
    assert len(sizes) == 1 and cache.get_seq_length() == 240
    positions = model.model._positions(tokens(1, 4), None, cache)
    assert positions.max() < 8  # however long the text, the rotary embedding sees one segment


def test_landmark_token_is_never_generated():
    model, ids = converted("landmark"), tokens(4, 9)
    with torch.no_grad():
        model.lm_head.weight[VOCAB] = 100 * model.lm_head.weight[2]
    for options in (GREEDY, {"do_sample": True, "pad_token_id": 0}):
        out = model.generate(ids, max_new_tokens=20, **options)
        assert (out < VOCAB).all()


@pytest.mark.parametrize("select", ["token_and_head", "head", "token"])
def test_retrieval_gives_all_logits_over_chunks(select):
    """One call over a long text is what calls over its chunks are, with every chunk's logits."""
    options = {"block_size": 5, "top_k": 2, "chunk_len": 9, "select": select}
    model, ids = converted("landmark", options=options), tokens(2, 50)
    whole = model(ids, use_cache=True, output_hidden_states=True)
    cache = hf.make_cache(model)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(9, 1)]
    assert whole.logits.shape == (2, 50, VOCAB + 1)
    close(whole.logits, torch.cat(parts, dim=1))
    assert [h.shape for h in whole.hidden_states] == [(2, 50, 32)] * (LAYERS + 1)
    near = model(ids, use_cache=False).logits
    assert not torch.allclose(whole.logits[:, -1], near[:, -1])
    close(whole.logits[:, :9], near[:, :9])


def test_a_long_prompt_makes_room_once():
    model = converted("landmark", options={"block_size": 5, "top_k": 2, "chunk_len": 9})
    cache = model(tokens(1, 100), use_cache=True).past_key_values
    assert cache.layers[0].rows.states[0].store.k.room.shape[1] == 28  # 25 blocks and an eighth


def test_generation_with_retrieval_is_the_argmax_of_every_step():
    options = {"block_size": 5, "top_k": 2, "chunk_len": 12}
    model, ids = converted("landmark", options=options), tokens(2, 44)
    out = model.generate(ids, max_new_tokens=12, output_logits=True, return_dict_in_generate=True,
                         **GREEDY)  # fmt: skip
    cache = hf.make_cache(model)
    with torch.no_grad():  # by the same kernels: rounding chooses between equal keys of layer 0
        logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
        for step, found in zip(range(44, 56), out.logits, strict=True):
            token = logits[:, :VOCAB].argmax(-1)
            assert torch.equal(out.sequences[:, step], token)
            torch.testing.assert_close(found, logits.float())
            logits = model(token[:, None], past_key_values=cache, use_cache=True).logits[:, -1]


def test_cache_options_of_one_generation():
    model, ids = converted("landmark"), tokens(1, 40)
    few = model.generate(ids, past_key_values=hf.make_cache(model, top_k=1, max_blocks=2),
                         max_new_tokens=12, **GREEDY)  # fmt: skip
    every = model.generate(ids, past_key_values=hf.make_cache(model, top_k=99), max_new_tokens=12,
                           **GREEDY)  # fmt: skip
    assert torch.equal(every, model.generate(ids, max_new_tokens=12, **GREEDY))
    assert few.shape == every.shape
    with pytest.raises(TypeError, match=r"landmark has no option segment_len for a cache"):
        hf.make_cache(model, segment_len=4)
    with pytest.raises(ValueError, match=r"hf.make_cache: top_k is 0; expected an int >= 1"):
        hf.make_cache(model, top_k=0)
    with pytest.raises(TypeError, match=r"infini has no option top_k for a cache; expected none"):
        hf.make_cache(converted("infini"), top_k=3)


def test_long_retrieval_keeps_positions_short():
    options = {"block_size": 5, "top_k": 2, "chunk_len": 8}
    model = converted("landmark", options=options)
    model(tokens(1, 400), use_cache=True)
    assert model.model.__dict__["_lctx_rope"].shape[1] <= 5 * 4 + 8 + 2


def test_changing_frequencies_are_refused_with_retrieval():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = converted("landmark", options={"block_size": 5, "top_k": 2}, rope_parameters=rope)
    with pytest.raises(NotImplementedError, match=r"rotary embedding 'dynamic'"):
        model(tokens(1, 30), use_cache=True)
    model(tokens(1, 30))


@pytest.mark.parametrize("method", ["infini", "landmark"])
def test_what_generate_refuses(method):
    model, ids = converted(method), tokens(1, 9)
    with pytest.raises(NotImplementedError, match=r"cache_implementation is 'static'"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static", **GREEDY)
    with pytest.raises((NotImplementedError, ValueError)):
        base().generate(ids, assistant_model=model, max_new_tokens=4, **GREEDY)
    guessing = [{"prompt_lookup_num_tokens": 2}]
    if method == "infini":  # landmark models have a token more than an assistant would
        guessing.append({"assistant_model": base()})
    for options in guessing:
        with pytest.raises(NotImplementedError, match="assistant_model or prompt_lookup"):
            model.generate(ids, max_new_tokens=4, **options, **GREEDY)


def test_a_cache_is_made_only_when_asked_for():
    model, ids = converted("infini"), tokens(1, 9)
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 9


def test_dilated_models_use_all_their_options():
    ids, found = tokens(2, 21), {}
    for head_offset in ("mod", "block"):
        for mix_grad in ("exact", "detached"):
            options = METHODS["dilated"] | {"head_offset": head_offset, "mix_grad": mix_grad}
            model = converted("dilated", options=options)
            logits = model(ids).logits
            logits.square().mean().backward()
            grad = model.model.layers[0].self_attn.q_proj.weight.grad
            found[head_offset, mix_grad] = logits, grad
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert torch.equal(model(out).logits[:, 20:-1].argmax(-1), out[:, 21:])
        close(found[head_offset, "exact"][0], found[head_offset, "detached"][0])
        assert not torch.allclose(found[head_offset, "exact"][1], found[head_offset, "detached"][1])
    assert not torch.allclose(found["mod", "exact"][0], found["block", "exact"][0])
