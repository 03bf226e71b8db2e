"""Servers of other kinds, as they answer, and servers that do what no server should: in a thread of the test, on loopback."""

import json
import math
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from minilora.cli import main
from minilora.errors import ConfigError, ServerError
from minilora.proof import verify, write_probe
from minilora.training import progress
from tests.proof.conftest import answers_along


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """A busy computer would show in between that it still asks; what counts here is what is said at the end."""
    monkeypatch.setattr(progress, "_PLAIN_EVERY", 1e9)


@contextmanager
def answering(answer, tls=None):
    """The address of a server: ``answer(path, body)`` gives ``(status, what is sent)``, JSON values or bytes; body is None for a GET.

    ``tls``: the ``SSLContext`` of one that is asked over https.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(None)

        def do_POST(self):
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body):
            status, said = answer(self.path, body)
            raw = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.handle_error = lambda *_: None  # a client that does not trust the certificate hangs up
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


NOT_FOUND = (404, {"detail": "Not Found"})


class Speaker:
    """What a model on a curve of the probe answers, to ids or to text."""

    def __init__(self, probe, name="adapted"):
        self.probe, self.answers = probe, answers_along(probe, name)

    def to(self, prompt):
        """``[(id, text, log-probability)]``, the likeliest first; None for what is no question of the probe."""
        for question, answer in zip(self.probe.questions, self.answers, strict=True):
            if prompt in (list(question.ids), question.text):
                texts = dict(zip(question.tokens, question.texts, strict=True))
                return [(token, texts.get(token, f"<{token}>"), value) for token, value in answer.items()]
        return None


def completion(logprobs, count):
    choice = {"index": 0, "text": "x", "logprobs": logprobs, "finish_reason": "length"}
    usage = {"prompt_tokens": count, "total_tokens": count + 1, "completion_tokens": 1}
    return 200, {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def vllm(adapted, base=None):
    """vLLM 0.32: LoRA models with their parent, and tokens by id where that is asked for."""

    def answer(path, body):
        if path == "/v1/models":

            def of(name, parent):
                return {
                    "id": name,
                    "object": "model",
                    "owned_by": "vllm",
                    "root": name,
                    "parent": parent,
                }

            return 200, {"object": "list", "data": [of("base", None), of("mine", "base")]}
        if path == "/tokenize":
            return 200, {
                "count": 1,
                "max_model_len": 256,
                "tokens": list(adapted.probe.chats[0].ids),
                "token_strs": None,
            }
        if path != "/v1/completions":
            return NOT_FOUND
        found = {"mine": adapted, "base": base}[body["model"]].to(body["prompt"])
        by_id = body.get("return_tokens_as_token_ids")
        named = {f"token_id:{token}" if by_id else text: value for token, text, value in found}
        first = next(iter(named))
        logprobs = {"text_offset": [0], "token_logprobs": [named[first]], "tokens": [first], "top_logprobs": [named]}
        return completion(logprobs, len(body["prompt"]))

    return answer


def by_text(adapted):
    """SGLang: log-probabilities by the texts of tokens; what it is asked beside that it passes over."""

    def answer(path, body):
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "mine", "object": "model", "owned_by": "sglang"}]}
        if path != "/v1/completions":
            return NOT_FOUND
        named = {text: value for _, text, value in adapted.to(body["prompt"])}
        return completion(
            {"text_offset": [-1], "token_logprobs": [], "tokens": [], "top_logprobs": [named]}, len(body["prompt"])
        )

    return answer


def ollama(adapted):
    """Ollama: its completions know no log-probabilities, its own way of asking does."""

    def answer(path, body):
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "mine:latest", "object": "model", "owned_by": "library"}]}
        if path == "/v1/completions" and isinstance(body["prompt"], list):
            return 400, {
                "error": {
                    "message": "json: cannot unmarshal array into Go struct field",
                    "type": "invalid_request_error",
                }
            }
        if path == "/api/generate":
            assert body["raw"] and not body["stream"]
            if (found := adapted.to(body["prompt"])) is None:
                return 200, {"model": "mine", "response": "x", "done": True}
            top = [{"token": text, "logprob": value, "bytes": []} for _, text, value in found]
            return 200, {"model": "mine", "response": "x", "done": True, "logprobs": [{**top[0], "top_logprobs": top}]}
        return NOT_FOUND

    return answer


def native(adapted):
    """llama.cpp of a year ago: no log-probabilities at OpenAI's address, but at its own."""

    def answer(path, body):
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "mine.gguf", "owned_by": "llamacpp"}]}
        if path == "/v1/completions":
            return completion(None, len(body["prompt"]))
        if path == "/lora-adapters":
            return 200, [{"id": 0, "path": "mine.gguf", "scale": 1.0}]
        if path == "/apply-template":
            turns = body["messages"]
            chat = next(chat for chat in adapted.probe.chats if list(chat.turns) == turns)
            return 200, {"prompt": chat.text}
        if path != "/completion":
            return NOT_FOUND
        top = [{"id": token, "token": text, "logprob": value} for token, text, value in adapted.to(body["prompt"])]
        return 200, {"content": "x", "completion_probabilities": [{**top[0], "top_logprobs": top}]}

    return answer


@pytest.mark.parametrize("server", [by_text, ollama, native])
@pytest.mark.parametrize(("curve", "kind"), [("adapted", "right"), ("base", "not applied"), ("scale 0.5", "scale")])
def test_servers_that_are_asked_in_their_own_way(sealed, server, curve, kind):
    with answering(server(Speaker(sealed.probe, curve))) as url:
        found = verify(sealed.folder, url)
    assert found.kind == kind
    assert found.code == (kind != "right")


def test_vllm_is_asked_for_its_adapter_and_where_that_is_wrong_for_its_base(sealed):
    right, base = Speaker(sealed.probe), Speaker(sealed.probe, "base")
    strange = Speaker(sealed.probe)
    strange.answers = list(reversed(strange.answers))
    asked = []

    def noted(server):
        def answer(path, body):
            asked.append(body and body.get("model"))
            return server(path, body)

        return answer

    with answering(noted(vllm(right, base))) as url:
        assert verify(sealed.folder, url, "mine").kind in ("right", "another template")  # it tokenizes one chat alone
        assert "base" not in asked
    with answering(vllm(strange, base)) as url:
        assert verify(sealed.folder, url).kind == "another adapter"
    with answering(vllm(strange, strange)) as url:
        assert verify(sealed.folder, url).kind == "another base"


def test_a_template_is_compared_by_text_by_tokens_or_by_their_number(sealed):
    chats, right = sealed.probe.chats, Speaker(sealed.probe)

    def saying(where, value):
        def answer(path, body):
            if path == where:
                chat = next(chat for chat in chats if list(chat.turns) == body["messages"])
                return 200, value(chat)
            return by_text(right)(path, body)

        return answer

    same = {
        "/apply-template": lambda chat: {"prompt": chat.text},
        "/tokenize": lambda chat: {"tokens": list(chat.ids)},
        "/v1/chat/completions": lambda chat: {"usage": {"prompt_tokens": len(chat.ids)}},
    }
    other = {
        "/apply-template": lambda chat: {"prompt": f"{chat.text}<think>"},
        "/tokenize": lambda chat: {"tokens": [*chat.ids, 1]},
        "/v1/chat/completions": lambda chat: {"usage": {"prompt_tokens": len(chat.ids) + 3}},
    }
    for where in same:
        with answering(saying(where, same[where])) as url:
            assert verify(sealed.folder, url).kind == "right", where
        with answering(saying(where, other[where])) as url:
            found = verify(sealed.folder, url)
            assert (found.kind, found.code) == ("another template", 1) and where in found.text


@pytest.mark.parametrize(
    ("where", "value", "bare", "said"),
    [
        (
            "/tokenize",
            lambda ids: {"tokens": [ids[0], *ids]},
            0,
            "comes twice, from the template and from the tokenizer",
        ),
        ("/tokenize", lambda ids: {"tokens": [ids[0] + 1, *ids]}, 0, "which the run did not have, comes first"),
        ("/tokenize", lambda ids: {"tokens": ids[1:]}, 0, "which the run had first, is missing"),
        ("/v1/chat/completions", lambda ids: {"usage": {"prompt_tokens": len(ids) + 1}}, 1, "comes twice"),
        ("/v1/chat/completions", lambda ids: {"usage": {"prompt_tokens": len(ids) + 1}}, 0, None),
        ("/v1/chat/completions", lambda ids: {"usage": {"prompt_tokens": len(ids) + 1}}, None, None),
    ],
)
def test_a_token_more_at_the_beginning_is_no_other_template(sealed, where, value, bare, said):
    """Where tokens are counted alone, the same text without the template tells the one from the other."""
    chats, right = sealed.probe.chats, Speaker(sealed.probe)

    def answer(path, body):
        if path == where:
            chat = next(chat for chat in chats if list(chat.turns) == body["messages"])
            return 200, value(list(chat.ids))
        lengths = {chat.text: len(chat.ids) for chat in chats}
        if body and "logprobs" not in body and body.get("prompt") in lengths:
            return NOT_FOUND if bare is None else completion(None, lengths[body["prompt"]] + bare)
        return by_text(right)(path, body)

    with answering(answer) as url:
        found = verify(sealed.folder, url)
    assert (found.kind, found.code) == ("another beginning" if said else "another template", 1)
    assert where in found.text and (said or "another chat template") in found.text


def edited(server, edit):
    """A server whose log-probabilities are changed by ``edit({text: value})``."""

    def answer(path, body):
        status, said = server(path, body)
        if path == "/v1/completions":
            said["choices"][0]["logprobs"]["top_logprobs"] = [edit(said["choices"][0]["logprobs"]["top_logprobs"][0])]
        return status, said

    return answer


def renormalized(temperature):
    def edit(named):
        total = sum(math.exp(value / temperature) for value in named.values())
        return {text: value / temperature - math.log(total) for text, value in named.items()}

    return edit


def one_left(lowest):
    return lambda named: {text: lowest if text != max(named, key=named.get) else 0.0 for text in named}


@pytest.mark.parametrize("curve", ["adapted", "base"])
@pytest.mark.parametrize("edit", [renormalized(1.0), renormalized(0.7), one_left(-9999.0), one_left(-100.0)])
def test_what_sampling_leaves_is_no_verdict(sealed, curve, edit):
    server = edited(by_text(Speaker(sealed.probe, curve)), edit)
    with answering(server) as url, pytest.raises(ServerError, match="sampling leaves"):
        verify(sealed.folder, url)


@pytest.mark.parametrize(("curve", "kind"), [("adapted", "right"), ("base", "not applied")])
def test_a_server_that_reads_something_else_in_token_ids_is_asked_by_text(sealed, curve, kind):
    speaker = Speaker(sealed.probe, curve)

    lengths = {question.text: len(question.ids) for question in sealed.probe.questions}

    def answer(path, body, counts):
        by_ids = body and isinstance(body["prompt"], list)
        prompt = sealed.probe.questions[0].text if by_ids else body and body["prompt"]
        status, said = by_text(speaker)(path, body and body | {"prompt": prompt})
        if path == "/v1/completions":
            said["usage"] = {"prompt_tokens": 777 if by_ids else lengths[prompt]} if counts else None
        return status, said

    for counts in (True, False):
        with answering(lambda path, body, counts=counts: answer(path, body, counts)) as url:
            found = verify(sealed.folder, url)
        assert found.kind == kind and ("does not take token ids" in found.text) == (not counts)


def test_words_without_the_space_before_them(sealed, tmp_path):
    """A tokenizer of sentencepiece decodes a word alone without its space, and some servers write it."""
    ids = sorted({token for question in sealed.probe.questions for token in question.tokens})
    words = {token: f"word{at}" for at, token in enumerate(ids)}
    questions = [
        replace(question, texts=tuple(words[token] for token in question.tokens)) for question in sealed.probe.questions
    ]
    probe = replace(sealed.probe, questions=tuple(questions))
    folder = shutil.copytree(sealed.folder, tmp_path / "adapter")
    write_probe(folder, probe)
    for space in ("", " ", "\u2581"):
        server = edited(
            by_text(Speaker(probe)), lambda named, space=space: {space + text: value for text, value in named.items()}
        )
        with answering(server) as url:
            assert verify(folder, url).kind == "right", space


@pytest.mark.parametrize(
    ("path", "said"),
    [("/lora-adapters", b'[{"scale": 1' + b"0" * 400 + b"}]"), ("/apply-template", b"<html>"), ("/tokenize", b"")],
)
def test_what_is_asked_beside_the_questions_costs_no_verdict(sealed, path, said):
    server = by_text(Speaker(sealed.probe, "base"))
    with answering(lambda asked, body: (200, said) if asked == path else server(asked, body)) as url:
        assert verify(sealed.folder, url).kind == "not applied"


def always(status, said):
    return lambda path, body: (status, said)


def models(ids):
    return lambda path, body: (200, {"data": [{"id": one} for one in ids]}) if path == "/v1/models" else NOT_FOUND


def with_logprobs(logprobs):
    return lambda path, body: completion(logprobs, len(body["prompt"])) if body else (200, {"data": []})


CHATLIKE = {"content": [{"token": "x", "logprob": -1.0, "top_logprobs": []}]}
BAD = {
    "not found": (always(404, b""), "HTTP 404"),
    "a page": (always(200, b"<html><body>It works!</body></html>"), "answers no JSON"),
    "an error with a page": (always(502, b"<html>Bad Gateway</html>"), "HTTP 502"),
    "garbage": (always(200, bytes(range(256))), "answers no JSON"),
    "nothing": (always(200, b""), "answers no JSON but nothing"),
    "cut off": (always(200, b'{"choices": [{"logprobs": '), "answers no JSON"),
    "nested without end": (always(200, b'{"data":' + b"[" * 100_000), "answers no JSON"),
    "a number without end": (always(200, b'{"data": ' + b"1" * 10_000 + b"}"), "answers no JSON"),
    "enormous": (always(200, b" " * 9_000_000), "answers more than 8,000,000 bytes"),
    "sent elsewhere": (always(302, b""), "HTTP 302"),
    "a list": (always(200, []), "no log-probabilities"),
    "null": (always(200, None), "no log-probabilities"),
    "no such model": (
        lambda path, body: (404, {"error": {"message": "The model `x` does not exist."}}),
        "does not exist",
    ),
    "several models": (models(["a", "b"]), "name the one with the adapter with --model"),
    "no log-probabilities": (with_logprobs(None), "no log-probabilities"),
    "log-probabilities of nothing": (with_logprobs({"top_logprobs": [{}]}), "no log-probabilities"),
    "an empty list": (with_logprobs(CHATLIKE), "no log-probabilities"),
    "of one token": (with_logprobs({"top_logprobs": [{"a": -1.0}]}), "no log-probabilities"),
    "of text": (with_logprobs({"top_logprobs": [{"a": "b", "c": -1.0}]}), "wanted a token and a finite number"),
    "of true": (with_logprobs({"top_logprobs": [{"a": True, "c": -1.0}]}), "wanted a token and a finite number"),
    "above 0": (with_logprobs({"top_logprobs": [{"a": 3.0, "c": -1.0}]}), "wanted a token and a finite number"),
    "NaN": (always(200, b'{"choices": [{"logprobs": {"top_logprobs": [{"a": NaN, "b": -1}]}}]}'), "answers no JSON"),
    "impossible": (with_logprobs({"top_logprobs": [{"a": -9e9, "b": -9e9, "c": -9e9}]}), "no log-probabilities"),
    "other tokens than were sent": (
        lambda path, body: completion({"top_logprobs": [{"a": -1.0, "b": -2.0}]}, 777) if body else (200, {}),
        "counts 777 tokens",
    ),
    "letters that steer": (always(500, {"error": {"message": "\x1b[2J\n\u202eboo"}}), "HTTP 500"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_such_server_answers_is_one_line(sealed, capsys, name):
    server, said = BAD[name]
    with answering(server) as url:
        assert main(["verify", str(sealed.folder), "--server", url, "--timeout", "20"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and "\x1b" not in line and "\u202e" not in line


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    """A certificate for loopback that nobody signed but itself, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    place = tmp_path_factory.mktemp("signed")
    name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *name]
    paths = ["-keyout", str(place / "key.pem"), "-out", str(place / "own.pem")]
    subprocess.run(["openssl", *words, *paths], check=True, capture_output=True)
    return place / "own.pem", place / "key.pem"


def test_a_certificate_that_is_not_trusted_is_one_line_with_the_way_out(sealed, capsys, monkeypatch, signed):
    own, key = signed
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(own, key)
    with answering(by_text(Speaker(sealed.probe)), tls) as url:
        assert url.startswith("https://")
        assert main(["verify", str(sealed.folder), "--server", url]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "its certificate is not trusted: self" in line and "SSL_CERT_FILE=FILE" in line
        monkeypatch.setenv("SSL_CERT_FILE", str(own))
        assert main(["verify", str(sealed.folder), "--server", url]) == 0
        assert "applied right" in capsys.readouterr().out
    with answering(by_text(Speaker(sealed.probe))) as url:
        assert main(["verify", str(sealed.folder), "--server", url.replace("http", "https")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "does the server speak https there, or is it http?" in line


@contextmanager
def talking(speak):
    """The address of a socket that is spoken to by ``speak(connection)``."""
    listening = socket.create_server(("127.0.0.1", 0))

    def work():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=speak, args=(connection,), daemon=True).start()

    threading.Thread(target=work, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()


def hang(connection):
    time.sleep(30)


def drip(connection):
    """A byte of the header now and then, so that no timeout of a socket runs out."""
    for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300:
        try:
            connection.sendall(bytes([byte]))
        except OSError:
            return
        time.sleep(0.1)


def cut(connection):
    connection.recv(10_000)
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"data": [')
    connection.close()


def shut(connection):
    connection.close()


def babble(connection):
    connection.recv(10_000)
    connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n" * 3)
    connection.close()


@pytest.mark.parametrize(
    ("speak", "said"),
    [
        (hang, "no whole answer within"),
        (drip, "no whole answer within"),
        (cut, "breaks off"),
        (shut, "cannot be asked"),
        (babble, "cannot be asked"),
    ],
)
def test_a_server_that_hangs_or_breaks_off_is_one_line(sealed, capsys, speak, said):
    began = time.monotonic()
    with talking(speak) as url:
        assert main(["verify", str(sealed.folder), "--server", url, "--timeout", "1"]) == 2
    assert time.monotonic() - began < 10
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "127.0.0.1:8080",
        "ftp://x",
        "http://",
        "http://a b",
        "http://x?y=1",
        "http://u:p@x",
        "http://x:0",
        "http://x:99999",
    ],
)
def test_an_address_that_cannot_be_is_refused(sealed, url):
    with pytest.raises(ConfigError, match="wanted an address"):
        verify(sealed.folder, url)


def test_a_key_goes_to_the_server_that_is_named_and_is_never_shown(sealed, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-key")
    seen = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["Authorization"])
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{server.server_port}/elsewhere")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = ["verify", str(sealed.folder), "--server", f"http://127.0.0.1:{server.server_port}"]
    assert main([*words, "--key-variable", "MY_KEY"]) == 2
    assert main([*words, "--key-variable", "NO_SUCH"]) == 2
    server.shutdown()
    server.server_close()
    assert set(seen) == {"Bearer secret-key"}
    said = capsys.readouterr()
    assert "secret-key" not in said.out + said.err


def test_nobody_there_is_one_line(sealed):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ServerError, match="is the server running there"):
            verify(sealed.folder, f"http://127.0.0.1:{free.getsockname()[1]}")


def test_a_model_that_the_server_does_not_list_is_said_with_those_that_it_lists(sealed, capsys):
    def answer(path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny", "parent": None}, {"id": "mine", "parent": "tiny"}]}
        return 404, {
            "error": {"message": "The model `mime` does not exist. Valid aliases: tiny."}
        }  # as vLLM 0.32 says it

    with answering(answer) as url:
        assert main(["verify", str(sealed.folder), "--server", url, "--model", "mime"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--model='mime' is none of those that it lists: tiny, mine")


def test_a_server_that_answers_in_ids_takes_them_and_is_not_asked_by_text(sealed):
    """As vLLM does: what it answers is its answer, even where text happens to fit better."""
    right, base, strange = Speaker(sealed.probe), Speaker(sealed.probe, "base"), Speaker(sealed.probe)
    strange.answers = list(reversed(strange.answers))

    def answer(path, body):
        by_text = bool(body) and isinstance(body.get("prompt"), str)
        status, said = vllm(right if by_text else strange, base)(path, body)
        return status, said | {"usage": None} if by_text else said

    with answering(answer) as url:
        found = verify(sealed.folder, url)
    assert found.kind == "another adapter" and "asked by text" not in found.text
