"The hub for real, over HTTP on loopback: revisions, shards, what is missing, a broken download, the cache."

import json
import os
import subprocess
import sys

import pytest
from conftest import tiny_hf
from hub_server import serve

from spectral_nb.base.paths import repo_root
from spectral_nb.models.loading import from_hf
from spectral_nb.models.records import model_info
from spectral_nb.models.revisions import REAL_MODELS

NAME, REAL = "someone/tiny", REAL_MODELS["smollm2-135m"]["hub"]
CLIENT = """
import json, sys
from spectral_nb.models import checkpoints, revisions
from spectral_nb.models.loading import load_model
from spectral_nb.models.records import model_info
for module in (checkpoints, revisions):
    module.installed_gguf = lambda name: None  # as if the package of the real model were not installed
for name, revision in json.loads(sys.argv[1]):
    try:
        if revision == "list":
            print(json.dumps(revisions.list_revisions(name)))
            continue
        info = model_info(load_model(name, revision))
        print(json.dumps([info.name, info.revision, info.step, info.weights_hash, info.placeholder_tokenizer]))
    except Exception as e:
        print(json.dumps([type(e).__name__, str(e)]))
"""


def ask(address: str, home, *calls) -> list:
    "What `load_model(name, revision)` gives in a new process that knows no other hub than `address`."
    env = os.environ | dict(HF_ENDPOINT=address, HF_HOME=str(home), HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
    env |= dict(PYTHONPATH=str(repo_root()), NO_PROXY="*", OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", CLIENT, json.dumps(calls)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    "`someone/tiny` with three revisions, one of them in shards, and a small model under the real one's name."
    root, shipped = tmp_path_factory.mktemp("hub"), repo_root() / "data" / "zoo" / "story-llama"
    made = {}
    for seed, revision in enumerate(("main", "step1000", "step2000")):
        shards = {"max_shard_size": "8KB"} if revision == "step1000" else {}
        tiny_hf("llama", seed, vocab_size=512).save_pretrained(root / revision, **shards)
        for file in shipped.glob("*token*.json"):
            (root / revision / file.name).write_bytes(file.read_bytes())
        made[revision] = root / revision
    return {NAME: made, REAL: {"main": made["step2000"]}}


def expected(seed: int) -> str:
    return model_info(from_hf(tiny_hf("llama", seed, vocab_size=512))).weights_hash


@pytest.fixture(scope="module")
def answers(repositories, tmp_path_factory):
    "One process against the server, then another against nobody, with the first one's cache."
    home = tmp_path_factory.mktemp("home")
    calls = [
        (NAME, None),
        (NAME, "step1000"),
        (NAME, "list"),
        (NAME, "step100"),
        ("someone/tiy", None),
        ("smollm2-135m", None),
    ]
    with serve(repositories) as (address, hub):
        first = ask(address, home, *calls)
        requests = list(hub.requests)
    return dict(zip(calls, first)), requests, ask(address, home, (NAME, "step1000"), (NAME, "step2000"))


def test_a_model_of_the_hub_and_its_revisions(answers, repositories):
    got, requests, _ = answers
    assert got[NAME, None] == [NAME, "main", None, expected(0), False]
    assert got[NAME, "step1000"] == [NAME, "step1000", 1000, expected(1), False]
    assert got[NAME, "list"] == ["step1000", "step2000", "main"]
    shards = {p.name for p in repositories[NAME]["step1000"].glob("*-of-*.safetensors")}
    assert len(shards) > 1 and shards <= {path.split("/")[-1] for _, path in requests}


def test_what_is_missing_is_named_with_the_nearest(answers):
    got, _, _ = answers
    kind, message = got[NAME, "step100"]
    assert kind == "ValueError" and "'step100'" in message and "did you mean 'step1000'" in message
    kind, message = got["someone/tiy", None]
    assert kind == "FileNotFoundError" and "someone/tiy" in message and "RepositoryNotFoundError" in message


def test_the_real_model_comes_from_the_hub_where_its_package_is_absent(answers):
    got, requests, _ = answers
    assert got["smollm2-135m", None] == ["smollm2-135m", "main", None, expected(2), False]
    assert any(REAL in path for _, path in requests)


def test_a_second_time_without_the_server(answers):
    _, _, (cached, never) = answers
    assert cached == [NAME, "step1000", 1000, expected(1), False]
    assert never[0] == "FileNotFoundError" and "step2000" in never[1]


def test_a_broken_download_leaves_nothing_half(repositories, tmp_path):
    with serve(repositories) as (address, hub):
        hub.breaking.add("model.safetensors")
        broken, again = ask(address, tmp_path, (NAME, None), (NAME, None))
        assert not hub.breaking
        assert broken[3:4] == [expected(0)] or broken[0] == "FileNotFoundError"
        assert again == [NAME, "main", None, expected(0), False]
