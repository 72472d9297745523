"""Push, pull, pin, go offline: against a Hub on this machine, with clients in processes of their own."""

import hashlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from .loopback_hub import TOKEN, USER, LoopbackHub

REPO = f"{USER}/tiny-splade"
TEXTS = ["the cat sat on the mat", "rain and sun"]


def run_python(code, environment):
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, splade_checkpoint, tmp_path_factory):
    """Two versions of a model and its processor, pushed by `push_to_hub` from a process with the package; the first
    one is tagged. Gives the commits and the vectors that each version had in the publisher's process."""
    home = tmp_path_factory.mktemp("publisher")
    code = f"""
import json, torch, rarezoo
from huggingface_hub import HfApi
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained({str(splade_checkpoint)!r}).eval()
processor = AutoProcessor.from_pretrained({str(splade_checkpoint)!r})
def encode():
    return model.encode_documents({TEXTS!r}, processor=processor, output="dense")
vectors = [encode()]
model.push_to_hub("{REPO}")
first = processor.push_to_hub("{REPO}").oid
HfApi().create_tag("{REPO}", tag="v1", revision=first)
with torch.no_grad():
    model.lm_head.weight.mul_(-1)
second = model.push_to_hub("{REPO}", commit_message="Other weights").oid
torch.save([*vectors, encode()], {str(home / "vectors.pt")!r})
print(json.dumps([first, second]))
"""
    first, second = json.loads(run_python(code, hub.environment(home)).splitlines()[-1])
    return {"commits": [first, second], "vectors": torch.load(home / "vectors.pt")}


@pytest.fixture(scope="module")
def reader_home(tmp_path_factory):
    return tmp_path_factory.mktemp("reader")


def load_revisions(revisions):
    """Code that prints the vectors of each revision, loaded from the Hub's code alone."""
    return f"""
        import torch
        from transformers import AutoModel, AutoModelForMaskedLM, AutoProcessor
        found = []
        for revision in {revisions!r}:
            options = dict(revision=revision, trust_remote_code=True)
            model = AutoModel.from_pretrained("{REPO}", **options).eval()
            processor = AutoProcessor.from_pretrained("{REPO}", **options)
            found.append(model.encode_documents({TEXTS!r}, processor=processor, output="dense").tolist())
        head = AutoModelForMaskedLM.from_pretrained("{REPO}", trust_remote_code=True)
        assert type(head).__name__ == "MistralSpladeForMaskedLM"
        print(found)
    """


def test_a_push_holds_all_that_a_reader_needs(hub, pushed, splade_checkpoint):
    local = {path.name for path in splade_checkpoint.iterdir() if path.is_file()}
    assert local <= hub.files(REPO)
    assert {"modeling_mistral_splade.py", "configuration_mistral_splade.py", "tokenizer.json"} <= hub.files(REPO)
    first, second = hub.repositories[REPO].resolve("v1"), hub.repositories[REPO].resolve("main")
    assert [first.oid, second.oid] == pushed["commits"]
    changed = {path for path in second.files if first.files.get(path) != second.files[path]}
    assert changed == {"model.safetensors"}
    weights = hub.content(REPO, "model.safetensors", "v1")
    assert weights == (splade_checkpoint / "model.safetensors").read_bytes()
    assert first.files["model.safetensors"].large, "weights go through large-file storage"
    titles = [commit.title for commit in hub.repositories[REPO].history("main")]
    assert (titles[0], titles[-1]) == ("Other weights", "initial commit")


def test_loads_from_the_hub_without_the_package(hub, pushed, reader_home, run_without_rarezoo):
    revisions = ["main", "v1", pushed["commits"][0]]
    printed = run_without_rarezoo(load_revisions(revisions), **hub.environment(reader_home))
    main, tagged, pinned = (torch.tensor(rows) for rows in json.loads(printed.splitlines()[-1]))
    assert torch.equal(main, pushed["vectors"][1])
    assert torch.equal(tagged, pushed["vectors"][0])
    assert torch.equal(pinned, tagged)
    assert not torch.equal(main, tagged)


def test_offline_from_the_cache(pushed, reader_home, run_without_rarezoo):
    """Runs after the download above: the server that this process is pointed at does not answer any more."""
    with LoopbackHub() as gone:
        environment = {**gone.environment(reader_home), "HF_HUB_OFFLINE": "1"}
    printed = run_without_rarezoo(load_revisions(["main", "v1"]), **environment)
    main, tagged = (torch.tensor(rows) for rows in json.loads(printed.splitlines()[-1]))
    assert torch.equal(main, pushed["vectors"][1])
    assert torch.equal(tagged, pushed["vectors"][0])


def test_with_the_package_no_flag_is_needed_and_errors_are_clear(hub, pushed, tmp_path):
    code = f"""
import json, rarezoo
from transformers import AutoModel
model = AutoModel.from_pretrained("{REPO}")
print(type(model).__module__)
for name, options in (("{USER}/absent", {{}}), ("{REPO}", {{"revision": "v9"}})):
    try:
        AutoModel.from_pretrained(name, **options)
    except OSError as error:
        print(json.dumps(str(error)))
"""
    module, missing_repo, missing_revision = run_python(code, hub.environment(tmp_path)).splitlines()
    assert module == "rarezoo.mistral_splade.modeling_mistral_splade"
    assert f"{USER}/absent is not a local folder and is not a valid model identifier" in json.loads(missing_repo)
    assert "v9 is not a valid git identifier" in json.loads(missing_revision)


def hf(environment, *arguments):
    program = Path(sys.executable).parent / "hf"
    return subprocess.run(
        [str(program), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_hf_command_line(hub, pushed, splade_checkpoint, tmp_path):
    environment = hub.environment(tmp_path / "home")
    name = f"{USER}/by-command-line"

    uploaded = hf(environment, "upload", name, splade_checkpoint, ".")
    assert uploaded.returncode == 0, uploaded.stderr
    assert hub.content(name, "model.safetensors") == (splade_checkpoint / "model.safetensors").read_bytes()

    downloaded = hf(environment, "download", name, "--local-dir", tmp_path / "copy")
    assert downloaded.returncode == 0, downloaded.stderr
    for path in splade_checkpoint.iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()

    info = hf(environment, "models", "info", REPO)
    assert info.returncode == 0, info.stderr
    assert pushed["commits"][1] in info.stdout

    absent = hf(environment, "download", f"{USER}/absent")
    assert absent.returncode != 0 and "not found" in (absent.stdout + absent.stderr).lower()


def request(hub, method, path, body=None, token=TOKEN, **headers):
    """One raw request: (status, headers, body)."""
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    sent = urllib.request.Request(f"{hub.endpoint}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(sent) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


class TestServer:
    """The server itself keeps the Hub's contract, so that the tests above mean something."""

    @pytest.fixture
    def hub(self):
        with LoopbackHub() as hub:
            yield hub

    def create(self, hub, **options):
        status, _, body = request(hub, "POST", "/api/repos/create", {"name": "thing", **options})
        assert status == 200
        return json.loads(body)["name"]

    def commit(self, hub, name, parent=None, **files):
        lines = [{"key": "header", "value": {"summary": "s", **({"parentCommit": parent} if parent else {})}}]
        lines += [{"key": "lfsFile", "value": {"path": path, "oid": oid}} for path, oid in files.items()]
        body = "\n".join(map(json.dumps, lines)).encode()
        return request(hub, "POST", f"/api/models/{name}/commit/main", body)

    def test_ranges_and_etags(self, hub):
        name = self.create(hub)
        content = bytes(range(256)) * 4
        oid = hashlib.sha256(content).hexdigest()
        assert request(hub, "PUT", f"/objects/{oid}", content)[0] == 200
        assert self.commit(hub, name, **{"weights": oid})[0] == 200
        path = f"/{name}/resolve/main/weights"

        status, headers, body = request(hub, "HEAD", path)
        assert (status, headers["Content-Length"], headers["ETag"], body) == (200, "1024", f'"{oid}"', b"")
        status, headers, body = request(hub, "GET", path, Range="bytes=1000-")
        assert (status, headers["Content-Range"], body) == (206, "bytes 1000-1023/1024", content[1000:])
        assert request(hub, "GET", path, Range="bytes=5-9")[2] == content[5:10]
        assert request(hub, "GET", path, Range="bytes=2000-")[0] == 416
        status, headers, _ = request(hub, "GET", f"/{name}/resolve/main/absent")
        assert (status, headers["X-Error-Code"]) == (404, "EntryNotFound")
        status, headers, _ = request(hub, "GET", f"/{name}/resolve/v9/weights")
        assert (status, headers["X-Error-Code"]) == (404, "RevisionNotFound")

    def test_refuses_damaged_or_missing_uploads(self, hub):
        name = self.create(hub)
        oid = hashlib.sha256(b"whole").hexdigest()
        assert request(hub, "PUT", f"/objects/{oid}", b"half")[0] == 400
        assert self.commit(hub, name, weights=oid)[0] == 400
        assert hub.files(name) == {".gitattributes"}

    def test_a_commit_on_an_old_parent_is_refused(self, hub):
        name = self.create(hub)
        parent = hub.repositories[name].branches["main"]
        assert self.commit(hub, name, parent)[0] == 200
        assert self.commit(hub, name, parent)[0] == 412

    def test_writes_and_private_reads_need_the_token(self, hub):
        name = self.create(hub, visibility="private")
        assert request(hub, "GET", f"/api/models/{name}")[0] == 200
        status, headers, _ = request(hub, "GET", f"/api/models/{name}", token=None)
        assert (status, headers["X-Error-Code"]) == (404, "RepoNotFound")
        assert request(hub, "POST", "/api/repos/create", {"name": "other"}, token=None)[0] == 401
        assert request(hub, "DELETE", "/api/repos/delete", {"name": "thing"}, token="hf_wrong")[0] == 401
        assert request(hub, "DELETE", "/api/repos/delete", {"name": "thing"})[0] == 200
        assert hub.repositories == {}


def test_clients_of_the_tests_never_leave_this_machine(hub, tmp_path):
    environment = hub.environment(tmp_path)
    assert environment["HF_ENDPOINT"].startswith("http://127.0.0.1:")
    assert not [name for name in environment if name.startswith("HF_") and "TOKEN" in name and name != "HF_TOKEN"]
    assert os.environ.get("HF_HUB_OFFLINE") == "1", "this process itself stays offline"
