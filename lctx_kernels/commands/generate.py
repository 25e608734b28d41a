"""`lctx generate`: text from a saved model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    Config,
    Device,
    Dtype,
    MethodOptions,
    load_for_use,
    naming,
    parse_options,
    plain_errors,
)


def add(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def generate(
        model: Annotated[str, typer.Argument(help="Folder or name of a model.")],
        prompt: Annotated[str | None, typer.Argument(help="Text; '-' reads it from stdin.")] = None,
        prompt_file: Annotated[
            Path | None, typer.Option(help="Text from a file (.gz too).")
        ] = None,
        max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
        temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest.")] = 0.0,
        top_k: Annotated[int, typer.Option(min=0, help="0: no limit.")] = 0,
        top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
        chunk: Annotated[
            int | None, typer.Option(min=1, help="Tokens of the prompt to read at a time.")
        ] = None,
        options: MethodOptions = None,
        seed: int = 0,
        device: Device = "auto",
        dtype: Dtype = "auto",
        config: Config = None,
    ) -> None:
        """Continue a text, token by token as it is made; --set gives options of the cache."""
        with plain_errors("generate"):
            text = _prompt(prompt, prompt_file)
            import torch
            import transformers

            from ..eval.score import encode_prompt

            tokenizer, loaded = load_for_use(model, device, dtype)
            ids = torch.tensor([encode_prompt(tokenizer, text)], device=loaded.device)
            if ids.shape[1] == 0:
                raise typer.BadParameter("no token in it", param_hint="PROMPT")
            arguments = {}
            if options:
                from .. import hf

                with naming("--set"):
                    arguments["past_key_values"] = hf.make_cache(loaded, **parse_options(options))
            if temperature > 0:
                arguments |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
            transformers.set_seed(seed)
            pad = tokenizer.pad_token_id
            loaded.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
                do_sample=temperature > 0, prefill_chunk_size=chunk,
                pad_token_id=tokenizer.eos_token_id if pad is None else pad,
                streamer=transformers.TextStreamer(tokenizer, skip_prompt=True), **arguments,
            )  # fmt: skip


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter(
            "expected exactly one of the two", param_hint="PROMPT, --prompt-file"
        )
    if prompt_file is not None:
        from ..data.text import read_document

        with naming("--prompt-file"):
            return read_document(prompt_file).data.decode("utf-8", "replace")
    assert prompt is not None
    return sys.stdin.read() if prompt == "-" else prompt
