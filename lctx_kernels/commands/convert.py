"""`lctx convert`: a saved model with another attention."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    Config,
    Layers,
    MethodOptions,
    load_model,
    load_tokenizer,
    method_options,
    naming,
    parse_numbers,
    plain_errors,
)


def apply_method(
    model: Any, method: str | None, pairs: list[str] | None, layers: str | None
) -> Any:
    """The model, converted if a method is given."""
    options = method_options(method, pairs)
    chosen = None if layers is None else parse_numbers(layers, "--layers")
    if method is None:
        if chosen is not None:
            raise typer.BadParameter("expected with --layers", param_hint="--method")
        return model
    from .. import hf

    return hf.convert(model, method, layers=chosen, **options)


def add(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def convert(
        model: Annotated[str, typer.Argument(help="Folder or name of a Hugging Face model.")],
        out: Annotated[Path, typer.Argument(help="Folder to write.")],
        method: Annotated[str, typer.Option(help="infini, landmark or dilated.")],
        options: MethodOptions = None,
        layers: Layers = None,
        config: Config = None,
    ) -> None:
        """Give a saved model infini, landmark or dilated attention."""
        with plain_errors("convert"):
            if out.exists() and any(out.iterdir()):
                raise typer.BadParameter(f"{out} is not empty", param_hint="OUT")
            method_options(method, options)
            with naming("MODEL"):
                loaded = load_model(model)
            converted = apply_method(loaded, method, options, layers)
            converted.save_pretrained(out)
            try:
                tokenizer = load_tokenizer(model)
            except (OSError, ValueError):
                tokenizer = None
            if tokenizer is not None:
                if method == "landmark":
                    _name_landmark(tokenizer, converted.config.lctx["options"]["landmark_id"])
                tokenizer.save_pretrained(out)
            spec = converted.config.lctx
            print(
                f"{type(converted).__name__}: layers {spec['layers']}, {spec['options']} -> {out}"
            )


def _name_landmark(tokenizer: Any, landmark_id: int) -> None:
    """Let the tokenizer carry the landmark where it comes right after its last token."""
    if landmark_id == len(tokenizer):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<landmark>"]})
