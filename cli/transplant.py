"""`rarezoo transplant`: a checkpoint with another tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rarezoo.cli.auxiliary import open_auxiliary
from rarezoo.cli.checkpoints import check_found, check_new_folder, check_source, read_config
from rarezoo.cli.convert import read_assignments
from rarezoo.cli.options import JsonOption
from rarezoo.cli.output import print_json

# What -k and -w are called by the methods; for the others they are k and weight.
_COUNT_NAMES = {"tokenadapt": "top_k", "clp": "top_k", "wechsel": "neighbors", "ofa": "neighbors"}
_WEIGHT_NAMES = {"common_interpolation": "weight_scheme"}
_DONOR_METHODS = ("omp", "common_interpolation", "landmark_pca", "stb", "mp_rope")
_AUXILIARY_METHODS = ("tokenadapt", "focus", "wechsel", "ofa")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def transplant(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Model to change: checkpoint folder, or Hub repository OWNER/NAME.")
    ],
    tokenizer: Annotated[
        str,
        typer.Argument(
            metavar="TOKENIZER",
            help="The new tokenizer: folder or Hub repository; or a .txt file of tokens, one a line, that the base's "
            "own tokenizer gets in addition.",
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder.")],
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "--approximation-method",
            "-a",
            help="How new rows are made: tokenadapt, retok, fvt, subword, mapping; omp, common_interpolation, "
            "landmark_pca, stb, mp_rope (these need a donor); focus, wechsel, ofa, clp; mean, zero, randn, normal, "
            "john_hewitt, mean_resizing. By default tokenadapt, or mapping with --mapping.",
        ),
    ] = None,
    donor: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Model that uses the new tokenizer. By default TOKENIZER, where a method needs one."
        ),
    ] = None,
    auxiliary: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Vectors of token texts (tokenadapt, focus, wechsel, ofa, clp): folder or Hub repository of an "
            "encoder; NAME.safetensors with its strings in NAME.json; word vectors .bin (fastText), .vec or .kv.",
        ),
    ] = None,
    auxiliary_cache: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep an encoder's vectors there, for the next run.")
    ] = None,
    mapping: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Rows by hand: JSON {new: [[old, weight], …]}, or TSV new, old, count."),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            help="Which tokens are the same: bytes, raw, normalized, canonical, canonical_fuzzy or special. By "
            "default bytes, or the rule of --compatibility."
        ),
    ] = None,
    compatibility: Annotated[
        str | None,
        typer.Option(
            metavar="PEER",
            help="Give the rows of tokenadapt, mergekit, focus or wechsel, with their matching and defects.",
        ),
    ] = None,
    special: Annotated[
        list[str] | None,
        typer.Option(metavar="OLD=NEW", help="The new token NEW takes the row of the base's OLD. May be repeated."),
    ] = None,
    fallback: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD",
            help="For rows that the method leaves open; may be repeated. By default retok, then mean; with "
            "--compatibility what the peer does.",
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "-k",
            "--k",
            "--top-k",
            help="Base rows in a new one: k of methods with a donor, top_k of tokenadapt and clp, neighbors of "
            "wechsel and ofa.",
        ),
    ] = None,
    weight: Annotated[
        str | None,
        typer.Option(
            "-w",
            "--weight",
            "--weight-scheme",
            metavar="NUMBER|SCHEME",
            help="Of tokenadapt, the share of the global row, 0 to 1; of common_interpolation, distance_proportional, "
            "barycentric or least_squares.",
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", "-temp", help="Of the softmax.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Of tokenadapt: smallest cosine in a global row.")] = None,
    cosine_similarity: Annotated[
        bool | None,
        typer.Option(
            "--cosine-similarity/--no-cosine-similarity",
            "-c/-nc",
            help="Of common_interpolation: nearest by cosine, not by distance.",
        ),
    ] = None,
    subword_method: Annotated[
        str | None,
        typer.Option("--subword-method", "-s", help="Of subword: mean, sum, weighted_mean or first_last."),
    ] = None,
    prefix_match: Annotated[
        str | None,
        typer.Option(
            "--prefix-match",
            "-pm",
            help="Copy the row of a token's longest prefix: yes, no, embed (input table only) or lm_head.",
        ),
    ] = None,
    byte_match: Annotated[
        str | None,
        typer.Option("--byte-match", "-bm", help="Copy the row of the same single byte: yes, no, embed or lm_head."),
    ] = None,
    magikarp: Annotated[
        bool | None,
        typer.Option("--magikarp/--no-magikarp", help="Neither copy nor use rows that are hardly trained."),
    ] = None,
    new_vocab_noise: Annotated[
        float | None, typer.Option("--new-vocab-noise", "-nvn", min=0, help="Standard deviation of noise on new rows.")
    ] = None,
    new_vocab_scale: Annotated[
        float | None, typer.Option("--new-vocab-scale", "-nvs", help="Factor of new rows.")
    ] = None,
    pad_to_multiple_of: Annotated[
        int, typer.Option("--pad-to-multiple-of", "-pad", min=1, help="The number of rows is a multiple of it.")
    ] = 1,
    rescale: Annotated[str, typer.Option(help="none, or mean_norm: new rows get the base's mean norm.")] = "none",
    seed: Annotated[int, typer.Option(min=0, help="Of all draws.")] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Another option of the method; VALUE is JSON or a plain word."),
    ] = None,
    stored: Annotated[
        bool,
        typer.Option(
            "--stored", help="Store only the base's name and the matrix of the rows: opened with `rarezoo` or its code."
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run the code that the base, a donor, a tokenizer or an encoder brings."
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Give a model another tokenizer.

    Rows of tokens that both have are copied; a method makes the others. The result is a plain model of the same
    architecture, with transplant_report.json beside it. Of a base in safetensors only the tables are rewritten, shard
    by shard; the model is built for --stored and for older weight files alone. Nothing is uploaded.
    """
    method = method or ("mapping" if mapping else "tokenadapt")
    given = {
        _COUNT_NAMES.get(method, "k"): count,
        _WEIGHT_NAMES.get(method, "weight"): _number_or_word(weight),
        "temperature": temperature,
        "threshold": threshold,
        "cosine_similarity": cosine_similarity,
        "combination": subword_method,
        "mapping": mapping,
        "prefix_match": prefix_match,
        "byte_match": byte_match,
        "magikarp": magikarp,
        "new_vocab_noise": new_vocab_noise,
        "new_vocab_scale": new_vocab_scale,
    }
    options = _with_assignments({name: value for name, value in given.items() if value is not None}, option or [])
    _check_paths(base, tokenizer, output, donor, mapping)
    donor = donor or (tokenizer if method in _DONOR_METHODS or magikarp else None)
    _check_needs(method, donor, tokenizer, auxiliary)
    _check_holds_weights(base)
    if method == "mp_rope":
        options = {**_rotary_options(base, str(donor), trust_remote_code), **options}
    vectors = open_auxiliary(auxiliary, auxiliary_cache, compatibility, trust_remote_code) if auxiliary else None
    settings: dict[str, Any] = {
        "method": method,
        "donor": donor,
        "auxiliary": vectors,
        "match": match,
        "compatibility": compatibility,
        "special_map": _special_map(special or []),
        "fallback": fallback,
        "pad_to_multiple_of": pad_to_multiple_of,
        "rescale": rescale,
        "seed": seed,
        **options,
    }
    new_tokenizer = _read_tokens(Path(tokenizer)) if tokenizer.endswith(".txt") else tokenizer
    settings["trust_remote_code"] = trust_remote_code
    report = (_write_stored if stored else _write_plain)(base, new_tokenizer, output, settings)
    if json:
        print_json({"folder": str(output), **report.provenance, "notes": report.notes})
    else:
        typer.echo(f"{output}: {_summary(report)}")


# --- the command line -------------------------------------------------------------------------------------------------


def _number_or_word(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _with_assignments(options: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """The options that have a flag, and those of --option."""
    others = read_assignments("--option", texts)
    twice = sorted(set(options) & set(others))
    if twice:
        raise ValueError(f"--option {twice[0]}: it is given by its own flag already")
    arguments = ("donor", "auxiliary", "match", "compatibility", "fallback", "rescale", "pad_to_multiple_of", "seed")
    for name in (*arguments, "special_map", "base_tokenizer", "trust_remote_code", "dtype"):
        if name in others:
            raise ValueError(f"--option {name}: it is no option of a method, see `rarezoo transplant --help`")
    return {**options, **others}


def _special_map(texts: list[str]) -> dict[str, str]:
    """{new token: base token}."""
    pairs = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not (old and equals and new):
            raise ValueError(f"--special must be OLD=NEW; found {text!r}")
        pairs[new] = old
    return pairs


def _read_tokens(path: Path) -> list[str]:
    tokens = list(dict.fromkeys(line for line in path.read_text(encoding="utf-8").split("\n") if line))
    if not tokens:
        raise ValueError(f"{path} holds no tokens; expected one a line")
    return tokens


def _check_paths(base: str, tokenizer: str, output: Path, donor: str | None, mapping: Path | None) -> None:
    """What needs no heavy import to be seen, first."""
    if (Path(base) / "adapter_config.json").is_file():
        raise ValueError(f"{base} holds an adapter: merge it into its base first (PEFT's merge_and_unload)")
    check_source(base)
    if tokenizer.endswith(".txt") and not Path(tokenizer).is_file():
        raise FileNotFoundError(f"no file of tokens at {tokenizer}")
    check_found(tokenizer)
    if donor is not None:
        check_source(donor)
    if mapping is not None and not mapping.is_file():
        raise FileNotFoundError(f"no mapping at {mapping}")
    check_new_folder(output)


def _check_holds_weights(base: str) -> None:
    if read_config(base).get("model_type") == "transplanted":
        raise ValueError(
            f"{base} stores the matrix of a transplantation: write the plain model first, by `rarezoo convert "
            f"tokenizer_transplant {base} PLAIN --to official`"
        )


def _check_needs(method: str, donor: str | None, tokenizer: str, auxiliary: str | None) -> None:
    if method in _AUXILIARY_METHODS and auxiliary is None:
        raise ValueError(
            f"--method {method} compares token texts: give --auxiliary (an encoder, or vectors), or a --method that "
            "needs none, such as retok"
        )
    if donor == tokenizer and Path(tokenizer).exists() and not (Path(tokenizer) / "config.json").is_file():
        raise ValueError(
            f"--method {method} needs a model that uses the new tokenizer, and {tokenizer} holds none: give --donor"
        )


def _rotary_options(base: str, donor: str, trust_remote_code: bool) -> dict[str, Any]:
    """What mp_rope must know of both models' attention."""
    from transformers import AutoConfig

    options: dict[str, Any] = {}
    for side, model in (("base", base), ("donor", donor)):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config()
        if not getattr(config, "rope_parameters", None):
            raise ValueError(f"--method mp_rope turns rows by rotary positions, which {model} does not have")
        options[f"{side}_heads"] = config.num_attention_heads
        options[f"{side}_rope_theta"] = config.rope_parameters["rope_theta"]
    return options


# --- the result -------------------------------------------------------------------------------------------------------


def _write_plain(base: str, tokenizer: str | list[str], output: Path, settings: dict[str, Any]) -> Any:
    """Write a plain checkpoint; returns its report."""
    from rarezoo.tokenizer_transplant import transplant_checkpoint, transplant_tokenizer

    if _has_safetensors(base):
        return transplant_checkpoint(base, tokenizer, output, **settings)
    result = transplant_tokenizer(base, tokenizer, **settings)
    result.save_pretrained(output)
    return result.report


def _has_safetensors(model: str) -> bool:
    from transformers.utils import cached_file

    return any(cached_file(model, name, _raise_exceptions_for_missing_entries=False) for name in _WEIGHTS)


def _write_stored(base: str, tokenizer: str | list[str], output: Path, settings: dict[str, Any]) -> Any:
    """Write a checkpoint of the family's own class; returns its report."""
    from transformers import AutoTokenizer

    from rarezoo.conversion.engine import staged_folder
    from rarezoo.tokenizer_transplant import transplant_tokenizer
    from rarezoo.tokenizer_transplant.transplant_report import REPORT_NAME

    if not _has_safetensors(base):
        raise FileNotFoundError(f"{base} holds no {_WEIGHTS[0]}, by which --stored knows its base: save it as that")
    _check_opens_without_its_code(base)
    result = transplant_tokenizer(base, tokenizer, **settings)
    stored_class = _stored_class(type(result.model).__name__)
    matrix, report, new_tokenizer = result.matrix, result.report, result.tokenizer
    del result  # the model: its class loads the base anew
    model = stored_class.from_base(
        base, matrix, new_tokenizer, AutoTokenizer.from_pretrained(base), provenance=report.provenance
    )
    if Path(base).is_dir():
        # Where it is from the new folder: both can move together.
        model.config.base_model_name_or_path = os.path.relpath(base, output)
    with staged_folder(output) as folder:
        model.save_pretrained(folder)
        new_tokenizer.save_pretrained(folder)
        report.save(folder / REPORT_NAME)
    return report


def _check_opens_without_its_code(base: str) -> None:
    """Trust in a stored checkpoint's code is not passed on to its base."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = read_config(base)
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"{base} brings its own code, which readers of a stored checkpoint do not run: leave out --stored"
        )


def _stored_class(name: str) -> Any:
    """The class of the family for a base's class."""
    from transformers.models.auto import modeling_auto

    from rarezoo import tokenizer_transplant

    for kind, mapping in (
        ("ForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("ForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ("Model", modeling_auto.MODEL_MAPPING_NAMES),
    ):
        if name in mapping.values():
            return getattr(tokenizer_transplant, f"Transplanted{kind}")
    raise ValueError(
        f"--stored knows causal and masked language models and models without a head; the base is a {name}: leave out "
        "--stored"
    )


def _summary(report: Any) -> str:
    provenance = report.provenance
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in provenance["counts"].items())
    made = ", ".join(f"{name} {count:,}" for name, count in report.notes["rows by method"].items() if count)
    return f"{provenance['tokens']:,} tokens in {provenance['rows']:,} rows: {kinds}{f' ({made})' if made else ''}"
