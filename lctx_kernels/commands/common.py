"""What the commands share: errors that name the option, options from YAML, loading a model."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

EXPECTED = (ValueError, TypeError, NotImplementedError, ImportError, OSError)

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with options of this command, such as `seq_len: 4096`; the command line "
        "wins.",
        is_eager=True,
        callback=lambda context, value: read_config(context, value),
    ),
]
Method = Annotated[
    str | None, typer.Option(help="infini, landmark or dilated; default: the model as it is.")
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Option of the method, such as segment_len=1024 or dilation_rates=[1,2]; repeat it "
        "for more.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda.")]
Dtype = Annotated[
    str, typer.Option(help="auto (bfloat16 on a GPU, else as saved), float32, bfloat16, float16.")
]
Layers = Annotated[
    str | None, typer.Option(help="Layers to convert, such as 4,5,-1; default: all that can be.")
]


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a YAML file the defaults of the command.

    Raises:
        typer.BadParameter: No such file, no mapping in it, or a name that is no option.
    """
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path}: expected options as `name: value`")
    known = {parameter.name: parameter for parameter in context.command.params}
    known |= {
        flag.lstrip("-").replace("-", "_"): parameter
        for parameter in context.command.params
        for flag in parameter.opts
    }
    defaults = {}
    for name, value in values.items():
        parameter = known.get(str(name).replace("-", "_"))
        if parameter is None or parameter.name in ("config", "help"):
            raise typer.BadParameter(
                f"{path}: {name} is no option; expected some of "
                f"{', '.join(sorted(p.name for p in context.command.params if p.name))}"
            )
        if isinstance(value, dict):
            value = [f"{key}={json.dumps(item)}" for key, item in value.items()]
        defaults[str(parameter.name)] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """["segment_len=4", "update=delta"] as {"segment_len": 4, "update": "delta"}.

    Raises:
        typer.BadParameter: An entry without "=".
    """
    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(
                f"{pair!r}; expected name=value, such as segment_len=1024", param_hint="--set"
            )
        constants = {"True": True, "False": False, "None": None}
        try:
            options[name] = constants[text] if text in constants else json.loads(text)
        except ValueError:
            options[name] = text
    return options


def parse_numbers(text: str, option: str, kind: Callable[[str], Any] = int) -> list[Any]:
    """ "1,2" as [1, 2].

    Raises:
        typer.BadParameter: Something else, naming the option.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}; expected numbers with commas between, such as 1,2", param_hint=option
        ) from None


@contextmanager
def plain_errors(command: str) -> Iterator[None]:
    """What a user can mend ends the command with one line and status 2."""
    try:
        yield
    except Exception as error:
        from ..data.text import TextError

        if not isinstance(error, (*EXPECTED, TextError)):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"lctx {command}: {' '.join(line.strip() for line in lines)}", file=sys.stderr)
        raise typer.Exit(2) from None


def load_model(path: str, dtype: str = "auto") -> Any:
    """A causal language model of transformers, converted or not, from safetensors alone.

    Raises:
        OSError, ValueError: No model there.
    """
    from .. import hf

    hf.register()
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model's folder."""
    from .. import hf

    hf.register()  # transformers reads the model's configuration too
    import transformers

    return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_for_use(path: str, device: str, dtype: str) -> Any:
    """A model in evaluation mode on a device.

    Args:
        path: Folder or name.
        device: "auto" is a GPU if there is one.
        dtype: "auto" is bfloat16 on a GPU, whose kernels take no fp32, else as saved.

    Raises:
        ValueError: No such device.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto" and device.startswith("cuda"):
        dtype = "bfloat16"
    model = load_model(path, dtype)
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)
