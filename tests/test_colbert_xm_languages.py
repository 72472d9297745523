"""Languages of ColBERT-XM: names, adapters per text, threads, adapters that are left out or added."""

import copy
import json
import threading

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, XmodModel

from rarezoo import ColBERTXMConfig, ColBERTXMForRetrieval, ColBERTXMModel, ColBERTXMProcessor
from rarezoo.colbert_xm.language_codes import find_language
from rarezoo.configs import load_preset, read_preset

PUBLISHED = read_preset("colbert_xm", "colbert-xm")["config"]["languages"]
TEXTS = ["the moon pulls the sea", "la loire est le plus long fleuve", "maji yake yanatoka ziwa", "rain"]
SPOKEN = ["en_XX", "fr_XX", "sw_KE", "en_XX"]


@pytest.fixture(scope="module")
def folder(colbert_fixtures):
    return colbert_fixtures / "checkpoint"


@pytest.fixture
def model(folder):
    return ColBERTXMForRetrieval.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return ColBERTXMProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("fr_XX", "fr_XX"), ("FR_xx", "fr_XX"), ("fr", "fr_XX"), ("fr-CA", "fr_XX"), ("fra", "fr_XX"), ("fre", "fr_XX"),
        ("pt-BR", "pt_XX"), ("zh", "zh_CN"), ("zh-Hans", "zh_CN"), ("zh-Hant", "zh_TW"), ("zh_TW", "zh_TW"),
        ("zh-HK", "zh_TW"), ("zh-Hant-HK", "zh_TW"), ("zh-Hans-HK", "zh_CN"),
        ("zh-Hant-CN", "zh_TW"), ("zh-Hant-SG", "zh_TW"), ("cmn", "zh_CN"), ("nb", "no_XX"), ("nn-NO", "no_XX"),
        ("iw", "he_IL"), ("fil", "tl_XX"), ("sr-Latn", "sr_RS"), ("kmr", "ku_TR"), (" de ", "de_DE"),
    ],
)  # fmt: skip
def test_names_of_languages(name, code):
    assert find_language(name, PUBLISHED) == code


def test_every_code_is_found_by_its_iso_name():
    for code in PUBLISHED:
        assert find_language(code, PUBLISHED) == code
        if code != "zh_TW":
            assert find_language(code.split("_")[0], PUBLISHED) == code


@pytest.mark.parametrize("name", ["xx", "", "klingon", "zz-FR"])
def test_an_unknown_language_lists_the_codes(name):
    with pytest.raises(
        ValueError, match=f"no adapter for the language '{name}'; expected one of en_XX, id_ID, .*sa_IN"
    ):
        find_language(name, PUBLISHED)


def test_scripts_are_not_mixed_up():
    assert find_language("zh", ["en_XX", "zh_TW"]) == "zh_TW"
    with pytest.raises(ValueError, match="zh-Hans"):
        find_language("zh-Hans", ["en_XX", "zh_TW"])
    with pytest.raises(TypeError, match="must be a string"):
        find_language(3, PUBLISHED)


@torch.no_grad()
def test_mixed_batches_equal_those_of_one_language(model, processor):
    inputs = processor.process_documents(TEXTS)
    mixed = model(**inputs, lang_ids=model.language_ids(SPOKEN, TEXTS)).embeddings
    for row, language in enumerate(SPOKEN):
        alone = model(**inputs, lang_ids=model.language_ids(language, TEXTS)).embeddings[row]
        torch.testing.assert_close(mixed[row], alone, atol=1e-5, rtol=0)
        assert language == "en_XX" or (alone - model(**inputs).embeddings[row]).abs().max() > 1e-3
    encoded = model.encode_documents(TEXTS, processor, language=SPOKEN)
    for row, vectors in enumerate(encoded):
        kept = inputs["keep_mask"][row].bool()
        torch.testing.assert_close(vectors, mixed[row][kept], atol=1e-5, rtol=0)
    by_function = model.encode_documents(TEXTS, processor, language=dict(zip(TEXTS, SPOKEN)).get)
    assert all(torch.equal(found, wanted) for found, wanted in zip(by_function, encoded))


@torch.no_grad()
def test_dispatch_equals_the_stock_backbone(model, processor):
    """Outputs and gradients are those of transformers' loop over all languages."""
    stock = XmodModel(model.config, add_pooling_layer=False).eval()
    stock.load_state_dict(model.roberta.state_dict())
    inputs = processor.process_documents(TEXTS)
    del inputs["keep_mask"]
    for languages in (SPOKEN, "sw", None):
        lang_ids = model.language_ids(languages, TEXTS)
        with torch.enable_grad():
            found = model.roberta(**inputs, lang_ids=lang_ids).last_hidden_state
            wanted = stock(**inputs, lang_ids=lang_ids).last_hidden_state
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
            weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
            for network, output in ((model.roberta, found), (stock, wanted)):
                network.zero_grad()
                (output * weights).sum().backward()
        gradients = dict(stock.named_parameters())
        for name, parameter in model.roberta.named_parameters():
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            torch.testing.assert_close(gradient, gradients[name].grad, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("fields", [dict(adapter_layer_norm=True), dict(adapter_reuse_layer_norm=False),
                                    dict(ln_before_adapter=False), dict(pre_norm=True)])  # fmt: skip
@torch.no_grad()
def test_dispatch_under_every_placement_of_the_norms(model, fields):
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    ours, stock = ColBERTXMModel(config).eval(), XmodModel(config, add_pooling_layer=False).eval()
    stock.load_state_dict(ours.state_dict())
    input_ids = torch.randint(5, 160, (4, 9), generator=torch.Generator().manual_seed(1))
    for lang_ids in (torch.tensor([2, 0, 3, 2]), torch.tensor([1, 1, 1, 1])):
        found, wanted = (network(input_ids, lang_ids=lang_ids).last_hidden_state for network in (ours, stock))
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_autocast_with_several_languages(model, processor):
    inputs = processor.process_documents(TEXTS)
    lang_ids = model.language_ids(SPOKEN, TEXTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs, lang_ids=lang_ids)
    assert output.embeddings.dtype == torch.float32
    assert (output.embeddings.norm(dim=-1)[output.mask.bool()] - 1).abs().max() < 1e-3
    assert (output.embeddings - model(**inputs, lang_ids=lang_ids).embeddings).abs().max() < 0.1


def test_threads_with_different_languages(model, processor):
    """The language is an argument, never a state of the model."""
    expected = {code: model.encode_documents(TEXTS, processor, language=code) for code in model.config.languages}
    wrong = []

    def encode(code):
        for _ in range(10):
            found = model.encode_documents(TEXTS, processor, language=code)
            if not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected[code])):
                wrong.append(code)

    threads = [threading.Thread(target=encode, args=(code,)) for code in model.config.languages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.config.default_language == "en_XX"


def test_threads_encode_a_model_that_is_in_training(model, processor):
    """Dropout stays off until the last thread has ended; then every module trains as before."""
    expected = [model.encode_documents([text], processor, language="fr")[0] for text in TEXTS]
    model.train()
    model.roberta.embeddings.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    wrong = []

    def encode(number):
        for _ in range(20):
            found = model.encode_documents([TEXTS[number]], processor, language="fr")[0]
            if not torch.allclose(found, expected[number], atol=1e-6):
                wrong.append(number)

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(len(TEXTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert {name: module.training for name, module in model.named_modules()} == modes
    with pytest.raises(TypeError, match="a text must be a string"):
        model.encode_documents([3], processor)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_the_default_language(model, processor):
    default = model.encode_documents(TEXTS, processor)
    assert torch.equal(default[0], model.encode_documents(TEXTS, processor, language="en")[0])
    model.set_default_language("fr-CA")
    assert model.config.default_language == "fr_XX"
    assert torch.equal(
        model.encode_documents(TEXTS, processor)[0], model.encode_documents(TEXTS, processor, language="fr")[0]
    )
    with pytest.raises(ValueError, match="expected one of en_XX, fr_XX, sw_KE, ja_XX"):
        model.set_default_language("xx")


def test_a_preset_s_default_is_the_first_of_its_languages():
    assert load_preset("colbert_xm", "tiny").default_language == "en_XX"
    assert load_preset("colbert_xm", "tiny", languages=["it_IT"]).default_language == "it_IT"


def test_whole_numbers_of_numpy_are_batch_sizes(model, processor):
    found = model.encode_documents(TEXTS, processor, batch_size=np.int64(2))
    assert all(torch.equal(*pair) for pair in zip(found, model.encode_documents(TEXTS, processor, batch_size=2)))
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        model.encode_documents(TEXTS, processor, batch_size=True)


def test_scores_by_another_similarity(model, processor):
    """The vectors have length 1: a squared distance is 2 - 2 cos."""
    queries, documents = model.encode_queries(TEXTS, processor), model.encode_documents(TEXTS, processor)
    lengths = torch.tensor([len(query) for query in queries])[:, None]
    distances = model.score(queries, documents, similarity="l2")
    torch.testing.assert_close(distances, 2 * model.score(queries, documents) - 2 * lengths, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lang_ids", [[1.7], torch.tensor([1.0]), [True]])
def test_indices_of_languages_are_whole_numbers(model, lang_ids):
    with pytest.raises(TypeError, match="lang_ids must be whole numbers"):
        model(torch.tensor([[0, 3, 2]]), lang_ids=lang_ids)


def test_mistakes(model, processor):
    with pytest.raises(TypeError, match="language must be a string such as 'fr_XX', one for each text, or a function"):
        model.encode_queries(TEXTS, processor, language=3)
    with pytest.raises(ValueError, match="one language per text: 4 texts, 2 languages"):
        model.encode_documents(TEXTS, processor, language=["en", "fr"])
    with pytest.raises(
        ValueError, match="no adapter for the language 'de'; expected one of en_XX, fr_XX, sw_KE, ja_XX"
    ):
        model.encode_queries(TEXTS, processor, language=["en", "de", "fr", "fr"])
    inputs = processor.process_documents(TEXTS)
    with pytest.raises(ValueError, match=r"lang_ids must lie in 0\.\.3 .*found \[4\]"):
        model(**inputs, lang_ids=torch.tensor([0, 4, 0, 0]))
    with pytest.raises(ValueError, match=r"lang_ids of shape \(batch,\) = \(4,\); found \(3,\)"):
        model(**inputs, lang_ids=torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("kept", [["ja_XX"], ["ja", "fr-CA"], "sw"])
def test_only_the_wanted_adapters_are_loaded(folder, model, processor, tmp_path, kept):
    model.save_pretrained(tmp_path / "whole")
    pruned, report = AutoModel.from_pretrained(tmp_path / "whole", languages=kept, output_loading_info=True)
    direct = ColBERTXMForRetrieval.from_pretrained(folder, languages=kept)
    assert not any(report.values()), report
    codes = [
        model.config.languages[model.config.language_id(name)] for name in ([kept] if isinstance(kept, str) else kept)
    ]
    assert set(pruned.config.languages) == set(codes) and pruned.config.default_language == codes[0]
    per_adapter = 2 * (2 * 32 * 16 + 16 + 32)
    count = sum(parameter.numel() for parameter in pruned.parameters())
    assert count == sum(parameter.numel() for parameter in model.parameters()) - (4 - len(codes)) * per_adapter
    pruned.save_pretrained(tmp_path / "pruned")
    reloaded, report = AutoModel.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(report.values())
    stored = load_file(tmp_path / "pruned" / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == count
    for code in codes:
        expected = model.encode_documents(TEXTS, processor, language=code)
        for network in (pruned, direct, reloaded):
            found = network.encode_documents(TEXTS, processor, language=code)
            assert all(torch.equal(a, b) for a, b in zip(found, expected))
    with pytest.raises(ValueError, match="no adapter for the language 'en'"):
        pruned.encode_documents(TEXTS, processor, language="en")


def test_a_configuration_and_languages_together(folder, model, processor, tmp_path):
    """The choice counts for the caller's configuration as for the stored one, and leaves it alone."""
    model.save_pretrained(tmp_path)
    config = ColBERTXMConfig.from_pretrained(tmp_path, similarity="l2")
    choice = {"languages": ["ja", "fr-CA"], "default_language": "fr"}
    for opened in (
        AutoModel.from_pretrained(tmp_path, config=config, **choice),
        ColBERTXMForRetrieval.from_pretrained(folder, config=config, **choice),
    ):
        assert (opened.config.languages, opened.config.default_language) == (["fr_XX", "ja_XX"], "fr_XX")
        assert opened.config.similarity == "l2" and config.languages == ["en_XX", "fr_XX", "sw_KE", "ja_XX"]
        for code in ("fr_XX", "ja_XX"):
            found, expected = (net.encode_documents(TEXTS, processor, language=code) for net in (opened, model))
            assert all(torch.equal(a, b) for a, b in zip(found, expected))
    with pytest.raises(ValueError, match="no adapter for the language 'de'; expected one of en_XX"):
        AutoModel.from_pretrained(tmp_path, config=config, languages=["de"])
    backbone = ColBERTXMModel.from_pretrained(tmp_path, config=config, languages="sw")
    assert backbone.config.languages == ["sw_KE"]


def test_a_language_that_the_checkpoint_lacks_is_not_made_up(folder):
    with pytest.raises(ValueError, match="no adapter for the language 'de'; expected one of en_XX"):
        ColBERTXMForRetrieval.from_pretrained(folder, languages=["en", "de"])


def test_codes_need_no_order(folder, tmp_path):
    """The index is the place in the configuration, sorted or not."""
    model = ColBERTXMForRetrieval.from_pretrained(folder, languages=["sw", "en", "ja"])
    assert model.config.languages == ["en_XX", "sw_KE", "ja_XX"], "the checkpoint's order"
    assert [model.config.language_id(name) for name in ("ja", "en", None)] == [2, 0, 0]


@pytest.mark.parametrize("init_from", [None, "sw"])
def test_add_a_language(model, processor, tmp_path, init_from):
    before = {code: model.encode_documents(TEXTS, processor, language=code) for code in model.config.languages}
    model.add_language("rw_RW", init_from=init_from)
    assert model.config.languages == ["en_XX", "fr_XX", "sw_KE", "ja_XX", "rw_RW"]
    found = model.encode_documents(TEXTS, processor, language="rw")
    assert all(torch.equal(a, b) for a, b in zip(found, before["sw_KE"])) == (init_from == "sw")
    new = [p for name, p in model.named_parameters() if ".rw_RW." in name]
    assert len(new) == 2 * 4 and all(p.isfinite().all() for p in new)
    with torch.no_grad():
        for parameter in new:
            parameter.add_(0.1)
    for code, vectors in before.items():
        again = model.encode_documents(TEXTS, processor, language=code)
        assert all(torch.equal(a, b) for a, b in zip(again, vectors)), code
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    expected = model.encode_documents(TEXTS, processor, language="rw_RW")
    assert all(torch.equal(a, b) for a, b in zip(loaded.encode_documents(TEXTS, processor, language="rw"), expected))


@pytest.mark.parametrize("init_from", [None, "sw"])
@pytest.mark.parametrize(
    "code", ["", "a.b", "train", "keys", "forward", "eu", "euES", "eu_es", "basque_ES", "eu_ES ", "__class__", None, 3]
)
def test_a_new_language_s_code_has_a_form(model, code, init_from):
    """Names such as "train" are attributes of every module: they cannot name an adapter."""
    languages, names = list(model.config.languages), set(model.state_dict())
    with pytest.raises(ValueError, match=r"must have the form xx_YY, such as 'eu_ES' or 'eo_XX'; found "):
        model.add_language(code, init_from=init_from)
    assert (model.config.languages, set(model.state_dict())) == (languages, names)
    assert callable(model.roberta.encoder.layer[0].output.adapter_modules.train)


@pytest.mark.parametrize("languages", [["train"], ["en_XX", "a.b"], ["en_XX", ""]])
def test_codes_in_a_configuration_have_that_form_too(languages, folder, tmp_path):
    with pytest.raises(StrictDataclassError, match="a language's code must have the form xx_YY"):
        ColBERTXMConfig(languages=languages)
    stored = json.loads((folder / "config.json").read_text())
    stored = {**stored, "languages": languages, "default_language": languages[0], "model_type": "colbert_xm"}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(StrictDataclassError, match="a language's code must have the form xx_YY"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("code", ["fr_XX", "FR_xx"])
def test_a_language_is_added_once(model, code):
    with pytest.raises(ValueError, match=f"there is an adapter for '{code}' already"):
        model.add_language(code)


def test_an_unknown_source_leaves_the_model_alone(model):
    names = set(model.state_dict())
    with pytest.raises(ValueError, match="no adapter for the language 'de'"):
        model.add_language("eu_ES", init_from="de")
    assert set(model.state_dict()) == names


def test_official_freezing(model):
    """Embeddings and adapters are frozen, the norms that the adapters share are not."""
    model.freeze_embeddings_and_language_adapters()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name for name, _ in model.named_parameters() if ".embeddings." in name or ".adapter_modules." in name
    }


def test_the_published_sizes_by_hand():
    """Embeddings, 12 layers, projection, and an adapter in every layer per language."""
    embeddings, layers, adapter = (250002 + 514 + 1 + 2) * 768, 85_054_464, 12 * (2 * 768 * 384 + 384 + 768)
    assert adapter == 7_091_712
    for languages in (PUBLISHED, ["en_XX"]):
        with torch.device("meta"):
            model = ColBERTXMForRetrieval(ColBERTXMConfig(languages=languages))
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == embeddings + layers + len(languages) * adapter + 768 * 128
