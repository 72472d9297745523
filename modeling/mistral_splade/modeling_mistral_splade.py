"""Mistral-SPLADE: text in, one non-negative sparse vector over the vocabulary out.

The backbone is transformers' Mistral, unchanged, with its weight names. The retrieval head pools log(1 +
relu(logits)) over the marked positions (SPLADE-max, arXiv 2109.10086 formula 4; on a causal model that reads the text
twice, arXiv 2408.11119).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn
from transformers import MistralModel, MistralPreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, MaskedLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from .configuration_mistral_splade import MistralSpladeConfig
from .fused_vocabulary_pooling import pool_vocabulary_head
from .processing_mistral_splade import MistralSpladeProcessor
from .text_encoding import check_finite, encode_in_batches, list_texts, stored_processor

logger = logging.get_logger(__name__)


@dataclass
class MistralSpladeOutput(ModelOutput):
    """
    Args:
        sparse_embedding: (batch, vocab_size) float32, non-negative; a dense tensor in which most entries are zero.
        hidden_states: tuple of (batch, length, hidden_size), when asked for.
        attentions: tuple of (batch, heads, length, length), when asked for (eager attention).
    """

    sparse_embedding: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class MistralSpladePreTrainedModel(MistralPreTrainedModel):
    config_class = MistralSpladeConfig
    config: MistralSpladeConfig
    base_model_prefix = "model"

    def __init__(self, config: MistralSpladeConfig, *args, **kwargs):
        # Fields that from_pretrained overrides are assigned one by one, without the checks across fields.
        config.validate()
        # transformers' mask functions read this flag of the configuration: False removes the causal mask.
        config.is_causal = config.attention_mode != "bidirectional"
        super().__init__(config, *args, **kwargs)


class MistralSpladeHeadModel(MistralSpladePreTrainedModel):
    """What the two models with a vocabulary head share: how the head comes from a checkpoint."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def tie_weights(self, missing_keys=None, recompute_mapping=True):
        """Tie as the configuration says, even where the checkpoint holds a head of its own (transformers would then
        leave it untied)."""
        tied = self.config.tie_word_embeddings
        if not tied and missing_keys and "lm_head.weight" in missing_keys:
            logger.warning(
                "The checkpoint has no lm_head.weight: until it is trained, the head is random and the vectors mean "
                "nothing. If the head is tied to the embeddings, load it with tie_word_embeddings=True; if the "
                "checkpoint is a backbone alone, open it with MistralSpladeModel."
            )
        head = self.get_output_embeddings()
        if tied and type(head) is nn.Linear and "model.embed_tokens.weight" not in (missing_keys or ()):
            head.weight = self.get_input_embeddings().weight
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)


class MistralSpladeModel(MistralSpladePreTrainedModel, MistralModel):
    """The backbone: Mistral, causal or, with `attention_mode="bidirectional"`, without the causal mask."""

    # A saved backbone names this class: it has no head that AutoModel's retrieval class could use.
    _auto_class = "AutoModel"

    def __init__(self, config: MistralSpladeConfig):
        super().__init__(config)
        # The stock module says True; the mask functions, which read the configuration, and the kernels must agree.
        for layer in self.layers:
            layer.self_attn.is_causal = config.is_causal


class MistralSpladeForMaskedLM(MistralSpladeHeadModel):
    """Backbone and vocabulary head with all logits: what sentence-transformers' `SparseEncoder` builds its pooling
    on."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _auto_class = "AutoModelForMaskedLM"

    def __init__(self, config: MistralSpladeConfig):
        super().__init__(config)
        self.model = MistralSpladeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        Args:
            input_ids, attention_mask: (batch, length).
            labels: (batch, length), token ids to predict at their own positions, -100 where ignored.

        Returns:
            logits (batch, length, vocab_size), already multiplied by `config.logit_scale`, so that any SPLADE pooling
            on top of them equals this family's own.
        """
        outputs = _encode(self.model, input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state) * self.config.logit_scale
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As in transformers. `SparseEncoder` opens the folder with its own fill-mask and SPLADE pooling modules where
        these compute this configuration's vectors, else with this family's module, as for the retrieval class."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        config = self.config
        plain = config.attention_mode in ("plain", "bidirectional") and not config.logit_shift
        splade_max = config.pooling == "max" and config.activation == "log1p_relu" and not config.excluded_token_ids
        if is_main_process and not (plain and splade_max):
            # Imported here for speed; by this line transformers also copies that file into every checkpoint.
            from .sentence_transformers_mistral_splade import write_sparse_encoder_files

            write_sparse_encoder_files(save_directory)


class MistralSpladeForRetrieval(MistralSpladeHeadModel):
    """Sparse retriever: the fused head pools the logits of the marked positions into one vector per text."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _auto_class = "AutoModel"

    def __init__(self, config: MistralSpladeConfig):
        super().__init__(config)
        self.model = MistralSpladeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._processor: MistralSpladeProcessor | None = None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pool_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MistralSpladeOutput:
        """
        Args:
            input_ids, attention_mask: (batch, length); padding on either side.
            pool_mask: (batch, length), 1 where the logits are pooled, as the processor returns it. Without it all
                positions of `attention_mask` are pooled, which is right for the modes that read the text once.

        Returns:
            `MistralSpladeOutput` with `sparse_embedding` (batch, vocab_size) float32. Rows with nothing to pool are
            zero.
        """
        outputs = _encode(self.model, input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state
        pool_mask = self._resolve_pool_mask(pool_mask, attention_mask, hidden_states)
        sparse_embedding = pool_vocabulary_head(
            self.lm_head,
            hidden_states,
            pool_mask,
            pooling=self.config.pooling,
            activation=self.config.activation,
            logit_scale=self.config.logit_scale,
            tile_size=self.config.head_chunk_size,
        )
        if self.config.excluded_token_ids:
            excluded = torch.tensor(self.config.excluded_token_ids, device=sparse_embedding.device)
            sparse_embedding = sparse_embedding.index_fill(1, excluded, 0.0)
        return MistralSpladeOutput(
            sparse_embedding=sparse_embedding, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _resolve_pool_mask(self, pool_mask, attention_mask, hidden_states) -> torch.Tensor:
        if pool_mask is None:
            if self.config.attention_mode in ("echo", "repeat") and not torch.compiler.is_compiling():
                logger.warning_once(
                    f"attention_mode={self.config.attention_mode!r} pools the second copy of the text, but no "
                    "pool_mask was given: all positions are pooled. Use the inputs that the processor returns."
                )
            pool_mask = (
                attention_mask if attention_mask is not None else hidden_states.new_ones(hidden_states.shape[:2])
            )
        pool_mask = pool_mask.to(hidden_states.device) != 0
        if pool_mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"expected a pool_mask of shape (batch, length) = {tuple(hidden_states.shape[:2])}; "
                f"found {tuple(pool_mask.shape)}"
            )
        if self.config.logit_shift:  # position i is pooled where token i + 1 is marked: its logits predict that token
            pool_mask = torch.cat([pool_mask[:, 1:], torch.zeros_like(pool_mask[:, :1])], dim=1)
            if attention_mask is not None:  # left padding before a marked first token predicts nothing
                pool_mask = pool_mask & (attention_mask.to(pool_mask.device) != 0)
        return pool_mask

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As in transformers; also writes the files by which sentence-transformers opens the folder."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            # Imported here for speed; by this line transformers also copies that file into every checkpoint.
            from .sentence_transformers_mistral_splade import write_sparse_encoder_files

            write_sparse_encoder_files(save_directory)

    def encode_queries(
        self,
        texts: str | Sequence[str],
        processor: MistralSpladeProcessor | None = None,
        *,
        prompt: str | None = None,
        batch_size: int = 32,
        top_k: int | None = None,
        output: str = "scipy",
        show_progress_bar: bool = False,
    ):
        """Sparse vectors of queries.

        Args:
            texts: one text or several.
            processor: defaults to the one stored beside the checkpoint.
            prompt: instruction for the query template; defaults to the processor's.
            batch_size: texts per forward pass; texts of similar length share a batch.
            top_k: weights kept per row; defaults to `config.top_k_query`; rows may have fewer.
            output: "scipy" (csr_matrix), "torch" (sparse CSR tensor) or "dense" (tensor), on the CPU.
            show_progress_bar: show one.

        Returns:
            (texts, vocab_size) float32, in the order of `texts`.
        """
        values = {"prompt": prompt} if prompt is not None else {}
        top_k = top_k if top_k is not None else self.config.top_k_query
        return self._encode_texts("query", texts, processor, values, batch_size, top_k, output, show_progress_bar)

    def encode_documents(
        self,
        texts: str | Sequence[str],
        processor: MistralSpladeProcessor | None = None,
        *,
        batch_size: int = 32,
        top_k: int | None = None,
        output: str = "scipy",
        show_progress_bar: bool = False,
    ):
        """Sparse vectors of documents; arguments and result as `encode_queries`, `top_k` from
        `config.top_k_document`."""
        top_k = top_k if top_k is not None else self.config.top_k_document
        return self._encode_texts("document", texts, processor, {}, batch_size, top_k, output, show_progress_bar)

    def _encode_texts(self, kind, texts, processor, values, batch_size, top_k, output, show_progress_bar):
        if output not in ("scipy", "torch", "dense"):
            raise ValueError(f"output must be 'scipy', 'torch' or 'dense'; found {output!r}")
        _check_counts(top_k=top_k)
        _check_counts(batch_size=batch_size, optional=False)
        texts = list_texts(texts)
        processor = self._usable_processor(processor)

        def encode(batch):
            chosen = [texts[i] for i in batch]
            inputs = processor.process([(kind, {"text": text, **values}) for text in chosen])
            self._check_length(inputs["input_ids"].shape[1])
            embedding = self(**inputs.to(self.device)).sparse_embedding
            check_finite(self, embedding, chosen)
            return [_active_entries(row, top_k) for row in embedding]

        title = f"Encoding {kind} texts" if show_progress_bar else None
        rows = encode_in_batches(self, texts, encode, batch_size, title)
        return _stack_rows(rows, self.config.vocab_size, output)

    def _usable_processor(self, processor: MistralSpladeProcessor | None) -> MistralSpladeProcessor:
        if processor is None:
            if self._processor is None:
                self._processor = stored_processor(MistralSpladeProcessor, self.config)
            processor = self._processor
        return self.check_processor(processor)

    def check_processor(self, processor: MistralSpladeProcessor) -> MistralSpladeProcessor:
        """The processor, if it belongs to this model.

        Raises:
            TypeError: it is something else, such as a tokenizer.
            ValueError: another attention mode or vocabulary.
        """
        if not hasattr(processor, "process_queries"):
            raise TypeError(f"expected a MistralSpladeProcessor; found {type(processor).__name__}")
        if processor.attention_mode != self.config.attention_mode:
            raise ValueError(
                f"the model was built for attention_mode={self.config.attention_mode!r}, but the processor prepares "
                f"{processor.attention_mode!r} inputs; load both from the same checkpoint or set the same mode"
            )
        if len(processor.tokenizer) > self.config.vocab_size:
            raise ValueError(
                f"the processor's tokenizer has {len(processor.tokenizer)} tokens, but the model's vocab_size is "
                f"{self.config.vocab_size}; they do not belong together"
            )
        return processor

    def _check_length(self, length: int) -> None:
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"the input has {length} tokens, but the model takes max_position_embeddings="
                f"{self.config.max_position_embeddings}; lower the processor's max_query_length or max_document_length"
            )
        window = self.config.sliding_window
        if window is not None and length > window and self.config.attention_mode in ("echo", "repeat"):
            logger.warning_once(
                f"the input has {length} tokens, more than the sliding window of {window}: the second copy of the text "
                "no longer sees all of the first"
            )

    @staticmethod
    def score(queries, documents):
        """Dot products of all queries with all documents.

        Args:
            queries: (n, vocab_size), scipy sparse, numpy, torch sparse CSR or dense.
            documents: (m, vocab_size), of the same kind.

        Returns:
            (n, m): a numpy array for scipy or numpy inputs, else a dense tensor (differentiable for dense inputs).
        """
        if isinstance(queries, torch.Tensor) != isinstance(documents, torch.Tensor):
            raise TypeError(
                f"queries and documents must be of the same kind; found {type(queries).__name__} and "
                f"{type(documents).__name__}"
            )
        if queries.shape[-1] != documents.shape[-1]:
            raise ValueError(
                f"queries have {queries.shape[-1]} dimensions and documents {documents.shape[-1]}; "
                "expected the same vocabulary"
            )
        if not isinstance(queries, torch.Tensor):
            scores = queries @ documents.T
            return scores.toarray() if hasattr(scores, "toarray") else scores
        if documents.layout != torch.strided:
            documents = documents.to_dense()
        return queries @ documents.T

    def explain(
        self,
        text_or_embedding,
        processor: MistralSpladeProcessor | None = None,
        top_k: int | None = 20,
        kind: str = "document",
    ) -> list[tuple[str, float]]:
        """The heaviest terms of a text or of one encoded row.

        Args:
            text_or_embedding: a text (encoded as `kind`, "query" or "document"), or one row: scipy (1, vocab_size),
                or a tensor (vocab_size,) or (1, vocab_size), sparse or dense.
            processor: defaults to the one stored beside the checkpoint.
            top_k: number of terms; None gives all.

        Returns:
            [(token, weight)], heaviest first; fewer than `top_k` where fewer are active. Vocabulary entries that the
            tokenizer does not know are named "<id N>".
        """
        if kind not in ("query", "document"):
            raise ValueError(f"kind must be 'query' or 'document'; found {kind!r}")
        _check_counts(top_k=top_k)
        if isinstance(text_or_embedding, str):
            encode = self.encode_queries if kind == "query" else self.encode_documents
            text_or_embedding = encode([text_or_embedding], processor, output="dense")
        row = _dense_row(text_or_embedding, self.config.vocab_size)
        entries, weights = _active_entries(row, top_k)
        processor = self._usable_processor(processor)
        order = weights.argsort(descending=True, stable=True)
        return [(processor.token(int(entries[i])), float(weights[i])) for i in order]


def _check_counts(optional: bool = True, **counts: object) -> None:
    for name, value in counts.items():
        is_count = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
        if not is_count and not (optional and value is None):
            raise ValueError(f"{name} must be a whole number of at least 1; found {value!r}")


def _encode(model, input_ids, attention_mask, position_ids, inputs_embeds, **kwargs) -> BaseModelOutputWithPast:
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        inputs_embeds=inputs_embeds,
        **{**kwargs, "use_cache": False},
    )


def _active_entries(row: torch.Tensor, top_k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Vocabulary ids (ascending, int64) and weights (float32) of the positive entries of `row`, on the CPU.

    With `top_k`, the largest ones; ties at the border go to the lower id, so that the result is the same everywhere.
    """
    entries = (row > 0).nonzero().squeeze(1)
    weights = row[entries]
    if top_k is not None and entries.numel() > top_k:
        kept = weights.argsort(descending=True, stable=True)[:top_k].sort().values
        entries, weights = entries[kept], weights[kept]
    return entries.cpu(), weights.float().cpu()


def _stack_rows(rows, vocab_size: int, output: str):
    counts = torch.tensor([0, *(entries.numel() for entries, _ in rows)])
    pointers = counts.cumsum(0)
    entries = torch.cat([entries.long() for entries, _ in rows]) if rows else torch.empty(0, dtype=torch.long)
    weights = torch.cat([weights for _, weights in rows]) if rows else torch.empty(0)
    shape = (len(rows), vocab_size)
    if output == "scipy":
        try:
            from scipy.sparse import csr_matrix
        except ImportError as error:
            raise ImportError("output='scipy' needs scipy; install it or choose output='torch'") from error

        matrix = csr_matrix((weights.numpy(), entries.numpy().astype("int32"), pointers.numpy()), shape=shape)
        matrix.has_sorted_indices = True
        return matrix
    if output == "torch":
        return torch.sparse_csr_tensor(pointers, entries, weights, size=shape, check_invariants=True)
    dense = torch.zeros(shape)
    dense[torch.arange(len(rows)).repeat_interleave(counts[1:]), entries] = weights
    return dense


def _dense_row(embedding, vocab_size: int) -> torch.Tensor:
    if isinstance(embedding, torch.Tensor):
        row = embedding.detach()
        row = row.to_dense() if row.layout != torch.strided else row
    elif hasattr(embedding, "toarray"):
        row = torch.from_numpy(embedding.toarray())
    else:
        raise TypeError(f"expected a text, a scipy sparse row or a tensor; found {type(embedding).__name__}")
    if row.numel() != vocab_size:
        raise ValueError(f"expected one row of {vocab_size} weights; found shape {tuple(embedding.shape)}")
    if not row.isfinite().all():
        raise ValueError("expected finite weights; the row holds NaN or infinity")
    return row.reshape(-1)
