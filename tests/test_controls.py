"""Ablations and controls of the routing: against the equations written out, AdamW, and what each claims to be."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molf import (
    MoLFAdamW,
    MoLFConfig,
    RoutingError,
    RoutingRecorder,
    apply_molf,
    kernels,
    molf_modules,
    molf_param_groups,
)
from molf.config import check_params, read_yaml
from molf.modules import layer
from molf.training import Outcome, train
from tests.conftest import ROOT, frame
from tests.oracle import (
    DECAY,
    LORA_DECAY,
    LORA_LR,
    LR,
    Net,
    Transcription,
    assert_equals,
    batches,
    groups,
    network,
    run,
    scrambled,
)

# ranks, forward, base trained, k, score, and what is other than in MoLF; two layers of two targets each
CASES: list[tuple[tuple[int, ...], str, bool, int, str, dict[str, Any]]] = [
    ((3,), "effective", True, 1, "epd", {"score_per": "layer"}),
    ((2, 5), "dense", True, 2, "pfn", {"score_per": "layer"}),
    ((2, 5), "effective", True, 1, "pfn", {"score_per": "model"}),
    ((2, 5), "dense", True, 1, "epd", {"score_per": "model"}),
    ((2, 4, 1), "dense", False, 1, "epd", {"score_per": "layer"}),
    ((2, 4), "dense", False, 1, "pfn", {"score_per": "model"}),
    ((3,), "effective", True, 1, "epd", {"winners": "shuffled", "seed": 3}),
    ((2, 5), "dense", True, 2, "epd", {"winners": "shuffled", "seed": 4, "score_per": "layer"}),
    ((3,), "effective", True, 1, "epd", {"winners": "random", "seed": 3}),
    ((2, 4, 1), "dense", False, 2, "epd", {"winners": "random", "seed": 2**31 - 1}),
    ((2, 5), "effective", True, 1, "epd", {"winners": "full"}),
    ((2, 5), "dense", True, 1, "epd", {"winners": "lora"}),
    ((2, 5, 1), "effective", True, 2, "pfn", {"winners": "lora"}),
    ((2, 5), "effective", True, 1, "epd", {"winners": "alternate"}),
    ((2, 4), "dense", False, 1, "epd", {"winners": "alternate"}),
]


@pytest.mark.parametrize(("ranks", "forward", "train_base", "k", "score", "other"), CASES)
def test_it_equals_the_literal_equations(
    ranks: tuple[int, ...], forward: str, train_base: bool, k: int, score: Any, other: dict[str, Any]
) -> None:
    model = network(ranks, forward, train_base, depth=2)
    oracle = Transcription(model, ranks, k, score, train_base, **other)
    optimizer = MoLFAdamW(groups(model), top_k=k, score=score, **other)
    assert_equals(model, optimizer, oracle)


def choices(depth: int = 2, steps: int = 30, ranks: tuple[int, ...] = (3,), **options: Any) -> Tensor:
    """Winners of every step of a training, (steps, modules, experts), modules in the model's order."""
    model = network(ranks, depth=depth)
    optimizer = MoLFAdamW(groups(model), **options)
    found = []

    def keep(step: int) -> None:
        assert optimizer.last_routing is not None
        found.append(optimizer.last_routing.winners)

    run(model, optimizer, batches(steps), after=keep)
    return torch.stack(found)


def test_modules_that_are_scored_together_win_together() -> None:
    apart, by_layer, of_model = (choices(score_per=scope) for scope in ("module", "layer", "model"))
    assert not torch.equal(apart[:, 0], apart[:, 1]), "nothing is shown: these modules would win together anyway"
    assert torch.equal(by_layer[:, 0], by_layer[:, 1]) and torch.equal(by_layer[:, 2], by_layer[:, 3])
    assert not torch.equal(by_layer[:, 0], by_layer[:, 2])
    assert all(torch.equal(of_model[:, 0], of_model[:, row]) for row in range(4))
    assert of_model[1:, 0, 0].any() and of_model[1:, 0, 1].any()


def test_a_layer_is_what_a_name_says_up_to_its_first_number() -> None:
    names = ["model.layers.3.mlp.up_proj", "vision.layers.3.fc", "layers.10.experts.4.w", "head", "0"]
    assert list(map(layer, names)) == ["model.layers.3", "vision.layers.3", "layers.10", "", "0"]


@pytest.mark.parametrize("forward", ["effective", "dense"])
def test_always_the_full_weight_is_adamw_on_the_base(forward: Any) -> None:
    """B starts at zero and never moves, so that the experts add nothing; nothing is clipped, for that counts them."""
    torch.manual_seed(0)
    plain = Net(2).double()
    model = apply_molf(copy.deepcopy(plain), MoLFConfig(r=(3,), lora_alpha=3.0, forward=forward))
    optimizer = MoLFAdamW(groups(model), winners="full")
    parameters = list(plain.parameters())
    decayed, rest = ([p for p in parameters if (p.ndim >= 2) == wanted] for wanted in (True, False))
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}], lr=LR
    )
    for ids, targets in batches():
        for net, opt in ((model, optimizer), (plain, adamw)):
            opt.zero_grad()
            nn.functional.cross_entropy(net(ids), targets).backward()
            opt.step()
    for name, module in molf_modules(model):
        assert not any(b.any() for b in module.lora_B)
        torch.testing.assert_close(module.effective_weight(), plain.get_parameter(f"{name}.weight").detach())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).detach(), parameter.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("forward", ["effective", "dense"])
def test_always_lora_is_adamw_on_its_factors_whatever_the_base_rate(forward: str) -> None:
    results = []
    for rate in (LR, 50 * LR):
        model, reference = network((3,), forward, depth=2), network((3,), "dense", depth=2)
        experts = molf_param_groups(model, rate, LORA_LR, DECAY, LORA_DECAY)
        optimizer = MoLFAdamW([g for g in experts if g["kind"] == "expert"], winners="lora")
        mine, theirs = ([p for _, m in molf_modules(n) for p in (*m.lora_A, *m.lora_B)] for n in (model, reference))
        adamw = torch.optim.AdamW(theirs, lr=LORA_LR, weight_decay=LORA_DECAY)
        before = [
            (m.base_weight(), None if m.bias is None else m.bias.detach().clone()) for _, m in molf_modules(model)
        ]
        for ids, targets in batches():
            for net, opt in ((model, optimizer), (reference, adamw)):
                net.zero_grad()
                nn.functional.cross_entropy(net(ids), targets).backward()
                opt.step()
        for left, right in zip(mine, theirs, strict=True):
            torch.testing.assert_close(left.detach(), right.detach(), rtol=0, atol=1e-9)
        for (_, module), (weight, bias) in zip(molf_modules(model), before, strict=True):
            torch.testing.assert_close(module.base_weight(), weight, rtol=0, atol=1e-12)
            assert bias is None or torch.equal(module.bias, bias)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


def test_drawn_winners_are_uniform_and_depend_on_the_seed() -> None:
    first, again, other = (choices(steps=30, ranks=(2, 5), winners="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first.sum(dim=2) == 1).all()
    # 10,000 draws of each place; five standard deviations of a share are 0.024.
    many = torch.stack(
        [kernels.drawn(4 * 3, 7, step, torch.device("cpu")).view(4, 3).argmax(1) for step in range(10_000)]
    )
    for row in range(4):
        shares = torch.bincount(many[:, row], minlength=3) / len(many)
        assert (shares - 1 / 3).abs().max() < 0.024
    pairs = torch.bincount(3 * many[:, 0] + many[:, 1], minlength=9) / len(many)  # of two modules of one step
    assert (pairs - 1 / 9).abs().max() < 0.016
    pairs = torch.bincount(3 * many[1:, 0] + many[:-1, 0], minlength=9) / len(many)  # of two steps of one module
    assert (pairs - 1 / 9).abs().max() < 0.016


def test_a_draw_is_the_hash_that_it_is_said_to_be() -> None:
    for seed, step in ((0, 1), (3, 7), (2**31 - 1, 10**6)):
        key = scrambled(scrambled(seed) ^ step)
        expected = [scrambled(scrambled(place) ^ key) for place in range(1, 50)]
        assert kernels.drawn(49, seed, step, torch.device("cpu")).tolist() == expected


def test_shuffled_winners_are_as_many_of_each_expert_as_the_scores_choose_in_other_places() -> None:
    model = network((2, 5), depth=4)
    optimizer = MoLFAdamW(groups(model), winners="shuffled", seed=1)
    moved = []

    def keep(step: int) -> None:
        routing = optimizer.last_routing
        assert routing is not None
        chosen = optimizer.select(routing.scores)
        assert torch.equal(chosen.sum(dim=0), routing.winners.sum(dim=0))
        moved.append(not torch.equal(chosen, routing.winners))

    run(model, optimizer, batches(), after=keep)
    assert sum(moved) > 5
    assert torch.equal(*(choices(depth=4, ranks=(2, 5), winners="shuffled", seed=1) for _ in range(2)))


@pytest.mark.parametrize("option", [{"winners": "random"}, {"winners": "shuffled"}, {"score_per": "layer"}])
def test_a_resumed_control_goes_on_to_the_bit(option: dict[str, Any]) -> None:
    data = batches()
    straight = network((2, 5), depth=2)
    run(straight, MoLFAdamW(groups(straight), seed=9, **option), data)

    model = network((2, 5), depth=2)
    optimizer = MoLFAdamW(groups(model), seed=9, **option)
    run(model, optimizer, data[:13])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = network((2, 5), depth=2)
    resumed.load_state_dict(saved["model"])
    again = MoLFAdamW(groups(resumed), seed=9, **option)
    again.load_state_dict(saved["optimizer"])
    run(resumed, again, data[13:], first=13)
    for left, right in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_state_from_before_there_were_controls_is_taken() -> None:
    model = network((3,))
    optimizer = MoLFAdamW(groups(model))
    run(model, optimizer, batches(2))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        for key in ("score_per", "winners", "seed"):
            del group[key]
    again = MoLFAdamW(groups(model))
    again.load_state_dict(state)
    run(model, again, batches(3)[2:], first=2)
    assert again.last_routing is not None and again.last_routing.decided_by == "scores"


@pytest.mark.parametrize(
    ("change", "train_base", "message"),
    [
        ({"winners": "coin"}, True, "winners is 'coin'; allowed: scores, shuffled, random, full, lora, alternate"),
        ({"score_per": "row"}, True, "score_per is 'row'; allowed: module, layer, model"),
        ({"winners": "full", "top_k": 2}, True, "lets one expert win in each step, but top_k is 2; set top_k to 1"),
        ({"winners": "alternate", "top_k": 2}, False, "set top_k to 1"),
        ({"winners": "lora", "top_k": 3}, True, "top_k is 3, but LoRA's experts are 2; lower top_k or add ranks to r"),
        ({"winners": "full"}, False, "over a frozen base all experts are LoRA's: full needs the full weight"),
        ({"winners": "lora"}, False, "lora would change nothing"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(change: dict[str, Any], train_base: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoLFAdamW(groups(network((2, 5), train_base=train_base)), **change)


@pytest.mark.parametrize("winners", ["full", "lora", "alternate"])
def test_a_control_that_pins_its_winners_is_not_one_sided_and_its_scores_are_kept(winners: Any) -> None:
    model = network((3,), depth=2)
    optimizer, recorder = MoLFAdamW(groups(model), winners=winners), RoutingRecorder()
    run(model, optimizer, batches(8), after=lambda step: recorder.record(optimizer.last_routing))
    summary = recorder.summary()
    assert (summary["one_sided"], summary["decided_by"]) == (False, winners)
    share = {"full": (1.0, 0.0), "lora": (0.0, 1.0), "alternate": (4 / 7, 3 / 7)}[winners]  # the first step's rate is 0
    assert tuple(summary["share"].values()) == pytest.approx(share)
    columns = recorder.columns()
    assert (columns["score"][columns["counted"]] > 0).all()
    other = RoutingRecorder()
    other.load_state_dict(recorder.state_dict())
    assert other.summary() == summary


@pytest.mark.parametrize("winners", ["shuffled", "random", "full", "lora", "alternate"])
def test_a_record_refuses_a_control_whose_winners_belie_it(winners: Any) -> None:
    model = network((2, 5), depth=2)
    optimizer, recorder = MoLFAdamW(groups(model), winners=winners), RoutingRecorder()
    run(model, optimizer, batches(6), after=lambda step: recorder.record(optimizer.last_routing))
    recorder.drain()  # what is true
    routing = optimizer.last_routing
    assert routing is not None
    other = torch.zeros_like(routing.winners)
    other[:, 0 if winners == "lora" else 2] = True
    recorder.record(routing._replace(step=7, winners=other))
    if winners == "random":
        recorder.drain()
    else:
        with pytest.raises(RoutingError, match=f"step 7: winners is {winners}, but others won than that says"):
            recorder.drain()


def test_a_cell_draws_by_its_seed_and_warns_of_no_control(base: Path, tmp_path: Path) -> None:
    data = read_yaml(ROOT / "params.yaml")
    data["training"] |= {"max_length": 32, "batch_size": 4, "max_steps": 4, "threads": 1}

    def trained(name: str, winners: str, seed: int) -> Outcome:
        data["methods"]["molf"] |= {"r": [4], "winners": winners}
        params, folder = check_params(data, "test"), tmp_path / name
        outcome = train(
            base, frame(), params.methods["molf"], params.training, seed, folder / "weights", folder / "scratch"
        )
        assert not [text for text in outcome.summary["warnings"] if "one-sided" in text]
        assert outcome.summary["routing"]["decided_by"] == winners
        return outcome

    first, again, other = (trained(f"random-{i}", "random", seed) for i, seed in enumerate((3, 3, 4)))
    won = [outcome.routing["won"].tolist() for outcome in (first, again, other) if outcome.routing is not None]
    assert won[0] == won[1] != won[2]
    assert trained("full", "full", 3).summary["routing"]["share"] == {"full": 1.0, "lora_r4": 0.0}
