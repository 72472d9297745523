"""The files beside the weights with which sentence-transformers describes a sparse encoder.

`modules.json` (Transformer, then SpladePooling), `1_SpladePooling/config.json`, `sentence_bert_config.json` and
`config_sentence_transformers.json`, as sentence-transformers 5 and 6 and the naver/splade-code repositories hold them.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from rarezoo.conversion.checkpoint_files import ConversionError, read_json, write_json

POOLING_FOLDER = "1_SpladePooling"
# sentence-transformers' name of the activation after relu -> ours.
_ACTIVATIONS = {"relu": "log1p_relu", "log1p_relu": "log1p_log1p_relu"}
_UNLIMITED = 10**9
_PIECE = re.compile(r"\{([^{}%!]+)\}")
_TEMPLATE = re.compile(r"((?:\{[^{}%!]+\})*)\{([^{}%!]?[^{}%]*)%%text%%\}((?:\{[^{}%!]+\})*)")
_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
    {
        "idx": 1,
        "name": "1",
        "path": POOLING_FOLDER,
        "type": "sentence_transformers.sparse_encoder.modules.SpladePooling",
    },
]


@dataclass(frozen=True)
class SparseEncoderFiles:
    """What the files say.

    Attributes:
        pooling: "max" or "sum".
        activation: one of the model configuration's names.
        prompts: kind ("query", "document") -> text put before every text of that kind.
        max_length: tokens kept of a text, special tokens included; None when only the tokenizer says so.
    """

    pooling: str
    activation: str
    prompts: dict[str, str] = field(default_factory=dict)
    max_length: int | None = None


def read_sparse_encoder_files(folder: Path) -> SparseEncoderFiles:
    """Read the files; raises `ConversionError` for a pooling or activation that this family does not have."""
    pooling_file = folder / POOLING_FOLDER / "config.json"
    if not pooling_file.exists():
        raise ConversionError(
            f"{folder} has no {POOLING_FOLDER}/config.json; expected a sparse encoder with SpladePooling"
        )
    pooling = read_json(pooling_file)
    strategy = pooling.get("pooling_strategy", "max")
    activation = pooling.get("activation_function", "relu")
    if strategy not in ("max", "sum") or activation not in _ACTIVATIONS:
        raise ConversionError(
            f"{pooling_file}: expected pooling_strategy max or sum and activation_function relu or log1p_relu; found "
            f"{strategy!r} and {activation!r}"
        )
    encoder = _read_optional(folder / "config_sentence_transformers.json")
    prompts = {kind: text for kind, text in (encoder.get("prompts") or {}).items() if kind in ("query", "document")}
    transformer = _read_optional(folder / "sentence_bert_config.json")
    return SparseEncoderFiles(strategy, _ACTIVATIONS[activation], prompts, transformer.get("max_seq_length"))


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def sparse_encoder_options(files: SparseEncoderFiles, tokenizer: Any) -> dict[str, Any]:
    """Options of the family's processor that reproduce sentence-transformers' tokenization of single texts.

    There prompt and text are one string, the tokenizer adds its own special tokens, and all positions are pooled.
    """
    before, after = _special_tokens(tokenizer)
    options: dict[str, Any] = {}
    for kind in ("query", "document"):
        prompt = files.prompts.get(kind) or ""
        if any(mark in prompt for mark in ("{", "}", "%%")) or prompt.startswith("!"):
            raise ConversionError(
                f"the {kind} prompt {prompt!r} holds a character of the template grammar; give {kind}_template yourself"
            )
        options[f"{kind}_template"] = f"{_piece(before)}{{{prompt}%%text%%}}{_piece(after)}"
        limit = files.max_length or tokenizer.model_max_length
        if limit < _UNLIMITED:
            options[f"max_{kind}_length"] = limit - len(before) - len(after)
    return options


def _piece(tokens: list[str]) -> str:
    return "".join(f"{{{token}}}" for token in tokens)


def _special_tokens(tokenizer: Any) -> tuple[list[str], list[str]]:
    """Tokens that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            tokens = tokenizer.convert_ids_to_tokens(whole)
            return tokens[:start], tokens[start + len(bare) :]
    raise ConversionError(f"the tokenizer changes a text when it adds special tokens: {bare} became {whole}")


def check_sparse_encoder(config: Any, processor: Any) -> None:
    """Raise `ConversionError` where sentence-transformers' own modules cannot express the model and its inputs: echo or
    repeat mode, other poolings, templates with anything but special tokens and a prompt around the text."""
    problems = []
    if config.attention_mode not in ("plain", "bidirectional"):
        problems.append(f"attention_mode {config.attention_mode!r} (expected plain or bidirectional)")
    if config.pooling not in ("max", "sum"):
        problems.append(f"pooling {config.pooling!r} (expected max or sum)")
    if config.logit_shift or config.excluded_token_ids:
        problems.append("logit_shift and excluded_token_ids (expected neither)")
    query, document = _TEMPLATE.fullmatch(processor.query_template), _TEMPLATE.fullmatch(processor.document_template)
    if query is None or document is None or query.group(1, 3) != document.group(1, 3):
        problems.append(
            f"the templates {processor.query_template!r} and {processor.document_template!r} (expected pooled special "
            "tokens, then a prompt and the text, then pooled special tokens, the same ones for both)"
        )
    if problems:
        raise ConversionError(
            f"sentence-transformers' SpladePooling cannot express {'; '.join(problems)}; keep the rarezoo layout"
        )


def write_sparse_encoder_files(folder: Path, config: Any, processor: Any) -> tuple[str, ...]:
    """Write the files for a model and processor that `check_sparse_encoder` accepts.

    The tokenizer in `folder` is written again, so that it adds the special tokens of the templates by itself.

    Returns:
        Notes on what differs from this family's own encoding.
    """
    before, query_prompt, after = _parse_template(processor.query_template)
    _, document_prompt, _ = _parse_template(processor.document_template)
    limit = max(processor.max_query_length, processor.max_document_length) + len(before) + len(after)
    _write_tokenizer(folder, processor, before, after, limit)
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    pooling = {"pooling_strategy": config.pooling, "activation_function": activations[config.activation]}
    (folder / POOLING_FOLDER).mkdir()
    write_json(folder / POOLING_FOLDER / "config.json", {**pooling, "embedding_dimension": config.vocab_size})
    write_json(folder / "sentence_bert_config.json", {"transformer_task": "fill-mask", "max_seq_length": limit})
    prompts = {"query": query_prompt, "document": document_prompt}
    encoder = {"model_type": "SparseEncoder", "prompts": prompts, "default_prompt_name": None}
    write_json(folder / "config_sentence_transformers.json", {**encoder, "similarity_fn_name": "dot"})
    write_json(folder / "modules.json", _MODULES)
    if processor.max_query_length == processor.max_document_length:
        return ()
    return (f"sentence-transformers has one maximum length: {limit} tokens for queries and documents",)


def without_prompts(processor: Any) -> Any:
    """A copy of a processor that `check_sparse_encoder` accepts, for a folder whose prompts sentence-transformers puts
    before the text: queries and documents are read alike."""
    bare = copy.copy(processor)
    before, _, after = _parse_template(processor.document_template)
    template = "".join(f"{{{token}}}" for token in before) + "{%%text%%}" + "".join(f"{{{token}}}" for token in after)
    bare.query_template = bare.document_template = template
    bare.max_query_length = bare.max_document_length = max(processor.max_query_length, processor.max_document_length)
    return bare


def _parse_template(template: str) -> tuple[list[str], str, list[str]]:
    """Special tokens before, prompt, special tokens after."""
    match = _TEMPLATE.fullmatch(template)
    if match is None:
        raise ConversionError(f"expected special tokens, a prompt and the text, all pooled; found {template!r}")
    return _PIECE.findall(match[1]), match[2], _PIECE.findall(match[3])


def _write_tokenizer(folder: Path, processor: Any, before: list[str], after: list[str], limit: int) -> None:
    tokenizer = copy.deepcopy(processor.tokenizer)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {*before, *after}]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=special
    )
    tokenizer.model_max_length = limit
    tokenizer.save_pretrained(folder)
    probe = "a text, to compare"
    found = AutoTokenizer.from_pretrained(folder, local_files_only=True)(probe)["input_ids"]
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    expected = [*map(dict(special).get, before), *bare, *map(dict(special).get, after)]
    if found != expected:
        raise ConversionError(f"the tokenizer gives {found} for {probe!r} after saving; the templates give {expected}")
