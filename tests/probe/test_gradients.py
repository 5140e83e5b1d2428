"""Gradients of models whose gradient is known on paper; folds, halves, AdamW's step."""

from typing import Any

import pytest
import torch
from torch import nn

from molf.probe import gradients
from molf.probe.gradients import FOLDS, HALVINGS


class Toy(nn.Module):
    """One linear layer and a head, as a transformers model names them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(8, 6, bias=False)}) for _ in range(3))
        self.lm_head = nn.Linear(6, 6)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def loss(model: nn.Module, batch: Any, items: int) -> torch.Tensor:
    """Half the squared error, summed over rows."""
    return (model(batch["x"]) - batch["y"]).square().sum() / 2 / items


@pytest.fixture
def regression() -> tuple[nn.Linear, list[dict[str, torch.Tensor]], torch.Tensor]:
    """A layer that is a rank-2 change away from the truth, and batches whose inputs' second moment is the identity."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6, bias=False)
    change = torch.outer(torch.randn(6), torch.randn(8)) + torch.outer(torch.randn(6), torch.randn(8))
    x = 8**0.5 * torch.eye(8)
    y = x @ (layer.weight.detach() + change).T
    batch = {"x": x, "y": y, "labels": torch.zeros(8, 1, dtype=torch.long)}
    return layer, [batch] * 8, change


def test_the_gradient_of_a_regression_is_the_change_that_it_asks_for(regression: Any) -> None:
    layer, batches, change = regression
    before = layer.weight.detach().clone()
    found = gradients.measure(layer, {"layers.0.proj": layer}, batches, loss)
    assert found.tokens == [16] * FOLDS and found.batches == 8
    for folds in (range(FOLDS), (0,), (1, 3)):
        torch.testing.assert_close(found.mean("layers.0.proj", folds), -change)
    assert torch.equal(layer.weight, before) and layer.weight.grad is None
    told = gradients.look(found, "layers.0.proj", [1, 2, 4], share=0.5)
    assert 0.5 < told.energy[1] < 0.999 and told.energy[2] == pytest.approx(1, abs=1e-5)
    assert 1 < told.effective_rank < 2.01 and 1 <= told.stable_rank < 2
    assert (told.type, told.layer, told.shape) == ("proj", 0, (6, 8))
    # Every batch alike: no noise, and a truncation loses the tail and nothing else.
    values = torch.linalg.svdvals(change.double())
    tail = torch.stack([values[r:].square().sum() for r in range(7)])
    assert told.noise_share == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(told.errors, tail.expand(len(HALVINGS), 7), atol=1e-4, rtol=1e-4)
    # AdamW's step over batches that are all alike is the gradient's sign.
    torch.testing.assert_close(found.step("layers.0.proj"), -change.sign())


def test_batches_of_unlike_length_weigh_by_their_tokens_and_their_noise_is_seen(regression: Any) -> None:
    layer, batches, change = regression
    torch.manual_seed(1)
    noisy = []
    for i, batch in enumerate(batches):
        rows = 8 if i % 2 else 4
        kept = {key: value[:rows] for key, value in batch.items()}
        noisy.append(kept | {"y": kept["y"] + 5 * torch.randn(rows, 6)})
    found = gradients.measure(layer, {"a": layer}, noisy, loss)
    layer.weight.grad = None
    layer.weight.requires_grad_(True)
    for batch in noisy:
        loss(layer, batch, 48).backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(found.mean("a"), layer.weight.grad)
    assert found.tokens == [8, 16, 8, 16]
    assert gradients.look(found, "a", [], share=1.0).noise_share > 0.3


def test_the_spread_of_two_folds_has_the_energy_of_their_means_noise() -> None:
    torch.manual_seed(0)
    tokens, energies, spreads = [3, 9, 5, 7], [], []
    for _ in range(300):
        folds = [count * torch.randn(4, 4) / count**0.5 for count in tokens]
        found = gradients.Gradients({"m": gradients.Sums(folds, torch.ones(4, 4))}, tokens, 4)
        energies.append(float(found.mean("m", (0, 1)).square().sum()))
        spreads.append(float(found.spread("m", (0, 1)).square().sum()))
    expected = 16 / 12
    for drawn in (energies, spreads):
        assert sum(drawn) / 300 == pytest.approx(expected, rel=0.1)


def test_targets_are_all_linears_but_the_head_and_what_is_excluded() -> None:
    names = [f"layers.{i}.proj" for i in range(3)]
    assert list(gradients.targets(Toy())) == names
    assert list(gradients.targets(Toy(), every=2)) == [names[0], names[2]]
    assert list(gradients.targets(Toy(), ["layers.1.proj"])) == [names[0], names[2]]
    with pytest.raises(ValueError, match="no linear layer"):
        gradients.targets(Toy(), ["proj"])
