"""Artefacts on the Hub (a server on loopback that speaks its calls) and in folders."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
import torch

import vpt
from vpt import artifact


@pytest.fixture
def path(tmp_path):
    model = tiny.attach(tiny.vit())
    return vpt.save(model, tmp_path / "run" / "prompt.safetensors", medical=True)


class Hub(BaseHTTPRequestHandler):
    """One repository; small files are sent in the commit, others (`lfs`) before it."""

    def log_message(self, *_):
        pass

    def answer(self, value, code=200, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for key, text in {"Content-Length": len(data), **headers}.items():
            self.send_header(key.replace("_", "-"), str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        state, body = self.server.state, self.body()
        state["calls"].append(self.path)
        if self.headers.get("authorization") != "Bearer hf_good":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            state["asked"] = json.loads(body)
            return self.answer({"url": f"{state['url']}/me/pets", "name": "me/pets"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{state['url']}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    state["files"][value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    state["files"][value["path"]] = state["lfs"][value["oid"]]
            state["commit"] = "c" * 40
            return self.answer(
                {"commitUrl": f"{state['url']}/me/pets/commit/{'c' * 40}", "commitOid": "c" * 40}
            )
        return self.answer({"error": "no such call"}, 404)

    def do_PUT(self):
        self.server.state["lfs"][self.path.rpartition("/")[2]] = self.body()
        self.answer(b"")

    def do_GET(self):
        state = self.server.state
        name = re.fullmatch(r"/me/pets/resolve/main/(.+)", self.path)
        if not name or name[1] not in state["files"]:
            code = "EntryNotFound" if name else "RepoNotFound"
            return self.answer({"error": "not found"}, 404, X_Error_Code=code)
        data = state["files"][name[1]]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return self.answer(data, X_Repo_Commit=state["commit"], ETag=etag)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    server.state = {"calls": [], "files": {}, "lfs": {}, "url": url}
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def call(kind, *arguments, token="hf_good"):
        """`vpt KIND …` in a process of its own: huggingface_hub reads its settings once."""
        settings = {"HF_ENDPOINT": url, "HF_HOME": tmp_path / "hf", "HF_HUB_DISABLE_XET": 1}
        environment = os.environ | {key: str(value) for key, value in settings.items()}
        environment |= {"HF_TOKEN": token, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "vpt.cli", kind, *map(str, arguments)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    yield call, server.state
    server.shutdown()


def test_a_folder_holds_artefact_and_card_and_gives_them_back(path, tmp_path):
    vpt.push(path, tmp_path / "shared", licence="apache-2.0")
    pulled = vpt.pull(tmp_path / "shared", tmp_path / "pets.safetensors", backbone=tiny.vit())
    model, images = vpt.load(pulled, tiny.vit()), tiny.images(2)
    torch.testing.assert_close(model(images), vpt.load(path, tiny.vit())(images))
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "Not for clinical use." in card
    for name in tiny.NAMES:
        assert f"`{name}`" in card
    assert str(tmp_path) not in card


def test_the_card_has_the_metrics_and_intervals_of_the_run(path, tmp_path):
    model = tiny.attach(tiny.vit())
    details = {"figures": {"accuracy": 0.75, "num_test": 40}, "config_hash": "a"}
    vpt.save(model, path, data={"name": "pets", "shots": 5, "seed": 2}, **details)
    result = {"accuracy_interval": [0.6, 0.9], "config_hash": "a"}
    path.with_name("result.json").write_text(json.dumps(result))
    vpt.push(path, tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "40 images that did not train it" in card
    assert "| accuracy | 0.750 | 0.600–0.900 |" in card
    assert "5 images a class, seed 2" in card
    # another run's result says nothing of this artefact
    path.with_name("result.json").write_text(json.dumps(result | {"config_hash": "b"}))
    vpt.push(path, tmp_path / "shared")
    assert "0.600" not in (tmp_path / "shared" / "README.md").read_text()


def test_no_path_of_this_machine_leaves_it(path, tmp_path):
    weights = tmp_path / "secret" / "vit.safetensors"
    tensors, metadata = artifact.read(path)
    metadata["backbone"] |= {"name": "vit", "checkpoint": str(weights)}
    path.write_bytes(artifact.to_bytes(tensors, metadata))
    vpt.push(path, tmp_path / "shared")
    for file in (tmp_path / "shared").iterdir():
        assert b"secret" not in file.read_bytes()
    assert (
        vpt.load(tmp_path / "shared" / path.name, tiny.vit()).metadata["backbone"]["name"] == "vit"
    )


def test_a_marked_up_class_name_stays_text(tmp_path):
    names = ["a`b", "<script>alert(1)</script>", "line\nbreak | x"]
    model = vpt.attach(tiny.vit(), class_names=names)
    vpt.push(vpt.save(model, tmp_path / "a.safetensors"), tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "`a'b`, `<script>alert(1)</script>`, `line break | x`." in card


def test_what_is_not_its_cards_file_is_refused_and_nothing_written(path, tmp_path):
    vpt.push(path, tmp_path / "shared")
    out = tmp_path / "pets.safetensors"
    other = vpt.save(tiny.attach(tiny.vit(), num_tokens=2), tmp_path / "other.safetensors")
    prompt = tmp_path / "shared" / "prompt.safetensors"
    kept = prompt.read_bytes()
    prompt.write_bytes(other.read_bytes())
    with pytest.raises(vpt.InputError, match=r"prompt.safetensors is not the file of its card"):
        vpt.pull(tmp_path / "shared", out)
    prompt.write_bytes(kept)
    with pytest.raises(vpt.InputError, match="made for backbone"):
        vpt.pull(tmp_path / "shared", out, backbone=tiny.vit(seed=1))
    assert not out.exists()
    out.write_bytes(other.read_bytes())
    with pytest.raises(vpt.InputError, match=r"pets.safetensors: is another file already"):
        vpt.pull(tmp_path / "shared", out)
    assert out.read_bytes() == other.read_bytes()
    with pytest.raises(vpt.InputError, match=r"no such file: give a folder"):
        vpt.pull(tmp_path / "nothing", out)


def test_the_hub_takes_an_artefact_and_gives_it_back(path, hub, tmp_path):
    call, state = hub
    done = call("push", path, "me/pets", "--licence", "mit")
    assert done.returncode == 0, done.stderr
    assert f"wrote {state['url']}/me/pets/commit/" in done.stdout
    asked = state["asked"]  # by its name in newer and older versions of huggingface_hub
    assert asked.get("visibility") == "private" or asked.get("private")
    assert set(state["files"]) == {"README.md", "prompt.safetensors"}
    done = call("pull", "me/pets")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pets.safetensors").read_bytes() == state["files"]["prompt.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "token", "words"),
    [
        (["push", "PATH", "me/pets"], "hf_bad", "401"),
        (["pull", "me/other"], "hf_good", "404"),
        (["pull", "me/pets"], "hf_good", "404"),
    ],
)
def test_what_the_hub_refuses_is_one_line(path, hub, arguments, token, words):
    call, _ = hub
    done = call(*[path if word == "PATH" else word for word in arguments], token=token)
    assert done.returncode == 1
    assert done.stderr.startswith("vpt: me/")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
