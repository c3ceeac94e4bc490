"""The language side of step 3: what a language model is told, and the fence around the code that it answers with.
Used through proco.prompt, compile_cost, load_cost and write_cost; `task` is a proco.Task throughout.

A predicate passes a whitelist over the syntax tree, runs under a meter on every operation, and has to behave on
made-up steps. The walls are thick: it comes from a language model, and some day from a file that somebody sent."""
import ast
import datetime
import hashlib
import math
import operator
import os
import re
import time
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent


class ProcoError(Exception):
    """Something a user can put right; the message is one sentence that says how."""


class CostError(ProcoError):
    """A cost predicate is refused; the message says in one sentence why (a language model reads it, too)."""


# What a predicate may say. Everything else is refused, so that harm would have to be built out of these.
NODES = set("""Module FunctionDef arguments arg Return Assign For If IfExp Expr Pass Constant Name Load
    Store Tuple List Subscript Slice Attribute Call keyword BinOp UnaryOp BoolOp Compare Add Sub Mult Div
    FloorDiv Mod Pow BitAnd BitOr BitXor And Or Not USub UAdd Invert Lt LtE Gt GtE Eq NotEq Is IsNot Break
    Continue""".split())
SHARED = set("""abs acos all amax amin any argmax argmin argsort asin atan atan2 ceil chunk clamp clip cos
    cumsum div eq exp flatten flip floor fmod gather ge gt hypot isfinite isnan le log logical_and
    logical_not logical_or logical_xor lt max maximum mean min minimum movedim mul nan_to_num narrow ne neg
    norm permute pow prod relu remainder reshape roll round select sigmoid sign sin sort split sqrt square
    squeeze sub add sum tan tanh topk transpose unbind unsqueeze where""".split())       # torch.f(x), x.f()
TORCH = SHARED | set("""arange arctan2 as_tensor bool cat concat deg2rad float float32 float64 full
    full_like inf int32 int64 linalg linspace long ones ones_like pi rad2deg stack take_along_dim tensor
    zeros zeros_like""".split())
METHODS = SHARED | set("""bool device dim double dtype expand expand_as float int long ndim new_ones
    new_zeros numel shape size to type_as unflatten view""".split())
ALLOWED = {"torch": TORCH, "torch.linalg": {"norm", "vector_norm"}, "math": set(
    "acos asin atan atan2 ceil cos degrees exp floor hypot inf log pi radians sin sqrt tan tau".split())}
KEYWORDS = set("""descending device dim dims dtype fill_value index k keepdim margin max min ord other
    shifts size""".split())
BUILTINS = dict(range=range, len=len, abs=abs, float=float, int=int, bool=bool)
OPERATORS = dict(Add=operator.add, Sub=operator.sub, Mult=operator.mul, Div=operator.truediv,
                 Mod=operator.mod, FloorDiv=operator.floordiv, Pow=operator.pow, BitAnd=operator.and_,
                 BitOr=operator.or_, BitXor=operator.xor)
GROWERS = set("zeros ones full arange linspace expand new_zeros new_ones".split())    # size from a number
ADVICE = dict(AugAssign="assigns in place (write x = x + y)", While="has a while loop (a for loop is fine)",
              Import="imports (torch and math are there)", ImportFrom="imports (torch and math are there)",
              ListComp="has a comprehension", GeneratorExp="has a comprehension")


def check_syntax(tree):
    """Raises CostError unless every node of a module is of a kind that a harmless predicate needs."""
    def need(fine, node, why):
        if not fine:
            raise CostError((f"line {node.lineno} " if hasattr(node, "lineno") else "it ") + why[:200] + ".")

    functions, names, owners = [], set(), set()
    for node in ast.walk(tree):                                     # the names that the file itself makes
        kind = type(node).__name__
        need(kind in NODES, node, ADVICE.get(kind, f"holds a {kind}, which no predicate needs"))
        if kind == "arg" or kind == "Name" and isinstance(node.ctx, ast.Store):
            names.add(node.arg if kind == "arg" else node.id)
        elif kind in ("Attribute", "For"):
            owners.add(id(node.value if kind == "Attribute" else node.iter))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            need(not (node.decorator_list or node.returns), node, "has a decorator or an annotation")
            for call in ast.walk(node):                             # only what stands above: no recursion
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                    need(call.func.id in {*functions, *BUILTINS}, call,
                         f"calls {call.func.id}, which is neither allowed nor defined above")
            need(node.name not in {*functions, *names}, node, f"gives the name {node.name} to something else")
            functions.append(node.name)
        else:
            need(isinstance(node, ast.Assign) and "torch" not in ast.unparse(node), node,
                 "stands outside the functions and is not a constant")
    for name in {*names, *functions}:
        need(name not in ("torch", "math", *BUILTINS) and (name == "_" or name[0] != "_"), tree,
             f"gives the name {name} to something of its own")
    for node in ast.walk(tree):
        kind = type(node).__name__
        if kind == "FunctionDef":
            need(node in tree.body, node, "nests a function")
        elif kind == "arg":
            need(not node.annotation, node, "annotates an argument")
        elif kind == "arguments":
            need(not (node.vararg or node.kwarg or node.kwonlyargs or node.posonlyargs) and all(
                isinstance(d, ast.Constant) for d in node.defaults), node, "has other than plain arguments")
        elif kind == "Assign":
            need(all(isinstance(part, (ast.Name, ast.Tuple, ast.Store)) for target in node.targets
                     for part in ast.walk(target)), node, "writes into a tensor or an object")
        elif kind == "Constant":
            need(node.value is None or node.value is Ellipsis or isinstance(node.value, float)
                 or isinstance(node.value, int) and node.value < 1e6, node, "holds a string or an odd number")
        elif kind == "Name" and node.id in ("torch", "math"):
            need(id(node) in owners, node, f"passes {node.id} on as a value")
        elif kind == "Name":
            need(node.id in {*names, *functions, *BUILTINS}, node, f"uses {node.id}, which nothing defines")
        elif kind == "Attribute":
            owner = ast.unparse(node.value)
            need(node.attr in ALLOWED.get(owner, METHODS), node, f"uses {owner}.{node.attr} (not allowed)")
        elif kind == "Call":
            own = isinstance(node.func, ast.Name)
            need(own or isinstance(node.func, ast.Attribute), node, "calls something that has no name")
            need(not own or node.func.id != "range" or id(node) in owners, node, "has a range outside a for")
            for word in node.keywords:
                need(word.arg in KEYWORDS or own and word.arg, node, f"uses the keyword {word.arg}")
        elif kind == "For":
            need(not node.orelse and isinstance(node.iter, (ast.Call, ast.Tuple, ast.List, ast.Name)), node,
                 "loops over something else than a range or a tuple")
    found = [[a.arg for a in f.args.args] for f in tree.body if isinstance(f, ast.FunctionDef)
             and f.name == "cost" and len(f.args.defaults) == 1]
    if found != [["obs", "action", "next_obs", "margin"]]:
        raise CostError("there is no function cost(obs, action, next_obs, margin=0.0).")


class Fence(ast.NodeTransformer):
    """Puts under a meter what syntax can't bound: Python's own arithmetic (twenty squarings make a number of
    a million digits), comparisons, loops and calls."""

    def call(self, name, *args):
        return ast.Call(ast.Name(name, ast.Load()), list(args), [])

    def visit_BinOp(self, node):
        self.generic_visit(node)
        return self.call("_op", ast.Constant(type(node.op).__name__), node.left, node.right)

    def visit_Compare(self, node):
        self.generic_visit(node)
        return ast.Compare(self.call("_number", node.left), node.ops,
                           [self.call("_number", x) for x in node.comparators])

    def visit_For(self, node):
        self.generic_visit(node)
        node.body.insert(0, ast.Expr(self.call("_tick")))
        return node

    visit_FunctionDef = visit_For


class Meter(torch.overrides.TorchFunctionMode):
    """While it is on, torch calls are counted and their operands weighed before they run: no predicate can
    make a tensor of more than 64 times the size of its observations, nor run without end."""

    def start(self, numbers, seconds):
        self.left, self.room, self.end = 2000, 64 * max(numbers, 1024), time.monotonic() + seconds

    def tick(self):
        self.left -= 1
        if self.left < 0 or time.monotonic() > self.end:
            raise CostError("it does more work than a predicate needs.")

    def number(self, x):
        if not isinstance(x, (torch.Tensor, int, float, type(None))) or type(x) is int and abs(x) > 2 ** 40:
            raise CostError("it computes with something other than tensors and moderate numbers.")
        return x

    def op(self, name, a, b):
        if name == "Add" and isinstance(a, tuple) and isinstance(b, tuple) and len(a) + len(b) < 16:
            return a + b                                            # obs.shape[:-1] + (16,)
        if name == "Pow" and not isinstance(b, torch.Tensor) and abs(self.number(b)) > 16:
            raise CostError("it raises to a huge power.")
        return self.number(OPERATORS[name](self.number(a), self.number(b)))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.tick()
        stack, shapes, ints, name = [*args, *(kwargs or {}).values()], [], 1, func.__name__
        for x in stack:                                             # grows while it is walked
            if isinstance(x, torch.Tensor):
                shapes.append(x.shape)
            elif isinstance(x, (tuple, list)):
                stack.extend(x)
                if len(stack) > 1000:
                    raise CostError("it nests its tuples too deep.")
            elif isinstance(x, int):
                ints *= max(abs(x), 1)
            elif isinstance(x, float) and name == "arange":
                raise CostError("it counts in fractions (arange takes whole numbers here).")
        sizes = [shape.numel() for shape in shapes]
        weight = max(sum(sizes), ints if name in GROWERS else 0)
        if name == "__getitem__":                                   # x[:, index] is as large as their product
            weight = max(weight, math.prod(sizes))
        elif len(set(shapes)) > 1 and name not in ("cat", "concat", "gather"):              # broadcasting
            ends = zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1)
            weight = max(weight, math.prod(max(dims) for dims in ends))
        if weight > self.room:
            raise CostError("it makes a huge tensor.")
        return func(*args, **(kwargs or {}))


def fence_in(text, name):
    """A predicate's source -> cost(obs, action, next_obs, margin=0.0, seconds=inf), its function `cost` under the
    meter. Nothing of it runs before its syntax has passed. Raises CostError, then and later."""
    if len(text) > 20_000:
        raise CostError("it is too long.")
    try:
        tree = ast.parse(text)
        tree.body = [n for n in tree.body if ast.unparse(n) not in ("import torch", "import math")]
        for owner in [tree, *(n for n in tree.body if isinstance(n, ast.FunctionDef))]:
            if ast.get_docstring(owner) is not None:
                owner.body = owner.body[1:] or [ast.Pass()]
        check_syntax(tree)
        code = compile(ast.fix_missing_locations(Fence().visit(tree)), f"<cost of {name}>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise CostError(f"it is not Python: {getattr(e, 'msg', '') or type(e).__name__}.") from None
    meter = Meter()
    scope = dict(BUILTINS, __builtins__={}, torch=torch, math=math,
                 _op=meter.op, _number=meter.number, _tick=meter.tick)

    def run(call, numbers, seconds):
        meter.start(numbers, seconds)
        try:
            with torch.no_grad(), meter:
                return call()
        except CostError:
            raise
        except Exception as e:
            raise CostError(f"it raises {type(e).__name__}: {str(e)[:200].partition(chr(10))[0]}.") from e

    run(lambda: exec(code, scope), 1, 1.0)
    return lambda obs, action, next_obs, margin=0.0, seconds=math.inf: run(
        lambda: scope["cost"](obs, action, next_obs, margin), next_obs.numel(), seconds)

def compile_cost(text, task, data=None):
    """What proco.compile_cost says."""
    cost = fence_in(text, task.name)
    check_behaviour(cost, plausible(task))
    if data is not None:
        check_behaviour(cost, [torch.as_tensor(np.asarray(x), dtype=torch.float32) for x in data], both=False)
    return cost


def plausible(task, rows=512):
    """Made-up (obs, action, next_obs) to try a predicate on: sensors at random (yaw as a magnetometer shows
    it), every lidar with up to four objects at any distance, now and then one that sees nothing."""
    rng = np.random.default_rng(0)
    obs = rng.normal(0, 3, (2, rows, task.obs_dim))
    if task.lidars:
        yaw = rng.uniform(-np.pi, np.pi, (2, rows))
        obs[..., 9], obs[..., 10] = -0.5 * np.sin(yaw), -0.5 * np.cos(yaw)
        for L in task.lidars:
            near = np.clip(1 - rng.uniform(0, 1.5, (2, rows, 4, 1)), 0, 1)
            near = near * (rng.random((2, rows, 1, 1)) < 0.9)
            off = (np.arange(16) - rng.uniform(0, 16, (2, rows, 4, 1)) + 8) % 16 - 8
            obs[..., L.start:L.start + 16] = (near * np.clip(np.minimum(2 + off, 1 - off), 0, 1)).max(2)
    obs = torch.as_tensor(obs, dtype=torch.float32)
    return obs[0], torch.as_tensor(rng.uniform(-1, 1, (rows, task.act_dim)), dtype=torch.float32), obs[1]


def check_behaviour(cost, batch, both=True):
    """Raises CostError unless the predicate is a function from each row to 0 or 1, monotone in its margin;
    with `both`, unless it says each of them at least once."""
    before, last, seen = [x.clone() for x in batch], None, []
    for margin in (0.0, 0.02, 0.05, 0.1, 0.3):
        c = cost(*batch, margin, seconds=5.0)
        if not isinstance(c, torch.Tensor) or c.shape != batch[0].shape[:-1]:
            shape = tuple(c.shape) if isinstance(c, torch.Tensor) else type(c).__name__
            raise CostError(f"it returns {shape} for observations of shape {tuple(batch[0].shape)}, "
                            "not their batch shape.")
        if not c.is_floating_point() or c.device != batch[0].device or not ((c == 0) | (c == 1)).all():
            raise CostError("it returns something other than 0. and 1. in float on its inputs' device.")
        if last is not None and (c < last).any():
            raise CostError("a wider margin calls something safe that a narrower one calls unsafe.")
        last, seen = c, seen + [c]
        if not torch.equal(c, cost(*batch, margin)):
            raise CostError("it answers the same question differently the second time.")
    for shape in ((), (7,), (3, 5))[:3 if len(batch[0]) >= 15 else 1]:
        few = [x[:math.prod(shape)].reshape(*shape, -1) for x in batch]
        c = cost(*few, 0.0, seconds=1.0)
        if not isinstance(c, torch.Tensor) or c.shape != shape or (c.flatten() != seen[0][:c.numel()]).any():
            raise CostError(f"for a batch of shape {shape} it answers otherwise than row by row.")
    if not all(torch.equal(x, y) for x, y in zip(batch, before)):
        raise CostError("it changes its inputs.")
    if both and not (seen[-1].any() and not seen[0].all()):
        raise CostError("it says the same of everything.")


def prompt(task):
    """(task: proco.Task) What a language model is told: the template and the paragraphs of KNOWLEDGE.md of whose heading a word
    is found in the task's name. Where the lidars lie comes from the table that the encoder uses."""
    pieces = re.split(r"^## (.+)$", (HERE / "KNOWLEDGE.md").read_text(), flags=re.M)[1:]
    told = [body.strip() for words, body in zip(pieces[::2], pieces[1::2])
            if any(re.search(word.strip(), task.name) for word in words.split(","))]
    layout = "\n".join(f"* {L.start} to {L.start + 15}: the {L.name} lidar, MAX = {L.reach:g} m"
                       for L in task.lidars)
    text = (HERE / "PROMPT.md").read_text().replace("{knowledge}", "\n\n".join(told))
    return (text.replace("{lidars}", layout).replace("{task}", task.name).replace("{obs_dim}", str(task.obs_dim))
            .replace("{act_dim}", str(task.act_dim)))


def prompt_hash(task):
    """The first 16 hexadecimal digits of the prompt's SHA-256."""
    return hashlib.sha256(prompt(task).encode()).hexdigest()[:16]


def cost_head(task, model, day=None):
    """The comment at the head of a cached predicate."""
    model = re.sub(r"[^\w.:/@ -]", "?", model)[:100]
    return ("# Written by a language model from the prompt with the hash below.\n"
            f"# model:  {model}\n# day:    {day or datetime.date.today()}\n"
            f"# prompt: {prompt_hash(task)} (SHA-256 of proco.prompt(\"{task.name}\"), first 16 digits)\n")


def ask(url, model, messages, key):
    """The text of an OpenAI-compatible endpoint's next message, or ProcoError. The key goes into the header
    of the request and nowhere else, so no message here quotes an exception's text."""
    import requests
    try:
        reply = requests.post(url.rstrip("/") + "/chat/completions", timeout=(10, 300), allow_redirects=False,
                              json=dict(model=model, messages=messages, stream=False),
                              headers={"Authorization": f"Bearer {key}"} if key else {})
    except (requests.RequestException, ValueError) as e:
        raise ProcoError(f"no language model answers at {url} ({type(e).__name__}).") from None
    if reply.status_code != 200:
        raise ProcoError(f"the language model's server at {url} answers with status {reply.status_code}.")
    try:
        text = reply.json()["choices"][0]["message"]["content"]
        return text + ""                                            # a string, or TypeError
    except (ValueError, LookupError, TypeError):
        raise ProcoError(f"what {url} answers is not a chat completion in JSON.") from None


def write_cost(task, url, model, key=None, attempts=3, out_dir=None, data=None):
    """Has a language model write a task's predicate: asks, checks, says what was wrong and asks again, and
    caches the first reply that passes. `data` is (obs, action, next_obs) of recorded safe steps, of which a
    predicate may flag 1%. Returns the path; ProcoError, CostError."""
    key = key or os.environ.get("PROCO_LLM_KEY")
    messages, why = [dict(role="user", content=prompt(task))], "none was asked for."
    if data is not None:
        every = max(1, len(data[0]) // 20_000)
        data = [torch.as_tensor(np.asarray(x[::every]), dtype=torch.float32) for x in data]
    for attempt in range(1, attempts + 1):
        reply = ask(url, model, messages, key)
        blocks = [b for b in re.findall(r"```[^\n`]*\n(.*?)```", reply, flags=re.S) if "def cost" in b]
        try:
            if not blocks:
                raise CostError("there is no fenced block with a function cost in the reply.")
            cost = compile_cost(blocks[-1], task, data)
            card, margins = "", (0.0, 0.05)
            for what, steps in (("made-up", plausible(task)), ("recorded safe", data)):
                shares = [cost(*steps, m).mean().item() for m in margins] if steps is not None else []
                card += "".join(f" {x:.2%} of {what} steps at margin {m}," for x, m in zip(shares, margins))
            if data is not None and shares[0] > 0.01:
                raise CostError(f"it calls {shares[0]:.1%} of the recorded safe steps unsafe.")
        except CostError as e:
            why = str(e)
            print(f"reply {attempt} of {attempts} is refused: {why}")
            messages += [dict(role="assistant", content=reply),
                         dict(role="user", content=f"This is refused: {why} Please put that right and give "
                                                   "the whole function again in one fenced block.")]
            continue
        path = Path(out_dir or HERE) / f"{task.name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(cost_head(task, model) + "\n" + blocks[-1].strip() + "\n")
        os.replace(part, path)                                      # whole or not at all
        print(f"{path}: reply {attempt} of {attempts} by {model} passed; it calls unsafe{card[:-1]}.")
        return path
    raise CostError(f"none of {attempts} replies passed; the last one: {why}")
