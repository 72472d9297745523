"""Encoding jobs on a real (tiny) model: the same rows as the model gives, interruptions, several processes, errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rarezoo.mistral_splade import MistralSpladeForRetrieval, MistralSpladeProcessor
from rarezoo.retrieval import Document, SparseEmbeddings, build_index, encode_corpus, model_fingerprint
from rarezoo.retrieval.fingerprint import processor_fingerprint

from .folders import contents

WORDS = "the of ranking sparse vector query term weight echo model retrieval index learned token é 日本 a to".split()

# Arguments: checkpoint, corpus, target, seconds per text.
JOB = """
import json, sys, time
import torch
torch.set_num_threads(1)
from rarezoo.mistral_splade import MistralSpladeForRetrieval, MistralSpladeProcessor
from rarezoo.retrieval import encode_corpus, read_corpus

checkpoint, corpus, target, seconds = sys.argv[1:]

def documents():
    for document in read_corpus(corpus):
        time.sleep(float(seconds))
        yield document

model = MistralSpladeForRetrieval.from_pretrained(checkpoint)
processor = MistralSpladeProcessor.from_pretrained(checkpoint)
embeddings = encode_corpus(model, processor, documents(), target, batch_size=4, shard_size=6, top_k=20)
print(f"{len(embeddings)}\\n", end="", flush=True)  # one write: processes share the output
"""
SAME_JOB = {"batch_size": 4, "shard_size": 6, "top_k": 20}


@pytest.fixture(scope="module")
def model(splade_checkpoint: Path) -> MistralSpladeForRetrieval:
    return MistralSpladeForRetrieval.from_pretrained(splade_checkpoint)


@pytest.fixture(scope="module")
def processor(splade_checkpoint: Path) -> MistralSpladeProcessor:
    return MistralSpladeProcessor.from_pretrained(splade_checkpoint)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, size=generator.integers(0, 30))) for _ in range(47)]
    return [Document(f"document-{number}", text) for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def one_process(model, processor, documents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted job of one process writes."""
    target = tmp_path_factory.mktemp("encoding") / "one process"
    encode_corpus(model, processor, documents, target, **SAME_JOB)
    return target


@pytest.fixture(scope="module")
def corpus_file(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [json.dumps({"_id": document.id, "text": document.text}) + "\n" for document in documents]
    path.write_text("".join(rows), encoding="utf-8")
    return path


def job(checkpoint: Path, corpus: Path, target: Path, seconds: float = 0) -> list[str]:
    return [sys.executable, "-c", JOB, str(checkpoint), str(corpus), str(target), str(seconds)]


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_rows_equal_those_of_each_text_alone(model, processor, documents, tmp_path: Path) -> None:
    embeddings = encode_corpus(model, processor, iter(documents), tmp_path / "e", batch_size=5, shard_size=20)
    assert list(embeddings.ids) == [document.id for document in documents]
    assert [len(shard) for shard in embeddings.iter_shards()] == [20, 20, 7]
    assert embeddings.fingerprint == model_fingerprint(model) and embeddings.vocab_size == 160
    for row, document in enumerate(documents):
        inputs = processor.process_documents([document.text])
        with torch.no_grad():
            alone = model(**inputs).sparse_embedding[0].numpy()
        np.testing.assert_allclose(embeddings.matrix[row].toarray()[0], alone, atol=1e-5)
    embeddings.verify()


def test_queries_use_the_query_side(model, processor, documents, tmp_path: Path) -> None:
    embeddings = encode_corpus(model, processor, documents[:9], tmp_path / "e", kind="query", top_k=8)
    expected = model.encode_queries([document.text for document in documents[:9]], processor, top_k=8)
    np.testing.assert_allclose(embeddings.matrix.toarray(), expected.toarray(), atol=1e-5)
    assert embeddings.matrix.getnnz(axis=1).max() == 8
    as_documents = model.encode_documents([document.text for document in documents[:9]], processor, top_k=8)
    assert abs(embeddings.matrix - as_documents).max() > 1e-2


def test_a_job_goes_on_in_the_precision_that_it_was_begun_in(
    splade_checkpoint, model, processor, documents, one_process: Path, tmp_path: Path
) -> None:
    target = tmp_path / "e"
    shutil.copytree(one_process, target)
    (target / "shard-00003.safetensors").unlink()
    in_bfloat16 = MistralSpladeForRetrieval.from_pretrained(splade_checkpoint, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"another job \(dtype: 'float32' there, 'bfloat16' now\)"):
        encode_corpus(in_bfloat16, processor, documents, target, **SAME_JOB)
    assert not (target / "shard-00003.safetensors").exists()
    # As the first release began jobs.
    manifest = json.loads((target / "embeddings.json").read_text())
    assert manifest.pop("dtype") == "float32" and manifest.pop("vocabulary")
    (target / "embeddings.json").write_text(json.dumps(manifest))
    encode_corpus(model, processor, documents, target, **SAME_JOB)
    assert contents(target) == contents(one_process)


def test_top_k_defaults_to_the_models_own(splade_checkpoint, processor, documents, tmp_path: Path) -> None:
    model = MistralSpladeForRetrieval.from_pretrained(splade_checkpoint, top_k_document=7)
    embeddings = encode_corpus(model, processor, documents, tmp_path / "e")
    assert embeddings.matrix.getnnz(axis=1).max() == 7
    assert json.loads((tmp_path / "e" / "embeddings.json").read_text())["top_k"] == 7


def test_a_killed_job_resumes_without_loss_or_duplicates(
    model, processor, documents, splade_checkpoint: Path, corpus_file: Path, one_process: Path, tmp_path: Path
) -> None:
    target = tmp_path / "killed"
    arguments = job(splade_checkpoint, corpus_file, target, seconds=0.15)
    process = subprocess.Popen(arguments, env=one_thread(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(list(target.glob("shard-*"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(ValueError, match="has not finished"):
        SparseEmbeddings.open(target)
    kept = {path.name: path.stat().st_mtime_ns for path in target.glob("shard-*")}
    assert 3 <= len(kept) < 8
    (target / ".shard-00006.safetensors.1.partial").write_bytes(b"being written when the job was killed")
    assert len(encode_corpus(model, processor, iter(documents), target, **SAME_JOB)) == 47
    assert contents(target) == contents(one_process)
    for name, time_written in kept.items():
        assert (target / name).stat().st_mtime_ns == time_written


def test_two_processes_write_the_same_files_as_one(
    splade_checkpoint: Path, corpus_file: Path, one_process: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    script = tmp_path / "job.py"
    script.write_text(JOB)
    target = tmp_path / "two processes"
    # With --cpu, accelerate starts a single process unless there is MPI; --multi_gpu starts them all, and without GPUs
    # they run on the CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", str(free_port()), str(script)]
    launch += [str(splade_checkpoint), str(corpus_file), str(target), "0"]
    finished = subprocess.run(launch, capture_output=True, text=True, env=one_thread())
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["47", "47"]
    assert contents(target) == contents(one_process)


def test_processes_that_do_not_know_of_each_other_are_refused(model, processor, tmp_path: Path, monkeypatch) -> None:
    """Each would take itself for the only one and write the same files."""
    state = pytest.importorskip("accelerate").PartialState()
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        with pytest.raises(RuntimeError, match=r"2 processes were launched, but .* knows 1"):
            encode_corpus(model, processor, [Document("a", "term")], tmp_path / "e")
    finally:
        state._reset_state()
    assert not (tmp_path / "e").exists()


def test_a_finished_job_can_be_called_again(model, processor, documents, tmp_path: Path) -> None:
    encode_corpus(model, processor, documents, tmp_path / "e", shard_size=10)
    before = contents(tmp_path / "e")

    def must_not_encode(*_, **__):
        raise AssertionError("encoded again")

    model_encode, model.encode_documents = model.encode_documents, must_not_encode
    try:
        assert len(encode_corpus(model, processor, documents, tmp_path / "e", shard_size=10)) == 47
    finally:
        model.encode_documents = model_encode
    assert contents(tmp_path / "e") == before


def test_other_settings_are_refused(model, processor, splade_checkpoint, documents, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    encode_corpus(model, processor, documents[:5], folder, top_k=9)
    before = contents(folder)
    other_processor = MistralSpladeProcessor.from_pretrained(splade_checkpoint, max_document_length=7)
    other_model = MistralSpladeForRetrieval.from_pretrained(splade_checkpoint)
    with torch.no_grad():
        other_model.lm_head.weight.mul_(1.1)
    for message, arguments in [
        ("top_k: 9 there, 8 now", (model, processor, documents[:5], folder, "document", 32, 2048, 8)),
        ("shard_size: 2048 there, 4 now", (model, processor, documents[:5], folder, "document", 32, 4, 9)),
        ("encoded: 'document' there, 'query' now", (model, processor, documents[:5], folder, "query", 32, 2048, 9)),
        ("processor: ", (model, other_processor, documents[:5], folder, "document", 32, 2048, 9)),
        ("fingerprint: ", (other_model, processor, documents[:5], folder, "document", 32, 2048, 9)),
    ]:
        with pytest.raises(ValueError, match=message):
            encode_corpus(*arguments)
    assert contents(folder) == before


def test_a_changed_corpus_is_noticed(model, processor, documents, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    encode_corpus(model, processor, documents, folder, shard_size=20)
    before = contents(folder)
    changed = [*documents[:25], Document(documents[25].id, "another text"), *documents[26:]]
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors was encoded from other texts"):
        encode_corpus(model, processor, changed, folder, shard_size=20)
    with pytest.raises(ValueError, match=r"holds shard-00002\.safetensors, but the corpus now ends before it"):
        encode_corpus(model, processor, documents[:40], folder, shard_size=20)
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors was encoded from other texts"):
        encode_corpus(model, processor, [*documents, Document("one more", "text")], folder, shard_size=20)
    assert contents(folder) == before


def test_a_shard_damaged_before_the_job_is_resumed_is_named(model, processor, documents, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    encode_corpus(model, processor, documents, folder, shard_size=20)
    whole = contents(folder)
    path = folder / "shard-00001.safetensors"
    path.write_bytes(whole[path.name][:-5])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged or truncated.*Remove the file"):
        encode_corpus(model, processor, documents, folder, shard_size=20)
    path.unlink()
    encode_corpus(model, processor, documents, folder, shard_size=20)
    assert contents(folder) == whole


def test_duplicate_identifiers_stop_the_job_before_they_are_encoded(model, processor, documents, tmp_path) -> None:
    with pytest.raises(ValueError, match="duplicate identifier 'document-3'"):
        encode_corpus(model, processor, [*documents, documents[3]], tmp_path / "e", shard_size=10)
    assert len(list((tmp_path / "e").glob("shard-*"))) == 4


def test_vectors_that_are_not_finite_name_the_text(splade_checkpoint, processor, documents, tmp_path: Path) -> None:
    model = MistralSpladeForRetrieval.from_pretrained(splade_checkpoint)
    with torch.no_grad():
        model.lm_head.weight.zero_()[:, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite, for example for ") as raised:
        encode_corpus(model, processor, documents, tmp_path / "e")
    assert any(f"for {document.text[:80]!r}: " in str(raised.value) for document in documents)
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["embeddings.json"]


def test_the_corpus_is_streamed(model, processor, tmp_path: Path) -> None:
    """When a shard is written, at most one shard of texts has been taken from the corpus beyond it."""

    def stream() -> Iterator[Document]:
        for number in range(40):
            assert len(list((tmp_path / "e").glob("shard-*"))) >= number // 4
            yield Document(str(number), "sparse vector")

    assert len(encode_corpus(model, processor, stream(), tmp_path / "e", shard_size=4)) == 40


def test_an_interrupted_stream_keeps_the_finished_shards(model, processor, documents, tmp_path: Path) -> None:
    def stream() -> Iterator[Document]:
        yield from documents[:25]
        raise ConnectionError("the disk with the corpus went away")

    with pytest.raises(ConnectionError):
        encode_corpus(model, processor, stream(), tmp_path / "e", shard_size=10)
    assert len(list((tmp_path / "e").glob("shard-*"))) == 2
    encode_corpus(model, processor, documents, tmp_path / "e", shard_size=10)
    encode_corpus(model, processor, documents, tmp_path / "whole", shard_size=10)
    assert contents(tmp_path / "e") == contents(tmp_path / "whole")


def test_a_corpus_without_texts_and_texts_without_characters(model, processor, tmp_path: Path) -> None:
    none = encode_corpus(model, processor, [], tmp_path / "none")
    assert len(none) == 0 and none.vocab_size == 160
    empty = encode_corpus(model, processor, [Document("a", ""), Document("b", "term")], tmp_path / "empty")
    assert list(empty.ids) == ["a", "b"] and np.isfinite(empty.matrix.data).all()


def test_folders_with_other_contents_are_left_alone(model, processor, documents, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        encode_corpus(model, processor, documents, tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_bad_arguments(model, processor, documents, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind must be 'document' or 'query'; found 'passage'"):
        encode_corpus(model, processor, documents, tmp_path / "e", kind="passage")
    for name in ("batch_size", "shard_size", "top_k"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; found 0"):
            encode_corpus(model, processor, documents, tmp_path / "e", **{name: 0})
    assert not (tmp_path / "e").exists()


def test_a_full_disk_keeps_what_is_whole_and_the_job_resumes(
    model, processor, documents, splade_checkpoint: Path, corpus_file: Path, one_process: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for the full disk: the shard that does not fit leaves nothing."""
    target = tmp_path / "e"
    largest = max(path.stat().st_size for path in one_process.glob("shard-*"))
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({largest - 1}, {largest - 1}))\n"
    arguments = job(splade_checkpoint, corpus_file, target)
    arguments[2] = limit + JOB
    finished = subprocess.run(arguments, capture_output=True, text=True, env=one_thread())
    assert finished.returncode == 1 and "CannotWriteError: cannot write" in finished.stderr
    written = contents(target)
    assert written and all(len(content) < largest for content in written.values())
    assert not any(name.endswith(".partial") for name in written)
    encode_corpus(model, processor, documents, target, **SAME_JOB)
    assert contents(target) == contents(one_process)


def test_a_read_only_folder_is_one_clear_error_before_anything_is_encoded(model, processor, tmp_path: Path) -> None:
    taken = []

    def stream() -> Iterator[Document]:
        taken.append(1)
        yield Document("a", "term")

    user = os.geteuid()
    tmp_path.chmod(0o500)
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(OSError, match=r"cannot write .*Permission denied"):
            encode_corpus(model, processor, stream(), tmp_path / "e")
    finally:
        if user == 0:
            os.seteuid(user)
        tmp_path.chmod(0o700)
    assert not taken and list(tmp_path.iterdir()) == []


def test_progress_is_shown(model, processor, documents, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    encode_corpus(model, processor, documents, tmp_path / "e", shard_size=10)
    shown = capsys.readouterr().err
    assert "Encoding documents: 100%" in shown and "47/47" in shown


def test_fingerprint_tells_models_apart_but_not_copies(model, splade_checkpoint: Path, tmp_path: Path) -> None:
    expected = model_fingerprint(model)
    assert len(expected) == 32 and int(expected, 16) > 0
    model.save_pretrained(tmp_path / "copy")
    same = [
        MistralSpladeForRetrieval.from_pretrained(tmp_path / "copy"),
        MistralSpladeForRetrieval.from_pretrained(splade_checkpoint, dtype=torch.bfloat16),
        MistralSpladeForRetrieval.from_pretrained(splade_checkpoint, head_chunk_size=7, top_k_document=3),
    ]
    assert {model_fingerprint(copy) for copy in same} == {expected}
    others = [
        MistralSpladeForRetrieval.from_pretrained(splade_checkpoint, pooling="sum"),
        MistralSpladeForRetrieval.from_pretrained(splade_checkpoint, logit_shift=1),
        MistralSpladeForRetrieval.from_pretrained(splade_checkpoint, activation="log1p_log1p_relu"),
    ]
    for name, parameter in same[0].named_parameters():
        changed = MistralSpladeForRetrieval.from_pretrained(splade_checkpoint)
        # One step of an optimizer with a small learning rate, on one tensor only.
        generator = torch.Generator().manual_seed(0)
        step = 1e-3 * torch.randn(parameter.shape, generator=generator)
        changed.get_parameter(name).data.add_(step)
        others.append(changed)
    fingerprints = [model_fingerprint(other) for other in others]
    assert expected not in fingerprints and len(set(fingerprints)) == len(fingerprints)


def test_fingerprint_of_a_quantized_model_survives_use(splade_checkpoint: Path) -> None:
    """bitsandbytes re-packs its 4-bit weights in the first forward pass on some processors."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    from rarezoo import load_preset

    config = load_preset("mistral_splade", "tiny", vocab_size=200)
    model = MistralSpladeForRetrieval(config)
    folder = splade_checkpoint.parent / "to quantize"
    model.save_pretrained(folder)
    scheme = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"])
    quantized = MistralSpladeForRetrieval.from_pretrained(folder, quantization_config=scheme)
    before = model_fingerprint(quantized)
    with torch.no_grad():
        quantized(input_ids=torch.arange(12)[None], pool_mask=torch.ones(1, 12, dtype=torch.long))
    assert model_fingerprint(quantized) == before != model_fingerprint(model)


def test_processor_fingerprint_survives_use(processor, splade_checkpoint: Path) -> None:
    before = processor_fingerprint(processor)
    processor.tokenizer(["a", "the of"], padding=True, truncation=True, max_length=5)
    assert processor_fingerprint(processor) == before
    for setting in ({"prompt": "another"}, {"document_template": "{%%text%%}"}, {"max_query_length": 9}):
        other = MistralSpladeProcessor.from_pretrained(splade_checkpoint, **setting)
        assert processor_fingerprint(other) != before


@pytest.mark.parametrize("texts", [["one text", "another"], "one text"])
def test_bare_strings_are_no_documents(model, processor, texts, tmp_path):
    with pytest.raises(TypeError, match=r"expected objects with id and text, such as Document\(id, text\).* found 'o"):
        encode_corpus(model, processor, texts, tmp_path / "x")


def test_bare_vectors_are_no_embeddings(tmp_path):
    with pytest.raises(TypeError, match=r"expected embeddings with identifiers.* found list"):
        build_index([torch.ones(2, 4)], tmp_path / "x")
