"Planted circuits: the models do their task by the planted heads and by nothing else."

import pytest
import torch

from spectral_nb.causal.ablation import ablate_heads
from spectral_nb.causal.metrics import evaluate
from spectral_nb.models.architectures import ArchSpec
from spectral_nb.models.planted_circuits import PLANTED, planted


@pytest.mark.parametrize("name", PLANTED)
def test_planted_heads_do_the_task(name):
    p = planted(name, 24, seed=5)
    assert evaluate(p.model, p.batch, "accuracy").mean() == 1.0
    for head in p.heads:
        with ablate_heads(p.model, [head]):
            without = evaluate(p.model, p.batch, "logit_diff").mean()
        whole = evaluate(p.model, p.batch, "logit_diff").mean()
        if head in p.distractors:
            assert without > 0.9 * whole  # it only shrinks everything else, through the norm
        else:
            assert without < 0.5 * whole


@pytest.mark.parametrize("name", PLANTED)
def test_planted_attention_is_sharp(name):
    "Every planted head that is not idle attends to one token, wherever it looks from."
    p = planted(name, 6)
    with torch.no_grad():
        _, cache = p.model.run_with_cache(p.batch.tokens)
    end = p.batch.at("end")
    for layer, head in p.heads:
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][torch.arange(6), head, end]
        assert (pattern.max(-1).values > 0.9).all()


def test_shapes_of_the_four():
    specs = {name: ArchSpec.from_model(planted(name, 2).model) for name in PLANTED}
    assert specs["induction"].norm == specs["inhibition"].norm == "layernorm" and specs["inhibition"].n_layers == 3
    assert specs["rotary"].positions == "rotary" and specs["rotary"].n_groups == 1
    assert specs["grouped"].positions == "rotary" and specs["grouped"].n_groups == 2


def test_seed_and_bad_names():
    assert torch.equal(planted("induction", 4, seed=1).batch.tokens, planted("induction", 4, seed=1).batch.tokens)
    assert not torch.equal(planted("grouped", 4, seed=1).batch.tokens, planted("grouped", 4, seed=2).batch.tokens)
    with pytest.raises(ValueError, match="induction"):
        planted("inductoin")
    with pytest.raises(ValueError, match="n_prompts"):
        planted("rotary", 0)
