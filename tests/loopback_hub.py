"""A small Hub on 127.0.0.1: the endpoints that huggingface_hub and transformers really call, with state in memory.

    with LoopbackHub() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path / "hf_home")})

huggingface_hub reads its endpoint once, at import: clients belong in a subprocess that gets `hub.environment(...)`.
Repositories have commits, branches, tags and large-file objects; every write and every private read needs the token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "somebody"
TOKEN = "hf_loopback"
LARGE_FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".onnx")


class HubError(Exception):
    """An answer other than success; `code` travels in X-Error-Code, which decides the client's exception class."""

    def __init__(self, status: HTTPStatus, message: str, code: str | None = None, body: dict[str, Any] | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.body = body if body is not None else {"error": message}


@dataclass(frozen=True)
class StoredFile:
    """Content address of one file: the git blob id, the SHA-256, its size in bytes, and how it was uploaded."""

    blob_id: str
    sha256: str
    size: int
    large: bool

    @classmethod
    def of(cls, content: bytes, large: bool) -> StoredFile:
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return cls(blob, hashlib.sha256(content).hexdigest(), len(content), large)

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob_id

    def describe(self, path: str) -> dict[str, Any]:
        row: dict[str, Any] = {"type": "file", "path": path, "oid": self.blob_id, "size": self.size}
        if self.large:
            row["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 130}
        return row


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, StoredFile]


@dataclass
class Repository:
    """One repository: an append-only set of commits, and the names that point at them."""

    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, StoredFile], title: str, message: str = "") -> Commit:
        parent = self.branches.get(branch)
        listing = sorted((path, stored.blob_id) for path, stored in files.items())
        identity = json.dumps([self.repo_id, len(self.commits), parent, title, listing])
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commit = Commit(hashlib.sha1(identity.encode()).hexdigest(), parent, title, message, date, files)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def resolve(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits


def metadata_errors(content: str) -> list[str]:
    """What the Hub refuses in a README's YAML header (its documented field types), as messages."""
    if not content.startswith("---\n"):
        return []
    header, separator, _ = content[4:].partition("\n---")
    if not separator:
        return ["the YAML header is not closed by a line of three dashes"]
    try:
        data = yaml.safe_load(header) or {}
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["the YAML header must be a mapping"]
    errors = []
    for key in ("license", "library_name", "pipeline_tag"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    if not isinstance(data.get("tags", []), list) or not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be an array of strings')
    if "base_model" in data and not isinstance(data["base_model"], (str, list)):
        errors.append('"base_model" must be a string or an array')
    for entry in data.get("model-index", []):
        if not entry.get("name"):
            errors.append('"model-index[].name" is required')
        for result in entry.get("results", []):
            errors.extend(_result_errors(result))
    return errors


def _result_errors(result: dict[str, Any]) -> list[str]:
    errors = []
    if not isinstance(result.get("task", {}).get("type"), str):
        errors.append('"model-index[].results[].task.type" is required')
    for key in ("type", "name"):
        if not isinstance(result.get("dataset", {}).get(key), str):
            errors.append(f'"model-index[].results[].dataset.{key}" is required')
    if not result.get("metrics"):
        errors.append('"model-index[].results[].metrics" is required')
    for metric in result.get("metrics", []):
        if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), (int, float, str)):
            errors.append('"model-index[].results[].metrics[]" needs a type and a value')
    return errors


class LoopbackHub:
    """The server; a context manager. `repositories`, `objects` and `requests` are open to tests."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path, *, token: str | None = TOKEN) -> dict[str, str]:
        """Environment variables of a client process; `home` becomes its HF_HOME."""
        variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        return {**variables, "HF_TOKEN": token} if token else variables

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering; the state stays readable. A second call does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def content(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        return self.objects[self.repositories[repo_id].resolve(revision).files[path].sha256]

    def files(self, repo_id: str, revision: str = "main") -> set[str]:
        return set(self.repositories[repo_id].resolve(revision).files)

    def store(self, content: bytes, large: bool) -> StoredFile:
        stored = StoredFile.of(content, large)
        self.objects[stored.sha256] = content
        return stored


class _Handler(BaseHTTPRequestHandler):
    state: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        self.state.requests.append(format % args)

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        self.body = self._read_body()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        # Split before unquoting: a revision or a path keeps its own slashes as %2F.
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        try:
            with self.state.lock:
                self._route(parts)
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self._send_json(error.body, error.status, headers)

    def _route(self, parts: list[str]) -> None:
        if parts[0] == "api":
            self._route_api(parts[1:])
        elif parts[0] == "objects":
            self._route_object(parts[1])
        elif len(parts) == 6 and parts[2:] == ["info", "lfs", "objects", "batch"]:
            self._lfs_batch(f"{parts[0]}/{parts[1].removesuffix('.git')}")
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._not_found()

    def _route_api(self, parts: list[str]) -> None:
        fixed: dict[tuple[str, str], Callable[[], None]] = {
            ("GET", "whoami-v2"): self._who_am_i,
            ("POST", "validate-yaml"): self._validate_yaml,
            ("POST", "repos/create"): self._create,
            ("DELETE", "repos/delete"): self._delete,
            ("GET", "models"): self._list_models,
        }
        handler = fixed.get((self.command, "/".join(parts)))
        if handler is not None:
            handler()
        elif parts[0] == "models" and len(parts) >= 3:
            self._route_repository("/".join(parts[1:3]), *parts[3:])
        else:
            self._not_found()

    def _route_repository(self, repo_id: str, verb: str = "", revision: str = "main", *rest: str) -> None:
        handlers: dict[tuple[str, str], Callable[[], None]] = {
            ("GET", ""): lambda: self._info(repo_id, "main"),
            ("GET", "revision"): lambda: self._info(repo_id, revision),
            ("GET", "tree"): lambda: self._tree(repo_id, revision, "/".join(rest)),
            ("POST", "paths-info"): lambda: self._paths_info(repo_id, revision),
            ("GET", "refs"): lambda: self._refs(repo_id),
            ("GET", "commits"): lambda: self._commits(repo_id, revision),
            ("POST", "preupload"): lambda: self._preupload(repo_id, revision),
            ("POST", "commit"): lambda: self._commit(repo_id, revision),
            ("POST", "tag"): lambda: self._create_tag(repo_id, revision),
            ("POST", "branch"): lambda: self._create_branch(repo_id, revision),
        }
        handlers.get((self.command, verb), self._not_found)()

    def _not_found(self) -> None:
        raise HubError(HTTPStatus.NOT_FOUND, f"{self.command} {self.path} is not served")

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _require_token(self) -> None:
        if not self._authorized():
            raise HubError(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")

    def _repository(self, repo_id: str, write: bool = False) -> Repository:
        if write:
            self._require_token()
        repository = self.state.repositories.get(repo_id)
        if repository is None or (repository.private and not self._authorized()):
            raise HubError(HTTPStatus.NOT_FOUND, "Repository not found", "RepoNotFound")
        return repository

    def _who_am_i(self) -> None:
        self._require_token()
        self._send_json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def _validate_yaml(self) -> None:
        errors = [{"message": message} for message in metadata_errors(self._json()["content"])]
        self._send_json({"errors": errors, "warnings": []}, HTTPStatus.BAD_REQUEST if errors else HTTPStatus.OK)

    def _create(self) -> None:
        self._require_token()
        request = self._json()
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        location = {"url": f"{self.state.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.state.repositories:
            message = "You already created this model repo"
            raise HubError(HTTPStatus.CONFLICT, message, body={"error": message, **location})
        private = bool(request.get("private")) or request.get("visibility") == "private"
        repository = Repository(repo_id, private)
        repository.commit("main", {".gitattributes": self.state.store(b"", large=False)}, "initial commit")
        self.state.repositories[repo_id] = repository
        self._send_json(location)

    def _delete(self) -> None:
        request = self._json()
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        self._repository(repo_id, write=True)
        del self.state.repositories[repo_id]
        self._send_json({})

    def _list_models(self) -> None:
        wanted = self.query.get("search", [""])[0]
        visible = [r for r in self.state.repositories.values() if wanted in r.repo_id and not r.private]
        self._send_json([{"id": r.repo_id, "modelId": r.repo_id, "private": False, "tags": []} for r in visible])

    def _info(self, repo_id: str, revision: str) -> None:
        repository = self._repository(repo_id)
        commit = repository.resolve(revision)
        self._send_json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "sha": commit.oid,
                "private": repository.private,
                "lastModified": commit.date,
                "tags": self._card_data(commit).get("tags", []),
                "cardData": self._card_data(commit),
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def _card_data(self, commit: Commit) -> dict[str, Any]:
        readme = commit.files.get("README.md")
        text = self.state.objects[readme.sha256].decode() if readme else ""
        return yaml.safe_load(text[4:].partition("\n---")[0]) or {} if text.startswith("---\n") else {}

    def _tree(self, repo_id: str, revision: str, folder: str) -> None:
        commit = self._repository(repo_id).resolve(revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: stored for path, stored in commit.files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise HubError(HTTPStatus.NOT_FOUND, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        rows, folders = [], set()
        for path, stored in sorted(inside.items()):
            below = path[len(prefix) :].split("/")
            folders.update(prefix + "/".join(below[:depth]) for depth in range(1, len(below) if recursive else 2))
            if len(below) == 1 or recursive:
                rows.append(stored.describe(path))
        folders -= set(inside)
        identifiers = {name: hashlib.sha1(name.encode()).hexdigest() for name in sorted(folders)}
        rows += [{"type": "directory", "path": name, "oid": oid, "size": 0} for name, oid in identifiers.items()]
        self._send_json(rows)

    def _paths_info(self, repo_id: str, revision: str) -> None:
        commit = self._repository(repo_id).resolve(revision)
        wanted = (
            self._json()["paths"] if "json" in self.headers["Content-Type"] else parse_qs(self.body.decode())["paths"]
        )
        self._send_json([commit.files[path].describe(path) for path in wanted if path in commit.files])

    def _refs(self, repo_id: str) -> None:
        repository = self._repository(repo_id)
        self._send_json(
            {
                "branches": _references("refs/heads", repository.branches),
                "tags": _references("refs/tags", repository.tags),
                "converts": [],
            }
        )

    def _commits(self, repo_id: str, revision: str) -> None:
        history = self._repository(repo_id).history(revision)
        self._send_json(
            [
                {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": USER}]}
                for c in history
            ]
        )

    def _create_tag(self, repo_id: str, revision: str) -> None:
        repository = self._repository(repo_id, write=True)
        name = self._json()["tag"]
        if name in repository.tags:
            raise HubError(HTTPStatus.CONFLICT, f"Tag reference exists already: {name}")
        repository.tags[name] = repository.resolve(revision).oid
        self._send_json({})

    def _create_branch(self, repo_id: str, name: str) -> None:
        repository = self._repository(repo_id, write=True)
        if name in repository.branches:
            raise HubError(HTTPStatus.CONFLICT, f"Reference already exists: refs/heads/{name}")
        repository.branches[name] = repository.resolve(self._json().get("startingPoint", "main")).oid
        self._send_json({})

    def _preupload(self, repo_id: str, revision: str) -> None:
        known = self._repository(repo_id, write=True).resolve(revision).files
        answers = []
        for file in self._json()["files"]:
            mode = "lfs" if file["path"].endswith(LARGE_FILE_SUFFIXES) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in known:
                answer["oid"] = known[file["path"]].etag
            answers.append(answer)
        self._send_json({"files": answers})

    def _lfs_batch(self, repo_id: str) -> None:
        self._repository(repo_id, write=True)
        answers = []
        for wanted in self._json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.state.objects:
                href = f"{self.state.endpoint}/objects/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": href}}
            answers.append(answer)
        self._send_json({"transfer": "basic", "objects": answers})

    def _route_object(self, oid: str) -> None:
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise HubError(HTTPStatus.BAD_REQUEST, "the content does not have the announced SHA-256")
            self.state.objects[oid] = self.body
        elif len(self.state.objects.get(oid, b"")) != self._json()["size"]:
            raise HubError(HTTPStatus.BAD_REQUEST, "the object was not stored whole")
        self._send_json({})

    def _commit(self, repo_id: str, revision: str) -> None:
        repository = self._repository(repo_id, write=True)
        if revision not in repository.branches:
            raise HubError(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", "RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = lines[0]["value"]
        if header.get("parentCommit", repository.branches[revision]) != repository.branches[revision]:
            raise HubError(HTTPStatus.PRECONDITION_FAILED, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.resolve(revision).files)
        for line in lines[1:]:
            self._apply(files, line["key"], line["value"])
        commit = repository.commit(revision, files, header["summary"], header.get("description", ""))
        self._send_json(
            {
                "success": True,
                "commitOid": commit.oid,
                "commitUrl": f"{self.state.endpoint}/{repo_id}/commit/{commit.oid}",
                "hookOutput": "",
            }
        )

    def _apply(self, files: dict[str, StoredFile], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = self.state.store(base64.b64decode(value["content"]), large=False)
        elif key == "lfsFile":
            if value["oid"] not in self.state.objects:
                raise HubError(HTTPStatus.BAD_REQUEST, f"{path}: its large-file object was never uploaded")
            files[path] = StoredFile.of(self.state.objects[value["oid"]], large=True)
        elif key in ("deletedFile", "deletedFolder"):
            for known in [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]:
                del files[known]
        else:
            raise HubError(HTTPStatus.BAD_REQUEST, f"unknown operation {key!r}")

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self._repository(repo_id).resolve(revision)
        stored = commit.files.get(path)
        if stored is None:
            raise HubError(HTTPStatus.NOT_FOUND, f"{path} does not exist on {revision}", "EntryNotFound")
        content = self.state.objects[stored.sha256]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{stored.etag}"', "Accept-Ranges": "bytes"}
        if stored.large:
            headers |= {"X-Linked-Size": str(stored.size), "X-Linked-Etag": f'"{stored.etag}"'}
        status = HTTPStatus.OK
        requested = self.headers.get("Range")
        if requested:
            first, _, last = requested.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else stored.size, stored.size)
            if start >= stored.size:
                raise HubError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"{path} has {stored.size} bytes")
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{stored.size}"
            content, status = content[start:stop], HTTPStatus.PARTIAL_CONTENT
        self._send(content, status, headers | {"Content-Type": "application/octet-stream"})

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def _send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {**(headers or {}), "Content-Type": "application/json"})

    def _send(self, content: bytes, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _references(prefix: str, names: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "ref": f"{prefix}/{name}", "targetCommit": oid} for name, oid in sorted(names.items())]
