"""Kinds of tokenizers and of chat templates as models have them, built small and offline."""

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# What the models are trained on: enough of it that tokens join letters across words, line ends and the seams of templates.
CORPUS = [
    "user\nhi there, how are you?\n\nassistant\nyo! I am fine, thank you.\n\nsystem\nbe brief and kind\n",
    "What is 12 + 30? It is 42.  Two  spaces, ﬁne ﬀ ﬂow, Ｆｕｌｌ width, Grüße aus Köln, naïve café, 世界 你好 🙂👍🏽\n\n\n",
    " [INST] hello [/INST] well </s> <s> <think>\nlet me see\n</think>\n\nyes, indeed\n\n def f(x):\n    return x + 1\n\n",
] * 8
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<unk>", "<pad>"),
]


def _trained(model, trainer, **parts):
    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _bpe(alphabet=(), size=420, **parts):
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=list(alphabet), show_progress=False
    )
    return _trained(models.BPE(unk_token="<unk>", byte_fallback=not alphabet), trainer, **parts)


def _bytes(prefix=False, **parts):
    """GPT-2's, Llama-3's, Qwen's."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    parts = {"pre_tokenizer": split, "decoder": decoders.ByteLevel(), **parts}
    return _bpe(pre_tokenizers.ByteLevel.alphabet(), **parts)


def _metaspace(scheme, split):
    """Llama-2's and Mistral's: a space is a letter of its own, and one is put before the text, or before every piece of it."""
    space = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return _bpe(pre_tokenizer=space, decoder=decoders.Metaspace(prepend_scheme=scheme))


def _sentencepiece():
    """Llama-2's as it was first converted: the space is put by the normalizer, and there is no pre-tokenizer."""
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return _bpe(normalizer=normalizers.Sequence(steps))


def _unigram():
    """T5's and ALBERT's: NFKC, several spaces made one."""
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    return _trained(models.Unigram(), trainer, normalizer=normalizer, pre_tokenizer=pre_tokenizers.Metaspace())


def _wordpiece():
    """BERT's: lower case, accents and control signs taken away, spaces lost, [CLS] and [SEP] put around."""
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    return _trained(
        models.WordPiece(unk_token="<unk>"),
        trainer,
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        post_processor=None,
    )


def _around(backend, before="<s>", after=""):
    tokens = [name for name in (before, after) if name]
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join([*([before] if before else []), "$A", *([after] if after else [])]),
        special_tokens=[(name, backend.token_to_id(name)) for name in tokens],
    )
    return backend


def _stripping(backend):
    """Added tokens that swallow the space around them (as Phi-3's do), and one that is no special one."""
    backend.add_special_tokens([AddedToken(name, lstrip=True, rstrip=True) for name in ("<|im_end|>", "<|eot_id|>")])
    backend.add_tokens([AddedToken("</think>", lstrip=True, normalized=False), AddedToken("yes", single_word=True)])
    return backend


TOKENIZERS = {
    "bytes": _bytes,
    "bytes, a space before": lambda: _bytes(True),
    "bytes, trimmed offsets": lambda: _bytes(post_processor=processors.ByteLevel(trim_offsets=True)),
    "bytes, NFKC": lambda: _bytes(normalizer=normalizers.NFKC()),
    "bytes, lower case and stripped": lambda: _bytes(
        normalizer=normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip(), normalizers.StripAccents()])
    ),
    "bytes, digits one by one": lambda: _bytes(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    ),
    "bytes, start token put": lambda: _around(_bytes()),
    "bytes, greedy added tokens": lambda: _stripping(_bytes()),
    "metaspace, always": lambda: _metaspace("always", True),
    "metaspace, first": lambda: _around(_metaspace("first", False)),
    "metaspace, never": lambda: _metaspace("never", True),
    "sentencepiece": lambda: _around(_sentencepiece()),
    "sentencepiece, greedy added tokens": lambda: _stripping(_around(_sentencepiece(), "<s>", "</s>")),
    "unigram": lambda: _around(_unigram(), "", "</s>"),
    "wordpiece": lambda: _around(_wordpiece(), "<s>", "</s>"),
}


def tokenizer_of(kind):
    backend = TOKENIZERS[kind]()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    return made


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = '<<SYS>>\n' + messages[0]['content'] + "
    "'\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') }}"
    "{{ message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# Thinking is taken out of all answers before the last question, and the last answer always has some.
QWEN3 = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}"
    "{%- endfor %}{%- for m in messages %}{%- set content = m.content %}{%- if m.role == 'assistant' %}{%- set thought = '' %}"
    "{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last %}{{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + content }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
GENERATION = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}{% for call in message.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "Llama 3": LLAMA3,
    "Llama 2": LLAMA2,
    "Mistral": MISTRAL,
    "Gemma": GEMMA,
    "Qwen 3": QWEN3,
    "generation": GENERATION,
    "dated": DATED,
    "tools": TOOLS,
}
# The same templates with their answers marked: what transformers then says itself is what must be learnt.
MARKED = {
    "ChatML": GENERATION.replace("<|im_end|>\n{% endgeneration %}", "<|im_end|>{% endgeneration %}{{ '\n' }}"),
    "Llama 3": LLAMA3.replace(
        "{{ content }}",
        "{% if message['role'] == 'assistant' %}{{ content[:content.index('<|end_header_id|>') + 19] }}"
        "{% generation %}{{ content[content.index('<|end_header_id|>') + 19:] }}{% endgeneration %}{% else %}{{ content }}{% endif %}",
    ),
    "Llama 2": LLAMA2.replace(
        "{{ ' ' + message['content'].strip() + ' ' + eos_token }}",
        "{% generation %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endgeneration %}",
    ),
    "Mistral": MISTRAL.replace(
        "{{ message['content'] + eos_token }}",
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}",
    ),
    "Gemma": GEMMA.replace(
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}",
        "{{ '<start_of_turn>' + role + '\n' }}{% if role == 'model' %}{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}",
    ),
    "generation": GENERATION,
}
