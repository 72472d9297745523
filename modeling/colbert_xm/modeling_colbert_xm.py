"""ColBERT-XM: text in, one unit vector per token out; relevance is MaxSim.

The backbone is transformers' X-MOD, with its weight names, and with its language adapters applied without a loop over
all languages. The head is colbert-ai's: a projection without bias, masked, L2-normalised (arXiv 2402.15059, formulas 1
to 4).
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import XmodModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.xmod.modeling_xmod import XmodAdapter, XmodOutput, XmodPreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from .colbert_metadata import PROJECTION, find_dense_module, write_metadata
from .configuration_colbert_xm import ColBERTXMConfig
from .language_codes import check_new_code
from .max_sim import Ranking, max_sim, rerank
from .processing_colbert_xm import ColBERTXMProcessor
from .text_encoding import check_finite, encode_in_batches, list_texts, stored_processor

logger = logging.get_logger(__name__)

Language = str | None | Sequence[str | None] | Callable[[str], str]


@dataclass
class ColBERTXMOutput(ModelOutput):
    """
    Args:
        embeddings: (batch, length, dim) float32; unit vectors, zero where `mask` is 0.
        mask: (batch, length) int64, 1 where the vector belongs to the text.
        hidden_states: tuple of (batch, length, hidden_size), when asked for.
        attentions: tuple of (batch, heads, length, length), when asked for (eager attention).
    """

    embeddings: torch.FloatTensor | None = None
    mask: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class LanguageAdapterOutput(XmodOutput):
    """X-MOD's output block with the adapters of the languages at hand only.

    The stock block selects the rows of every language in turn: 81 languages x 12 layers of empty tensors for one text.
    """

    def lang_adapter(self, lang_ids, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden_size) through the adapters; `lang_ids` is what `group_by_language` gives."""
        residual = hidden_states
        if self.adapter_layer_norm is not None:
            hidden_states = self.adapter_layer_norm(hidden_states)
        elif self.adapter_reuse_layer_norm:
            hidden_states = self.LayerNorm(hidden_states)
        if self.ln_before_adapter:
            residual = hidden_states
        if isinstance(lang_ids, str):
            adapted = self.adapter_modules[lang_ids](hidden_states)
        else:
            groups, restore_order = lang_ids
            parts = [self.adapter_modules[language](hidden_states[rows]) for language, rows in groups]
            adapted = torch.cat(parts)[restore_order]
        return self.dropout(adapted) + residual


@torch.compiler.disable
def group_by_language(lang_ids: torch.Tensor, languages: Sequence[str]):
    """Which adapters read which rows of a batch.

    Args:
        lang_ids: (batch,) int64, indices in `languages`.
        languages: the codes.

    Returns:
        The code of the one language of the batch; of several ((code, its rows), …), the rows int64, and the order
        (batch,) int64 that undoes the grouping.

    Raises:
        ValueError: an index is none of a language.
    """
    present = lang_ids.unique().tolist()
    unknown = [index for index in present if not 0 <= index < len(languages)]
    if unknown:
        raise ValueError(f"lang_ids must lie in 0..{len(languages) - 1} ({', '.join(languages)}); found {unknown}")
    if len(present) == 1:
        return languages[present[0]]
    groups = tuple((languages[index], (lang_ids == index).nonzero().squeeze(1)) for index in present)
    return groups, torch.cat([rows for _, rows in groups]).argsort()


class ColBERTXMPreTrainedModel(XmodPreTrainedModel):
    config_class = ColBERTXMConfig
    config: ColBERTXMConfig
    _auto_class = "AutoModel"
    # The pooler of official checkpoints, which ColBERT never reads, and adapters that the configuration leaves out.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)pooler\.", r"\.adapter_modules\."]

    def __init__(self, config: ColBERTXMConfig, *args, **kwargs):
        # Fields that from_pretrained overrides are assigned one by one, without the checks across fields.
        config.validate()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers, with the adapters of `languages` only, if they are named, and with `default_language`.
        Both count for a given `config`, too, which stays as it is.

        Raises:
            ValueError: there is no such adapter; the message lists the codes.
        """
        # Without a configuration of the caller's, its class reads the two.
        if hasattr(kwargs.get("config"), "choose_languages"):
            choice = {name: kwargs.pop(name, None) for name in ("languages", "default_language")}
            kwargs["config"] = deepcopy(kwargs["config"])
            kwargs["config"].choose_languages(**choice)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @property
    def backbone(self) -> "ColBERTXMModel":
        """The X-MOD without the head."""
        return getattr(self, self.base_model_prefix, self)

    def _check_length(self, length: int) -> None:
        # Positions begin behind that of padding.
        limit = self.config.max_position_embeddings - (self.config.pad_token_id or 0) - 1
        if length > limit:
            raise ValueError(
                f"the input has {length} tokens, but the model takes {limit}; lower the processor's max_query_length "
                "or max_document_length"
            )

    def language_ids(self, language: Language, texts: Sequence[str]) -> torch.Tensor:
        """Adapter indices of texts, (texts,) int64 on the model's device.

        Args:
            language: of all texts, or one for each, as X-MOD codes, ISO codes or BCP-47 tags; None means
                `config.default_language`; or a function that tells the language of a text.

        Raises:
            TypeError: a language is no string.
            ValueError: no adapter for a language, or another number of languages than of texts.
        """
        if callable(language):
            language = [language(text) for text in texts]
        if language is None or isinstance(language, str):
            language = [language] * len(texts)
        if not hasattr(language, "__len__"):
            raise TypeError(
                f"language must be a string such as 'fr_XX', one for each text, or a function; found {language!r}"
            )
        if len(language) != len(texts):
            raise ValueError(f"expected one language per text: {len(texts)} texts, {len(language)} languages")
        known = {name: self.config.language_id(name) for name in set(language)}
        return torch.tensor([known[name] for name in language], dtype=torch.long, device=self.device)

    def set_default_language(self, language: str) -> None:
        """Set the language of inputs that come without one: X-MOD code, ISO code or BCP-47 tag.

        Raises:
            ValueError: there is no such adapter; the message lists the codes.
        """
        self.config.default_language = self.config.languages[self.config.language_id(language)]

    def add_language(self, code: str, init_from: str | None = None) -> None:
        """Add the adapter of a new language, to be trained while all else is frozen (`train_language`).

        Args:
            code: its name from now on, of X-MOD's form, such as "eu_ES"; it gets the next index.
            init_from: a language whose adapter is copied; None initialises at random. In a quantized model a copy is
                quantized as its source is, a random one is kept in full precision.

        Raises:
            ValueError: there is such an adapter already, or none to copy, or the code has another form. The model is
                then as it was.
        """
        check_new_code(code, self.config.languages)
        source = None if init_from is None else self.config.languages[self.config.language_id(init_from)]
        for layer in self.backbone.encoder.layer:
            adapters = layer.output.adapter_modules
            if source is not None:
                adapters[code] = deepcopy(adapters[source])
                continue
            neighbour = layer.output.LayerNorm.weight  # which keeps its dtype where linear layers are quantized
            adapters[code] = XmodAdapter(self.config).to(neighbour.device, neighbour.dtype).train(self.training)
            adapters[code].apply(self._init_weights)
        self.config.languages = [*self.config.languages, code]
        if source is None and getattr(self, "hf_quantizer", None) is not None:
            self._keep_unquantized(rf".*\.adapter_modules\.{code}")

    def _keep_unquantized(self, pattern: str) -> None:
        """Say in the configuration that modules are not quantized: a saved model would be read as if they were."""
        quantization = self.config.quantization_config
        for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
            if hasattr(quantization, name):
                # None stands for the modules that transformers chose.
                kept = getattr(quantization, name) or self.hf_quantizer.modules_to_not_convert
                setattr(quantization, name, [*sorted(kept), pattern])


class ColBERTXMModel(ColBERTXMPreTrainedModel, XmodModel):
    """The backbone: X-MOD without its pooler."""

    def __init__(self, config: ColBERTXMConfig):
        super().__init__(config, add_pooling_layer=False)
        for layer in self.encoder.layer:
            # The stock encoder builds its layers itself. Same fields, same weights, another dispatch.
            layer.output.__class__ = LanguageAdapterOutput

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        lang_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """
        Args:
            input_ids, attention_mask: (batch, length), padding on either side.
            lang_ids: (batch,) int64, indices in `config.languages`; None means `config.default_language`.

        Returns:
            `last_hidden_state` (batch, length, hidden_size) in the model's dtype, `pooler_output` None.

        Raises:
            TypeError: `lang_ids` are no whole numbers.
            ValueError: more tokens than positions, or `lang_ids` of another shape or outside of `config.languages`.
        """
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is not None and not torch.compiler.is_compiling():
            self._check_length(inputs.shape[1])
        if lang_ids is None:
            languages = self.config.default_language
        else:
            lang_ids = torch.as_tensor(lang_ids, device=self.device)
            if lang_ids.is_floating_point() or lang_ids.is_complex() or lang_ids.dtype == torch.bool:
                raise TypeError(f"lang_ids must be whole numbers, indices in config.languages; found {lang_ids.dtype}")
            lang_ids = lang_ids.long()
            if inputs is not None and lang_ids.shape != inputs.shape[:1]:
                raise ValueError(
                    f"expected lang_ids of shape (batch,) = ({inputs.shape[0]},); found {tuple(lang_ids.shape)}"
                )
            languages = group_by_language(lang_ids, self.config.languages)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            lang_ids=languages,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class ColBERTXMForRetrieval(ColBERTXMPreTrainedModel):
    """Late-interaction retriever: a projected unit vector for every kept token."""

    def __init__(self, config: ColBERTXMConfig):
        super().__init__(config)
        self.roberta = ColBERTXMModel(config)
        self.linear = nn.Linear(config.hidden_size, config.dim, bias=False)
        self._processor: ColBERTXMProcessor | None = None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        keep_mask: torch.Tensor | None = None,
        lang_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ColBERTXMOutput:
        """
        Args:
            input_ids, attention_mask: (batch, length); padding on either side.
            keep_mask: (batch, length), 1 where the vector counts, as the processor returns it. Without it all ids but
                padding count, which is right for queries.
            lang_ids: (batch,) int64, indices in `config.languages` (`language_ids` gives them); None means
                `config.default_language`.

        Returns:
            `ColBERTXMOutput` with `embeddings` (batch, length, dim) float32 and `mask` (batch, length) int64.

        Raises:
            ValueError: more tokens than positions, or `lang_ids` or `keep_mask` of another shape, or an index that is
                none of a language.
        """
        outputs = self.roberta(
            input_ids=input_ids,
            attention_mask=attention_mask,
            lang_ids=lang_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        mask = self._resolve_keep_mask(keep_mask, input_ids, attention_mask, hidden_states)
        # Normalised in float32: in bfloat16 the vectors would miss unit length by up to 1 %.
        projected = self.linear(hidden_states.to(self.linear.weight.dtype)).float() * mask[..., None]
        return ColBERTXMOutput(
            embeddings=normalize(projected, dim=-1),
            mask=mask.long(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def tie_weights(self, missing_keys=None, recompute_mapping=True):
        """As in transformers, with a word on a checkpoint without a projection: nothing is tied to it.

        Raises:
            ValueError: there is one, in PyLate's or sentence-transformers' layout.
        """
        if missing_keys and PROJECTION in missing_keys:
            source = self.config._name_or_path
            dense = find_dense_module(source, revision=getattr(self.config, "_commit_hash", None))
            if dense is not None:
                raise ValueError(
                    f"{source} has its projection in {dense}/, where PyLate and sentence-transformers keep it; convert "
                    f"it first, by the command line's `convert colbert_xm {source} DESTINATION`"
                )
            logger.warning(
                f"The checkpoint has no {PROJECTION}: the projection is random, and until it is trained the vectors "
                "mean nothing. If the checkpoint is a backbone alone, open it with ColBERTXMModel."
            )
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)

    def _resolve_keep_mask(self, keep_mask, input_ids, attention_mask, hidden_states) -> torch.Tensor:
        if keep_mask is None:
            if input_ids is not None:
                keep_mask = input_ids != self.config.pad_token_id
            elif attention_mask is not None:
                keep_mask = attention_mask
            else:
                keep_mask = hidden_states.new_ones(hidden_states.shape[:2])
        keep_mask = keep_mask.to(hidden_states.device) != 0
        if keep_mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"expected a keep_mask of shape (batch, length) = {tuple(hidden_states.shape[:2])}; "
                f"found {tuple(keep_mask.shape)}"
            )
        return keep_mask

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As in transformers; also writes the files by which sentence-transformers opens the folder, and
        `artifact.metadata`, where colbert-ai has dimension and similarity."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_metadata(save_directory, self.config)
            # Imported here for speed; by this line transformers also copies that file into every checkpoint.
            from .sentence_transformers_colbert_xm import write_multi_vector_encoder_files

            write_multi_vector_encoder_files(save_directory)

    def encode_queries(
        self,
        texts: str | Sequence[str],
        processor: ColBERTXMProcessor | None = None,
        *,
        language: Language = None,
        full_length: bool = False,
        batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> list[torch.Tensor]:
        """Token vectors of queries.

        Args:
            texts: one text or several.
            processor: defaults to the one stored beside the checkpoint.
            language: of all texts or one for each: X-MOD code, ISO code or BCP-47 tag; None means
                `config.default_language`; or a function from text to language.
            full_length: do not cut queries at the processor's `max_query_length`.
            batch_size: texts per forward pass; texts of one language and of similar length share a batch.
            show_progress_bar: show one.

        Returns:
            Per text (max_query_length, dim) float32 on the CPU, unit vectors, in the order of `texts`.

        Raises:
            TypeError: texts or languages are no strings, or the processor is none.
            ValueError: no adapter for a language, another number of languages than of texts, a processor that does not
                belong to the model, a text of more tokens than positions, or weights that give no finite vectors.
        """
        processor = self._usable_processor(processor)

        def process(batch):
            return processor.process_queries(batch, full_length=full_length)

        # A longer query would lengthen the others of its batch by `<mask>`s, which count.
        batch_size = 1 if full_length else batch_size
        return self._encode_texts("query", texts, process, language, batch_size, show_progress_bar)

    def encode_documents(
        self,
        texts: str | Sequence[str],
        processor: ColBERTXMProcessor | None = None,
        *,
        language: Language = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> list[torch.Tensor]:
        """Token vectors of documents; arguments and errors as `encode_queries`.

        Returns:
            Per text (kept tokens, dim) float32 on the CPU, unit vectors, in the order of `texts`: without padding and
            punctuation.
        """
        process = self._usable_processor(processor).process_documents
        return self._encode_texts("document", texts, process, language, batch_size, show_progress_bar)

    def _encode_texts(self, kind, texts, process, language, batch_size, show_progress_bar) -> list[torch.Tensor]:
        if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1; found {batch_size!r}")
        texts = list_texts(texts)
        lang_ids = self.language_ids(language, texts)

        def encode(batch):
            chosen = [texts[i] for i in batch]
            output = self(**process(chosen).to(self.device), lang_ids=lang_ids[batch])
            check_finite(self, output.embeddings, chosen)
            return [embedding[kept.bool()].cpu() for embedding, kept in zip(output.embeddings, output.mask)]

        title = f"Encoding {kind} texts" if show_progress_bar else None
        # By language: no adapter waits for another.
        return encode_in_batches(self, texts, encode, batch_size, title, groups=lang_ids.tolist())

    def _usable_processor(self, processor: ColBERTXMProcessor | None) -> ColBERTXMProcessor:
        if processor is None:
            if self._processor is None:
                self._processor = stored_processor(ColBERTXMProcessor, self.config)
            processor = self._processor
        return self.check_processor(processor)

    def check_processor(self, processor: ColBERTXMProcessor) -> ColBERTXMProcessor:
        """See that a processor can belong to this model: that it makes queries and documents, and that its tokenizer
        has no ids beyond the embeddings. Lengths are looked at when a text is encoded.

        Args:
            processor: of any checkpoint.

        Returns:
            The processor itself.

        Raises:
            TypeError: it is something else, such as a tokenizer.
            ValueError: its tokenizer has more tokens than `config.vocab_size`.
        """
        if not hasattr(processor, "process_queries"):
            raise TypeError(f"expected a ColBERTXMProcessor; found {type(processor).__name__}")
        if len(processor.tokenizer) > self.config.vocab_size:
            raise ValueError(
                f"the processor's tokenizer has {len(processor.tokenizer)} tokens, but the model's vocab_size is "
                f"{self.config.vocab_size}; they do not belong together"
            )
        return processor

    def score(self, queries, documents, *, similarity: str | None = None, **masks) -> torch.Tensor:
        """MaxSim of all queries with all documents; see `max_sim` for the forms of inputs.

        Args:
            queries, documents: as `encode_queries` and `encode_documents` give them, or padded with masks.
            similarity: "cosine" or "l2"; None means `config.similarity`.

        Returns:
            (queries, documents) float32.

        Raises:
            TypeError, ValueError: inputs of another form, shape or dim.
        """
        similarity = self.config.similarity if similarity is None else similarity
        return max_sim(queries, documents, similarity=similarity, **masks)

    def rerank(self, query, documents, top_k: int = 10, **masks) -> Ranking:
        """The best documents of one query, exactly; see `max_sim.rerank` for the forms of inputs.

        Args:
            query: (length, dim), one of `encode_queries`.
            documents: as `encode_documents` gives them, or `PackedDocuments` where they serve several queries.
            top_k: results.

        Returns:
            `Ranking(positions, scores)`, int64 and float32, best first. With `similarity="l2"` the order is the same,
            since all vectors have length 1; the scores are those of the cosine.

        Raises:
            TypeError, ValueError: inputs of another form, shape or dim, or `top_k` below 1.
        """
        return rerank(query, documents, top_k, **masks)
