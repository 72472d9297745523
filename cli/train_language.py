"""`rarezoo train-language`: a checkpoint that reads one more language."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rarezoo.cli.checkpoints import check_found, check_new_folder, check_source, load_config, load_retriever
from rarezoo.cli.options import JsonOption, ModelArgument
from rarezoo.cli.output import print_json


def train_language(
    model: ModelArgument,
    code: Annotated[str, typer.Argument(metavar="CODE", help="Of the new language, of the form xx_YY, as eu_ES.")],
    texts: Annotated[
        Path,
        typer.Argument(metavar="TEXTS", help=".txt file, a text a line, or .jsonl with the field text (also .gz)."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New folder.")],
    init_from: Annotated[
        str | None,
        typer.Option(metavar="LANGUAGE", help="Related language whose adapter to begin with. By default at random."),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(help="X-MOD language model whose head predicts, as facebook/xmod-base. By default no head."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Pieces of text per step.")] = 32,
    max_length: Annotated[int, typer.Option(min=3, help="Tokens of a piece.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 1e-4,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of order, masks and random adapters.")] = 0,
    json: JsonOption = False,
) -> None:
    """Teach a multilingual checkpoint a new language.

    The new adapter is trained by masked language modelling on raw text. All other weights stay as they are, bit for
    bit, and so do the vectors of all other languages.
    """
    _check_arguments(model, code, texts, output, language_model)
    _check_languages(model, code, init_from)
    from transformers import set_seed

    from rarezoo.conversion.engine import staged_folder
    from rarezoo.training import read_texts
    from rarezoo.training import train_language as train_adapter

    raw = read_texts(texts)
    _, config = load_config(model)
    # Small steps vanish in 16 bits; the other weights are the same again when they go back.
    network, processor = load_retriever(model, dtype="float32")
    set_seed(seed)
    network.add_language(code, init_from=init_from)
    report = train_adapter(
        network,
        code,
        raw,
        processor,
        language_model=language_model,
        steps=steps,
        batch_size=batch_size,
        max_length=max_length,
        learning_rate=learning_rate,
        bf16=bf16,
        seed=seed,
    )
    if int(os.environ.get("RANK", "0")):  # of several processes one writes and answers
        return
    with staged_folder(output) as folder:
        network.to(config.dtype or network.dtype).save_pretrained(folder)
        processor.save_pretrained(folder)
    if json:
        print_json(
            {"folder": str(output), "language": code, "texts": len(raw), **report, "steps": int(report["steps"])}
        )
        return
    typer.echo(
        f"{output}: {code} added, {report['steps']:,.0f} steps on {len(raw):,} texts, loss {report['first_loss']:.3f} "
        f"at first and {report['last_loss']:.3f} at last"
    )


def _check_arguments(model: str, code: str, texts: Path, output: Path, language_model: str | None) -> None:
    """What needs no heavy import to be seen, first."""
    from rarezoo.colbert_xm.language_codes import check_new_code

    check_source(model)
    check_new_code(code, ())
    if not texts.is_file():
        raise FileNotFoundError(f"no file of texts at {texts}")
    if language_model is not None:
        check_found(language_model)
    check_new_folder(output)


def _check_languages(model: str, code: str, init_from: str | None) -> None:
    """What the configuration tells, before the weights are read."""
    from rarezoo.colbert_xm.language_codes import check_new_code

    config: Any
    family, config = load_config(model)
    if not hasattr(config, "languages"):
        raise ValueError(f"{model} is a {family.title}, which has no language adapters")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{model} is quantized: add the language to the full checkpoint, then quantize that")
    check_new_code(code, config.languages)
    config.language_id(init_from)
