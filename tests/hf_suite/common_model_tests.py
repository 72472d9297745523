"""transformers' common model tests, applied to every row of `tests/cases.py`.

`tests/test_transformers_suite.py` copies this file as `tests/test_rarezoo_models.py` into the unpacked sources of
transformers' tests and runs it there; it is not collected from here. The table comes in by the path in RAREZOO_CASES.
"""

import importlib.util
import os
import sys
import unittest

import torch
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

import rarezoo
from rarezoo.auto import FAMILIES

# By module: names of test classes here would be collected as tests of their own.
from . import test_configuration_common, test_modeling_common

_specification = importlib.util.spec_from_file_location("cases", os.environ["RAREZOO_CASES"])
cases = importlib.util.module_from_spec(_specification)
sys.modules["cases"] = cases
_specification.loader.exec_module(cases)

# The common tests decide by these static tables, not by the AutoClasses, which classes are backbones or give a
# representation (no loss), and which take labels of which shape.
STATIC_TABLES = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


class ModelTester:
    """What transformers calls a model tester: sizes as attributes, a configuration and inputs."""

    batch_size = 3
    seq_length = 7
    is_training = True

    def __init__(self, case, fields):
        self.case, self.fields = case, fields
        self.encoder_seq_length = self.key_length = self.seq_length
        vars(self).update(case.config)

    def get_config(self):
        return self.case.make_config(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = test_modeling_common.ids_tensor([self.batch_size, self.seq_length], config.vocab_size).to(
            torch_device
        )
        # Padding, which X-MOD gives no position of its own, would not be told by embeddings.
        if config.pad_token_id is not None:
            input_ids[input_ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


def skipping(reason):
    return lambda self: self.skipTest(reason)


def make_test_class(case, suffix) -> type:
    family = FAMILIES[case.family]
    base_class = getattr(rarezoo, family.base_model)
    distinct = dict.fromkeys([base_class, *(family.model_class(name) for name in case.heads)])
    model_classes = tuple(map(case.suite_class, distinct))
    for auto_class in case.heads:
        STATIC_TABLES[auto_class][case.family] = family.model_class(auto_class).__name__
    if "AutoModel" in case.heads:
        STATIC_TABLES["AutoModel"][case.family] = (base_class.__name__, family.model_class().__name__)

    class Tests(test_modeling_common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = model_classes
        pipeline_model_mapping = {}

        def setUp(self):
            self.model_tester = ModelTester(case, case.suite_configs[suffix])
            self.config_tester = test_configuration_common.ConfigTester(
                self, config_class=family.config_class(), **case.fields()
            )

        def test_config(self):
            self.config_tester.run_common_tests()

    generates = any(model_class.can_generate() for model_class in model_classes)
    bases = (test_modeling_common.GenerationTesterMixin, Tests) if generates else (Tests,)
    skipped = {name: skipping(reason) for name, reason in case.suite_skips.get(suffix, {}).items()}
    return type(f"{family.base_model}{suffix}Test", bases, skipped)


for _case in cases.MODELS.values():
    for _suffix in _case.suite_configs:
        _class = make_test_class(_case, _suffix)
        globals()[_class.__name__] = _class
del _class
