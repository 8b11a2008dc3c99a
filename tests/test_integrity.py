"""Planted faults in training checkpoints are found, and sound ones are left alone."""

import shutil

import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from spectral_nb.models.integrity import (
    check_revisions,
    check_tokens,
    find_faults,
    hub_file_hashes,
    revision_hashes,
    tensor_hashes,
)

STEPS = (10, 20, 30, 40)


def revision(step):
    return f"step{step}-tokens{step}M"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    for step in STEPS:
        torch.manual_seed(step)
        model = GPT2LMHeadModel(config)
        for p in model.parameters():
            p.data += 0.01 * torch.randn_like(p)
        model.save_pretrained(folder / revision(step), max_shard_size="8KB")
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "copy")


def test_sound_checkpoints_have_no_fault(sound):
    report = check_revisions(sound)
    assert report["used"].all() and (report["fault"] == "").all()
    assert report["tokens"].tolist() == [s * 10**6 for s in STEPS]


def test_planted_duplicate(folder):
    shutil.rmtree(folder / revision(30))
    shutil.copytree(folder / revision(20), folder / revision(30))
    report = check_revisions(folder).set_index("revision")
    assert report["used"].tolist() == [True, False, False, True]
    assert report.loc[revision(30), "fault"] == f"duplicate of {revision(20)}"


def test_duplicate_of_the_last_blames_the_earlier(folder):
    shutil.rmtree(folder / revision(20))
    shutil.copytree(folder / revision(40), folder / revision(20))
    assert check_revisions(folder)["used"].tolist() == [True, False, True, True]


def test_planted_spliced_shard(folder):
    shards = sorted((folder / revision(40)).glob("*.safetensors"))
    assert len(shards) > 1
    shutil.copy(shards[0], folder / revision(10) / shards[0].name)
    faults = find_faults(revision_hashes(folder))
    assert faults["revision"].tolist() == [revision(10)] and faults["kind"].tolist() == ["spliced"]
    assert faults["n_tensors"][0] == len(tensor_hashes_of(shards[0])) and 0 < faults["share"][0] < 1
    assert check_revisions(folder)["used"].tolist() == [False, True, True, True]
    assert check_revisions(folder, include_flagged=True)["used"].all()


def tensor_hashes_of(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        return list(f.keys())


def test_one_changed_value_changes_one_hash(folder):
    before = tensor_hashes(folder / revision(10)).set_index("tensor")["hash"]
    model = GPT2LMHeadModel.from_pretrained(folder / revision(10))
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] += 1e-3
    model.save_pretrained(folder / "changed")
    after = tensor_hashes(folder / "changed").set_index("tensor")["hash"]
    assert list(before.index[before != after.reindex(before.index)]) == ["transformer.h.1.mlp.c_fc.weight"]


def test_torch_files_are_read_too(folder, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(folder / revision(10))
    (tmp_path / "bin").mkdir()
    torch.save(dict(model.state_dict()), tmp_path / "bin" / "pytorch_model.bin")
    ours = tensor_hashes(tmp_path / "bin").set_index("tensor")["hash"]
    saved = tensor_hashes(folder / revision(10)).set_index("tensor")["hash"]
    assert (ours.reindex(saved.index) == saved).all()


def test_buffers_and_constants_are_no_fault():
    rows = [
        (f"step{s}", t, 5, h)
        for s in range(4)
        for t, h in (("w", f"w{s}"), ("attn.rotary_emb.inv_freq", "same"), ("frozen", "same"))
    ]
    assert find_faults(pd.DataFrame(rows, columns=["revision", "tensor", "n_values", "hash"])).empty


def test_hub_hashes_by_file():
    served = {
        "step1": [("model-1.safetensors", 9, "a" * 64), ("model-2.safetensors", 9, "b" * 64)],
        "step2": [("model-1.safetensors", 9, "c" * 64), ("model-2.safetensors", 9, "d" * 64)],
        "main": [("model-1.safetensors", 9, "a" * 64), ("model-2.safetensors", 9, "e" * 64)],
    }
    hashes = hub_file_hashes("owner/name", list(served), fetch=lambda name, r: served[r])
    faults = find_faults(hashes)
    assert faults[["revision", "same_as", "kind", "tensors"]].values.tolist() == [
        ["step1", "main", "spliced", "model-1.safetensors"]
    ]


def test_refusals(sound, tmp_path):
    with pytest.raises(ValueError, match="out of order"):
        check_revisions(sound, [revision(20), revision(10)])
    with pytest.raises(ValueError, match="did you mean"):
        check_revisions(sound, ["step20"])
    with pytest.raises(FileNotFoundError, match="no weights"):
        tensor_hashes(tmp_path)
    with pytest.raises(ValueError, match="without a token count: b"):
        check_tokens(["a", "b"], [1, None])
    with pytest.raises(ValueError, match="out of order"):
        check_tokens(["a", "b"], [2, 1])
    with pytest.raises(ValueError, match="no revision holds"):
        hub_file_hashes("owner/name", ["main"], fetch=lambda n, r: [])


def test_token_counts_can_be_given(tmp_path, sound):
    renamed = tmp_path / "renamed"
    for step in STEPS:
        shutil.copytree(sound / revision(step), renamed / f"step{step}")
    with pytest.raises(ValueError, match="without a token count"):
        check_revisions(renamed)
    report = check_revisions(renamed, tokens={f"step{s}": s * 7 for s in STEPS})
    assert report["tokens"].tolist() == [70, 140, 210, 280]
