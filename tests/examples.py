"One right value for every parameter of every public function, by name; what a function needs apart stands in `OWN`."

import inspect
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from conftest import tiny_hf
from drive import Fresh

from spectral_nb.base.intervals import Interval
from spectral_nb.base.paths import zoo_dir
from spectral_nb.causal.changes import Changes
from spectral_nb.causal.set_tests import AblationOptions
from spectral_nb.tracing.one_prompt import trace_prompt
from spectral_nb.prompts.tasks import make_batch


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
    def traced(self):
        from spectral_nb.tracing.recursion import trace_tables

        return trace_tables(self.model, self.batch)

    @cached_property
    def stories(self) -> list[str]:
        from spectral_nb.prompts.stories import sample_stories

        return sample_stories(np.random.default_rng(0), 4, 60)

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
        if name in ("model", "batch", "acts", "pairs", "data", "edges", "graph", "survey", "table", "tokenizer"):
            return getattr(self, name)
        if name == "cfg":
            return None  # of five sections, each with its own: see `arguments`
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
        if title.endswith((".run", ".measure")):
            kind = inspect.signature(function).parameters["cfg"].annotation
            own["cfg"] = kind(model_name="story-gpt2-s42")
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
            **self.of_prompts_and_models(), **self.of_causal_and_tracing(), **self.of_norms_and_surveys(),
            **self.of_training_sweeps_and_views(),
        )  # fmt: skip

    @cached_property
    def prompts_file(self) -> str:
        path = Path(self.folder) / "own.jsonl"
        path.write_text('{"prompt": "the dogs near the tree", "answer": " run", "wrong": " runs"}\n')
        return str(path)

    @cached_property
    def stream(self):
        from spectral_nb.norms.stream import measure_stream

        return measure_stream(self.model, self.batch)

    @cached_property
    def trained(self):
        from spectral_nb.training.config import TrainConfig

        return TrainConfig("tiny", n_layers=1, d_model=8, n_heads=2, d_mlp=16, steps=2, batch_size=2)

    @cached_property
    def tokenizer(self):
        return self.model.tokenizer

    @cached_property
    def effects(self):
        from spectral_nb.tracing.interventions import edge_interventions

        return edge_interventions(self.model, self.batch, self.edges.head(2))

    @cached_property
    def sweep(self) -> dict:
        from sweep_toy import write_toy

        notebook = write_toy(Path(self.folder))
        return dict(name="toy", notebook=str(notebook), out=f"{self.folder}/sweep", models=[], grid=[{"x": [1, 2]}])

    def of_prompts_and_models(self) -> dict:
        "What functions of `prompts` and `models` need."
        rows = torch.tensor([[0, 5, 6], [0, 7, 8]])
        own = dict(prompts=["the dogs near the tree"], answer=[" run"], wrong=[" runs"])
        few = dict(n_prompts=3)
        return dict(
            PromptBatch=dict(
                task="toy", tokens=rows, attention_mask=rows >= 0, positions={"end": torch.tensor([2, 2])},
                answer=torch.tensor([1, 2]), wrong=torch.tensor([3, 4]), text=["a", "b"], pad_token_id=0,
            ),
            natural_bigrams=dict(few, text=self.stories, length=12),
            synthetic_bigrams=few, induction=few, retrieval=few, ioi=few, sva=few,
            text=lambda: dict(few, texts=self.stories, window=8), story_tokenizer=dict(n_ctx=32),
            natural_text=dict(source=["the dogs run"]), from_prompts=own, from_file=dict(path=self.prompts_file),
            sample_stories=dict(rng=Fresh(lambda: np.random.default_rng(0)), n_stories=2),
            sample_training=dict(rng=Fresh(lambda: np.random.default_rng(0)), n_sequences=2),
            load_model=dict(revision=None), self_check=dict(revision=None, heavy=True), list_models=dict(kind="all"),
            check_revisions=dict(name="story-olmo", heavy=True), checkpoint_hash=dict(revision=None),
            from_hf=dict(hf_model=Fresh(lambda: tiny_hf("gpt2"))),
            weight_files=lambda: dict(folder=zoo_dir() / "story-neox"),
            rotation=lambda: dict(positions=torch.arange(3)), planted=dict(name="induction", n_prompts=4),
            rebuild_scores=lambda: dict(cache=self.model.run_with_cache(self.batch.tokens)[1]),
        )  # fmt: skip

    def of_causal_and_tracing(self) -> dict:
        "What functions of `causal`, `tracing` and `fingerprint` need."
        one = torch.tensor([0])
        change = dict(run=one, layer=one, head=one, pos=one, vector=torch.ones(1, 64))
        effects, size = (1.0, 0.5, 1.5), dict(batch_size=8)
        return dict(
            Changes=change, run_changed=lambda: dict(prompt=one, changes=Changes(**change)),
            single_heads=dict(heads=["L0H0"]),
            faithfulness=lambda: dict(ranking=[(layer, h) for h in range(4) for layer in range(3)],
                sizes=(0.0, 0.5, 1.0)),
            plot_faithfulness=lambda: dict(results={"one": self.faithful}),
            set_verdict=dict(effect=Interval(*effects), draw_effects=[0.1, 0.2, 0.3]),
            ablation_test=dict(options=AblationOptions(n_draws=2)), attribute_heads=size,
            trace_prompt=dict(text="When Mary and John went to the shop , John gave a book to", answer=" Mary"),
            draw_sentence=lambda: dict(found=trace_prompt(self.model,
                "When Mary and John went to the shop , John gave a book to", " Mary")),
            draw_graph=dict(known=["L0H0"]), trace_flow=lambda: dict(roots=self.traced[1], edges=self.traced[0]),
            write_graph=dict(path=f"{self.folder}/graph.json"), read_graph=lambda: dict(path=self.graph_file()),
            filter_graph=dict(min_count=1), edge_interventions=lambda: dict(edges=self.edges.head(2)),
            set_interventions=lambda: dict(edges=self.edges.head(2), sets=self.one_set),
            additivity=lambda: dict(table=self.sets_table), measure_seeds=dict(folders=[], heavy=True),
            codeword_readout=lambda: dict(train=self.more_prompts, test=self.batch),
            head_ratios=lambda: dict(batch=self.more_prompts), ratio_trajectory=lambda: dict(
                revisions=["step210"], batch=self.more_prompts),
            load_seed_tables=dict(heavy=True), summarise_seeds=dict(heavy=True),
        )  # fmt: skip

    @cached_property
    def faithful(self):
        from spectral_nb.causal.rankings import faithfulness

        return faithfulness(self.model, self.batch, list(np.ndindex(3, 4)), sizes=(0.0, 0.5, 1.0))

    @property
    def one_set(self) -> dict:
        first = self.edges.iloc[0]
        return {"one": [(str(first.upstream), f"L{first.layer}H{first['head']}", str(first.role))]}

    @cached_property
    def sets_table(self):
        from spectral_nb.tracing.sets import set_interventions

        return set_interventions(self.model, self.batch, self.edges.head(2), self.one_set)

    def graph_file(self) -> str:
        from spectral_nb.tracing.graph_files import write_graph

        return str(write_graph(self.graph, f"{self.folder}/read.json"))

    def of_norms_and_surveys(self) -> dict:
        "What functions of `norms`, `survey` and the sections need."
        norms = self.array(3, 4, torch_=False) ** 2 + 0.1
        return dict(
            r_norm_test=dict(norms=norms, heads=[(0, 1)], n_draws=20), find_circuit=dict(task="retrieval", n_prompts=8),
            growth=dict(logs=self.array(4, 6, torch_=False)),
            heads_experiment=dict(out=f"{self.folder}/heads.parquet", heavy=True),
            store_circuits=dict(model="story-gpt2-s42", folder=Path(self.folder), heavy=True),
            stored_circuits=dict(model="story-gpt2-s42"),
            norm_table=lambda: dict(stream=self.stream),
            theory_responses=lambda: dict(stream=self.stream, n_random=4),
            expert_participation=lambda: dict(model=self.experts, batch=make_batch("retrieval", self.experts, 4)),
            conserved_fraction=lambda: dict(classed=self.classed), ranking_table=dict(
                pr=1 + self.array(3, 4, 2, torch_=False) ** 2, tokens=[1.0, 2.0]),
            precision_at_k=lambda: dict(classed=self.classed, ks=[1, 2]), screen_ablation=dict(n_draws=2),
            removal_curve=dict(max_heads=2), run=dict(heavy=True), measure=dict(heavy=True),
        )  # fmt: skip

    @cached_property
    def experts(self):
        from spectral_nb.models.loading import load_model

        return load_model("story-olmoe")

    @cached_property
    def classed(self):
        from spectral_nb.survey.rankings import ranking_table

        return ranking_table(1 + self.array(3, 4, 2, torch_=False) ** 2, [1.0, 2.0]).merge(self.survey)

    def of_training_sweeps_and_views(self) -> dict:
        "What functions of `training`, `sweeps` and `views` need."
        sweep, heavy = lambda: dict(source=self.sweep), lambda: dict(source=self.sweep, heavy=True)
        page = dict(path=f"{self.folder}/page.html")
        return dict(
            train=lambda: dict(config=self.trained, out_dir=f"{self.folder}/training", heavy=True),
            build_model=lambda: dict(config=self.trained), TrainConfig=dict(name="tiny"),
            preset=dict(name="story-olmo"),
            rising=dict(pr=self.array(3, 4, 5, torch_=False)), evaluate_tasks=dict(n_prompts=4, tasks=("retrieval",)),
            accuracy_table=dict(heavy=True), run_sweep=lambda: dict(spec=self.sweep, heavy=True),
            run_sweeps=lambda: dict(sources=[self.sweep], heavy=True), sweep_plan=sweep, sweep_status=sweep,
            collect_sweep=sweep, clean_sweep=sweep, report_sweep=heavy, load_spec=sweep,
            load_results=dict(folder=str(self.folder), heavy=True), attention_page=page,
            circuit_page=lambda: dict(page, tokenizer=self.tokenizer, edges=self.edges.head(3)),
            plot_pattern=dict(values=np.tril(np.ones((3, 3))), tokens=["a", "b", "c"]),
            plot_slice_terms=dict(terms=self.array(4, torch_=False)),
        )  # fmt: skip
