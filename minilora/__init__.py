"""minilora: LoRA and QLoRA from scratch in PyTorch. The public names; everything else is one import deeper.

A name is imported when it is asked for, torch with it. ``__init__.pyi`` has the same names for mypy and editors.
"""

from minilora.lazy import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "minilora.errors": ("MiniLoraError",),
        "minilora.job.finetune": ("fine_tune",),
        "minilora.job.settings": ("Job",),
        "minilora.linear.packed": ("QuantLinear",),
        "minilora.lora.adapter": ("Adapter",),
        "minilora.lora.config": ("LoraConfig",),
        "minilora.lora.inject": ("inject",),
        "minilora.lora.layer": ("LoRALinear",),
        "minilora.lora.tying": ("untie",),
        "minilora.lora.variants": ("register",),  # from there, so that our variants have their names before yours
        "minilora.many.adapted": ("delete_adapter", "set_adapter", "unload"),
        "minilora.many.batched": ("batch_adapters",),
        "minilora.many.combine": ("add_weighted_adapter",),
        "minilora.many.hotswap": ("hotswap_adapter",),
        "minilora.many.merging": ("MergeReport", "merge", "unmerge"),
        "minilora.peft": (
            "AutoPeftModelForCausalLM",  # the one that needs transformers
            "PeftConfig",
            "PeftModel",
            "PeftModelForCausalLM",
            "PeftModelForSequenceClassification",
            "TaskType",
            "get_peft_model",
            "get_peft_model_state_dict",
            "inject_adapter_in_model",
            "set_peft_model_state_dict",
        ),
        "minilora.qlora.calibrate": ("calibrate",),
        "minilora.qlora.kbit": ("prepare_model_for_kbit_training",),
        "minilora.qlora.quantize_model": ("quantize_model",),
        "minilora.quant.blockwise": ("quantize",),
        "minilora.quant.codebooks": ("Codebook", "register_codebook"),
        "minilora.quant.config": ("QuantConfig",),
        "minilora.quant.quantized": ("QuantizedTensor",),
        "minilora.export.folders": ("export_adapter",),
        "minilora.store.load": ("load_adapter", "save_adapter"),
        "minilora.training.check": ("check_adapter",),
        "minilora.training.optim": ("lora_plus_groups",),
        "minilora.training.optim_adamw8": ("AdamW8bit",),
    },
)
