"""``minilora doctor`` on a run and its checkpoints: what the run remembers is compared, too."""

import json

from minilora.cli import main
from minilora.job.finetune import fine_tune


def test_a_run_and_its_template(make_job, tmp_path, capsys):
    out = tmp_path / "run"
    fine_tune(make_job(out, steps=4, training={"save_every": 2}), lambda line: None)
    assert main(["doctor", str(out)]) == 0
    said = capsys.readouterr().out
    assert "fault:" not in said and "warning:" not in said
    assert main(["doctor", str(out / "checkpoint-2")]) == 0
    record = json.loads((out / "job.json").read_text())
    (out / "job.json").write_text(json.dumps(record | {"template": "0" * 64}))
    assert main(["doctor", str(out)]) == 0
    assert "is not the one that the adapter was trained with" in capsys.readouterr().out
    (out / "job.json").write_text("{")
    assert main(["doctor", str(out)]) == 0
    assert "warning: " in (said := capsys.readouterr().out) and "job.json: damaged" in said
