"""Training: repeatable, resumable, refusing what makes no sense; the zoo: what ships is what was trained."""

import dataclasses
import os

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from spectral_nb.training import corpus
from spectral_nb.prompts import grammar, stories
from spectral_nb.training import loop as training
from spectral_nb.training import zoo
from spectral_nb.models.gguf_files import file_sha256
from spectral_nb.base.files import read_json, read_table
from spectral_nb.training.accuracy import EVALUATED, evaluate_tasks
from spectral_nb.training.config import ARCHITECTURES, EXPORTED, PRESETS, SHIPPED, TrainConfig, preset
from spectral_nb.training.loop import train
from spectral_nb.training.untrained import build_model

TINY = dict(
    n_layers=1, d_model=16, n_heads=2, d_mlp=32, batch_size=4, steps=6, warmup_steps=2, checkpoint_every=2, eval_every=0
)
EXPERTS = dict(n_experts=4, n_experts_per_token=2)


def tiny(architecture="gpt2", **changes):
    return TrainConfig("tiny", architecture, **{**TINY, **(EXPERTS if architecture == "olmoe" else {}), **changes})


def weights(folder, step):
    return load_file(folder / "checkpoints" / f"step{step}" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    config = tiny(eval_every=2, eval_prompts=10, n_checkpoints=3)
    return config, folder, train(config, folder)


# ---------------------------------------------------------------- training
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, architecture):
    config = tiny(architecture)
    whole, parts = train(config, tmp_path / "whole"), None
    for stop in (1, 3, None):
        parts = train(config, tmp_path / "parts", stop_after=stop)
    for step in (0, 2, 4, 6):
        assert same(weights(tmp_path / "whole", step), weights(tmp_path / "parts", step))
    pd.testing.assert_frame_equal(whole, parts)
    assert not same(weights(tmp_path / "whole", 0), weights(tmp_path / "whole", 6))


def test_interrupted_inside_an_update_resumes_from_the_last_state(tmp_path):
    class Stop:
        def step(self, model, step):
            if step == 5:
                raise KeyboardInterrupt

    config = tiny()
    train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", callbacks=[Stop()])
    assert sorted(p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()) == ["step0", "step2", "step4"]
    train(config, tmp_path / "parts")
    assert same(weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 6))


def test_number_of_threads_of_the_caller_does_not_matter_and_is_kept(tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train(tiny(), tmp_path / "two")
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        train(tiny(), tmp_path / "one")
    finally:
        torch.set_num_threads(before)
    assert same(weights(tmp_path / "two", 6), weights(tmp_path / "one", 6))


def test_seeds_differ(tmp_path):
    train(tiny(), tmp_path / "a")
    train(tiny(seed=1), tmp_path / "b")
    assert not same(weights(tmp_path / "a", 6), weights(tmp_path / "b", 6))


def test_a_finished_training_is_not_trained_again(run):
    config, folder, log = run
    stamp = (folder / "state.safetensors").stat().st_mtime_ns
    again = train(config, folder)
    assert (folder / "state.safetensors").stat().st_mtime_ns == stamp and len(again) == len(log)


def test_another_config_is_refused_and_changes_nothing(run):
    config, folder, _ = run
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(ValueError, match="another config"):
        train(dataclasses.replace(config, learning_rate=1e-4), folder)
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_log_holds_loss_and_accuracies(run):
    config, folder, log = run
    assert list(log.columns) == training.LOG_COLUMNS
    assert sorted(log[log.metric == "loss"].step) == [1, 2, 3, 4, 5, 6]
    accuracy = log[log.metric == "accuracy"]
    assert set(accuracy.task) == set(EVALUATED) and set(accuracy.step) == {0, 2, 4, 6}
    assert (log.tokens == log.step * config.tokens_per_step).all()
    assert read_table(folder / "training_log.parquet").shape == log.shape


def test_loss_falls(tmp_path):
    log = train(tiny(steps=60, checkpoint_every=60, learning_rate=1e-2, batch_size=16), tmp_path)
    loss = log[log.metric == "loss"].value.to_numpy()
    assert loss[0] == pytest.approx(np.log(512), abs=0.3) and loss[-5:].mean() < loss[0] - 0.5


def test_loss_ignores_padding():
    config = tiny()
    model, tokens = build_model(config, grammar.story_tokenizer()).eval(), torch.tensor([[0, 5, 6, 7, 0, 0]])
    short = training.next_token_loss(model, tokens[:, :4], 0)
    assert training.next_token_loss(model, tokens, 0).item() == pytest.approx(short.item(), abs=1e-6)


def test_a_loss_that_is_not_finite_stops_training(tmp_path, monkeypatch):
    monkeypatch.setattr(
        training, "next_token_loss", lambda model, tokens, pad: next(model.parameters()).sum() * float("nan")
    )
    with pytest.raises(ValueError, match="not finite at step 2 of tiny"):
        train(tiny(), tmp_path)
    assert not (tmp_path / "checkpoints" / "step2").exists()


def test_state_file_is_safetensors_and_restores_moments(run):
    config, folder, _ = run
    tensors = load_file(folder / "state.safetensors")
    assert "rng" in tensors and any(k.startswith("optimizer.exp_avg_sq.") for k in tensors)


def test_no_embedding_is_frozen_at_zero():
    for architecture in ARCHITECTURES:
        model = build_model(tiny(architecture), grammar.story_tokenizer())
        assert (model.get_input_embeddings().weight.abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(architecture="mamba"), "architecture"),
        (dict(n_heads=3), "n_heads"),
        (dict(d_mlp=16), "d_mlp"),
        (dict(steps=0), "steps"),
        (dict(learning_rate=-1.0), "learning_rate"),
        (dict(precision="float16"), "precision"),
        (dict(n_key_value_heads=2), "n_key_value_heads"),
        (dict(architecture="llama", n_key_value_heads=3), "n_key_value_heads"),
        (dict(rotary_fraction=0.5), "rotary_fraction"),
        (dict(n_experts=4), "n_experts"),
        (dict(name="a/b"), "name"),
        (dict(decay_fraction=1.5), "decay_fraction"),
        (dict(repeat_order="none"), "repeat_order"),
        (dict(seed=-1), "seed"),
    ],
)
def test_config_refuses_and_names_the_argument(change, name):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{**dict(name="tiny"), **TINY, **change})


@pytest.mark.parametrize("change", [dict(steps=2.5), dict(batch_size="4"), dict(learning_rate="fast")])
def test_config_refuses_wrong_types(change):
    with pytest.raises(TypeError, match=next(iter(change))):
        TrainConfig(**{**dict(name="tiny"), **TINY, **change})


def test_presets_are_the_designs_models():
    assert {
        "story-gpt2-s42",
        "story-gpt2-s271",
        "story-gpt2-s149",
        "story-neox",
        "story-llama",
        "story-olmo",
        "story-olmoe",
    } == set(SHIPPED)
    sources_size = {f"story-8x16-s{seed}" for seed in (42, 271, 149, 7, 11, 13)}
    assert set(PRESETS) == {*SHIPPED, *sources_size, "ts51m"}
    for name in sources_size:
        config = preset(name)
        assert (config.n_layers, config.n_heads, config.d_model, config.d_mlp, config.n_ctx) == (8, 16, 256, 1024, 64)
        assert (config.batch_size, config.steps, config.learning_rate) == (64, 2000, 3e-3)
    with pytest.raises(KeyError, match="story-llama"):
        preset("story-lama")
    with pytest.raises(TypeError, match="learning_rate"):
        preset("story-llama", learning_rat=1.0)


def test_accuracy_of_a_model_that_knows_is_one():
    tokenizer = grammar.story_tokenizer()

    class Oracle(torch.nn.Module):
        def __init__(self, batch):
            super().__init__()
            self.scale, self.batch = torch.nn.Parameter(torch.ones(1)), batch

        def forward(self, tokens):
            logits = torch.zeros(*tokens.shape, 512)
            for row, prompt in enumerate(tokens):
                at = (self.batch.tokens == prompt).all(1).nonzero()[0, 0]
                logits[row, self.batch.positions["end"][at], self.batch.answer[at]] = 1.0
            return logits

    from spectral_nb.prompts.tasks import make_batch

    table = evaluate_tasks(
        Oracle(make_batch("retrieval", tokenizer, 20, seed=10_007, words="known")), tokenizer, 20, tasks=["retrieval"]
    )
    assert (table.value == 1.0).all()
    with pytest.raises(ValueError, match="retrieval"):
        evaluate_tasks(Oracle(None), tokenizer, 20, tasks=["retreival"])


# ---------------------------------------------------------------- ts51m
def test_ts51m_shape_and_a_few_steps(tmp_path):
    config = preset("ts51m")
    assert (config.n_layers, config.d_model, config.n_heads, config.n_ctx, config.n_codewords) == (8, 512, 16, 512, 512)
    (tmp_path / "text.txt").write_text("\n\n".join(stories.sample_stories(np.random.default_rng(0), 200)))
    grammar.story_tokenizer().save_pretrained(tmp_path / "tokenizer")
    small = dataclasses.replace(
        config,
        text=str(tmp_path / "text.txt"),
        tokenizer=str(tmp_path / "tokenizer"),
        n_codewords=64,
        n_ctx=64,
        n_layers=2,
        steps=2,
        batch_size=2,
        device="cpu",
        checkpoint_every=2,
    )
    log = train(small, tmp_path / "run")
    assert np.isfinite(log.value).all() and len(log) == 2
    checkpoint = weights(tmp_path / "run", 2)
    assert (
        checkpoint["transformer.wte.weight"].dtype == torch.float32
        and checkpoint["transformer.wte.weight"].shape[1] == 512
    )


def test_probes_are_written_into_text():
    tokenizer = grammar.story_tokenizer()
    probe = corpus.make_probe(tokenizer, 100)
    rows = corpus.sample_text(np.random.default_rng(0), np.full(500, 7), 300, 40, probe, probe_fraction=0.4)
    probed = (rows[:, 1:] != 7).any(1)
    assert 0.3 < probed.mean() < 0.5
    for row in rows[probed]:
        assert row[-1] in probe.codewords and (row == row[-1]).sum() == 2
    with pytest.raises(ValueError, match="too short"):
        corpus.sample_text(np.random.default_rng(0), np.full(500, 7), 2, 8, probe)
    with pytest.raises(ValueError, match="probe_fraction"):
        corpus.sample_text(np.random.default_rng(0), np.full(500, 7), 2, 40, probe, 2.0)


def test_text_that_is_missing_or_empty_is_refused(tmp_path):
    tokenizer = grammar.story_tokenizer()
    with pytest.raises(FileNotFoundError, match="no.txt"):
        corpus.token_stream(str(tmp_path / "no.txt"), tokenizer)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="no token"):
        corpus.token_stream(str(tmp_path / "empty.txt"), tokenizer)


# ---------------------------------------------------------------- zoo
def test_export_is_half_precision_hashed_and_replaces_the_old(run, tmp_path, monkeypatch):
    config, folder, _ = run
    entry = zoo.export_model(config, folder, tmp_path / "zoo")
    assert list(entry["revisions"])[0] == "step0" and list(entry["revisions"])[-1] == "step6"
    for revision in entry["revisions"].values():
        at = tmp_path / "zoo" / revision["folder"]
        assert all(file_sha256(at / f) == h for f, h in revision["files"].items())
        assert all(t.dtype == torch.float16 for t in load_file(at / "model.safetensors").values())
    first = file_sha256(tmp_path / "zoo" / "manifest.json")
    zoo.export_model(config, folder, tmp_path / "zoo")
    assert file_sha256(tmp_path / "zoo" / "manifest.json") == first
    assert [p.name for p in (tmp_path / "zoo").iterdir() if p.name.startswith(".")] == []
    assert set(read_table(tmp_path / "zoo" / "training_log.parquet").model) == {"tiny"}


def test_accuracy_table_is_of_the_shipped_weights(run, tmp_path, monkeypatch):
    config, folder, _ = run
    zoo.export_model(config, folder, tmp_path / "zoo")
    monkeypatch.setenv("SPECTRAL_NB_DATA", str(tmp_path))
    table = zoo.accuracy_table(["tiny"], n_prompts=10)
    assert (
        set(table.words) == {"known", "heldout"}
        and set(table.revision) == {"step0", "step2", "step6"}
        or len(set(table.revision)) == 3
    )
    assert ((table.ci_low <= table.value) & (table.value <= table.ci_high)).all()
    assert len(zoo.check_targets(table)) == 4


def test_export_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoints"):
        zoo.export_model(tiny(), tmp_path, tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_chosen_checkpoints_are_dense_where_retrieval_emerges():
    steps = list(range(0, 3001, 10))
    accuracy = [float(s >= 900) * min(1.0, (s - 900) / 150) for s in steps]
    chosen = zoo.choose_checkpoints(steps, {"retrieval": accuracy}, 12)
    assert len(chosen) == 12 and chosen[0] == 0 and chosen[-1] == 3000
    assert sum(900 <= s <= 1050 for s in chosen) >= 6
    with pytest.raises(ValueError, match="n="):
        zoo.choose_checkpoints(steps, {}, 1)


def test_command_trains_and_exports(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "story-gpt2-s42", tiny(eval_every=3, eval_prompts=10))
    monkeypatch.setenv("SPECTRAL_NB_DATA", str(tmp_path / "data"))
    code = zoo.main(
        ["story-gpt2-s42", "--steps", "3", "--train-dir", str(tmp_path / "t"), "--zoo", str(tmp_path / "zoo")]
    )
    assert code == 0 and "step3" in read_json(tmp_path / "zoo" / "manifest.json")["models"]["tiny"]["revisions"]
    with pytest.raises(SystemExit):
        zoo.main(["story-gpt3"])
    assert "story-gpt2-s42" in capsys.readouterr().err


# ---------------------------------------------------------------- what ships
@pytest.mark.skipif(not (zoo.zoo_dir() / "accuracy.parquet").is_file(), reason="no zoo in this checkout")
def test_shipped_models_reach_their_targets_and_retrieval_is_abrupt():
    table = read_table(zoo.zoo_dir() / "accuracy.parquet")
    targets = zoo.check_targets(table)
    assert set(targets.model) == set(EXPORTED) and targets.met.all(), targets[~targets.met]
    log = read_table(zoo.zoo_dir() / "training_log.parquet")
    rows = log[(log.task == "retrieval") & (log.metric == "accuracy")]
    for name, model in rows.groupby("model"):
        low, high = model[model.value >= 0.1].step.min(), model[model.value >= 0.9].step.min()
        assert high - low <= 0.15 * model.step.max(), (
            f"{name}: retrieval rises from 10 % to 90 % over {high - low} steps"
        )


@pytest.mark.skipif(not (zoo.zoo_dir() / "manifest.json").is_file(), reason="no zoo in this checkout")
def test_shipped_files_have_the_hashes_of_the_manifest_and_fit():
    root, size = zoo.zoo_dir(), 0
    manifest = read_json(root / "manifest.json")["models"]
    for name, entry in manifest.items():
        for revision in entry["revisions"].values():
            for file, digest in revision["files"].items():
                assert file_sha256(root / revision["folder"] / file) == digest
        for file, digest in entry["files"].items():
            assert file_sha256(root / name / file) == digest
        assert TrainConfig(**entry["training"]).architecture == entry["architecture"]
    for folder, _, files in os.walk(root):
        size += sum(os.path.getsize(os.path.join(folder, f)) for f in files)
    assert size < 45e6
