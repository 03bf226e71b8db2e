"""The programs that an adapter can be exported for, and what each is told: names alone, so that the command line needs no torch for them.

Next file: ``export/folders.py``.
"""

TARGETS = ("vllm", "llama.cpp", "mlx", "diffusers")
# With --base: a GGUF LoRA for the file that is served, and for Ollama the Modelfile beside it.
WITH_BASE = ("llama.cpp", "ollama")
PROGRAMS = (*TARGETS, "ollama")
# Parts of a pipeline of diffusers that can have an adapter.
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
RANKS_OF_VLLM = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def max_lora_rank(rank: int) -> int | None:
    """What vLLM's ``--max-lora-rank`` takes for an adapter of this rank; None where no number that it takes is large enough."""
    return next((taken for taken in RANKS_OF_VLLM if taken >= rank), None)


def vllm_rank_hint(rank: int) -> str:
    """The flag in words, or that vLLM takes no such rank."""
    if (taken := max_lora_rank(rank)) is None:
        return f"vLLM takes ranks up to {RANKS_OF_VLLM[-1]} only, and this one has {rank}; merge it instead"
    return f"start vLLM with --enable-lora --max-lora-rank {taken} or more"
