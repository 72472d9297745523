"""After-care of a model that got another tokenizer: its new rows learn, the rest stays as it was, or learns by LoRA."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed
from transformers.utils import cached_file, logging

from rarezoo.tokenizer_transplant.modeling_tokenizer_transplant import MATRIX_NAME
from rarezoo.tokenizer_transplant.table_surgery import vocabulary_tensors
from rarezoo.tokenizer_transplant.token_bytes import Vocabulary
from rarezoo.tokenizer_transplant.transplant_matrix import SourceKind, TransplantMatrix
from rarezoo.tokenizer_transplant.transplant_report import REPORT_NAME
from rarezoo.training.language_model import collate_tokens, pack_texts, text_rows
from rarezoo.training.recipe import TransplantTrainingRecipe
from rarezoo.training.run_folder import (
    CHECKPOINT_FOLDER,
    check_folder,
    cleared_after_a_mistake,
    common_arguments,
    export_run,
    last_whole_checkpoint,
)
from rarezoo.training.trainer import show_progress_bar_alone

logger = logging.get_logger(__name__)

NO_CHUNK = -1
# Rows that were trained already, or never will be.
_NOT_NEW = {SourceKind.COPIED, SourceKind.SPECIAL, SourceKind.PADDING}
_TRAINED_FILE = "trained.safetensors"


# --- which rows learn -------------------------------------------------------------------------------------------------


class _ChosenRows(nn.Module):
    """Some rows of a table as a parameter of their own, for `torch.nn.utils.parametrize`.

    The optimiser never sees the others: neither weight decay nor momentum moves them, and its state is no larger than
    the chosen rows. They are in float32 at least, whatever the table's dtype.
    """

    row_ids: Tensor

    def __init__(self, table: Tensor, row_ids: Tensor):
        super().__init__()
        self.register_buffer("row_ids", row_ids.to(table.device), persistent=False)
        chosen = table.detach()[self.row_ids]
        self.rows = nn.Parameter(chosen.to(torch.promote_types(table.dtype, torch.float32), copy=True))

    def forward(self, table: Tensor) -> Tensor:
        return table.index_copy(0, self.row_ids, self.rows.to(table.dtype))


@contextmanager
def only_embeddings_train(model: Any, row_ids: Sequence[int] | Tensor | None = None) -> Iterator[list[nn.Parameter]]:
    """For a while, the rows of a model's input table and head are all that trains; afterwards they stand in the tables.

    Rows that are not chosen, all other weights and biases stay bit-identical, under any optimiser and weight decay.
    Tables that the model ties are one, their rows trained once. What trained before trains again afterwards.

    Args:
        model: a `PreTrainedModel` with floating-point tables.
        row_ids: token ids, or a mask of bool `(rows,)`; None takes all.

    Yields:
        The trained parameters: one for each table, float32 `(chosen rows, width)` (float64 for such tables).

    Raises:
        ValueError: ids out of range, twice, or none; a mask of another length; quantized tables.
    """
    tables = _tables(model)
    chosen = _chosen_ids(row_ids, {len(table) for table, _ in tables})
    trained_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    rows = [_ChosenRows(table, chosen) for table, _ in tables]
    try:
        for chosen_rows, (_, modules) in zip(rows, tables):
            for module in modules:
                parametrize.register_parametrization(module, "weight", chosen_rows)
        yield [chosen_rows.rows for chosen_rows in rows]
    finally:
        for chosen_rows, (table, modules) in zip(rows, tables):
            for module in filter(parametrize.is_parametrized, modules):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            with torch.no_grad():
                table[chosen_rows.row_ids.to(table.device)] = chosen_rows.rows.to(table)
        for parameter in trained_before:
            parameter.requires_grad_(True)


def _tables(model: Any) -> list[tuple[nn.Parameter, list[nn.Module]]]:
    """Every table of the vocabulary with the modules that hold it."""
    tables: dict[int, tuple[nn.Parameter, list[nn.Module]]] = {}
    for name, kind in vocabulary_tensors(type(model), model.config).items():
        if kind.role == "bias":
            continue
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        table = getattr(module, attribute)
        if attribute != "weight" or kind.dim != 0 or not table.is_floating_point():
            raise ValueError(
                f"expected the table {name} to be a floating-point weight with a row per token, found {table.dtype} "
                f"{tuple(table.shape)}: load the model without quantizing it"
            )
        modules = tables.setdefault(id(table), (table, []))[1]
        if all(module is not known for known in modules):
            modules.append(module)
    return list(tables.values())


def _chosen_ids(row_ids: Sequence[int] | Tensor | None, sizes: set[int]) -> Tensor:
    """Ascending ids, `(n,)` int64."""
    size = min(sizes)
    if row_ids is None:
        return torch.arange(size)
    chosen = torch.as_tensor(row_ids)
    if chosen.dtype == torch.bool:
        if chosen.shape != (size,):
            raise ValueError(f"a mask of rows must have shape ({size},), found {tuple(chosen.shape)}")
        chosen = chosen.nonzero()[:, 0]
    if chosen.dim() != 1 or len(chosen) == 0 or chosen.is_floating_point():
        raise ValueError(f"expected the ids of the rows to train, or a mask of them, found {row_ids!r}")
    ids = chosen.long().unique()
    if len(ids) != len(chosen) or ids[0] < 0 or ids[-1] >= size:
        raise ValueError(f"ids of rows must be different ones from 0 to {size - 1}, found {row_ids!r}")
    return ids


def new_row_ids(model: str | Path) -> list[int]:
    """Ids of the rows that a transplantation made anew, by the report, or else the transplant matrix, beside the model.

    Args:
        model: checkpoint folder or Hub name.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: no row is new.
    """
    for name, read in ((REPORT_NAME, _reported_kinds), (MATRIX_NAME, _stored_kinds)):
        with suppress(OSError):
            kinds = read(Path(str(cached_file(str(model), name))))
            break
    else:
        raise FileNotFoundError(
            f"there is neither {REPORT_NAME} nor {MATRIX_NAME} in {model}, which would tell which rows are new: list "
            "their ids"
        )
    ids = [row_id for row_id, kind in enumerate(kinds) if kind not in _NOT_NEW]
    if not ids:
        raise ValueError(f"{model}: no row is new, all were taken over from the base")
    return ids


def _reported_kinds(path: Path) -> list[SourceKind]:
    tokens = json.loads(path.read_text(encoding="utf-8"))["tokens"]
    return [SourceKind[entry["source"].upper()] for entry in tokens]


def _stored_kinds(path: Path) -> list[SourceKind]:
    return [SourceKind(kind) for kind in TransplantMatrix.load(path).kinds.tolist()]


# --- approximate likelihood matching ----------------------------------------------------------------------------------


def align_chunks(student: Sequence[bytes], teacher: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The chunks that two tokenizations of one text have in common: from a border that both have to the next.

    Args:
        student, teacher: the bytes of every token.

    Returns:
        For each, the number of every token's chunk, int64 `(tokens,)`, ascending from 0. A token without bytes belongs
        to the chunk that ends there.

    Raises:
        ValueError: the bytes are not the same.
    """
    one, other = b"".join(student), b"".join(teacher)
    if one != other:
        place = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
        raise ValueError(
            f"the tokenizations must be of one text; they differ at byte {place}: {one[place : place + 20]!r} and "
            f"{other[place : place + 20]!r}"
        )
    student_ends = np.cumsum([len(token) for token in student], dtype=np.int64)
    teacher_ends = np.cumsum([len(token) for token in teacher], dtype=np.int64)
    borders = np.intersect1d(student_ends, teacher_ends)
    borders = borders[borders > 0]
    return np.searchsorted(borders, student_ends), np.searchsorted(borders, teacher_ends)


def token_log_probabilities(logits: Tensor, input_ids: Tensor) -> Tensor:
    """The log-probability of each token after those before it: float32 `(batch, length)`, 0 for the first.

    Args:
        logits: `(batch, length, vocab_size)`.
        input_ids: int64 `(batch, length)`.
    """
    logits, targets = logits[:, :-1].float(), input_ids[:, 1:]
    found = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    return nn.functional.pad(found, (1, 0))


def alm_loss(
    student_log_probabilities: Tensor,
    teacher_log_probabilities: Tensor,
    student_chunks: Tensor,
    teacher_chunks: Tensor,
    temperature: float = 100.0,
    epsilon: float = 1e-6,
) -> Tensor:
    """Approximate likelihood matching (tokenkit): the mean over chunks of

        -[exp(a) b + (1 - exp(a)) log(1 - exp(b))]

    where a (of the teacher) and b (of the student) are the log-probabilities of the chunk's tokens, added up, divided
    by `temperature`, less `epsilon`. For a given teacher it is smallest where b = a.

    Args:
        student_log_probabilities, teacher_log_probabilities: of each token, `(batch, student length)` and `(batch,
            teacher length)`, see `token_log_probabilities`.
        student_chunks, teacher_chunks: int64, the same shapes: number of the token's chunk in its row, -1 for tokens
            that count in none.
        temperature: of the binary probabilities.
        epsilon: keeps 1 - exp(b) above 0.

    Raises:
        ValueError: no chunks, or not the same ones on both sides.
    """
    count = int(max(student_chunks.max(), teacher_chunks.max())) + 1
    if count < 1:
        raise ValueError("there are no chunks to match")
    student_sums, present = _chunk_sums(student_log_probabilities, student_chunks, count)
    teacher_sums, expected = _chunk_sums(teacher_log_probabilities, teacher_chunks, count)
    if not torch.equal(present, expected):
        raise ValueError("student and teacher must have the same chunks in every row")
    b = student_sums[present] / temperature - epsilon
    a = teacher_sums[present].detach() / temperature - epsilon
    return -(a.exp() * b - torch.expm1(a) * torch.log(-torch.expm1(b))).mean()


def _chunk_sums(values: Tensor, chunks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums by chunk, `(batch, count)`, and which chunks there are."""
    counted = chunks != NO_CHUNK
    places = chunks.clamp(min=0)
    empty = values.new_zeros(len(values), count)
    sums = empty.scatter_add(1, places, torch.where(counted, values, 0))
    return sums, empty.scatter_add(1, places, counted.to(values)) > 0


class _TextReader:
    """A tokenizer that also tells the bytes of its tokens and what it writes before and behind a text."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.vocabulary = Vocabulary(tokenizer)
        example = tokenizer("a", return_special_tokens_mask=True)
        special = example["special_tokens_mask"]
        start = special.index(0) if 0 in special else 0
        self.prefix: list[int] = example["input_ids"][:start]
        self.end: int | None = tokenizer.eos_token_id

    def read(self, text: str) -> tuple[list[int], list[bytes]] | None:
        """Ids, and bytes that joined are the text's; None where they are not, as with a tokenizer that normalises."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces = [self.vocabulary.token_bytes[token_id] or b"" for token_id in ids]
        joined, wanted = b"".join(pieces), text.encode()
        if joined == b" " + wanted and pieces[0].startswith(b" "):  # sentencepiece's mark of a word's start
            pieces[0] = pieces[0][1:]
            return ids, pieces
        return (ids, pieces) if joined == wanted else None


def alignment_rows(
    texts: Sequence[str], student_tokenizer: Any, teacher_tokenizer: Any, sequence_length: int
) -> list[dict[str, np.ndarray]]:
    """Rows of one text in two tokenizations, cut where both have a border.

    Before each row stands what its tokenizer writes before a text; where there is nothing, the row's first chunk has no
    probability and does not count. Behind the end of a text the end-of-text tokens make a chunk, if both have one.

    Args:
        texts: those that one of the tokenizers changes are left out, with a warning.
        sequence_length: most tokens of a row, of either tokenizer.

    Returns:
        Rows with `student_ids`, `student_chunks`, `teacher_ids`, `teacher_chunks`, int64 `(tokens,)` each.

    Raises:
        ValueError: no text gives a row.
    """
    student, teacher = _TextReader(student_tokenizer), _TextReader(teacher_tokenizer)
    rows: list[dict[str, np.ndarray]] = []
    left_out = 0
    for text in texts:
        read = student.read(text), teacher.read(text)
        if read[0] is None or read[1] is None:
            left_out += 1
        elif read[0][0]:
            rows += _cut_rows(student, teacher, read[0], read[1], sequence_length)
    if left_out:
        logger.warning(f"{left_out} of {len(texts)} texts are left out: a tokenizer changes them, so they do not align")
    if not rows:
        raise ValueError(
            f"none of {len(texts)} texts gives a row with a chunk to match ({left_out} are left out because a "
            f"tokenizer changes them; sequence_length is {sequence_length})"
        )
    return rows


def _cut_rows(
    student: _TextReader,
    teacher: _TextReader,
    student_read: tuple[list[int], list[bytes]],
    teacher_read: tuple[list[int], list[bytes]],
    sequence_length: int,
) -> Iterator[dict[str, np.ndarray]]:
    chunks = align_chunks(student_read[1], teacher_read[1])
    both_end = student.end is not None and teacher.end is not None
    sides = []
    for reader, (ids, _), numbers in zip((student, teacher), (student_read, teacher_read), chunks):
        read = np.array(ids, dtype=np.int64)
        if both_end and reader.end is not None:
            read, numbers = np.append(read, reader.end), np.append(numbers, numbers[-1] + 1)
        sides.append((reader, read, numbers))
    # Tokens of each side before every border.
    before = [np.append(0, np.bincount(numbers).cumsum()) for _, _, numbers in sides]
    room = [sequence_length - len(reader.prefix) for reader, _, _ in sides]
    start, last = 0, len(before[0]) - 1
    while start < last:
        fitting = (np.searchsorted(counts, counts[start] + most, "right") - 1 for counts, most in zip(before, room))
        stop = min(fitting)
        if stop <= start:  # a chunk that is longer than a row
            start += 1
            continue
        row: dict[str, np.ndarray] = {}
        for name, (reader, read, numbers), counts in zip(("student", "teacher"), sides, before):
            part = slice(counts[start], counts[stop])
            row[f"{name}_ids"] = np.append(np.array(reader.prefix, dtype=np.int64), read[part])
            row[f"{name}_chunks"] = np.append(np.full(len(reader.prefix), NO_CHUNK), numbers[part] - start)
        if not student.prefix or not teacher.prefix:
            for name in ("student_chunks", "teacher_chunks"):
                row[name][row[name] == 0] = NO_CHUNK
        if (row["student_chunks"] != NO_CHUNK).any():
            yield row
        start = stop


def collate_aligned(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """A batch of `alignment_rows`, padded on the right, with masks `student_mask` and `teacher_mask`."""
    batch = {}
    for name in ("student", "teacher"):
        ids = [torch.as_tensor(row[f"{name}_ids"]) for row in rows]
        chunks = [torch.as_tensor(row[f"{name}_chunks"]) for row in rows]
        batch[f"{name}_ids"] = pad_sequence(ids, batch_first=True)
        batch[f"{name}_chunks"] = pad_sequence(chunks, batch_first=True, padding_value=NO_CHUNK)
        batch[f"{name}_mask"] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return batch


# --- the run ----------------------------------------------------------------------------------------------------------


class TransplantTrainer(Trainer):
    """transformers' `Trainer` for a model of which little learns: its checkpoints hold only that.

    Args:
        teacher: of approximate likelihood matching, on batches of `collate_aligned`; None for language modelling.
        temperature: see `alm_loss`.
        arguments: as for `Trainer`.
    """

    def __init__(self, teacher: Any = None, temperature: float = 100.0, **arguments: Any):
        super().__init__(**arguments)
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.args.device)
        self.temperature = temperature
        if teacher is not None:
            # Otherwise the Trainer expects losses that are sums over the tokens of all accumulated batches.
            self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ids, teacher_ids = inputs["student_ids"], inputs["teacher_ids"]
        with torch.no_grad():
            logits = self.teacher(input_ids=teacher_ids, attention_mask=inputs["teacher_mask"]).logits
            expected = token_log_probabilities(logits, teacher_ids)
        logits = model(input_ids=ids, attention_mask=inputs["student_mask"]).logits
        found = token_log_probabilities(logits, ids)
        loss = alm_loss(found, expected, inputs["student_chunks"], inputs["teacher_chunks"], self.temperature)
        return (loss, {}) if return_outputs else loss

    def _trained(self, model: Any = None) -> dict[str, nn.Parameter]:
        unwrapped = self.accelerator.unwrap_model(self.model if model is None else model)
        return {name: parameter for name, parameter in unwrapped.named_parameters() if parameter.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.detach().contiguous() for name, value in self._trained().items()}, folder / _TRAINED_FILE
        )

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        stored = load_file(Path(resume_from_checkpoint) / _TRAINED_FILE)
        trained = self._trained(model)
        if stored.keys() != trained.keys():
            raise ValueError(f"{resume_from_checkpoint} was written by another recipe: other weights were trained")
        for name, parameter in trained.items():
            parameter.copy_(stored[name])


def train_transplanted(
    recipe: TransplantTrainingRecipe,
    output_dir: str | Path,
    rows: Sequence[Any] | None = None,
    evaluation_rows: Sequence[Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """Train a transplanted model's embeddings: what `rarezoo.training.train` does with such a recipe.

    Args:
        rows: texts, or rows with `text` (or, for language modelling, `input_ids`), instead of `recipe.training_data`.
        evaluation_rows: the same, instead of `recipe.evaluation_data`.
        recipe, output_dir, callbacks, resume, and errors: as for `train`.

    Returns:
        The last logged `loss` and `eval_loss`, `steps`, `train_runtime` in seconds, and `output_dir`.
    """
    output_dir = Path(output_dir)
    processes = PartialState()
    check_folder(recipe, output_dir, resume)
    processes.wait_for_everyone()
    texts = text_rows(rows, recipe.training_data)
    if not texts:
        raise ValueError("no texts to train on: set training_data in the recipe, or pass rows")
    set_seed(recipe.seed)
    model, tokenizer = load_transplanted(recipe)
    teacher, make_rows = _data(recipe, tokenizer)
    train_dataset = make_rows(texts)
    evaluation_texts = text_rows(evaluation_rows, recipe.evaluation_data)
    eval_dataset = None if evaluation_texts is None else make_rows(evaluation_texts)
    checkpoints = output_dir / CHECKPOINT_FOLDER
    row_ids = _row_ids(recipe)
    with cleared_after_a_mistake(output_dir, resume):
        with only_embeddings_train(model, row_ids) as trained_rows:
            network = _with_lora(recipe, model, trained_rows) if recipe.lora else model
            trainer = TransplantTrainer(
                teacher=teacher,
                temperature=recipe.temperature,
                model=network,
                args=_arguments(recipe, checkpoints, eval_dataset is not None),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                data_collator=collate_tokens if teacher is None else collate_aligned,
                processing_class=tokenizer,
                callbacks=list(callbacks),
            )
            show_progress_bar_alone(trainer)
            if processes.is_main_process:
                recipe.save_into(output_dir)
            result = trainer.train(resume_from_checkpoint=last_whole_checkpoint(checkpoints))
    trained: Any = trainer.accelerator.unwrap_model(network)
    if recipe.lora:  # only now that the tables are whole again: PEFT looks whether input table and head are one tensor
        trained = trained.merge_and_unload()
    if processes.is_main_process:

        def write(scratch: Path) -> None:
            trained.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            with suppress(OSError):  # which rows are new: for `new_row_ids` of a model that is trained again
                shutil.copy(str(cached_file(str(recipe.model), REPORT_NAME)), scratch / REPORT_NAME)

        export_run(output_dir, write, trainer.state.log_history)
    processes.wait_for_everyone()
    metrics: dict[str, Any] = {}
    for name in ("loss", "eval_loss"):
        logged = [entry[name] for entry in trainer.state.log_history if name in entry]
        if logged:
            metrics[name] = logged[-1]
            if teacher is None:
                metrics[name.replace("loss", "perplexity")] = math.exp(logged[-1])
    return {
        **metrics,
        "steps": trainer.state.global_step,
        "train_runtime": result.metrics["train_runtime"],
        "output_dir": str(output_dir),
    }


def load_transplanted(recipe: TransplantTrainingRecipe) -> tuple[Any, Any]:
    """The recipe's model, plain, and its tokenizer.

    Raises ValueError where the tables have too few rows for the tokenizer.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(str(recipe.model), dtype=getattr(torch, recipe.dtype))
    if hasattr(model, "merge_and_unload"):  # one that stores only the transplant matrix
        model = model.merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or str(recipe.model))
    found = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > found:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model only {found} rows: transplant first"
        )
    return model, tokenizer


def _data(recipe: TransplantTrainingRecipe, tokenizer: Any) -> tuple[Any, Any]:
    """The teacher, or None, and the function that makes rows of texts."""
    if recipe.teacher is None:
        return None, lambda texts: pack_texts(texts, tokenizer, recipe.sequence_length)
    teacher = AutoModelForCausalLM.from_pretrained(recipe.teacher, dtype=getattr(torch, recipe.dtype))
    teacher_tokenizer = AutoTokenizer.from_pretrained(recipe.teacher)

    def make_rows(rows: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        texts = [row if isinstance(row, str) else row.get("text") for row in rows]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                "objective 'alm' needs texts, or rows with the column 'text': ids are of one tokenizer only"
            )
        return alignment_rows(texts, tokenizer, teacher_tokenizer, recipe.sequence_length)

    return teacher, make_rows


def _row_ids(recipe: TransplantTrainingRecipe) -> list[int] | None:
    if isinstance(recipe.trained_rows, list):
        return recipe.trained_rows
    return None if recipe.trained_rows == "all" else new_row_ids(str(recipe.model))


def _with_lora(recipe: TransplantTrainingRecipe, model: Any, trained_rows: list[nn.Parameter]) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("LoRA needs the peft library: pip install 'rarezoo[train]'") from None
    # PEFT annotates lora_alpha as int and takes any number.
    alpha: Any = recipe.lora_alpha
    settings = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.lora_target_modules or "all-linear",
    )
    adapted = get_peft_model(model, settings)
    for rows in trained_rows:  # PEFT freezes whatever is not its own
        rows.requires_grad_(True)
    return adapted


def _arguments(recipe: TransplantTrainingRecipe, folder: Path, evaluates: bool) -> TrainingArguments:
    return TrainingArguments(
        **common_arguments(recipe, folder, recipe.max_steps, evaluates),
        lr_scheduler_type="linear",
        warmup_steps=recipe.warmup_steps,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        prediction_loss_only=True,
        label_names=["labels"] if recipe.teacher is None else ["student_chunks"],
        # The collators make what the losses need.
        remove_unused_columns=False,
    )
