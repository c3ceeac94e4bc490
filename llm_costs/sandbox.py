"""The fence around code by a stranger: what a cost predicate may say and do. Used by proco.compile_cost alone.

First a whitelist over the syntax tree, then a meter on every operation while it runs. The walls are thick since a
predicate comes from a language model, and some day from a file that somebody sent."""
import ast
import math
import operator
import time
from itertools import zip_longest

import torch


class Refused(Exception):
    """Why a predicate is refused, in one sentence (a language model reads it, too)."""


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
    """Raises Refused unless every node of a module is of a kind that a harmless predicate needs."""
    def need(fine, node, why):
        if not fine:
            raise Refused((f"line {node.lineno} " if hasattr(node, "lineno") else "it ") + why[:200] + ".")

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
        raise Refused("there is no function cost(obs, action, next_obs, margin=0.0).")


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
            raise Refused("it does more work than a predicate needs.")

    def number(self, x):
        if not isinstance(x, (torch.Tensor, int, float, type(None))) or type(x) is int and abs(x) > 2 ** 40:
            raise Refused("it computes with something other than tensors and moderate numbers.")
        return x

    def op(self, name, a, b):
        if name == "Add" and isinstance(a, tuple) and isinstance(b, tuple) and len(a) + len(b) < 16:
            return a + b                                            # obs.shape[:-1] + (16,)
        if name == "Pow" and not isinstance(b, torch.Tensor) and abs(self.number(b)) > 16:
            raise Refused("it raises to a huge power.")
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
                    raise Refused("it nests its tuples too deep.")
            elif isinstance(x, int):
                ints *= max(abs(x), 1)
            elif isinstance(x, float) and name == "arange":
                raise Refused("it counts in fractions (arange takes whole numbers here).")
        sizes = [shape.numel() for shape in shapes]
        weight = max(sum(sizes), ints if name in GROWERS else 0)
        if name == "__getitem__":                                   # x[:, index] is as large as their product
            weight = max(weight, math.prod(sizes))
        elif len(set(shapes)) > 1 and name not in ("cat", "concat", "gather"):              # broadcasting
            ends = zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1)
            weight = max(weight, math.prod(max(dims) for dims in ends))
        if weight > self.room:
            raise Refused("it makes a huge tensor.")
        return func(*args, **(kwargs or {}))


def fence_in(text, name):
    """A predicate's source -> guarded(obs, action, next_obs, margin, seconds), its function `cost` under the meter.
    Nothing of it runs before its syntax has passed. Raises Refused, then and later."""
    if len(text) > 20_000:
        raise Refused("it is too long.")
    try:
        tree = ast.parse(text)
        tree.body = [n for n in tree.body if ast.unparse(n) not in ("import torch", "import math")]
        for owner in [tree, *(n for n in tree.body if isinstance(n, ast.FunctionDef))]:
            if ast.get_docstring(owner) is not None:
                owner.body = owner.body[1:] or [ast.Pass()]
        check_syntax(tree)
        code = compile(ast.fix_missing_locations(Fence().visit(tree)), f"<cost of {name}>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise Refused(f"it is not Python: {getattr(e, 'msg', '') or type(e).__name__}.") from None
    meter = Meter()
    scope = dict(BUILTINS, __builtins__={}, torch=torch, math=math,
                 _op=meter.op, _number=meter.number, _tick=meter.tick)

    def run(call, numbers, seconds):
        meter.start(numbers, seconds)
        try:
            with torch.no_grad(), meter:
                return call()
        except Refused:
            raise
        except Exception as e:
            raise Refused(f"it raises {type(e).__name__}: {str(e)[:200].partition(chr(10))[0]}.") from e

    run(lambda: exec(code, scope), 1, 1.0)
    return lambda obs, action, next_obs, margin, seconds: run(
        lambda: scope["cost"](obs, action, next_obs, margin), next_obs.numel(), seconds)
