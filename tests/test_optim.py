"""The optimizer against its oracles: AdamW where one expert is pinned, the literal equations where it is free."""

import copy
import io
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molf import MoLFAdamW, MoLFConfig, apply_molf, kernels, merge_molf, molf_modules, molf_param_groups

STEPS = 30
LR, LORA_LR, DECAY, LORA_DECAY, CLIP = 2e-2, 3e-2, 0.1, 0.05, 1.0


class Net(nn.Module):
    """Two targets around a norm and a head that is none: each kind of parameter once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        self.down = nn.Linear(9, 6, bias=False)
        self.lm_head = nn.Linear(6, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.lm_head(x + self.down(self.norm(torch.tanh(self.up(x)))))


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randint(0, 11, (8,), generator=generator), torch.randint(0, 11, (8,), generator=generator))
        for _ in range(count)
    ]


def schedule(step: int) -> float:
    """Linear warm-up over 3 steps from a rate of 0, then a cosine."""
    return step / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / STEPS))


def network(ranks: tuple[int, ...], forward: str = "auto", train_base: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Net().double()
    config = MoLFConfig(r=ranks, lora_alpha=3.0, train_base=train_base, forward=forward)  # type: ignore[arg-type]
    model = apply_molf(model, config)
    with torch.no_grad():  # B away from zero, so that both halves of the experts matter from the first step
        for _, module in molf_modules(model):
            for s, a, b in zip(module.scaling, module.lora_A, module.lora_B, strict=True):
                b.normal_(0, 0.05)
                if module.is_effective:
                    module.weight.add_(s * b @ a)
    return model


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return molf_param_groups(model, LR, LORA_LR, DECAY, LORA_DECAY)


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[tuple[Tensor, Tensor]],
    first: int = 0,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains with the schedule and global clipping."""
    base = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    for step, (ids, targets) in enumerate(data, start=first):
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * schedule(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids), targets).backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], CLIP)
        optimizer.step()
        after(step)


class Transcription:
    """The equations of DESIGN.md section 2, written out: own dense forward, own moments, plain loops."""

    def __init__(self, model: nn.Module, ranks: tuple[int, ...], k: int, score: str, train_base: bool) -> None:
        self.k, self.score, self.train_base = k, score, train_base
        self.layers: dict[str, dict[str, Any]] = {}
        for name, module in molf_modules(model):
            bias = None if module.bias is None else module.bias.detach().clone()
            self.layers[name] = {
                "W": module.base_weight(),
                "b": bias,
                "A": [a.detach().clone() for a in module.lora_A],
                "B": [b.detach().clone() for b in module.lora_B],
                "s": [3.0 / math.sqrt(r) for r in ranks],
            }
        self.other = {n: p.detach().clone() for n, p in model.named_parameters() if n.split(".")[0] not in self.layers}
        self.moments: dict[tuple[Any, ...], list[Any]] = {}

    def forward(self, ids: Tensor) -> Tensor:
        def linear(name: str, x: Tensor) -> Tensor:
            layer = self.layers[name]
            y = x @ layer["W"].T
            if layer["b"] is not None:
                y = y + layer["b"]
            for s, a, b in zip(layer["s"], layer["A"], layer["B"], strict=True):
                y = y + s * (x @ a.T) @ b.T
            return y

        o = self.other
        x = o["embed.weight"][ids]
        h = nn.functional.layer_norm(torch.tanh(linear("up", x)), (9,), o["norm.weight"], o["norm.bias"])
        return (x + linear("down", h)) @ o["lm_head.weight"].T

    def experts(self, name: str) -> list[list[tuple[tuple[Any, ...], Tensor, bool]]]:
        layer = self.layers[name]
        lora = [
            [((name, "A", i), a, True), ((name, "B", i), b, True)]
            for i, (a, b) in enumerate(zip(layer["A"], layer["B"], strict=True))
        ]
        full = [((name, "W"), layer["W"], True)]
        if layer["b"] is not None:
            full.append(((name, "b"), layer["b"], False))
        return [full, *lora] if self.train_base else lora

    def train(self, data: list[tuple[Tensor, Tensor]]) -> list[list[list[bool]]]:
        history = []
        for step, (ids, targets) in enumerate(data):
            tensors = [t for name in self.layers for expert in self.experts(name) for _, t, _ in expert]
            if self.train_base:
                tensors += list(self.other.values())
            for tensor in tensors:
                tensor.requires_grad_(True)
            loss = nn.functional.cross_entropy(self.forward(ids), targets)
            gradients = dict(zip(map(id, tensors), torch.autograd.grad(loss, tensors), strict=True))
            for tensor in tensors:
                tensor.requires_grad_(False)
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
            factor = min(1.0, CLIP / (norm + 1e-6))
            rate = schedule(step)
            choice = []
            for name in self.layers:
                scores = []
                for index, expert in enumerate(self.experts(name)):
                    full = self.train_base and index == 0
                    eta = (LR if full else LORA_LR) * rate
                    total, count = 0.0, 0
                    for key, tensor, _ in expert:
                        m, v, t = self.moments.get(key, [torch.zeros_like(tensor), torch.zeros_like(tensor), 0])
                        g = gradients[id(tensor)] * factor
                        m = 0.9 * m + 0.1 * g
                        v = 0.999 * v + 0.001 * g**2
                        self.moments[key] = [m, v, t + 1]
                        if self.score == "epd":
                            total += float((m**2 / (v.sqrt() + 1e-8)).sum())
                        else:
                            total += float(((m / (v.sqrt() + 1e-8)) ** 2).sum())
                        count += tensor.numel()
                    scores.append(eta / count * total if self.score == "epd" else math.sqrt(total / count))
                ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: self.k]
                choice.append([i in ranked for i in range(len(scores))])
                for index, expert in enumerate(self.experts(name)):
                    if index not in ranked:
                        continue
                    full = self.train_base and index == 0
                    eta, decay = (LR, DECAY) if full else (LORA_LR, LORA_DECAY)
                    for key, tensor, decayed in expert:
                        self.update(tensor, key, eta * rate, decay if decayed else 0.0)
            if self.train_base:
                for name, tensor in self.other.items():
                    m, v, t = self.moments.get((name,), [torch.zeros_like(tensor), torch.zeros_like(tensor), 0])
                    g = gradients[id(tensor)] * factor
                    self.moments[(name,)] = [0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1]
                    self.update(tensor, (name,), LR * rate, DECAY if tensor.ndim >= 2 else 0.0)
            history.append(choice)
        return history

    def update(self, tensor: Tensor, key: tuple[Any, ...], eta: float, decay: float) -> None:
        m, v, t = self.moments[key]
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
        tensor.mul_(1 - eta * decay)
        tensor.sub_(eta * m_hat / (v_hat.sqrt() + 1e-8))


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
    ((2, 5), 1, "epd", "dense", False),
    ((2, 4, 1), 2, "pfn", "dense", False),
]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(("ranks", "k", "score", "forward", "train_base"), CASES)
def test_free_run_equals_the_literal_equations(
    ranks: tuple[int, ...], k: int, score: Any, forward: str, train_base: bool, backend: Any
) -> None:
    model = network(ranks, forward, train_base)
    oracle = Transcription(model, ranks, k, score, train_base)
    optimizer = MoLFAdamW(groups(model), top_k=k, score=score, backend=backend)
    winners: list[list[list[bool]]] = []

    def keep(step: int) -> None:
        assert optimizer.last_routing is not None
        winners.append(optimizer.last_routing.winners.tolist())

    run(model, optimizer, batches(), after=keep)
    assert winners == oracle.train(batches())
    for name, module in molf_modules(model):
        layer = oracle.layers[name]
        torch.testing.assert_close(module.base_weight(), layer["W"], rtol=0, atol=1e-9)
        for mine, theirs in zip([*module.lora_A, *module.lora_B], [*layer["A"], *layer["B"]], strict=True):
            torch.testing.assert_close(mine.detach(), theirs, rtol=0, atol=1e-9)
        if module.bias is not None:
            torch.testing.assert_close(module.bias.detach(), layer["b"], rtol=0, atol=1e-9)
    for name, tensor in oracle.other.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), tensor, rtol=0, atol=1e-9)


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
def test_a_step_on_a_device_never_waits_for_it(
    forward: Any, moments: Any, path: str, monkeypatch: pytest.MonkeyPatch
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
        optimizer = MoLFAdamW(groups(model), moments=moments)
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
