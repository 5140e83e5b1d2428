"""The optimizer against its oracles: AdamW where one expert is pinned, the literal equations where it is free."""

import copy
import io
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molf import MoLFAdamW, MoLFConfig, apply_molf, kernels, merge_molf, molf_modules, molf_param_groups
from tests.oracle import (
    CLIP,
    DECAY,
    LORA_DECAY,
    LORA_LR,
    LR,
    Transcription,
    assert_equals,
    batches,
    groups,
    network,
    run,
)

CASES = [
    # ranks, k, score, forward, base trained
    ((3,), 1, "epd", "effective", True),
    ((3,), 1, "epd", "dense", True),
    ((3,), 1, "pfn", "effective", True),
    ((3,), 2, "epd", "effective", True),
    ((2, 5), 1, "epd", "effective", True),
    ((2, 5), 1, "pfn", "dense", True),
    ((2, 5), 2, "epd", "effective", True),
    ((2, 5), 2, "pfn", "effective", True),
    ((2, 5), 2, "epd", "dense", True),
    ((2, 5), 3, "epd", "effective", True),
    ((2, 5), 3, "pfn", "dense", True),
    ((2, 4, 1), 1, "epd", "dense", True),
    ((2, 4, 1), 2, "epd", "effective", True),
    ((2, 4, 1), 3, "pfn", "effective", True),
    ((3, 3), 1, "epd", "effective", True),
    ((2, 5), 1, "epd", "dense", False),
    ((2, 5), 1, "pfn", "dense", False),
    ((3, 3), 1, "epd", "dense", False),
    ((2, 4, 1), 1, "epd", "dense", False),
    ((2, 4, 1), 2, "epd", "dense", False),
    ((2, 4, 1), 2, "pfn", "dense", False),
    ((1, 2, 4, 6), 3, "epd", "dense", False),
]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(("ranks", "k", "score", "forward", "train_base"), CASES)
def test_free_run_equals_the_literal_equations(
    ranks: tuple[int, ...], k: int, score: Any, forward: str, train_base: bool, backend: Any
) -> None:
    model = network(ranks, forward, train_base)
    oracle = Transcription(model, ranks, k, score, train_base)
    optimizer = MoLFAdamW(groups(model), top_k=k, score=score, backend=backend)
    assert_equals(model, optimizer, oracle)


def test_the_winner_changes_during_a_run_that_the_equations_confirm() -> None:
    model = network((2, 5), "effective")
    oracle = Transcription(model, (2, 5), 1, "epd", True)
    history = oracle.train(batches())
    # The first step's rate is 0: every score ties at 0, and the lower index wins.
    assert history[0] == [[True, False, False], [True, False, False]]
    by_module = [{tuple(step[row]) for step in history[1:]} for row in range(2)]
    assert any(len(choices) > 1 for choices in by_module)


class Pinned(MoLFAdamW):
    """Always the same winner."""

    winner = 0

    def select(self, scores: Tensor) -> Tensor:
        winners = torch.zeros_like(scores, dtype=torch.bool)
        winners[:, self.winner] = True
        return winners


@pytest.mark.parametrize("forward", ["effective", "dense"])
def test_pinned_to_the_base_it_is_adamw_on_the_weight(forward: str) -> None:
    model = network((3,), forward)
    reference = merge_molf(copy.deepcopy(network((3,), "dense")))
    frozen = {name: module.lora_weight() for name, module in molf_modules(model)}
    # The reference trains W under the same fixed B A, so the gradients agree.
    parameters = dict(reference.named_parameters())
    for name, module in molf_modules(model):
        parameters[f"{name}.weight"].data.copy_(module.base_weight())
    decayed = [p for p in parameters.values() if p.ndim >= 2]
    plain = [p for p in parameters.values() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}], lr=LR
    )

    class Shifted(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            shifted = {f"{n}.weight": parameters[f"{n}.weight"] + frozen[n] for n in frozen}
            return torch.func.functional_call(reference, parameters | shifted, (ids,))

    optimizer = Pinned(groups(model))
    full = [p for group in optimizer.param_groups if group.get("expert") != "lora_r3" for p in group["params"]]

    def step(net: nn.Module, opt: torch.optim.Optimizer, clipped: list[nn.Parameter]) -> None:
        for ids, targets in batches():
            opt.zero_grad()
            nn.functional.cross_entropy(net(ids), targets).backward()
            nn.utils.clip_grad_norm_(clipped, CLIP)
            opt.step()

    step(model, optimizer, full)
    step(Shifted(), adamw, list(parameters.values()))
    for name, module in molf_modules(model):
        torch.testing.assert_close(module.base_weight(), parameters[f"{name}.weight"].detach(), rtol=0, atol=1e-9)
        torch.testing.assert_close(module.lora_weight(), frozen[name], rtol=0, atol=0)


@pytest.mark.parametrize("forward", ["effective", "dense"])
def test_pinned_to_one_lora_expert_it_is_adamw_on_its_two_factors(forward: str) -> None:
    model, reference = network((3,), forward), network((3,), "dense")

    class PinnedToLora(Pinned):
        winner = 1

    optimizer = PinnedToLora([g for g in groups(model) if g["kind"] == "expert"])
    factors = [p for _, m in molf_modules(reference) for p in [*m.lora_A, *m.lora_B]]
    adamw = torch.optim.AdamW(factors, lr=LORA_LR, weight_decay=LORA_DECAY)
    mine = [p for _, m in molf_modules(model) for p in [*m.lora_A, *m.lora_B]]
    bases = {name: module.base_weight() for name, module in molf_modules(model)}
    for ids, targets in batches():
        for net, opt in ((model, optimizer), (reference, adamw)):
            net.zero_grad()
            nn.functional.cross_entropy(net(ids), targets).backward()
            opt.step()
    for left, right in zip(mine, factors, strict=True):
        torch.testing.assert_close(left.detach(), right.detach(), rtol=0, atol=1e-9)
    for name, module in molf_modules(model):
        torch.testing.assert_close(module.base_weight(), bases[name], rtol=0, atol=1e-9)


def test_losers_weights_stay_to_the_bit_and_their_moments_move() -> None:
    model = network((3,), "dense")
    optimizer = Pinned(groups(model))
    before = [p.detach().clone() for _, m in molf_modules(model) for p in [*m.lora_A, *m.lora_B]]
    run(model, optimizer, batches(5))
    after = [p for _, m in molf_modules(model) for p in [*m.lora_A, *m.lora_B]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(optimizer.state[p]["step"] == 5 and optimizer.state[p]["exp_avg"].abs().sum() > 0 for p in after)


class Stand(ModuleType):
    """Stands for kernels_cuda: its functions, by the reference, on the host."""

    serves = staticmethod(lambda weight, moment: True)

    @staticmethod
    def advance(gs: list[Tensor], ms: list[Tensor], vs: list[Tensor], *constants: Any) -> Tensor:
        rows: Any = [[t.reshape(1, -1) for t in tensors] for tensors in (gs, ms, vs)]
        parts: Any = kernels.advance(*rows, *constants, None)  # type: ignore[call-arg]  # four constants
        return torch.cat(parts).double()

    @staticmethod
    def move(ps: Any, ms: Any, vs: Any, keeps: Any, rates: Any, roots: Any, eps: float, wins: Tensor) -> None:
        for p, m, v, keep, rate, root, win in zip(ps, ms, vs, keeps, rates, roots, wins, strict=True):
            if bool(torch.Tensor.as_subclass(win, torch.Tensor)):
                rows: Any = [[t.view(1, -1)] for t in (p, m, v)]
                kernels.move(rows[0], rows[1], rows[2], [keep], rate, root, eps, [0], None)


@pytest.mark.parametrize("path", ["masked", "fused"])
@pytest.mark.parametrize(("ranks", "top_k", "train_base"), [((2, 5), 1, True), ((2, 5), 2, True), ((2, 5), 1, False)])
def test_moves_that_only_the_device_knows_equal_those_of_the_host(
    ranks: tuple[int, ...], top_k: int, train_base: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paths that CUDA takes, run on the CPU: the same weights up to rounding."""
    results = []
    for on_device in (False, True):
        model = network(ranks, train_base=train_base)
        optimizer = MoLFAdamW(groups(model), top_k=top_k)
        if on_device:
            optimizer.select = lambda scores, select=optimizer.select: Masks(select(scores))  # type: ignore
            if path == "fused":
                monkeypatch.setattr(optimizer, "_fused", lambda params: Stand("stand"))
        run(model, optimizer, batches(10))
        results.append([p.detach().clone() for p in model.parameters()])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2])
def test_moves_in_bfloat16_are_the_hosts_in_the_mean(top_k: int) -> None:
    """Stochastic rounding of every write, decay's give-back included: no drift between the two paths."""
    results = []
    for on_device in (False, True):
        model = network((2, 5)).bfloat16()
        optimizer = MoLFAdamW(molf_param_groups(model, 1e-3, 1e-3, 10.0, 0.0), top_k=top_k)
        if on_device:
            optimizer.select = lambda scores, select=optimizer.select: Masks(select(scores))  # type: ignore
        generator = torch.Generator().manual_seed(3)
        for _ in range(40):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            optimizer.step()
        results.append(torch.cat([module.weight.detach().float().flatten() for _, module in molf_modules(model)]))
    difference = results[0] - results[1]
    # 40 steps of decay 1e-2 move weights of 0.2 by 0.06 in the mean; a rounding of 2^-9 of them is 4e-4.
    assert difference.abs().mean() < 4e-3 and difference.mean().abs() < 1e-3


class Masks(torch.Tensor):
    """A host tensor that says it lies on a device that must not be read."""

    @property
    def device(self) -> Any:  # type: ignore[override]
        return torch.device("meta")

    def tolist(self) -> Any:
        raise AssertionError("read back to the host")

    def to(self, *how: Any, **more: Any) -> Tensor:
        return self.as_subclass(torch.Tensor).to(*how, **more)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("forward", ["effective", "dense"])
@pytest.mark.parametrize("path", ["masked", "fused"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score_per": "layer", "score": "pfn"},
        {"score_per": "model", "top_k": 2},
        *({"winners": winners} for winners in ("shuffled", "random", "full", "lora", "alternate")),
        {"winners": "shuffled", "score_per": "layer"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_step_on_a_device_never_waits_for_it(
    options: dict[str, Any], forward: Any, moments: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tensors that have no values: reading one back to the host, for a branch or a number, is an error."""
    if moments == "8bit":
        pytest.importorskip("torchao")
        if path == "fused":
            pytest.skip("the fused kernels are for float32 moments")
    # What crosses to the device is sent from pinned memory without waiting; there is no such memory to fake.
    monkeypatch.setattr(kernels, "to_device", lambda tensor, device: tensor.to(device))
    books = kernels.Codebooks(torch.empty(256, device="meta"), torch.empty(256, device="meta"))
    monkeypatch.setattr(kernels, "codebooks", lambda device: books)
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64, bias=False))
        model = apply_molf(net, MoLFConfig(r=(4, 8), forward=forward))
        optimizer = MoLFAdamW(groups(model), moments=moments, **options)
        if path == "fused":
            monkeypatch.setattr(optimizer, "_fused", lambda params: Unread("unread"))
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            optimizer.step()
    assert optimizer.last_routing is not None and optimizer.last_routing.winners.shape == (2, 3)
    with pytest.raises(Exception, match="(?i)meta|data.dependent|item"):
        optimizer.last_routing.winners.tolist()


class Unread(Stand):
    """kernels_cuda's shapes without its work."""

    @staticmethod
    def advance(gs: list[Tensor], *rest: Any) -> Tensor:
        return torch.empty(len(gs), dtype=torch.float64, device=gs[0].device)

    @staticmethod
    def move(ps: Any, ms: Any, vs: Any, keeps: Any, rates: Any, roots: Any, eps: float, wins: Tensor) -> None:
        assert len(ps) == len(ms) == len(vs) == len(keeps) == len(rates) == len(roots) == len(wins)


@pytest.mark.parametrize("forward", ["effective", "dense"])
def test_save_load_continue_equals_uninterrupted(forward: str) -> None:
    data = batches()
    straight = network((2, 5), forward)
    run(straight, MoLFAdamW(groups(straight)), data)

    model = network((2, 5), forward)
    optimizer = MoLFAdamW(groups(model))
    run(model, optimizer, data[:13])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = network((2, 5), forward)
    resumed.load_state_dict(saved["model"])
    again = MoLFAdamW(groups(resumed))
    again.load_state_dict(again.state_dict())  # what accelerate does at prepare
    again.load_state_dict(saved["optimizer"])
    run(resumed, again, data[13:], first=13)
    for left, right in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


def test_state_dict_is_plain() -> None:
    model = network((3,), "effective")
    optimizer = MoLFAdamW(groups(model))
    run(model, optimizer, batches(2))

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(plain(k) and plain(v) for k, v in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return type(value) in (int, float, str, bool, type(None), Tensor)

    assert plain(optimizer.state_dict())


def test_moments_of_bfloat16_weights_stay_float32_through_a_load() -> None:
    model = network((3,), "effective").bfloat16()
    optimizer = MoLFAdamW(groups(model))
    run(model, optimizer, batches(3))
    again = MoLFAdamW(groups(model))
    again.load_state_dict(optimizer.state_dict())
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].dtype == torch.float32
        assert torch.equal(again.state[parameter]["exp_avg"], state["exp_avg"])
        assert torch.equal(again.state[parameter]["exp_avg_sq"], state["exp_avg_sq"])


@pytest.mark.parametrize("forward", ["effective", "dense"])
def test_accumulated_gradients_equal_one_batch(forward: str) -> None:
    results = []
    for parts in (1, 4):
        model = network((3,), forward)
        optimizer = MoLFAdamW(groups(model))
        for ids, targets in batches(6):
            optimizer.zero_grad()
            for i, t in zip(ids.chunk(parts), targets.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(i), t) / parts).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


def test_ties_go_to_the_lower_index() -> None:
    optimizer = MoLFAdamW(groups(network((2, 5))), top_k=2)
    scores = torch.tensor([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    assert optimizer.select(scores).tolist() == [[False, True, True], [True, True, False]]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"top_k": 3}, "top_k is 3"), ({"score": "x"}, "allowed: epd, pfn"), ({"eps": 0.0}, "eps is above 0")],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoLFAdamW(groups(network((3,))), **change)


def test_bare_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="molf_param_groups"):
        MoLFAdamW(list(network((3,)).parameters()))  # type: ignore[arg-type]
