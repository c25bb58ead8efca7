"""The peer of the benchmarks against the oracle, on tiny models built in memory (float64)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from loraforge.bench.peers import document_loop as peer
from loraforge.bench.peers.hooked import weight_of
from loraforge.bench.peers.objective import iteris_objective

from . import iteris as oracle

LEVELS = ("self.query self.key self.value", "attention.output.dense", "intermediate.dense", "output.dense")
ALPHAS = {"alpha_1": 2e-4, "alpha_2": 1e-4}


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=16, attn_implementation="eager", initializer_range=0.3,
    )  # fmt: skip
    return BertForSequenceClassification(config).double()


def gpt2():
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=40, n_embd=12, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


def t5():
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=40, d_model=12, d_kv=6, d_ff=20, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config).double()


def module_order(model):
    """Targets of the BERT in the order in which the model runs them, grouped by shared input."""
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layer." in n]
    layers = [[n for n in names if f".layer.{i}." in n] for i in range(2)]
    pick = {"attention.output.dense": lambda n: n.endswith("attention.output.dense")}
    pick["output.dense"] = lambda n: n.endswith(".output.dense") and "attention" not in n
    pick["intermediate.dense"] = lambda n: n.endswith("intermediate.dense")
    qkv = ("query", "key", "value")
    return [
        [n for n in layer if (n.endswith(qkv) if "query" in level else pick[level](n))]
        for layer in layers
        for level in LEVELS
    ]


def adapters_for(model, names, seed=3, tasks=2, scale=0.3):
    """One (B, A, s) a module and task; ranks differ, and task 0 lacks the last module."""
    g = torch.Generator().manual_seed(seed)
    modules, out = dict(model.named_modules()), []
    for i in range(tasks):
        pairs = {}
        for name in names if i else names[:-1]:
            m, n = weight_of(modules[name]).shape
            factors = [torch.randn(*s, generator=g, dtype=torch.float64) for s in ((m, i + 1), (i + 1, n))]
            pairs[name] = (factors[0], factors[1], scale)
        out.append(pairs)
    return out


def batches_for(seed=5, tasks=2, extra=0, labels=False):
    """Two batches a task, right-padded; `extra` adds padding that must not matter."""
    g, out = torch.Generator().manual_seed(seed), []
    for _ in range(tasks):
        task = []
        for _ in range(2):
            ids, mask = torch.zeros(4, 8 + extra, dtype=torch.long), torch.zeros(4, 8 + extra, dtype=torch.long)
            target = torch.full((4, 8 + extra), -100)
            for row in range(4):
                length = int(torch.randint(4, 9, (1,), generator=g))
                ids[row, :length] = torch.randint(3, 40, (length,), generator=g)
                mask[row, :length] = 1
                target[row, : length - 1] = torch.randint(3, 40, (length - 1,), generator=g)
            task.append({"input_ids": ids, "attention_mask": mask} | ({"labels": target} if labels else {}))
        out.append(task)
    return out


def own_rows(model, names, batches, deltas):
    """The test's own collection: weights changed in a state dict, inputs read by pre-hooks, padding dropped."""
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    modules, rows = dict(model.named_modules()), {n: [] for n in names}
    model.load_state_dict(saved | {f"{n}.weight": saved[f"{n}.weight"] + torch.tensor(d) for n, d in deltas.items()})
    model.eval()
    hooks = [modules[n].register_forward_pre_hook(lambda _m, a, n=n: rows[n].append(a[0].detach())) for n in names]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    model.load_state_dict(saved)
    keep = [batch["attention_mask"].bool() for batch in batches]
    return {n: torch.cat([x[k] for x, k in zip(r, keep, strict=True)]).numpy() for n, r in rows.items()}


def as_numpy(adapter):
    return {n: (s * (b @ a)).numpy() for n, (b, a, s) in adapter.items()}


OPTIONS = [
    ({}, {}),
    ({"use_dcs": True}, {"dcs": oracle.Dcs(min_ess=0.0)}),
    (
        {"use_camr": True, "camr_alpha": 1e-3, "camr_beta": 1e-5},
        {"camr": oracle.Camr(1e-3, 1e-5, "document", "sum", "abs", "iso")},
    ),
    ({"reg_ceof": 0.3, "with_pretrain_matrix": True}, {"reg_ceof": 0.3, "with_pretrain_matrix": 1}),
    ({"lambda_mode": "delta", "coefficients": [1.0, 0.5]}, {"lam": "delta", "c": [1.0, 0.5]}),
]


def setup(names=None):
    model = bert()
    levels = module_order(model)
    names = names or [n for level in levels for n in level]
    adapters = adapters_for(model, names)
    return model, levels, names, adapters, batches_for()


def oracle_delta(model, name, X, Xt, adapters, options):
    W0 = dict(model.named_modules())[name].weight.detach().numpy()
    deltas = [as_numpy(a).get(name) for a in adapters]
    W = oracle.solve_dense([x[name] for x in X], [x[name] for x in Xt], deltas, W0=W0, **ALPHAS, **options)
    return W - W0 if options.get("with_pretrain_matrix") else W


@pytest.mark.parametrize(("ours", "theirs"), OPTIONS)
def test_two_solves_match_the_oracle(ours, theirs):
    model, _, names, adapters, batches = setup()
    X = [own_rows(model, names, b, as_numpy(a)) for b, a in zip(batches, adapters, strict=True)]
    first = {n: oracle_delta(model, n, X, X, adapters, theirs) for n in names}
    Xt = [own_rows(model, names, b, first) for b in batches]
    second = {n: oracle_delta(model, n, X, Xt, adapters, theirs) for n in names}
    steps = []
    options = ALPHAS | ours | {"gram_dtype": torch.float64, "convergence_threshold": 0.0, "max_iter": 2}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    result = peer.document_loop(model, adapters, batches, on_iteration=lambda k, d: steps.append(d), **options)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for got, expected in zip(steps, (first, second), strict=True):
        for n in names:
            np.testing.assert_allclose(got[n].numpy(), expected[n], atol=1e-9 * max(1.0, np.abs(expected[n]).max()))
    assert all(torch.equal(result.deltas[n], steps[1][n]) for n in names)
    assert result.log[0].relative_change is None and result.log[1].relative_change > 0
    assert result.tokens[names[0]] == [int(sum(b["attention_mask"].sum() for b in task)) for task in batches]
    assert {"collect_task", "collect_merged", "lambda", "grams", "solve"} <= set(result.seconds)


def test_reaches_the_sequential_solution_after_as_many_solves_as_levels():
    model, levels, names, adapters, batches = setup()
    X = [own_rows(model, names, b, as_numpy(a)) for b, a in zip(batches, adapters, strict=True)]
    merged = {}
    for level in levels:
        Xt = [own_rows(model, names, b, merged) for b in batches]
        merged |= {n: oracle_delta(model, n, X, Xt, adapters, {}) for n in level}
    options = ALPHAS | {"gram_dtype": torch.float64, "convergence_threshold": 0.0}
    early = peer.document_loop(model, adapters, batches, max_iter=len(levels) - 1, **options)
    result = peer.document_loop(model, adapters, batches, max_iter=len(levels), **options)
    last = levels[-1][0]
    assert np.abs(early.deltas[last].numpy() - merged[last]).max() > 1e-8
    for n in names:
        np.testing.assert_allclose(result.deltas[n].numpy(), merged[n], atol=1e-8)
    stopped = peer.document_loop(model, adapters, batches, max_iter=50, **(options | {"convergence_threshold": 1e-9}))
    assert stopped.converged and len(stopped.log) == len(levels) + 1


def test_mats_takes_the_oracle_step():
    model, _, names, adapters, batches = setup()
    plain, mixed = [], []
    options = ALPHAS | {"gram_dtype": torch.float64, "convergence_threshold": 0.0}
    peer.document_loop(model, adapters, batches, max_iter=3, on_iteration=lambda k, d: plain.append(d), **options)
    mats = {"use_mats": True, "on_iteration": lambda k, d: mixed.append(d)}
    peer.document_loop(model, adapters, batches, max_iter=3, **mats, **options)
    rule = oracle.Anderson(5, 1e-6, "absolute")
    for n in names:
        W, G = [plain[0][n].numpy(), plain[1][n].numpy()], [plain[1][n].numpy(), plain[2][n].numpy()]
        np.testing.assert_allclose(mixed[1][n].numpy(), W[1], atol=1e-12)  # the first pair returns G itself
        np.testing.assert_allclose(mixed[2][n].numpy(), oracle.anderson_next(W, G, rule), atol=1e-8)


@pytest.mark.parametrize(
    ("build", "suffixes", "labels"),
    [
        (bert, ("query", "value", "dense"), False),
        (gpt2, ("c_attn", "c_proj", "c_fc"), False),
        (t5, ("q", "v", "k", "o", "wi"), True),
    ],
)
def test_padding_does_not_count(build, suffixes, labels):
    model = build()
    names = [n for n, _ in model.named_modules() if n.split(".")[-1] in suffixes and "pooler" not in n]
    adapters = adapters_for(model, names, scale=0.1)
    options = {"max_iter": 3, "alpha": 1e-4, "gram_dtype": torch.float64, "convergence_threshold": 0.0}
    short = peer.document_loop(model, adapters, batches_for(labels=labels), **options)
    long = peer.document_loop(model, adapters, batches_for(labels=labels, extra=3), **options)
    assert set(short.deltas) == set(names) and short.tokens == long.tokens
    for n in names:  # both stacks of the T5 have inputs of one length here: the names must tell the masks apart
        decoder = n.startswith("decoder") and not n.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        count = (lambda b: b["labels"] != -100) if decoder else lambda b: b["attention_mask"]
        assert short.tokens[n] == [int(sum(count(b).sum() for b in task)) for task in batches_for(labels=labels)]
    for n in names:
        np.testing.assert_allclose(long.deltas[n].numpy(), short.deltas[n].numpy(), atol=1e-8)
    objectives = [iteris_objective(model, adapters, batches_for(labels=labels, extra=e), short.deltas) for e in (0, 3)]
    np.testing.assert_allclose(*objectives, rtol=1e-9)
    assert 0 < objectives[0] < 1


@pytest.mark.parametrize("lam", ["full", "delta", "one"])
def test_objective_matches_the_oracle(lam):
    model, _, names, adapters, batches = setup()
    merged = {n: 0.5 * sum(as_numpy(a).get(n, 0.0) for a in adapters) for n in names}
    X = [own_rows(model, names, b, as_numpy(a)) for b, a in zip(batches, adapters, strict=True)]
    Xt = [own_rows(model, names, b, merged) for b in batches]
    total = size = 0.0
    for n in names:
        W0 = dict(model.named_modules())[n].weight.detach().numpy()
        deltas = oracle.fill([as_numpy(a).get(n) for a in adapters])
        rows, tilde = [x[n] for x in X], [x[n] for x in Xt]
        a = oracle.task_weights(rows, deltas, W0, lam)
        total += oracle.objective(merged[n], rows, tilde, deltas, a)
        size += oracle.objective(np.zeros_like(W0), rows, tilde, deltas, a)
    dense = {n: torch.tensor(d) for n, d in merged.items()}
    got = iteris_objective(model, adapters, batches, dense, lambda_mode=lam)
    np.testing.assert_allclose(got, total / size, rtol=1e-9)
    pairs = {n: (torch.eye(len(d), dtype=torch.float64), d) for n, d in dense.items()}
    np.testing.assert_allclose(iteris_objective(model, adapters, batches, pairs, lambda_mode=lam), got, rtol=1e-9)


def test_objective_is_zero_for_one_adapter_and_one_for_none():
    model, _, _, adapters, batches = setup()
    one, rows = adapters[1:], batches[1:]
    assert iteris_objective(model, one, rows, one[0]) < 1e-24
    np.testing.assert_allclose(iteris_objective(model, one, rows, {}), 1.0, rtol=1e-12)
    loop = peer.document_loop(model, one, rows, alpha=1e-10, gram_dtype=torch.float64)
    assert iteris_objective(model, one, rows, loop.deltas) < 1e-10


def test_fp32_products_stay_close_to_float64():
    model, _, names, adapters, batches = setup()
    options = {"alpha": 1e-4, "max_iter": 3, "convergence_threshold": 0.0}
    exact = peer.document_loop(model, adapters, batches, gram_dtype=torch.float64, **options)
    single = peer.document_loop(model, adapters, batches, **options)
    for n in names:
        # Rounding of the Grams, magnified by the condition of T2, which alpha bounds by about 1 / alpha.
        bound = torch.finfo(torch.float32).eps / options["alpha"]
        assert 0 < (single.deltas[n] - exact.deltas[n]).norm() < bound * exact.deltas[n].norm()


def test_what_is_refused():
    model, _, names, adapters, batches = setup()
    with pytest.raises(ValueError, match="does not have.*nowhere"):
        peer.document_loop(model, [{"nowhere": torch.zeros(1, 1)}], batches[:1])
    with pytest.raises(ValueError, match="2 adapters, 1 lists"):
        peer.document_loop(model, adapters, batches[:1])
    with pytest.raises(ValueError, match="LayerNorm expected|is a LayerNorm"):
        peer.document_loop(model, [{"bert.embeddings.LayerNorm": torch.zeros(1, 1)}], batches[:1])
    broken = {names[0]: torch.full((12, 12), float("nan"))}
    with pytest.raises(ValueError, match=f"solution of {names[0]} is not finite"):
        peer.document_loop(model, [broken], batches[:1])
    with pytest.raises(ValueError, match=f"T2 of {names[0]} is singular"):
        peer.document_loop(model, adapters, batches, coefficients=[0.0, 0.0])
