import json

import pytest
import torch
from hf.tiny import base, converted, tokens
from transformers import AutoModelForCausalLM

from lctx_kernels.hf.weight_diff import make_diff, recover


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["landmark", "infini"])
def test_the_tuned_model_comes_back_bit_for_bit(tmp_path, dtype, method):
    base(dtype=dtype).save_pretrained(tmp_path / "base")
    model = converted(method, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "tuned")
    make_diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "diff")
    recover(tmp_path / "base", tmp_path / "diff", tmp_path / "again")
    for file in (tmp_path / "tuned").glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype).eval()
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=dtype).eval()
    assert torch.equal(again(tokens(1, 20)).logits, tuned(tokens(1, 20)).logits)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "diff", dtype=dtype).model.norm.weight
    assert not torch.allclose(kept.float(), model.model.norm.weight.float(), atol=0.1)


def test_another_base_is_noticed(tmp_path):
    base().save_pretrained(tmp_path / "base")
    converted("landmark").save_pretrained(tmp_path / "tuned")
    make_diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "diff")
    other = base()
    torch.nn.init.ones_(other.model.norm.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="are not the tuned ones"):
        recover(tmp_path / "other", tmp_path / "diff", tmp_path / "again")
    base(dtype=torch.float32).save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match=r"expected one dtype, and no more rows in the base"):
        make_diff(tmp_path / "half", tmp_path / "tuned", tmp_path / "diff2")
    with pytest.raises(ValueError, match=r"no \*.safetensors in"):
        make_diff(tmp_path / "nowhere", tmp_path / "tuned", tmp_path / "diff2")
    assert "sha256" in json.loads((tmp_path / "diff" / "weight_diff.json").read_text())
