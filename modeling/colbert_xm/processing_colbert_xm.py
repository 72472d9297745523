"""Text to tensors for ColBERT-XM, as colbert-ai's query and document tokenizers do it: markers, `<mask>` augmentation
of queries, and the punctuation that documents do not keep."""

import string
from collections.abc import Sequence
from functools import cached_property

import torch
from transformers import AutoTokenizer, BatchEncoding, PreTrainedConfig
from transformers.processing_utils import ProcessorMixin

from .colbert_metadata import (
    MARKER_MODES,
    SHORTEST_INPUT,
    is_stanford_layout,
    marker_mode_of,
    processor_settings,
    read_metadata,
    write_metadata,
)

# colbert-ai's cap on queries that are not cut to `query_maxlen` (`full_length_search`).
_LONGEST_FULL_QUERY = 500
# What it leaves to a query and its context together.
_LONGEST_INPUT = 512
_SHORTEST_CONTEXT = 2  # one token and `</s>`


class ColBERTXMProcessor(ProcessorMixin):
    r"""
    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The checkpoint's tokenizer (XLM-R's).
        max_query_length (`int`, defaults to 32):
            Tokens of a query, special tokens and marker included. Shorter ones are filled with `<mask>`, longer ones
            are cut.
        max_document_length (`int`, defaults to 256):
            Largest number of tokens of a document, special tokens and marker included; longer ones are cut.
        query_marker, document_marker (`str`, default to `"[unused0]"` and `"[unused1]"`):
            Tokens that stand behind `<s>`. The defaults, which are colbert-ai's, are not in XLM-R's vocabulary: both
            markers are then `<unk>`, with which the published weights were trained. No token is ever added.
        marker_mode (`str`, defaults to `"insert"`):
            `"insert"` puts the marker behind `<s>` (colbert-ai from 0.2.21 on). `"replace"` tokenizes ". " + text and
            overwrites the second id (colbert-ai up to 0.2.20): with XLM-R's vocabulary a "." stays behind the marker.
        attend_to_mask_tokens (`bool`, defaults to True):
            Whether the encoder attends to the `<mask>`s of queries. They count in the score in any case.
        mask_punctuation (`bool`, defaults to True):
            Drop the vectors of punctuation from documents: of each ASCII punctuation symbol the first id into which the
            tokenizer splits it when it stands alone. With XLM-R's vocabulary that is "▁" for most of them, not the
            symbol; the published weights were trained so.
        skiplist_tokens (`list[str]`, *optional*):
            Tokens whose vectors documents do not keep, instead of those that `mask_punctuation` finds: for checkpoints
            that PyLate trained with a list of its own. Each is one token of the vocabulary; `<unk>` stands for all
            that are none, default markers included.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        tokenizer=None,
        max_query_length: int = 32,
        max_document_length: int = 256,
        query_marker: str = "[unused0]",
        document_marker: str = "[unused1]",
        marker_mode: str = "insert",
        attend_to_mask_tokens: bool = True,
        mask_punctuation: bool = True,
        skiplist_tokens: list[str] | None = None,
        chat_template=None,
    ):
        if marker_mode not in MARKER_MODES:
            raise ValueError(f"marker_mode must be one of {', '.join(MARKER_MODES)}; found {marker_mode!r}")
        for field, value in (("max_query_length", max_query_length), ("max_document_length", max_document_length)):
            if not isinstance(value, int) or value < SHORTEST_INPUT:
                raise ValueError(
                    f"{field} must be at least {SHORTEST_INPUT} (three special tokens and one of text); found {value!r}"
                )
        for field, value in (("query_marker", query_marker), ("document_marker", document_marker)):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{field} must be a token; found {value!r}")
        if isinstance(skiplist_tokens, str) or not all(isinstance(token, str) for token in skiplist_tokens or ()):
            raise ValueError(f"skiplist_tokens must be a list of tokens; found {skiplist_tokens!r}")
        super().__init__(tokenizer, chat_template=chat_template)
        self._check_known(skiplist_tokens or ())
        self.max_query_length = max_query_length
        self.max_document_length = max_document_length
        self.query_marker = query_marker
        self.document_marker = document_marker
        self.marker_mode = marker_mode
        self.attend_to_mask_tokens = attend_to_mask_tokens
        self.mask_punctuation = mask_punctuation
        self.skiplist_tokens = skiplist_tokens

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers; of an official checkpoint the settings come from its `artifact.metadata`.

        Raises:
            OSError: there is no such checkpoint, or no tokenizer in it.
            ValueError: a setting that is not allowed, or metadata that are not JSON.
        """
        # Only an AutoClass heeds the argument; transformers warns of it elsewhere.
        options = {name: value for name, value in kwargs.items() if name != "trust_remote_code"}
        config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **options)
        if not is_stanford_layout(config, pretrained_model_name_or_path, **kwargs):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        metadata = read_metadata(pretrained_model_name_or_path, **kwargs)
        settings = {
            **processor_settings(metadata),
            "marker_mode": marker_mode_of(config, metadata),
            "skiplist_tokens": None,
        }
        settings.update({name: kwargs.pop(name) for name in list(kwargs) if name in settings})
        return cls(AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs), **settings)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in transformers; also writes the settings as colbert-ai names them (`artifact.metadata`). Here they are
        read from `processor_config.json` alone."""
        written = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        write_metadata(save_directory, processor=self)
        return written

    def __call__(self, text: str | Sequence[str], kind: str = "document", **kwargs) -> BatchEncoding:
        """`process_queries` or `process_documents`, by `kind` ("query" or "document"), and with their other arguments;
        those by which generic callers ask for padding, truncation and tensors change nothing.

        Raises:
            TypeError, ValueError: as those do; another `kind`, or `return_tensors` other than "pt".
        """
        if kind not in ("query", "document"):
            raise ValueError(f"kind must be 'query' or 'document'; found {kind!r}")
        if kwargs.pop("return_tensors", "pt") not in (None, "pt"):
            raise ValueError("return_tensors must be 'pt'")
        decided = {"padding", "truncation"}  # by the lengths above; generic callers send them
        own = {name: value for name, value in kwargs.items() if name not in decided and not name.endswith("_kwargs")}
        return (self.process_queries if kind == "query" else self.process_documents)(text, **own)

    def process_queries(
        self, texts: str | Sequence[str], full_length: bool = False, context: str | Sequence[str] | None = None
    ) -> BatchEncoding:
        """Tensors of queries.

        Args:
            texts: one text or several.
            full_length: do not cut at `max_query_length`: the batch is as long as its longest query has tokens without
                special ones, at most 500 (colbert-ai's `full_length_search`).
            context: background text per query, whose ids without the first follow the query's, as colbert-ai has it;
                cut where both together would have more than 512 tokens.

        Returns:
            `input_ids`, `attention_mask` and `keep_mask` (1: every vector of a query counts, but not the padding of
            contexts), int64 (queries, length).

        Raises:
            TypeError: a text is no string.
            ValueError: there are no texts, another number of contexts, queries so long that contexts have no room, or
                half of a surrogate pair in a text.
        """
        texts = _as_list(texts)
        length = self.max_query_length
        if full_length:
            bare = self._tokenize(self._prefixed(texts), special_tokens=False)
            length = min(_LONGEST_FULL_QUERY, max(length, *map(len, bare)))
        rows = self._with_marker(texts, self.query_marker, length)
        input_ids, attention_mask = _pad(rows, self.tokenizer.pad_token_id, length)
        input_ids[input_ids == self.tokenizer.pad_token_id] = self.tokenizer.mask_token_id
        if self.attend_to_mask_tokens:
            attention_mask = torch.ones_like(attention_mask)
        if context is not None:
            input_ids, attention_mask = self._append(_as_list(context), input_ids, attention_mask)
        keep_mask = (input_ids != self.tokenizer.pad_token_id).long()  # contexts of several lengths are padded
        return BatchEncoding({"input_ids": input_ids, "attention_mask": attention_mask, "keep_mask": keep_mask})

    def process_documents(self, texts: str | Sequence[str]) -> BatchEncoding:
        """Tensors of documents.

        Returns:
            `input_ids`, `attention_mask` (0 at padding) and `keep_mask` (1 where the vector belongs to the document:
            not at padding, not at punctuation; `<s>`, the marker and `</s>` stay), int64 (documents, longest document).

        Raises:
            TypeError: a text is no string.
            ValueError: there are no texts, or half of a surrogate pair in one.
        """
        rows = self._with_marker(_as_list(texts), self.document_marker, self.max_document_length)
        input_ids, attention_mask = _pad(rows, self.tokenizer.pad_token_id, max(map(len, rows)))
        dropped = torch.tensor([self.tokenizer.pad_token_id, *self.skiplist_ids])
        keep_mask = (~torch.isin(input_ids, dropped)).long()
        return BatchEncoding({"input_ids": input_ids, "attention_mask": attention_mask, "keep_mask": keep_mask})

    @property
    def shared_settings(self) -> dict[str, str | int]:
        """What queries and documents must agree in to be compared: all else is the choice of one side alone."""
        markers = self.tokenizer.convert_tokens_to_ids([self.query_marker, self.document_marker])
        return {"marker_mode": self.marker_mode, "query_marker_id": markers[0], "document_marker_id": markers[1]}

    @property
    def skiplist_ids(self) -> list[int]:
        """Ids, ascending, whose vectors documents do not keep."""
        if self.skiplist_tokens is not None:
            return sorted({self.tokenizer.convert_tokens_to_ids(token) for token in self.skiplist_tokens})
        if not self.mask_punctuation:
            return []
        return self._punctuation_ids

    def _check_known(self, tokens: Sequence[str]) -> None:
        """Raise `ValueError` for tokens that the tokenizer would take for the unknown one."""
        unknown = self.tokenizer.unk_token
        known = (None, self.tokenizer.unk_token_id)
        foreign = [name for name in tokens if name != unknown and self.tokenizer.convert_tokens_to_ids(name) in known]
        if foreign:
            raise ValueError(
                f"skiplist_tokens must be tokens of the vocabulary; found {', '.join(map(repr, foreign))}, for which "
                f"{unknown} would be dropped: all unknown words, and markers. Name {unknown} itself if that is meant"
            )

    @cached_property
    def _punctuation_ids(self) -> list[int]:
        return sorted({ids[0] for ids in self._tokenize(list(string.punctuation), special_tokens=False)})

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "keep_mask"]

    def _with_marker(self, texts: list[str], marker: str, limit: int) -> list[list[int]]:
        """Ids of at most `limit` tokens: `<s>`, the marker, the text, `</s>`."""
        if not texts:
            raise ValueError("expected at least one text; found none")
        marker_id = self.tokenizer.convert_tokens_to_ids(marker)
        if self.marker_mode == "insert":
            rows = self._tokenize(texts, max_length=limit - 1)
            return [[*row[:1], marker_id, *row[1:]] for row in rows]
        rows = self._tokenize(self._prefixed(texts), max_length=limit)
        return [[*row[:1], marker_id, *row[2:]] for row in rows]

    def _prefixed(self, texts: list[str]) -> list[str]:
        """With the placeholder that the "replace" marker overwrites."""
        return (
            [f". {text}" if isinstance(text, str) else text for text in texts]
            if self.marker_mode == "replace"
            else texts
        )

    def _append(self, contexts: list[str], input_ids: torch.Tensor, attention_mask: torch.Tensor):
        if len(contexts) != len(input_ids):
            raise ValueError(f"expected one context per query: {len(input_ids)} queries, {len(contexts)} contexts")
        room = _LONGEST_INPUT - input_ids.shape[1]
        if room < _SHORTEST_CONTEXT:
            raise ValueError(
                f"queries of {input_ids.shape[1]} tokens leave no room for contexts, with which they may have "
                f"{_LONGEST_INPUT}; lower max_query_length ({self.max_query_length}) or leave the contexts out"
            )
        rows = [row[1:] for row in self._tokenize(contexts, max_length=room + 1)]
        ids, mask = _pad(rows, self.tokenizer.pad_token_id, max(map(len, rows)))
        return torch.cat([input_ids, ids], dim=1), torch.cat([attention_mask, mask], dim=1)

    def _tokenize(self, texts: list[str], special_tokens: bool = True, max_length: int | None = None):
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"a text must be a string; found {type(text).__name__}")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"a text holds half of a surrogate pair: {text[:80]!r}")
        # Cut here and not by the tokenizer, which keeps the length as a state: other threads may use it for another.
        rows = self.tokenizer(
            texts, add_special_tokens=special_tokens, padding=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        if max_length is None or all(len(row) <= max_length for row in rows):
            return rows
        suffix = self._special_suffix()
        kept = max_length - len(suffix)
        return [row if len(row) <= max_length else [*row[:kept], *suffix] for row in rows]

    def _special_suffix(self) -> list[int]:
        """The ids that the tokenizer puts behind every text: `</s>`, or none."""
        bare, full = (self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        start = next((place for place in range(len(full)) if full[place : place + len(bare)] == bare), 0)
        return full[start + len(bare) :]


def _as_list(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _pad(rows: list[list[int]], padding_id: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, padded on the right, and the mask of what is not padding: (rows, length) int64."""
    ids = torch.tensor([row + [padding_id] * (length - len(row)) for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(length) < lengths[:, None]).long()
