"""What the commands share: errors that name the option, options from YAML, loading a model."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

DTYPES = ("auto", "float32", "bfloat16", "float16")
METHODS = ("infini", "landmark", "dilated")
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
def naming(option: str) -> Iterator[None]:
    """What a user can mend in here is said to be a bad value of this option."""
    from ..data.text import TextError

    try:
        yield
    except (*EXPECTED, TextError) as error:
        message = _one_line(error).removeprefix(f"{option}: ")
        raise typer.BadParameter(message, param_hint=option) from None


@contextmanager
def plain_errors(command: str) -> Iterator[None]:
    """What a user can mend ends the command with one line and status 2."""
    try:
        yield
    except Exception as error:
        from ..data.text import TextError

        if not isinstance(error, (*EXPECTED, TextError)):
            raise
        print(f"lctx {command}: {_one_line(error)}", file=sys.stderr)
        raise typer.Exit(2) from None


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines)


def method_options(method: str | None, pairs: list[str] | None) -> dict[str, Any]:
    """The options of --set for --method, checked before anything is loaded.

    Raises:
        typer.BadParameter: Another method, an option it has not, or a value that does not fit.
    """
    options = parse_options(pairs)
    if method is None:
        if options:
            raise typer.BadParameter("expected with --set", param_hint="--method")
        return options
    if method not in METHODS:
        other = "; ring needs processes of its own: docs/models.md" if method == "ring" else ""
        raise typer.BadParameter(
            f"{method!r}; expected one of {', '.join(METHODS)}{other}", param_hint="--method"
        )
    from ..hf.options import complete

    with naming("--set"):
        complete(method, options, "--set")
    return options


def load_model(path: str, dtype: str = "auto") -> Any:
    """A causal language model of transformers, converted or not, from safetensors alone.

    Raises:
        OSError, ValueError: No model there.
    """
    from .. import hf

    hf.register()
    import transformers

    with _no_model_there(path):
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )


@contextmanager
def _no_model_there(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if Path(path).is_dir():
            raise
        reason = _one_line(error).partition(". ")[0]
        raise OSError(f"no folder {path}; as a name on the Hugging Face hub: {reason}") from None


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model's folder."""
    from .. import hf

    hf.register()  # transformers reads the model's configuration too
    import transformers

    with _no_model_there(path):
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_for_use(path: str, device: str, dtype: str) -> tuple[Any, Any]:
    """A model's tokenizer, and the model in evaluation mode on a device.

    Args:
        path: Folder or name.
        device: "auto" is a GPU if there is one.
        dtype: "auto" is bfloat16 on a GPU, whose kernels take no fp32, else as saved.

    Raises:
        typer.BadParameter: No model there, no such device or type of numbers.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype not in DTYPES:
        raise typer.BadParameter(
            f"{dtype!r}; expected one of {', '.join(DTYPES)}", param_hint="--dtype"
        )
    if dtype == "auto" and device.startswith("cuda"):
        dtype = "bfloat16"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(_one_line(error), param_hint="--device") from None
    with naming("MODEL"):
        return load_tokenizer(path), load_model(path, dtype).to(device).eval()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)
