"""Pushing and loading by repository id, over a real connection to a loopback server."""

import json
from collections import Counter

import pytest
from conftest import ROOT, python
from hub import Hub, serve

FORCED = """
import sys
from stitched_llama import StitchedLlamaForCausalLM
how = {"cache_dir": sys.argv[1], "force_download": True}
StitchedLlamaForCausalLM.from_pretrained("someone/bundle", **how)
StitchedLlamaForCausalLM.from_anchors(["someone/small", "someone/large"], **how)
"""


@pytest.fixture
def hub():
    server = serve()
    yield server
    server.shutdown()
    server.server_close()


def test_bundle_and_anchors_by_repository_id(hub, anchors, tmp_path):
    reach = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TESTS_MAY_REACH_HUB": "1",
    }  # fmt: skip
    done = python(ROOT / "tests" / "hub.py", json.dumps(anchors["unequal"]), tmp_path / "cache", **reach)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"] == {"AutoModelForCausalLM": True, "StitchedLlamaForCausalLM": True, "part": True}
    assert found["digest"]
    assert len(found["commit"]) == 40
    assert [anchor["name_or_path"] for anchor in found["anchors"]] == ["someone/small", "someone/large"]
    assert all(len(anchor["revision"]) == 40 for anchor in found["anchors"]), "the commit of an anchor is not recorded"
    assert set(Hub.files["someone/bundle"]) == {
        "README.md",
        "digests.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "stitches.json",
    }
    card = Hub.files["someone/bundle"]["README.md"].decode()
    assert "base_model:\n- someone/small\n- someone/large\n" in card
    assert "v2" in Hub.branches
    assert "tags:\n- stitched-llama\n- alpaca\n" in Hub.files["someone/tagged"]["README.md"].decode()
    part = [path for path in Hub.asked if "someone/large/resolve" in path and "model-0" in path]
    shards = {name for name in Hub.files["someone/large"] if name.startswith("model-0")}
    assert len(shards) > 5
    assert {path.rsplit("/", 1)[1] for path in part} == shards

    before = len(Hub.fetched)
    python("-c", FORCED, tmp_path / "cache", **reach)
    times = Counter(path.split("/resolve/")[0] for path in Hub.fetched[before:] if path.endswith(".safetensors"))
    assert times["/someone/bundle"] == 1
    assert times["/someone/large"] == 2 * len(shards), "a shard was fetched anew more than once a call"
