"""`lctx train`: a model from scratch or from a checkpoint, on the text at hand."""

import json
import shutil
import sys
import zipfile
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    Config,
    Layers,
    Method,
    MethodOptions,
    load_model,
    load_tokenizer,
    method_options,
    naming,
    plain_errors,
    write_json,
)
from .convert import apply_method

RECORD = "run.json"
SIZES = {
    "tiny": (64, 2, 4, 2), "10m": (256, 6, 4, 2), "30m": (512, 8, 8, 4), "100m": (768, 12, 12, 4),
}  # fmt: skip
"""Name -> hidden size, layers, query heads, key/value heads of a Llama from scratch."""


@dataclass
class Settings:
    """What a run is made of; two runs with equal settings take the same steps."""

    model: str
    method: str | None
    options: list[str]
    layers: str | None
    text: str | None
    vocab_size: int
    seq_len: int
    steps: int
    batch: int
    accumulate: int
    lr: float
    gate_lr: float | None
    weight_decay: float
    warmup: int
    segmentwise: bool
    checkpointing: bool
    bf16: bool
    lora: int
    seed: int
    held_out: float
    device: str


def add(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def train(
        context: typer.Context,
        out: Annotated[Path, typer.Argument(help="Folder for checkpoints, logs and the model.")],
        model: Annotated[
            str,
            typer.Option(help=f"Folder or name of a model, or a new Llama: {', '.join(SIZES)}."),
        ] = "tiny",
        method: Method = None,
        options: MethodOptions = None,
        layers: Layers = None,
        text: Annotated[
            Path | None, typer.Option(help="File, folder or JSONL; default: an installed text.")
        ] = None,
        vocab_size: Annotated[int, typer.Option(min=259, help="Of a new model.")] = 4096,
        seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 1024,
        steps: Annotated[int, typer.Option(min=1)] = 1000,
        batch: Annotated[int, typer.Option(min=1, help="Rows per forward.")] = 4,
        accumulate: Annotated[int, typer.Option(min=1, help="Forwards per step.")] = 1,
        lr: Annotated[float, typer.Option(min=0)] = 3e-4,
        gate_lr: Annotated[
            float | None, typer.Option(min=0, help="Of infini's gates; default: 0.01.")
        ] = None,
        weight_decay: Annotated[float, typer.Option(min=0)] = 0.1,
        warmup: Annotated[int, typer.Option(min=0, help="Steps; then a cosine to 0.")] = 20,
        segmentwise: Annotated[
            bool, typer.Option(help="Infini: one backward per segment, memory carried along.")
        ] = False,
        checkpointing: Annotated[bool, typer.Option(help="Recompute activations.")] = False,
        bf16: Annotated[bool, typer.Option(help="Compute in bfloat16.")] = False,
        lora: Annotated[int, typer.Option(min=0, help="Rank; 0 trains all parameters.")] = 0,
        save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
        keep_every: Annotated[
            int, typer.Option(min=0, help="Steps between models kept as milestone-STEP; 0: none.")
        ] = 0,
        eval_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 100,
        held_out: Annotated[float, typer.Option(help="Share of the text to evaluate on.")] = 0.05,
        report: Annotated[str, typer.Option(help="tensorboard, wandb, none, ...")] = "tensorboard",
        resume: Annotated[
            bool,
            typer.Option("--resume", help="Go on where OUT ended, with the options it began with."),
        ] = False,
        seed: int = 0,
        device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
        config: Config = None,
    ) -> None:
        """Train on text; killed at any moment and resumed, the steps are the same."""
        with plain_errors("train"):
            settings = Settings(
                model, method, options or [], layers, None if text is None else str(text),
                vocab_size, seq_len, steps, batch, accumulate, lr, gate_lr, weight_decay, warmup,
                segmentwise, checkpointing, bf16, lora, seed, held_out, device,
            )  # fmt: skip
            sources = {name: context.get_parameter_source(name) for name in context.params}
            given = {name for name, x in sources.items() if x is not None and x.name != "DEFAULT"}
            settings, checkpoint = start_or_resume(settings, given, out, resume)
            often: dict[str, Any] = {
                "save_every": save_every, "keep_every": keep_every, "eval_every": eval_every,
                "report": report,
            }  # fmt: skip
            if resume:
                before = json.loads((out / RECORD).read_text()).get("often", {})
                often |= {name: x for name, x in before.items() if name not in given}
            if often["keep_every"] % often["save_every"]:
                raise typer.BadParameter(
                    f"{often['keep_every']}; expected a multiple of --save-every, "
                    f"{often['save_every']}", param_hint="--keep-every",
                )  # fmt: skip
            try:
                run(settings, out, checkpoint, often)
            except KeyboardInterrupt:
                print(f"\nstopped; go on with: lctx train {out} --resume", file=sys.stderr)
                raise typer.Exit(130) from None


def run(settings: Settings, out: Path, checkpoint: Path | None, often: dict[str, Any]) -> Any:
    """Train and save; returns the trainer.

    Args:
        checkpoint: What to go on from.
        often: save_every, keep_every, eval_every (steps), and report, where the log goes to.
    """
    method_options(settings.method, settings.options)
    if settings.device not in ("auto", "cpu"):
        raise typer.BadParameter(
            f"{settings.device!r}; expected auto or cpu", param_hint="--device"
        )
    import transformers

    from ..data.corpus import digest, read_corpus, split

    transformers.set_seed(settings.seed)
    with naming("--text"):
        documents = read_corpus(settings.text)
    with naming("--held-out"):
        texts, held_out = split(documents, settings.held_out)
    text_sha256 = digest(documents)
    _refuse_another_text(out, text_sha256)
    model, tokenizer = _model(settings, texts)
    trainer = _trainer(settings, out, model, tokenizer, texts, held_out, often)
    record = {"settings": asdict(settings), "often": often, "text_sha256": text_sha256}
    write_json(out / RECORD, record)
    print(
        f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(trainer.train_dataset)} rows of at most {settings.seq_len} tokens from "
        f"{len(texts)} documents" + (f", resumed from {checkpoint.name}" if checkpoint else "")
    )
    if checkpoint is not None and _step(checkpoint) >= settings.steps:
        _copy_model(checkpoint, out)  # all steps are done: transformers would take one more
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_model(str(out))
    tokenizer.save_pretrained(out)
    return trainer


def start_or_resume(
    settings: Settings, given: Collection[str], out: Path, resume: bool
) -> tuple[Settings, Path | None]:
    """The settings of the run, and the checkpoint to go on from; None for a new run.

    Args:
        given: Names of settings that are not defaults: they have to be those of the run's
            beginning, all others are taken from there.

    Raises:
        typer.BadParameter: A folder with another run in it, or nothing to resume.
    """
    record = out / RECORD
    if not record.exists():
        if resume:
            raise typer.BadParameter(f"no run in {out}", param_hint="--resume")
        if out.exists() and any(out.iterdir()):
            raise typer.BadParameter(f"{out} is not empty", param_hint="OUT")
        return settings, None
    if not resume:
        raise typer.BadParameter(f"{out} holds a run; expected --resume to go on", param_hint="OUT")
    before = json.loads(record.read_text())["settings"]
    for name, value in asdict(settings).items():
        if name in given and before.get(name) != value:
            flag = "--set" if name == "options" else "--" + name.replace("_", "-")
            raise typer.BadParameter(
                f"{value!r}; the run in {out} began with {before.get(name)!r}", param_hint=flag
            )
    known = {name: before[name] for name in asdict(settings) if name in before}
    return replace(settings, **known), last_complete_checkpoint(out)


def last_complete_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint of which every file was written to its end, None if there is none."""
    found = sorted(
        (path for path in out.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()),
        key=_step,
    )
    return next((path for path in reversed(found) if _complete(path)), None)


def _copy_model(checkpoint: Path, to: Path) -> None:
    """What a model is loaded from, without the optimiser."""
    to.mkdir(exist_ok=True)
    for file in checkpoint.iterdir():
        if file.suffix in (".safetensors", ".json") and file.name != "trainer_state.json":
            shutil.copy(file, to)


def _milestones(out: Path, every: int, tokenizer: Any) -> Any:
    """A callback that keeps the models of some checkpoints when these are deleted."""
    import transformers

    class Milestones(transformers.TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = state.global_step
            if step % every == 0 and state.is_world_process_zero:
                _copy_model(out / f"checkpoint-{step}", out / f"milestone-{step}")
                tokenizer.save_pretrained(out / f"milestone-{step}")

    return Milestones()


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _complete(path: Path) -> bool:
    from safetensors import safe_open

    try:
        json.loads((path / "trainer_state.json").read_text())
        weights = list(path.glob("*.safetensors"))
        for file in weights:
            with safe_open(file, "pt") as opened:
                opened.keys()
        states = [path / "optimizer.pt", path / "scheduler.pt", *path.glob("rng_state*.pth")]
        return bool(weights) and len(states) > 2 and all(map(zipfile.is_zipfile, states))
    except Exception:  # whatever a half-written file makes its reader raise
        return False


def _refuse_another_text(out: Path, found: str) -> None:
    """Compare the text's digest with that of the run's beginning, if there was one."""
    record = out / RECORD
    if record.exists() and json.loads(record.read_text()).get("text_sha256", found) != found:
        raise typer.BadParameter(
            "another text than that of the run's beginning", param_hint="--text"
        )


def _model(settings: Settings, texts: list[Any]) -> tuple[Any, Any]:
    """The model to train and its tokenizer."""
    if settings.model in SIZES:
        from ..data.tokens import train_tokenizer

        tokenizer = train_tokenizer(texts, settings.vocab_size)
        model = _new_llama(settings, tokenizer)
    else:
        with naming("--model"):
            tokenizer = load_tokenizer(settings.model)
            model = load_model(settings.model, "float32")
    if settings.segmentwise and "infini" not in (
        settings.method, getattr(model.config, "lctx", None) and model.config.lctx["method"],
    ):  # fmt: skip
        raise typer.BadParameter("expected with --method infini", param_hint="--segmentwise")
    model = apply_method(model, settings.method, settings.options, settings.layers)
    if settings.lora:
        model = _with_lora(model, settings.lora)
    return model, tokenizer


def _new_llama(settings: Settings, tokenizer: Any) -> Any:
    import transformers

    width, depth, heads, kv_heads = SIZES[settings.model]
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 8 // 3,
            num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=kv_heads,
            max_position_embeddings=max(2048, settings.seq_len), tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def _with_lora(model: Any, rank: int) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("peft is missing, which --lora needs; try: pip install peft") from error
    gates = [name for name, _ in model.named_modules() if name.endswith("memory_gate")]
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            modules_to_save=["memory_gate"] if gates else None,
        ),
    )  # fmt: skip


def _trainer(
    settings: Settings, out: Path, model: Any, tokenizer: Any, texts: list[Any],
    held_out: list[Any], often: dict[str, Any],
) -> Any:  # fmt: skip
    import torch
    import transformers

    from ..data.tokens import Collator, pack
    from ..hf.training import SegmentTrainer, gated_optimizer

    again: dict[str, Any] = {}
    if settings.checkpointing:
        again["gradient_checkpointing"] = True
        again["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    arguments = transformers.TrainingArguments(
        output_dir=str(out), max_steps=settings.steps, seed=settings.seed,
        per_device_train_batch_size=settings.batch, per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate, learning_rate=settings.lr,
        weight_decay=settings.weight_decay, warmup_steps=settings.warmup,
        lr_scheduler_type="cosine", logging_steps=1, save_steps=often["save_every"],
        save_total_limit=2, eval_strategy="steps", eval_steps=often["eval_every"],
        report_to=[] if often["report"] == "none" else [often["report"]], bf16=settings.bf16,
        use_cpu=settings.device == "cpu", remove_unused_columns=False, prediction_loss_only=True,
        dataloader_pin_memory=settings.device != "cpu" and torch.cuda.is_available(),
        **again,
    )  # fmt: skip
    shared: dict[str, Any] = {
        "model": model, "args": arguments, "data_collator": Collator(tokenizer.pad_token_id or 0),
        "train_dataset": pack(texts, tokenizer, settings.seq_len),
        "eval_dataset": pack(held_out, tokenizer, settings.seq_len),
    }  # fmt: skip
    if often["keep_every"]:
        shared["callbacks"] = [_milestones(out, often["keep_every"], tokenizer)]
    gate_lr = 0.01 if settings.gate_lr is None else settings.gate_lr
    if settings.segmentwise:
        return SegmentTrainer(**shared, gate_lr=gate_lr)
    return transformers.Trainer(
        **shared, optimizers=(gated_optimizer(model, arguments, gate_lr), None)
    )
