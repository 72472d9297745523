"""The table of families, and the only place that registers anything.

One row per family drives the AutoClasses, PEFT's default LoRA targets, the command line's `list`, the README's table
and the common tests. Registration has the effect of the AutoClasses' `register` methods, but imports nothing until a
family is looked up: `import rarezoo` stays light, and `from transformers import AutoModel` knows the families whichever
import comes first.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: the name of the family's folder, and its `model_type` unless that is given.
        title: the name people use.
        summary: one sentence: what goes in, what comes out.
        representation: what the model produces: "sparse", "multi-vector", "dense", "hybrid" or "text".
        config: name of the configuration class.
        base_model: name of the headless model class.
        auto_classes: AutoClass name -> name of the model class that it gives.
        processor: name of the processor class, or None.
        lora_target_modules: what a bare `LoraConfig()` adapts, and the PEFT tuners that adapt the same layers.
        backbone: model type whose defaults serve PEFT's other tuners, such as IA3, or None.
        full_precision_modules: modules that quantized variants leave alone (output heads; embeddings never are
            quantized, since only `nn.Linear` is).
        paper: arXiv identifier.
        model_type: of the family's configurations, where it is not the family's name.
    """

    name: str
    title: str
    summary: str
    representation: str
    config: str
    base_model: str
    auto_classes: dict[str, str]
    processor: str | None = None
    lora_target_modules: tuple[str, ...] = ()
    backbone: str | None = None
    full_precision_modules: tuple[str, ...] = ()
    paper: str | None = None
    model_type: str = ""

    def __post_init__(self):
        object.__setattr__(self, "model_type", self.model_type or self.name)

    def module(self, kind: str) -> ModuleType:
        """Import `configuration`, `modeling` or `processing` of the family."""
        return importlib.import_module(f"rarezoo.{self.name}.{kind}_{self.name}")

    def config_class(self) -> type[Any]:
        return getattr(self.module("configuration"), self.config)

    def model_class(self, auto_class: str = "AutoModel") -> type[Any]:
        return getattr(self.module("modeling"), self.auto_classes[auto_class])

    def processor_class(self) -> type[Any] | None:
        return getattr(self.module("processing"), self.processor) if self.processor else None


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="mistral_splade",
            title="Mistral-SPLADE",
            summary="Text to one sparse vector over the vocabulary, for inverted indexes.",
            representation="sparse",
            config="MistralSpladeConfig",
            base_model="MistralSpladeModel",
            auto_classes={
                "AutoModel": "MistralSpladeForRetrieval",
                "AutoModelForMaskedLM": "MistralSpladeForMaskedLM",
            },
            processor="MistralSpladeProcessor",
            lora_target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            backbone="mistral",
            full_precision_modules=("lm_head",),
            paper="2408.11119",
        ),
        Family(
            name="colbert_xm",
            title="ColBERT-XM",
            summary="Text in the languages of its adapters to one vector per token, for late interaction.",
            representation="multi-vector",
            config="ColBERTXMConfig",
            base_model="ColBERTXMModel",
            auto_classes={"AutoModel": "ColBERTXMForRetrieval"},
            processor="ColBERTXMProcessor",
            lora_target_modules=("query", "key", "value", "dense"),
            backbone="roberta",
            full_precision_modules=("linear",),
            paper="2402.15059",
        ),
        Family(
            name="lexinvariant",
            title="Lexinvariant LM",
            summary="Symbols of any vocabulary to the next, from how they repeat and not from what they are called.",
            representation="text",
            config="LexinvariantConfig",
            base_model="LexinvariantModel",
            auto_classes={"AutoModel": "LexinvariantModel", "AutoModelForCausalLM": "LexinvariantForCausalLM"},
            lora_target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
            paper="2305.16349",
        ),
        Family(
            name="tokenizer_transplant",
            title="Transplanted tokenizer",
            summary="Any pretrained model with another tokenizer, stored as the megabytes that make the new tables.",
            representation="text",
            config="TransplantedConfig",
            base_model="TransplantedModel",
            auto_classes={
                "AutoModel": "TransplantedModel",
                "AutoModelForCausalLM": "TransplantedForCausalLM",
                "AutoModelForMaskedLM": "TransplantedForMaskedLM",
            },
            # What the layers are called in the bases: Llama's kind, BERT's, GPT-2's and T5's.
            lora_target_modules=(
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "query",
                "key",
                "value",
                "c_attn",
                "q",
                "k",
                "v",
            ),
            full_precision_modules=("lm_head", "decoder"),
            paper="2505.09738",
            model_type="transplanted",
        ),
    )
}


def family_of_model_type(model_type: str | None) -> Family | None:
    """The family whose configurations have that `model_type`."""
    return next((family for family in FAMILIES.values() if family.model_type == model_type), None)


def family_of(checkpoint: str) -> str | None:
    """The name of the family that reads a checkpoint folder or Hub repository, also one in its official layout; None
    where there is none of either."""
    for family in FAMILIES.values():
        with contextlib.suppress(OSError, ValueError):
            settings, _ = family.config_class().get_config_dict(checkpoint)
            if settings.get("model_type") == family.model_type:
                return family.name
    return None


class _LazyRegistry(dict):
    """The dict in which a transformers mapping keeps registered classes; ours are imported when they are looked up.

    Importing them at registration would pull in torch and every backbone, and would run in circles: transformers' own
    docstring decorator imports the AutoClasses while a configuration is being defined.
    """

    def __init__(self, registered: dict, pending: dict[str, Callable[[], tuple[Any, Any]]]):
        super().__init__(registered)
        self._pending = pending  # model type or configuration class name -> () -> (key, registered class)

    def _resolve(self, key: Any) -> None:
        name = key if isinstance(key, str) else getattr(key, "__name__", "")
        if name in self._pending:
            resolved_key, value = self._pending.pop(name)()
            self.setdefault(resolved_key, value)

    def _resolve_all(self) -> None:
        for name in list(self._pending):
            self._resolve(name)

    def __contains__(self, key: object) -> bool:
        self._resolve(key)
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        self._resolve(key)
        return super().__getitem__(key)

    def __len__(self) -> int:
        return super().__len__() + len(self._pending)

    def keys(self):
        self._resolve_all()
        return super().keys()

    def values(self):
        self._resolve_all()
        return super().values()

    def items(self):
        self._resolve_all()
        return super().items()

    def __iter__(self):
        self._resolve_all()
        return super().__iter__()

    def __reduce__(self):
        return dict, (dict(self.items()),)


def _make_lazy(mapping: Any, pending: dict[str, Callable[[], tuple[Any, Any]]]) -> None:
    mapping._extra_content = _LazyRegistry(mapping._extra_content, pending)


def _register_configs(module: ModuleType) -> None:
    def entry(family: Family):
        return lambda: (family.model_type, family.config_class())

    _make_lazy(module.CONFIG_MAPPING, {family.model_type: entry(family) for family in FAMILIES.values()})


def _register_models(module: ModuleType) -> None:
    def entry(family: Family, auto_class: str):
        return lambda: (family.config_class(), family.model_class(auto_class))

    for auto_class in sorted({name for family in FAMILIES.values() for name in family.auto_classes}):
        families = [family for family in FAMILIES.values() if auto_class in family.auto_classes]
        pending = {family.config: entry(family, auto_class) for family in families}
        _make_lazy(getattr(module, auto_class)._model_mapping, pending)


def _register_processors(module: ModuleType) -> None:
    def entry(family: Family):
        return lambda: (family.config_class(), family.processor_class())

    pending = {family.config: entry(family) for family in FAMILIES.values() if family.processor}
    _make_lazy(module.PROCESSOR_MAPPING, pending)


def _register_tokenizers(module: ModuleType) -> None:
    """The tokenizer's class stands in `tokenizer_config.json`; this row serves checkpoints that lack it."""

    def entry(family: Family):
        from transformers import PreTrainedTokenizerFast

        return lambda: (family.config_class(), PreTrainedTokenizerFast)

    _make_lazy(module.TOKENIZER_MAPPING, {family.config: entry(family) for family in FAMILIES.values()})


def _register_peft_targets(module: ModuleType) -> None:
    """Every tuner has a table of its own; most hold copies of LoRA's."""
    lora = module.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    tables = [
        table
        for name, table in vars(module).items()
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING")
    ]
    for family in FAMILIES.values():
        linear = lora.get(family.backbone)
        for table in tables:
            usual = table.get(family.backbone, linear)
            table.setdefault(family.model_type, list(family.lora_target_modules if usual == linear else usual))


_AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.processing_auto": _register_processors,
    "transformers.models.auto.tokenization_auto": _register_tokenizers,
    "peft.utils.constants": _register_peft_targets,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module as soon as that module has been imported, once."""

    def __init__(self, pending: dict[str, Callable[[ModuleType], None]]):
        self.pending = dict(pending)
        self.searching: set[str] = set()

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.pending or fullname in self.searching:
            return None
        self.searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)  # by the other finders
        finally:
            self.searching.discard(fullname)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def run_module_then_register(module: ModuleType) -> None:
            run_module(module)
            # Only now: a specification may be asked for without an import.
            callback = self.pending.pop(fullname, None)
            if callback is not None:
                callback(module)

        spec.loader.exec_module = run_module_then_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make the AutoClasses and PEFT know every family. Called by `import rarezoo`; calling it again changes nothing."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    pending = {}
    for module_name, callback in _AFTER_IMPORT.items():
        if module_name in sys.modules:
            callback(sys.modules[module_name])
        else:
            pending[module_name] = callback
    sys.meta_path.insert(0, _AfterImport(pending))
