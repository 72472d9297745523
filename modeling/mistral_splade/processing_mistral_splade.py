"""Text to tensors for Mistral-SPLADE: templates in the brace grammar of the official echo parser, masks and padding.

The grammar (github.com/jakespringer/echo-embeddings, `EchoParser`): a template is a sequence of pieces. `{...}` is a
piece whose tokens are pooled, `{!...}` one whose tokens are read but not pooled, text outside braces is literal and
not pooled; inside braces `%%name%%` is replaced by a value. Every piece is tokenized by itself, without special
tokens beyond those written in the template, and cut to the maximum length by itself: both copies of a long text stay
whole copies, and `{</s>}` is never cut off.
"""

import re
import threading
from collections.abc import Mapping, Sequence

import torch
from transformers import BatchEncoding
from transformers.processing_utils import ProcessorMixin

ECHO_QUERY = "<s>Instruct:{!%%prompt%%,}\nQuery:{!%%text%%}\nQuery again:{%%text%%}{</s>}"
ECHO_DOCUMENT = "<s>Document:{!%%text%%}\nDocument again:{%%text%%}{</s>}"
SINGLE = "{<s>}{%%text%%}"
REPEAT = "<s>{!%%text%%}{<s>}{%%text%%}"

_DEFAULT_TEMPLATES = {
    "echo": (ECHO_QUERY, ECHO_DOCUMENT),
    "plain": (SINGLE, SINGLE),
    "bidirectional": (SINGLE, SINGLE),
    "repeat": (REPEAT, REPEAT),
}
# A tokenizer keeps `split_special_tokens` as a state, which another thread must not change before it is used.
_TOKENIZING = threading.Lock()
_PIECE = re.compile(r"\{(?:.|\n|\r)+?\}")
_VARIABLE = re.compile(r"%%(\w+)%%")


class MistralSpladeProcessor(ProcessorMixin):
    r"""
    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The checkpoint's tokenizer. Without a padding token it pads with its unknown token, as the official parser
            does.
        attention_mode (`str`, defaults to `"echo"`):
            "echo", "plain", "bidirectional" or "repeat", as in the model's configuration; chooses the default
            templates.
        query_template, document_template (`str`, *optional*):
            Templates in the brace grammar. They must contain `%%text%%`; `%%prompt%%` is the only other variable that
            `process_queries` and `process_documents` fill. `<s>` and `</s>` become the tokenizer's own start and end
            tokens where these have other names, and are left out where it has none.
        prompt (`str`):
            Default value of `%%prompt%%`.
        max_query_length, max_document_length (`int`, defaults to 256):
            Tokens kept of each piece (not of their sum). The official value for dense echo models is 300.
        pad_between_copies (`bool`, defaults to False):
            Only for "repeat" mode: pad each copy to the batch's longest before doubling, as CSPLADE's and LACONIC's
            code does. The result of a text then depends on the other texts of its batch; kept to reproduce such
            checkpoints.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        tokenizer=None,
        attention_mode: str = "echo",
        query_template: str | None = None,
        document_template: str | None = None,
        prompt: str = "Retrieve passages that answer the question",
        max_query_length: int = 256,
        max_document_length: int = 256,
        pad_between_copies: bool = False,
        chat_template=None,
    ):
        if attention_mode not in _DEFAULT_TEMPLATES:
            raise ValueError(f"attention_mode must be one of {', '.join(_DEFAULT_TEMPLATES)}; found {attention_mode!r}")
        if pad_between_copies and attention_mode != "repeat":
            raise ValueError(f"pad_between_copies needs attention_mode='repeat'; found {attention_mode!r}")
        for field, value in (("max_query_length", max_query_length), ("max_document_length", max_document_length)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a whole number of at least 1; found {value!r}")
        super().__init__(tokenizer, chat_template=chat_template)
        default_query, default_document = _DEFAULT_TEMPLATES[attention_mode]
        self.attention_mode = attention_mode
        self.query_template = self._in_own_tokens(default_query if query_template is None else query_template)
        self.document_template = self._in_own_tokens(
            default_document if document_template is None else document_template
        )
        self.prompt = prompt
        self.max_query_length = max_query_length
        self.max_document_length = max_document_length
        self.pad_between_copies = pad_between_copies
        for kind in ("query", "document"):
            self._check_template(kind)

    def __call__(self, text: str | Sequence[str], kind: str = "document", **kwargs) -> BatchEncoding:
        """`process_queries` or `process_documents`, by `kind`.

        Callers used to tokenizers may say `padding`, `truncation` and `return_tensors="pt"`; generic callers
        (sentence-transformers' fill-mask module, pipelines) send these in groups, such as `text_kwargs={…}`. The
        template and its lengths decide padding and truncation here, and the result is torch tensors.
        """
        if kind not in ("query", "document"):
            raise ValueError(f"kind must be 'query' or 'document'; found {kind!r}")
        if kwargs.get("return_tensors") not in (None, "pt"):
            raise ValueError(f"return_tensors must be 'pt'; found {kwargs['return_tensors']!r}")
        process = self.process_queries if kind == "query" else self.process_documents
        decided = ("padding", "truncation", "return_tensors")
        own = {name: value for name, value in kwargs.items() if name not in decided and not name.endswith("_kwargs")}
        return process(text, **own)

    def process_queries(
        self, texts: str | Sequence[str], prompt: str | None = None, padding_side: str = "right"
    ) -> BatchEncoding:
        """Tensors of queries; `prompt` overrides the stored one. See `process`."""
        values = {} if prompt is None else {"prompt": prompt}
        return self.process([("query", {"text": text, **values}) for text in _as_list(texts)], padding_side)

    def process_documents(self, texts: str | Sequence[str], padding_side: str = "right") -> BatchEncoding:
        """Tensors of documents. See `process`."""
        return self.process([("document", {"text": text}) for text in _as_list(texts)], padding_side)

    def process(self, items: Sequence[tuple[str, Mapping[str, str]]], padding_side: str = "right") -> BatchEncoding:
        """Tensors of a batch in which queries and documents may be mixed.

        Args:
            items: pairs (kind, values): kind "query" or "document", values for the template's variables.
            padding_side: "right" or "left".

        Returns:
            `input_ids`, `attention_mask` (0 at padding) and `pool_mask` (1 where pooled): int64 (items, length); in
            "repeat" mode with `pad_between_copies` also `position_ids`.
        """
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left'; found {padding_side!r}")
        if self.pad_between_copies and padding_side == "left":
            raise ValueError("pad_between_copies pads each copy on the right; found padding_side='left'")
        if not items:
            raise ValueError("expected at least one text; found none")
        pieces = [self._fill_template(kind, values) for kind, values in items]
        token_ids = self._tokenize({(text, verbatim) for row in pieces for text, verbatim, _, _ in row})
        rows = [
            [(token_ids[text, verbatim][:limit], pooled) for text, verbatim, pooled, limit in row] for row in pieces
        ]
        if self.pad_between_copies:
            return self._pad_each_copy(rows)
        return BatchEncoding(self._pad(rows, padding_side))

    def token(self, token_id: int) -> str:
        """Surface form of a vocabulary entry; "<id N>" for entries of a padded head that the tokenizer does not
        know."""
        token = self.tokenizer.convert_ids_to_tokens(token_id) if token_id < len(self.tokenizer) else None
        return f"<id {token_id}>" if token is None else token

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers. sentence-transformers' own modules read queries with the document template and pool every
        position: where that is not what this processor does, its `SparseEncoder` is given this family's module."""
        written = super().save_pretrained(save_directory, **kwargs)
        query, document = self._template("query"), self._template("document")
        everything_pooled = not _PIECE.sub("", query[0]) and "{!" not in query[0]
        if query != document or not everything_pooled:
            # Imported here for speed; by this line transformers also copies that file beside the processor.
            from .sentence_transformers_mistral_splade import write_sparse_encoder_files

            write_sparse_encoder_files(save_directory)
        return written

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pool_mask"]

    @property
    def _padding_id(self) -> int:
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.unk_token_id):
            if token_id is not None:
                return token_id
        raise ValueError("the tokenizer has neither a padding nor an unknown token; set tokenizer.pad_token")

    def _template(self, kind: str) -> tuple[str, int]:
        if kind == "query":
            return self.query_template, self.max_query_length
        if kind == "document":
            return self.document_template, self.max_document_length
        raise ValueError(f"kind must be 'query' or 'document'; found {kind!r}")

    def _in_own_tokens(self, template: str) -> str:
        if self.tokenizer is None or not isinstance(template, str):
            return template
        for literal, token in (("<s>", self.tokenizer.bos_token), ("</s>", self.tokenizer.eos_token)):
            token_id = self.tokenizer.convert_tokens_to_ids(literal)
            known = token_id is not None and self.tokenizer.convert_ids_to_tokens(token_id) == literal
            if literal in template and not known:
                template = template.replace(literal, token or "").replace("{}", "")
        return template

    def _check_template(self, kind: str) -> None:
        template, _ = self._template(kind)
        if not isinstance(template, str):
            raise ValueError(f"the {kind} template must be a string; found {template!r}")
        outside = _PIECE.sub("", template)
        if "{" in outside or "}" in outside:
            raise ValueError(f"the {kind} template has an unmatched brace or an empty piece: {template!r}")
        if "%%text%%" not in "".join(_PIECE.findall(template)):
            raise ValueError(f"the {kind} template must contain %%text%% inside braces; found {template!r}")
        unknown = set(_VARIABLE.findall(template)) - {"text", "prompt"}
        if unknown:
            raise ValueError(
                f"the {kind} template may use %%text%% and %%prompt%%; found {', '.join(sorted(unknown))} "
                f"in {template!r}"
            )

    def _fill_template(self, kind: str, values: Mapping[str, str]) -> list[tuple[str, bool, bool, int]]:
        """Pieces in order: (text, read special tokens as plain characters, pooled, maximum number of tokens)."""
        template, limit = self._template(kind)
        values = {"prompt": self.prompt, **values}
        if "text" not in values:
            raise ValueError(f"a {kind} needs a value for 'text'; found {', '.join(sorted(values))}")
        for name, value in values.items():
            if not isinstance(value, str):
                raise TypeError(f"the {name} of a {kind} must be a string; found {type(value).__name__}")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(f"the {name} of a {kind} holds half of a surrogate pair: {value[:80]!r}")
        pieces, end = [], 0
        for match in _PIECE.finditer(template):
            pieces.append((template[end : match.start()], False, False, limit))
            inner = match.group()[1:-1]
            pooled = not inner.startswith("!")
            # A text is data: "</s>" in it is four characters. Special tokens that the template puts beside it stay.
            verbatim = "%%text%%" in inner and not any(token in inner for token in self.tokenizer.all_special_tokens)
            # One pass, so that a text that itself contains "%%prompt%%" stays as it is.
            filled = _VARIABLE.sub(lambda variable: values[variable.group(1)], inner if pooled else inner[1:])
            pieces.append((filled, verbatim, pooled, limit))
            end = match.end()
        pieces.append((template[end:], False, False, limit))
        return [piece for piece in pieces if piece[0]]

    def _tokenize(self, pieces: set[tuple[str, bool]]) -> dict[tuple[str, bool], list[int]]:
        """Ids of pieces (text, read special tokens as plain characters)."""
        token_ids: dict[tuple[str, bool], list[int]] = {}
        for verbatim in (False, True):
            texts = sorted(text for text, plain in pieces if plain == verbatim)
            if texts:
                with _TOKENIZING:
                    encoded = self.tokenizer(
                        texts,
                        add_special_tokens=False,
                        split_special_tokens=verbatim,
                        return_attention_mask=False,
                        truncation=False,
                        verbose=False,
                    )
                token_ids.update(zip([(text, verbatim) for text in texts], encoded["input_ids"]))
        return token_ids

    def _pad(self, rows: list[list[tuple[list[int], bool]]], padding_side: str) -> dict[str, torch.Tensor]:
        """Tensors of rows of pieces (ids, pooled)."""
        ids = [[token for tokens, _ in row for token in tokens] for row in rows]
        pooled = [[int(pool) for tokens, pool in row for _ in tokens] for row in rows]
        length = max(1, *(len(row) for row in ids))
        input_ids = torch.full((len(ids), length), self._padding_id, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        pool_mask = torch.zeros_like(input_ids)
        for i, (row, pool) in enumerate(zip(ids, pooled)):
            place = slice(0, len(row)) if padding_side == "right" else slice(length - len(row), length)
            input_ids[i, place] = torch.tensor(row, dtype=torch.long)
            attention_mask[i, place] = 1
            pool_mask[i, place] = torch.tensor(pool, dtype=torch.long)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "pool_mask": pool_mask}

    def _pad_each_copy(self, rows: list[list[tuple[list[int], bool]]]) -> BatchEncoding:
        """First copies padded to one length, then second copies, which begin with the first pooled piece: positions run
        through the padding between them."""
        starts = [next((i for i, (_, pooled) in enumerate(row) if pooled), len(row)) for row in rows]
        first = self._pad([row[:start] for row, start in zip(rows, starts)], "right")
        second = self._pad([row[start:] for row, start in zip(rows, starts)], "right")
        joined = {name: torch.cat([first[name], second[name]], dim=1) for name in first}
        joined["position_ids"] = torch.arange(joined["input_ids"].shape[1]).expand_as(joined["input_ids"])
        return BatchEncoding(joined)


def _as_list(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
