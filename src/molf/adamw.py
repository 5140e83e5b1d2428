"""AdamW with moments of a precision of their own, and which code does its arithmetic.

kernels.py in torch, kernels.cpp on the host (native.py), Triton on CUDA (kernels_cuda.py): the same up to rounding.
"""

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from molf import kernels, native
from molf.kernels import Moment
from molf.nn import local

Precision = Literal["float32", "8bit"]

# Elements of a parameter from which compiling the arithmetic of 8-bit moments pays.
WORTH_COMPILING = 1 << 17


def plain_param_groups(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Up to two groups, of decayed parameters and of biases and norms, which are not.

    Args:
        parameters: All that are trained so.
        lr: Learning rate of both.
        weight_decay: Of the first.
    """
    parameters = list(parameters)
    decayed = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    groups = [(decayed, weight_decay), (plain, 0.0)]
    return [{"params": p, "kind": "other", "lr": lr, "weight_decay": decay} for p, decay in groups if p]


def plain_adamw(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, moments: Precision
) -> torch.optim.Optimizer:
    """AdamW without routing: torch's own fused one where it keeps float32, else ours.

    Args:
        parameters: Those without `requires_grad` are left out.
        lr: Learning rate.
        weight_decay: Biases and norms are not decayed.
        moments: As `AdamW`'s.
    """
    return make_adamw(plain_param_groups((p for p in parameters if p.requires_grad), lr, weight_decay), moments)


def make_adamw(groups: list[dict[str, Any]], moments: Precision) -> torch.optim.Optimizer:
    """AdamW on groups, as `plain_adamw` chooses it."""
    if moments == "float32" and all(p.dtype == torch.float32 for group in groups for p in group["params"]):
        return torch.optim.AdamW(groups, eps=1e-8, fused=True)
    return AdamW(groups, eps=1e-8, moments=moments)


class AdamW(torch.optim.Optimizer):
    """AdamW with moments of a precision of their own, whatever the weights'; bfloat16 weights round stochastically.

    Args:
        params: Groups with `params`, `lr` and `weight_decay` (`plain_param_groups`).
        betas: Of the moments.
        eps: Added to the root of the second moment.
        moments: `float32` (float64 for float64 parameters) or `8bit`: codes in blocks of 256 that share a scale, for
            whole parameters of at least 4,096 elements, a multiple of 256; needs torchao.
        backend: `auto` takes kernels.cpp on the host where a compiler is, Triton on CUDA where it is installed, and
            compiles the arithmetic of 8-bit moments; `eager` takes kernels.py as it stands.

    Raises:
        ValueError: A value is out of range, or torchao is needed and lacks.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        moments: Precision = "float32",
        backend: Literal["auto", "eager"] = "auto",
        **defaults: Any,
    ) -> None:
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps > 0):
            raise ValueError(f"betas={betas}, eps={eps}: betas lie in [0, 1) and eps is above 0")
        if moments not in ("float32", "8bit"):
            raise ValueError(f"moments is {moments!r}; allowed: float32, 8bit")
        if moments == "8bit":
            kernels.codebooks(torch.device("cpu"))
        self.moments, self.backend = moments, backend
        self._ordinals: dict[Tensor, int] = {}
        super().__init__(params, {"betas": tuple(betas), "eps": eps, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = evaluate(closure)
        for group in self.param_groups:
            self._plain(group)
        return loss

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            # Codes come in blocks of elements; shards are cut by rows, so theirs stay values.
            coded = self.moments == "8bit" and local(parameter) is parameter and kernels.fits_codes(parameter)
            for name in ("exp_avg", "exp_avg_sq"):
                dtype = torch.uint8 if coded else torch.promote_types(parameter.dtype, torch.float32)
                state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
                if coded:
                    state[f"{name}_scale"] = torch.zeros(
                        parameter.numel() // kernels.CODES_PER_SCALE, device=parameter.device
                    )
        return state

    def _moment(self, parameter: Tensor, name: str) -> Moment:
        state = self.state[parameter]
        scale = state.get(f"{name}_scale")
        return local(state[name]) if scale is None else (state[name], scale)

    def _books(self, parameter: Tensor) -> kernels.Codebooks | None:
        coded = "exp_avg_scale" in self.state[parameter]
        return kernels.codebooks(parameter.device) if coded else None

    def _plain(self, group: dict[str, Any]) -> None:
        """AdamW on a group: torch's own fused one where it keeps the moments' precision, else ours."""
        params = [p for p in group["params"] if p.grad is not None]
        states = [self._state(p) for p in params]
        own = [p.dtype not in (torch.float32, torch.float64) or "exp_avg_scale" in self.state[p] for p in params]
        fused = [(p, state) for p, state, mine in zip(params, states, own, strict=True) if not mine]
        if fused:
            adamw(
                [local(p) for p, _ in fused],
                [local(p.grad) for p, _ in fused],
                [local(state["exp_avg"]) for _, state in fused],
                [local(state["exp_avg_sq"]) for _, state in fused],
                [],
                [torch.full((), float(state["step"]), device=p.device) for p, state in fused],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for _, state in fused:
                state["step"] += 1
        ours = [p for p, mine in zip(params, own, strict=True) if mine]
        if ours:
            self._advance(ours, group, None)
            self._move(ours, [True] * len(ours), group)

    def _advance(self, params: Sequence[Tensor], group: dict[str, Any], score: str | None) -> Tensor:
        """Moves the moments of parameters by their gradients.

        Returns:
            Each one's score sum over what this process holds of it, (parameters,) of float64.
        """
        beta1, beta2 = group["betas"]
        constants = (beta1, beta2, group["eps"], score)
        fused = self._fused(params)
        if fused is not None:
            for parameter in params:
                self._state(parameter)["step"] += 1
            ms, vs = ([self._moment(p, name) for p in params] for name in ("exp_avg", "exp_avg_sq"))
            gradients = [
                local(p.grad).to(m.dtype).contiguous()  # type: ignore[arg-type, union-attr]  # values, and none is None
                for p, m in zip(params, ms, strict=True)
            ]
            return fused.advance(gradients, ms, vs, *constants)  # type: ignore[no-any-return]
        sums: list[Tensor] = [torch.zeros((), dtype=torch.float64)] * len(params)
        together: dict[int, list[int]] = {}
        for index, parameter in enumerate(params):
            assert parameter.grad is not None  # the caller saw to it
            self._state(parameter)["step"] += 1
            weight, gradient = local(parameter), local(parameter.grad)
            m, v = self._moment(parameter, "exp_avg"), self._moment(parameter, "exp_avg_sq")
            kind = self._native(weight, m)
            if kind is not None and gradient.is_contiguous() and gradient.dtype == weight.dtype:
                together.setdefault(kind, []).append(index)
                continue
            books = self._books(parameter)
            parts: list[Tensor] = []
            for slab in kernels.slabs(weight, gradient, m, v):
                for block in self._blocks(slab, books):
                    assert block.gradient is not None
                    run = self._coded(kernels.advance, block) if books else kernels.advance
                    parts += run([block.gradient], [block.m], [block.v], *constants, books)
            if score is not None:
                # A process may hold no row of a sharded parameter.
                zero = torch.zeros((), dtype=torch.float64, device=weight.device)
                sums[index] = torch.cat(parts).double().sum() if parts else zero
        for kind, chosen in together.items():
            gradients = [local(params[i].grad) for i in chosen]  # type: ignore[arg-type]  # none is None
            ms, vs = ([self._moment(params[i], name) for i in chosen] for name in ("exp_avg", "exp_avg_sq"))
            found = native.advance(kind, gradients, ms, vs, *constants)  # type: ignore[arg-type]  # values, not codes
            for i, part in zip(chosen, found, strict=True):
                sums[i] = part
        return torch.stack(sums)

    def _move(
        self,
        params: Sequence[Tensor],
        decayed: Sequence[bool],
        group: dict[str, Any],
        wins: Tensor | None = None,
    ) -> None:
        """p <- p (1 - eta lambda), then p <- p - eta m_hat / (sqrt v_hat + eps), with bias-corrected moments.

        With a bool scalar `wins` on a device, only if it holds: nothing is read back to the host.
        """
        eps = group["eps"]
        for parameter, decays in zip(params, decayed, strict=True):
            keep, rate, root = self._numbers(parameter, decays, group)
            seed = self._seed(parameter)
            weight, books = local(parameter), self._books(parameter)
            m, v = self._moment(parameter, "exp_avg"), self._moment(parameter, "exp_avg_sq")
            kind = self._native(weight, m) if wins is None else None
            if kind is not None:
                native.move(kind, [weight], [m], [v], [keep], [rate], [root], eps, [seed])  # type: ignore[list-item]
                continue
            # A view of a strided parameter would be a copy, and the step lost.
            target = weight if weight.is_contiguous() else weight.contiguous()
            old = weight.clone() if wins is not None else weight
            for slab in kernels.slabs(target, None, m, v):
                for block in self._blocks(slab, books):
                    numbers: list[Any] = [keep, rate, root, seed + block.first]
                    run: Callable[..., Any] = kernels.move
                    if books:
                        run = self._coded(kernels.move, block)
                        numbers = [torch.full((), x, dtype=torch.float64) for x in numbers[:3]]
                        numbers.append(torch.full((), seed + block.first & 0xFFFFFFFF, dtype=torch.int64))
                    run([block.weight], [block.m], [block.v], [numbers[0]], *numbers[1:3], eps, [numbers[3]], books)
            if target is not weight:
                weight.copy_(target)
            if wins is not None:
                weight.copy_(torch.where(wins, weight, old))

    def _numbers(self, parameter: Tensor, decays: bool, group: dict[str, Any]) -> tuple[float, float, float]:
        """1 - eta lambda, eta / (1 - b1^t) and 1 / sqrt(1 - b2^t) of a parameter's step."""
        lr, (beta1, beta2), step = float(group["lr"]), group["betas"], self.state[parameter]["step"]
        keep = 1 - lr * group["weight_decay"] if decays else 1.0
        return keep, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5

    def _seed(self, parameter: Tensor) -> int:
        """Of a parameter's rounding in this step."""
        if parameter not in self._ordinals:
            every = (p for group in self.param_groups for p in group["params"])
            self._ordinals = {p: ordinal for ordinal, p in enumerate(every)}
        return int(self.state[parameter]["step"]) * 0x9E3779B1 + self._ordinals[parameter] * 0x85EBCA6B

    def _fused(self, params: Sequence[Tensor]) -> ModuleType | None:
        """kernels_cuda, where it serves all of these parameters, else None."""
        if self.backend == "eager" or self.moments != "float32" or not on_fused_device(params[0]):
            return None
        from molf import kernels_cuda

        states = (self._state(p)["exp_avg"] for p in params)
        served = all(
            p.device == params[0].device and kernels_cuda.serves(local(p), local(m))
            for p, m in zip(params, states, strict=True)
        )
        return kernels_cuda if served else None

    def _native(self, weight: Tensor, moment: Moment) -> int | None:
        """kernels.cpp's number for a parameter that it serves, else None."""
        return native.kind(weight, moment) if self.backend == "auto" and isinstance(moment, Tensor) else None

    def _blocks(self, slab: kernels.Slab, books: kernels.Codebooks | None) -> Iterable[kernels.Slab]:
        """All of a slab at once where its arithmetic is compiled, which leaves no temporaries."""
        return [slab] if books and self._coded(kernels.move, slab) is not kernels.move else kernels.blocks(slab)

    def _coded(self, function: Callable[..., Any], slab: kernels.Slab) -> Callable[..., Any]:
        """`function` for 8-bit moments: compiled where there is much to do, since it has many small operations."""
        if self.backend == "eager" or slab.weight.numel() < WORTH_COMPILING:
            return function
        kernels.mark_rows(slab.weight, slab.m, slab.v, *([] if slab.gradient is None else [slab.gradient]))
        return kernels.compiled(function)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state in the precision it was saved in: torch would cast it to the parameters' dtype."""
        super().load_state_dict(state_dict)
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    own = torch.promote_types(parameter.dtype, torch.float32) if value.is_floating_point() else None
                    dtype = torch.float32 if name.endswith("_scale") else own or value.dtype
                    self.state[parameter][name] = value.to(parameter.device, dtype)


def evaluate(closure: Callable[[], float] | None) -> float | None:
    """The loss of an optimizer's closure, if there is one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def on_fused_device(parameter: Tensor) -> bool:
    """Whether the Triton kernels can run where a parameter lies."""
    return parameter.device.type == "cuda" and find_spec("triton") is not None
