"The live monitor: its rule, its events, its harmlessness, and Hugging Face's Trainer."

import numpy as np
import pytest
import torch
from conftest import D_VOCAB, random_tokens, tiny_hf

from spectral_nb.models.loading import from_hf
from spectral_nb.training.monitor import SpectralMonitor, TransitionRule, rising
from spectral_nb.attention.participation import fixed_content, head_participation
from spectral_nb.prompts.batches import PromptBatch


@pytest.fixture
def batch():
    tokens = random_tokens(40, 12)
    tokens[:, -1] = 7
    return PromptBatch(
        "toy",
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        {"end": torch.full((40,), 11), "key": torch.full((40,), 4)},
        tokens[:, 4].clone(),
        None,
        [""] * 40,
        0,
    )


def sharpen(hf, layer=1):
    with torch.no_grad():
        hf.transformer.h[layer].attn.c_attn.weight[:, :64] *= 40


def test_rule_waits_for_patience_and_fires_once():
    pr = [5, 2, 2, 5, 2, 5, 5, 5, 5, 9]
    assert np.flatnonzero(rising([pr])[0]).tolist() == [6]
    assert np.flatnonzero(rising([pr], patience=3)[0]).tolist() == [7]
    assert not rising([pr], factor=10).any()
    assert rising([[1, 3.5], [1, 1]], patience=1).tolist() == [[False, True], [False, False]]


def test_rule_is_the_same_live_and_afterwards():
    pr = 1 + np.random.default_rng(0).gamma(1, 2, size=(2, 3, 40))
    rule = TransitionRule()
    live = np.stack([rule.update(pr[..., i]) for i in range(40)], axis=-1)
    assert np.array_equal(live, rising(pr)) and live.sum() <= 6


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "qwen3", "olmo", "olmoe"])
def test_monitor_reads_what_a_loaded_model_shows(architecture, batch):
    hf = tiny_hf(architecture)
    monitor = SpectralMonitor(batch)
    live = monitor.measure(hf)["pr"]
    bridge = head_participation(from_hf(hf, processing="raw"), batch).numpy()
    np.testing.assert_allclose(live, bridge, rtol=1e-4)


def test_training_is_the_same_with_and_without(batch):
    def train(callback):
        hf = tiny_hf("gpt2").train()
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-3)
        for step in range(5):
            callback(hf, step)
            tokens = torch.randint(1, D_VOCAB, (4, 12))
            optimizer.zero_grad()
            hf(tokens, labels=tokens).loss.backward()
            optimizer.step()
        return hf

    watched = train(SpectralMonitor(batch, every=1, shuffled=True).step)
    alone = train(lambda model, step: None)
    assert watched.training and all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters()))


def test_events_come_when_a_head_starts_to_fetch(batch):
    hf, heard = tiny_hf("gpt2"), []
    monitor = SpectralMonitor(batch, every=10, on_event=heard.append, patience=1, factor=1.2, least=0.5)
    for step in range(41):
        returned = monitor.step(hf, step)
        assert returned == [e for e in monitor.events if e.step == step]
        if step == 25:
            sharpen(hf)
    assert heard == monitor.events and heard and {e.step for e in heard} == {30} and {e.layer for e in heard} == {1}
    assert all(e.pr > e.lowest for e in heard) and "L1H" in str(heard[0])
    table = monitor.table()
    assert sorted(table.step.unique()) == [0, 10, 20, 30, 40] and len(table) == 5 * 8


def test_control_separates_content_from_other_variation(batch):
    hf = tiny_hf("gpt2")
    monitor = SpectralMonitor(batch, control=fixed_content(batch))
    found = monitor.measure(hf)
    assert (found["content"] >= 1).all()
    np.testing.assert_allclose(found["pr_control"], head_participation(hf, fixed_content(batch)).numpy())
    assert SpectralMonitor(batch, control=batch).measure(hf)["content"].max() == 1
    with pytest.raises(ValueError, match="role"):
        SpectralMonitor(
            batch,
            "key",
            control=batch.subset(slice(0, 20)).__class__(
                "toy", batch.tokens, batch.attention_mask, {"end": batch.positions["end"]}, None, None, batch.text, 0
            ),
        )


def test_trainer_callback(batch, tmp_path):
    from transformers import Trainer, TrainingArguments

    monitor = SpectralMonitor(batch, every=2)
    rows = [{"input_ids": t, "labels": t} for t in random_tokens(12, 10)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(tiny_hf("gpt2"), arguments, train_dataset=rows, callbacks=[monitor.trainer_callback()]).train()
    assert sorted(monitor.table().step.unique()) == [0, 2, 4]


def test_fits_the_training_loop(batch, tmp_path):
    from spectral_nb.prompts.grammar import story_tokenizer
    from spectral_nb.prompts.lookup_tasks import retrieval
    from spectral_nb.training.config import TrainConfig
    from spectral_nb.training.loop import train

    monitor = SpectralMonitor(retrieval(story_tokenizer(), 40), every=2)
    config = TrainConfig(
        "tiny", n_layers=1, d_model=16, n_heads=2, d_mlp=32, steps=4, batch_size=4, eval_every=0, checkpoint_every=4
    )
    train(config, tmp_path / "run", callbacks=[monitor])
    assert sorted(monitor.table().step.unique()) == [0, 2, 4]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"role": "nd"}, ValueError, "did you mean 'end'"),
        ({"every": 0}, ValueError, "every"),
        ({"every": 2.5}, TypeError, "every"),
        ({"on_event": 3}, TypeError, "on_event"),
        ({"factor": 0.9}, ValueError, "factor"),
        ({"patience": 0}, ValueError, "patience"),
    ],
)
def test_bad_settings_are_refused(batch, options, error, message):
    with pytest.raises(error, match=message):
        SpectralMonitor(batch, **options)


def test_a_model_gone_wrong_is_named(batch):
    hf = tiny_hf("gpt2")
    with torch.no_grad():
        hf.transformer.h[1].attn.c_attn.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="layer 1"):
        SpectralMonitor(batch).step(hf, 0)
    with pytest.raises(ValueError, match="step"):
        SpectralMonitor(batch).step(hf, -1)
