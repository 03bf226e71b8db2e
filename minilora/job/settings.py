"""What a fine-tuning job is asked to do: ``Job``. Nothing here needs torch or transformers.

The texts under ``Args``, one line a field, are also what ``minilora train --help`` shows. Next file: ``job/finetune.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from minilora.data.shapes.recognise import columns_of
from minilora.errors import ConfigError
from minilora.files import validate
from minilora.hf.dates import check_date
from minilora.hf.places import AUTO, check_place, check_quant
from minilora.lora.config import LoraConfig
from minilora.lora.targets import check_form
from minilora.training.settings import TrainConfig

__all__ = ["FROM_DATA", "TRACKER_NAMES", "Job"]

TRACKER_NAMES = ("tensorboard", "wandb", "trackio", "mlflow")  # ``job/trackers.py``
FROM_DATA = ("eva", "corda", "lora_ga")  # values of init_lora_weights that look at the examples
_MOST_THREADS = 4096


@dataclass(frozen=True)
class Job:
    """What to fine-tune, on what, and how.

    Args:
        model: hub id, local folder, GGUF file, or "smollm2".
        trust_remote_code: run the Python files that the model brings, with all your rights; without it no code of a model is run.
        data: JSONL, JSON, CSV, TSV, Parquet, Arrow or text files, folders, or data sets of the Hub; as FILE:0.5 half its examples count.
        eval_data: the same, to evaluate on instead of a share of ``data``.
        system: a system turn that is put before conversations that have none; "" puts none.
        columns: fields by what they are, as in prompt=question completion=answer; without it they are recognised by their names.
        out: run folder, made if it is not there.
        quant: format that the frozen linear layers are packed to, 4 bits (nf2, nf3, int8: 2, 3, 8); "none" leaves them dense.
        double_quant: keep the scales of packed weights in 8 bits (4.127 instead of 4.5 bits per weight with nf4).
        dtype: number format of the weights that are not packed; "auto" is bfloat16 on a GPU that has it, else float32.
        shard: under torchrun, each process keeps only its part of the frozen weights of the model's blocks.
        max_length: tokens that an example may have; what is longer becomes several examples.
        truncate: cut off and count what is longer than ``max_length`` tokens, instead of making several examples of it.
        eval_share: share of the examples that is held out for evaluation, in [0, 1).
        prompts: texts that are asked before and after training, for the report.
        max_new_tokens: tokens that an answer to a prompt may have.
        date: day that the chat template takes for today, as 2025-01-31; "" is the real today.
        resume: go on with the run that lies in ``out``, to the same bits.
        overwrite: remove the run that lies in ``out``, and begin anew.
        device: where the model goes: auto, cpu, cuda, cuda:N or mps; "auto" takes a CUDA GPU where one works, else the CPU.
        attention: implementation of attention in transformers: eager, sdpa, flash_attention_2 ...; "auto" leaves it to the model.
        variant: a registered variant of LoRA, such as vera, lora_fa or lora_xs; "" is the one that the settings of the adapter mean.
        init_from: folder of a saved adapter to go on training, with the settings that it was saved with; "" begins anew.
        allow_other_base: go on with ``init_from`` on another base model than it was trained on.
        start_examples: examples that a start from data (eva, corda, lora_ga) looks at, a whole number >= 1.
        threads: threads that torch computes with on the CPU; 0 leaves their number to it.
        dry_run: do all up to the first step and say what would come; nothing is trained, and nothing is written into ``out``.
        report_to: trackers that get the numbers of the run: tensorboard, wandb, trackio, mlflow; each is a package of its own.
        push_to_hub: repository of the Hugging Face Hub, OWNER/NAME or NAME, that the adapter and its card go to at the end; "" is none.
        private: whether that repository is made private, if it is not there yet.
        probe: keep in probe.json what base and adapted model say to a few prompts, by which a server can be verified.
        lora: what to adapt.
        training: how to train.

    Raises:
        ConfigError: a value that cannot be meant, by name.
    """

    model: str
    data: str | Sequence[str]
    out: str
    quant: str = "nf4"
    double_quant: bool = True
    dtype: str = AUTO
    max_length: int = 512
    eval_share: float = 0.1
    prompts: Sequence[str] = ()
    max_new_tokens: int = 48
    date: str = ""
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    device: str = AUTO
    attention: str = AUTO
    shard: bool = False
    variant: str = ""
    init_from: str = ""
    allow_other_base: bool = False
    start_examples: int = 64
    threads: int = 0
    dry_run: bool = False
    report_to: Sequence[str] = ()
    eval_data: str | Sequence[str] = ()
    system: str = ""
    columns: Sequence[str] = ()
    truncate: bool = False
    push_to_hub: str = ""
    private: bool = False
    probe: bool = True
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_quant(self.quant)
        check_place(self.device, self.dtype, self.attention)
        for name in ("model", "out"):
            validate.text(name, getattr(self, name))
        for name in ("data", "eval_data"):
            validate.one_or_several(name, getattr(self, name), 1 if name == "data" else 0)
        validate.whole_text("system", self.system)
        validate.texts("columns", self.columns)
        columns_of(self.columns)
        for name in ("max_length", "max_new_tokens"):
            validate.whole(name, getattr(self, name), 2)
        for name in (
            "double_quant",
            "resume",
            "overwrite",
            "trust_remote_code",
            "shard",
            "allow_other_base",
            "dry_run",
            "private",
            "truncate",
            "probe",
        ):
            validate.flag(name, getattr(self, name))
        if self.dry_run and self.resume:
            raise ConfigError(
                "dry_run: looks at a run from its first step, and not at one that lies there; leave resume out"
            )
        validate.whole("start_examples", self.start_examples, 1)
        for name in ("variant", "init_from", "push_to_hub"):
            if getattr(self, name) != "":
                validate.text(name, getattr(self, name))
        validate.number("eval_share", self.eval_share, 0, 1)
        validate.whole("threads", self.threads, 0, _MOST_THREADS)
        validate.texts("prompts", self.prompts)
        validate.texts("report_to", self.report_to)
        for name in self.report_to:
            if name not in TRACKER_NAMES:
                raise ConfigError(f"report_to={validate.shown(name)}: wanted some of {', '.join(TRACKER_NAMES)}")
        check_date(self.date)
        for name, kind in (("lora", LoraConfig), ("training", TrainConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name}={validate.shown(getattr(self, name))}: wanted a {kind.__name__}")
        for name in ("target_modules", "exclude_modules"):
            check_form(getattr(self.lora, name), name)
