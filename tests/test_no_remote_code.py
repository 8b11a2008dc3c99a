"A checkpoint's own code never runs and nobody is asked: a marker file for every entry point, answered yes."

import json
import subprocess
import sys

import nbformat
import pytest
import torch
from conftest import tiny_hf
from safetensors.torch import save_file
from sweep_toy import PARAMETERS, write_toy

from spectral_nb.base.paths import repo_root
from spectral_nb.models.checkpoints import checkpoint_hash, read_spec, resolve
from spectral_nb.models.integrity import revision_hashes
from spectral_nb.models.loading import load_model, self_check
from spectral_nb.models.revisions import list_revisions
from spectral_nb.norms.command import main as norms_main
from spectral_nb.norms.weight_files import weight_norms
from spectral_nb.sweeps import sweep_plan, sweep_status
from spectral_nb.sweeps.command import main as sweep_main
from spectral_nb.training.config import TrainConfig
from spectral_nb.training.untrained import load_tokenizer
from spectral_nb.training.zoo import load_plain
from spectral_nb.views.circuits import main as circuits_main
from spectral_nb.views.trace_command import main as trace_main

# What a checkpoint's code would be: it writes the marker as soon as it is imported
CODE = """
open({marker!r}, "w").close()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class C(PretrainedConfig):
    model_type = "evil"
class M(PreTrainedModel):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
"""
AUTO = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
NOTEBOOK = "10_norm_growth"


def plant(folder, marker) -> None:
    "The code, and the keys that point to it in the configuration and in the tokenizer's."
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    for name, more in (("config.json", {}), ("tokenizer_config.json", {"tokenizer_class": "T"})):
        file = folder / name
        known = json.loads(file.read_text()) if file.is_file() else {"model_type": "evil"}
        file.write_text(json.dumps(known | more | {"auto_map": AUTO}))


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def unknown(tmp_path, marker):
    "A folder of an unknown family with code of its own."
    folder = tmp_path / "unknown"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    plant(folder, marker)
    return folder


@pytest.fixture
def known(tmp_path, marker):
    "A sound Llama whose files also point to code of their own."
    folder = tmp_path / "known"
    tiny_hf("llama", vocab_size=512).save_pretrained(folder)
    for file in (repo_root() / "data" / "zoo" / "story-llama").glob("*token*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": AUTO}))
    kept = config["tokenizer_class"]
    plant(folder, marker)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": kept}))
    return folder


@pytest.fixture
def yes(monkeypatch):
    "Every prompt is answered yes, and noted: the list of prompts."
    asked = []
    monkeypatch.setattr("builtins.input", lambda *a: asked.append(a) or "y")
    return asked


def sweep_file(folder):
    "A sweep in YAML over a folder's model, beside it."
    file = folder.parent / "sweep.yaml"
    file.write_text(f"notebook: {NOTEBOOK}\nparameters: {{model_name: {folder}}}\nout: {folder.parent / 'out'}\n")
    return str(file)


def sweep_of(folder) -> dict:
    return {"notebook": NOTEBOOK, "parameters": {"model_name": str(folder)}, "out": str(folder.parent / "out")}


PROMPT = ["When Mary and John went to the shop", "--answer", " Mary"]
COMMANDS = {
    "spectral-sweep plan": lambda f: sweep_main(["plan", sweep_file(f)]),
    "spectral-sweep status": lambda f: sweep_main(["status", sweep_file(f)]),
    "spectral-sweep collect": lambda f: sweep_main(["collect", sweep_file(f)]),
    "spectral-sweep clean": lambda f: sweep_main(["clean", sweep_file(f)]),
    "spectral-sweep report": lambda f: sweep_main(["report", sweep_file(f)]),
    "spectral-norms": lambda f: norms_main(["--model", str(f), "--heads", "L0H1"]),
    "spectral-norms --tasks": lambda f: norms_main(["--model", str(f), "--tasks", "retrieval", "--prompts", "4"]),
    "spectral-trace": lambda f: trace_main([*PROMPT, "--model", str(f)]),
    "circuits": lambda f: circuits_main(["--model", str(f), "--prompts", "2", "--out", str(f.parent / "page.html")]),
}
FUNCTIONS = {
    "load_model": load_model,
    "self_check": self_check,
    "weight_norms": weight_norms,
    "list_revisions": list_revisions,
    "checkpoint_hash": checkpoint_hash,
    "revision_hashes": revision_hashes,
    "resolve": resolve,
    "read_spec": read_spec,
    "sweep_plan": lambda f: sweep_plan(sweep_of(f)),
    "sweep_status": lambda f: sweep_status(sweep_of(f)),
    "load_plain": load_plain,
    "load_tokenizer": lambda f: load_tokenizer(TrainConfig(name="toy", tokenizer=str(f))),
}

GGUF = [name for name in FUNCTIONS if name not in ("load_plain", "load_tokenizer")]  # those take no GGUF file


def attempt(call, folder) -> BaseException | int | None:
    "What the call gives or how it refuses; anything but a refusal is a fault."
    try:
        return call(folder)
    except (ValueError, TypeError, FileNotFoundError, SystemExit) as e:
        return e


@pytest.mark.parametrize("entry", [*COMMANDS, *FUNCTIONS])
def test_an_unknown_family_is_refused_and_its_code_does_not_run(entry, unknown, marker, yes):
    got = attempt((COMMANDS | FUNCTIONS)[entry], unknown)
    assert not marker.exists() and not yes
    if isinstance(got, Exception):
        assert any(
            word in str(got) for word in ("evil", "not supported", "cannot be read", "trust_remote_code", "tokenizer")
        ), got


@pytest.mark.parametrize("entry", [*COMMANDS, *FUNCTIONS])
def test_a_known_family_is_read_without_its_own_code(entry, known, marker, yes):
    attempt((COMMANDS | FUNCTIONS)[entry], known)
    assert not marker.exists() and not yes


@pytest.mark.parametrize("entry", ["load_model", "load_tokenizer", "spectral-trace"])
def test_a_tokenizer_of_a_class_that_only_its_code_has(entry, known, marker, yes):
    "Where the tokenizer's class is one that transformers knows, its code would not be asked for."
    file = known / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "T"}))
    attempt((COMMANDS | FUNCTIONS)[entry], known)
    assert not marker.exists() and not yes


def test_a_known_family_with_code_loads(known, marker):
    assert load_model(known).cfg.d_vocab == 512 and not marker.exists()


@pytest.mark.parametrize("command", ["plan", "run"])
def test_commands_piped_a_yes_run_nothing(command, unknown, marker, tmp_path):
    "`yes | spectral-sweep plan`, and the run itself, whose notebook loads the model in a process of its own."
    write_toy(tmp_path, PARAMETERS + f'model_name: str = "{unknown}"\n')
    notebook = nbformat.read(tmp_path / "90_toy.ipynb", 4)
    load = "from spectral_nb.models.loading import load_model; load_model(model_name)"
    notebook.cells.append(nbformat.v4.new_code_cell(load))
    nbformat.write(notebook, tmp_path / "90_toy.ipynb")
    (tmp_path / "toy.yaml").write_text("notebook: 90_toy\n")
    call = [sys.executable, "-m", "spectral_nb.sweeps", command, str(tmp_path / "toy.yaml"), "--out", tmp_path / "out"]
    more = ["--executor", "serial", "--quiet"] if command == "run" else []
    done = subprocess.run([*call, *more], input="y\n" * 50, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert "Traceback" not in said and "[y/N]" not in said and not marker.exists(), said
    assert done.returncode == (0 if command == "plan" else 1), said
    assert command == "plan" or "architecture 'evil' is not supported" in said, said


def test_its_refusal_names_the_features(unknown):
    "Also of a family that transformers does not know."
    config = json.loads((unknown / "config.json").read_text())
    more = {"sliding_window": 4, "rope_theta": 1e4, "mystery_scale": 0.25}
    (unknown / "config.json").write_text(json.dumps(config | more))
    with pytest.raises(ValueError, match="recognised: rotary positions, windows; not recognised: mystery_scale"):
        load_model(unknown)


def write_gguf(file) -> None:
    "A tiny Llama in GGUF, with a tokenizer."
    gguf = pytest.importorskip("gguf")
    w = gguf.GGUFWriter(str(file), "llama")
    d, heads, width, layers, words = 32, 4, 48, 1, 64
    w.add_context_length(32), w.add_embedding_length(d), w.add_block_count(layers), w.add_feed_forward_length(width)
    w.add_head_count(heads), w.add_head_count_kv(heads), w.add_layer_norm_rms_eps(1e-5), w.add_vocab_size(words)
    w.add_rope_dimension_count(d // heads), w.add_rope_freq_base(10000.0)
    w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("default")
    (
        w.add_token_list([chr(33 + i) for i in range(words - 1)] + ['!"']),
        w.add_token_types([1] * words),
        w.add_token_merges(['! "']),
    )
    w.add_bos_token_id(0), w.add_eos_token_id(1)
    torch.manual_seed(0)
    shapes = {"token_embd": (words, d), "output_norm": (d,), "output": (words, d)}
    for layer in range(layers):
        block = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (d, d))
        block |= dict(attn_norm=(d,), ffn_norm=(d,), ffn_gate=(width, d), ffn_up=(width, d), ffn_down=(d, width))
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        w.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()


@pytest.mark.parametrize("entry", [*COMMANDS, *GGUF])
@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_gguf_file_beside_code(entry, given, tmp_path, marker, yes, monkeypatch):
    "The file, or its folder without a configuration, while code lies beside it."
    monkeypatch.setenv("SPECTRAL_NB_DATA", str(tmp_path / "data"))
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf")
    plant(folder, marker)
    if given == "folder":
        (folder / "config.json").unlink()
    call = (COMMANDS | FUNCTIONS)[entry]
    attempt(call, folder if given == "folder" else folder / "tiny.gguf")
    assert not marker.exists() and not yes


def test_a_gguf_file_beside_code_loads(tmp_path, marker, monkeypatch):
    monkeypatch.setenv("SPECTRAL_NB_DATA", str(tmp_path / "data"))
    write_gguf(tmp_path / "tiny.gguf")
    plant(tmp_path, marker)
    assert load_model(tmp_path / "tiny.gguf").cfg.d_vocab == 64 and not marker.exists()


def test_the_marker_would_be_written(unknown, marker):
    "The attack is real: with `trust_remote_code=True` transformers runs the folder's code."
    from transformers import AutoConfig

    AutoConfig.from_pretrained(str(unknown), trust_remote_code=True)
    assert marker.exists()
