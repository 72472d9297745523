"""The machinery that every family's converter shares: checkpoints in, checkpoints out, one tensor at a time.

A converter is a table of `Rule`s (tensor names of the source and of the target, with an optional transform and its
inverse) and the files around the weights. The engine accounts for every tensor, writes sharded safetensors into a
folder beside the destination, opens what it wrote again, and only then gives the folder its name. Source files are
mapped, not loaded; memory in use is about one shard of the output.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import logging

from rarezoo.conversion.checkpoint_files import CheckpointReader, ConversionError, TensorEntry, listed, write_json

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True)
class FolderReport:
    """What one written folder holds.

    Attributes:
        path: the folder.
        layout: "rarezoo", or the official layout's name.
        tensors, parameters, size_bytes, files: counts of the weights that were written.
        dtype: name of the weights' dtype; that of most parameters where several are kept.
        merged: weights into which an adapter was merged.
        dropped: source tensor or file -> why it is not in the folder.
        notes: what a reader should know, in sentences.
    """

    path: str
    layout: str
    tensors: int = 0
    parameters: int = 0
    size_bytes: int = 0
    files: int = 0
    dtype: str | None = None
    merged: tuple[str, ...] = ()
    dropped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """Result of `convert`: where the checkpoint came from, the layout it had, and the folders that were written."""

    family: str
    source: str
    source_layout: str
    to: str
    folders: tuple[FolderReport, ...]


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """`torch.dtype` of a name ("float32", "bf16", …); None keeps the dtypes of the source."""
    if dtype is None:
        return None
    parsed = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if parsed not in _DTYPES.values():
        raise ConversionError(f"dtype must be one of {', '.join(_DTYPES)}; found {dtype!r}")
    return parsed


Transform = Callable[[list[torch.Tensor]], list[torch.Tensor]]


@dataclass(frozen=True)
class Rule:
    """Names of a tensor (or of a group of tensors that are converted together) on both sides.

    A name is a pattern in which `{placeholder}` stands for one part between dots: `"layers.{layer}.fc1.weight"`. Both
    sides use the same placeholders, so that a table of rules can be read in both directions.

    Attributes:
        sources: patterns of the source names.
        targets: patterns of the target names; empty: the sources are dropped.
        forward: source tensors -> target tensors, both in the order of the patterns; None: they are the same.
        backward: the inverse of `forward`.
        reason: why the sources are dropped.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    forward: Transform | None = None
    backward: Transform | None = None
    reason: str = ""

    def __post_init__(self):
        groups = [_placeholders(pattern) for pattern in (*self.sources, *self.targets)]
        if any(group != groups[0] for group in groups):
            raise ValueError(f"the patterns of one rule must use the same placeholders: {self.sources} {self.targets}")
        if not self.targets and not self.reason:
            raise ValueError(f"a rule that drops tensors must say why: {self.sources}")
        if self.forward is None and len(self.targets) > 1:
            raise ValueError(f"several tensors need a transform: {self.sources} -> {self.targets}")


def rename(source: str, target: str, forward: Transform | None = None, backward: Transform | None = None) -> Rule:
    """A rule for one tensor."""
    return Rule((source,), (target,), forward, backward)


def keep(*names: str) -> tuple[Rule, ...]:
    """Rules for tensors that have the same name on both sides."""
    return tuple(rename(name, name) for name in names)


def drop(source: str, reason: str) -> Rule:
    """A rule for a tensor that the target does not store."""
    return Rule((source,), (), reason=reason)


def reverse(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same table, read from target to source; rules that drop tensors have no inverse and are left out."""
    reversed_rules = []
    for rule in rules:
        if not rule.targets:
            continue
        if (rule.forward is None) != (rule.backward is None):
            raise ValueError(f"the rule {rule.sources} -> {rule.targets} has a transform without an inverse")
        reversed_rules.append(Rule(rule.targets, rule.sources, rule.backward, rule.forward))
    return tuple(reversed_rules)


@dataclass(frozen=True)
class Step:
    """One rule applied to concrete names."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transform: Transform | None = None


@dataclass(frozen=True)
class Plan:
    """What happens to every tensor of a source."""

    steps: tuple[Step, ...]
    dropped: dict[str, str]


def plan_conversion(
    rules: Sequence[Rule], entries: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]], origin: object
) -> Plan:
    """Match every source tensor with exactly one rule, and the results with what the target model expects.

    Args:
        rules: the table.
        entries: the source's tensors.
        expected: name -> shape of every tensor that the target must hold.
        origin: named in error messages.

    Raises:
        ConversionError: one message that lists all unknown, missing and wrongly shaped tensors.
    """
    matchers = [(rule, [_compile(pattern) for pattern in rule.sources]) for rule in rules]
    groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, str]] = {}
    unknown = []
    for name in entries:
        found = [
            (number, tuple(sorted(match.groupdict().items())), position)
            for number, (_, patterns) in enumerate(matchers)
            for position, pattern in enumerate(patterns)
            if (match := pattern.fullmatch(name))
        ]
        if len(found) > 1:
            raise ValueError(f"{name!r} matches more than one rule of the table")
        if not found:
            unknown.append(name)
            continue
        number, binding, position = found[0]
        groups.setdefault((number, binding), {})[position] = name
    steps, dropped, missing = [], {}, []
    for (number, binding), names in groups.items():
        rule = rules[number]
        sources = tuple(_fill(pattern, binding) for pattern in rule.sources)
        if not rule.targets:
            dropped.update(dict.fromkeys(names.values(), rule.reason))
        elif len(names) < len(sources):
            missing += [source for source in sources if source not in names.values()]
        else:
            steps.append(Step(sources, tuple(_fill(pattern, binding) for pattern in rule.targets), rule.forward))
    _check_accounting(steps, unknown, missing, entries, expected, origin)
    return Plan(tuple(steps), dropped)


def _check_accounting(steps, unknown, missing, entries, expected, origin) -> None:
    produced = [target for step in steps for target in step.targets]
    if len(set(produced)) < len(produced):
        raise ValueError(f"the table writes a tensor twice: {listed([x for x in produced if produced.count(x) > 1])}")
    problems = []
    unexpected = [target for target in produced if target not in expected]
    if unknown or unexpected:
        problems.append(f"Unknown tensors: {listed(unknown + unexpected)}")
    incomplete = missing + [name for name in expected if name not in set(produced)]
    if incomplete:
        problems.append(f"Missing tensors: {listed(incomplete)}")
    wrong = []
    for step in steps:
        source, target = step.sources[0], step.targets[0]
        if step.transform is None and target in expected and entries[source].shape != tuple(expected[target]):
            wrong.append(f"{source} {list(entries[source].shape)} instead of {list(expected[target])}")
    if wrong:
        problems.append(f"Wrong shapes: {listed(wrong)}")
    if problems:
        raise ConversionError(
            f"the tensors in {origin} are not those that its configuration describes. {'. '.join(problems)}. "
            "Expected each tensor exactly once; check that weights and config.json belong together"
        )


def _placeholders(pattern: str) -> frozenset[str]:
    return frozenset(re.findall(r"\{(\w+)\}", pattern))


def _compile(pattern: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", pattern)
    return re.compile("".join(f"(?P<{part}>[^.]+)" if i % 2 else re.escape(part) for i, part in enumerate(parts)))


def _fill(pattern: str, binding: Iterable[tuple[str, str]]) -> str:
    return pattern.format(**dict(binding))


@dataclass(frozen=True)
class WrittenWeights:
    """What `write_weights` wrote: name -> (shape, dtype), and the files."""

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    files: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape, _ in self.tensors.values())

    @property
    def size_bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most parameters."""
        counts: dict[torch.dtype, int] = {}
        for shape, dtype in self.tensors.values():
            counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
        return max(counts, key=lambda dtype: counts[dtype])


def write_weights(
    plan: Plan,
    reader: CheckpointReader,
    expected: Mapping[str, tuple[int, ...]],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    finish: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> WrittenWeights:
    """Write `model.safetensors`, or shards and their index, in the order of `expected`.

    Args:
        plan: from `plan_conversion`.
        reader: the source's tensors.
        expected: name -> shape of the target's tensors.
        folder: existing folder.
        dtype: of the floating-point tensors in the files; None keeps the source's.
        max_shard_size: bytes, or a string such as "5GB". A larger tensor gets a shard of its own.
        finish: called with the target name and tensor before the cast, for example to merge an adapter.

    Raises:
        ConversionError: a wrong shape, or values that are not finite, in the source or after the cast.
        OSError: the disk cannot take the files.
    """
    producer = _Producer(plan, reader, expected, dtype, finish)
    split = split_state_dict_into_shards_factory(
        producer.tensors,
        get_storage_size=lambda entry: math.prod(entry[0]) * entry[1].itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    written = WrittenWeights(producer.tensors, tuple(split.filename_to_tensors))
    _check_free_space(folder, written.size_bytes)
    title = f"Writing {len(written.tensors)} tensors"
    with logging.tqdm(total=written.size_bytes, unit="B", unit_scale=True, desc=title) as bar:
        for filename, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = producer.produce(name)
                bar.update(shard[name].nbytes)
            _save_shard(shard, folder / filename)
            del shard
            reader.close()
    if split.is_sharded:
        metadata = {"total_size": written.size_bytes, "total_parameters": written.parameters}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return written


class _Producer:
    """The target's tensors, made one at a time in any order.

    Attributes:
        tensors: name -> (shape, dtype) of what `produce` will give.
    """

    def __init__(self, plan: Plan, reader: CheckpointReader, expected, dtype, finish):
        self._steps = {target: step for step in plan.steps for target in step.targets}
        self._reader = reader
        self._finish = finish
        self._pending: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, shape in expected.items():
            stored = reader.entries[self._steps[name].sources[0]].dtype
            cast = dtype is not None and stored.is_floating_point
            self.tensors[name] = (tuple(shape), dtype if cast else stored)

    def produce(self, name: str) -> torch.Tensor:
        step = self._steps[name]
        if name not in self._pending:
            found = [self._reader.read(source) for source in step.sources]
            found = found if step.transform is None else step.transform(found)
            # The other results of a step wait for their turn, which may come in another shard.
            self._pending.update(zip(step.targets, found, strict=True))
        tensor = self._pending.pop(name)
        finished = _finished(name, tensor, *self.tensors[name], self._finish)
        if finished is not tensor:
            self._reader.release(step.sources)
        return finished


def _finished(name, tensor, shape, dtype, finish) -> torch.Tensor:
    if finish is not None:
        tensor = finish(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ConversionError(f"{name} became {list(tensor.shape)}; the configuration says {list(shape)}")
    _check_finite(name, tensor, "in the source")
    cast = tensor.to(dtype)
    if cast is not tensor:
        _check_finite(name, cast, f"as {dtype}; choose another dtype")
    return cast.contiguous()


def _check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    if tensor.is_floating_point() and tensor.numel():
        low, high = tensor.aminmax()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ConversionError(f"{name} has values that are not finite {where}")


def _save_shard(shard: Mapping[str, torch.Tensor], file: Path) -> None:
    try:
        save_file(dict(shard), file, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise OSError(f"cannot write {file.name} ({error}); nothing was kept, choose another destination") from error


def _check_free_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the weights need {needed / 1e9:.2f} GB, but the destination's disk has {free / 1e9:.2f} GB free"
        )


@contextmanager
def staged_folder(destination: Path) -> Iterator[Path]:
    """A new folder beside `destination`: it gets that name when the block ends well and disappears when it does not.

    Raises `FileExistsError` when the destination exists and is not an empty folder, `OSError` when it cannot be made or
    its disk is full.
    """
    destination = destination.expanduser().absolute()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(
            f"{destination} exists and is not an empty folder; choose another destination or remove it"
        )
    created: list[Path] = []
    try:
        staging = _make_staging(destination, created)
    except OSError as error:
        _remove_empty(created)
        raise type(error)(
            f"cannot write to {destination.parent} ({error.strerror}); choose another destination"
        ) from error
    try:
        yield staging
        if destination.exists():
            destination.rmdir()
        os.replace(staging, destination)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(created)
        if _disk_is_full(error) and str(destination) not in str(error):
            raise OSError(f"{destination} was not written: {error}") from error
        raise


def _disk_is_full(error: BaseException) -> bool:
    """Libraries written in Rust give the system's error number in the message only."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    found = getattr(error, "errno", None) in numbers
    return found or any(f"(os error {number})" in str(error) for number in numbers)


def _make_staging(destination: Path, created: list[Path]) -> Path:
    missing = [parent for parent in destination.parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir()
        created.append(parent)
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
    umask = os.umask(0)
    os.umask(umask)
    staging.chmod(0o777 & ~umask)
    return staging


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except OSError:
            return


def verify_weights(folder: Path, written: WrittenWeights) -> None:
    """Open a written folder again and compare names, shapes and dtypes with what was meant to be written."""
    entries = CheckpointReader(folder).entries
    found = {name: (entry.shape, entry.dtype) for name, entry in entries.items()}
    if found != written.tensors:
        wrong = [name for name in {**found, **written.tensors} if found.get(name) != written.tensors.get(name)]
        raise ConversionError(f"the written files differ from what was meant to be written: {listed(wrong)}")


def verify_model(folder: Path, auto_class: Any, written: WrittenWeights, load: bool) -> None:
    """Open a written folder through its AutoClass.

    Args:
        folder: the folder.
        auto_class: for example `transformers.AutoModel`.
        written: from `write_weights`.
        load: load the weights and ask transformers for missing and unexpected ones; otherwise (large checkpoints) build
            the model of the written configuration on the meta device and compare names and shapes.
    """
    if load:
        model, problems = auto_class.from_pretrained(folder, output_loading_info=True, local_files_only=True)
        found = {kind: sorted(map(str, names)) for kind, names in problems.items() if names}
        del model
    else:
        found = _compare_on_meta(folder, auto_class, written)
    if found:
        raise ConversionError(f"the written checkpoint does not load cleanly: {found}")


def _compare_on_meta(folder: Path, auto_class: Any, written: WrittenWeights) -> dict[str, list[str]]:
    from transformers import AutoConfig

    with torch.device("meta"):
        model = auto_class.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    expected = expected_shapes(model)
    found = {name: shape for name, (shape, _) in written.tensors.items()}
    wrong = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    return {"mismatched_keys": sorted(wrong)} if wrong else {}


def expected_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of `model` stores; tied weights are stored once."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
