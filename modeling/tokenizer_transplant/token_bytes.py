"""What tokens stand for (their bytes, texts and roles), and which tokens of two vocabularies are the same.

The scheme of a tokenizer is read from its serialised form (decoder, pre-tokenizer, model), never from its class:
"byte_level" (GPT-2's alphabet of bytes), "metaspace" (sentencepiece: `▁` for a space, `<0xNN>` for bytes), "wordpiece"
(`##` before a token that continues a word) or "plain" (tokens stand for themselves).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from .transplant_matrix import SourceKind

MATCH_RULES = ("bytes", "raw", "normalized", "canonical", "canonical_fuzzy", "special")
# In order of importance: a token that plays several roles takes the row of the first that the base has.
ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
# What takes a role that the base lacks.
_SUBSTITUTE_ROLES = {"bos": "cls", "cls": "bos", "eos": "sep", "sep": "eos", "mask": "pad"}
_CHAT_ROLES = {
    "turn_start": ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|turn>"),
    "turn_end": ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>"),
}
_METASPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet, character -> byte: printable Latin-1 stands for itself, the other bytes for U+0100 and up."""
    characters = sorted(ByteLevel.alphabet())
    own = {character: ord(character) for character in characters if ord(character) < 256}
    others = [byte for byte in range(256) if byte not in own.values()]
    return own | dict(zip([character for character in characters if character not in own], others))


_BYTE_OF = _byte_alphabet()
_CHARACTER_OF = {byte: character for character, byte in _BYTE_OF.items()}


class Vocabulary:
    """A fast tokenizer seen as a table of tokens.

    Attributes:
        tokenizer: the tokenizer.
        size: greatest id plus one, added tokens included; ids in between may be unused.
        tokens: list of length `size`: the raw string of every id, None where the id is unused.
        scheme: "byte_level", "metaspace", "wordpiece" or "plain".
        added_ids, special_ids: ids of the added tokens and, among them, of the special ones (sets).
        roles: role -> id, of the `ROLES` and chat roles ("turn_start", "turn_end") that the tokenizer has.

    Raises TypeError for a tokenizer without a fast backend.
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TypeError(
                f"expected a fast tokenizer (one with tokenizer.json), found {type(tokenizer).__name__}: load it with "
                "AutoTokenizer, which converts, and save it once"
            )
        self.tokenizer = tokenizer
        self._settings: dict[str, Any] = json.loads(backend.to_str())
        vocabulary = tokenizer.get_vocab()
        if not vocabulary:
            raise ValueError("the tokenizer has no tokens")
        self.size = max(vocabulary.values()) + 1
        self.tokens: list[str | None] = [None] * self.size
        for token, token_id in vocabulary.items():
            self.tokens[token_id] = token
        added = backend.get_added_tokens_decoder()
        self.added_ids = set(added)
        self.special_ids = {token_id for token_id, token in added.items() if token.special}
        self.special_ids |= {token_id for token_id in tokenizer.all_special_ids if token_id is not None}
        self.roles = _roles_of(tokenizer, vocabulary)
        self.scheme = _scheme_of(self._settings)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the serialised tokenizer without its truncation and padding settings."""
        settings = {key: value for key, value in self._settings.items() if key not in ("truncation", "padding")}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @cached_property
    def used_ids(self) -> list[int]:
        """Ids that have a token, ascending."""
        return [token_id for token_id, token in enumerate(self.tokens) if token is not None]

    @cached_property
    def token_bytes(self) -> list[bytes | None]:
        """The bytes that every token stands for, None where the id is unused; a special token stands for its name."""
        return [
            None if token is None else self._bytes_of(token_id, token) for token_id, token in enumerate(self.tokens)
        ]

    @cached_property
    def texts(self) -> list[str | None]:
        """`token_bytes` as text, with U+FFFD for bytes that are none; None where the id is unused."""
        return [None if raw is None else raw.decode("utf-8", errors="replace") for raw in self.token_bytes]

    @cached_property
    def is_byte_token(self) -> list[bool]:
        """Whether a token is one of `<0xNN>`, sentencepiece's names of single bytes."""
        return [
            token is not None and token_id not in self.special_ids and bool(_BYTE_TOKEN.fullmatch(token))
            for token_id, token in enumerate(self.tokens)
        ]

    def decoded_alone(self, ids: Sequence[int]) -> list[str]:
        """The tokenizer's own decoding of every id alone. It may lose a leading space, and gives U+FFFD for a part of a
        character: `texts` does neither lose nor, for whole characters, replace anything."""
        return self.tokenizer.batch_decode([[token_id] for token_id in ids])

    def encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokenizer's own encoding of texts, without special tokens."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []

    def pieces(self, byte_strings: Sequence[bytes], rows: int, *, model_only: bool = False) -> list[list[int]]:
        """Every byte string cut into tokens of the vocabulary whose bytes, joined, are that string.

        The first of these that gives back the bytes: the tokenizer's pre-tokenizer and model (where pre-tokenization
        adds nothing; not with `model_only`), its model alone, and the fewest pieces (the longest first). Only ordinary
        tokens with ids below `rows` occur. A string that cannot be built gets [].
        """
        pieces: list[list[int]] = [[] for _ in byte_strings]
        missing = [position for position, raw in enumerate(byte_strings) if raw]
        for encoder, spelling in self._encoders[-1:] if model_only else self._encoders:
            spelled = [(position, spelling(byte_strings[position])) for position in missing]
            spelled = [(position, text) for position, text in spelled if text is not None]
            encodings = encoder.encode_batch([text for _, text in spelled], add_special_tokens=False)
            for (position, _), encoding in zip(spelled, encodings):
                if self._joined(encoding.ids, rows) == byte_strings[position]:
                    pieces[position] = encoding.ids
            missing = [position for position in missing if not pieces[position]]
        if missing:
            tokens = self.ids_by_bytes(rows)
            longest = max(map(len, tokens), default=0)
            for position in missing:
                pieces[position] = _fewest_pieces(byte_strings[position], tokens, longest)
        return pieces

    def ids_by_bytes(self, rows: int) -> dict[bytes, int]:
        """Bytes -> the id of the ordinary token that stands for them, below `rows`: of several, a real token before
        `<0xNN>`, then the lowest id."""
        found: dict[bytes, int] = {}
        ordinary = [token_id for token_id in self.used_ids if token_id < rows and token_id not in self.special_ids]
        for token_id in sorted(ordinary, key=lambda i: (self.is_byte_token[i], i)):
            if raw := self.token_bytes[token_id]:
                found.setdefault(raw, token_id)
        return found

    def _joined(self, ids: Iterable[int], rows: int) -> bytes | None:
        ids = list(ids)
        if any(token_id >= rows or token_id in self.special_ids for token_id in ids):
            return None
        return b"".join(self.token_bytes[token_id] or b"" for token_id in ids)

    def _bytes_of(self, token_id: int, token: str) -> bytes:
        if token_id in self.special_ids:
            return token.encode()
        if self.scheme == "byte_level":
            if token_id in self.added_ids:
                return token.encode()
            return b"".join(
                bytes([_BYTE_OF[character]]) if character in _BYTE_OF else character.encode() for character in token
            )
        if self.scheme == "metaspace":
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(_METASPACE, " ").encode()
        if self.scheme == "wordpiece":
            if token_id in self.added_ids:
                return token.encode()
            prefix = self._settings["model"].get("continuing_subword_prefix", "##")
            return token.removeprefix(prefix).encode() if token.startswith(prefix) else f" {token}".encode()
        return token.encode()

    @cached_property
    def _encoders(self) -> list[tuple[Tokenizer, Any]]:
        """Tokenizers that only cut, and how each wants bytes spelled (None: it cannot spell them)."""
        settings = {
            **self._settings,
            "added_tokens": [],
            "normalizer": None,
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        model_only = Tokenizer.from_str(json.dumps({**settings, "pre_tokenizer": None}))
        if self.scheme == "byte_level":
            settings["pre_tokenizer"] = _without_prefix_space(settings["pre_tokenizer"])
            whole = Tokenizer.from_str(json.dumps(settings))
            return [(whole, _decoded), (model_only, _in_byte_alphabet)]
        if self.scheme == "metaspace":
            return [(model_only, _with_metaspace)]
        return [(model_only, _without_first_space if self.scheme == "wordpiece" else _decoded)]


def _roles_of(tokenizer: Any, vocabulary: Mapping[str, int]) -> dict[str, int]:
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
    for role, names in _CHAT_ROLES.items():
        roles[role] = next((vocabulary[name] for name in names if name in vocabulary), None)
    return {role: token_id for role, token_id in roles.items() if token_id is not None}


def _parts(component: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The members of a decoder or pre-tokenizer, which may be a sequence."""
    if component is None:
        return []
    return list(component[key]) if component["type"] == "Sequence" else [component]


def _scheme_of(settings: Mapping[str, Any]) -> str:
    decoders = _parts(settings.get("decoder"), "decoders")
    parts = decoders + _parts(settings.get("pre_tokenizer"), "pretokenizers")
    types = {part["type"] for part in parts}
    if "ByteLevel" in types:
        return "byte_level"
    replaces_mark = any(
        part["type"] == "Replace" and part.get("pattern", {}).get("String") == _METASPACE for part in decoders
    )
    if "Metaspace" in types or replaces_mark:
        return "metaspace"
    if "WordPiece" in types or settings["model"]["type"] == "WordPiece":
        return "wordpiece"
    return "plain"


def _without_prefix_space(pre_tokenizer: Any) -> Any:
    """A serialised pre-tokenizer whose byte-level members put no space before the text."""
    if isinstance(pre_tokenizer, dict):
        changed = {key: _without_prefix_space(value) for key, value in pre_tokenizer.items()}
        return {**changed, "add_prefix_space": False} if "add_prefix_space" in changed else changed
    if isinstance(pre_tokenizer, list):
        return [_without_prefix_space(member) for member in pre_tokenizer]
    return pre_tokenizer


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _in_byte_alphabet(raw: bytes) -> str:
    return "".join(_CHARACTER_OF[byte] for byte in raw)


def _with_metaspace(raw: bytes) -> str | None:
    text = _decoded(raw)
    return None if text is None else text.replace(" ", _METASPACE)


def _without_first_space(raw: bytes) -> str | None:
    return _decoded(raw[1:]) if raw.startswith(b" ") else None


def _fewest_pieces(raw: bytes, tokens: Mapping[bytes, int], longest: int) -> list[int]:
    """The segmentation of `raw` into the fewest tokens, the longest first among equals; [] if there is none."""
    impossible = len(raw) + 1
    needed = [impossible] * len(raw) + [0]  # pieces needed from each position to the end
    length = [0] * len(raw)
    for start in reversed(range(len(raw))):
        for stop in range(start + 1, min(start + longest, len(raw)) + 1):
            if needed[stop] + 1 <= needed[start] and needed[stop] < impossible and raw[start:stop] in tokens:
                needed[start], length[start] = needed[stop] + 1, stop - start
    if needed[0] >= impossible:
        return []
    pieces, start = [], 0
    while start < len(raw):
        pieces.append(tokens[raw[start : start + length[start]]])
        start += length[start]
    return pieces


# --- which tokens are the same ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matches:
    """Which rows are copied.

    base_ids: `(new.size,)` int64, the base id of every new id, -1 where there is none.
    kinds: `(new.size,)` uint8, COPIED or SPECIAL (by its role), UNDEFINED where there is none.
    without_row: new ids of tokens that the base's tokenizer has, but its tables have no row for.
    """

    base_ids: Tensor
    kinds: Tensor
    without_row: list[int]


def match_vocabularies(
    base: Vocabulary,
    new: Vocabulary,
    base_rows: int,
    *,
    rule: str = "bytes",
    special_map: Mapping[str, str] | None = None,
    compatibility: str | None = None,
) -> Matches:
    """Which tokens of `new` are tokens of `base`.

    rule: "bytes", equal bytes, ordinary tokens with ordinary tokens (the default); "raw", equal strings, as TokenAdapt;
        "normalized", equal but for the mark of a word's start, named special tokens by role, as mergekit; "canonical"
        and "canonical_fuzzy" (then also ignoring mark and case), as deepfocus; "special", only special tokens of equal
        names, as WECHSEL.
    special_map: {new token: base token}, before everything else.
    compatibility: None; a peer's name turns off what that peer does not do: special tokens by role (then by name), and
        the lowest id among equals.

    Special tokens are matched by role first, then by name. Among several base tokens of the same bytes, the one of the
    same raw string wins, then a real token before a `<0xNN>`, then the lowest id.

    Raises ValueError for an unknown rule, and for tokens of `special_map` that do not exist.
    """
    if rule not in MATCH_RULES:
        raise ValueError(f"unknown matching rule {rule!r}; known: {', '.join(MATCH_RULES)}")
    base_ids = [-1] * new.size
    by_role = set()
    for new_id, base_id in _by_rule(base, new, rule, compatibility).items():
        base_ids[new_id] = base_id
    if compatibility is None:
        for new_id, base_id in _special_by_name(base, new).items():
            base_ids[new_id] = base_id
        roles = _special_by_role(base, new)
        base_ids = [roles.get(new_id, base_id) for new_id, base_id in enumerate(base_ids)]
        by_role |= set(roles)
    for new_token, base_token in (special_map or {}).items():
        new_id = _id_of(new, new_token, "new")
        base_ids[new_id] = _id_of(base, base_token, "base")
        by_role.add(new_id)
    without_row = [new_id for new_id, base_id in enumerate(base_ids) if base_id >= base_rows]
    base_ids = [-1 if base_id >= base_rows else base_id for base_id in base_ids]
    kinds = [
        SourceKind.UNDEFINED if base_id < 0 else SourceKind.SPECIAL if new_id in by_role else SourceKind.COPIED
        for new_id, base_id in enumerate(base_ids)
    ]
    return Matches(torch.tensor(base_ids), torch.tensor(kinds, dtype=torch.uint8), without_row)


def _by_rule(base: Vocabulary, new: Vocabulary, rule: str, compatibility: str | None) -> dict[int, int]:
    if rule == "bytes":
        return _by_bytes(base, new)
    if rule == "raw":
        return _by_form(list(base.tokens), list(new.tokens))
    if rule == "normalized":
        by_class = compatibility == "mergekit"
        return _by_form(normalized_forms(base, by_class), normalized_forms(new, by_class))
    if rule == "special":
        return {i: j for i, j in _by_form(list(base.tokens), list(new.tokens)).items() if i in new.special_ids}
    highest = compatibility == "focus"
    base_forms, new_forms = _canonical_forms(base), _canonical_forms(new)
    matches = _by_form(base_forms, new_forms, highest_id=highest)
    if rule == "canonical_fuzzy":
        base_loose, new_loose = _loose_forms(base_forms), _loose_forms(new_forms)
        # Of base tokens that are alike so, one that is of that form strictly goes before the others.
        strict = _by_form(base_forms, new_loose, highest_id=highest)
        matches = _by_form(base_loose, new_loose) | strict | matches
    return matches


def _by_form(base_forms: Sequence[Any], new_forms: Sequence[Any], *, highest_id: bool = False) -> dict[int, int]:
    """New id -> base id of the same form; None is no form. Of several base ids the lowest, or the highest."""
    ids: dict[Any, int] = {}
    for base_id, form in enumerate(base_forms):
        if form is not None and (highest_id or form not in ids):
            ids[form] = base_id
    return {new_id: ids[form] for new_id, form in enumerate(new_forms) if form is not None and form in ids}


def _by_bytes(base: Vocabulary, new: Vocabulary) -> dict[int, int]:
    by_bytes = base.ids_by_bytes(base.size)
    by_token = {base.tokens[base_id]: base_id for base_id in base.used_ids if base_id not in base.special_ids}
    matches = {}
    for new_id in new.used_ids:
        raw = new.token_bytes[new_id]
        if new_id in new.special_ids or not raw:
            continue
        same_name = by_token.get(new.tokens[new_id])
        if same_name is not None and base.token_bytes[same_name] == raw:
            matches[new_id] = same_name
        elif raw in by_bytes:
            matches[new_id] = by_bytes[raw]
    return matches


def _special_by_name(base: Vocabulary, new: Vocabulary) -> dict[int, int]:
    """Special tokens of one name; what one side holds as special, the other may hold as an ordinary added token."""
    by_name = {base.tokens[base_id]: base_id for base_id in sorted(base.special_ids | base.added_ids)}
    return {
        new_id: by_name[new.tokens[new_id]]
        for new_id in sorted(new.special_ids | new.added_ids)
        if new.tokens[new_id] in by_name
        and (new_id in new.special_ids or by_name[new.tokens[new_id]] in base.special_ids)
    }


def _special_by_role(base: Vocabulary, new: Vocabulary) -> dict[int, int]:
    matches: dict[int, int] = {}
    for role, new_id in new.roles.items():
        base_id = base.roles.get(role, base.roles.get(_SUBSTITUTE_ROLES.get(role, "")))
        if base_id is not None:
            matches.setdefault(new_id, base_id)
    return matches


def _id_of(vocabulary: Vocabulary, token: str, which: str) -> int:
    token_id = vocabulary.tokenizer.get_vocab().get(token)
    if token_id is None:
        raise ValueError(f"special_map names {token!r}, which is no token of the {which} tokenizer")
    return token_id


def normalized_forms(vocabulary: Vocabulary, by_class: bool) -> list[Any]:
    """mergekit's forms: ("special", role) for named special tokens, ("word start", rest) for tokens with the mark."""
    mark = (
        mergekit_mark(vocabulary) if by_class else {"byte_level": "Ġ", "metaspace": _METASPACE}.get(vocabulary.scheme)
    )
    roles: dict[int, str] = {}
    for role in ROLES:
        if role in vocabulary.roles:
            roles.setdefault(vocabulary.roles[role], role)
    forms: list[Any] = []
    for token_id, token in enumerate(vocabulary.tokens):
        if token_id in roles:
            forms.append(("special", roles[token_id]))
        elif token is not None and mark is not None and token.startswith(mark):
            forms.append(("word start", token[len(mark) :]))
        else:
            forms.append(token)
    return forms


def mergekit_mark(vocabulary: Vocabulary) -> str:
    """The mark by the tokenizer's class, as mergekit 0.1.5 chooses it: an unknown class counts as byte-level."""
    name = type(vocabulary.tokenizer).__name__
    sentencepiece = name.startswith(("Llama", "T5", "Gemma")) and "Ġhello" not in vocabulary.tokenizer.get_vocab()
    return _METASPACE if sentencepiece else "Ġ"


def _canonical_forms(vocabulary: Vocabulary) -> list[str | None]:
    """deepfocus' forms: `▁` for tokens that start a word, and the text without leading space."""
    named = [token for token in vocabulary.tokens if token is not None]
    if sum(token.startswith(_METASPACE) for token in named) > 100:
        return [None if token is None else _canonical_sentencepiece(token) for token in vocabulary.tokens]
    if sum(token.startswith("##") for token in named) > 100:
        return [
            None if token is None else token[2:] if token.startswith("##") else _METASPACE + token
            for token in vocabulary.tokens
        ]
    forms: list[str | None] = [None] * vocabulary.size
    for token_id, text in zip(vocabulary.used_ids, vocabulary.decoded_alone(vocabulary.used_ids)):
        mark = _METASPACE if (vocabulary.tokens[token_id] or "").startswith("Ġ") else ""
        forms[token_id] = mark + text.lstrip()
    return forms


def _loose_forms(forms: Sequence[str | None]) -> list[str | None]:
    return [None if form is None else form.replace(_METASPACE, "").lower() for form in forms]


def _canonical_sentencepiece(token: str) -> str:
    return _METASPACE + token.lstrip(_METASPACE) if token.startswith(_METASPACE) else token
