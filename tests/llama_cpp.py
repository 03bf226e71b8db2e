"""A llama.cpp server for one test, on a free port of loopback, and the log-probabilities that it answers with.

``xllamacpp`` brings the engine as a wheel; a test that needs it begins with ``pytest.importorskip("xllamacpp")``. Keys and values of the
cache are fp32 and flash attention is off, so that what is left between it and transformers is rounding.
"""

import json
import urllib.request
from contextlib import contextmanager

import torch


@contextmanager
def serving(model, lora=None, scale=1.0, context=64, **params):
    """The URL of a server of the GGUF file ``model``, with the GGUF LoRA ``lora`` at ``scale``; it is gone afterwards.

    ``params`` are fields of ``xllamacpp.CommonParams``, such as ``model_alias="mine"``.
    """
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path = str(model)
    asked.hostnames, asked.port = ["127.0.0.1"], 0
    asked.n_ctx, asked.n_parallel, asked.warmup, asked.verbosity, asked.ui = context, 1, False, 0, False
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), scale)]
    for name, value in params.items():
        setattr(asked, name, value)
    server = xllamacpp.Server(asked)
    try:
        post(server.listening_address, "/tokenize", content="")  # one that stops before it has begun may never return
        yield server.listening_address
    finally:
        del server  # which stops it


def post(url, path, **body):
    """What the server answers to one JSON request, as a dictionary."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def next_log_probs(url, ids, vocabulary):
    """Log-probabilities ``[vocabulary]`` (fp32) of the token after the prompt ``ids``, before any sampler."""
    asked = {"n_predict": 1, "n_probs": vocabulary, "temperature": 0, "post_sampling_probs": False}
    asked["logit_bias"] = [
        ["a", 1e4]
    ]  # of the choice alone: after the end of the text or half a letter the server says nothing
    answer = post(url, "/completion", prompt=list(ids), cache_prompt=False, **asked)
    found = torch.full((vocabulary,), -torch.inf)
    for entry in answer["completion_probabilities"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


def distance(url, model, ids, first=3):
    """The largest difference between the server's log-probabilities and those of a transformers model, after each prefix of ``ids``.

    Prefixes begin at ``first`` tokens. The model computes in the dtype that it has.
    """
    with torch.no_grad():
        own = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    lengths = range(first, len(ids) + 1)
    return max((next_log_probs(url, ids[:n], own.shape[1]) - own[n - 1]).abs().max().item() for n in lengths)
