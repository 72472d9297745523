"""Push a checkpoint folder to the Hub: its card, and the files that a checkpoint consists of, nothing else."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from rarezoo.model_cards.card import (
    WEIGHT_FILES,
    _given,
    _read_config,
    is_authored,
    is_plain,
    named_base,
    read_json,
    write_card,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)

# A list of what belongs, not of what does not: optimizer states, logs, notebooks and key files stay where they are.
CHECKPOINT_FILES = (
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "config.json",
    "generation_config.json",
    *WEIGHT_FILES,
    "model.safetensors.index.json",
    "transplant_report.json",
    "configuration_*.py",
    "modeling_*.py",
    "processing_*.py",
    "tokenization_*.py",
    "sentence_transformers_*.py",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "lora/adapter_config.json",
    "lora/adapter_model.safetensors",
    "modules.json",
    "config_sentence_transformers.json",
    "artifact.metadata",
    "sentence_bert_config.json",
    "training_recipe.json",
    "evaluation.json",
    "quantization_report.json",
    "quantization_report.md",
)


def checkpoint_files(folder: str | os.PathLike[str], extra_files: Sequence[str] = ()) -> list[str]:
    """Paths, relative to the folder, of what `push` uploads: the files of a checkpoint, the code that its `auto_map`
    needs, the module folders of sentence-transformers, and what matches `extra_files` (patterns such as "*.png")."""
    folder = Path(folder)
    patterns = [*CHECKPOINT_FILES, *_code_files(folder), *_module_files(folder), *extra_files]
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if any(_matches(path, pattern) for pattern in patterns)]


def _matches(path: str, pattern: str) -> bool:
    """Like a shell pattern: `*` does not cross a slash."""
    return path.count("/") == pattern.count("/") and fnmatch(path, pattern)


def _code_files(folder: Path) -> list[str]:
    """File names of the modules that `auto_map` names and of those that they import from beside themselves."""
    from transformers.dynamic_module_utils import get_relative_imports

    references = read_json(folder / "config.json", dict).get("auto_map", {}).values()
    waiting = [f"{reference.split('.')[0]}.py" for reference in references if "--" not in reference]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found and (folder / name).is_file():
            waiting += [f"{module}.py" for module in get_relative_imports(folder / name)]
        found.add(name)
    return sorted(found)


def _module_files(folder: Path) -> list[str]:
    modules = read_json(folder / "modules.json", list) or []
    return [f"{module['path']}/{name}" for module in modules if module["path"] for name in ("*.json", "*.safetensors")]


def check_complete(folder: Path) -> None:
    """Raise `FileNotFoundError` naming everything that a reader of the folder would miss, and `ValueError` where the
    configuration cannot be read elsewhere."""
    family, config = _read_config(folder)
    refers_to_base = family.name == "tokenizer_transplant" and not is_plain(family, config)
    weights = ["transplant_matrix.safetensors"] if refers_to_base else _weight_files(folder)
    wanted = [*weights, *_code_files(folder)]
    if family.processor:
        wanted += ["processor_config.json", "tokenizer_config.json"]
    missing = sorted({name for name in wanted if not (folder / name).is_file()})
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a whole checkpoint: {', '.join(missing)} missing; save the model and its processor with "
            "save_pretrained first"
        )
    if is_plain(family, config):
        return
    if refers_to_base and not named_base(config):
        raise ValueError(
            f"{folder / 'config.json'} names the folder {config.get('base_model_name_or_path')!r} as its base, which "
            "readers do not have: publish the base, and write its name on the Hub as base_model_name_or_path"
        )
    if "AutoModel" not in config.get("auto_map", {}):
        raise ValueError(f"{folder / 'config.json'} has no auto_map: readers without rarezoo could not load the model")


def _weight_files(folder: Path) -> list[str]:
    index = read_json(folder / "model.safetensors.index.json", dict)
    return ["model.safetensors"] if index is None else sorted(set(index["weight_map"].values()))


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload checkpoint",
    extra_files: Sequence[str] = (),
    license: str | None = None,
    base_model: str | None = None,
    language: str | None = None,
) -> CommitInfo:
    """Write the folder's card and upload the checkpoint as one commit; the repository and branch are made when absent.

    Args:
        folder: checkpoint with configuration, code, weights and processor. Its README.md is rewritten by
            `write_card`, unless it was written or edited by hand: then it goes up as it is, which a warning says.
        repo_id: "owner/name".
        revision: branch to commit to; "main" when None.
        private: visibility of a repository that this call creates.
        token: Hub token; the stored one when None.
        extra_files: patterns of further files to upload, relative to the folder. Without them only the files of a
            checkpoint go (see `checkpoint_files`): no training states, logs or key files.
        license, base_model, language: see `build_card`.

    Returns:
        The commit: `.oid`, `.commit_url`.

    Raises:
        FileNotFoundError: part of the checkpoint is missing; nothing has been uploaded.
        ValueError: not a checkpoint of the zoo, a name that is not "owner/name", or metadata that the Hub refuses.
        ConnectionError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import get_session, validate_repo_id

    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"the repository must be OWNER/NAME; found {repo_id!r}")
    folder = Path(folder)
    check_complete(folder)
    if is_authored(folder / "README.md"):
        unused = _given(license=license, base_model=base_model, language=language)
        logger.warning(
            "%s was written or edited by hand and is uploaded unchanged%s",
            folder / "README.md",
            f", without the given {', '.join(unused)}" if unused else "",
        )
    else:
        write_card(folder, repo_id, license=license, base_model=base_model, language=language)
    files = checkpoint_files(folder, extra_files)
    left_out = sorted(path.name for path in folder.iterdir() if not any(f.split("/")[0] == path.name for f in files))
    if left_out:
        logger.warning("not part of the checkpoint, not uploaded: %s", ", ".join(left_out))
    api = HfApi(token=token)
    # httpx or its successor, whichever this version of huggingface_hub speaks through.
    client_library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            allow_patterns=[_literal(path) for path in files],
            commit_message=commit_message,
        )
    except client_library.TransportError as error:
        raise ConnectionError(f"the Hub cannot be reached ({error}); push {folder} again later") from error


def _literal(path: str) -> str:
    """A pattern that matches this path only."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)
