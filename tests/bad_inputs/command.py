"""Rows about the command line: each verb with a mistake ends with code 2 and one line; nothing is written."""

# ruff: noqa: E501  (a row is one line)

GEN = ["generate", "--model", "{model}"]
MERGE = ["merge", "--model", "{model}", "--out", "{out}"]
PACK = ["quantize", "--model", "{model}", "--out", "{out}"]
TRAIN = ["train", "--model", "{model}", "--data", "{data}", "--out", "{out}"]
EXPORT = ["export", "--out", "{out}", "--adapter"]
PLAN = ["plan", "--model", "{model}", "--no-measure"]
BENCH = ["bench", "--model", "{model}"]
HELP = "--help"

# (words, what the line names, what it offers); {model}, {data}, {adapter} are good, {empty} is an empty folder, {file} a text file
LINES = [
    (["tarin"], "'tarin'", "'train'"),
    (["--vresion"], "--vresion", "'--version'"),
    (["-x"], "-x: unknown flag", HELP),
    *(([verb, "--modle", "m"], "--modle: unknown flag", f"{verb} --help") for verb in ("demo", "train", "generate", "plan", "bench", "quantize", "merge", "export")),
    *(([verb, "--mod", "m"], "--mod: unknown flag", "'--model'") for verb in ("train", "generate", "plan", "bench", "quantize", "merge", "export")),
    *(([verb, "--seed", "x"], "--seed: 'x' is no whole number", "such as 8") for verb in ("demo", "train", "generate", "bench")),
    *(([*words, "--quant"], "--quant: its value is missing", "--quant VALUE") for words in (TRAIN, GEN, PLAN, BENCH)),
    *(([*words, "--dtype", "float8"], "dtype='float8'", "bfloat16") for words in (TRAIN, PLAN, BENCH, PACK, [*MERGE, "--adapter", "{adapter}"])),
    *(([*words, "--device", "tpu"], "device='tpu'", "cuda:N") for words in (TRAIN, PLAN, BENCH, PACK, [*GEN, "hi"], [*MERGE, "--adapter", "{adapter}"])),
    *(([*words, "--device", "cuda:99"], "device='cuda:99'", "; wanted ") for words in (TRAIN, PLAN, BENCH, PACK, [*GEN, "hi"], [*MERGE, "--adapter", "{adapter}"])),
    *(([*words, "--attention", "flash"], "attention='flash'", "sdpa") for words in (TRAIN, PLAN, BENCH, [*GEN, "hi"])),
    *(([*words, "--model", "/nowhere"], "'/nowhere'", "wanted a hub id") for words in ([*GEN, "hi"], [*MERGE, "--adapter", "{adapter}"], PACK, PLAN, TRAIN, ["bench", "--data", "random"])),
    *(([*words, "--model", "{empty}"], "{empty}", "wanted a hub id") for words in ([*GEN, "hi"], PACK, PLAN, TRAIN)),
    *(([*words, "--model", "{file}"], "{file}", "wanted a hub id") for words in ([*GEN, "hi"], PLAN)),
    *(([*words, "--model", "no/such-model"], "no/such-model", "wanted a hub id") for words in ([*GEN, "hi"], PLAN)),
    *(([*words, "--model="], "model", "wanted") for words in (PLAN, BENCH, [*GEN, "hi"])),
    *(([*words, "--target-modules", "q_porj", "v_proj"], "'q_porj'", "'q_proj'") for words in (TRAIN, PLAN)),
    *(([*words, "--target-modules", "(q_proj"], "'(q_proj'", "not a regular expression") for words in (TRAIN, PLAN, BENCH)),
    *(([*words, "--r", "0"], "r=0", "set r=8") for words in (TRAIN, PLAN, BENCH)),
    *(([*words, "--model", place], place, "wanted a hub id") for place in ("{untyped}", "{strange}", "{half}", "{textual}") for words in ([*GEN, "hi"], PLAN, TRAIN, PACK)),
    *(([*words, "--model", place], place, "wanted a hub id") for place in ("{cut}", "{wordless}", "{wide}") for words in ([*GEN, "hi"], TRAIN, PACK)),
    # demo
    (["demo", "--steps", "0", "--out", "{out}"], "steps=0", "whole number >= 1"),
    (["demo", "--seed", "-1", "--out", "{out}"], "seed=-1", "whole number >= 0"),
    (["demo", "--out", "{file}"], "{file}", "wanted a folder"),
    (["demo", "now"], "'now'", HELP),
    # train
    (["train", "--data", "d", "--out", "o"], "--model is missing", "as a flag"),
    (["train", "--model", "m", "--out", "o"], "--data is missing", "as a flag"),
    (["train", "--model", "m", "--data", "d"], "--out is missing", "as a flag"),
    ([*TRAIN, "--config", "{empty}/job.toml"], "job.toml: cannot be read", "check --config"),
    ([*TRAIN, "--config", "{file}"], "{file}: not TOML", "wanted lines such as"),
    ([*TRAIN, "--config", "{toml}"], "unknown key 'stepz'", "'steps'"),
    ([*TRAIN, "--config", "{toml2}"], "steps = 'many'", "wanted a whole number"),
    ([*TRAIN, "--data", "{empty}/d.jsonl"], "d.jsonl: no such file", "wanted JSONL"),
    ([*TRAIN, "--data", "{file}"], "{file}:1:1: not JSON", "one object a line"),
    ([*TRAIN, "--out", "{file}"], "{file}", "wanted a folder"),
    ([*TRAIN, "--out", "{run}"], "holds a run already", "--resume"),
    ([*TRAIN, "--resume", "--overwrite"], "resume and overwrite", "wanted one"),
    ([*TRAIN, "--resume", "--out", "{adapter}"], "no checkpoint", "--overwrite"),
    ([*TRAIN, "--max-length", "2", "--truncate"], "max_length=2", "raise it"),
    ([*TRAIN, "--lr", "1"], "lr=1.0", "wanted a number in"),
    ([*TRAIN, "--steps", "1e3"], "--steps: '1e3'", "whole number"),
    ([*TRAIN, "--lora-dropout", "much"], "--lora-dropout: 'much'", "such as 0.5"),
    ([*TRAIN, "--bias", "some"], "bias='some'", "'lora_only'"),
    ([*TRAIN, "--quant", "nf5"], "quant='nf5'", "wanted one of none"),
    ([*TRAIN, "--eval-share", "1"], "eval_share=1.0", "wanted a number in"),
    ([*TRAIN, "--modules-to-save", "haed"], "'haed'", "closest names"),
    ([*TRAIN, "--exclude-modules", "q_porj"], "'q_porj'", "'q_proj'"),
    ([*TRAIN, "--no-resume=1"], "--no-resume: takes no value", "write --no-resume alone"),
    ([*TRAIN, "more"], "'more' belongs to no flag", HELP),
    # generate
    (["generate", "hi"], "--model: missing", HELP),
    (GEN, "prompt: missing", HELP),
    ([*GEN, "hi", "--adapter", "{empty}"], "{empty}", "adapter_config.json"),
    ([*GEN, "hi", "--adapter", "/nowhere"], "/nowhere: no such folder", "wanted one with"),
    ([*GEN, "hi", "--adapter", "{foreign}"], "'first'", "closest names"),
    ([*GEN, "hi", "--adapter", "{adapter}", "--expect-sha256", "12"], "expect_sha256='12'", "64 hexadecimal digits"),
    ([*GEN, "hi", "--adapter", "{adapter}", "--expect-sha256", "0" * 64], "expected 0000", "another adapter"),
    ([*GEN, "hi", "--quant", "int3"], "'int3'", "wanted one of none"),
    ([*GEN, "hi", "--max-new-tokens", "0"], "--max-new-tokens=0", "whole number >= 1"),
    ([*GEN, "hi", "--temperature", "-1"], "--temperature=-1", "0 is greedy"),
    ([*GEN, "hi", "--temperature", "nan"], "--temperature=nan", "0 is greedy"),
    ([*GEN, "hi", "--seed", "99999999999999999999"], "--seed=99999999999999999999", "whole number"),
    ([*GEN, "hi", "--seed", "-1"], "--seed=-1", "whole number"),
    # plan, bench
    ([*PLAN, "--batch", "0"], "batch=0", "whole number >= 1"),
    ([*PLAN, "--seq", "1"], "seq=1", "whole number >= 2"),
    ([*PLAN, "--seq", "9999"], "seq=9999", "lower --seq"),
    ([*PLAN, "--threads", "-2"], "threads=-2", "whole number >= 0"),
    ([*PLAN, "--lora-dropout", "2"], "lora_dropout=2.0", "0.05"),
    ([*PLAN, "--html", "{empty}"], "{empty}", "wanted a file"),
    ([*BENCH, "--steps", "0"], "steps=0", "whole number >= 1"),
    ([*BENCH, "--lr", "0"], "lr=0.0", "wanted a number in"),
    ([*BENCH, "--data", "{empty}/d.jsonl"], "d.jsonl: no such file", "wanted JSONL"),
    ([*BENCH, "--html", "{empty}"], "{empty}", "wanted a file"),
    # quantize
    (["quantize", "--model", "{model}"], "--out: missing", HELP),
    ([*PACK, "--format", "nf3"], "--format='nf3'", "wanted nf4 or fp4"),
    ([*PACK, "--blocksize", "48"], "blocksize=48", "64 is usual"),
    ([*PACK, "--blocksize", "32"], "blocksize=32", "64 to 4096"),
    ([*PACK, "--scale", "max"], "scale='max'", "'weighted'"),
    ([*PACK, "--scale", "weighted"], "scale='weighted'", "--calibration FILE.jsonl"),
    ([*PACK, "--scale", "weighted", "--calibration", "{empty}/d"], "d: no such file", "wanted JSONL"),
    ([*PACK, "--out", "{run}"], "{run}: exists", "choose another --out"),
    ([*PACK, "--out", "{file}"], "{file}: exists", "choose another --out"),
    # merge, export
    (["merge", "--model", "m", "--out", "o"], "--adapter: missing", HELP),
    ([*MERGE, "--adapter", "{empty}"], "{empty}", "adapter_config.json"),
    ([*MERGE, "--adapter", "{foreign}"], "'first'", "closest names"),
    ([*MERGE, "--adapter", "{adapter}", "--out", "{run}"], "{run}: exists", "choose another --out"),
    ([*EXPORT, "{adapter}"], "--for: missing", HELP),
    ([*EXPORT, "{adapter}", "--for", "ollama"], "--for: 'ollama'", "wanted one of vllm"),
    ([*EXPORT, "{empty}", "--for", "vllm"], "{empty}", "adapter_config.json"),
    ([*EXPORT, "/nowhere", "--for", "vllm"], "/nowhere: no such folder", "wanted one with"),
    ([*EXPORT, "{adapter}", "--for", "mlx", "--expect-sha256", "0" * 64], "expected 0000", "another adapter"),
    ([*EXPORT, "{foreign}", "--for", "mlx"], "first: mlx adapts", "leave this one out"),
    ([*EXPORT, "{adapter}", "--for", "vllm", "--model", "{empty}"], "{empty}", "wanted a hub id"),
]  # fmt: skip
