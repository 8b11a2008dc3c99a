"""The grammar's text, checked word by word with patterns of its own: nothing here reads the sampler's tables."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from spectral_nb.prompts.grammar import NAMES, NOUNS, VERBS, lexicon, story_tokenizer
from spectral_nb.prompts.stories import probe_rows, random_rows, sample_stories, sample_training

LEX = lexicon()
HELD_NAMES = set(NAMES[100:])
HELD_CODES = set(LEX.codewords[-20:])
HELD_NOUNS = {w for pair in NOUNS[20:] for w in pair}
PLURAL = {p: s for s, p in NOUNS}
SINGULAR = {s: p for s, p in NOUNS}


def words_of(rows):
    return [" ".join(LEX.words[t] for t in row[1:]) for row in rows]


@pytest.fixture(scope="module")
def sample():
    return sample_training(np.random.default_rng(5), 1500)


def test_vocabulary_is_512_different_words_with_bos_first():
    tok = story_tokenizer()
    assert len(tok) == len(set(LEX.words)) == len(LEX.ids) == 512
    assert tok.bos_token_id == tok.eos_token_id == tok.pad_token_id == 0
    assert tok.convert_ids_to_tokens(list(range(512))) == list(LEX.words)
    assert len(set(NAMES)) == 120 and len(LEX.codewords) >= 170
    assert all(re.fullmatch(r"[A-Z]{2}\d\d", c) for c in LEX.codewords)


def test_known_and_held_out_split_each_list():
    for kind in ("names", "nouns", "codewords"):
        known, held = LEX.split(kind), LEX.split(kind, "heldout")
        assert known and held and not set(known) & set(held)
        assert known + held == list(LEX.split(kind, "all"))
    assert len(LEX.split("names")) >= 100


@pytest.mark.parametrize("config", [GPT2Config, LlamaConfig])
def test_saved_tokenizer_loads_beside_a_model_config(tmp_path, config):
    tok = story_tokenizer()
    tok.save_pretrained(tmp_path)
    config(vocab_size=512, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "When Mary and John went to the shop, John gave QX17. unseen"
    assert again(text).input_ids == tok(text).input_ids
    assert again.tokenize(text) == "When Mary and John went to the shop , John gave QX17 .".split() + ["<unk>"]
    first = (tmp_path / "tokenizer.json").read_bytes()
    story_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == first


def test_rows_begin_with_bos_and_are_full(sample):
    assert sample.dtype == np.int64 and sample.shape == (1500, 64)
    assert (sample[:, 0] == 0).all()
    assert (sample[:, 1:] > 1).all() and sample.max() < 512  # neither <bos> nor <unk> inside
    assert len(np.unique(sample)) == 511  # every word but <unk> occurs


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 40),
    n_ctx=st.integers(40, 150),
    order=st.sampled_from(["fixed", "shuffled"]),
)
def test_sampler_is_deterministic_for_any_size(seed, n, n_ctx, order):
    a, b = (sample_training(np.random.default_rng(seed), n, n_ctx, repeat_order=order) for _ in range(2))
    assert a.shape == (n, n_ctx) and (a == b).all() and (a[:, 1:] > 1).all()
    assert (sample_training(np.random.default_rng(seed + 1), n, n_ctx, repeat_order=order) != a).any()


def test_mix_is_the_share_of_rows(sample):
    texts = words_of(sample)
    assert np.mean(["code" in t.split() for t in texts]) == pytest.approx(0.40, abs=0.05)
    assert np.mean([set(t.split()) <= set(LEX.codewords) for t in texts]) == pytest.approx(0.15, abs=0.04)
    only = sample_training(np.random.default_rng(0), 50, mix={"sva": 2.0})
    assert all(
        re.search(r"(near|behind|beside|with) the", t) and "code" not in t and "gave" not in t for t in words_of(only)
    )


def test_probes_ask_twice_for_the_key_they_gave():
    before, between = set(), set()
    for t in words_of(probe_rows(np.random.default_rng(1), 400, 64)):
        key = re.findall(r"(?:The secret code is|Remember the secret code) (\S+) \.", t)
        asked = re.findall(r"(?:What is the secret code|What was the code) \? (\S+) \.", t)
        assert len(key) == 1 and len(asked) == 2 and set(asked) == set(key)
        assert set(re.findall(r"\b[A-Z]{2}\d\d\b", t)) == set(key) and not set(key) & HELD_CODES
        words = t.split()
        before.add(words.index(key[0]))
        between.add(words.index("?") - words.index(key[0]))
    assert len(before) > 10 and len(between) > 10  # the key is at varying places, and at varying distances


def test_indirect_object_sentences_name_the_other_person_and_no_held_out_name(sample):
    rows = sample_training(np.random.default_rng(2), 300, mix={"ioi": 1.0})
    orders = []
    for t in words_of(rows):
        names, current = [], []
        for w in t.split():
            if w in NAMES:
                current.append(w)
                if len(current) == 4:
                    names.append(current)
                    current = []
        for a, b, s, io in names:
            assert a != b and s in (a, b) and io == ({a, b} - {s}).pop()
            orders.append(s == b)
        assert not set(t.split()) & HELD_NAMES
    assert np.mean(orders) == pytest.approx(0.5, abs=0.05)


def test_verbs_agree_with_the_subject_whatever_stands_between(sample):
    third = {s: "singular" for _, s in VERBS} | {p: "plural" for p, _ in VERBS}
    number = dict.fromkeys(SINGULAR, "singular") | dict.fromkeys(PLURAL, "plural")
    seen = {"same": 0, "opposite": 0}
    adjective = "(?:red |big |small |blue |new |little |good |nice |quiet |pretty )?"
    pattern = rf"[Tt]he {adjective}(\w+) (?:near|behind|beside|with) the {adjective}(\w+) (\w+)"
    for t in words_of(sample):
        for subject, between, verb in re.findall(pattern, t):
            if subject in number and between in number and verb in third:
                assert third[verb] == number[subject], (subject, between, verb)
                assert not {subject, between} & HELD_NOUNS
                seen["same" if number[subject] == number[between] else "opposite"] += 1
    assert min(seen.values()) > 100


def test_plain_clauses_agree_too_and_use_held_out_words():
    third = {s: "singular" for _, s in VERBS} | {p: "plural" for p, _ in VERBS}
    texts = words_of(sample_training(np.random.default_rng(3), 400, mix={"story": 1.0}))
    used = set(" ".join(texts).split())
    assert HELD_NAMES <= used and HELD_NOUNS <= used
    checked = 0
    for t in texts:
        for noun, verb in re.findall(r"(?:[Tt]he|A) (\w+) (\w+) (?:at|and|,)", t):
            if verb in third and noun in SINGULAR | PLURAL:
                assert third[verb] == ("singular" if noun in SINGULAR else "plural")
                checked += 1
    assert checked > 200


def test_names_recur_through_a_story():
    recurrence = []
    for story in sample_stories(np.random.default_rng(4), 50, 120):
        names = [w for w in re.findall(r"\w+", story) if w in NAMES]
        recurrence.append(len(names) / len(set(names)))
        assert story.endswith(".") and " ." not in story
    assert min(recurrence) > 1 and np.mean(recurrence) > 1.5


@pytest.mark.parametrize("order", ["fixed", "shuffled"])
def test_random_words_recur(order):
    rows = random_rows(np.random.default_rng(6), 200, 64, order)
    repeated, distances = [], []
    for row in rows[:, 1:]:
        last = {}
        bigrams = list(zip(row[:-1], row[1:], strict=True))
        repeated.append(len(bigrams) - len(set(bigrams)))
        gaps = set()
        for i, t in enumerate(row):
            if t in last:
                gaps.add(i - last[t])
            last[t] = i
        distances.append(len(gaps))
    assert min(repeated) > 5
    # a span repeated in order recurs at one distance in a row; in shuffled chunks it does not
    assert (max(distances) == 1) if order == "fixed" else (np.median(distances) > 5)


def test_bad_input_is_refused_by_name():
    rng = np.random.default_rng(0)
    for arguments, message in [
        ({"mix": {"poetry": 1.0}}, "poetry"),
        ({"mix": {}}, "mix="),
        ({"mix": {"ioi": -1.0}}, "mix="),
        ({"mix": {"ioi": 0.0}}, "mix="),
        ({"repeat_order": "sorted"}, "repeat_order"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample_training(rng, 4, **arguments)
    with pytest.raises(ValueError, match="n_ctx=20"):
        sample_training(rng, 4, 20, mix={"retrieval": 1.0})
    with pytest.raises(ValueError, match="words="):
        LEX.split("names", "new")
