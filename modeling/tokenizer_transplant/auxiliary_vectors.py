"""Vectors of token strings in an auxiliary space, in which the tokens of two vocabularies can be compared.

Whatever gives the vectors, a transplantation method sees one method: `vectors(strings)` returns the vectors and which
strings have one. `as_auxiliary_vectors` makes such an object of a dictionary, a stored table, a text encoder of
transformers or sentence-transformers, or static word vectors (fastText, gensim).

Encoders see every sequence of their own token ids once, in batches of one length, so that nothing is computed on
padding; what they gave can be kept in a file, which is used again as long as the encoder is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

_TOKENS_PER_BATCH = 1_024  # more gains no speed on a CPU
_STRINGS_PER_WRITE = 20_000  # so much work is lost at most when a process is killed
_EXPECTED = (
    "a mapping {string: vector}, a pair (table, strings), a safetensors file with its strings in JSON, an encoder of "
    "transformers (or a pair (encoder, tokenizer)), a model of sentence-transformers or its name, or word vectors with "
    "get_word_vector or __getitem__"
)


@runtime_checkable
class AuxiliaryVectors(Protocol):
    """What transplantation methods ask for vectors; any object with this method serves."""

    def vectors(self, strings: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`(strings, dim)` float32, on the CPU, and which strings have a vector, `(strings,)` bool; the rows of the
        others are zero."""


def as_auxiliary_vectors(source: Any, *, cache_folder: str | os.PathLike | None = None) -> AuxiliaryVectors:
    """Vectors from any of these sources:

    - a mapping `{string: vector}`;
    - a pair `(table, strings)`: `(n, dim)` numbers and their n strings; also two paths, or one path `name.safetensors`,
      of a safetensors file with one tensor and of a JSON list (`name.json` or `name_strings.json` beside it);
    - an encoder of transformers, alone (its tokenizer is then loaded from where the encoder came from) or as a pair
      `(encoder, tokenizer)`: the mean of the last hidden states over all positions, special tokens included;
    - a model of sentence-transformers, or the name of one: its own pooling, without a prompt;
    - word vectors: an object with `get_word_vector(string)` (fastText; strings of several words go to
      `get_sentence_vector` where there is one), or with `string in it` and `it[string]` (gensim);
    - an object that has `vectors(strings)` already, which is returned as it is.

    cache_folder: where encoders keep vectors between runs, one safetensors file per encoder, named by the SHA-256 of
        its weights, configuration and tokenizer; None keeps them only as long as the object lives.

    Raises TypeError for other sources, ValueError for tables that do not fit their strings.
    """
    if callable(getattr(source, "vectors", None)):
        return source
    if isinstance(source, Mapping):
        return VectorTable(list(source.values()), list(source))
    if isinstance(source, tuple) and len(source) == 2:
        first, second = source
        if _is_transformers_model(first):
            return EncoderVectors(first, second, cache_folder)
        if isinstance(first, (str, os.PathLike)):
            return _stored_table(Path(first), Path(second))
        return VectorTable(first, second)
    if isinstance(source, (str, os.PathLike)):
        if Path(source).suffix == ".safetensors":
            return _stored_table(Path(source), _strings_beside(Path(source)))
        return EncoderVectors(_sentence_transformer(str(source)), None, cache_folder)
    if isinstance(source, nn.Module) and (_is_transformers_model(source) or hasattr(source, "encode")):
        return EncoderVectors(source, None, cache_folder)
    by_item = hasattr(source, "__getitem__") and hasattr(source, "__contains__")
    if hasattr(source, "get_word_vector") or (by_item and not isinstance(source, (Tensor, np.ndarray, list, tuple))):
        return WordVectors(source)
    raise TypeError(f"expected auxiliary vectors as {_EXPECTED}; found {type(source).__name__}")


class VectorTable:
    """A table of vectors, `(n, dim)`, and the n strings they belong to; strings are looked up as they are."""

    def __init__(self, table: Any, strings: Sequence[str]):
        if not len(strings):
            raise ValueError("auxiliary vectors must be those of at least one string; found none")
        foreign = [string for string in strings if not isinstance(string, str)]
        if foreign:
            raise TypeError(f"auxiliary vectors must belong to strings; found {foreign[0]!r}")
        self._table = _as_table(table)
        self._positions = {string: position for position, string in enumerate(strings)}
        if len(strings) != len(self._table) or len(self._positions) != len(strings):
            raise ValueError(
                f"a table of auxiliary vectors needs one row per distinct string; found {len(self._table)} rows and "
                f"{len(strings)} strings, {len(self._positions)} of them distinct"
            )

    def vectors(self, strings: Sequence[str]) -> tuple[Tensor, Tensor]:
        positions = torch.tensor([self._positions.get(string, -1) for string in strings], dtype=torch.int64)
        has_vector = positions >= 0
        found = torch.zeros(len(positions), self._table.shape[1])
        found[has_vector] = self._table[positions[has_vector]]
        return found, has_vector & (found != 0).any(1)


class WordVectors:
    """Static word vectors: a fastText model, gensim's KeyedVectors, a mapping, or what answers like them.

    Strings are looked up without the whitespace around them, as words have none; a zero vector counts as none.
    """

    def __init__(self, source: Any):
        self._source = source

    def vectors(self, strings: Sequence[str]) -> tuple[Tensor, Tensor]:
        known = {string: self._vector(string) for string in dict.fromkeys(strings)}
        found = {string: np.asarray(vector, np.float32) for string, vector in known.items() if vector is not None}
        if not found:
            return torch.zeros(len(strings), 0), torch.zeros(len(strings), dtype=torch.bool)
        nothing = np.zeros_like(next(iter(found.values())))
        table = _as_table([found.get(string, nothing) for string in strings])
        return table, (table != 0).any(1)

    def _vector(self, string: str) -> Any:
        words = string.split()
        if not words:
            return None
        if not hasattr(self._source, "get_word_vector"):
            return self._source[string.strip()] if string.strip() in self._source else None
        if len(words) > 1 and hasattr(self._source, "get_sentence_vector"):
            return self._source.get_sentence_vector(" ".join(words))  # fastText refuses line ends
        return self._source.get_word_vector(string.strip())


class EncoderVectors:
    """Vectors from a text encoder: see `as_auxiliary_vectors`.

    encoder: a model of transformers, or one of sentence-transformers (for which `tokenizer` stays None).
    cache_folder: as in `as_auxiliary_vectors`. Vectors are also kept in the object.
    """

    def __init__(self, encoder: Any, tokenizer: Any = None, cache_folder: str | os.PathLike | None = None):
        self._encoder = encoder
        self._is_transformers = _is_transformers_model(encoder)
        if tokenizer is None:
            tokenizer = _tokenizer_of(encoder) if self._is_transformers else getattr(encoder, "tokenizer", None)
        # Encoders of sentence-transformers may have a tokenizer of another kind: then equal strings are encoded once.
        self._tokenizer = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
        if self._is_transformers and self._tokenizer is None:
            raise TypeError(f"expected the encoder's tokenizer, found {type(tokenizer).__name__}")
        self._rows: dict[bytes, int] = {}  # of the table, by what the encoder sees
        self._row_of_string: dict[str, int] = {}  # -1 for strings that have no vector
        self._table = torch.empty(0, 0)
        self._cache_file = None
        if cache_folder is not None:
            self._cache_file = Path(cache_folder) / f"{self._fingerprint()}.safetensors"
            self._read_cache()

    def vectors(self, strings: Sequence[str]) -> tuple[Tensor, Tensor]:
        strings = list(strings)
        unseen = [string for string in dict.fromkeys(strings) if string not in self._row_of_string]
        sequences = self._sequences(unseen)
        keys = [_key(sequence) for sequence in sequences]
        missing: dict[bytes, int] = {}
        for position, key in enumerate(keys):
            if key and key not in self._rows:  # what has nothing to encode has no vector
                missing.setdefault(key, position)
        if missing:
            self._encode_missing(list(missing.values()), unseen, sequences)
        self._row_of_string.update((string, self._rows.get(key, -1)) for string, key in zip(unseen, keys))
        rows = torch.tensor([self._row_of_string[string] for string in strings], dtype=torch.int64)
        found = torch.zeros(len(strings), self._table.shape[1])
        found[rows >= 0] = self._table[rows[rows >= 0]]
        return found, rows >= 0

    def _sequences(self, strings: list[str]) -> list[list[int]]:
        """What the encoder sees of every string: its token ids, or else its UTF-8 bytes."""
        if self._tokenizer is None:
            return [list(string.encode("utf-8", "surrogatepass")) for string in strings]
        if not strings:
            return []
        limit = self._max_length()
        return self._tokenizer(
            strings,
            truncation=limit is not None,
            max_length=limit,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]

    def _max_length(self) -> int | None:
        if not self._is_transformers or self._tokenizer is None:
            return getattr(self._encoder, "max_seq_length", None)
        limits = [self._tokenizer.model_max_length, getattr(self._encoder.config, "max_position_embeddings", None)]
        return min((limit for limit in limits if limit is not None and 0 < limit < 10**9), default=None)

    def _encode_missing(self, positions: list[int], strings: list[str], sequences: list[list[int]]) -> None:
        order: list[int] = []
        encoded: list[Tensor] = []
        bar = tqdm(total=len(positions), desc="auxiliary vectors", unit="string", leave=None, disable=None)
        with bar, _evaluation_mode(self._encoder), _linear_layers_by_onednn(self._encoder):
            for batch in _batches_of_one_length(positions, sequences):
                encoded.append(self._encode(batch, strings, sequences))
                order += batch
                bar.update(len(batch))
                if len(order) >= _STRINGS_PER_WRITE:
                    self._keep(order, torch.cat(encoded), strings, sequences)
                    order, encoded = [], []
        if order:
            self._keep(order, torch.cat(encoded), strings, sequences)

    def _keep(self, order: list[int], new: Tensor, strings: list[str], sequences: list[list[int]]) -> None:
        broken = (~new.isfinite().all(1)).nonzero()[:, 0].tolist()
        if broken:
            raise ValueError(
                f"the encoder gives a vector with NaN or infinity, first for {strings[order[broken[0]]]!r}"
            )
        first = len(self._rows)
        self._rows.update({_key(sequences[position]): first + row for row, position in enumerate(order)})
        self._table = torch.cat([self._table, new]) if first else new
        self._write_cache()

    @torch.no_grad()
    def _encode(self, batch: list[int], strings: list[str], sequences: list[list[int]]) -> Tensor:
        """`(batch, dim)` float32 for strings of one length."""
        if not self._is_transformers:
            texts = [strings[position] for position in batch]
            found = self._encoder.encode(texts, prompt="", batch_size=len(texts), show_progress_bar=False)
            return torch.as_tensor(np.asarray(found), dtype=torch.float32)
        token_ids = torch.tensor([sequences[position] for position in batch], device=self._encoder.device)
        encoder = self._encoder.get_encoder() if self._encoder.config.is_encoder_decoder else self._encoder
        output = encoder(input_ids=token_ids, attention_mask=torch.ones_like(token_ids))
        if not hasattr(output, "last_hidden_state"):
            name = type(self._encoder).__name__
            raise TypeError(f"expected an encoder without a head, as AutoModel loads it; found {name}")
        return output.last_hidden_state.float().mean(1).cpu()

    # --- the cache ----------------------------------------------------------------------------------------------------

    def _fingerprint(self) -> str:
        """SHA-256 of all that decides about a vector: weights, configuration, tokenizer, pooling."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._encoder.state_dict().items()):
            if torch.is_tensor(tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        for module in self._encoder.modules():
            if _is_transformers_model(module):
                settings = module.config.to_dict()
                unimportant = ("_name_or_path", "transformers_version", "dtype")
                settings = {key: value for key, value in settings.items() if key not in unimportant}
                digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        if not self._is_transformers:
            digest.update(repr(self._encoder).encode())
        digest.update(_tokenizer_text(self._tokenizer).encode())
        digest.update(str(self._max_length()).encode())
        return digest.hexdigest()

    def _read_cache(self) -> None:
        if self._cache_file is None or not self._cache_file.exists():
            return
        try:
            stored = load_file(self._cache_file)
            sequences = stored["sequences"].split(stored["lengths"].tolist())
            self._table = stored["vectors"]
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"{self._cache_file} is no whole cache of auxiliary vectors ({error}): delete it"
            ) from error
        self._rows = {_key(sequence.tolist()): row for row, sequence in enumerate(sequences)}

    def _write_cache(self) -> None:
        if self._cache_file is None:
            return
        self._cache_file.parent.mkdir(parents=True, exist_ok=True)
        beside = self._cache_file.with_name(f"{self._cache_file.name}.{os.getpid()}.partial")
        sequences = [np.frombuffer(key, np.int32) for key in self._rows]
        stored = {
            "sequences": torch.from_numpy(np.concatenate(sequences)),
            "lengths": torch.tensor([len(sequence) for sequence in sequences]),
            "vectors": self._table.contiguous(),
        }
        save_file(stored, beside)
        os.replace(beside, self._cache_file)


def _batches_of_one_length(positions: list[int], sequences: list[list[int]]) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for position in positions:
        by_length.setdefault(len(sequences[position]), []).append(position)
    for length, members in sorted(by_length.items()):
        size = max(1, _TOKENS_PER_BATCH // length)
        yield from (members[start : start + size] for start in range(0, len(members), size))


def _key(sequence: Sequence[int]) -> bytes:
    return np.asarray(sequence, np.int32).tobytes()


def _tokenizer_text(tokenizer: Any) -> str:
    """All that a tokenizer does, as text; what it was last asked to truncate or pad is left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        settings = json.loads(backend.to_str())
        return json.dumps(settings | {"truncation": None, "padding": None}, sort_keys=True)
    if tokenizer is None:
        return ""
    return json.dumps([type(tokenizer).__name__, tokenizer.get_vocab(), repr(tokenizer)], sort_keys=True)


def _is_transformers_model(source: Any) -> bool:
    if not isinstance(source, nn.Module):
        return False
    from transformers import PreTrainedModel  # the longest of all imports, and methods without an encoder need it not

    return isinstance(source, PreTrainedModel)


def _tokenizer_of(encoder: Any) -> Any:
    name = encoder.config._name_or_path
    if not name:
        raise ValueError("this encoder was not loaded from a checkpoint: give a pair (encoder, tokenizer)")
    return AutoTokenizer.from_pretrained(name)


def _sentence_transformer(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError("to load an encoder by its name, install sentence-transformers") from error
    if name.startswith((".", os.sep)) and not Path(name).exists():
        raise FileNotFoundError(f"there is no folder {name} of an encoder for auxiliary vectors")
    try:
        return SentenceTransformer(name)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"no encoder for auxiliary vectors can be read from {name!r}: {error}") from error


@contextmanager
def _evaluation_mode(encoder: nn.Module) -> Iterator[None]:
    in_training = [module for module in encoder.modules() if module.training]
    encoder.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


@contextmanager
def _linear_layers_by_onednn(encoder: nn.Module) -> Iterator[None]:
    """float32 layers on a CPU are computed by the function of oneDNN that Inductor's code calls: the library behind
    `linear` takes twice as long on some processors, and there is no public choice between them."""
    layers = []
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for layer in encoder.modules():
            if type(layer) is nn.Linear and layer.weight.dtype is torch.float32 and layer.weight.device.type == "cpu":
                if "forward" not in vars(layer):  # nobody else has replaced it
                    layers.append(layer)
    for layer in layers:
        layer.forward = partial(_onednn_linear, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _onednn_linear(layer: nn.Linear, rows: Tensor) -> Tensor:
    if rows.dtype is not torch.float32:  # under autocast
        return nn.functional.linear(rows, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise.default(rows, layer.weight, layer.bias, "none", [], "")


# --- tables -----------------------------------------------------------------------------------------------------------


def _as_table(table: Any) -> Tensor:
    """`(n, dim)` float32."""
    if torch.is_tensor(table):
        table = table.detach().to("cpu", torch.float32)
    else:
        try:
            table = torch.as_tensor(np.asarray([np.asarray(row, np.float32) for row in table], np.float32))
        except ValueError as error:
            raise ValueError(f"auxiliary vectors must be numbers, and all of one length: {error}") from error
    if table.dim() != 2:
        raise ValueError(f"expected a table of auxiliary vectors (n, dim), found the shape {tuple(table.shape)}")
    broken = (~table.isfinite().all(1)).nonzero()[:, 0]
    if len(broken):
        raise ValueError(f"auxiliary vector {int(broken[0])} holds NaN or infinite components")
    return table


def _stored_table(table_path: Path, strings_path: Path) -> VectorTable:
    try:
        tensors = load_file(table_path)
    except SafetensorError as error:
        raise ValueError(f"{table_path} is damaged or truncated ({error})") from error
    if len(tensors) != 1:
        raise ValueError(f"expected one tensor in {table_path}, found {sorted(tensors)}")
    try:
        strings = json.loads(strings_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected a JSON list of strings in {strings_path}: {error}") from error
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise ValueError(f"expected a JSON list of strings in {strings_path}")
    return VectorTable(next(iter(tensors.values())), strings)


def _strings_beside(table_path: Path) -> Path:
    if not table_path.is_file():
        raise FileNotFoundError(f"there is no file {table_path} of auxiliary vectors")
    beside = [table_path.with_suffix(".json"), table_path.with_name(f"{table_path.stem}_strings.json")]
    for path in beside:
        if path.exists():
            return path
    raise FileNotFoundError(f"the strings of {table_path} are in neither of {', '.join(map(str, beside))}")
