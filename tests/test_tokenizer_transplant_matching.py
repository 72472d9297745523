"""Which tokens of two vocabularies are the same: every pair of schemes, special tokens, holes, trimmed vocabularies.

The tokenizers are trained here. What a token stands for is established independently of our code: by what the
tokenizer decodes it to after another token.
"""

import argparse
import inspect
import itertools
import json
import tarfile
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rarezoo.tokenizer_transplant import (
    SourceKind,
    Vocabulary,
    match_vocabularies,
    plan_transplant,
    transplant_tokenizer,
    trim_tokenizer,
)

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizer_transplant"
SPECIALS = ["<s>", "</s>", "<unk>", "<pad>"]
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TEXTS = [
    *inspect.getsource(argparse).split("\n"),
    *inspect.getsource(tarfile).split("\n"),
    "Über die Brücke fährt ein Zug nach Köln, größer als je zuvor. " * 3,
    "यह एक छोटा वाक्य है। यह हिन्दी में है। " * 3,
    "これは短い文です。東京は大きい。 " * 3,
    "emoji 🙂🙂 and arrows → ⇒",
]


def wrapped(tokenizer, **roles):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **{**ROLES, **roles})


def byte_level(size=900):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return wrapped(tokenizer)


def metaspace(size=1100):
    """Llama's kind: `▁` in front and for spaces, `<0xNN>` for what is not in the vocabulary."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=[^▁])(?=▁)"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    settings = json.loads(tokenizer.to_str())
    settings["added_tokens"] = settings["added_tokens"][: len(SPECIALS)]
    settings["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer)


def unigram(size=700):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return wrapped(tokenizer)


def wordpiece(size=900):
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return wrapped(tokenizer)


def copied(tokenizer, **roles):
    return wrapped(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), **roles)


SCHEMES = {"byte_level": byte_level, "metaspace": metaspace, "unigram": unigram, "wordpiece": wordpiece}


@pytest.fixture(scope="module")
def trained():
    return {name: build() for name, build in SCHEMES.items()}


@pytest.fixture(scope="module")
def vocabularies(trained):
    return {name: Vocabulary(tokenizer) for name, tokenizer in trained.items()}


def decoded_in_context(tokenizer):
    """id -> what the token adds to the text when it is decoded after another token; no special or partial tokens."""
    backend = tokenizer.backend_tokenizer
    anchor = next(i for token, i in sorted(tokenizer.get_vocab().items()) if token in ("x", "▁x"))
    before = backend.decode([anchor], skip_special_tokens=False)
    found = {}
    for token, token_id in tokenizer.get_vocab().items():
        text = backend.decode([anchor, token_id], skip_special_tokens=False)
        if token not in SPECIALS and "\ufffd" not in text:
            assert text.startswith(before)
            found[token_id] = text[len(before) :]
    return found


# --- what tokens stand for --------------------------------------------------------------------------------------------


def test_schemes_are_read_from_the_serialised_tokenizer(vocabularies):
    found = {name: vocabulary.scheme for name, vocabulary in vocabularies.items()}
    assert found == {
        "byte_level": "byte_level",
        "metaspace": "metaspace",
        "unigram": "metaspace",
        "wordpiece": "wordpiece",
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_what_is_decoded(scheme, trained, vocabularies):
    decoded = decoded_in_context(trained[scheme])
    assert len(decoded) > 400
    for token_id, text in decoded.items():
        assert vocabularies[scheme].token_bytes[token_id] == text.encode(), vocabularies[scheme].tokens[token_id]


@pytest.mark.parametrize("scheme", ["byte_level", "metaspace"])
def test_parts_of_characters_keep_their_bytes(scheme, trained, vocabularies):
    ids = trained[scheme]("ᚠ", add_special_tokens=False)["input_ids"]
    joined = b"".join(vocabularies[scheme].token_bytes[token_id] for token_id in ids)
    assert joined.removeprefix(b" ") == "ᚠ".encode() and len(ids) >= 3


@pytest.mark.parametrize(("base", "new"), list(itertools.product(SCHEMES, SCHEMES)))
def test_byte_equal_tokens_are_matched(base, new, trained, vocabularies):
    matches = match_vocabularies(vocabularies[base], vocabularies[new], vocabularies[base].size)
    base_texts, new_texts = decoded_in_context(trained[base]), decoded_in_context(trained[new])
    known = set(base_texts.values())
    equal = [new_id for new_id, text in new_texts.items() if text and text in known]
    assert len(equal) > 200
    for new_id, base_id in enumerate(matches.base_ids.tolist()):
        if new_id in new_texts and base_id >= 0:
            assert base_texts[base_id] == new_texts[new_id]
    assert sum(int(matches.base_ids[new_id]) >= 0 for new_id in equal) >= 0.95 * len(equal)
    if base == new:
        assert matches.base_ids.tolist() == list(range(vocabularies[new].size))


def test_word_starts_of_different_schemes_are_one(trained, vocabularies):
    for base, new, base_token, new_token in (
        ("byte_level", "metaspace", "Ġself", "▁self"),
        ("metaspace", "byte_level", "▁self", "Ġself"),
        ("byte_level", "wordpiece", "Ġself", "self"),
        ("wordpiece", "unigram", "the", "▁the"),
        ("byte_level", "metaspace", "ing", "ing"),
        ("wordpiece", "byte_level", "##ing", "ing"),
    ):
        base_id, new_id = trained[base].get_vocab()[base_token], trained[new].get_vocab()[new_token]
        for rule in ("bytes", "canonical"):
            found = match_vocabularies(vocabularies[base], vocabularies[new], 10_000, rule=rule)
            assert int(found.base_ids[new_id]) == base_id, (rule, base_token, new_token)


def test_bytes_are_matched_to_byte_tokens(trained, vocabularies):
    found = match_vocabularies(vocabularies["metaspace"], vocabularies["byte_level"], 10_000)
    for byte in (0x00, 0xC3, 0xE0, 0xFF):
        new_id = trained["byte_level"].convert_tokens_to_ids(
            next(
                t
                for t, raw in zip(vocabularies["byte_level"].tokens, vocabularies["byte_level"].token_bytes)
                if raw == bytes([byte])
            )
        )
        assert int(found.base_ids[new_id]) == trained["metaspace"].convert_tokens_to_ids(f"<0x{byte:02X}>")
    # "e" is a real token, and <0x65> its hardly trained double.
    new_id = trained["byte_level"].convert_tokens_to_ids("e")
    assert int(found.base_ids[new_id]) == trained["metaspace"].convert_tokens_to_ids("e")


@pytest.mark.parametrize(("base", "new"), list(itertools.product(SCHEMES, SCHEMES)))
def test_pieces_join_to_the_token(base, new, vocabularies):
    rows = vocabularies[base].size - 50  # the last tokens have no row
    raw = [vocabularies[new].token_bytes[token_id] for token_id in vocabularies[new].used_ids]
    pieces = vocabularies[base].pieces(raw, rows)
    for expected, ids in zip(raw, pieces):
        if ids:
            assert b"".join(vocabularies[base].token_bytes[token_id] for token_id in ids) == expected
            assert max(ids) < rows and not set(ids) & vocabularies[base].special_ids
    if base in ("byte_level", "metaspace"):
        assert all(pieces), "bytes can spell everything"
    else:
        assert sum(map(bool, pieces)) > 0.6 * len(pieces)


def test_words_are_cut_with_their_space(trained, vocabularies):
    """`decode` drops the space of a word's start in sentencepiece, and encoding a piece adds one."""
    new, base = vocabularies["metaspace"], vocabularies["byte_level"]
    tokens = [token for token in ("▁argument", "argument", "ument") if token in trained["metaspace"].get_vocab()]
    assert tokens
    for token in tokens:
        text = token.replace("▁", " ")
        assert base.pieces([text.encode()], base.size) == [trained["byte_level"].encode(text, add_special_tokens=False)]
    for text, first in ((" selfish", "▁self"), ("selfish", "self")):
        pieces = new.pieces([text.encode()], new.size)[0]
        assert b"".join(new.token_bytes[token_id] for token_id in pieces) == text.encode()
        assert new.tokens[pieces[0]][0] == first[0]


def test_fewest_pieces(vocabularies):
    wordpiece = vocabularies["wordpiece"]
    pieces = wordpiece.pieces([b"ing", b" self self", b"\n", b""], wordpiece.size)
    assert [[wordpiece.tokens[i] for i in row] for row in pieces] == [["##ing"], ["self", "self"], [], []]


@pytest.mark.parametrize(("base", "new"), list(itertools.permutations(SCHEMES, 2)))
def test_every_pair_of_schemes_is_transplanted(base, new, trained):
    table = torch.randn(len(trained[base]), 8, generator=torch.Generator().manual_seed(0))
    matrix, report = plan_transplant(trained[base], trained[new], table, None, "retok")
    assert matrix.apply(table).isfinite().all()
    assert sum(report.counts.values()) == len(matrix) == len(trained[new])
    assert report.counts["copied"] > 200 and report.counts["special"] == 4


# --- rules of the peers -----------------------------------------------------------------------------------------------


def test_raw_and_normalized(trained, vocabularies):
    base, new = vocabularies["byte_level"], vocabularies["metaspace"]
    base_vocab, new_vocab = trained["byte_level"].get_vocab(), trained["metaspace"].get_vocab()
    raw = match_vocabularies(base, new, 10_000, rule="raw", compatibility="tokenadapt").base_ids.tolist()
    assert {i: j for i, j in enumerate(raw) if j >= 0} == {
        new_vocab[token]: base_vocab[token] for token in set(base_vocab) & set(new_vocab)
    }
    normalized = match_vocabularies(base, new, 10_000, rule="normalized").base_ids.tolist()
    assert normalized[new_vocab["▁self"]] == base_vocab["Ġself"] and raw[new_vocab["▁self"]] == -1
    # mergekit judges by the class, and takes an unknown one for byte-level.
    by_class = match_vocabularies(base, new, 10_000, rule="normalized", compatibility="mergekit").base_ids.tolist()
    assert by_class[new_vocab["▁self"]] == -1


def test_canonical_takes_the_highest_id_only_for_deepfocus(vocabularies):
    vocabulary = vocabularies["byte_level"]
    spaces = [i for i, raw in enumerate(vocabulary.token_bytes) if raw and not raw.strip(b" ")]
    assert len(spaces) > 1
    for compatibility, expected in ((None, min(spaces)), ("focus", max(spaces))):
        found = match_vocabularies(vocabulary, vocabulary, 10_000, rule="canonical", compatibility=compatibility)
        assert {int(found.base_ids[i]) for i in spaces} == {expected}


def test_fuzzy_ignores_mark_and_case_after_exact_matches(vocabularies, trained):
    vocabulary = vocabularies["byte_level"]
    extended = copied(trained["byte_level"])
    extended.add_tokens([" SELF"])
    new = Vocabulary(extended)
    new_id = new.size - 1
    exact = match_vocabularies(vocabulary, new, 10_000, rule="canonical", compatibility="focus")
    fuzzy = match_vocabularies(vocabulary, new, 10_000, rule="canonical_fuzzy", compatibility="focus")
    assert int(exact.base_ids[new_id]) == -1
    assert vocabulary.texts[int(fuzzy.base_ids[new_id])].strip().lower() == "self"
    both = exact.base_ids >= 0
    assert torch.equal(fuzzy.base_ids[both], exact.base_ids[both])


# --- special tokens, holes, missing rows ------------------------------------------------------------------------------


def renamed(tokenizer, **roles):
    """The tokenizer with other names for its special tokens."""
    names = {"<s>": "[CLS]", "</s>": "[SEP]", "<unk>": "[UNK]", "<pad>": "[PAD]"}
    text = tokenizer.backend_tokenizer.to_str()
    for old, new in names.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **roles)


def test_special_tokens_by_role(trained):
    new = renamed(trained["metaspace"], cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]")
    base = trained["byte_level"]
    table = torch.randn(len(base), 4)
    matrix, report = plan_transplant(base, new, table, None, "retok")
    rows = {row["token"]: row for row in report.rows()}
    for token, expected in (("[CLS]", "<s>"), ("[SEP]", "</s>"), ("[UNK]", "<unk>"), ("[PAD]", "<pad>")):
        assert rows[token]["source"] == "special" and rows[token]["base_tokens"] == [expected]
    chosen, _ = plan_transplant(base, new, table, None, "retok", special_map={"[PAD]": "</s>", "▁self": "e"})
    vocab, base_vocab = new.get_vocab(), base.get_vocab()
    assert torch.equal(chosen.apply(table)[vocab["[PAD]"]], table[base_vocab["</s>"]])
    assert torch.equal(chosen.apply(table)[vocab["▁self"]], table[base_vocab["e"]])
    assert torch.equal(matrix.apply(table)[vocab["[CLS]"]], table[base_vocab["<s>"]])


def test_the_most_important_role_wins(trained):
    new = renamed(trained["metaspace"], bos_token="[CLS]", eos_token="[CLS]", pad_token="[CLS]")
    found = match_vocabularies(Vocabulary(trained["byte_level"]), Vocabulary(new), 10_000)
    assert int(found.base_ids[new.bos_token_id]) == trained["byte_level"].bos_token_id


def test_a_special_token_is_no_word(trained):
    base, new = trained["byte_level"], copied(trained["byte_level"])
    new.add_special_tokens({"additional_special_tokens": ["Ġself"]})
    found = match_vocabularies(Vocabulary(base), Vocabulary(new), 10_000)
    assert base.get_vocab()["Ġself"] == new.get_vocab()["Ġself"]
    assert int(found.base_ids[new.get_vocab()["Ġself"]]) == -1


def holey_tokenizer():
    vocabulary = {"a": 0, "b": 2, "c": 5, "<s>": 7}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(["added"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_holes_and_added_tokens():
    tokenizer = holey_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.size == max(tokenizer.get_vocab().values()) + 1 > len(tokenizer) - 1
    assert vocabulary.used_ids == sorted(tokenizer.get_vocab().values())
    table = torch.randn(11, 3)
    matrix, report = plan_transplant(tokenizer, tokenizer, table, None, "zero", pad_to_multiple_of=7)
    rows = list(report.rows())
    assert len(matrix) == 14
    for new_id in range(14):
        used = new_id in vocabulary.used_ids
        assert rows[new_id]["source"] == (
            "padding" if not used else "special" if rows[new_id]["token"] == "<s>" else "copied"
        )
        assert torch.equal(matrix.apply(table)[new_id], table[new_id] if used else torch.zeros(3))


def test_tokens_without_a_row_are_made():
    """The tokenizer knows ids that the table has not: they are no source of rows, and the report counts them."""
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "base_model")
    table = torch.randn(500, 3)
    matrix, report = plan_transplant(tokenizer, tokenizer, table, None, "retok")
    assert torch.equal(matrix.apply(table)[:500], table)
    assert set(matrix.kinds[500:].tolist()) == {SourceKind.COMBINED}
    assert report.notes["tokens that the base's tokenizer has but its tables have not"] == 60
    for row in report.rows():
        assert max(row["base_ids"]) < 500


def test_multiples():
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "base_model")
    for multiple, rows in ((1, 560), (16, 560), (64, 576), (128, 640)):
        matrix, _ = plan_transplant(
            tokenizer, tokenizer, torch.zeros(576, 2), pad_to_multiple_of=multiple, method="zero"
        )
        assert len(matrix) == rows and (matrix.kinds == SourceKind.PADDING).sum() == rows - 560


def test_slow_tokenizers_are_refused():
    with pytest.raises(TypeError, match="expected a fast tokenizer"):
        Vocabulary(object())


# --- extension and trimming -------------------------------------------------------------------------------------------


def tiny_llama(rows):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def test_extension_keeps_every_id(trained):
    base = trained["byte_level"]
    model = tiny_llama(len(base) + 9)  # rows beyond the tokenizer: new tokens take them over
    old = model.model.embed_tokens.weight.detach().clone()
    result = transplant_tokenizer(model, ["photosynthesis", " ribosome"], "retok", base_tokenizer=base)
    assert len(result.tokenizer) == len(base) + 2 == len(result.model.lm_head.weight)
    assert len(base) == len(trained["byte_level"]), "the given tokenizer stays as it was"
    new = result.model.model.embed_tokens.weight
    assert torch.equal(new[: len(base)], old[: len(base)])
    for number, text in enumerate(("photosynthesis", " ribosome")):
        pieces = base.encode(text, add_special_tokens=False)
        torch.testing.assert_close(new[len(base) + number], old[pieces].mean(0), atol=1e-7, rtol=0)
        assert result.tokenizer.encode(text, add_special_tokens=False) == [len(base) + number]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trimming(scheme, trained):
    base = trained[scheme]
    texts = ["Print the message to the given file.", "    def add_argument(self, *args, **kwargs):", "Über Köln"]
    trimmed = trim_tokenizer(base, iter(texts))
    assert len(trimmed) < 0.75 * len(base)
    for text in texts:
        assert base.convert_ids_to_tokens(base.encode(text)) == trimmed.convert_ids_to_tokens(trimmed.encode(text))
    assert trimmed.convert_ids_to_tokens(trimmed.all_special_ids) == base.convert_ids_to_tokens(base.all_special_ids)
    if scheme in ("byte_level", "metaspace"):
        assert trimmed.decode(trimmed.encode("quick ᚠ 🙂 jumps")).strip() == "quick ᚠ 🙂 jumps"
    model = tiny_llama(len(base))
    kept = torch.tensor(base.convert_tokens_to_ids(trimmed.convert_ids_to_tokens(range(len(trimmed)))))
    expected = model(base(texts[0], return_tensors="pt")["input_ids"]).logits[..., kept]
    result = transplant_tokenizer(model, trimmed, "zero", base_tokenizer=base)
    assert set(result.report.counts) == {"copied", "special"}
    assert torch.equal(result.model(result.tokenizer(texts[0], return_tensors="pt")["input_ids"]).logits, expected)


def test_trimming_renumbers_the_post_processor(trained):
    base = copied(trained["wordpiece"])
    base.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    ids = {token: base.convert_tokens_to_ids(token) for token in ("[CLS]", "[SEP]")}
    base.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=list(ids.items())
    )
    trimmed = trim_tokenizer(base, ["the message"])
    assert trimmed.convert_ids_to_tokens(trimmed.encode("the message")) == base.convert_ids_to_tokens(
        base.encode("the message")
    )
    assert trimmed.encode("the message")[0] != ids["[CLS]"]
