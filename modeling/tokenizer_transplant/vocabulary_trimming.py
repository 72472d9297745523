"""A smaller tokenizer that cuts given texts exactly as the large one does: the new tokenizer of a trimming.

`transplant_tokenizer(model, trim_tokenizer(tokenizer, texts))` then copies the rows that are left, and drops the rest.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from tokenizers import Tokenizer

from .token_bytes import Vocabulary

_TEXTS_AT_ONCE = 1_000


def trim_tokenizer(tokenizer: Any, texts: Iterable[str], *, min_count: int = 1) -> Any:
    """A copy of a fast tokenizer without the tokens that the texts do not use.

    Kept are: tokens that occur in the texts, with what their merges need; added and special tokens; single characters
    and bytes, so that what could be encoded still can. Ids close up in their old order. With `min_count=1` the texts
    are cut into the same tokens as before.

    Args:
        tokenizer: with a BPE, WordPiece, WordLevel or Unigram model.
        texts: read once, as a stream.
        min_count: occurrences that a token needs.

    Raises:
        TypeError: no fast tokenizer, or another kind of model.
    """
    vocabulary = Vocabulary(tokenizer)
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = _used_ids(tokenizer, texts, min_count) | vocabulary.added_ids | vocabulary.special_ids | _units(vocabulary)
    model = settings["model"]
    if model["type"] == "BPE":
        kept = _with_parts(kept, model, tokenizer.get_vocab())
    elif model["type"] not in ("WordPiece", "WordLevel", "Unigram"):
        raise TypeError(f"expected a BPE, WordPiece, WordLevel or Unigram model, found {model['type']}")
    if model.get("unk_id") is not None:
        kept.add(model["unk_id"])
    if model.get("unk_token") in tokenizer.get_vocab():
        kept.add(tokenizer.get_vocab()[model["unk_token"]])
    new_ids = {old_id: new_id for new_id, old_id in enumerate(sorted(kept & set(vocabulary.used_ids)))}
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = Tokenizer.from_str(json.dumps(_renumbered(settings, new_ids)))
    return trimmed


def _used_ids(tokenizer: Any, texts: Iterable[str], min_count: int) -> set[int]:
    counts: dict[int, int] = {}
    for batch in _batches(iter(texts)):
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            for token_id in ids:
                counts[token_id] = counts.get(token_id, 0) + 1
    return {token_id for token_id, count in counts.items() if count >= min_count}


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(texts, _TEXTS_AT_ONCE)):
        yield batch


def _units(vocabulary: Vocabulary) -> set[int]:
    """Ids of single characters, with or without a mark, and of bytes."""
    prefix = "##" if vocabulary.scheme == "wordpiece" else ""
    return {
        token_id
        for token_id in vocabulary.used_ids
        if len((vocabulary.tokens[token_id] or "").removeprefix(prefix)) <= 1 or vocabulary.is_byte_token[token_id]
    }


def _merge_parts(merge: str | Sequence[str]) -> tuple[str, str]:
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first, second


def _product(parts: tuple[str, str], model: dict[str, Any]) -> str:
    """The token that a merge makes: the second part loses the mark of a continued word."""
    return parts[0] + parts[1].removeprefix(model.get("continuing_subword_prefix") or "")


def _with_parts(kept: set[int], model: dict[str, Any], ids: dict[str, int]) -> set[int]:
    """The ids, and those of all tokens that are merged on the way to them."""
    ways: dict[int, list[int]] = {}
    for merge in model["merges"]:
        parts = _merge_parts(merge)
        ways.setdefault(ids[_product(parts, model)], []).extend(ids[part] for part in parts)
    kept, open_ids = set(kept), list(kept)
    while open_ids:
        for part in ways.get(open_ids.pop(), ()):
            if part not in kept:
                kept.add(part)
                open_ids.append(part)
    return kept


def _renumbered(settings: dict[str, Any], new_ids: dict[int, int]) -> dict[str, Any]:
    """The serialised tokenizer with the ids that are kept, by their new numbers."""
    model = dict(settings["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [entry for old_id, entry in enumerate(model["vocab"]) if old_id in new_ids]
        model["unk_id"] = None if model["unk_id"] is None else new_ids[model["unk_id"]]
    else:
        model["vocab"] = {token: new_ids[old_id] for token, old_id in model["vocab"].items() if old_id in new_ids}
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if _product(_merge_parts(merge), model) in model["vocab"]]
    added = [{**token, "id": new_ids[token["id"]]} for token in settings["added_tokens"]]
    post_processor = _with_new_ids(settings["post_processor"], new_ids)
    return {**settings, "model": model, "added_tokens": added, "post_processor": post_processor}


def _with_new_ids(component: Any, new_ids: dict[int, int]) -> Any:
    """A serialised post-processor: the lists `ids` of templates, and pairs such as ["[CLS]", 101]."""
    if isinstance(component, dict):
        return {
            key: [new_ids[old_id] for old_id in value]
            if key == "ids"
            else [value[0], new_ids[value[1]]]
            if key in ("cls", "sep")
            else _with_new_ids(value, new_ids)
            for key, value in component.items()
        }
    if isinstance(component, list):
        return [_with_new_ids(member, new_ids) for member in component]
    return component
