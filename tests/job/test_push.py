"""A run on the Hub: who may write is asked first, what goes up is whole, and the card says how it came about. The Hub is a fake."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from minilora import LoraConfig, inject, save_adapter
from minilora.cli import main
from minilora.errors import ConfigError, WriteError, for_terminal
from minilora.files.hub import check_upload
from minilora.job.finetune import fine_tune
from minilora.job.push import push_run
from tests import models
from tests.job.asked import SYSTEM

huggingface_hub = pytest.importorskip("huggingface_hub")

USER = {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": "write"}}}


class Hub:
    """What the fake remembers; ``fails`` is raised by the call of that name."""

    def __init__(self):
        self.user, self.fails, self.made, self.files, self.calls = USER, {}, [], {}, []

    def _called(self, name):
        self.calls.append(name)
        if name in self.fails:
            raise self.fails[name]

    def whoami(self):
        self._called("whoami")
        return self.user

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self._called("create_repo")
        assert exist_ok
        self.made.append((repo_id, private))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, repo_id, folder_path, commit_message, **options):
        self._called("upload_folder")
        self.files = {name: (Path(folder_path) / name).read_bytes() for name in os.listdir(folder_path)}
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/abc")


@pytest.fixture
def hub(monkeypatch):
    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: fake)
    return fake


@pytest.fixture(scope="module")
def run(make_job, tmp_path_factory):
    """A run with a system turn, held-out examples and answers."""
    out = tmp_path_factory.mktemp("run") / "out"
    outcome = fine_tune(make_job(out, steps=3, system=SYSTEM, eval_share=0.2), lambda line: None)
    return out, outcome


# ---- who may write


@pytest.mark.parametrize("repo", ["mine", "me/mine", "us/mine"])
def test_who_may_write_is_named(hub, repo):
    assert check_upload(repo) == "me" and hub.calls == ["whoami"]


@pytest.mark.parametrize(
    ("repo", "change", "said"),
    [
        ("them/mine", {}, "them/mine: you are me on the Hub, and not of them"),
        ("me/mine", {"user": USER | {"auth": {"accessToken": {"role": "read"}}}}, "the token of me may only read"),
        (
            "me/mine",
            {"fails": {"whoami": OSError("Token is required\nmore")}},
            "(Token is required); run hf auth login",
        ),
        ("me/mine", {"fails": {"whoami": ConnectionError("offline")}}, "the Hub does not say who you are (offline)"),
        ("a/b/c", {}, "'a/b/c': "),
        ("bad name", {}, "'bad name': "),
    ],
)
def test_who_may_not_is_told_in_a_line(hub, repo, change, said):
    vars(hub).update(change)
    with pytest.raises(ConfigError) as caught:
        check_upload(repo)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_that_may_not_be_pushed_does_not_begin(hub, make_job, tmp_path, monkeypatch):
    monkeypatch.setattr("minilora.job.finetune.looked_at", lambda *_: pytest.fail("the data was read"))
    hub.fails = {"whoami": ConnectionError("offline")}
    with pytest.raises(ConfigError, match="does not say who you are"):
        fine_tune(make_job(tmp_path / "run", push_to_hub="me/mine"), lambda line: None)
    assert not (tmp_path / "run").exists()


# ---- what goes up


def test_a_run_goes_up_at_its_end(hub, make_job, tmp_path):
    lines = []
    fine_tune(make_job(tmp_path / "run", steps=1, push_to_hub="mine", private=True), lines.append)
    assert lines[0] == "mine: me may write there" and hub.made == [("mine", True)]
    assert lines[-1] == f"{tmp_path / 'run'}: now at https://huggingface.co/me/mine"
    assert hub.calls == ["whoami", "create_repo", "upload_folder"]


def test_what_lies_there_is_the_adapter_with_its_card(hub, run):
    out, _ = run
    assert push_run(out, "me/mine") == "https://huggingface.co/me/mine" and hub.made == [("me/mine", None)]
    names = {"adapter_config.json", "adapter_model.safetensors", "minilora.json", "probe.json", "log.jsonl"}
    names |= {"README.md", "loss.png"}
    assert hub.files.keys() == names
    for name in names - {"README.md", "loss.png"}:
        assert hub.files[name] == (out / name).read_bytes()
    assert hub.files["loss.png"].startswith(b"\x89PNG")
    assert not (out / "README.md").exists()


def test_the_card_says_how_it_came_about(hub, run, tmp_path):
    out, outcome = run
    push_run(out, "me/mine")
    card, record = hub.files["README.md"].decode(), json.loads((out / "job.json").read_text())
    (data,) = record["data"]
    assert card.startswith("---\n") and "library_name: peft" in card and "- lora" in card
    assert (
        "# mine" in card
        and f"`d.jsonl`, SHA-256 `{data['sha256']}`" in card
        and str(Path(data["path"]).parent) not in card
    )
    assert SYSTEM in card and "packed to nf4, double quantization" in card
    evals = [r["eval_loss"] for r in outcome.records if "eval_loss" in r]
    assert f"| training loss | {outcome.losses[0]:.3f} | {outcome.losses[-1]:.3f} |" in card
    assert (
        f"| held-out loss | {evals[0]:.3f} | {evals[-1]:.3f} |" in card
        and "![Loss by optimizer step](loss.png)" in card
    )
    for pair in outcome.answers:
        assert all(for_terminal(text) in card for text in pair.values())
    assert "| lora_alpha | 7 |" in card and "| steps | 3 |" in card and "- torch " in card
    for program in ("minilora chat --model", "PeftModel.from_pretrained(", "vllm serve"):
        assert program in card
    assert "--adapter me/mine" in card and "mine=me/mine" in card


def test_a_base_of_this_disk_is_no_model_of_the_hub(hub, run, model_folder):
    push_run(run[0], "me/mine")
    card = hub.files["README.md"].decode()
    assert "base_model" not in card and "a local model" in card and "--model BASE" in card


def test_any_adapter_folder_can_go_up(hub, tmp_path):
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["first"], base_model_name_or_path="owner/base")
    save_adapter(inject(models.mlp(), config), tmp_path / "a")
    push_run(tmp_path / "a", "mine")
    card = hub.files["README.md"].decode()
    assert hub.files.keys() == {"adapter_config.json", "adapter_model.safetensors", "minilora.json", "README.md"}
    assert "base_model: owner/base" in card and "base_model:adapter:owner/base" in card
    assert "| lora_alpha | 12 |" in card and "Losses" not in card


def test_an_answer_is_text_in_the_card_whatever_it_holds(hub, run, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    for file in run[0].iterdir():
        if file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    record = json.loads((out / "job.json").read_text())
    record["answers"][0]["after"] = "```\n<script>alert(1)</script>\n# not a heading"
    (out / "job.json").write_text(json.dumps(record))
    push_run(out, "me/mine")
    card = hub.files["README.md"].decode()
    assert "````text\n```\n<script>alert(1)</script>\n# not a heading\n````" in card


# ---- the command


def test_the_command(hub, run, capsys):
    out, _ = run
    assert main(["push", str(out), "mine", "--private"]) == 0
    assert capsys.readouterr().out == f"{out}: now at https://huggingface.co/me/mine\n" and hub.made == [("mine", True)]


@pytest.mark.parametrize(
    ("fails", "folder", "code", "said"),
    [
        ({"upload_folder": OSError("no route\nto host")}, None, 1, "could not be uploaded (no route); "),
        ({"create_repo": OSError("403 Forbidden")}, None, 1, "mine: could not be uploaded (403 Forbidden)"),
        ({"whoami": OSError("no token")}, None, 2, "(no token)"),
        ({}, "/nowhere", 2, "/nowhere: no such folder; wanted a run"),
        ({}, "{empty}", 2, "adapter_config.json"),
    ],
)
def test_what_fails_is_one_line(hub, run, capsys, tmp_path, fails, folder, code, said):
    hub.fails = fails
    place = str(run[0]) if folder is None else folder.format(empty=tmp_path)
    assert main(["push", place, "mine"]) == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and said in line
    if code == 1:
        assert f"try again with minilora push {place} mine" in line
    assert not hub.files


def test_a_failed_upload_leaves_the_run_whole(hub, make_job, tmp_path):
    hub.fails = {"upload_folder": OSError("no route")}
    with pytest.raises(WriteError, match="is whole; try again with minilora push"):
        fine_tune(make_job(tmp_path / "run", steps=1, push_to_hub="mine"), lambda line: None)
    assert (tmp_path / "run" / "adapter_model.safetensors").exists() and (tmp_path / "run" / "report.html").exists()
