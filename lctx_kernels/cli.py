"""The `lctx` command: info, demo, bench, and train, generate, eval, samples, convert for models.

Needs typer (`pip install 'lctx_kernels[cli]'`), the last five also 'lctx_kernels[train]'.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    import typer

WITHOUT_TYPER = """lctx needs typer: pip install 'lctx_kernels[cli]'
Without it: python -m lctx_kernels.info"""
WITHOUT_CHECKOUT = """lctx bench needs the repository: bench/ is not part of the package.
Run it from the root of a checkout, or there: python -m bench.run"""


def main() -> None:
    """Entry point of the `lctx` command."""
    try:
        app = build_app()
    except ImportError as error:
        if error.name != "typer":
            raise
        sys.exit(WITHOUT_TYPER)
    app()


def build_app() -> "typer.Typer":
    """The command line as a typer application. Raises ImportError without typer."""
    import typer

    app = typer.Typer(
        name="lctx", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
        help="Attention over very long contexts: Infini, Landmark, LongNet dilated, Ring.",
    )  # fmt: skip

    @app.command()
    def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
        """Show versions, what was built and what not and why, and which operations can run here."""
        from . import info as module

        raise typer.Exit(module.main(["--json"] if as_json else []))

    @app.command()
    def demo(
        text: Annotated[
            Path | None,
            typer.Option(help="A text of your own (.gz too); default: the longest installed one."),
        ] = None,
        out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path(
            "lctx-demo"
        ),
        quick: Annotated[
            bool, typer.Option("--quick", help="Short lengths, a few seconds.")
        ] = False,
        backend: Annotated[str, typer.Option(help="auto, cpu or reference.")] = "auto",
    ) -> None:
        """Run the methods on a real document: checked, and timed against SDPA."""
        from . import demo as module

        raise typer.Exit(module.main(text, out, quick, backend))

    settings = {"allow_extra_args": True, "ignore_unknown_options": True}

    @app.command(context_settings=settings, add_help_option=False)
    def bench(context: typer.Context) -> None:
        """Benchmark against PyTorch's attention, from a checkout of the repository."""
        load_bench().main(context.args)

    from .commands import convert, evaluate, generate, samples, train

    for command in (train, generate, evaluate, samples, convert):
        command.add(app)
    return app


def load_bench() -> Any:
    """The module bench.run of the working directory's checkout, else of the one around this file.

    Exits with a message where there is none.
    """
    import importlib

    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (root / "bench" / "run.py").is_file() and (root / "lctx_kernels").is_dir():
            sys.path.insert(0, str(root))
            return importlib.import_module("bench.run")
    sys.exit(WITHOUT_CHECKOUT)


if __name__ == "__main__":
    main()
