"Faults that people meet when loading a model: each is refused by name, none is filled in or guessed."

import json
import shutil

import pytest
import torch
import transformers as tf
from conftest import tiny_hf
from safetensors.torch import load_file, save_file

from spectral_nb.models.architectures import ArchSpec
from spectral_nb.models.checkpoints import checkpoint_hash
from spectral_nb.models.heads import rotation
from spectral_nb.models.loading import from_hf, load_model, self_check
from spectral_nb.models.records import model_info
from spectral_nb.models.revisions import list_revisions, revision_steps
from spectral_nb.models.weight_storage import read_tensor, weight_files
from spectral_nb.norms.weight_files import weight_norms


@pytest.fixture
def llama(tmp_path):
    "A folder with a small Llama whose head is not tied."
    tiny_hf("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    return tmp_path


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def write_index(folder, where):
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# missing and unexpected tensors


@pytest.mark.parametrize("tensor", ["lm_head.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_missing_tensor_is_named(llama, tensor):
    change_tensors(llama, lambda t: {k: v for k, v in t.items() if k != tensor})
    with pytest.raises(ValueError, match=f"1 tensors are missing: {tensor}"):
        load_model(llama)


def test_tied_head_may_be_absent(tmp_path):
    tiny_hf("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_model(tmp_path, check=True)


def test_left_over_tensor_is_named(llama):
    change_tensors(llama, lambda t: t.update({"model.layers.0.self_attn.extra.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match="left over: model.layers.0.self_attn.extra.weight"):
        load_model(llama)


@pytest.mark.parametrize("n_layers, said", [(9, "are missing"), (1, "are left over")])
def test_another_number_of_layers(llama, n_layers, said):
    change_config(llama, num_hidden_layers=n_layers)
    with pytest.raises(ValueError, match=said):
        load_model(llama)


def test_prefixed_names(llama):
    change_tensors(llama, lambda t: {f"module.{k}": v for k, v in t.items()})
    with pytest.raises(ValueError, match="missing.*left over: module"):
        load_model(llama)


def test_buffers_of_old_checkpoints_are_no_fault(tmp_path):
    tiny_hf("gpt_neox").save_pretrained(tmp_path)
    extra = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1),
    }
    change_tensors(tmp_path, lambda t: t.update(extra))
    load_model(tmp_path, check=True)


# quantised weights


def test_fp8_without_scales(llama):
    def to_fp8(tensors):
        return {k: v.to(torch.float8_e4m3fn) if "proj" in k else v for k, v in tensors.items()}

    change_tensors(llama, to_fp8)
    for read in (load_model, weight_norms):
        with pytest.raises(ValueError, match="quantised weights without a way to scale them.*F8_E4M3"):
            read(llama)


def test_quantisation_in_the_config(llama):
    change_config(llama, quantization_config={"quant_method": "fp8"})
    for read in (load_model, weight_norms):
        with pytest.raises(ValueError, match="is quantised .fp8."):
            read(llama)


# which files


def test_index_and_single_file_together_are_read_alike(tmp_path):
    tiny_hf("llama", seed=1, tie_word_embeddings=False).save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    tiny_hf("llama", seed=2, tie_word_embeddings=False).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    columns = ["layer", "head", "matrix", "metric"]
    files, loaded = (weight_norms(x).sort_values(columns).value for x in (tmp_path, load_model(tmp_path)))
    torch.testing.assert_close(torch.tensor(files.to_numpy()), torch.tensor(loaded.to_numpy()), rtol=1e-5, atol=1e-6)
    assert set(weight_files(tmp_path).values()) == {tmp_path / "model.safetensors"}


def test_index_without_a_tensor(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path, max_shard_size="8KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    lost = next(k for k in index if "q_proj" in k)
    write_index(tmp_path, {k: v for k, v in index.items() if k != lost})
    for read in (load_model, weight_norms):
        with pytest.raises(ValueError, match=f"disagrees with its files about the tensors {lost}"):
            read(tmp_path)


@pytest.mark.parametrize("outside", ["../evil.safetensors", "/etc/evil.safetensors", "a/../../evil.safetensors"])
def test_index_that_leaves_the_folder(tmp_path, outside):
    tiny_hf("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "evil.safetensors")
    write_index(tmp_path / "model", dict.fromkeys(load_file(tmp_path / "evil.safetensors"), outside))
    for read in (load_model, weight_norms):
        with pytest.raises(ValueError, match="leaves the model's folder"):
            read(tmp_path / "model")


def test_read_tensor_of_both_formats(llama):
    model = tf.AutoModelForCausalLM.from_pretrained(llama)
    (llama / "bin").mkdir()
    torch.save(dict(model.state_dict()), llama / "bin" / "pytorch_model.bin")
    name = "model.norm.weight"
    assert torch.equal(*(read_tensor(weight_files(f)[name], name) for f in (llama, llama / "bin")))


# revisions


@pytest.mark.parametrize("revision", [0, False, [], 1.5])
def test_revision_must_be_text(llama, revision):
    with pytest.raises(TypeError, match="revision must be text"):
        load_model(llama, revision)


def test_shipped_model_refuses_a_number_too():
    with pytest.raises(TypeError, match="revision must be text"):
        load_model("story-neox", 0)


@pytest.mark.parametrize("scheme", ["step-{}", "step_{}", "checkpoint-{}", "global_step{}", "iter_{:07d}", "{}"])
def test_revisions_are_ordered_by_number(llama, scheme):
    names = {step: scheme.format(step) for step in (970, 1940, 97)}
    for name in names.values():
        shutil.copytree(llama, llama.parent / f"many-{llama.name}" / name, ignore=shutil.ignore_patterns("many*"))
    folder = llama.parent / f"many-{llama.name}"
    assert list(revision_steps(folder).values()) == [97, 970, 1940]
    assert list_revisions(folder)[-1] == names[1940]
    assert model_info(load_model(folder, names[97])).step == 97


@pytest.mark.parametrize(
    "names, said",
    [
        (["step10", "step_10"], "both carry step 10"),
        (["step10-iter20", "step30"], "carries the steps"),
        (["e9", "e10"], "no known scheme"),
    ],
)
def test_ambiguous_revisions_are_refused(tmp_path, names, said):
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=said):
        list_revisions(tmp_path)


@pytest.mark.parametrize("revision", ["../other", "/etc", "a/../../other", "..\\other"])
def test_revision_that_leaves_the_folder(llama, revision):
    for name in (str(llama), "owner/name"):
        with pytest.raises(ValueError, match="leaves the model's folder"):
            load_model(name, revision)


# tokenizers


def test_vocab_and_merges_make_a_tokenizer(reference, tmp_path):
    source = reference / "gpt2_tokenizer"
    found = {p.name for p in source.iterdir()}
    if not {"vocab.json", "merges.txt"} <= found:
        pytest.skip(f"vocab.json and merges.txt are not in {source}")
    tiny_hf("gpt2", vocab_size=50257).save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(source / name, tmp_path)
    model = load_model(tmp_path)
    assert not model_info(model).placeholder_tokenizer
    assert model.tokenizer(" Mary", add_special_tokens=False).input_ids == [5335]


def test_placeholder_is_marked(llama):
    assert model_info(load_model(llama)).placeholder_tokenizer
    assert model_info(from_hf(tiny_hf("gpt2"))).placeholder_tokenizer


def test_unreadable_tokenizer_is_refused(llama):
    (llama / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer of .* cannot be read"):
        load_model(llama)


def test_checkpoint_hash_sees_the_tokenizer(llama):
    before = checkpoint_hash(llama)
    (llama / "tokenizer_config.json").write_text("{}")
    assert checkpoint_hash(llama) != before


# shapes, dtypes, second use


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "olmoe"])
def test_vocabulary_as_large_as_the_model(architecture):
    with pytest.raises(ValueError, match="d_vocab equals d_model"):
        from_hf(tiny_hf(architecture, vocab_size=32))
    from_hf(tiny_hf(architecture, vocab_size=32), processing="raw")


@pytest.mark.parametrize("processing", ["folded", "raw"])
def test_from_hf_twice_on_one_object(processing):
    model = tiny_hf("gpt2")
    from_hf(model, processing=processing)
    with pytest.raises(ValueError, match="already taken over"):
        from_hf(model)


@pytest.mark.parametrize("processing", ["folded", "raw"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_rotary_frequencies(tmp_path, dtype, processing):
    tiny_hf("llama", max_position_embeddings=2048).save_pretrained(tmp_path)
    half, full = (load_model(tmp_path, dtype=d, processing=processing) for d in (dtype, "float32"))
    far = torch.tensor([1000, 2000])
    assert all(torch.equal(a, b) for a, b in zip(rotation(half, far), rotation(full, far)))
    assert next(half.parameters()).dtype == getattr(torch, dtype)
    half(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "qwen3", "olmo", "olmoe"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_every_dtype_passes_its_check(architecture, dtype, tmp_path):
    tiny_hf(architecture).save_pretrained(tmp_path)
    load_model(tmp_path, dtype=dtype, check=True)


def test_self_check_sees_a_fault_beyond_24_tokens(tmp_path, monkeypatch):
    from spectral_nb.models import verification

    tiny_hf("llama", max_position_embeddings=64).save_pretrained(tmp_path)
    self_check(tmp_path)
    right = verification.apply_rotation

    def wrong_far_away(x, *turn):
        turned = right(x, *turn)
        return torch.cat([turned[:, :40], x[:, 40:]], dim=1)

    monkeypatch.setattr(verification, "apply_rotation", wrong_far_away)
    with pytest.raises(ValueError, match="scores differ"):
        self_check(tmp_path)


def test_neox_without_attention_bias_is_refused():
    with pytest.raises(ValueError, match="attention_bias=False"):
        ArchSpec.from_config(tiny_hf("gpt_neox", attention_bias=False).config)
