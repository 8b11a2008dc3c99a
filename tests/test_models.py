"Loading: every architecture against plain Hugging Face, the real trained model, and every refusal."

import json
import shutil

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import ARCHITECTURES, D_VOCAB, random_tokens, tiny_hf, zoo_names

from spectral_nb.training.config import SHIPPED
from spectral_nb.models import verification
from spectral_nb.models.architectures import ArchSpec
from spectral_nb.models.checkpoints import checkpoint_hash
from spectral_nb.models.heads import apply_rotation, head_weights, rotation
from spectral_nb.models.loading import from_hf, load_model, self_check
from spectral_nb.models.records import model_info, weights_hash
from spectral_nb.models.revisions import list_revisions, revision_steps


@pytest.mark.parametrize("processing", ["folded", "raw"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_model_equals_plain_hugging_face(architecture, processing, tmp_path):
    tiny_hf(architecture).save_pretrained(tmp_path)
    errors = self_check(tmp_path, processing=processing)
    assert errors["log_probs"] < 1e-4 and errors["scores"] < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_outputs_sum_to_attention_output(architecture, tiny_model):
    model = tiny_model(architecture)
    _, cache = model.run_with_cache(random_tokens())
    for layer in range(2):
        w = head_weights(model, layer)
        out = torch.einsum("bphd,hdm->bpm", cache[f"blocks.{layer}.attn.hook_z"], w.W_O) + w.b_O
        torch.testing.assert_close(out, cache[f"blocks.{layer}.hook_attn_out"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_come_from_the_expanded_weights(architecture, tiny_model):
    "z of the first position is the value itself, so it tests W_V, b_V and the grouping by themselves."
    model = tiny_model(architecture)
    _, cache = model.run_with_cache(random_tokens())
    w = head_weights(model, 1)
    value = torch.einsum("bm,hmd->bhd", cache["blocks.1.ln1.hook_out"][:, 0], w.W_V) + w.b_V
    torch.testing.assert_close(value, cache["blocks.1.attn.hook_z"][:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_spec_matches_the_weights(architecture, tiny_model):
    model, spec = tiny_model(architecture), ArchSpec.from_config(tiny_hf(architecture).config)
    assert (spec.n_layers, spec.n_heads, spec.d_model, spec.d_head, spec.d_vocab) == (2, 4, 32, 8, D_VOCAB)
    assert spec.n_key_value_heads == model.blocks[0].attn.W_K.shape[0]
    names = set(model.run_with_cache(random_tokens())[1])
    assert spec.parallel_blocks == ("blocks.0.hook_resid_mid" not in names)
    assert (spec.positions == "rotary") == ("blocks.0.attn.hook_cos" in names)
    assert bool(spec.qk_norm) == ("blocks.0.attn.q_norm.hook_scale" in names)
    assert spec.qkv_bias == bool(head_weights(model, 0).b_Q.abs().sum() > 0)
    assert (spec.n_experts > 0) == (architecture == "olmoe")


def test_rotation_against_complex_numbers(tiny_model):
    model = tiny_model("gpt_neox")
    cos, sin = rotation(model, torch.arange(6))
    assert cos.shape == (6, 2)  # a quarter of d_head = 8
    x = torch.randn(6, 8)
    turned = apply_rotation(x, cos, sin)
    z = torch.complex(x[:, 0], x[:, 1]) * torch.polar(torch.ones(6), torch.arange(6.0))
    torch.testing.assert_close(turned[:, 0], z.real)
    torch.testing.assert_close(turned[:, 1], z.imag)
    torch.testing.assert_close(turned[:, 2:], x[:, 2:])


def test_folded_and_raw_are_recorded_and_differ(tiny_model):
    folded, raw = tiny_model("gpt2"), tiny_model("gpt2", processing="raw")
    assert (model_info(folded).processing, model_info(raw).processing) == ("folded", "raw")
    assert model_info(folded).weights_hash != model_info(raw).weights_hash
    assert model_info(folded).weights_hash == model_info(tiny_model("gpt2")).weights_hash
    assert not torch.allclose(head_weights(folded, 0).W_Q, head_weights(raw, 0).W_Q)


def test_weights_hash_sees_one_changed_number(tiny_model):
    model = tiny_model("llama")
    before = weights_hash(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert weights_hash(model) != before


def test_half_precision_weights_are_folded_in_float32(tmp_path):
    tiny_hf("gpt2").save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float16")
    assert next(model.parameters()).dtype == torch.float16 and head_weights(model, 0).W_Q.dtype == torch.float32


@pytest.mark.parametrize("processing", ["folded", "raw"])
def test_stories260k_passes_its_self_check(reference, processing):
    errors = self_check(reference / "stories260k", processing=processing)
    assert max(errors.values()) < 1e-4


def test_stories260k_continues_with_the_published_text(stories260k):
    text = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball. "
        "She wanted to play with it, but it was too high."
    )
    tokenizer = stories260k.tokenizer
    tokens = torch.tensor([[1]])
    with torch.inference_mode():
        while len(tokenizer.decode(tokens[0], skip_special_tokens=True)) < len(text):
            tokens = torch.cat([tokens, stories260k(tokens)[:, -1:].argmax(-1)], dim=1)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True).strip().startswith(text)


@pytest.mark.parametrize("processing", ["folded", "raw"])
@pytest.mark.parametrize("name", zoo_names())
def test_shipped_models_pass_their_self_check(name, processing, record_property):
    errors = self_check(name, processing=processing)
    record_property("errors", json.dumps(errors))
    assert errors["scores"] < 1e-4 and errors["log_probs"] < 2e-4, (
        errors
    )  # self_check itself allows for the size of the log-probabilities


@pytest.mark.parametrize("name", zoo_names())
def test_every_shipped_revision_is_whole_and_different(name):
    revisions = list_revisions(name)
    hashes = [checkpoint_hash(name, r) for r in revisions]
    assert len(set(hashes)) == len(revisions) >= (6 if name in SHIPPED else 1)  # of a seed its last checkpoint is kept
    steps = list(revision_steps(name).values())
    assert steps == sorted(steps)


def test_local_folder_with_revisions(tmp_path):
    for seed, folder in enumerate([tmp_path, tmp_path / "step10"]):
        tiny_hf("gpt2", seed).save_pretrained(folder)
    first, last = load_model(tmp_path, revision="step10"), load_model(tmp_path)
    assert model_info(first).step == 10 and model_info(first).weights_hash != model_info(last).weights_hash
    assert list_revisions(tmp_path) == ["step10"]


@pytest.mark.parametrize(
    "config, feature",
    [
        (tf.BertConfig(), "encoder-only"),
        (tf.MambaConfig(), "state-space"),
        (tf.T5Config(), "encoder-decoder"),
        (tf.BloomConfig(apply_residual_connection_post_layernorm=True), "after the norm"),
        (tf.LlamaConfig(attn_logit_softcapping=30.0), "soft-cap"),
        (tf.DeepseekV3Config(), "latent attention"),
        (tf.Qwen2MoeConfig(mlp_only_layers=[1]), "dense layers"),
        (tf.LlamaConfig(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), "'dynamic'"),
        (tf.Cohere2Config(), "recognised: .*rotary positions.*; not recognised: "),
        (tf.OlmoConfig(clip_qkv=5.0), "clip_qkv"),
        (tf.GPT2Config(scale_attn_weights=False), "unscaled"),
        (tf.GPT2Config(scale_attn_by_inverse_layer_idx=True), "scaled by layer"),
        (tf.OPTConfig(do_layer_norm_before=False), "norms after the residual"),
        (tf.OPTConfig(word_embed_proj_dim=512), "another width"),
        (tf.PhiConfig(qk_layernorm=True), "norms with biases on queries and keys"),
        (tf.MptConfig(attn_config=dict(qk_ln=True)), "qk_ln=True"),
        (tf.Qwen3MoeConfig(decoder_sparse_step=2), "dense layers"),
        (tf.ViTConfig(), "not supported"),
    ],
)
def test_unsupported_architecture_names_the_feature(config, feature, tmp_path):
    with pytest.raises(ValueError, match=feature):
        ArchSpec.from_config(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=feature):
        load_model(tmp_path)


def test_unknown_model_and_revision(tmp_path):
    with pytest.raises(FileNotFoundError, match="story-gpt2-s4"):
        load_model("story-gpt2-s43")
    with pytest.raises(FileNotFoundError, match="nobody/no-such-model"):
        load_model("nobody/no-such-model")
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_model(tmp_path)
    with pytest.raises(
        ValueError, match="processing='foldedd'; did you mean|processing='foldedd' is not known; did you mean 'folded'"
    ):
        load_model(tmp_path, processing="foldedd")
    with pytest.raises(ValueError, match="dtype='int8'"):
        load_model(tmp_path, dtype="int8")
    if zoo_names():
        with pytest.raises(ValueError, match="revision='step77'.*did you mean"):
            load_model("story-gpt2-s42", revision="step77")


def test_changed_byte_in_a_shipped_file_is_refused(tmp_path, monkeypatch):
    from spectral_nb.base.paths import zoo_dir

    if not zoo_names():
        pytest.skip("no shipped models are installed")
    name = zoo_names()[0]
    shutil.copytree(zoo_dir() / name, tmp_path / "zoo" / name)
    shutil.copy(zoo_dir() / "manifest.json", tmp_path / "zoo")
    monkeypatch.setenv("SPECTRAL_NB_DATA", str(tmp_path))
    load_model(name)
    file = tmp_path / "zoo" / name / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors fails its hash"):
        load_model(name)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        load_model(name)


def test_truncated_weight_file_of_a_local_folder(tmp_path):
    tiny_hf("gpt2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="weights of .* cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json of .* cannot be read"):
        load_model(tmp_path)


def test_nan_in_a_weight_names_the_layer(tmp_path):
    model = tiny_hf("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = np.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer 1, tensor .*q_proj"):
        load_model(tmp_path)


def test_square_mlp_is_refused_when_folded():
    "TransformerLens 4.3 centres a square MLP matrix along the wrong axis."
    with pytest.raises(ValueError, match="d_mlp equals d_model"):
        from_hf(tiny_hf("olmo", intermediate_size=32))
    from_hf(tiny_hf("olmo", intermediate_size=32), processing="raw")


def test_head_out_of_range(tiny_model):
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="layer=2 is out of range: allowed is 0 to 1"):
        head_weights(model, 2)
    with pytest.raises(ValueError, match="head=4 is out of range"):
        ArchSpec.from_model(model).check_head(0, 4)
    with pytest.raises(TypeError, match="model must be"):
        ArchSpec.from_model("gpt2")
    with pytest.raises(TypeError, match="model must be a loaded model"):
        model_info(object())


def test_self_check_notices_wrong_weights(tmp_path, monkeypatch):
    "The check itself can fail: a wrong rotation is caught."
    tiny_hf("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(verification, "apply_rotation", lambda x, *_: x)
    with pytest.raises(ValueError, match="scores differ"):
        load_model(tmp_path, check=True)
