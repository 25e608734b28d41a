"""The `lctx` commands that work on models. Imported by the command line alone: they need typer."""
