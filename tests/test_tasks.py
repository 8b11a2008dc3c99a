"""Tasks: every role is checked by decoding the token at its position and comparing it with the prompt's own words."""

import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spectral_nb.base.paths import reference_dir
from spectral_nb.prompts.batches import PromptBatch
from spectral_nb.prompts.grammar import BODIES, IOI_WORDINGS, NAMES, NOUNS, VERBS, lexicon, story_tokenizer
from spectral_nb.prompts.stories import sample_training
from spectral_nb.prompts.tasks import TASKS, induction, ioi, make_batch, retrieval, sva, text

STORY = story_tokenizer()
LEX = lexicon()
BLANKS = set(
    """book ball cup hat key box coat letter flower map ring lamp basket bag toy cake drum rope bell coin park shop
school garden house river hill market station farm library kitchen forest beach bridge field museum office
hotel lake red big small blue new little good nice quiet pretty""".split()
)
needs_reference = pytest.mark.skipif(reference_dir() is None, reason="no reference data")


@pytest.fixture(scope="module")
def gpt2():
    folder = reference_dir() / "gpt2_tokenizer"
    bpe = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def word(tokenizer, batch, role, i):
    return tokenizer.decode([batch.tokens[i, batch.at(role)[i]]])


def names_in(prompt, names=frozenset(NAMES)):
    return [w for w in re.findall(r"\w+", prompt) if w in names]


def check_ioi(tokenizer, batch, space):
    for i, prompt in enumerate(batch.text):
        a, b, s = names_in(prompt)
        io = ({a, b} - {s}).pop()
        assert s in (a, b) and a != b
        assert word(tokenizer, batch, "IO", i) == space + io == tokenizer.decode([batch.answer[i]])
        assert word(tokenizer, batch, "S1", i) == word(tokenizer, batch, "S2", i) == space + s
        assert tokenizer.decode([batch.wrong[i]]) == space + s
        assert word(tokenizer, batch, "end", i) == space + "to" and prompt.endswith(" to")
        after = re.findall(r"\w+|[^\w\s]", prompt)
        assert word(tokenizer, batch, "S1+1", i).strip() == after[after.index(s) + 1]
        assert batch.at("S1")[i] < batch.at("S2")[i] and batch.at("IO")[i] < batch.at("S2")[i]
        assert batch.at("end")[i] == batch.attention_mask[i].sum() - 1
        assert tokenizer.decode(batch.tokens[i, 1 : batch.lengths[i]]).replace(" ", "") == prompt.replace(" ", "")


def test_ioi_roles_with_the_story_tokenizer():
    check_ioi(STORY, ioi(STORY, 300, seed=3), "")


@needs_reference
def test_ioi_roles_with_gpt2_tokenizer(gpt2):
    batch = ioi(gpt2, 300, seed=3)
    check_ioi(gpt2, batch, " ")
    for name in NAMES:  # every name is one GPT-2 token behind a space, and none shares it
        assert len(gpt2(" " + name).input_ids) == 1
    assert (batch.tokens[:, 0] == gpt2.bos_token_id).all()
    assert all(
        gpt2(t).input_ids == row[1:n].tolist()
        for t, row, n in zip(batch.text, batch.tokens, batch.lengths, strict=True)
    )


@needs_reference
def test_ioi_uses_a_hundred_names_fifteen_wordings_and_half_of_each_order(gpt2):
    batch = ioi(gpt2, 2000, seed=0)
    assert len({n for t in batch.text for n in names_in(t)}) >= 100
    frames = set()
    for t in batch.text:
        frames.add(" ".join("N" if w in NAMES else "_" if w in BLANKS else w for w in re.findall(r"\w+|[^\w\s]", t)))
    assert len(frames) == len(set(IOI_WORDINGS)) >= 15
    assert (batch.at("IO") < batch.at("S1")).sum() == 1000


@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_ioi_order(order):
    batch = ioi(STORY, 50, order=order)
    assert ((batch.at("IO") < batch.at("S1")) == (order == "ABBA")).all()


def test_ioi_of_own_wordings():
    batch = ioi(STORY, 10, wordings=["At the {P} {A} and {B} met , so {S} sold a {T} to {O} ."])
    assert all(re.fullmatch(r"At the \w+ \w+ and \w+ met, so \w+ sold a \w+ to", t) for t in batch.text)
    check_ioi(STORY, batch, "")
    for bad in [
        "{A} and {B} met",
        "Then {S} saw {A} and {B} and went to {O}",
        "{A} {B} {S} {X} {O}",
        "{A} and {B} and {A} {S} {O}",
    ]:
        with pytest.raises(ValueError, match="wordings"):
            ioi(STORY, 2, wordings=[bad])
    with pytest.raises(ValueError, match="wordings"):
        ioi(STORY, 2, wordings=[])


def test_held_out_words_are_disjoint_and_never_answers_in_training():
    known, held = ioi(STORY, 300), ioi(STORY, 300, words="heldout")
    assert not {n for t in known.text for n in names_in(t)} & {n for t in held.text for n in names_in(t)}
    known, held = retrieval(STORY, 300), retrieval(STORY, 300, words="heldout")
    assert not set(known.answer.tolist()) & set(held.answer.tolist())
    known, held = sva(STORY, 300), sva(STORY, 300, words="heldout")
    nouns = [{w for t in b.text for w in t.split()} & {w for p in NOUNS for w in p} for b in (known, held)]
    assert nouns[0] and nouns[1] and not nouns[0] & nouns[1]
    rows = sample_training(np.random.default_rng(0), 1000)
    codes = set(retrieval(STORY, 300, words="heldout").answer.tolist())
    assert not codes & set(rows[(rows == LEX.ids["code"]).any(1)].ravel().tolist())


@pytest.mark.parametrize("kind", ["any", "same", "opposite"])
def test_sva_roles_and_numbers(kind):
    batch = sva(STORY, 400, seed=2, distractor=kind)
    number = {s: 0 for s, _ in NOUNS} | {p: 1 for _, p in NOUNS}
    forms = {s: (p, 0) for p, s in VERBS} | {p: (s, 1) for p, s in VERBS}
    same = []
    for i, prompt in enumerate(batch.text):
        subject, between = [w for w in prompt.split() if w in number]
        assert word(STORY, batch, "subject", i) == subject and word(STORY, batch, "distractor", i) == between
        assert word(STORY, batch, "end", i) == prompt.split()[-1]
        answer, rival = STORY.decode([batch.answer[i]]), STORY.decode([batch.wrong[i]])
        assert forms[answer] == (rival, number[subject])
        same.append(number[subject] == number[between])
    assert sum(same) == {"any": 200, "same": 400, "opposite": 0}[kind]
    singular = sum(number[word(STORY, batch, "subject", i)] == 0 for i in range(400))
    assert singular == 200


def test_retrieval_roles_and_varying_key_position():
    batch = retrieval(STORY, 300, seed=4)
    for i, prompt in enumerate(batch.text):
        codes = re.findall(r"\b[A-Z]{2}\d\d\b", prompt)
        assert codes == [STORY.decode([batch.answer[i]])] == [word(STORY, batch, "key", i)]
        assert word(STORY, batch, "query", i) == word(STORY, batch, "end", i) == "?" and prompt.endswith("?")
        assert batch.wrong[i] != batch.answer[i] and LEX.words[batch.wrong[i]] in LEX.codewords
        assert prompt.count(".") == 4  # three story sentences and the key
        assert not re.search(r"[A-Z]{2}\d\d\. (What is|What was)", prompt)  # a story sentence stands between
    assert len(set(batch.at("key").tolist())) > 10


@needs_reference
def test_retrieval_with_own_codewords_for_another_tokenizer(gpt2):
    batch = retrieval(gpt2, 20, codewords=["green", "seven", "river", "notasingletoken"])
    assert {gpt2.decode([a]) for a in batch.answer} <= {" green", " seven", " river"}
    assert all(word(gpt2, batch, "key", i) == gpt2.decode([batch.answer[i]]) for i in range(20))
    with pytest.raises(ValueError, match="codewords are a single token"):
        retrieval(gpt2, 20)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 20),
    length=st.integers(5, 60),
    seed=st.integers(0, 999),
    vocabulary=st.sampled_from([None, "all", range(2, 80)]),
)
def test_induction_repeats_one_word_only(n, length, seed, vocabulary):
    batch = induction(STORY, n, length=length, seed=seed, vocabulary=vocabulary)
    assert batch.tokens.shape == (n, length + 1) and (batch.tokens[:, 0] == 0).all()
    for i, row in enumerate(batch.tokens.tolist()):
        a1, b1, a2 = (batch.at(r)[i].item() for r in ("A1", "B1", "A2"))
        counts = Counter(row[1:])
        assert b1 == a1 + 1 and a2 == length and 2 <= a1 and b1 < a2 - 1
        assert row[a1] == row[a2] and counts[row[a1]] == 2 and sum(counts.values()) - len(counts) == 1
        assert batch.answer[i] == row[b1] and batch.wrong[i] not in (row[a1], row[b1]) and batch.wrong[i] in row
        assert 0 not in row[1:] and 1 not in row[1:]  # no special token
        if vocabulary is None:
            assert {LEX.words[t] for t in row[1:]} <= set(LEX.codewords[:-20])


@needs_reference
def test_induction_over_other_vocabularies(gpt2):
    batch = induction(gpt2, 200, length=50)
    assert gpt2.bos_token_id not in batch.tokens[:, 1:]
    assert all(len(set(row)) == 49 for row in batch.tokens[:, 1:].tolist())
    llama = AutoTokenizer.from_pretrained(reference_dir() / "stories260k")
    batch = induction(llama, 50, prepend_bos=False)
    assert batch.tokens.shape == (50, 32) and batch.tokens.min() >= 3
    with pytest.raises(ValueError, match="heldout"):
        induction(gpt2, 4, words="heldout")


@needs_reference
def test_text_from_a_file_and_from_strings(gpt2):
    path = reference_dir() / "text" / "tinyshakespeare.txt"
    batch = text(gpt2, path, 20, window=32, seed=1)
    whole = path.read_text()
    assert batch.tokens.shape == (20, 32) and batch.answer is None and list(batch.positions) == ["end"]
    assert all(t in whole for t in batch.text)
    assert (text(gpt2, path, 20, window=32, seed=1).tokens == batch.tokens).all()
    assert (text(gpt2, path, 20, window=32, seed=2).tokens != batch.tokens).any()
    short = text(gpt2, ["Hello there", "To be, or not to be, that is the question"])
    assert short.lengths.tolist() == [3, 13] and short.text[0] == "Hello there"
    assert (short.tokens[0, 3:] == short.pad_token_id).all() and short.at("end").tolist() == [2, 12]


def test_text_defaults_to_stories_in_full_windows():
    batch = text(STORY, n_prompts=30)
    assert batch.tokens.shape == (30, 64) and batch.attention_mask.all() and 1 not in batch.tokens
    long = text(STORY, [" ".join(["Then Mary saw the dogs ."] * 30)], window=11)
    assert len(long) == 18 and long.attention_mask.all()


def test_text_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.txt"):
        text(STORY, tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="0 windows"):
        text(STORY, ["", "  "])
    with pytest.raises(ValueError, match="at least 9 are needed"):
        text(STORY, ["Then Mary saw John ."], 9)
    with pytest.raises(ValueError, match="unknown"):
        text(STORY, ["Shall I compare thee"])
    with pytest.raises(TypeError, match="int"):
        text(STORY, [3])
    with pytest.raises(ValueError, match="window=65"):
        text(STORY, window=65)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("n", [1, 7])
def test_every_task_is_deterministic_and_well_formed(task, n):
    a, b, c = (make_batch(task, STORY, n, seed=s) for s in (5, 5, 6))
    assert (a.tokens == b.tokens).all() and a.text == b.text
    assert a.tokens.shape != c.tokens.shape or (a.tokens != c.tokens).any()
    assert len(a) == n == len(a.text) and a.tokens.dtype == torch.int64 and a.attention_mask.dtype == torch.bool
    last = a.attention_mask.sum(1) - 1
    assert (a.at("end") == last).all()
    assert ((a.attention_mask.cumprod(1).bool()) == a.attention_mask).all()  # padding is on the right only
    assert (a.tokens[~a.attention_mask] == a.pad_token_id).all()
    if task != "text":
        assert (a.answer != a.wrong).all()


def test_a_model_gives_its_tokenizer_and_context():
    model = SimpleNamespace(tokenizer=STORY, cfg=SimpleNamespace(n_ctx=24, d_vocab=512))
    assert (ioi(model, 8).tokens == ioi(STORY, 8).tokens).all()
    with pytest.raises(ValueError, match="n_ctx=24"):
        retrieval(model, 8)
    with pytest.raises(TypeError, match="without a tokenizer"):
        ioi(SimpleNamespace(tokenizer=None), 8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: make_batch("iou", STORY, 4), "task='iou'.*did you mean 'ioi'"),
        (lambda: ioi(STORY, 0), "n_prompts=0"),
        (lambda: sva(STORY, -1), "n_prompts=-1"),
        (lambda: ioi(STORY, 4, words="unseen"), "words='unseen'"),
        (lambda: ioi(STORY, 4, order="AABB"), "order='AABB'"),
        (lambda: sva(STORY, 4, distractor="other"), "distractor='other'"),
        (lambda: retrieval(STORY, 4, n_fillers=20), "n_ctx=64"),
        (lambda: induction(STORY, 4, length=4), "length=4"),
        (lambda: induction(STORY, 4, length=64), "n_ctx=64"),
        (lambda: induction(STORY, 4, vocabulary="everything"), "vocabulary='everything'"),
        (lambda: induction(STORY, 4, vocabulary=range(500, 600)), "0 to 511"),
        (lambda: induction(STORY, 4, vocabulary=range(10)), "10 different ids"),
    ],
)
def test_bad_values_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_refused():
    for bad in (
        lambda: ioi("gpt2", 4),
        lambda: ioi(None, 4),
        lambda: ioi(STORY, 4.0),
        lambda: ioi(STORY, 4, subjects=3),
    ):
        with pytest.raises(TypeError):
            bad()


@needs_reference
def test_too_few_single_token_names_is_an_error():
    llama = AutoTokenizer.from_pretrained(reference_dir() / "stories260k")
    with pytest.raises(ValueError, match=r"only \d+ of 100 known names are a single token .*at least 10 are needed"):
        ioi(llama, 4)
    with pytest.raises(ValueError, match="nouns are a single token"):
        sva(llama, 4)


def test_subset_batches_and_split_keep_rows_together():
    batch = ioi(STORY, 10)
    picked = batch.subset([7, 2])
    assert picked.text == [batch.text[7], batch.text[2]]
    for role in batch.positions:
        assert picked.at(role).tolist() == batch.at(role)[[7, 2]].tolist()
    assert picked.answer.tolist() == batch.answer[[7, 2]].tolist()
    assert (picked.tokens == batch.tokens[[7, 2]]).all()
    mask = torch.zeros(10, dtype=torch.bool)
    mask[3] = True
    assert batch.subset(mask).text == batch.subset(mask.numpy()).text == [batch.text[3]]
    assert sum((b.text for b in batch.batches(4)), []) == batch.text
    widths = []
    for places, part in batch.by_length(4):
        assert part.text == [batch.text[i] for i in places.tolist()] and (part.lengths == batch.lengths[places]).all()
        assert (
            part.tokens.equal(batch.tokens[places][:, : part.tokens.shape[1]])
            and part.tokens.shape[1] == part.lengths.max()
        )
        widths += [part.lengths.min().item(), part.lengths.max().item()]
    assert widths == sorted(widths)
    a, b = batch.split(6)
    assert a.text + b.text == batch.text and len(a) == 6
    assert (batch.to("cpu").tokens == batch.tokens).all()
    for bad in (
        lambda: batch.subset([]),
        lambda: batch.subset(mask & False),
        lambda: batch.split(10),
        lambda: list(batch.batches(0)),
        lambda: list(batch.by_length(0)),
        lambda: batch.at("S3"),
    ):
        with pytest.raises(ValueError):
            bad()


def test_a_batch_made_by_hand_is_checked():
    good = dict(
        task="demo",
        tokens=torch.zeros(2, 3, dtype=torch.int64),
        attention_mask=torch.ones(2, 3, dtype=torch.bool),
        positions={"end": torch.tensor([2, 2])},
        answer=None,
        wrong=None,
        text=["a", "b"],
        pad_token_id=0,
    )
    PromptBatch(**good)
    for change, message in [
        ({"tokens": torch.zeros(0, 3), "attention_mask": torch.ones(0, 3)}, "empty"),
        ({"positions": {}}, "end"),
        ({"positions": {"end": torch.tensor([2, 3])}}, "outside"),
        ({"positions": {"end": torch.tensor([2])}}, "1 entries"),
        ({"text": ["a"]}, "text has 1"),
        ({"answer": torch.tensor([1])}, "answer has 1"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask"),
    ]:
        with pytest.raises(ValueError, match=message):
            PromptBatch(**{**good, **change})


def test_prompts_are_made_of_the_words_that_training_uses():
    """No prompt of a task holds a word that the tokenizer does not know."""
    for task in TASKS:
        for words in ("known", "heldout"):
            kwargs = {} if task == "text" else {"words": words}
            if task == "induction":
                kwargs["length"] = 12
            assert 1 not in make_batch(task, STORY, 100, **kwargs).tokens
    assert max(len(b.split()) for b in BODIES) < 12
