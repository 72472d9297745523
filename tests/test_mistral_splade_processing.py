"""Mistral-SPLADE's processor: ids and masks of the official echo parser, truncation, padding, storage, clear errors."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from rarezoo import MistralSpladeProcessor

KINDS = {"query": "queries", "document": "documents", "negative": "negatives"}


@pytest.fixture(scope="module")
def processor(tokenizer, inputs):
    return MistralSpladeProcessor(
        tokenizer,
        query_template=inputs["templates"]["query"],
        document_template=inputs["templates"]["document"],
        prompt=inputs["prompt"],
        max_query_length=inputs["max_length"],
        max_document_length=inputs["max_length"],
    )


@pytest.fixture(scope="module")
def echo(fixture_folder):
    return load_file(fixture_folder / "echo.safetensors")


def tokens(processor, batch, row=0, only_pooled=False):
    kept = batch["pool_mask" if only_pooled else "attention_mask"][row].bool()
    return processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][row][kept].tolist())


def assert_same(batch, expected):
    assert list(batch) == list(expected)
    for name in expected:
        assert batch[name].dtype == torch.int64
        assert torch.equal(batch[name], expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_ids_and_masks_of_the_official_parser(processor, inputs, echo, kind, padding_side):
    process = processor.process_queries if kind == "query" else processor.process_documents
    ending = "_left" if padding_side == "left" else ""
    names = {"input_ids": "input_ids", "attention_mask": "attention_mask", "pool_mask": "embed_mask"}
    expected = {name: echo[f"{kind}.{stored}{ending}"] for name, stored in names.items()}
    assert_same(process(inputs[KINDS[kind]], padding_side=padding_side), expected)


def test_default_templates_are_the_official_ones(tokenizer, processor, inputs):
    default = MistralSpladeProcessor(tokenizer)
    assert {"query": default.query_template, "document": default.document_template} == inputs["templates"]
    for name in ("queries", "documents"):
        process = f"process_{name}"
        assert_same(getattr(default, process)(inputs[name]), getattr(processor, process)(inputs[name]))


def test_plain_mode_reads_the_text_once_after_one_start_token(tokenizer, inputs, fixture_folder):
    plain = load_file(fixture_folder / "plain.safetensors")
    for mode in ("plain", "bidirectional"):
        processor = MistralSpladeProcessor(tokenizer, attention_mode=mode)
        for side in ("right", "left"):
            for process in (processor.process_queries, processor.process_documents):
                batch = process(inputs["plain_texts"], padding_side=side)
                mask = plain[f"attention_mask_{side}"]
                ids = plain[f"input_ids_{side}"]
                assert_same(batch, {"input_ids": ids, "attention_mask": mask, "pool_mask": mask})


def test_repeat_mode_doubles_the_ids(tokenizer, inputs, echo):
    ids, mask = echo["repeat.input_ids"], echo["repeat.attention_mask"]
    processor = MistralSpladeProcessor(tokenizer, attention_mode="repeat", pad_between_copies=True)
    batch = processor(inputs["documents"])
    assert torch.equal(batch["input_ids"], ids.repeat(1, 2))
    assert torch.equal(batch["attention_mask"], mask.repeat(1, 2))
    assert torch.equal(batch["pool_mask"], torch.cat([torch.zeros_like(mask), mask], dim=1))
    assert torch.equal(batch["position_ids"], torch.arange(48).expand(3, 48))

    packed = MistralSpladeProcessor(tokenizer, attention_mode="repeat")(inputs["documents"])
    for row in range(3):
        copy = ids[row][mask[row].bool()].tolist()
        assert packed["input_ids"][row][packed["attention_mask"][row].bool()].tolist() == copy * 2
        assert packed["pool_mask"][row].nonzero().flatten().tolist() == list(range(len(copy), 2 * len(copy)))


def test_padding_between_copies_follows_the_template(tokenizer):
    """The second copy begins with the first pooled piece; what the template does not pool is not pooled."""
    template = "<s>again and again {!%%text%%}:{%%text%%}\n{</s>}"
    processor = MistralSpladeProcessor(
        tokenizer, attention_mode="repeat", document_template=template, pad_between_copies=True
    )
    texts = ["the cat", "the capital of france is paris"]
    batch, packed = processor(texts), MistralSpladeProcessor(tokenizer, document_template=template)(texts)
    for row, text in enumerate(texts):
        copy = tokenizer.tokenize(text)
        assert tokens(processor, batch, row) == tokens(processor, packed, row)
        assert tokens(processor, batch, row, only_pooled=True) == [*copy, "</s>"]
    second = [mask.nonzero()[0].item() for mask in batch["pool_mask"]]
    with pytest.raises(ValueError, match="pads each copy on the right; found padding_side='left'"):
        processor.process_documents(texts, padding_side="left")
    assert second[0] == second[1] and batch["attention_mask"][0, second[0] - 1] == 0


def test_pieces_are_tokenized_separately(processor, inputs, echo):
    """The joined string gives other ids: the pieces' own word-start marks are missing. And one <s>, not two."""
    for row, text in enumerate(inputs["documents"]):
        official = echo["document.input_ids"][row][echo["document.attention_mask"][row].bool()].tolist()
        joined = f"<s>Document:{text}\nDocument again:{text}</s>"
        assert processor.tokenizer(joined, add_special_tokens=False)["input_ids"] != official
        assert official.count(processor.tokenizer.bos_token_id) == 1
        assert official.count(processor.tokenizer.eos_token_id) == 1


def test_second_copy_and_end_are_pooled_and_nothing_else(processor, inputs):
    query, document = inputs["queries"][0], inputs["documents"][0]
    for batch, text in (
        (processor.process_queries([query]), query),
        (processor.process_documents([document]), document),
    ):
        copy = processor.tokenizer.tokenize(text)
        assert tokens(processor, batch, only_pooled=True) == [*copy, "</s>"]
        assert tokens(processor, batch)[-len(copy) - 1 :] == [*copy, "</s>"]
        assert batch["pool_mask"][0, : -len(copy) - 1].sum() == 0


@pytest.mark.parametrize("length", [1, 3, 7])
def test_every_piece_is_cut_by_itself(tokenizer, length):
    """Both copies of a long text keep the same first tokens, and </s> survives."""
    processor = MistralSpladeProcessor(tokenizer, max_query_length=length, max_document_length=length + 1)
    text = "the capital of france is paris " * 30
    for batch, kept in ((processor.process_queries([text]), length), (processor.process_documents([text]), length + 1)):
        copy = processor.tokenizer.tokenize(text)[:kept]
        assert tokens(processor, batch, only_pooled=True) == [*copy, "</s>"]
        row = tokens(processor, batch)
        starts = [i for i in range(len(row)) if row[i : i + kept] == copy]
        assert len(starts) >= 2 and row[-1] == "</s>" and row[0] == "<s>"
    # The prompt is a piece too, cut to the query's limit with its comma; so are the literals.
    literals = [tokenizer.tokenize(piece)[:length] for piece in ("<s>Instruct:", "\nQuery:", "\nQuery again:")]
    prompt = tokenizer.tokenize("Retrieve passages that answer the question,")[:length]
    copy = tokenizer.tokenize(text)[:length]
    expected = [*literals[0], *prompt, *literals[1], *copy, *literals[2], *copy, "</s>"]
    assert tokens(processor, processor.process_queries([text])) == expected


def test_prompt(processor, inputs):
    query = inputs["queries"][:1]
    stored, given = processor.process_queries(query), processor.process_queries(query, prompt="find")
    assert "".join(tokens(processor, given)).replace("▁", " ").startswith("<s> Instruct: find,")
    assert_same(processor.process_queries(query, prompt=inputs["prompt"]), stored)
    empty = processor.process_queries(query, prompt="")
    assert "".join(tokens(processor, empty)).replace("▁", " ").startswith("<s> Instruct: , ")
    assert tokens(processor, given, only_pooled=True) == tokens(processor, stored, only_pooled=True)


def test_mixed_kinds_in_one_batch(processor, inputs):
    query, document = inputs["queries"][0], inputs["documents"][1]
    batch = processor.process([("query", {"text": query}), ("document", {"text": document}), ("query", {"text": "x"})])
    alone = [
        processor.process_queries([query]),
        processor.process_documents([document]),
        processor.process_queries(["x"]),
    ]
    for row, expected in enumerate(alone):
        length = expected["input_ids"].shape[1]
        for name in expected:
            assert torch.equal(batch[name][row, :length], expected[name][0])
            assert batch[name][row, length:].eq(0).all()


def test_one_text_or_several(processor):
    assert_same(processor("a cat"), processor.process_documents(["a cat"]))
    assert_same(processor("a cat", kind="query"), processor.process_queries("a cat"))
    assert_same(processor(("a cat", "a dog"), kind="query"), processor.process_queries(["a cat", "a dog"]))


@pytest.mark.parametrize(
    "text", ["%%prompt%% %%text%%", "{!not a piece} }{", "</s> <s>", "a<s>b", "<unk>", "\\1 \\g<0>", "{</s>}"]
)
def test_a_text_is_data(processor, text):
    """Markers of the template language and special tokens inside a text are plain characters, in both copies."""
    for batch in (processor.process_documents([text]), processor.process_queries([text])):
        copy = processor.tokenizer.tokenize(text, split_special_tokens=True)
        assert tokens(processor, batch, only_pooled=True) == [*copy, "</s>"]
        row = tokens(processor, batch)
        assert row.count("<s>") == 1 and row.count("</s>") == 1
        assert len([i for i in range(len(row)) if row[i : i + len(copy)] == copy]) == 2


def test_special_tokens_beside_a_text_are_the_templates(tokenizer):
    processor = MistralSpladeProcessor(tokenizer, document_template="{<s>%%text%%</s>}")
    row = tokens(processor, processor("a cat"))
    assert row[0] == "<s>" and row[-1] == "</s>" and "".join(row[1:-1]).replace("▁", " ").strip() == "a cat"
    # The tokenizer itself is as before for everybody else.
    assert tokenizer.tokenize("</s>") == ["</s>"]


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (
            {"bos_token": "[BOS]", "eos_token": "[EOS]"},
            ["[BOS]", "Document", ":", "a", "Document", "again", ":", "a", "[EOS]"],
        ),
        ({"eos_token": "[EOS]"}, ["Document", ":", "a", "Document", "again", ":", "a", "[EOS]"]),
    ],
)
def test_start_and_end_tokens_of_other_names(special, expected, tmp_path):
    """Else "<s>" would be read as three characters, and the text would have no start token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "[BOS]", "[EOS]", "Document", "again", ":", "a"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)
    MistralSpladeProcessor(foreign).save_pretrained(tmp_path)
    for processor in (MistralSpladeProcessor(foreign), MistralSpladeProcessor.from_pretrained(tmp_path)):
        batch = processor.process_documents("a")
        assert tokens(processor, batch) == expected
        assert tokens(processor, batch, only_pooled=True) == ["a", "[EOS]"]


def test_half_a_surrogate_pair_is_named(processor):
    with pytest.raises(ValueError, match=r"text of a document holds half of a surrogate pair: 'a \\ud83d b'"):
        processor.process_documents("a \ud83d b")


def test_options_that_callers_of_tokenizers_give(processor):
    batch = processor("a text", padding=True, truncation=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], processor.process_documents("a text")["input_ids"])
    with pytest.raises(ValueError, match="return_tensors must be 'pt'; found 'np'"):
        processor("a text", return_tensors="np")


def test_empty_text_keeps_the_templates_tokens(processor):
    """Nothing of the text, the template's end token pooled; in a batch as alone."""
    alone = processor.process_documents([""])
    assert tokens(processor, alone, only_pooled=True) == ["</s>"]
    expected = [
        token for piece in ("<s>Document:", "\nDocument again:") for token in processor.tokenizer.tokenize(piece)
    ]
    assert tokens(processor, alone) == [*expected, "</s>"]
    batch = processor.process_documents(["a cat on the mat", ""])
    assert tokens(processor, batch, row=1) == tokens(processor, alone)


def test_template_without_tokens_for_an_empty_text(tokenizer):
    processor = MistralSpladeProcessor(tokenizer, document_template="{%%text%%}")
    batch = processor(["", ""])
    assert batch["input_ids"].shape == (2, 1)
    assert batch["attention_mask"].sum() == 0 and batch["pool_mask"].sum() == 0


def test_template_that_pools_nothing(tokenizer):
    batch = MistralSpladeProcessor(tokenizer, document_template="<s>{!%%text%%}")(["a cat"])
    assert batch["attention_mask"].all() and batch["pool_mask"].sum() == 0


@pytest.mark.parametrize(
    "text", ["naïve café", "東京は日本の首都です", "🙂🙃", "\u0000\u200b\ufeff", "e\u0301", "\n\n\t  "]
)
def test_any_characters(processor, text):
    batch = processor.process_documents([text, "a cat"])
    copy = processor.tokenizer.tokenize(text)
    assert copy and tokens(processor, batch, only_pooled=True) == [*copy, "</s>"]
    assert 0 <= batch["input_ids"].min() and batch["input_ids"].max() < len(processor.tokenizer)


def test_long_text(processor):
    """Ten thousand tokens and more: cut silently to the limit, twice, without a warning about model_max_length."""
    text = "jupiter is the largest planet " * 3000
    assert len(processor.tokenizer.tokenize(text)) > 10_000
    batch = processor.process_documents([text])
    assert int(batch["pool_mask"].sum()) == 301
    literals = len(processor.tokenizer.tokenize("<s>Document:")) + len(
        processor.tokenizer.tokenize("\nDocument again:")
    )
    assert batch["input_ids"].shape == (1, literals + 2 * 300 + 1)


def test_everything_is_stored(tokenizer, tmp_path):
    """A processor with nothing left at its default comes back whole: same fields, same ids."""
    processor = MistralSpladeProcessor(
        tokenizer,
        attention_mode="repeat",
        query_template="<s>Q {!%%prompt%%}{!%%text%%}\n{<s>}{%%text%%}",
        document_template="<s>“D”{!%%text%%}{<s>}{%%text%%}{</s>}",
        prompt="Trouve {tout}",
        max_query_length=5,
        max_document_length=9,
        pad_between_copies=True,
    )
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))
    for loaded in (MistralSpladeProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is MistralSpladeProcessor
        for field in ("attention_mode", "query_template", "document_template", "prompt", "max_query_length",
                      "max_document_length", "pad_between_copies"):  # fmt: skip
            assert getattr(loaded, field) == getattr(processor, field) == stored[field]
        texts = ["the capital of france is paris", "x", ""]
        assert_same(loaded.process_documents(texts), processor.process_documents(texts))
        assert_same(loaded.process_queries(texts), processor.process_queries(texts))


def test_stored_beside_the_model(splade_checkpoint, inputs, echo):
    """What the checkpoint holds prepares the reference ids, through every way to open it."""
    for loaded in (
        AutoProcessor.from_pretrained(splade_checkpoint),
        MistralSpladeProcessor.from_pretrained(splade_checkpoint),
    ):
        batch = loaded.process_queries(inputs["queries"])
        assert torch.equal(batch["input_ids"], echo["query.input_ids"])
        assert torch.equal(batch["pool_mask"], echo["query.embed_mask"])


def test_padding_token(fixture_folder):
    """The padding token, else the unknown token, else a clear error."""
    tokenizer = AutoTokenizer.from_pretrained(fixture_folder)
    texts = ["a cat", "a cat on the mat"]
    tokenizer.pad_token = "</s>"
    padded = MistralSpladeProcessor(tokenizer)(texts)
    assert set(padded["input_ids"][padded["attention_mask"] == 0].tolist()) == {tokenizer.eos_token_id}
    tokenizer.pad_token = None
    padded = MistralSpladeProcessor(tokenizer)(texts)
    assert set(padded["input_ids"][padded["attention_mask"] == 0].tolist()) == {tokenizer.unk_token_id}
    tokenizer.unk_token = None
    with pytest.raises(ValueError, match=r"neither a padding nor an unknown token; set tokenizer\.pad_token"):
        MistralSpladeProcessor(tokenizer)(texts)


def test_names_of_tokens(processor):
    assert processor.token(1) == "<s>"
    assert [processor.token(i) for i in range(160)] == processor.tokenizer.convert_ids_to_tokens(list(range(160)))
    assert processor.token(160) == "<id 160>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{%%text%%", "unmatched brace"),
        ("%%text%%}", "unmatched brace"),
        ("{{%%text%%}}", "unmatched brace"),
        ("{%%text%%}{}", "empty piece"),
        ("", "must contain %%text%% inside braces"),
        ("<s>%%text%%{</s>}", "must contain %%text%% inside braces"),
        ("{%%title%%}{%%text%%}", "found title in"),
        (7, "must be a string; found 7"),
    ],
)
@pytest.mark.parametrize("kind", ["query", "document"])
def test_wrong_templates_are_refused(tokenizer, kind, template, message):
    with pytest.raises(ValueError, match=f"the {kind} template .*{message}"):
        MistralSpladeProcessor(tokenizer, **{f"{kind}_template": template})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(attention_mode="both"), "attention_mode must be one of echo, plain, bidirectional, repeat; found 'both'"),
        (dict(pad_between_copies=True), "pad_between_copies needs attention_mode='repeat'; found 'echo'"),
        (dict(max_query_length=0), "max_query_length must be a whole number of at least 1; found 0"),
        (dict(max_document_length=2.5), "max_document_length must be a whole number of at least 1; found 2.5"),
    ],
)
def test_wrong_settings_are_refused(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        MistralSpladeProcessor(tokenizer, **arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p.process_documents([]), ValueError, "expected at least one text; found none"),
        (
            lambda p: p.process_documents(["a", None]),
            TypeError,
            "the text of a document must be a string; found NoneType",
        ),
        (lambda p: p.process_queries([b"a"]), TypeError, "the text of a query must be a string; found bytes"),
        (lambda p: p.process_queries(["a"], prompt=3), TypeError, "the prompt of a query must be a string; found int"),
        (lambda p: p.process_queries(["a"], padding_side="top"), ValueError, "padding_side must be 'right' or 'left'"),
        (
            lambda p: p.process([("passage", {"text": "a"})]),
            ValueError,
            "kind must be 'query' or 'document'; found 'pa",
        ),
        (lambda p: p("a", kind="passage"), ValueError, "kind must be 'query' or 'document'; found 'passage'"),
        (lambda p: p.process([("document", {"title": "a"})]), ValueError, "a document needs a value for 'text'; found"),
    ],
)
def test_wrong_inputs_are_refused(processor, call, error, message):
    with pytest.raises(error, match=message):
        call(processor)


def test_threads_share_a_processor(tokenizer):
    """Templates hold special tokens, texts are read as plain characters, whatever other threads do at that moment."""
    processor = MistralSpladeProcessor(tokenizer)
    texts = [f"a </s> cat number {number}" for number in range(4)]
    expected = {text: processor.process_queries([text])["input_ids"].tolist() for text in texts}
    wrong = []

    def process(text):
        for _ in range(150):
            if processor.process_queries([text])["input_ids"].tolist() != expected[text]:
                wrong.append(text)

    threads = [threading.Thread(target=process, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
