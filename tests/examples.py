"One right value for every parameter of every public function, by name; what a function needs apart stands in `OWN`."

import inspect
from functools import cached_property

import numpy as np
import pandas as pd
import torch


class Examples:
    "Values on the small shipped GPT-2; made once, when first asked for."

    def __init__(self, folder):
        self.folder = folder

    @cached_property
    def model(self):
        from spectral_nb.models.loading import load_model

        return load_model("story-gpt2-s42")

    @cached_property
    def batch(self):
        from spectral_nb.prompts.tasks import make_batch

        return make_batch("retrieval", self.model, 6, seed=1)

    @cached_property
    def acts(self):
        from spectral_nb.attention.activations import capture

        return capture(self.model, self.batch)

    @cached_property
    def pairs(self):
        from spectral_nb.attention.pairs import firings

        return firings(self.acts, self.batch)

    @cached_property
    def data(self):
        from spectral_nb.attention.slices import measure_slices

        return measure_slices(self.model, self.batch)

    @cached_property
    def edges(self):
        from spectral_nb.tracing.recursion import trace

        return trace(self.model, self.batch, roots=None)

    @cached_property
    def graph(self):
        from spectral_nb.tracing.graphs import trace_graph

        return trace_graph(self.edges)

    @cached_property
    def survey(self):
        from spectral_nb.prompts.bigrams import synthetic_bigrams
        from spectral_nb.survey.classes import capability_survey

        return capability_survey(self.model, synthetic_bigrams(self.model, 16, 32), n_random=4, n_null=4)

    def array(self, *shape, torch_=True):
        made = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        return torch.from_numpy(made) if torch_ else made

    @cached_property
    def table(self) -> pd.DataFrame:
        rows = [(layer, head, "spectral", 1.0 + layer + head) for layer in range(3) for head in range(4)]
        return pd.DataFrame(rows, columns=["layer", "head", "metric", "value"])

    def by_name(self, name: str):
        "The usual value of a parameter of this name; LookupError for a name without one."
        plain = dict(
            layer=1, head=0, seed=0, n_prompts=4, heads=[(0, 0), (1, 1)], task="retrieval", role="end", kind="entropy",
            metric="logit_diff", n_draws=4, n_layers=3, n_heads=4, tokens=self.__class__.batch, name="story-gpt2-s42",
            name_or_path="story-gpt2-s42", folder_or_name="story-gpt2-s42", revision="step800", section="x", params={},
            path=f"{self.folder}/file.parquet", folder=f"{self.folder}", claim="it grows", unit="ratio", n=3,
            side="greater",
            null=0.0, x="layer", y="value", label="metric", head_counts=(2,), revisions=["step800"], threshold=0.5,
        )  # fmt: skip
        if name in ("model", "batch", "acts", "pairs", "data", "edges", "graph", "survey", "table"):
            return getattr(self, name)
        if name in ("tokenizer_or_model",):
            return self.model
        if name == "tokens":
            return self.batch.tokens
        if name in plain:
            return plain[name]
        raise LookupError(name)

    def arguments(self, title: str, function) -> tuple[dict, bool]:
        "(arguments of a right call, whether that call is too much work to be made here)."
        own = self.own().get(title.split(".")[-1], {})
        own = own() if callable(own) else dict(own)
        heavy = bool(own.pop("heavy", False))
        for name, p in inspect.signature(function).parameters.items():
            if name not in own and p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                own[name] = self.by_name(name)
        return own, heavy

    @cached_property
    def more_prompts(self):
        from spectral_nb.prompts.tasks import make_batch

        return make_batch("retrieval", self.model, 20, seed=1)

    def written(self) -> str:
        self.table.to_parquet(f"{self.folder}/read.parquet")
        return f"{self.folder}/read.parquet"

    def own(self) -> dict:
        "What single functions need."
        a, effect = self.array, (1.0, 0.5, 1.5)
        left, right = a(2, 6, 3), a(2, 5, 3)
        draws = [0.1, 0.2, 0.3]
        return dict(
            differs=dict(effect=effect), equals=dict(effect=effect, value=1.0, margin=1.0), identity=dict(error=1e-7),
            claims_table=dict(rows=[]), write_table=dict(table=self.table), head_matrix=dict(value="value"),
            plot_heads=dict(values=a(3, 4, torch_=False)), Interval=dict(estimate=1.0, low=0.0, high=2.0),
            bootstrap_ci=dict(values=draws, n_resamples=20), wilson=dict(successes=2, n=3),
            exact_p=dict(effect=0.2, draws=draws), permutation_p=dict(a=draws, b=draws, n_resamples=20),
            long_table=dict(parts=[self.table]), plot_hist=dict(values=draws),
            plot_draws=dict(observed=0.2, draws=draws),
            plot_intervals=lambda: dict(
                table=self.table.assign(low=0.0, high=9.0), estimate="value", low="low", high="high"
            ),
            plot_small_multiples=dict(facet="head"), save_run=dict(table=self.table),
            factored_svd=dict(left=left, right=right), factored_singular_values=dict(left=left, right=right),
            spectral_norm=dict(left=left), frobenius_norm=dict(left=left), stable_rank=dict(left=left),
            participation_ratio=dict(x=a(2, 6, 3)), participation_ratio_from_gram=dict(gram=torch.eye(3)),
            principal_angles=dict(a=a(6, 2), b=a(6, 3)), subspace_overlap=dict(a=a(6, 2), b=a(6, 3)),
            select_slices=dict(terms=a(5, 4)), pr_spread=dict(pr=1 + a(3, 4, 5, torch_=False) ** 2),
            pr_integral=dict(pr=1 + a(3, 4, 4, torch_=False) ** 2, tokens=[0.0, 1.0, 2.0, 3.0]),
            rank_heads=dict(scores=a(3, 4, torch_=False)), elbow=dict(scores=a(12, torch_=False)),
            through_norm=lambda: dict(values=a(1, 2, 64), ln_scale=torch.ones(1, 2), model=self.model, layer=0),
            component_outputs=lambda: dict(tokens_or_cache=self.batch.tokens),
            r_norm=dict(norms=a(3, 4, torch_=False) ** 2 + 0.1, heads=[(0, 1)]),
            head_participation=lambda: dict(batch=self.more_prompts),
            read_table=lambda: dict(path=self.written()), parse_head=dict(head="L0H1"),
            weight_norms=dict(revision=None), matched_random=dict(n_heads=4, n_layers=3, heads=[(0, 1)]),
            run=dict(heavy=True), measure=dict(heavy=True), train=dict(heavy=True),
        )  # fmt: skip
