"""The figures: which there are, how they look, and the reductions that they show."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import LogNorm

from molf.paths import read_json, write_json, write_parquet
from molf.report import comparison, figures, routing_figures, sheets, style, weight_figures
from tests.report import fake

METHODS = [("fft", "fft"), ("lora", "lora"), ("molf", "molf"), ("molf-e", "molf-e")]
NAMES = {"score", "cost", "loss", "routing", "share", "ratio", "moved", "forgetting", "intruders"}


def test_every_figure_is_a_png_and_an_svg(made: Path) -> None:
    folder = made / "reports/figures"
    stems = {f"tiny-{task}-{name}" for task in ("sql", "fact") for name in NAMES}
    stems |= {"overview-routing", "overview-rank"}
    assert {path.name for path in folder.iterdir()} == {f"{stem}.{end}" for stem in stems for end in ("png", "svg")}
    for stem in stems:
        drawn = (folder / f"{stem}.svg").read_text()
        assert drawn.startswith("<svg") and "<text" in drawn and "metadata" not in drawn, stem
        assert "<title>" in drawn, stem


def test_notes_tell_the_numbers(made: Path) -> None:
    folder = made / "reports/figures"
    group = read_json(made / "reports/comparison.json")["groups"][0]
    molf = group["methods"][2]
    score = f"molf: {molf['mean']:.3f} [{molf['low']:.3f}, {molf['high']:.3f}]"
    assert f"<title>{score}</title>" in (folder / "tiny-sql-score.svg").read_text()
    assert f"<title>{score} at 8.4 s, on the front</title>" in (folder / "tiny-sql-cost.svg").read_text()
    routing = (folder / "tiny-sql-routing.svg").read_text()
    assert "<title>layer 1, mlp.up_proj: the full weight won 82 %</title>" in routing
    assert "<title>layer 1, mlp.up_proj: LoRA r = 8 won 18 %</title>" in routing
    assert "<title>molf, layer 2: 20.0 % intruders</title>" in (folder / "tiny-sql-intruders.svg").read_text()
    assert "effective rank of the change 12<" in (folder / "tiny-sql-moved.svg").read_text()
    overview = (folder / "overview-routing.svg").read_text()
    assert "<title>fact, molf: the full weight: first expert won, layer 0" not in overview
    assert "fact, molf: the full weight: first expert won 73 %" in overview


def test_figures_of_what_lacks_are_left_out(tmp_path: Path) -> None:
    params = fake.write_tree(tmp_path, fake.raw_params(("sql",)))
    path = tmp_path / "results/tiny/sql/molf/seed-0/train/routing.parquet"
    write_parquet(path, pd.read_parquet(path).assign(counted=False))
    path = tmp_path / "results/tiny/sql/molf-e/seed-0/train/routing.parquet"
    write_parquet(path, pd.read_parquet(path).query("expert == 'lora_r4'"))  # an expert alone has no rival
    for path in tmp_path.glob("results/*/*/*/*/evaluation/weights.parquet"):
        path.unlink()
    result = comparison.build(params, tmp_path)
    result["groups"][0]["pareto"] = None
    for m in result["groups"][0]["methods"]:
        m["general"] = None
    drawn = figures.draw(result, tmp_path, tmp_path / "figures")
    assert [figure["name"] for figure in drawn] == ["score", "loss", "routing", "share"]
    routing = routing_figures.read_routing(tmp_path / "results/tiny/sql/molf/seed-0/train")
    assert routing_figures.share_so_far(routing).empty


def give_ranks(root: Path, method: str, by_seed: dict[int, dict[str, int]]) -> None:
    """Says in a method's summaries what rank each module got."""
    for seed, ranks in by_seed.items():
        path = root / f"results/tiny/sql/{method}/seed-{seed}/train/summary.json"
        write_json(path, {**read_json(path), "adaptation": {"ranks": ranks, "budget": sum(ranks.values())}})


def test_ranks_are_drawn_where_a_method_moves_them(tmp_path: Path) -> None:
    """The mean over seeds; a module that is left out has none; summaries of an earlier molf say nothing."""
    params = fake.write_tree(tmp_path, fake.raw_params(("sql",), seeds=(0, 1)))
    q, up = (f"model.layers.0.{kind}" for kind in ("self_attn.q_proj", "mlp.up_proj"))
    deep = up.replace("0", "2")
    give_ranks(tmp_path, "lora", {0: {q: 4, up: 8}, 1: {q: 6, up: 8, deep: 3}})
    give_ranks(tmp_path, "molf-e", {0: {q: 16}, 1: {q: 16}})
    result = comparison.build(params, tmp_path)
    methods = {m["method"]: m for m in result["groups"][0]["methods"]}
    assert methods["lora"]["ranks"] == {"low": 3, "mean": pytest.approx(5.8), "high": 8}
    assert methods["fft"]["ranks"] is None
    assert "ranks" not in comparison.flat(result)
    drawn = {figure["name"]: figure for figure in figures.draw(result, tmp_path, tmp_path / "figures")}
    svg = (tmp_path / "figures" / drawn["ranks"]["file"]).with_suffix(".svg").read_text()
    for said in ("layer 0, self_attn.q_proj: lora, rank 5", "layer 2, mlp.up_proj: lora, rank 1.5"):
        assert f"<title>{said}</title>" in svg
    assert "<title>layer 0, mlp.up_proj: molf-e, rank 0</title>" in svg and "fft" not in svg
    assert "ranks" in sheets.costs(result["groups"][0]).header
    cells = {row[0][0]: row[-1] for row in sheets.costs(result["groups"][0]).rows}
    assert cells["lora"] == ("3 to 8", 8) and cells["fft"] == sheets.UNKNOWN
    for m in methods.values():  # as an earlier molf wrote comparison.json
        del m["ranks"]
    assert "ranks" not in sheets.costs(result["groups"][0]).header


def test_looks_stay_with_the_kind_and_never_repeat() -> None:
    looks = style.styles(METHODS)
    assert {name: look.colour for name, look in looks.items()} == style.KIND_COLOURS
    assert {name: look.marker for name, look in looks.items()} == style.KIND_MARKERS
    many = style.styles([*METHODS, ("lora-r8", "lora"), ("lora-r64", "lora"), ("dora", "dora")])
    assert len({look.colour for look in many.values()}) == len({look.marker for look in many.values()}) == 7
    rivals = style.styles([("a", "lora"), *((name, name) for name in "bcdefgh"), ("molf", "molf"), ("x", "molf-e")])
    assert len({look.colour for look in rivals.values()}) == len({look.marker for look in rivals.values()}) == 10
    assert [rivals[name].colour for name in ("a", "molf", "x")] == [style.ORANGE, style.GREEN, style.PURPLE]
    controls = style.styles([*METHODS, *((f"molf-{i}", "molf") for i in range(20))])
    assert len({(look.colour, look.marker) for look in controls.values()}) == 24


def test_a_figure_grows_with_its_legend(tmp_path: Path) -> None:
    """Else a long legend is cut off, and squeezes the axes to nothing."""
    for count, height in ((4, 3.0), (20, style.ABOVE + 40 * style.LINE)):
        figure, axes = style.canvas(6.4, 3.0)
        for i in range(count):
            axes.plot([0, 1], [i, i], label=f"method {i}\nand more")
        style.legend(axes)
        style.save(figure, tmp_path / "long.png")
        assert figure.get_figheight() == pytest.approx(height)
        drawn = axes.get_legend()
        assert drawn is not None and drawn.get_window_extent().y0 >= 0
        assert axes.get_window_extent().height > 0.7 * height * figure.dpi


def test_many_methods_share_one_map_of_layers(made: Path) -> None:
    frame = weight_figures.read_weights([made / "results/tiny/sql/molf/seed-0/evaluation"])
    assert frame is not None
    few, many = ({f"m{i}": frame for i in range(count)} for count in (style.MANY, style.MANY + 1))
    assert len(weight_figures.moved_figure("few", few).axes) == 2 * style.MANY + 2  # and two colour bars
    assert len(weight_figures.moved_figure("many", many).axes) == 4
    place = weight_figures.by_place(frame, "effective_rank")
    table = style.by_method({"a": place, "b": 2 * place})
    assert list(table.index) == ["a", "b"] and list(table.columns) == [0, 1, 2]
    assert table.loc["b", 1] == pytest.approx(2 * place[1].mean())
    types = style.by_method({"a": place}, axis=1)
    assert types.loc["a", "mlp.up_proj"] == pytest.approx(place.loc["mlp.up_proj"].mean())


def test_many_methods_share_one_figure_of_the_routing(made: Path, tmp_path: Path) -> None:
    routing = routing_figures.read_routing(made / "results/tiny/sql/molf/seed-0/train")
    few, many = ({f"m{i}": routing for i in range(count)} for count in (style.MANY, style.MANY + 1))
    looks = style.styles([(name, "molf") for name in many])
    assert len(routing_figures.routing_heat_map(few, "few").axes) == 2 * style.MANY + 1  # and a colour bar
    assert len(routing_figures.share_figure("few", few, looks).axes) == style.MANY
    together, over_time = routing_figures.routing_heat_map(many, "many"), routing_figures.share_figure("m", many, looks)
    assert len(together.axes) == 3 and len(over_time.axes) == 1
    style.save(together, tmp_path / "together.png")
    style.save(over_time, tmp_path / "time.png")
    places = routing_figures.share_by_place(routing, "full")
    drawn = (tmp_path / "together.svg").read_text()
    assert f"<title>layer 1, m0: full weight: first expert won {100 * places[1].mean():.0f} %</title>" in drawn
    assert f"<title>up_proj, m6: full weight: first expert won {100 * places.loc['mlp.up_proj'].mean():.0f} %" in drawn
    assert f">m{style.MANY}: full weight<" in drawn
    first = routing[routing["expert"] == "full"]
    last = first.groupby(routing_figures.windows(first["step"]))["won"].mean()
    said = f"m6, up to step {last.index[-1]}: the full weight won {100 * last.iloc[-1]:.0f} %"
    assert f"<title>{said}</title>" in (tmp_path / "time.svg").read_text()


def test_experts_in_words() -> None:
    words = [routing_figures.expert_words(name) for name in ("full", "lora_r128", "lora_r32_2")]
    assert words == ["the full weight", "LoRA r = 128", "LoRA r = 32 (no. 2)"]


def test_routing_reductions(made: Path) -> None:
    routing = routing_figures.read_routing(made / "results/tiny/sql/molf/seed-0/train")
    assert set(routing["step"]) == set(range(2, fake.STEPS + 1))  # the step with rate 0 does not count
    share = routing_figures.share_so_far(routing)
    assert list(share.columns) == routing_figures.experts(routing) == ["full", "lora_r8"]
    assert share.loc[2, "full"] == pytest.approx(5 / 6)
    assert share.sum(axis=1).tolist() == pytest.approx([1.0] * len(share))
    places = {expert: routing_figures.share_by_place(routing, expert) for expert in ("full", "lora_r8")}
    assert list(places["full"].index) == ["self_attn.q_proj", "mlp.up_proj"]
    assert list(places["full"].columns) == [0, 1, 2]
    assert places["full"].loc["mlp.up_proj", 1] == pytest.approx(9 / 11)
    assert (places["full"] + places["lora_r8"]).to_numpy().ravel().tolist() == pytest.approx([1.0] * 6)
    kinds = routing_figures.share_by_type(routing)
    assert list(kinds.columns) == ["self_attn.q_proj", "mlp.up_proj"]
    # Step 2: layer 1's up_proj (place 3) has (2 + 3) % 4 != 0; q_proj of layer 1 (place 2) has not.
    assert kinds.to_numpy()[0].tolist() == pytest.approx([2 / 3, 1.0])


def test_score_ratio() -> None:
    rows = [
        (step, module, expert, True, score)
        for step in (1, 2)
        for module, scores in {"a": (4.0, 1.0, 2.0), "b": (1.0, 4.0, 0.5), "c": (0.0, 1.0, 1.0)}.items()
        for expert, score in zip(("full", "lora_r4", "lora_r8"), scores, strict=True)
    ]
    routing = pd.DataFrame(rows, columns=["step", "module", "expert", "won", "score"])
    routing["expert"] = pd.Categorical(routing["expert"], categories=["full", "lora_r4", "lora_r8"], ordered=True)
    table = routing_figures.score_ratio(routing)
    assert list(table.index) == [1, 2]
    assert table.loc[1, "median"] == pytest.approx((4 / 2 + 1 / 4) / 2)  # a score of 0 has no ratio
    pooled = routing_figures.pooled([routing, routing])
    assert routing_figures.score_ratio(pooled)["median"].equals(table["median"])


def test_windows_are_few_and_cover_all_steps() -> None:
    steps = pd.Series(range(1, 1001))
    last = routing_figures.windows(steps)
    assert last.nunique() <= routing_figures.WINDOWS and last.iloc[-1] == 1000
    assert (last >= steps).all() and last.is_monotonic_increasing
    assert routing_figures.windows(pd.Series([3, 5, 5])).tolist() == [3, 5, 5]


def test_weights_are_means_over_seeds(tmp_path: Path) -> None:
    frame: dict[str, Any] = {"type": ["up", "up"], "layer": [0, 1], "base_norm": 2.0, "effective_rank": 3.0}
    for seed, change in enumerate((1.0, 3.0)):
        folder = tmp_path / str(seed)
        write_parquet(
            folder / "weights.parquet", pd.DataFrame({**frame, "change_norm": change, "intruders": seed, "top": 4})
        )
    weights = weight_figures.read_weights([tmp_path / "0", tmp_path / "1"])
    assert weights is not None
    assert weights["relative_change"].tolist() == [1.0, 1.0] and weights["intruders"].tolist() == [0.5, 0.5]
    assert weight_figures.by_place(weights, "effective_rank").to_numpy().tolist() == [[3.0, 3.0]]
    assert weight_figures.read_weights([tmp_path / "0", tmp_path / "none"]) is None


def test_a_scale_is_logarithmic_where_values_lie_orders_apart() -> None:
    near, far = pd.DataFrame([[1.0, 2.0]]), pd.DataFrame([[0.0, 1000.0]])
    assert not isinstance(style.scale([near]), LogNorm) and style.scale([near]).vmax == 2.0
    assert isinstance(style.scale([near, far]), LogNorm)
    assert style.scale([pd.DataFrame([[np.nan, 0.0]])]).vmax == 1.0


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    curve = style.thinned(pd.DataFrame({"step": range(10_000)}), figures.LOSS_POINTS)
    assert len(curve) == figures.LOSS_POINTS
    assert curve["step"].iloc[[0, -1]].tolist() == [0, 9999]


def test_tasks_and_models_stand_beside_each_other_in_one_scale(tmp_path: Path) -> None:
    low, high = (pd.DataFrame([[value, value]], index=["mlp.up_proj"], columns=[0, 1]) for value in (2.0, 8.0))
    tables = {("small", "fft"): {"sql": low, "fact": high}, ("large", "fft"): {"sql": high}}  # fact was not asked of it
    figure = routing_figures.overview_figure(tables, "ranks", "effective rank", share=False)
    style.save(figure, tmp_path / "overview.png")
    drawn = (tmp_path / "overview.svg").read_text()
    assert [drawn.count(f">{text}<") for text in ("small", "large", "sql: 2", "sql: 8", "fact: 8")] == [1] * 5
    colours = {
        value: set(re.findall(rf"effective rank {value}</title>\s*<path[^>]*fill: (#\w+)", drawn)) for value in "28"
    }
    assert all(len(found) == 1 for found in colours.values()) and colours["2"] != colours["8"]
    # A power of ten is no formula where "$" is a dollar.
    far = {("small", "fft"): {"sql": low, "fact": 100 * high}}
    style.save(routing_figures.overview_figure(far, "ranks", "effective rank", share=False), tmp_path / "far.png")
    assert "mathdefault" not in (tmp_path / "far.svg").read_text()
