"""One row per family, by which the common tests know how to build it, feed it and read its answer.

`rarezoo.auto.FAMILIES` says what exists, this table how to test it: a family without a row fails
`test_common_checkpoints.py::test_every_family_has_a_case`, unless its checkpoints hold no weights.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from rarezoo.auto import FAMILIES

FIXTURES = Path(__file__).parent / "fixtures"
DEVICE = os.environ.get("RAREZOO_TEST_DEVICE", "cpu")


@dataclass(frozen=True)
class Case:
    """What the common tests need to know about a family.

    Attributes:
        family: name in `FAMILIES`.
        config: fields of a tiny configuration with weights large enough that outputs differ visibly.
        heads: AutoClass -> name of the class that it must give.
        inputs: `inputs(auto_class, rows, padding_side)` -> keyword arguments of `forward` for rows of token ids.
        answers: AutoClass -> function of (outputs, inputs) that gives the tensor to compare, without padding: its rows
            are the rows of the batch in order, so that the answers of single rows concatenate to that of the batch.
        make_processor: builds the family's processor, where it has one.
        embed: function of (input embeddings, inputs) that gives what `input_ids` become.
        variants: further configuration fields under which attention must be right.
        vocabulary_head: whether the heads end in a matrix over the vocabulary.
        gradient_size: of the largest gradients that the common tests compute, to which their rounding is relative.
        trained: whether a parameter of that name gets a gradient from `inputs`.
        suite_configs: part of a name -> fields for transformers' own common tests, which expect its usual
            initialization.
        suite_skips: the same part -> those of them that cannot apply, with the reason.
        quantization_config: fields that give the widths which 4-bit layers need (multiples of 64).
        suite_class: model class -> the one that transformers' own common tests get, which save what they build.
        faulty_configs: configuration fields that must be refused, with a pattern of the message.
    """

    family: str
    config: dict[str, Any]
    heads: dict[str, str]
    inputs: Callable[[str, list[torch.Tensor], str], dict[str, torch.Tensor]]
    answers: dict[str, Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]]
    make_processor: Callable[[], Any] | None = None
    embed: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor] = lambda embeddings, inputs: embeddings(
        inputs["input_ids"]
    )
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    vocabulary_head: bool = True
    gradient_size: float = 1.0
    trained: Callable[[str], bool] = lambda name: True
    suite_configs: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    suite_skips: dict[str, dict[str, str]] = field(default_factory=dict)
    suite_class: Callable[[type], type] = lambda model_class: model_class
    quantization_config: dict[str, Any] = field(default_factory=dict)
    faulty_configs: tuple[tuple[dict[str, Any], str], ...] = ()

    def make_config(self, **overrides):
        return FAMILIES[self.family].config_class()(**{**self.config, **overrides})

    def fields(self) -> dict[str, Any]:
        """Some of the configuration's own fields, with values that are not the defaults."""
        return self.config

    def build(self, auto_class: str = "AutoModel", attention: str = "sdpa", **overrides):
        """A model with reproducible random weights, in eval mode."""
        torch.manual_seed(0)
        config = self.make_config(**overrides)
        return auto(auto_class).from_config(config, attn_implementation=attention).to(DEVICE).eval()

    def rows(self, lengths: tuple[int, ...] = (9, 5, 2)) -> list[torch.Tensor]:
        """Random token ids, the same on every call; never a special token."""
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(3, self.config["vocab_size"], (length,), generator=generator) for length in lengths]

    def batch(self, auto_class: str, rows: list[torch.Tensor] | None = None, padding_side: str = "right"):
        inputs = self.inputs(auto_class, self.rows() if rows is None else rows, padding_side)
        return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}

    def answer(self, model, auto_class: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.answers[auto_class](model(**inputs), inputs)


def auto(auto_class: str):
    return getattr(transformers, auto_class)


def pad(rows: list[torch.Tensor], padding_side: str, value: int = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=padding_side)


def second_half_pooled(auto_class: str, rows: list[torch.Tensor], padding_side: str) -> dict[str, torch.Tensor]:
    """Token ids and masks; the retriever pools the second half of every row, as after an echo."""
    inputs = {
        "input_ids": pad(rows, padding_side),
        "attention_mask": pad([torch.ones_like(row) for row in rows], padding_side),
    }
    if auto_class == "AutoModel":
        halves = [(torch.arange(len(row)) >= len(row) // 2).long() for row in rows]
        inputs["pool_mask"] = pad(halves, padding_side)
    return inputs


def several_languages(auto_class: str, rows: list[torch.Tensor], padding_side: str) -> dict[str, torch.Tensor]:
    """Token ids, masks, and a language for every row, by its length; one id in three is not kept, as punctuation."""
    return {
        "input_ids": pad(rows, padding_side, 1),
        "attention_mask": pad([torch.ones_like(row) for row in rows], padding_side),
        "keep_mask": pad([(row % 3 != 0).long() for row in rows], padding_side),
        "lang_ids": torch.tensor([len(row) // 3 for row in rows]),
    }


def seeded_by_row(auto_class: str, rows: list[torch.Tensor], padding_side: str) -> dict[str, torch.Tensor]:
    """Token ids, masks, and for every row a seed that depends on nothing but the row."""
    return {
        "input_ids": pad(rows, padding_side),
        "attention_mask": pad([torch.ones_like(row) for row in rows], padding_side),
        "lex_seeds": torch.stack([row.sum() for row in rows]),
    }


def colbert_xm_processor():
    from rarezoo import ColBERTXMProcessor

    tokenizer = transformers.AutoTokenizer.from_pretrained(FIXTURES / "colbert_xm" / "checkpoint")
    return ColBERTXMProcessor(tokenizer, max_query_length=20, marker_mode="replace", mask_punctuation=False)


def mistral_splade_processor():
    from rarezoo import MistralSpladeProcessor

    tokenizer = transformers.AutoTokenizer.from_pretrained(FIXTURES / "mistral_splade")
    return MistralSpladeProcessor(tokenizer, prompt="Find it", max_query_length=20)


CASES = {
    case.family: case
    for case in (
        Case(
            family="mistral_splade",
            config=dict(
                vocab_size=160,
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=12,
                max_position_embeddings=128,
                sliding_window=None,
                pad_token_id=0,
                initializer_range=0.2,
            ),
            heads={"AutoModel": "MistralSpladeForRetrieval", "AutoModelForMaskedLM": "MistralSpladeForMaskedLM"},
            inputs=second_half_pooled,
            answers={
                "AutoModel": lambda outputs, inputs: outputs.sparse_embedding,
                "AutoModelForMaskedLM": lambda outputs, inputs: outputs.logits[inputs["attention_mask"].bool()],
            },
            make_processor=mistral_splade_processor,
            variants={
                "echo": dict(attention_mode="echo"),
                "bidirectional": dict(attention_mode="bidirectional"),
                "sliding_window": dict(attention_mode="echo", sliding_window=3),
                "bidirectional_sliding_window": dict(attention_mode="bidirectional", sliding_window=3),
                "sum_shifted": dict(attention_mode="echo", pooling="sum", logit_shift=1),
                "last": dict(attention_mode="plain", pooling="last", activation="log1p_log1p_relu", logit_scale=0.4),
            },
            suite_configs={"": dict(attention_mode="plain", initializer_range=0.02)},
            quantization_config=dict(hidden_size=64, intermediate_size=128, head_dim=16),
            faulty_configs=(
                (dict(pooling=3), "'pooling' expected str, got int"),
                (dict(hidden_size="32"), "'hidden_size' expected int, got str"),
                (dict(logit_shift=True), "'logit_shift' expected int, got bool"),
                (dict(excluded_token_ids=["the"]), "excluded_token_ids"),
                (dict(attention_mode="both"), "attention_mode must be one of echo, plain, bidirectional, repeat"),
                (dict(pooling="median"), "pooling must be one of max, sum, mean, last; found 'median'"),
                (dict(activation="relu"), "activation must be one of log1p_relu, log1p_log1p_relu; found 'relu'"),
                (dict(logit_shift=2), "logit_shift must be one of 0, 1; found 2"),
                (dict(logit_scale=0.0), "logit_scale must be a positive number; found 0"),
                (dict(logit_scale=float("nan")), "logit_scale must be a positive number; found nan"),
                (dict(logit_scale=float("inf")), "logit_scale must be a positive number; found inf"),
                (dict(head_chunk_size=0), "head_chunk_size must be at least 1; found 0"),
                (dict(top_k_query=0), "top_k_query must be at least 1; found 0"),
                (dict(num_key_value_heads=3), r"num_attention_heads \(4\) must be a multiple .* \(3\)"),
                (dict(excluded_token_ids=[3, 160]), r"excluded_token_ids must lie in 0\.\.159; found \[160\]"),
            ),
        ),
        Case(
            family="colbert_xm",
            config=dict(
                vocab_size=165,
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=130,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                languages=["sw_KE", "en_XX", "zh_TW", "fr_XX"],
                default_language="en_XX",
                dim=16,
                initializer_range=0.2,
            ),
            heads={"AutoModel": "ColBERTXMForRetrieval"},
            inputs=several_languages,
            answers={"AutoModel": lambda outputs, inputs: outputs.embeddings[inputs["attention_mask"].bool()]},
            make_processor=colbert_xm_processor,
            variants={
                "own_norm": dict(adapter_layer_norm=True),
                "no_norm": dict(adapter_reuse_layer_norm=False),
                "pre_norm": dict(pre_norm=True, ln_before_adapter=False),
            },
            vocabulary_head=False,
            trained=lambda name: ".adapter_modules.zh_TW." not in name,
            suite_configs={"": dict(initializer_range=0.02)},
            quantization_config=dict(hidden_size=128, intermediate_size=128),
            faulty_configs=(
                (dict(dim="128"), "'dim' expected int, got str"),
                (dict(dim=0), "dim must be at least 1; found 0"),
                (dict(similarity="dot"), "similarity must be one of cosine, l2; found 'dot'"),
                (dict(hidden_size=30), r"hidden_size \(30\) must be a multiple of num_attention_heads \(4\)"),
                (dict(is_decoder=True), "is_decoder and add_cross_attention must be False"),
            ),
        ),
        Case(
            family="lexinvariant",
            gradient_size=20.0,
            config=dict(
                vocab_size=160,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                head_dim=12,
                intermediate_size=37,
                initializer_range=0.2,
                pad_token_id=0,
            ),
            heads={"AutoModel": "LexinvariantModel", "AutoModelForCausalLM": "LexinvariantForCausalLM"},
            inputs=seeded_by_row,
            answers={
                "AutoModel": lambda outputs, inputs: outputs.last_hidden_state[inputs["attention_mask"].bool()],
                "AutoModelForCausalLM": lambda outputs, inputs: outputs.logits[inputs["attention_mask"].bool()],
            },
            embed=lambda embeddings, inputs: embeddings(inputs["input_ids"], inputs["lex_seeds"]),
            variants={
                "gaussian": dict(),
                "collapsed": dict(unseen_logits="collapsed"),
                "exempt": dict(unseen_logits="collapsed", exempt_token_ids=[1, 7, 90]),
                "exempt_sampled": dict(exempt_token_ids=[1, 7, 90]),
                "orthonormal": dict(table="orthonormal", unseen_logits="collapsed"),
                "canonical": dict(table="canonical", canonical_size=32),
                "canonical_learned": dict(table="canonical", canonical_size=32, learned_table=True),
                "permuted": dict(table="permuted"),
                "permuted_learned": dict(table="permuted", learned_table=True),
                "learned": dict(table="learned"),
                "mixed": dict(table="mixed", randomize_prob=0.5),
                "subset_permuted": dict(table="subset_permuted", randomize_prob=0.5),
                "strict": dict(attend_self=False),
                "t5": dict(qk_norm=False, relative_attention_bias_shared=True, embedding_affine="scalar"),
                "key_smear": dict(key_smear=True, unseen_logits="collapsed"),
            },
            vocabulary_head=False,
            suite_configs={"": dict(), "Learned": dict(table="learned")},
            suite_skips={
                "": {
                    "test_model_get_set_embeddings": "rows come from seeds, not from an nn.Embedding",
                    "test_resize_tokens_embeddings": "there is no embedding matrix; see test_lexinvariant_model",
                    "test_enable_input_require_grads_with_gradient_checkpointing": "there is no embedding matrix",
                },
                "Learned": {"test_model_get_set_embeddings": "the embeddings hold scale and bias, too"},
            },
            quantization_config=dict(hidden_size=64, head_dim=16, intermediate_size=128),
            faulty_configs=(
                (dict(table=3), "'table' expected str, got int"),
                (dict(vocab_size="130"), "'vocab_size' expected int, got str"),
                (dict(table="normal"), "table must be one of gaussian, orthonormal, .*; found 'normal'"),
                (dict(unseen_logits="none"), "unseen_logits must be one of sampled, collapsed; found 'none'"),
                (dict(embedding_affine="matrix"), "embedding_affine must be one of vector, scalar, none"),
                (dict(canonical_size=0), "canonical_size must be at least 1; found 0"),
                (dict(randomize_prob=1.5), r"randomize_prob must lie in 0\.\.1; found 1.5"),
                (dict(table="learned", unseen_logits="collapsed"), "unseen_logits='collapsed' needs a table of"),
                (dict(table="orthonormal"), r"no more than hidden_size \(32\) rows are orthogonal"),
                (dict(exempt_token_ids=[160]), r"exempt_token_ids must be different numbers in 0\.\.159"),
                (dict(table="mixed", exempt_token_ids=[1]), "exempt_token_ids is for random rows"),
                (dict(relative_attention_max_distance=16), "relative_attention_max_distance must be more than half"),
            ),
        ),
    )
}


def masked_rows(auto_class: str, rows: list[torch.Tensor], padding_side: str) -> dict[str, torch.Tensor]:
    return {
        "input_ids": pad(rows, padding_side),
        "attention_mask": pad([torch.ones_like(row) for row in rows], padding_side),
    }


class TransplantedCase(Case):
    """A family whose configurations hold a base's: `config` and all overrides are the base's fields."""

    def make_config(self, **overrides):
        return FAMILIES[self.family].config_class()(text_config={**self.config, **overrides})

    def fields(self) -> dict[str, Any]:
        return {"base_model_name_or_path": "owner/base", "base_revision": "1f", "token_ids": {"eos": 2}}


def saved_with_a_base(model_class: type) -> type:
    """The class, but a model that has no base yet is saved with one beside it: its own weights with the rows of the
    vocabulary in another order, which the stored matrix undoes."""
    from rarezoo.tokenizer_transplant import TransplantMatrix
    from rarezoo.tokenizer_transplant.table_surgery import vocabulary_tensors

    def save_pretrained(self, folder, **kwargs):
        if self.transplant_matrix is not None:
            return model_class.save_pretrained(self, folder, **kwargs)
        base, rows = copy.deepcopy(self.model), self.config.vocab_size
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        state = base.state_dict()
        tables = {
            state[name].data_ptr(): (state[name], tensor.dim)
            for name, tensor in vocabulary_tensors(type(base), base.config).items()
        }
        for table, dim in tables.values():
            table.copy_(table.index_select(dim, order))
        base.save_pretrained(Path(folder) / "base")
        matrix = TransplantMatrix.copies(order.argsort(), rows)
        roles = SimpleNamespace(
            **{f"{role}_token_id": getattr(self.config, f"{role}_token_id", None) for role in ("bos", "eos", "pad")}
        )
        model_class.from_base(Path(folder) / "base", matrix, roles).save_pretrained(folder, **kwargs)

    return type(model_class.__name__, (model_class,), {"save_pretrained": save_pretrained, "_auto_class": None})


WITHOUT_WEIGHTS_SKIPS = {
    "test_load_save_without_tied_weights": "the checkpoint holds no weights whose names could be read",
    "test_model_weights_reload_no_missing_tied_weights": "the checkpoint holds no weights that could be missing",
}
# Families whose checkpoints hold no weights: what is common about their models, and the file that tests the rest.
WITHOUT_WEIGHTS = {
    "tokenizer_transplant": (
        TransplantedCase(
            family="tokenizer_transplant",
            config=dict(
                model_type="llama",
                vocab_size=160,
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=12,
                initializer_range=0.2,
                pad_token_id=0,
            ),
            heads={"AutoModel": "TransplantedModel", "AutoModelForCausalLM": "TransplantedForCausalLM"},
            inputs=masked_rows,
            answers={
                "AutoModel": lambda outputs, inputs: outputs.last_hidden_state[inputs["attention_mask"].bool()],
                "AutoModelForCausalLM": lambda outputs, inputs: outputs.logits[inputs["attention_mask"].bool()],
            },
            variants={
                "llama": dict(),
                "mistral": dict(model_type="mistral", sliding_window=3),
                "qwen3": dict(model_type="qwen3"),
                "tied": dict(tie_word_embeddings=True),
            },
            suite_configs={"": dict(initializer_range=0.02)},
            suite_class=saved_with_a_base,
            suite_skips={"": WITHOUT_WEIGHTS_SKIPS},
        ),
        "test_tokenizer_transplant_stored.py",
    ),
    "tokenizer_transplant_masked": (
        TransplantedCase(
            family="tokenizer_transplant",
            config=dict(
                model_type="bert",
                vocab_size=160,
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=4,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                initializer_range=0.2,
                pad_token_id=0,
            ),
            heads={"AutoModelForMaskedLM": "TransplantedForMaskedLM"},
            inputs=masked_rows,
            answers={"AutoModelForMaskedLM": lambda outputs, inputs: outputs.logits[inputs["attention_mask"].bool()]},
            variants={
                "xlm_roberta": dict(model_type="xlm-roberta"),
                "untied": dict(model_type="xlm-roberta", tie_word_embeddings=False),
            },
            suite_configs={"Masked": dict(initializer_range=0.02)},
            suite_class=saved_with_a_base,
            suite_skips={"Masked": WITHOUT_WEIGHTS_SKIPS},
        ),
        "test_tokenizer_transplant_stored.py",
    ),
}
MODELS = CASES | {family: case for family, (case, _) in WITHOUT_WEIGHTS.items()}


def heads_of(cases: dict[str, Case]) -> list[tuple[str, str]]:
    return [(family, auto_class) for family, case in cases.items() for auto_class in case.heads]


HEADS, MODEL_HEADS = heads_of(CASES), heads_of(MODELS)
VOCABULARY_HEADS = [(family, auto_class) for family, auto_class in HEADS if CASES[family].vocabulary_head]
VARIANTS = [
    (family, auto_class, variant)
    for family, case in MODELS.items()
    for auto_class in case.heads
    for variant in case.variants
]
