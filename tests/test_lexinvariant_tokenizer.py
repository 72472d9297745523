"""The tokenizer of 128 characters: ids are ASCII codes, and every ASCII text comes back to the letter."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rarezoo.configs import load_preset
from rarezoo.lexinvariant.character_tokenizer import EOS_TOKEN, PAD_TOKEN, character_tokenizer

ALL = "".join(map(chr, range(128)))


@pytest.fixture(scope="module", params=["made", "loaded"])
def tokenizer(request, tmp_path_factory):
    made = character_tokenizer()
    if request.param == "made":
        return made
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_ids_are_codes(tokenizer):
    assert tokenizer.is_fast and len(tokenizer) == 130
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (128, 129)
    assert tokenizer(ALL).input_ids == list(range(128))
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    assert len(tokenizer) == load_preset("lexinvariant", "150m-character").vocab_size


def test_every_ascii_text_comes_back(tokenizer):
    """Runs of spaces, leading and trailing ones, line ends of all kinds, and what looks like a special token."""
    generator = random.Random(0)
    pieces = [*ALL, "  ", "\n\n", "\r\n", "\t", " 's", " n't", " .", " ,", "<pad>", "</s>", "[MASK]"]
    texts = ["", " ", "  leading", "trailing  ", " don't , I 'm . yes !", "def f(x):\n\treturn x\n", ALL]
    texts += ["".join(generator.choices(pieces, k=generator.randrange(60))) for _ in range(300)]
    encoded = tokenizer(texts, padding=True)
    for text, ids in zip(texts, encoded.input_ids):
        assert tokenizer(text).input_ids == list(text.encode("ascii"))
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_other_characters_are_dropped(tokenizer):
    assert tokenizer("é naïve 中 café\u00a0\U0001f600!").input_ids == list(b" nave  caf!")


def test_specials_have_names_that_no_ascii_text_contains(tokenizer):
    assert not (PAD_TOKEN + EOS_TOKEN).isascii()
    assert tokenizer.decode([128, 97, 129]) == f"{PAD_TOKEN}a{EOS_TOKEN}"
    assert tokenizer(f"a{EOS_TOKEN}").input_ids == [97, 129]


def test_padding_is_on_the_left(tokenizer):
    batch = tokenizer(["abc", "a"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[97, 98, 99], [128, 128, 97]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_offsets(tokenizer):
    found = tokenizer("aé\nb", return_offsets_mapping=True)
    assert found.offset_mapping == [(0, 1), (2, 3), (3, 4)]


def test_beside_a_checkpoint_without_the_plugin(tmp_path, run_without_rarezoo):
    """Model and tokenizer from one folder, by their AutoClasses, with and without rarezoo: the same text."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(load_preset("lexinvariant", "tiny")).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    code = f"""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
    inputs = tokenizer(["A->2\\nB->3\\nA->", " x"], return_tensors="pt", padding=True)
    found = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8)
    print([list(text.encode()) for text in tokenizer.batch_decode(found, skip_special_tokens=True)])
    """
    said = run_without_rarezoo(code).splitlines()[-1]
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = tokenizer(["A->2\nB->3\nA->", " x"], return_tensors="pt", padding=True)
    found = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8)
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    assert said == str([list(text.encode()) for text in texts])
    assert texts[0].startswith("A->2\nB->3\nA->")


def test_any_other_tokenizer_will_do(fixture_folder):
    """One of another family: only the number of symbols has to be large enough."""
    other = AutoTokenizer.from_pretrained(fixture_folder)
    config = load_preset("lexinvariant", "tiny", vocab_size=len(other), pad_token_id=0, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    inputs = other(["the cat sat", "what is the capital of france?"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
