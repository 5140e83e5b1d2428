"""A small network in float64 and the equations of the routed AdamW written out for it. It is no test."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from molf import MoLFAdamW, MoLFConfig, apply_molf, molf_modules, molf_param_groups

STEPS = 30
LR, LORA_LR, DECAY, LORA_DECAY, CLIP = 2e-2, 3e-2, 0.1, 0.05, 1.0


class Layer(nn.Module):
    """Two targets around a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        self.down = nn.Linear(9, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(torch.tanh(self.up(x))))


class Net(nn.Module):
    """Layers between an embedding and a head that is no target: each kind of parameter once."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.lm_head = nn.Linear(6, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randint(0, 11, (8,), generator=generator), torch.randint(0, 11, (8,), generator=generator))
        for _ in range(count)
    ]


def schedule(step: int) -> float:
    """Linear warm-up over 3 steps from a rate of 0, then a cosine."""
    return step / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / STEPS))


def network(ranks: tuple[int, ...], forward: str = "auto", train_base: bool = True, depth: int = 1) -> nn.Module:
    torch.manual_seed(0)
    model = Net(depth).double()
    config = MoLFConfig(r=ranks, lora_alpha=3.0, train_base=train_base, forward=forward)  # type: ignore[arg-type]
    model = apply_molf(model, config)
    disturb(model, 0.05)
    return model


def disturb(model: nn.Module, spread: float) -> None:
    """Takes each B away from zero, so that both halves of the experts matter from the first step."""
    with torch.no_grad():
        for _, module in molf_modules(model):
            for s, a, b in zip(module.scaling, module.lora_A, module.lora_B, strict=True):
                b.normal_(0, spread)
                if module.is_effective:
                    module.weight.add_(s * b @ a)


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


def assert_equals(model: nn.Module, optimizer: MoLFAdamW, oracle: "Transcription") -> None:
    """Trains both on the same batches: the winners of every step are the same, and all parameters at the end."""
    winners: list[list[list[bool]]] = []

    def keep(step: int) -> None:
        assert optimizer.last_routing is not None
        winners.append(optimizer.last_routing.winners.tolist())

    run(model, optimizer, batches(), after=keep)
    assert winners == oracle.train(batches())
    for name, module in molf_modules(model):
        layer = oracle.layers[name]
        mine = [module.base_weight(), *module.lora_A, *module.lora_B]
        theirs = [layer["W"], *layer["A"], *layer["B"]]
        if module.bias is not None:
            mine, theirs = [*mine, module.bias], [*theirs, layer["b"]]
        for left, right in zip(mine, theirs, strict=True):
            torch.testing.assert_close(left.detach(), right, rtol=0, atol=1e-9)
    for name, tensor in oracle.other.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), tensor, rtol=0, atol=1e-9)


class Transcription:
    """The equations of DESIGN.md section 2, written out: own dense forward, own moments, plain loops.

    `score_per`, `winners` and `seed` as `MoLFAdamW`'s: ablations and controls, written out likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: tuple[int, ...],
        k: int,
        score: str,
        train_base: bool,
        score_per: str = "module",
        winners: str = "scores",
        seed: int = 0,
    ) -> None:
        self.k, self.score, self.train_base = k, score, train_base
        self.score_per, self.winners, self.seed = score_per, winners, seed
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
        self.other = {
            n: p.detach().clone()
            for n, p in model.named_parameters()
            if not any(n.startswith(f"{layer}.") for layer in self.layers)
        }
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
        for i in range(len(self.layers) // 2):
            at = f"layers.{i}."
            h = torch.tanh(linear(at + "up", x))
            x = x + linear(at + "down", nn.functional.layer_norm(h, (9,), o[at + "norm.weight"], o[at + "norm.bias"]))
        return x @ o["lm_head.weight"].T

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
            parts: dict[str, list[tuple[float, int]]] = {}
            for name in self.layers:
                parts[name] = []
                for expert in self.experts(name):
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
                    parts[name].append((total, count))
            scores = [self.scores(name, parts, rate) for name in self.layers]
            choice = self.choose(scores, step + 1)
            for name, won in zip(self.layers, choice, strict=True):
                for index, expert in enumerate(self.experts(name)):
                    if not won[index]:
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

    def scores(self, name: str, parts: dict[str, list[tuple[float, int]]], rate: float) -> list[float]:
        """Each expert's, over this module or over all that it is scored with."""
        layer = name.rpartition(".")[0]
        members = {
            "module": [name],
            "layer": [other for other in self.layers if other.rpartition(".")[0] == layer],
            "model": list(self.layers),
        }[self.score_per]
        found = []
        for index in range(len(parts[name])):
            total = sum(parts[member][index][0] for member in members)
            count = sum(parts[member][index][1] for member in members)
            eta = (LR if self.train_base and index == 0 else LORA_LR) * rate
            found.append(eta / count * total if self.score == "epd" else math.sqrt(total / count))
        return found

    def choose(self, scores: list[list[float]], step: int) -> list[list[bool]]:
        """Who wins in step `step`, 1 for the first."""
        experts = len(scores[0])
        key = scrambled(scrambled(self.seed) ^ step)

        def highest(values: list[Any]) -> list[bool]:
            ranked = sorted(range(experts), key=lambda i: (-values[i], i))[: self.k]
            return [i in ranked for i in range(experts)]

        def drawn(place: int) -> int:
            return scrambled(scrambled(place + 1) ^ key)

        match self.winners:
            case "full":
                return [[i == 0 for i in range(experts)] for _ in scores]
            case "lora":
                return [highest([-math.inf, *row[1:]]) for row in scores]
            case "alternate":
                return [[i == step % experts for i in range(experts)] for _ in scores]
            case "random":
                return [highest([drawn(row * experts + i) for i in range(experts)]) for row in range(len(scores))]
            case "shuffled":
                places = sorted(range(len(scores)), key=drawn)
                return [highest(scores[place]) for place in places]
        return [highest(row) for row in scores]

    def update(self, tensor: Tensor, key: tuple[Any, ...], eta: float, decay: float) -> None:
        m, v, t = self.moments[key]
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
        tensor.mul_(1 - eta * decay)
        tensor.sub_(eta * m_hat / (v_hat.sqrt() + 1e-8))


def scrambled(number: int) -> int:
    """The 32-bit hash by which controls draw."""
    number = (number ^ number >> 16) * 0x21F0AAAD % 2**32
    number = (number ^ number >> 15) * 0x735A2D97 % 2**32
    return number ^ number >> 15
