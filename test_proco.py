"""Tests of step 3's language side. (`lang` becomes `proco`.)"""
import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

import proco
from proco import (CostError, ProcoError, TASKS, compile_cost, load_cost, plausible, prompt, prompt_hash,
                  write_cost)

TASK = "PointGoal1"                                     # 60 observations, hazards lidar at 28:44
GOOD = "def cost(obs, action, next_obs, margin=0.0):\n    d = 3 * (1 - next_obs[..., 28:44].amax(-1))\n" \
       "    return (d <= 0.2 + margin).float()\n"


def body(*lines, before=""):
    """A predicate that would pass, with these lines put into it."""
    return (f"{before}\ndef cost(obs, action, next_obs, margin=0.0):\n"
            "    d = 3 * (1 - next_obs[..., 28:44].amax(-1))\n" + "".join(f"    {x}\n" for x in lines)
            + "    return (d <= 0.2 + margin).float()\n")


HOSTILE = dict(
    import_os=body("import os"), import_top=body(before="import os"),
    from_import=body(before="from torch import load"), import_as=body(before="import torch as math"),
    dunder_import=body("__import__('os').system('true')"),
    dunder_walk=body("x = ().__class__.__base__.__subclasses__()"),
    dunder_attribute=body("x = obs.__class__"), getattr_=body("x = getattr(obs, 'tofile')"),
    eval_=body("eval('1')"), exec_=body("exec('x = 1')"), open_=body("open('/tmp/x', 'w')"),
    globals_=body("x = globals()"), builtins=body("x = __builtins__"),
    torch_save=body("torch.save(obs, 'x')"), torch_load=body("x = torch.load('x')"),
    hub=body("torch.hub.load('a', 'b')"), ops=body("torch.ops.load_library('x')"),
    classes=body("torch.classes.load_library('x')"), utils=body("torch.utils.dlpack.to_dlpack(obs)"),
    torch_alias=body("t = torch", "t.save(obs, 'x')"), torch_os=body("torch.os.system('true')"),
    storage=body("obs.untyped_storage().fill_(0)"), tofile=body("obs.numpy().tofile('x')"),
    numpy=body("x = obs.numpy()"), from_file=body("x = torch.from_file('x')"),
    default_executes=body(before="def f(x=print(1)):\n    return x"),
    default_call=GOOD.replace("margin=0.0", "margin=float(1)"),
    annotation=GOOD.replace("obs, action", "obs: print(1), action"),
    result_annotation=GOOD.replace("margin=0.0):", "margin=0.0) -> print(1):"),
    variable_annotation=body("x: print(1) = 2"), decorator="@torch.jit.script\n" + GOOD,
    class_=body("class A: pass"), lambda_=body("f = lambda: 1"), while_=body("while True: pass"),
    huge_loop=body("for i in range(999999): pass"),
    nested_loops=body("for i in range(999):", "    for j in range(999):", "        for k in range(9): pass"),
    huge_power=body("x = 9 ** 999999"), power_chain=body("x = 9 ** 9 ** 9"), shift=body("x = 1 << 999999"),
    squaring=body("n = 10", *["n = n * n"] * 40), tuple_bomb=body("t = (1,)", *["t = t + t"] * 40),
    repeat_tuple=body("t = (0,) * 999999"),
    compare_bomb=body("t = (1, 1)", *["t = (t, t)"] * 30, "x = t == t"),
    range_bomb=body("x = torch.tensor(range(999999 * 9999))"), range_index=body("x = obs[range(999999 * 9999)]"),
    range_value=body("r = range", "x = obs[r(99)]"),
    tensor_bomb=body("t = (1, 1)", *["t = (t, t)"] * 30, "x = torch.tensor(t)"),
    fractions=body("x = torch.arange(0.0, 1.0, 1e-12)"),
    linspace=body("x = torch.linspace(0, 1, 999999 * 9999)"),
    shadow_meter=body(before="def _op(x, y, z):\n    return 1"),
    shadow_tick=body(before="def f(_tick):\n    return 1"),
    own_out=body(before="def f(out):\n    return torch.abs(out, out=out)"),
    double_star=body("x = torch.abs(*obs)"), linalg=body("x = torch.linalg.inv(obs)"),
    closure=body("x = load_cost.__globals__"),
    stack_bomb=body("t = (obs, obs)", *["t = (t, t)"] * 30, "x = torch.cat(t)"),
    huge_tensor=body("x = torch.zeros(99999, 99999)"), huge_arange=body("x = torch.arange(999999999999)"),
    doubling=body("x = obs", *["x = torch.cat([x, x])"] * 40), outer=body("x = obs[:, None] * obs[None]"),
    outer_index=body("x = obs[:, torch.zeros_like(obs[:, 0]).long()]"),
    expand=body("x = obs[..., :1].expand(99999, 99999)"),
    recursion=body("return f(obs)", before="def f(x):\n    return f(x)"),
    mutual=body(before="def f(x):\n    return cost(x, x, x)"),
    calls_itself=body("return cost(obs, action, next_obs)"),
    tower=body("f7(1)", before="def f0(x):\n    return x\n" + "".join(
        f"def f{i}(x):\n    for j in range(64):\n        f{i - 1}(x)\n" for i in range(1, 8))),
    write_item=body("next_obs[..., 0] = 0"), write_method=body("next_obs.add_(1)"),
    write_zero=body("obs.zero_()"), write_augmented=body("next_obs += 1"),
    write_out=body("torch.add(obs, 1, out=next_obs)"), write_data=body("obs.data = next_obs"),
    write_copy=body("obs.copy_(next_obs)"), delete=body("del obs"),
    set_threads=body("torch.set_num_threads(1)"), set_dtype=body("torch.set_default_dtype(torch.float64)"),
    set_grad=body("torch.set_grad_enabled(False)"), global_=body("global n", "n = 1"),
    with_=body("with torch.no_grad(): pass"), patch=body("torch.where = 1"),
    seed=body("torch.manual_seed(0)"), rand=body("d = d + torch.rand_like(d)"),
    randn=body("d = d + torch.randn(1)"), dropout=body("d = torch.dropout(d, 0.5, True)"),
    bernoulli=body("d = d.bernoulli()"), fstring=body("x = f'{obs}'"),
    format_=body("x = '{0.__class__}'.format(obs)"), try_=body("try: pass\n    except: pass"),
    star=body("x = torch.stack([*obs])"), item=body("x = obs.sum().item()"), walrus=body("x = (y := 1)"),
    shadow=body("torch = obs"), shadow_range=body(before="def range(x):\n    return x"),
    nested=body("def f(): return 1"), yield_=body("yield 1"), assert_=body("assert False"),
    async_=body("async def f(): pass"), match=body("match d:\n        case 1: pass"),
    top_call=body(before="print(1)"), top_torch=body(before="X = torch.zeros(3)"),
    prose="I am sorry, but I can't write that.", prose_tail=GOOD + "\nHope this helps!", empty="",
    null="\0", deep="x = " + "-" * 9000 + "1", brackets="(" * 9000, long=GOOD + "#" * 30_000,
    no_cost="def price(obs, action, next_obs, margin=0.0):\n    return obs",
    arguments=GOOD.replace("action, ", ""), no_margin=GOOD.replace("margin=0.0", "margin"),
    two_costs=GOOD + GOOD, nan=body("return d * math.nan"), nan_2=body("return d / 0 - d / 0"),
    not_01=body("return d"), boolean=body("return d <= 0.2 + margin"),
    integer=body("return (d <= 0.2 + margin).long()"), nothing=body("return None"),
    number=body("return 0.0"), wrong_shape=body("return (d <= 0.2 + margin).float().unsqueeze(-1)"),
    reduced=body("return (d <= 0.2 + margin).float().amax()"),
    batch_bound=body("return (next_obs[:, 28] > 0.9 - margin).float()"),
    mixes_rows=body("return (d <= d.mean() + margin).float()"),
    not_monotone=GOOD.replace("+ margin", "- margin"), all_safe=body("return torch.zeros_like(d)"),
    all_unsafe=body("return torch.ones_like(d)"), raises=body("x = obs[..., 999]"),
    undefined=body("x = y"), no_such=body("x = torch.wehre(obs)"))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_replies_are_refused(name, tmp_path, monkeypatch):
    """Each with one sentence, and the world is as it was."""
    monkeypatch.chdir(tmp_path)
    random, where = torch.get_rng_state(), torch.where
    state = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    with pytest.raises(CostError) as e:
        compile_cost(HOSTILE[name], TASK)
    assert len(str(e.value)) < 400 and "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == [] and torch.where is where
    assert torch.equal(random, torch.get_rng_state())
    assert state == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())


def test_what_a_plain_predicate_needs_is_allowed():
    compile_cost("import torch\nimport math\n" + GOOD, TASK)
    compile_cost('''
CORNERS = ((0.1, 0.1), (-0.1, 0.1))
RADIUS = 0.2 + 0.0 * math.sqrt(2)

def distance(bins, reach=3.0):
    """Of the nearest."""
    value, _ = bins.max(dim=-1)
    return reach * (1 - value)

def cost(obs, action, next_obs, margin=0.0):
    bins = next_obs[..., 28:44]
    i = torch.argmax(bins, dim=-1, keepdim=True)
    around = torch.cat([torch.gather(bins, -1, (i + k) % 16) for_k], dim=-1)
    angle = torch.atan2(around[..., 1], around[..., 0]) + torch.arange(16, device=obs.device)[0]
    xy = torch.stack((torch.cos(angle), torch.sin(angle)), dim=-1)
    unsafe = torch.zeros(next_obs.shape[:-1], dtype=torch.bool, device=next_obs.device)
    for x, y in CORNERS:
        unsafe = unsafe | (torch.linalg.norm(xy * 0 + x * y * 0, dim=-1) < -1)
    if margin >= 0 and bins.shape[-1] == 16:
        unsafe = unsafe | (distance(bins) <= RADIUS + margin)
    return torch.where(unsafe, torch.ones_like(angle), torch.zeros_like(angle)).to(next_obs.dtype)
'''.replace("[torch.gather(bins, -1, (i + k) % 16) for_k]",
            "[torch.gather(bins, -1, (i - 1) % 16), torch.roll(bins, 1, dims=-1).gather(-1, i)]"), TASK)


@pytest.mark.parametrize("task", TASKS)
def test_cached_predicates(task):
    """Each loads through the whitelist, was written from the prompt of today, and widens with its margin."""
    head = (proco.LLM_COSTS / f"{task}.py").read_text()
    assert re.search(r"^# prompt: (\w{16}) ", head, re.M)[1] == prompt_hash(task)
    assert re.search(r"^# model:  \S", head, re.M) and re.search(r"^# day:    \d{4}-\d\d-\d\d$", head, re.M)
    cost, batch = load_cost(task), [x.clone().requires_grad_() for x in plausible(task)]
    share = [cost(*batch, m).mean().item() for m in (0.0, 0.05, 0.2, 1.0)]
    assert share == sorted(share) and share[0] < share[-1]
    assert "{" not in prompt(task) and f"(..., {batch[0].shape[-1]})" in prompt(task)


def test_prompts_tell_facts_and_what_is_missing_is_said():
    for task in TASKS:
        text = prompt(task)
        assert task in text and ("lidar" in text) == ("Velocity" not in task)
        assert ("Gremlins" in text) == ("Button" in task) and ("Vases" in text) == ("Goal2" in task)
    assert "24 to 39: the circle lidar" in prompt("CarCircle2")
    assert "12 to 27: the circle lidar" in prompt("PointCircle2")
    with pytest.raises(CostError):
        prompt("PointFly1")
    with pytest.raises(CostError):
        load_cost("PointFly1")


def scene(task, lidars, yaw=0.0):
    """An observation in which each named lidar sees objects at (distance m, bearing degrees)."""
    obs = torch.zeros(proco.task_dims(task)[0])
    obs[9], obs[10] = -0.5 * math.sin(yaw), -0.5 * math.cos(yaw)
    for L in proco.make_lidars(task)[1]:
        for distance, bearing in lidars.get(L.name, ()):
            i, v = int(bearing % 360 // 22.5), max(0.0, 1 - distance / L.reach)
            f = bearing % 360 / 22.5 - i
            for k, value in ((i, v), (i + 1, f * v), (i - 1, (1 - f) * v)):
                obs[L.start + k % 16] = max(obs[L.start + k % 16], value)
    return obs


@pytest.mark.parametrize("task, lidars, yaw, unsafe_from", [
    ("PointGoal1", dict(hazards=[(0.19, 100)]), 0, 0),
    ("CarGoal1", dict(hazards=[(0.23, 100), (1, 3)]), 0, 0.03),
    ("PointGoal1", dict(goal=[(0.1, 0)], vases=[(0.1, 0)]), 0, 2.8),
    ("CarPush1", dict(hazards=[(0.33, 7)]), 0, 0.03),
    ("PointCircle1", dict(circle=[(1.1, 180)]), 0, 0.025),
    ("PointCircle1", dict(circle=[(1.1, 180)]), math.pi / 2, 1.125),
    ("CarCircle2", dict(circle=[(1.1, 30)]), math.radians(60), 0.025),
    ("CarCircle1", dict(circle=[(1.13, 9)]), -math.radians(9), 0), ("CarCircle1", {}, 0, 0),
    ("PointPush2", dict(pillars=[(0.40, 0)]), 0, 0.048),
    ("PointPush2", dict(pillars=[(0.40, 90)]), 0, 0.098),
    ("CarPush2", dict(pillars=[(0.40, 270)]), 0, 0.023), ("CarGoal2", dict(vases=[(0.29, 270)]), 0, 0),
    ("PointButton1", dict(buttons=[(0.15, 90), (1, 0)], goal=[(1, 0)]), 0, 0),
    ("PointButton1", dict(buttons=[(0.15, 90), (1, 0)], goal=[(0.15, 90)]), 0, 0.748),
    ("CarButton2", dict(gremlins=[(0.3, 270)]), 0, 0)])
def test_hand_computed_distances(task, lidars, yaw, unsafe_from):
    cost, obs = load_cost(task), scene(task, lidars, yaw)
    action = torch.zeros(2)
    assert unsafe_from == 0 or cost(obs, action, obs, unsafe_from - 2e-3) == 0
    assert cost(obs, action, obs, unsafe_from + 2e-3) == 1


def test_buttons_are_off_while_their_lidar_is_dark():
    cost, action = load_cost("CarButton1"), torch.zeros(2)
    on = scene("CarButton1", dict(buttons=[(0.1, 90)], goal=[(2, 0)]))
    off = scene("CarButton1", dict(goal=[(2, 0)]))
    assert [cost(a, action, b) for a, b in ((on, on), (off, on), (on, off), (off, off))] == [1, 0, 0, 0]


@pytest.mark.parametrize("task, i, limit", [("HalfCheetahVelocity", 8, 3.2096), ("HopperVelocity", 5, 0.7402),
                                            ("SwimmerVelocity", 3, 0.2282), ("Walker2dVelocity", 8, 2.3415)])
def test_speed_is_the_mean_over_the_step(task, i, limit):
    cost, (size, actions) = load_cost(task), proco.task_dims(task)
    obs, next_obs, action = torch.zeros(size), torch.zeros(size), torch.zeros(actions)
    obs[i], next_obs[i] = limit + 0.1, limit - 0.08
    assert cost(obs, action, next_obs) == 1 and cost(obs, action, 2 * next_obs - obs) == 0
    assert cost(-obs, action, -next_obs) == 0 and cost(obs, action, next_obs - 0.05) == 0
    assert cost(obs, action, next_obs - 0.05, margin=0.02) == 1


class Endpoint(BaseHTTPRequestHandler):
    """Plays a chat-completions server: gives the replies it was given and keeps what it was asked."""
    def do_POST(self):
        self.server.asked.append((self.path, dict(self.headers), json.loads(
            self.rfile.read(int(self.headers["Content-Length"])))))
        reply = self.server.replies.pop(0)
        status, text = reply if isinstance(reply, tuple) else (200, json.dumps(
            dict(choices=[dict(message=dict(role="assistant", content=reply))])))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fenced(code):
    return f"Here it is.\n```python\n{code}```\nAsk me anything."


def test_write_cost_caches_only_the_good_reply_and_says_why(endpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PROCO_LLM_KEY", "very-secret")
    endpoint.replies = [fenced(HOSTILE["import_os"]), fenced(HOSTILE["wrong_shape"]), fenced(GOOD)]
    path = write_cost(TASK, endpoint.url, "model\nx = 1", out_dir=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [f"{TASK}.py"] and path == tmp_path / f"{TASK}.py"
    text = path.read_text()
    assert GOOD in text and prompt_hash(TASK) in text and compile_cost(text, TASK)
    assert len(endpoint.asked) == 3 and all(p == "/v1/chat/completions" for p, _, _ in endpoint.asked)
    assert endpoint.asked[0][2]["messages"] == [dict(role="user", content=prompt(TASK))]
    last = endpoint.asked[2][2]["messages"]
    assert [m["role"] for m in last] == ["user", "assistant"] * 2 + ["user"]
    assert "imports" in last[2]["content"] and "shape" in last[4]["content"]
    assert endpoint.asked[0][1]["Authorization"] == "Bearer very-secret"
    assert "very-secret" not in text + capsys.readouterr().out + json.dumps([m for _, _, m in endpoint.asked])


def test_write_cost_holds_a_reply_against_recorded_safe_steps(endpoint, tmp_path):
    obs, action, next_obs = plausible(TASK)
    safe = load_cost(TASK)(obs, action, next_obs) == 0
    data = [x[safe].numpy() for x in (obs, action, next_obs)]
    shy = GOOD.replace("0.2 +", "0.9 +")
    endpoint.replies = [fenced(shy), fenced(GOOD)]
    assert "0.9 +" not in write_cost(TASK, endpoint.url, "m", out_dir=tmp_path, data=data).read_text()
    assert "recorded" in endpoint.asked[1][2]["messages"][-1]["content"]


@pytest.mark.parametrize("replies, error", [
    ([(500, "oops")], ProcoError), ([(401, "no")], ProcoError), ([(302, "")], ProcoError),
    ([(200, "not JSON")], ProcoError), ([(200, "[]")], ProcoError),
    ([(200, '{"choices": []}')], ProcoError),
    ([(200, '{"choices": [{"message": {"content": null}}]}')], ProcoError), (["no code"] * 2, CostError),
    (["x", (500, "")], ProcoError), ([fenced(HOSTILE["not_monotone"])] * 2, CostError)])
def test_write_cost_overwrites_nothing_when_it_fails(endpoint, tmp_path, replies, error):
    (tmp_path / f"{TASK}.py").write_text("before")
    endpoint.replies = list(replies)
    with pytest.raises(error) as e:
        write_cost(TASK, endpoint.url, "m", attempts=2, out_dir=tmp_path)
    assert "\n" not in str(e.value) and [p.read_text() for p in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "nonsense", "http://"])
def test_write_cost_with_nobody_there(url, tmp_path):
    with pytest.raises(ProcoError, match="no language model answers"):
        write_cost(TASK, url, "m", out_dir=tmp_path, key="very-secret")
    with pytest.raises(ProcoError) as e:
        write_cost(TASK, url, "m", out_dir=tmp_path, key="very\nsecret")
    assert "secret" not in str(e.value)
