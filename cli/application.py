"""The table of verbs, and how errors reach the person who typed the command.

What a person can put right (a missing file, a wrong value, a full disk, a missing extra) ends in one line
on standard error and exit code 2. Anything else is a fault of the program and keeps its traceback.
"""

from __future__ import annotations

import gc
import logging
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rarezoo.cli import (
    card,
    convert,
    encode,
    evaluate,
    explain,
    export,
    families,
    index,
    info,
    push,
    quantize,
    quickstart_command,
    search,
    supertokens,
    train,
    train_language,
    transplant,
)

# typer exports only this subclass of the error that a wrong command line raises.
_UsageError = typer.BadParameter.__mro__[1]

_EXTRAS = {
    "accelerate": "train",
    "bitsandbytes": "quant",
    "bm25s": "retrieval",
    "datasets": "train",
    "ir_measures": "eval",
    "matplotlib": "quickstart",
    "numba": "retrieval",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "peft": "peft",
    "py3langid": "retrieval",
    "sentence_transformers": "retrieval",
    "torchao": "quant",
}

# They report on the machine (no Triton, no CUDA extension) and on every call (a cast to float16), not on the command.
_CHATTY_LOGGERS = ("bitsandbytes", "torchao", "torch.utils._pytree")


# In the order in which a newcomer meets them.
_ORDER = (
    "quickstart",
    "list",
    "info",
    "convert",
    "supertokens",
    "transplant",
    "train",
    "train-language",
    "encode",
    "index",
    "search",
    "explain",
    "eval",
    "quantize",
    "export",
    "card",
    "push",
)


class _Verbs(TyperGroup):
    """The group of all verbs: they end in one line on standard error when the user can put the error right."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in _ORDER if name in self.commands]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            typer.echo(
                "rarezoo: interrupted; run again, `encode` and `eval` go on, and so does `train` with --resume; other "
                "verbs begin anew",
                err=True,
            )
            raise typer.Exit(130) from error
        except Exception as error:
            line = _line(error)
            if line is None or ctx.params.get("debug"):
                raise
            typer.echo(f"rarezoo: {line}", err=True)
            raise typer.Exit(2) from error


def _line(error: Exception) -> str | None:
    """What to tell the user, in one line; None where the error is not the user's to put right."""
    if isinstance(error, _UsageError):
        command = getattr(getattr(error, "ctx", None), "command_path", "rarezoo")
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        stop = "" if message.endswith("?") else "."
        return " ".join(f"{message}{stop} See `{command} --help`.".split())
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get((error.name or "").split(".")[0])):
        return f"this needs {error.name}: pip install 'rarezoo[{extra}]'"
    if isinstance(error, ImportError) and "pip install" not in str(error):
        return None
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    # A KeyError without a sentence is a lookup that failed inside the program.
    expected = " " in message if isinstance(error, KeyError) else isinstance(error, _user_errors())
    return " ".join(message.split()) or type(error).__name__ if expected else None


def _user_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import StrictDataclassError

    # Training raises FloatingPointError where a loss is not finite: a lower learning rate puts that right.
    return ValueError, OSError, ImportError, FloatingPointError, StrictDataclassError


app = typer.Typer(
    cls=_Verbs,
    name="rarezoo",
    help="Models that the mainstream libraries leave out: convert, train, quantize, encode, index, search, explain.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import rarezoo

        typer.echo(f"rarezoo {rarezoo.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if not debug:
        for name in _CHATTY_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)


app.command("list")(families.list_families)
app.command("info")(info.info)
app.command("convert")(convert.convert)
app.command("export")(export.export)
app.command("quantize")(quantize.quantize)
app.command("supertokens")(supertokens.supertokens)
app.command("transplant")(transplant.transplant)
app.command("train")(train.train)
app.command("train-language")(train_language.train_language)
app.command("encode")(encode.encode)
app.add_typer(index.app, name="index")
app.command("search")(search.search)
app.command("explain")(explain.explain)
app.command("eval")(evaluate.evaluate)
app.command("card")(card.card)
app.command("push")(push.push)
app.command("quickstart")(quickstart_command.quickstart)


def main() -> None:
    """Entry point of the console script."""
    # The hundreds of thousands of objects that imports make live to the end: by Python's default they are searched for
    # garbage again and again, a tenth of a short command's time.
    gc.set_threshold(50_000, *gc.get_threshold()[1:])
    app()
