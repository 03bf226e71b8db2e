"""What is no answer at all gets a sentence too: a syntax error, a missing function, another signature, an error, a changed input."""

import pytest

from minilora.errors import ConfigError
from minilora.learn.answer import RIGHT, WRONG
from minilora.learn.course import LESSONS, lesson
from minilora.learn.grade import grades

PACK = "def pack(codes):\n    "


def first(tmp_path, text, name, number=5):
    path = tmp_path / "lesson_05.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return next(grade for grade in grades(path, number) if grade.name == name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = (\n", "line 1: is no Python ('(' was never closed)"),
        ("def f():\nreturn 1\n", "line 2: is no Python (expected an indented block after function definition on line 1)"),
        ("import torch\nimport no_such\n", "raises ModuleNotFoundError: No module named 'no_such', line 2 of lesson_05.py"),
        ("exit()\n", "ends Python (SystemExit, line 1 of lesson_05.py); wanted a value"),
        ("a\0b", "is no Python (source code string cannot contain null bytes)"),
        (b"\xff\xfe", "cannot be read ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_run_is_told(tmp_path, text, said):
    grade = first(tmp_path, text, "lesson_05.py")
    assert grade.state == WRONG and grade.why == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no function pack in the file; wanted def pack(codes)"),
        ("pack = 3\n", "pack is an int; wanted def pack(codes)"),
        ("def pack(a, b):\n    return a\n", "pack takes (a, b); wanted (codes)"),
        ("def pack():\n    return 1\n", "pack takes (); wanted (codes)"),
        (PACK + "return 1 / 0\n", "pack(codes=[1, 2] (uint8)): raises ZeroDivisionError: division by zero, line 2 of lesson_05.py"),
        (PACK + "return {}[9]\n", "pack(codes=[1, 2] (uint8)): raises KeyError: 9, line 2 of lesson_05.py"),
        (PACK + "exit(3)\n", "pack(codes=[1, 2] (uint8)): ends Python (SystemExit, line 2 of lesson_05.py); wanted a value"),
        (
            PACK + "return pack(codes)\n",
            "pack(codes=[1, 2] (uint8)): raises RecursionError: maximum recursion depth exceeded, line 2 of lesson_05.py",
        ),
        (PACK + "return None\n", "pack(codes=[1, 2] (uint8)): returned nothing (is there a return?)"),
        (PACK + "return codes\n", "pack(codes=[1, 2] (uint8)): got shape [2], wanted [1]"),
        (PACK + "return codes[:1].int()\n", "pack(codes=[1, 2] (uint8)): got dtype int32, wanted uint8"),
        (PACK + "return codes[:1]\n", "pack(codes=[1, 2] (uint8)): got [1], wanted [18]"),
        (
            PACK + "codes.mul_(16)\n    return codes[:1] + codes[1:] // 16\n",
            "pack(codes=[1, 2] (uint8)): codes is changed by the call; it was [1, 2] (uint8) and is [16, 32] (uint8): work on a copy",
        ),
    ],
)  # fmt: skip
def test_a_function_that_does_not_answer_is_told(tmp_path, text, said):
    grade = first(tmp_path, text, "pack")
    assert (grade.state, grade.why) == (WRONG, said)


def test_of_a_large_tensor_the_first_wrong_entry_is_told(tmp_path):
    right = lesson(5).solution
    wrong = right.replace(
        "return pairs[:, 0] * 16 + pairs[:, 1]",
        "out = pairs[:, 0] * 16 + pairs[:, 1]\n    out[7:9] = 0\n    return out",
    )
    assert wrong != right
    assert first(tmp_path, wrong, "pack").why.endswith("2 of 501 differ")
    assert "pack(codes=uint8 [1001]): entry [7] is 0, wanted " in first(tmp_path, wrong, "pack").why


@pytest.mark.parametrize(
    ("number", "text", "said"),
    [
        (5, "def absmax(a, size):\n    return a.view(-1, size).abs().max(1)\n", "got a pair (values, indices); wanted a tensor [2]"),
        (1, "def numbers_saved(out_features, in_features, r):\n    return 1.5\n", "got 1.5, a float; wanted 14, an int"),
        (2, "def start(a, b, c):\n    return torch.zeros(c, a), torch.zeros(b, c)\n", "A is zero, so B gets no gradient; wanted rows"),
        (2, "def start(a, b, c):\n    return torch.full((c, a), torch.nan), torch.zeros(b, c)\n", "A has a value that is not finite"),
        (2, "def start(a, b, c):\n    return torch.ones(c, a), torch.zeros(b, c)\n", "two calls return the same A; wanted"),
        (2, "def start(a, b, c):\n    return 3\n", "got an int; wanted a tuple (A, B)"),
        (2, "def gradients(x, g, A, B, lora_alpha):\n    return A + 1, B\n", "the gradient of A: got [[2, 1]], wanted "),
        (2, "def gradients(x, g, A, B, lora_alpha):\n    return g @ B * lora_alpha * x, B\n", "the gradient of B: got "),
        (2, "def gradients(x, g, A, B, lora_alpha):\n    A + B.T\n", "raises RuntimeError"),
        (2, "def gradients(x, g, A, B, lora_alpha):\n    A * x\n", "returned nothing (is there a return?)"),
        (11, "def keeps_the_law(update, delta, n):\n    return False\n", "got False, wanted True; the two differ by rounding alone"),
        (11, "def keeps_the_law(update, delta, n):\n    return None\n", "returned nothing (is there a return?)"),
        (11, "def keeps_the_law(update, delta, n):\n    return torch.tensor(True)\n", "got True (bool), a Tensor; wanted True, a bool"),
    ],
)  # fmt: skip
def test_a_sentence_says_what_it_is_about(tmp_path, number, text, said):
    name = text.partition("(")[0].removeprefix("def ")
    grade = first(tmp_path, f"import torch\n{text}", name, number)
    assert grade.state == WRONG and f"): {said}" in grade.why, grade.why


@pytest.mark.parametrize(
    "inputs", ["-100 * torch.ones(1, n)", "100 * torch.randn(1, n)", "100 * torch.rand(50, n)", "100 * torch.eye(n)"]
)
def test_one_kind_of_input_does_not_show_that_the_law_holds(tmp_path, inputs):
    text = (
        f"import torch\n\ndef keeps_the_law(update, delta_weight, n):\n    x = {inputs}\n"
        "    return torch.allclose(update(x), x @ delta_weight().T, rtol=1e-4, atol=1e-4)\n"
    )
    assert "got True, wanted False" in first(tmp_path, text, "keeps_the_law", number=11).why


@pytest.mark.parametrize(
    "output",
    [
        "F.linear(x, W) + s * F.linear(F.linear(x, A), B)",
        "(W @ x.T + s * (B @ (A @ x.T))).T",
        "torch.einsum('ti,oi->to', x, W) + s * torch.einsum('tr,or->to', torch.einsum('ti,ri->tr', x, A), B)",
        "torch.stack([W @ each + s * (B @ (A @ each)) for each in x])",
        "(x.double() @ W.double().T + s * (x.double() @ A.double().T @ B.double().T)).float()",
        "x @ W.T.contiguous() + s * (x @ A.T.contiguous() @ B.T.contiguous())",
        "torch.addmm(x @ W.T, x @ A.T, B.T, alpha=s)",
    ],
)
def test_other_ways_that_do_not_form_the_product_are_right(tmp_path, output):
    text = "import torch\nimport torch.nn.functional as F\n\ndef forward(x, W, A, B, alpha):\n    s = alpha / len(A)\n"
    grade = first(tmp_path, f"{text}    return {output}\n", "forward", number=2)
    assert grade.state == RIGHT, grade.why


@pytest.mark.parametrize(
    "output",
    [
        "torch.addmm(W, B, A, alpha=s) @ x.T",
        "W @ x.T + s * torch.einsum('or,ri->oi', B, A) @ x.T",
        "W @ x.T + s * (B[:, :, None] * A).sum(1) @ x.T",
        "W @ x.T + torch.stack([s * row @ A for row in B]) @ x.T",
    ],
)
def test_every_way_that_forms_the_product_is_told(tmp_path, output):
    text = f"import torch\n\ndef forward(x, W, A, B, alpha):\n    s = alpha / len(A)\n    return ({output}).T\n"
    assert "forms a matrix [4, 5] beside W" in first(tmp_path, text, "forward", number=2).why


def test_an_answer_that_a_law_cannot_look_at_is_told(tmp_path):
    grade = first(tmp_path, "def factors(W, r):\n    return 'A', 'B'\n", "factors", number=1)
    assert grade.state == WRONG and "got ('A', 'B'), which cannot be judged (AttributeError" in grade.why


def test_what_one_function_does_is_no_matter_of_the_others(tmp_path):
    text = lesson(5).solution.replace("return pairs", "exit()\n    return pairs")
    assert first(tmp_path, text, "pack").state == WRONG and first(tmp_path, text, "decode").state == RIGHT


def test_there_are_twelve_lessons():
    assert [each.number for each in LESSONS] == list(range(1, 13))
    for each in LESSONS:
        assert each.page.startswith(f"lessons/{each.number:02}_") and each.question.endswith("?")
    with pytest.raises(ConfigError, match="lesson 0: is not there; wanted 1 to 12; minilora learn lists them"):
        lesson(0)
