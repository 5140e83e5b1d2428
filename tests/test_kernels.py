"""The arithmetic of AdamW: kernels.cpp against its reference in torch, 8-bit moments, stochastic rounding."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molf import kernels, native
from molf.adamw import AdamW, plain_param_groups

# Shapes around the blocks' edges: a scalar row, less than a row of columns, whole rows, whole rows and a rest.
SHAPES = [(1,), (7, 5), (64, 64), (130, 33), (3, 4096), (40, 4096), (17000,)]


def tensors(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


@torch.no_grad()
def stepped(dtype: torch.dtype, backend: Any, steps: int = 4, moments: Any = "float32") -> tuple[AdamW, list[Tensor]]:
    """Parameters after some steps on fixed gradients."""
    params = [nn.Parameter(t) for t in tensors(dtype)]
    optimizer = AdamW(plain_param_groups(params, 1e-2, 0.1), moments=moments, backend=backend)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        for group in optimizer.param_groups:
            optimizer._advance(group["params"], group, None)
            optimizer._move(group["params"], [p.ndim > 1 for p in group["params"]], group)
    return optimizer, [p.detach() for p in params]


needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C++ compiler is here")


@needs_compiler
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.0)])
def test_the_compiled_arithmetic_equals_its_reference(dtype: torch.dtype, rtol: float) -> None:
    (compiled, mine), (reference, theirs) = stepped(dtype, "auto"), stepped(dtype, "eager")
    assert native.kind(mine[0], compiled.state[compiled.param_groups[0]["params"][0]]["exp_avg"]) is not None
    for left, right in zip(mine, theirs, strict=True):
        if dtype == torch.bfloat16:
            # The same noise; a value at the border of two may fall either way after another order of operations.
            assert (left != right).float().mean() < 0.01
            torch.testing.assert_close(left, right, rtol=2**-7, atol=0)
        else:
            torch.testing.assert_close(left, right, rtol=rtol, atol=1e-2 * rtol)
    for p, q in zip(compiled.state, reference.state, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(compiled.state[p][name], reference.state[q][name], rtol=1e-5, atol=1e-9)


@needs_compiler
@pytest.mark.parametrize("score", ["epd", "pfn"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_score_sums_equal_the_reference_and_do_not_depend_on_the_threads(dtype: torch.dtype, score: str) -> None:
    found = []
    for backend, threads in (("auto", 1), ("auto", 2), ("eager", 1)):
        optimizer, params = stepped(dtype, backend)
        group = optimizer.param_groups[0]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        with torch.no_grad():
            found.append(optimizer._advance(group["params"], group, score))
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=2e-5, atol=0)
    assert (found[0] > 0).all()


@torch.no_grad()
def test_a_strided_parameter_is_moved_in_place() -> None:
    results = []
    for strided in (False, True):
        values = torch.arange(12.0).view(3, 4)
        p = nn.Parameter(values.T.contiguous().T if strided else values.clone())
        assert p.is_contiguous() != strided
        optimizer = AdamW(plain_param_groups([p], 0.1, 0.1))
        p.grad = torch.ones(3, 4)
        optimizer._advance([p], optimizer.param_groups[0], None)
        optimizer._move([p], [True], optimizer.param_groups[0])
        results.append(p.detach().clone())
    torch.testing.assert_close(results[0], results[1])
    assert not torch.equal(results[0], torch.arange(12.0).view(3, 4))


def test_stochastic_rounding_is_right_in_the_mean_and_never_off_by_more_than_one_step() -> None:
    x = torch.full((64, 4096), 1.0 + 2.0**-10)  # an eighth of the way from 1 to the next bfloat16
    rounded = kernels.round_stochastically(x, 12345).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    share = (rounded > 1).double().mean()
    # 262,144 draws of chance 1/8: five standard deviations are 0.0032.
    assert abs(share - 0.125) < 0.0032
    other = kernels.round_stochastically(x, 12346 + 0x9E3779B1).float()
    assert 0.2 < (rounded != other).double().mean() < 0.24  # 2 (1/8) (7/8): another seed, other noise
    exact = torch.tensor([[0.0, -0.0, 1.0, -2.5, 2.0**-120]])
    assert torch.equal(kernels.round_stochastically(exact, 7).float(), exact)


def test_what_is_no_number_stays_so_when_rounded() -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -0x400000, 0x7F800000, -0x800000], dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32).view(1, -1)
    for seed in range(20):
        rounded = kernels.round_stochastically(x, seed * 977).float()
        assert rounded[0, :3].isnan().all() and torch.equal(rounded[0, 3:], x[0, 3:])


@needs_compiler
def test_what_is_no_number_stays_so_on_the_host() -> None:
    weight = torch.ones(8, dtype=torch.bfloat16)
    m = torch.tensor([float("nan")] * 4 + [float("inf")] * 2 + [0.0] * 2)
    m.view(torch.int32)[0] = 0x7FFFFFFF
    native.move(2, [weight], [m], [torch.ones(8)], [1.0], [1.0], [1.0], 1e-8, [3])
    assert weight[:4].isnan().all() and weight[4:6].isinf().all() and (weight[6:] == 1).all()


@pytest.mark.parametrize("backend", ["auto", "eager"])
@torch.no_grad()
def test_a_process_without_a_row_of_a_parameter_has_a_sum_of_zero(backend: Any) -> None:
    params = [nn.Parameter(torch.empty(0, 5)), nn.Parameter(torch.ones(2, 5))]
    optimizer = AdamW(plain_param_groups(params, 1e-2, 0.1), backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    sums = optimizer._advance(params, optimizer.param_groups[0], "epd")
    optimizer._move(params, [True, True], optimizer.param_groups[0])
    assert sums[0] == 0 and sums[1] > 0


def test_updates_below_a_bfloat16_step_add_up() -> None:
    """Rounding to the nearest would leave every weight where it is, however many steps are made."""
    p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = AdamW(plain_param_groups([p], 1e-4, 0.0))  # a step of 1e-4 where bfloat16 knows 2^-8 below 1
    for _ in range(200):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert abs(p.float().mean() - (1 - 200 * 1e-4)) < 1e-3
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def quadratic(moments: Any) -> tuple[AdamW, Callable[[], float]]:
    torch.manual_seed(0)
    target, p = torch.randn(64, 128), nn.Parameter(torch.zeros(64, 128))
    optimizer = AdamW(plain_param_groups([p], 3e-2, 0.0), moments=moments)

    def train() -> float:
        for _ in range(60):
            optimizer.zero_grad()
            loss = (p - target).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    return optimizer, train


def test_8_bit_moments_learn_as_float32_ones_do_in_a_quarter_of_the_bytes() -> None:
    pytest.importorskip("torchao")
    sizes, losses = [], []
    for moments in ("float32", "8bit"):
        optimizer, train = quadratic(moments)
        losses.append(train())
        (state,) = optimizer.state.values()
        sizes.append(sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor)))
    assert losses[1] == pytest.approx(losses[0], rel=0.2) and losses[0] < 0.1  # from a mean square of 1
    assert sizes[1] < 0.27 * sizes[0]


def test_8_bit_codes_give_back_what_they_stand_for() -> None:
    pytest.importorskip("torchao")
    books = kernels.codebooks(torch.device("cpu"))
    values = torch.randn(3, 4096, generator=torch.Generator().manual_seed(0)) * 1e-3
    coded = (torch.empty(3, 4096, dtype=torch.uint8), torch.empty(3, 16))
    kernels.encode(values, coded, books.signed)
    decoded = kernels.decode(coded, books, signed=True)
    largest = values.view(-1, 256).abs().amax(dim=1)
    assert ((decoded - values).abs().view(-1, 256).amax(dim=1) < 0.04 * largest).all()
    assert (decoded == 0).float().mean() < 0.01


def test_no_8_bit_step_is_out_of_all_proportion() -> None:
    """A small gradient beside a large one: its first moment has a code where its second rounds to nothing."""
    pytest.importorskip("torchao")
    p = nn.Parameter(torch.zeros(16, 256))
    optimizer = AdamW(plain_param_groups([p], 1e-3, 0.0), moments="8bit")
    for _ in range(3):
        before = p.detach().clone()
        p.grad = torch.full_like(p, 1e-4)
        p.grad[:, 0] = 1.0
        optimizer.step()
        assert (p.detach() - before).abs().max() < 8e-3  # AdamW's own step is at most 1e-3


def test_small_parameters_keep_float32_moments() -> None:
    pytest.importorskip("torchao")
    optimizer, params = stepped(torch.float32, "auto", steps=1, moments="8bit")
    dtypes = {tuple(p.shape): state["exp_avg"].dtype for p, state in optimizer.state.items()}  # type: ignore[union-attr]
    assert dtypes[(40, 4096)] == dtypes[(64, 64)] == torch.uint8
    assert dtypes[(7, 5)] == dtypes[(130, 33)] == dtypes[(17000,)] == torch.float32


def test_8_bit_state_survives_a_save_and_a_load() -> None:
    pytest.importorskip("torchao")
    first, train = quadratic("8bit")
    train()
    second, _ = quadratic("8bit")
    second.load_state_dict(first.state_dict())
    for left, right in zip(first.state.values(), second.state.values(), strict=True):
        for name, value in left.items():
            same = torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name]
            assert same and (not isinstance(value, Tensor) or value.dtype == right[name].dtype), name


def test_without_a_compiler_it_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    native.library.cache_clear()
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    try:
        with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
            _, params = stepped(torch.float32, "auto", steps=1)
    finally:
        native.library.cache_clear()
    monkeypatch.undo()
    _, reference = stepped(torch.float32, "eager", steps=1)
    assert all(torch.equal(a, b) for a, b in zip(params, reference, strict=True))


def test_a_library_is_loaded_from_a_folder_of_ones_own_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native._folder() == tmp_path / "molf"
    (tmp_path / "molf").chmod(0o777)  # anyone could put a library there
    assert native._folder() != tmp_path / "molf"


def test_a_compiler_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native.library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ("--no-such-flag",))
    try:
        with pytest.warns(UserWarning, match="does not compile kernels.cpp"):
            assert native.library() is None
    finally:
        native.library.cache_clear()
    assert not list((tmp_path / "molf").glob("*"))


TRITON = """
import torch
from molf import kernels, kernels_cuda
shapes = [(3,), (100, 33), (4096,), (50, 100), (3, 2048)]
torch.manual_seed(0)
make = lambda: [torch.randn(shape) for shape in shapes]
g, m, p = make(), make(), make()
v = [t.square() for t in make()]
rows = lambda tensors: [t.view(1, -1) for t in tensors]
for score in (None, "epd", "pfn"):
    m2, v2 = [t.clone() for t in m], [t.clone() for t in v]
    sums = kernels_cuda.advance(g, m, v, 0.9, 0.999, 1e-8, score)
    parts = kernels.advance(rows(g), rows(m2), rows(v2), 0.9, 0.999, 1e-8, score, None)
    torch.testing.assert_close(m, m2)
    torch.testing.assert_close(v, v2)
    if score is not None:
        torch.testing.assert_close(sums, torch.cat(parts).double(), rtol=1e-5, atol=0)
wins = torch.tensor([True, False, True, True, False])
keeps, rates, roots = [0.9, 1.0, 0.99, 0.9, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 2.0, 3.0, 4.0, 5.0]
before = [t.clone() for t in p]
expected = [t.clone() for t in p]
for i in range(5):
    if wins[i]:
        kernels.move(*[rows([x[i]]) for x in (expected, m, v)], [keeps[i]], rates[i], roots[i], 1e-8, [0], None)
kernels_cuda.move(p, m, v, keeps, rates, roots, 1e-8, wins)
torch.testing.assert_close(p, expected)
assert torch.equal(p[1], before[1]) and not torch.equal(p[0], before[0])
print("equal")
"""


def test_the_triton_kernels_equal_their_reference_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", TRITON],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr
