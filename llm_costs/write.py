"""Has a language model write the cost predicate of a task, and checks what it writes (step 3).

    python -m llm_costs.write --task CarButton1 --url URL --model NAME
    python -m llm_costs.write --task CarButton1 --show-prompt

    Ollama      --url http://localhost:11434/v1 --model qwen2.5-coder
    vLLM        --url http://localhost:8000/v1 --model NAME
    llama.cpp   --url http://localhost:8080/v1 --model any
    hosted      --url https://HOST/v1 --model NAME, and PROCO_LLM_KEY=... before python

The prompt is PROMPT.md with the paragraphs of KNOWLEDGE.md that apply to the task. The first reply
that passes becomes llm_costs/<task>.py. A reply is a stranger's code: its syntax has to pass a
whitelist before anything of it runs; then it is tried in a child process with limits on time and
memory.
"""

import argparse
import ast
import contextlib
import datetime
import faulthandler
import hashlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.parse
from pathlib import Path

import numpy as np
import torch

try:
    import proco
    from proco import CostError, ProcoError
except ModuleNotFoundError as error:
    if error.name != "proco":
        raise
    sys.exit("llm_costs.write: there is no proco.py here; run this in the repository's folder.")

HERE = Path(__file__).resolve().parent
MARGINS = (0.0, 0.02, 0.05, 0.1, 0.3)  # m or m/s, at which a predicate is tried
FALSE_ALARMS = 0.01  # share of recorded safe steps that a predicate may call unsafe
SECONDS = 20  # for all trials of one predicate
MEMORY = 2 << 30  # bytes, for the same
REFUSED = 3  # exit code of the child process that tries it
ANSWER_TIME = 600  # s, for one answer of the server
PATIENCE = 60  # s, of waiting altogether while the server is busy


# ---- The prompt ----------------------------------------------------------------------------------


def prompt(task):
    """What a language model is told about a task: PROMPT.md with what is known about the task.

    A paragraph of KNOWLEDGE.md applies if a word of its heading is found in the task's name."""
    facts = proco.get_task(task)
    knowledge = (HERE / "KNOWLEDGE.md").read_text(encoding="utf-8-sig")
    _, *pieces = re.split(r"^## (.+)$", knowledge, flags=re.MULTILINE)
    told = []
    for heading, paragraph in zip(pieces[::2], pieces[1::2]):
        if any(re.search(word.strip(), task) for word in heading.split(",")):
            told.append(paragraph.strip())
    if not told:
        raise ProcoError(f"KNOWLEDGE.md says nothing about {task}; write a paragraph first.")
    lidars = ""
    for lidar in facts.lidars:
        last = lidar.start + 15
        lidars += f"\n* {lidar.start} to {last}: the {lidar.name} lidar, MAX = {lidar.reach:g} m"
    text = (HERE / "PROMPT.md").read_text(encoding="utf-8-sig")
    text = text.replace("{knowledge}", "\n\n".join(told)).replace("{lidars}", lidars.strip())
    text = text.replace("{task}", task).replace("{obs_dim}", str(facts.obs_dim))
    return text.replace("{act_dim}", str(facts.act_dim))


def prompt_hash(task):
    """The first 16 hexadecimal digits of the prompt's SHA-256."""
    return hashlib.sha256(prompt(task).encode()).hexdigest()[:16]


def head_comment(task, model):
    """The comment at the head of a cached predicate: who wrote it, when, and from which prompt."""
    return (
        "# Written by a language model from the prompt with the hash below.\n"
        f"# model:  {re.sub(r'[^A-Za-z0-9_.:/@ -]', '?', model)[:90]}\n"
        f"# day:    {datetime.date.today()}\n"
        f"# prompt: {prompt_hash(task)} (first 16 digits of the SHA-256 of what this prints:\n"
        f"#         python -m llm_costs.write --task {task} --show-prompt)\n"
    )


# ---- The reply -----------------------------------------------------------------------------------


def extract(reply):
    """The pieces of a reply that may be the predicate, the likeliest first: the last block of code,
    then the earlier ones, then all of them joined; without any, the whole reply.

    What precedes the last </think> is thought; a fence begins a line."""
    text = reply.lstrip("\ufeff").replace("\r\n", "\n").replace("\u00a0", " ")
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    blocks = []
    mark = ""  # the fence that opened the present block; the reply's end closes it, too
    for line in text.split("\n"):
        fence = re.match(r"\s*(`{3,}|~{3,})([^`]*)$", line)
        if fence and fence[1].startswith(mark):
            closes = mark and not fence[2].strip()
            mark = "" if closes else fence[1]
            blocks += [] if closes else [""]
        elif mark:
            blocks[-1] += line + "\n"
    codes = [textwrap.dedent(block) for block in blocks] or [text]
    codes = dict.fromkeys([*codes[-4:][::-1], "\n".join(codes)])  # the same one once
    return [code for code in codes if "def cost" in code]


def tidy(text):
    """Code without its annotations, and without imports that nothing uses or that are not needed,
    as torch and math are there already."""
    nodes = list(ast.walk(ast.parse(text)))
    notes = [getattr(node, "annotation", None) or getattr(node, "returns", None) for node in nodes]
    notes = [note for note in notes if note]
    noted = {part for note in notes for part in ast.walk(note)}
    used = {node.id for node in nodes if isinstance(node, ast.Name) and node not in noted}
    imports = []
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            given = ast.unparse(node) in ("import torch", "import math", "import torch, math")
            imports += [node] if given or not names & used else []
    raw = text.encode()  # the tree counts in bytes
    lengths = [len(line) + 1 for line in raw.split(b"\n")]
    lines = [0, *itertools.accumulate(lengths)]  # the byte at which each line begins
    for node in sorted(notes + imports, key=lambda node: (-node.lineno, -node.col_offset)):
        head = raw[: lines[node.lineno - 1] + node.col_offset]
        if node in notes:  # the sign before it goes, too
            head = head.rstrip().removesuffix(b":").removesuffix(b"->").rstrip()
        raw = head + raw[lines[node.end_lineno - 1] + node.end_col_offset :]
    return raw.decode().strip() + "\n"


# ---- The whitelist -------------------------------------------------------------------------------

# What a predicate may say; harm would have to be built out of these.
NODES = """Module FunctionDef arguments arg Return Assign For If IfExp Expr Pass Constant Name Load
Store Tuple List Subscript Slice Attribute Call keyword BinOp UnaryOp BoolOp Compare Add Sub Mult
Div FloorDiv Mod Pow BitAnd BitOr BitXor And Or Not USub UAdd Invert Lt LtE Gt GtE Eq NotEq Is IsNot
Break Continue"""
SHARED = """ abs acos add all amax amin any argmax argmin argsort asin atan atan2 bool ceil chunk
clamp clip clone cos cumsum div eq exp flatten flip float floor fmod gather ge gt hypot isfinite
isnan le log logical_and logical_not logical_or logical_xor long lt max maximum mean min minimum
movedim mul nan_to_num narrow ne neg norm permute pow prod relu remainder reshape roll round select
sigmoid sign sin sort split sqrt square squeeze sub sum tan tanh topk transpose unbind unsqueeze
where """
TORCH = """arange arctan2 as_tensor cat concat deg2rad float32 float64 full full_like inf int32
int64 linalg linspace ones ones_like pi rad2deg stack take_along_dim tensor zeros zeros_like"""
METHODS = """contiguous detach device dim double dtype expand expand_as indices int ndim new_ones
new_zeros numel repeat shape size to type_as unflatten values view"""
MATH = "acos asin atan atan2 ceil cos degrees exp floor hypot inf log pi radians sin sqrt tan tau"
ALLOWED = {"torch": SHARED + TORCH, "torch.linalg": "norm vector_norm", "math": MATH}
GIVEN = {"range", "len", "abs", "min", "max", "float", "int", "bool", "torch", "math"}
ADVICE = {
    "AugAssign": "assigns in place (write x = x + y)",
    "While": "has a while loop (a for loop is fine)",
    "Import": "imports (torch and math are there, nothing else is)",
    "ImportFrom": "imports (torch and math are there, nothing else is)",
}


def objection(node, names):
    """What is wrong with one node of a syntax tree, or None; names are those that are defined."""
    kind = type(node).__name__
    if kind not in NODES.split():
        return ADVICE.get(kind, f"holds a {kind}, which no predicate needs")
    if kind == "Name" and node.id not in names:
        return f"uses {node.id}, which nothing defines"
    if kind == "Attribute":
        owner = ast.unparse(node.value)
        if node.attr not in ALLOWED.get(owner, SHARED + METHODS).split():
            return f"uses {owner[:80]}.{node.attr}, which is not allowed"
    if kind in ("Attribute", "Subscript") and isinstance(node.ctx, ast.Store):
        return "writes into a tensor"
    if kind == "Constant" and isinstance(node.value, (str, bytes, complex)):
        return "holds a string or an odd number"
    if kind == "FunctionDef" and node.decorator_list:
        return "has a decorator"
    if kind == "keyword" and node.arg in (None, "out"):
        return "uses ** or out="
    return None


def check_tree(tree):
    """CostError unless every node is allowed and the function cost is there."""
    nodes = list(ast.walk(tree))
    made = {node.arg for node in nodes if isinstance(node, ast.arg)}
    made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    stored = [node for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store)]
    made |= {node.id for node in stored if isinstance(node, ast.Name)}
    spoken = [node.value for node in nodes if isinstance(node, ast.Expr)]  # doc strings
    for node in nodes:
        why = objection(node, made | GIVEN)
        if node in tree.body and not isinstance(node, ast.FunctionDef):
            constant = isinstance(node, ast.Assign) and "torch" not in ast.unparse(node)
            if not constant and not isinstance(getattr(node, "value", None), ast.Constant):
                why = why or "does something outside the functions"
        if why and not (isinstance(node, ast.Constant) and node in spoken):
            raise CostError(f"line {getattr(node, 'lineno', 1)} {why}.")
    costs = [ast.unparse(node.args) for node in tree.body if getattr(node, "name", "") == "cost"]
    if len(costs) != 1 or not re.fullmatch(r"obs, action, next_obs, margin=[\d.]+", costs[0]):
        raise CostError("it needs one function cost(obs, action, next_obs, margin=0.0).")


def check_syntax(text):
    """The code to keep: without annotations and needless imports. CostError unless its syntax holds
    nothing but what a harmless predicate needs. Nothing of it runs."""
    if len(text) > 20_000:
        raise CostError("it is too long.")
    try:
        text = tidy(text)
        check_tree(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = getattr(error, "msg", "") or type(error).__name__
        raise CostError(f"it is not Python: {why}.") from None
    if "__" in text:
        raise CostError("it has a name with two underscores.")
    return text


# ---- Behaviour -----------------------------------------------------------------------------------


def plausible(task, rows=512):
    """Made-up steps (obs, action, next_obs) to try a predicate on.

    Sensors at random, the yaw as a magnetometer shows it; in every lidar up to four objects at any
    distance and bearing, and now and then nothing."""
    facts = proco.get_task(task)
    rng = np.random.default_rng(0)
    obs = rng.normal(0, 3, (2, rows, facts.obs_dim))  # before and after the step
    action = rng.uniform(-1, 1, (rows, facts.act_dim))
    if facts.lidars:
        yaw = rng.uniform(-np.pi, np.pi, (2, rows))
        obs[..., 9] = -0.5 * np.sin(yaw)
        obs[..., 10] = -0.5 * np.cos(yaw)
    for lidar in facts.lidars:
        near = np.clip(1 - rng.uniform(0, 1.5, (2, rows, 4, 1)), 0, 1)  # 1 - distance / MAX
        seen = rng.random((2, rows, 1, 1)) < 0.9
        bearing = rng.uniform(0, 16, (2, rows, 4, 1))  # in bins
        off = (np.arange(16) - bearing + 8) % 16 - 8  # from the object to each bin
        share = np.clip(np.minimum(2 + off, 1 - off), 0, 1)  # of the object's value in each bin
        obs[..., lidar.start : lidar.start + 16] = (near * seen * share).max(axis=2)
    return [torch.as_tensor(x, dtype=torch.float32) for x in (obs[0], action, obs[1])]


def flags_of(cost, steps, margin=0.0):
    """What a predicate says of steps: a tensor of the batch shape, or CostError."""
    copies = [x.clone() for x in steps]
    shape = steps[0].shape[:-1]
    flags = cost(*steps, margin)
    got = tuple(flags.shape) if isinstance(flags, torch.Tensor) else type(flags).__name__
    if got != tuple(shape):
        raise CostError(f"it returns {got} for a batch of shape {tuple(shape)}, not that shape.")
    binary = bool(((flags == 0) | (flags == 1)).all())
    if not binary or not flags.is_floating_point() or flags.device != steps[0].device:
        raise CostError("it returns something other than 0. and 1. in float on its inputs' device.")
    if not torch.equal(flags, cost(*steps, margin)):
        raise CostError("it answers the same question differently the second time.")
    if not all(torch.equal(x, copy) for x, copy in zip(steps, copies)):
        raise CostError("it changes its inputs.")
    return flags


def try_steps(cost, steps):
    """What a predicate says of steps at each of MARGINS. CostError unless it says 0 or 1 of each
    row, whatever the batch, and never less with a wider margin."""
    answers = [flags_of(cost, steps, margin) for margin in MARGINS]
    for narrow, wide in itertools.pairwise(answers):
        if (wide < narrow).any():
            raise CostError("a wider margin calls something safe that a narrower one calls unsafe.")
    for shape in ((), (7,), (3, 5)):
        rows = answers[0][: math.prod(shape)]
        if len(rows) == math.prod(shape):
            few = [x[: len(rows)].reshape(*shape, -1) for x in steps]
            if not torch.equal(flags_of(cost, few).flatten(), rows):
                raise CostError(f"for the batch shape {shape} it answers otherwise than by rows.")
    return answers


def check_behaviour(code, task, data=None):
    """Tries a predicate whose syntax has passed, in this process -> a sentence about what it flags.

    `data` is None or (obs, action, next_obs) of recorded safe steps. Raises CostError."""
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / f"{task}.py"
            path.write_text(code, encoding="utf-8")
            cost = proco.load_cost(task, path)
            made_up = try_steps(cost, plausible(task))
            recorded = try_steps(cost, data) if data else None
    except CostError as error:
        why = " ".join(str(error).replace(f" {path}", "").split())
        raise CostError(why[:300]) from None
    except Exception as error:  # noqa: BLE001 (whatever a predicate raises)
        why = " ".join(str(error).split())[:200]
        raise CostError(f"it raises {type(error).__name__}: {why}.") from None
    if made_up[0].all() or not made_up[-1].any():
        raise CostError("it says the same of everything.")
    flagged = f"it calls unsafe {made_up[0].mean():.1%} of made-up steps"
    if recorded:
        share = recorded[0].mean()
        if share > FALSE_ALARMS:
            raise CostError(f"it calls {share:.1%} of the recorded safe steps unsafe.")
        flagged += f" and {share:.2%} of recorded safe ones"
    return flagged + "."


def answer_check():
    """The child process: reads a job from stdin and prints what check_behaviour says -> exit code.

    It ends when its time is over, whatever runs in it, and can't grow by more than MEMORY."""
    job = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=True)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(job.pop("seconds"), exit=True)
    # Windows has no such limit on memory, and macOS does not keep it.
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        print(check_behaviour(**job))
        return 0
    except CostError as error:
        print(error)
        return REFUSED


def check_in_child(code, task, data=None):
    """check_behaviour in a process of its own, which can't harm this one."""
    job = io.BytesIO()
    torch.save({"seconds": SECONDS, "code": code, "task": task, "data": data}, job)
    command = [sys.executable, "-m", "llm_costs.write", "--check"]
    options = {"input": job.getvalue(), "capture_output": True, "cwd": HERE.parent}
    try:
        child = subprocess.run(command, **options, timeout=SECONDS + 100, check=False)
    except subprocess.TimeoutExpired:
        raise CostError(f"it does not finish in {SECONDS} s.") from None
    said = child.stdout.decode(errors="replace").strip().rpartition("\n")[2]
    failure = child.stderr.decode(errors="replace").strip()
    if child.returncode == 0:
        return said
    if child.returncode == REFUSED:
        raise CostError(said)
    if "Timeout (" in failure:
        raise CostError(f"it does not finish in {SECONDS} s.")
    why = failure.rpartition("\n")[2][:200]
    raise CostError(f"the process that tried it ended with code {child.returncode}: {why}.")


def check(text, task, data=None):
    """A predicate's source -> (the code to keep, a sentence about what it flags), or CostError.

    `data` is None or (obs, action, next_obs) of recorded safe steps, of which it may flag 1%."""
    code = check_syntax(text)
    if data is not None:
        every = max(1, len(data[0]) // 20_000)  # some thousands say as much as millions
        data = [torch.as_tensor(x[::every], dtype=torch.float32) for x in data]
    return code, check_in_child(code, task, data)


# ---- The server ----------------------------------------------------------------------------------


def own_words(body, key):
    """What a server says of an error, from the forms that are in use, without the key."""
    try:
        said = json.loads(body)
    except ValueError:
        said = body
    if isinstance(said, list) and said:
        said = said[0]
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(name):
            said = said[name]
    words = " ".join(str(said).split())
    return (words.replace(key, "***") if key else words)[:300]


class Bearer:
    """How requests is told the key, so that no ~/.netrc takes its place."""

    def __init__(self, key):
        self.key = key

    def __call__(self, request):
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


def endpoint(url):
    """Where to ask -> (with the password it may hold, and without, for messages)."""
    try:
        parts = urllib.parse.urlsplit(url.strip())
    except ValueError:  # half an IPv6 address: nobody is there
        return url, url
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    shown = parts._replace(path=path, netloc=parts.netloc.rpartition("@")[2], query="")
    return parts._replace(path=path).geturl(), shown.geturl()


def post(url, question, key):
    """Asks once -> (status, header fields, text). The key goes into the request, nowhere else."""
    import requests

    place, shown = endpoint(url)
    options = {"auth": Bearer(key), "timeout": (10, ANSWER_TIME), "allow_redirects": False}
    end = time.monotonic() + ANSWER_TIME
    body = bytearray()
    try:
        with requests.post(place, json=question, stream=True, **options) as reply:
            for piece in reply.iter_content(1):  # byte by byte, to look at the clock in between
                body += piece
                if time.monotonic() > end:
                    raise ProcoError(f"{shown} takes more than {ANSWER_TIME} s for one answer.")
    except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError):
        raise ProcoError(f"the answer of {shown} breaks off or is damaged.") from None
    except (requests.RequestException, ValueError) as error:
        why = type(error).__name__  # its text may quote the key
        raise ProcoError(f"no language model answers at {shown} ({why}).") from None
    return reply.status_code, reply.headers, body.decode("utf-8-sig", errors="replace")


def patient_post(url, question, key):
    """Asks, and asks again while the server is busy -> the text of its answer, or ProcoError."""
    waited = 0.0
    pause = 1.0
    while True:
        status, fields, body = post(url, question, key)
        if status == 200:
            return body
        place = endpoint(url)[1]
        why = f"{place} answers with status {status}: {own_words(body, key) or 'nothing more'}"
        if 300 <= status < 400:
            why += f"; it points to {fields.get('Location')}, so give that as --url"
        if status == 404 and "/v1/" not in place:
            why += "; most servers want a --url that ends in /v1"
        with contextlib.suppress(ValueError):
            pause = max(pause, float(fields.get("Retry-After", "")))
        if status not in (429, 503) or waited + pause > PATIENCE:
            raise ProcoError(f"{why}.")
        print(f"{why}; asking again in {pause:g} s")
        time.sleep(pause)
        waited += pause
        pause *= 2


def content_of(message):
    """The text of a message, which may be one string, a list of parts, or nothing."""
    content = message.get("content", message.get("text"))
    if isinstance(content, list):
        parts = [part if isinstance(part, str) else part.get("text") for part in content]
        content = "".join(part or "" for part in parts)
    return "" + (content or "")  # TypeError for anything else


def ask(url, model, messages, key=""):
    """The next message of an OpenAI-compatible endpoint -> (text, why it is not whole or None)."""
    place = endpoint(url)[1]
    body = patient_post(url, {"model": model, "messages": messages, "stream": False}, key)
    pieces = []
    finish = None
    refusal = ""
    usage = {}
    try:
        events = [body]
        if not body.lstrip().startswith("{"):  # a server that streams though it was not asked to
            events = [line[5:] for line in body.split("\n") if line.startswith("data:")]
        for event in events:
            event = json.loads(event) if event.strip() != "[DONE]" else {}
            if event.get("error"):
                raise ProcoError(f"{place} answers: {own_words(json.dumps(event), key)}.")
            usage = event.get("usage") or usage
            for choice in event.get("choices", [])[:1]:
                message = choice.get("message") or choice.get("delta") or choice
                pieces.append(content_of(message))
                refusal = refusal or message.get("refusal")
                finish = choice.get("finish_reason") or finish
        tokens = usage.get("completion_tokens")
    except (ValueError, LookupError, TypeError, AttributeError):
        pieces = []
    if not pieces:
        start = own_words(body, key)[:80] or "nothing"
        raise ProcoError(f"what {place} answers is no chat completion: {start}")
    if refusal or finish == "content_filter":
        return "".join(pieces), f"the model declines: {refusal or finish}."
    if len(events) > 1 and not finish and "[DONE]" not in events[-1]:
        finish = "length"  # a stream that broke off
    if str(finish).lower() not in ("length", "model_length", "max_tokens"):
        return "".join(pieces), None
    count = f" at {tokens} tokens" if tokens else ""
    return "".join(pieces), f"the reply was cut off{count}; be brief, or allow the model more."


# ---- Writing a predicate -------------------------------------------------------------------------


def best_of(reply, task, data=None):
    """The first piece of a reply that passes -> (code, a sentence about what it flags).

    CostError says why the likeliest piece is refused."""
    reasons = []
    for text in extract(reply):
        try:
            return check(text, task, data)
        except CostError as error:
            reasons.append(error)
    if reasons:
        raise reasons[0]
    empty = "the reply is empty." if not reply.strip() else ""
    raise CostError(empty or "there is no function cost in the reply.")


def write_cost(task, url, model, key=None, attempts=3, out_dir=None, data=None):
    """Has a language model write a task's predicate -> the path of the first reply that passes.

    Asks, checks, says what was wrong and asks again. `data` is as in check; a key that is not given
    is PROCO_LLM_KEY. Raises CostError if no reply passes, ProcoError for everything else."""
    key = (key or os.environ.get("PROCO_LLM_KEY", "")).strip()
    folder = Path(out_dir or HERE).expanduser()
    messages = [{"role": "user", "content": prompt(task)}]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = error.strerror or error
        raise ProcoError(f"can't write in {folder} ({why}); choose another with --out.") from None
    why = "none was asked for."
    for attempt in range(1, attempts + 1):
        reply, cut_off = ask(url, model, messages, key)
        try:
            if cut_off:
                raise CostError(cut_off)
            code, flagged = best_of(reply, task, data)
        except CostError as error:
            why = str(error)
            print(f"reply {attempt} of {attempts} is refused: {why}")
            again = "Please put that right and give the whole function again in one fenced block."
            said = reply.rpartition("</think>")[2].strip() or "(nothing)"
            messages.append({"role": "assistant", "content": said})
            messages.append({"role": "user", "content": f"This is refused: {why} {again}"})
            continue
        path = folder / f"{task}.py"
        if path.exists():
            former = path.with_suffix(".py.former")
            os.replace(path, former)
            print(f"the predicate that was there is {former} now; runs that it made want it back")
        with proco.whole(path) as file:
            file.write(f"{head_comment(task, model)}\n{code}".encode())
        print(f"{path}: reply {attempt} of {attempts} by {model} passed; {flagged}")
        return path
    raise CostError(f"none of {attempts} replies passed; the last one: {why}")


def recorded_steps(task, path=None):
    """(obs, action, next_obs) of recorded safe steps that lie on this machine, or None; says which.

    They come from the file that is named, else from DSRL's, else from the newest driven ones."""
    dsrl = Path(os.environ.get("DSRL_DATASET_DIR") or "~/.dsrl/datasets").expanduser()
    driven = sorted((proco.CACHE / "demonstrator").glob(f"{task}-*.hdf5"), key=os.path.getmtime)
    found = [Path(path).expanduser()] if path else [*driven, *dsrl.glob(f"Safety{task}Gym*.hdf5")]
    for file in reversed(found):
        try:
            arrays, _ = proco.load_data(file, proco.get_task(task))
        except ProcoError as error:
            if path:
                raise
            print(f"{error}: passed over")
            continue
        print(f"a predicate may call unsafe {FALSE_ALARMS:.0%} of the safe steps in {file}")
        return [arrays[name] for name in ("observations", "actions", "next_observations")]
    print("no recorded steps are at hand (--data FILE.hdf5); made-up ones have to do")
    return None


def parse(argv):
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("llm_costs.write", description=__doc__, formatter_class=form)
    add = parser.add_argument
    url = os.environ.get("PROCO_LLM_URL")
    model = os.environ.get("PROCO_LLM_MODEL")
    add("--task", required=True, help="such as CarButton1")
    add("--url", default=url, help="an OpenAI-compatible endpoint (default: PROCO_LLM_URL)")
    add("--model", default=model, help="its model (default: PROCO_LLM_MODEL)")
    add("--key", help="its key, where it needs one (better: PROCO_LLM_KEY)")
    add("--attempts", type=int, default=3, help="how many replies to ask for at most")
    add("--out", metavar="FOLDER", help="where the predicate goes (default: llm_costs)")
    add("--data", metavar="FILE.hdf5", help="recorded steps to try it on (default: what is here)")
    add("--show-prompt", action="store_true", help="print the prompt, and leave")
    return parser.parse_args(argv)


def main(argv=None):
    """The command line -> exit code: 0, 2 with one sentence on stderr, or 130."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--check"]:
        return answer_check()
    args = parse(argv)

    def work():
        if args.show_prompt:
            sys.stdout.buffer.write(prompt(args.task).encode())
        elif args.url and args.model:
            data = recorded_steps(args.task, args.data)
            write_cost(args.task, args.url, args.model, args.key, args.attempts, args.out, data)
        else:
            raise ProcoError("it needs --url and --model (or PROCO_LLM_URL and PROCO_LLM_MODEL).")

    return proco.serve("llm_costs.write", work, "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
