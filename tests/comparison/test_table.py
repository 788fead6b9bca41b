"""What is made of the runs: table, plot, page and manifest."""

import csv
import dataclasses
import io
import itertools
import json
import statistics

import comparisons
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from peft_modal.cli.compare import publish
from peft_modal.comparison.figures import draw, plot
from peft_modal.comparison.manifest import Manifest, read_manifest, write_manifest
from peft_modal.comparison.page import page
from peft_modal.comparison.plan import COST, Plan, Progress
from peft_modal.comparison.table import Row, balances, comma_separated, markdown, rows
from peft_modal.errors import ConfigError, FileFormatError

COSTS = {"step_ms": 30.0, "ratio": 0.75, "peak_mb": 60.0, "peak_ratio": 0.5, "error": None}


def three_seeds():
    plan = comparisons.make(seeds=(0, 1, 2), cost_rounds=3)
    progress = comparisons.complete(
        plan, test=lambda run: [0.5, 0.7, 0.6][run.seed], val=lambda run: 0.8 - abs(run.lr - 0.2)
    )
    return plan, {**progress, COST: Progress("done", figures={"lora": COSTS, "full": {"error": "out of memory"}})}


def manifest(plan, progress):
    return Manifest(plan, progress, "python -m peft_modal compare <...>", "study", "comparison.db")


def test_a_row_is_mean_and_sample_deviation_over_the_seeds_of_the_chosen_rate():
    row = rows(*three_seeds())[0]

    assert (row.method, row.seeds, row.split, row.lr) == ("lora", 3, "test", 0.2)
    assert row.mean == pytest.approx(0.6)
    assert row.deviation == pytest.approx(statistics.stdev([0.5, 0.6, 0.7]))
    assert (row.trained, row.trained_share, row.adapter_bytes) == (15, 0.25, 2000)
    assert (row.step_ms, row.step_ratio, row.peak_mb, row.peak_ratio) == (30, 0.75, 60, 0.5)
    assert not row.at_edge


def test_runs_with_other_rates_are_no_part_of_a_row():
    plan, progress = three_seeds()
    for key, one in progress.items():
        if "lr0.2" not in key and key != COST:
            progress[key] = comparisons.done(val=one.figures["val/accuracy"], test=0.0)

    assert rows(plan, progress)[0].mean == pytest.approx(0.6)


def test_the_markdown_table_reads_well():
    lines = markdown(*three_seeds()).splitlines()

    assert lines[0] == (
        "| method | test accuracy, % | learning rate | trained | share | adapter | step time | peak memory |"
    )
    assert lines[2] == "| lora | 60.0 ± 10.0 | 0.2 | 15 | 25.00 % | 2 kB | 0.75 (30 ms) | 0.50 (60 MB) |"
    assert lines[3] == "| full | 60.0 ± 10.0 | 0.2 | 15 | 25.00 % | 2 kB |  |  |"
    assert "the one of 0.1, 0.2, 0.3 with the highest val/accuracy of seed 0" in lines[5]
    assert "- full, cost: out of memory" in lines


def test_costs_have_columns_only_where_they_are_measured():
    for rounds, heads in ((0, False), (3, True)):
        plan = comparisons.make(cost_rounds=rounds)
        assert ("step time" in markdown(plan, comparisons.complete(plan))) == heads


def test_the_csv_holds_every_figure():
    table = list(csv.DictReader(io.StringIO(comma_separated(*three_seeds()))))

    assert [row["method"] for row in table] == ["lora", "full"]
    assert float(table[0]["mean"]) == pytest.approx(0.6)
    assert table[1]["step_ms"] == ""
    own = {field.name for field in dataclasses.fields(Row)} - {"further", "balance"}
    assert table[0].keys() == {"metric", *own}


def with_pictures(fid, score):
    """Three finished methods whose runs have two more figures each."""
    plan = comparisons.make(seeds=(0, 1, 2))
    plan = dataclasses.replace(
        plan, compared=("pictures/fid", "pictures/score", "pictures/never"), balanced=("pictures/fid", "pictures/score")
    )
    progress = comparisons.complete(plan)
    for key, one in progress.items():
        if key == COST:
            continue
        method = next(run.method for run in plan.known(progress) if run.key == key)
        place, seed = list(plan.methods).index(method), int(key[-1])
        more = {"pictures/fid": fid[place] + seed, "pictures/score": score[place]}
        progress[key] = dataclasses.replace(one, figures={**one.figures, **more})
    return plan, progress


def test_further_figures_have_columns_of_their_own():
    plan, progress = with_pictures([10.0, 20.0], [30.0, 31.0])
    row = rows(plan, progress)[0]
    assert row.further["pictures/fid"] == pytest.approx((11.0, 1.0))
    text = markdown(plan, progress)
    assert text.startswith("| method | test accuracy, % | pictures: fid | pictures: score | balance | learning rate |")
    assert "| 11 ± 1 | 30 ± 0 | 1 |" in text
    assert "how far fid is below the largest" in text
    table = list(csv.DictReader(io.StringIO(comma_separated(plan, progress))))
    assert float(table[1]["pictures/fid mean"]) == pytest.approx(21.0)
    assert float(table[0]["balance"]) == pytest.approx(1.0)


def test_a_plan_with_further_figures_survives_its_file():
    plan, _ = with_pictures([1.0, 2.0], [3.0, 4.0])
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    older = {key: value for key, value in plan.to_dict().items() if key not in {"compared", "balanced"}}
    assert Plan.from_dict(older).compared == ()


def test_the_balance_is_that_of_the_card():
    # Two of the figures of the paper's table for Stable Diffusion 1.5, with its extremes.
    pairs = [(165.72, 25.76), (134.96, 27.08), (133.69, 26.42), (151.58, 28.00)]
    found = balances(pairs)
    assert found[0] == pytest.approx(0.0)
    assert found[1] == pytest.approx((165.72 - 134.96) / (165.72 - 133.69) + (27.08 - 25.76) / (28.00 - 25.76))
    assert found[1] == pytest.approx(1.55, abs=0.005)


@pytest.mark.parametrize("pairs", [[(1.0, 2.0)], [(1.0, 2.0), (1.0, 3.0)], [(1.0, 2.0), (None, 3.0)]])
def test_there_is_no_balance_of_too_little(pairs):
    assert balances(pairs) == [None] * len(pairs)


def test_a_failed_method_says_why():
    plan, progress = three_seeds()
    for run in plan.grid("lora"):
        progress[run.key] = Progress("failed", error="no such site")
    text = markdown(plan, progress)

    assert "| lora | failed |" in text
    assert "- lora, lr 0.1, seed 0: no such site" in text
    assert "no such site" in page(manifest(plan, progress), "<svg/>")


def test_a_failed_seed_is_left_out_and_counted():
    plan, progress = three_seeds()
    progress["runs/lora/lr0.2/seed1"] = Progress("failed", error="killed")

    assert "| lora | 55.0 ± 7.1 (2 of 3) |" in markdown(plan, progress)


def test_an_unfinished_comparison_has_a_table():
    plan, _ = three_seeds()

    assert "| lora | not finished |" in markdown(plan, {})
    assert draw(plan, rows(plan, {}))[0].lstrip().startswith("<?xml")


def test_a_rate_at_the_edge_of_the_grid_is_marked():
    plan = comparisons.make()

    assert "| 0.3* |" in markdown(plan, comparisons.complete(plan))


def test_figures_on_validation_data_are_called_so():
    plan = comparisons.make()
    progress = {
        key: dataclasses.replace(one, figures={k: v for k, v in one.figures.items() if k != "test/accuracy"})
        for key, one in comparisons.complete(plan).items()
    }

    assert "validation accuracy" in markdown(plan, progress)
    assert "There is no test data" in markdown(plan, progress)


def test_losses_are_no_percentages():
    plan = comparisons.make(metric="loss", mode="min")
    figures = {"val/loss": 0.5, "test/loss": 0.1234567}

    progress = {run.key: Progress("done", figures=figures) for run in plan.due({})}
    progress |= {run.key: Progress("done", figures=figures) for run in plan.due(progress)}

    text = markdown(plan, progress)

    assert "| method | test loss |" in text
    assert "| lora | 0.1235 ± 0 |" in text


def crowded(count):
    methods = [f"method_{i}(argument={i})" for i in range(count)]
    plan = comparisons.make(methods=methods, lrs=[0.1])
    table = rows(plan, comparisons.complete(plan))
    return plan, [
        dataclasses.replace(row, mean=0.6 + 0.004 * (i % 4), deviation=0.01, trained=5000 * 1.15**i)
        for i, row in enumerate(table)
    ]


def test_labels_cover_neither_each_other_nor_a_point():
    plan, table = crowded(12)
    figure, labels = plot(plan, table)
    figure.draw_without_rendering()
    axes = figure.axes[0]

    boxes = [label.get_window_extent() for label in labels]
    points = [axes.transData.transform((row.trained, 100 * row.mean)) for row in table]

    assert [label.get_text() for label in labels] == [row.method for row in table]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert not [box for box in boxes for point in points if box.contains(*point)]
    assert isinstance(figure.canvas, FigureCanvasAgg)


def test_the_plot_is_the_same_each_time():
    plan, table = crowded(3)

    assert draw(plan, table)[0] == draw(plan, table)[0]


def test_the_page_needs_nothing_from_elsewhere_and_escapes_what_it_shows():
    plan, progress = three_seeds()
    text = page(manifest(plan, progress), draw(plan, rows(plan, progress))[0])

    assert "&lt;...&gt;" in text
    assert "<script" not in text
    assert 'src="' not in text
    assert "<td>lora</td>" in text
    assert '<td>70.0</td><td class="best">80.0</td><td>70.0</td>' in text
    assert "<?xml" not in text


def test_table_and_plot_are_remade_from_the_manifest_alone(tmp_path):
    plan, progress = three_seeds()
    publish(tmp_path / "a", manifest(plan, progress), complete=True)
    publish(tmp_path / "b", read_manifest(tmp_path / "a"), complete=True)

    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"manifest.json", "table.csv", "table.md", "table.html", "plot.svg", "plot.png"}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_manifest_holds_plan_choices_and_runs(tmp_path):
    plan, progress = three_seeds()
    write_manifest(tmp_path, manifest(plan, progress))
    document = json.loads((tmp_path / "manifest.json").read_text())

    assert Plan.from_dict(document["plan"]) == plan
    assert document["choices"]["lora"]["lr"] == 0.2
    assert [one["lr"] for one in document["choices"]["lora"]["chosen_by"]] == [0.1, 0.2, 0.3]
    assert {run["key"] for run in document["runs"]} == progress.keys()
    assert "test" not in json.dumps(document["choices"])


def test_where_a_run_lies_beside_it_its_own_figures_count(tmp_path):
    plan, progress = three_seeds()
    write_manifest(tmp_path, manifest(plan, progress))
    folder = tmp_path / "runs/lora/lr0.2/seed0"
    folder.mkdir(parents=True)
    figures = {**progress["runs/lora/lr0.2/seed0"].figures, "test/accuracy": 0.9}
    (folder / "metrics.json").write_text(json.dumps(figures))

    assert rows(plan, read_manifest(tmp_path).progress)[0].mean == pytest.approx((0.9 + 0.7 + 0.6) / 3)


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        (None, ConfigError, "holds no comparison"),
        ("{", FileFormatError, "is damaged"),
        ("[]", FileFormatError, "is damaged"),
        ('{"format_version": 1}', FileFormatError, "is damaged"),
        ('{"format_version": 2}', FileFormatError, "has format version 2"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path, text, error, sentence):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)

    with pytest.raises(error, match=sentence):
        read_manifest(tmp_path)
