"""Configurations are strict: a wrong type, an unknown value or fields in contradiction are one clear error."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from rarezoo.auto import FAMILIES

from .cases import CASES, MODELS

FAULTS = [(family, *fault) for family, case in CASES.items() for fault in case.faulty_configs]


@pytest.mark.parametrize(("family", "fields", "message"), FAULTS, ids=lambda value: str(value)[:40])
def test_faulty_fields_are_refused(family, fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        CASES[family].make_config(**fields)


@pytest.mark.parametrize(("family", "fields", "message"), FAULTS, ids=lambda value: str(value)[:40])
def test_faulty_fields_in_a_checkpoint_are_refused(family, fields, message, tmp_path):
    """The same when the fault comes with `from_pretrained` or stands in the file."""
    CASES[family].make_config().save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=message):
        model_class = FAMILIES[family].model_class()
        model_class(AutoConfig.from_pretrained(tmp_path, **fields))


@pytest.mark.parametrize("family", MODELS)
def test_faulty_assignment_is_refused(family):
    config = MODELS[family].make_config()
    with pytest.raises(StrictDataclassError, match="'hidden_size' expected int, got str"):
        config.hidden_size = "32"
    assert config.hidden_size == MODELS[family].config["hidden_size"]


@pytest.mark.parametrize("family", CASES)
def test_save_and_load_keep_every_field(family, tmp_path):
    config = CASES[family].make_config()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_diff_dict() == json.loads((tmp_path / "config.json").read_text())
    for name, value in CASES[family].config.items():
        assert getattr(loaded, name) == value


@pytest.mark.parametrize("family", MODELS)
def test_instances_do_not_share_their_class_map(family):
    first, second = MODELS[family].make_config(), MODELS[family].make_config()
    first.auto_map["AutoModel"] = "elsewhere.Model"
    assert second.auto_map["AutoModel"] != "elsewhere.Model"
    assert MODELS[family].make_config().auto_map["AutoModel"] != "elsewhere.Model"
