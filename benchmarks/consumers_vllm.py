"""Bases and adapters in vLLM, in an environment that has it: ``consumers.py`` runs this and reads the lines that begin with ANSWER."""

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def answer(asked):
    """Log-probabilities of the next token, by token; or what vLLM said."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    sizes = {
        "max_model_len": 48,
        "max_num_seqs": 2,
        "max_logprobs": asked["vocabulary"],
        "kv_cache_memory_bytes": 64 << 20,
    }
    lora = {"enable_lora": True, "max_lora_rank": asked["max_lora_rank"]} if asked["adapter"] else {}
    model = LLM(model=asked["base"], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, **sizes, **lora)
    request = LoRARequest("mine", 1, asked["adapter"]) if asked["adapter"] else None
    wanted = SamplingParams(max_tokens=1, temperature=0, logprobs=asked["vocabulary"])
    (found,) = model.generate([{"prompt_token_ids": asked["ids"]}], wanted, lora_request=request, use_tqdm=False)
    answers = found.outputs[0].logprobs[0]
    return [answers[token].logprob for token in range(asked["vocabulary"])]


def main():
    for at, asked in enumerate(json.loads(sys.stdin.read())):
        try:
            said = answer(asked)
        except Exception as error:  # whatever it raises is its answer
            said = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        print(f"ANSWER {at} {json.dumps(said)}", flush=True)


if __name__ == "__main__":
    main()
