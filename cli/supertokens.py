"""`rarezoo supertokens`: a tokenizer whose tokens may span words, trained on texts."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from rarezoo.cli.checkpoints import check_new_folder
from rarezoo.cli.options import JsonOption
from rarezoo.cli.output import print_json, print_table

_HELD_OUT = 10  # every tenth text
_OURS, _WORDS = "supertokens", "BPE cut at words"


def supertokens(
    texts: Annotated[
        Path,
        typer.Argument(metavar="TEXTS", help=".txt file, a text a line, or .jsonl with the field text (also .gz)."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Entries, special tokens and bytes included. By default 128000.")
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(metavar="YAML", help="Settings file of SuperTokenizer; --vocab-size goes before what it says."),
    ] = None,
    max_chunks: Annotated[
        int | None, typer.Option(min=1, help="Learn from a random sample of so many chunks, to bound the memory.")
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts to compare on. By default every tenth of TEXTS, which is left out."),
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="Compare with a byte pair encoding of the same size that is cut at words.")
    ] = True,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the comparison: .png, .svg, .pdf.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the chunks.")] = 0,
    json: JsonOption = False,
) -> None:
    """Train a tokenizer whose tokens may span words.

    The texts are cut at random lengths instead of at spaces while it learns; afterwards nothing is random, and every
    text comes back as it was. The folder opens with AutoTokenizer, and `rarezoo transplant` gives it to a model.
    """
    _check_arguments(texts, output, settings, held_out, compare, picture)
    from rarezoo.conversion.engine import staged_folder
    from rarezoo.tokenizer_transplant import (
        compare_tokenizers,
        draw_comparison,
        read_supertoken_settings,
        train_supertokens,
        train_word_tokens,
    )
    from rarezoo.training import read_texts

    # The trainer's bar goes to standard output, where the answer is.
    show_progress = sys.stdout.isatty() and not json
    with _noted_warnings():
        arguments = read_supertoken_settings(settings) if settings else {}
        if vocab_size is not None:
            arguments["vocab_size"] = vocab_size
        learned, unseen = _divided(read_texts(texts), None if held_out is None else read_texts(held_out), compare)
        tokenizer = train_supertokens(
            learned, **arguments, max_chunks=max_chunks, seed=seed, show_progress=show_progress
        )
    figures: dict[str, dict[str, Any]] = {}
    if compare:
        shared = ("vocab_size", "min_frequency", "special_tokens", "model_max_length")
        common = {name: value for name, value in arguments.items() if name in shared}
        common["vocab_size"] = len(tokenizer)
        with _noted_warnings():
            words = train_word_tokens(learned, **common, show_progress=show_progress)
        figures = compare_tokenizers({_OURS: tokenizer, _WORDS: words}, unseen)
    with staged_folder(output) as folder:
        tokenizer.save_pretrained(folder)
        if picture is not None:
            _draw(draw_comparison, figures, picture)
    if json:
        print_json({"folder": str(output), "tokens": len(tokenizer), "texts": len(learned), "comparison": figures})
        return
    typer.echo(f"{output}: {len(tokenizer):,} tokens, learned from {len(learned):,} texts")
    if figures:
        _print_comparison(figures)


def _check_arguments(
    texts: Path, output: Path, settings: Path | None, held_out: Path | None, compare: bool, picture: Path | None
) -> None:
    """What needs no heavy import to be seen, first."""
    for file, what in ((texts, "texts"), (settings, "settings"), (held_out, "texts to compare on")):
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"no file of {what} at {file}")
    check_new_folder(output)
    if not compare and (picture is not None or held_out is not None):
        raise ValueError("--no-compare: there is nothing to draw or to compare on; leave out --picture and --held-out")
    if picture is not None:
        _check_picture(picture)


def _check_picture(picture: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if picture.suffix.removeprefix(".") not in known:
        raise ValueError(f"--picture {picture}: expected a name that ends in one of .{', .'.join(sorted(known))}")
    if not picture.absolute().parent.is_dir():
        raise FileNotFoundError(f"--picture {picture}: there is no folder {picture.absolute().parent}")


def _divided(texts: list[str], held_out: list[str] | None, compare: bool) -> tuple[list[str], list[str]]:
    """Texts to learn from, and texts to compare on."""
    if held_out is not None or not compare:
        return texts, held_out or []
    if len(texts) < _HELD_OUT:
        raise ValueError(
            f"{len(texts)} texts are too few to set some apart: give texts to compare on by --held-out, or --no-compare"
        )
    unseen = texts[_HELD_OUT - 1 :: _HELD_OUT]
    return [text for number, text in enumerate(texts, 1) if number % _HELD_OUT], unseen


def _draw(draw: Any, figures: dict[str, dict[str, Any]], picture: Path) -> None:
    """Beside its place first: an error leaves no half a picture."""
    with tempfile.TemporaryDirectory(prefix=".picture.", dir=picture.absolute().parent) as folder:
        drawn = Path(folder) / picture.name
        draw(figures, drawn)
        os.replace(drawn, picture)


def _print_comparison(figures: dict[str, dict[str, Any]]) -> None:
    rows = [
        (
            name,
            f"{found['vocabulary_size']:,}",
            f"{found['tokens']:,}",
            f"{found['bytes_per_token']:.2f}",
            f"{found['tokens_per_word']:.2f}" if found["tokens_per_word"] else "",
            f"{found['multi_word_share']:.1%}",
            f"{found['lossless']:.1%}",
        )
        for name, found in figures.items()
    ]
    ours = figures[_OURS]
    typer.echo(f"compared on {ours['texts']:,} other texts, {ours['bytes']:,} bytes:")
    header = ("", "vocabulary", "tokens", "bytes per token", "tokens per word", "across words", "lossless")
    print_table(header, rows)


@contextmanager
def _noted_warnings() -> Iterator[None]:
    """Warnings as lines for the person who typed the command, without the place in the program."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
        typer.echo(f"note: {message}", err=True)
