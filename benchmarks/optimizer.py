"""Moments, scores and update over Gemma 3 270M's linears, beside torch's fused AdamW and the bytes that must move."""

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Result, Row, Settings, side_by_side, timed
from benchmarks.workloads import RANK
from molf import MoLFAdamW, MoLFConfig, apply_molf, defer_lora_gradients, derive_lora_gradients, molf_param_groups

LIMITS = {"cpu": 2.0, "cuda": 1.4}
# (out, in) of the seven linears of each of Gemma 3 270M's 18 layers.
GEMMA = {
    "q_proj": (1024, 640),
    "k_proj": (256, 640),
    "v_proj": (256, 640),
    "o_proj": (640, 1024),
    "gate_proj": (2048, 640),
    "up_proj": (2048, 640),
    "down_proj": (640, 2048),
}
LAYERS = 18
SITUATIONS = {"the base wins everywhere": 0, "LoRA wins everywhere": 1, "free choice": None}
# Float32 units that a parameter moves at least: AdamW reads g, m, v, p and writes m, v, p; a routed step reads g, m, v
# and writes m, v of every parameter, then, once the winners are known, reads m, v, p and writes p of theirs.
FUSED, SCORED, APPLIED = 7, 5, 4


class Pinned(MoLFAdamW):
    """The winner in all modules is `winner`, or whoever scores highest while that is None."""

    winner: int | None = None

    def select(self, scores: Tensor) -> Tensor:
        if self.winner is None:
            return super().select(scores)
        winners = torch.zeros_like(scores, dtype=torch.bool)
        winners[:, self.winner] = True
        return winners


def routed_update(settings: Settings) -> Result:
    """`MoLFAdamW.step` in three situations beside `torch.optim.AdamW(fused=True)`, with the floor of each."""
    device = settings.device
    layers, rank = (1, 8) if settings.quick else (LAYERS, RANK)
    dense, effective = (gemma_linears(layers, rank, forward, device.type) for forward in ("dense", "effective"))
    parameters = list(dense.parameters())
    for model in (dense, effective):
        give_gradients(model)
    fused = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.1, fused=True)
    apart, rebuilding = (Pinned(molf_param_groups(m, lr=1e-5, lora_lr=1e-5)) for m in (dense, effective))

    size = sum(p.numel() for p in parameters)
    lora = sum(p.numel() for name, p in dense.named_parameters() if ".lora_" in name)
    bandwidth = copy_bandwidth(settings)
    result = Result()
    against = f"AdamW(fused=True) over the same {size / 1e6:.0f} M float32 parameters"
    result.notes.append(f"copying memory here moves {bandwidth / 1e9:.1f} GB/s (read and written bytes)")
    for situation, winner in SITUATIONS.items():
        apart.winner = rebuilding.winner = winner
        sides = {"adamw": fused.step, "apart": apart.step, "rebuilding": rebuilding.step}
        seconds = side_by_side(sides, device, settings.rounds)
        what = f"MoLF moments, scores, update, r={rank}: {situation}"
        result.rows.append(Row(what, against, "s", seconds["apart"], seconds["adamw"], LIMITS[device.type]))
        with_weight = f"the same and W_eff rebuilt: {situation}"
        result.rows.append(Row(with_weight, against, "s", seconds["rebuilding"], seconds["adamw"]))
        won = winning_parameters(apart)
        floor = _floor(size, won, bandwidth, {k: statistics.median(v) for k, v in seconds.items()})
        result.data[situation] = floor | {"winning_parameters": won}
        result.notes.append(
            f"{situation}: {won / size:.0%} of the parameters win, so {floor['units']:.2f} units a parameter "
            f"must move where AdamW moves {FUSED}: at best {floor['ratio']:.2f} times; moved at "
            f"{floor['routed'] / 1e9:.1f} GB/s, AdamW at {floor['fused'] / 1e9:.1f} GB/s"
        )
    derive = [timed(lambda: derive_lora_gradients(effective), device) for _ in range(settings.rounds + 1)][1:]
    result.data |= {"parameters": size, "lora_parameters": lora, "copy": bandwidth, "derive_lora_gradients": derive}
    result.notes.append(f"derive_lora_gradients over the same layers: {statistics.median(derive):.3f} s")
    return result


def gemma_linears(layers: int, rank: int, forward: Any, device: str) -> nn.Module:
    """Gemma 3 270M's linears with one LoRA expert each, B away from zero."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            f"layer_{i}": nn.ModuleDict({n: nn.Linear(k, m, bias=False, device=device) for n, (m, k) in GEMMA.items()})
            for i in range(layers)
        }
    )
    model = apply_molf(model, MoLFConfig(r=(rank,), forward=forward))
    defer_lora_gradients(model)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=1e-3)
    return model


def give_gradients(model: nn.Module) -> None:
    """Random gradients, the experts' larger in every second layer, so that a free choice is a mixed one."""
    generator = torch.Generator().manual_seed(2)
    for index, module in enumerate(m for m in model.modules() if hasattr(m, "lora_A")):
        for name, parameter in module.named_parameters():
            scale = 2e-3 if ("lora_" in name) == bool(index % 2) else 1e-3
            parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.device)


def winning_parameters(optimizer: MoLFAdamW) -> int:
    """Parameters of the experts that won the last step."""
    routing = optimizer.last_routing
    assert routing is not None
    winners, sizes = routing.winners.cpu(), torch.zeros(routing.winners.shape, dtype=torch.long)
    row = {name: i for i, name in enumerate(routing.modules)}
    column = {name: i for i, name in enumerate(routing.experts)}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["modules"], group["params"], strict=True):
            sizes[row[name], column[group["expert"]]] += parameter.numel()
    return int((sizes * winners).sum())


def copy_bandwidth(settings: Settings) -> float:
    """Bytes that a large copy reads and writes in a second: what this memory can do."""
    source = torch.ones((1 if settings.quick else 256) * 2**20, device=settings.device.type)
    target = torch.empty_like(source)
    best = min(timed(lambda: target.copy_(source), settings.device) for _ in range(6))
    return 2 * source.numel() * source.element_size() / best


def _floor(size: int, won: int, bandwidth: float, seconds: dict[str, float]) -> dict[str, float]:
    """Units a parameter, best possible ratio, seconds at the copy's speed, and bytes a second that were reached."""
    units = SCORED + APPLIED * won / size
    return {
        "units": units,
        "ratio": units / FUSED,
        "seconds": 4 * units * size / bandwidth,
        "routed": 4 * units * size / seconds["apart"],
        "fused": 4 * FUSED * size / seconds["adamw"],
    }
