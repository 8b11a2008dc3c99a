"Fixtures shared by all tests: tiny random models of every architecture, and the reference data where it is there."

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema would build a parser of web addresses with it for 3 s

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)

# Files that take longest come first, so that no worker of pytest-xdist begins one of them at the end.
SLOW_FILES = """sweeps_kills website sweeps arguments real_models sweeps_faults hub wheel families sweeps_distributed
no_remote_code circuits svt sweep_report cross_architecture faults norm_growth pr_fingerprint causal""".split()
D_VOCAB, N_CTX = 97, 32
ARCHITECTURES = ("gpt2", "gpt_neox", "llama", "qwen3", "olmo", "olmoe")


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def tiny_hf(architecture: str, seed: int = 0, **changes):
    "A random Hugging Face model of two layers with weights large enough that attention is far from uniform."
    import transformers as tf

    common = dict(vocab_size=D_VOCAB, bos_token_id=0, eos_token_id=0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=N_CTX, **common)
    config = {
        "gpt2": lambda: tf.GPT2Config(
            **{**dict(n_embd=32, n_layer=2, n_head=4, n_positions=N_CTX, **common), **changes}
        ),
        "gpt_neox": lambda: tf.GPTNeoXConfig(**{**dict(sizes, intermediate_size=64, rotary_pct=0.25), **changes}),
        "llama": lambda: tf.LlamaConfig(**{**dict(sizes, intermediate_size=48, num_key_value_heads=2), **changes}),
        "qwen3": lambda: tf.Qwen3Config(
            **{**dict(sizes, intermediate_size=48, num_key_value_heads=2, head_dim=8), **changes}
        ),
        "olmo": lambda: tf.OlmoConfig(**{**dict(sizes, intermediate_size=48, pad_token_id=0), **changes}),
        "olmoe": lambda: tf.OlmoeConfig(
            **{**dict(sizes, intermediate_size=24, num_experts=4, num_experts_per_tok=2, pad_token_id=0), **changes}
        ),
    }[architecture]()
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.randn_like(p) * 0.3 + (1.0 if name.endswith("weight") else 0.0))
            else:
                p.mul_(5)
    return model


@pytest.fixture(autouse=True)
def own_figure_style():
    "A test that sets the figure style (`set_style`) leaves it to no other test of its process."
    with matplotlib.rc_context():
        yield


@pytest.fixture
def tiny_model():
    "Function (architecture, processing='folded', seed=0, **config changes) -> bridge."
    from spectral_nb.models.loading import from_hf

    return lambda architecture, processing="folded", seed=0, **changes: from_hf(
        tiny_hf(architecture, seed, **changes), name=f"tiny-{architecture}", processing=processing
    )


@pytest.fixture(scope="session")
def reference():
    "Folder of the reference data; tests that need it are skipped where it is absent."
    from spectral_nb.base.paths import reference_dir

    folder = reference_dir()
    if folder is None:
        pytest.skip("reference data (../shared/reference) is absent")
    return folder


@pytest.fixture(scope="session")
def stories260k(reference):
    "The real trained grouped-query Llama, folded."
    from spectral_nb.models.loading import load_model

    return load_model(reference / "stories260k")


def random_tokens(n: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, D_VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def zoo_names() -> list[str]:
    "Shipped models (the manifest's names)."
    from spectral_nb.models.revisions import list_models

    return list_models("zoo")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    "Headless Chromium that cannot reach a network; tests that need it are skipped where no browser is installed."
    import shutil

    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = (
        shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome"),
        shutil.which("chromedriver"),
    )
    if not (program and driver):
        pytest.skip("no Chromium with chromedriver here: the browser tests are skipped")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--force-device-scale-factor=1",
        "--window-size=1280,900",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chromium.set_script_timeout(60)
    yield chromium
    chromium.quit()


@pytest.fixture
def open_page(browser):
    "Function (path, width=1280, height=900) -> browser showing the file at that size, its console emptied before."
    from pathlib import Path

    def show(path, width=1280, height=900):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600),
        )
        browser.get_log("browser")
        browser.get(Path(path).resolve().as_uri())
        return browser

    yield show
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def horizontal_overflow(browser) -> list[str]:
    "Elements that stick out of the page's right edge with no scrolling box around, and the page if it scrolls."
    return browser.execute_script("""
        const width = document.documentElement.clientWidth, out = [];
        const page = document.documentElement.scrollWidth;
        if (page > width + 1) out.push('page ' + page + ' > ' + width);
        for (const e of document.querySelectorAll('body *')) {
          const r = e.getBoundingClientRect();
          if (!r.width || r.right <= width + 1 || r.left >= width) continue;
          let p = e.parentElement;
          while (p && getComputedStyle(p).overflowX === 'visible') p = p.parentElement;
          const words = e.tagName + ' ' + (e.textContent || '').trim().slice(0, 40);
          if (!p || p === document.body || p === document.documentElement) out.push(words);
        }
        return out;""")


def accessibility_faults(browser, inside="html") -> list[str]:
    "What axe-core finds against WCAG 2 A and AA in an element of the page shown: rule, how often, the first element."
    from importlib.resources import files

    browser.execute_script(files("axe_core_python").joinpath("axe.min.js").read_text())
    found = browser.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        const rules = {resultTypes: ['violations'], runOnly: ['wcag2a', 'wcag2aa']};
        axe.run(arguments[0], rules).then(r => done(r.violations)).catch(e => done(String(e)));""",
        inside,
    )
    assert isinstance(found, list), found
    return [f"{v['id']}: {len(v['nodes'])}, {v['nodes'][0]['html'][:120]}" for v in found]
