"""A loopback server of the few Hub endpoints that pushing and loading a bundle need; a script that uses it."""

import base64
import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(BaseHTTPRequestHandler):
    """One repository a name, one commit a push; files are kept in memory."""

    files: dict[str, dict[str, bytes]] = {}
    asked: list[str] = []
    fetched: list[str] = []
    branches: set[str] = set()
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, headers=()):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(raw)),
            "Content-Type": "application/json",
            **dict(headers),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def commit(self, repo):
        names = sorted((name, hashlib.sha1(raw).hexdigest()) for name, raw in self.files[repo].items())
        return hashlib.sha1(repr(names).encode()).hexdigest()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            repo = "someone/" + json.loads(body)["name"].split("/")[-1]
            self.files.setdefault(repo, {})
            return self.answer({"url": f"http://{self.headers['Host']}/{repo}", "id": repo, "name": repo})
        if "/branch/" in path:
            self.branches.add(path.rsplit("/", 1)[1])
            return self.answer({})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            wanted = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
            )
        if "/commit/" in path:
            branch = path.rsplit("/", 1)[1]
            if branch not in {"main", *self.branches}:
                return self.answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = self.commit(repo)
            return self.answer(
                {"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{commit}", "commitOid": commit}
            )
        self.answer({"error": path}, 404)
        return None

    def do_GET(self):
        path = self.path.split("?")[0]
        parts = path.strip("/").split("/")
        self.asked.append(path)
        if self.command == "GET":
            self.fetched.append(path)
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.files:
            repo = "/".join(parts[2:4])
            rows = [
                {"rfilename": n, "path": n, "type": "file", "size": len(r), "oid": hashlib.sha1(r).hexdigest()}
                for n, r in self.files[repo].items()
            ]
            if "tree" in parts:
                return self.answer(rows)
            return self.answer(
                {"id": repo, "modelId": repo, "sha": self.commit(repo), "siblings": rows, "tags": [], "private": False}
            )
        if len(parts) > 4 and parts[2] == "resolve" and "/".join(parts[4:]) in self.files.get("/".join(parts[:2]), {}):
            repo = "/".join(parts[:2])
            raw = self.files[repo]["/".join(parts[4:])]
            return self.answer(
                raw,
                headers={
                    "ETag": f'"{hashlib.sha1(raw).hexdigest()}"',
                    "X-Repo-Commit": self.commit(repo),
                    "Accept-Ranges": "none",
                },
            )
        code = "EntryNotFound" if "/".join(parts[:2]) in self.files else "RepoNotFound"
        self.answer({"error": code}, 404, {"X-Error-Code": code})
        return None

    do_HEAD = do_GET


def serve():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main(folders, output):
    """In a process whose HF_ENDPOINT is the server: pushes anchors and a bundle, loads them, prints what it found."""
    import torch
    from conftest import ids_like
    from tiny_runs import stitched_model
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    import stitched_llama

    names = ["someone/small", "someone/large"]
    for name, folder in zip(names, folders):
        LlamaForCausalLM.from_pretrained(folder).push_to_hub(name, max_shard_size="20KB")
    model = stitched_model(names)
    commit = model.push_to_hub("someone/bundle")
    model.push_to_hub("someone/tagged", revision="v2", commit_description="why", tags=["alpaca"])
    ids, equal = ids_like(1, 6), {}
    for load in (AutoModelForCausalLM, stitched_llama.StitchedLlamaForCausalLM):
        again = load.from_pretrained("someone/bundle", cache_dir=output)
        equal[load.__name__] = all(
            torch.equal(again(ids, stitch_id=k).logits, model(ids, stitch_id=k).logits) for k in model.keys
        )
    part = stitched_llama.StitchedLlamaForCausalLM.from_pretrained(
        "someone/bundle", stitch_id="0[0:2]>1[4:5]", cache_dir=output + "/part"
    )
    equal["part"] = torch.equal(part(ids).logits, model(ids, stitch_id="0[0:2]>1[4:5]").logits)
    space = stitched_llama.StitchSpace.from_configs(names)
    print(
        json.dumps(
            {
                "equal": equal,
                "commit": commit.oid,
                "anchors": model.config.anchors,
                "digest": space.digest == model.space.digest,
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
