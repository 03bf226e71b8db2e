"""The page of a sweep: from its table alone, whole and safe, and honest about what diverged, was refused or has not ended."""

import math
import re
import sys

import pytest

from minilora.errors import CheckpointError, ConfigError, MissingPackageError
from minilora.lab import Result, Trial, sweep, trials_of
from minilora.lab.sweeps.table import as_csv
from minilora.lab.verdicts.groups import families_of, read_table
from minilora.lab.verdicts.report import sweep_page, sweep_report, sweep_text
from tests.lab.test_sweep import EXAMPLES, HELD_OUT, base, lora, plan, quiet
from tests.lab.test_verdict import row, seeds, table
from tests.report.test_page import parse, svgs

WILD = Trial(lora(init_lora_weights=False, lora_alpha=10**30), plan(steps=4, lr=0.9))


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def made(rates=(0.001, 0.01), **fields):
    losses = {1: 2.4, 4: 2.1, 8: 2.0}
    return table(
        *(
            line
            for r, low in losses.items()
            for lr in rates
            for line in seeds([low + lr, low + lr + 0.05], r=r, lr=lr, **fields)
        )
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A real sweep of two ranks, two rates and two seeds, and of one trial that diverges."""
    folder = tmp_path_factory.mktemp("sweep")
    trials = trials_of("r=2,7 lr=1e-3,5e-3", seeds=2, lora=lora(), train=plan(steps=4))

    def measure(model, result):
        return {"forgetting": result.trial.lora.r / 10 + result.trial.train.seed / 100}

    trials.append(WILD)
    return folder, sweep(base(), EXAMPLES, trials, evaluation=HELD_OUT, folder=folder, measure=measure, say=quiet)


def test_from_the_table_alone_as_from_the_results(swept):
    folder, results = swept
    path = sweep_report(folder, results)
    from_results = path.read_bytes()
    assert path == folder / "report.html" and sweep_report(folder).read_bytes() == from_results
    best = families_of(read_table(as_csv(results)))[0].best
    own = [result for result in results if result.trial.lora.r == 2 and result.trial.train.lr == best.rate]
    assert best.losses == {result.trial.train.seed: result.eval_loss for result in own}
    assert best.measured("forgetting").mean == pytest.approx(0.205)


def test_the_page_is_whole_and_needs_nothing_else(swept):
    pytest.importorskip("matplotlib")
    page = sweep_page(read_table(as_csv(swept[1])))
    parse(page)
    assert len(svgs(page)) == 6  # three, and each again for a phone
    assert headings(page) == [
        *("Verdict", "Loss by learning rate", "How near, and what was forgotten", "All that was tried"),
        *("What ran together", "Trials that did not end"),
    ]
    assert "<h1>A sweep of 9 trials</h1>" in page and "3 families, 3 learning rates, 2 seeds" in page
    assert "9 of 9 trials went through the model together" in page
    assert "<td>diverged: the first step has no finite gradient" in page
    assert not re.search(r'(src|href)="', page) and "http" not in page.replace("http-equiv", "")


def test_figures_as_files_only_if_asked(swept):
    pytest.importorskip("matplotlib")
    folder, _ = swept
    assert not list(folder.glob("sweep-*"))
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        sweep_report(folder, figures=kind)
        files = sorted(folder.glob(f"sweep-*.{kind}"))
        assert [file.stem for file in files] == ["sweep-frontier", "sweep-rates", "sweep-regret"]
        assert all(file.read_bytes().startswith(start) for file in files)
    with pytest.raises(ConfigError, match="figures='bmp'; wanted one of png, svg, pdf, or nothing"):
        sweep_report(folder, figures="bmp")
    sweep(base(), EXAMPLES, [Trial(lora(), plan(steps=1))], folder=folder, overwrite=True, say=quiet)
    assert not list(folder.glob("sweep-*")) and not (folder / "report.html").exists()
    sweep_report(folder)


def test_without_matplotlib_the_page_has_the_rest_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = sweep_page(made(forgetting=0.1))
    assert (
        headings(page) == ["Verdict", "All that was tried", "What ran together"] and "No pictures: matplotlib" in page
    )
    (tmp_path / "runs.csv").write_text(as_csv([result()]))
    with pytest.raises(MissingPackageError):
        sweep_report(tmp_path, figures="png")
    assert not (tmp_path / "report.html").exists()


def test_the_terminal_has_the_lowest_loss_first():
    lines = sweep_text(made()).splitlines()
    assert [line.split()[:3] for line in lines[1:7]] == [
        *(["r=8", "0.001", "2.026"], ["r=8", "0.01", "2.035"], ["r=4", "0.001", "2.126"]),
        *(["r=4", "0.01", "2.135"], ["r=1", "0.001", "2.426"], ["r=1", "0.01", "2.435"]),
    ]
    assert "1.708 to 2.344" in lines[1] and lines[8].startswith("The best is r=8 at lr=0.001: evaluation loss 2.026")
    assert lines[2].split()[6:10] == ["+0.0090,", "0.0090", "to", "0.0090"]


@pytest.mark.parametrize(
    ("outcomes", "pictures"),
    [
        (made(rates=[0.01]), 4),
        (table(row()), 2),
        (table(*seeds([None, None])), 0),
        (table(*seeds([2.0, None], lr=0.1), *seeds([2.0, 2.1])), 4),
        (table(row(ended="has not ended")), 0),
        (table(*(line for r in range(12) for line in seeds([2.0, 2.1], r=r, forgetting=r / 10))), 6),
    ],
    ids=["one rate", "one trial", "all diverged", "one diverged", "goes", "twelve"],
)
def test_pages_of_any_sweep(outcomes, pictures):
    pytest.importorskip("matplotlib")
    page = sweep_page(outcomes)
    parse(page)
    assert len(svgs(page)) == pictures and "nan" not in re.sub(r"step 4: the loss is nan|data.*?>", "", page).lower()
    assert sweep_text(outcomes)


def test_what_ran_alone_and_what_did_not_run():
    rows = [row(), row(r=8, together="no: it trains more"), row(r=9, loss=None, ended="no layer <b> is called so")]
    page = sweep_page(table(*rows))
    assert "2 of 3 trials went through the model together" in page and "<td>it trains more</td>" in page
    assert "refused: no layer &lt;b&gt; is called so" in page and "Did not run: t9-0.01-0" in page


# ---- the table that it is drawn from


def result(evaluations=((0, 3.0), (4, 2.0)), finished=True, **fields):
    records = [{"step": step, "loss": 2.5} for step in range(1, 5)]
    records += [{"step": step, "eval_loss": loss} for step, loss in evaluations]
    return Result(Trial(lora(), plan(steps=4, **fields)), "t1", records=records, finished=finished)


@pytest.mark.parametrize(
    ("evaluations", "fields", "loss"),
    [
        ([(0, 1.0), (4, 2.0)], {}, 2.0),
        ([(0, 1.0), (2, 1.5), (4, None)], {}, None),  # at its end it has no finite loss
        ([(0, 1.0), (2, 1.5), (4, None)], {"keep_best": True, "eval_every": 2}, 1.5),
        ([(0, 1.0), (2, 1.5), (4, 1.7)], {"keep_best": True, "eval_every": 2}, 1.5),  # nothing is kept of step 0
        ([(0, 1.0)], {}, None),
    ],
)
def test_the_loss_that_counts(evaluations, fields, loss):
    assert result(evaluations, **fields).eval_loss == loss


def test_a_trial_that_goes_has_no_loss_yet():
    (trial,) = read_table(as_csv([result(finished=False)])).trials
    assert trial.fate == "goes" and trial.loss is None
    assert read_table(as_csv([result()])).trials[0].loss == 2.0


def test_steps_that_differ_are_a_setting():
    results = [result() for _ in range(2)]
    results[1].trial = Trial(lora(), plan(steps=9))
    assert [family.name for family in families_of(read_table(as_csv(results)))] == ["steps=4", "steps=9"]


def test_an_interrupted_sweep_says_that_it_goes(tmp_path):
    def stop(name, record):
        if record["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(
            base(),
            EXAMPLES,
            [Trial(lora(), plan(steps=4))],
            folder=tmp_path,
            evaluation=HELD_OUT,
            save_every=1,
            watch=stop,
            say=quiet,
        )
    assert "1 of 1 trials has not ended, so this may change." in sweep_report(tmp_path).read_text()
    sweep(
        base(), EXAMPLES, [Trial(lora(), plan(steps=4))], folder=tmp_path, evaluation=HELD_OUT, resume=True, say=quiet
    )
    assert "has not ended" not in sweep_report(tmp_path).read_text()
    sweep(
        base(), EXAMPLES, [Trial(lora(), plan(steps=4))], folder=tmp_path, evaluation=HELD_OUT, resume=True, say=quiet
    )
    assert "has not ended" not in (tmp_path / "runs.csv").read_text()


def test_folders_without_a_table(tmp_path):
    with pytest.raises(CheckpointError, match=r"runs\.csv"):
        sweep_report(tmp_path)
    (tmp_path / "runs.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="damaged"):
        sweep_report(tmp_path)
    (tmp_path / "runs.csv").write_text("a,b\n")
    with pytest.raises(CheckpointError, match="no table of a sweep"):
        sweep_report(tmp_path)
    assert not (tmp_path / "report.html").exists() and math.isfinite(result().eval_loss)
