"""Hugging Face `Trainer` for retrievers: what all kinds share, and what sparse and late-interaction ones add."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from rarezoo.colbert_xm.max_sim import max_sim
from rarezoo.training.chunked_encoding import encode_in_chunks
from rarezoo.training.late_interaction_losses import LateInteractionObjective
from rarezoo.training.objective import SparseObjective

logger = logging.get_logger(__name__)

_Result = TypeVar("_Result")


class CollapseCallback(TrainerCallback):
    """Notices when the representations of one side have become empty, which a ReLU does not recover from.

    Looks at the logged `query_active_dimensions` and `document_active_dimensions`; warns once.

    Args:
        minimum_active_dimensions: below this mean number the side counts as collapsed.
        stop: also end the training.
    """

    def __init__(self, minimum_active_dimensions: float = 1.0, stop: bool = False):
        self.minimum_active_dimensions = minimum_active_dimensions
        self.stop = stop
        self.warned = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for side in ("query", "document"):
            active = (logs or {}).get(f"{side}_active_dimensions")
            if active is None or active >= self.minimum_active_dimensions:
                continue
            if not self.warned and state.is_world_process_zero:
                logger.warning(
                    f"Step {state.global_step}: the {side} representations have collapsed "
                    f"({active:.2f} active dimensions on average). A dimension whose logit is negative for every text "
                    f"gets no gradient, so this does not heal by itself. Start again with a smaller "
                    f"{side}_regularizer_weight, a longer regularizer_warmup_steps or a smaller learning rate; a "
                    "language model that was never trained for retrieval first needs rarezoo.training.stabilize()."
                )
            self.warned = True
            control.should_training_stop = control.should_training_stop or self.stop


class RetrievalTrainer(Trainer):
    """What trainers of all kinds of retriever share: texts encoded in mini-batches, metrics averaged between logs.

    Subclasses say what a text's representation is (`represent`) and what is minimised (`batch_loss`).

    Args:
        model: the retriever, or a PEFT model around one.
        args: HF training arguments.
        mini_batch_size: texts encoded at a time; activations are recomputed in the backward pass (see
            `encode_in_chunks`). None keeps the activations of the whole batch in memory.
        data_collator, train_dataset, eval_dataset, processing_class, callbacks, and others: as for `Trainer`.
            `processing_class` is the retriever's processor, saved with every checkpoint.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, mini_batch_size: int | None = None, **kwargs: Any):
        args = copy.copy(args)
        # The collator needs columns that are no arguments of the model's forward.
        args.remove_unused_columns = False
        if mini_batch_size is not None and mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be at least 1, found {mini_batch_size}")
        self.mini_batch_size = mini_batch_size
        self._metrics: dict[str, dict[str, list[Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def represent(self, retriever: Any, texts: dict[str, Tensor]) -> Tensor:
        """Representations of the model inputs of some texts, `(rows, …)`."""
        raise NotImplementedError("each kind of representation has a trainer of its own")

    def batch_loss(
        self, outputs: dict[str, Tensor], inputs: dict[str, Any], training: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of the representations of a batch's `queries` and `documents`."""
        raise NotImplementedError("each kind of representation has a trainer of its own")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of one batch of `RetrievalCollator`; outputs are the representations of both sides."""
        retriever = self.accelerator.unwrap_model(model)

        def encode(texts: dict[str, Tensor]) -> Tensor:
            return self.represent(retriever, texts)

        def encode_batch() -> dict[str, Tensor]:
            return {
                side: encode_in_chunks(encode, inputs[side], self.mini_batch_size) for side in ("queries", "documents")
            }

        outputs = call_through(model, encode_batch)
        training = model.training
        loss, metrics = self.batch_loss(outputs, inputs, training)
        for name, value in metrics.items():
            self._metrics["train" if training else "eval"][name].append(value)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        return finite(super().training_step(model, inputs, num_items_in_batch), self.state.global_step + 1)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        metrics = self._metrics[mode]
        if metrics:
            means = torch.stack([torch.stack(values).mean() for values in metrics.values()])
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            prefix = "eval_" if mode == "eval" else ""
            logs = {**logs, **{f"{prefix}{name}": mean for name, mean in zip(metrics, means)}}
            metrics.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return sum(super(RetrievalTrainer, self).floating_point_ops(inputs[s]) for s in ("queries", "documents"))


class SparseRetrievalTrainer(RetrievalTrainer):
    """Trains `model(**inputs).sparse_embedding` with a `SparseObjective`.

    Works on the batches of `RetrievalCollator`. Logs, averaged since the last log and over processes: the ranking loss,
    and for each side the regulariser, its lambda, the FLOPS value and the mean number of active dimensions.

    Args:
        model: the retriever, or a PEFT model around one.
        args: HF training arguments. One optimiser step always uses one batch: with `gradient_accumulation_steps=k` the
            k batches are joined to one of k times the size and encoded `per_device_train_batch_size` rows at a time,
            because FLOPS and in-batch negatives of parts are not those of the whole.
        objective: losses and regularisers; default `SparseObjective()`.
        mini_batch_size, and others: as for `RetrievalTrainer`.
        stop_on_collapse: end the training when the representations collapse, instead of only warning.

    Under `accelerate launch` each process draws its negatives from its own part of the batch, and FLOPS is that of the
    process' part.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: SparseObjective | None = None,
        mini_batch_size: int | None = None,
        stop_on_collapse: bool = False,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ):
        if args.gradient_accumulation_steps > 1:
            args = copy.copy(args)
            mini_batch_size = mini_batch_size or args.per_device_train_batch_size
            args.per_device_train_batch_size *= args.gradient_accumulation_steps
            args.gradient_accumulation_steps = 1
        self.objective: SparseObjective = objective or SparseObjective()
        callbacks = [CollapseCallback(stop=stop_on_collapse), *callbacks]
        super().__init__(model, args, mini_batch_size, callbacks=callbacks, **kwargs)

    def represent(self, retriever: Any, texts: dict[str, Tensor]) -> Tensor:
        """`(rows, vocab_size)`"""
        return retriever(**texts).sparse_embedding

    def batch_loss(
        self, outputs: dict[str, Tensor], inputs: dict[str, Any], training: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(
            outputs["queries"],
            outputs["documents"],
            # Evaluation uses the final weights, so that its losses compare between steps.
            step=self.state.global_step if training else self.state.max_steps,
            max_steps=self.state.max_steps,
            teacher_scores=inputs.get("teacher_scores"),
            teacher_margins=inputs.get("teacher_margins"),
        )


class LateInteractionTrainer(RetrievalTrainer):
    """Trains `model(**inputs).embeddings` with a `LateInteractionObjective`.

    Works on the batches of `LateInteractionCollator`. Logs, averaged since the last log and over processes: the losses
    and the accuracy. Evaluation adds `mrr@10` and `recall@100`: of the evaluation rows' positives among all their
    documents.

    Args:
        model: the retriever, or a PEFT model around one.
        args: HF training arguments. `gradient_accumulation_steps` is colbert-ai's `accumsteps`: each part of the batch
            has its own in-batch negatives, and the losses are averaged. `mini_batch_size` is the way to a large batch
            with all its negatives in little memory. Weight decay applies to all trained weights, as in colbert-ai.
        objective: the losses; default `LateInteractionObjective()`.
        mini_batch_size, and others: as for `RetrievalTrainer`.

    Under `accelerate launch` each process draws its negatives from its own part of the batch, as in colbert-ai.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        objective: LateInteractionObjective | None = None,
        mini_batch_size: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ):
        self.objective: LateInteractionObjective = objective or LateInteractionObjective()
        super().__init__(model, args, mini_batch_size, callbacks=list(callbacks), **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    def represent(self, retriever: Any, texts: dict[str, Tensor]) -> Tensor:
        """`(rows, length, dim)`"""
        return retriever(**texts).embeddings

    def batch_loss(
        self, outputs: dict[str, Tensor], inputs: dict[str, Any], training: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch_size = len(outputs["queries"])
        return self.objective(
            outputs["queries"],
            by_query(outputs["documents"], batch_size),
            query_mask=inputs["queries"]["keep_mask"].bool(),
            document_mask=by_query(inputs["documents"]["keep_mask"].bool(), batch_size),
            teacher_scores=inputs.get("teacher_scores"),
            similarity=self.accelerator.unwrap_model(self.model).config.similarity,
        )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        for name, value in self.ranking_quality(dataloader).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    @torch.no_grad()
    def ranking_quality(self, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
        """`mrr@10` and `recall@100` of the rows' positives among the different documents of all batches."""
        retriever = self.accelerator.unwrap_model(self.model).eval()
        queries: list[Tensor] = []
        answers: list[tuple[int, ...]] = []
        documents: dict[tuple[int, ...], Tensor] = {}  # by what the model reads: a document of several rows is one
        for batch in batches:
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                query_vectors, document_vectors = (
                    _kept_vectors(self.represent(retriever, batch[side]), batch[side])
                    for side in ("queries", "documents")
                )
            queries += query_vectors
            texts = _readable(batch["documents"])
            answers += texts[: len(query_vectors)]
            documents.update(zip(texts, document_vectors))
        columns = {text: column for column, text in enumerate(documents)}
        scores = max_sim(queries, list(documents.values()), similarity=retriever.config.similarity)
        answer_scores = scores.gather(1, torch.tensor([[columns[text]] for text in answers], device=scores.device))
        # A tie counts against the positive: a model that scores all documents alike has found nothing.
        ranks = (scores >= answer_scores).sum(dim=1)
        reciprocal = torch.where(ranks <= 10, 1 / ranks, 0.0)
        return {"mrr@10": reciprocal.mean().item(), "recall@100": (ranks <= 100).float().mean().item()}


def _kept_vectors(embeddings: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    return [vectors[keep.bool()] for vectors, keep in zip(embeddings, inputs["keep_mask"])]


def _readable(inputs: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """Per text its language and ids: what the vectors depend on."""
    rows = zip(inputs["lang_ids"].tolist(), inputs["input_ids"], inputs["attention_mask"])
    return [(language, *ids[mask.bool()].tolist()) for language, ids, mask in rows]


def by_query(documents: Tensor, batch_size: int) -> Tensor:
    """`(batch, nway, …)` from the collator's order: all positives, then all first negatives, and so on."""
    if len(documents) % batch_size:
        raise ValueError(
            f"expected a multiple of {batch_size} documents for {batch_size} queries, found {len(documents)}"
        )
    return documents.unflatten(0, (-1, batch_size)).transpose(0, 1)


def call_through(wrapper: nn.Module, function: Callable[[], _Result]) -> _Result:
    """Call a function that uses the module inside a `DistributedDataParallel` wrapper as if it were the forward pass.

    The wrapper averages gradients over processes only for what happens inside its own forward pass, and wants one such
    pass per backward pass, whereas a batch is encoded in many calls, some of them repeated during the backward pass.
    """
    if not isinstance(wrapper, DistributedDataParallel):
        return function()
    module = wrapper.module
    own_forward = vars(module).get("forward")  # accelerate hangs its autocast there

    def restore() -> None:
        vars(module).pop("forward", None)
        if own_forward is not None:
            module.forward = own_forward

    def run_function() -> _Result:
        restore()
        return function()

    module.forward = run_function
    try:
        return wrapper()
    finally:
        restore()


@contextmanager
def autocast_removed(model: nn.Module) -> Iterator[None]:
    """With bf16, accelerate hangs its autocast on a model's forward pass and leaves it there; after this it is gone."""
    try:
        yield
    finally:
        extract_model_from_parallel(model, keep_fp32_wrapper=False)


def finite(loss: Tensor, step: int) -> Tensor:
    """The loss of a step, a scalar. Raises FloatingPointError if it is infinite or NaN."""
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss became {loss.item()} at step {step}. Continue from the last checkpoint with a lower learning "
            "rate or max_grad_norm, in bf16 or float32 instead of fp16"
        )
    return loss


def show_progress_bar_alone(trainer: Trainer) -> None:
    """No line on standard output for every log entry, neither beside a progress bar nor without one."""
    trainer.pop_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_QuietProgressCallback)


class _QuietProgressCallback(ProgressCallback):
    """The progress bar alone, with the figures to watch at its end instead of a printed line for every log entry."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("ranking_loss", (logs or {}).get("loss"))
        if self.training_bar is None or not logs or loss is None:
            return
        figures = f"loss {loss:.3f}"
        if "query_active_dimensions" in logs:
            figures += (
                f", active {logs['query_active_dimensions']:.0f} (query) "
                f"{logs['document_active_dimensions']:.0f} (document)"
            )
        if "accuracy" in logs:
            figures += f", accuracy {logs['accuracy']:.2f}"
        self.training_bar.set_postfix_str(figures)
